"""Columns read from the files by the workers: the same rows and the same weights as through Spark, and only where that is sure."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pyspark.sql import functions as F
from torch import nn

from bigdl_lite import TorchEstimator, TorchRegressor
from bigdl_lite.data.parquet import FILE, INDEX
from bigdl_lite.engine import arrange as way
from bigdl_lite.engine.direct import SETTING, located
from bigdl_lite.errors import DataError
from tests.conftest import flat

FEATURES = [f"f{i}" for i in range(20)]
NAMES = [FEATURES, "label"]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """600 rows in 4 files: f0 .. f19 float, label float, part int."""
    folder, rng = tmp_path_factory.mktemp("files with a space"), np.random.default_rng(0)
    for k in range(4):
        x = rng.standard_normal((20, 150)).astype("f4")
        table = {name: pa.array(x[i]) for i, name in enumerate(FEATURES)}
        label = pa.array(x[:3].sum(0))
        pq.write_table(pa.table({**table, "label": label, "k": pa.array([k] * 150)}), folder / f"{k}.parquet", row_group_size=40)
    return str(folder)


@pytest.fixture
def through_spark(spark):
    """Switches the direct way off, for the reference."""

    def call(run):
        spark.conf.set(SETTING, "false")
        try:
            return run()
        finally:
            spark.conf.unset(SETTING)

    return call


def net():
    return nn.Sequential(nn.Linear(20, 8), nn.Tanh(), nn.Linear(8, 1))


def fit(frame, engine, workers=2):
    return TorchRegressor(
        module=net, inputCols=[FEATURES], optimizer=lambda p: torch.optim.Adam(p, lr=1e-2), batchSize=64, epochs=2,
        numWorkers=workers, engine=engine, progress="none",
    ).fit(frame)  # fmt: skip


SELECTIONS = {
    "scan": lambda df: df,
    "filter": lambda df: df.where("f0 > -0.5 and k < 3").where("f1 < 1"),
    "select": lambda df: df.select("label", "k", *reversed(FEATURES)).where("k > 0").drop("k"),
    "nothing of a file": lambda df: df.where("k = 2"),
}


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("local", "barrier", "shuffle")]


@pytest.mark.parametrize("engine", SLOW)
def test_the_weights_are_those_of_the_rows_that_spark_brings(spark, path, through_spark, engine) -> None:
    frame = SELECTIONS["filter"](spark.read.parquet(path))
    assert FILE in way.arrange(frame, NAMES, 2).columns
    ours, reference = fit(frame, engine), through_spark(lambda: fit(frame, engine))
    assert torch.equal(flat(ours.module), flat(reference.module)), "to the bit"
    other = fit(frame.where("f2 < 1"), engine)
    assert not torch.equal(flat(ours.module), flat(other.module)), "rows count"


@pytest.mark.parametrize("selection", SELECTIONS.values(), ids=SELECTIONS)
def test_scores_are_those_of_the_rows_that_spark_brings(spark, path, through_spark, selection) -> None:
    frame = selection(spark.read.parquet(path))
    model = fit(spark.read.parquet(path), "local", 1)
    scored = model.transform(frame)
    assert "_metadata" in scored._jdf.queryExecution().executedPlan().toString(), "the direct way was taken"
    assert scored.columns == [*frame.columns, "prediction"]
    expected = through_spark(lambda: model.transform(frame).collect())
    assert scored.collect() == expected and expected
    few = scored.select("label", "prediction").where("prediction > 0").collect()
    assert few == [(row.label, row.prediction) for row in expected if row.prediction > 0]


OTHERS = {
    "a computed column": lambda df: df.withColumn("f3", F.col("f3") * 2),
    "a renamed column": lambda df: df.withColumnRenamed("f3", "x").withColumnRenamed("f4", "f3").withColumnRenamed("x", "f4"),
    "a limit": lambda df: df.limit(100),
    "a union": lambda df: df.union(df),
    "a join": lambda df: df.join(df.select("f0").distinct(), "f0"),
    "a random filter": lambda df: df.where(F.rand(1) < 0.5),
    "a cached frame": lambda df: df.where("k < 3").cache(),
    "a column of metadata": lambda df: df.withColumn("_metadata", F.lit(1)),
    "columns in memory": lambda df: df.sparkSession.createDataFrame(df.limit(8).collect(), df.schema),
}


@pytest.mark.parametrize("change", OTHERS.values(), ids=OTHERS)
def test_anything_else_travels_through_spark(spark, path, change) -> None:
    frame = change(spark.read.parquet(path))
    assert located(frame, NAMES) is None
    found = way.arrange(frame, NAMES, 2)
    assert FILE not in found.columns and found.count() == frame.count()
    frame.unpersist()


def test_settings_under_which_files_are_skipped_forbid_it(spark, path) -> None:
    frame = spark.read.parquet(path)
    assert located(frame, NAMES) is not None
    assert located(spark.read.option("ignoreCorruptFiles", "true").parquet(path), NAMES) is None
    for name in ("spark.sql.files.ignoreMissingFiles", "spark.sql.parquet.fieldId.read.enabled"):
        spark.conf.set(name, "true")
        try:
            assert located(frame, NAMES) is None, name
        finally:
            spark.conf.unset(name)
    assert located(frame, NAMES) is not None


def test_files_of_other_types_than_the_frame_forbid_it(spark, path, tmp_path) -> None:
    narrow = pa.table({"x": pa.array([1], pa.int32()), "y": pa.array([[1.0] * 9])})
    wide = pa.table({"x": pa.array([1], pa.int64()), "y": pa.array([[1.0] * 9])})
    pq.write_table(narrow, tmp_path / "0.parquet")
    assert located(spark.read.parquet(str(tmp_path)), ["y", "x"]) is not None
    pq.write_table(wide, tmp_path / "1.parquet")
    assert located(spark.read.schema("x long, y array<double>").parquet(str(tmp_path)), ["y", "x"]) is None
    assert located(spark.read.schema("missing int, y array<double>").parquet(str(tmp_path)), ["y", "missing"]) is None


def test_other_formats_and_short_rows_travel_through_spark(spark, path, tmp_path) -> None:
    frame = spark.read.parquet(path)
    frame.write.orc(str(tmp_path / "orc"))
    assert located(spark.read.orc(str(tmp_path / "orc")), NAMES) is None
    assert located(frame, ["f0", "label"]) is None
    frame.withColumn("text", F.lit("x")).write.parquet(str(tmp_path / "text"))
    assert located(spark.read.parquet(str(tmp_path / "text")), [*NAMES, "text"]) is None


def test_folders_that_name_a_column_are_read_for_the_others(spark, path, tmp_path, through_spark) -> None:
    spark.read.parquet(path).write.partitionBy("k").parquet(str(tmp_path / "by k"))
    frame = spark.read.parquet(str(tmp_path / "by k")).where("k in (1, 3)")
    assert located(frame, NAMES) is not None and located(frame, [*NAMES, "k"]) is None
    assert torch.equal(flat(fit(frame, "local").module), flat(through_spark(lambda: fit(frame, "local")).module))


def test_a_folder_counts_more_than_a_column_of_that_name_in_its_files(spark, tmp_path) -> None:
    """Spark takes the value from the folder's name; a worker would find the other one in the file."""
    for k in range(2):
        (tmp_path / f"x={k}").mkdir()
        pq.write_table(pa.table({"x": pa.array([7, 7]), "y": pa.array([[1.0] * 9] * 2)}), tmp_path / f"x={k}" / "0.parquet")
    frame = spark.read.parquet(str(tmp_path))
    assert sorted(row.x for row in frame.select("x").collect()) == [0, 0, 1, 1], "what Spark makes of it"
    assert located(frame, ["y"]) is not None and located(frame, ["y", "x"]) is None


@pytest.mark.parametrize("engine", ["barrier", "local"])
def test_bad_rows_are_the_same_error(spark, path, tmp_path, through_spark, engine) -> None:
    frame = spark.read.parquet(path)
    broken = str(tmp_path / "broken")
    frame.withColumn("f7", F.when(F.col("f7") > 1, None).otherwise(F.col("f7"))).write.parquet(broken)
    found = []
    for run in (lambda call: call(), through_spark):
        with pytest.raises(DataError) as error:
            run(lambda: fit(spark.read.parquet(broken), engine))
        found.append(str(error.value))
    assert "column 'f7' has" in found[0] and "null(s)" in found[0] and "null(s)" in found[1]


def test_a_frame_that_is_read_directly_has_the_columns_of_the_numbers(spark, path) -> None:
    frame = way.arrange(spark.read.parquet(path), NAMES, 2)
    assert frame.columns == [FILE, INDEX] and frame.count() == 600
    estimator = TorchEstimator(module=net, inputCols=[FEATURES], loss=nn.MSELoss(), progress="none")
    assert estimator.getInputCols() == [FEATURES]
