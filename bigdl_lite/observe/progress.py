"""A bar in a terminal or notebook, a log line every few seconds anywhere else.

    fit:  67%|█████████▍    | 20/30 [00:02<00:01,  9.80step/s, epoch 2/3, loss 0.4132, val_accuracy 0.913, 12,480 rows/s]
"""

from __future__ import annotations

import logging
import sys
import time
import warnings
from collections.abc import Mapping
from typing import Any

from bigdl_lite.observe.events import Callback, FitEnded, FitFailed, FitStarted, StepEnded, Validated, event_of
from bigdl_lite.observe.summary import iterations, kind_of

_LOG = logging.getLogger("bigdl_lite")
_EVERY = 10.0  # seconds between log lines


class Progress(Callback):
    """mode: "auto" (a bar where someone may be looking), "bar", "log" or "none".

    every        seconds between log lines
    file, width  where the bar is written, and its characters; None: a widget in a notebook that has them, else all of stderr
    """

    def __init__(self, mode: str = "auto", every: float = _EVERY, file: Any = None, width: int | None = None) -> None:
        if mode == "auto":
            mode = "bar" if sys.stderr.isatty() or _in_notebook() else "log"
        self._tqdm = _tqdm() if mode == "bar" else None
        self._mode = "log" if mode == "bar" and self._tqdm is None else mode
        self._every, self._file, self._width = every, file, width
        self._bar: Any = None
        self._last, self._steps, self._epochs, self._validated = time.monotonic(), 0, 0, ""

    def __call__(self, line: Mapping[str, Any]) -> None:
        """Takes a line, too, so that a Progress alone is an observer."""
        event = event_of(line)
        if isinstance(event, FitStarted):
            self.on_fit_started(event)
        elif isinstance(event, StepEnded):
            self.on_step(event)
        elif isinstance(event, Validated):
            self.on_validation(event)

    def close(self) -> None:
        """Leaves the bar where it is."""
        bar, self._bar = self._bar, None
        if bar is not None:
            bar.close()

    def on_fit_started(self, event: FitStarted) -> None:
        self._steps, self._epochs, self._last, self._validated = event.steps, event.epochs, time.monotonic(), ""
        if self._tqdm is not None and self._bar is None:
            where = {"file": self._file, "ncols": self._width, "dynamic_ncols": self._width is None}
            self._bar = self._tqdm(total=event.steps, unit="step", desc="fit", mininterval=0.2, **where)

    def on_step(self, event: StepEnded) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(self._text(event), False)
            more = event.step + 1 - self._bar.n
            self._bar.update(more)
            if more < 0:  # back to an earlier state, after the loss of a rank
                self._bar.refresh()
        elif self._mode == "log" and time.monotonic() - self._last >= self._every:
            self._last = time.monotonic()
            _LOG.info("step %d of %d, %s", event.step + 1, self._steps, self._text(event))

    def on_validation(self, event: Validated) -> None:
        """The metric is shown from now on: the first that is not the loss, where there is one."""
        named = [name for name in event.metrics if name != "val_loss"] or list(event.metrics)
        self._validated = f"{named[0]} {event.metrics[named[0]]:.4g}, " if named else ""
        if self._mode == "log":
            _LOG.info("validation after step %d: %s", event.step, ", ".join(f"{k} {v:.4g}" for k, v in event.metrics.items()))

    def on_fit_ended(self, event: FitEnded) -> None:
        """Lines of steps come thinned, so the bar learns only here how many there were (after a stop not all), and of the last one."""
        if self._bar is not None:
            done = iterations(event.history)
            last = next((line for line in reversed(event.history) if kind_of(line) == "step"), None)
            if last is not None and last["step"] + 1 == done:  # with logInterval it may not be kept
                self._bar.set_postfix_str(self._text(event_of(last)), False)
            self._bar.n = max(self._bar.n, done)
            self._bar.refresh()
        self.close()

    def on_fit_failed(self, event: FitFailed) -> None:
        self.close()

    def _text(self, event: StepEnded) -> str:
        rate = event.rows / max(1e-9, event.seconds)
        return f"epoch {event.epoch + 1}/{self._epochs}, loss {event.loss:.4g}, {self._validated}{rate:,.0f} rows/s"


def _in_notebook() -> bool:
    """Whether a kernel runs this program. That ipykernel is imported says nothing: pyspark imports it wherever it is installed."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return hasattr(shell, "kernel")


def _tqdm() -> Any:
    """tqdm's bar for where we are, or None. It warns where a notebook has no widgets, and then writes text: which is good enough."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from tqdm.auto import tqdm
        except ImportError:
            return None
    return tqdm
