"""Row-sparse exchanges: of an embedding table, only the rows that some peer has touched in this step.

    UnionRows   those rows as they are: lossless
    S2          a count sketch of them: a fraction of the bytes, and an error that is zero in the mean

The gradient of an embedding is zero but for the rows of the ids in the batch. Lists of (row, values) cannot be summed on their way,
for each peer has other rows; so the peers first agree on the rows that any of them has, by the bitwise or of bitmaps.

    n  length of the flat update      R  rows of all tables      u  values of a table in touched rows      U  of all tables
    p  peers                          m  columns of a table      D  values that lie in no table

Source: Parallax, SparCML and others sum sparse updates by index; the sketch is that of "S2 Reducer: High-Performance Sparse
Communication to Accelerate Distributed Deep Learning", arXiv 2110.02140; count sketch: Charikar, Chen, Farach-Colton, ICALP 2002.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from bigdl_lite.algorithms.exchange import Stateless, Turn
from bigdl_lite.batch import mix
from bigdl_lite.comm.comm import Comm
from bigdl_lite.errors import RecipeError
from bigdl_lite.model.layout import Blueprint, Span
from bigdl_lite.vector import Cut


@dataclass(frozen=True)
class UnionRows:
    """The touched rows of all tables and all that lies in no table, in one sum.  Lossless: the same bits as a sum of everything.

    tables  names of 2-d parameters; None: the weights of every nn.Embedding and nn.EmbeddingBag

    A row is touched where any of its values is not zero. A table whose weight is used elsewhere too (tied to an output layer) has
    all rows touched: nothing is saved then.

    Cost, bytes of all peers: 2 (p - 1) (ceil(R / 8) + 4 (U + D)), in two calls.
    """

    tables: tuple[str, ...] | None = None
    remembers: ClassVar[bool] = False

    def check(self, blueprint: Blueprint) -> None:
        _tables(blueprint, self.tables, "UnionRows")

    def start(self, blueprint: Blueprint, comm: Comm) -> _Rows:
        return _Rows(_tables(blueprint, self.tables, "UnionRows"), blueprint.layout.n, None)


@dataclass(frozen=True)
class S2:
    """The touched rows of each table as a count sketch [rows, c], c = ceil(beta u), all that lies in no table as it is.

    beta    buckets for one value. Less costs less, and each step is noisier: as if the batch were smaller
    rows    sketches with hashes of their own, whose estimates' median counts: an odd number. More than one helps values with
            heavy tails, at as many times the bytes
    tables  as in UnionRows

    With rows = 1 the result is the sum plus an error of mean zero (over the hashes) and energy |sum|^2 / beta: four times the
    energy of the gradient itself at beta = 0.25. It averages out over steps because hashes are drawn anew in every one; nothing is
    kept of it, as error feedback would diverge for beta < 1. A table whose sketch would be no smaller than its touched rows
    (rows * beta >= 1) is sent as UnionRows sends it.

    Momentum and weight decay move rows that no peer has touched, as they do in torch with dense gradients: the sketch is of
    gradients, and the optimizer's rule stays what it is. Adam, with its eps, moves untouched rows by its momentum too.

    Cost, bytes of all peers: 2 (p - 1) (ceil(R / 8) + 4 (sum over tables of min(rows c, u) + D)), in two calls.
    """

    beta: float = 0.25
    rows: int = 1
    tables: tuple[str, ...] | None = None
    remembers: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise RecipeError(f"S2(beta={self.beta}) has no room for any value; beta must be above 0, usual are 0.15 to 0.5")
        if self.rows < 1 or self.rows % 2 == 0:
            raise RecipeError(f"S2(rows={self.rows}) has no middle estimate; rows must be odd: 1 or 3")

    def check(self, blueprint: Blueprint) -> None:
        _tables(blueprint, self.tables, "S2")

    def start(self, blueprint: Blueprint, comm: Comm) -> _Rows:
        return _Rows(_tables(blueprint, self.tables, "S2"), blueprint.layout.n, self)


class _Rows(Stateless):
    def __init__(self, tables: Sequence[Span], n: int, sketched: S2 | None) -> None:
        self.tables, self.sketched = tables, sketched
        self.dense = rest([(span.start, span.stop) for span in tables], n)

    def __call__(self, x: Tensor, comm: Comm, turn: Turn) -> Tensor:
        tables = [span.view(x) for span in self.tables]
        touched = _union([_touched(table) for table in tables], comm)
        sketches = [self._sketch(i, table, rows, turn) for i, (table, rows) in enumerate(zip(tables, touched, strict=True))]
        parts = []
        for table, rows, sketch in zip(tables, touched, sketches, strict=True):
            values = table[rows].reshape(-1)
            parts.append(values if sketch is None else sketch.encode(values))
        parts += [x[a:b] for a, b in self.dense]
        message = torch.cat(parts)
        total = comm.all_reduce(message) if len(message) else message  # all tables untouched, and nothing else: no call
        sums = total.split([len(part) for part in parts])
        for table, rows, sketch, part in zip(tables, touched, sketches, sums[: len(tables)], strict=True):
            values = part if sketch is None else sketch.decode(part)
            table.zero_()  # a row of -0.0 counts as untouched, and peers must have the same bits
            table[rows] = values.view(len(rows), table.shape[1])
        for (a, b), part in zip(self.dense, sums[len(tables) :], strict=True):
            x[a:b] = part
        return x

    def _sketch(self, number: int, table: Tensor, rows: Tensor, turn: Turn) -> Sketch | None:
        """None where the rows themselves are no longer than their sketch: an empty union among them."""
        how, u, m = self.sketched, len(rows) * table.shape[1], table.shape[1]
        if how is None or how.rows * math.ceil(how.beta * u) >= u:
            return None
        return Sketch(rows, m, how.rows, math.ceil(how.beta * u), mix(turn.seed, number))


class Sketch:
    """A count sketch [r, c] of the values [k, m] in k rows of a table: linear, so that sketches can be summed.

    encode   T[i, h_i(j)] = sum of s_i(j) x[j] over all values j, i = 1 .. r
    decode   x[j] = median over i of s_i(j) T[i, h_i(j)]

    The bucket h and the sign s of value (row, column) come from 64 bits, A[row] xor B[column], where A and B are random words
    of a counter and the seed: simple tabulation hashing, which is 3-independent (Patrascu and Thorup, J. ACM 2012). So only the
    rows and columns need random numbers, not the values, and only of rows that are there.
    """

    def __init__(self, rows: Tensor, m: int, r: int, c: int, seed: int) -> None:
        self.length = r * c
        numbers, columns = rows.numpy().astype(np.uint64), np.arange(m, dtype=np.uint64)
        places, signs = [], []
        for i in range(r):
            words = _words(mix(seed, i, 0), numbers)[:, None] ^ _words(mix(seed, i, 1), columns)  # [k, m]
            buckets = ((words >> np.uint64(32)) * np.uint64(c)) >> np.uint64(32)  # uniform in [0, c)
            places.append(torch.from_numpy(buckets.view(np.int64).reshape(-1)) + i * c)
            signs.append(torch.from_numpy((words & np.uint64(1)).astype(np.float32).reshape(-1)).mul_(-2).add_(1))
        self.places, self.signs = torch.stack(places), torch.stack(signs)  # [r, k m]

    def encode(self, values: Tensor) -> Tensor:
        """[k m] -> [r c]"""
        return torch.zeros(self.length).index_add_(0, self.places.view(-1), (self.signs * values).view(-1))

    def decode(self, table: Tensor) -> Tensor:
        """[r c] -> [k m]"""
        estimates = table[self.places].mul_(self.signs)
        return estimates[0] if len(estimates) == 1 else estimates.median(0).values


def _words(seed: int, counters: np.ndarray) -> np.ndarray:
    """A random uint64 for every counter: the output function of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014)."""
    z = counters * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _touched(table: Tensor) -> np.ndarray:
    """Which rows [k] have a value other than zero. The or of the bits without the sign, six times as fast as any() in torch 2.13."""
    return np.bitwise_or.reduce(table.numpy().view(np.uint32), axis=1) << np.uint32(1) != 0


def _union(touched: Sequence[np.ndarray], comm: Comm) -> list[Tensor]:
    """The numbers of the rows, per table, that any peer has touched: one bit a row, the bits of all tables in one call."""
    counts = [len(mask) for mask in touched]
    bits = comm.union(torch.from_numpy(np.packbits(np.concatenate(touched))))
    found = torch.from_numpy(np.unpackbits(bits.numpy(), count=sum(counts)))
    return [mask.nonzero().view(-1) for mask in found.split(counts)]


def _tables(blueprint: Blueprint, asked: Sequence[str] | None, who: str) -> list[Span]:
    spans = blueprint.layout.parameters
    fit = [span.name for span in spans if len(span.shape) == 2]
    if asked is None:
        names = {id(p): name for name, p in blueprint.skeleton.named_parameters()}
        kinds = (nn.Embedding, nn.EmbeddingBag)
        weights = [m._parameters.get("weight") for m in blueprint.skeleton.modules() if isinstance(m, kinds)]
        wanted = {names.get(id(weight)) for weight in weights}
    else:
        wanted = set(asked)
        wrong = sorted(wanted.difference(fit))
        if wrong:
            raise RecipeError(
                f"{who}: {', '.join(wrong)} is no trainable parameter of two dimensions; those are {', '.join(fit) or 'none'}"
            )
    tables = [span for span in spans if span.name in wanted and len(span.shape) == 2]
    if not tables:
        raise RecipeError(
            f"{who} finds no table: the module has no trainable nn.Embedding or nn.EmbeddingBag. Name tables=(...) among its "
            f"parameters of two dimensions ({', '.join(fit) or 'none'}), or leave the exchange away"
        )
    return tables


def rest(cuts: Sequence[Cut], n: int) -> list[Cut]:
    """What the cuts, in order and apart, leave of [0, n): without empty ones."""
    edges = [0, *(edge for cut in cuts for edge in cut), n]
    return [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b]
