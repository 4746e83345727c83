"""Series in time: windows of rows for a module to read, and a split into earlier and later.

    rows of one key, in time      0  1  2  3  4  5  6  7          length = 3, step = 2, horizon = 2
    windows                       0  1  2                         and the row that each foretells: 4
                                        2  3  4                                                    6
                                              4  5  6             no row 8: this window is left out
"""

from __future__ import annotations

from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F
from pyspark.sql.types import DoubleType, FloatType, TimestampType

from bigdl_lite.errors import DataError, RecipeError
from bigdl_lite.features.frames import HIDDEN, Names, columns, listed, untied, window


def windows(
    df: DataFrame, time: Names, values: Names, length: int, step: int = 1, horizon: int = 0, by: Names | None = None,
    target: Names | None = None, into: str = "window",
) -> DataFrame:  # fmt: skip
    """A row for each window of `length` rows in the order of time, for each key.

    time     a column that orders the rows of a key, or a list of columns, the later for where the first are equal
    values   k columns of numbers
    step     rows from the start of one window to the start of the next; the first begins with the first row of its key
    horizon  how many rows after its end a window's target lies; 0: there are no targets
    by       the columns of the key; None: all rows are one series, which one task then sorts
    target   with a horizon, the column of numbers that is foretold, or a list of them; None: all of `values`
    returns  the columns of `by` and `time`, as of the window's last row; `into`, array<array<double>> [length, k]; with a horizon
             "target", a double for one name, array<double> for a list. Windows that would reach past the last row of their key,
             and those whose target would, are left out: a key of fewer than length + horizon rows has none.

    Cost     lazy; one shuffle by the key, and a sort. Each row is copied `length` times.
    Raises   RecipeError, DataError for what the arguments show; an error of Spark's that says which, when it is computed, for a
             row without a time, or two of a key with the same.

    >>> df = spark.createDataFrame([("a", t, t * 10.0) for t in range(5)], "key string, day int, sold double")
    >>> for row in windows(df, "day", "sold", length=3, horizon=1, by="key", target="sold").collect():
    ...     print(row.key, row.day, row.window, row.target)
    a 2 [[0.0], [10.0], [20.0]] 30.0
    a 3 [[10.0], [20.0], [30.0]] 40.0
    """
    for name, given, least in (("length", length, 1), ("step", step, 1), ("horizon", horizon, 0)):
        if given < least:
            raise RecipeError(f"windows({name}={given}): must be at least {least}")
    if target is not None and not horizon:
        raise RecipeError(f"windows(target={target!r}) without a horizon: say how many rows ahead the target lies, horizon=1")
    if not listed(values) or not listed(time):
        raise RecipeError("windows() needs at least one column of time and one of values")
    kept = list(dict.fromkeys([*listed(by), *listed(time)]))
    taken = {into, "target"} & set(kept) if horizon else {into} & set(kept)
    if taken:
        raise DataError(f"windows() makes a column {taken.pop()!r}, which is also one of the key or of the time: rename that first")
    keys, times = columns(df, listed(by)), columns(df, listed(time))
    order = window(keys, times)
    place = F.row_number().over(order)  # from 1
    whole = (place >= length) & (F.pmod(place - length, F.lit(step)) == 0)
    made = {into: F.collect_list(_numbers(df, values)).over(order.rowsBetween(1 - length, 0))}
    if horizon:
        foretold = values if target is None else target
        ahead = F.lead(_numbers(df, foretold), horizon).over(order)  # null past the last row, and only there
        whole = whole & ahead.isNotNull()
        made["target"] = ahead[0] if isinstance(target, str) else ahead
    made[HIDDEN] = untied(whole, order, df, by, time)
    marked = df.select(*columns(df, kept), *(c.alias(name) for name, c in made.items()))
    return marked.where(HIDDEN).drop(HIDDEN)


def _numbers(df: DataFrame, names: Names) -> Column:
    """array<double>: columns side by side."""
    return F.array(*(c.cast("double") for c in columns(df, listed(names))))


def split_by_time(df: DataFrame, time: str, fraction: float) -> tuple[DataFrame, DataFrame]:
    """(earlier, later): about the first `fraction` of the rows, and the rest. Rows of one time stay together.

    The border is the first time up to which more than `fraction` of the rows lie; rows before it are the earlier ones.
    Unlike randomSplit, this lets no window of the training rows look into the time that is tested.

    Cost    one job now, which counts the rows of each time; the two frames are filters of df.
    Raises  DataError where the frame is empty or a time is null or NaN, RecipeError where fraction is not between 0 and 1.

    >>> earlier, later = split_by_time(spark.range(10).withColumnRenamed("id", "day"), "day", 0.8)
    >>> earlier.count(), later.count(), later.first().day
    (8, 2, 8)
    """
    if not 0 < fraction < 1:
        raise RecipeError(f"split_by_time(fraction={fraction}): must be above 0 and below 1")
    (when,) = columns(df, [time])
    kind = df.schema[time].dataType
    stamp = isinstance(kind, TimestampType)
    exact = F.unix_micros(when) if stamp else when  # the text of a local time names two moments in an autumn night
    lost = (when.isNull() | F.isnan(when)) if isinstance(kind, DoubleType | FloatType) else when.isNull()
    counted = df.groupBy(exact.alias("time"), lost.alias("lost")).agg(F.count("*").alias("rows"))
    upto, everything = F.sum("rows").over(window([], [F.col("time")])), F.sum("rows").over(Window.partitionBy(F.lit(0)))
    beyond = F.when(upto > fraction * everything, F.col("time")).alias("time")
    bad = F.sum(F.when(F.col("lost"), F.col("rows"))).alias("lost")
    border = F.min("time").cast("string").alias("border")
    found = counted.select(beyond, "lost", "rows").agg(border, F.sum("rows").alias("rows"), bad).first()
    if not found.rows:
        raise DataError("split_by_time() was given a DataFrame without rows")
    if found.lost:
        raise DataError(f"column {time!r} is null or NaN in {found.lost} of {found.rows} rows; drop them first")
    first = F.timestamp_micros(F.lit(int(found.border))) if stamp else F.lit(found.border).cast(kind)
    return df.where(when < first), df.where(when >= first)
