"""Tables of mixed columns as two columns that a module can take: ids of categories, and numbers.

    city   string     Index()      counted by Spark: 1 the commonest, 0 for what was not there when it was fitted
    shop   string     Hashed(50)   1 + hash mod 50: no fitting, any value, and some share a number
    price  double     dense        (x - mean) / standard deviation
    tags   vector     dense        its values side by side, sparse or dense

                              ids [b, 2] int64        dense [b, 1 + tags] float32        (net.py: TableNet takes the two)

A category is the text of its value, and 3, 3.0 and "3" are one: columns that StringIndexer made fit as well as its inputs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
from pyspark.sql import Column, DataFrame, Window
from pyspark.sql import functions as F
from pyspark.sql.types import (
    ArrayType,
    BooleanType,
    DataType,
    DateType,
    DecimalType,
    DoubleType,
    FloatType,
    IntegralType,
    NumericType,
    StringType,
    TimestampType,
)

from bigdl_lite.data import files
from bigdl_lite.errors import DataError, RecipeError, WireError
from bigdl_lite.features.frames import columns, ids_of, mapped

_FORMAT = 1


@dataclass(frozen=True)
class Index:
    """A number for each value: the `size` commonest that occur at least min_count times, or all (None); 0 for every other."""

    size: int | None = None
    min_count: int = 1

    def __post_init__(self) -> None:
        if self.min_count < 1 or (self.size is not None and self.size < 1):
            raise RecipeError(f"{self}: size and min_count must be at least 1")


@dataclass(frozen=True)
class Hashed:
    """One of `buckets` numbers for any value, by Spark's xxhash64: from 1; 0 for null."""

    buckets: int

    def __post_init__(self) -> None:
        if self.buckets < 1:
            raise RecipeError(f"{self}: must be at least 1")


@dataclass(frozen=True)
class Table:
    """Which columns of a table are read, and how.

    dense        columns of numbers, and of ml vectors or arrays of them
    categorical  columns of strings, whole numbers, booleans or dates, and Index() or Hashed(buckets) for each
    standardise  numbers are moved to mean 0 and scaled to standard deviation 1, as they are in the rows that are fitted

    >>> df = spark.createDataFrame([("Rome", 1.0), ("Oslo", 2.0), ("Rome", 3.0)], "city string, price double")
    >>> table = Table(dense=["price"], categorical={"city": Index()}).fit(df)
    >>> for row in table.transform(df).collect():
    ...     print(row.ids, [round(x, 3) for x in row.dense])
    [1] [-1.225]
    [2] [0.0]
    [1] [1.225]
    """

    dense: Sequence[str] = ()
    categorical: Mapping[str, Index | Hashed] = field(default_factory=dict)
    standardise: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.dense, str):
            raise RecipeError(f"Table(dense={self.dense!r}): must be a list of names")
        object.__setattr__(self, "dense", tuple(self.dense))
        object.__setattr__(self, "categorical", dict(self.categorical))
        wrong = [name for name, how in self.categorical.items() if not isinstance(how, Index | Hashed)]
        if wrong:
            raise RecipeError(f"Table(categorical={{{wrong[0]!r}: ...}}): must be Index() or Hashed(buckets)")
        if not self.dense and not self.categorical:
            raise RecipeError("a Table needs at least one column, dense or categorical")

    @property
    def indexed(self) -> dict[str, Index]:
        return {name: how for name, how in self.categorical.items() if isinstance(how, Index)}

    def fit(self, df: DataFrame) -> FittedTable:
        """Counts the categories and takes means and standard deviations.

        Categories are ordered by count, equal counts by code point. Means differ in the last digit between layouts of the rows,
        because sums of floats do.

        Cost    a job for all Index columns, a count by value; a job for all dense columns. All words come to the driver.
        Raises  DataError where a column is missing or of a type that cannot be read; where there are no rows; where a dense value
                is null or NaN, or vectors of a column differ in length.
        """
        texts = {name: _text(df, name) for name in self.categorical}
        numbers = {name: _numbers(df, name) for name in self.dense}
        words = _words(df, {name: texts[name] for name in self.indexed}, self.indexed) if self.indexed else {}
        widths, mean, std = _moments(df, numbers) if numbers else ((), (), ())
        return FittedTable(self, words, widths, mean, std)

    def to_json(self) -> dict[str, Any]:
        """As a value of plain JSON."""
        return {
            "dense": list(self.dense),
            "categorical": [[name, asdict(how)] for name, how in self.categorical.items()],
            "standardise": self.standardise,
        }

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> Table:
        made = {name: Hashed(**how) if "buckets" in how else Index(**how) for name, how in told["categorical"]}
        return cls(told["dense"], made, told["standardise"])


