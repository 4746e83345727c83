"""GradiVeQ: gradients of a layer lie near a small linear space, which is learned, and then only coordinates in it are summed.

A layer is cut into slices of M consecutive values. In a cycle of steps

    train steps         the sum of everything, exact; one peer keeps the second moments of the summed slices y
    compressed steps    c = sum over peers of U^T x_i    then    y = U (c - U^T mu) + mu

mu is the mean and U the d first principal directions of y in the training steps of the cycle, one pair for a layer. The projection is
linear, so coordinates can be summed as the gradients would be: that is the method's point. mu is subtracted once, from the sum, so
that nothing depends on how the rows are shared out.

    n  length of the flat update      M  slice        L  layers that are compressed      D  values outside their slices
    p  peers                          d  rank         S  slices of all layers

The exact sums decide U, but eigenvectors computed twice may differ in sign, order and rounding: so the first peer alone computes
them, and sends them to all. It must have seen all training steps of the cycle, as must the driver where peers remember nothing.

Source: Yu et al., "GradiVeQ: Vector Quantization for Bandwidth-Efficient Gradient Aggregation in Distributed CNN Training",
NeurIPS 2018. Error feedback is of no use here: what U leaves out could not be sent in any later step of the cycle.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from bigdl_lite.algorithms.algorithm import State
from bigdl_lite.algorithms.exchange import NOTHING, Turn
from bigdl_lite.algorithms.rows import rest
from bigdl_lite.comm.comm import Comm
from bigdl_lite.errors import CheckpointError, RecipeError
from bigdl_lite.model.layout import Blueprint, Layout
from bigdl_lite.vector import Cut


@dataclass(frozen=True)
class GradiVeQ:
    """Layers of two and more dimensions with min_size values and at least one slice; their tails and all else are summed exactly.

    slice       M: values that lie together in a layer; best is what belongs together, as the inputs of one unit
    rank        d: coordinates that a slice is sent as
    train       steps of a cycle that are exact. Fewer slices than d in all of them leave directions out
    compressed  steps that follow. What U leaves out does not move in them: too many look like a plateau
    min_size    None: one slice

    ratio       values of a layer per value sent, over a whole cycle; d / M alone is that of the compressed steps

    Cost, bytes of all peers: 8 (p - 1) n in a training step, and 4 (p - 1) L M (d + 1) more in the last of them;
    8 (p - 1) (D + S d) in a compressed step. Memory: 8 L (M + 1)^2 bytes on the first peer while it trains, 4 L M (d + 1) on all.
    """

    slice: int = 256
    rank: int = 32
    train: int = 20
    compressed: int = 80
    min_size: int | None = None
    remembers: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 1 <= self.rank < self.slice:
            raise RecipeError(f"GradiVeQ(slice={self.slice}, rank={self.rank}): rank must be at least 1 and less than slice")
        if self.train < 1 or self.compressed < 1:
            raise RecipeError(f"GradiVeQ(train={self.train}, compressed={self.compressed}): both must be at least 1")

    @property
    def ratio(self) -> float:
        return (self.train + self.compressed) / (self.train + self.compressed * self.rank / self.slice)

    def layers(self, layout: Layout) -> list[Cut]:
        """The whole slices of every layer that is compressed."""
        least = max(self.slice, self.min_size or 0)
        large = [s for s in layout.parameters if len(s.shape) >= 2 and s.stop - s.start >= least]
        return [(s.start, s.stop - (s.stop - s.start) % self.slice) for s in large]

    def check(self, blueprint: Blueprint) -> None:
        if not self.layers(blueprint.layout):
            sizes = [s.stop - s.start for s in blueprint.layout.parameters if len(s.shape) >= 2]
            raise RecipeError(
                f"GradiVeQ compresses layers of {max(self.slice, self.min_size or 0)} values and more; the largest of this module "
                f"has {max(sizes, default=0)}. Take a smaller slice, or leave the exchange away"
            )

    def start(self, blueprint: Blueprint, comm: Comm) -> _GradiVeQ:
        return _GradiVeQ(self, blueprint.layout)


class _GradiVeQ:
    """basis    [L, M, d + 1] float32: U, and mu as the last column; None where the next compressed step has none
    moments  [L, M + 1, M + 1] float64, of the first peer: the sum of z z^T over slices, z = (y, 1)
    seen     training steps of this cycle that moments knows of
    """

    def __init__(self, how: GradiVeQ, layout: Layout) -> None:
        self.how, self.layers = how, how.layers(layout)
        self.rest = rest(self.layers, layout.n)
        self.basis: Tensor | None = None
        self.moments: Tensor | None = None
        self.seen = 0

    def __call__(self, x: Tensor, comm: Comm, turn: Turn) -> Tensor:
        place = turn.step % (self.how.train + self.how.compressed)
        if place < self.how.train:
            return self._trained(x, comm, place)
        # without a basis (resumed without the state, or it was not a number) all peers are exact until the next one
        return comm.all_reduce(x) if self.basis is None else self._compressed(x, comm, self.basis)

    def _trained(self, x: Tensor, comm: Comm, place: int) -> Tensor:
        y = comm.all_reduce(x)
        basis, moments, seen = None, None, 0
        if comm.rank == 0:
            moments, seen = (None, 0) if place == 0 else (self.moments, self.seen)
            moments, seen = self._added(moments, y), seen + 1
        if place == self.how.train - 1:
            found = self._basis(moments, seen) if moments is not None else self._empty()
            told = comm.broadcast(found.view(-1)).view_as(found)
            basis, moments, seen = told if bool(told.isfinite().all()) else None, None, 0
        self.basis, self.moments, self.seen = basis, moments, seen
        return y

    def _empty(self) -> Tensor:
        return torch.zeros(len(self.layers), self.how.slice, self.how.rank + 1)

    def _added(self, moments: Tensor | None, y: Tensor) -> Tensor:
        """A new tensor: the old one counts until all calls of the step are made. Not of y that is not finite."""
        m = self.how.slice
        total = torch.zeros(len(self.layers), m + 1, m + 1, dtype=torch.float64) if moments is None else moments.clone()
        if bool(y.isfinite().all()):
            for layer, (a, b) in zip(total, self.layers, strict=True):
                z = torch.ones((b - a) // m, m + 1, dtype=torch.float64)
                z[:, :m] = y[a:b].view(-1, m)
                layer.addmm_(z.T, z)
        return total

    def _basis(self, moments: Tensor, seen: int) -> Tensor:
        """The basis; not a number where it would be of a part of the training steps only, or of none.

        Directions without variance are columns of zeros: a layer whose gradient is constant is decoded as mu.
        """
        m, d, found = self.how.slice, self.how.rank, self._empty()
        for layer, z in zip(found, moments, strict=True):
            count = float(z[m, m])
            if seen < self.how.train or not count:
                return found.fill_(float("nan"))
            mu, second = z[:m, m] / count, z[:m, :m] / count
            variances, directions = torch.linalg.eigh(second - mu.outer(mu))
            real = variances[-d:] > 1e-12 * second.trace()
            layer[:, :d] = (directions[:, -d:] * real).flip(1)
            layer[:, d] = mu
        return found

    def _compressed(self, x: Tensor, comm: Comm, basis: Tensor) -> Tensor:
        m, d = self.how.slice, self.how.rank
        parts = [(x[a:b].view(-1, m) @ b_l[:, :d]).view(-1) for (a, b), b_l in zip(self.layers, basis, strict=True)]
        parts += [x[a:b] for a, b in self.rest]
        total = comm.all_reduce(torch.cat(parts))
        if not bool(total.any()):
            return x.zero_()  # a step of which no row counts: not (I - U U^T) mu
        sums = total.split([len(part) for part in parts])
        for (a, b), layer, c in zip(self.layers, basis, sums[: len(self.layers)], strict=True):
            u, mu = layer[:, :d], layer[:, d]
            x[a:b] = torch.addmm(mu, c.view(-1, d) - mu @ u, u.T).view(-1)
        for (a, b), values in zip(self.rest, sums[len(self.layers) :], strict=True):
            x[a:b] = values
        return x

    def shared(self) -> State:
        return NOTHING if self.basis is None else State({"exchange/basis": self.basis}, {})

    def own(self) -> State:
        return NOTHING if self.moments is None else State({"exchange/moments": self.moments}, {"seen": self.seen})

    def restore(self, shared: State, own: State) -> None:
        m, layers = self.how.slice, len(self.layers)
        self.basis = _found(shared, "exchange/basis", (layers, m, self.how.rank + 1))
        self.moments = _found(own, "exchange/moments", (layers, m + 1, m + 1))
        self.seen = 0 if self.moments is None else int(own.facts["seen"])


def _found(state: State, name: str, shape: tuple[int, ...]) -> Tensor | None:
    found = state.tensors.get(name)
    if found is not None and tuple(found.shape) != shape:
        raise CheckpointError(
            f"the checkpoint holds {name!r} in {list(found.shape)}, this GradiVeQ needs {list(shape)}: "
            "go on with the slice and rank that it was saved with"
        )
    return None if found is None else found.clone()
