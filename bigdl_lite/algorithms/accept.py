"""Which pushes make the next weights, and when: the rules of a parameter server (server.py), free of threads, clocks and sockets.

    FirstOf(n)           the first n of p workers make the next version, all at once; who comes later is dropped
    Bounded(staleness)   each push is applied as it comes; nobody is more than `staleness` steps ahead of the slowest

A rule is a frozen value. Its book is what one shard writes down: who pushed, who took the weights. ready() says whose pushes are
to be applied next; what time it is, is an argument. A book is the same whoever keeps it, so that all shards do the same.

    p  workers      version  steps that are complete in the weights of a shard      a push is tagged with the step it was made for
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

from bigdl_lite.algorithms.algorithm import Update
from bigdl_lite.algorithms.peer import Moment
from bigdl_lite.errors import RecipeError, WireError

_LOG = logging.getLogger("bigdl_lite")
_UNSEEN = 50  # versions in a row without a worker, after which its rows are said not to count


class Book(Protocol):
    """What one shard knows of its workers. Steps begin at `first`, with the same weights everywhere."""

    version: int

    def late(self, step: int) -> bool:
        """Whether a push of this step is dropped."""
        ...

    def push(self, rank: int, step: int, now: float) -> None:
        """A push has come whole, and is not late. Raises WireError where this worker cannot be at this step."""
        ...

    def ready(self, now: float) -> tuple[int, ...]:
        """The ranks, ascending, whose pushes are to be summed and applied next, which then are applied; (): nothing to do."""
        ...

    def waits(self, rank: int) -> bool:
        """Whether a push of this rank has come, and is neither applied nor dropped."""
        ...

    def took(self, rank: int, step: int) -> None:
        """The rank has got the weights with which it computes this step."""
        ...

    def wakes(self) -> float:
        """When ready() may say something although nothing has come."""
        ...

    def missing(self) -> list[int]:
        """The ranks that are waited for."""
        ...

    def counted(self, rank: int, step: int) -> bool:
        """Whether the rank's push of this step, its last one, is in the weights."""
        ...

    def told(self) -> dict[str, Any]:
        """What is to be said of the epoch; end_epoch() begins the next one."""
        ...

    def end_epoch(self) -> None: ...


class Rule(Protocol):
    led: bool  # whether rank 0 decides for all shards, whose versions then are the same weights
    staleness: float
    idle: bool  # whether a sum without rows is a step of the optimizer too

    def of(self, p: int, deadline: float = math.inf) -> Rule:
        """The rule for p workers, none of whose waits is longer than the deadline. Raises RecipeError where there is none."""
        ...

    def scaled(self, update: Update, now: Moment, rank: int) -> Update:
        """The update with the weight that it is divided by, or that its sum with others is."""
        ...

    def open(self, p: int, first: int, leads: bool) -> Any: ...


@dataclass(frozen=True)
class FirstOf:
    """Backup workers: of p workers, the first n that bring a gradient of version t make version t + 1, the mean over their rows.

    No gradient is stale, and nobody waits for the p - n slowest: a step takes the n-th smallest of p compute times instead of the
    largest. The order in which pushes come to the shard of rank 0 decides, for all shards. A push that is late is dropped, never
    applied to newer weights; its worker goes on with the newest version, and with that step's rows.

    patience  seconds after the first push of a version after which those that have come are enough; at most half the deadline.
              For workers that are slow: one that is gone takes its shard along, and ends the fit

    The learning rate grows with n, not with p (linear scaling). An epoch no longer uses every row: a worker that is always slow
    counts for nothing, and if its rows are unlike the others' the model never learns them. A worker without rows in a step is
    among the first, as any other.

    Source: Chen et al., "Revisiting Distributed Synchronous SGD", ICLR workshop 2016, Alg. 3 and 4.
    """

    n: int
    patience: float = 30.0
    led: ClassVar[bool] = True
    staleness: ClassVar[float] = 0.0
    idle: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.n < 1 or not self.patience > 0:
            raise RecipeError(f"FirstOf(n={self.n}, patience={self.patience}): at least 1 worker, and more than 0 seconds")

    def of(self, p: int, deadline: float = math.inf) -> FirstOf:
        if self.n > p:
            raise RecipeError(f"FirstOf(n={self.n}) waits for {self.n} workers, and there are {p}: take n from 1 to {p}")
        return replace(self, patience=min(self.patience, deadline / 2))

    def scaled(self, update: Update, now: Moment, rank: int) -> Update:
        return update

    def open(self, p: int, first: int, leads: bool) -> Ballot:
        return Ballot(self, p, first, leads)