@dataclass(frozen=True)
class FittedTable:
    """A Table and what it learnt; made by Table.fit, or loaded.

    words      of each Index column, commonest first: words[name][i] has the id i + 1
    widths     values of each dense column: 1, or the length of its vectors
    mean, std  [sum(widths)] of the dense values, the standard deviation over n; 1 in the place of 0
    """

    table: Table
    words: Mapping[str, tuple[str, ...]]
    widths: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Rows of the embedding of each categorical column: its ids are 0 .. size - 1."""
        kinds = self.table.categorical.items()
        return tuple(1 + (how.buckets if isinstance(how, Hashed) else len(self.words[name])) for name, how in kinds)

    @property
    def width(self) -> int:
        """Dense values of a row."""
        return sum(self.widths)

    def transform(self, df: DataFrame, ids: str = "ids", dense: str = "dense") -> DataFrame:
        """df with `ids`, array<long> [categorical columns], and `dense`, array<float> [width]; only those that the table has.

        Lazy, and good for streams. A null category is 0; a null number becomes a null in `dense`, which fit and transform of
        an estimator refuse by name.
        Raises  DataError where a column is missing or of a type that cannot be read, or a new one is there already.
        """
        made = {}
        if self.table.categorical:
            made[ids] = F.array(*(self._id(df, name, how) for name, how in self.table.categorical.items()))
        if self.table.dense:
            made[dense] = self._dense(df)
        columns(df, [], list(made))
        return df.withColumns(made)

    def _id(self, df: DataFrame, name: str, how: Index | Hashed) -> Column:
        text = _text(df, name)
        if isinstance(how, Index):
            return mapped(ids_of(self.words[name], 1, 0), pa.string(), "bigint")(text)
        return F.when(text.isNull(), F.lit(0).cast("long")).otherwise(1 + F.pmod(F.xxhash64(text), F.lit(how.buckets)))

    def _dense(self, df: DataFrame) -> Column:
        values = F.concat(*(_numbers(df, name) for name in self.table.dense))
        if self.table.standardise:
            mean, std = (F.array(*map(F.lit, numbers)) for numbers in (self.mean, self.std))
            values = F.zip_with(F.zip_with(values, mean, lambda x, m: x - m), std, lambda x, s: x / s)
        return values.cast("array<float>")

    def to_json(self) -> str:
        told = {
            "format": _FORMAT, "table": self.table.to_json(), "words": {name: list(w) for name, w in self.words.items()},
            "widths": self.widths, "mean": self.mean, "std": self.std,
        }  # fmt: skip
        return json.dumps(told, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> FittedTable:
        """Raises WireError for a text that to_json() did not write."""
        try:
            told = json.loads(text)
            if told["format"] != _FORMAT:
                raise WireError(f"this table has format {told['format']}, this version reads format {_FORMAT}")
            words = {name: tuple(w) for name, w in told["words"].items()}
            return cls(Table.from_json(told["table"]), words, *(tuple(told[name]) for name in ("widths", "mean", "std")))
        except WireError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise WireError(f"this is no saved table: {type(error).__name__}: {error}") from error

    def save(self, path: str) -> None:
        """Writes one file of JSON, to a path or a URI that pyarrow.fs opens."""
        files.write(path, self.to_json().encode())

    @classmethod
    def load(cls, path: str) -> FittedTable:
        return cls.from_json(files.read(path))


def _text(df: DataFrame, name: str) -> Column:
    """The text of a category: whole numbers alike in all types."""
    (value,) = columns(df, [name])
    kind = df.schema[name].dataType
    if isinstance(kind, DoubleType | FloatType):
        whole = (F.abs(value) < 2.0**53) & (value == F.floor(value))
        return F.when(whole, F.floor(value).cast("string")).otherwise(value.cast("string"))
    if isinstance(kind, StringType | IntegralType | DecimalType | BooleanType | DateType | TimestampType):
        return value.cast("string")
    raise DataError(f"column {name!r} is of type {kind.simpleString()}, which is no category: take strings, whole numbers or dates")


def _numbers(df: DataFrame, name: str) -> Column:
    """array<double>: the values of a dense column, [null] for null."""
    (value,) = columns(df, [name])
    kind = df.schema[name].dataType
    if kind.typeName() == "vectorudt":
        from pyspark.ml.functions import vector_to_array

        return F.coalesce(vector_to_array(value), _absent())
    if isinstance(kind, ArrayType) and _is_number(kind.elementType):
        return F.coalesce(value.cast("array<double>"), _absent())
    if _is_number(kind):
        return F.array(value.cast("double"))
    raise DataError(
        f"column {name!r} is of type {kind.simpleString()}, which holds no numbers: name it in categorical, or leave it out"
    )


def _absent() -> Column:
    return F.array(F.lit(None).cast("double"))


def _is_number(kind: DataType) -> bool:
    return isinstance(kind, NumericType | BooleanType)


def _words(df: DataFrame, texts: Mapping[str, Column], kinds: Mapping[str, Index]) -> dict[str, tuple[str, ...]]:
    """The values of each column, commonest first. One job for all."""
    pairs = F.array(*(F.struct(F.lit(i).alias("at"), text.alias("word")) for i, text in enumerate(texts.values())))
    counted = df.select(F.inline(pairs)).where("word is not null").groupBy("at", "word").count()
    kept = F.lit(False)
    for i, how in enumerate(kinds.values()):
        kept = kept | ((F.col("at") == i) & (F.col("count") >= how.min_count) & (F.col("place") <= (how.size or 2**31 - 1)))
    place = F.row_number().over(Window.partitionBy("at").orderBy(F.desc("count"), "word"))
    rows = counted.withColumn("place", place).where(kept).select("at", "word", "place").collect()
    found: list[list[str]] = [[] for _ in texts]
    for row in sorted(rows, key=lambda row: row.place):
        found[row.at].append(row.word)
    return {name: tuple(words) for name, words in zip(texts, found, strict=True)}


def _tagged(values: Column, at: int) -> Column:
    """An array of (at, i, values[i])."""
    return F.transform(values, lambda x, i: F.struct(F.lit(at).alias("at"), i.alias("i"), x.alias("x")))


def _moments(df: DataFrame, numbers: Mapping[str, Column]) -> tuple[tuple[int, ...], tuple[float, ...], tuple[float, ...]]:
    """(width of each column, mean and standard deviation of each value). One job for all, whatever the widths."""
    tagged = [_tagged(values, at) for at, values in enumerate(numbers.values())]
    bad = F.col("x").isNull() | F.isnan("x")
    summed = df.select(F.inline(F.concat(*tagged))).groupBy("at", "i").agg(
        F.count("*").alias("rows"), F.sum(bad.cast("long")).alias("bad"), F.avg("x").alias("mean"), F.stddev_pop("x").alias("std")
    )  # fmt: skip
    found = sorted(summed.collect(), key=lambda row: (row.at, row.i))
    if not found:
        raise DataError("there are no rows to fit the table to")
    widths = []
    for at, name in enumerate(numbers):
        mine = [row for row in found if row.at == at]
        lost = sum(row.bad for row in mine)
        if lost:
            raise DataError(f"column {name!r} has {lost} null(s) or NaN; drop or fill them first (df.na.fill, or Imputer)")
        if len({row.rows for row in mine}) > 1:
            raise DataError(f"column {name!r} holds arrays of different lengths, up to {len(mine)} values; all rows need one length")
        widths.append(len(mine))
    return tuple(widths), tuple(row.mean for row in found), tuple(row.std or 1.0 for row in found)
