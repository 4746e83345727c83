"""Skewed data is what its settings say: every row once, the same every time, and no worker left with next to nothing.

    N  rows      C  classes      p  workers
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bigdl_lite.algorithms import Gradient, Round, Sum, Update, Work
from bigdl_lite.errors import DataError, RecipeError
from bigdl_lite.testing import label_skew, skew_of, skewed
from tests.conftest import mlp, problem

pytestmark = pytest.mark.timeout(60)

ALPHAS = [0.02, 0.1, 1, 10]
WORKERS = [4, 8, 16, 20]


def some(rows: int = 2000, classes: int = 10, seed: int = 0) -> np.ndarray:
    """Labels whose classes are of unequal sizes."""
    return np.random.default_rng(seed).integers(0, classes, rows)


def counts(labels: np.ndarray, owners: np.ndarray, workers: int) -> np.ndarray:
    """[p, C] rows."""
    return np.array([[np.sum((owners == r) & (labels == c)) for c in np.unique(labels)] for r in range(workers)])


def distance(labels: np.ndarray, owners: np.ndarray) -> float:
    """Of the workers' shares of the classes from those of all rows, in total variation: 0 alike, near 1 apart."""
    whole = np.bincount(labels) / len(labels)
    return float(np.abs(skew_of(labels, owners) - whole).sum(1).mean() / 2)


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_every_row_has_one_worker_and_every_worker_half_of_its_share(alpha: float, workers: int) -> None:
    owners = label_skew(some(), alpha, workers)
    assert owners.shape == (2000,) and owners.dtype == np.int64
    rows = np.bincount(owners, minlength=workers)
    assert len(rows) == workers and rows.min() >= 2000 / workers / 2


@pytest.mark.parametrize("workers", WORKERS)
def test_a_small_alpha_gives_a_worker_few_classes(workers: int) -> None:
    owners = label_skew(some(), 0.02, workers)
    two = np.sort(skew_of(some(), owners), axis=1)[:, -2:].sum(1)
    assert two.min() > 0.5 and two.mean() > 0.7
    assert distance(some(), owners) > 0.6


@pytest.mark.parametrize("workers", WORKERS)
def test_a_large_alpha_gives_every_worker_all_classes(workers: int) -> None:
    """Negative control of the one above."""
    owners = label_skew(some(), 10, workers)
    assert distance(some(), owners) < 0.2
    assert skew_of(some(), owners).max() < 0.35


def test_the_distance_falls_as_alpha_grows() -> None:
    found = [distance(some(), label_skew(some(), alpha, 8)) for alpha in [*ALPHAS, math.inf]]
    assert found == sorted(found, reverse=True) and found[-1] < 0.02


@pytest.mark.parametrize("alpha", [1e15, math.inf])
@pytest.mark.parametrize("workers", [1, 3, 8, 20])
def test_an_infinite_alpha_is_even_to_a_row_or_two(alpha: float, workers: int) -> None:
    table = counts(some(), label_skew(some(), alpha, workers), workers)
    assert np.abs(table - np.bincount(some()) / workers).max() <= 2