@dataclass(frozen=True)
class AllBut:
    """FirstOf all workers but some, however many there are."""

    backups: int
    patience: float = 30.0
    led: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.backups < 0:
            raise RecipeError(f"backups is {self.backups}, must be at least 0")
        FirstOf(1, self.patience)

    def of(self, p: int, deadline: float = math.inf) -> FirstOf:
        if self.backups >= p:
            raise RecipeError(f"backups={self.backups} of {p} workers leaves none to wait for: take at most {p - 1}")
        return FirstOf(p - self.backups, self.patience).of(p, deadline)


class Ballot:
    """The book of FirstOf. Where it leads it decides; elsewhere fix() tells what was decided.

    fixed    the last version whose workers are known, and these
    counts   how often each worker was one of them in this epoch
    """

    def __init__(self, rule: FirstOf, p: int, first: int, leads: bool) -> None:
        self.rule, self.leads, self.version = rule, leads, first
        self.fixed: tuple[int, tuple[int, ...]] = (first - 1, ())
        self.counts = [0] * p
        self._last = [first - 1] * p  # the version that each worker last was part of
        self._came: list[int] = []  # with a push of this version, in order
        self._since = 0.0
        self._warned: set[int | str] = set()

    def late(self, step: int) -> bool:
        return step < self.version

    def push(self, rank: int, step: int, now: float) -> None:
        if step != self.version or rank in self._came:
            raise WireError(f"rank {rank} pushed step {step} {'twice' if rank in self._came else f'before version {step} was made'}")
        self._since = self._since if self._came else now
        self._came.append(rank)

    def fix(self, version: int, ranks: Sequence[int]) -> None:
        """What the shard that leads has decided. Raises WireError where it cannot have."""
        p = len(self.counts)
        known = list(ranks) == sorted({r for r in ranks if type(r) is int and 0 <= r < p})
        if self.leads or version != self.version or self.fixed[0] >= version or not known or not 1 <= len(ranks) <= self.rule.n:
            raise WireError(f"workers {str(ranks)[:80]} cannot make version {str(version)[:20]} after {self.version} of {p} workers")
        self.fixed = (version, tuple(ranks))

    def ready(self, now: float) -> tuple[int, ...]:
        if self.leads and self._came and (len(self._came) >= self.rule.n or now >= self.wakes()):
            self.fixed = (self.version, tuple(sorted(self._came[: self.rule.n])))
        version, ranks = self.fixed
        if version != self.version or not set(ranks) <= set(self._came):
            return ()
        for rank in ranks:
            self.counts[rank] += 1
            self._last[rank] = version
        if self.leads:
            self._warn(ranks)
        self._came, self.version = [], version + 1  # who has come too late for this version is dropped with it
        return ranks

    def waits(self, rank: int) -> bool:
        return rank in self._came

    def took(self, rank: int, step: int) -> None:
        pass

    def wakes(self) -> float:
        return self._since + self.rule.patience if self.leads and self._came else math.inf

    def missing(self) -> list[int]:
        if self.fixed[0] == self.version:
            return [r for r in self.fixed[1] if r not in self._came]
        return [r for r in range(len(self.counts)) if r not in self._came] if self.leads else [0]

    def counted(self, rank: int, step: int) -> bool:
        return self._last[rank] == step

    def told(self) -> dict[str, Any]:
        return {"accepted": list(self.counts)}

    def end_epoch(self) -> None:
        self.counts = [0] * len(self.counts)

    def _warn(self, ranks: Sequence[int]) -> None:
        """Once for each kind of trouble."""
        if len(ranks) < self.rule.n and "patience" not in self._warned:
            self._warned.add("patience")
            _LOG.warning(
                "step %d: %d of %d workers came within %.1f s (ranks %s), and make the step without the others; this is said once",
                self.version, len(ranks), self.rule.n, self.rule.patience, list(ranks),
            )  # fmt: skip
        for rank, last in enumerate(self._last):
            if self.version - last >= _UNSEEN and rank not in self._warned:
                self._warned.add(rank)
                _LOG.warning("rank %d was accepted in 0 of the last %d steps: its rows do not count", rank, _UNSEEN)


