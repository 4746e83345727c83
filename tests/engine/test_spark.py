"""Frames in shape for the engines: how many partitions, by which way, and what the user's session notices (nothing)."""

from __future__ import annotations

import re
from decimal import Decimal

import numpy as np
import pytest
import torch
from pyspark.sql import functions as F
from torch import nn

from bigdl_lite import TorchEstimator
from bigdl_lite.data.columns import title
from bigdl_lite.engine import arrange as way
from bigdl_lite.engine import spark as door
from bigdl_lite.errors import DataError, RecipeError
from tests.conftest import flat, mlp, problem, uneven
from tests.conftest import frame as frame_of

NAMES = [["a", "b"], "label"]


@pytest.fixture
def files(spark, tmp_path):
    """60 rows (a, b, label) in 6 Parquet files of about one size."""
    x = np.arange(60)
    rows = [(float(i), float(2 * i), int(i % 3)) for i in x]
    frame = spark.createDataFrame(rows, "a float, b double, label long")
    frame.repartition(6, "a").write.parquet(str(tmp_path / "data"))
    return str(tmp_path / "data")


def rows(frame):
    return sorted((tuple(row[0]), row[1]) for row in frame.select(title(["a", "b"]), "label").collect())


CHAINS = {
    "scan": lambda df: df,
    "filter": lambda df: df.where("a >= 3 and label < 2"),
    "expression": lambda df: df.withColumn("a", F.col("a") * 2).drop("c"),
    "select": lambda df: df.select("label", "b", "a").where("label = 1").withColumnRenamed("b", "x").withColumnRenamed("x", "b"),
}
OTHERS = {
    "union": lambda df: df.where("a < 30").unionByName(df.where("a >= 30")),
    "shuffle": lambda df: df.repartition(4),
    "random": lambda df: df.where("a >= rand(1) - 1"),
    "subquery": lambda df: df.where("a <= (select max(id) from range(1000))"),
}


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)
def test_a_selection_from_files_is_read_in_as_many_parts_as_there_are_workers(spark, files, chain, p) -> None:
    whole = chain(spark.read.parquet(files))
    before = dict(spark.sparkContext.getConf().getAll()), spark.conf.get("spark.sql.files.maxPartitionBytes")
    frame = way.arrange(whole, NAMES, p)
    assert way._partitions(frame) == p and door.ROW not in frame.columns, "no shuffle was needed"
    assert rows(frame) == rows(door.select(whole, NAMES)) and rows(frame)
    assert (dict(spark.sparkContext.getConf().getAll()), spark.conf.get("spark.sql.files.maxPartitionBytes")) == before
    assert rows(way.arrange(whole, NAMES, p)) == rows(frame)


@pytest.mark.parametrize("change", OTHERS.values(), ids=OTHERS)
def test_whatever_is_more_goes_through_a_shuffle(spark, files, change) -> None:
    whole = change(spark.read.parquet(files))
    assert way.reread(whole, 5) is None
    frame = way.arrange(whole, NAMES, 5)
    assert frame.columns[-1] == door.ROW
    assert rows(frame) == rows(door.select(spark.read.parquet(files), NAMES))


def test_a_column_in_the_names_of_folders_is_kept(spark, tmp_path) -> None:
    spark.range(20).selectExpr("float(id) a", "float(id) b", "id % 2 label").write.partitionBy("label").parquet(str(tmp_path / "x"))
    whole = spark.read.parquet(str(tmp_path / "x"))
    frame = way.arrange(whole, NAMES, 2)
    assert door.ROW not in frame.columns
    assert rows(frame) == rows(door.select(whole, NAMES)) and len(rows(frame)) == 20


def test_a_schema_of_the_users_is_kept(spark, files) -> None:
    narrowed = spark.read.schema("label long, b double, a float, missing int").parquet(files)
    assert way.reread(narrowed.where("missing is null"), 2).columns == ["label", "b", "a", "missing"]
    assert rows(way.arrange(narrowed, NAMES, 2)) == rows(door.select(spark.read.parquet(files), NAMES))


def test_what_the_user_has_set_holds_for_the_files_too(spark, files) -> None:
    name, active = "spark.sql.execution.arrow.maxRecordsPerBatch", spark.getActiveSession()
    before = spark.conf.get(name)
    spark.conf.set(name, "7")
    try:
        frame = way.arrange(spark.read.parquet(files), NAMES, 2)
        assert frame.sparkSession is not spark and frame.sparkSession.conf.get(name) == "7"
        assert spark.getActiveSession() is active and type(spark).builder.getOrCreate() is spark
    finally:
        spark.conf.set(name, before)


def test_files_that_do_not_divide_evenly_go_through_a_shuffle(spark, files, tmp_path) -> None:
    """One large file: to cut it may give one worker all rows."""
    spark.read.parquet(files).coalesce(1).write.parquet(str(tmp_path / "one"))
    spark.read.parquet(files).where("a < 2").coalesce(1).write.mode("append").parquet(str(tmp_path / "one"))
    assert way.reread(spark.read.parquet(str(tmp_path / "one")), 2) is None
    assert way.reread(spark.read.parquet(files), 4) is None  # six files, four workers
    assert way.reread(spark.read.parquet(files), 3) is not None  # the control


