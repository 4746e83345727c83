"""Graphs hang together, their weights keep the mean where it is, and schedules meet whom they promise to meet."""

from __future__ import annotations

import itertools
import math
import pickle
from collections.abc import Callable

import networkx
import numpy as np
import pytest

from bigdl_lite.comm import graph as graphs
from bigdl_lite.comm.graph import (
    TOPOLOGIES,
    Graph,
    OnePeerExponential,
    Schedule,
    ShiftOne,
    Static,
    check_mixing,
    graph_of,
    metropolis,
    partners,
    spectral_gap,
    static,
    uniform,
)
from bigdl_lite.comm.matcha import Matcha, activation, matcha, matchings
from bigdl_lite.errors import RecipeError

SOCIAL = {"davis": (32, 89), "karate": (34, 78), "florentine": (15, 20), "les_miserables": (77, 254)}  # ranks, edges
SIZES = [1, 2, 3, 4, 5, 8, 9, 16, 32]
ODD_DEGREE = {("random_regular", 5), ("random_regular", 9)}  # three neighbours each: there is no such graph

GRAPHS = [(name, p) for name in TOPOLOGIES if name not in SOCIAL for p in SIZES if (name, p) not in ODD_DEGREE]
GRAPHS += [(name, p) for name, (p, _) in SOCIAL.items()]
WITH_EDGES = [(name, p) for name, p in GRAPHS if p > 1]
FOR_MATCHA = [(name, p) for name, p in WITH_EDGES if p in (2, 9, 15, 32)]

DEGREES: dict[str, Callable[[int], int]] = {
    "ring": lambda p: min(2, p - 1),
    "complete": lambda p: p - 1,
    "random_regular": lambda p: min(3, p - 1),
    "torus": {1: 0, 2: 1, 3: 2, 4: 2, 5: 2, 8: 3, 9: 4, 16: 4, 32: 4}.__getitem__,
    "exponential": {1: 0, 2: 1, 3: 2, 4: 3, 5: 4, 8: 5, 9: 6, 16: 7, 32: 9}.__getitem__,
}


def assert_keeps_the_mean(W: np.ndarray, p: int) -> None:
    """Doubly stochastic: what is written above every schedule."""
    assert W.shape == (p, p) and W.dtype == np.float64 and W.min() >= 0
    np.testing.assert_allclose(W.sum(0), 1, rtol=0, atol=1e-12)
    np.testing.assert_allclose(W.sum(1), 1, rtol=0, atol=1e-12)


def mean_of(p: int) -> np.ndarray:
    return np.full((p, p), 1 / p)


# Graphs ------------------------------------------------------------------------------------------------------------------


def test_edges_are_kept_ascending_and_once() -> None:
    assert Graph(4, ((3, 1), (1, 0), (1, 3), (0, 1))).edges == ((0, 1), (1, 3))
    assert Graph(3, ((2, 0),)) == Graph(np.int64(3), ((np.int64(0), np.int64(2)),))  # type: ignore[arg-type]


def test_neighbours_are_both_ends_of_an_edge() -> None:
    graph = Graph(5, ((1, 0), (1, 4), (2, 1)))
    assert [graph.neighbours(i) for i in range(5)] == [(1,), (0, 2, 4), (1,), (), (1,)]
    assert graph.degrees == (1, 3, 1, 0, 1) == tuple(graph.degree(i) for i in range(5))
    assert not graph.connected and graph.unreachable == (3,)


