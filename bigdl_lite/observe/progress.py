"""A bar in a terminal or notebook, a log line every few seconds anywhere else."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping
from typing import Any

_LOG = logging.getLogger("bigdl_lite")
_EVERY = 10.0  # seconds between log lines


class Progress:
    """Takes the events of a fit. mode: "auto" (a bar where someone may be looking), "bar", "log" or "none"."""

    def __init__(self, mode: str = "auto") -> None:
        self._mode, self._bar, self._last, self._steps = mode, None, time.monotonic(), 0
        if mode == "auto":
            self._mode = "bar" if sys.stderr.isatty() or "ipykernel" in sys.modules else "log"
        if self._mode == "bar":
            try:
                import tqdm.auto  # noqa: F401
            except ImportError:
                self._mode = "log"

    def __call__(self, event: Mapping[str, Any]) -> None:
        if self._mode == "none":
            return
        if "start" in event:
            self._begin(event["start"]["steps"])
        elif "step" in event:
            self._step(event)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.n = self._steps
            self._bar.refresh()
            self._bar.close()
            self._bar = None

    def _begin(self, steps: int) -> None:
        self._steps = steps
        if self._mode == "bar" and self._bar is None:
            from tqdm.auto import tqdm

            self._bar = tqdm(total=steps, unit="step", desc="fit", mininterval=0.2)

    def _step(self, line: Mapping[str, Any]) -> None:
        rate = line["rows"] / max(1e-9, line["seconds"])
        sync = 100 * line["sync_s"] / max(1e-9, line["seconds"])
        if self._bar is not None:
            self._bar.set_postfix_str(f"epoch {line['epoch']}, loss {line['loss']:.4g}, {rate:,.0f} rows/s, sync {sync:.0f}%", False)
            self._bar.update(line["step"] + 1 - self._bar.n)
        elif time.monotonic() - self._last > _EVERY:
            self._last = time.monotonic()
            _LOG.info(
                "step %d of %d, epoch %d, loss %.4g, %.0f rows/s, sync %.0f%%",
                line["step"] + 1, self._steps, line["epoch"], line["loss"], rate, sync,
            )  # fmt: skip
