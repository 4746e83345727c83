"""Arrow record batches to tensors, a column at a time and without a Python object per row.

    B  rows of one record batch      N  rows of the share

Whatever cannot become a tensor is an error that names column, partition and row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from bigdl_lite.batch import Batch
from bigdl_lite.data.columns import Column, Columns, Raw, field, numeric
from bigdl_lite.data.holdout import Holdout, parted
from bigdl_lite.data.parquet import fetch
from bigdl_lite.errors import DataError, UserError, report


def share(batches: Iterable[pa.RecordBatch], columns: Columns, partition: int) -> Batch | None:
    """All rows of one partition as one Batch; None where it has no row. See shares()."""
    whole, held = shares(batches, replace(columns, held=None), partition)
    assert held is None
    return whole


def shares(
    batches: Iterable[pa.RecordBatch], columns: Columns, partition: int, holdout: Holdout | None = None
) -> tuple[Batch | None, Batch | None]:  # fmt: skip
    """The rows of one partition to train on, and those held out for validation; None where there are none.

    columns.held decides where it is given, else holdout; with neither, all rows are to train on.

    Raises DataError for nulls, ragged rows, NaN and infinity, and shapes that change between record batches.
    Cost: each value is copied once (twice where rows must be put in order, or are held out).
    """
    found = _tensors(batches, columns, partition)
    if found is None:
        return None, None
    whole = _batch(found, columns)
    if columns.held is not None:
        return parted(whole, found[-1] != 0)
    return (whole, None) if holdout is None else parted(whole, holdout.marks(whole))


def _tensors(batches: Iterable[pa.RecordBatch], columns: Columns, partition: int) -> list[Tensor] | None:
    """One tensor of all rows for each of columns.all; None where there is no row."""
    parts: list[list[Tensor]] = [[] for _ in columns.all]
    rows: list[np.ndarray] = []
    seen = 0
    for batch in fetch(batches, columns.all) if columns.located else batches:
        if not batch.num_rows:
            continue
        for found, column in zip(parts, columns.all, strict=True):
            name = column.name if columns.located else field(column.name)
            values = tensor(batch.column(name), column, partition, seen)
            if found and values.shape[1:] != found[0].shape[1:]:
                raise DataError(
                    f"column {column.name!r} holds rows of shape {list(found[0].shape[1:])} and "
                    f"{list(values.shape[1:])} (partition {partition}); all rows need one shape"
                )
            found.append(values)
        if columns.row is not None:
            rows.append(batch.column(columns.row).to_numpy(zero_copy_only=False))
        seen += batch.num_rows
    if not seen:
        return None
    # clone: a tensor of a single record batch still points into Arrow's buffer, which is read-only
    whole = [torch.cat(found) if len(found) > 1 else found[0].clone() for found in parts]
    if columns.row is not None:
        index = np.concatenate(rows)
        if np.any(np.diff(index) < 0):
            by_row = torch.from_numpy(np.argsort(index, kind="stable"))
            whole = [x.index_select(0, by_row) for x in whole]
    return whole


def _batch(tensors: Sequence[Tensor], columns: Columns) -> Batch:
    """Of tensors for each of columns.all, or for all but the last where that is columns.held."""
    k = len(columns.inputs)
    rest = iter(tensors[k:])
    target, weight = (next(rest) if column is not None else None for column in (columns.label, columns.weight))
    return Batch(tuple(tensors[:k]), target, weight)


Shapes = list[list[int]]


def shapes(share: Batch | None) -> Shapes | None:
    """The shape of one row in each column of a share; None where there is no row to tell."""
    if share is None:
        return None
    return [list(x.shape[1:]) for x in (*share.inputs, *([] if share.target is None else [share.target]))]


def agree(told: Sequence[Shapes | None], columns: Columns) -> Shapes:
    """The shapes that all shares have, told by each. Raises DataError where they differ, or where no share has a row."""
    known = [(partition, found) for partition, found in enumerate(told) if found is not None]
    if not known:
        raise DataError("the DataFrame has no rows; there is nothing to train on")
    first, shape = known[0]
    for partition, found in known[1:]:
        for column, a, b in zip(columns.shown, shape, found, strict=True):
            if a != b:
                raise DataError(
                    f"column {column.name!r} holds rows of shape {a} (partition {first}) and {b} (partition {partition}); "
                    "all rows need one shape"
                )
    return shape


def nothing(columns: Columns, agreed: Shapes) -> Batch:
    """A share without rows, of the shapes that the others have."""
    made = [torch.empty([0, *shape], dtype=c.dtype) for c, shape in zip(columns.shown, agreed, strict=True)]
    if columns.weight is not None:
        made.append(torch.empty(0, dtype=columns.weight.dtype))
    return _batch(made, columns)


def tensor(array: pa.Array, column: Column, partition: int, first_row: int = 0) -> Tensor:
    """One column of one record batch as a tensor [B, ...] of column.dtype."""
    where = f"partition {partition}"
    if isinstance(array, pa.ChunkedArray):
        array = array.combine_chunks()
    if array.null_count:
        row = first_row + int(np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False))[0])
        raise DataError(
            f"column {column.name!r} has {array.null_count} null(s), the first in row {row} of {where}; "
            f"drop them (df.na.drop(subset=[{column.name!r}])) or fill them first"
        )
    if column.decoder is not None:
        values = _decoded(array, column, where)
    else:
        values = _numbers(array, column, where)
    if column.finite and values.is_floating_point() and not bool(torch.isfinite(values).all()):
        bad = ~torch.isfinite(values.reshape(len(values), -1)).all(dim=1)
        row = first_row + int(bad.nonzero()[0, 0])
        raise DataError(
            f"column {_member(column, ~torch.isfinite(values))!r} has NaN or infinity in {int(bad.sum())} row(s), the first in "
            f"row {row} of {where}; "
            "filter or impute them first"
        )
    if column.dtype == torch.int64 and values.is_floating_point():
        whole = values.to(torch.int64)
        if not bool((whole == values).all()):
            row = first_row + int((whole != values).reshape(len(values), -1).any(dim=1).nonzero()[0, 0])
            raise DataError(f"column {column.name!r} must hold whole numbers, row {row} of {where} does not")
        return whole
    made = values.to(column.dtype)
    narrower = made.dtype != values.dtype and made.is_floating_point()
    if column.finite and narrower and not bool(torch.isfinite(made).all()):
        bad = ~torch.isfinite(made.reshape(len(made), -1)).all(dim=1)
        row = first_row + int(bad.nonzero()[0, 0])
        raise DataError(
            f"column {_member(column, ~torch.isfinite(made))!r} has values too large for {made.dtype}, the first in row {row} of "
            f"{where}; scale it first"
        )
    if column.positive and len(made) and bool((made < 0).any()):
        row = first_row + int((made < 0).nonzero()[0, 0])
        raise DataError(f"column {column.name!r} has negative weights, the first in row {row} of {where}; they must be at least 0")
    if column.unit and len(made) and not bool(((made >= 0) & (made <= 1)).all()):
        bad = ((made < 0) | (made > 1)).reshape(len(made), -1).any(dim=1)
        row = first_row + int(bad.nonzero()[0, 0])
        raise DataError(f"column {column.name!r} has values outside 0 .. 1, which its loss takes, the first in row {row} of {where}")
    return made


def _member(column: Column, bad: Tensor) -> str:
    """The name of the first column that has a bad value, where several stand side by side; bad [B, ...] bool."""
    return column.members[int(bad.any(0).nonzero()[0, 0])] if column.members else column.name


def _numbers(array: pa.Array, column: Column, where: str) -> Tensor:
    shape = [len(array)]
    while isinstance(array, pa.ListArray | pa.LargeListArray | pa.FixedSizeListArray):
        width = _width(array, column, where)
        shape.append(width)
        array = array.flatten()  # honours the array's own offset
        if array.null_count:
            name = _member(column, torch.from_numpy(array.is_null().to_numpy(zero_copy_only=False)).view(shape))
            inside = "" if column.members else " inside its arrays"
            raise DataError(f"column {name!r} has {array.null_count} null(s){inside} ({where}); fill them first")
    if pa.types.is_boolean(array.type):
        array = array.cast(pa.uint8())
    values = torch.from_dlpack(array) if len(array) else torch.empty(0)  # no copy, and no warning of read-only memory
    return values.reshape(shape)


def _width(array: pa.Array, column: Column, where: str) -> int:
    """The one length of all lists of `array`."""
    if isinstance(array, pa.FixedSizeListArray):
        return array.type.list_size
    lengths = np.diff(array.offsets.to_numpy())
    if not len(lengths):
        return 0
    if lengths.min() != lengths.max():
        raise DataError(
            f"column {column.name!r} holds arrays of {lengths.min()} and {lengths.max()} values ({where}); all rows need one length"
        )
    return int(lengths[0])


def _decoded(array: pa.Array, column: Column, where: str) -> Tensor:
    decoder = column.decoder
    if isinstance(decoder, Raw):
        kind = np.dtype(_offset_dtype(array))
        offsets = np.frombuffer(array.buffers()[1], kind, len(array) + 1, array.offset * kind.itemsize)
        lengths = np.diff(offsets)
        if len(lengths) and (lengths != decoder.nbytes).any():
            wrong = int(lengths[lengths != decoder.nbytes][0])
            raise DataError(f"column {column.name!r} holds values of {wrong} bytes, {decoder} takes {decoder.nbytes} ({where})")
        data = array.buffers()[2]
        start, stop = int(offsets[0]), int(offsets[-1])
        flat = np.frombuffer(data, np.uint8, stop - start, start) if stop > start else np.empty(0, np.uint8)
        return torch.from_numpy(flat.view(decoder.dtype).reshape(len(array), *decoder.shape).copy())
    try:
        made = [decoder(value.as_py()) for value in array]
    except DataError as error:
        raise DataError(f"{error} ({where}, in the decoder of column {column.name!r})") from error
    except Exception as error:
        raise UserError(report(error, f"{where}, in the decoder of column {column.name!r}")["message"]) from error
    rows = [_array(x, column, where) for x in made]
    shapes = sorted({row.shape for row in rows})
    if len(shapes) > 1:
        raise DataError(f"the decoder of column {column.name!r} returned shapes {shapes[0]} and {shapes[1]} ({where})")
    return torch.from_numpy(np.stack(rows))


def _array(made: object, column: Column, where: str) -> np.ndarray:
    """What a decoder returned, as numbers that torch can hold."""
    try:
        found = np.asarray(made)
        found = found.astype(found.dtype.newbyteorder("="), copy=False)
    except Exception as error:  # lists that are ragged, tensors with a gradient, ...
        raise DataError(f"the decoder of column {column.name!r} returned a {type(made).__name__} ({where}): {error}") from error
    if not numeric(found.dtype):
        raise DataError(
            f"the decoder of column {column.name!r} returned a {type(made).__name__} of dtype {found.dtype} ({where}); "
            "it must return an array of real numbers"
        )
    return found


def _offset_dtype(array: pa.Array) -> type:
    return np.int64 if pa.types.is_large_binary(array.type) else np.int32
