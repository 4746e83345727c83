"""What a fit came to: the losses, the best of them, and where the time went.

    time of a fit  =  launch + steps + validation         launch: jobs, start of workers, reading rows into them; all that is no step
    time of a step =  compute + data + sync               compute and data of the slowest rank; sync is the rest, optimizer included
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

PHASES = ("launch", "data", "compute", "sync", "validation")  # the order of every table and picture
Line = Mapping[str, Any]


def kind_of(line: Line) -> str:
    """"step", "epoch" or "validation"."""
    return next(kind for kind in ("validation", "step", "epoch") if kind in line)


def iterations(history: Sequence[Line]) -> int:
    """Steps that were made, of which the history may keep every logInterval-th only."""
    in_epochs = sum(line["steps"] for line in history if kind_of(line) == "epoch")
    last = max((line["step"] + 1 for line in history if kind_of(line) == "step"), default=0)
    return max(in_epochs, last)


@dataclass(frozen=True)
class Summary:
    """Made from the history of a fit and what is known beside it; everything else is computed from these.

    history   lines of steps, epochs and validations, as in model.history
    workers   how many; shares: the rows of each, where known
    seconds   of the whole fit as the clock on the wall has them; 0: not known, and then there is no phase "launch"
    before    lines at the head of the history that an earlier fit made, which this one went on from
    monitor   the validation metric that says what is best, and whether higher is better
    """

    history: Sequence[Line] = field(repr=False)
    engine: str = ""
    workers: int = 0
    seconds: float = 0.0
    shares: Sequence[int] = ()
    before: int = 0
    monitor: str = "val_loss"
    higher: bool = False

    def lines(self, kind: str, since: int = 0) -> list[Line]:
        """The lines of one kind, "step", "epoch" or "validation"."""
        return [line for line in self.history[since:] if kind_of(line) == kind]

    @property
    def objectiveHistory(self) -> list[float]:
        """The mean loss of each epoch."""
        return [line["loss"] for line in self.lines("epoch")]

    @property
    def validationHistory(self) -> list[dict[str, float]]:
        """A dict for each validation: "step", the steps done before it, and its metrics: "val_loss", "val_accuracy", ..."""
        return [
            {"step": line["validation"], **{k: v for k, v in line.items() if k.startswith("val_")}} for line in self.lines("validation")
        ]

    @property
    def totalIterations(self) -> int:
        """Steps."""
        return iterations(self.history)

    @property
    def epochs(self) -> int:
        """Epochs that were begun."""
        return 1 + max((line["epoch"] for line in self.history if "epoch" in line), default=-1)

    def total(self, key: str, since: int = 0) -> float:
        """The sum over all steps of "rows", "bytes_sent", "seconds", "compute_s", ...; of an epoch broken off, over the lines kept."""
        return sum(line[key] for line in self._summed(since))

    @property
    def counted(self) -> int:
        """Steps that total() sums over: all, but those of an epoch broken off of which logInterval kept no line."""
        return sum(line.get("steps", 1) for line in self._summed(0))

    def _summed(self, since: int) -> list[Line]:
        ended = self.lines("epoch", since)
        last = max((line["epoch"] for line in ended), default=-1)
        return [*ended, *(line for line in self.lines("step", since) if line["epoch"] > last)]

    @property
    def rows(self) -> int:
        """Rows that steps took, all epochs together."""
        return int(self.total("rows"))

    @property
    def bytes_sent(self) -> int:
        return int(self.total("bytes_sent"))

    @property
    def rows_per_second(self) -> float:
        """Rows of all steps over the seconds of all steps: launch and validation do not count."""
        return self.rows / max(1e-9, self.total("seconds"))

    @property
    def phases(self) -> dict[str, float]:
        """Seconds by phase, of this fit alone. They add up to `seconds`, where that is known."""
        found = {name: float(self.total(f"{name}_s", self.before)) for name in ("data", "compute", "sync")}
        found["validation"] = float(sum(line.get("seconds", 0.0) for line in self.lines("validation", self.before)))
        inside = self.total("seconds", self.before) + found["validation"]
        found["launch"] = max(0.0, self.seconds - inside)
        return {name: found[name] for name in PHASES}

    @property
    def best(self) -> tuple[int, float]:
        """(steps done, value) of the best validation by `monitor`; without validation, of the epoch of the lowest mean loss.

        Raises ValueError where there is neither.
        """
        asked = [(line["validation"], line.get(self.monitor, math.nan)) for line in self.lines("validation")]
        found = [(done, value) for done, value in asked if math.isfinite(value)]
        better = max if self.higher else min
        if not found:
            done, better = 0, min
            for line in self.lines("epoch"):
                done += line["steps"]
                found.append((done, line["loss"]))
        if not found:
            raise ValueError("the history has no validation and no whole epoch, of which one could be the best")
        return better(found, key=lambda pair: pair[1])

    @property
    def _named(self) -> str:
        """What `best` compares: the monitor, or "loss" where no validation has it."""
        return self.monitor if any(self.monitor in line for line in self.lines("validation")) else "loss"

    @property
    def report(self) -> str:
        """A few lines: where the time went, and what would help."""
        from bigdl_lite.observe.report import report

        return report(self)

    def to_pandas(self) -> Any:
        """All lines as a pandas DataFrame: a column "kind", and NaN where a kind of line has no such value.

        "step" is the number of a step; for an epoch or a validation it is the steps done by then.
        """
        import pandas as pd

        rows, done = [], 0
        for line in self.history:
            kind, row = kind_of(line), dict(line)
            if kind == "epoch":
                done += line["steps"]
                row["step"] = done
            elif kind == "validation":
                row["step"] = row.pop("validation")
            rows.append({"kind": kind, **row})
        return pd.DataFrame(rows, columns=None if rows else ["kind", "step", "epoch", "loss"])

    def plot(self, path: Any = None) -> Any:
        """A matplotlib Figure: loss, learning rate, metrics, and time by phase; shown by notebooks, written to `path` where given.

        Raises ImportError where matplotlib is missing, ValueError where the history is empty.
        """
        from bigdl_lite.observe.plot import plot

        return plot(self, path)

    def __repr__(self) -> str:
        """A table, a line a fact."""
        facts = {
            "engine": f"{self.engine or 'unknown'}, {_many(self.workers, 'worker')}" if self.workers else self.engine or "unknown",
            "trained": f"{_many(self.epochs, 'epoch')}, {_many(self.totalIterations, 'step')}, {_many(self.rows, 'row')}",
        }
        losses = self.objectiveHistory
        if losses:
            facts["loss"] = f"{losses[-1]:.4g}" + (f" (first epoch {losses[0]:.4g})" if len(losses) > 1 else "")
        if self.validationHistory:
            last = self.validationHistory[-1]
            facts["validation"] = ", ".join(f"{key} {value:.4g}" for key, value in last.items() if key != "step")
        if len(losses) > 1 or self.validationHistory:
            facts["best"] = f"{self._named} {self.best[1]:.4g} after step {self.best[0]:,}"
        facts["speed"] = f"{self.rows_per_second:,.0f} rows/s in steps"
        if self.bytes_sent:
            facts["sent"] = size(self.bytes_sent)
        total = sum(self.phases.values())
        facts["time"] = f"{duration(total)}: " + ", ".join(f"{k} {percent(share)}" for k, share in self.fractions.items())
        width = max(map(len, facts))
        return "\n".join(["Summary", *(f"  {name:<{width}}  {text}" for name, text in facts.items())])

    @property
    def fractions(self) -> dict[str, float]:
        """Each phase that took any time, as a part of all."""
        total = sum(self.phases.values())
        return {name: seconds / total for name, seconds in self.phases.items() if seconds > 0}


def _many(count: int, thing: str) -> str:
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


def size(nbytes: float) -> str:
    """Three figures and a unit: "1.21 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 999.5:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"


def percent(part: float) -> str:
    """"12%", and never 0% of what is there."""
    return "<1%" if 0 < part < 0.005 else ">99%" if 0.995 <= part < 1 else f"{part:.0%}"


def duration(seconds: float) -> str:
    """"84 ms", "12.3 s", "5 min 12 s", "2 h 05 min"."""
    if seconds < 0.9995:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
