"""Estimators as pyspark.ml has them: written and read, in Pipelines and CrossValidators, copied, and used from several threads."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from pyspark.ml import Pipeline, PipelineModel
from pyspark.ml.evaluation import MulticlassClassificationEvaluator
from pyspark.ml.feature import VectorAssembler
from pyspark.ml.linalg import Vectors, VectorUDT
from pyspark.ml.tuning import CrossValidator, CrossValidatorModel, ParamGridBuilder
from pyspark.sql.types import ArrayType, DoubleType, LongType, StructField, StructType
from torch import nn

from bigdl_lite import AUC, EMA, TopK, TorchClassifier, TorchEstimator, TorchRegressor, every_epoch, max_loss
from bigdl_lite.algorithms.named import NamedOptimizer
from bigdl_lite.errors import DataError, RecipeError, WireError
from bigdl_lite.ml.spelled import Unspellable, spelled, unspelled
from tests.conftest import flat, frame, mlp, problem


def halved(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.25)


class Three(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(4, 2)

    def forward(self, a: torch.Tensor, b: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return self.net(torch.cat([a, b[:, None], v], 1))


def linear2() -> nn.Module:
    return nn.Linear(2, 3)


@pytest.fixture(scope="module")
def rows(spark: Any) -> Any:
    x, y = problem(60)
    return frame(spark, x, y, [30, 30]).cache()


def quick(**more: Any) -> TorchClassifier:
    given = {"module": mlp, "engine": "local", "numWorkers": 2, "epochs": 2, "batchSize": 20, "progress": "none"}
    return TorchClassifier(**given | more)


@pytest.mark.parametrize(
    "value",
    [None, 3, 0.5, "x", ["a", ["b", "c"]], mlp, nn.CrossEntropyLoss, EMA(0.9), AUC(bins=100), TopK(0.25),
     every_epoch(2) & ~max_loss(0.1), NamedOptimizer("sgd", 0.1)],
    ids=repr,
)  # fmt: skip
def test_values_come_back_as_they_were(value: Any) -> None:
    assert unspelled(json.loads(json.dumps(spelled(value)))) == value


def test_a_loss_of_torchs_comes_back_with_its_settings() -> None:
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5]), ignore_index=2, label_smoothing=0.1)
    again = unspelled(json.loads(json.dumps(spelled(loss))))
    x, y = torch.randn(8, 3), torch.tensor([0, 1, 2, 0, 1, 2, 1, 0])
    assert again(x, y) == loss(x, y) != nn.CrossEntropyLoss()(x, y)


@pytest.mark.parametrize("value", [lambda p: None, nn.Linear(2, 2), object()], ids=["lambda", "module", "object"])
def test_what_has_no_name_is_not_written(value: Any) -> None:
    with pytest.raises(Unspellable):
        spelled(value)


@pytest.mark.parametrize(
    "told",
    [{"value": "subprocess:Popen", "fields": {}}, {"value": "bigdl_lite.errors:UserError", "fields": {}}, {"loss": "Linear"}, {"x": 1}],
    ids=str,
)
def test_a_file_cannot_name_what_it_likes(told: dict[str, Any]) -> None:
    with pytest.raises(WireError):
        unspelled(told)


def test_an_estimator_is_saved_and_fits_the_same_again(rows: Any, tmp_path: Any) -> None:
    est = quick(optimizer=halved, loss=nn.CrossEntropyLoss(label_smoothing=0.1), metrics=["accuracy"], validationFraction=0.25)
    est.write().overwrite().save(str(tmp_path / "est"))
    again = TorchClassifier.load(str(tmp_path / "est"))
    assert type(again) is TorchClassifier and again.uid == est.uid and again.getOptimizer() is halved
    torch.testing.assert_close(flat(again.fit(rows).module), flat(est.fit(rows).module), atol=0, rtol=0)
    assert type(TorchEstimator.load(str(tmp_path / "est"))) is TorchClassifier
    with pytest.raises(WireError, match="not a TorchRegressor"):
        TorchRegressor.load(str(tmp_path / "est"))


def test_what_was_not_saved_must_be_set_again(rows: Any, tmp_path: Any) -> None:
    """A default in its place would train something else in silence."""
    est = quick(optimizer=lambda p: torch.optim.SGD(p, lr=0.25))
    with pytest.warns(RuntimeWarning, match=r"set again after loading: optimizer"):
        est.save(str(tmp_path / "est"))
    again = TorchClassifier.load(str(tmp_path / "est"))
    with pytest.raises(RecipeError, match="optimizer was not saved"):
        again.fit(rows)
    torch.testing.assert_close(flat(again.setParams(optimizer=halved).fit(rows).module), flat(est.fit(rows).module))


def test_optimizers_by_name_are_torchs(rows: Any) -> None:
    for name, more, by_hand in (
        ("adam", {}, lambda p: torch.optim.Adam(p, lr=1e-3)),
        ("sgd", {"learningRate": 0.2, "momentum": 0.9, "weightDecay": 0.01}, lambda p: torch.optim.SGD(p, 0.2, 0.9, weight_decay=0.01)),
    ):
        a, b = quick(optimizer=name, **more).fit(rows), quick(optimizer=by_hand).fit(rows)
        torch.testing.assert_close(flat(a.module), flat(b.module), atol=0, rtol=0)
    for wrong, said in (({"optimizer": "adan"}, "adamw"), ({"optimizer": halved, "learningRate": 0.1}, "by name"),
                        ({"optimizer": "adam", "momentum": 0.9}, "rmsprop")):  # fmt: skip
        with pytest.raises(RecipeError, match=said):
            quick(**wrong).fit(rows)


def test_a_pipeline_with_it_is_saved_before_and_after_the_fit(spark: Any, tmp_path: Any) -> None:
    x, y = problem(40, 2)
    df = spark.createDataFrame([(*map(float, a), int(b)) for a, b in zip(x, y, strict=True)], "a double, b double, label long")
    stages = [VectorAssembler(inputCols=["a", "b"], outputCol="features"), quick(module=linear2)]
    Pipeline(stages=stages).save(str(tmp_path / "pipeline"))
    fitted = Pipeline.load(str(tmp_path / "pipeline")).fit(df)
    fitted.save(str(tmp_path / "fitted"))
    again = PipelineModel.load(str(tmp_path / "fitted"))
    assert [row.prediction for row in again.transform(df).collect()] == [row.prediction for row in fitted.transform(df).collect()]


def test_a_cross_validator_with_it_is_saved_before_and_after_the_fit(rows: Any, tmp_path: Any) -> None:
    est = quick(optimizer="sgd")
    grid = ParamGridBuilder().addGrid(est.learningRate, [0.001, 0.5]).build()
    folds = CrossValidator(
        estimator=est, estimatorParamMaps=grid, evaluator=MulticlassClassificationEvaluator(metricName="accuracy"), numFolds=2, seed=1,
        parallelism=2,
    )  # fmt: skip
    folds.save(str(tmp_path / "folds"))
    found = CrossValidator.load(str(tmp_path / "folds")).fit(rows)
    found.save(str(tmp_path / "found"))
    again = CrossValidatorModel.load(str(tmp_path / "found"))
    assert again.avgMetrics == found.avgMetrics and found.avgMetrics[1] > found.avgMetrics[0]
    assert found.bestModel.getOrDefault("predictionCol") == "prediction"
    scored = [model.transform(rows).select("prediction").collect() for model in (again, found)]
    assert scored[0] == scored[1]


def test_copies_do_not_know_of_each_other(rows: Any) -> None:
    est = quick()
    other = est.copy({est.epochs: 1, est.predictionCol: "guess"})
    assert (est.getEpochs(), other.getEpochs(), other.uid) == (2, 1, est.uid)
    models = est.fit(rows, [{est.epochs: 1}, {est.predictionCol: "guess"}])
    assert [sum("steps" in line for line in model.history) for model in models] == [1, 2]
    assert "guess" in models[1].transform(rows).columns and "guess" not in models[0].transform(rows).columns
    assert est.setParams(epochs=3).getEpochs() == 3
    with pytest.raises(TypeError, match="no parameter 'epoch'"):
        est.setParams(epoch=3)


def test_threads_fit_side_by_side_to_the_same_weights(rows: Any) -> None:
    alone = {engine: flat(quick(engine=engine).fit(rows).module) for engine in ("local", "barrier", "shuffle")}
    with ThreadPoolExecutor(3) as pool:
        fits = {engine: pool.submit(quick(engine=engine).fit, rows) for engine in alone}
        for engine, fit in fits.items():
            torch.testing.assert_close(flat(fit.result(100).module), alone[engine], atol=0, rtol=0)


def test_every_param_has_a_setter(rows: Any) -> None:
    est = TorchClassifier()
    for param in est.params:
        assert callable(getattr(est, f"set{param.name[0].upper()}{param.name[1:]}")), param.name
    made = est.setModule(mlp).setEngine("local").setNumWorkers(2).setEpochs(2).setBatchSize(20).setProgress("none")
    made.setFeaturesCol("features")
    torch.testing.assert_close(flat(made.fit(rows).module), flat(quick().fit(rows).module), atol=0, rtol=0)
    with pytest.raises(RecipeError, match="batchSize='many'"):
        est.setBatchSize("many")
    with pytest.raises(RecipeError, match="both name the inputs"):
        made.setInputCols(["features"]).fit(rows)


def test_rows_that_cannot_be_used_are_errors_or_left_out(spark: Any) -> None:
    """In training and in scoring: nulls, NaN and infinity in numbers, arrays and vectors."""
    nan, inf, fine = float("nan"), float("inf"), ([1.0, 2.0], 0.5, Vectors.dense([1.0]), 1)
    ill = [(None, *fine[1:]), ([1.0, nan], *fine[1:]), ([1.0, None], *fine[1:]), (fine[0], None, *fine[2:]), (fine[0], -inf, *fine[2:]),
           (*fine[:2], None, 1), (*fine[:2], Vectors.dense([nan]), 1), (*fine[:3], None)]  # fmt: skip
    schema = StructType([
        StructField("a", ArrayType(DoubleType())), StructField("b", DoubleType()), StructField("v", VectorUDT()),
        StructField("label", LongType()),
    ])  # fmt: skip
    df = spark.createDataFrame([fine, *ill, fine], schema)
    est = quick(module=Three, inputCols=["a", "b", "v"], numWorkers=1, epochs=1)
    with pytest.raises(DataError):
        est.fit(df)
    model = est.setHandleInvalid("skip").fit(df)
    assert model.history[0]["rows"] == 2
    scored = model.transform(df)
    assert sorted(str(row.label) for row in scored.collect()) == ["1", "1", "None"], "a label is not needed to score"
    assert model.evaluate(df, ["accuracy"])["accuracy"] in (0.0, 1.0)
    with pytest.raises(RecipeError, match="'error' or 'skip'"):
        est.setHandleInvalid("keep").fit(df)