def test_orc_is_read_so_too_and_text_is_not(spark, files, tmp_path) -> None:
    whole = spark.read.parquet(files)
    whole.repartition(4, "a").write.orc(str(tmp_path / "orc"))
    whole.repartition(3).write.csv(str(tmp_path / "csv"))
    assert rows(way.reread(door.select(spark.read.orc(str(tmp_path / "orc")), NAMES), 2)) == rows(door.select(whole, NAMES))
    assert way.reread(spark.read.schema(whole.schema).csv(str(tmp_path / "csv")), 2) is None


def table(spark):
    rows = [(1.5, 2.5, 3, True, Decimal("4.25")), (-1.0, 0.0, -7, False, Decimal("-0.5"))]
    return spark.createDataFrame(rows, "a float, b double, c int, d boolean, e decimal(5,2)").withColumn("label", F.lit(1))


def test_columns_named_together_are_one_array_whatever_numbers_they_hold(spark) -> None:
    names = ["a", "b", "c", "d", "e"]
    frame = door.select(table(spark), [names, "label"])
    assert [list(row[0]) for row in frame.collect()] == [[1.5, 2.5, 3.0, 1.0, 4.25], [-1.0, 0.0, -7.0, 0.0, -0.5]]
    columns = door.read_columns(frame, [names], "label", torch.float32)
    assert columns.inputs[0].members == tuple(names) and columns.inputs[0].dtype == torch.float32
    whole = door.read_columns(door.select(table(spark), [["c", "label"], "label"]), [["c", "label"]], "label", torch.float32)
    assert whole.inputs[0].dtype == torch.int64, "whole numbers stay what they are"


def test_two_lists_that_begin_and_end_alike_are_two_inputs(spark) -> None:
    frame = door.select(table(spark), [["a", "b", "e"], ["a", "c", "e"], "label"])
    assert len(frame.columns) == 3
    first = frame.collect()[0]
    assert [list(first[0]), list(first[1])] == [[1.5, 2.5, 4.25], [1.5, 3.0, 4.25]]


@pytest.mark.parametrize(
    "names, kind, words",
    [
        ([["a", "nothing"]], DataError, "no column 'nothing'"),
        ([[]], RecipeError, "empty list"),
        ([["a", "text"]], DataError, "'text' is of type string; columns that are named together must each hold one number"),
        ([["a", "list"]], DataError, "'list' is of type array<int>"),
    ],
)
def test_what_cannot_stand_side_by_side_is_refused_by_name(spark, names, kind, words) -> None:
    df = table(spark).withColumn("text", F.lit("x")).withColumn("list", F.array(F.lit(1)))
    with pytest.raises(kind, match=re.escape(words)):
        door.select(df, names)


def test_a_decoder_of_a_column_among_others_is_refused(spark) -> None:
    frame = door.select(table(spark), [["a", "b"]])
    with pytest.raises(RecipeError, match="decoders name"):
        door.read_columns(frame, [["a", "b"]], None, torch.float32, {"a": bytes})


def test_training_on_columns_equals_training_on_an_array_of_them(spark) -> None:
    x, y = problem()
    arrays = frame_of(spark, x, y, uneven(60, 2))
    columns = arrays.select(*(F.col("features")[i].alias(f"f{i}") for i in range(5)), "label")
    settings = {"module": mlp, "loss": nn.CrossEntropyLoss(), "batchSize": 25, "numWorkers": 2, "engine": "local", "progress": "none"}
    one = TorchEstimator(**settings).fit(arrays)
    other = TorchEstimator(inputCols=[[f"f{i}" for i in range(5)]], **settings).fit(columns)
    assert torch.equal(flat(one.module), flat(other.module))
    scores = [[row.prediction for row in model.transform(df).collect()] for model, df in ((one, arrays), (other, columns))]
    assert scores[0] == scores[1]


@pytest.mark.parametrize(
    "bad, words", [(None, "column 'f2' has 1 null(s)"), (float("nan"), "column 'f2' has NaN or infinity in 1 row(s)")]
)
def test_a_bad_value_among_many_columns_names_its_own(spark, bad, words) -> None:
    rows = [(1.0, 2.0, 3.0, 0.0), (1.0, 2.0, bad, 0.0)]
    df = spark.createDataFrame(rows, "f0 float, f1 float, f2 float, label float").coalesce(1)
    estimator = TorchEstimator(
        module=lambda: nn.Sequential(nn.Linear(3, 1), nn.Flatten(0)), loss=nn.MSELoss(), inputCols=[["f0", "f1", "f2"]], engine="local",
        numWorkers=1, progress="none",
    )  # fmt: skip
    with pytest.raises(DataError, match=re.escape(words)):
        estimator.fit(df)
