"""What each column becomes: the contract between a DataFrame's schema and a module's arguments.

    Arrow type                     tensor                        condition
    int8 .. int64, uint8 .. 32     [B] int64                     no nulls
    float, double, bool            [B] float of the module       no nulls, finite
    list (of lists) of those       [B, ...], the same dtypes     every row of one shape
    binary, with Raw(shape, dtype) [B, *shape] of that dtype     every value of that many bytes
    binary, with a function        [B, *], what it returns       every result of one shape and dtype
    k columns named together       [B, k] float of the module    each a column of numbers; whole numbers if all are

ml vectors have become lists of numbers before they come here. Everything else is refused by name on the driver.
"""

from __future__ import annotations

import math
import operator
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import torch

from bigdl_lite.errors import DataError, RecipeError


def numeric(dtype: np.dtype) -> bool:
    """Whether torch has this dtype, and it is one of real numbers."""
    return dtype.kind in "biuf" and dtype.isnative and isinstance(getattr(torch, dtype.name, None), torch.dtype)


@dataclass(frozen=True)
class Raw:
    """Raw bytes of one array: C order, little-endian, `shape` without the batch dimension, `dtype` a NumPy dtype or its name."""

    shape: tuple[int, ...]
    dtype: str = "float32"

    def __post_init__(self) -> None:
        try:
            found = np.dtype(self.dtype)
        except (TypeError, ValueError):
            raise RecipeError(f"Raw(dtype={self.dtype!r}): not a NumPy dtype") from None
        if self.dtype is None or not numeric(found):
            raise RecipeError(f"Raw(dtype={self.dtype!r}): no tensor has it; take one of whole numbers or floats, little-endian")
        try:
            shape = tuple(operator.index(n) for n in self.shape)
        except TypeError:
            shape = (-1,)
        if any(n < 0 for n in shape):
            raise RecipeError(f"Raw(shape={self.shape!r}) is not the shape of an array: a tuple of whole numbers, () for one number")
        object.__setattr__(self, "dtype", found.name)
        object.__setattr__(self, "shape", shape)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


Decoder = Raw | Callable[[bytes], np.ndarray]


Name = str | Sequence[str]  # of an input: one column, or columns of numbers that become one tensor


def flat(names: Sequence[Name]) -> list[str]:
    """All columns that `names` names, each once."""
    return list(dict.fromkeys(one for name in names for one in ([name] if isinstance(name, str) else name)))


def title(name: Name) -> str:
    """What an input is called in messages, and in the frame that workers see: its own name, or one for this list alone."""
    if isinstance(name, str) or not name:
        return str(name)
    return f"{name[0]} to {name[-1]} ({zlib.crc32(repr(list(name)).encode()):08x})"


def field(title: str) -> str:
    """The name under which a column travels: its own where Spark takes it for nothing else (a path, a star) and nor do we.

    Spark's mapInArrow looks for columns by frame[name], where dots and backticks have a meaning.
    """
    plain = re.fullmatch(r"[\w ()]+", title) and not title.startswith("__bigdl_lite")
    return title if plain else f"column_{zlib.crc32(title.encode(errors='replace')):08x}"


@dataclass(frozen=True)
class Column:
    """One column and the dtype of its tensor. depth counts list levels; decoder is set for binary columns only.

    members names the columns of numbers that the JVM has put side by side in this one; empty for one that stands for itself.
    """

    name: str
    dtype: torch.dtype
    depth: int = 0
    decoder: Decoder | None = None
    finite: bool = True  # NaN and infinity are errors
    members: tuple[str, ...] = ()
    unit: bool = False  # values below 0 or above 1 are errors
    positive: bool = False  # values below 0 are errors

    @property
    def source(self) -> Name:
        """The column, or the columns, of the user's DataFrame that this one reads."""
        return self.members or self.name

    def renamed(self, name: Name) -> Column:
        return replace(self, name=title(name), members=() if isinstance(name, str) else tuple(name))


@dataclass(frozen=True)
class Columns:
    """All that a fit reads: the inputs in the order of forward's arguments, and the label if there is one.

    weight says how much a row counts, held whether it is for validation and not for training; either may be missing.

    row is the name of a column of unique int64 row numbers; where given, a share is put in that order before anything
    else, which makes it independent of how the rows travelled. located: record batches say where the rows lie in files,
    and the columns are read from there (parquet.py).
    """

    inputs: tuple[Column, ...]
    label: Column | None = None
    row: str | None = None
    located: bool = False
    weight: Column | None = None
    held: Column | None = None

    @property
    def shown(self) -> tuple[Column, ...]:
        """Those that the module and the loss see."""
        return self.inputs if self.label is None else (*self.inputs, self.label)

    @property
    def all(self) -> tuple[Column, ...]:
        return (*self.shown, *(c for c in (self.weight, self.held) if c is not None))


def describe(
    schema: pa.Schema,
    inputs: Sequence[Name],
    label: str | None,
    floating: torch.dtype,
    decoders: Mapping[str, Decoder] | None = None,
    label_dtype: torch.dtype | None = None,
    row: str | None = None,
) -> Columns:
    """The Columns for names found in `schema`, each as field() writes it; floating numbers take the dtype `floating`.

    Raises DataError that names the column and the way out: missing, of a type that no tensor can hold, binary without
    a decoder.
    """
    decoders = decoders or {}
    if not inputs:
        raise RecipeError("inputCols is empty: name at least one column")
    known = {*(name for name in inputs if isinstance(name, str)), label}
    unknown = [name for name in decoders if name not in known]
    if unknown:
        raise RecipeError(f"decoders name {unknown}, which are neither input nor label columns")
    made = [
        _column(schema, name, floating, decoders.get(name))
        if isinstance(name, str)
        else replace(_column(schema, title(name), floating, None), members=tuple(name))
        for name in inputs
    ]
    target = None
    if label is not None:
        target = _column(schema, label, floating, decoders.get(label))
        if label_dtype is not None:
            target = replace(target, dtype=label_dtype)
    return Columns(tuple(made), target, row)


def require(names: Sequence[str], present: Sequence[str]) -> None:
    """Raises DataError where a column is missing."""
    missing = [name for name in names if name not in present]
    if missing:
        raise DataError(f"no column {missing[0]!r}; the DataFrame has {', '.join(map(repr, present)) or 'none'}")


def _column(schema: pa.Schema, name: str, floating: torch.dtype, decoder: Decoder | None) -> Column:
    require([field(name)], schema.names)
    found = schema.field(field(name)).type
    kind, depth = found, 0
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        if decoder is None:
            raise DataError(
                f"column {name!r} is binary: say how to read it with decoders={{{name!r}: Raw(shape, dtype)}}, "
                "or give a function from bytes to a NumPy array"
            )
        dtype = floating
        if isinstance(decoder, Raw):
            dtype = torch.from_numpy(np.empty(0, decoder.dtype)).dtype
            dtype = floating if dtype.is_floating_point else dtype
        return Column(name, dtype, 0, decoder)
    if decoder is not None:
        raise DataError(f"column {name!r} is {kind}, a decoder reads binary columns only")
    while pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        kind, depth = kind.value_type, depth + 1
    if pa.types.is_integer(kind):
        return Column(name, torch.int64, depth)
    if pa.types.is_floating(kind) or pa.types.is_boolean(kind):
        return Column(name, floating, depth)
    hint = "index it first (StringIndexer)" if pa.types.is_string(kind) else "cast it to a number"
    raise DataError(f"column {name!r} is of type {found}, which no tensor can hold; {hint}")
