"""How the time of a round grows with the model and with the number of ranks, in both Spark engines.

An MLP, 16 rows a rank, Adam: small batches, so that compute does not hide the exchange. There are more ranks than cores
from 4 on (a note says how many cores there are): compute then takes turns, and the exchange is the same memory traffic
by more processes. A process's peak of memory bounds the largest case; what has no room is left out and said so.
"""

from __future__ import annotations

import os
import statistics
from typing import Any

import numpy as np

from tests.bench.report import Claim, Context, Row
from tests.bench.training import ours
from tests.bench.workloads import Workload, mlp

MILLIONS, RANKS = (1, 10, 50), (2, 4, 8)
ROWS, STEPS, WARM = 16, 8, 3
SLACK = 1.25


def _room() -> float:
    """Bytes that are free now."""
    with open("/proc/meminfo") as lines:
        found = {line.split(":")[0]: 1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")}
    return found["MemAvailable"]


def _one(context: Context, work: Workload, engine: str, ranks: int, steps: int) -> dict[str, Any]:
    spark = context.spark
    path = work.write(context.folder, rows=steps * work.batch)
    return ours(spark, work, path, engine, numWorkers=ranks)


def run(context: Context) -> tuple[list[Row], list[Claim]]:
    context.session(cores=max(RANKS), conf={"spark.driver.memory": "5g"})
    steps, repeat = (5 if context.quick else STEPS), min(context.repeat, 3)
    sizes = tuple(m / 10 for m in MILLIONS) if context.quick else MILLIONS
    rows: dict[tuple[str, float, int], list[dict[str, Any]]] = {}
    left_out = []
    for _ in range(repeat):
        for millions in sizes:
            for ranks in RANKS:
                # weights, two of Adam and a gradient each, and what a backward pass keeps
                if (need := 4e6 * millions * (4 + 2 * ranks) + 0.25e9 * ranks) > _room():
                    left_out.append(f"{millions:g} M, {ranks} ranks: needs about {need / 1e9:.1f} GB")
                    continue
                work = mlp(millions, 0, ROWS * ranks)
                for engine in ("barrier", "shuffle"):
                    rows.setdefault((engine, millions, ranks), []).append(_one(context, work, engine, ranks, steps))
    found = [_row(engine, millions, ranks, told) for (engine, millions, ranks), told in rows.items()]
    claims = [claim for engine in ("barrier", "shuffle") for ranks in RANKS if (claim := _claim(found, engine, ranks, sizes))]
    if left_out:
        print("growth, left out for want of memory:", *sorted(set(left_out)), sep="\n  ")
    return found, claims


def _row(engine: str, millions: float, ranks: int, told: list[dict[str, Any]]) -> Row:
    middle = statistics.median
    values = tuple(middle(x["seconds"][WARM:]) for x in told)
    phases = {name: middle(middle(x["phases"][name][WARM:]) for x in told) for name in told[0]["phases"]}
    return Row("growth", f"{millions:g} M, {ranks} ranks", engine, "s", values, phases, f"{os.cpu_count()} cores, {ROWS} rows a rank")


def _claim(rows: list[Row], engine: str, ranks: int, sizes: tuple[float, ...]) -> Claim | None:
    """Linear in the parameters: sync of the largest size against that of the middle one, as measured and on the line of
    least squares through all sizes, whichever is more.
    """
    sync = {row.workload: row.phases["sync"] for row in rows if row.system == engine}
    names = [f"{millions:g} M, {ranks} ranks" for millions in sizes]
    if any(name not in sync for name in names):
        return None
    times = [sync[name] for name in names]
    slope, base = np.polyfit(sizes, times, 1)
    line = [slope * x + base for x in sizes]
    # a line that starts below zero at the middle size has grown faster than any line through the origin
    ratio = max(times[2] / times[1], line[2] / line[1] if line[1] > 0 else float("inf"))
    text = f"{engine}, {ranks} ranks: sync of {sizes[2]:g} M against {sizes[1]:g} M parameters"
    return Claim("growth", text, float(ratio), SLACK * sizes[2] / sizes[1], "<=")
