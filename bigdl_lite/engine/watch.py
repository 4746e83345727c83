"""What is looked at while a fit runs: rows held out, metrics, when it is enough.

    validation    at some moments: every worker measures its own held-out rows; sums are added in rank order, and divided once
    Judge         says of the values whether they are the best so far, and whether the fit ends; the same on every rank,
                  because it knows only what all of them know

Between two moments nothing of this costs anything.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bigdl_lite.data.holdout import Holdout
from bigdl_lite.engine.trigger import Moment, Trigger
from bigdl_lite.errors import DataError, DivergedError, RecipeError

if TYPE_CHECKING:
    from bigdl_lite.model.sums import Metric


@dataclass(frozen=True)
class Watch:
    """validates  whether rows are held out: by columns.held, or by holdout
    metrics    of the held-out rows, beside their loss
    every      when they are measured; None: at the ends of epochs
    monitor    the value that counts, as the history calls it; higher: whether more of it is better
    patience   validations without a value better by more than min_delta, after which the fit ends; None: it does not
    best       whether the fit returns the weights of its best validation
    end        when it is enough, whatever the values; None: after all epochs
    listens    whether the observer may end the fit, at the ends of epochs and at validations
    """

    validates: bool = False
    holdout: Holdout | None = None
    metrics: tuple[Metric, ...] = ()
    every: Trigger | None = None
    monitor: str = "val_loss"
    higher: bool = False
    patience: int | None = None
    min_delta: float = 0.0
    best: bool = False
    end: Trigger | None = None
    listens: bool = False

    def __post_init__(self) -> None:
        asked = {"metrics": self.metrics, "patience": self.patience is not None, "restoreBest": self.best}
        without = next((name for name, value in asked.items() if value), None)
        if without and not self.validates:
            raise RecipeError(f"{without} needs rows to validate on: set validationFraction or validationIndicatorCol")
        known = ["val_loss", *(f"val_{metric.name}" for metric in self.metrics)]
        if len(set(known)) < len(known):
            raise RecipeError(f"two metrics have one name: {', '.join(known[1:])}")
        for trigger in (self.every, self.end):
            if trigger is not None and hasattr(trigger, "check"):
                trigger.check(known if self.validates else ())
        if self.monitor not in known:
            raise RecipeError(f"monitor is {self.monitor!r}, must be one of {', '.join(map(repr, known))}")

    def values(self, total: Sequence[Tensor]) -> dict[str, float]:
        """The values of a validation, by their names in the history. total: what Replica.measure gives, summed over workers."""
        loss, weight = total[0].tolist()
        if not weight:
            raise DataError("no row that is held out for validation counts; raise validationFraction, or look at the rows' weights")
        if not math.isfinite(loss):
            raise DivergedError(
                f"the loss of the rows held out for validation is {loss}; lower the learning rate, or clip gradients (clipNorm)"
            )
        found = {f"val_{metric.name}": float(metric.value(sums)) for metric, sums in zip(self.metrics, total[1:], strict=True)}
        return {"val_loss": loss / weight, **found}


@dataclass
class Judge:
    """told: what facts() said, where a fit goes on. ended says why the fit ends here, "" while it goes on."""

    watch: Watch
    told: Mapping[str, Any] | None = None
    best: float | None = None
    since: int = 0  # validations since the best one
    ended: str = ""
    metrics: dict[str, float] = field(default_factory=dict)  # of the last validation
    buffers: Tensor | None = None  # of the best one

    def __post_init__(self) -> None:
        if self.told is not None:
            self.best, self.since, self.ended = self.told["best"], self.told["since"], self.told["ended"]
            self.metrics = dict(self.told["metrics"])
            buffers = self.told["buffers"]
            self.buffers = None if buffers is None else torch.tensor([float.fromhex(x) for x in buffers], dtype=torch.float64)

    def facts(self) -> dict[str, Any]:
        """All of it, as JSON takes it."""
        buffers = None if self.buffers is None else [x.hex() for x in self.buffers.tolist()]
        return {"best": self.best, "since": self.since, "ended": self.ended, "metrics": self.metrics, "buffers": buffers}

    def due(self, now: Moment) -> bool:
        """Whether the held-out rows are to be measured at this moment."""
        if not self.watch.validates or self.ended:
            return False
        return now.end_of_epoch if self.watch.every is None else bool(self.watch.every(now))

    def judge(self, values: dict[str, float], buffers: Tensor) -> bool:
        """Takes the values of a validation; says whether they are the best so far. buffers [m] are those of the moment."""
        watch, self.metrics = self.watch, values
        value = values[watch.monitor]
        gain = math.inf if self.best is None else (value - self.best) * (1 if watch.higher else -1)
        better = gain > watch.min_delta
        if better:
            self.best, self.since = value, 0
            self.buffers = buffers.clone() if watch.best else None
        else:
            self.since += 1
        if watch.patience is not None and self.since > watch.patience:
            best = f"{watch.monitor} has been no better than {self.best:.6g}"
            self.ended = f"{best} for {self.since} validations (patience={watch.patience})"
        return better

    def end(self, now: Moment, asked: bool = False) -> None:
        """Ends the fit where its trigger says so, or where the observer has asked for it."""
        if self.ended:
            return
        if self.watch.end is not None and self.watch.end(now):
            self.ended = f"{self.watch.end!r} after step {now.step}"
        elif asked:
            self.ended = f"a callback asked for it, after step {now.step}"

    @property
    def score(self) -> float | None:
        """The last monitored value, as something of which less is better; None where nothing was validated."""
        value = self.metrics.get(self.watch.monitor)
        return None if value is None else -value if self.watch.higher else value


def shown(advancer: Any) -> Tensor | None:
    """An owner's slice as validation and the model are to see it (algorithms/shadow.py); None: as it is."""
    ask = getattr(advancer, "shown", None)
    return ask() if ask else None


def best_of(advancer: Any) -> Tensor | None:
    """An owner's slice of the best validation, where it is kept."""
    ask = getattr(advancer, "best", None)
    return ask() if ask else None


def keep_best(advancer: Any) -> None:
    """Keeps the owner's slice as it is shown now."""
    advancer.keep_best()
