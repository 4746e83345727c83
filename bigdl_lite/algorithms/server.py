"""A parameter server whose shards are the workers themselves: nobody waits for everybody.

    worker r    computes the gradient of its rows           -> pushes slice s of it to shard s, for all s
    shard s     lives in worker s: owns slice s of the weights and its optimizer, and answers everyone from threads of its own
                applies pushes as the rule says (accept.py) -> answers with its slice of the weights, when the rule says

A worker asks each shard once a step, its own without a socket:

    ["push", step, weight], slice [m]      ->  ["take", version], slice [m]         or ["failed", error]
    ["pull", step]                         ->  the same                             where one answer was not enough

With FirstOf a version is the same weights on all shards, and a worker computes with no others: where answers are of several
versions, because some shards were already further, it asks the rest again for the newest of them, until all are of one. A version
is made of n pushes that were computed from all of the one before, so no shard runs away while a worker looks for the newest. An
answer is a copy of the slice, made at once and never changed. Rank 0 tells who makes a version to all others:

    ["accept", version, ranks]             on a link of its own to each of them

With Bounded there are no versions of the whole: each slice is as new as its shard. At a report nothing is under way, so then
all ranks take the same weights. Between a report and the next step of its own rank, a shard lets nothing in: its state may be
read there.

Cost of a step, bytes of all p workers: 2 (p - 1) 4 n, also for pushes that are dropped. Memory of each: its weights and gradient;
served weights n, of which its slice is used; a push of each other worker, n in all; the optimizer's state of its slice.

    n  length of the flat weights      m  of one slice      p  workers, and shards
"""

from __future__ import annotations

import contextlib
import json
import math
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from bigdl_lite.algorithms.accept import AllBut, Book, Bounded, FirstOf, Rule
from bigdl_lite.algorithms.algorithm import Advance, Round, State, Update
from bigdl_lite.algorithms.parts import Gradient, Sum
from bigdl_lite.algorithms.peer import Here, Moment, require_finite
from bigdl_lite.algorithms.shard import Shard
from bigdl_lite.comm.door import Service, call
from bigdl_lite.comm.link import TENSOR, Link, exchange
from bigdl_lite.errors import BigDLError, PeerLost, RecipeError, WireError, report, revive
from bigdl_lite.model.layout import Blueprint
from bigdl_lite.model.replica import Replica


@dataclass(frozen=True)
class Served:
    """The peer whose workers serve one another. rule: FirstOf, AllBut or Bounded.

    Raises PeerLost where a worker is gone: its shard is gone with it. MeetingTimeout, which names them, where workers take longer
    than the deadline for a step.
    """

    rule: FirstOf | AllBut | Bounded
    alike: ClassVar[bool] = True
    every: ClassVar[int] = 0
    keeps: ClassVar[bool] = True
    threads: ClassVar[bool] = True

    def prepared(self, blueprint: Blueprint, replica: Replica, advance: Advance, p: int) -> Served:
        if advance.measures:
            raise RecipeError(
                "clipNorm needs the norm of the whole gradient, and the shards of a parameter server advance their slices without "
                "waiting for one another: take clipValue, or leave it out"
            )
        scheduled = getattr(advance, "scheduler", None) is not None and getattr(advance, "per", "") == "step"
        if scheduled and not self.rule.led and p > 1:
            raise RecipeError(
                f"{self.rule!r} applies each push by itself, {p} in a step, and schedulerInterval='step' would count them: take 'epoch'"
            )
        return Served(self.rule.of(p))

    def start(self, here: Here) -> _Serving:
        return _Serving(self, here)


