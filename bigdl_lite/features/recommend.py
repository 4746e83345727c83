"""Who met what: negatives to train with, candidates to test with, histories, and a test set of last events.

    events (user, item, time) --- leave_one_out ---> train --- negative_samples ---> rows with label 1 and 0 ---> fit
                                       `----------> test  --- candidates -------> [true item, n others] ------> HR@k, NDCG@k

Whatever is drawn by lot is a hash of the row and a seed, in the place of rand(): it is the same in any number of partitions,
and when Spark computes a partition again.

Source: He et al., "Neural Collaborative Filtering", WWW 2017, for the negatives and the evaluation; Bentley and Floyd,
"Programming Pearls: A Sample of Brilliance", CACM 1987, for n different numbers in n draws.
"""

from __future__ import annotations

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from bigdl_lite.errors import DataError, RecipeError
from bigdl_lite.features.frames import HIDDEN, Names, col, columns, listed, require_whole, shown, untied, window

_I, _PLACE, _MET, _RANKS = (HIDDEN + name for name in ("i", "place", "met", "ranks"))


def leave_one_out(df: DataFrame, user: str, time: Names) -> tuple[DataFrame, DataFrame]:
    """(train, test): the last row of each user is held out; the only row of a user stays in train.

    time    a column, or a list of columns, the later for where the first are equal

    Cost    lazy; one shuffle by user for each of the two.
    Raises  DataError where a column is missing; an error of Spark's, when it is computed, for a row without a time and for a
            user with two rows of one time.

    >>> df = spark.createDataFrame([(1, 7, 0), (1, 8, 1), (2, 7, 5)], "user long, item long, time long")
    >>> train, test = leave_one_out(df, "user", "time")
    >>> sorted(tuple(row) for row in train.collect()), [tuple(row) for row in test.collect()]
    ([(1, 7, 0), (2, 7, 5)], [(1, 8, 1)])
    """
    keys, times = columns(df, [user]), columns(df, listed(time))
    order = window(keys, times)
    last = (F.row_number().over(order) > 1) & F.lead(F.lit(1)).over(order).isNull()
    marked = df.withColumn(HIDDEN, untied(last, order, df, user, time))
    return marked.where(~F.col(HIDDEN)).drop(HIDDEN), marked.where(HIDDEN).drop(HIDDEN)


def history(df: DataFrame, user: str, item: str, time: Names, length: int, into: str = "history") -> DataFrame:
    """df with the last `length` items of the same user before each row: a column `into`, array<long> [length].

    The latest stands last, and 0 stands before the first: items are numbered from 1.

    Cost    lazy; one shuffle by user, and a sort.
    Raises  DataError where a column is missing, is not of whole numbers, or `into` is there already; RecipeError for length < 1;
            an error of Spark's, when it is computed, for an item that is null or 0, and for times that are null or equal.

    >>> df = spark.createDataFrame([(1, 7, 0), (1, 8, 1), (1, 9, 2)], "user long, item long, time long")
    >>> [(row.item, row.history) for row in history(df, "user", "item", "time", length=2).collect()]
    [(7, [0, 0]), (8, [0, 7]), (9, [7, 8])]
    """
    if length < 1:
        raise RecipeError(f"history(length={length}): must be at least 1")
    owner, thing, *times = columns(df, [user, item, *listed(time)], [into])
    require_whole(df, item)
    order = window([owner], times)
    wrong = F.concat(F.lit(f"column {item!r} holds "), shown(thing), F.lit(", and 0 is the padding: number items from 1"))
    sound = F.when(thing.isNull() | (thing == 0), F.raise_error(wrong)).otherwise(thing.cast("long"))
    before = F.collect_list(sound).over(order.rowsBetween(-length, -1))
    padded = F.concat(F.array_repeat(F.lit(0).cast("long"), F.lit(length) - F.size(before)), before)
    return df.withColumn(into, untied(padded, order, df, user, time))


