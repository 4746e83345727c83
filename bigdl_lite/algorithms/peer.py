"""The seam of every method without a common meeting point.

    Round(local, combine, advance, peer=...)

        local     on a worker, talks to nobody        batches of one share -> Update
        peer      instead of combine and exchange     whom this worker talks to, when, and what becomes of its weights
        advance   the optimizer, on whatever slice of the weights the peer gives it

Each worker has weights of its own, all n of them. Nobody waits for everybody in a step: what workers have to say about their
steps (loss, rows, seconds) is told later, in a report every few steps. What a fit returns is the mean of the weights.

A worker's update is a sum over its rows; the gradient of a step is that sum divided by the mean number of rows of a worker, so
that the uniform mean over workers is the mean over rows, as in every other method, however rows are shared out.

    n  length of the flat weights      p  workers
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from bigdl_lite.algorithms.algorithm import Advance, DurableAdvancer, State, Update
from bigdl_lite.algorithms.exchange import is_finite
from bigdl_lite.comm.comm import Collectives
from bigdl_lite.errors import DivergedError
from bigdl_lite.model.layout import Blueprint
from bigdl_lite.model.replica import Replica


class Moment(NamedTuple):
    """One step. rows[r]: of rank r in it. seed: of the step, the same on all ranks."""

    step: int
    rows: Sequence[int]
    seed: int

    def scaled(self, update: Update, rank: int) -> Update:
        """The update over the mean number of rows of a worker: what step() then divides by is 1. Changes the vector."""
        total = sum(self.rows)
        by = self.rows[rank] * len(self.rows) / (total * update.weight) if total and update.weight else 0.0
        return Update(update.vector.mul_(by), 1.0)


@dataclass(frozen=True)
class Here:
    """What a living peer is given.

    replica   the module; the peer alone writes replica.weights [n], from step() and from no other thread
    comm      to all ranks; nothing else uses it. inline: whether it may only be used from the thread of step(), because ranks are
              threads that take turns
    reach     (store, host): where doors of its own may be opened, and how others find them; None where ranks are threads
    weighs    whether some rank's loss divides by something else than its rows
    first     the first step of this run
    """

    blueprint: Blueprint
    replica: Replica
    advance: Advance
    comm: Collectives
    inline: bool
    reach: Any
    weighs: bool
    first: int
    deadline: float


class Peering(Protocol):
    """The living half of a Peer, on one rank."""

    advancer: DurableAdvancer  # of this rank's weights, or of the slice that it owns

    def begin(self, now: Moment) -> None:
        """Before the local work of a step: what may travel while it computes."""
        ...

    def step(self, update: Update, now: Moment) -> int:
        """Takes this rank's update, and moves its weights. Returns the number of its next step, most often now.step + 1."""
        ...

    def settle(self) -> dict[str, Any]:
        """Before a report: nothing of this rank is under way when it returns. What it says becomes part of the epoch's line."""
        ...

    def finish(self) -> None:
        """After the last step: brings in what has not been applied yet."""
        ...

    @property
    def bytes_sent(self) -> int: ...

    def own(self) -> State:
        """What this rank must have to go on, its weights and its optimizer's state apart. Names begin with "exchange/"."""
        ...

    def restore(self, own: State) -> None: ...

    def close(self) -> None:
        """Ends threads and doors, also after an error; may be called twice."""
        ...


class Peer(Protocol):
    alike: bool  # whether all ranks have the same bits at a report
    every: int  # steps between reports; 0: only at the ends of epochs
    keeps: bool  # whether its fits can be saved and gone on with
    threads: bool  # whether ranks must live side by side, each in a process of its own: not in the local engine

    def prepared(self, blueprint: Blueprint, replica: Replica, advance: Advance, p: int) -> Peer:
        """The peer that p ranks get, with what need be computed only once; on the driver, before any job.

        Raises RecipeError where it cannot work with this module, optimizer or number of workers.
        """
        ...

    def start(self, here: Here) -> Peering: ...


def require_finite(x: Tensor, what: str, rank: int, step: int) -> None:
    """Raises DivergedError: others would take it in, and a codec might make numbers of what is none."""
    if not is_finite(x):
        raise DivergedError(
            f"the {what} of rank {rank} is not finite in step {step}; lower the learning rate, clip gradients, or look at its rows"
        )


def distance(weights: Tensor, mean: Tensor) -> float:
    """The squared distance of this rank's weights [n] from the mean of all.  Cost: one pass; nothing of length n is allocated."""
    step, total = 1 << 20, 0.0
    for at in range(0, len(mean), step):
        total += float(torch.linalg.vector_norm(weights[at : at + step] - mean[at : at + step], dtype=torch.float64)) ** 2
    return total
