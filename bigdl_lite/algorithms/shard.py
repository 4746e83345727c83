"""One shard of a parameter server: a slice of the weights with its optimizer, which threads push to and take from (server.py).

    m  values of the slice
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import Any

from torch import Tensor

from bigdl_lite.algorithms.accept import Rule
from bigdl_lite.algorithms.algorithm import State, Update
from bigdl_lite.algorithms.parts import Sum
from bigdl_lite.algorithms.peer import Here
from bigdl_lite.errors import BigDLError, MeetingTimeout, blamed, report, revive
from bigdl_lite.model.replica import Replica
from bigdl_lite.vector import Cut


class Shard:
    """The shard of one rank. What comes in is noted in the rule's book, under one lock, and applied when the book says so.

    Answers are a version and a copy of the slice, made once a version and never changed, so that nothing is sent under the lock.
    To the loop (engine/apart.py) it is the advancer of the slice, which is asked only while nothing is let in.

    Raises  MeetingTimeout where a wait is longer than the deadline; what fail() was told, where another thread's work went wrong.
    """

    def __init__(self, rule: Rule, here: Here, cut: Cut) -> None:
        replica, self.rule, self.cut = here.replica, rule, cut
        self.rank, self.deadline = here.comm.rank, here.deadline
        weights = replica.weights.detach().cpu().clone()
        frozen = {name: p.detach() for name, p in replica.module.named_parameters() if not p.requires_grad}
        served = Replica(here.blueprint, weights, None, frozen, replica.loss)
        self.advancer = here.advance.start(served, cut)
        self.book = rule.open(here.comm.size, here.first, self.rank == 0)
        self.failed: BigDLError | None = None
        self._slice = weights[slice(*cut)]
        self._copy: Tensor | None = None
        self._pushed: list[Any] = [None] * here.comm.size  # the last Update of each rank; the book knows which still count
        self._changed = threading.Condition()
        self._open = False

    def push(self, rank: int, step: int, update: Update) -> tuple[int, Tensor]:
        """Takes the update [m] of a step. Returns when the rank may take the weights for the next one: see take().

        Until then the update's memory must not change; then it is not needed any more.
        """
        with self._changed:
            if not self.book.late(step):
                self._wait(lambda: self._open or self.book.late(step), lambda: f"rank {self.rank} to end its report")
            if not self.book.late(step):  # others may have made the version before this thread woke
                self._pushed[rank] = update
                self.book.push(rank, step, time.monotonic())
                self._go_on()
            return self._take(rank, step + 1, step + 1 - self.rule.staleness)

    def take(self, rank: int, step: int) -> tuple[int, Tensor]:
        """The version, at least `step`, and the slice [m], which nobody may change."""
        with self._changed:
            return self._take(rank, step, step)

    def accept(self, version: int, ranks: list[int]) -> None:
        """What rank 0 has decided."""
        with self._changed:
            self.book.fix(version, ranks)
            self._go_on()

    def accepted(self, version: int) -> list[int]:
        """What rank 0, whose shard this is, decides."""
        with self._changed:
            self._wait(lambda: self.book.fixed[0] >= version, str, math.inf)
            assert self.book.fixed[0] == version, "the next version needs this one on all shards"
            return list(self.book.fixed[1])

    def let_in(self, open_: bool) -> None:
        with self._changed:
            self._open = open_
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """Ends every wait, with this error if it is the first."""
        with self._changed:
            self.failed = self.failed or revive(report(error, f"the shard of rank {self.rank}"))
            self._changed.notify_all()

    def rates(self) -> list[float]:
        return self.advancer.rates()

    def end_epoch(self, loss: float) -> None:
        self.book.end_epoch()
        self.advancer.end_epoch(loss)

    def state(self) -> State:
        return self.advancer.state()

    def restore(self, state: State) -> None:
        self.advancer.restore(state)

    def _take(self, rank: int, step: int, version: float) -> tuple[int, Tensor]:
        self._wait(
            lambda: self.book.version >= version and not self.book.waits(rank),
            lambda: f"rank(s) {self.book.missing()} in step {self.book.version}, before rank {rank} may go on",
        )
        if self._copy is None:
            self._copy = self._slice.clone()
        found = self.book.version, self._copy
        self.book.took(rank, step)
        self._go_on()
        return found

    def _go_on(self) -> None:
        """Applies what can be applied."""
        while ranks := self.book.ready(time.monotonic()):
            update = Sum()([self._pushed[rank] for rank in ranks])
            if update.weight or self.rule.idle:
                with blamed(f"the shard of rank {self.rank}"):
                    self.advancer.step(update, 0.0)
                self._copy = None
            self._changed.notify_all()

    def _wait(self, met: Callable[[], bool], whom: Callable[[], str], deadline: float | None = None) -> None:
        until = time.monotonic() + (self.deadline if deadline is None else deadline)
        while not met():
            if self.failed is not None:
                raise type(self.failed)(str(self.failed)) from self.failed
            now, wakes = time.monotonic(), self.book.wakes()
            if now >= until:
                raise MeetingTimeout(
                    f"the shard of rank {self.rank} waited {self.deadline:.0f} s for {whom()}; are those tasks still running?"
                )
            if now >= wakes:
                self._go_on()
            else:
                left = min(until, wakes) - now
                self._changed.wait(None if left == math.inf else left)
