"""One worker's copy of the module, alive: batches in, summed gradients out.

The parameters are views into a flat vector of weights and the gradients views into a flat vector of gradients, so a
backward pass writes straight to where the others will read.

    n  length of the flat vectors      b  rows of this worker's part of the batch
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bigdl_lite.batch import Batch
from bigdl_lite.errors import RecipeError
from bigdl_lite.model.batchnorm import SyncBatchNorm
from bigdl_lite.model.layout import Blueprint, read_buffers, write_buffers
from bigdl_lite.model.loss import Each, Loss, check_output, class_rule, rule_of, squeeze, summed, tensors, weight_of
from bigdl_lite.model.sums import Metric

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_SCALE = 1024.0  # by which gradients are larger while they are of 16 bits with 5 of exponent
_LANES = 16


@dataclass(frozen=True)
class Compute:
    """How a replica computes. None of it changes what is computed, beyond rounding (and what BatchNorm sees at a time).

    passes      forward and backward passes that a worker's rows of a step are divided into, to need less memory
    precision   of the forward pass where torch's autocast allows it: "fp32", "bf16" or "fp16"; weights stay what they are
    compiled    whether the module goes through torch.compile
    """

    passes: int = 1
    precision: str = "fp32"
    compiled: bool = False

    def __post_init__(self) -> None:
        if self.passes < 1:
            raise RecipeError(f"accumulation is {self.passes}, must be at least 1")
        if self.precision not in PRECISIONS:
            raise RecipeError(f"precision is {self.precision!r}, must be one of {', '.join(map(repr, PRECISIONS))}")


class Replica:
    """weights [n] and gradient [n] are shared with the caller; `module` lives on their device and is in training mode.

    gradient is None where nothing will be computed (on a driver that only advances the weights), or until write_to.
    """

    def __init__(
        self, blueprint: Blueprint, weights: Tensor, gradient: Tensor | None, constants: dict[str, Tensor], loss: Loss,
        compute: Compute | None = None,
    ) -> None:  # fmt: skip
        if getattr(rule_of(loss), "reduction", "mean") == "sum":
            raise RecipeError(f"{type(rule_of(loss)).__name__} sums over the rows; it must return their mean (reduction='mean')")
        self.layout = blueprint.layout
        self.weights = weights
        self.gradient = gradient
        self.loss = loss
        self.compute = compute or Compute()
        self.module = blueprint.build(weights, constants, gradient).to(weights.device).train()
        self.parameters = [p for p in self.module.parameters() if p.requires_grad]
        self._forward: Callable[..., Any] = torch.compile(self.module) if self.compute.compiled else self.module
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
        across workers and divided once. Random numbers (dropout) depend on `seed` alone. Of a Stack it is the mean over the
        models, and the buffer "told" has the loss of each.
        """
        self.gradient.zero_()
        stack: Any = self.module
        told = stack.told.zero_() if isinstance(self.loss, Each) else None
        # a module whose layers meet the other ranks in forward must be entered even with nothing to compute
        if not batch.rows and not self._meets:
            return 0.0
        seed_here(self.weights.device, seed)
        if not batch.rows:
            output = self.module(*batch.inputs)
            sum(x.sum() for x in tensors(output)).mul(0.0).backward()
            return 0.0
        rows, scale, total = -(-batch.rows // self.compute.passes), 1.0, 0.0
        if self.compute.precision == "fp16":
            scale = _SCALE
        for at in range(0, batch.rows, rows):
            part = batch if rows == batch.rows else batch.part(at, at + rows)
            for i, (rule, forward) in enumerate(self._forwards(part)):
                with self._cast():
                    output = forward()
                    check_output(rule, output, part)
                    weight = self.weight(part)
                    loss = summed(rule, output, part, weight)
                if not loss.requires_grad:
                    raise RecipeError("the loss does not depend on any trainable parameter; is the forward pass under no_grad?")
                if weight:  # else every row has ignore_index, or counts nothing: the mean over none of them is not a number
                    (loss.sum() * scale).backward()
                    if told is None:
                        total += float(loss.detach())
                    else:
                        told[i : i + loss.numel()] += loss.detach()
        if told is not None:
            total = float(told.mean())
        if scale != 1.0:
            self.gradient.div_(scale)
        return total

    def _forwards(self, part: Batch) -> list[tuple[Loss, Callable[[], Any]]]:
        """What is to be computed on `part`, and by which loss; of a Stack all models at once, or one after the other."""
        stack: Any = self.module
        if not isinstance(self.loss, Each) or stack.together(*part.inputs):
            return [(self.loss, partial(self._forward, *part.inputs))]
        turns = stack.in_turn(*part.inputs)
        return [(self.loss.loss, partial(next, turns))] * stack.k

    def _cast(self) -> Any:
        dtype = PRECISIONS[self.compute.precision]
        return torch.autocast(self.weights.device.type, dtype=dtype, enabled=dtype != torch.float32)

    def measure(self, batch: Batch, metrics: Sequence[Metric], size: int) -> list[Tensor]:
        """[the loss summed over the rows of `batch`, what it divides by], and the sums of each metric; vectors of float64. The
        losses of a Stack come first, one after the other.

        The module is in evaluation mode, and sees `size` rows at a time, filled up to a multiple of 16 so that the output of a
        row does not depend on how many there are. A worker without rows computes on two of zeros, of which nothing counts.
        """
        self.module.eval()
        try:
            with torch.inference_mode(), self._cast():
                if not batch.rows:
                    zeros = tuple(x.new_zeros([2, *x.shape[1:]]) for x in batch.inputs)
                    assert batch.target is not None
                    return self._measured(Batch(zeros, batch.target.new_zeros([2, *batch.target.shape[1:]])), metrics, False)
                parts = [self._measured(batch.part(at, at + size), metrics, True) for at in range(0, batch.rows, size)]
                return [torch.stack(sums).sum(0) for sums in zip(*parts, strict=True)]
        finally:
            self.module.train()

    def _measured(self, batch: Batch, metrics: Sequence[Metric], counts: bool) -> list[Tensor]:
        k = batch.rows
        output = first(self.module(*(filled(x, _LANES) for x in batch.inputs)), k)
        check_output(self.loss, output, batch)
        weight = self.weight(batch) if counts else 0.0
        losses = [0.0] * (self.loss.k if isinstance(self.loss, Each) else 1)
        if weight:
            losses = summed(self.loss, output, batch, weight).reshape(-1).tolist()
        each = torch.full([k], float(counts), dtype=torch.float64, device=self.weights.device)
        if counts and batch.weight is not None:
            each = batch.weight.double()
        found = [m.sums(squeeze(output, batch.target), batch.target, each).double().cpu() for m in metrics]
        return [torch.tensor([*losses, weight], dtype=torch.float64), *found]

    def weight(self, batch: Batch) -> float:
        """What the loss divides by to be a mean over this batch: see loss.weight_of."""
        return weight_of(self.loss, batch)

    def weighs(self, share: Batch) -> bool:
        """Whether weight() may be something else than the number of rows for some batch of this share."""
        rule, target = class_rule(self.loss, share.target), share.target
        if share.weight is not None:
            return True
        if rule is None:
            return False
        assert target is not None
        return rule.weight is not None or target.ndim > 1 or self.weight(share) != share.rows


def seed_here(device: torch.device, seed: int) -> None:
    """Seeds the generator that kernels of this device draw from.

    Not torch.manual_seed: for every kind of device that is not in use, that remembers the call and its stack for later,
    which costs more than a small forward pass, and memory without end.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)


def filled(x: Tensor, lanes: int) -> Tensor:
    """x [b, ...] with copies of its last row up to a multiple of `lanes` rows: kernels round a few odd rows differently."""
    missing = -len(x) % lanes
    return torch.cat([x, x[-1:].expand(missing, *x.shape[1:])]) if missing else x


def first(output: Any, rows: int) -> Any:
    """The output of the first `rows` rows, whatever it is made of."""
    if isinstance(output, Tensor):
        return output[:rows] if output.ndim else output
    if isinstance(output, dict):
        return {name: first(x, rows) for name, x in output.items()}
    if isinstance(output, tuple | list):
        parts = [first(x, rows) for x in output]
        return type(output)(*parts) if hasattr(output, "_fields") else type(output)(parts)
    return output
