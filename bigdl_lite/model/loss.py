"""What a loss is to a replica: one number, the mean over rows; or one for each row, where rows count differently.

    b  rows      C  classes
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bigdl_lite.batch import Batch
from bigdl_lite.errors import DataError, RecipeError

Loss = Callable[[Any, Tensor], Tensor]

# these broadcast a [b] target against a [b, 1] output into [b, b] and train nonsense without an error
ELEMENTWISE_LOSSES = (
    nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.BCELoss, nn.BCEWithLogitsLoss, nn.PoissonNLLLoss,
    nn.SoftMarginLoss,
)  # fmt: skip
CLASS_LOSSES = (nn.CrossEntropyLoss, nn.NLLLoss)


@dataclass(frozen=True)
class Squeezed:
    """A loss that sees an output of [b, 1] as [b] where the label is [b]."""

    loss: Loss

    def __call__(self, output: Any, target: Tensor) -> Tensor:
        return self.loss(squeeze(output, target), target)


@dataclass(frozen=True)
class Each:
    """The loss of k models that are trained together, of outputs [b, k, ...] (model/stack.py): each model's own, and their sum."""

    loss: Loss
    k: int

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        return sum((self.loss(x, target) for x in output.unbind(1)), start=output.new_zeros(()))


def squeeze(output: Any, target: Tensor | None) -> Any:
    fits = isinstance(output, Tensor) and target is not None and output.ndim == 2 and output.shape[1] == 1 and target.ndim == 1
    return output.squeeze(1) if fits else output


def rule_of(loss: Loss) -> Any:
    """The loss that the user gave."""
    while isinstance(loss, Squeezed | Each):
        loss = loss.loss
    return loss


def by_row(loss: Loss) -> Loss:
    """The loss with a value for each row, for rows that have weights: torch's losses are asked not to reduce.

    Any other callable must return [b] itself, which shows when it is called.
    """
    if isinstance(loss, Squeezed):
        return Squeezed(by_row(loss.loss))
    if not hasattr(loss, "reduction"):
        return loss
    if loss.reduction == "sum":
        raise RecipeError(f"{type(loss).__name__} sums over the rows; leave its reduction at 'mean'")
    made = copy.deepcopy(loss)
    made.reduction = "none"
    return made


def class_rule(loss: Loss, target: Tensor | None) -> Any:
    """The loss, where it is one of class indices and the target holds such; else None."""
    rule = rule_of(loss)
    return rule if isinstance(rule, CLASS_LOSSES) and target is not None and not target.is_floating_point() else None


def weight_of(loss: Loss, batch: Batch) -> float:
    """What the loss divides by to be a mean over this batch.

    The number of rows, or the sum of their weights; for class losses with weights or with rows to ignore, the sum of the weights
    of the labels that count, so that a mean over parts is the mean over the whole. A label with more dimensions is one row in the
    mean for each of its values.
    """
    rule, target, weight = class_rule(loss, batch.target), batch.target, batch.weight
    if rule is None or not batch.rows:
        return float(batch.rows) if weight is None else float(weight.sum(dtype=torch.float64))
    assert target is not None
    counts = target != rule.ignore_index
    if rule.weight is None and weight is None:
        return float(counts.sum())
    each = counts.double()
    if rule.weight is not None:
        each[counts] = rule.weight.to(target.device)[target[counts]].double()
    return float((each if weight is None else each.reshape(len(each), -1).sum(1) * weight).sum())


def summed(loss: Loss, output: Any, batch: Batch, weight: float) -> Tensor:
    """The loss summed over the rows of `batch`, of weight_of() `weight`: a tensor of one number; [k] for Each of k models."""
    if isinstance(loss, Each):
        return torch.stack([summed(loss.loss, x, batch, weight).reshape(()) for x in output.unbind(1)])
    value = loss(output, batch.target)
    if batch.weight is None:
        if not isinstance(value, Tensor) or value.numel() != 1:
            told = _shown(value)
            raise RecipeError(f"the loss returned {told}; it must return one number, the mean over the rows (reduction='mean')")
        return value * weight
    if not isinstance(value, Tensor) or not value.ndim or len(value) != batch.rows:
        raise RecipeError(
            f"the loss returned {_shown(value)} for {batch.rows} rows; with weightCol it must return a value for each, [{batch.rows}]"
        )
    each = value.reshape(batch.rows, -1)
    each = each.sum(1) if class_rule(loss, batch.target) is not None else each.mean(1)
    return (each * batch.weight).sum()


def check_output(loss: Loss, output: Any, batch: Batch) -> None:
    """Raises DataError where what the module returned for these rows is not what its loss can compare with the label."""
    target = batch.target
    for x in tensors(output):
        if x.ndim == 0 or x.shape[0] != batch.rows:
            raise DataError(
                f"forward returned a tensor of shape {list(x.shape)} for {batch.rows} rows; its first dimension must be the rows"
            )
    if not isinstance(output, Tensor) or target is None:
        return
    if isinstance(loss, Each):
        loss, output = loss.loss, output[:, 0]
    rule = rule_of(loss)
    if isinstance(loss, Squeezed):
        output = squeeze(output, target)
    if isinstance(rule, ELEMENTWISE_LOSSES) and output.shape != target.shape:
        raise DataError(
            f"forward returns {list(output.shape)} but the label is {list(target.shape)}, and {type(rule).__name__} "
            "needs one shape: squeeze or reshape the output (TorchRegressor does it for a single output)"
        )
    if class_rule(loss, target) is not None and output.ndim >= 2 and target.numel():
        low, high = int(target.min()), int(target.max())
        ignored = rule.ignore_index
        if (low < 0 and low != ignored) or (high >= output.shape[1] and high != ignored):
            wrong = low if low < 0 else high
            raise DataError(
                f"the label column has the value {wrong}, the module has {output.shape[1]} outputs: "
                f"labels must be 0 .. {output.shape[1] - 1}"
            )


def tensors(output: Any) -> list[Tensor]:
    """The tensors that a module's output is made of."""
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output if isinstance(output, tuple | list) else ()
    return [x for x in values if isinstance(x, Tensor)]


def _shown(value: Any) -> str:
    return f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def balanced(counts: Sequence[int]) -> list[float]:
    """Weights for C classes of so many rows each, by which all count the same: rows / (C * rows of the class).

    Source: the "balanced" heuristic of King and Zeng, "Logistic Regression in Rare Events Data", 2001. DataError for an empty class.
    """
    empty = [i for i, count in enumerate(counts) if not count]
    if empty:
        raise DataError(f"class {empty[0]} of {len(counts)} has no row, so that no weight balances it: give classWeights as numbers")
    return [sum(counts) / (len(counts) * count) for count in counts]
