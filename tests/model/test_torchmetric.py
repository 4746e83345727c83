"""Metrics of torchmetrics whose states are sums: the same number from parts as torchmetrics gives for all rows at once."""

from __future__ import annotations

import math
import pickle
import runpy
import sys
import warnings
from typing import Any

import pytest
import torch
from pyspark import cloudpickle
from torch import Tensor

from bigdl_lite.errors import DataError, RecipeError
from bigdl_lite.model import torchmetric
from bigdl_lite.model.classes import F1, Accuracy
from bigdl_lite.model.metrics import metric_of
from bigdl_lite.model.ranking import AUC
from bigdl_lite.model.sums import MAE, MSE, R2
from bigdl_lite.model.torchmetric import TorchMetric

torchmetrics = pytest.importorskip("torchmetrics")
classification, regression = torchmetrics.classification, torchmetrics.regression

pytestmark = pytest.mark.timeout(60)

G = torch.Generator().manual_seed(0)
Y3 = torch.randint(0, 3, (60,), generator=G)
X3 = torch.randn(60, 3, generator=G) + 0.8 * torch.nn.functional.one_hot(Y3, 3)
Y2 = torch.randint(0, 2, (60,), generator=G)
X2 = torch.randn(60, generator=G) + 0.8 * Y2
Y = torch.randn(60, generator=G)
P = Y + 0.5 * torch.randn(60, generator=G)
ONES = torch.ones(60, dtype=torch.float64)

# torchmetrics' metric, kind, output, target, and what update() of all rows at once is given as output
CASES: dict[str, tuple[Any, str, Tensor, Tensor, Tensor]] = {
    "accuracy": (classification.MulticlassAccuracy(3, average="micro"), "logits", X3, Y3, X3),
    "f1": (classification.MulticlassF1Score(3), "log-probabilities", X3.log_softmax(1), Y3, X3.softmax(1)),
    "confusion": (classification.MulticlassMatthewsCorrCoef(3), "logits", X3, Y3, X3),
    "calibrated curve": (classification.MulticlassAUROC(3, thresholds=50), "logits", X3, Y3, X3.softmax(1)),
    "binary": (classification.BinaryAccuracy(), "logit", X2[:, None], Y2.float(), X2.sigmoid()),
    "binary curve": (classification.BinaryAUROC(thresholds=200), "logit", X2, Y2, X2.sigmoid()),
    "probability": (classification.BinaryF1Score(), "probability", X2.sigmoid(), Y2.float(), X2.sigmoid()),
    "mse": (regression.MeanSquaredError(), "plain", P[:, None], Y, P),
    "rmse": (regression.MeanSquaredError(squared=False), "plain", P, Y, P),
    "r2": (regression.R2Score(), "plain", P, Y, P),
    "explained variance": (regression.ExplainedVariance(), "plain", P, Y, P),
}
every_metric = pytest.mark.parametrize("case", CASES)


def of(metric: Any, output: Tensor, target: Tensor) -> float:
    return metric.value(metric.sums(output, target, torch.ones(len(target), dtype=torch.float64)))


@every_metric
def test_sums_of_parts_give_the_number_of_all_rows_at_once(case: str) -> None:
    theirs, kind, output, target, seen = CASES[case]
    expected = float(theirs.clone()(seen, target.long() if kind != "plain" else target))
    metric = metric_of(theirs, kind)
    parts = [metric.sums(output[a:b], target[a:b], ONES[a:b]) for a, b in ((0, 1), (1, 20), (20, 20), (20, 60))]
    assert metric.value(torch.stack(parts).sum(0)) == pytest.approx(expected, rel=1e-5)
    assert metric.higher is (case not in ("mse", "rmse"))


@every_metric
def test_a_worker_without_rows_knows_the_number_of_sums_and_rows_of_weight_0_add_nothing(case: str) -> None:
    theirs, kind, output, target, _ = CASES[case]
    metric = metric_of(theirs, kind)
    whole = metric.sums(output, target, ONES)
    zeros = [torch.zeros(2, *x.shape[1:], dtype=x.dtype) for x in (output, target)]
    empty = metric.sums(*zeros, torch.zeros(2, dtype=torch.float64))
    assert whole.dtype == empty.dtype == torch.float64 and empty.shape == whole.shape and not empty.any()
    rubbish = torch.full_like(output[:2], math.nan), torch.full_like(target[:2], 999)
    weight = torch.cat([ONES, torch.zeros(2, dtype=torch.float64)])
    assert torch.equal(metric.sums(torch.cat([output, rubbish[0]]), torch.cat([target, rubbish[1]]), weight), whole)