@pytest.mark.parametrize("workers", [16, 20, 23])
def test_groups_of_at_most_ten_have_an_equal_part_of_each_class(workers: int) -> None:
    table = counts(some(), label_skew(some(), 0.1, workers), workers)
    groups = -(-workers // 10)
    for group in range(groups):
        members = range(group, workers, groups)
        assert len(members) <= 10
        assert np.abs(table[members].sum(0) - np.bincount(some()) * len(members) / workers).max() <= 2


def test_within_a_group_nothing_is_equal() -> None:
    """Negative control: the same look at the first ten workers of one group and of another cut."""
    table = counts(some(), label_skew(some(), 0.1, 20), 20)
    assert np.abs(table[:10].sum(0) - np.bincount(some()) / 2).max() > 20


def test_the_same_settings_give_the_same_workers_and_others_do_not() -> None:
    made = partial(label_skew, some(), 0.1, 8)
    assert np.array_equal(made(), made()) and np.array_equal(made(seed=5), made(seed=5))
    for other in (made(seed=1), label_skew(some(), 0.2, 8), label_skew(some(), 0.1, 7), label_skew(some(seed=1), 0.1, 8)):
        assert (other != made()).mean() > 0.3


def test_one_known_assignment() -> None:
    """So that a change of the draws is seen: experiments that name a seed would no longer repeat."""
    assert label_skew([0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2], 1.0, 3, seed=5).tolist() == [1, 0, 0, 1, 2, 2, 2, 2, 1, 1, 0, 1]


def test_numpys_random_state_is_left_alone() -> None:
    before = np.random.get_state()[1].tolist()
    label_skew(some(), 1, 4)
    assert np.random.get_state()[1].tolist() == before


@pytest.mark.parametrize("rename", [str, float, lambda x: x > 4, lambda x: 10**17 + x], ids=["text", "float", "bool", "large"])
def test_labels_are_of_any_kind(rename: Any) -> None:
    named = np.array([rename(int(x)) for x in some()])
    owners = label_skew(named, 1, 4)
    assert len(np.unique(owners)) == 4 and skew_of(named, owners).shape == (4, len(set(named.tolist())))


@pytest.mark.parametrize("sizes", [[1000 // c for c in range(1, 11)], [10] * 100, [1] * 60], ids=["zipf", "many", "single"])
def test_classes_of_any_size_are_dealt_out(sizes: Sequence[int]) -> None:
    labels = np.repeat(np.arange(len(sizes)), sizes)
    rows = np.bincount(label_skew(labels, 0.1, 6), minlength=6)
    assert rows.sum() == sum(sizes) and rows.min() >= sum(sizes) / 6 / 2


@pytest.mark.parametrize(
    ("labels", "alpha", "workers", "said"),
    [
        ([0, 1] * 50, 0.02, 8, r"alpha=0.02, workers=8\).*at best \d+ of the 12.5 rows.*100 rows of 2 classes"),
        ([0] * 30, 1e-4, 3, r"at best \d+ of the 10.0 rows"),
        ([0, 1, 2], 1.0, 4, "3 rows for 4 workers"),
        ([], 1.0, 1, "0 rows for 1 workers"),
        ([0, 1], 1.0, 0, "2 rows for 0 workers"),
        ([0, 1], 0.0, 1, "alpha is 0.0, must be above 0"),
        ([0, 1], -1, 1, "alpha is -1, must be above 0"),
        ([0, 1], math.nan, 1, "alpha is nan"),
        ([[0], [1]], 1.0, 1, r"shape \[2, 1\]"),
    ],
)
def test_what_cannot_be_is_an_error_with_numbers(labels: list[Any], alpha: float, workers: int, said: str) -> None:
    with pytest.raises(RecipeError, match=said) as caught:
        label_skew(labels, alpha, workers)
    assert isinstance(caught.value, ValueError)


def test_a_row_for_each_worker_is_enough() -> None:
    assert sorted(label_skew(range(7), 1.0, 7)) == list(range(7))


def test_the_table_of_shares() -> None:
    table = skew_of(["a", "b", "b", "c", "b", "b"], [0, 0, 0, 0, 2, 2])
    assert table.tolist() == [[0.25, 0.5, 0.25], [0, 0, 0], [0, 1, 0]]


# ---- DataFrames -------------------------------------------------------------------------------------------------------


def kinds(spark: Any, n: int = 90) -> Any:
    """Columns of many types, nulls among them, and labels that are text."""
    from pyspark.ml.linalg import Vectors, VectorUDT
    from pyspark.sql import types as T

    schema = T.StructType([
        T.StructField("id", T.LongType(), False), T.StructField("kind", T.StringType(), True, {"from": "a test"}),
        T.StructField("x", T.ArrayType(T.FloatType())), T.StructField("v", VectorUDT()), T.StructField("f", T.FloatType()),
        T.StructField("d", T.DecimalType(10, 2)), T.StructField("b", T.BinaryType()), T.StructField("at", T.TimestampType()),
    ])  # fmt: skip
    labels = some(n, 3)
    rows = [
        (i, "abc"[labels[i]], [i / 3, None], Vectors.dense(i, 0.1), None if i % 7 == 0 else i / 7, Decimal(i) / 4, bytes([i]),
         datetime(2024, 1, 1, 0, i % 60, 0, i))
        for i in range(n)
    ]  # fmt: skip
    return spark.createDataFrame(spark.sparkContext.parallelize(rows, 3), schema)


def by_partition(frame: Any) -> list[list[Any]]:
    return frame.rdd.glom().collect()


def test_partitions_hold_what_label_skew_says_and_nothing_is_changed(spark: Any) -> None:
    frame = kinds(spark)
    rows = frame.collect()
    owners = label_skew([row.kind for row in rows], 0.3, 4, seed=2)
    made = skewed(frame, "kind", 0.3, 4, seed=2)
    assert made.schema == frame.schema and made.schema["kind"].metadata == {"from": "a test"}
    assert by_partition(made) == [[row for row, owner in zip(rows, owners, strict=True) if owner == r] for r in range(4)]


def test_a_fit_takes_the_partitions_as_they_are(spark: Any) -> None:
    from bigdl_lite.engine.arrange import arrange

    made = skewed(kinds(spark).repartition(2), "kind", 0.3, 4)
    taken = arrange(made, ["x", "f"], 4)
    assert len(taken.columns) == 2  # no column of row numbers: not shuffled
    assert [len(rows) for rows in by_partition(taken)] == [len(rows) for rows in by_partition(made)]
    assert len(arrange(made, ["x", "f"], 3).columns) == 3  # negative control


@dataclass(frozen=True)
class Watched:
    """A Local that notes the labels which each rank computes with."""

    seen: dict[int, list[int]] = field(default_factory=dict)
    moves: bool = False

    def batches(self, epoch: int) -> int:
        return 1

    def __call__(self, replica: Any, batches: Sequence[Any], work: Work) -> tuple[Update, float]:
        target: Tensor = batches[0].target
        self.seen[work.rank] = sorted(target.tolist())
        return Gradient()(replica, batches, work)


def test_the_workers_of_a_fit_have_these_rows(spark: Any) -> None:
    from bigdl_lite import TorchClassifier

    x, y = problem(120)
    frame = spark.createDataFrame([(a.tolist(), int(b)) for a, b in zip(x, y, strict=True)], "features array<float>, label long")
    owners, watched = label_skew(y, 0.1, 4, seed=3), Watched()
    estimator = TorchClassifier(
        module=mlp(), batchSize=120, numWorkers=4, engine="local", progress="none", optimizer=partial(torch.optim.SGD, lr=0.1),
        algorithm=lambda advance: Round(watched, Sum(), advance),
    )  # fmt: skip
    estimator.fit(skewed(frame, "label", 0.1, 4, seed=3))
    assert watched.seen == {r: sorted(y[owners == r].tolist()) for r in range(4)}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda frame: frame.selectExpr("id", "if(id < 3, null, kind) kind"), "'kind' is null or NaN in 3 of 90 rows"),
        (lambda frame: frame.selectExpr("if(id < 2, double('nan'), 1.0) kind"), "'kind' is null or NaN in 2 of 90 rows"),
        (lambda frame: frame.drop("kind"), "no column 'kind'"),
        (lambda frame: frame.union(frame), "localCheckpoint"),
    ],
    ids=["null", "nan", "missing", "union"],
)
def test_frames_that_cannot_be_skewed(spark: Any, change: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        skewed(change(kinds(spark)), "kind", 1.0, 2)


def test_a_union_can_be_skewed_the_way_the_error_says(spark: Any) -> None:
    frame = kinds(spark).select("kind")
    assert sum(map(len, by_partition(skewed(frame.union(frame).localCheckpoint(), "kind", 1.0, 2)))) == 180


def test_rows_that_change_between_the_looks_are_noticed(spark: Any) -> None:
    restless = spark.sparkContext.parallelize(range(90), 2).map(lambda i: (int(np.random.default_rng().integers(0, 3)),))
    made = skewed(spark.createDataFrame(restless, "kind long"), "kind", 1.0, 2)
    with pytest.raises(Exception, match="another label than when skewed\\(\\) looked"):
        made.count()
