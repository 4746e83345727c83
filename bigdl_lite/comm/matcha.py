"""MATCHA: each step uses some of a graph's edges, drawn so that the important ones come most often.

The edges are cut into matchings, sets in which nobody has two partners and which therefore take the time of one message
each. A step draws every matching j on its own with probability p_j and averages over the drawn ones:

    W_t  =  I - alpha sum of L_j over the drawn j            L_j is the Laplacian of matching j

    budget   the share of the M matchings that a step may use on average: sum p_j <= budget M
    p_j      maximise lambda_2 of the mean Laplacian, sum p_j L_j: how well the graph is connected on average
    alpha    minimises ||E[W_t^2] - J||_2, the share of the ranks' squared distance from their mean that a step leaves

    p  ranks      M  matchings, at most largest degree + 1      J  [p, p] of 1/p

Source: Wang, Sahu, Yang, Joshi, Kar, "MATCHA: Speeding Up Decentralized SGD via Matching Decomposition Sampling", 2019.
One difference: alpha is at most 1 / largest degree here, so that no weight of any W_t is negative. That costs little where
degrees are alike; where they are not, ranks agree more slowly (karate, budget 0.5: the norm is 0.96, and 0.88 without).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from bigdl_lite.batch import mix
from bigdl_lite.comm.graph import Edge, Graph
from bigdl_lite.errors import RecipeError

Matching = tuple[Edge, ...]

_DRAW = 0x4D41  # sets these draws apart from others made of the same seed
_STEPS = 300  # of the supergradient: on 10 graphs with 5 budgets, lambda_2 was 0.1 % below that of 20 times as many, at worst 2 %
_PATIENCE = 25  # steps without a better lambda_2; where all p_j = budget is best already, that is soon known
_CUTS = 35  # of the golden section: 1 / degree x 0.618^35 is 5e-8


@dataclass(frozen=True)
class Matcha:
    """A schedule; make it with matcha(graph, budget, seed).

    Every rank draws the same matchings at a step, whatever it did before: they are a function of seed and step. The numbers
    below are computed once and shipped, since two machines' eigenvectors need not have the same bits.

    Cost  of a step: sum p_j messages one after the other, and sum p_j 2 len(matching j) vectors sent by all, on average.
    """

    size: int
    matchings: tuple[Matching, ...]
    probabilities: tuple[float, ...]
    alpha: float
    seed: int = 0

    def __post_init__(self) -> None:
        if len(self.matchings) != len(self.probabilities):
            raise RecipeError(f"{len(self.matchings)} matchings have {len(self.probabilities)} probabilities; each needs its own")
        if not all(0 <= p <= 1 for p in self.probabilities):
            raise RecipeError(f"probabilities are {self.probabilities}; each must be from 0 to 1")
        most = max(Graph(self.size, tuple(itertools.chain(*self.matchings))).degrees)
        if not 0 <= self.alpha * most <= 1:
            raise RecipeError(f"alpha is {self.alpha:g}; from 0 to 1 / {most} (largest degree) no weight is negative")

    def active(self, step: int) -> tuple[int, ...]:
        """The numbers of the matchings drawn at a step, ascending."""
        # raw words: unlike random(), numpy promises that they never change
        words = np.random.Philox(mix(self.seed, _DRAW, step)).random_raw(len(self.matchings))
        drawn = (words >> np.uint64(11)) * 2.0**-53 < np.array(self.probabilities)
        return tuple(np.flatnonzero(drawn).tolist())

    def matrix(self, step: int) -> np.ndarray:
        """W [p, p] of a step: symmetric, non-negative, rows and columns sum to 1; the identity where nothing is drawn."""
        edges, _ = _flat([self.matchings[j] for j in self.active(step)])
        return np.eye(self.size) - self.alpha * _laplacian(self.size, edges, np.ones(len(edges)))

    @property
    def norm(self) -> float:
        """||E[W_t^2] - J||_2: below 1, and the closer to 0 the faster the ranks agree.  Cost O(p^3)."""
        return _remaining(self.size, self.matchings, np.array(self.probabilities))(self.alpha)


def matcha(graph: Graph, budget: float = 0.5, seed: int = 0) -> Matcha:
    """The schedule of a connected graph that uses `budget` of its matchings on average, 0 < budget <= 1; with 1 it uses all.

    Cost  about 350 eigenvalue problems [p, p]: 0.1 s for 32 ranks, 0.3 s for 77; ten times that where BLAS threads lack cores.
    Raises  RecipeError for another budget, and for a graph that is not connected.
    """
    if not 0 < budget <= 1:
        raise RecipeError(f"the budget is {budget}; it is the share of matchings that a step uses, above 0 and at most 1")
    if not graph.connected:
        raise RecipeError(f"MATCHA needs a connected graph; rank 0 cannot reach {graph.unreachable} of {graph.size} ranks")
    found = matchings(graph)
    p = activation(graph.size, found, budget)
    alpha = _golden(_remaining(graph.size, found, p), 1 / max(graph.degrees)) if found else 0.0
    return Matcha(graph.size, found, tuple(p.tolist()), alpha, seed)


def matchings(graph: Graph) -> tuple[Matching, ...]:
    """At most largest degree + 1 matchings that together hold each edge once: the edges of each colour of a colouring.

    Source  Misra and Gries, "A Constructive Proof of Vizing's Theorem", Information Processing Letters 1992.
    """
    colours = range(max(graph.degrees) + 1)
    met: list[dict[int, int]] = [{} for _ in range(graph.size)]  # of each rank: colour -> the other end of that edge
    for u, v in graph.edges:
        common = next((c for c in colours if c not in met[u] and c not in met[v]), None)
        if common is None:
            _make_room(met, colours, u, v)
        else:
            met[u][common], met[v][common] = v, u
    by_colour = [tuple((i, met[i][c]) for i in range(graph.size) if met[i].get(c, -1) > i) for c in colours]
    return tuple(matching for matching in by_colour if matching)


def _make_room(met: list[dict[int, int]], colours: Sequence[int], u: int, v: int) -> None:
    """Colours edge (u, v), whose ends lack no colour in common, by changing the colours of others."""
    colour = {w: c for c, w in met[u].items()}  # of u's edges
    fan: list[int] = [v]  # neighbours of u: the edge of each has a colour that the one before lacks
    while more := [w for w in sorted(colour) if w not in fan and colour[w] not in met[fan[-1]]]:
        fan.append(more[0])
    c = next(c for c in colours if c not in met[u])
    d = next(c for c in colours if c not in met[fan[-1]])

    path, x, here = [], u, d  # from u along edges of colour d, c, d, ...; with the two exchanged, u lacks d
    while here in met[x]:
        path.append((x, met[x][here], here))
        x, here = met[x][here], c + d - here
    for x, y, here in path:
        del met[x][here], met[y][here]
    for x, y, here in path:
        met[x][c + d - here], met[y][c + d - here] = y, x

    colour = {w: c for c, w in met[u].items()}
    last = next(k for k, w in enumerate(fan) if d not in met[w])  # there is one, and up to it the fan is still a fan
    moved = [colour[w] for w in fan[1 : last + 1]]  # each edge of the fan takes the colour of the next
    for w, here in zip(fan[1 : last + 1], moved, strict=True):
        del met[u][here], met[w][here]
    for w, here in zip(fan[: last + 1], [*moved, d], strict=True):
        met[u][here], met[w][here] = w, u


def activation(size: int, found: Sequence[Matching], budget: float) -> np.ndarray:
    """The probabilities [M] that maximise lambda_2(sum p_j L_j) with sum p_j <= budget M and 0 <= p_j <= 1.

    A supergradient of lambda_2 is (v_a - v_b)^2 summed over the edges of each matching, v its eigenvector; where several
    eigenvectors share lambda_2, their mean, which keeps what is symmetric symmetric. Never worse than all p_j = budget.
    """
    edges, owner = _flat(found)
    cap = budget * len(found)
    p = best = np.full(len(found), float(budget))
    most, since = -1.0, 0
    for step in range(_STEPS if budget < 1 and len(found) > 1 else 0):
        values, vectors = np.linalg.eigh(_laplacian(size, edges, p[owner]))
        if values[1] > most * (1 + 1e-9):
            most, best, since = values[1], p, step
        if step - since == _PATIENCE:
            break
        v = vectors[:, 1:][:, values[1:] <= values[1] * (1 + 1e-6) + 1e-12]
        rise = ((v[edges[:, 0]] - v[edges[:, 1]]) ** 2).mean(1)
        g = np.bincount(owner, rise, len(found))
        p = _projected(p + budget * g / (np.linalg.norm(g) * np.sqrt(step + 4)), cap)
    return best


def _projected(x: np.ndarray, cap: float) -> np.ndarray:
    """The point of 0 <= p <= 1, sum p <= cap that is nearest to x: x less a number, cut off at 0 and 1."""
    less, more = 0.0, float(max(0.0, x.max()))
    if np.clip(x, 0, 1).sum() <= cap:
        return np.clip(x, 0, 1)
    for _ in range(60):
        middle = (less + more) / 2
        less, more = (middle, more) if np.clip(x - middle, 0, 1).sum() > cap else (less, middle)
    return np.clip(x - more, 0, 1)


def _remaining(size: int, found: Sequence[Matching], p: np.ndarray) -> Callable[[float], float]:
    """alpha -> ||E[(I - alpha L)^2] - J||_2, a convex function.

    The draws are independent and L_j^2 = 2 L_j, so E[L^2] = mean^2 + 2 sum p_j (1 - p_j) L_j.
    """
    edges, owner = _flat(found)
    mean = _laplacian(size, edges, p[owner])
    square = mean @ mean + 2 * _laplacian(size, edges, (p * (1 - p))[owner])
    rest = np.eye(size) - 1 / size
    return lambda alpha: float(np.abs(np.linalg.eigvalsh(rest - 2 * alpha * mean + alpha**2 * square)).max())


def _golden(f: Callable[[float], float], most: float) -> float:
    """Where a convex f is least in [0, most], by golden section."""
    ratio = (5**0.5 - 1) / 2
    low, high = 0.0, most
    a, b = high - ratio * (high - low), low + ratio * (high - low)
    fa, fb = f(a), f(b)
    for _ in range(_CUTS):
        if fa <= fb:
            high, b, fb = b, a, fa
            a = high - ratio * (high - low)
            fa = f(a)
        else:
            low, a, fa = a, b, fb
            b = low + ratio * (high - low)
            fb = f(b)
    return min((low + high) / 2, most, key=f)  # the cuts come near the end, but never to it


def _flat(found: Sequence[Matching]) -> tuple[np.ndarray, np.ndarray]:
    """All edges [E, 2], and the number [E] of the matching that each is of."""
    edges = np.array(list(itertools.chain(*found)), dtype=np.int64).reshape(-1, 2)
    return edges, np.repeat(np.arange(len(found)), [len(matching) for matching in found])


def _laplacian(size: int, edges: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[p, p] of a graph with weights [E] on its edges [E, 2], each there once."""
    L = np.zeros((size, size))
    L[edges[:, 0], edges[:, 1]] = L[edges[:, 1], edges[:, 0]] = -weights
    np.fill_diagonal(L, -L.sum(1))
    return L
