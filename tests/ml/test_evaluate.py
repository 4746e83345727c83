"""evaluate measures where the rows lie, in one job, and does not care how they are dealt."""

from __future__ import annotations

import importlib.util
import math
import sys
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from pyspark.sql import functions as F
from torch import Tensor, nn

from bigdl_lite import TorchClassifier, TorchEstimator, TorchModel, TorchRegressor
from bigdl_lite.errors import DataError, RecipeError, UserError
from bigdl_lite.ml.loss import Loss
from tests.conftest import frame, mlp, problem

METRICS = importlib.util.find_spec("bigdl_lite.model.metrics") is not None
X, Y = problem(90)
COMMON = {"engine": "local", "numWorkers": 1, "progress": "none", "batchSize": 30}


@dataclass(frozen=True)
class Right:
    """The share of rows whose largest score is that of the label."""

    name: str = "right"
    higher: bool = True

    def sums(self, output: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        return torch.stack([((output.argmax(1) == target) * weight).sum(), weight.sum()])

    def value(self, sums: Tensor) -> float:
        return float(sums[0] / sums[1])


@dataclass(frozen=True)
class Mean:
    """The weighted mean of the output, whatever the target."""

    name: str = "mean"
    higher: bool = True

    def sums(self, output: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        return torch.stack([output.double().reshape(len(weight), -1).sum(1) @ weight, weight.sum()])

    def value(self, sums: Tensor) -> float:
        return float(sums[0] / sums[1])


@dataclass(frozen=True)
class Raises(Mean):
    def sums(self, output: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        raise KeyError("a metric of mine")


@pytest.fixture(autouse=True)
def _metric_of(monkeypatch):
    """Where the package's own metrics are not there, values must do."""
    if not METRICS:
        monkeypatch.setitem(sys.modules, "bigdl_lite.model.metrics", stand_in([]))


def stand_in(asked: list) -> ModuleType:
    def metric_of(metric, kind):
        asked.append((metric, kind))
        if isinstance(metric, int):
            raise RecipeError("int is no metric")
        return Right(metric) if isinstance(metric, str) else metric

    made = ModuleType("bigdl_lite.model.metrics")
    made.metric_of = metric_of
    return made


def exact() -> nn.Module:
    """In float64: sums of float32 outputs would only be as equal as these, whose last digits depend on a row's place in its batch."""
    return mlp().double()


@pytest.fixture(scope="module")
def df(spark):
    return frame(spark, X, Y, [40, 0, 50]).withColumn("weight", F.element_at("features", 1) ** 2).cache()


@pytest.fixture(scope="module")
def model(df):
    return TorchClassifier(module=exact, **COMMON).fit(df)


@pytest.fixture(scope="module")
def outputs(model):
    with torch.inference_mode():
        return model.module(torch.from_numpy(X).double())


def test_metrics_and_loss_are_those_of_all_rows(df, model, outputs):
    found = model.evaluate(df, [Right(), Mean()], loss=nn.CrossEntropyLoss())
    assert list(found) == ["loss", "right", "mean"]
    y = torch.from_numpy(Y)
    assert found["right"] == float((outputs.argmax(1) == y).double().mean())
    assert found["mean"] == pytest.approx(float(outputs.sum(1).mean()), rel=1e-12)
    assert found["loss"] == pytest.approx(float(nn.functional.cross_entropy(outputs, y)), rel=1e-12)
    assert all(type(value) is float for value in found.values())


def test_weights_count_and_rows_of_weight_zero_do_not(df, model, outputs):
    weight, y = torch.from_numpy(X[:, 0]).double() ** 2, torch.from_numpy(Y)
    found = model.evaluate(df, Right(), weightCol="weight", loss=nn.CrossEntropyLoss())
    by_row = nn.functional.cross_entropy(outputs, y, reduction="none")
    assert found["loss"] == pytest.approx(float((by_row * weight).sum() / weight.sum()), rel=1e-12)
    assert found["right"] == pytest.approx(float(weight[outputs.argmax(1) == y].sum() / weight.sum()), rel=1e-12)
    assert found["right"] != model.evaluate(df, Right())["right"]
    half = df.withColumn("weight", F.when(F.element_at("features", 2) > 0, 1).otherwise(0))
    alone = model.evaluate(df.where(F.element_at("features", 2) > 0), [Right(), Mean()])
    assert model.evaluate(half, [Right(), Mean()], weightCol="weight") == pytest.approx(alone, rel=1e-12)


@pytest.mark.parametrize("parts", [[90], [1, 0, 2, 80, 7], [30, 30, 30]], ids=str)
def test_the_layout_of_rows_does_not_matter(spark, df, model, parts):
    dealt = frame(spark, X, Y, parts).withColumn("weight", F.element_at("features", 1) ** 2)
    small = model.copy({model.predictBatchSize: 7})
    for loss in (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5]).double(), label_smoothing=0.1)):
        expected = model.evaluate(df, [Right(), Mean()], loss=loss)
        assert model.evaluate(dealt, [Right(), Mean()], loss=loss) == pytest.approx(expected, rel=1e-12, abs=1e-12)
        assert small.evaluate(dealt, [Right(), Mean()], loss=loss) == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_a_module_of_float32_is_as_equal_as_its_outputs(spark, df):
    model = TorchClassifier(module=mlp, **COMMON).fit(df)
    found = [model.evaluate(frame(spark, X, Y, parts), [Mean()], loss=nn.CrossEntropyLoss()) for parts in ([90], [7, 13, 70])]
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_it_is_one_job(spark, df, model):
    df.count()  # the cache is filled by a job of its own
    sc = spark.sparkContext
    sc.setJobGroup("evaluate", "evaluate")
    try:
        model.evaluate(df, [Right(), Mean()])
        assert len(sc.statusTracker().getJobIdsForGroup("evaluate")) == 1
        df.count()
        assert len(sc.statusTracker().getJobIdsForGroup("evaluate")) > 1
    finally:
        sc.setLocalProperty("spark.jobGroup.id", None)


