"""Windows and splits in time: as pandas makes them, exact at the edges, and never decided by chance."""

from __future__ import annotations

import datetime
from typing import Any

import numpy as np
import pandas as pd
import pytest
from pyspark.sql import Window
from pyspark.sql import functions as F

from bigdl_lite.errors import DataError, RecipeError
from bigdl_lite.features import split_by_time, windows

pytestmark = pytest.mark.timeout(120)

SIZES = {"a": 10, "b": 3, "c": 1, "d": 4}  # rows of each key


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = [(key, 100 + 7 * t, *rng.standard_normal(2)) for key, n in SIZES.items() for t in range(n)]
    return pd.DataFrame(rows, columns=["key", "t", "x", "y"]).sample(frac=1, random_state=0)


@pytest.fixture(scope="module")
def df(spark: Any, table: pd.DataFrame) -> Any:
    return spark.createDataFrame(table, "key string, t long, x double, y double").repartition(5).cache()


def by_pandas(table: pd.DataFrame, length: int, step: int, horizon: int) -> list[tuple[Any, ...]]:
    found = []
    for key, rows in table.sort_values("t").groupby("key"):
        values, times = rows[["x", "y"]].to_numpy(), rows["t"].to_numpy()
        for start in range(0, len(rows) - length - horizon + 1, step):
            last = start + length - 1
            ahead = (values[last + horizon, 1],) if horizon else ()
            found.append((key, int(times[last]), values[start : last + 1].tolist(), *ahead))
    return sorted(found)


@pytest.mark.parametrize(("length", "step", "horizon"), [(1, 1, 0), (3, 1, 0), (3, 2, 2), (4, 3, 1), (11, 1, 0), (1, 1, 9)])
def test_windows_are_those_of_pandas(df: Any, table: pd.DataFrame, length: int, step: int, horizon: int) -> None:
    made = windows(df, "t", ["x", "y"], length, step, horizon, by="key", target="y" if horizon else None)
    expected = by_pandas(table, length, step, horizon)
    assert sorted(map(tuple, made.collect())) == expected
    assert (length == 11) == (expected == [])


def test_windows_do_not_depend_on_the_partitions_nor_on_a_key(df: Any) -> None:
    one = df.where("key = 'a'")
    made = [windows(frame, "t", "x", 3, horizon=1).orderBy("t").collect() for frame in (one.coalesce(1), one.repartition(7, "x"))]
    assert made[0] == made[1] and len(made[0]) == 7
    assert made[0][0].target == made[0][1].window[2]  # all of the values, an array


def test_no_rows_make_no_windows(df: Any) -> None:
    assert windows(df.where("false"), "t", "x", 3, by="key").collect() == []


def test_two_rows_of_one_time_are_refused_until_a_column_decides(spark: Any) -> None:
    frame = spark.createDataFrame([("a", 1, 1, 5.0), ("a", 1, 0, 6.0), ("b", 1, 0, 7.0)], "key string, t int, n int, x double")
    with pytest.raises(Exception, match=r"two rows of key = a have t = 1: which is first\? Name a column that decides"):
        windows(frame, "t", "x", 1, by="key").collect()
    made = windows(frame, ["t", "n"], "x", 2, by="key").collect()
    assert [(row.key, row.n, row.window) for row in made] == [("a", 1, [[6.0], [5.0]])]
    # negative control: Spark alone decides it by where the rows lie, and says nothing
    order = Window.partitionBy("key").orderBy("t")
    first = [
        rows.withColumn("k", F.row_number().over(order)).where("key = 'a' and k = 1").first().n
        for rows in (frame.coalesce(1), frame.orderBy("n").coalesce(1))
    ]
    assert first == [1, 0]


def test_a_row_without_a_time_is_refused(spark: Any) -> None:
    frame = spark.createDataFrame([("a", None, 5.0), ("a", 1, 6.0)], "key string, t int, x double")
    with pytest.raises(Exception, match="a row of key = a has no time: column 't' is null"):
        windows(frame, "t", "x", 1, by="key").collect()


def test_names_with_dots_are_names(spark: Any) -> None:
    frame = spark.createDataFrame([(0, 1.0), (1, 2.0)], ["a.t", "a.x"])
    assert windows(frame, "a.t", "a.x", 2).collect()[0].window == [[1.0], [2.0]]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"length": 0}, "length=0"),
        ({"step": 0}, "step=0"),
        ({"horizon": -1}, "horizon=-1"),
        ({"target": "x"}, "without a horizon"),
        ({"values": []}, "at least one column"),
        ({"values": "z"}, "no column 'z'"),
        ({"into": "key"}, "makes a column 'key'"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_any_job(df: Any, given: dict[str, Any], said: str) -> None:
    with pytest.raises((RecipeError, DataError), match=said):
        windows(df, **{"time": "t", "values": "x", "length": 2, "by": "key", **given})


@pytest.mark.parametrize("fraction", [0.01, 0.5, 0.8, 0.99])
def test_a_split_puts_about_the_fraction_first_and_keeps_times_together(df: Any, table: pd.DataFrame, fraction: float) -> None:
    earlier, later = split_by_time(df, "t", fraction)
    times = sorted(table["t"])
    border = times[int(fraction * len(times))]  # the first time up to which more than the fraction of the rows lie
    found = earlier.select("t").collect(), later.select("t").collect()
    assert sorted(row.t for row in found[0]) == [t for t in times if t < border]
    assert sorted(row.t for row in found[1]) == [t for t in times if t >= border]


@pytest.mark.parametrize("kind", ["timestamp", "date", "double", "string"])
def test_a_split_takes_times_of_many_kinds_to_the_last_digit(spark: Any, kind: str) -> None:
    at = datetime.datetime(2024, 10, 27, 0, 30)  # an autumn night, in which clocks go back
    made = {
        "timestamp": [at + datetime.timedelta(microseconds=i) for i in range(10)],
        "date": [at.date() + datetime.timedelta(days=i) for i in range(10)],
        "double": [0.1 + i * 2.0**-50 for i in range(10)],
        "string": [f"2024-{i:02}" for i in range(10)],
    }[kind]
    frame = spark.createDataFrame([(t,) for t in made], f"t {kind}").coalesce(1)
    later = split_by_time(frame, "t", 0.6)[1]
    assert sorted(row.t for row in later.collect()) == made[6:]
    assert "Join" not in later._jdf.queryExecution().toString()  # a filter, which files can skip rows by


def test_a_split_of_nothing_or_by_nothing_is_refused(spark: Any, df: Any) -> None:
    with pytest.raises(RecipeError, match="fraction=1"):
        split_by_time(df, "t", 1)
    with pytest.raises(DataError, match="without rows"):
        split_by_time(df.where("false"), "t", 0.5)
    with pytest.raises(DataError, match="null or NaN in 2 of 3 rows"):
        split_by_time(spark.createDataFrame([(1.0,), (None,), (float("nan"),)], "t double"), "t", 0.5)
