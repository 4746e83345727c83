"""Recipe: all that an executor must know. Outcome: all that a fit gives back.

    n  flat weights      m  values of the buffers
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from bigdl_lite.algorithms import Round
from bigdl_lite.data.columns import Columns
from bigdl_lite.errors import RecipeError
from bigdl_lite.model.layout import Blueprint
from bigdl_lite.model.replica import Loss

# {"start": {"steps", "epochs", "rows"}}, then the lines of the history as they come
Event = Mapping[str, Any]
Observer = Callable[[Event], None]


def silent(event: Event) -> None:
    """The observer that looks away."""


@dataclass(frozen=True)
class Recipe:
    """What to train and how; nothing of where. It travels to every executor once, without the weights.

    batch_size   rows of one step over all workers
    deadline     seconds that any wait between ranks may take before it is an error
    log_interval a step is kept in the history where step % log_interval == 0 (epochs always are)
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

    def __post_init__(self) -> None:
        for name, value in (
            ("batchSize", self.batch_size), ("epochs", self.epochs), ("numWorkers", self.num_workers),
            ("logInterval", self.log_interval),
        ):  # fmt: skip
            if value < 1:
                raise RecipeError(f"{name} is {value}, must be at least 1")
        if not self.deadline > 0:
            raise RecipeError(f"deadline is {self.deadline} s, must be above 0")


@dataclass(frozen=True)
class Start:
    """Where training begins: weights [n], buffers [m] float64, and the frozen parameters by name."""

    weights: Tensor
    buffers: Tensor
    constants: dict[str, Tensor]


@dataclass(frozen=True)
class Outcome:
    """weights [n], buffers [m] float64, and the history: one dict a step, one dict an epoch.

    step:   step, epoch, loss, rows, lr, seconds, compute_s, sync_s, data_s, bytes_sent
    epoch:  epoch, loss, rows, seconds, compute_s, sync_s, data_s, bytes_sent, steps
    seconds are wall time; compute_s and data_s those of the slowest rank; sync_s is the rest. bytes_sent counts the
    payload that all workers sent to other nodes, or into the shuffle. shapes: of one row in each column of the recipe.
    """

    weights: Tensor
    buffers: Tensor
    history: list[dict[str, Any]] = field(default_factory=list)
    engine: str = ""
    shapes: list[list[int]] = field(default_factory=list)


class Engine(Protocol):
    name: str

    def fit(self, frame: Any, recipe: Recipe, start: Start, observer: Observer = silent) -> Outcome: ...