@pytest.mark.parametrize(
    ("size", "edges", "said"),
    [
        (0, (), "a graph of 0 ranks"),
        (3, ((0, 3),), r"edge \(0, 3\) leaves the graph of 3 ranks; they are numbered 0 to 2"),
        (3, ((-1, 0),), r"edge \(-1, 0\) leaves"),
        (3, ((1, 1),), "joins rank 1 to itself"),
        (3, ((0, 1, 2),), r"\(0, 1, 2\) is no edge"),
        (3, ((0, 1.5),), r"\(0, 1.5\) is no edge"),
        (3, (0, 1), "0 is no edge"),
    ],
)
def test_an_edge_that_cannot_be_is_refused(size: int, edges: tuple, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        Graph(size, edges)


@pytest.mark.parametrize(("name", "p"), GRAPHS)
def test_every_topology_is_connected_and_made_the_same_again(name: str, p: int) -> None:
    graph = TOPOLOGIES[name](p)
    assert graph.size == p and graph.connected
    assert all(i < j for i, j in graph.edges) and sorted(set(graph.edges)) == list(graph.edges)
    assert graph == TOPOLOGIES[name](p) == pickle.loads(pickle.dumps(graph))


@pytest.mark.parametrize(("name", "p"), [(name, p) for name, p in GRAPHS if name in DEGREES])
def test_everybody_has_as_many_neighbours_as_the_topology_says(name: str, p: int) -> None:
    assert set(TOPOLOGIES[name](p).degrees) == {DEGREES[name](p)}


def test_a_star_has_one_centre() -> None:
    assert graphs.star(5).degrees == (4, 1, 1, 1, 1)


def test_a_ring_of_two_has_one_edge_and_a_ring_of_one_has_none() -> None:
    assert graphs.ring(2).edges == ((0, 1),) and graphs.ring(1).edges == ()


def test_a_torus_is_the_most_square_grid() -> None:
    grid = networkx.grid_2d_graph(3, 4, periodic=True)
    known = {tuple(sorted((4 * a + b, 4 * c + d))) for (a, b), (c, d) in grid.edges}
    assert set(graphs.torus(12).edges) == known
    assert graphs.torus(7) == graphs.ring(7)  # a prime has no other grid


def test_exponential_neighbours_are_powers_of_two_away() -> None:
    assert graphs.exponential(16).neighbours(0) == (1, 2, 4, 8, 12, 14, 15)


@pytest.mark.parametrize(("p", "degree", "said"), [(5, 3, "5 x 3 is odd.*degree=4"), (9, 3, "9 x 3"), (8, 1, "cannot connect 8 ranks")])
def test_a_regular_graph_that_does_not_exist_is_refused(p: int, degree: int, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        graphs.random_regular(p, degree)


def test_random_regular_graphs_differ_by_seed_and_are_redrawn_until_connected() -> None:
    assert graphs.random_regular(16, seed=1) != graphs.random_regular(16, seed=2)
    assert all(graphs.random_regular(12, degree=2, seed=seed).connected for seed in range(10))  # of these, some fall apart
    assert set(graphs.random_regular(9, degree=4).degrees) == {4}


@pytest.mark.parametrize("name", SOCIAL)
def test_a_social_graph_is_that_of_networkx_without_weights(name: str) -> None:
    makers = {"davis": "davis_southern_women", "karate": "karate_club", "florentine": "florentine_families"}
    known = getattr(networkx, makers.get(name, name) + "_graph")()
    nodes, (p, num_edges) = list(known.nodes), SOCIAL[name]
    graph = graph_of(name, p)
    assert (graph.size, len(graph.edges)) == (len(nodes), known.number_of_edges()) == (p, num_edges)
    assert {frozenset((nodes[i], nodes[j])) for i, j in graph.edges} == set(map(frozenset, known.edges))


@pytest.mark.parametrize("name", SOCIAL)
def test_a_social_graph_for_another_number_of_workers_is_refused(name: str) -> None:
    with pytest.raises(RecipeError, match=f"{name!r} has {SOCIAL[name][0]} ranks and there are 8 workers; take"):
        graph_of(name, 8)


def test_a_topology_is_a_name_or_a_graph_or_edges_or_a_function() -> None:
    ring = graphs.ring(4)
    for given in ("ring", ring, [(0, 1), (1, 2), (2, 3), (3, 0)], np.array(ring.edges), graphs.ring, lambda p: graphs.ring(p)):
        assert graph_of(given, 4) == ring


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("rings", "no topology 'rings'; there are complete, davis, "),
        (7, "7 is or returns int; give a name, a Graph"),
        (None, "None is or returns NoneType"),
        (lambda p: None, "returns NoneType"),
        (graphs.ring(5), "has 5 ranks and there are 4 workers"),
        (lambda p: graphs.ring(2 * p), "has 8 ranks and there are 4 workers"),
        ([(0, 4)], "leaves the graph of 4 ranks"),
        (networkx.cycle_graph(4), "0 is no edge"),
        ([(0, 1), (2, 3)], "from rank 0 to 2, 3, so the 4 ranks would never agree"),
        ([], "from rank 0 to 1, 2, 3"),
    ],
)
def test_what_is_no_connected_graph_of_four_is_refused(given: object, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        graph_of(given, 4)  # type: ignore[arg-type]


def test_of_many_ranks_that_cannot_be_reached_the_first_ten_are_named() -> None:
    with pytest.raises(RecipeError, match=r"to 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, \.\.\. \(14 in all\)"):
        graph_of([(0, 1)], 16)


# Mixing matrices ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [metropolis, uniform])
@pytest.mark.parametrize(("name", "p"), GRAPHS)
def test_weights_are_symmetric_and_keep_the_mean_and_bring_agreement(name: str, p: int, weights: Callable) -> None:
    graph = TOPOLOGIES[name](p)
    W = weights(graph)
    assert_keeps_the_mean(check_mixing(W), p)
    assert np.array_equal(W, W.T)
    assert {(i, j) for i, j in np.argwhere(W).tolist() if i < j} == set(graph.edges)
    assert 0 < spectral_gap(W) <= 1 + 1e-12


@pytest.mark.parametrize("weights", [metropolis, uniform])
@pytest.mark.parametrize("p", [3, 4, 5, 8, 16, 32])
def test_a_ring_gives_a_third_to_each_and_its_gap_is_known(p: int, weights: Callable) -> None:
    W = weights(graphs.ring(p))
    np.testing.assert_allclose(W[W > 0], 1 / 3, rtol=1e-15)
    assert spectral_gap(W) == pytest.approx(2 / 3 * (1 - math.cos(2 * math.pi / p)))


@pytest.mark.parametrize("p", SIZES)
def test_a_complete_graph_gives_the_mean_at_once(p: int) -> None:
    np.testing.assert_allclose(uniform(graphs.complete(p)), mean_of(p), atol=1e-15)
    assert spectral_gap(metropolis(graphs.complete(p))) == pytest.approx(1)


def test_metropolis_weights_of_a_small_graph_by_hand() -> None:
    W = metropolis(Graph(4, ((0, 1), (0, 2), (0, 3), (1, 2))))  # degrees 3, 2, 2, 1
    expected = np.array([[3, 3, 3, 3], [3, 5, 4, 0], [3, 4, 5, 0], [3, 0, 0, 9]]) / 12
    np.testing.assert_allclose(W, expected, rtol=1e-15)


def row_stochastic(graph: Graph) -> np.ndarray:
    """The tempting mistake: each rank takes the plain mean of itself and its neighbours."""
    W = np.eye(graph.size)
    for i, j in graph.edges:
        W[i, j] = W[j, i] = 1
    return W / W.sum(1, keepdims=True)


def test_plain_means_of_the_neighbourhood_drift_on_a_star_and_metropolis_weights_do_not() -> None:
    star = graphs.star(8)
    x = np.random.default_rng(0).standard_normal((8, 5))
    mean, drifted, kept = x.mean(0), x, x
    for _ in range(500):
        drifted, kept = row_stochastic(star) @ drifted, metropolis(star) @ kept
    assert np.ptp(drifted, axis=0).max() < 1e-12 and np.abs(drifted.mean(0) - mean).max() > 0.1  # they agree, on something else
    np.testing.assert_allclose(kept, np.broadcast_to(mean, x.shape), rtol=0, atol=1e-12)
    with pytest.raises(RecipeError, match=r"column 0 .* sums to 3\.625, not 1: the mean of all ranks would drift"):
        check_mixing(row_stochastic(star))


@pytest.mark.parametrize(
    ("W", "said"),
    [
        (np.ones((2, 3)) / 3, r"shape \[p, p\], not \[2, 3\]"),
        (np.ones(4) / 4, r"not \[4\]"),
        (np.zeros((0, 0)), r"not \[0, 0\]"),
        (np.array([[1.0, math.nan], [0.0, 1.0]]), r"W\[0, 1\] is nan, which is not finite"),
        (np.array([[1.5, -0.5], [-0.5, 1.5]]), r"W\[0, 1\] is -0.5, which is negative"),
        (np.array([[0.5, 0.6], [0.6, 0.5]]), r"row 0 .* sums to 1.1, not 1"),
        (np.eye(2) * (1 + 1e-11), r"row 0 .* sums to 1.00000000001"),
        (np.roll(np.eye(3), 1, 0), r"W\[0, 1\] is 0 and W\[1, 0\] is 1; a mixing matrix is symmetric"),
    ],
)
def test_a_matrix_that_does_not_average_is_refused(W: np.ndarray, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        check_mixing(W)


def test_a_directed_matrix_may_be_checked_without_symmetry() -> None:
    assert_keeps_the_mean(check_mixing(OnePeerExponential(5).matrix(0), directed=True), 5)


def test_the_gap_is_zero_where_ranks_never_agree() -> None:
    assert spectral_gap(np.eye(3)) == pytest.approx(0)
    assert spectral_gap(np.array([[0.0, 1.0], [1.0, 0.0]])) == pytest.approx(0)  # for ever exchanged, never averaged


def test_partners_are_those_who_hear_and_those_who_are_heard() -> None:
    W = OnePeerExponential(8).matrix(1)
    assert partners(W, 0) == ((2,), (6,))
    assert partners(metropolis(graphs.ring(5)), 0) == ((1, 4), (1, 4))
    assert partners(np.eye(3), 1) == ((), ())


# Schedules ---------------------------------------------------------------------------------------------------------------

SCHEDULES: list[Callable[[int], Schedule]] = [
    lambda p: static(metropolis(graphs.ring(p))),
    ShiftOne,
    OnePeerExponential,
    lambda p: matcha(graphs.ring(p), budget=0.5, seed=3),
]


@pytest.mark.parametrize("make", SCHEDULES, ids=["static", "shift_one", "one_peer", "matcha"])
@pytest.mark.parametrize("p", SIZES)
def test_every_step_of_a_schedule_keeps_the_mean_and_whoever_sends_is_heard(p: int, make: Callable[[int], Schedule]) -> None:
    schedule = make(p)
    again = pickle.loads(pickle.dumps(schedule))
    assert schedule.size == p and schedule == again and hash(schedule) == hash(again)
    for step in range(12):
        W = schedule.matrix(step)
        assert_keeps_the_mean(W, p)
        assert np.array_equal(W, again.matrix(step))
        sent = {(i, j) for i in range(p) for j in partners(W, i)[0]}
        assert sent == {(j, i) for i in range(p) for j in partners(W, i)[1]}


@pytest.mark.parametrize("make", [ShiftOne, OnePeerExponential])
def test_a_schedule_of_nobody_is_refused(make: Callable[[int], Schedule]) -> None:
    with pytest.raises(RecipeError, match="0 ranks"):
        make(0)


def test_a_static_schedule_takes_only_what_can_be_averaged_with() -> None:
    assert static(np.eye(2)).rows == ((1.0, 0.0), (0.0, 1.0))
    with pytest.raises(RecipeError, match="sums to 2"):
        Static(((1.0, 1.0), (1.0, 1.0)))


def pairs_of(W: np.ndarray) -> set[tuple[int, int]]:
    """Who meets whom; every pair averages with halves."""
    met = [partners(W, i)[1] for i in range(len(W))]
    assert all(len(m) <= 1 for m in met)
    assert all(met[j] == (i,) and W[i, i] == W[i, j] == 0.5 for i, m in enumerate(met) for j in m)
    return {(min(i, j), max(i, j)) for i, m in enumerate(met) for j in m}


@pytest.mark.parametrize("p", [2, 4, 6, 8, 16, 32])
def test_shift_one_is_a_perfect_matching_and_all_pairs_across_the_halves_meet_in_half_of_p_steps(p: int) -> None:
    for start in (0, 5):
        steps = [pairs_of(ShiftOne(p).matrix(start + step)) for step in range(p // 2)]
        assert all(len(pairs) == p // 2 for pairs in steps)
        assert set.union(*steps) == set(itertools.product(range(p // 2), range(p // 2, p)))


@pytest.mark.parametrize("p", [1, 3, 5, 9])
def test_shift_one_of_an_odd_number_leaves_out_each_once_and_all_pairs_meet_in_p_steps(p: int) -> None:
    steps = [pairs_of(ShiftOne(p).matrix(7 + step)) for step in range(p)]
    idle = [set(range(p)) - set(itertools.chain(*pairs)) for pairs in steps]
    assert all(len(out) == 1 for out in idle) and set.union(*idle) == set(range(p))
    assert set.union(*steps) == set(itertools.combinations(range(p), 2))


def test_shift_one_follows_the_formula_of_bagua() -> None:
    for step, i in itertools.product(range(9), range(4)):
        assert partners(ShiftOne(8).matrix(step), i) == (((step + i) % 4 + 4,), ((step + i) % 4 + 4,))


@pytest.mark.parametrize("p", [2, 4, 8, 16, 32])
@pytest.mark.parametrize("start", [0, 1, 4])
def test_one_peer_exponential_gives_the_exact_mean_in_log2_p_steps(p: int, start: int) -> None:
    product = np.eye(p)
    for step in range(start, start + p.bit_length() - 1):
        product = OnePeerExponential(p).matrix(step) @ product
    assert np.array_equal(product, mean_of(p))  # halves of halves: exact


@pytest.mark.parametrize("p", [3, 5, 9])
def test_one_peer_exponential_of_another_number_only_comes_near_the_mean(p: int) -> None:
    k = (p - 1).bit_length()
    once = np.linalg.multi_dot([np.eye(p), *(OnePeerExponential(p).matrix(step) for step in range(k))])
    assert 0.01 < np.abs(once - mean_of(p)).max()
    np.testing.assert_allclose(np.linalg.matrix_power(once, 40), mean_of(p), atol=1e-9)


# MATCHA ------------------------------------------------------------------------------------------------------------------


def assert_matchings_of(graph: Graph) -> None:
    found = matchings(graph)
    assert len(found) <= max(graph.degrees) + 1
    assert sorted(itertools.chain(*found)) == list(graph.edges)  # every edge once
    for matching in found:
        assert matching and len(set(itertools.chain(*matching))) == 2 * len(matching)  # nobody has two partners


@pytest.mark.parametrize(("name", "p"), GRAPHS)
def test_matchings_hold_every_edge_once_and_are_few(name: str, p: int) -> None:
    assert_matchings_of(TOPOLOGIES[name](p))


@pytest.mark.parametrize("seed", range(60))
def test_matchings_of_random_graphs_are_few_too(seed: int) -> None:
    """27 of these need edges recoloured; of the regular graphs above hardly any does."""
    drawn = networkx.gnp_random_graph(4 + seed % 20, (seed % 10 + 1) / 10, seed=seed)
    assert_matchings_of(Graph(len(drawn), tuple(drawn.edges)))


def mean_laplacian(schedule: Matcha) -> np.ndarray:
    L = np.zeros((schedule.size, schedule.size))
    for matching, p in zip(schedule.matchings, schedule.probabilities, strict=True):
        for i, j in matching:
            L[[i, j], [i, j]] += p
            L[[i, j], [j, i]] -= p
    return L


def second_moment(schedule: Matcha) -> np.ndarray:
    """E[W^2], by adding up every set of matchings that may be drawn."""
    total = np.zeros((schedule.size, schedule.size))
    for drawn in itertools.product((0, 1), repeat=len(schedule.matchings)):
        chance = math.prod(p if on else 1 - p for on, p in zip(drawn, schedule.probabilities, strict=True))
        chosen = tuple(float(on) for on in drawn)
        only = Matcha(schedule.size, schedule.matchings, chosen, schedule.alpha)
        W = np.eye(schedule.size) - schedule.alpha * mean_laplacian(only)
        total += chance * W @ W
    return total


@pytest.mark.parametrize("budget", [0.3, 1.0])
@pytest.mark.parametrize(("name", "p"), FOR_MATCHA)
def test_matcha_stays_within_its_budget_and_brings_agreement(name: str, p: int, budget: float) -> None:
    graph = TOPOLOGIES[name](p)
    schedule = matcha(graph, budget)
    chances, M = np.array(schedule.probabilities), len(schedule.matchings)
    assert chances.min() >= 0 and chances.max() <= 1 and chances.sum() <= budget * M + 1e-9
    assert chances.sum() == pytest.approx(budget * M)  # more is never worse, so all is spent
    assert schedule.norm < 1
    for step in range(5):
        assert_keeps_the_mean(check_mixing(schedule.matrix(step)), p)


@pytest.mark.parametrize(("name", "p"), [("ring", 5), ("ring", 8), ("torus", 9), ("star", 5), ("florentine", 15)])
def test_the_norm_is_that_of_all_draws_added_up(name: str, p: int) -> None:
    schedule = matcha(TOPOLOGIES[name](p), budget=0.4)
    assert schedule.norm == pytest.approx(np.linalg.norm(second_moment(schedule) - mean_of(p), 2), abs=1e-9)


@pytest.mark.parametrize(("name", "p"), [("ring", 5), ("ring", 8), ("torus", 9), ("florentine", 15)])
@pytest.mark.parametrize("budget", [0.4, 1.0])
def test_no_other_alpha_leaves_less(name: str, p: int, budget: float) -> None:
    graph = TOPOLOGIES[name](p)
    best = matcha(graph, budget)
    for alpha in np.linspace(0, 1 / max(graph.degrees), 101):
        assert best.norm <= Matcha(p, best.matchings, best.probabilities, float(alpha)).norm + 1e-6


def test_the_edge_that_holds_two_halves_together_is_drawn_most_often() -> None:
    bridge = Graph(6, ((0, 1), (0, 2), (1, 2), (3, 4), (3, 5), (4, 5), (2, 3)))
    found = matchings(bridge)
    chances = activation(6, found, budget=0.5)
    assert chances.argmax() == next(j for j, matching in enumerate(found) if (2, 3) in matching)

    def connectivity(p: np.ndarray) -> float:
        return float(np.linalg.eigvalsh(mean_laplacian(Matcha(6, found, tuple(p.tolist()), 0.0)))[1])

    ticks = np.linspace(0, 1, 21)
    allowed = [np.array(p) for p in itertools.product(ticks, repeat=len(found)) if sum(p) <= 0.5 * len(found) + 1e-9]
    assert connectivity(chances) >= max(map(connectivity, allowed)) - 1e-3
    assert connectivity(chances) > 1.05 * connectivity(np.full(len(found), 0.5))


@pytest.mark.parametrize(("name", "p"), [("ring", 9), ("torus", 16), ("florentine", 15)])
def test_matchings_are_drawn_as_often_as_they_should_be_and_independently(name: str, p: int) -> None:
    schedule, steps = matcha(TOPOLOGIES[name](p), budget=0.5, seed=1), 3000
    drawn = np.zeros((steps, len(schedule.matchings)))
    for step in range(steps):
        drawn[step, list(schedule.active(step))] = 1
    chances = np.array(schedule.probabilities)
    sigma = np.sqrt(chances * (1 - chances) / steps)
    assert (np.abs(drawn.mean(0) - chances) <= 3 * sigma + 1e-12).all()
    off, slack = drawn - chances, 4 * 0.25 / math.sqrt(steps)
    np.testing.assert_allclose(off.T @ off / steps, np.diag(chances * (1 - chances)), rtol=0, atol=slack)  # of one another
    np.testing.assert_allclose(off[1:].T @ off[:-1] / steps, 0, rtol=0, atol=slack)  # of the step before


def test_a_matrix_averages_over_what_is_active_and_nothing_else() -> None:
    schedule = matcha(graphs.torus(9), budget=0.5)
    sets = {schedule.active(step) for step in range(50)}
    assert len(sets) > 5
    for step in range(50):
        W = schedule.matrix(step)
        edges = sorted(itertools.chain(*(schedule.matchings[j] for j in schedule.active(step))))
        assert [(i, j) for i, j in np.argwhere(W).tolist() if i < j] == edges
        np.testing.assert_allclose([W[i, j] for i, j in edges], schedule.alpha)


def test_with_the_whole_budget_every_edge_is_used_at_every_step() -> None:
    schedule = matcha(graphs.davis(32), budget=1)
    assert set(schedule.probabilities) == {1.0}
    assert all(schedule.active(step) == tuple(range(len(schedule.matchings))) for step in range(200))


def test_with_the_whole_budget_alpha_of_a_ring_is_the_best_known() -> None:
    gaps = 2 - 2 * np.cos(2 * np.pi * np.arange(8) / 8)  # eigenvalues of the Laplacian
    smallest, largest = np.sort(gaps)[1], gaps.max()
    assert matcha(graphs.ring(8), budget=1).alpha == pytest.approx(2 / (smallest + largest), abs=1e-6)  # Xiao and Boyd, 2004


def test_matcha_is_made_the_same_again() -> None:
    assert matcha(graphs.florentine(15), 0.4, seed=5) == matcha(graphs.florentine(15), 0.4, seed=5)


def test_draws_depend_on_the_seed_and_the_step_and_not_on_what_was_drawn_before() -> None:
    one, other = matcha(graphs.torus(16), seed=1), matcha(graphs.torus(16), seed=2)
    draws = [one.active(step) for step in range(30)]
    assert draws == [one.active(step) for step in reversed(range(30))][::-1]
    assert draws != [other.active(step) for step in range(30)]


def test_half_of_the_budget_still_brings_everybody_to_the_mean() -> None:
    schedule = matcha(graphs.florentine(15), budget=0.5)
    x = np.random.default_rng(0).standard_normal((15, 3))
    mixed = x
    for step in range(300):
        mixed = schedule.matrix(step) @ mixed
    np.testing.assert_allclose(mixed, np.broadcast_to(x.mean(0), x.shape), rtol=0, atol=1e-4)


@pytest.mark.parametrize("budget", [0, -0.1, 1.01, math.nan])
def test_a_budget_that_is_no_share_is_refused(budget: float) -> None:
    with pytest.raises(RecipeError, match=rf"the budget is {budget}"):
        matcha(graphs.ring(4), budget)


def test_matcha_refuses_a_graph_in_parts_and_numbers_that_do_not_fit() -> None:
    with pytest.raises(RecipeError, match=r"cannot reach \(2, 3\) of 4 ranks"):
        matcha(Graph(4, ((0, 1), (2, 3))))
    with pytest.raises(RecipeError, match="1 matchings have 2 probabilities"):
        Matcha(2, (((0, 1),),), (0.5, 0.5), 0.5)
    with pytest.raises(RecipeError, match="each must be from 0 to 1"):
        Matcha(2, (((0, 1),),), (1.5,), 0.5)
    with pytest.raises(RecipeError, match=r"alpha is 1\.5; from 0 to 1 / 1"):
        Matcha(2, (((0, 1),),), (0.5,), 1.5)
