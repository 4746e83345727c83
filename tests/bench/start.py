"""From fit() to the first step, and twenty fits in one session.

    first step   the moment when the last rank enters forward for the first time; each rank notes it in a file of its own
    beside it    TorchDistributor's run() to the same moment, on the same files, in its faster mode

Both in a session that has run before, on a small table. Twenty fits follow, with each engine: seconds, memory and files
after each, to see what grows. The JVM is asked to collect its garbage before its heap is read.
"""

from __future__ import annotations

import glob
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from torch import Tensor, nn

from tests.bench.distributor import distribute
from tests.bench.ingest import local_folders
from tests.bench.report import Claim, Context, Row
from tests.bench.watch import pss, workers
from tests.bench.workloads import Seeded, Workload, adam

FITS = 20
FEATURES = 16


def _table(rng: np.random.Generator, rows: int) -> dict[str, pa.Array]:
    x = rng.standard_normal((FEATURES, rows)).astype("f4")
    return {f"f{i}": pa.array(x[i]) for i in range(FEATURES)} | {"label": pa.array(x.sum(0))}


def _net() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, 32), nn.ReLU(), nn.Linear(32, 1), nn.Flatten(0))


SMALL = Workload(
    "small", "small table", 20_000, 1_024, Seeded(_net), nn.MSELoss, adam, [[f"f{i}" for i in range(FEATURES)]], "label", _table
)


class Noted(nn.Module):
    """A module that notes in `folder` when this process entered its forward for the first time."""

    def __init__(self, inner: nn.Module, folder: str) -> None:
        super().__init__()
        self.inner, self.folder = inner, folder

    def forward(self, x: Tensor) -> Tensor:
        if self.training:  # not when the driver asks for the shape of the output, afterwards
            path = Path(self.folder, str(os.getpid()))
            if not path.exists():
                path.write_text(repr(time.time()))
        return self.inner(x)


def first_step(spark: Any, path: Path, engine: str) -> float:
    with tempfile.TemporaryDirectory() as folder:
        estimator = SMALL.estimator(engine, module=Noted(SMALL.make(), folder))
        frame = spark.read.parquet(str(path))
        began = time.time()
        estimator.fit(frame)
        moments = [float(file.read_text()) for file in Path(folder).iterdir()]
    assert moments
    return max(moments) - began


def resident(pid: int) -> int:
    """Bytes of memory that a process has now (RSS)."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def left(folders: list[Path]) -> int:
    """Files and folders of ours that lie in shared memory and in Spark's local directories."""
    places = ["/dev/shm", *map(str, folders)]
    return sum(len(glob.glob(f"{place}/bigdl_lite-*")) for place in places)


def heap(spark: Any) -> int:
    """Bytes in use in the driver's JVM after a collection."""
    runtime = spark.sparkContext._jvm.java.lang.Runtime.getRuntime()
    runtime.gc()
    return int(runtime.totalMemory() - runtime.freeMemory())


def twenty(spark: Any, path: Path, engine: str, fits: int) -> dict[str, list[float]]:
    jvm = int(spark.sparkContext._jvm.java.lang.ProcessHandle.current().pid())
    folders = local_folders(spark)
    found: dict[str, list[float]] = {}
    for _ in range(fits):
        began = time.perf_counter()
        SMALL.estimator(engine).fit(spark.read.parquet(str(path)))
        now = {
            "seconds": time.perf_counter() - began, "driver RSS MiB": resident(os.getpid()) / 2**20,
            "JVM heap after gc MiB": heap(spark) / 2**20, "JVM RSS MiB": resident(jvm) / 2**20,
            "workers Pss MiB": sum(pss(pid)["all"] for pid in workers()) / 2**20, "files left": float(left(folders)),
        }  # fmt: skip
        for name, value in now.items():
            found.setdefault(name, []).append(value)
    return found


def run(context: Context) -> tuple[list[Row], list[Claim]]:
    spark = context.session()
    path = SMALL.write(context.folder)
    for engine in ("barrier", "shuffle"):
        first_step(spark, path, engine)  # warm
    tried = {mode: distribute(spark, SMALL, path, mode).first_step for mode in (False, True)}
    mode = min(tried, key=lambda mode: tried[mode])
    peer = f"TorchDistributor, local_mode={mode}"
    values: dict[str, list[float]] = {"barrier": [], "shuffle": [], peer: []}
    for _ in range(context.repeat):
        for engine in ("barrier", "shuffle"):
            values[engine].append(first_step(spark, path, engine))
        values[peer].append(distribute(spark, SMALL, path, mode).first_step)
    note = f"tried: local_mode=False {tried[False]:.2f} s, True {tried[True]:.2f} s"
    work = f"{SMALL.title}, {SMALL.rows:,} rows"
    rows = [Row("start", work, f"{name}: to the first step", "s", tuple(found), note=note if name == peer else "")
            for name, found in values.items()]  # fmt: skip
    ratio = statistics.median(values["barrier"]) / statistics.median(values[peer])
    claims = [Claim("start", "to the first step, barrier against TorchDistributor (s)", ratio, 0.7, "<=")]
    for engine in ("barrier", "shuffle"):
        found = twenty(spark, path, engine, 8 if context.quick else FITS)
        for name, series in found.items():
            unit = "s" if name == "seconds" else "files" if name == "files left" else "MiB"
            told = f"fits 3 .. 7: {_middle(series[2:7]):.2f}, the last five: {_middle(series[-5:]):.2f}"
            rows.append(Row("start", work, f"{engine}, {len(series)} fits: {name}", unit, tuple(series), note=told))
        grown = {name: _middle(series[-5:]) / _middle(series[2:7]) for name, series in found.items() if name != "files left"}
        claims.append(Claim("start", f"{engine}: seconds of the last five fits against fits 3 .. 7", grown["seconds"], 1.2, "<="))
        for name in ("driver RSS MiB", "JVM heap after gc MiB", "workers Pss MiB"):
            claims.append(Claim("start", f"{engine}: {name}, the last five fits against fits 3 .. 7", grown[name], 1.1, "<="))
        claims.append(Claim("start", f"{engine}: files left by any fit", max(found["files left"]), 0.0, "<="))
    return rows, claims


def _middle(series: list[float]) -> float:
    return statistics.median(series)
