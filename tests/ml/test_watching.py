"""Validation while a fit runs, and what follows from it: one account for all engines."""

from __future__ import annotations

import math
import shutil
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bigdl_lite import TorchClassifier, TorchEstimator, TorchRegressor
from bigdl_lite.algorithms.shadow import EMA, SWA
from bigdl_lite.engine.trigger import every_epoch, max_loss, max_step, min_metric, several_steps
from bigdl_lite.errors import DataError, RecipeError
from bigdl_lite.observe.events import Callback, EpochEnded, StepEnded, Stop, Validated
from tests.conftest import flat, frame, mlp, problem, uneven

ENGINES = ("local", "shuffle", "barrier")


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.02)


def classifier(engine: str = "local", **more: Any) -> TorchClassifier:
    given = {"numWorkers": 2, "batchSize": 20, "epochs": 3, "optimizer": adam, "module": mlp, "progress": "none", "engine": engine}
    return TorchClassifier(**given | more)


@pytest.fixture(scope="module")
def rows(spark: Any) -> Any:
    x, y = problem(120)
    return frame(spark, x, y, [70, 0, 50]).cache()


def validations(model: Any) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k != "seconds"} for line in model.history if "validation" in line]


@pytest.fixture(scope="module")
def by_engine(rows: Any) -> dict[str, Any]:
    given = {"validationFraction": 0.25, "metrics": ["accuracy", "f1_macro"], "patience": 50, "averaging": EMA(0.8)}
    return {engine: classifier(engine, **given).fit(rows) for engine in ENGINES}


def test_engines_agree_on_what_was_held_out_and_what_it_is_worth(by_engine: dict[str, Any]) -> None:
    local = validations(by_engine["local"])
    assert len(local) == 3 and set(local[0]) == {"validation", "val_loss", "val_accuracy", "val_f1_macro"}
    for engine in ENGINES[1:]:
        for mine, theirs in zip(local, validations(by_engine[engine]), strict=True):
            assert mine == pytest.approx(theirs, rel=1e-6), engine
        torch.testing.assert_close(flat(by_engine[engine].module), flat(by_engine["local"].module), atol=1e-6, rtol=1e-6)


def test_the_line_of_an_epoch_has_the_values_of_its_end(by_engine: dict[str, Any]) -> None:
    for model in by_engine.values():
        ends = [line["val_accuracy"] for line in model.history if "epoch" in line and "steps" in line]
        assert ends == [line["val_accuracy"] for line in validations(model)]


def test_a_value_is_that_of_the_module_on_the_rows_held_out(rows: Any) -> None:
    """Computed anew from the indicator, by one process: the values are not only the same everywhere, they are right."""
    marked = rows.selectExpr("*", "hash(features) % 4 = 0 as held")
    model = classifier(validationIndicatorCol="held", metrics=["accuracy"]).fit(marked)
    held = [(row.features, row.label) for row in marked.where("held").collect()]
    x, y = torch.tensor([a for a, _ in held]), torch.tensor([b for _, b in held])
    with torch.no_grad():
        scores = model.module(x)
    last = validations(model)[-1]
    assert last["val_loss"] == pytest.approx(float(nn.functional.cross_entropy(scores, y)), rel=1e-5)
    assert last["val_accuracy"] == pytest.approx(float((scores.argmax(1) == y).double().mean()))
    trained = sum(line["rows"] for line in model.history if "epoch" in line and "steps" in line)
    assert trained == 3 * (120 - len(held))


def test_rows_held_out_are_not_trained_on(spark: Any) -> None:
    """The marked rows are of another world: a model that had seen them would not fit the others exactly."""
    x = np.linspace(-1, 1, 60, dtype="f4")[:, None]
    data = [(a.tolist(), float(2 * a[0]) if i % 3 else 100.0, i % 3 == 0) for i, a in enumerate(x)]
    df = spark.createDataFrame(data, "features array<float>, label double, held boolean")
    given = {"module": lambda: nn.Linear(1, 1), "optimizer": lambda p: torch.optim.SGD(p, lr=0.5), "epochs": 60, "batchSize": 60}
    est = TorchRegressor(engine="local", numWorkers=2, progress="none", **given)
    clean = est.copy({est.validationIndicatorCol: "held"}).fit(df)
    assert clean.module.weight.item() == pytest.approx(2.0, abs=1e-3)
    assert abs(est.fit(df).module.bias.item()) > 10  # control: with them it does not