def test_the_label_is_the_one_of_the_training_and_stays_so_on_disk(df, tmp_path):
    other = df.withColumn("answer", F.col("label").cast("double")).drop("label")
    model = TorchClassifier(module=mlp, labelCol="answer", **COMMON).fit(other)
    found = model.evaluate(other, Right(), loss=nn.CrossEntropyLoss())
    assert model.evaluate(df, Right(), labelCol="label", loss=nn.CrossEntropyLoss()) == found
    model.save(str(tmp_path / "model"))
    again = TorchModel.load(str(tmp_path / "model"))
    assert again.getLabelCol() == "answer" and again.evaluate(other, Right(), loss=nn.CrossEntropyLoss()) == found
    with pytest.raises(DataError, match="no column 'answer'"):
        model.evaluate(df, Right())


def test_a_regressor_compares_one_output_with_one_label(df):
    model = TorchRegressor(module=lambda: nn.Linear(5, 1), **COMMON).fit(df)
    with torch.inference_mode():
        output = model.module(torch.from_numpy(X))[:, 0].double()
    found = model.evaluate(df, "loss", loss=nn.MSELoss())
    assert found == {"loss": pytest.approx(float(nn.functional.mse_loss(output, torch.from_numpy(Y).double())), rel=1e-6)}
    plain = TorchEstimator(module=lambda: nn.Linear(5, 3), loss=nn.CrossEntropyLoss(), **COMMON).fit(df)
    with pytest.raises(DataError, match="MSELoss needs one shape"):
        plain.evaluate(df.withColumn("label", F.col("label").cast("double")), loss=nn.MSELoss())


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"scores": self.net(x), "sum": x.sum(1)}


def of_both(output: dict[str, Tensor], target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output["scores"], target) + output["sum"].square().mean()


def test_a_loss_of_your_own_sees_all_outputs_and_weights(df):
    model = TorchEstimator(module=Both, loss=of_both, **COMMON).fit(df)
    with torch.inference_mode():
        output = model.module(torch.from_numpy(X))
        y, weight = torch.from_numpy(Y), torch.from_numpy(X[:, 0]).double() ** 2
        rows = nn.functional.cross_entropy(output["scores"], y, reduction="none") + output["sum"].square()
    assert model.evaluate(df, loss=of_both)["loss"] == pytest.approx(float(rows.mean()), rel=1e-6)
    expected = float((rows.double() * weight).sum() / weight.sum())
    assert model.evaluate(df, loss=of_both, weightCol="weight")["loss"] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "rule",
    [
        nn.CrossEntropyLoss(), nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0, 0.2]), ignore_index=1), nn.NLLLoss(),
        nn.CrossEntropyLoss(label_smoothing=0.2), lambda output, target: nn.functional.cross_entropy(output, target),
    ],
    ids=["plain", "weights and a label to ignore", "nll", "smooth", "function"],
)  # fmt: skip
def test_a_loss_in_parts_is_the_loss_of_the_whole(rule):
    output, target = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)).log_softmax(1), torch.arange(40) % 3
    parts = [Loss(rule).sums(output[a:b], target[a:b], torch.ones(b - a, dtype=torch.float64)) for a, b in ((0, 7), (7, 7), (7, 40))]
    assert Loss(rule).value(sum(parts)) == pytest.approx(float(rule(output, target)), rel=1e-5)


