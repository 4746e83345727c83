"""From the sides of a step to one line of history. One account for all engines."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from bigdl_lite.algorithms import Side
from bigdl_lite.engine.recipe import Observer
from bigdl_lite.engine.watch import Judge
from bigdl_lite.errors import DivergedError

_SUMS = ("seconds", "compute_s", "sync_s", "data_s", "bytes_sent")


def mean_loss(sides: Sequence[Side], step: int) -> float:
    """The loss of a step, a mean over all rows. Raises DivergedError that names step and rank."""
    for side in sides:
        if not math.isfinite(side.loss):
            raise DivergedError(
                f"the loss is {side.loss} in step {step} on rank {side.rank}; "
                "lower the learning rate, clip gradients (clipNorm), or look at that worker's rows"
            )
    total = sum(side.weight for side in sides)
    return sum(side.loss for side in sides) / total if total else 0.0


def _ratio(line: Mapping[str, Any]) -> float:
    return line["sync_s"] / line["compute_s"] if line["compute_s"] else 0.0


class History:
    """Collects lines; tells each to the observer as it comes."""

    def __init__(self, log_interval: int, observer: Observer) -> None:
        self.lines: list[dict[str, Any]] = []
        self._every, self._observer = log_interval, observer
        self._epoch: dict[str, Any] = {}
        self._line: dict[str, Any] | None = None  # the last step, until its bytes are known
        self._since = [0.0, 0]  # loss summed over rows, and rows, since the last checkpoint

    def start(self, steps: int, epochs: int, rows: int, sums: Mapping[str, Any] | None = None) -> None:
        """steps of the whole fit, rows of an epoch. sums: of the state to go on from."""
        if sums:
            self._epoch, self._since = dict(sums["epoch"]), list(sums["since"])
        self._observer({"start": {"steps": steps, "epochs": epochs, "rows": rows}})

    def sums(self, saved: bool, judge: Judge) -> dict[str, Any]:
        """What start() must know to go on from here, and "loss", by which checkpoints are compared. saved: this is one.

        That is the mean loss since the checkpoint before; where rows are held out, the value that is monitored.
        """
        loss, rows = self._since
        if saved:
            self._since = [0.0, 0]
        mean = loss / rows if rows else math.nan
        told = {"epoch": dict(self._epoch), "since": list(self._since), "judge": judge.facts()}
        return told | {"loss": mean if judge.score is None else judge.score}

    def step(
        self, step: int, epoch: int, sides: Sequence[Side], loss: float, seconds: float, lr: float,
        more: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """One step; sent() follows when the bytes of all ranks are known. more: what only some methods have to say of it."""
        compute = max(side.compute_s for side in sides)
        data = max(side.data_s for side in sides)
        self._line = {
            "step": step, "epoch": epoch, "loss": loss, "rows": sum(side.rows for side in sides),
            "weight": sum(side.weight for side in sides), "lr": lr, "seconds": seconds,
            "compute_s": compute, "sync_s": max(0.0, seconds - compute - data), "data_s": data, "bytes_sent": 0,
        }  # fmt: skip
        self._line |= {"sync_ratio": _ratio(self._line), **(more or {})}

    def sent(self, nbytes: int) -> None:
        """Completes the last step with the bytes that all ranks sent in it, and tells the observer."""
        line, self._line = self._line, None
        if line is None:
            return
        line["bytes_sent"] = nbytes
        total = self._epoch or dict.fromkeys((*_SUMS, "rows", "loss", "steps"), 0)
        for key in (*_SUMS, "rows"):
            total[key] += line[key]
        total["loss"] += line["loss"] * line["rows"]
        if "losses" in line:
            before = total.get("losses") or [0.0] * len(line["losses"])
            total["losses"] = [x + loss * line["rows"] for x, loss in zip(before, line["losses"], strict=True)]
        self._since[0] += line["loss"] * line["rows"]
        self._since[1] += line["rows"]
        total["steps"] += 1
        self._epoch = total
        if line["step"] % self._every == 0:
            self.lines.append(line)
        self._observer(line)

    def validation(self, steps: int, values: Mapping[str, float], seconds: float) -> None:
        """What the rows held out are worth after so many steps."""
        line = {"validation": steps, **values, "seconds": seconds}
        self.lines.append(line)
        self._observer(line)

    @property
    def mean(self) -> float:
        """The mean loss of the epoch, so far."""
        return self._epoch["loss"] / max(1, self._epoch["rows"]) if self._epoch else 0.0

    @property
    def means(self) -> list[float]:
        """The mean loss of each model in the epoch so far, where several are trained together (engine/each.py); else none."""
        return [x / max(1, self._epoch["rows"]) for x in self._epoch.get("losses", ())]

    def epoch(self, epoch: int, more: Mapping[str, Any] | None = None) -> float:
        """Closes the epoch; returns its mean loss."""
        mean, means, total, self._epoch = self.mean, self.means, self._epoch, {}
        line = {"epoch": epoch, **total, "loss": mean, "sync_ratio": _ratio(total), **(more or {})}
        if means:
            line["losses"] = means
        self.lines.append(line)
        self._observer(line)
        return line["loss"]
