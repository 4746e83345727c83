"""The rows that a fit is given: a DataFrame, or an RDD of (inputs, label) NumPy tuples, whose arrays travel as raw bytes.

Also what is said where Spark fails to compute them.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from pyspark.ml.functions import vector_to_array
from pyspark.ml.linalg import VectorUDT
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F
from pyspark.sql.types import ArrayType, BinaryType, DataType, DoubleType, FloatType, StructField, StructType

from bigdl_lite.data.columns import Name, Raw, flat, numeric
from bigdl_lite.engine.spark import SPARK_ERRORS, active_session
from bigdl_lite.errors import DataError

if TYPE_CHECKING:
    from pyspark import RDD

_TRACEBACK = re.compile(r"Traceback \(most recent call last\):\n((?:[ \t].*\n|\n)*)(\S.*)")  # of a Python worker
# as Spark names what is wrong in SQL; what these three stand in has nothing to do with rows
_CONDITION = re.compile(r"\[(?![A-Z_.]*(?:INTERNAL|CANCEL|MEMORY))[A-Z][A-Z0-9_.]{3,}\] .*")
_RAISED = re.compile(r"\): (java\.lang\.\w+Exception: .*)")  # the same before Spark 4


def require_frame(dataset: Any, stream: bool = False) -> None:
    """Raises DataError for what is no DataFrame, or is one without an end where that cannot be."""
    if not hasattr(dataset, "sparkSession"):
        raise DataError(f"a {type(dataset).__name__} is no DataFrame of Spark's: make one with spark.createDataFrame")
    if not stream and dataset.isStreaming:
        raise DataError("the DataFrame is a stream, which has no end: train on a table of its rows")


def usable(frame: DataFrame, names: Sequence[Name]) -> DataFrame:
    """The rows in which the named columns hold numbers: no null, NaN or infinity, also inside arrays and ml vectors."""
    kinds = {found.name: found.dataType for found in frame.schema.fields}
    for name in flat(names):
        frame = frame.where(_valid(F.col(f"`{name.replace('`', '``')}`"), kinds[name]))
    return frame


def _valid(column: Column, kind: DataType) -> Column:
    if isinstance(kind, VectorUDT):
        return F.when(column.isNotNull(), F.forall(vector_to_array(column), lambda x: _valid(x, DoubleType()))).otherwise(False)
    if isinstance(kind, ArrayType):
        return F.when(column.isNotNull(), F.forall(column, lambda x: _valid(x, kind.elementType))).otherwise(False)
    if isinstance(kind, FloatType | DoubleType):
        return column.isNotNull() & ~F.isnan(column) & (F.abs(column) != float("inf"))
    return column.isNotNull()


@contextlib.contextmanager
def computed() -> Iterator[None]:
    """Turns Spark's error for rows that it cannot compute (a UDF that raises, a cast, a division by zero) into a DataError.

    What is no fault of the rows, such as a lost executor, stays Spark's own error.
    """
    try:
        yield
    except SPARK_ERRORS as error:
        why = _why(str(error))
        if why is None:
            raise
        raise DataError(f"Spark cannot compute the rows: {why}") from error


def _why(text: str) -> str | None:
    for frames, last in _TRACEBACK.findall(text)[-1:]:
        ours = re.match(r"bigdl_lite\.errors\.DataError: (.*)", last)
        return ours[1] if ours else None if "bigdl_lite/" in frames else last
    found = _CONDITION.search(text)
    if found:
        return found[0]
    raised = _RAISED.search(text)
    return raised[1] if raised else None


def from_rdd(rdd: RDD[Any]) -> tuple[DataFrame, list[str], str, dict[str, Raw]]:
    """The frame, its input columns, its label column, and how to read them. Runs one job, which takes the first row."""
    first = rdd.take(1)
    if not first:
        raise DataError("the RDD has no rows; there is nothing to train on")
    arrays = _arrays(first[0])
    names = [f"input{i}" for i in range(len(arrays) - 1)] + ["label"]
    for name, x in zip(names, arrays, strict=True):
        if not numeric(x.dtype):
            raise DataError(f"{name} of the RDD's first row has dtype {x.dtype}, must be an array of real numbers")
    decoders = {name: Raw(tuple(x.shape), x.dtype.name) for name, x in zip(names, arrays, strict=True)}
    schema = StructType([StructField(name, BinaryType(), False) for name in names])
    spark = active_session()  # where an RDD lives
    frame = spark.createDataFrame(rdd.mapPartitions(_encoder(list(decoders.values()))), schema)
    return frame, names[:-1], names[-1], decoders


def _arrays(row: Any) -> list[np.ndarray]:
    if not isinstance(row, tuple | list) or len(row) != 2:
        raise DataError(f"an RDD must hold tuples (inputs, label), the first row is a {type(row).__name__}")
    inputs, label = row
    several = inputs if isinstance(inputs, tuple | list) else [inputs]
    if not several:
        raise DataError("an RDD must hold tuples (inputs, label), a row has no inputs")
    try:
        return [np.asarray(x) for x in (*several, label)]
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"an RDD must hold tuples (inputs, label) of NumPy arrays: {error}") from error


def _encoder(decoders: list[Raw]) -> Callable[[Iterable[Any]], Iterator[tuple[bytes, ...]]]:
    def encode(rows: Iterable[Any]) -> Iterator[tuple[bytes, ...]]:
        for row in rows:
            arrays = _arrays(row)
            if [x.shape for x in arrays] != [d.shape for d in decoders]:
                raise DataError(f"a row has arrays of shapes {[x.shape for x in arrays]}, the first {[d.shape for d in decoders]}")
            yield tuple(bytearray(_of_dtype(x, d.dtype).tobytes()) for x, d in zip(arrays, decoders, strict=True))

    return encode


def _of_dtype(x: np.ndarray, dtype: str) -> np.ndarray:
    """x in C order; a whole number may become a float, but nothing is cut off."""
    with np.errstate(all="ignore"):  # what is too large for a float becomes infinity, which is refused where it is read
        made = np.asarray(x, dtype, order="C")
    if made.dtype.kind != "f" and not np.array_equal(made, x):
        raise DataError(f"a row has an array of {x.dtype}, the first row one of {dtype}, which cannot hold it; make all of one dtype")
    return made
