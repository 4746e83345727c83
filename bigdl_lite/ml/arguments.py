"""What a user passes to model.udf(), as the arrays that the module's inputs are read from.

transform sees the DataFrame on the driver, and has Spark turn vectors and decimals into arrays of doubles; a function in SQL sees its
arguments only here.

    passed to the function           becomes
    number, boolean, decimal         the same; a decimal a double
    array (of arrays) of numbers     the same
    ml vector, dense or sparse       list of doubles
    one number for each of a group   list of doubles
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from bigdl_lite.data.columns import Column
from bigdl_lite.errors import DataError

_VECTOR = {"type", "size", "indices", "values"}  # the fields of an ml vector


def arguments(arrays: Sequence[pa.Array], columns: Sequence[Column]) -> list[pa.Array]:
    """An array for each column, out of as many arrays, or out of one for each member of the groups.

    Raises DataError for any other number of them, and for what no tensor can hold.
    """
    names = [name for c in columns for name in c.members or [c.name]]
    wanted = len(names)
    if len(arrays) == len(columns):
        return [_plain(a, c.name, c) for a, c in zip(arrays, columns, strict=True)]
    if len(arrays) != wanted:
        several = f", or {wanted} ({', '.join(names)})" if wanted > len(columns) else ""
        raise DataError(f"the function takes {len(columns)} arguments, one for each input of the module{several}; it got {len(arrays)}")
    made, at = [], 0
    for c in columns:
        if c.members:
            made.append(_side_by_side([_plain(arrays[at + i], name, None) for i, name in enumerate(c.members)], c))
        else:
            made.append(_plain(arrays[at], c.name, c))
        at += len(c.members) or 1
    return made


def _plain(array: pa.Array, name: str, column: Column | None) -> pa.Array:
    kind = array.type
    if pa.types.is_struct(kind) and {field.name for field in kind} == _VECTOR:
        return _dense(array, name)
    if column is not None and column.decoder is not None:
        if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
            raise DataError(f"the function's argument for {name!r} is {kind}, its decoder reads binary values")
        return array
    inner, depth = kind, 0
    while pa.types.is_list(inner) or pa.types.is_large_list(inner):
        inner, depth = inner.value_type, depth + 1
    if pa.types.is_decimal(inner):
        to = pa.float64()
        for _ in range(depth):
            to = pa.list_(to)
        return array.cast(to)
    if not (pa.types.is_integer(inner) or pa.types.is_floating(inner) or pa.types.is_boolean(inner)):
        raise DataError(f"the function's argument for {name!r} is {kind}, which no tensor can hold; cast it to a number")
    return array


def _side_by_side(arrays: Sequence[pa.Array], column: Column) -> pa.Array:
    """[B, k]: one number of each, as lists. Nulls stay, and are an error where the tensor is made."""
    rows, k = len(arrays[0]), len(arrays)
    alike = len({a.type for a in arrays}) == 1
    values = pa.concat_arrays([a if alike else a.cast(pa.float64()) for a in arrays])
    by_row = np.arange(rows * k).reshape(k, rows).T.ravel()
    return pa.FixedSizeListArray.from_arrays(values.take(pa.array(by_row)), k)


def _dense(array: pa.StructArray, name: str) -> pa.Array:
    """ml vectors [B] of one size n as lists of n doubles."""
    fields = dict(zip((field.name for field in array.type), array.flatten(), strict=True))  # a null vector is a null in each
    kind, size, indices, values = (fields[name] for name in ("type", "size", "indices", "values"))
    if values.null_count or not np.any(kind.to_numpy(zero_copy_only=False) == 0):
        return values
    size = size.cast(pa.int64())  # dense vectors have none, and whole numbers with gaps come as floats from pandas (Spark 3.5)
    rows, sizes = [], set()
    for i in range(len(array)):
        found = values[i].values.to_numpy(zero_copy_only=False)
        if kind[i].as_py() == 0:
            full = np.zeros(size[i].as_py())
            full[indices[i].values.to_numpy(zero_copy_only=False)] = found
            found = full
        rows.append(found)
        sizes.add(len(found))
    if len(sizes) > 1:
        raise DataError(f"the function's argument for {name!r} holds vectors of {min(sizes)} and {max(sizes)} values, all need one")
    return pa.FixedSizeListArray.from_arrays(pa.array(np.concatenate(rows)), sizes.pop())