@dataclass(frozen=True)
class Bounded:
    """Stale synchronous parallel: every push is applied as it comes, and a worker waits only when it is too far ahead.

    A worker that has done c steps goes on when the slowest has done at least c - staleness. The weights with which it computes step
    c hold all pushes of steps before c - staleness, and none of a step after c + staleness - 1: a push that comes earlier waits
    until all have taken the weights that are to be without it.

    staleness  0: synchronous; 4, say: bounded; math.inf: asynchronous SGD

    A push is divided by the rows of all workers in its step, so that p pushes move plain SGD as one synchronous step does. With
    momentum, weight decay or Adam each push is a step of the optimizer, p of them where there was one. A push of no rows is none.

    Source: Ho et al., "More Effective Distributed ML via a Stale Synchronous Parallel Parameter Server", NeurIPS 2013; asynchronous:
    Recht et al., "Hogwild", NeurIPS 2011, Dean et al., "Large Scale Distributed Deep Networks", NeurIPS 2012 (Downpour).
    """

    staleness: float
    led: ClassVar[bool] = False
    idle: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.staleness >= 0:
            raise RecipeError(f"Bounded(staleness={self.staleness}): at least 0; math.inf is asynchronous")

    def of(self, p: int, deadline: float = math.inf) -> Bounded:
        return self

    def scaled(self, update: Update, now: Moment, rank: int) -> Update:
        # where the loss weighs its rows: as if those of all workers weighed alike
        rows = now.rows[rank]
        return Update(update.vector, update.weight * sum(now.rows) / rows if rows else 0.0)

    def open(self, p: int, first: int, leads: bool) -> Clocks:
        return Clocks(self, p, first)


class Clocks:
    """The book of Bounded. done[r]: steps of rank r that are in the weights; taken[r]: the step it last took weights for."""

    def __init__(self, rule: Bounded, p: int, first: int) -> None:
        self.rule, self.done, self.taken = rule, [first] * p, [first] * p
        self._waiting: list[int] = []  # in the order in which they came

    @property
    def version(self) -> int:
        return min(self.done)

    def late(self, step: int) -> bool:
        return False

    def push(self, rank: int, step: int, now: float) -> None:
        if step != self.done[rank] or rank in self._waiting:
            raise WireError(f"rank {rank} pushed step {step}, and has done {self.done[rank]}")
        self._waiting.append(rank)

    def ready(self, now: float) -> tuple[int, ...]:
        for rank in self._waiting:
            if self.done[rank] - self.rule.staleness <= min(self.taken):
                self._waiting.remove(rank)
                self.done[rank] += 1
                return (rank,)
        return ()

    def waits(self, rank: int) -> bool:
        return rank in self._waiting

    def took(self, rank: int, step: int) -> None:
        self.taken[rank] = step

    def wakes(self) -> float:
        return math.inf

    def missing(self) -> list[int]:
        return [rank for rank, done in enumerate(self.done) if done == self.version]

    def counted(self, rank: int, step: int) -> bool:
        return True

    def told(self) -> dict[str, Any]:
        return {}

    def end_epoch(self) -> None:
        pass
