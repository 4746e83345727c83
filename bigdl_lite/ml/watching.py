"""What an estimator's Params say of validation and its end, and who hears of a fit."""

from __future__ import annotations

import copy
from typing import Any

import torch
from pyspark.sql import DataFrame
from torch import nn

from bigdl_lite.data.columns import Column
from bigdl_lite.data.holdout import Holdout
from bigdl_lite.engine.recipe import Engine, Recipe, Start
from bigdl_lite.engine.watch import Watch
from bigdl_lite.errors import DataError, RecipeError
from bigdl_lite.ml.head import classifier_kind
from bigdl_lite.ml.rows import computed
from bigdl_lite.model.loss import balanced, rule_of
from bigdl_lite.model.metrics import metric_of
from bigdl_lite.observe.events import Callbacks
from bigdl_lite.observe.progress import Progress

_OF_CLASSES = (nn.CrossEntropyLoss, nn.NLLLoss, nn.BCEWithLogitsLoss, nn.BCELoss)


def watch_of(estimator: Any, loss: Any) -> Watch:
    """What is looked at during the fit. Raises RecipeError where Params contradict each other."""
    given = estimator._given
    fraction, column = given("validationFraction"), given("validationIndicatorCol")
    if fraction is not None and column:
        raise RecipeError("validationFraction and validationIndicatorCol both say which rows are held out: leave out one")
    validates = fraction is not None or bool(column)
    metrics = tuple(metric_of(metric, kind_of(loss)) for metric in given("metrics"))
    monitor, patience, best = given("monitor"), given("patience"), given("restoreBest")
    higher = next((metric.higher for metric in metrics if f"val_{metric.name}" == monitor), False)
    return Watch(
        validates, Holdout(fraction, given("seed")) if fraction is not None else None, metrics, given("validationTrigger"), monitor,
        higher, patience, given("minDelta"), patience is not None if best is None else best, given("endTrigger"),
        bool(given("callbacks")),
    )  # fmt: skip


def kind_of(loss: Any) -> str:
    """What an output is to a metric, told by the loss."""
    rule = rule_of(loss)
    return classifier_kind(rule) if isinstance(rule, _OF_CLASSES) else "plain"


def weighted_by_class(loss: Any, asked: Any, dataset: DataFrame, label: Column | None) -> Any:
    """The loss with weights for the classes. asked: "balanced", which costs a job that counts them, or a number for each class."""
    if asked is None:
        return loss
    if not isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss | nn.BCEWithLogitsLoss):
        raise RecipeError(f"classWeights is for class losses (CrossEntropyLoss, NLLLoss, BCEWithLogitsLoss), not {type(loss).__name__}")
    if getattr(loss, "pos_weight", None) is not None or loss.weight is not None:
        raise RecipeError(f"classWeights is given, and {type(loss).__name__} has weights of its own: leave out one")
    assert label is not None
    weights = _counted(dataset, label.name) if isinstance(asked, str) else [float(x) for x in asked]
    loss = copy.deepcopy(loss)
    if isinstance(loss, nn.BCEWithLogitsLoss):
        if len(weights) != 2:
            raise RecipeError(f"classWeights has {len(weights)} numbers; with BCEWithLogitsLoss there are two classes")
        loss.register_buffer("pos_weight", torch.tensor(weights[1] / weights[0]))
    else:
        loss.register_buffer("weight", torch.tensor(weights))
    return loss


def _counted(dataset: DataFrame, label: str) -> list[float]:
    with computed():
        rows = dataset.groupBy(dataset[f"`{label}`"].cast("double").alias("label")).count().collect()
    counts = {row["label"]: row["count"] for row in rows}
    wrong = [value for value in counts if value is None or value != int(value) or value < 0]
    if wrong:
        raise DataError(f"classWeights='balanced' counts labels 0, 1, 2, ...; column {label!r} has {wrong[0]}")
    return balanced([counts.get(float(i), 0) for i in range(int(max(counts, default=-1)) + 1)])


def ears_of(estimator: Any, recipe: Recipe, engine: Engine, start: Start) -> Callbacks:
    """Who hears of a fit: the bar, then the callbacks."""
    params = {p.name: value for p, value in estimator.extractParamMap().items() if isinstance(value, str | int | float | bool)}
    callbacks = [Progress(estimator._given("progress")), *estimator._given("callbacks")]
    return Callbacks(callbacks, recipe.run, engine.name, recipe.num_workers, params, start.now.step - start.now.at)
