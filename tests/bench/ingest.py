"""From a DataFrame to tensors: rows a second, ours beside what a peer's user has.

    ours      the engine's own decoding of a share (data.arrow.share), called by an estimator whose engine stops there
    rows      rdd.mapPartitions, a Row at a time, torch.tensor of every 4096
    pandas    mapInPandas, a frame at a time, its values as one NumPy array
    files     the DataFrame written as parquet, then read by pyarrow on each rank: Horovod's estimators, TorchDistributor

The DataFrame is the result of a filter, so that `files` has to write it before it can read. `scan` is the read alone,
of the files that happened to be there: no peer has it for a DataFrame that was computed. All end as one float32 tensor
[rows of the share, 200] and one of labels, on each of two ranks. Bytes on disk are those of Spark's local directories.
"""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from pyspark import TaskContext
from pyspark.sql import DataFrame, SparkSession

from bigdl_lite.data.arrow import share
from bigdl_lite.data.columns import Columns
from bigdl_lite.engine.recipe import Observer, Outcome, Recipe, Start, silent
from bigdl_lite.engine.spark import collect
from bigdl_lite.engine.worker import settle
from tests.bench.distributor import read
from tests.bench.report import Claim, Context, Row
from tests.bench.watch import Most, on_disk
from tests.bench.workloads import W4

RANKS = 2
_TOLD = "rows long, jvm double, python double"
_CHUNK = 4096  # rows of one torch.tensor in `rows`


class _Stop(Exception):
    """The shares are decoded; nothing is to be trained."""


class Decoding:
    """An engine that does what the barrier engine does before the first step, and no more."""

    name = "decoding"

    def __init__(self) -> None:
        self.told: list[dict[str, Any]] = []

    def fit(self, frame: DataFrame, recipe: Recipe, start: Start, observer: Observer = silent) -> Outcome:
        self.told = collect(frame.mapInArrow(_decoder(recipe.columns), _TOLD, barrier=True)).to_pylist()
        raise _Stop


