"""Several models in one fit: what a step, an epoch and a validation say of each of them.

    line of     has, beside what any fit tells          split() makes of it, for model i
    a step      losses [k], rates [k]                   loss, lr
    an epoch    losses [k], each [k]                    loss, val_...
    validation  each [k]                                val_...

Seconds and bytes are those of the whole pass. The loss of the pass itself, which progress shows, is the mean over the models.

    k  models      n, m  weights and values of buffers of one model
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bigdl_lite.algorithms import Side
from bigdl_lite.algorithms.many import Many
from bigdl_lite.algorithms.parts import TorchOptimizer
from bigdl_lite.engine.recipe import Outcome, Recipe, Start
from bigdl_lite.engine.watch import Watch
from bigdl_lite.model.layout import blueprint
from bigdl_lite.model.loss import Each, squeeze
from bigdl_lite.model.stack import Stack


@dataclass(frozen=True)
class OfEach:
    """A metric of each of k models, for outputs [b, k, ...]."""

    metric: Any
    k: int

    @property
    def name(self) -> str:
        return self.metric.name

    @property
    def higher(self) -> bool:
        return self.metric.higher

    def sums(self, output: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        return torch.cat([self.metric.sums(squeeze(x, target), target, weight) for x in output.unbind(1)])

    def value(self, sums: Tensor) -> float:
        """Of one model."""
        return self.metric.value(sums)


@dataclass(frozen=True)
class WatchEach(Watch):
    """What is looked at in a fit of k models; metrics are OfEach. Nothing that it sees may end the fit: the models differ."""

    k: int = 1

    def values(self, total: Sequence[Tensor]) -> dict[str, Any]:
        losses, weight, rest = total[0][:-1], total[0][-1:], [sums.view(self.k, -1) for sums in total[1:]]
        each = [super(WatchEach, self).values([torch.cat([losses[i : i + 1], weight]), *(x[i] for x in rest)]) for i in range(self.k)]
        return {"val_loss": sum(values["val_loss"] for values in each) / self.k, "each": each}


def watch_each(watch: Watch, k: int) -> WatchEach:
    return WatchEach(watch.validates, watch.holdout, tuple(OfEach(metric, k) for metric in watch.metrics), watch.every, k=k)


def stacked(recipe: Recipe, start: Start, advances: Sequence[TorchOptimizer]) -> tuple[Recipe, Start, Stack]:
    """The recipe and the start of as many models as there are advances, and the stack of them, to split() the outcome with."""
    k, coarse = len(advances), recipe.compute.precision != "fp32" or start.weights.dtype in (torch.float16, torch.bfloat16)
    stack = Stack(recipe.blueprint, start.weights, start.buffers, start.constants, k, turns=coarse)
    plan, weights, buffers, constants = blueprint(stack)
    made = replace(
        recipe, blueprint=plan, loss=Each(recipe.loss, k), watch=watch_each(recipe.watch, k),
        round=replace(recipe.round, advance=Many(tuple(advances))),  # type: ignore[arg-type]
    )  # fmt: skip
    return made, Start(weights, buffers, constants), stack


def told(recipe: Recipe, sides: Sequence[Side], rates: Sequence[float]) -> dict[str, Any]:
    """What the line of a step says of each model; nothing where there is one. rates: see algorithms/many.py."""
    if not isinstance(recipe.loss, Each):
        return {}
    weight = sum(side.weight for side in sides)
    assert recipe.blueprint.layout.buffers[0].name == "told"
    sums = [sum(side.buffers[i].item() for side in sides) for i in range(recipe.loss.k)]
    return {"losses": [x / weight if weight else 0.0 for x in sums], "rates": list(rates)}


def split(outcome: Outcome, stack: Stack) -> list[Outcome]:
    """The outcome of each model, as a fit of it alone would give it."""
    k, weights, at = stack.k, outcome.weights.view(stack.k, -1), stack.k
    buffers: list[list[Tensor]] = [[] for _ in range(k)]
    for span in stack.inner.buffers:
        width = math.prod(span.shape)
        for i in range(k):
            buffers[i].append(outcome.buffers[at + i * width : at + (i + 1) * width])
        at += k * width
    return [
        replace(
            outcome, weights=weights[i].clone(), history=[_of(line, i) for line in outcome.history],
            buffers=torch.cat(buffers[i]) if buffers[i] else outcome.buffers[:0],
        )
        for i in range(k)
    ]  # fmt: skip


def _of(line: Mapping[str, Any], i: int) -> dict[str, Any]:
    mine = {key: value for key, value in line.items() if key not in ("losses", "rates", "each")}
    for key, name in (("losses", "loss"), ("rates", "lr")):
        if key in line:
            mine[name] = line[key][i]
    return mine | (line["each"][i] if "each" in line else {})
