"""Metrics that see only the order of scores: who is among the first, and the areas under curves. As sums over rows.

    first k     a row is a contest of C candidates      TopK, HitRatio, NDCG      2 sums
    curves      all rows are one contest                AUC, AUCPR                2 bins sums: a histogram of each class

Inputs, kinds and `ignore` are those of classes.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from bigdl_lite.errors import RecipeError
from bigdl_lite.model.classes import check_kind, hits, labelled, sums_by
from bigdl_lite.model.sums import KINDS, ratio

_SCORES = ("plain", "logits", "log-probabilities")  # kinds with a score for each candidate


# ---- the first k -----------------------------------------------------------------------------------------------------


def _place(scores: Tensor, labels: Tensor) -> Tensor:
    """How many others [r] are ahead of the true one: 0 is the first place.

    Equal scores are ahead, or a net that says the same of all candidates would look perfect; so is NaN.
    """
    true = scores.gather(1, labels[:, None])
    return (~(scores < true)).sum(1) - 1


def _require_places(metric: Any, k: int, output: Any) -> None:
    if k < 1:
        raise RecipeError(f"{type(metric).__name__}(k={k}): k must be at least 1")
    if isinstance(output, Tensor) and output.ndim > 1 and 2 <= output.shape[1] <= k:
        raise RecipeError(f"metric {metric.name!r} is 1 for any module, of {output.shape[1]} scores a row: k must be below it")


@dataclass(frozen=True)
class TopK:
    """The share of labels whose score is among the k largest. Equal scores count against: see _place."""

    k: int = 5
    kind: str = "plain"
    ignore: int = -100
    higher: ClassVar[bool] = True
    kinds: ClassVar[tuple[str, ...]] = _SCORES

    def __post_init__(self) -> None:
        check_kind(self.kind)
        _require_places(self, self.k, None)

    @property
    def name(self) -> str:
        return f"top{self.k}_accuracy"

    def sums(self, output: Any, target: Tensor, weight: Tensor) -> Tensor:
        _require_places(self, self.k, output)
        scores, labels, weight = labelled(self, output, target, weight)
        return hits(_place(scores, labels) < self.k, weight)

    def value(self, sums: Tensor) -> float:
        return ratio(*sums.tolist())


@dataclass(frozen=True)
class HitRatio(TopK):
    """The share of contests that the true candidate ends among the first k.

    A row is one contest, not one pair of user and item: output [b, 1 + negatives] holds the scores of its candidates, the
    label [b] int64 says which of them is the true one (0 in all rows, where it is put first). The place of the true one is
    the number of scores that are not below its own, itself left out: equal scores count against it.
    """

    k: int = 10

    @property
    def name(self) -> str:
        return f"hit_ratio@{self.k}"


@dataclass(frozen=True)
class NDCG(TopK):
    """The mean over contests of 1 / log2(2 + place) where the true candidate is among the first k, else 0; see HitRatio.

    Source: He et al., "Neural Collaborative Filtering", WWW 2017: with one true candidate the ideal gain is 1.
    """

    k: int = 10

    @property
    def name(self) -> str:
        return f"ndcg@{self.k}"

    def sums(self, output: Any, target: Tensor, weight: Tensor) -> Tensor:
        scores, labels, weight = labelled(self, output, target, weight)
        place = _place(scores, labels)
        gain = 1 / (2 + place.double()).log2()
        return hits(torch.where(place < self.k, gain, 0.0), weight)


# ---- areas under curves ----------------------------------------------------------------------------------------------


def _histograms(metric: Any, output: Any, target: Tensor, weight: Tensor) -> Tensor:
    """[2 bins] float64: the weight of labels 1 in each bin of the score, then that of labels 0. NaN where a score is.

    The score is the log-odds z of class 1; bins have equal width in z / (3 + |z|), which goes from -1 to 1 as the sigmoid
    goes from 0 to 1, but more slowly: of bins of equal width in the probability, a few would hold all rows where the class is
    rare, or where the net is sure of itself.
    """
    scores, labels, weight = labelled(metric, output, target, weight)
    if scores.shape[1] != 2:
        raise RecipeError(f"metric {metric.name!r} is of two classes, the module has scores of {scores.shape[1]}")
    z = scores.double().diff(dim=1).squeeze(1)
    if bool(z.isnan().any()):
        return z.new_full((2 * metric.bins,), math.nan)
    at = (1 + z.sign() * (1 - 3 / (3 + z.abs()))) / 2  # infinite scores lie at 0 and 1
    index = (at * metric.bins).long().clamp(max=metric.bins - 1)
    return sums_by(index + metric.bins * (1 - labels), weight, 2 * metric.bins)


def _check_bins(bins: int) -> None:
    if bins < 2:
        raise RecipeError(f"bins is {bins}, must be at least 2")


@dataclass(frozen=True)
class AUC:
    """Area under the ROC curve: the chance that a positive row has a larger score than a negative one; an equal one counts half.

    Scores in one bin are equal, so that the error is at most half the share of pairs (positive, negative) whose rows share
    a bin. It is below 1e-4 with 10,000 bins and logits whose standard deviation is 1 or more; where all scores are almost
    the same (0.01), more bins help. NaN where there is one class only.

    Cost    16 bytes a bin, of each worker.
    """

    bins: int = 10_000
    kind: str = "plain"
    ignore: int = -100
    name: ClassVar[str] = "auc"
    higher: ClassVar[bool] = True
    kinds: ClassVar[tuple[str, ...]] = KINDS

    def __post_init__(self) -> None:
        check_kind(self.kind)
        _check_bins(self.bins)

    def sums(self, output: Any, target: Tensor, weight: Tensor) -> Tensor:
        return _histograms(self, output, target, weight)

    def value(self, sums: Tensor) -> float:
        positive, negative = sums.double().reshape(2, -1)
        below = negative.cumsum(0) - negative / 2
        return ratio(float((positive * below).sum()), float(positive.sum() * negative.sum()))


@dataclass(frozen=True)
class AUCPR:
    """Average precision, the area under the curve of precision over recall: the mean over positive rows of the precision there.

    Scores in one bin are equal: it adds its share of the positives times the precision at its lower end, as scikit-learn does
    for equal scores. The error is below 1e-3 with 10,000 bins, logits whose standard deviation is 1 or more and a hundred
    positives or more. NaN without any.

    Cost    16 bytes a bin, of each worker.
    """

    bins: int = 10_000
    kind: str = "plain"
    ignore: int = -100
    name: ClassVar[str] = "aucpr"
    higher: ClassVar[bool] = True
    kinds: ClassVar[tuple[str, ...]] = KINDS

    def __post_init__(self) -> None:
        check_kind(self.kind)
        _check_bins(self.bins)

    def sums(self, output: Any, target: Tensor, weight: Tensor) -> Tensor:
        return _histograms(self, output, target, weight)

    def value(self, sums: Tensor) -> float:
        positive, negative = sums.double().reshape(2, -1).flip(1)  # from the largest score down
        true, wrong = positive.cumsum(0), negative.cumsum(0)
        precision = torch.where(true > 0, true / (true + wrong), 0.0)
        return ratio(float((positive * precision).sum()), float(true[-1]))