def negative_samples(
    df: DataFrame, user: str, item: str, ratio: int, seed: int = 0, items: int | DataFrame | None = None,
    seen: DataFrame | None = None, label: str = "label",
) -> DataFrame:  # fmt: skip
    """The rows of df with label 1, and for each of them up to `ratio` copies with another item and label 0.

    ratio    items drawn for each row, each equally likely. A draw that hits an item of this user is dropped, not repeated:
             a user who met m of n items keeps ratio * (1 - m / n) on average
    seed     of the draws: a hash of (user, item, number of the draw, seed)
    items    n: the items are 0 .. n - 1; a DataFrame: those in its column `item`; None: those in df
    seen     a DataFrame (user, item) of the pairs that are no negatives; None: those of df
    label    the name of the new column, float

    Cost     lazy, but for one job that counts the items where they are not a number; then one join of ratio times the rows.
    Raises   DataError where a column is missing or label is there already, RecipeError for a ratio or items below 1.

    >>> df = spark.createDataFrame([(1, 0), (1, 1), (2, 3)], "user long, item long")
    >>> made = negative_samples(df, "user", "item", ratio=1, items=1000)
    >>> made.groupBy("user").sum("label").orderBy("user").collect()
    [Row(user=1, sum(label)=2.0), Row(user=2, sum(label)=1.0)]
    >>> made.where("label = 0").join(df, ["user", "item"], "left_semi").count(), made.count()
    (0, 6)
    """
    if ratio < 1:
        raise RecipeError(f"negative_samples(ratio={ratio}): must be at least 1")
    owner, thing = columns(df, [user, item], [label])
    catalogue, n = _catalogue(df, item, items)
    each = df.withColumn(_I, F.explode(F.sequence(F.lit(1), F.lit(ratio))))
    drawn = each.withColumn(_PLACE, F.pmod(F.xxhash64(owner, thing, F.col(_I), F.lit(seed)), F.lit(n)))
    drawn = _placed(drawn.drop(item), catalogue, item, df).select(*columns(df, df.columns))
    seen = df if seen is None else seen
    unmet = drawn.join(seen.select(*columns(seen, [user, item])), [user, item], "left_anti").select(*columns(df, df.columns))
    one, zero = (F.lit(x).cast("float") for x in (1.0, 0.0))
    return df.withColumn(label, one).unionByName(unmet.withColumn(label, zero))