@every_metric
@pytest.mark.parametrize("pickler", [pickle, cloudpickle], ids=["pickle", "cloudpickle"])
def test_it_pickles_and_compares_by_value(case: str, pickler: Any) -> None:
    theirs, kind, output, target, _ = CASES[case]
    metric = metric_of(theirs, kind)
    again = pickler.loads(pickler.dumps(metric))
    assert again == metric and hash(again) == hash(metric)
    assert of(again, output, target) == of(metric, output, target)
    assert again == metric  # use has not changed it


def test_other_settings_are_another_metric() -> None:
    make = classification.MulticlassF1Score
    assert TorchMetric(make(3)) == TorchMetric(make(3))
    assert TorchMetric(make(3)) != TorchMetric(make(3, average="micro"))
    assert TorchMetric(make(3)) != TorchMetric(make(3), kind="logits") and TorchMetric(make(3)) != F1()
    curve = classification.BinaryAUROC
    assert TorchMetric(curve(thresholds=[0.1, 0.5])) != TorchMetric(curve(thresholds=[0.1, 0.6]))


def test_a_metric_that_has_seen_rows_begins_anew_and_is_not_touched() -> None:
    theirs = regression.MeanSquaredError()
    theirs.update(P, Y)
    metric = metric_of(theirs)
    assert of(metric, Y, Y) == 0 and metric == metric_of(regression.MeanSquaredError())
    assert float(theirs.compute()) > 0


def test_names_are_those_of_the_class_unless_given() -> None:
    assert metric_of(classification.MulticlassF1Score(3)).name == "multiclass_f1_score"
    assert metric_of(classification.BinaryAUROC(thresholds=9)).name == "binary_auroc"
    assert metric_of(regression.R2Score()).name == "r2_score"
    assert metric_of(TorchMetric(regression.R2Score(), name="mine")).name == "mine"


def test_logits_are_judged_the_same_however_small_the_batch() -> None:
    """Negative control: torchmetrics by itself takes logits for probabilities where all of a batch lie between 0 and 1."""
    output, target = torch.tensor([0.2, 0.3, -3.0]), torch.tensor([1, 1, 0])
    theirs = classification.BinaryAccuracy()
    metric = metric_of(theirs, "logit")
    parts = metric.sums(output[:2], target[:2], ONES[:2]) + metric.sums(output[2:], target[2:], ONES[:1])
    assert metric.value(parts) == of(metric, output, target) == 1
    theirs.update(output[:2], target[:2])
    theirs.update(output[2:], target[2:])
    assert float(theirs.compute()) < 1


def test_our_own_metrics_give_the_numbers_of_torchmetrics() -> None:
    pairs = [
        (Accuracy(), classification.MulticlassAccuracy(3, average="micro"), X3, Y3, 1e-6),
        (F1("macro"), classification.MulticlassF1Score(3), X3, Y3, 1e-6),
        (AUC(kind="logit"), classification.BinaryAUROC(), X2, Y2, 2e-4),
        (MSE(), regression.MeanSquaredError(), P, Y, 1e-6),
        (MAE(), regression.MeanAbsoluteError(), P, Y, 1e-6),
        (R2(), regression.R2Score(), P, Y, 1e-5),
    ]
    for ours, theirs, output, target, error in pairs:
        assert of(ours, output, target) == pytest.approx(float(theirs(output, target)), abs=error)


def test_it_works_in_inference_mode_without_a_warning_and_meets_no_other_process() -> None:
    def meet(*_: Any, **__: Any) -> Any:
        raise AssertionError("compute() waits for others")

    theirs = regression.MeanSquaredError(distributed_available_fn=lambda: True, dist_sync_fn=meet)
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("error")
        assert of(metric_of(theirs), P, Y) == pytest.approx(of(MSE(), P, Y))
    theirs.update(P, Y)
    with pytest.raises(AssertionError, match="waits for others"):  # negative control
        theirs.compute()


