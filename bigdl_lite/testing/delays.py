"""Slow machines, the same ones every time: each worker sleeps before it computes.

    seconds(rank, step)  =  unit * exp(sigma * z)  [ * factor ]       z normal; the factor with `probability`, or for a rank in `slow`

A delay is a function of (seed, rank, step) alone: any worker, and any retry of it, sleeps as long as in the run before. The
weights are those of the method without delays, to the bit, wherever the method waits for all.

Source: Chen et al., "Revisiting Distributed Synchronous SGD", ICLR 2016 workshop, on stragglers; the lognormal is a model.
"""

from __future__ import annotations

import math
import operator
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np

from bigdl_lite.algorithms import Advance, Local, Round, Update, Work, method
from bigdl_lite.algorithms.deadline import Within
from bigdl_lite.batch import Batch, mix
from bigdl_lite.errors import RecipeError
from bigdl_lite.model.replica import Replica


@dataclass(frozen=True)
class Delays:
    """How long each worker is held up in each step.

    unit         median seconds; 0: no delays
    sigma        spread of the logarithm: 0.1 is about 10 %
    probability  of a straggler, drawn anew for each worker in each step
    factor       how many times longer a straggler takes
    slow         ranks that are stragglers in every step; being drawn as well makes them no slower
    """

    unit: float = 0.04
    sigma: float = 0.1
    probability: float = 0.02
    factor: float = 10.0
    slow: tuple[int, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "slow", tuple(sorted({operator.index(rank) for rank in self.slow})))
        for name, value, least in (("unit", self.unit, 0), ("sigma", self.sigma, 0), ("factor", self.factor, 1)):
            if not least <= value < math.inf:
                raise RecipeError(f"Delays({name}={value}): must be at least {least}, and finite")
        if not 0 <= self.probability <= 1:
            raise RecipeError(f"Delays(probability={self.probability}): must be from 0 to 1")
        if any(rank < 0 for rank in self.slow):
            raise RecipeError(f"Delays(slow={self.slow}): ranks begin at 0")

    def seconds(self, rank: int, step: int) -> float:
        """How long this rank is held up in this step. Pure: the same in every process."""
        if not self.unit:
            return 0.0
        rng = np.random.default_rng(mix(self.seed, 5, rank, step))
        spread, drawn = math.exp(self.sigma * rng.standard_normal()), rng.random() < self.probability
        return self.unit * spread * (self.factor if drawn or rank in self.slow else 1.0)


@dataclass(frozen=True)
class Slowed:
    """A Local that sleeps before it computes; all else is the wrapped one's.

    What a module or loss draws is what it would draw without: torch's random state is not touched.
    """

    local: Local
    delays: Delays

    @property
    def moves(self) -> bool:
        return self.local.moves

    def batches(self, epoch: int) -> int:
        return self.local.batches(epoch)

    def __call__(self, replica: Replica, batches: Sequence[Batch], work: Work) -> tuple[Update, float]:
        time.sleep(self.delays.seconds(work.rank, work.step))
        return self.local(replica, batches, work)

    def __getattr__(self, name: str) -> Any:
        # asked only for what is not found above; pickle and copy ask before there is a `local`
        if name == "local" or name.startswith("__"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.local, name)


def slowed(algorithm: str | Callable[[Any], Round], delays: Delays) -> Callable[[Advance], Round]:
    """The algorithm, a name in the catalogue or a function optimizer -> Round, on workers that are held up.

        TorchEstimator(algorithm=slowed("local-sgd", Delays(unit=0.1, slow=(3,))), ...)

    The sleep counts as compute_s in the history. With engine="local" ranks take turns, so that their delays add up. With
    engine="shuffle" a worker without rows in a step is not held up, and one whose task is repeated is held up again.
    """

    def made(advance: Advance) -> Round:
        found = method(algorithm, advance)
        if isinstance(found.local, Within):  # it looks at the clock after each part: a slow worker is slow in each of them
            each = replace(delays, unit=delays.unit / found.local.parts)
            return replace(found, local=replace(found.local, local=cast(Local, Slowed(found.local.local, each))))
        return replace(found, local=cast(Local, Slowed(found.local, delays)))  # its moves can be read, not set

    return made