def test_a_loss_of_pixels_is_a_mean_over_pixels():
    output, target = torch.randn(6, 3, 4, 4), torch.randint(0, 3, (6, 4, 4))
    weight = torch.ones(6, dtype=torch.float64)
    assert Loss(nn.CrossEntropyLoss()).value(Loss(nn.CrossEntropyLoss()).sums(output, target, weight)) == pytest.approx(
        float(nn.functional.cross_entropy(output, target)), rel=1e-5
    )


def test_names_are_looked_up_with_the_kind_of_the_output(df, model, monkeypatch):
    asked: list = []
    monkeypatch.setitem(sys.modules, "bigdl_lite.model.metrics", stand_in(asked))
    assert model.evaluate(df, ["accuracy"])["accuracy"] == model.evaluate(df, Right())["right"]
    assert asked == [("accuracy", "logits"), (Right(), "logits")]


@pytest.mark.skipif(not METRICS, reason="the package's own metrics are not there")
def test_names_of_the_package_are_what_scikit_learn_says(df, model, outputs):
    from sklearn.metrics import accuracy_score, f1_score, r2_score, roc_auc_score

    found = model.evaluate(df, ["accuracy", "f1_macro"])
    guess = outputs.argmax(1).numpy()
    assert found == pytest.approx({"accuracy": accuracy_score(Y, guess), "f1_macro": f1_score(Y, guess, average="macro")}, rel=1e-9)
    halves = df.withColumn("label", (F.col("label") > 0).cast("double"))
    one = TorchClassifier(module=lambda: mlp(classes=1), loss=nn.BCEWithLogitsLoss(), **COMMON).fit(halves)
    with torch.inference_mode():
        logit = one.module(torch.from_numpy(X))[:, 0].numpy()
    found = one.evaluate(halves, ["auc", "accuracy"])
    assert found["auc"] == pytest.approx(roc_auc_score(Y > 0, logit), abs=1e-3)
    assert found["accuracy"] == pytest.approx(accuracy_score(Y > 0, logit > 0))
    number = TorchRegressor(module=lambda: nn.Linear(5, 1), **COMMON).fit(df)
    with torch.inference_mode():
        output = number.module(torch.from_numpy(X))[:, 0].numpy()
    assert number.evaluate(df, "r2")["r2"] == pytest.approx(r2_score(Y, output), rel=1e-5)


@pytest.mark.parametrize(
    ("change", "metrics", "more", "kind", "said"),
    [
        ("where false", [Right()], {}, DataError, "no rows"),
        ("null", [Right()], {}, DataError, "column 'features' has 1 null"),
        ("label 7", ["loss"], {"loss": nn.CrossEntropyLoss()}, DataError, "value 7, the module has 3 outputs"),
        ("weight 0", [Right()], {"weightCol": "weight"}, DataError, "weights of all rows are 0"),
        ("weight -1", [Right()], {"weightCol": "weight"}, DataError, "weight below 0, the first in row 0"),
        ("", [Right()], {"weightCol": "features"}, DataError, "is one number"),
        ("", [Right()], {"weightCol": "no"}, DataError, "no column 'no'"),
        ("", [Raises()], {}, UserError, "Traceback[^$]*a metric of mine[^$]*partition"),
        ("", ["loss"], {}, RecipeError, "give it with"),
        ("", [], {}, RecipeError, "nothing to measure"),
        ("", [Right(), Right()], {}, RecipeError, "the name 'right'"),
        ("", [3], {}, RecipeError, "int is no metric"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_measured_says_why(df, model, change, metrics, more, kind, said):
    changed = {
        "": df,
        "where false": df.where("false"),
        "null": df.withColumn("features", F.when(F.element_at("features", 1) != float(X[3, 0]), F.col("features"))),
        "label 7": df.withColumn("label", F.lit(7)),
        "weight 0": df.withColumn("weight", F.lit(0)),
        "weight -1": df.withColumn("weight", F.lit(-1.0)),
    }[change]
    with pytest.raises(kind, match=said):
        model.evaluate(changed, metrics, **more)


def test_it_works_on_a_model_that_a_pipeline_copied(df, model):
    assert not math.isnan(model.copy().evaluate(df, Right())["right"])
