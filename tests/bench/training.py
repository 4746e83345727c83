"""Rows a second in the steady state, ours beside plain DDP: the same module, batch and optimizer, two workers of one thread.

A repetition runs each system once, in turn (A B C A B C), so that a slow minute of the machine falls on all of them. Its
value is batch / median seconds of the steps after the first WARM; starting, reading and ending are not in it (fits.py).
A step's seconds are the whole of it: rows picked, forward, backward, exchange, optimizer, new weights everywhere.

    barrier, shuffle   our engines, on a DataFrame of Parquet files; seconds as in model.history
    ddp                DistributedDataParallel over gloo, rows in memory, no Spark; `ddp fused` with the one-pass optimizer
    naive              W3 only: mapPartitions + treeAggregate + broadcast

BigDL 2.4's rows a second are from another run, on a machine of this kind: a ratio with them is an indication.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pyspark.sql import SparkSession

from tests.bench.ddp import ddp
from tests.bench.naive import naive
from tests.bench.report import Claim, Context, Row
from tests.bench.workloads import W1, W2, W3, Workload

WARM = {"W1": 300, "W2": 20, "W3": 5}  # in which the JVM still compiles what it runs
STEPS = {"W1": 500, "W2": 60, "W3": 15}
BIGDL = {"W1": (3_196.0, 9_891.0), "W2": (39_000.0, 222_000.0)}  # rows a second, and those of DDP in the same run
AGAINST_DDP = {"W1": 1.0, "W2": 1.2, "W3": 2.0}

Told = dict[str, Any]  # seconds: of each step; phases: {name: seconds of each step}


def ours(spark: SparkSession, work: Workload, path: Path, engine: str, **more: Any) -> Told:
    """One fit. A step of its history begins where the one before ended."""
    lines = [x for x in work.estimator(engine, **more).fit(spark.read.parquet(str(path))).history if "step" in x]
    names = {"data": "data_s", "compute": "compute_s", "sync": "sync_s"}
    phases = {name: [line[key] for line in lines] for name, key in names.items()}
    return {"seconds": [line["seconds"] for line in lines], "phases": phases, "loss": [line["loss"] for line in lines]}


def systems(spark: SparkSession, work: Workload, path: Path, steps: int) -> dict[str, Callable[[], Told]]:
    found: dict[str, Callable[[], Told]] = {
        "barrier": lambda: ours(spark, work, path, "barrier"),
        "shuffle": lambda: ours(spark, work, path, "shuffle"),
        "ddp": lambda: ddp(work, path, steps),
        "ddp fused": lambda: ddp(work, path, steps, fuse=True),
    }
    if work is W3:
        found["naive"] = lambda: naive(spark, work, path, steps)
    return found


def steady(told: Told, warm: int) -> tuple[float, dict[str, float]]:
    """Median seconds of a step, and of each phase."""
    middle = statistics.median
    return middle(told["seconds"][warm:]), {name: middle(spent[warm:]) for name, spent in told["phases"].items()}


def measure(context: Context, work: Workload) -> list[Row]:
    steps = 8 if context.quick else STEPS[work.name]
    warm = min(WARM[work.name], steps // 2)
    spark = context.session()
    path = work.write(context.folder, rows=steps * work.batch)
    seconds: dict[str, list[float]] = {}
    phases: dict[str, list[dict[str, float]]] = {}
    slowest: dict[str, float] = {}
    for _ in range(context.repeat):
        for name, run in systems(spark, work, path, steps).items():
            told = run()
            step, parts = steady(told, warm)
            seconds.setdefault(name, []).append(step)
            phases.setdefault(name, []).append(parts)
            slowest[name] = max(slowest.get(name, 0.0), *told["seconds"][warm:])
    rows = []
    for name, found in seconds.items():
        middle = {part: statistics.median(x[part] for x in phases[name]) for part in phases[name][0]}
        note = f"{steps - warm} steps; s / step {statistics.median(found):.4f}, slowest of all {slowest[name]:.3f}"
        rows.append(Row("training", label(work), name, "rows/s", tuple(work.batch / s for s in found), middle, note))
    return rows


def label(work: Workload) -> str:
    return f"{work.name} {work.title}"


def claims(work: Workload, rows: list[Row]) -> list[Claim]:
    speed = {row.system: row.median for row in rows}
    found = [Claim("training", f"{work.name}: barrier against ddp (rows/s)", speed["barrier"] / speed["ddp"], AGAINST_DDP[work.name])]
    if "naive" in speed:
        found.append(Claim("training", f"{work.name}: naive's round against shuffle's (s)", speed["shuffle"] / speed["naive"], 4.0))
    if work.name in BIGDL:
        theirs, beside = BIGDL[work.name]
        text = f"{work.name}: shuffle against BigDL 2.4's {theirs:,.0f} rows/s of another run"
        found.append(Claim("training", text, speed["shuffle"] / theirs, 2.0))
        text = f"{work.name}: the same, each divided by DDP's rows/s of its own run"
        found.append(Claim("training", text, (speed["shuffle"] / speed["ddp"]) / (theirs / beside), 2.0))
    return found


def run(context: Context) -> tuple[list[Row], list[Claim]]:
    rows: list[Row] = []
    found: list[Claim] = []
    for work in (W1, W2, W3):
        mine = measure(context, work)
        rows += mine
        found += claims(work, mine)
    return rows, found
