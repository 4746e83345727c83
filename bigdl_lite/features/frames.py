"""What all helpers share: columns by their plain names, rows in time, and a search through a table of words.

A time is a column, or a list of columns of which the later ones decide where the first are equal. Where the order of two rows
is still open, a helper raises: Spark would pick one, and another the next time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import Column, DataFrame, Window, WindowSpec
from pyspark.sql import functions as F
from pyspark.sql.types import ByteType, IntegerType, LongType, ShortType

from bigdl_lite.data.columns import require
from bigdl_lite.errors import DataError

Names = str | Sequence[str]

HIDDEN = "__bigdl_lite_"  # how the names of our own, passing columns begin


def listed(names: Names | None) -> list[str]:
    return [] if names is None else [names] if isinstance(names, str) else list(names)


def col(name: str) -> Column:
    """The column of this very name, dots and all."""
    return F.col("`" + name.replace("`", "``") + "`")


def columns(frame: DataFrame, names: Sequence[str], new: Sequence[str] = ()) -> list[Column]:
    """The columns of these names. Raises DataError where one is missing, or where one of `new` is there already."""
    require(names, frame.columns)
    taken = [name for name in new if name.lower() in {c.lower() for c in frame.columns}]
    if taken:
        raise DataError(f"the DataFrame has a column {taken[0]!r} already: drop it, or give the new one another name")
    return [col(name) for name in names]


def require_whole(frame: DataFrame, name: str) -> None:
    """Raises DataError where a column is not one of whole numbers."""
    kind = frame.schema[name].dataType
    if not isinstance(kind, ByteType | ShortType | IntegerType | LongType):
        raise DataError(
            f"column {name!r} is of type {kind.simpleString()}, must hold whole numbers: number its values first "
            "(StringIndexer, and cast to long)"
        )


def window(by: Sequence[Column], times: Sequence[Column], down: bool = False) -> WindowSpec:
    """The rows of each key in the order of time, earliest first; or latest first."""
    keys = by or [F.lit(0)]  # one partition, and without Spark's warning that it is one
    return Window.partitionBy(*keys).orderBy(*(t.desc() if down else t.asc() for t in times))


def untied(value: Column, order: WindowSpec, frame: DataFrame, by: Names | None, time: Names) -> Column:
    """`value`; raises, when it is computed, at a row that has no time or the time of its neighbour in `order`."""
    keys, times = columns(frame, listed(by)), columns(frame, listed(time))
    here, before = F.struct(*times), F.lag(F.struct(*times)).over(order)
    whose = [F.lit(" of "), *_told(listed(by), keys)] if keys else []
    named = listed(time)
    tie = F.concat(
        F.lit("two rows"), *whose, F.lit(" have "), *_told(named, times), F.lit(
            f": which is first? Name a column that decides, time={[*named, '...']!r}, or drop one of the rows"
        ),
    )  # fmt: skip
    absent = F.concat(F.lit("a row"), *whose, F.lit(f" has no time: column {named[0]!r} is null; drop such rows first"))
    return F.when(times[0].isNull(), F.raise_error(absent)).when(before.eqNullSafe(here), F.raise_error(tie)).otherwise(value)


def _told(names: Sequence[str], found: Sequence[Column]) -> list[Column]:
    """The parts of a text "a = 1, b = 2"."""
    parts = [(F.lit(f"{', ' if i else ''}{name} = "), shown(c)) for i, (name, c) in enumerate(zip(names, found, strict=True))]
    return [part for pair in parts for part in pair]


def shown(value: Column) -> Column:
    """A value as text, for a message."""
    return F.coalesce(value.cast("string"), F.lit("null"))


def ids_of(words: Sequence[str], first: int, unknown: int) -> Callable[[pa.Array], pa.Array]:
    """The function strings -> int64: first + i for words[i], `unknown` for others and for null."""
    table = list(words)
    made: list[pa.Array] = []  # built once in each task

    def ids(values: pa.Array) -> pa.Array:
        if not made:
            made.append(pa.array(table, pa.string()))
        found = pc.index_in(values.cast(pa.string()), value_set=made[0], skip_nulls=True)
        return pc.fill_null(pc.add(found.cast(pa.int64()), first), unknown)

    return ids


def mapped(function: Callable[[pa.Array], pa.Array], given: pa.DataType, sql_type: str) -> Callable[[Column], Column]:
    """A column computed in Python, an Arrow array at a time. Spark < 4.1 has this over pandas only, and converts on both sides.

    given  the type of the arrays, which a Series of nulls does not tell

    Spark's own maps and arrays are searched from end to end, a cost for each word that grows with their length; Arrow hashes.
    """
    if hasattr(F, "arrow_udf"):

        def whole(batches: Any) -> Any:
            return (function(batch) for batch in batches)

        whole.__annotations__ = {"batches": Iterator[pa.Array], "return": Iterator[pa.Array]}
        return F.arrow_udf(whole, sql_type)
    import pandas as pd

    def through(batches: Any) -> Any:
        return (function(pa.Array.from_pandas(batch, type=given)).to_pandas() for batch in batches)

    through.__annotations__ = {"batches": Iterator[pd.Series], "return": Iterator[pd.Series]}
    return F.pandas_udf(through, sql_type)
