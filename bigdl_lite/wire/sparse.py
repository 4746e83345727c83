"""Codecs that send some of the values as they are, and nothing of the others: TopK, RandomK.

    n  length of the vector      g  values of one group      k  values that are sent

What lossy.py says of vectors, groups, random numbers and NaN holds here too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from bigdl_lite.errors import WireError
from bigdl_lite.wire.codec import _check
from bigdl_lite.wire.pieces import (
    FLOAT,
    Array,
    array,
    blocks,
    drawn,
    key_of,
    need_group,
    need_ratio,
)


@dataclass(frozen=True)
class TopK:
    """The k values that are largest in magnitude, k = ceil(ratio n); the others are zero. Of equal ones, those that come first.

    [n] <-> 8 k bytes: int32 places [k], ascending, float32 values [k]. n < 2^31. A NaN counts as larger than infinity.
    ||error||^2 <= (1 - k / n) ||v||^2, and no other k values do better: a contraction, but biased, so it wants error feedback.

    Source: Aji and Heafield, "Sparse Communication for Distributed Gradient Descent", EMNLP 2017; Stich et al., "Sparsified SGD
    with Memory", NeurIPS 2018.
    """

    tag: ClassVar[int] = 6
    group: ClassVar[int] = 0
    ratio: float

    def __post_init__(self) -> None:
        need_ratio(self)

    def kept(self, n: int) -> int:
        return math.ceil(Fraction(str(float(self.ratio))) * n)  # 7 % of 100 is 7, not ceil(7.000000000000001)

    def encode(self, x: Tensor) -> memoryview:
        n = len(x)
        k = self.kept(n)
        if n >= 1 << 31:
            raise WireError(f"{self!r}: places of {n} values do not fit in 31 bits; cut the vector")
        if not n:
            return memoryview(b"")
        v = array(x)
        bits, magnitude = v.view(np.uint32), np.uint32(0x7FFFFFFF)
        size = bits & magnitude  # ordered as |v| is
        size.partition(n - k)
        edge = size[n - k]
        places = np.flatnonzero(np.bitwise_and(bits, magnitude, out=size) >= edge)
        if len(places) > k:
            equal = np.flatnonzero(size[places] == edge)
            places = np.delete(places, equal[k - len(places) :])
        data = np.empty(8 * k, np.uint8)
        data[: 4 * k].view("<i4")[...] = places
        data[4 * k :].view(FLOAT)[...] = v[places]
        return memoryview(data)

    def decode(self, data: bytes | memoryview, n: int) -> Tensor:
        _check(self, data, n)
        out, k = np.zeros(n, np.float32), self.kept(n)
        raw = np.frombuffer(data, np.uint8)
        places = raw[: 4 * k].view("<i4")
        if n and (places[0] < 0 or places[-1] >= n or (places[1:] <= places[:-1]).any()):
            raise WireError(f"{self!r}: places from {places.min()} to {places.max()} are not {k} ascending ones of {n} values")
        out[places] = raw[4 * k :].view(FLOAT)
        return torch.from_numpy(out)

    def nbytes(self, n: int) -> int:
        return 8 * self.kept(n)


@dataclass(frozen=True)
class RandomK:
    """k values of each group, at places drawn by (seed, place in the flat vector): the same on all ranks, so places do not travel.

    [n] <-> 4 bytes for each kept value; k = round(ratio g), at least 1. Drawing takes k steps, each for all groups at once.
    E ||error||^2 = (1 - k / g) ||v||^2: a contraction, which wants error feedback. Where a group holds a NaN or an infinity, its
    first kept value becomes NaN.

    scaled  decoded values are multiplied by g / k: without bias, E ||error||^2 = (g / k - 1) ||v||^2, but no contraction. A sum
            (rank -1) is made of kept places only, and is not scaled again

    Source: random masks of Konecny et al., "Federated Learning: Strategies", 2016; Stich et al., "Sparsified SGD with Memory",
    NeurIPS 2018.
    """

    tag: ClassVar[int] = 7
    ratio: float
    group: int = 1024
    seed: int = 0
    scaled: bool = False
    first: int = field(default=0, repr=False)

    def __post_init__(self) -> None:
        need_ratio(self)
        need_group(self)

    @property
    def contracts(self) -> bool:
        return not self.scaled

    def at(self, seed: int, rank: int, first: int) -> RandomK:
        return replace(self, seed=seed, first=first, scaled=self.scaled and rank >= 0)

    def kept(self, g: int) -> int:
        """Of a group of g > 0 values."""
        return max(1, round(self.ratio * g))

    def encode(self, x: Tensor) -> memoryview:
        v, n, end = array(x), len(x), 0
        data = np.empty(self.nbytes(n) // 4, FLOAT)
        for values, places in self._chosen(n):
            y = v[values].reshape(len(places), -1)
            kept = np.take_along_axis(y, places, 1)
            kept[~np.isfinite(y).all(1), 0] = np.nan
            data[end : end + kept.size] = kept.reshape(-1)
            end += kept.size
        return memoryview(data.view(np.uint8))

    def decode(self, data: bytes | memoryview, n: int) -> Tensor:
        _check(self, data, n)
        out, end, told = np.zeros(n, np.float32), 0, np.frombuffer(data, FLOAT)
        for values, places in self._chosen(n):
            y = out[values].reshape(len(places), -1)
            kept = told[end : end + places.size].reshape(places.shape)
            np.put_along_axis(y, places, kept * np.float32(y.shape[1] / places.shape[1]) if self.scaled else kept, 1)
            end += places.size
        return torch.from_numpy(out)

    def nbytes(self, n: int) -> int:
        whole, rest = divmod(n, self.group or max(n, 1))
        return 4 * ((whole and whole * self.kept(self.group or n)) + (rest and self.kept(rest)))

    def _chosen(self, n: int) -> Iterator[tuple[slice, Array]]:
        """Blocks of groups: values, and the places that each keeps [groups, k]."""
        key = key_of(self.tag, self.seed)
        for values, groups, g in blocks(n, self.group, times=32):
            yield values, drawn(key, self.first + values.start, groups.stop - groups.start, g, self.kept(g))
