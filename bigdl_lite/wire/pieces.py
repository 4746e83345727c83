"""What lossy codecs are made of: blocks of groups, random numbers that depend on their place alone, codes of a few bits.

    n  length of the vector      g  values of one group: `group`, n where group is 0, fewer in the last group

numpy and not torch: integers of 64 bits without sign, and the same order of summation for every row of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bigdl_lite.errors import RecipeError

FLOAT = np.dtype("<f4")
_BLOCK = 1 << 15  # values that are worked on at a time: what lies between input and output stays in a core's cache

Array = np.ndarray[Any, Any]


def array(x: Tensor) -> Array:
    return x.detach().to(torch.float32).contiguous().numpy()


def num_groups(n: int, group: int) -> int:
    return -(-n // (group or n)) if n else 0


def blocks(n: int, group: int, times: int = 1) -> Iterator[tuple[slice, slice, int]]:
    """The vector as blocks of whole groups: (its values, its groups, values of one group). The short last group comes alone."""
    if n:
        g = group or n
        whole, step = n // g, max(1, times * _BLOCK // g)
        for a in range(0, whole, step):
            b = min(whole, a + step)
            yield slice(a * g, b * g), slice(a, b), g
        if n % g:
            yield slice(whole * g, n), slice(whole, whole + 1), n % g


def need_group(codec: Any, step: int = 1) -> None:
    if codec.group < 0 or codec.group % step:
        whole = "" if step == 1 else f" and a multiple of {step}, so that groups end at whole bytes"
        raise RecipeError(f"{type(codec).__name__}(group={codec.group}): group must be at least 0 (one group){whole}")


def need_ratio(codec: Any) -> None:
    if not 0 < codec.ratio <= 1:
        raise RecipeError(f"{type(codec).__name__}(ratio={codec.ratio}): ratio must lie in (0, 1]")


# random numbers that are a function of their place: SplitMix64 (Steele, Lea, Flood, OOPSLA 2014)

_WORD = (1 << 64) - 1
_GAMMA, _MIX = 0x9E3779B97F4A7C15, ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


def words(key: int, places: Array) -> Array:
    """uint64, one for each place (any integers, modulo 2^64)."""
    z = places.astype(np.uint64)
    z *= np.uint64(_GAMMA)
    z += np.uint64(key & _WORD)
    for shift, factor in _MIX:
        z ^= z >> np.uint64(shift)
        z *= np.uint64(factor)
    z ^= z >> np.uint64(31)
    return z


def key_of(*parts: int) -> int:
    key = 0
    for part in parts:
        key = int(words((key ^ part) + _GAMMA, np.zeros(1, np.uint64))[0])
    return key


def noise(key: int, first: int, n: int) -> Array:
    """Uniform in [0, 1), float32 and multiples of 2^-24, for the places first .. first + n: each is half a word."""
    halves = words(key, np.arange(first // 2, (first + n + 1) // 2)).view("<u4")[first % 2 :][:n]
    u = (halves >> np.uint32(8)).astype(np.float32)
    u *= 2.0**-24
    return u


def drawn(key: int, first: int, rows: int, g: int, k: int) -> Array:
    """For each of `rows` groups of g values, k different places in it, ascending; the first group begins at place `first`.

    Floyd's algorithm (Bentley and Floyd, CACM 1987): the i-th draw is uniform below top = g - k + i, or else top itself.
    """
    begins = first + g * np.arange(rows)
    draws = words(key, begins[:, None] + np.arange(k)) >> np.uint64(32)
    taken, places, row = np.zeros((rows, g), np.bool_), np.empty((rows, k), np.int64), np.arange(rows)
    for i in range(k):
        top = g - k + i
        place = (draws[:, i] * np.uint64(top + 1) >> np.uint64(32)).astype(np.int64)
        place[taken[row, place]] = top
        taken[row, place] = True
        places[:, i] = place
    places.sort(1)
    return places


# codes of a few bits, side by side without gaps


def packed(codes: Array, bits: int) -> Array:
    """[n] codes < 2^bits -> ceil(n bits / 8) bytes, the first code in the lowest bits; beyond 8 bits the low bytes come first."""
    if bits > 8:
        return np.concatenate([(codes & 255).astype(np.uint8), packed((codes >> 8).astype(np.uint8), bits - 8)])
    if bits == 8:
        return codes
    per, size, word = (8 // bits, 1, "u1") if 8 % bits == 0 else (8, bits, "<u8")  # `per` codes fill `size` bytes
    lanes = np.zeros((-(-len(codes) // per), per), np.uint8)
    lanes.reshape(-1)[: len(codes)] = codes
    filled = lanes[:, 0].astype(word)
    for i in range(1, per):
        filled |= lanes[:, i].astype(word) << filled.dtype.type(i * bits)
    return filled.view(np.uint8).reshape(-1, filled.itemsize)[:, :size].reshape(-1)[: -(-len(codes) * bits // 8)]


def unpacked(data: Array, n: int, bits: int) -> Array:
    if bits > 8:
        return data[:n].astype(np.uint16) | unpacked(data[n:], n, bits - 8).astype(np.uint16) << np.uint16(8)
    if bits == 8:
        return data
    per, size, word = (8 // bits, 1, "u1") if 8 % bits == 0 else (8, bits, "<u8")
    full = np.zeros(-(-n // per) * size, np.uint8)
    full[: len(data)] = data
    filled = np.zeros((-(-n // per), np.dtype(word).itemsize), np.uint8)
    filled[:, :size] = full.reshape(-1, size)
    filled = filled.view(word)[:, 0]
    codes = np.empty((len(filled), per), np.uint8)
    for i in range(per):
        codes[:, i] = filled >> filled.dtype.type(i * bits) & filled.dtype.type((1 << bits) - 1)
    return codes.reshape(-1)[:n]
