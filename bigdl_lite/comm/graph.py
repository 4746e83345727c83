"""Graphs: who talks to whom, and with which weights they average.

    Graph        ranks and edges; made by a pure function p -> Graph, all of them in TOPOLOGIES
    W            how a graph averages: x_i  <-  sum_j W[i, j] x_j. Row i is what rank i hears, column j who hears rank j
    Schedule     a W for every step: Static, ShiftOne, OnePeerExponential here, Matcha in comm.matcha

    p  ranks      d_i  neighbours of rank i      W  [p, p] float64, non-negative, rows and columns sum to 1

Rows that sum to 1 make an average of what is heard; columns that sum to 1 keep the mean of all ranks where it is. A W with
the first alone pulls the ranks together, but to a mean that favours those with many neighbours.
A graph is made once, on the driver, and shipped as a frozen value: ranks need not agree on a version of networkx.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from bigdl_lite.batch import mix
from bigdl_lite.errors import RecipeError

Edge = tuple[int, int]
TOLERANCE = 1e-12  # of the sums and the symmetry of W


@dataclass(frozen=True)
class Graph:
    """p ranks and undirected edges between them, kept as pairs i < j, ascending, each once.

    Raises  RecipeError for a size below 1, a rank outside [0, size), an edge from a rank to itself.
    """

    size: int
    edges: tuple[Edge, ...]

    def __post_init__(self) -> None:
        size = operator.index(self.size)
        if size < 1:
            raise RecipeError(f"a graph of {size} ranks has nobody in it; size must be at least 1")
        object.__setattr__(self, "size", size)
        object.__setattr__(self, "edges", tuple(sorted({_edge(given, size) for given in self.edges})))

    def neighbours(self, rank: int) -> tuple[int, ...]:
        """Ascending.  Cost O(edges)."""
        return tuple(sorted(i + j - rank for i, j in self.edges if rank in (i, j)))

    def degree(self, rank: int) -> int:
        return len(self.neighbours(rank))

    @property
    def degrees(self) -> tuple[int, ...]:
        """Of all ranks.  Cost O(p + edges)."""
        return tuple(np.bincount(np.array(self.edges, dtype=np.int64).reshape(-1), minlength=self.size).tolist())

    @property
    def unreachable(self) -> tuple[int, ...]:
        """The ranks to which no path leads from rank 0, ascending.  Cost O(p + edges times the longest path)."""
        reached = {0}
        while found := {end for edge in self.edges if not reached.isdisjoint(edge) for end in edge} - reached:
            reached |= found
        return tuple(i for i in range(self.size) if i not in reached)

    @property
    def connected(self) -> bool:
        return not self.unreachable


def _edge(given: object, size: int) -> Edge:
    try:
        i, j = (operator.index(end) for end in given)  # type: ignore[attr-defined]
    except (TypeError, ValueError) as error:
        raise RecipeError(f"{given!r} is no edge; an edge is a pair of ranks, as in [(0, 1), (1, 2)]") from error
    if i == j:
        raise RecipeError(f"edge ({i}, {j}) joins rank {i} to itself; its own weight is in W already, leave the edge out")
    if min(i, j) < 0 or max(i, j) >= size:
        raise RecipeError(f"edge ({i}, {j}) leaves the graph of {size} ranks; they are numbered 0 to {size - 1}")
    return min(i, j), max(i, j)


def ring(p: int) -> Graph:
    """Everybody and the next.  d = 2; with p = 2 the two neighbours are one, and with p = 1 there is none."""
    return _circulant(p, [1])


def torus(p: int) -> Graph:
    """The most square grid a x b = p, closed both ways.  d = 4, one less for every side of 2 (its two neighbours are one).

    A prime p has the grid 1 x p alone: a ring.
    """
    a = next((a for a in range(int(p**0.5), 0, -1) if p % a == 0), 1)
    b = p // a
    right = [(r * b + c, r * b + (c + 1) % b) for r in range(a) for c in range(b) if b > 1]
    down = [(r * b + c, (r + 1) % a * b + c) for r in range(a) for c in range(b) if a > 1]
    return Graph(p, (*right, *down))


def exponential(p: int) -> Graph:
    """Rank i and those 1, 2, 4, ... ahead of it, in both directions: d is at most 2 ceil(log2 p), and no two are far apart.

    Source: Assran et al., "Stochastic Gradient Push for Distributed Deep Learning", ICML 2019 (there directed).
    """
    return _circulant(p, [2**k for k in range((p - 1).bit_length())])


def complete(p: int) -> Graph:
    """Everybody with everybody: d = p - 1, and one step gives the exact mean."""
    return Graph(p, tuple((i, j) for j in range(p) for i in range(j)))


def star(p: int) -> Graph:
    """Rank 0 with everybody, and nobody else."""
    return Graph(p, tuple((0, i) for i in range(1, p)))


def random_regular(p: int, degree: int = 3, seed: int = 0) -> Graph:
    """A random connected graph in which everybody has `degree` neighbours, or all p - 1 others where that is less.

    Raises  RecipeError when there is no such graph: p times degree is odd, or degree is too small to connect p ranks.
    """
    import networkx  # torch needs it, so it is there; but slow to load

    d = min(degree, p - 1)
    if d % 2 and p % 2:
        raise RecipeError(
            f"{p} ranks cannot have {d} neighbours each: an edge has two ends, and {p} x {d} is odd; "
            f"take an even number of ranks, or topology=lambda p: random_regular(p, degree={d + 1})"
        )
    if d < min(2, p - 1):
        raise RecipeError(f"random_regular(degree={degree}) cannot connect {p} ranks; degree must be at least 2, better 3")
    drawn = (networkx.random_regular_graph(d, p, seed=mix(seed, attempt)) for attempt in itertools.count())
    return next(graph for graph in (Graph(p, tuple(each.edges)) for each in drawn) if graph.connected)


def davis(p: int) -> Graph:
    """18 women, 14 events, 89 edges.  Source: Davis et al., 1941; used by Lin et al., "Quasi-Global Momentum", ICML 2021."""
    return _social("davis", "davis_southern_women_graph", 32, p)


def karate(p: int) -> Graph:
    """34 members of a karate club, 78 edges.  Source: Zachary, J. of Anthropological Research, 1977."""
    return _social("karate", "karate_club_graph", 34, p)


def florentine(p: int) -> Graph:
    """15 families of Florence, 20 marriages.  Source: Breiger and Pattison, Social Networks, 1986."""
    return _social("florentine", "florentine_families_graph", 15, p)


def les_miserables(p: int) -> Graph:
    """77 characters of the novel, 254 edges between those who meet.  Source: Knuth, "The Stanford GraphBase", 1993."""
    return _social("les_miserables", "les_miserables_graph", 77, p)


TOPOLOGIES: dict[str, Callable[[int], Graph]] = {
    "ring": ring, "torus": torus, "exponential": exponential, "complete": complete, "star": star,
    "random_regular": random_regular,
    "davis": davis, "karate": karate, "florentine": florentine, "les_miserables": les_miserables,
}  # fmt: skip
Topology = str | Graph | Iterable[Edge] | Callable[[int], Graph]


def graph_of(given: Topology, p: int) -> Graph:
    """The graph of p ranks that a setting means: a name in TOPOLOGIES, a Graph, a list of edges, or a function p -> Graph.

    Raises  RecipeError for anything else, for a graph of another size, and for one that is not connected.
    """
    if isinstance(given, str) and given not in TOPOLOGIES:
        raise RecipeError(f"there is no topology {given!r}; there are {', '.join(sorted(TOPOLOGIES))}, or give a list of edges")
    made = TOPOLOGIES[given](p) if isinstance(given, str) else given(p) if callable(given) else given
    if isinstance(made, str) or not isinstance(made, (Graph, Iterable)):
        kind = type(made).__name__
        raise RecipeError(f"topology {given!r} is or returns {kind}; give a name, a Graph, edges [(0, 1), ...] or a function of p")
    graph = made if isinstance(made, Graph) else Graph(p, tuple(made))
    if graph.size != p:
        raise RecipeError(f"the topology has {graph.size} ranks and there are {p} workers; the two numbers must be equal")
    lost = graph.unreachable
    if lost:
        told = ", ".join(map(str, lost[:10])) + (f", ... ({len(lost)} in all)" if len(lost) > 10 else "")
        raise RecipeError(f"no path leads from rank 0 to {told}, so the {p} ranks would never agree; add the edges that are missing")
    return graph


def _circulant(p: int, hops: Iterable[int]) -> Graph:
    return Graph(p, tuple((i, (i + hop) % p) for hop in hops for i in range(p) if hop % p))


def _social(name: str, maker: str, size: int, p: int) -> Graph:
    """Ranks are numbered in the order in which networkx lists the nodes; weights and attributes stay behind."""
    if p != size:
        raise RecipeError(f"topology {name!r} has {size} ranks and there are {p} workers; take {size} workers or another topology")
    import networkx

    known = getattr(networkx, maker)()
    rank = {node: i for i, node in enumerate(known.nodes)}
    return Graph(size, tuple((rank[a], rank[b]) for a, b in known.edges))


def metropolis(graph: Graph) -> np.ndarray:
    """W [p, p] with W[i, j] = 1 / (1 + max(d_i, d_j)) on edges, and on the diagonal what is left: never below 1 / (1 + d_i).

    Source: Xiao and Boyd, "Fast Linear Iterations for Distributed Averaging", Systems and Control Letters 2004.
    """
    d = graph.degrees
    return _weighted(graph, [1 / (1 + max(d[i], d[j])) for i, j in graph.edges])


def uniform(graph: Graph) -> np.ndarray:
    """W [p, p] with 1 / (1 + largest d) on every edge, and on the diagonal what is left.  Ring: 1/3; complete: 1/p.

    Source: Lian et al., "Can Decentralized Algorithms Outperform Centralized Algorithms?" (D-PSGD), NeurIPS 2017.
    """
    return _weighted(graph, [1 / (1 + max(graph.degrees))] * len(graph.edges))


def _weighted(graph: Graph, weights: Iterable[float]) -> np.ndarray:
    W = np.zeros((graph.size, graph.size))
    for (i, j), weight in zip(graph.edges, weights, strict=True):
        W[i, j] = W[j, i] = weight
    np.fill_diagonal(W, 1 - W.sum(1))
    return W


def check_mixing(W: np.ndarray, directed: bool = False) -> np.ndarray:
    """W [p, p] as float64, if it can be averaged with for ever.

    Raises  RecipeError unless it is square, finite, non-negative, and within 1e-12 its rows and columns sum to 1 and it is
            symmetric (which a directed one need not be).
    """
    W = np.asarray(W, dtype=np.float64)
    if W.ndim != 2 or W.shape[0] != W.shape[1] or not len(W):
        raise RecipeError(f"a mixing matrix has shape [p, p], not {list(W.shape)}")
    for fault, where in (("not finite", ~np.isfinite(W)), ("negative", W < 0)):
        if where.any():
            i, j = np.argwhere(where)[0].tolist()
            raise RecipeError(f"W[{i}, {j}] is {W[i, j]:g}, which is {fault}; the weights of an average are numbers from 0 to 1")
    for line, sums in (("row", W.sum(1)), ("column", W.sum(0))):
        k = int(np.abs(sums - 1).argmax())
        if abs(sums[k] - 1) > TOLERANCE:
            why = "what a rank hears would grow or shrink" if line == "row" else "the mean of all ranks would drift"
            way = "metropolis(graph) gives weights that fit any graph"
            raise RecipeError(f"{line} {k} of the mixing matrix sums to {sums[k]:.15g}, not 1: {why} with every step; {way}")
    off = np.abs(W - W.T)
    if not directed and off.max() > TOLERANCE:
        i, j = np.unravel_index(off.argmax(), off.shape)
        raise RecipeError(f"W[{i}, {j}] is {W[i, j]:.15g} and W[{j}, {i}] is {W[j, i]:.15g}; a mixing matrix is symmetric")
    return W


def spectral_gap(W: np.ndarray) -> float:
    """1 - max(|lambda_2|, |lambda_p|) of a symmetric W [p, p]: 1 when a step gives the mean, 0 when ranks never agree.

    Every step takes the ranks' distance from their mean down to 1 - gap of it, or less.  Cost O(p^3).
    Raises  RecipeError as check_mixing does.
    """
    W = check_mixing(W)
    return 1 - float(np.abs(np.linalg.eigvalsh(W - 1 / len(W))).max())  # J = 1/p takes lambda_1 = 1 to 0, and no other


def partners(W: np.ndarray, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Whom this rank sends to (its column of W) and whom it hears (its row), ascending, without itself.  Cost O(p)."""
    to, heard = (tuple(i for i in np.flatnonzero(line).tolist() if i != rank) for line in (W[:, rank], W[rank]))
    return to, heard


