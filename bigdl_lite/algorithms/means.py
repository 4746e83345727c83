"""Running averages of the weights: which weights they take in, and how far they go toward them.

    average += rate (weights - average)

        EMA     rate = 1 - decay           after every step, or every few
        SWA     rate = 1 / (taken + 1)     at the ends of epochs, or every few steps: the arithmetic mean

The first rate is 1: an average begins as a copy of weights that were trained, never as zeros, so that nothing need be corrected.
What holds an average, and where, is in shadow.py. The arithmetic is that of torch.optim.swa_utils.AveragedModel.

Source: Polyak and Juditsky, "Acceleration of Stochastic Approximation by Averaging", 1992; SWA: Izmailov et al., "Averaging
Weights Leads to Wider Optima and Better Generalization", UAI 2018.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from bigdl_lite.errors import RecipeError


class Average(Protocol):
    """A frozen dataclass; compares by repr() with that of a checkpoint."""

    @property
    def per(self) -> str:
        """What is counted: "step" or "epoch"."""
        ...

    def due(self, done: int) -> bool:
        """Whether the weights are taken in after so many steps, or epochs, from 1 on."""
        ...

    def rate(self, taken: int) -> float:
        """How much of the way the average goes toward the weights, when it has taken so many before; 1.0 for the first."""
        ...


@dataclass(frozen=True)
class EMA:
    """The exponential moving average: the weights after `start`, start + every, ... steps, each old one worth `decay` of the next.

    It begins as a copy of the first weights that it takes, never of those that training began with. It remembers about
    every / (1 - decay) steps: a fit that is shorter still shows much of its beginning.
    """

    decay: float = 0.999
    every: int = 1
    start: int = 0
    per: ClassVar[str] = "step"

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise RecipeError(f"EMA(decay={self.decay}): must be at least 0 and below 1; 0.999 remembers about a thousand steps")
        _require(self)

    def due(self, done: int) -> bool:
        return _due(done, self.start, self.every)

    def rate(self, taken: int) -> float:
        return 1.0 - self.decay if taken else 1.0


@dataclass(frozen=True)
class SWA:
    """The arithmetic mean of the weights at the ends of epochs start_epoch, start_epoch + every, ...; or so by steps.

    Epochs and steps are those that are done, from 1 on: start_epoch=5 takes the weights first when 5 epochs are done. The rate
    from there on is best a constant one, or a cycle of `every` (torch.optim.swa_utils.SWALR is a scheduler like any other).
    """

    start_epoch: int | None = None
    start_step: int | None = None
    every: int = 1

    def __post_init__(self) -> None:
        if (self.start_epoch is None) == (self.start_step is None):
            raise RecipeError(f"{self}: give start_epoch, which counts epochs, or start_step, which counts steps; one of them")
        _require(self)

    @property
    def per(self) -> str:
        return "step" if self.start_epoch is None else "epoch"

    @property
    def start(self) -> int:
        return (self.start_step if self.start_epoch is None else self.start_epoch) or 0

    def due(self, done: int) -> bool:
        return _due(done, self.start, self.every)

    def rate(self, taken: int) -> float:
        return 1.0 / (taken + 1)


def _due(done: int, start: int, every: int) -> bool:
    return done >= max(start, 1) and (done - start) % every == 0


def _require(average: EMA | SWA) -> None:
    if average.every < 1 or average.start < 0:
        raise RecipeError(f"{average}: every must be at least 1, and the start at least 0")
