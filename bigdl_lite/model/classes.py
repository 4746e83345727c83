"""Metrics of classes, as sums over rows.

    output                                 target                             classes
    [b, C] or [b, C, ...] scores           [b] or [b, ...]  0 .. C - 1        C: logits, log-probabilities, or plain
    one number a label, as the target      0 or 1                             2: kind "logit" or "probability"

    b  rows      C  classes      r  labels: one a row, or b times the places of a row      k  sums

One number z becomes the scores (0, log-odds of z), so that all below see classes: it says class 1 above logit 0, which is
probability 0.5. Labels equal to `ignore` are left out, as CrossEntropyLoss leaves them out. Where a label has NaN among
its scores, no class is predicted for it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from bigdl_lite.errors import DataError, RecipeError
from bigdl_lite.model.loss import squeeze
from bigdl_lite.model.sums import KINDS, kept, ratio, require_tensor

_ONE_NUMBER = ("logit", "probability")
_AVERAGES = (None, "binary", "macro", "micro", "weighted")


def labelled(metric: Any, output: Any, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Every label that counts: scores [r, C], labels [r] int64, weight [r] float64.

    Raises RecipeError where the shapes are not those of metric.kind, DataError where a label is no class.
    """
    name, output = metric.name, require_tensor(metric.name, output)
    if metric.kind in _ONE_NUMBER:
        output = squeeze(output, target)
        if output.shape != target.shape:
            raise RecipeError(
                f"metric {name!r} of a {metric.kind} takes one number a label, the module returns {list(output.shape)} and the "
                f"label is {list(target.shape)}"
            )
    elif output.ndim < 2 or output.shape[1] < 2 or output.shape[:1] + output.shape[2:] != target.shape:
        hint = f"; where one number is a logit or a probability, say so: {type(metric).__name__}(kind='logit')"
        raise RecipeError(
            f"metric {name!r} takes scores [rows, classes >= 2, ...] and labels [rows, ...], the module returns {list(output.shape)} "
            f"and the label is {list(target.shape)}{hint if 'logit' in metric.kinds else ''}"
        )
    output, target, weight = kept(output, target, weight)
    if metric.kind in _ONE_NUMBER:
        scores = _two(name, metric.kind, output.double().reshape(-1))
    else:
        scores = output.movedim(1, -1).reshape(-1, output.shape[1])
    labels = target.reshape(-1)
    weight = weight.repeat_interleave(math.prod(target.shape[1:]))
    counts = labels != metric.ignore
    if not bool(counts.all()):
        scores, labels, weight = scores[counts], labels[counts], weight[counts]
    return scores, _classes(name, labels, scores.shape[1]), weight


def _two(name: str, kind: str, z: Tensor) -> Tensor:
    """One number [r] for two classes, as scores [r, 2] float64 whose softmax is their probability."""
    if kind == "probability":
        if bool(((z < 0) | (z > 1)).any()):
            raise DataError(f"metric {name!r} of a probability: the module returns values in {float(z.min()):g} .. {float(z.max()):g}")
        z = z.log() - (-z).log1p()
    return torch.stack([torch.zeros_like(z), z], 1)


def _classes(name: str, labels: Tensor, classes: int) -> Tensor:
    """labels [r] as int64; doubles are fine where they are whole, as pipelines of pyspark.ml have them."""
    index = labels.long()
    wrong = (index < 0) | (index >= classes) | (index != labels)
    if bool(wrong.any()):
        raise DataError(f"metric {name!r}: the label {labels[wrong][0].item():g} is not one of the classes 0 .. {classes - 1}")
    return index


def _predicted(scores: Tensor) -> Tensor:
    """The class [r] of the largest score, the first of equal ones; -1 where there is NaN among them."""
    return scores.argmax(1).masked_fill(scores.isnan().any(1), -1)


def check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise RecipeError(f"kind {kind!r} is not one of {KINDS}")


def sums_by(index: Tensor, weight: Tensor, n: int) -> Tensor:
    """[n] float64: the sum of the weights [r] at each index [r]. (bincount of nothing would be integers.)"""
    return weight.new_zeros(n).index_add(0, index, weight)


def hits(hit: Tensor, weight: Tensor) -> Tensor:
    return torch.stack([(hit * weight).sum(), weight.sum()])


