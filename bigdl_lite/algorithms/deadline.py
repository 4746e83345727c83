"""Deadline SGD: a worker that is late sends what it has, and the rest of its batch is dropped.

    local     the batch in `parts`, one after the other, until the time is up      -> the sum over the rows that were done
    combine   as ever: the sum is divided by the rows that count

The first part is always done, so that every step moves; a slow worker is then late by one part and not by a whole batch. Needs no
meeting and no state: all engines, shuffle too. The line of a step says in `weight` how many of its `rows` counted.

Time decides what is computed, so a fit does not repeat to the bit, nor does a task that Spark runs again. Rows of a worker that
is always slow count for less; where its rows are of a kind that others do not have, the model sees less of that kind.

Source: the time budget of "anytime minibatch" (Ferdinand et al., ICLR 2019), in the place of the dropped stragglers of Chen et al.,
"Revisiting Distributed Synchronous SGD", 2016.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from bigdl_lite.algorithms.algorithm import Advance, Local, Round, Update, Work
from bigdl_lite.algorithms.parts import Gradient, Sum
from bigdl_lite.batch import Batch, mix
from bigdl_lite.errors import RecipeError
from bigdl_lite.model.replica import Replica

_GRADIENT = Gradient()


@dataclass(frozen=True)
class Within:
    """As much of the gradient of one batch as fits into `seconds`, part by part; local makes that of one part.

    Cost  one more vector of the length of the weights, and `parts` forward and backward passes instead of one.
    """

    seconds: float
    parts: int = 4
    local: Local = _GRADIENT
    moves: ClassVar[bool] = False
    drops: ClassVar[bool] = True  # rows, so that an update weighs less than its rows

    def __post_init__(self) -> None:
        if not self.seconds > 0 or self.parts < 1:
            raise RecipeError(f"Within(seconds={self.seconds}, parts={self.parts}): above 0, and at least 1")
        if self.local.moves:
            raise RecipeError(f"Within drops rows of a gradient, and {type(self.local).__name__} makes steps: leave one of them out")

    def batches(self, epoch: int) -> int:
        return 1

    def __call__(self, replica: Replica, batches: Sequence[Batch], work: Work) -> tuple[Update, float]:
        (batch,), until = batches, time.monotonic() + self.seconds
        rows = max(1, -(-batch.rows // self.parts))
        vector, weight, loss = torch.zeros_like(replica.gradient), 0.0, 0.0
        for i, first in enumerate(range(0, max(1, batch.rows), rows)):
            if i and time.monotonic() >= until:
                break
            part = batch.take(torch.arange(first, min(first + rows, batch.rows), device=batch.inputs[0].device))
            update, more = self.local(replica, [part], work._replace(seed=mix(work.seed, i)))
            vector.add_(update.vector)
            weight, loss = weight + update.weight, loss + more
        return Update(replica.gradient.copy_(vector), weight), loss


def within(seconds: float, parts: int = 4) -> Callable[[Advance], Round]:
    """The algorithm of synchronous SGD in which a worker computes for at most `seconds` a step."""
    local = Within(seconds, parts)
    return lambda advance: Round(local, Sum(), advance)
