"""Negatives, candidates and histories: never what a user met, the same in any layout, and each item as likely as another."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from pyspark.sql import functions as F

from bigdl_lite.errors import DataError, RecipeError
from bigdl_lite.features import candidates, history, leave_one_out, negative_samples

pytestmark = pytest.mark.timeout(120)

USERS, ITEMS = 12, 40
SCHEMA = "user long, item int, time long"


def events() -> list[tuple[int, int, int]]:
    """user u met u distinct items, in a random order."""
    rng = np.random.default_rng(0)
    return [(u, int(item), 10 + t) for u in range(1, USERS + 1) for t, item in enumerate(rng.permutation(ITEMS)[:u])]


ROWS = events()
MET = {u: {item for user, item, _ in ROWS if user == u} for u in range(1, USERS + 1)}


@pytest.fixture(scope="module")
def df(spark: Any) -> Any:
    return spark.createDataFrame(ROWS, SCHEMA).coalesce(1).cache()


@pytest.fixture(scope="module")
def spread(df: Any) -> Any:
    """The same rows in another layout."""
    return df.repartition(6, "item").cache()


def rows(frame: Any) -> list[tuple[Any, ...]]:
    return sorted(map(tuple, frame.collect()))


def test_negatives_are_never_what_the_user_met_and_do_not_depend_on_the_layout(df: Any, spread: Any) -> None:
    made = rows(negative_samples(df, "user", "item", ratio=5, seed=3, items=ITEMS))
    assert made == rows(negative_samples(spread, "user", "item", ratio=5, seed=3, items=ITEMS))
    assert sorted(row[:3] for row in made if row[3] == 1) == sorted(ROWS)
    negatives = [row for row in made if row[3] == 0]
    assert all(item not in MET[user] and 0 <= item < ITEMS for user, item, _, _ in negatives)
    kept = sum(5 * (1 - len(MET[u]) / ITEMS) for u, _, _ in ROWS)  # of each row's draws, on average
    assert abs(len(negatives) - kept) < 5 * np.sqrt(kept)
    assert {(u, t) for u, _, t, _ in negatives} <= {(u, t) for u, _, t in ROWS}  # other columns are those of the row


def test_controls_of_the_two_promises(spark: Any, df: Any, spread: Any) -> None:
    """Negative controls: without the exclusion true pairs appear, and rand() depends on the layout though it has a seed."""
    nothing = spark.createDataFrame([], SCHEMA)
    drawn = negative_samples(df, "user", "item", ratio=5, seed=3, items=ITEMS, seen=nothing).where("label = 0").collect()
    assert len(drawn) == 5 * len(ROWS) and sum(row["item"] in MET[row.user] for row in drawn) > 0
    by_rand = [rows(frame.withColumn("drawn", (F.rand(3) * ITEMS).cast("int"))) for frame in (df, spread)]
    assert by_rand[0] != by_rand[1]


def test_another_seed_draws_others(df: Any) -> None:
    first, second = (rows(negative_samples(df, "user", "item", ratio=1, seed=s, items=10**6).where("label = 0")) for s in (1, 2))
    assert len(first) == len(second) == len(ROWS) and not set(first) & set(second)


def test_items_of_any_type_are_drawn_from_those_that_are_there(df: Any, spread: Any) -> None:
    named = [frame.select("user", F.concat(F.lit("i"), "item").alias("item")) for frame in (df, spread)]
    made, again = (rows(negative_samples(frame, "user", "item", ratio=3)) for frame in named)
    assert made == again
    known = {f"i{item}" for items in MET.values() for item in items}
    negatives = [(user, item) for user, item, label in made if label == 0]
    assert {item for _, item in negatives} <= known and all(int(item[1:]) not in MET[user] for user, item in negatives)


def test_a_table_of_items_may_name_more_than_were_met(spark: Any, df: Any) -> None:
    more = spark.createDataFrame([(i,) for i in range(1000, 1010)], "item long")
    made = negative_samples(df, "user", "item", ratio=2, items=more)
    assert made.schema["item"].dataType == df.schema["item"].dataType
    drawn = Counter(row["item"] for row in made.where("label = 0").collect())
    assert sorted(drawn) == list(range(1000, 1010)) and sum(drawn.values()) == 2 * len(ROWS)  # none of them was met


def test_candidates_are_the_true_item_and_others_that_the_user_never_met(df: Any, spread: Any) -> None:
    made = {}
    for name, frame in (("whole", df), ("spread", spread)):
        train, test = leave_one_out(frame, "user", "time")
        made[name] = rows(candidates(test, train, "user", "item", n=20, seed=5, items=ITEMS))
    assert made["whole"] == made["spread"] and len(made["whole"]) == USERS - 1  # user 1 has a single event
    for user, item, time, listed, label in made["whole"]:
        assert (user, item, time) == max((row for row in ROWS if row[0] == user), key=lambda row: row[2])
        assert listed[0] == item and label == 0
        assert len(listed) == len(set(listed)) == 21 and not set(listed[1:]) & MET[user] and max(listed) < ITEMS


def test_candidates_are_named_by_their_items_where_these_are_no_places(df: Any, spread: Any) -> None:
    made = []
    for frame in (df, spread):
        train, test = leave_one_out(frame.withColumn("item", F.col("item") * 10 + 3), "user", "time")
        made.append(rows(candidates(test, train, "user", "item", n=4, seed=5)))
    assert made[0] == made[1] and len(made[0]) == USERS - 1
    known = {item * 10 + 3 for items in MET.values() for item in items}
    for user, item, _, listed, _ in made[0]:
        assert listed[0] == item and len(set(listed)) == 5
        assert set(listed) <= known and not set(listed[1:]) & {x * 10 + 3 for x in MET[user]}


def test_all_that_is_left_can_be_asked_for_and_no_more(spark: Any) -> None:
    seen = spark.createDataFrame([(1, 0), (1, 2), (1, 5)], "user long, item long")
    test = spark.createDataFrame([(1, 3)], "user long, item long")
    assert sorted(candidates(test, seen, "user", "item", n=4, items=8).first().candidates[1:]) == [1, 4, 6, 7]
    with pytest.raises(Exception, match="user 1 has met 4 of 8 items: 4 are left"):
        candidates(test, seen, "user", "item", n=5, items=8).collect()


def test_every_item_is_as_likely_a_candidate(spark: Any) -> None:
    test = spark.range(3000).select(F.col("id").alias("user"), (F.col("id") % 10).alias("item"))
    made = candidates(test, test.limit(0), "user", "item", n=3, items=10)
    drawn = Counter(dict(made.select(F.explode(F.slice("candidates", 2, 3)).alias("item")).groupBy("item").count().collect()))
    assert sorted(drawn) == list(range(10)) and sum(drawn.values()) == 9000
    assert max(abs(count - 900) for count in drawn.values()) < 5 * np.sqrt(900)


def test_a_history_is_the_items_before_in_order(df: Any, spread: Any) -> None:
    shifted = [frame.withColumn("item", F.col("item") + 1) for frame in (df, spread)]  # 0 is the padding
    made, again = (rows(history(frame, "user", "item", "time", length=4)) for frame in shifted)
    assert made == again and len(made) == len(ROWS)
    for user, item, time, before in made:
        earlier = [i + 1 for u, i, t in sorted(ROWS, key=lambda row: row[2]) if u == user and t < time]
        assert before == ([0] * 4 + earlier)[-4:] and item not in before


def test_a_history_takes_no_padding_for_an_item(df: Any) -> None:
    with pytest.raises(Exception, match="column 'item' holds 0, and 0 is the padding"):
        history(df, "user", "item", "time", length=2).collect()


def test_leaving_one_out_keeps_every_row_once(df: Any, spread: Any) -> None:
    train, test = leave_one_out(df, "user", "time")
    assert sorted(rows(train) + rows(test)) == sorted(ROWS)
    assert rows(test) == rows(leave_one_out(spread, "user", "time")[1])
    assert (1, *ROWS[0][1:]) in rows(train)  # the only event of user 1


def test_ties_are_refused_until_a_column_decides(spark: Any) -> None:
    frame = spark.createDataFrame([(1, 7, 0), (1, 8, 0)], SCHEMA)
    with pytest.raises(Exception, match=r"two rows of user = 1 have time = 0: which is first\?"):
        leave_one_out(frame, "user", "time")[1].collect()
    with pytest.raises(Exception, match=r"two rows of user = 1 have time = 0"):
        history(frame, "user", "item", "time", 2).collect()
    assert rows(leave_one_out(frame, "user", ["time", "item"])[1]) == [(1, 8, 0)]


def test_no_rows_give_no_rows(df: Any) -> None:
    none = df.where("false")
    assert rows(negative_samples(none, "user", "item", ratio=2, items=5)) == []
    assert rows(history(none, "user", "item", "time", 2)) == []
    with pytest.raises(DataError, match="names no items"):
        negative_samples(none, "user", "item", ratio=2)


def test_settings_that_cannot_work_are_refused_before_any_job(spark: Any, df: Any) -> None:
    text = spark.createDataFrame([("u", "i", 1)], "user string, item string, time long")
    for broken, said in (
        (lambda: negative_samples(df, "user", "item", ratio=0), "ratio=0"),
        (lambda: negative_samples(df, "user", "item", ratio=1, items=0), "items=0"),
        (lambda: negative_samples(df, "user", "item", ratio=1, label="time"), "has a column 'time' already"),
        (lambda: negative_samples(df, "user", "thing", ratio=1), "no column 'thing'"),
        (lambda: negative_samples(text, "user", "item", ratio=1, items=5), "must hold whole numbers"),
        (lambda: candidates(df, df, "user", "item", n=0), "n=0"),
        (lambda: candidates(text, text, "user", "item"), "must hold whole numbers"),
        (lambda: history(df, "user", "item", "time", 0), "length=0"),
        (lambda: history(text, "user", "item", "time", 1), "must hold whole numbers"),
        (lambda: leave_one_out(df, "user", "when"), "no column 'when'"),
    ):
        with pytest.raises((RecipeError, DataError), match=said):
            broken()
