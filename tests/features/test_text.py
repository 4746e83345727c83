"""Ids of words: as plain Python would find them, in any partitions, in streams, and kept as JSON."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pyspark.sql import functions as F

from bigdl_lite.errors import DataError, RecipeError, WireError
from bigdl_lite.features import Vocabulary, token_ids

pytestmark = pytest.mark.timeout(120)

TEXTS = [
    "The cat saw a cat.", "the DOG saw the cat", "", "  ...  ", "Ünïcode Wörter, 10 von 10", "one_word", "zebra apple zebra apple",
    "a b c d e f g h i j k", "日本語 テキスト cat", None,
]  # fmt: skip


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def padded(found: list[int], length: int) -> list[int]:
    return (found + [0] * length)[:length]


@pytest.fixture(scope="module")
def df(spark: Any) -> Any:
    return spark.createDataFrame(list(enumerate(TEXTS)), "row int, text string").repartition(3, "row").cache()


@pytest.fixture(scope="module")
def vocabulary(df: Any) -> Vocabulary:
    return Vocabulary.fit(df, "text")


def test_words_are_ordered_by_count_and_then_by_code_point_in_any_partitions(df: Any, vocabulary: Vocabulary) -> None:
    counts = Counter(word for text in TEXTS if text for word in words(text))
    assert vocabulary.words == tuple(sorted(counts, key=lambda word: (-counts[word], word)))
    assert Vocabulary.fit(df.coalesce(1), "text") == vocabulary


def test_the_limits_keep_the_commonest(df: Any, vocabulary: Vocabulary) -> None:
    assert Vocabulary.fit(df, "text", size=5, min_count=2).words == vocabulary.words[:5]
    assert Vocabulary.fit(df, "text", min_count=3).words == ("cat", "the")
    assert Vocabulary.fit(df.where("false"), "text").words == ()


@pytest.mark.parametrize("length", [1, 4, 20])
def test_ids_are_those_of_plain_python(df: Any, vocabulary: Vocabulary, length: int) -> None:
    small = Vocabulary(vocabulary.words[:6])  # so that there are unknown words
    rows = token_ids(df, "text", small, length, mask="mask").collect()
    assert len(rows) == len(TEXTS)
    for row in rows:
        text = TEXTS[row.row]
        if text is None:
            assert row.ids is None and row.mask is None
            continue
        expected = padded([small.id(word) for word in words(text)], length)
        assert row.ids == expected and row.mask == [float(id != 0) for id in expected]
    assert any(1 in row.ids for row in rows if row.ids)  # something was unknown
    assert dict(token_ids(df, "text", small, 4, mask="mask").dtypes)["ids"] == "array<bigint>"


def test_a_spark_without_arrow_functions_finds_the_same(df: Any, vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch) -> None:
    direct = sorted(token_ids(df, "text", vocabulary, 4, mask="mask").collect())
    monkeypatch.delattr(F, "arrow_udf", raising=False)
    made = token_ids(df, "text", vocabulary, 4, mask="mask")
    assert sorted(made.collect()) == direct and "Arrow" in made._jdf.queryExecution().executedPlan().toString()


def test_arrays_of_words_are_taken_as_they_are_and_null_words_are_unknown(spark: Any) -> None:
    frame = spark.createDataFrame([(["Cat", None, "x-y"],), ([],), (None,)], "words array<string>")
    assert Vocabulary.fit(frame, "words").words == ("Cat", "x-y")
    found = [row.ids for row in token_ids(frame, "words", Vocabulary(("x-y", "Cat")), 4).coalesce(1).collect()]
    assert found == [[3, 1, 2, 0], [0, 0, 0, 0], None]


def test_rows_need_no_partition_and_no_vocabulary(df: Any) -> None:
    assert token_ids(df.where("false"), "text", Vocabulary(("a",)), 3).collect() == []
    found = token_ids(df.where("row = 0"), "text", Vocabulary(()), 6).first().ids
    assert found == [1, 1, 1, 1, 1, 0]


def test_a_vocabulary_is_plain_json_and_comes_back_the_same(vocabulary: Vocabulary, tmp_path: Path) -> None:
    path = str(tmp_path / "deep" / "words.json")
    vocabulary.save(path)
    assert Vocabulary.load(path) == vocabulary
    assert json.loads(Path(path).read_text())["words"] == list(vocabulary.words)
    assert [vocabulary.id(vocabulary.word(i)) for i in range(2, len(vocabulary))] == list(range(2, len(vocabulary)))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 9, "words": []}', '{"format": 1, "words": "ab"}', "\x80\x04N."])
def test_what_is_no_vocabulary_is_refused(text: str) -> None:
    with pytest.raises(WireError, match="no saved Vocabulary"):
        Vocabulary.from_json(text)


def test_settings_that_cannot_work_are_refused_before_any_job(df: Any, vocabulary: Vocabulary) -> None:
    with pytest.raises(RecipeError, match="'b' is there twice"):
        Vocabulary(("a", "b", "b"))
    with pytest.raises(RecipeError, match="strings"):
        Vocabulary(("a", 1))  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="min_count=0"):
        Vocabulary.fit(df, "text", min_count=0)
    with pytest.raises(RecipeError, match="length=0"):
        token_ids(df, "text", vocabulary, 0)
    with pytest.raises(DataError, match="no column 'txt'"):
        token_ids(df, "txt", vocabulary, 3)
    with pytest.raises(DataError, match="'row' is of type int"):
        token_ids(df, "row", vocabulary, 3)
    with pytest.raises(DataError, match="has a column 'text' already"):
        token_ids(df, "text", vocabulary, 3, into="text")


def test_a_stream_gets_the_ids_of_a_table(spark: Any, tmp_path: Path, df: Any, vocabulary: Vocabulary) -> None:
    df.coalesce(1).write.json(str(tmp_path / "in"))
    stream = spark.readStream.schema(df.schema).json(str(tmp_path / "in"))
    made = token_ids(stream, "text", vocabulary, 5, mask="mask")
    query = made.writeStream.format("memory").queryName("ids").trigger(availableNow=True)
    query.option("checkpointLocation", str(tmp_path / "state")).start().awaitTermination()
    assert sorted(spark.table("ids").collect()) == sorted(token_ids(df, "text", vocabulary, 5, mask="mask").collect())
