"""Stack: k modules of one shape as one module, whose models see the same rows and know nothing of each other.

    weights   "stack" [k, n], the models one after the other: a slice between two of them is a whole model
    buffers   "told" [k], then those of the module, each [k, ...]
    forward   inputs as one module takes them -> [b, k, ...]

The loss of a stack is Each (model/loss.py): the sum of the losses of the models has the gradients of separate fits.

    together  torch.func.vmap: one kernel where k modules need k. Kernels of many small operations gain most
    in turn   one model after the other, from one state of the random generator

Together is tried at the first forward pass, in training and in evaluation, and compared with one model alone. What vmap cannot do
(LSTM, control flow that looks at values) or does with other random numbers (dropout in attention) goes in turn, and so do
convolutions: k of them are one grouped convolution, which is slower on CPUs (LeNet, 8 models, 128 rows: 440 ms, in turn 325).
In turn, every kernel is that of a separate fit, and so is every bit. BatchNorm needs it: the gradient of a bias before it is zero but
for rounding, which Adam makes into steps as long as any.

    n  trainable values of one model      b  rows      k  models
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from bigdl_lite.errors import RecipeError
from bigdl_lite.model.layout import Blueprint, Layout

_IN_TURN = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase)


class Stack(nn.Module):
    """k models of one blueprint, which all begin with the same values.

    weights    [n]                     buffers  [m] float64, of one model
    constants  the frozen parameters, which the models share
    turns      whether they go in turn from the beginning, which rounds as separate fits do: for precisions of 16 bits

    In forward, RecipeError where the module does not return one tensor with a row for each row.
    """

    def __init__(
        self, plan: Blueprint, weights: Tensor, buffers: Tensor, constants: dict[str, Tensor], k: int, turns: bool = False
    ) -> None:  # fmt: skip
        super().__init__()
        self.k = k
        self.plan = plan  # no nn.Module, so that the skeleton's stand-ins are no parameters of this one
        self.stack = nn.Parameter(weights.repeat(k, 1))
        self._frozen = list(constants)
        for j, x in enumerate(constants.values()):
            self.register_parameter(f"frozen{j}", nn.Parameter(x, requires_grad=False))
        self.register_buffer("told", torch.zeros(k, dtype=torch.float64))  # losses of a step, summed over this worker's rows
        for j, span in enumerate(plan.layout.buffers):
            x = span.view(buffers).to(span.dtype)
            self.register_buffer(f"buffer{j}", x.repeat(k, *[1] * x.ndim))
        turns = turns or any(isinstance(m, _IN_TURN) for m in plan.skeleton.modules())
        self._together: dict[bool, bool] = dict.fromkeys((True, False), False) if turns else {}  # by training

    @property
    def inner(self) -> Layout:
        """Where the tensors of one model lie in its row of the weights."""
        return self.plan.layout

    def one(self, weights: Tensor) -> nn.Module:
        """A module of its own around `weights` [n], a row of the stack."""
        return self.plan.build(weights, {name: getattr(self, f"frozen{j}").detach() for j, name in enumerate(self._frozen)})

    def train(self, mode: bool = True) -> Stack:
        self.plan.skeleton.train(mode)
        return super().train(mode)

    def _apply(self, fn: Any, recurse: bool = True) -> Stack:
        self.plan.skeleton._apply(fn)  # what is no part of the flat vectors, such as complex buffers
        return super()._apply(fn, recurse)

    def forward(self, *inputs: Tensor) -> Tensor:
        spans = self.inner.parameters
        # one split, not a slice for each tensor: the gradient of a slice is as long as the stack
        parts = self.stack.split([span.stop - span.start for span in spans], 1)
        weights = {span.name: x.view(self.k, *span.shape) for span, x in zip(spans, parts, strict=True)}
        buffers = {span.name: getattr(self, f"buffer{j}") for j, span in enumerate(self.inner.buffers)}
        if self.training not in self._together:
            self._together[self.training] = self._tried(weights, buffers, inputs)
        if self._together[self.training]:
            return self._vmapped(weights, buffers, inputs)
        before, outputs = _random(self.stack.device), []
        for i in range(self.k):
            if i:
                _set_random(self.stack.device, before)
            outputs.append(self._alone(_row(weights, i), _row(buffers, i), inputs))
        return torch.stack(outputs).movedim(0, 1)  # in memory [k, b, ...]: what a loss sees of a model is contiguous

    def _alone(self, weights: dict[str, Tensor], buffers: dict[str, Tensor], inputs: tuple[Tensor, ...]) -> Tensor:
        frozen = {name: getattr(self, f"frozen{j}") for j, name in enumerate(self._frozen)}
        output = functional_call(self.plan.skeleton, {**weights, **buffers, **frozen}, inputs)
        if not isinstance(output, Tensor) or not output.ndim:
            raise RecipeError("models that are trained together must each return one tensor, with a row for each row")
        return output

    def _vmapped(self, weights: dict[str, Tensor], buffers: dict[str, Tensor], inputs: tuple[Tensor, ...]) -> Tensor:
        def alone(w: dict[str, Tensor], b: dict[str, Tensor]) -> Tensor:
            return self._alone(w, b, inputs)

        return vmap(alone, randomness="same")(weights, buffers).contiguous().movedim(0, 1)

    def _tried(self, weights: dict[str, Tensor], buffers: dict[str, Tensor], inputs: tuple[Tensor, ...]) -> bool:
        """Whether vmap gives what one model gives alone: outputs, buffers and random numbers. Changes nothing."""
        before = _random(self.stack.device)
        copies = [{name: x.clone() for name, x in buffers.items()} for _ in range(2)]
        with torch.no_grad():
            alone = self._alone(_row(weights, 0), _row(copies[0], 0), inputs)
            after = _random(self.stack.device)
            _set_random(self.stack.device, before)
            try:
                together = self._vmapped(weights, copies[1], inputs)[:, 0]
            except Exception:  # vmap has many ways to say that it cannot; in turn, the module's own errors show
                return False
            else:
                drawn = all(torch.equal(x, y) for x, y in zip(after, _random(self.stack.device), strict=True))
            finally:
                _set_random(self.stack.device, before)
        found = [(alone, together), *((copies[0][name][0], copies[1][name][0]) for name in buffers)]
        return drawn and all(x.shape == y.shape and torch.allclose(x, y, 1e-4, 1e-6, equal_nan=True) for x, y in found)


def _row(tensors: dict[str, Tensor], i: int) -> dict[str, Tensor]:
    return {name: x[i] for name, x in tensors.items()}


def _random(device: torch.device) -> list[Tensor]:
    """The state of the generators that kernels of this device, and code on the CPU, draw from."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _set_random(device: torch.device, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
