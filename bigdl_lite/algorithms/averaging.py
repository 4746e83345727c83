"""Asynchronous model averaging: workers step at their own speed, and their mean is taken beside them.

    snapshot  s = x_i, between two steps            the thread beside    S = the mean of all snapshots
    later     x_i <- x_i + (S - s)                  between two steps: what x_i did in the meantime is kept

Nobody waits for a slow worker in a step; the round of averages does, and is as often as the slowest worker lets it. At a report
all go on averaging until everybody is there, and then take one mean of all, so that nothing is on its way.

    n  length of the flat weights      p  workers

Source: "async model average" of BAGUA (Gan et al., VLDB 2022), in the delta form of its code.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from bigdl_lite.algorithms.algorithm import Advance, DurableAdvancer, Round, State, Update
from bigdl_lite.algorithms.parts import Gradient, Sum
from bigdl_lite.algorithms.peer import Here, Moment, require_finite
from bigdl_lite.comm.beside import Beside
from bigdl_lite.errors import RecipeError
from bigdl_lite.model.layout import Blueprint
from bigdl_lite.model.replica import Replica


@dataclass(frozen=True)
class Averaging:
    """The peer that takes means beside its steps.

    interval  seconds between two of them, at least; at most a quarter of the deadline, within which all must come to each
    warmup    first steps in which gradients are summed, synchronously, so that all begin together

    Cost  a round: 8 (p - 1) / p n bytes of each worker, 4 n bytes of memory twice.
    """

    interval: float = 0.5
    warmup: int = 0
    alike: ClassVar[bool] = False
    every: ClassVar[int] = 0
    keeps: ClassVar[bool] = True
    threads: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.interval < 0 or self.warmup < 0:
            raise RecipeError(f"Averaging(interval={self.interval}, warmup={self.warmup}): neither may be below 0")

    def prepared(self, blueprint: Blueprint, replica: Replica, advance: Advance, p: int) -> Averaging:
        return self

    def start(self, here: Here) -> _Averaging:
        return _Averaging(self, here)


class _Averaging:
    def __init__(self, how: Averaging, here: Here) -> None:
        self.how, self.comm, self.weighs = how, here.comm, here.weighs
        self.interval = min(how.interval, here.deadline / 4)
        self.weights = here.replica.weights
        self.advancer: DurableAdvancer = here.advance.start(here.replica, (0, len(self.weights)))
        self._round: Beside[Tensor] | None = None
        self._snapshot = torch.empty(0)
        self._next = time.monotonic()
        self.rounds, self._step = 0, here.first  # rounds since the last report

    def begin(self, now: Moment) -> None:
        pass

    def step(self, update: Update, now: Moment) -> int:
        update = now.scaled(update, self.comm.rank) if now.step >= self.how.warmup else self._summed(update, sum(now.rows) or 1)
        self._step = now.step
        self.advancer.step(update, self.advancer.measure(update))
        if now.step >= self.how.warmup:
            if self._round is not None and self._round.done:
                self._take()
            if self._round is None and time.monotonic() >= self._next:
                self._begin(there=False)
        return now.step + 1

    def _summed(self, update: Update, rows: int) -> Update:
        mean = self.comm.all_reduce((update.vector / rows).cpu())
        weight = 1.0
        if self.weighs:
            weight = float(self.comm.all_reduce(torch.tensor([update.weight / rows], dtype=torch.float64)))
        return Update(mean.to(self.weights.device), weight)

    def _begin(self, there: bool) -> None:
        """A round; there: whether this worker has come to the report and only waits for the others."""
        self._snapshot = self.weights.detach().cpu().clone()
        require_finite(self._snapshot, "model", self.comm.rank, self._step)
        told = torch.cat([self._snapshot / self.comm.size, torch.tensor([float(there)], dtype=self._snapshot.dtype)])
        self._round = Beside(self.comm.all_reduce, told)

    def _take(self) -> bool:
        """Brings the mean of a round in. Whether all workers had come to the report when it began."""
        assert self._round is not None
        found, self._round = self._round.result(), None
        mean, there = found[:-1], float(found[-1])
        with torch.no_grad():
            if there == self.comm.size:
                self.weights.copy_(mean)  # nobody has moved since
            else:
                self.weights.add_(mean.sub_(self._snapshot).to(self.weights.device))
        self.rounds += 1
        self._next = time.monotonic() + self.interval
        return there == self.comm.size

    def settle(self) -> dict[str, Any]:
        if self._round is not None:
            self._take()
        while True:
            self._begin(there=True)
            if self._take():
                found, self.rounds = self.rounds, 0
                return {"averages": found}

    def finish(self) -> None:
        pass

    @property
    def bytes_sent(self) -> int:
        return self.comm.bytes_sent

    def own(self) -> State:
        return State({}, {})

    def restore(self, own: State) -> None:
        pass

    def close(self) -> None:
        pass  # what is under way ends with the connections, or at its deadline


def async_average(interval: float = 0.5, warmup: int = 0) -> Callable[[Advance], Round]:
    """The algorithm that averages models beside the steps, every `interval` seconds; warmup in synchronous steps."""
    peer = Averaging(interval, warmup)
    return lambda advance: Round(Gradient(), Sum(), advance, peer=peer)