def test_sums_are_kept_in_float64() -> None:
    metric = metric_of(regression.MeanSquaredError())
    total = sum(metric.sums(P[i : i + 1], Y[i : i + 1], ONES[:1]) for i in range(60))
    assert metric.value(total) == pytest.approx(of(MSE(), P, Y), rel=1e-6)
    counts = metric_of(classification.MulticlassAccuracy(3, average="micro"), "logits")
    many = counts.sums(X3, Y3, ONES) * 2.0**30  # counts beyond what float32 and int32 can hold
    assert counts.value(many) == pytest.approx(of(Accuracy(), X3, Y3))


class Peak(torchmetrics.Metric):
    higher_is_better = True

    def __init__(self, rule: str = "max") -> None:
        super().__init__()
        self.add_state("peak", torch.tensor(0.0), dist_reduce_fx=rule)

    def update(self, output: Tensor, target: Tensor) -> None:
        self.peak = torch.maximum(self.peak, (output - target).max())

    def compute(self) -> Tensor:
        return self.peak


class Forgetful(torchmetrics.Metric):
    """Keeps a number beside its states."""

    higher_is_better = True

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")
        self.largest = 0.0

    def update(self, output: Tensor, target: Tensor) -> None:
        self.total += output.sum()
        self.largest = max(self.largest, float(output.max()))

    def compute(self) -> Tensor:
        return self.total / self.largest


def test_what_no_sum_can_tell_is_refused_by_its_name_and_reason() -> None:
    mse, accuracy = regression.MeanSquaredError(), classification.MulticlassAccuracy(3)
    refused = {
        r"BinaryAUROC keeps all rows in its state 'preds', a list, .* take AUC\(\)": lambda: metric_of(classification.BinaryAUROC()),
        "KendallRankCorrCoef keeps all rows in its state 'preds'": lambda: metric_of(regression.KendallRankCorrCoef()),
        "PearsonCorrCoef reduces its state 'mean_x' by None": lambda: metric_of(regression.PearsonCorrCoef()),
        "Peak reduces its state 'peak' by max": lambda: metric_of(Peak()),
        "Peak reduces its state 'peak' by mean": lambda: metric_of(Peak("mean")),
        "CompositionalMetric is made of other metrics": lambda: metric_of(mse + mse),
        "MinMaxMetric is made of other metrics": lambda: metric_of(torchmetrics.MinMaxMetric(mse)),
        "MetricCollection": lambda: metric_of(torchmetrics.MetricCollection([mse])),
        "MulticlassConfusionMatrix does not say whether more is better": lambda: metric_of(classification.MulticlassConfusionMatrix(3)),
        "TorchMetric takes a torchmetrics.Metric, got Accuracy": lambda: TorchMetric(Accuracy()),
        "kind 'other' is not one of": lambda: TorchMetric(mse, kind="other"),
        r"MulticlassAccuracy cannot weigh rows, and a row weighs 0\.5": lambda: metric_of(accuracy, "logits").sums(X3, Y3, ONES / 2),
        r"MulticlassAccuracy computes a tensor of shape \[3\]": lambda: of(
            metric_of(classification.MulticlassAccuracy(3, average="none"), "logits"), X3, Y3
        ),
        r"ExplainedVariance: its state 'sum_error' has the shape \[\] at first and \[2\] after": lambda: of(
            metric_of(regression.ExplainedVariance()), P.reshape(30, 2), Y.reshape(30, 2)
        ),
        r"Forgetful keeps in update\(\) what is not among its states \['total'\]": lambda: of(metric_of(Forgetful()), P, Y),
    }
    for message, act in refused.items():
        with pytest.raises(RecipeError, match=message):
            act()
    with pytest.raises(DataError, match=r"the label 0\.5 is not a class"):
        of(metric_of(classification.BinaryAccuracy(), "logit"), X2, torch.full((60,), 0.5))


def test_without_torchmetrics_all_else_works_and_the_error_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics", None)  # to import it is an error now
    runpy.run_path(torchmetric.__file__)
    assert metric_of("auc", "logit") == AUC(kind="logit")
    with pytest.raises(ImportError, match=r"pip install 'bigdl_lite\[torchmetrics\]'"):
        TorchMetric(object())