def test_the_split_does_not_depend_on_the_layout(rows: Any) -> None:
    a = classifier(validationFraction=0.3, epochs=1, batchSize=120, numWorkers=1).fit(rows)
    b = classifier(validationFraction=0.3, epochs=1, batchSize=120, numWorkers=3).fit(rows.repartition(4))
    assert a.history[0]["rows"] == b.history[0]["rows"]
    assert validations(a)[0] == pytest.approx(validations(b)[0], rel=1e-5)
    other = classifier(validationFraction=0.3, epochs=1, batchSize=120, numWorkers=1, seed=5).fit(rows)  # control
    assert validations(other)[0]["val_loss"] != pytest.approx(validations(a)[0]["val_loss"], rel=1e-5)


def worse_and_worse(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=4.0)  # too high: the loss goes up and down


@pytest.mark.parametrize("engine", ENGINES)
def test_the_best_weights_come_back_and_the_fit_ends_early(rows: Any, engine: str) -> None:
    given = {"validationFraction": 0.25, "optimizer": worse_and_worse, "epochs": 30}
    model = classifier(engine, patience=2, **given).fit(rows)
    found = [line["val_loss"] for line in validations(model)]
    assert len(found) < 30 and found.index(min(found)) == len(found) - 4  # three that are not better
    again = classifier(initialModel=model, epochs=1, limitBatches=1, optimizer=lambda p: torch.optim.SGD(p, lr=0.0), **{
        "validationFraction": 0.25}).fit(rows)
    assert validations(again)[0]["val_loss"] == pytest.approx(min(found), rel=1e-5)
    if engine == "local":  # control: without it, the last weights are what comes back
        last = classifier(patience=2, restoreBest=False, **given).fit(rows)
        assert not torch.allclose(flat(last.module), flat(model.module))


@pytest.mark.parametrize("engine", ENGINES)
def test_a_trigger_ends_the_fit(rows: Any, engine: str) -> None:
    model = classifier(engine, endTrigger=max_step(5) | max_loss(1e-9)).fit(rows)
    assert [line["step"] for line in model.history if "step" in line] == [0, 1, 2, 3, 4]


def test_validation_may_be_more_often_than_epochs(rows: Any) -> None:
    for engine in ("local", "shuffle"):
        model = classifier(engine, validationFraction=0.25, validationTrigger=several_steps(2), epochs=2).fit(rows)
        steps = sum("step" in line for line in model.history)
        assert [line["validation"] for line in validations(model)] == list(range(2, steps + 1, 2))


def test_an_end_by_a_metric(rows: Any) -> None:
    given = {"validationFraction": 0.25, "metrics": ["accuracy"], "epochs": 60}
    model = classifier(endTrigger=min_metric("val_accuracy", 0.6), **given).fit(rows)
    found = [line["val_accuracy"] for line in validations(model)]
    assert found[-1] >= 0.6 and all(value < 0.6 for value in found[:-1]) and len(found) < 60


@pytest.mark.parametrize("engine", ENGINES)
def test_a_callback_hears_a_fit_and_ends_it(rows: Any, engine: str) -> None:
    heard: list[Any] = []

    class Enough(Callback):
        def on_epoch(self, event: EpochEnded) -> Any:
            return Stop() if event.epoch == 1 else None

    model = classifier(engine, epochs=9, validationFraction=0.25, callbacks=[heard.append, Enough()]).fit(rows)
    kinds = [type(event).__name__ for event in heard]
    assert kinds[0] == "FitStarted" and kinds[-1] == "FitEnded"
    assert kinds.count("EpochEnded") == 2 and kinds.count("Validated") == 2
    assert sum("steps" in line for line in model.history) == 2
    assert any(isinstance(event, StepEnded) for event in heard) and any(isinstance(event, Validated) for event in heard)


def test_a_local_fit_inside_a_callback_of_another_is_refused(rows: Any) -> None:
    """Both would seed the one generator of this process; it would wait for the fit that it is a part of."""
    heard: list[Any] = []

    class Greedy(Callback):
        def on_epoch(self, event: EpochEnded) -> None:
            with pytest.raises(RecipeError, match="cannot run another"):
                classifier(epochs=1).fit(rows)
            heard.append(event.epoch)

    classifier(epochs=2, callbacks=[Greedy()]).fit(rows)
    assert heard == [0, 1]


@pytest.mark.parametrize("average", [EMA(0.9), SWA(2)], ids=repr)
def test_the_model_has_averaged_weights(rows: Any, average: Any) -> None:
    plain = classifier().fit(rows)
    shadowed = classifier(averaging=average).fit(rows)
    assert plain.history[-1]["loss"] == shadowed.history[-1]["loss"]  # training itself is the same
    assert not torch.allclose(flat(plain.module), flat(shadowed.module))