@dataclass(frozen=True)
class Accuracy:
    """The share of labels that are the class of the largest score."""

    kind: str = "plain"
    ignore: int = -100
    name: ClassVar[str] = "accuracy"
    higher: ClassVar[bool] = True
    kinds: ClassVar[tuple[str, ...]] = KINDS

    def __post_init__(self) -> None:
        check_kind(self.kind)

    def sums(self, output: Any, target: Tensor, weight: Tensor) -> Tensor:
        scores, labels, weight = labelled(self, output, target, weight)
        return hits(_predicted(scores) == labels, weight)

    def value(self, sums: Tensor) -> float:
        return ratio(*sums.tolist())


# ---- counts of each class --------------------------------------------------------------------------------------------


def _counts(metric: Any, output: Any, target: Tensor, weight: Tensor) -> Tensor:
    """[3 C]: of each class the weight of true positives, then of false positives, then of false negatives."""
    scores, labels, weight = labelled(metric, output, target, weight)
    classes = scores.shape[1]
    if metric.average == "binary" and classes != 2:
        raise RecipeError(f"metric {metric.name!r} is of two classes, the module has {classes}: take average='macro' or 'micro'")
    predicted = _predicted(scores)
    hit = predicted == labels
    wrong = ~hit & (predicted >= 0)
    return torch.cat([
        sums_by(labels[hit], weight[hit], classes),
        sums_by(predicted[wrong], weight[wrong], classes),
        sums_by(labels[~hit], weight[~hit], classes),
    ])  # fmt: skip


def _check_average(average: str | None) -> None:
    if average not in _AVERAGES:
        raise RecipeError(f"average {average!r} is not one of {_AVERAGES}")


def _averaged(sums: Tensor, average: str | None, beside: tuple[float, float]) -> float:
    """The average over classes of t / (t + beside . (false positives, false negatives)), t the true positives; 0 where t is 0.

    Classes that are neither predicted nor there are left out of the macro average, as in scikit-learn.
    """
    counts = sums.double().reshape(3, -1)
    if not counts.sum():
        return math.nan
    if average == "micro":
        counts = counts.sum(1, keepdim=True)
    true, wrong, missed = counts
    bottom = true + beside[0] * wrong + beside[1] * missed
    score = torch.where(true > 0, true / bottom, 0.0)
    if average == "binary" or (average is None and len(score) == 2):
        return float(score[1])
    share = true + missed if average == "weighted" else (counts.sum(0) > 0).double()
    return float((score * share).sum() / share.sum())


def _named(name: str, average: str | None) -> str:
    return f"{name}_{average}" if average else name


@dataclass(frozen=True)
class _OfCounts:
    """average and kind as told by F1; parts: how much of precision and of recall is in the harmonic mean."""

    average: str | None = None
    kind: str = "plain"
    ignore: int = -100
    higher: ClassVar[bool] = True
    kinds: ClassVar[tuple[str, ...]] = KINDS
    word: ClassVar[str]
    parts: ClassVar[tuple[float, float]]

    def __post_init__(self) -> None:
        check_kind(self.kind)
        _check_average(self.average)

    @property
    def name(self) -> str:
        return _named(self.word, self.average)

    def sums(self, output: Any, target: Tensor, weight: Tensor) -> Tensor:
        return _counts(self, output, target, weight)

    def value(self, sums: Tensor) -> float:
        return _averaged(sums, self.average, self.parts)


@dataclass(frozen=True)
class F1(_OfCounts):
    """The harmonic mean of precision and recall.

    average  "binary" (that of class 1), "macro" (the mean over classes), "weighted" (by how often they are there),
             "micro" (of the counts of all classes together); None is binary for two classes and macro for more
    """

    word: ClassVar[str] = "f1"
    parts: ClassVar[tuple[float, float]] = (0.5, 0.5)


@dataclass(frozen=True)
class Precision(_OfCounts):
    """Of what is predicted to be a class, the share that is; average as in F1."""

    word: ClassVar[str] = "precision"
    parts: ClassVar[tuple[float, float]] = (1.0, 0.0)


@dataclass(frozen=True)
class Recall(_OfCounts):
    """Of what is a class, the share that is predicted to be; average as in F1."""

    word: ClassVar[str] = "recall"
    parts: ClassVar[tuple[float, float]] = (0.0, 1.0)
