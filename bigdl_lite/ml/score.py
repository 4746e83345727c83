"""transform and udf: a module as a column of a DataFrame, evaluated lazily, one Arrow batch at a time.

Only the input columns travel to Python, so a selection or filter after transform still prunes what it can. Where they can be
read from files (direct.py), not even they.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import torch
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F
from torch import Tensor, nn

from bigdl_lite.batch import Batch
from bigdl_lite.data.arrow import tensor
from bigdl_lite.data.columns import Columns
from bigdl_lite.data.parquet import FILE, INDEX, fetch
from bigdl_lite.engine.device import current, task_device
from bigdl_lite.engine.direct import located
from bigdl_lite.engine.pack import pack, unpack
from bigdl_lite.engine.recipe import Start
from bigdl_lite.engine.shipped import Shipped
from bigdl_lite.engine.spark import as_columns, gpus, partition_id
from bigdl_lite.engine.worker import settle
from bigdl_lite.errors import RecipeError
from bigdl_lite.ml.arguments import arguments
from bigdl_lite.ml.head import Head, Heads, cut, head_from_rows
from bigdl_lite.model.layout import Blueprint, write_buffers
from bigdl_lite.model.replica import filled

_LOG = logging.getLogger("bigdl_lite")


@dataclass(frozen=True)
class Scorer:
    """All that an executor must know to score, without the weights. batch_size is the rows of one forward pass.

    device  "auto": the GPU that Spark gave to the task, else the CPU; "cpu"; "cuda": a GPU, or an error
    """

    blueprint: Blueprint
    columns: Columns
    head: Head | Heads | None
    batch_size: int
    device: str = "auto"


def module_of(blueprint: Blueprint, start: Start) -> nn.Module:
    """The module in evaluation mode, built around the weights of `start`."""
    module = blueprint.build(start.weights, start.constants).eval()
    write_buffers(module, blueprint.layout, start.buffers)
    return module


def head_of(kind: str, plan: Blueprint, start: Start, columns: Columns, shapes: Sequence[Sequence[int]]) -> Head | Heads | None:
    """What one row of output looks like: told by two rows of zeros, and by three. None where no tensor has a row for each.

    shapes  of one row in each input column
    """
    module = module_of(plan, start)

    def output(rows: int) -> Any:
        return module(*(torch.zeros([rows, *shape], dtype=c.dtype) for c, shape in zip(columns.inputs, shapes, strict=False)))

    with torch.inference_mode():
        return head_from_rows(kind, output(2), output(3))


_LANES = 16


@torch.inference_mode()
def forward(module: nn.Module, inputs: Sequence[Tensor], device: torch.device) -> Any:
    """What the module returns for the rows of `inputs`, on the CPU.

    The rows are filled up to a multiple of 16 with copies of the last, whose outputs are thrown away: kernels for a few odd
    rows round differently, and the score of a row should not depend on who its neighbours are.
    """
    k = len(inputs[0])
    rows = k + -k % _LANES
    with current(device):
        return cut(module(*(filled(x, _LANES).to(device) for x in inputs)), k, rows)


def passes(batch: Batch, size: int) -> Iterator[Batch]:
    """The rows of `batch`, `size` at a time."""
    for at in range(0, batch.rows, size):
        yield batch.part(at, at + size)


def device_of(asked: str) -> torch.device:
    """Where this task computes. Raises RecipeError where a GPU is asked for and there is none."""
    device, why = task_device(gpus(), asked, partition_id())
    if why:
        _LOG.warning("scoring on the CPU: Spark gave a GPU to the task, but %s", why)
    return device


def require_cuda(why: str) -> None:
    if not torch.cuda.is_available():
        raise RecipeError(f"device is 'cuda', and {why}, or set device='auto', which takes the CPU where there is no GPU")


def score(frame: DataFrame, scorer: Scorer, shipped: Shipped) -> Column:
    """The column of scorer.head.sql_type for every row of `frame`."""
    names = [column.source for column in scorer.columns.inputs]
    given = located(frame, names)
    if given is not None:
        scorer = replace(scorer, columns=replace(scorer.columns, located=True))
    given = given or as_columns(frame, names)
    return _udf(_task(pack(scorer), shipped), scorer.head.sql_type, len(given))(*given)


def function(scorer: Scorer, shipped: Shipped) -> Any:
    """The same as a function of columns, for expressions and spark.udf.register.

    It takes a column for each input; or, where inputs are groups, a column for each member, in order.
    """
    return _udf(_task(pack(scorer), shipped, free=True), scorer.head.sql_type, sum(len(c.members) or 1 for c in scorer.columns.inputs))


_CACHE: dict[Any, tuple[Scorer, nn.Module, torch.device]] = {}  # the last model that this worker scored with


def _task(packed: bytes, shipped: Shipped, free: bool = False) -> Callable[[Iterator[tuple[pa.Array, ...]]], Iterator[pa.Array]]:
    """free: the arrays are what a user passes to a function, not what transform has looked at."""

    def main(batches: Iterator[tuple[pa.Array, ...]]) -> Iterator[pa.Array]:
        settle()
        scorer, module, device = load(packed, shipped)
        columns, head = scorer.columns.inputs, scorer.head
        for arrays in _read(batches, scorer.columns):
            if free:
                arrays = arguments(arrays, columns)
            if len(arrays[0]):
                rows = Batch(tuple(tensor(a, c, partition_id()) for a, c in zip(arrays, columns, strict=True)), None)
                parts = [head.to_arrow(forward(module, part.inputs, device)) for part in passes(rows, scorer.batch_size)]
                yield pa.concat_arrays(parts) if len(parts) > 1 else parts[0]
            else:
                yield head.to_arrow(head.empty())

    return main


def _read(batches: Iterator[Any], columns: Columns) -> Iterator[Sequence[pa.Array]]:
    """The arrays of the inputs: as they come, or from the files that they lie in."""
    arrays = (batch if isinstance(batch, tuple) else (batch,) for batch in batches)
    if not columns.located:
        return arrays
    found = fetch((pa.RecordBatch.from_arrays(list(x), [FILE, INDEX]) for x in arrays), columns.inputs)
    return ([batch.column(column.name) for column in columns.inputs] for batch in found)


def load(packed: bytes, shipped: Shipped) -> tuple[Scorer, nn.Module, torch.device]:
    """In a task: the scorer, its module, and the device that the module is on."""
    key = (shipped.key, hash(packed))
    if key not in _CACHE:
        _CACHE.clear()
        scorer = unpack(packed)
        found, device = scorer.blueprint.layout, device_of(scorer.device)
        module = module_of(scorer.blueprint, shipped.read(torch.empty(found.n, dtype=found.dtype)))
        _CACHE[key] = scorer, module.to(device), device
    return _CACHE[key]


def _udf(task: Callable[..., Any], sql_type: str, width: int) -> Callable[..., Column]:
    """An iterator UDF over `width` Arrow arrays. Spark < 4.1 has them over pandas only, and converts on both sides."""
    if hasattr(F, "arrow_udf"):
        return F.arrow_udf(_typed(task, pa.Array, pa.Array, width), sql_type)
    import pandas as pd

    def main(batches: Iterator[Any]) -> Iterator[Any]:
        arrays = (tuple(map(_from_pandas, x if isinstance(x, tuple) else (x,))) for x in batches)
        for out in task(arrays):
            if pa.types.is_struct(out.type):
                yield pd.DataFrame({field.name: out.field(field.name).to_pandas() for field in out.type})
            else:
                yield out.to_pandas()

    kind = pd.DataFrame if sql_type.startswith("struct") else pd.Series
    return F.pandas_udf(_typed(main, pd.Series, kind, width), sql_type)


def _from_pandas(values: Any) -> pa.Array:
    """What Spark hands to a pandas function as one argument; an ml vector, like any struct, comes as a frame of its fields."""
    if hasattr(values, "columns"):
        return pa.StructArray.from_arrays([_from_pandas(values[name]) for name in values.columns], list(values.columns))
    return pa.Array.from_pandas(values)


def _typed(task: Callable[..., Any], given: type, back: type, width: int) -> Callable[..., Any]:
    """Spark reads from the annotations that this is an iterator of columns, or of tuples of columns."""
    task.__annotations__ = {"batches": Iterator[given] if width == 1 else Iterator[tuple[given, ...]], "return": Iterator[back]}
    return task
