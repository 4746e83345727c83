"""What a round of the shuffle engine costs besides the work in it.

    fixed    a tiny model: the seconds of a round without its compute, beside an empty Spark job of the same two stages,
             map over 2 cached partitions -> partitionBy(2) -> mapPartitions -> collect, in the same session, in turn
    schedule an empty job of one stage and N = 1 .. 8 tasks: a + c N, by non-negative least squares
    share    7 million parameters and about one second of compute a round: how much of a round is the exchange

Seconds are those of the history: what the driver saw of a round, and the slowest worker's forward and backward.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from bigdl_lite import TorchEstimator
from tests.bench.report import Claim, Context, Row
from tests.bench.workloads import adam

ROUNDS, WARM, FEATURES = 40, 5, 16


class Deep(nn.Module):
    """An MLP of about 7 M parameters.  [B, 16] -> [B]"""

    def __init__(self) -> None:
        super().__init__()
        h = 1850
        self.layers = nn.Sequential(
            nn.Linear(FEATURES, h), nn.ReLU(), nn.Linear(h, h), nn.ReLU(), nn.Linear(h, h), nn.ReLU(), nn.Linear(h, 1), nn.Flatten(0)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def tiny() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 1), nn.Flatten(0))


def fit(spark: Any, module: Any, batch: int, rounds: int) -> list[dict[str, Any]]:
    """The steps of a fit in the shuffle engine, on rows that Spark makes."""
    from pyspark.sql import functions as F

    row = F.col("id").cast("float")
    vector = F.array(*(F.sin(row * (i + 1)).cast("float") for i in range(FEATURES)))
    frame = spark.range(0, batch * rounds, 1, 2).select(vector.alias("features"), F.sin(row).cast("float").alias("label"))
    estimator = TorchEstimator(
        module=module, loss=nn.MSELoss(), optimizer=adam, inputCols=["features"], batchSize=batch, numWorkers=2, engine="shuffle",
        progress="none",
    )  # fmt: skip
    return [line for line in estimator.fit(frame).history if "step" in line]


def pairs(rows: Iterable[Any]) -> Iterator[tuple[int, bytes]]:
    for row in rows:
        yield row, b""


def values(rows: Iterable[Any]) -> Iterator[Any]:
    yield from rows


def empty(spark: Any, rounds: int) -> list[float]:
    """Seconds of Spark jobs that do nothing, in two stages of two tasks."""
    tokens = spark.sparkContext.parallelize([0, 1], 2).cache()
    tokens.count()
    seconds = []
    for _ in range(rounds):
        began = time.perf_counter()
        tokens.mapPartitions(pairs).partitionBy(2).mapPartitions(values).collect()
        seconds.append(time.perf_counter() - began)
    tokens.unpersist()
    return seconds


def scheduled(spark: Any, rounds: int) -> tuple[list[Row], Claim]:
    """What Spark takes to run N tasks that do nothing: t(N) = a + c N, a and c not below 0, and how far the worst N is from it."""
    from scipy.optimize import nnls

    found: dict[int, list[float]] = {tasks: [] for tasks in range(1, 9)}
    rdds = {tasks: spark.sparkContext.parallelize(range(tasks), tasks).mapPartitions(values) for tasks in found}
    for _ in range(rounds):
        for tasks, rdd in rdds.items():
            began = time.perf_counter()
            rdd.collect()
            found[tasks].append(time.perf_counter() - began)
    middles = {tasks: statistics.median(seconds[WARM:]) for tasks, seconds in found.items()}
    (a, c), _ = nnls(np.array([[1.0, tasks] for tasks in middles]), np.array(list(middles.values())))
    worst = max(abs(a + c * tasks - seconds) / seconds for tasks, seconds in middles.items())
    note = f"fit: {1e3 * a:.1f} ms and {1e3 * c:.1f} ms a task, on 2 slots"
    rows = [Row("overhead", f"empty, {tasks} tasks", "a job of one stage", "s", (s,), {}, note) for tasks, s in middles.items()]
    return rows, Claim("overhead", "scheduling as a + c N: the largest error of 1 to 8 tasks", worst, 0.25, "<=")


def run(context: Context) -> tuple[list[Row], list[Claim]]:
    spark = context.session()
    fit(spark, tiny, 64, WARM)
    empty(spark, WARM)
    ours: list[float] = []
    bare: list[float] = []
    each = 10 if context.quick else ROUNDS
    for _ in range(context.repeat):
        steps = fit(spark, tiny, 64, each + WARM)[WARM:]
        ours += [step["seconds"] - step["compute_s"] for step in steps]
        bare += empty(spark, each + WARM)[WARM:]
    ratio = statistics.median(ours) / statistics.median(bare)
    rows = [
        Row("overhead", "tiny, 2 workers", "shuffle, a round without its compute", "s", tuple(ours)),
        Row("overhead", "tiny, 2 workers", "an empty job of two stages", "s", tuple(bare)),
    ]
    claims = [Claim("overhead", "a round of shuffle without its compute, against an empty job (s)", ratio, 1.3, "<=")]
    more, claim = scheduled(spark, WARM + (5 if context.quick else 20))
    rows += more
    claims.append(claim)
    batch = _batch(spark, 0.2 if context.quick else 1.0)
    heavy = [step for _ in range(context.repeat) for step in fit(spark, Deep, batch, 3 + 2)[2:]]
    middle = {name: statistics.median(step[key] for step in heavy)
              for name, key in (("data", "data_s"), ("compute", "compute_s"), ("sync", "sync_s"))}  # fmt: skip
    n = sum(p.numel() for p in Deep().parameters())
    rows.append(Row("overhead", f"{n / 1e6:.1f} M parameters, batch {batch:,}", "shuffle", "s",
                    tuple(step["seconds"] for step in heavy), middle))  # fmt: skip
    share = statistics.median(step["sync_s"] / step["seconds"] for step in heavy)
    claims.append(Claim("overhead", f"share of sync in a round of {middle['compute']:.2f} s of compute, shuffle", share, 0.1, "<="))
    return rows, claims


def _batch(spark: Any, seconds: float) -> int:
    """Rows over both workers that take about so many seconds of compute: measured, in steps of 64."""
    found = 1024
    for _ in range(2):
        took = statistics.median(step["compute_s"] for step in fit(spark, Deep, found, 4)[1:])
        found = max(64, int(found * seconds / took) // 64 * 64)
    return found
