"""model.evaluate: sums over the rows where the rows lie, added on the driver.

    partition  ->  forward, a batch at a time  ->  sums of each metric [k] float64  ->  one row  ->  driver: + in partition order

One Spark job. A task holds one record batch and its outputs, never its share of the rows. How the rows are dealt to partitions
changes only the order in which float64 are added (1e-12), and what the module's own arithmetic makes of a row's place in its batch:
1e-7 in float32, nothing in a module of float64.

    b  rows of one forward pass      k  sums of a metric
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from pyspark.sql import DataFrame
from torch import Tensor, nn

from bigdl_lite.batch import Batch
from bigdl_lite.data.arrow import tensor
from bigdl_lite.data.columns import Column, Columns, field
from bigdl_lite.engine.cluster import cluster_of
from bigdl_lite.engine.pack import check, pack, unpack
from bigdl_lite.engine.shipped import Shipped
from bigdl_lite.engine.spark import collect, partition_id, read_columns, select
from bigdl_lite.engine.worker import require_versions, settle, versions
from bigdl_lite.errors import DataError, RecipeError, report, revive
from bigdl_lite.ml.loss import Loss
from bigdl_lite.ml.model import TorchClassificationModel, TorchRegressionModel
from bigdl_lite.ml.rows import computed, require_frame, usable
from bigdl_lite.ml.score import forward, load, passes
from bigdl_lite.model.loss import CLASS_LOSSES, ELEMENTWISE_LOSSES, Squeezed
from bigdl_lite.model.sums import Metric

_TOKEN = "partition int, weight double, sums array<binary>, error string"
_ARROW = pa.schema([
    ("partition", pa.int32()), ("weight", pa.float64()), ("sums", pa.list_(pa.binary())), ("error", pa.string()),
])  # fmt: skip


@dataclass(frozen=True)
class _Job:
    """What a task must know beside the model. The weight of a row, where there is one, is the last of columns' inputs."""

    columns: Columns
    metrics: tuple[Metric, ...]
    weighted: bool
    versions: Mapping[str, str]


def evaluate(model: Any, frame: DataFrame, metrics: Any, label: str | None, weight: str | None, loss: Any) -> dict[str, float]:
    """{name: value} of each metric, and "loss" where loss is given.

    Raises RecipeError and DataError for what settings and schema show to be wrong, before any job; DataError for rows, among them
    a DataFrame without any, and UserError that begins with the traceback of your own code.
    Cost: one job, and for each partition with rows one row of 8 k bytes a metric to the driver.
    """
    require_frame(frame, stream=True)
    if frame.isStreaming:
        raise DataError("the DataFrame is a stream, which has no end: evaluate each of its batches in foreachBatch")
    scorer = model._scorer(whole=True)
    kind = model._head.kind if model._head is not None else "plain"
    chosen = _chosen(metrics, _as_in_training(model, loss), kind)
    check(metrics=chosen)
    columns = _columns(frame, model, scorer.columns.inputs, label or model.getLabelCol(), weight, loss)
    names = [c.source for c in columns.all]
    scorer = replace(scorer, columns=Columns(columns.inputs[: len(scorer.columns.inputs)]))
    job = _Job(columns, chosen, weight is not None, versions())
    task = _task(pack(scorer), pack(job), model._ship(frame.sparkSession))
    if model._given("handleInvalid") == "skip":
        frame = usable(frame, names)
    with computed(), cluster_of(frame.sparkSession).jobs("bigdl_lite: evaluate"):
        table = collect(select(frame, names).mapInArrow(task, _TOKEN))
    return _values(sorted(table.to_pylist(), key=lambda told: told["partition"]), chosen)


def _chosen(metrics: Any, loss: Any, kind: str) -> tuple[Metric, ...]:
    from bigdl_lite.model.metrics import metric_of

    asked = [metrics] if isinstance(metrics, str) or not isinstance(metrics, Sequence) else list(metrics)
    if loss is None and any(isinstance(metric, str) and metric == "loss" for metric in asked):
        raise RecipeError("the metric 'loss' is the mean of a loss: give it with evaluate(..., loss=nn.MSELoss())")
    made: list[Any] = [] if loss is None else [Loss(loss)]
    for metric in asked:
        if isinstance(metric, str) and metric == "loss":
            continue
        made.append(metric_of(metric, kind))
    if not made:
        raise RecipeError("evaluate has nothing to measure: name at least one metric, or give a loss")
    twice = [metric.name for i, metric in enumerate(made) if metric.name in [other.name for other in made[:i]]]
    if twice:
        raise RecipeError(f"two metrics have the name {twice[0]!r}")
    return tuple(made)


