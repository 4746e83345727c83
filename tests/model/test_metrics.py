"""Metrics of the whole out of sums of parts, and the numbers that scikit-learn gives for the whole."""

from __future__ import annotations

import dataclasses
import math
import pickle
from typing import Any

import numpy as np
import pytest
import sklearn.metrics as sk
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bigdl_lite.errors import DataError, RecipeError
from bigdl_lite.ml import head
from bigdl_lite.model.classes import F1, Accuracy, Precision, Recall
from bigdl_lite.model.metrics import METRICS, Metric, metric_of
from bigdl_lite.model.ranking import AUC, AUCPR, NDCG, HitRatio, TopK
from bigdl_lite.model.sums import MAE, MSE, R2, RMSE, Mean

pytestmark = pytest.mark.timeout(60)


def ones(b: int) -> Tensor:
    return torch.ones(b, dtype=torch.float64)


def of(metric: Metric, output: Any, target: Tensor, weight: Tensor | None = None) -> float:
    return metric.value(metric.sums(output, target, ones(len(target)) if weight is None else weight))


def scores(b: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Class scores [b, C] that know something of the labels [b], and weights [b], a quarter of them 0."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (b,), generator=g)
    x = torch.randn(b, classes, generator=g)
    x[torch.arange(b), labels] += 0.8
    weight = torch.rand(b, generator=g, dtype=torch.float64) * (torch.rand(b, generator=g) > 0.25)
    return x, labels, weight


def numbers(b: int, *shape: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    y = torch.randn(b, *shape, generator=g)
    return y + 0.5 * torch.randn(b, *shape, generator=g), y, torch.rand(b, generator=g, dtype=torch.float64)


def per_row(output: Tensor, target: Tensor) -> Tensor:
    return (output.argmax(1) - target).abs()


# every metric beside a problem that it fits: (metric, output, target)
X3, Y3, W3 = scores(40, 3)
X12, Y12, W12 = scores(40, 12)
X2, Y2, W2 = scores(40, 2)
P, Y, W = numbers(40)
PS, YS, WS = numbers(40, 2)
IMAGE, MASK = torch.stack([X3, X3.flip(1)], 2)[..., None], torch.stack([Y3, Y12 % 3], 1)[..., None]  # [40, 3, 2, 1], [40, 2, 1]
CASES: dict[str, tuple[Metric, Tensor, Tensor]] = {
    "accuracy": (Accuracy(), X3, Y3),
    "accuracy of pixels": (Accuracy(), IMAGE, MASK),
    "accuracy of a logit": (Accuracy("logit"), X2[:, 1:], Y2.float()),
    "accuracy of a probability": (Accuracy("probability"), X2[:, 1].sigmoid(), Y2),
    "top 3": (TopK(3), X12, Y12),
    "hit ratio": (HitRatio(10), X12, Y12),
    "ndcg": (NDCG(10), X12, Y12),
    "f1": (F1(), X2, Y2),
    "f1 macro": (F1("macro"), X3, Y3),
    "f1 micro": (F1("micro"), X3, Y3),
    "f1 weighted": (F1("weighted"), X3, Y3),
    "precision": (Precision(), X3, Y3),
    "recall": (Recall(), X3, Y3),
    "auc": (AUC(bins=500), X2, Y2),
    "aucpr": (AUCPR(bins=500), X2, Y2),
    "mse": (MSE(), P, Y),
    "rmse": (RMSE(), P[:, None], Y),
    "mae": (MAE(), PS, YS),
    "r2": (R2(), P, Y),
    "r2 of two": (R2(center=1.0), PS, YS),
    "mean": (Mean("distance", per_row, higher=False), X3, Y3),
}
every_metric = pytest.mark.parametrize("case", CASES)


def near(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-9)


# ---- sums ------------------------------------------------------------------------------------------------------------


@every_metric
@settings(max_examples=15, deadline=None)
@given(owner=st.lists(st.integers(0, 4), min_size=40, max_size=40))
def test_sums_over_any_parts_add_up_to_the_sums_of_the_whole(case: str, owner: list[int]) -> None:
    metric, output, target = CASES[case]
    rank = torch.tensor(owner)
    parts = [metric.sums(output[rank == r], target[rank == r], W3[rank == r]) for r in range(5)]
    near(torch.stack(parts).sum(0), metric.sums(output, target, W3))


@every_metric
@settings(max_examples=15, deadline=None)
@given(times=st.lists(st.integers(0, 3), min_size=40, max_size=40))
def test_a_row_of_weight_3_is_three_rows(case: str, times: list[int]) -> None:
    metric, output, target = CASES[case]
    again = torch.arange(40).repeat_interleave(torch.tensor(times))
    found = metric.sums(output, target, torch.tensor(times, dtype=torch.float64))
    near(found, metric.sums(output[again], target[again], ones(len(again))))


@every_metric
def test_a_worker_without_rows_knows_the_number_of_sums_and_adds_exactly_nothing(case: str) -> None:
    metric, output, target = CASES[case]
    whole = metric.sums(output, target, W3)
    zeros = [torch.zeros(2, *x.shape[1:], dtype=x.dtype) for x in (output, target)]
    empty = metric.sums(*zeros, torch.zeros(2, dtype=torch.float64))
    assert whole.dtype == empty.dtype == torch.float64 and whole.ndim == 1
    assert empty.shape == whole.shape and not empty.any()
    assert math.isnan(metric.value(empty))


@every_metric
def test_rows_of_weight_0_add_exactly_nothing_whatever_they_hold(case: str) -> None:
    metric, output, target = CASES[case]
    rubbish = torch.full_like(output[:2], math.nan), torch.full_like(target[:2], 999)
    weight = torch.cat([W3, torch.zeros(2, dtype=torch.float64)])
    found = metric.sums(torch.cat([output, rubbish[0]]), torch.cat([target, rubbish[1]]), weight)
    assert torch.equal(found, metric.sums(output, target, W3))


@every_metric
def test_a_metric_is_a_value(case: str) -> None:
    metric, output, target = CASES[case]
    again = pickle.loads(pickle.dumps(metric))
    assert again == metric and hash(again) == hash(metric)
    assert of(again, output, target) == of(metric, output, target)
    with pytest.raises(dataclasses.FrozenInstanceError):
        metric.name = "other"  # type: ignore[misc]


@pytest.mark.parametrize("case", ["f1", "f1 macro", "auc", "aucpr", "rmse", "r2"])
def test_the_mean_of_the_parts_metrics_is_another_number(case: str) -> None:
    """Negative control: what it is all for."""
    metric, output, target = CASES[case]
    parts = [of(metric, x, y) for x, y in zip(output.split([10, 30]), target.split([10, 30]), strict=True)]
    assert abs((10 * parts[0] + 30 * parts[1]) / 40 - of(metric, output, target)) > 1e-3


def test_gradients_and_inference_mode_are_no_matter() -> None:
    x = X3.clone().requires_grad_()
    assert not Accuracy().sums(x, Y3, W3).requires_grad
    with torch.inference_mode():
        assert of(Accuracy(), x * 1, Y3) == of(Accuracy(), X3, Y3)


# ---- the numbers of scikit-learn -------------------------------------------------------------------------------------


def test_accuracy_is_that_of_scikit_learn() -> None:
    assert of(Accuracy(), X3, Y3, W3) == pytest.approx(sk.accuracy_score(Y3, X3.argmax(1), sample_weight=W3))
    assert of(Accuracy("log-probabilities"), X3.log_softmax(1), Y3.double()) == pytest.approx(sk.accuracy_score(Y3, X3.argmax(1)))


@pytest.mark.parametrize(("kind", "output"), [("logit", [-1.0, 0.0, 0.1, 3.0]), ("probability", [0.1, 0.5, 0.51, 1.0])])
def test_one_number_says_class_1_above_logit_0_and_above_probability_one_half(kind: str, output: list[float]) -> None:
    said = torch.tensor([0, 0, 1, 1])
    for shape in ((4,), (4, 1)):
        assert of(Accuracy(kind), torch.tensor(output).reshape(shape), said) == 1
    as_column = head.Head(kind, ()).to_arrow(torch.tensor(output)).field("prediction").to_pylist()
    assert as_column == said.tolist()


def test_labels_to_ignore_are_left_out() -> None:
    labels = torch.where(torch.arange(40) % 3 == 0, -100, Y3)
    some = labels >= 0
    for metric in (Accuracy(), F1("macro"), TopK(2)):
        assert torch.equal(metric.sums(X3, labels, W3), metric.sums(X3[some], Y3[some], W3[some]))


@pytest.mark.parametrize("average", ["macro", "micro", "weighted"])
@pytest.mark.parametrize(
    ("metric", "theirs"), [(F1, sk.f1_score), (Precision, sk.precision_score), (Recall, sk.recall_score)], ids=["f1", "p", "r"]
)
def test_counts_of_classes_are_those_of_scikit_learn(metric: Any, theirs: Any, average: str) -> None:
    """Of 12 classes one is never there and never predicted, one only there, one only predicted."""
    x, y = X12.clone(), Y12 % 10
    x[:, 11] = -99
    x[5, 10], x[:, 4] = 99, -99
    assert {4, 10, 11} - set(y.tolist()) == {10, 11}
    expected = theirs(y, x.argmax(1), average=average, sample_weight=W12, zero_division=0)
    assert of(metric(average), x, y, W12) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("metric", "theirs"), [(F1, sk.f1_score), (Precision, sk.precision_score), (Recall, sk.recall_score)], ids=["f1", "p", "r"]
)
def test_of_two_classes_it_is_that_of_class_1(metric: Any, theirs: Any) -> None:
    expected = theirs(Y2, X2.argmax(1), sample_weight=W2)
    assert of(metric(), X2, Y2, W2) == of(metric("binary"), X2, Y2, W2) == pytest.approx(expected)
    assert of(metric("macro"), X2, Y2, W2) != pytest.approx(expected)
    assert of(metric(kind="logit"), X2[:, 1] - X2[:, 0], Y2, W2) == pytest.approx(expected)


def test_top_k_is_that_of_scikit_learn_where_no_scores_are_equal() -> None:
    assert of(TopK(3), X12, Y12, W12) == pytest.approx(sk.top_k_accuracy_score(Y12, X12, k=3, sample_weight=W12, labels=range(12)))


@pytest.mark.parametrize(("theirs", "ours"), [(sk.mean_squared_error, MSE()), (sk.mean_absolute_error, MAE()), (sk.r2_score, R2())])
def test_errors_of_numbers_are_those_of_scikit_learn(theirs: Any, ours: Metric) -> None:
    for p, y, w in ((P, Y, W), (PS, YS, WS)):
        assert of(ours, p, y, w) == pytest.approx(theirs(y.double(), p.double(), sample_weight=w))
    assert of(RMSE(), P, Y) == pytest.approx(math.sqrt(sk.mean_squared_error(Y.double(), P.double())))


def test_the_mse_of_a_probability_is_the_brier_score() -> None:
    p = X2[:, 1].sigmoid()
    assert of(metric_of("mse", "probability"), p[:, None], Y2.float()) == pytest.approx(sk.brier_score_loss(Y2, p.double()))


@pytest.mark.parametrize(("center", "error"), [(0.0, 1e-6), (3e4, 1e-12)])
def test_r2_of_labels_far_from_zero_loses_as_many_digits_as_it_says(center: float, error: float) -> None:
    y, p = Y.double() + 3e4, P.double() + 3e4
    assert of(R2(center), p, y) == pytest.approx(of(R2(), P.double(), Y.double()), abs=error)


def test_r2_of_one_single_label_is_1_where_it_is_met_and_else_0() -> None:
    y = torch.full((5,), 1e6 + 0.1)
    assert of(R2(), y, y) == 1 and of(R2(), y + 1, y) == 0


# ---- order -----------------------------------------------------------------------------------------------------------


def theirs_of(metric: Metric) -> Any:
    return sk.roc_auc_score if isinstance(metric, AUC) else sk.average_precision_score


@pytest.mark.parametrize("rare", [0.5, 0.01])
@pytest.mark.parametrize("scale", [1.0, 3.0, 10.0])
@pytest.mark.parametrize("metric", [AUC(), AUCPR()], ids=["auc", "aucpr"])
def test_areas_are_those_of_scikit_learn_within_the_error_they_tell(metric: Any, scale: float, rare: float) -> None:
    rng = np.random.default_rng(0)
    y = rng.random(20_000) < rare
    z = scale * (rng.standard_normal(20_000) + y) + np.log(rare / (1 - rare))
    w = rng.random(20_000)
    expected = theirs_of(metric)(y, z, sample_weight=w)
    told = 1e-4 if isinstance(metric, AUC) else 1e-3
    target, weight = torch.tensor(y).long(), torch.tensor(w)
    for kind, output in (("logit", torch.tensor(z)), ("plain", torch.tensor(np.stack([0 * z, z], 1)))):
        assert of(dataclasses.replace(metric, kind=kind), output, target, weight) == pytest.approx(expected, abs=told)
    if scale < 10:  # where the sigmoid has not made them 1
        probability = torch.tensor(z).sigmoid()
        assert of(dataclasses.replace(metric, kind="probability"), probability, target, weight) == pytest.approx(expected, abs=told)
    coarse = dataclasses.replace(metric, bins=4, kind="logit")
    assert abs(of(coarse, torch.tensor(z), target, weight) - expected) > told  # negative control


def test_the_error_of_auc_is_at_most_half_the_pairs_that_share_a_bin() -> None:
    metric, x = AUC(bins=8), X2.diff(dim=1)[:, 0]
    sums = metric.sums(X2, Y2, ones(40))
    positive, negative = sums.reshape(2, -1)
    bound = float((positive * negative).sum() / positive.sum() / negative.sum()) / 2
    error = abs(metric.value(sums) - sk.roc_auc_score(Y2, x))
    assert 0 < error <= bound < 0.25


@pytest.mark.parametrize("metric", [AUC(bins=20, kind="logit"), AUCPR(bins=20, kind="logit")], ids=["auc", "aucpr"])
def test_areas_are_exact_for_scores_rounded_to_bins(metric: Any) -> None:
    z = X2.diff(dim=1)[:, 0].double()
    rounded = (10 * z / (3 + z.abs())).floor()
    assert of(metric, z, Y2, W2) == pytest.approx(theirs_of(metric)(Y2, rounded, sample_weight=W2))


@pytest.mark.parametrize("metric", [AUC(), AUCPR()], ids=["auc", "aucpr"])
def test_areas_of_certain_scores_and_of_one_class(metric: Any) -> None:
    certain = dataclasses.replace(metric, kind="probability")
    assert of(certain, torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0, 0, 1])) == 1
    assert of(dataclasses.replace(metric, kind="logit"), torch.tensor([-math.inf, 3.0, math.inf]), torch.tensor([0, 1, 1])) == 1
    assert math.isnan(of(metric, X2, torch.zeros_like(Y2)))


