"""The whole fit of W4, from fit() to the model, beside TorchDistributor's whole run() on the same files.

Both train one epoch on two ranks in a session that has run before. Ours reads through a DataFrame; TorchDistributor reads
the files itself, in its faster mode (both are tried once). What a fit does besides its steps is `rest`: planning,
reading and decoding of the rows, the stage, and the way back.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

from tests.bench.distributor import Told, distribute, middle
from tests.bench.report import Claim, Context, Row
from tests.bench.workloads import W4

_PHASES = {"data": "data_s", "compute": "compute_s", "sync": "sync_s"}


def ours(spark: Any, path: Any, engine: str) -> tuple[float, dict[str, float], float]:
    """Seconds, the phases of them, and the mean loss of the epoch."""
    estimator = W4.estimator(engine)
    began = time.perf_counter()
    model = estimator.fit(spark.read.parquet(str(path)))
    seconds = time.perf_counter() - began
    steps = [line for line in model.history if "step" in line]
    phases = {name: sum(step[key] for step in steps) for name, key in _PHASES.items()}
    (loss,) = (line["loss"] for line in model.history if "step" not in line)
    return seconds, {**phases, "rest": seconds - sum(phases.values())}, loss


def run(context: Context) -> tuple[list[Row], list[Claim]]:
    spark = context.session()
    path = W4.write(context.folder, context.quick)
    ours(spark, path, "barrier")  # warm
    tried = {mode: distribute(spark, W4, path, mode) for mode in (False, True)}
    mode = min(tried, key=lambda mode: tried[mode].seconds)
    mine: list[tuple[float, dict[str, float], float]] = []
    theirs: list[Told] = []
    for _ in range(context.repeat):
        mine.append(ours(spark, path, "barrier"))
        theirs.append(distribute(spark, W4, path, mode))
    middle_one = sorted(mine, key=lambda fit: fit[0])[len(mine) // 2]
    also = f"tried: local_mode=False {tried[False].seconds:.2f} s, True {tried[True].seconds:.2f} s"
    rows = [
        Row("fits", W4.name, "barrier", "s", tuple(fit[0] for fit in mine), middle_one[1], f"mean loss {middle_one[2]:.3f}"),
        Row("fits", W4.name, f"TorchDistributor, local_mode={mode}", "s", tuple(run.seconds for run in theirs), middle(theirs),
            f"mean loss {theirs[-1].loss:.3f}; {also}"),
    ]  # fmt: skip
    ratio = statistics.median(rows[0].values) / statistics.median(rows[1].values)
    return rows, [Claim("fits", "whole fit of W4, barrier against TorchDistributor (s)", ratio, 0.7, "<=")]
