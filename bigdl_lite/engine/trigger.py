"""Triggers: when to validate, to save, to stop, as values that can be put together.

    every_epoch(n)   several_steps(n)            at the ends of epochs; after every n steps       true now and then
    max_epoch(n)     max_step(n)                 when so many are done                            true from then on
    max_loss(x)      min_metric(name, x)         when the fit is good enough                      true while it is

        every_epoch() & ~max_epoch(3)            a & b, a | b, ~a; "and", "or" and "not" are refused, as Python would not ask us

A trigger is a pure function of a Moment, whose numbers are the same on all ranks: so all ranks decide alike, without a word, and
a fit that goes on from a checkpoint decides as it would have.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from bigdl_lite.errors import RecipeError


@dataclass(frozen=True)
class Moment:
    """Between two steps.

    step, epoch   how many are done
    end_of_epoch  whether the step that is just done was the last one of its epoch
    loss          the mean over the rows of that step; at the end of an epoch, over those of the epoch
    metrics       of the last validation, by name ("val_loss", "val_accuracy"); empty before the first
    """

    step: int
    epoch: int
    end_of_epoch: bool
    loss: float
    metrics: Mapping[str, float] = field(default_factory=dict)


class Trigger:
    """Frozen, compares and pickles by value, and is written as it was made. One of your own needs __call__, and no state."""

    def __call__(self, now: Moment) -> bool:
        raise NotImplementedError

    @property
    def asks(self) -> frozenset[str]:
        """The names of the metrics that it looks at."""
        return frozenset()

    def check(self, metrics: Collection[str]) -> None:
        """Raises RecipeError, on the driver, where it looks at a metric that no validation of this fit computes."""
        missing = sorted(self.asks - set(metrics))
        if missing:
            there = ", ".join(sorted(metrics)) or "no metric, because it does not validate"
            raise RecipeError(f"{self!r} looks at {missing[0]!r}, and this fit has {there}: name one of these, or validate with it")

    def __and__(self, other: Any) -> Trigger:
        return Both(self, other) if isinstance(other, Trigger) else NotImplemented

    def __or__(self, other: Any) -> Trigger:
        return Either(self, other) if isinstance(other, Trigger) else NotImplemented

    def __invert__(self) -> Trigger:
        return Not(self)

    def __bool__(self) -> bool:
        raise RecipeError(f"{self!r} is neither true nor false without a moment: put triggers together with &, | and ~")


@dataclass(frozen=True, repr=False)
class EveryEpoch(Trigger):
    n: int

    def __call__(self, now: Moment) -> bool:
        return now.end_of_epoch and now.epoch % self.n == 0

    def __repr__(self) -> str:
        return f"every_epoch({'' if self.n == 1 else self.n})"


@dataclass(frozen=True, repr=False)
class SeveralSteps(Trigger):
    n: int

    def __call__(self, now: Moment) -> bool:
        return now.step > 0 and now.step % self.n == 0

    def __repr__(self) -> str:
        return f"several_steps({self.n})"


@dataclass(frozen=True, repr=False)
class MaxEpoch(Trigger):
    n: int

    def __call__(self, now: Moment) -> bool:
        return now.epoch >= self.n

    def __repr__(self) -> str:
        return f"max_epoch({self.n})"


@dataclass(frozen=True, repr=False)
class MaxStep(Trigger):
    n: int

    def __call__(self, now: Moment) -> bool:
        return now.step >= self.n

    def __repr__(self) -> str:
        return f"max_step({self.n})"


@dataclass(frozen=True, repr=False)
class MaxLoss(Trigger):
    most: float

    def __call__(self, now: Moment) -> bool:
        return now.loss <= self.most

    def __repr__(self) -> str:
        return f"max_loss({self.most!r})"


@dataclass(frozen=True, repr=False)
class MinMetric(Trigger):
    name: str
    least: float

    def __call__(self, now: Moment) -> bool:
        return self.name in now.metrics and now.metrics[self.name] >= self.least

    @property
    def asks(self) -> frozenset[str]:
        return frozenset([self.name])

    def __repr__(self) -> str:
        return f"min_metric({self.name!r}, {self.least!r})"


@dataclass(frozen=True, repr=False)
class Both(Trigger):
    a: Trigger
    b: Trigger

    def __call__(self, now: Moment) -> bool:
        return self.a(now) and self.b(now)

    @property
    def asks(self) -> frozenset[str]:
        return self.a.asks | self.b.asks

    def __repr__(self) -> str:
        return f"{_within(self.a, Either)} & {_within(self.b, Either, Both)}"


@dataclass(frozen=True, repr=False)
class Either(Trigger):
    a: Trigger
    b: Trigger

    def __call__(self, now: Moment) -> bool:
        return self.a(now) or self.b(now)

    @property
    def asks(self) -> frozenset[str]:
        return self.a.asks | self.b.asks

    def __repr__(self) -> str:
        return f"{self.a!r} | {_within(self.b, Either)}"


@dataclass(frozen=True, repr=False)
class Not(Trigger):
    a: Trigger

    def __call__(self, now: Moment) -> bool:
        return not self.a(now)

    @property
    def asks(self) -> frozenset[str]:
        return self.a.asks

    def __repr__(self) -> str:
        return f"~{_within(self.a, Either, Both)}"


def _within(trigger: Trigger, *looser: type[Trigger]) -> str:
    """As part of another, in brackets where Python would read it in another way."""
    return f"({trigger!r})" if isinstance(trigger, looser) else repr(trigger)


def every_epoch(n: int = 1) -> Trigger:
    """At the end of every n-th epoch."""
    return EveryEpoch(_count("every_epoch", n))


def several_steps(n: int) -> Trigger:
    """After every n steps, counted from the first of the fit, across epochs."""
    return SeveralSteps(_count("several_steps", n))


def max_epoch(n: int) -> Trigger:
    """Once n epochs are done."""
    return MaxEpoch(_count("max_epoch", n))


def max_step(n: int) -> Trigger:
    """Once n steps are done."""
    return MaxStep(_count("max_step", n))


def max_loss(most: float) -> Trigger:
    """While the loss is at most `most`; a loss that is not a number never is."""
    return MaxLoss(_number(f"max_loss({most!r})", most))


def min_metric(name: str, least: float) -> Trigger:
    """While a metric of the last validation, min_metric("val_accuracy", 0.9), is at least `least`; false before the first one."""
    if not isinstance(name, str) or not name:
        raise RecipeError(f"min_metric({name!r}, {least!r}): the name of a metric comes first, like 'val_accuracy'")
    return MinMetric(name, _number(f"min_metric({name!r}, {least!r})", least))


def _count(name: str, n: Any) -> int:
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise RecipeError(f"{name}({n!r}): must be a whole number, at least 1")
    return n


def _number(call: str, x: Any) -> float:
    if not isinstance(x, int | float) or isinstance(x, bool) or x != x:
        raise RecipeError(f"{call}: must be a number")
    return float(x)
