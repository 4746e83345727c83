"""An RDD of (inputs, label) NumPy tuples as a DataFrame: arrays travel as raw bytes, so any shape and dtype will do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from pyspark import RDD
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql.types import BinaryType, StructField, StructType

from bigdl_lite.data.columns import Raw
from bigdl_lite.errors import DataError


def from_rdd(rdd: RDD[Any]) -> tuple[DataFrame, list[str], str, dict[str, Raw]]:
    """The frame, its input columns, its label column, and how to read them. Runs one job, which takes the first row."""
    first = rdd.take(1)
    if not first:
        raise DataError("the RDD has no rows; there is nothing to train on")
    arrays = _arrays(first[0])
    names = [f"input{i}" for i in range(len(arrays) - 1)] + ["label"]
    decoders = {name: Raw(tuple(x.shape), x.dtype.name) for name, x in zip(names, arrays, strict=True)}
    schema = StructType([StructField(name, BinaryType(), False) for name in names])
    spark = SparkSession.builder.getOrCreate()  # an RDD lives in the active session
    frame = spark.createDataFrame(rdd.mapPartitions(_encoder(list(decoders.values()))), schema)
    return frame, names[:-1], names[-1], decoders


def _arrays(row: Any) -> list[np.ndarray]:
    if not isinstance(row, tuple | list) or len(row) != 2:
        raise DataError(f"an RDD must hold tuples (inputs, label), the first row is a {type(row).__name__}")
    inputs, label = row
    return [np.asarray(x) for x in (*(inputs if isinstance(inputs, tuple | list) else [inputs]), label)]


def _encoder(decoders: list[Raw]) -> Callable[[Iterable[Any]], Iterator[tuple[bytes, ...]]]:
    def encode(rows: Iterable[Any]) -> Iterator[tuple[bytes, ...]]:
        for row in rows:
            arrays = _arrays(row)
            if [x.shape for x in arrays] != [d.shape for d in decoders]:
                raise DataError(f"a row has arrays of shapes {[x.shape for x in arrays]}, the first {[d.shape for d in decoders]}")
            yield tuple(bytearray(np.ascontiguousarray(x, d.dtype).tobytes()) for x, d in zip(arrays, decoders, strict=True))

    return encode
