"""Cuts tile a flat vector, whatever its length and however many owners there are."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bigdl_lite.vector import aligned, overlap, slices, snap

lengths, owners = st.integers(0, 5000), st.integers(1, 40)


def tiles(cuts: list[tuple[int, int]], n: int) -> bool:
    """Whether the cuts cover [0, n) in order, without gap or overlap."""
    joined = all(x[1] == y[0] for x, y in pairwise(cuts))
    return cuts[0][0] == 0 and cuts[-1][1] == n and all(a <= b for a, b in cuts) and joined


@given(lengths, owners)
@settings(max_examples=100, deadline=None)
def test_slices_tile_the_vector_and_differ_by_one_at_most(n: int, p: int) -> None:
    cuts = slices(n, p)
    sizes = [stop - start for start, stop in cuts]
    assert len(cuts) == p and tiles(cuts, n) and max(sizes) - min(sizes) <= 1


def test_ten_values_for_four_owners() -> None:
    assert slices(10, 4) == [(0, 2), (2, 5), (5, 7), (7, 10)]


@pytest.mark.parametrize(("n", "p"), [(-1, 1), (5, 0)])
def test_a_negative_length_or_no_owner_is_refused(n: int, p: int) -> None:
    with pytest.raises(ValueError, match=rf"slices\(n={n}, p={p}\)"):
        slices(n, p)


@given(lengths, owners, st.sampled_from([1, 8, 64]))
@settings(max_examples=100, deadline=None)
def test_aligned_cuts_still_tile_and_their_inner_borders_are_multiples(n: int, p: int, step: int) -> None:
    cuts = aligned(slices(n, p), step)
    assert len(cuts) == p and tiles(cuts, n)
    assert all(start % step == 0 or start == n for start, _ in cuts)


@given(st.lists(st.integers(0, 300), min_size=1, max_size=12), owners)
@settings(max_examples=100, deadline=None)
def test_snapped_cuts_still_tile_and_split_no_tensor(sizes: list[int], p: int) -> None:
    bounds = [0]
    for size in sizes:
        bounds.append(bounds[-1] + size)
    cuts = snap(slices(bounds[-1], p), bounds)
    assert len(cuts) == p and tiles(cuts, bounds[-1])
    assert {edge for cut in cuts for edge in cut} <= set(bounds)


def test_a_border_snaps_to_the_nearest_bound_and_to_the_lower_of_two() -> None:
    assert snap([(0, 5), (5, 10)], [0, 4, 7, 10]) == [(0, 4), (4, 10)]
    assert snap([(0, 5), (5, 10)], [0, 3, 7, 10]) == [(0, 3), (3, 10)]
    assert snap([(0, 5), (5, 10)], [0, 10]) == [(0, 0), (0, 10)]


@given(st.tuples(lengths, lengths).map(sorted), st.tuples(lengths, lengths).map(sorted))
@settings(max_examples=100, deadline=None)
def test_the_overlap_is_what_both_cuts_hold(a: list[int], b: list[int]) -> None:
    start, stop = overlap(tuple(a), tuple(b))
    assert start <= stop
    assert set(range(start, stop)) == set(range(*a)) & set(range(*b))
