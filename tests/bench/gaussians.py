"""Rows of classes that lie in many places: a mixture of Gaussians for each class.

    [N, FEATURES] float32, of variance about 1      [N] int64, from 0 to CLASSES - 1, each as often

A class is MODES places, drawn from a normal distribution, and each row one of them with noise of the same size. Places overlap, and
200 of them in 32 dimensions are more than a small net learns in a short fit, so that methods have room to differ. There are as many
rows as one asks for: with few of them it would count most which method fits them less closely.
"""

from __future__ import annotations

import numpy as np

CLASSES, MODES, FEATURES = 10, 20, 32


def mixture(rows: int, held_out: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """x [rows + held_out, FEATURES] float32 and y [rows + held_out] int64, in random order; classes are even in both parts."""
    rng = np.random.default_rng(seed)
    places = rng.standard_normal((CLASSES, MODES, FEATURES))
    y = np.concatenate([rng.permutation(np.arange(n) % CLASSES) for n in (rows, held_out)])
    x = places[y, rng.integers(0, MODES, len(y))] + rng.standard_normal((len(y), FEATURES))
    return (x / 2**0.5).astype(np.float32), y