def test_rows_count_by_their_weight(spark: Any) -> None:
    """A weight of 2 is a row that stands there twice, a weight of 0 one that does not."""
    x, y = problem(30)
    rng = np.random.default_rng(1)
    weights = rng.integers(0, 3, 30)
    weighted = spark.createDataFrame(
        [(a.tolist(), int(b), float(w)) for a, b, w in zip(x, y, weights, strict=True)], "features array<float>, label long, w double"
    )
    twice = spark.createDataFrame(
        [(a.tolist(), int(b)) for a, b, w in zip(x, y, weights, strict=True) for _ in range(w)], "features array<float>, label long"
    )
    given = {"batchSize": 100, "epochs": 4, "optimizer": lambda p: torch.optim.SGD(p, lr=0.3)}
    a = flat(classifier(weightCol="w", **given).fit(weighted).module)
    torch.testing.assert_close(a, flat(classifier(**given).fit(twice).module), atol=1e-6, rtol=1e-5)
    assert not torch.allclose(a, flat(classifier(**given).fit(weighted).module), atol=1e-3)  # control


@pytest.mark.parametrize("engine", ENGINES[1:])
def test_weights_of_rows_reach_every_engine(spark: Any, engine: str) -> None:
    x, y = problem(40)
    df = spark.createDataFrame([(a.tolist(), int(b), float(i % 4)) for i, (a, b) in enumerate(zip(x, y, strict=True))],
                               "features array<float>, label long, w double").repartition(2)  # fmt: skip
    given = {"weightCol": "w", "validationFraction": 0.3, "metrics": ["accuracy"]}
    here, there = classifier(**given).fit(df), classifier(engine, **given).fit(df)
    torch.testing.assert_close(flat(here.module), flat(there.module), atol=1e-6, rtol=1e-5)
    assert validations(here)[-1] == pytest.approx(validations(there)[-1], rel=1e-6)


def test_classes_count_alike_when_balanced(spark: Any) -> None:
    x, y = problem(60, classes=2)
    few = [(a.tolist(), int(b)) for i, (a, b) in enumerate(zip(x, y, strict=True)) if b == 0 or i % 6 == 0]
    df = spark.createDataFrame(few, "features array<float>, label long")
    counts = [sum(b == c for _, b in few) for c in (0, 1)]
    weights = [len(few) / (2 * count) for count in counts]
    by_hand = nn.CrossEntropyLoss(weight=torch.tensor(weights))
    two = lambda: mlp(classes=2)  # noqa: E731
    a = classifier(module=two, classWeights="balanced").fit(df)
    torch.testing.assert_close(flat(a.module), flat(classifier(module=two, loss=by_hand).fit(df).module))
    torch.testing.assert_close(flat(a.module), flat(classifier(module=two, classWeights=weights).fit(df).module))
    whole = [flat(classifier(module=two, classWeights=numbers).fit(df).module) for numbers in ([1, 3], [1.0, 3.0])]
    torch.testing.assert_close(*whole)
    assert not torch.allclose(flat(a.module), flat(classifier(module=two).fit(df).module))  # control


