"""What happens in a fit, as typed values, and who hears of it on the driver.

    engine    a line, a plain dict       Callbacks, the observer of the fit        each callback, in order
    fit       ended(), or its error                                                returns STOP: the fit ends after this step

A callback is a Callback, whose methods do nothing until you write them, or any function of one event. It runs in the driver's
process, with local and shuffle between two steps, which then wait for it; with barrier in another thread, which training does not
wait for: there the steps are thinned (at most ten a second), those of epochs and validation all come.

After the loss of a rank a fit goes on from an earlier state: its steps since then come again, FitStarted does not.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from types import TracebackType
from typing import Any

from bigdl_lite.errors import RecipeError, report

_LOG = logging.getLogger("bigdl_lite")


@dataclass(frozen=True)
class Stop:
    """What a callback returns to end the fit; why goes into the log."""

    why: str = ""


STOP = Stop()


@dataclass(frozen=True)
class FitStarted:
    """steps of the whole fit; rows of an epoch; params: the settings of the estimator that are text or numbers, by name."""

    steps: int
    epochs: int
    rows: int
    engine: str = ""
    workers: int = 0
    params: Mapping[str, Any] = field(default_factory=dict)
    run: str = ""  # which fit it is, where one callback hears several at once


@dataclass(frozen=True)
class StepEnded:
    """The line of a step (see engine.recipe.Outcome); more: what only some methods have to say of it."""

    step: int
    epoch: int
    loss: float
    rows: int
    lr: float
    seconds: float
    compute_s: float
    sync_s: float
    data_s: float
    bytes_sent: int
    more: Mapping[str, Any] = field(default_factory=dict)
    run: str = ""


@dataclass(frozen=True)
class EpochEnded:
    """The line of an epoch: sums of its steps, and their mean loss. more has "val_loss" where a validation fell on its end.

    done  steps of the fit by then
    """

    epoch: int
    steps: int
    loss: float
    rows: int
    seconds: float
    compute_s: float
    sync_s: float
    data_s: float
    bytes_sent: int
    more: Mapping[str, Any] = field(default_factory=dict)
    done: int = 0
    run: str = ""


@dataclass(frozen=True)
class Validated:
    """step: steps done so far; metrics: {"val_loss": ..., "val_accuracy": ...}."""

    step: int
    epoch: int
    metrics: Mapping[str, float]
    seconds: float = 0.0
    run: str = ""


@dataclass(frozen=True)
class FitEnded:
    """history: all lines; seconds of the whole fit, as the clock on the wall has them; model: the fitted TorchModel."""

    history: Sequence[Mapping[str, Any]]
    seconds: float
    model: Any = None
    run: str = ""


@dataclass(frozen=True)
class FitFailed:
    error: BaseException
    run: str = ""


Event = FitStarted | StepEnded | EpochEnded | Validated | FitEnded | FitFailed


def event_of(line: Mapping[str, Any]) -> Event | None:
    """The typed event of a line that an engine tells; None for a kind of line that is not known here."""
    if "start" in line:
        return FitStarted(**{key: line["start"][key] for key in ("steps", "epochs", "rows")})
    if "validation" in line:
        metrics = {key: value for key, value in line.items() if key.startswith("val_")}
        return Validated(line["validation"], line.get("epoch", 0), metrics, line.get("seconds", 0.0))
    if "step" in line:
        return _made(StepEnded, line)
    return _made(EpochEnded, line) if "epoch" in line else None


def _made(kind: type[Any], line: Mapping[str, Any]) -> Any:
    own = {f.name for f in fields(kind)} - {"more", "done", "run"}
    return kind(**{key: line[key] for key in own}, more={key: value for key, value in line.items() if key not in own})


class Callback:
    """Hears the events of a fit, one method each. Each may return STOP, or Stop("the reason"), to end the fit after this step.

    An error in one of them is logged with your traceback; the callback then hears no more than the end of this fit, which goes on.
    """

    def before_fit(self, run: str) -> None:
        """Called in the thread that calls fit, before any job. What it raises, fit raises."""

    def on_fit_started(self, event: FitStarted) -> Stop | None:
        """The rows have been counted; the first step comes next."""

    def on_step(self, event: StepEnded) -> Stop | None: ...

    def on_epoch(self, event: EpochEnded) -> Stop | None: ...

    def on_validation(self, event: Validated) -> Stop | None: ...

    def on_fit_ended(self, event: FitEnded) -> None: ...

    def on_fit_failed(self, event: FitFailed) -> None: ...


_METHODS: dict[type[Any], str] = {
    FitStarted: "on_fit_started", StepEnded: "on_step", EpochEnded: "on_epoch", Validated: "on_validation",
    FitEnded: "on_fit_ended", FitFailed: "on_fit_failed",
}  # fmt: skip


def check_callbacks(callbacks: Sequence[Any]) -> None:
    """Raises RecipeError for what cannot hear events."""
    for callback in callbacks:
        if isinstance(callback, type):
            raise RecipeError(f"callbacks has the class {callback.__name__}; give an object of it: {callback.__name__}(...)")
        if not isinstance(callback, Callback) and not callable(callback):
            raise RecipeError(f"callbacks has a {type(callback).__name__}, must have Callback objects or functions of one event")


class Callbacks:
    """The observer of one fit: tells each callback, in order, one event at a time whatever threads they come from.

        with Callbacks(callbacks, run, engine, workers, params) as told:    # before_fit of each; an error becomes FitFailed
            engine.fit(..., told)
            told.ended(history, model)

    done         steps before the epoch that the fit begins in, where it goes on from a checkpoint
    stop, why    whether some callback asked to end the fit, and what the first of them said
    """

    def __init__(
        self, callbacks: Sequence[Callback | Callable[[Event], Any]] = (), run: str = "", engine: str = "", workers: int = 0,
        params: Mapping[str, Any] | None = None, done: int = 0,
    ) -> None:  # fmt: skip
        check_callbacks(callbacks)
        self.stop, self.why = False, ""
        self._callbacks, self._run = list(callbacks), run
        self._facts: dict[str, Any] = {"engine": engine, "workers": workers, "params": dict(params or {})}
        self._broken: set[int] = set()
        self._lock, self._began = threading.RLock(), time.monotonic()
        self._started, self._over, self._epoch = False, False, 0
        self._done, self._steps = done, dict[int, int]()  # the steps of each epoch that has ended

    def asked(self) -> bool:
        """Whether the fit is to end; an engine looks at the ends of epochs and after validations."""
        return self.stop

    def __enter__(self) -> Callbacks:
        self._began = time.monotonic()
        try:
            for callback in self._callbacks:
                if isinstance(callback, Callback):
                    callback.before_fit(self._run)
        except BaseException as error:
            self.failed(error)  # those before it may hold something open
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is not None:
            self.failed(error)

    def __call__(self, line: Mapping[str, Any]) -> None:
        """Takes a line, as an engine tells it."""
        event = event_of(line)
        if event is not None:
            with self._lock:
                self._tell(event)

    def ended(self, history: Sequence[Mapping[str, Any]], model: Any = None) -> None:
        """Tells that the fit is over; seconds are those since `with` began."""
        with self._lock:
            self._tell(FitEnded(history, self.seconds, model))

    def failed(self, error: BaseException) -> None:
        with self._lock:
            self._tell(FitFailed(error))

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._began

    def _tell(self, event: Event) -> None:
        if self._over:  # a line that came late, or an error after the end
            return
        event = replace(event, run=self._run)
        if isinstance(event, FitStarted):
            if self._started:
                return
            self._started, event = True, replace(event, **self._facts)
        elif isinstance(event, StepEnded):
            self._epoch = event.epoch
        elif isinstance(event, EpochEnded):
            self._steps[event.epoch] = event.steps  # again, perhaps, after the loss of a rank
            event = replace(event, done=self._done + sum(n for epoch, n in self._steps.items() if epoch <= event.epoch))
        elif isinstance(event, Validated):
            event = replace(event, epoch=self._epoch)
        last = isinstance(event, FitEnded | FitFailed)
        self._over = last
        for at, callback in enumerate(self._callbacks):
            if at not in self._broken or last:
                self._one(at, callback, event)
        if isinstance(event, EpochEnded):
            self._epoch = event.epoch + 1  # until its own steps come, which may be thinned

    def _one(self, at: int, callback: Any, event: Event) -> None:
        name = type(callback).__name__ if isinstance(callback, Callback) else getattr(callback, "__name__", repr(callback))
        try:
            answer = getattr(callback, _METHODS[type(event)])(event) if isinstance(callback, Callback) else callback(event)
        except Exception as error:
            if at in self._broken:
                _LOG.warning("callback %s failed at the end of the fit, too: %s: %s", name, type(error).__name__, error)
                return
            self._broken.add(at)
            said = report(error, f"the driver, in callback {name}")["message"]
            _LOG.warning("callback %s failed; it hears no more than the end of the fit, which goes on:\n%s", name, said)
            return
        if isinstance(answer, Stop) and not self.stop:
            self.why = answer.why or f"callback {name} asked for it"
            self.stop = True
            _LOG.info("the fit ends after this step: %s", self.why)