def test_a_small_score_and_its_neighbour_are_told_apart_where_bins_of_probability_would_not() -> None:
    z = torch.tensor([-9.0, -9.3, -12.0, 12.0, 13.0])
    assert of(AUC(kind="logit"), z, torch.tensor([1, 0, 0, 0, 1])) == sk.roc_auc_score([1, 0, 0, 0, 1], z)
    assert len({int(p * 10_000) for p in z.sigmoid()[:3].tolist()}) < 3  # negative control


def test_places_in_a_contest_and_what_they_are_worth() -> None:
    """The true candidate is first, second, third, and first beside an equal one."""
    x = torch.tensor([[9.0, 1, 2, 3], [8, 9, 2, 1], [5, 9, 8, 1], [9, 9, 1, 2]])
    true = torch.zeros(4, dtype=torch.int64)
    assert of(HitRatio(1), x, true) == 1 / 4
    assert of(HitRatio(2), x, true) == of(TopK(2), x, true) == 3 / 4
    assert of(NDCG(2), x, true) == pytest.approx((1 + 1 / math.log2(3) + 0 + 1 / math.log2(3)) / 4)
    assert of(NDCG(10), x, true) == pytest.approx((1 + 1 / math.log2(3) + 1 / 2 + 1 / math.log2(3)) / 4)


