"""One long fit of a tiny model in each engine: is anything larger, or slower, at its end than after its first tenth?

    shuffle    5,000 rounds, each a Spark job          barrier    50,000 steps in one stage, a checkpoint every 5,000

Looked at through the whole fit, every few seconds. Memory is that of the driver, its JVM after a collection, and all Python
workers; files are those open in all these processes; the local directories are Spark's. The history keeps 500 steps (logInterval):
all 50,000 would be 50 MB, which is no leak but looks like one.
"""

from __future__ import annotations

import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bigdl_lite import TorchEstimator
from tests.bench.ingest import local_folders
from tests.bench.report import Claim, Context, Row
from tests.bench.start import heap, resident
from tests.bench.watch import Watched, on_disk, pss, workers

ROWS, FEATURES = 10_000, 16
STEPS = {"shuffle": 5_000, "barrier": 50_000}
_FLAT = 1.1


def tiny() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 1), nn.Flatten(0))


def run(context: Context) -> tuple[list[Row], list[Claim]]:
    spark = context.session()
    rows, claims = [], []
    for engine, steps in STEPS.items():
        series, seconds = soak(spark, context.folder, engine, steps // 20 if context.quick else steps)
        for name, found in series.items():
            early, late = _part(found, 0.1, 0.3), _part(found, 0.8, 1.0)
            unit = name.rpartition(" ")[2]
            rows.append(Row("soak", f"{steps:,} steps", f"{engine}: {name}", unit, tuple(found), note=f"{early:.4g} -> {late:.4g}"))
            grown = late / max(early, 1e-9)
            claims.append(Claim("soak", f"{engine}: {name}, the last fifth against the second tenth", grown, _FLAT, "<="))
        rows.append(Row("soak", f"{steps:,} steps", f"{engine}: the fit", "s", (seconds,)))
    return rows, claims


def soak(spark: Any, folder: Path, engine: str, steps: int) -> tuple[dict[str, list[float]], float]:
    """What was seen through one fit, in time; and the seconds of the fit."""
    from pyspark.sql import functions as F

    row = F.col("id").cast("float")
    vector = F.array(*(F.sin(row * (i + 1)).cast("float") for i in range(FEATURES)))
    frame = spark.range(0, ROWS, 1, 2).select(vector.alias("features"), F.sin(row).cast("float").alias("label"))
    batch, folders = 100, local_folders(spark)
    jvm = int(spark.sparkContext._jvm.java.lang.ProcessHandle.current().pid())
    seen: dict[str, list[float]] = {}

    def look() -> None:
        pids = workers()
        now = {
            "driver RSS MiB": resident(os.getpid()) / 2**20, "JVM heap MiB": heap(spark) / 2**20,
            "workers PSS MiB": sum(pss(pid)["all"] for pid in pids) / 2**20,
            "open files": sum(_open(pid) for pid in (os.getpid(), jvm, *pids)), "local directories MiB": on_disk(folders) / 2**20,
        }  # fmt: skip
        for name, value in now.items():
            seen.setdefault(name, []).append(value)

    estimator = TorchEstimator(
        module=tiny, loss=nn.MSELoss(), optimizer=lambda p: torch.optim.Adam(p, lr=1e-3), batchSize=batch, numWorkers=2, engine=engine,
        epochs=steps * batch // ROWS, logInterval=max(1, steps // 500), progress="none",
        checkpointDir=str(folder / f"soak-{time.time_ns()}"),
        checkpointInterval=steps // 10, checkpointUnit="step",
    )  # fmt: skip
    began = time.perf_counter()
    with Watched(look, 2.0 if steps > 1000 else 0.5):
        model = estimator.fit(frame)
    seconds = time.perf_counter() - began
    times = [line["seconds"] * 1e3 for line in model.history if "step" in line]
    count = len(times) // 50
    seen["a step ms"] = [statistics.median(times[i : i + count]) for i in range(0, len(times), count)]
    return seen, seconds


def _open(pid: int) -> int:
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return 0


def _part(series: list[float], start: float, stop: float) -> float:
    """The median of a part of a series."""
    a, b = int(len(series) * start), max(int(len(series) * start) + 1, int(len(series) * stop))
    return statistics.median(series[a:b])