def _decoder(columns: Columns) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    def main(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        settle()
        began, watch = time.perf_counter(), _Watch(batches)
        mine = share(watch, columns, TaskContext.get().partitionId())
        whole = time.perf_counter() - began
        rows = mine.rows if mine is not None else 0
        told = {"rows": [rows], "jvm": [watch.waited], "python": [whole - watch.waited]}
        yield pa.RecordBatch.from_pydict(told)

    return main


class _Watch:
    """Counts the seconds in which Python waits for a record batch from the JVM."""

    def __init__(self, batches: Iterator[pa.RecordBatch]) -> None:
        self.batches, self.waited = batches, 0.0

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        return self

    def __next__(self) -> pa.RecordBatch:
        began = time.perf_counter()
        try:
            return next(self.batches)
        finally:
            self.waited += time.perf_counter() - began


def ours(frame: DataFrame) -> tuple[int, float, dict[str, float]]:
    """Rows, seconds and where they went; the slower rank's."""
    engine = Decoding()
    estimator = W4.estimator(engine)
    began = time.perf_counter()
    try:
        estimator.fit(frame)
    except _Stop:
        pass
    seconds = time.perf_counter() - began
    parts = {name: max(rank[name] for rank in engine.told) for name in ("jvm", "python")}
    return sum(rank["rows"] for rank in engine.told), seconds, {**parts, "rest": seconds - sum(parts.values())}


# ---- peers ------------------------------------------------------------------------------------------------------------


def names() -> list[str]:
    return list(W4.inputs[0])


def by_rows(frame: DataFrame) -> int:
    wanted = names()

    def tensors(rows: Iterable[Any]) -> Iterator[int]:
        settle()
        x, y, chunk = [], [], []
        for row in rows:
            chunk.append(row)
            if len(chunk) == _CHUNK:
                x.append(torch.tensor([row[:-1] for row in chunk]))
                y.append(torch.tensor([row[-1] for row in chunk]))
                chunk = []
        if chunk:
            x.append(torch.tensor([row[:-1] for row in chunk]))
            y.append(torch.tensor([row[-1] for row in chunk]))
        yield len(torch.cat(x)) if x else 0

    return sum(frame.select(*wanted, W4.label).coalesce(RANKS).rdd.mapPartitions(tensors).collect())


def by_pandas(frame: DataFrame) -> int:
    import pandas as pd

    wanted, label = names(), W4.label

    def tensors(frames: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        settle()
        x, y = [], []
        for part in frames:
            x.append(torch.from_numpy(part[wanted].to_numpy()))
            y.append(torch.from_numpy(part[label].to_numpy()))
        torch.cat(y)
        yield pd.DataFrame({"rows": [len(torch.cat(x)) if x else 0]})

    told = frame.select(*wanted, label).coalesce(RANKS).mapInPandas(tensors, "rows long").collect()
    return sum(row.rows for row in told)


def by_files(spark: SparkSession, folder: Path) -> int:
    files = sorted(str(file) for file in folder.glob("*.parquet"))
    wanted, label = names(), W4.label

    def tensors(rank: int, _: Iterable[Any]) -> Iterator[int]:
        settle()
        yield len(read(files[rank::RANKS], wanted, label)[0])

    return sum(spark.sparkContext.parallelize(range(RANKS), RANKS).mapPartitionsWithIndex(tensors).collect())


# ---- what lies on disks -----------------------------------------------------------------------------------------------


def local_folders(spark: SparkSession) -> list[Path]:
    """Where Spark, and we through Spark, put what does not stay in memory: told by a task."""

    def told(_: Iterable[Any]) -> Iterator[str]:
        yield os.environ["SPARK_LOCAL_DIRS"]

    (folders,) = spark.sparkContext.parallelize([0], 1).mapPartitions(told).collect()
    return [Path(folder) for folder in folders.split(",")]


# ---- all of them ------------------------------------------------------------------------------------------------------


def timed(call: Callable[[], int]) -> tuple[int, float]:
    began = time.perf_counter()
    rows = call()
    return rows, time.perf_counter() - began


def run(context: Context) -> tuple[list[Row], list[Claim]]:
    spark = context.session()
    path = W4.write(context.folder, context.quick)
    plain = spark.read.parquet(str(path))
    frame = plain.where("f0 > -10")
    rows = frame.count()
    written = Path(context.folder, "written")
    values: dict[str, list[float]] = {name: [] for name in ("ours", "ours, plain scan", "rows", "pandas", "files", "scan")}
    spent: dict[str, list[dict[str, float]]] = {"ours": [], "ours, plain scan": [], "files": []}
    fitted = [ours(frame)[0], by_pandas(frame), by_files(spark, Path(path))]  # all workers are warm now
    assert set(fitted) == {rows}, fitted
    most, folders = {"ours": 0, "ours, plain scan": 0}, local_folders(spark)
    # Rows are so slow that a tenth of them tells their rate
    tenth = frame.sample(0.1, seed=0).coalesce(RANKS).cache()
    few = tenth.count()
    for _ in range(context.repeat):
        for name, source in (("ours", frame), ("ours, plain scan", plain)):
            before = on_disk(folders)
            with Most(lambda: on_disk(folders), 0.1) as disk:
                got, seconds, parts = ours(source)
            assert got == rows, (got, rows)
            values[name].append(rows / seconds)
            spent[name].append(parts)
            most[name] = max(most[name], disk.most - before)
        got, seconds = timed(lambda: by_pandas(frame))
        values["pandas"].append(got / seconds)
        shutil.rmtree(written, ignore_errors=True)
        _, wrote = timed(lambda: frame.write.parquet(str(written)) or 0)
        got, seconds = timed(lambda: by_files(spark, written))
        assert got == rows, (got, rows)
        values["files"].append(got / (wrote + seconds))
        spent["files"].append({"write": wrote, "read": seconds})
        got, seconds = timed(lambda: by_files(spark, Path(path)))
        values["scan"].append(got / seconds)
    for _ in range(min(2, context.repeat)):
        got, seconds = timed(lambda: by_rows(tenth))
        values["rows"].append(few / seconds)
    notes = {
        **{name: f"most bytes on disk during a fit: {found:,}" for name, found in most.items()},
        "rows": f"{few:,} rows of a cached DataFrame, which flatters it",
        "files": f"{on_disk([written]):,} bytes written as parquet", "scan": "no DataFrame: the files read by pyarrow as they are",
    }  # fmt: skip
    shutil.rmtree(written, ignore_errors=True)
    table = [
        Row("ingest", W4.name, name, "rows/s", tuple(found), _middle(spent.get(name, [])), notes.get(name, ""))
        for name, found in values.items()
    ]
    middle = {name: statistics.median(found) for name, found in values.items()}
    best = max("rows", "pandas", "files", key=lambda name: middle[name])
    share = max(most.values()) / (rows * 4 * len(names()))
    claims = [
        Claim("ingest", f"DataFrame to tensors, ours against {best}, the best peer (rows/s)", middle["ours"] / middle[best], 2.0, ">="),
        Claim("ingest", "bytes that a fit puts on disk, of the bytes of its tensors", share, 0.01, "<="),
    ]
    return table, claims


def _middle(parts: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(part[key] for part in parts) for key in parts[0]} if parts else {}
