"""transform: a module as a column of a DataFrame, evaluated lazily, one Arrow batch at a time.

Only the input columns travel to Python, so a selection or filter after transform still prunes what it can. Where they can be
read from files (direct.py), not even they.
"""

from __future__ import annotations

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
from bigdl_lite.engine.direct import located
from bigdl_lite.engine.pack import pack, unpack
from bigdl_lite.engine.recipe import Start
from bigdl_lite.engine.shipped import Shipped
from bigdl_lite.engine.spark import as_columns, partition_id
from bigdl_lite.engine.worker import settle
from bigdl_lite.ml.head import Head
from bigdl_lite.model.layout import Blueprint, write_buffers


@dataclass(frozen=True)
class Scorer:
    """All that an executor must know to score, without the weights. batch_size is the rows of one forward pass."""

    blueprint: Blueprint
    columns: Columns
    head: Head
    batch_size: int


def module_of(blueprint: Blueprint, start: Start) -> nn.Module:
    """The module in evaluation mode, built around the weights of `start`."""
    module = blueprint.build(start.weights, start.constants).eval()
    write_buffers(module, blueprint.layout, start.buffers)
    return module


def head_of(kind: str, plan: Blueprint, start: Start, columns: Columns, shapes: Sequence[Sequence[int]]) -> Head | None:
    """What one row of output looks like: told by two rows of zeros. None where the module does not return a row for each.

    shapes  of one row in each input column
    """
    module = module_of(plan, start)
    zeros = [torch.zeros([2, *shape], dtype=c.dtype) for c, shape in zip(columns.inputs, shapes, strict=False)]
    with torch.inference_mode():
        output = module(*zeros)
    by_row = isinstance(output, Tensor) and output.ndim > 0 and len(output) == 2
    return Head(kind, tuple(output.shape[1:])) if by_row else None


_LANES = 16


@torch.inference_mode()
def predict(module: nn.Module, batch: Batch, size: int) -> Tensor:
    """The module's outputs for all rows of `batch`, `size` rows a pass.

    A pass is filled up to a multiple of 16 rows with copies of its last row, whose outputs are thrown away: kernels for a
    few odd rows round differently, and the score of a row should not depend on who its neighbours are.
    """
    parts = []
    for at in range(0, batch.rows, size):
        rows = [x[at : at + size] for x in batch.inputs]
        k = len(rows[0])
        output = module(*(torch.cat([x, x[-1:].expand(-k % _LANES, *x.shape[1:])]) if k % _LANES else x for x in rows))
        parts.append(output[:k])
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def score(frame: DataFrame, scorer: Scorer, shipped: Shipped) -> Column:
    """The column of scorer.head.sql_type for every row of `frame`."""
    names = [column.source for column in scorer.columns.inputs]
    given = located(frame, names)
    if given is not None:
        scorer = replace(scorer, columns=replace(scorer.columns, located=True))
    given = given or as_columns(frame, names)
    return _udf(_task(pack(scorer), shipped), scorer.head.sql_type, len(given))(*given)


_CACHE: dict[Any, tuple[Scorer, nn.Module]] = {}  # the last model that this worker scored with


def _task(packed: bytes, shipped: Shipped) -> Callable[[Iterator[tuple[pa.Array, ...]]], Iterator[pa.Array]]:
    def main(batches: Iterator[tuple[pa.Array, ...]]) -> Iterator[pa.Array]:
        settle()
        scorer, module = _load(packed, shipped)
        columns = scorer.columns.inputs
        for arrays in _read(batches, scorer.columns):
            if len(arrays[0]):
                inputs = tuple(tensor(a, c, partition_id()) for a, c in zip(arrays, columns, strict=True))
                yield scorer.head.to_arrow(predict(module, Batch(inputs, None), scorer.batch_size))
            else:
                yield scorer.head.to_arrow(torch.empty(0, *scorer.head.shape))

    return main


def _read(batches: Iterator[Any], columns: Columns) -> Iterator[Sequence[pa.Array]]:
    """The arrays of the inputs: as they come, or from the files that they lie in."""
    arrays = (batch if isinstance(batch, tuple) else (batch,) for batch in batches)
    if not columns.located:
        return arrays
    found = fetch((pa.RecordBatch.from_arrays(list(x), [FILE, INDEX]) for x in arrays), columns.inputs)
    return ([batch.column(column.name) for column in columns.inputs] for batch in found)


def _load(packed: bytes, shipped: Shipped) -> tuple[Scorer, nn.Module]:
    key = (shipped.key, hash(packed))
    if key not in _CACHE:
        _CACHE.clear()
        scorer = unpack(packed)
        found = scorer.blueprint.layout
        _CACHE[key] = scorer, module_of(scorer.blueprint, shipped.read(torch.empty(found.n, dtype=found.dtype)))
    return _CACHE[key]


def _udf(task: Callable[..., Any], sql_type: str, width: int) -> Callable[..., Column]:
    """An iterator UDF over `width` Arrow arrays. Spark < 4.1 has them over pandas only, and converts on both sides."""
    if hasattr(F, "arrow_udf"):
        return F.arrow_udf(_typed(task, pa.Array, pa.Array, width), sql_type)
    import pandas as pd

    def main(batches: Iterator[Any]) -> Iterator[Any]:
        arrays = (tuple(map(pa.Array.from_pandas, x if isinstance(x, tuple) else (x,))) for x in batches)
        for out in task(arrays):
            if pa.types.is_struct(out.type):
                yield pd.DataFrame({field.name: out.field(field.name).to_pandas() for field in out.type})
            else:
                yield out.to_pandas()

    kind = pd.DataFrame if sql_type.startswith("struct") else pd.Series
    return F.pandas_udf(_typed(main, pd.Series, kind, width), sql_type)


def _typed(task: Callable[..., Any], given: type, back: type, width: int) -> Callable[..., Any]:
    """Spark reads from the annotations that this is an iterator of columns, or of tuples of columns."""
    task.__annotations__ = {"batches": Iterator[given] if width == 1 else Iterator[tuple[given, ...]], "return": Iterator[back]}
    return task
