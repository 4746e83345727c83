"""TensorBoard: the numbers of a fit as an event file."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

from bigdl_lite.errors import RecipeError
from bigdl_lite.observe.events import Callback, EpochEnded, FitEnded, FitFailed, FitStarted, StepEnded, Validated


class TensorBoard(Callback):
    """Writes to `folder`, on the driver, a folder for each fit; look at them with `tensorboard --logdir folder`.

        of every `every`-th step   loss, learning_rate, rows_per_second, sync (the part of the step that it takes)
        of epochs                  epoch/loss
        of validations             validation/loss, validation/accuracy, ...
        text                       settings

    All at the number of steps done by then.

    Raises ImportError where tensorboard is missing.
    """

    def __init__(self, folder: str | os.PathLike[str], every: int = 1) -> None:
        if every < 1:
            raise RecipeError(f"every is {every}, must be at least 1")
        if importlib.util.find_spec("tensorboard") is None:
            raise ImportError("TensorBoard needs the tensorboard package: pip install 'bigdl_lite[tensorboard]'")
        self.folder, self.every = os.fspath(folder), every
        self._writers: dict[str, Any] = {}  # by run: fits may run side by side

    def before_fit(self, run: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writers[run] = SummaryWriter(os.path.join(self.folder, run))

    def on_fit_started(self, event: FitStarted) -> None:
        settings = {
            "engine": event.engine, "workers": event.workers, "epochs": event.epochs, "steps": event.steps, "rows": event.rows,
            **event.params,
        }  # fmt: skip
        table = ["| setting | value |", "|---|---|", *(f"| {key} | {value} |" for key, value in settings.items())]
        self._writers[event.run].add_text("settings", "\n".join(table))

    def on_step(self, event: StepEnded) -> None:
        if event.step % self.every:
            return
        speed, sync = event.rows / max(1e-9, event.seconds), event.sync_s / max(1e-9, event.seconds)
        self._write(event.run, {"loss": event.loss, "learning_rate": event.lr, "rows_per_second": speed, "sync": sync}, event.step + 1)

    def on_epoch(self, event: EpochEnded) -> None:
        self._write(event.run, {"epoch/loss": event.loss}, event.done)
        self._writers[event.run].flush()

    def on_validation(self, event: Validated) -> None:
        self._write(event.run, {f"validation/{name.removeprefix('val_')}": value for name, value in event.metrics.items()}, event.step)

    def on_fit_ended(self, event: FitEnded) -> None:
        self._close(event.run)

    def on_fit_failed(self, event: FitFailed) -> None:
        self._close(event.run)

    def _write(self, run: str, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writers[run].add_scalar(name, value, step)

    def _close(self, run: str) -> None:
        writer = self._writers.pop(run, None)
        if writer is not None:
            writer.close()
