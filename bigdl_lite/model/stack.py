"""Stack: k modules of one shape as one module, whose models see the same rows and know nothing of each other.

    weights   "stack" [k, n], the models one after the other: a slice between two of them is a whole model
    buffers   "told" [k], then those of the module, each [k, ...]
    forward   inputs as one module takes them -> [b, k, ...]

The loss of a stack is Each (model/loss.py): the sum of the losses of the models has the gradients of separate fits.

    together  torch.func.vmap: one kernel where k modules need k. It pays where kernels are so small that starting them is the work
    in turn   one model after the other, from one state of the random generator: the kernels of separate fits, and every bit of them

    one thread of a CPU, 8 models, ms     rows   8 separate   together   in turn
    2 layers, 771 values                   128          2.0        1.1       2.5
    2 layers, 771 values                 2,048          4.3        5.0       5.1
    LeNet                                  128          100        118       101

Together is tried at the first forward pass, in training and in evaluation, and compared with one model alone. What vmap cannot do
(LSTM, control flow that looks at values), or does with other random numbers (dropout in attention), goes in turn; so do many rows on
a CPU, and convolutions, which become grouped ones. BatchNorm needs it: the gradient of a bias before it is zero but for rounding,
which Adam makes into steps as long as any.

    n  trainable values of one model      b  rows      k  models
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from bigdl_lite.errors import RecipeError
from bigdl_lite.model.layout import Blueprint, Layout, Span

_SMALL = 500_000  # rows times values of a model: above it a CPU has enough to do with one
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
        self._kept: tuple[Any, list[dict[str, Tensor]]] | None = None
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
        if self.together(*inputs):
            return self._vmapped(self._weights(), self._states(), inputs)
        return torch.stack([*self.in_turn(*inputs)]).movedim(0, 1)  # in memory [k, b, ...]: what a loss sees of a model is contiguous

    def together(self, *inputs: Tensor) -> bool:
        """Whether forward computes all models of these rows at the same time."""
        if self.training not in self._together:
            self._together[self.training] = self._tried(self._weights(), self._states(), inputs)
        small = self.stack.device.type != "cpu" or len(inputs[0]) * self.inner.n <= _SMALL
        return self._together[self.training] and small

    def in_turn(self, *inputs: Tensor) -> Iterator[Tensor]:
        """The output of one model after the other, [b, ...]. Who goes backward before the next needs the memory of one only."""
        before, buffers = _random(self.stack.device), self._states()
        for i, weights in enumerate(self._rows()):
            if i:
                _set_random(self.stack.device, before)
            yield self._alone(weights, _row(buffers, i), inputs)

    def _states(self) -> dict[str, Tensor]:
        return {span.name: getattr(self, f"buffer{j}") for j, span in enumerate(self.inner.buffers)}

    def _weights(self) -> dict[str, Tensor]:
        """The tensors of all models, [k, ...] by name."""
        spans = self.inner.parameters
        # one split, not a slice for each tensor: the gradient of a slice is as long as the stack
        parts = self.stack.split([span.stop - span.start for span in spans], 1)
        return {span.name: x.view(self.k, *span.shape) for span, x in zip(spans, parts, strict=True)}

    def _rows(self) -> list[dict[str, Tensor]]:
        """The tensors of each model: leaves with gradients that are views into that of the stack, where it has one.

        A backward pass then writes where it should; through the one parameter it would write, copy and add vectors of k n values.
        """
        data, grad = self.stack.data, self.stack.grad
        if grad is None or not torch.is_grad_enabled():
            return [{span.name: span.view(row) for span in self.inner.parameters} for row in self.stack.unbind()]
        key = data.data_ptr(), grad.data_ptr()
        if self._kept is None or self._kept[0] != key:
            pairs = [*zip(data, grad, strict=True)]
            self._kept = key, [{span.name: _leaf(span, *pair) for span in self.inner.parameters} for pair in pairs]
        return self._kept[1]

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
        """Whether vmap gives what one model gives alone: outputs, buffers and random numbers. Changes nothing.

        The last model is asked: where others have drawn before it, its numbers are not those that it draws alone.
        """
        before = _random(self.stack.device)
        copies = [{name: x.clone() for name, x in buffers.items()} for _ in range(2)]
        with torch.no_grad():
            alone = self._alone(_row(weights, -1), _row(copies[0], -1), inputs)
            after = _random(self.stack.device)
            _set_random(self.stack.device, before)
            try:
                together = self._vmapped(weights, copies[1], inputs)[:, -1]
            except Exception:  # vmap has many ways to say that it cannot; in turn, the module's own errors show
                return False
            else:
                drawn = all(torch.equal(x, y) for x, y in zip(after, _random(self.stack.device), strict=True))
            finally:
                _set_random(self.stack.device, before)
        found = [(alone, together), *((copies[0][name][-1], copies[1][name][-1]) for name in buffers)]
        return drawn and all(x.shape == y.shape and torch.allclose(x, y, 1e-4, 1e-6, equal_nan=True) for x, y in found)


def _leaf(span: Span, weights: Tensor, gradient: Tensor) -> nn.Parameter:
    leaf = nn.Parameter(span.view(weights))
    leaf.grad = span.view(gradient)
    return leaf


def _row(tensors: dict[str, Tensor], i: int) -> dict[str, Tensor]:
    return {name: x[i] for name, x in tensors.items()}


def _random(device: torch.device) -> list[Tensor]:
    """The state of the generators that kernels of this device, and code on the CPU, draw from."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _set_random(device: torch.device, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
