"""PowerSGD: a matrix of gradients is sent as two thin factors, one step of subspace iteration a step of training.

    M_i = x_i + e_i                            of each peer; sum over peers M = sum M_i
    P   = orthonormal(sum over peers M_i Q)    [r columns]      Q of the step before: a warm start
    Q   = sum over peers M_i^T P
    x   = P Q^T = P P^T M                      the same on all peers
    e_i = M_i - P (M_i^T P)^T                  the residual: what this peer has not sent yet

All steps but the orthonormalisation are linear, so factors can be summed as gradients would be.

    n  length of the flat update      a, b   rows and columns of a matrix      r  its rank: at most min(a, b)
    p  peers                          D      values outside of matrices

The paper's code keeps M_i - P Q^T, the own matrix less the common result. Only the sum of the residuals over peers ever enters P, Q
and x, and it is the same; the own projection is smaller, does not drift where the peers' rows differ, and needs no share.

Source: Vogels, Karimireddy, Jaggi, "PowerSGD: Practical Low-Rank Gradient Compression for Distributed Optimization", NeurIPS 2019.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bigdl_lite.algorithms.algorithm import State
from bigdl_lite.algorithms.exchange import Turn, copy_into
from bigdl_lite.algorithms.rows import rest
from bigdl_lite.comm.comm import Comm
from bigdl_lite.errors import RecipeError
from bigdl_lite.model.layout import Blueprint, Layout

_SEED = 20190531  # of the first Q, the same in every process


@dataclass(frozen=True)
class PowerSGD:
    """Parameters of two and more dimensions as matrices [first dimension, all others]; all else is summed exactly.

    rank             columns of each factor: 1 to 4
    residual         error feedback. Without it what a step leaves out is lost, and training stops short
    warmup           exact steps at the beginning, while gradients change fast
    min_compression  a matrix is compressed where that saves more than so many times: a b > min_compression r (a + b)

    Cost, bytes of all peers: 8 (p - 1) (D + sum over matrices of r (a + b)), in two calls; 8 (p - 1) n in the warm-up.
    Memory: with residual the values of all matrices once more on each peer, and r b per matrix.
    """

    rank: int = 2
    residual: bool = True
    warmup: int = 0
    min_compression: float = 2.0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise RecipeError(f"PowerSGD(rank={self.rank}): rank must be at least 1")
        if self.warmup < 0 or not self.min_compression > 0:
            raise RecipeError(f"PowerSGD(warmup={self.warmup}, min_compression={self.min_compression}): at least 0, and above 0")

    @property
    def remembers(self) -> bool:
        return self.residual

    def matrices(self, layout: Layout) -> list[Matrix]:
        """The parameters that are compressed."""
        found = []
        for span in layout.parameters:
            if len(span.shape) < 2 or span.start == span.stop:
                continue
            a, b = span.shape[0], math.prod(span.shape[1:])
            r = min(self.rank, a, b)
            if a * b > self.min_compression * r * (a + b):
                found.append(Matrix(span.start, a, b, r))
        return found

    def check(self, blueprint: Blueprint) -> None:
        if not self.matrices(blueprint.layout):
            shapes = [list(span.shape) for span in blueprint.layout.parameters if len(span.shape) >= 2]
            raise RecipeError(
                f"PowerSGD(rank={self.rank}) would make no parameter {self.min_compression:g} times smaller; the shapes are "
                f"{', '.join(map(str, shapes)) or 'none of two dimensions'}. Take a smaller rank, or leave the exchange away"
            )

    def start(self, blueprint: Blueprint, comm: Comm) -> _PowerSGD:
        return _PowerSGD(self, blueprint.layout)


class Matrix(NamedTuple):
    """x[start : start + a b] as [a, b], compressed to rank r."""

    start: int
    a: int
    b: int
    r: int

    @property
    def stop(self) -> int:
        return self.start + self.a * self.b

    def view(self, x: Tensor) -> Tensor:
        return x[self.start : self.stop].view(self.a, self.b)


class _PowerSGD:
    """warm      Q [b, r] of each matrix, from the sums of the step before
    residual  of each matrix, as long as it is; empty without
    """

    def __init__(self, how: PowerSGD, layout: Layout) -> None:
        self.how, self.matrices = how, how.matrices(layout)
        self.rest = rest([(one.start, one.stop) for one in self.matrices], layout.n)
        generator = torch.Generator().manual_seed(_SEED)
        self.warm = [torch.randn(one.b, one.r, generator=generator) for one in self.matrices]
        self.residual = [torch.zeros(one.a, one.b) for one in self.matrices] if how.residual else []

    def __call__(self, x: Tensor, comm: Comm, turn: Turn) -> Tensor:
        if turn.step < self.how.warmup:
            return comm.all_reduce(x)
        ms = [one.view(x) for one in self.matrices]
        for m, e in zip(ms, self.residual, strict=False):
            m.add_(e)
        count = len(ms)
        sums = _summed(comm, [m @ q for m, q in zip(ms, self.warm, strict=True)] + [x[a:b] for a, b in self.rest])
        ps = [_orthonormal(p) for p in sums[:count]]
        mine = [m.T @ p for m, p in zip(ms, ps, strict=True)]
        qs = _summed(comm, mine)
        for m, e, p, q in zip(ms, self.residual, ps, mine, strict=False):
            torch.addmm(m, p, q.T, alpha=-1, out=e)
        for m, p, q in zip(ms, ps, qs, strict=True):
            torch.mm(p, q.T, out=m)
        for (a, b), total in zip(self.rest, sums[count:], strict=True):
            x[a:b] = total
        self.warm = [_scaled(q, old) for q, old in zip(qs, self.warm, strict=True)]
        return x

    def shared(self) -> State:
        return State({f"exchange/q{i}": q for i, q in enumerate(self.warm)}, {})

    def own(self) -> State:
        return State({f"exchange/e{i}": e for i, e in enumerate(self.residual)}, {})

    def restore(self, shared: State, own: State) -> None:
        for i, q in enumerate(self.warm):
            copy_into(q, shared, f"exchange/q{i}")
        for i, e in enumerate(self.residual):
            copy_into(e, own, f"exchange/e{i}")


def _summed(comm: Comm, parts: list[Tensor]) -> list[Tensor]:
    """The sums of tensors over peers, in one call."""
    total = comm.all_reduce(torch.cat([part.reshape(-1) for part in parts]))
    sums = total.split([part.numel() for part in parts])
    return [x.view_as(part) for x, part in zip(sums, parts, strict=True)]


def _orthonormal(p: Tensor) -> Tensor:
    """Orthonormal columns [a, r] that span those of p, and others where they do not suffice: of zeros, too.

    By Householder's method in float64, which knows no smallest norm.
    """
    return torch.linalg.qr(p.double()).Q.float().contiguous()


def _scaled(q: Tensor, old: Tensor) -> Tensor:
    """Q for the next step: only its directions count. After a step of zeros, or of no numbers, those of before."""
    largest = q.abs().amax()
    return q / largest if bool(largest.isfinite() & (largest > 0)) else old
