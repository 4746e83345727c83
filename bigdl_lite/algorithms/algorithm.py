"""The seams of every method that has a meeting point.

    Round(local, combine, advance, exchange)

        local     on a worker, talks to nobody        batches of one share  -> Update
        combine   on the owner of a slice             updates, in rank order -> Update
        exchange  instead of combine                  how updates travel, and are summed, perhaps only nearly (exchange.py)
        advance   on the server side, slice by slice  weights, Update        -> weights

A method is a value made of these values, never a class of its own; a famous name is one row of the catalogue.
Transport and arithmetic keep apart: combine returns the sum over rows with its weight, and advance divides, once.

    n  length of the flat weights      m  values of the buffers      p  ranks
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from bigdl_lite.batch import Batch
from bigdl_lite.errors import CheckpointError
from bigdl_lite.model.replica import Replica
from bigdl_lite.vector import Cut


@dataclass(frozen=True)
class Update:
    """vector [k]: a sum over rows of total weight `weight`, which is their number unless the loss weighs them."""

    vector: Tensor
    weight: float


@dataclass(frozen=True)
class Side:
    """The small things that travel beside an update: not sliced, never compressed, known to all ranks.

    weight is that of the update; loss is summed over it; compute_s and data_s are this rank's seconds; buffers [m] float64
    after the local work.
    """

    rank: int
    rows: int
    weight: float
    loss: float
    compute_s: float
    data_s: float
    buffers: Tensor


class Work(NamedTuple):
    """One round on one worker. seed: of its random numbers. rates: the learning rate of each parameter group, at the server.

    rank and step only tell which one it is: what is computed may not depend on them, but time may (bigdl_lite.testing).
    """

    seed: int
    epoch: int
    rates: Sequence[float]
    rank: int = 0
    step: int = 0


class Local(Protocol):
    """What a worker does between two meetings. Deterministic in (weights, batches, work): a retried task repeats it."""

    moves: bool  # whether it changes replica.weights: then each worker has weights of its own, the server's at the start of a round

    def batches(self, epoch: int) -> int:
        """Batches of this epoch that one round takes; the last round of an epoch takes what is left."""
        ...

    def __call__(self, replica: Replica, batches: Sequence[Batch], work: Work) -> tuple[Update, float]:
        """The update, and the loss summed over the rows. May return replica.gradient itself: it is not kept."""
        ...


class Combine(Protocol):
    linear: bool  # a sum of sums is a sum: nodes may combine before they exchange

    def __call__(self, updates: Sequence[Update]) -> Update:
        """The updates of one slice, in rank order, to one. May overwrite updates[0].vector."""
        ...


class Advancer(Protocol):
    """The living half of an Advance: it owns the optimizer state of one slice."""

    def measure(self, update: Update) -> float:
        """This slice's part of a sum that step needs over all slices (a squared norm); 0.0 where it needs none."""
        ...

    def step(self, update: Update, measured: float) -> None:
        """Advances the slice of the weights in place. measured is the sum of measure() over all slices."""
        ...

    def end_epoch(self, loss: float) -> None: ...

    def rates(self) -> list[float]:
        """The learning rate of each parameter group, now."""
        ...


class Advance(Protocol):
    measures: bool  # whether measure() must be summed over the owners before step()

    def cuts(self, replica: Replica, p: int) -> list[Cut]:
        """Where replica.weights [n] may be cut for p owners."""
        ...

    def start(self, replica: Replica, cut: Cut) -> Advancer:
        """The advancer of replica.weights[cut]."""
        ...

    def check(self, replica: Replica) -> None:
        """Raises RecipeError where start() would fail; called once on the driver, before any job."""
        ...


class State(NamedTuple):
    """What a server side knows beside the weights, as plain data: what is large as tensors by name, all else as facts.

    Names begin with "optimizer/", so that the tensors can lie beside others; facts are as to_json takes them (data/manifest.py).
    """

    tensors: dict[str, Tensor]
    facts: dict[str, Any]


class DurableAdvancer(Advancer, Protocol):
    """An advancer that can be saved and put back."""

    def state(self) -> State:
        """The state of this slice. Its tensors share memory with it: they count until the next step(). Its facts are copies."""
        ...

    def restore(self, state: State) -> None:
        """Puts back what Durable.join made, before the first step, whatever the cuts were that it was taken from.

        Copies its part of the tensors, which other advancers may read at the same time. Raises CheckpointError where the
        state is not one of this method and these weights.
        """
        ...


class Durable(Advance, Protocol):
    """An Advance whose fits can be saved. One without these methods trains as well; it only has no checkpoints."""

    def start(self, replica: Replica, cut: Cut) -> DurableAdvancer: ...

    def check_state(self, replica: Replica, saved: State | None = None) -> None:
        """Raises CheckpointError where the state could not be saved, or where `saved` could not be put back.

        Called once on the driver, before any job.
        """
        ...

    def join(self, states: Iterable[State]) -> State:
        """The states of all owners, in any order, as one that no longer knows of the cuts. It shares no memory with them."""
        ...


def durable(advance: Advance) -> Durable:
    """The advance itself. Raises CheckpointError where its fits cannot be saved."""
    missing = [name for name in ("check_state", "join") if not callable(getattr(advance, name, None))]
    if missing:
        raise CheckpointError(
            f"{type(advance).__name__} cannot be saved: it has no {' and no '.join(missing)} (see Durable in "
            "bigdl_lite.algorithms); add them, or fit without checkpoints"
        )
    return cast(Durable, advance)


@dataclass(frozen=True)
class Round:
    """exchange  an algorithms.exchange.Exchange; None: updates travel and are combined as they are
    peer      an algorithms.peer.Peer, in place of combine and exchange: there is no common meeting point
    """

    local: Local
    combine: Combine
    advance: Advance
    exchange: Any = None
    peer: Any = None


def merge_buffers(sides: Sequence[Side]) -> Tensor:
    """One rule for buffers, in all engines: the mean over ranks, weighted by their rows, after every round.

    A value that all ranks with rows agree on stays what it is, to the bit (constants, counters).  [m] float64
    """
    found = [side for side in sides if side.rows] or list(sides)[:1]
    first = found[0].buffers
    if len(found) == 1 or not len(first):
        return first
    stacked = torch.stack([side.buffers for side in found])  # [p, m]
    rows = torch.tensor([float(side.rows) for side in found], dtype=torch.float64)
    mean = (stacked * rows[:, None]).sum(0) / rows.sum()
    return torch.where((stacked == first).all(0), first, mean)
