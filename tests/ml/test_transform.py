"""transform is module.eval() on every row, wherever the row lies."""

from __future__ import annotations

import gc

import pytest
import torch
from pyspark.sql import functions as F
from torch import nn

from bigdl_lite import TorchEstimator, TorchModel
from tests.conftest import frame, problem

X, Y = problem(500)


def net():
    return nn.Sequential(nn.Linear(5, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 3))


@pytest.fixture(scope="module")
def model(spark):
    estimator = TorchEstimator(module=net, loss=nn.CrossEntropyLoss(), engine="local", numWorkers=1, epochs=2, progress="none")
    return estimator.fit(frame(spark, X, Y, [500]))


@pytest.mark.parametrize("parts", [[500], [100, 0, 1, 250, 99, 20, 30]], ids=["1 partition", "7 partitions"])
def test_every_row_is_scored_exactly_as_on_the_driver(spark, model, parts):
    df = frame(spark, X, Y, parts).withColumn("id", F.monotonically_increasing_id())
    with torch.inference_mode():
        expected = model.module(torch.from_numpy(X))
    rows = model.transform(df).orderBy("id").collect()
    assert torch.equal(torch.tensor([row.prediction for row in rows]), expected)
    assert [row.label for row in rows] == Y.tolist()


def test_a_selection_and_a_filter_may_follow(spark, model):
    df = frame(spark, X, Y, [200, 300]).withColumn("id", F.monotonically_increasing_id())
    scored = model.transform(df)
    top = scored.select("id", F.element_at("prediction", 1).alias("first")).where("first > 0").orderBy("id").collect()
    with torch.inference_mode():
        expected = model.module(torch.from_numpy(X))[:, 0]
    assert [row.first for row in top] == expected[expected > 0].tolist()
    assert 0 < len(top) < 500


def test_the_plan_sends_only_input_columns_to_python(spark, model):
    df = frame(spark, X, Y, [500]).withColumn("wide", F.lit("x" * 100))
    plan = model.transform(df)._jdf.queryExecution().executedPlan().toString()
    assert "ArrowEval" in plan and model.transform(df).drop("prediction").columns == ["features", "label", "wide"]


def test_nothing_runs_before_an_action(spark, model):
    broken = frame(spark, X, Y, [500]).withColumn("features", F.expr("transform(features, x -> x / 0 * raise_error('no'))"))
    assert "prediction" in model.transform(broken).columns


def test_rows_with_nulls_name_the_column(spark, model):
    df = spark.createDataFrame([([1.0, 2.0, 3.0, 4.0, 5.0],), (None,)], "features array<double>")
    with pytest.raises(Exception, match=r"column 'features' has 1 null"):
        model.transform(df).collect()


def test_an_empty_frame_gives_an_empty_frame(spark, model):
    df = spark.createDataFrame([], "features array<double>, label long")
    assert model.transform(df).collect() == []


def test_a_lazy_frame_outlives_its_model(spark, model, tmp_path):
    model.save(str(tmp_path / "model"))
    df = frame(spark, X, Y, [500])
    scored = TorchModel.load(str(tmp_path / "model"), module=net).transform(df)
    gc.collect()
    assert len(scored.collect()) == 500