def _columns(frame: DataFrame, model: Any, inputs: Sequence[Column], label: str, weight: str | None, loss: Any) -> Columns:
    """What is read: the inputs as in training, the label likewise, and the weight as one input more."""
    names, trained, floating = [c.source for c in inputs], model._columns.label, model._plan.layout.dtype
    decoders = {c.name: c.decoder for c in inputs if c.decoder is not None}
    if trained is not None and trained.decoder is not None:
        decoders[label] = trained.decoder
    found = read_columns(select(frame, [*names, label]), names, label, floating, decoders)
    assert found.label is not None
    target = replace(found.label, dtype=trained.dtype, unit=trained.unit) if trained else _target(found.label, model, loss)
    # the dtype in training is the module's contract: a table of today may hold the same numbers as doubles
    read = tuple(replace(now, dtype=c.dtype) for now, c in zip(found.inputs, inputs, strict=True))
    if weight is not None:
        weights = read_columns(select(frame, [weight]), [weight], None, torch.float64).inputs[0]
        if weights.depth:
            raise DataError(f"column {weight!r} holds arrays; the weight of a row is one number")
        read = (*read, replace(weights, dtype=torch.float64))
    return Columns(read, target)


def _as_in_training(model: Any, loss: Any) -> Any:
    """The loss as the estimator of such a model has it: an output of [b, 1] is compared with a label of [b] as [b]."""
    binary = isinstance(model, TorchClassificationModel) and isinstance(loss, nn.BCEWithLogitsLoss | nn.BCELoss)
    return Squeezed(loss) if loss is not None and (binary or isinstance(model, TorchRegressionModel)) else loss


def _target(label: Column, model: Any, loss: Any) -> Column:
    """What the label becomes, for a model that was saved without saying so: see TorchEstimator."""
    floating, kind = model._plan.layout.dtype, model._head.kind if model._head is not None else "plain"
    if kind in ("logit", "probability"):
        return replace(label, dtype=floating, unit=True)
    alone = label.depth == 0 and getattr(label.decoder, "shape", ()) == ()
    if alone and (kind in ("logits", "log-probabilities") or isinstance(loss, CLASS_LOSSES)):
        return replace(label, dtype=torch.int64)
    number = isinstance(model, TorchRegressionModel) or isinstance(loss, ELEMENTWISE_LOSSES)
    return replace(label, dtype=floating) if number else label


def _task(scorer: bytes, packed: bytes, shipped: Shipped) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    def main(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        settle()
        partition = partition_id()
        told: dict[str, Any] = {"partition": partition, "weight": 0.0, "sums": [], "error": None}
        try:
            total, sums = _sums(batches, unpack(packed), scorer, shipped, partition)
            told |= {"weight": total, "sums": [x.numpy().tobytes() for x in sums]}
        except Exception as error:
            told["error"] = json.dumps(report(error, f"partition {partition}"))
        if told["sums"] or told["error"]:
            yield pa.RecordBatch.from_pylist([told], schema=_ARROW)

    return main


def _sums(
    batches: Iterator[pa.RecordBatch], job: _Job, packed: bytes, shipped: Shipped, partition: int
) -> tuple[float, list[Tensor]]:  # fmt: skip
    """The weight of the rows of a partition, and the sums of each metric over them, none where there is no row."""
    require_versions(dict(job.versions))
    seen, total = 0, 0.0
    sums: list[Tensor] = []
    shapes: list[Any] = []
    for batch in batches:
        if not batch.num_rows:
            continue
        scorer, module, device = load(packed, shipped)
        whole = [tensor(batch.column(field(c.name)), c, partition, seen) for c in job.columns.all]
        _same_shapes(shapes, whole, job.columns, partition)
        *inputs, target = whole
        weight = inputs.pop() if job.weighted else torch.ones(batch.num_rows, dtype=torch.float64)
        if bool((weight < 0).any()):
            row, name = seen + int((weight < 0).nonzero()[0, 0]), job.columns.inputs[-1].name
            raise DataError(f"column {name!r} has a weight below 0, the first in row {row} of partition {partition}")
        for part in passes(Batch((*inputs, weight), target), scorer.batch_size):
            output = forward(module, part.inputs[:-1], device)
            found = [m.sums(output, part.target, part.inputs[-1]).to("cpu", torch.float64) for m in job.metrics]
            sums = [a + b for a, b in zip(sums, found, strict=True)] if sums else found
        seen, total = seen + batch.num_rows, total + float(weight.sum())
    return total, sums


def _same_shapes(first: list[Any], whole: Sequence[Tensor], columns: Columns, partition: int) -> None:
    if not first:
        first += [x.shape[1:] for x in whole]
    for column, a, x in zip(columns.all, first, whole, strict=True):
        if x.shape[1:] != a:
            raise DataError(
                f"column {column.name!r} holds rows of shape {list(a)} and {list(x.shape[1:])} (partition {partition}); all rows need "
                "one shape"
            )


def _values(told: Sequence[Mapping[str, Any]], metrics: Sequence[Metric]) -> dict[str, float]:
    for line in told:
        if line["error"]:
            raise revive(json.loads(line["error"]))
    if not told:
        raise DataError("the DataFrame has no rows; there is nothing to evaluate")
    if not sum(line["weight"] for line in told):
        raise DataError("the weights of all rows are 0; there is nothing to evaluate")
    values = {}
    for i, metric in enumerate(metrics):
        parts = [np.frombuffer(line["sums"][i]) for line in told]
        if len({len(part) for part in parts}) > 1:
            raise DataError(f"rows are of several shapes: metric {metric.name!r} has {sorted({len(x) for x in parts})} sums of them")
        total = np.zeros(len(parts[0]))
        for part in parts:
            total += part
        values[metric.name] = float(metric.value(torch.from_numpy(total)))
    return values
