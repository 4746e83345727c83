"""Texts as ids of one length: a vocabulary counted by Spark, and the words of each row looked up in it.

    "The cat saw a cat."  ->  the cat saw a cat  ->  [5, 2, 4, 3, 2, 0, 0, 0]         0 padding, 1 unknown, 2 the commonest word

A word is a run of letters, digits, combining marks and underscores of any script, in lower case: (?U)\\w+ of Java.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F
from pyspark.sql.types import ArrayType, StringType

from bigdl_lite.data import files
from bigdl_lite.errors import DataError, RecipeError, WireError
from bigdl_lite.features.frames import col, columns, ids_of, mapped

PADDING, UNKNOWN, FIRST = 0, 1, 2
_FORMAT = 1


def tokens(text: Column) -> Column:
    """The words of a text, array<string>; null for null.

    >>> spark.range(1).select(tokens(F.lit("A no_1: 10 Ünits!")).alias("words")).first().words
    ['a', 'no_1', '10', 'ünits']
    """
    return F.regexp_extract_all(F.lower(text), F.lit(r"(?U)\w+"), F.lit(0))


def _words(frame: DataFrame, column: str) -> Column:
    """array<string>: the tokens of a column of texts; a column of arrays of words as it is."""
    columns(frame, [column])
    kind = frame.schema[column].dataType
    if isinstance(kind, ArrayType) and isinstance(kind.elementType, StringType):
        return col(column)
    if isinstance(kind, StringType):
        return tokens(col(column))
    raise DataError(f"column {column!r} is of type {kind.simpleString()}, must be string (a text) or array<string> (its words)")


@dataclass(frozen=True)
class Vocabulary:
    """Words and their ids: words[i] has the id i + 2; 0 is padding, 1 every other word.

    >>> words = Vocabulary(("cat", "dog"))
    >>> words.id("dog"), words.id("cow"), words.word(2), len(words)     # len: rows of an nn.Embedding
    (3, 1, 'cat', 4)
    >>> Vocabulary.from_json(words.to_json()) == words
    True
    """

    words: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "words", tuple(self.words))
        if not all(isinstance(word, str) for word in self.words):
            raise RecipeError("a Vocabulary takes words, all of them strings")
        if len(set(self.words)) < len(self.words):
            twice = next(word for i, word in enumerate(self.words) if word in self.words[:i])
            raise RecipeError(f"a Vocabulary takes each word once, {twice!r} is there twice")

    @classmethod
    def fit(cls, df: DataFrame, column: str, size: int | None = None, min_count: int = 1) -> Vocabulary:
        """The words of a column, commonest first, equally common ones by code point.

        column     of texts, or of arrays of words (as Tokenizer of pyspark.ml makes them)
        size       the most words that are kept; None: all, and all come to the driver
        min_count  how often a word must stand in the column

        Cost    one job, a count by word.
        Raises  DataError where the column is missing or of another type, RecipeError for size or min_count below 1.

        >>> df = spark.createDataFrame([("the cat saw the dog",), ("a dog",)], "text string")
        >>> Vocabulary.fit(df, "text", size=3).words
        ('dog', 'the', 'a')
        """
        if min_count < 1 or (size is not None and size < 1):
            raise RecipeError(f"Vocabulary.fit(size={size}, min_count={min_count}): both must be at least 1")
        each = df.select(F.explode(_words(df, column)).alias("word")).where("word is not null")
        counted = each.groupBy("word").count().where(F.col("count") >= min_count).orderBy(F.desc("count"), "word")
        return cls(tuple(row.word for row in (counted.limit(size) if size else counted).select("word").collect()))

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {word: i + FIRST for i, word in enumerate(self.words)}

    def __len__(self) -> int:
        return len(self.words) + FIRST

    def id(self, word: str) -> int:
        return self._ids.get(word, UNKNOWN)

    def word(self, id: int) -> str:
        """The word of an id; "" for padding and "?" for unknown."""
        return ("", "?", *self.words)[id] if id < FIRST else self.words[id - FIRST]

    def to_json(self) -> str:
        return json.dumps({"format": _FORMAT, "words": list(self.words)}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> Vocabulary:
        """Raises WireError for a text that to_json() did not write."""
        try:
            told = json.loads(text)
        except ValueError as error:
            raise WireError(f"this is no saved Vocabulary: {error}") from error
        if not isinstance(told, dict) or told.get("format") != _FORMAT or not isinstance(told.get("words"), list):
            raise WireError(f"this is no saved Vocabulary of format {_FORMAT}")
        return cls(tuple(told["words"]))

    def save(self, path: str) -> None:
        """Writes one file of JSON, to a path or a URI that pyarrow.fs opens."""
        files.write(path, self.to_json().encode())

    @classmethod
    def load(cls, path: str) -> Vocabulary:
        return cls.from_json(files.read(path))


def token_ids(
    df: DataFrame, column: str, vocabulary: Vocabulary, length: int, into: str = "ids", mask: str | None = None
) -> DataFrame:  # fmt: skip
    """df with the ids of the first `length` words of each text: a column `into`, array<long> [length], padded with 0 at the end.

    column   of texts, or of arrays of words; null stays null, for a fit to refuse or for you to drop
    mask     the name of one more column, array<float> [length]: 1 where there is a word, 0 where there is padding

    Lazy, and good for streams: no job, no join, rows and partitions stay as they are. The words of the vocabulary go to the
    executors with the query.
    Raises   DataError where the column is missing or of another type or `into` is there already, RecipeError for length < 1.

    >>> df = spark.createDataFrame([("A dog, a cow!",), ("",)], "text string")
    >>> for row in token_ids(df, "text", Vocabulary(("a", "dog")), length=5, mask="mask").collect():
    ...     print(row.ids, row.mask)
    [2, 3, 2, 1, 0] [1.0, 1.0, 1.0, 1.0, 0.0]
    [0, 0, 0, 0, 0] [0.0, 0.0, 0.0, 0.0, 0.0]
    """
    if length < 1:
        raise RecipeError(f"token_ids(length={length}): must be at least 1")
    columns(df, [column], [into, *([mask] if mask else [])])
    made = df.withColumn(into, mapped(_padded(vocabulary, length), pa.list_(pa.string()), "array<bigint>")(_words(df, column)))
    if mask is None:
        return made
    return made.withColumn(mask, F.transform(col(into), lambda id: F.when(id != PADDING, 1.0).otherwise(0.0).cast("float")))


def _padded(vocabulary: Vocabulary, length: int) -> Callable[[pa.Array], pa.Array]:
    """The function array<string> -> array<long> [length]."""
    ids_in = ids_of(vocabulary.words, FIRST, UNKNOWN)

    def ids(texts: pa.Array) -> pa.Array:
        found = ids_in(texts.flatten()).to_numpy()
        counts = pc.fill_null(pc.list_value_length(texts), 0).to_numpy().astype(np.int64)
        starts = np.cumsum(counts) - counts
        place = np.arange(length)
        there = place < counts[:, None]  # [rows, length]
        out = np.full(there.shape, PADDING, np.int64)
        out[there] = found[(starts[:, None] + place)[there]]
        edges = pa.array(np.arange(len(texts) + 1, dtype=np.int32) * length)
        absent = texts.is_null()
        made = pa.ListArray.from_arrays(edges, pa.array(out.reshape(-1)), mask=absent if texts.null_count else None)
        return made

    return ids
