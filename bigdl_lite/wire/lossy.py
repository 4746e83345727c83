"""Codecs that send fewer bits of each value: MinMax8, QSGD, Sign. Those that send fewer values are in sparse.py.

    n  length of the vector      g  values of one group: `group`, n where group is 0, fewer in the last group
    G  groups, ceil(n / g)       v  the values of one group

Vectors are float32. Every decoded value depends on its own group alone, and random numbers on (seed, rank, place in the flat
vector) alone: a vector that is cut at multiples of `group` decodes to the same bits, in as many bytes.

A NaN or an infinity makes at least one decoded value of its group NaN or infinite, so that divergence is seen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from bigdl_lite.errors import RecipeError
from bigdl_lite.wire.codec import _check
from bigdl_lite.wire.pieces import (
    FLOAT,
    Array,
    array,
    blocks,
    key_of,
    need_group,
    noise,
    num_groups,
    packed,
    unpacked,
)


@dataclass(frozen=True)
class MinMax8:
    """The smallest and the largest value of each group, and where between them each value lies, in 255 equal steps.

    [n] <-> n + 8 G bytes: float32 lo [G], hi [G], uint8 [n].
    Error of a value: (hi - lo) / 510, and the rounding of float32 (relative 2e-4 of that, and half an ulp of the value). It scales
    with the vector; a constant group comes back exactly. A group whose range is no finite float32 becomes NaN.

    Source: the MinMaxUInt8 of BAGUA's ByteGrad (Gan et al., VLDB 2022), without the absolute epsilon of its scale.
    """

    tag: ClassVar[int] = 3
    group: int = 2048

    def __post_init__(self) -> None:
        need_group(self)

    def encode(self, x: Tensor) -> memoryview:
        v, n = array(x), len(x)
        data = np.empty(self.nbytes(n), np.uint8)
        (lo, hi), codes = self._parts(data, n)
        with np.errstate(all="ignore"):
            for values, groups, g in blocks(n, self.group):
                y = v[values].reshape(-1, g)
                lo[groups], hi[groups] = y.min(1), y.max(1)
                width = (hi[groups] - lo[groups])[:, None]
                lost = ~np.isfinite(width[:, 0])
                width[width == 0] = 1
                y = y - lo[groups, None]
                y /= width  # and not times 255 / width, which is infinite where width is small
                y *= 255
                y += 0.5
                told = codes[values].reshape(-1, g)
                np.copyto(told, y, casting="unsafe")
                if lost.any():
                    told[lost] = 0
        return memoryview(data)

    def decode(self, data: bytes | memoryview, n: int) -> Tensor:
        _check(self, data, n)
        out = np.empty(n, np.float32)
        (lo, hi), codes = self._parts(np.frombuffer(data, np.uint8), n)
        with np.errstate(all="ignore"):
            for values, groups, g in blocks(n, self.group):
                y = out[values].reshape(-1, g)
                y[...] = codes[values].reshape(-1, g)
                y /= 255
                y *= (hi[groups] - lo[groups])[:, None]
                y += lo[groups, None]
        return torch.from_numpy(out)

    def nbytes(self, n: int) -> int:
        return n + 8 * num_groups(n, self.group)

    def _parts(self, data: Array, n: int) -> tuple[Array, Array]:
        head = 8 * num_groups(n, self.group)
        return data[:head].view(FLOAT).reshape(2, -1), data[head:]


@dataclass(frozen=True)
class QSGD:
    """Each value rounded at random, without bias, to one of `levels` parts of its group's norm, and its sign.

        s |v_i| / ||v||  ->  xi_i, one of the two integers beside it      decoded  ||v|| sign(v_i) xi_i / s      s = levels

    [n] <-> 4 G + ceil(n bits / 8) bytes, bits = ceil(log2(2 s + 1)): float32 ||v|| [G], then the codes s + sign xi.
    Expected ||error||^2: at most min(g / s^2, sqrt(g) / s) ||v||^2 =: omega ||v||^2. Error of a value: ||v|| / s at most.

    contract  decoded values are divided by 1 + omega: E ||error||^2 <= omega / (1 + omega) ||v||^2, as error feedback needs it

    Ranks must round independently, or errors do not average out: at() gives each its own random numbers.

    Source: Alistarh et al., "QSGD", NeurIPS 2017, Lemma 3.1; contract: Koloskova et al., "Decentralized Stochastic Optimization
    and Gossip Algorithms with Compressed Communication", ICML 2019.
    """

    tag: ClassVar[int] = 4
    levels: int = 127
    group: int = 512
    seed: int = 0
    contract: bool = False
    rank: int = field(default=0, repr=False)
    first: int = field(default=0, repr=False)

    def __post_init__(self) -> None:
        need_group(self, 8)
        if not 1 <= self.levels <= 32767:
            raise RecipeError(f"QSGD(levels={self.levels}): levels must be between 1 and 32767")

    def at(self, seed: int, rank: int, first: int) -> QSGD:
        return replace(self, seed=seed, rank=rank, first=first)

    @property
    def contracts(self) -> bool:
        return self.contract or (self.group > 0 and self.omega(self.group) < 1)

    @property
    def bits(self) -> int:
        return (2 * self.levels).bit_length()

    def encode(self, x: Tensor) -> memoryview:
        v, n, s = array(x), len(x), self.levels
        data = np.empty(self.nbytes(n), np.uint8)
        norms, key = data[: 4 * num_groups(n, self.group)].view(FLOAT), key_of(self.tag, self.seed, self.rank)
        codes = np.empty(n, np.uint8 if self.bits <= 8 else np.uint16)
        with np.errstate(all="ignore"):
            for values, groups, g in blocks(n, self.group):
                y = v[values].reshape(-1, g)
                wide = y.astype(np.float64)  # where the square of a float32 neither vanishes nor overflows
                wide *= wide
                norm = np.sqrt(wide.sum(1)).astype(np.float32)
                norms[groups] = norm
                lost = ~np.isfinite(norm)
                norm[norm == 0] = 1
                y = y / norm[:, None]
                y *= s
                low = np.floor(y)
                y -= low
                low += s
                low += noise(key, self.first + values.start, y.size).reshape(-1, g) < y
                if lost.any():
                    low[lost] = s
                codes[values] = low.reshape(-1)
        data[norms.nbytes :] = packed(codes, self.bits)
        return memoryview(data)

    def decode(self, data: bytes | memoryview, n: int) -> Tensor:
        _check(self, data, n)
        out, head = np.empty(n, np.float32), 4 * num_groups(n, self.group)
        raw = np.frombuffer(data, np.uint8)
        norms, codes = raw[:head].view(FLOAT), unpacked(raw[head:], n, self.bits)
        with np.errstate(all="ignore"):
            for values, groups, g in blocks(n, self.group):
                y = out[values].reshape(-1, g)
                y[...] = codes[values].reshape(-1, g)
                y -= self.levels
                y /= self.levels * (1 + self.omega(g) if self.contract else 1)
                y *= norms[groups, None]
        return torch.from_numpy(out)

    def nbytes(self, n: int) -> int:
        return 4 * num_groups(n, self.group) + -(-n * self.bits // 8)

    def omega(self, g: int) -> float:
        return min(g / self.levels**2, math.sqrt(g) / self.levels)


@dataclass(frozen=True)
class Sign:
    """The sign of each value and one scale a group, mean |v|.  Zero has the sign +; a group of zeros stays zero.

    [n] <-> 4 G + ceil(n / 8) bytes: float32 scale [G], then the bits, 1 where v >= 0.
    ||error||^2 = ||v||^2 - ||v||_1^2 / g: a contraction, but biased, so it wants error feedback.

    Source: Karimireddy et al., "Error Feedback Fixes SignSGD", ICML 2019.
    """

    tag: ClassVar[int] = 5
    group: int = 2048

    def __post_init__(self) -> None:
        need_group(self, 8)

    def encode(self, x: Tensor) -> memoryview:
        v, n = array(x), len(x)
        data = np.empty(self.nbytes(n), np.uint8)
        head = 4 * num_groups(n, self.group)
        scale, bits = data[:head].view(FLOAT), data[head:]
        with np.errstate(all="ignore"):
            for values, groups, g in blocks(n, self.group):
                y = v[values].reshape(-1, g)
                scale[groups] = np.abs(y).astype(np.float64).mean(1)
                bits[values.start // 8 : -(-values.stop // 8)] = np.packbits(y >= 0, bitorder="little")
        return memoryview(data)

    def decode(self, data: bytes | memoryview, n: int) -> Tensor:
        _check(self, data, n)
        out, head = np.empty(n, np.float32), 4 * num_groups(n, self.group)
        raw = np.frombuffer(data, np.uint8)
        scale, bits = raw[:head].view(FLOAT), raw[head:]
        with np.errstate(all="ignore"):
            for values, groups, g in blocks(n, self.group):
                y = out[values]
                y[...] = np.unpackbits(bits[values.start // 8 : -(-values.stop // 8)], count=len(y), bitorder="little")
                y *= 2
                y -= 1
                y.reshape(-1, g)[...] *= scale[groups, None]
        return torch.from_numpy(out)

    def nbytes(self, n: int) -> int:
        return 4 * num_groups(n, self.group) + -(-n // 8)
