"""Metrics by name, and what may stand in place of a name.

The names are those of METRICS; "top5_accuracy", "hit_ratio@10" and "ndcg@10" take any other number as well.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import is_dataclass, replace
from typing import Any

from bigdl_lite.errors import RecipeError
from bigdl_lite.model.classes import F1, Accuracy, Precision, Recall
from bigdl_lite.model.ranking import AUC, AUCPR, NDCG, HitRatio, TopK
from bigdl_lite.model.sums import KINDS, MAE, MSE, R2, RMSE, Mean, Metric
from bigdl_lite.model.torchmetric import TorchMetric, is_torchmetric

__all__ = [
    "AUC", "AUCPR", "F1", "MAE", "METRICS", "MSE", "NDCG", "R2", "RMSE", "Accuracy", "HitRatio", "Mean", "Metric", "Precision",
    "Recall", "TopK", "TorchMetric", "metric_of",
]  # fmt: skip

METRICS: dict[str, Metric] = {
    "accuracy": Accuracy(),
    "top5_accuracy": TopK(5),
    "f1": F1(),  # of class 1 where there are two classes, else the mean over classes
    "f1_macro": F1("macro"),
    "f1_micro": F1("micro"),
    "f1_weighted": F1("weighted"),
    "precision": Precision(),
    "precision_macro": Precision("macro"),
    "recall": Recall(),
    "recall_macro": Recall("macro"),
    "auc": AUC(),
    "aucpr": AUCPR(),
    "hit_ratio@10": HitRatio(10),
    "ndcg@10": NDCG(10),
    "mse": MSE(),
    "rmse": RMSE(),
    "mae": MAE(),
    "r2": R2(),
}

_NUMBERED: dict[str, Callable[[int], Metric]] = {r"top(\d+)_accuracy": TopK, r"hit_ratio@(\d+)": HitRatio, r"ndcg@(\d+)": NDCG}


def metric_of(metric: Any, kind: str = "plain") -> Metric:
    """The metric of a name, made to fit an output of this kind.

    metric   a name in METRICS, a value such as AUC(bins=1000) or Mean(...), a torchmetrics.Metric, or any object with
             name, higher, sums and value. Where its own kind is "plain", it becomes `kind`
    kind     what the output means: one of KINDS, as in ml/head.py

    Raises  RecipeError for unknown names, for what is no metric, and where the kind alone shows that they do not fit.
    """
    if kind not in KINDS:
        raise RecipeError(f"kind {kind!r} is not one of {KINDS}")
    found: Any = _named(metric) if isinstance(metric, str) else _given(metric)
    if is_dataclass(found) and not isinstance(found, type) and getattr(found, "kind", None) == "plain":
        found = replace(found, kind=kind)
    fits, kind = getattr(found, "kinds", KINDS), getattr(found, "kind", kind)
    if kind not in fits:
        raise RecipeError(f"metric {found.name!r} is of an output that is {' or '.join(fits)}; this one is of kind {kind!r}")
    if found.name == "loss":
        raise RecipeError("a metric cannot have the name 'loss', which is that of the loss itself: give it another")
    return found


def _named(name: str) -> Metric:
    if name in METRICS:
        return METRICS[name]
    for pattern, make in _NUMBERED.items():
        number = re.fullmatch(pattern, name)
        if number:
            return make(int(number[1]))
    raise RecipeError(f"metric {name!r} is not one of {', '.join(METRICS)} (with any number in place of 5 and 10)")


def _given(metric: Any) -> Any:
    if is_torchmetric(metric):
        return TorchMetric(metric)
    if isinstance(metric, type):
        raise RecipeError(f"{metric.__name__} is a class: give an object of it, {metric.__name__}(...)")
    missing = [part for part in ("name", "higher", "sums", "value") if not hasattr(metric, part)]
    if not missing:
        return metric
    if callable(metric):
        name = getattr(metric, "__name__", type(metric).__name__)
        raise RecipeError(
            f"the function {name} does not say whether more is better: Mean({name!r}, {name}, higher=False), or True, takes its mean "
            "over rows"
        )
    raise RecipeError(f"{type(metric).__name__} is no metric: it has no {missing[0]!r}; the names are {', '.join(METRICS)}")
