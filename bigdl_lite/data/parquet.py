"""Rows of Parquet files by their numbers: the columns come as the file has them, and no row of them crosses the JVM.

A record batch says which rows are wanted: in FILE the path, in INDEX the number of the row in that file, as Spark's
`_metadata.file_path` and `_metadata.row_index` tell them. What comes back is a record batch of the columns, row by row
the same. Who asks, and when it is allowed, is decided in engine/direct.py.

    B  rows of a record batch      k  columns that stand side by side in one

Cost: a row group is decoded once where rows are asked for in ascending order, whatever part of it is wanted; memory is that of
one row group's pages, and of a few thousand decoded rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bigdl_lite.data.columns import Column
from bigdl_lite.errors import DataError

FILE, INDEX = "__bigdl_lite_file", "__bigdl_lite_index"
_ROWS = 1 << 13  # decoded at a time
_BUFFER = 1 << 16  # bytes of a column read at a time


def local_path(uri: str) -> str | None:
    """The path of a file: URI, None for any other scheme."""
    parts = urlsplit(uri)
    return unquote(parts.path) if parts.scheme == "file" and not parts.netloc else None


def schema_of(path: str) -> pa.Schema:
    """The columns as they will be read. Raises OSError or pyarrow's own error where that cannot be."""
    return pq.read_schema(path)


def plain(kind: pa.DataType) -> str | None:
    """A name for the types that Spark and Arrow read alike, None for all others."""
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        inner = plain(kind.value_type)
        return inner and f"list of {inner}"
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        return "binary"
    simple = pa.types.is_signed_integer(kind) or kind in (pa.float32(), pa.float64(), pa.bool_())
    return str(kind) if simple else None


def fetch(wanted: Iterable[pa.RecordBatch], columns: Sequence[Column]) -> Iterator[pa.RecordBatch]:
    """For each record batch of (FILE, INDEX), one of the columns for the same rows, named as in `columns`."""
    reader: _Reader | None = None
    names = list(dict.fromkeys(name for column in columns for name in column.members or [column.name]))
    columns = list({c.name: c for c in columns}.values())
    for batch in wanted:
        index = batch.column(INDEX).to_numpy()
        files = batch.column(FILE)
        for start, stop in _runs(files, index):
            path = files[start].as_py()
            if reader is None or reader.uri != path:
                reader = _Reader(path, names)
            for found in reader.rows(index[start:stop]):
                arrays = [_side_by_side(found, c.members) if c.members else found.column(c.name) for c in columns]
                yield pa.RecordBatch.from_arrays(arrays, [c.name for c in columns])


def _runs(files: pa.Array, index: np.ndarray) -> Iterator[tuple[int, int]]:
    """The parts of a batch that lie in one file, their rows in ascending order."""
    if not len(index):
        return
    codes = files.dictionary_encode().indices.to_numpy()
    ends = np.flatnonzero((codes[1:] != codes[:-1]) | (index[1:] <= index[:-1])) + 1
    edges = [0, *ends.tolist(), len(index)]
    yield from pairwise(edges)


class _Reader:
    """One file, read forward from wherever the last rows were."""

    def __init__(self, uri: str, names: Sequence[str]) -> None:
        self.uri, self.names = uri, names
        path = local_path(uri)
        if path is None:
            raise DataError(f"{uri} is not on a path that this worker can open")
        try:
            self.file = pq.ParquetFile(Path(path), buffer_size=_BUFFER)
        except OSError as error:
            raise DataError(f"{path} cannot be read on this worker: {error}") from error
        meta = self.file.metadata
        self.ends = np.cumsum([meta.row_group(g).num_rows for g in range(meta.num_row_groups)])
        self.group, self.stream = -1, iter(())
        self.held: pa.RecordBatch | None = None
        self.first = self.stop = 0  # the rows of the file that are held

    def rows(self, index: np.ndarray) -> Iterator[pa.RecordBatch]:
        """The rows `index`, ascending, in as many batches as it takes."""
        while len(index):
            self._reach(int(index[0]))
            k = int(np.searchsorted(index, self.stop))
            inside = index[:k] - self.first
            assert self.held is not None
            whole = inside[-1] - inside[0] + 1 == k
            yield self.held.slice(int(inside[0]), k) if whole else self.held.take(pa.array(inside))
            index = index[k:]

    def _reach(self, row: int) -> None:
        """Holds the batch that row lies in."""
        if self.held is not None and self.first <= row < self.stop:
            return
        group = int(np.searchsorted(self.ends, row, side="right"))
        if group == len(self.ends):
            rows = int(self.ends[-1]) if len(self.ends) else 0
            raise DataError(f"{self.uri} has {rows} rows, row {row} is wanted: was it written anew since it was listed?")
        if group != self.group or row < self.first:
            self.group = group
            self.first = self.stop = int(self.ends[group - 1]) if group else 0
            self.stream = self.file.iter_batches(_ROWS, row_groups=[group], columns=self.names, use_threads=False)
        while row >= self.stop:
            self.held = next(self.stream)
            self.first, self.stop = self.stop, self.stop + self.held.num_rows


def _side_by_side(batch: pa.RecordBatch, members: Sequence[str]) -> pa.Array:
    """[B, k]: the columns of one type as one column of lists."""
    arrays, rows, k = [batch.column(name) for name in members], batch.num_rows, len(members)
    if any(x.null_count for x in arrays):  # an error a little later, which wants to know where
        by_row = np.arange(rows * k).reshape(k, rows).T.ravel()
        return pa.FixedSizeListArray.from_arrays(pa.concat_arrays(arrays).take(pa.array(by_row)), k)
    values = np.empty((rows, k), arrays[0].type.to_pandas_dtype())
    for i, x in enumerate(arrays):
        values[:, i] = x.to_numpy()
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), k)
