"""Where the time of a fit went, and what would help: a few lines, by rules that can be read in one table (RULES).

    of the fit     launch, validation                      parts of the seconds on the clock
    of a step      compute, data (input wait), sync        parts of the seconds of steps alone, so that a long launch hides nothing

A rule speaks where its condition holds; where none does, the report says that and no more. It knows what was measured, and nothing of
the model: what it names is worth a try, in the order of the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from bigdl_lite.observe.summary import Summary, duration, percent, size

_SHORT = 0.005  # seconds of compute, below which what a step costs beside it counts
_MOST = 3  # pieces of advice in one report


@dataclass(frozen=True)
class Facts:
    """What the rules look at. launch, validation: parts of the fit; compute, data, sync: parts of a step; step_compute: seconds."""

    engine: str
    workers: int
    seconds: float
    launch: float
    validation: float
    compute: float
    data: float
    sync: float
    step_seconds: float
    step_compute: float
    step_rows: float
    step_bytes: float
    skew: float  # rows of the largest share over the mean of all; 1 where shares are not known


def facts(summary: Summary) -> Facts:
    parts, shares = summary.fractions, summary.shares
    steps = max(1, summary.counted)
    inside = max(1e-9, summary.total("seconds"))
    return Facts(
        engine=summary.engine, workers=summary.workers, seconds=sum(summary.phases.values()),
        launch=parts.get("launch", 0.0), validation=parts.get("validation", 0.0),
        compute=summary.total("compute_s") / inside, data=summary.total("data_s") / inside, sync=summary.total("sync_s") / inside,
        step_seconds=inside / steps, step_compute=summary.total("compute_s") / steps, step_rows=summary.rows / steps,
        step_bytes=summary.bytes_sent / steps, skew=max(shares) * len(shares) / max(1, sum(shares)) if shares else 1.0,
    )  # fmt: skip


class Rule(NamedTuple):
    name: str
    when: Callable[[Facts], bool]
    say: Callable[[Facts], str]


def _larger(f: Facts) -> str:
    """Rows of a step that computes for _SHORT, rounded up to a power of two times what they are; 64 times at most."""
    return f"{f.step_rows * 2 ** min(6, math.ceil(math.log2(_SHORT / max(1e-6, f.step_compute)))):,.0f}"


RULES = (
    Rule(
        "launch",
        lambda f: f.launch > 0.5,
        lambda f: f"launch took {percent(f.launch)} of the fit ({duration(f.launch * f.seconds)}): make more epochs in one fit, let "
        "local_session (or spark.python.daemon.module = bigdl_lite.engine.daemon) keep torch imported, cache the DataFrame",
    ),
    Rule(
        "small steps",
        lambda f: f.step_compute < _SHORT and f.compute < 0.5,
        lambda f: f"a step computes for {duration(f.step_compute)} of its {duration(f.step_seconds)}: a larger batchSize, say "
        f"{_larger(f)} in place of {f.step_rows:,.0f} rows, and a learning rate for it, or algorithm=local_sgd(8)",
    ),
    Rule(
        "rounds of shuffle",
        lambda f: f.engine == "shuffle" and f.sync > 0.5,
        lambda f: f"sync is {percent(f.sync)} of a step, a Spark job each: engine='barrier' runs one job a fit, where all workers have "
        "a slot at once",
    ),
    Rule(
        "bytes",
        lambda f: f.sync > 0.5 and f.step_bytes > 1e5 and f.engine != "shuffle",
        lambda f: f"sync is {percent(f.sync)} of a step, which sends {size(f.step_bytes)}: exchange='bf16' or 'minmax8' sends half "
        "or a quarter, algorithm=local_sgd(8) meets every eighth batch only",
    ),
    Rule(
        "waiting",
        lambda f: f.sync > 0.5 and f.step_bytes <= 1e5 and f.engine == "barrier" and f.step_compute >= _SHORT and f.skew <= 1.5,
        lambda f: f"sync is {percent(f.sync)} of a step, though little is sent: is a worker slower than the others, are there more "
        f"workers ({f.workers}) than free cores, or is the optimizer itself slow?",
    ),
    Rule(
        "input",
        lambda f: f.data > 0.2,
        lambda f: f"workers wait for rows {percent(f.data)} of a step: read with Raw instead of a Python function, select fewer or "
        "smaller columns, do in Spark before fit what need not be done in each epoch",
    ),
    Rule(
        "skewed shares",
        lambda f: f.skew > 1.5,
        lambda f: f"the largest share has {f.skew:.1f} times the rows of the mean one, and a step lasts as long as its rows of it: "
        "df.repartition(numWorkers) before fit",
    ),
    Rule(
        "validation",
        lambda f: f.validation > 0.3,
        lambda f: f"validation took {percent(f.validation)} of the fit: validate less often, or on fewer rows",
    ),
)  # fmt: skip


def advice(summary: Summary) -> dict[str, str]:
    """What each rule that speaks says, by its name."""
    known = facts(summary)
    return {rule.name: rule.say(known) for rule in RULES if rule.when(known)} if summary.counted else {}


def report(summary: Summary) -> str:
    """Two lines of numbers and up to three of advice."""
    names: dict[str, Any] = {"data": "input wait"}
    parts = ", ".join(f"{names.get(name, name)} {percent(part)}" for name, part in summary.fractions.items())
    workers = f" with {summary.workers} worker{'s' if summary.workers > 1 else ''}" if summary.workers else ""
    lines = [
        f"{summary.engine or 'fit'}{workers}: {summary.rows:,} rows in {duration(sum(summary.phases.values()))}, "
        f"{summary.rows_per_second:,.0f} rows/s in steps",
        f"time: {parts or 'none'}",
    ]
    if not summary.counted:
        return "\n".join([*lines, "no step was made"])
    said = list(advice(summary).values())
    if not said:
        known = facts(summary)
        said = [f"a step computes for {percent(known.compute)} of its time; nothing else stands out"]
    return "\n".join([*lines, *(f"- {text}" for text in said[:_MOST])])
