"""A loss as a metric: sums over rows that each have a weight.

    b  rows of one forward pass
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bigdl_lite.errors import DataError, RecipeError
from bigdl_lite.model.replica import ELEMENTWISE_LOSSES, Squeezed, squeeze

CLASS_INDEX = (nn.CrossEntropyLoss, nn.NLLLoss)  # their mean is divided by the weights of the labels that count


@dataclass(frozen=True)
class Loss:
    """The mean of a loss over rows, each with its weight; what training calls the loss, where all weights are 1.

    torch's classes with a `reduction` are asked for the loss of each row, in float64. Any other function is asked for its mean over
    b rows, as in training; or, where their weights differ, row by row.
    """

    loss: Any
    name: str = "loss"
    higher: bool = False

    def sums(self, output: Any, target: Tensor, weight: Tensor) -> Tensor:
        """[2]: the weighted losses, and what they are divided by."""
        b = len(weight)
        if not b:
            return torch.zeros(2, dtype=torch.float64)
        rule = self.loss
        if isinstance(rule, Squeezed):
            rule, output = rule.loss, squeeze(output, target)
        if isinstance(rule, ELEMENTWISE_LOSSES) and isinstance(output, Tensor) and output.shape != target.shape:
            raise DataError(
                f"forward returns {list(output.shape)} but the label is {list(target.shape)}, and {type(rule).__name__} needs one shape"
            )
        _check_classes(rule, output, target)
        found = _by_row(rule, output, target)
        if found is not None:
            values, parts = found
            return torch.stack([values @ weight, parts @ weight])
        if bool((weight == weight[0]).all()):
            return torch.stack([_mean(rule, output, target) * weight.sum(), weight.sum()])
        rows = [_mean(rule, _row(output, i, b), target[i : i + 1]) for i in range(b)]
        return torch.stack([torch.stack(rows) @ weight, weight.sum()])

    def value(self, sums: Tensor) -> float:
        return float(sums[0] / sums[1])


def _check_classes(rule: Any, output: Any, target: Tensor) -> None:
    if not isinstance(rule, CLASS_INDEX) or target.is_floating_point() or not isinstance(output, Tensor) or output.ndim < 2:
        return
    wrong = target[((target < 0) | (target >= output.shape[1])) & (target != rule.ignore_index)]
    if len(wrong):
        raise DataError(
            f"the label column has the value {int(wrong[0])}, the module has {output.shape[1]} outputs: labels must be 0 .. "
            f"{output.shape[1] - 1}"
        )


def _by_row(rule: Any, output: Any, target: Tensor) -> tuple[Tensor, Tensor] | None:
    """The losses of the values of each row, summed [b], and what the mean divides them by [b]; None where they cannot be told."""
    if not (isinstance(rule, nn.Module) and type(rule).__module__.startswith("torch.") and isinstance(output, Tensor)):
        return None
    if getattr(rule, "reduction", None) != "mean":
        return None
    one = copy.deepcopy(rule).double()
    one.reduction = "none"
    target = target.double() if target.is_floating_point() else target
    values = one(output.double(), target)
    if values.ndim == 0 or len(values) != len(output):
        return None
    parts = torch.ones_like(values)
    if isinstance(rule, CLASS_INDEX) and not target.is_floating_point():
        counts = target != rule.ignore_index
        parts = counts.double() if one.weight is None else one.weight[target.where(counts, torch.zeros_like(target))] * counts
    return values.reshape(len(output), -1).sum(1), parts.reshape(len(output), -1).sum(1)


def _mean(rule: Any, output: Any, target: Tensor) -> Tensor:
    value = rule(output, target)
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = f"a tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise RecipeError(f"the loss returned {got}; it must return one number, the mean over the rows (reduction='mean')")
    return value.double().reshape(())


def _row(output: Any, i: int, b: int) -> Any:
    """The i-th of b rows, in the form that the module gave it."""
    if isinstance(output, Tensor):
        return output[i : i + 1] if output.ndim and len(output) == b else output
    if isinstance(output, dict):
        made = copy.copy(output)
        made.update({name: _row(x, i, b) for name, x in output.items()})
        return made
    if isinstance(output, tuple | list):
        parts = [_row(x, i, b) for x in output]
        return type(output)(*parts) if hasattr(output, "_fields") else type(output)(parts)
    return output
