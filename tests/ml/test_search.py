"""fitMultiple gives the models of separate fits, in one pass over the rows where it can, and says why where it cannot."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from pyspark.ml.evaluation import MulticlassClassificationEvaluator
from pyspark.ml.tuning import CrossValidator, CrossValidatorModel, ParamGridBuilder, TrainValidationSplit
from pyspark.sql import functions as F
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import StepLR

from bigdl_lite import TorchClassifier, TorchModel, TorchRegressor, every_epoch, max_loss
from bigdl_lite.algorithms.shadow import EMA
from bigdl_lite.engine.local import LocalEngine
from bigdl_lite.engine.spark import shares
from bigdl_lite.errors import DataError, DivergedError, RecipeError, UserError
from bigdl_lite.ml import search
from bigdl_lite.ml.search import alike, why_alone
from tests.conftest import flat, frame, mlp, problem

pytestmark = pytest.mark.timeout(120)

X, Y = problem(120)
_SECONDS = {"seconds", "compute_s", "sync_s", "data_s", "sync_ratio", "bytes_sent"}


def regularised() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))


def rate(rule: Any, lr: float) -> Any:
    return partial(rule, lr=lr)


@pytest.fixture(scope="module")
def df(spark):
    made = frame(spark, X, Y, [70, 50])
    return made.withColumn("weight", F.col("label") + F.lit(0.5)).cache()


class Counting:
    """The local engine, which counts its fits."""

    name = "local"

    def __init__(self) -> None:
        self.fits: list[int] = []
        self.lock = threading.Lock()

    def fit(self, df: Any, recipe: Any, start: Any, *more: Any) -> Any:
        with self.lock:
            self.fits.append(getattr(recipe.loss, "k", 1))
        return LocalEngine().fit(shares(df, recipe.num_workers), recipe, start, *more)


def quick(**more: Any) -> TorchClassifier:
    settings = {"module": mlp, "optimizer": rate(Adam, 0.02), "batchSize": 40, "epochs": 2, "engine": "local", "numWorkers": 2}
    return TorchClassifier(**(settings | {"progress": "none"} | more))


def rates(estimator: Any, *lrs: float) -> list[dict[Any, Any]]:
    return [{estimator.optimizer: rate(Adam, lr)} for lr in lrs]


def same(one: TorchModel, other: TorchModel) -> None:
    torch.testing.assert_close(flat(one.module), flat(other.module), rtol=1e-5, atol=1e-6)
    assert one.uid == other.uid and one.engine == other.engine and type(one) is type(other)
    assert len(one.history) == len(other.history)
    for a, b in zip(one.history, other.history, strict=True):
        assert a.keys() == b.keys()
        told = [{key: value for key, value in line.items() if key not in _SECONDS} for line in (a, b)]
        assert told[0] == pytest.approx(told[1], rel=1e-5, abs=1e-6)


def test_the_models_are_those_of_separate_fits_from_one_fit(df):
    engine = Counting()
    estimator = quick(
        engine=engine, module=regularised, weightCol="weight", validationFraction=0.3, metrics=["accuracy", "f1"],
        classWeights=[1.0, 2.0, 3.0],
    )  # fmt: skip
    maps = [
        {estimator.optimizer: rate(SGD, 0.3), estimator.clipNorm: 0.1},
        {estimator.scheduler: partial(StepLR, step_size=1, gamma=0.1)},
        {estimator.optimizer: rate(Adam, 0.1), estimator.predictionCol: "guess"},
    ]
    together = estimator.fit(df, maps)
    assert engine.fits == [3]
    for one, given in zip(together, maps, strict=True):
        same(one, estimator.fit(df, given))
    assert "guess" in together[2].transform(df).columns and "guess" not in together[0].transform(df).columns
    assert not torch.allclose(flat(together[0].module), flat(together[1].module), atol=1e-3)


def test_a_model_of_a_pass_is_a_model_like_any_other(df, tmp_path):
    estimator = TorchRegressor(
        module=partial(mlp, 5, 1), optimizer=rate(Adam, 0.02), batchSize=40, engine="local", numWorkers=1, progress="none"
    )
    model = estimator.fit(df, rates(estimator, 0.1, 0.01))[1]
    expected = [row.prediction for row in estimator.fit(df, rates(estimator, 0.01)[0]).transform(df).collect()]
    assert [row.prediction for row in model.transform(df).collect()] == pytest.approx(expected, rel=1e-5)
    model.write().save(str(tmp_path / "model"))
    again = TorchModel.load(str(tmp_path / "model"), module=partial(mlp, 5, 1))
    assert torch.equal(flat(again.module), flat(model.module)) and type(model.module) is nn.Sequential
    assert model.summary.engine == "local"


@pytest.mark.parametrize("engine", ["barrier", "shuffle"])
def test_the_engines_of_spark_train_them_with_the_jobs_of_one_fit(df, engine):
    sc, estimator = df.sparkSession.sparkContext, quick(engine=engine, validationFraction=0.3)
    maps = rates(estimator, 0.1, 0.01, 0.001)
    before = _jobs(sc)
    estimator.fit(df, maps[0])
    alone, before = _jobs(sc) - before, _jobs(sc)
    together = estimator.fit(df, maps)
    of_all = _jobs(sc) - before
    # the shuffle engine submits jobs ahead, some of them for nothing
    assert of_all == alone if engine == "barrier" else of_all < 2 * alone
    local = estimator.copy({estimator.engine: "local"})
    for one, given in zip(together, maps, strict=True):
        reference = local.fit(df, given)
        torch.testing.assert_close(flat(one.module), flat(reference.module), rtol=1e-5, atol=1e-6)
        assert one.engine == engine
        for key in ("loss", "val_loss", "lr"):
            found, expected = ([line[key] for line in model.history if key in line] for model in (one, reference))
            assert found == pytest.approx(expected, rel=1e-5)


def _jobs(sc: Any) -> int:
    """How many jobs there were in this context."""
    return sc._jsc.sc().dagScheduler().nextJobId()


def grid(estimator: Any) -> list[Any]:
    return ParamGridBuilder().addGrid(estimator.optimizer, [rate(Adam, lr) for lr in (1e-4, 0.1, 0.01)]).build()


def test_a_cross_validator_picks_the_same_model_as_with_separate_fits(df, monkeypatch):
    engine = Counting()
    estimator = quick(engine=engine, numWorkers=1)
    evaluator = MulticlassClassificationEvaluator(metricName="logLoss")
    validator = CrossValidator(
        estimator=estimator, estimatorParamMaps=grid(estimator), evaluator=evaluator, numFolds=2, parallelism=2, seed=1
    )
    together = validator.fit(df)
    assert engine.fits == [3, 3, 1] and isinstance(together, CrossValidatorModel)
    monkeypatch.setattr(search, "why_alone", lambda estimator, k: "a fit for each")
    engine.fits.clear()
    alone = validator.fit(df)
    assert engine.fits == [1] * 7
    assert together.avgMetrics == pytest.approx(alone.avgMetrics, rel=1e-4)
    torch.testing.assert_close(flat(together.bestModel.module), flat(alone.bestModel.module), rtol=1e-5, atol=1e-6)
    assert len(set(together.avgMetrics)) == 3


@pytest.mark.parametrize("engine", ["barrier", "shuffle"])
def test_separate_fits_run_side_by_side(df, engine):
    """Four workers each, on four slots: Spark lets one wait for the other."""
    estimator = quick(engine=engine, numWorkers=4, averaging=EMA(0.5), epochs=1)
    maps = rates(estimator, 0.1, 0.01)
    with ThreadPoolExecutor(2) as pool:
        models = estimator.fitMultiple(df, maps)
        found = dict(pool.map(lambda _: next(models), range(2)))
    for index, given in enumerate(maps):
        same(found[index], estimator.fit(df, given))


def test_local_fits_in_several_threads_do_not_draw_each_others_numbers(df):
    estimator = quick(module=regularised, averaging=EMA(0.5))
    maps = [{estimator.seed: seed} for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        models = estimator.fitMultiple(df, maps)
        found = dict(pool.map(lambda _: next(models), range(4)))
    for index, given in enumerate(maps):
        assert torch.equal(flat(found[index].module), flat(estimator.fit(df, given).module))


def test_a_grid_falls_into_as_many_passes_as_it_needs(df):
    engine = Counting()
    estimator = quick(engine=engine, epochs=1)
    maps = [
        {estimator.optimizer: rate(Adam, lr), estimator.batchSize: size} for size in (20, 40) for lr in (0.1, 0.01)
    ] + [{estimator.module: regularised}]  # fmt: skip
    models = estimator.fit(df, maps)
    assert engine.fits == [2, 2, 1]
    same(models[3], estimator.fit(df, maps[3]))
    same(models[4], estimator.fit(df, maps[4]))


def test_models_of_many_weights_share_a_pass_as_far_as_they_fit(df, monkeypatch):
    engine = Counting()
    estimator = quick(engine=engine, epochs=1)
    monkeypatch.setattr(search, "_MOST", 2 * len(flat(mlp())))
    models = estimator.fit(df, rates(estimator, 0.1, 0.05, 0.01))
    assert engine.fits == [2, 1]
    same(models[2], estimator.fit(df, rates(estimator, 0.01)[0]))
    monkeypatch.setattr(search, "_MOST", len(flat(mlp())))
    engine.fits.clear()
    estimator.fit(df, rates(estimator, 0.1, 0.05))
    assert engine.fits == [1, 1]


def test_makers_optimizers_and_outputs_decide_what_is_alike():
    estimator = quick()
    maps = [{}, {estimator.clipNorm: 1.0}, {estimator.module: regularised}, {estimator.seed: 3}, {estimator.predictionCol: "p"}]
    assert alike([estimator.copy(given) for given in maps]) == [[0, 1, 4], [2], [3]]


ALONE: list[tuple[dict[str, Any], str]] = [
    ({"averaging": EMA(0.9)}, "averaging"),
    ({"patience": 1, "validationFraction": 0.3}, "patience"),
    ({"exchange": "bf16"}, "exchange"),
    ({"algorithm": "local-sgd"}, "algorithm"),
    ({"callbacks": [print]}, "callbacks"),
    ({"checkpointDir": "checkpoints"}, "checkpointDir"),
    ({"restoreBest": True, "validationFraction": 0.3}, "restoreBest"),
    ({"endTrigger": max_loss(0.1)}, "endTrigger"),
    ({"validationTrigger": max_loss(0.1)}, "validationTrigger"),
    ({"compile": True}, "compile"),
    ({"syncBatchNorm": True}, "syncBatchNorm"),
]


@pytest.mark.parametrize(("given", "said"), ALONE, ids=[said for _, said in ALONE])
def test_what_concerns_a_fit_as_a_whole_asks_for_a_fit_for_each(given, said):
    assert said in why_alone(quick(**given), 2)
    assert why_alone(quick(validationTrigger=every_epoch(), validationFraction=0.2), 2) == "" != why_alone(quick(), 1)


def test_the_reason_is_logged(df, caplog):
    estimator = quick(exchange="bf16", epochs=1)
    with caplog.at_level(logging.INFO, "bigdl_lite"):
        estimator.fitMultiple(df, rates(estimator, 0.1, 0.01))
    assert "param maps 0, 1: exchange is for a fit as a whole" in caplog.text


def test_a_model_that_diverges_does_not_take_the_others_with_it(df):
    estimator = quick(epochs=4)
    maps = [{estimator.optimizer: rate(SGD, lr)} for lr in (0.1, 1e38)]
    models = estimator.fitMultiple(df, maps)
    index, model = next(models)
    assert index == 0
    same(model, estimator.fit(df, maps[0]))
    with pytest.raises(DivergedError):
        next(models)
    with pytest.raises(StopIteration):
        next(models)


def test_errors_of_ones_own_code_and_params_are_those_of_a_separate_fit(df):
    def broken(parameters: Any) -> Any:
        raise ZeroDivisionError("no optimizer today")

    estimator = quick(epochs=1)
    models = estimator.fitMultiple(df, [{}, {estimator.optimizer: broken}, {estimator.clipNorm: -1.0}])
    assert next(models)[0] == 0
    with pytest.raises(UserError, match=r"no optimizer today"):
        next(models)
    with pytest.raises(RecipeError, match=r"clipNorm is -1.0"):
        next(models)


def test_an_error_of_the_data_reaches_everybody_who_asks(df):
    engine = Counting()
    estimator = quick(engine=engine)
    models = estimator.fitMultiple(df.withColumn("label", F.col("label") + 5), rates(estimator, 0.1, 0.01))
    for _ in range(2):
        with pytest.raises(DataError, match=r"labels must be 0 .. 2"):
            next(models)
    assert engine.fits == [2]


def test_a_train_validation_split_asks_in_threads(df):
    engine = Counting()
    estimator = quick(engine=engine, epochs=1)
    split = TrainValidationSplit(
        estimator=estimator, estimatorParamMaps=grid(estimator), evaluator=MulticlassClassificationEvaluator(), parallelism=3, seed=1
    )
    assert len(split.fit(df).validationMetrics) == 3 and engine.fits == [3, 1]