class Schedule(Protocol):
    """A W for every step. Pure: every rank computes the same one from the same step."""

    @property
    def size(self) -> int: ...

    def matrix(self, step: int) -> np.ndarray:
        """W [p, p] float64 of a step, counted from 0; rows and columns sum to 1."""
        ...


@dataclass(frozen=True)
class Static:
    """The same W at every step; make it with static(W).  Each rank sends d_i vectors a step: D-PSGD of Lian et al., 2017."""

    rows: tuple[tuple[float, ...], ...]  # a tuple, not an array: two schedules compare by value

    def __post_init__(self) -> None:
        check_mixing(np.array(self.rows))

    @property
    def size(self) -> int:
        return len(self.rows)

    def matrix(self, step: int) -> np.ndarray:
        return np.array(self.rows)


def static(W: np.ndarray) -> Static:
    """W [p, p] at every step.  Raises  RecipeError as check_mixing does."""
    return Static(tuple(map(tuple, check_mixing(W).tolist())))


@dataclass(frozen=True)
class ShiftOne:
    """Pairs: each rank meets one other a step, and both take the mean.  One vector sent a step and rank.

    p even    rank i < p/2 meets p/2 + (step + i) mod p/2: every pair across the halves once in p/2 steps
    p odd     i meets j where i + j = step mod p, and the one with 2 i = step idles: every pair once in p steps

    Source: Gan et al., "BAGUA", VLDB 2022 (shift_one; it refuses odd p, which here follow a round-robin tournament).
    """

    size: int

    def __post_init__(self) -> None:
        Graph(self.size, ())  # refuses a size below 1

    def matrix(self, step: int) -> np.ndarray:
        p, half = self.size, self.size // 2
        if p % 2:
            return _halved([(step - i) % p for i in range(p)])  # who would meet itself idles
        return _halved([half + (step + i) % half for i in range(half)] + [(i - step) % half for i in range(half)])


@dataclass(frozen=True)
class OnePeerExponential:
    """Rank i keeps half of its own and takes half of rank i - 2^(step mod k), k = ceil(log2 p).  One vector sent a step.

    Directed: W is not symmetric, but its columns sum to 1 too. When p is a power of two, any k steps in a row give the
    exact mean; otherwise they come near it.
    Source: Assran et al., "Stochastic Gradient Push for Distributed Deep Learning", ICML 2019.
    """

    size: int

    def __post_init__(self) -> None:
        Graph(self.size, ())  # refuses a size below 1

    def matrix(self, step: int) -> np.ndarray:
        p, k = self.size, max(1, (self.size - 1).bit_length())
        return _halved([(i - 2 ** (step % k)) % p for i in range(p)])


def _halved(heard: list[int]) -> np.ndarray:
    """W in which rank i takes half of its own and half of rank heard[i], which may be itself."""
    W = np.eye(len(heard)) / 2
    W[np.arange(len(heard)), heard] += 0.5
    return W