def test_ndcg_is_that_of_scikit_learn() -> None:
    gain = nn.functional.one_hot(Y12, 12)
    assert of(NDCG(5), X12, Y12, W12) == pytest.approx(sk.ndcg_score(gain, X12, k=5, sample_weight=W12))


def test_a_module_that_says_the_same_of_all_is_not_perfect() -> None:
    same = torch.zeros(5, 12), torch.zeros(5, dtype=torch.int64)
    assert of(HitRatio(10), *same) == of(TopK(5), *same) == of(NDCG(10), *same) == 0
    assert of(AUC(), torch.zeros(4, 2), torch.tensor([0, 1, 0, 1])) == 0.5


def test_nan_is_never_good() -> None:
    """A net that has diverged must not look right because NaN is not less than anything."""
    x = X12.clone()
    x[torch.arange(40), Y12] = math.nan
    for metric in (Accuracy(), F1(), TopK(), HitRatio(), NDCG()):
        assert of(metric, x, Y12) == 0
    assert math.isnan(of(AUC(), x[:, :2], Y2)) and math.isnan(of(MSE(), x[:, 0] * math.nan, Y))


# ---- a function of the user's ----------------------------------------------------------------------------------------


def test_the_mean_of_a_function_sees_all_that_the_module_returns_and_only_rows_that_count() -> None:
    seen = []

    def gap(output: dict[str, Tensor], target: Tensor) -> Tensor:
        seen.append(len(target))
        return (output["a"] - target).abs()

    metric = Mean("gap", gap, higher=False)
    weight = torch.tensor([2.0, 0.0, 1.0])
    assert of(metric, {"a": torch.tensor([1.0, 5.0, 3.0])}, torch.tensor([0.0, 0.0, 0.0]), weight) == pytest.approx(5 / 3)
    metric.sums({"a": torch.zeros(2)}, torch.zeros(2), torch.zeros(2))
    assert seen == [2]