def candidates(
    test: DataFrame, seen: DataFrame, user: str, item: str, n: int = 99, seed: int = 0, items: int | DataFrame | None = None,
    into: str = "candidates", label: str = "label",
) -> DataFrame:  # fmt: skip
    """test with a list to rank for each row: its own item first, then n others that its user never met.

    seen     a DataFrame (user, item) of all that users have met: the training rows; what `test` holds is added
    items    m: the items are 0 .. m - 1; a DataFrame: those in its column `item`; None: those in `seen` and `test`
    returns  the columns of test; `into`, array<long> [1 + n], all different; `label`, long: 0, the place of the true item

    Cost     lazy, but for one job that counts the items where they are not a number. A row costs n times the items that its
             user has met.
    Raises   DataError where a column is missing, not of whole numbers, or a new one is there already; RecipeError for n < 1;
             an error of Spark's, when it is computed, where fewer than n items are left for a user.

    >>> seen = spark.createDataFrame([(1, 0), (1, 1), (2, 3)], "user long, item long")
    >>> test = spark.createDataFrame([(1, 4)], "user long, item long")
    >>> row = candidates(test, seen, "user", "item", n=2, items=5).first()
    >>> row.candidates[0], sorted(row.candidates[1:]), row.label
    (4, [2, 3], 0)
    """
    if n < 1:
        raise RecipeError(f"candidates(n={n}): must be at least 1")
    owner, thing = columns(test, [user, item], [into, label])
    require_whole(test, item)
    met = seen.select(*columns(seen, [user, item])).unionByName(test.select(owner, thing)).distinct()
    catalogue, total = _catalogue(met, item, items)
    places = _places(met, catalogue, item, total).groupBy(user).agg(F.sort_array(F.collect_list(_PLACE)).alias(_MET))
    left = F.lit(total).cast("long") - F.size(_MET)
    too_few = F.concat(
        F.lit(f"{user} "), shown(owner), F.lit(" has met "), shown(F.size(_MET)), F.lit(f" of {total} items: "), shown(left),
        F.lit(f" are left, candidates(n={n}) asks for more; take a smaller n, or name more items"),
    )  # fmt: skip
    ranks = F.when(left < n, F.raise_error(too_few)).otherwise(_different(n, left, [owner, thing, F.lit(seed)]))
    pairs = test.select(owner, thing).distinct().join(places, user).withColumn(_RANKS, ranks)
    others = F.transform(_RANKS, lambda r: r + F.size(F.filter(_below(), lambda d: d <= r)))
    if catalogue is None:
        lists = pairs.select(owner, thing, others.alias(_RANKS))
    else:
        wide = pairs.select(owner, thing, F.posexplode(others).alias(_I, _PLACE))
        named = wide.join(catalogue.withColumnRenamed(item, _MET), _PLACE)
        inside = F.sort_array(F.collect_list(F.struct(_I, F.col(_MET).cast("long").alias("item"))))
        lists = named.groupBy(owner, thing).agg(inside["item"].alias(_RANKS))
    zero = F.lit(0).cast("long")
    made = test.join(lists, [user, item]).withColumn(into, F.concat(F.array(thing.cast("long")), F.col(_RANKS))).withColumn(label, zero)
    return made.select(*columns(made, [*test.columns, into, label]))


def _different(n: int, total: Column, by: list[Column]) -> Column:
    """n different numbers below `total`, drawn by the hash of `by`: Floyd's algorithm, which never draws in vain."""

    def add(drawn: Column, j: Column) -> Column:
        t = F.pmod(F.xxhash64(*by, j), j + 1)
        return F.concat(drawn, F.array(F.when(F.array_contains(drawn, t), j).otherwise(t)))

    return F.aggregate(F.sequence(total - n, total - 1), F.array().cast("array<long>"), add)


def _below() -> Column:
    """How many numbers that are not in the sorted _MET lie below each that is: the r-th of them is r + the count of these <= r."""
    return F.transform(_MET, lambda place, k: place - k)


def _catalogue(df: DataFrame, item: str, items: int | DataFrame | None) -> tuple[DataFrame | None, int]:
    """(a table of (_PLACE, item), or None where each item is its own place; how many items there are)."""
    if isinstance(items, int):
        require_whole(df, item)
        if items < 1:
            raise RecipeError(f"items={items}: must be at least 1")
        return None, items
    source = df if items is None else items
    found = source.select(*columns(source, [item])).where(col(item).isNotNull()).distinct()
    place = F.row_number().over(window([], [col(item)])) - 1
    n = found.count()
    if not n:
        raise DataError(f"column {item!r} names no items: the DataFrame is empty")
    return found.select(col(item), place.cast("long").alias(_PLACE)), n


def _placed(drawn: DataFrame, catalogue: DataFrame | None, item: str, like: DataFrame) -> DataFrame:
    """drawn with the item of each _PLACE."""
    kind = like.schema[item].dataType
    if catalogue is None:
        return drawn.withColumn(item, F.col(_PLACE).cast(kind))
    return drawn.join(catalogue.select(col(item).cast(kind).alias(item), _PLACE), _PLACE)


def _places(met: DataFrame, catalogue: DataFrame | None, item: str, total: int) -> DataFrame:
    """met with the _PLACE of each item; items that are not in the catalogue are left out."""
    if catalogue is not None:
        return met.join(catalogue, item)
    return met.withColumn(_PLACE, col(item).cast("long")).where((F.col(_PLACE) >= 0) & (F.col(_PLACE) < total))
