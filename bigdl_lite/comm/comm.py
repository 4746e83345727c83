"""Comm: the sums that an exchange is made of, and how they are made among members that send tensors to one another.

    Comm           what an exchange may ask for: all_reduce, union, broadcast. Every engine has one
    Collectives    a Comm made of one operation, _trade: each member sends a tensor to each other one

    p  members      n  length of a vector, the same on every member unless said otherwise

Everything is summed in member order, on one member, and handed out: all members have the same bits. A codec is applied
to pieces that begin at multiples of its group, so the result does not depend on how a vector is cut among the members.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from bigdl_lite.vector import Cut, slices
from bigdl_lite.wire.codec import Codec, decoded, encoded, group_of, length, made_for, on_bytes

SERVER = -1  # the rank in whose name a sum is encoded


@dataclass
class Residual:
    """What a lossy all_reduce has not sent yet: on its way in (mine [n]) and on its way out (owned: of this member's slice).

    Source: error feedback on both sides, as in DoubleSqueeze (Tang et al., ICML 2019) and BAGUA's C_LP_S.
    """

    mine: Tensor
    owned: Tensor

    @staticmethod
    def zeros(n: int, comm: Comm, codec: Codec, gather: bool = False) -> Residual:
        owned = 0 if gather else _length(divided(n, comm.size, group_of(codec))[comm.rank])
        return Residual(torch.zeros(n), torch.zeros(owned))


class Comm(Protocol):
    """Calls are made by all members in the same order, with vectors of the same length."""

    rank: int
    size: int
    bytes_sent: int  # payload that this member sent

    def all_reduce(
        self, x: Tensor, codec: Codec | None = None, seed: int = 0, residual: Residual | None = None, gather: bool = False,
        first: int = 0,
    ) -> Tensor:  # fmt: skip
        """The sum of x [n] over members, in member order, in memory of its own; float32 where there is a codec.

        codec     None: as it is. Else Q(sum Q(x)): what travels is encoded in both directions, the sum is made in float32
        gather    sum Q(x): each sends its encoding to all, and nothing is encoded twice. For codecs so sparse that
                  p encodings are less than two vectors
        seed      of the step, for codecs with random numbers; the same on all
        residual  errors to send first, and the place for those of this call (error feedback)
        first     where x begins in the flat vector, a multiple of the codec's group

        Cost, bytes sent by all members together: 2 (p - 1) nbytes(n), or p (p - 1) nbytes(n) with gather.
        """
        ...

    def union(self, bits: Tensor) -> Tensor:
        """The bitwise or of bits [n] uint8.  Cost: 2 (p - 1) n bytes sent by all together."""
        ...

    def broadcast(self, x: Tensor, root: int = 0) -> Tensor:
        """The root's x; the others' give shape and dtype.  Cost: (p - 1) bytes of x, sent by the root."""
        ...


class Collectives(ABC):
    """A Comm over _trade, for tensors on a CPU (all_to_all and all_gather: on any device that _trade can do)."""

    rank: int
    size: int
    bytes_sent: int

    @abstractmethod
    def _trade(self, what: str, out: Sequence[Tensor], into: Sequence[Tensor]) -> None:
        """Sends out[j] to member j and fills into[j] from it, for all others; an empty tensor is not sent: both know its length."""

    def all_to_all(self, out: Sequence[Tensor]) -> list[Tensor]:
        """Sends out[j] to member j, whose in[self.rank] it becomes; lengths may differ by receiver but are slices of one n.

        Every member receives p tensors as long as its own out[rank].  Cost: the sum of the others' lengths, sent.
        """
        mine = out[self.rank]
        received = [torch.empty_like(mine, memory_format=torch.contiguous_format) for _ in range(self.size)]
        received[self.rank] = mine
        self._trade("all_to_all", out, received)
        return received

    def all_gather(self, mine: Tensor, out: Sequence[Tensor]) -> None:
        """Fills out[j] with member j's tensor; lengths may differ between members.  Cost: (p - 1) len(mine) values sent."""
        if mine.numel() and out[self.rank].data_ptr() != mine.data_ptr():
            out[self.rank].copy_(mine)
        self._trade("all_gather", [mine.contiguous()] * self.size, out)

    def swap(self, x: Tensor, to: Sequence[int], sources: Sequence[int]) -> list[Tensor]:
        """Sends x to the members `to`, and returns what each of `sources` sent, in their order: of the length and dtype of x.

        All members call it equally often, also those that have nobody to speak with now; nobody waits for any but its sources.
        Cost: len(to) times the bytes of x.
        """
        x, nothing = x.contiguous(), x.new_empty(0)
        out, into = [nothing] * self.size, [nothing] * self.size
        for other in to:
            out[other] = x
        for other in sources:
            into[other] = torch.empty_like(x)
        self._trade("swap", out, into)
        return [into[other] for other in sources]

    def all_reduce(
        self, x: Tensor, codec: Codec | None = None, seed: int = 0, residual: Residual | None = None, gather: bool = False,
        first: int = 0,
    ) -> Tensor:  # fmt: skip
        if codec is None:
            return self._scattered(x, slices(len(x), self.size))
        if gather:
            return self._gathered(x, codec, seed, residual, first)
        return self._coded(x, codec, seed, residual, first)

    def union(self, bits: Tensor) -> Tensor:
        return self._scattered(bits, slices(len(bits), self.size), torch.Tensor.bitwise_or_)

    def broadcast(self, x: Tensor, root: int = 0) -> Tensor:
        got, nothing = torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(0)
        sends = self.rank == root
        self._trade(
            "broadcast", [x.contiguous() if sends else nothing] * self.size,
            [got if r == root and not sends else nothing for r in range(self.size)],
        )  # fmt: skip
        return x.clone() if sends else got

    def _scattered(self, x: Tensor, cuts: Sequence[Cut], add: object = torch.Tensor.add_) -> Tensor:
        parts = self.all_to_all([x[a:b] for a, b in cuts])
        total = torch.empty_like(x, memory_format=torch.contiguous_format)
        mine = total[slice(*cuts[self.rank])]
        mine.copy_(parts[0])
        for part in parts[1:]:
            add(mine, part)  # type: ignore[operator]
        self.all_gather(mine, [total[a:b] for a, b in cuts])
        return total

    def _coded(self, x: Tensor, codec: Codec, seed: int, residual: Residual | None, first: int) -> Tensor:
        cuts = divided(len(x), self.size, group_of(codec))
        lengths = [_length(cut) for cut in cuts]
        if residual is not None:
            x = x + residual.mine
        here = [made_for(codec, seed, self.rank, first + a) for a, _ in cuts]
        out = [_encoded(q, x[a:b]) for q, (a, b) in zip(here, cuts, strict=True)]
        if residual is not None:
            for q, sent, (a, b) in zip(here, out, cuts, strict=True):
                torch.sub(x[a:b], _decoded(q, sent, b - a), out=residual.mine[a:b])
        a, k = cuts[self.rank][0], lengths[self.rank]
        parts = self.all_to_all(out)
        total = _decoded(made_for(codec, seed, 0, first + a), parts[0], k)
        for r, part in enumerate(parts[1:], 1):
            total.add_(_decoded(made_for(codec, seed, r, first + a), part, k, own=False))
        if residual is not None:
            total.add_(residual.owned)
        sums = [made_for(codec, seed, SERVER, first + a) for a, _ in cuts]
        mine = _encoded(sums[self.rank], total)
        if residual is not None:
            torch.sub(total, _decoded(sums[self.rank], mine, k), out=residual.owned)
        told = [torch.empty(length(q, k), dtype=torch.uint8) for q, k in zip(sums, lengths, strict=True)]
        self.all_gather(mine, told)
        return torch.cat([_decoded(q, data, k, own=False) for q, data, k in zip(sums, told, lengths, strict=True)])

    def _gathered(self, x: Tensor, codec: Codec, seed: int, residual: Residual | None, first: int) -> Tensor:
        if residual is not None:
            x = x + residual.mine
        senders = [made_for(codec, seed, r, first) for r in range(self.size)]
        mine = _encoded(senders[self.rank], x)
        if residual is not None:
            torch.sub(x, _decoded(senders[self.rank], mine, len(x)), out=residual.mine)
        told = [torch.empty(length(q, len(x)), dtype=torch.uint8) for q in senders]
        self.all_gather(mine, told)
        total = _decoded(senders[0], told[0], len(x))
        for q, data in zip(senders[1:], told[1:], strict=True):
            total.add_(_decoded(q, data, len(x), own=False))
        return total


def divided(n: int, p: int, group: int) -> list[Cut]:
    """p cuts of [0, n) that begin at multiples of group; group 0 leaves all to the first."""
    if group == 0:
        return [(0, n), *[(n, n)] * (p - 1)]
    groups = -(-n // group)
    return [(min(n, a * group), min(n, b * group)) for a, b in slices(groups, p)]


def _length(cut: Cut) -> int:
    return cut[1] - cut[0]


def _encoded(codec: Codec, x: Tensor) -> Tensor:
    return on_bytes(encoded(codec, x), torch.uint8)


def _decoded(codec: Codec, data: Tensor, n: int, own: bool = True) -> Tensor:
    return decoded(codec, memoryview(data.numpy()), n, own)
