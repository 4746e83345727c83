"""A loss as a metric: sums over rows that each have a weight.

    b  rows of one forward pass
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bigdl_lite.batch import Batch
from bigdl_lite.errors import RecipeError
from bigdl_lite.model.loss import Squeezed, by_row, check_output, rule_of, squeeze, summed, weight_of


@dataclass(frozen=True)
class Loss:
    """The mean of a loss over rows, each with its weight; what training calls the loss, where all weights are 1.

    torch's classes are asked for the loss of each row, in float64. Any other function is asked for its mean over b rows, as in
    training; or, where their weights differ, row by row.
    """

    loss: Any
    name: str = "loss"
    higher: bool = False

    def sums(self, output: Any, target: Tensor, weight: Tensor) -> Tensor:
        """[2]: the weighted losses, and what they are divided by."""
        b = len(weight)
        if not b:
            return torch.zeros(2, dtype=torch.float64)
        check_output(self.loss, output, Batch((target,), target))
        rule = rule_of(self.loss)
        if isinstance(rule, nn.Module) and getattr(rule, "reduction", None) == "mean" and isinstance(output, Tensor):
            each = by_row(self.loss)
            rule_of(each).double()
            rows = Batch((target,), target.double() if target.is_floating_point() else target, weight)
            divided = weight_of(each, rows)
            return torch.stack([summed(each, output.double(), rows, divided).double(), torch.tensor(divided, dtype=torch.float64)])
        if isinstance(self.loss, Squeezed):
            output = squeeze(output, target)
        if bool((weight == weight[0]).all()):
            return torch.stack([_mean(rule, output, target) * weight.sum(), weight.sum()])
        means = [_mean(rule, _row(output, i, b), target[i : i + 1]) for i in range(b)]
        return torch.stack([torch.stack(means) @ weight, weight.sum()])

    def value(self, sums: Tensor) -> float:
        return float(sums[0] / sums[1])


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
