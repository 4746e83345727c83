"""One worker's copy of the module, alive: batches in, summed gradients out.

The parameters are views into a flat vector of weights and the gradients views into a flat vector of gradients, so a
backward pass writes straight to where the others will read.

    n  length of the flat vectors      b  rows of this worker's part of the batch
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bigdl_lite.batch import Batch
from bigdl_lite.errors import DataError, RecipeError
from bigdl_lite.model.batchnorm import SyncBatchNorm
from bigdl_lite.model.layout import Blueprint, read_buffers, write_buffers

Loss = Callable[[Any, Tensor], Tensor]

# these broadcast a [b] target against a [b, 1] output into [b, b] and train nonsense without an error
ELEMENTWISE_LOSSES = (
    nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.BCELoss, nn.BCEWithLogitsLoss, nn.PoissonNLLLoss,
    nn.SoftMarginLoss,
)  # fmt: skip
_CLASS_INDEX = (nn.CrossEntropyLoss, nn.NLLLoss)


@dataclass(frozen=True)
class Squeezed:
    """A loss that sees an output of [b, 1] as [b] where the label is [b]."""

    loss: Loss

    def __call__(self, output: Any, target: Tensor) -> Tensor:
        return self.loss(squeeze(output, target), target)


def squeeze(output: Any, target: Tensor | None) -> Any:
    fits = isinstance(output, Tensor) and target is not None and output.ndim == 2 and output.shape[1] == 1 and target.ndim == 1
    return output.squeeze(1) if fits else output


class Replica:
    """weights [n] and gradient [n] are shared with the caller; `module` lives on their device and is in training mode.

    gradient is None where nothing will be computed (on a driver that only advances the weights), or until write_to.
    """

    def __init__(
        self, blueprint: Blueprint, weights: Tensor, gradient: Tensor | None, constants: dict[str, Tensor], loss: Loss
    ) -> None:
        rule = loss.loss if isinstance(loss, Squeezed) else loss
        if getattr(rule, "reduction", "mean") == "sum":
            raise RecipeError(f"{type(rule).__name__} sums over the rows; it must return their mean (reduction='mean')")
        self.layout = blueprint.layout
        self.weights = weights
        self.gradient = gradient
        self.loss = loss
        self.module = blueprint.build(weights, constants, gradient).to(weights.device).train()
        self.parameters = [p for p in self.module.parameters() if p.requires_grad]
        self._meets = any(isinstance(m, SyncBatchNorm) for m in self.module.modules())

    @property
    def buffers(self) -> Tensor:
        return read_buffers(self.module, self.layout)

    @buffers.setter
    def buffers(self, values: Tensor) -> None:
        write_buffers(self.module, self.layout, values)

    def write_to(self, gradient: Tensor) -> None:
        """From now on the backward pass writes into `gradient` [n]."""
        if self.gradient is None or self.gradient.data_ptr() != gradient.data_ptr():
            for p, span in zip(self.parameters, self.layout.parameters, strict=True):
                p.grad = span.view(gradient)
        self.gradient = gradient

    def backward(self, batch: Batch, seed: int) -> float:
        """Fills `gradient` with the gradient summed over the rows of `batch`; returns the loss summed over them.

        The loss is a mean over rows, so it is multiplied by weight(batch) before the backward pass: sums can be added
        across workers and divided once. Random numbers (dropout) depend on `seed` alone.
        """
        self.gradient.zero_()
        # a module whose layers meet the other ranks in forward must be entered even with nothing to compute
        if not batch.rows and not self._meets:
            return 0.0
        seed_here(self.weights.device, seed)
        output = self.module(*batch.inputs)
        if not batch.rows:
            sum(x.sum() for x in _tensors(output)).mul(0.0).backward()
            return 0.0
        self._check(output, batch)
        loss = self.loss(output, batch.target)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise RecipeError(f"the loss returned {got}; it must return one number, the mean over the rows (reduction='mean')")
        if not loss.requires_grad:
            raise RecipeError("the loss does not depend on any trainable parameter; is the forward pass under no_grad?")
        weight = self.weight(batch)
        if not weight:  # every row has ignore_index: the mean over none of them is not a number
            return 0.0
        (loss * weight).backward()
        return float(loss.detach()) * weight

    def weight(self, batch: Batch) -> float:
        """What the loss divides by to be a mean over this batch.

        The number of rows; for class losses with weights or with rows to ignore, the sum of the weights of the labels that
        count, so that a mean over parts is the mean over the whole.
        """
        rule, target = self.loss, batch.target
        if not isinstance(rule, _CLASS_INDEX) or target is None or target.is_floating_point() or not batch.rows:
            return float(batch.rows)
        counts = target != rule.ignore_index
        if rule.weight is not None:
            return float(rule.weight.to(target.device)[target[counts]].sum(dtype=torch.float64))
        # a label with more dimensions is one row in the mean for each of its values
        return float(counts.sum())

    def weighs(self, share: Batch) -> bool:
        """Whether weight() may be something else than the number of rows for some batch of this share."""
        rule, target = self.loss, share.target
        if not isinstance(rule, _CLASS_INDEX) or target is None or target.is_floating_point():
            return False
        return rule.weight is not None or target.ndim > 1 or self.weight(share) != share.rows

    def _check(self, output: Any, batch: Batch) -> None:
        target = batch.target
        for x in _tensors(output):
            if x.ndim == 0 or x.shape[0] != batch.rows:
                raise DataError(
                    f"forward returned a tensor of shape {list(x.shape)} for {batch.rows} rows; its first dimension must be the rows"
                )
        if not isinstance(output, Tensor) or target is None:
            return
        rule = self.loss
        if isinstance(rule, Squeezed):
            rule, output = rule.loss, squeeze(output, target)
        if isinstance(rule, ELEMENTWISE_LOSSES) and output.shape != target.shape:
            raise DataError(
                f"forward returns {list(output.shape)} but the label is {list(target.shape)}, and {type(rule).__name__} "
                "needs one shape: squeeze or reshape the output (TorchRegressor does it for a single output)"
            )
        if isinstance(rule, _CLASS_INDEX) and not target.is_floating_point() and output.ndim == 2:
            low, high = int(target.min()), int(target.max())
            ignored = rule.ignore_index
            if (low < 0 and low != ignored) or (high >= output.shape[1] and high != ignored):
                wrong = low if low < 0 else high
                raise DataError(
                    f"the label column has the value {wrong}, the module has {output.shape[1]} outputs: "
                    f"labels must be 0 .. {output.shape[1] - 1}"
                )


def seed_here(device: torch.device, seed: int) -> None:
    """Seeds the generator that kernels of this device draw from.

    Not torch.manual_seed: for every kind of device that is not in use, that remembers the call and its stack for later,
    which costs more than a small forward pass, and memory without end.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output if isinstance(output, tuple | list) else ()
    return [x for x in values if isinstance(x, Tensor)]