def test_a_function_that_returns_no_number_for_each_row_is_refused_with_its_shape() -> None:
    with pytest.raises(RecipeError, match=r"metric 'm': the function returned a tensor of shape \[\] for 40 rows"):
        Mean("m", lambda p, y: (p - y).mean(), higher=False).sums(P, Y, W)


# ---- names and kinds -------------------------------------------------------------------------------------------------


def test_every_metric_has_the_name_it_is_found_by() -> None:
    assert all(metric.name == name and metric_of(name, metric.kinds[0]) == metric for name, metric in METRICS.items())
    assert {name for name, metric in METRICS.items() if not metric.higher} == {"mse", "rmse", "mae"}


@pytest.mark.parametrize(("name", "metric"), [("top3_accuracy", TopK(3)), ("hit_ratio@20", HitRatio(20)), ("ndcg@5", NDCG(5))])
def test_numbers_in_names_may_be_others(name: str, metric: Metric) -> None:
    assert metric_of(name) == metric and metric.name == name


def test_a_metric_takes_the_kind_of_the_output_unless_it_has_its_own() -> None:
    assert metric_of("auc", "logit") == AUC(kind="logit") == metric_of(AUC(), "logit")
    assert metric_of(AUC(bins=50, kind="probability"), "plain") == AUC(50, "probability")
    mean = Mean("m", per_row, higher=False)
    assert metric_of(mean, "logits") is mean