class _Serving:
    """One rank: its shard, the threads that answer for it, and links to the shards of all others."""

    def __init__(self, how: Served, here: Here) -> None:
        self.here, self.rank, self.size = here, here.comm.rank, here.comm.size
        self.rule: Rule = how.rule.of(self.size, here.deadline)
        self.cuts = here.advance.cuts(here.replica, self.size)
        self.cut = self.cuts[self.rank]
        self.shard = self.advancer = Shard(self.rule, here, self.cut)
        self.book: Book = self.shard.book
        self.weights = here.replica.weights.detach()
        self.used = True  # whether the last update counts
        self._landing = self.weights if self.weights.device.type == "cpu" else torch.empty_like(self.weights, device="cpu")
        self._patience = 2 * here.deadline  # the other end says itself what it waited for in vain
        self._next = here.first
        self._links: dict[int, Link] = {}
        self._asked = [0] * self.size
        self._sent = [0] * self.size  # by the thread that answers each rank; by that of step() at this one's place
        self._service: Service | None = None
        self._leader: Link | None = None  # over which rank 0 tells what it decides
        self._follower = threading.Thread(target=self._follow, name="bigdl_lite-shard", daemon=True)
        if self.size > 1:
            try:
                self._meet()
            except BaseException:
                self.close()
                raise

    def begin(self, now: Moment) -> None:
        self.shard.let_in(True)

    def step(self, update: Update, now: Moment) -> int:
        update = self.rule.scaled(update, now, self.rank)
        x = update.vector.detach().cpu().contiguous()
        require_finite(x, "update", self.rank, now.step)
        for other, link in self._links.items():
            self._ask(other, ["push", now.step, update.weight])
            link.send(TENSOR, self._asked[other], _bytes(x[slice(*self.cuts[other])]))
            self._sent[self.rank] += _bytes(x[slice(*self.cuts[other])]).nbytes
        exchange(self._links.values(), self._patience)
        versions = {self.rank: self._land(*self.shard.push(self.rank, now.step, Update(x[slice(*self.cut)], update.weight)))}
        versions |= {other: self._hear(other) for other in self._links}
        if self.rule.led:
            while behind := [rank for rank, version in versions.items() if version < max(versions.values())]:
                versions |= self._pull(behind, max(versions.values()))
        self._arrive()
        self.used = self.book.counted(self.rank, now.step)
        self._next = max(versions.values()) if self.rule.led else now.step + 1
        return self._next

    def settle(self) -> dict[str, Any]:
        """All ranks have pushed what they have when it returns, and all have the same weights."""
        if self.rule.staleness:
            self._pull(range(self.size), self._next)
            self._arrive()
        self.shard.let_in(False)
        return self.book.told()

    def finish(self) -> None:
        pass

    @property
    def bytes_sent(self) -> int:
        return sum(self._sent)

    def own(self) -> State:
        return State({}, self.book.told())

    def restore(self, own: State) -> None:
        counts = own.facts.get("accepted", [])
        if self.rule.led and len(counts) == self.size:
            self.shard.book.counts = list(counts)

    def close(self) -> None:
        self.shard.fail(PeerLost(f"rank {self.rank} has left"))
        for link in (*self._links.values(), self._leader):
            if link is not None:
                link.close()
        if self._service is not None:
            self._service.close()
        if self._follower.ident is not None:
            self._follower.join(2.0)

    # ---- as a worker ------------------------------------------------------------------------------------------------------

    def _meet(self) -> None:
        store, host = self.here.reach
        self._service = Service(host, store.token, f"shard/{self.rank}", self._serve, "bigdl_lite-shard")
        store.put(f"shard/{self.rank}", json.dumps([host, self._service.port]).encode())
        for other in range(self.size):
            if other != self.rank:
                self._links[other] = self._call(other, "worker")
        if self.rule.led and self.rank:
            self._leader = self._call(0, "follower")
            self._follower.start()

    def _call(self, other: int, role: str) -> Link:
        store, _ = self.here.reach
        host, port = json.loads(store.get(f"shard/{other}"))
        link = call(host, port, store.token, f"shard/{other}", self.rank, self.here.deadline, f"rank {other}")
        link.tell([role, self.rank], self.here.deadline)
        return link

    def _ask(self, other: int, fact: list[Any]) -> None:
        self._asked[other] += 1
        self._links[other].tell(fact, self._patience)

    def _pull(self, ranks: Collection[int], step: int) -> dict[int, int]:
        """Slices of these shards at version `step` at least, and their versions."""
        for rank in ranks:
            if rank != self.rank:
                self._ask(rank, ["pull", step])
        found = {self.rank: self._land(*self.shard.take(self.rank, step))} if self.rank in ranks else {}
        return found | {rank: self._hear(rank) for rank in ranks if rank != self.rank}

    def _hear(self, other: int) -> int:
        link = self._links[other]
        match link.hear(self._patience):
            case ["take", version] if _whole(version):
                link.receive(self._asked[other], _bytes(self._landing[slice(*self.cuts[other])]))
                exchange([link], self._patience)
                return version
            case ["failed", {"kind": str(kind), "message": str(message)}]:
                raise revive({"kind": kind, "message": message})
            case fact:
                raise WireError(f"the shard of rank {other} answered {str(fact)[:80]}")

    def _land(self, version: int, x: Tensor) -> int:
        self._landing[slice(*self.cut)].copy_(x)
        return version

    def _arrive(self) -> None:
        if self._landing is not self.weights:
            self.weights.copy_(self._landing)

    # ---- as a shard: in threads of the service, one for each link ------------------------------------------------------------

    def _serve(self, link: Link) -> None:
        match link.hear(self.here.deadline):
            case ["worker", rank] if _whole(rank) and rank < self.size and rank != self.rank:
                work = partial(self._answer, link, rank)
            case ["follower", rank] if _whole(rank) and 0 < rank < self.size and self.rank == 0 and self.rule.led:
                work = partial(self._lead, link)
            case fact:
                raise WireError(f"neither a worker nor a follower of {self.size}: {str(fact)[:80]}")
        try:
            work()
        except Exception as error:  # also where the visitor is gone: without its pushes nobody can go on
            self.shard.fail(error)
            with contextlib.suppress(BigDLError):
                link.tell(["failed", report(error, f"the shard of rank {self.rank}")], 1.0)
            raise

    def _answer(self, link: Link, rank: int) -> None:
        room, asked = torch.empty(self.cut[1] - self.cut[0], dtype=self.weights.dtype), 0
        while True:
            fact, asked = link.hear(None), asked + 1
            match fact:
                case ["push", step, weight] if _whole(step) and _number(weight):
                    link.receive(asked, _bytes(room))
                    exchange([link], self._patience)
                    version, x = self.shard.push(rank, step, Update(room, float(weight)))
                case ["pull", step] if _whole(step):
                    version, x = self.shard.take(rank, step)
                case _:
                    raise WireError(f"rank {rank} asked a shard for {str(fact)[:80]}")
            link.tell(["take", version], self._patience)
            link.send(TENSOR, asked, _bytes(x))
            exchange([link], self._patience)
            self._sent[rank] += x.nbytes

    def _lead(self, link: Link) -> None:
        version = self.here.first
        while True:
            link.tell(["accept", version, self.shard.accepted(version)], self._patience)
            version += 1

    def _follow(self) -> None:
        assert self._leader is not None
        try:
            while True:
                match self._leader.hear(None):
                    case ["accept", version, [*ranks]] if _whole(version):
                        self.shard.accept(version, ranks)
                    case ["failed", {"kind": str(kind), "message": str(message)}]:
                        raise revive({"kind": kind, "message": message})
                    case fact:
                        raise WireError(f"rank 0 told {str(fact)[:80]}")
        except Exception as error:
            self.shard.fail(error)


def _bytes(x: Tensor) -> memoryview:
    """The memory of a contiguous tensor itself."""
    return memoryview(x.view(torch.uint8).numpy()) if x.numel() else memoryview(b"")


def _whole(x: Any) -> bool:
    return type(x) is int and 0 <= x < 1 << 53


def _number(x: Any) -> bool:
    return type(x) in (int, float) and math.isfinite(x) and x >= 0


def backup_workers(backups: int = 1, patience: float = 30.0) -> Callable[[Advance], Round]:
    """The algorithm that takes the first gradients of each step and drops those of the `backups` slowest workers. See FirstOf.

    The learning rate is that of synchronous SGD with numWorkers - backups workers.
    """
    peer = Served(AllBut(backups, patience))
    return lambda advance: Round(Gradient(), Sum(), advance, peer=peer)


def bounded_staleness(bound: float = 4) -> Callable[[Advance], Round]:
    """The algorithm in which no worker is more than `bound` steps ahead of the slowest; math.inf: asynchronous SGD. See Bounded."""
    peer = Served(Bounded(bound))
    return lambda advance: Round(Gradient(), Sum(), advance, peer=peer)
