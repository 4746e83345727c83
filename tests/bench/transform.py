"""model.transform beside pyspark.ml.functions.predict_batch_udf, on every row of W4.

Each is consumed by a write that throws the rows away: once with the label and the prediction alone, once with all
columns. The peer is taken in its best form: its inputs as a struct or as an array, with batches of 1024, 4096 or all
rows of an Arrow batch; all are tried once, and the quickest runs side by side with ours.

    scan    the same rows without any Python: what reading and packing costs, whoever scores
    pipe    the same with a Python function that returns zeros: scan, Arrow to Python and back

Memory is the most that one Python worker holds (Pss), while it scores a fifth of the rows and all of them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from pyspark.ml.functions import predict_batch_udf
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F
from pyspark.sql.types import ArrayType, DataType, DoubleType, FloatType

from bigdl_lite.ml.model import TorchModel
from tests.bench.report import Claim, Context, Row
from tests.bench.watch import Most, pss, workers
from tests.bench.workloads import W4

BATCHES = (1024, 4096, 10_000)


def names() -> list[str]:
    return list(W4.inputs[0])


def fitted(frame: DataFrame) -> TorchModel:
    return W4.estimator("barrier").fit(frame)


def peer(model: TorchModel, form: str, batch: int) -> Column:
    """The prediction as a user of predict_batch_udf writes it."""
    module = model.module
    with torch.inference_mode():
        scalar = module(torch.zeros(2, len(names()))).reshape(2, -1).shape[1] == 1
    kind: DataType = DoubleType() if scalar else ArrayType(FloatType())

    def make() -> Callable[[np.ndarray], np.ndarray]:
        torch.set_num_threads(1)
        module.eval()

        def predict(inputs: np.ndarray) -> np.ndarray:
            with torch.inference_mode():
                output = module(torch.from_numpy(inputs))
            return output.reshape(-1).double().numpy() if scalar else output.numpy()

        return predict

    made = predict_batch_udf(make, return_type=kind, batch_size=batch, input_tensor_shapes=[[len(names())]])
    return made(F.array(*names()) if form == "array" else F.struct(*names()))


def consume(frame: DataFrame) -> float:
    began = time.perf_counter()
    frame.write.format("noop").mode("overwrite").save()
    return time.perf_counter() - began


def zeros(batches: Iterator[pa.Array]) -> Iterator[pa.Array]:
    for batch in batches:
        yield pa.array(np.zeros(len(batch)))


def phases(frame: DataFrame) -> dict[str, float]:
    """Seconds of the rows alone, and of the rows through a Python function that does nothing."""
    packed = frame.select(F.array(*names()).alias("x"), W4.label)
    nothing = F.arrow_udf(_typed(zeros), "double") if hasattr(F, "arrow_udf") else None
    found = {"scan": consume(packed)}
    if nothing is not None:
        found["pipe"] = consume(packed.select(W4.label, nothing("x").alias("prediction")))
    return found


def _typed(task: Any) -> Any:
    task.__annotations__ = {"batches": Iterator[pa.Array], "return": Iterator[pa.Array]}  # Spark reads values, not strings
    return task


# ---- all of them ------------------------------------------------------------------------------------------------------


def run(context: Context) -> tuple[list[Row], list[Claim]]:
    spark = context.session()
    path = W4.write(context.folder, context.quick)
    frame = spark.read.parquet(str(path))
    model = fitted(frame.limit(W4.batch).repartition(2))
    rows = frame.count()
    held = _held(model, frame, rows)  # before all else, because a worker's memory rarely shrinks
    forms = [(form, batch) for form in ("struct", "array") for batch in BATCHES]
    ours = model.transform(frame)
    few = [W4.label, "prediction"]
    consume(ours.select(*few))  # warm
    spent = phases(frame)  # warm, too
    tried = {form: consume(frame.withColumn("prediction", peer(model, *form)).select(*few)) for form in forms}
    best = min(forms, key=lambda form: tried[form])
    theirs = frame.withColumn("prediction", peer(model, *best))
    _same(ours, theirs)
    values: dict[str, list[float]] = {}
    parts = []
    for _ in range(context.repeat):
        for name, mine, other in (("two columns", ours.select(*few), theirs.select(*few)), ("all columns", ours, theirs)):
            values.setdefault(f"transform, {name}", []).append(rows / consume(mine))
            values.setdefault(f"predict_batch_udf, {name}", []).append(rows / consume(other))
        parts.append(phases(frame))
    spent = {key: statistics.median(part[key] for part in parts) for key in parts[0]}
    note = f"{best[0]}, batch_size {best[1]}; tried (s): " + ", ".join(f"{a} {b}: {tried[a, b]:.2f}" for a, b in forms)
    table = [
        Row("transform", W4.name, name, "rows/s", tuple(found), spent if name == "transform, two columns" else {},
            note if name.startswith("predict") else "")
        for name, found in values.items()
    ]  # fmt: skip
    middle = {name: statistics.median(found) for name, found in values.items()}
    claims = [
        Claim("transform", f"transform against predict_batch_udf, {name} (rows/s)",
              middle[f"transform, {name}"] / middle[f"predict_batch_udf, {name}"], 1.5, ">=")
        for name in ("two columns", "all columns")
    ]  # fmt: skip
    table += [Row("transform", W4.name, f"worker, {n:,} rows", "MiB Pss at most", (most / 2**20,)) for n, most in held]
    (few_rows, less), (all_rows, more) = held
    claims.append(Claim("transform", f"memory of a worker, {all_rows:,} rows against {few_rows:,}", more / less, 1.2, "<="))
    return table, claims


def _same(ours: DataFrame, theirs: DataFrame) -> None:
    """Both score alike, seen on the first rows."""
    a = np.array([row.prediction for row in ours.limit(200).select("prediction").collect()])
    b = np.array([row.prediction for row in theirs.limit(200).select("prediction").collect()])
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def _held(model: TorchModel, frame: DataFrame, rows: int) -> list[tuple[int, int]]:
    """Rows, and the most bytes of one worker while it scores them. The few rows first."""
    found = []
    for part in (0.2, 1.0):
        source = frame.where(F.pmod(F.hash(W4.label), F.lit(100)) < int(100 * part))
        with Most(lambda: max([0, *(pss(pid)["all"] for pid in workers())]), 0.05) as peak:
            consume(model.transform(source).select(W4.label, "prediction"))
        found.append((round(rows * part), peak.most))
    return found
