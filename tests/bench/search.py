"""A search over 8 learning rates: in one pass over the rows (fitMultiple), beside 8 separate fits of the same estimator.

Both on two ranks of the barrier engine, in a session that has run before, one after the other. W4 is a table whose rows cost more
than the module; W1 is LeNet, whose k convolutions are computed in turn, so that what is saved are launch, reading and meetings.
The note has the largest difference of a weight between the two, relative to the largest weight.
"""

from __future__ import annotations

import statistics
import time
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tests.bench.report import Claim, Context, Row
from tests.bench.workloads import W1, W4

MODELS = 8
ROWS = {"W4": 100_000, "W1": 4_000}
BOUNDS = {"W4": 0.5, "W1": 1.0}  # seconds of one pass over those of separate fits


def weights(models: Any) -> list[Tensor]:
    return [torch.cat([p.detach().reshape(-1) for p in model.module.parameters()]) for model in models]


def run(context: Context) -> tuple[list[Row], list[Claim]]:
    spark, rows, claims = context.session(), [], []
    for work in (W4, W1):
        count = 2 * work.batch if context.quick else ROWS[work.name]
        df = spark.read.parquet(str(work.write(context.folder, rows=count)))
        estimator = work.estimator("barrier")
        # the rates lie within a factor of two: a model that diverges would be no fair work
        maps = [{estimator.optimizer: partial(torch.optim.SGD, lr=1e-3 * 2 ** (i / MODELS))} for i in range(MODELS)]
        systems = {
            "one pass": lambda estimator=estimator, df=df, maps=maps: estimator.fit(df, maps),
            "separate fits": lambda estimator=estimator, df=df, maps=maps: [estimator.fit(df, given) for given in maps],
        }
        estimator.fit(df, maps[0])  # warm
        seconds: dict[str, list[float]] = {name: [] for name in systems}
        found: dict[str, list[Tensor]] = {}
        for _ in range(context.repeat):
            for name, fit in systems.items():
                began = time.perf_counter()
                models = fit()
                seconds[name].append(time.perf_counter() - began)
                found[name] = weights(models)
        apart = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*found.values(), strict=True))
        title = f"{work.name}, {count:,} rows, {MODELS} models"
        rows += [
            Row("search", title, name, "s", tuple(values), note=f"weights differ by {apart:.1e}" if name == "one pass" else "")
            for name, values in seconds.items()
        ]
        ratio = statistics.median(seconds["one pass"]) / statistics.median(seconds["separate fits"])
        claims.append(Claim("search", f"{title}: one pass against separate fits (s)", ratio, BOUNDS[work.name], "<="))
    return rows, claims
