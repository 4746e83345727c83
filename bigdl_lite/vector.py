"""Arithmetic of slices: who owns which part of a flat vector.

    n  length of the flat vector      p  owners

A cut is a half-open pair (start, stop). All cuts together tile [0, n) in order; some may be empty.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Sequence

Cut = tuple[int, int]


def slices(n: int, p: int) -> list[Cut]:
    """p cuts of [0, n) that differ in length by one at most: cut i is [floor(i n / p), floor((i + 1) n / p))."""
    if n < 0 or p < 1:
        raise ValueError(f"slices(n={n}, p={p}): n must be >= 0 and p >= 1")
    return [(i * n // p, (i + 1) * n // p) for i in range(p)]


def snap(cuts: Sequence[Cut], bounds: Sequence[int]) -> list[Cut]:
    """Moves every inner border of the cuts to the nearest of `bounds` (ascending, from 0 to n).

    For optimizers whose rule needs whole tensors (a matrix norm, a factorisation): no tensor is split between owners.
    """

    def nearest(x: int) -> int:
        i = bisect_left(bounds, x)
        if i == 0:
            return bounds[0]
        return bounds[i] if i < len(bounds) and bounds[i] - x < x - bounds[i - 1] else bounds[i - 1]

    inner = [nearest(start) for start, _ in cuts[1:]]
    edges = [cuts[0][0], *inner, cuts[-1][1]]
    return list(itertools.pairwise(edges))


def aligned(cuts: Sequence[Cut], step: int = 64) -> list[Cut]:
    """The cuts with every inner border at a multiple of `step`, so that owners share no cache line, and a kernel's
    vector lanes (and with them its rounding) do not depend on where a vector is cut."""
    n = cuts[-1][1]
    edges = [cuts[0][0], *(min(n, (start + step // 2) // step * step) for start, _ in cuts[1:]), n]
    return list(itertools.pairwise(edges))


def overlap(a: Cut, b: Cut) -> Cut:
    """The common part of two cuts; empty cuts have start == stop."""
    start = max(a[0], b[0])
    return start, max(start, min(a[1], b[1]))
