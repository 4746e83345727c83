"""Where every tensor of a module lies in the flat vectors.

    n  trainable values: one flat vector, the parameters in the order of module.parameters(), frozen ones left out
    m  values of the buffers that training may change (running statistics and the like), as one flat float64 vector

Frozen parameters never change: they travel once, by name, as constants.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bigdl_lite.errors import RecipeError


@dataclass(frozen=True)
class Span:
    """One tensor in a flat vector: [start, stop) holds its values in C order."""

    name: str
    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def stop(self) -> int:
        return self.start + math.prod(self.shape)

    def view(self, flat: Tensor) -> Tensor:
        return flat[self.start : self.stop].view(self.shape)


@dataclass(frozen=True)
class Layout:
    parameters: tuple[Span, ...]
    buffers: tuple[Span, ...]

    @property
    def n(self) -> int:
        return self.parameters[-1].stop if self.parameters else 0

    @property
    def m(self) -> int:
        return self.buffers[-1].stop if self.buffers else 0

    @property
    def dtype(self) -> torch.dtype:
        return self.parameters[0].dtype if self.parameters else torch.float32


def layout(module: nn.Module) -> Layout:
    """The layout of a module. Raises RecipeError where nothing can be trained, or where dtypes are mixed."""
    trainable = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    tensors = (*module.named_parameters(), *module.named_buffers())
    lazy = [name for name, x in tensors if isinstance(x, nn.parameter.UninitializedTensorMixin)]
    if lazy:
        raise RecipeError(f"{lazy[0]!r} is not initialised yet: run one batch through the module before fit")
    if not trainable:
        raise RecipeError("the module has no trainable parameter (requires_grad is False everywhere, or there is none)")
    dtypes = sorted({str(p.dtype) for _, p in trainable})
    if len(dtypes) > 1:
        raise RecipeError(f"trainable parameters are of {' and '.join(dtypes)}; all need one dtype (module.to(dtype))")
    buffers = [(name, b) for name, b in module.named_buffers() if not b.is_complex()]
    return Layout(_spans(trainable), _spans(buffers))


def _spans(named: list[tuple[str, Tensor]]) -> tuple[Span, ...]:
    spans, start = [], 0
    for name, x in named:
        spans.append(Span(name, start, tuple(x.shape), x.dtype))
        start = spans[-1].stop
    return tuple(spans)


@dataclass(frozen=True)
class Blueprint:
    """A module without the values of its parameters: small to send, and enough to rebuild it around a flat vector."""

    skeleton: nn.Module
    layout: Layout

    def build(self, weights: Tensor, constants: dict[str, Tensor], gradient: Tensor | None = None) -> nn.Module:
        """A module whose parameters are views into `weights` [n] and, if given, whose gradients are views into `gradient` [n].

        constants  the frozen parameters by name, shared and not copied
        """
        module = copy.deepcopy(self.skeleton)
        for name, p in module.named_parameters():
            if not p.requires_grad:
                p.data = constants[name]
        named = dict(module.named_parameters())
        for span in self.layout.parameters:
            p = named[span.name]
            p.data = span.view(weights)
            p.grad = None if gradient is None else span.view(gradient)
        return module


def blueprint(module: nn.Module) -> tuple[Blueprint, Tensor, Tensor, dict[str, Tensor]]:
    """Takes a module apart; the module itself is left as it is.

    returns  blueprint, weights [n], buffers [m] float64, constants (the frozen parameters by name)
    Cost     one copy of the weights.
    """
    found = layout(module)
    # the memo makes deepcopy take an empty stand-in for each parameter, so that the weights are not copied twice
    memo = {id(p): nn.Parameter(torch.empty(0, dtype=p.dtype), requires_grad=p.requires_grad) for p in module.parameters()}
    for p in module.parameters():
        memo[id(p)].__dict__.update(p.__dict__)
    skeleton = copy.deepcopy(module, memo)
    named = dict(module.named_parameters())
    weights = torch.cat([named[s.name].detach().cpu().reshape(-1) for s in found.parameters])
    constants = {name: p.detach().cpu().contiguous() for name, p in named.items() if not p.requires_grad}
    return Blueprint(skeleton.cpu(), found), weights, read_buffers(module, found), constants


def read_buffers(module: nn.Module, found: Layout) -> Tensor:
    """The module's buffers as one flat vector [m] float64: exact for every float and for integers up to 2^53."""
    named = dict(module.named_buffers())
    parts = [named[s.name].detach().reshape(-1).to("cpu", torch.float64) for s in found.buffers]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64)


def write_buffers(module: nn.Module, found: Layout, values: Tensor) -> None:
    """Puts values [m] float64 into the module's buffers, in place."""
    named = dict(module.named_buffers())
    with torch.no_grad():
        for s in found.buffers:
            named[s.name].copy_(s.view(values))
