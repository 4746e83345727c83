"""300 million parameters, 1.2 GB of weights, with the 1 GB heap that Spark gives a driver by default.

A bag of embeddings and one number from it: a step computes next to nothing, and all that is heavy is the weights on their
way. SGD without momentum, so that the optimizer holds nothing of its own. barrier must train; shuffle brings the weights
through the driver's JVM, so it must train or refuse before its first job, in words that hold the numbers.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from bigdl_lite import TorchEstimator
from tests.bench.report import Claim, Context, Row

SESSION = {"cores": 2, "conf": {"spark.driver.memory": "1g"}}  # what Spark takes by default
WIDTH, BAG, BATCH, STEPS = 128, 16, 64, 3


class Bag(nn.Module):
    """The mean of the embeddings of 16 words, and one number from it.  int64 [B, 16] -> [B]"""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(words, WIDTH, mode="mean", _weight=torch.empty(words, WIDTH).uniform_(-0.1, 0.1))
        self.last = nn.Linear(WIDTH, 1)

    def forward(self, bag: Tensor) -> Tensor:
        return self.last(self.words(bag)).squeeze(1)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


@dataclass(frozen=True)
class Attempt:
    """What became of a fit: its seconds, its steps, how many jobs Spark ran, and the error if there was one."""

    seconds: float
    steps: list[dict[str, Any]]
    moved: bool
    jobs: int
    error: str


def attempt(spark: Any, engine: str, words: int, frame: Any) -> Attempt:
    before, began = _last_job(spark), time.perf_counter()
    module = Bag(words)
    estimator = TorchEstimator(
        module=module, loss=nn.MSELoss(), optimizer=sgd, inputCols=["bag"], labelCol="label", batchSize=BATCH, numWorkers=2,
        engine=engine, progress="none",
    )  # fmt: skip
    try:
        model = estimator.fit(frame)
    except Exception as error:  # a failure is what this module is to report
        told = next(line for line in f"{type(error).__name__}: {error}".splitlines() if line.strip())
        return Attempt(time.perf_counter() - began, [], False, _last_job(spark) - before - 1, told)
    steps = [line for line in model.history if "step" in line]
    moved = not torch.equal(model.module.last.weight.cpu(), module.last.weight)
    return Attempt(time.perf_counter() - began, steps, moved, _last_job(spark) - before - 1, "")


def _last_job(spark: Any) -> int:
    """The number of the newest job: Spark counts them; the one that asks is counted, too."""
    sc = spark.sparkContext
    sc.setJobGroup("large", "which number is next")
    sc.parallelize([0], 1).count()
    found = max(sc.statusTracker().getJobIdsForGroup("large"))
    sc.setLocalProperty("spark.jobGroup.id", None)
    return found


def run(context: Context) -> tuple[list[Row], list[Claim]]:
    words = 20_000 if context.quick else 2_350_000
    n = words * WIDTH + WIDTH + 1
    spark = context.session(**SESSION) if context.spark is None else context.spark
    heap = spark.sparkContext._jvm.java.lang.Runtime.getRuntime().maxMemory()
    frame = spark.read.parquet(str(_rows(context.folder, words)))
    rows, claims = [], []
    for engine in ("barrier", "shuffle"):
        made = attempt(spark, engine, words, frame)
        work = f"{n / 1e6:.0f} M parameters, heap {heap / 2**20:,.0f} MiB"
        first = made.steps[-1] if made.steps else {}
        phases = {name: first[key] for name, key in (("compute", "compute_s"), ("sync", "sync_s")) if first}
        note = made.error or f"{len(made.steps)} steps, the last in {first['seconds']:.2f} s; whole fit"
        rows.append(Row("large", work, engine, "s", (made.seconds,), phases, note))
        trained = len(made.steps) == STEPS and made.moved
        refused = bool(made.error) and made.jobs == 0 and len(re.findall(r"\d+", made.error)) >= 2
        if engine == "barrier":
            claims.append(Claim("large", "barrier trains (1: yes)", float(trained), 1.0, ">="))
        else:
            text = "shuffle trains, or is refused before its first job with the numbers (1: yes)"
            claims.append(Claim("large", text, float(trained or refused), 1.0, ">="))
    return rows, claims


def _rows(folder: Any, words: int) -> Any:
    path = folder / f"large-{words}"
    path.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(2):
        half = BATCH * STEPS // 2
        bags = pa.FixedSizeListArray.from_arrays(pa.array(rng.integers(0, words, half * BAG)), BAG).cast(pa.list_(pa.int64()))
        label = pa.array(rng.standard_normal(half).astype("f4"))
        pq.write_table(pa.table({"bag": bags, "label": label}), path / f"{i}.parquet")
    return path