def test_a_value_of_the_users_own_needs_no_more_than_the_protocol() -> None:
    class Rows:
        name, higher = "rows", True

        def sums(self, output: Any, target: Tensor, weight: Tensor) -> Tensor:
            return weight.sum()[None]

        def value(self, sums: Tensor) -> float:
            return float(sums[0])

    assert of(metric_of(Rows(), "logits"), X3, Y3) == 40


def test_what_is_no_metric_is_refused_with_the_way_out() -> None:
    refused = {
        r"'acuracy' is not one of accuracy, .*, r2 \(with any number": lambda: metric_of("acuracy"),
        r"Accuracy is a class: give an object of it, Accuracy\(...\)": lambda: metric_of(Accuracy),
        r"the function per_row does not say .*: Mean\('per_row', per_row, higher=False\)": lambda: metric_of(per_row),
        "int is no metric: it has no 'name'": lambda: metric_of(3),
        "cannot have the name 'loss'": lambda: metric_of(Mean("loss", per_row, higher=False)),
        "kind 'other' is not one of": lambda: metric_of("auc", "other"),
        r"TopK\(k=0\): k must be at least 1": lambda: metric_of("top0_accuracy"),
        "bins is 1": lambda: AUC(bins=1),
        "average 'mean' is not one of": lambda: F1("mean"),
        "'mse' is of an output that is plain or probability; this one is of kind 'logits'": lambda: metric_of("mse", "logits"),
        "'hit_ratio@10' is of an output that is plain or logits .* of kind 'logit'": lambda: metric_of("hit_ratio@10", "logit"),
        "'r2' is of an output": lambda: metric_of("r2", "probability"),
    }
    for message, act in refused.items():
        with pytest.raises(RecipeError, match=message):
            act()


