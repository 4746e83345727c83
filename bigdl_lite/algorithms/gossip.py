"""Gossip: average with neighbours, and with nobody else.

    before    x_i <- sum_j W[i, j] x_j  -  lr u(g_i)       g_i is taken at the old x_i, while the models travel
    after     x_i <- sum_j W[i, j] (x_j - lr u(g_j))

u is what the user's optimizer makes of the gradient, with state of its own on every worker. No worker ever holds the mean; W
pulls all of them toward it. How models travel is a Mix: as they are (Whole), as coded differences to what neighbours know
already (Difference, Choco).

    n  length of the flat weights      p  workers      W  [p, p] rows and columns sum to 1 (comm/graph.py)

Source: Lian et al., "Can Decentralized Algorithms Outperform Centralized Algorithms?", NeurIPS 2017, Alg. 1; "after" is the
order of Lin et al., "Quasi-Global Momentum", ICML 2021.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from bigdl_lite.algorithms.algorithm import Advance, DurableAdvancer, Round, State, Update
from bigdl_lite.algorithms.exchange import copy_into
from bigdl_lite.algorithms.parts import Gradient, Sum
from bigdl_lite.algorithms.peer import Here, Moment, require_finite
from bigdl_lite.comm.beside import Beside
from bigdl_lite.comm.comm import Collectives
from bigdl_lite.comm.graph import Schedule, Static, graph_of, metropolis, partners, static
from bigdl_lite.comm.matcha import matcha
from bigdl_lite.errors import RecipeError
from bigdl_lite.model.layout import Blueprint
from bigdl_lite.model.replica import Replica
from bigdl_lite.wire.codec import Codec, decoded, encoded, length, made_for, on_bytes

Topology = Any  # a name in comm.graph.TOPOLOGIES, a Graph, a list of edges, or a function p -> Graph
Plan = Callable[[int], Schedule]  # p -> W of every step


class Mixer(Protocol):
    """The living half of a Mix."""

    def __call__(self, x: Tensor, w: np.ndarray, comm: Collectives, seed: int) -> Tensor:
        """sum_j w[rank, j] x_j, exactly or nearly, in memory of its own; x [n] float32 on the CPU is not changed."""
        ...

    def own(self) -> dict[str, Tensor]: ...


class Mix(Protocol):
    static: ClassVar[bool]  # whether W must be the same in every step

    def start(self, x: Tensor, w: np.ndarray, comm: Collectives) -> Mixer:
        """x [n]: where all workers begin, the same on all."""
        ...


@dataclass(frozen=True)
class Whole:
    """Models as they are.  Cost: 4 n bytes to each neighbour."""

    static: ClassVar[bool] = False

    def start(self, x: Tensor, w: np.ndarray, comm: Collectives) -> _Whole:
        return _Whole()


class _Whole:
    def __call__(self, x: Tensor, w: np.ndarray, comm: Collectives, seed: int) -> Tensor:
        to, sources = partners(w, comm.rank)
        found = dict(zip(sources, comm.swap(x, to, sources), strict=True))
        return _sum({comm.rank: x, **found}, w[comm.rank])

    def own(self) -> dict[str, Tensor]:
        return {}


def _sum(models: dict[int, Tensor], w: np.ndarray) -> Tensor:
    """In the order of ranks, so that every engine rounds alike."""
    total: Tensor | None = None
    for rank, x in sorted(models.items()):
        total = x * float(w[rank]) if total is None else total.add_(x, alpha=float(w[rank]))
    assert total is not None
    return total


@dataclass(frozen=True)
class Difference:
    """DCD-PSGD: what travels is the coded difference of a model to what its neighbours know of it already.

    Each worker keeps what the neighbours know of it, and what it knows of them; both are advanced by the same decoded bytes, so
    they are the same bits at both ends for ever. Needs a codec of small error, 8 bits say; below that take Choco.

    Cost    codec.nbytes(n) to each neighbour. Memory: 1 + neighbours vectors of n values.
    Source  Tang et al., "Communication Compression for Decentralized Training", NeurIPS 2018, Alg. 1; BAGUA's D_LP_S.
    """

    codec: Codec
    static: ClassVar[bool] = True

    def start(self, x: Tensor, w: np.ndarray, comm: Collectives) -> _Difference:
        _, sources = partners(w, comm.rank)
        return _Difference(self.codec, x.clone(), {other: x.clone() for other in sources})


class _Difference:
    def __init__(self, codec: Codec, known: Tensor, others: dict[int, Tensor]) -> None:
        self.codec, self.known, self.others = codec, known, others

    def __call__(self, x: Tensor, w: np.ndarray, comm: Collectives, seed: int) -> Tensor:
        # what the neighbours know now, mixed, and this worker's own step since then
        target = _sum({comm.rank: self.known, **self.others}, w[comm.rank]).add_(x).sub_(self.known)
        mine, theirs = coded_swap(self.codec, target.sub_(self.known), w, comm, seed)
        self.known.add_(mine)
        for other, difference in theirs.items():
            self.others[other].add_(difference)
        return self.known.clone()

    def own(self) -> dict[str, Tensor]:
        return {"exchange/known": self.known, **{f"exchange/known{r}": x for r, x in self.others.items()}}


@dataclass(frozen=True)
class Choco:
    """CHOCO-SGD: coded differences with any codec that contracts (top-k, sign), and a careful step toward the neighbours.

    gamma  of that step: smaller for codecs that keep less. Top 1 % needs about 0.05, sign about 0.45

    Cost    codec.nbytes(n) to each neighbour. Memory: 2 vectors of n values, whatever the number of neighbours.
    Source  Koloskova et al., "Decentralized Stochastic Optimization and Gossip Algorithms with Compressed Communication", ICML
            2019, Alg. 2 in the form that keeps only the weighted sum of the neighbours' copies.
    """

    codec: Codec
    gamma: float = 0.4
    static: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.gamma <= 1:
            raise RecipeError(f"Choco(gamma={self.gamma}): must be above 0 and at most 1")

    def start(self, x: Tensor, w: np.ndarray, comm: Collectives) -> _Choco:
        return _Choco(self, x.clone(), x.clone())


class _Choco:
    def __init__(self, how: Choco, known: Tensor, around: Tensor) -> None:
        self.how, self.known, self.around = how, known, around  # around: sum_j w[i, j] of what j is known to be

    def __call__(self, x: Tensor, w: np.ndarray, comm: Collectives, seed: int) -> Tensor:
        mine, theirs = coded_swap(self.how.codec, x - self.known, w, comm, seed)
        self.known.add_(mine)
        self.around.add_(_sum({comm.rank: mine, **theirs}, w[comm.rank]))
        return x.add(self.around - self.known, alpha=self.how.gamma)

    def own(self) -> dict[str, Tensor]:
        return {"exchange/known": self.known, "exchange/around": self.around}


def coded_swap(codec: Codec, x: Tensor, w: np.ndarray, comm: Collectives, seed: int) -> tuple[Tensor, dict[int, Tensor]]:
    """Sends x [n], encoded, to the neighbours: what they decode of it, and what this worker decodes of theirs."""
    to, sources = partners(w, comm.rank)
    made = [made_for(codec, seed, r, 0) for r in range(comm.size)]
    sent = on_bytes(encoded(made[comm.rank], x), torch.uint8)
    if any(length(made[r], len(x)) != len(sent) for r in sources):
        raise RecipeError(f"{codec!r} encodes to lengths that depend on the worker: take another codec")
    got = comm.swap(sent, to, sources)

    def read(r: int, data: Tensor) -> Tensor:
        return decoded(made[r], memoryview(data.numpy()), len(x), True)

    return read(comm.rank, sent), {r: read(r, data) for r, data in zip(sources, got, strict=True)}


@dataclass(frozen=True)
class Gossip:
    """The peer that averages with its neighbours.

    plan      p -> the mixing matrix of every step
    mix       how models travel
    early     whether the old models travel while the gradient is computed ("before"); else the advanced ones, afterwards
    each      steps between two mixings (local steps)

    Cost    that of the mix, to each neighbour, every `each` steps. One more vector of n values.
    """

    plan: Plan
    mix: Mix = Whole()
    early: bool = False
    each: int = 1
    alike: ClassVar[bool] = False
    every: ClassVar[int] = 50
    keeps: ClassVar[bool] = True
    threads: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.each < 1:
            raise RecipeError(f"Gossip(each={self.each}): at least 1 step")
        if self.early and self.mix.static:
            raise RecipeError(f"{type(self.mix).__name__} mixes models after the step that changed them: leave out early=True")

    def prepared(self, blueprint: Blueprint, replica: Replica, advance: Advance, p: int) -> Gossip:
        schedule = self.plan(p)
        if schedule.size != p:
            raise RecipeError(f"the plan of gossip is one for {schedule.size} workers, there are {p}")
        if self.mix.static and not isinstance(schedule, Static):
            raise RecipeError(
                f"{type(self.mix).__name__} needs neighbours that stay the same, and {type(schedule).__name__} changes them: take a "
                "fixed topology, or models as they are (Whole)"
            )
        if blueprint.layout.dtype != torch.float32 and self.mix.static:
            dtype = blueprint.layout.dtype
            raise RecipeError(f"{type(self.mix).__name__} codes models of float32, the module is of {dtype}: take Whole()")
        return replace(self, plan=_Ready(schedule))

    def start(self, here: Here) -> _Gossip:
        return _Gossip(self, here)


class _Gossip:
    def __init__(self, how: Gossip, here: Here) -> None:
        self.how, self.here, self.comm = how, here, here.comm
        self.weights = here.replica.weights
        self.schedule = how.plan(self.comm.size)
        self.advancer: DurableAdvancer = here.advance.start(here.replica, (0, len(self.weights)))
        self._settle_momentum = getattr(getattr(self.advancer, "optimizer", None), "settle", None)  # quasi-global: quasiglobal.py
        self.mixer = how.mix.start(self.weights.detach().cpu(), self.schedule.matrix(0), self.comm)
        self._mixed: Beside | None = None
        self._since = self.weights.detach().clone() if self._settle_momentum else None

    def _due(self, step: int) -> bool:
        return (step + 1) % self.how.each == 0

    def _mix(self, x: Tensor, now: Moment) -> Tensor:
        return self.mixer(x, self.schedule.matrix(now.step), self.comm, now.seed)

    def begin(self, now: Moment) -> None:
        if self.how.early and self._due(now.step):
            x = self.weights.detach().cpu()
            self._mixed = Beside(self._mix, x.clone() if x.data_ptr() == self.weights.data_ptr() else x, now, inline=self.here.inline)

    def step(self, update: Update, now: Moment) -> int:
        update = now.scaled(update, self.comm.rank)
        if self._mixed is not None:
            mixed, self._mixed = self._mixed.result(), None
            with torch.no_grad():
                self.weights.copy_(mixed)
        self.advancer.step(update, self.advancer.measure(update))
        if not self.how.early and self._due(now.step):
            x = self.weights.detach().cpu()
            require_finite(x, "model", self.comm.rank, now.step)
            with torch.no_grad():
                self.weights.copy_(self._mix(x, now))
        if self._settle_momentum is not None and self._due(now.step):
            moved = self._since.sub_(self.weights)
            self._settle_momentum({piece.parameter: moved[piece.start : piece.stop] for piece in self.advancer.pieces})
            self._since.copy_(self.weights)
        return now.step + 1

    def settle(self) -> dict[str, Any]:
        return {}

    def finish(self) -> None:
        pass

    @property
    def bytes_sent(self) -> int:
        return self.comm.bytes_sent

    def own(self) -> State:
        since = {} if self._since is None else {"exchange/since": self._since}
        return State({**self.mixer.own(), **since}, {})

    def restore(self, own: State) -> None:
        for name, x in self.own().tensors.items():
            copy_into(x, own, name)

    def close(self) -> None:
        pass


def fixed(topology: Topology = "ring", rule: Callable[[Any], np.ndarray] = metropolis) -> Plan:
    """The plan that mixes with the same neighbours in every step; rule makes W of a graph (metropolis, uniform, or your own)."""
    return _Fixed(topology, rule)


@dataclass(frozen=True)
class _Fixed:
    topology: Topology
    rule: Callable[[Any], np.ndarray]

    def __call__(self, p: int) -> Schedule:
        return static(self.rule(graph_of(self.topology, p)))


@dataclass(frozen=True)
class _Ready:
    """A plan that has been made, so that all ranks have the same bits of it."""

    schedule: Schedule

    def __call__(self, p: int) -> Schedule:
        return self.schedule


def matcha_plan(topology: Topology = "exponential", budget: float = 0.5, seed: int = 0) -> Plan:
    """The plan in which each matching of a graph's edges is used in some steps only: `budget` of all of them, on average.

    Source: Wang et al., "MATCHA: Speeding Up Decentralized SGD via Matching Decomposition Sampling", 2019.
    """
    return lambda p: matcha(graph_of(topology, p), budget, seed)


def gossip(
    topology: Topology = "ring", mix: Mix | Codec | None = None, early: bool = False, each: int = 1, plan: Plan | None = None,
    advance: Callable[[Advance], Advance] | None = None,
) -> Callable[[Advance], Round]:  # fmt: skip
    """The algorithm in which workers average with their neighbours.

    topology  a name ("ring", "torus", "exponential", "complete", "star", "random_regular", "davis", ...), a list of edges, a Graph,
              or a function p -> Graph; mixed by Metropolis weights
    mix       Whole() unless given; a codec stands for Difference(codec)
    plan      instead of topology: p -> a schedule (ShiftOne, OnePeerExponential, Matcha)
    """
    if plan is not None and topology != "ring":
        raise RecipeError(f"gossip has the topology {topology!r} and a plan, which says itself who meets whom: leave out one of them")
    made: Any = Whole() if mix is None else Difference(mix) if callable(getattr(mix, "encode", None)) else mix
    peer = Gossip(plan or fixed(topology), made, early, each)

    def method(given: Advance) -> Round:
        return Round(Gradient(), Sum(), advance(given) if advance else given, peer=peer)

    return method
