"""Recipe: all that an executor must know. Outcome: all that a fit gives back.

    n  flat weights      m  values of the buffers
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
from torch import Tensor

from bigdl_lite.algorithms import Round, State
from bigdl_lite.batch import quotas
from bigdl_lite.data.columns import Columns
from bigdl_lite.engine.watch import Watch
from bigdl_lite.errors import CheckpointError, DataError, RecipeError
from bigdl_lite.model.batchnorm import SyncBatchNorm
from bigdl_lite.model.layout import Blueprint
from bigdl_lite.model.loss import Loss
from bigdl_lite.model.replica import Compute

# {"start": {"steps", "epochs", "rows"}}, then the lines of the history as they come
Event = Mapping[str, Any]
Observer = Callable[[Event], None]


def silent(event: Event) -> None:
    """The observer that looks away."""


class Position(NamedTuple):
    """A moment between two steps: steps done in all, the epoch of the next one, and the steps of that epoch already done."""

    step: int
    epoch: int
    at: int


@dataclass(frozen=True)
class Saving:
    """Checkpoints after every `interval` steps or epochs (unit "step" or "epoch"), and after the last step."""

    interval: int
    unit: str = "epoch"

    def __post_init__(self) -> None:
        if self.interval < 1:
            raise RecipeError(f"checkpointInterval is {self.interval}, must be at least 1")
        if self.unit not in ("step", "epoch"):
            raise RecipeError(f"checkpointUnit is {self.unit!r}, must be 'step' or 'epoch'")

    def due(self, now: Position, epochs: int) -> bool:
        if now.epoch == epochs:
            return True
        return now.step % self.interval == 0 if self.unit == "step" else now.at == 0 and now.epoch % self.interval == 0


@dataclass(frozen=True)
class Recipe:
    """What to train and how; nothing of where. It travels to every executor once, without the weights.

    batch_size   rows of one step over all workers
    deadline     seconds that any wait between ranks may take before it is an error
    saving       when checkpoints are due; None: never
    recovery     seconds between the states that the barrier engine keeps to go on from after a loss; inf: none
    recoveries   losses after which a fit gives up
    hierarchical with an exchange, whether the ranks of a node sum in memory first and are one peer; else each rank is a peer
    log_interval a step is kept in the history where step % log_interval == 0 (epochs always are)
    compute      how a worker computes its part of a step
    watch        rows held out, metrics, and when it is enough
    limit        batches of an epoch at most, for a dry run; None: all
    device       where workers compute: "auto", "cpu" or "cuda" (see device.py)
    """

    blueprint: Blueprint
    loss: Loss
    round: Round
    columns: Columns
    num_workers: int
    batch_size: int
    epochs: int
    seed: int = 0
    log_interval: int = 1
    deadline: float = 120.0
    run: str = "run"
    saving: Saving | None = None
    recovery: float = 60.0
    recoveries: int = 3
    hierarchical: bool = False
    compute: Compute = field(default_factory=Compute)
    watch: Watch = field(default_factory=Watch)
    limit: int | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        for name, value in (
            ("batchSize", self.batch_size), ("epochs", self.epochs), ("numWorkers", self.num_workers),
            ("logInterval", self.log_interval),
        ):  # fmt: skip
            if value < 1:
                raise RecipeError(f"{name} is {value}, must be at least 1")
        if not self.deadline > 0:
            raise RecipeError(f"deadline is {self.deadline} s, must be above 0")
        if self.limit is not None and self.limit < 1:
            raise RecipeError(f"limitBatches is {self.limit}, must be at least 1")
        overlaps, meets = getattr(self.round.exchange, "overlap", False), any(isinstance(m, SyncBatchNorm) for m in self._modules())
        if overlaps and (self.compute.passes > 1 or self.compute.precision == "fp16"):
            raise RecipeError(
                "overlap=True sends gradients while the one backward pass computes them: with accumulation, or precision='fp16', "
                "which scales them, leave it out"
            )
        if meets and self.compute.passes > 1:
            raise RecipeError(
                "syncBatchNorm=True takes statistics of the whole batch, and with accumulation no forward pass sees it: leave out one"
            )
        if self.round.peer is not None and (self.watch.best or self.watch.every is not None):
            raise RecipeError(
                f"with {type(self.round.peer).__name__} each worker has weights of its own, whose mean is validated at the ends of "
                "epochs and not kept: leave out validationTrigger and restoreBest"
            )
        if self.hierarchical and overlaps:
            raise RecipeError(
                "overlap=True sends each rank's gradient while backward computes it, and hierarchical=True sums those of a node first: "
                "leave out one of them"
            )
        if self.round.peer is not None and self.hierarchical:
            raise RecipeError(
                f"with {type(self.round.peer).__name__} each worker has weights of its own, and hierarchical=True makes those of one "
                "machine one: leave out one of them"
            )
        alone = self.round.local if getattr(self.round.local, "drops", False) else self.round.peer
        if alone is not None and meets:
            raise RecipeError(
                f"syncBatchNorm=True makes all workers meet inside forward, and with {type(alone).__name__} they do not: leave it out, "
                "or take GroupNorm, which needs no other rows"
            )
        if not self.recovery >= 0:
            raise RecipeError(f"recoveryInterval is {self.recovery} s, must be at least 0")

    def _modules(self) -> Iterable[Any]:
        return self.blueprint.skeleton.modules()

    @property
    def apart(self) -> bool:
        """Whether each rank is a peer of its own, whoever it shares a machine with."""
        return self.round.peer is not None or (self.round.exchange is not None and not self.hierarchical)

    def plan(self, counts: Sequence[int]) -> np.ndarray:
        """Rows that each share gives to each batch of an epoch: see batch.quotas."""
        return quotas(counts, self.batch_size)[: self.limit]

    def check_held(self, counts: Sequence[int], held: int) -> None:
        """Raises DataError where all rows, or none, are held out for validation. counts: of rows to train on."""
        if self.watch.validates and (not held or not sum(counts)):
            raise DataError(
                f"{held} rows are held out for validation, {sum(counts)} are left to train on; both must be at least 1: look at "
                "validationFraction or validationIndicatorCol"
            )

    def steps(self, batches: int) -> int:
        """Rounds of the whole fit, where an epoch has so many batches."""
        return sum(-(-batches // self.round.local.batches(epoch)) for epoch in range(self.epochs))

    def due(self, now: Position, ended: bool = False) -> bool:
        """Whether a checkpoint is due at this moment. ended: whether the fit ends here, before its epochs are done."""
        return self.saving is not None and (ended or self.saving.due(now, self.epochs))


@dataclass(frozen=True)
class Resume:
    """What a fit goes on from, beside the weights: where it stood, the server side, and the running sums of its history.

    dealt  what decides which rows a step takes: rows of each share, batch size, seed, batches of a round
    """

    now: Position
    state: State
    sums: dict[str, Any]
    dealt: dict[str, Any]

    def check(self, dealt: dict[str, Any]) -> None:
        """Raises CheckpointError where an epoch that had begun would be dealt in another way."""
        # what an older checkpoint does not tell was of one kind when it was written
        other = [key for key, value in dealt.items() if self.now.at and self.dealt.get(key, value) != value]
        if other:
            key = other[0]
            raise CheckpointError(
                f"the checkpoint of step {self.now.step} lies inside epoch {self.now.epoch}, which was dealt with {key} "
                f"{self.dealt.get(key)}; this fit has {dealt[key]}, so that some rows would come twice: give what it had, or go on "
                "from the end of an epoch (checkpointUnit='epoch')"
            )


@dataclass(frozen=True)
class Start:
    """Where training begins: weights [n], buffers [m] float64, and the frozen parameters by name."""

    weights: Tensor
    buffers: Tensor
    constants: dict[str, Tensor]
    resume: Resume | None = None

    @property
    def now(self) -> Position:
        return self.resume.now if self.resume else Position(0, 0, 0)


@dataclass(frozen=True)
class Outcome:
    """weights [n], buffers [m] float64, and the history: one dict a step, one dict an epoch.

    step:   step, epoch, loss, rows, lr, seconds, compute_s, sync_s, data_s, sync_ratio, bytes_sent
    epoch:  epoch, loss, rows, seconds, compute_s, sync_s, data_s, sync_ratio, bytes_sent, steps
    validation: validation (steps done), val_loss and the other values, seconds; values at its end are in the line of an epoch too
    A step is a round: one batch, or several with local SGD. seconds are wall time; compute_s and data_s those of the slowest
    rank; sync_s is the rest, and sync_ratio is sync_s / compute_s (0 where nothing was computed). bytes_sent counts the
    payload that all workers sent to other nodes, or into the shuffle. shapes: of one row in each column of the recipe; shares:
    rows of each worker.
    """

    weights: Tensor
    buffers: Tensor
    history: list[dict[str, Any]] = field(default_factory=list)
    engine: str = ""
    shapes: list[list[int]] = field(default_factory=list)
    shares: list[int] = field(default_factory=list)


def dealt(recipe: Recipe, counts: Any, now: Position) -> dict[str, Any]:
    """What decides which rows a step of the epoch now takes: see Resume."""
    batches = recipe.round.local.batches(now.epoch)
    return {"rows of shares": list(counts), "batchSize": recipe.batch_size, "seed": recipe.seed, "batches of a round": batches}


class Engine(Protocol):
    name: str

    def fit(self, frame: Any, recipe: Recipe, start: Start, observer: Observer = silent) -> Outcome:
        """With checkpoints there is one argument more, keep (see keeper.py), which takes the state where recipe.due() says so."""
        ...