def test_shapes_that_do_not_fit_are_refused_with_their_numbers() -> None:
    refused = {
        r"'accuracy' takes scores .* returns \[40\] and the label is \[40\]; .* Accuracy\(kind='logit'\)": (Accuracy(), P, Y3),
        r"returns \[40, 1\] and the label is \[40\]": (AUC(), P[:, None], Y2),
        r"returns \[40, 3\] and the label is \[40, 3\]": (Accuracy(), X3, X3),
        r"'f1_binary' is of two classes, the module has 3": (F1("binary"), X3, Y3),
        r"'auc' is of two classes, the module has scores of 3": (AUC(), X3, Y3),
        r"takes one number a label, the module returns \[40, 3\] and the label is \[40\]": (Accuracy("logit"), X3, Y3),
        r"'mse' compares value by value, the module returns \[40, 3\] and the label is \[40\]": (MSE(), X3, Y),
        r"'top5_accuracy' is 1 for any module, of 3 scores a row": (TopK(), X3, Y3),
        r"'accuracy' takes one tensor, the module returns dict": (Accuracy(), {"a": X3}, Y3),
    }
    for message, (metric, output, target) in refused.items():
        with pytest.raises(RecipeError, match=message):
            of(metric, output, target)
    with pytest.raises(RecipeError, match=r"weights of shape \[3\] for 40 rows"):
        Accuracy().sums(X3, Y3, ones(3))


def test_labels_that_are_no_class_are_refused_with_their_value() -> None:
    for metric in (Accuracy(), F1(), TopK(2)):
        with pytest.raises(DataError, match=r"the label 3 is not one of the classes 0 .. 2"):
            of(metric, X3, Y3 + 1)
    with pytest.raises(DataError, match=r"the label 0\.5 is not one of the classes"):
        of(Accuracy("probability"), P.sigmoid(), torch.full((40,), 0.5))
    with pytest.raises(DataError, match=r"'auc' of a probability: the module returns values in -"):
        of(AUC(kind="probability"), P, Y2)