@pytest.mark.parametrize("engine", ENGINES)
def test_accumulation_is_the_same_gradient_in_parts(rows: Any, engine: str) -> None:
    whole, parts = classifier().fit(rows), classifier(engine, accumulation=3).fit(rows)
    torch.testing.assert_close(flat(whole.module), flat(parts.module), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_autocast_rounds_and_trains(rows: Any, precision: str) -> None:
    full, half = classifier(epochs=6).fit(rows), classifier(precision=precision, epochs=6).fit(rows)
    assert half.history[-1]["loss"] == pytest.approx(full.history[-1]["loss"], rel=0.1)
    assert not torch.equal(flat(full.module), flat(half.module))  # control: it did something
    assert flat(half.module).dtype == torch.float32


@pytest.mark.slow  # a compiler is started
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_module_trains_to_the_same_weights(rows: Any) -> None:
    for engine in ("local", "barrier"):
        plain, made = classifier(engine, epochs=2).fit(rows), classifier(engine, epochs=2, compile=True).fit(rows)
        torch.testing.assert_close(flat(made.module), flat(plain.module), atol=1e-5, rtol=1e-4)


def test_a_dry_run_takes_few_batches(rows: Any) -> None:
    for engine in ENGINES:
        model = classifier(engine, limitBatches=2, epochs=2).fit(rows)
        assert sum("step" in line for line in model.history) == 4


def test_a_warm_start_goes_on_where_a_model_ended(rows: Any) -> None:
    sgd = {"optimizer": lambda p: torch.optim.SGD(p, lr=0.1), "batchSize": 1000}
    four = classifier(epochs=4, **sgd).fit(rows)
    two = classifier(epochs=2, **sgd).fit(rows)
    more = classifier(epochs=2, initialModel=two, **sgd).fit(rows)
    torch.testing.assert_close(flat(more.module), flat(four.module), atol=1e-6, rtol=1e-5)
    with pytest.raises(RecipeError, match=r"another module.*0\.weight"):
        classifier(initialModel=two, module=lambda: nn.Sequential(nn.Linear(5, 3))).fit(rows)


def test_a_loss_of_ones_own_with_weights_returns_a_value_for_each_row(spark: Any) -> None:
    df = spark.createDataFrame([([float(i)], float(i), 1.0 + i % 2) for i in range(8)], "features array<float>, label double, w double")

    def each(output: Tensor, target: Tensor) -> Tensor:
        return (output.reshape(-1) - target).abs()

    given = {"module": lambda: nn.Linear(1, 1), "engine": "local", "numWorkers": 1, "progress": "none", "weightCol": "w"}
    model = TorchEstimator(loss=each, **given).fit(df)
    assert math.isfinite(model.history[-1]["loss"])
    with pytest.raises(RecipeError, match="a value for each"):
        TorchEstimator(loss=lambda output, target: each(output, target).mean(), **given).fit(df)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"metrics": ["accuracy"]}, "needs rows to validate on"),
        ({"patience": 1}, "needs rows to validate on"),
        ({"validationFraction": 0.2, "metrics": ["acuracy"]}, "accuracy"),
        ({"validationFraction": 0.2, "monitor": "val_auc"}, "val_loss"),
        ({"validationFraction": 1.5}, "below 1"),
        ({"validationFraction": 0.2, "validationIndicatorCol": "held"}, "leave out one"),
        ({"precision": "fp8"}, "bf16"),
        ({"classWeights": [1.0, -1.0]}, "above 0"),
        ({"accumulation": 0}, "at least 1"),
        ({"limitBatches": 0}, "at least 1"),
        ({"callbacks": [3]}, "int"),
        ({"averaging": EMA(0.9), "algorithm": "d-psgd"}, "weights of its own"),
        ({"validationFraction": 0.2, "validationTrigger": every_epoch(2), "algorithm": "d-psgd"}, "validationTrigger"),
        ({"weightCol": "nowhere"}, "nowhere"),
        ({"validationIndicatorCol": "label"}, "boolean"),
    ],
    ids=lambda x: str(x)[:60],
)
def test_what_cannot_work_is_said_before_any_job(rows: Any, given: dict[str, Any], said: str) -> None:
    with pytest.raises((RecipeError, DataError), match=said):
        classifier(**given).fit(rows)


def test_peers_are_validated_by_their_mean(rows: Any) -> None:
    given = {"validationFraction": 0.25, "metrics": ["accuracy"], "patience": 50, "restoreBest": False}
    model = classifier(algorithm="dsgd", epochs=4, **given).fit(rows)
    lines = validations(model)
    assert len(lines) == 4
    again = classifier(initialModel=model, epochs=1, limitBatches=1, optimizer=lambda p: torch.optim.SGD(p, lr=0.0), **{
        "validationFraction": 0.25}).fit(rows)
    assert validations(again)[0]["val_loss"] == pytest.approx(lines[-1]["val_loss"], rel=1e-5)


def test_a_fit_that_is_gone_on_with_judges_as_if_it_had_not_stopped(rows: Any, tmp_path: Any) -> None:
    given = {"validationFraction": 0.25, "optimizer": worse_and_worse, "patience": 2, "averaging": EMA(0.5)}
    whole = classifier(epochs=30, **given).fit(rows)
    classifier(epochs=2, checkpointDir=str(tmp_path), **given).fit(rows)
    rest = classifier(epochs=30, checkpointDir=str(tmp_path), resume=True, **given).fit(rows)
    assert validations(rest) == validations(whole)
    torch.testing.assert_close(flat(rest.module), flat(whole.module), atol=0, rtol=0)
    after = classifier(epochs=30, checkpointDir=str(tmp_path), resume=True, **given).fit(rows)  # it had ended: nothing more is trained
    torch.testing.assert_close(flat(after.module), flat(whole.module), atol=0, rtol=0)


def test_unevenly_dealt_rows_of_validation(spark: Any) -> None:
    """A worker without a row to validate on, and one without a row to train on."""
    x, y = problem(40)
    df = frame(spark, x, y, uneven(40, 4)).selectExpr("*", "spark_partition_id() = 2 as held").cache()
    df.count()
    local = classifier(numWorkers=4, validationIndicatorCol="held", metrics=["accuracy"]).fit(df)
    for engine in ENGINES[1:]:
        model = classifier(engine, numWorkers=4, validationIndicatorCol="held", metrics=["accuracy"]).fit(df)
        assert validations(model)[-1] == pytest.approx(validations(local)[-1], rel=1e-6)
    for fault in ("true", "false"):
        with pytest.raises(DataError, match="held out for validation"):
            classifier(validationIndicatorCol="held").fit(df.selectExpr("features", "label", f"{fault} as held"))
