"""An exchange played by tasks that remember nothing, and a driver that does.

    driver   runs the exchanger; each sum that it asks for is a job, whose answer it gets
    task     runs the exchanger on its own update, with the answers so far, up to the sum that is asked for: that is its message

Source of the idea: coroutines by replay. Nothing of a worker must outlive a job, so any executor can play any rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bigdl_lite.algorithms import Exchange, State, Turn
from bigdl_lite.algorithms.exchange import NOTHING, is_finite
from bigdl_lite.comm.comm import SERVER, Residual
from bigdl_lite.errors import DivergedError, RecipeError
from bigdl_lite.model.layout import Blueprint
from bigdl_lite.vector import Cut
from bigdl_lite.wire.codec import Codec, Raw, group_of, made_for, on_bytes

# values of one piece: 256 KB of float32, because the JVM treats arrays of half a heap region (512 KB at the least) in a
# slow way of their own, and because small pieces let Python and the JVM work at the same time
PIECE = 1 << 16

Packed = tuple[bytes, torch.dtype]


@dataclass(frozen=True)
class Ask:
    """The sum, or the union of bits, number `index` of a step: of vectors [n], by owners who each have a cut of it."""

    index: int
    n: int
    cuts: tuple[Cut, ...]
    dtype: torch.dtype = torch.float32
    codec: Codec | None = None
    seed: int = 0
    gather: bool = False
    first: int = 0
    union: bool = False

    @property
    def pieces(self) -> list[tuple[int, Cut]]:
        """The owner and the cut of every piece, in order; pieces of a codec begin at multiples of its group."""
        return pieces(self.cuts, 1 if self.codec is None else group_of(self.codec))

    def sender(self, rank: int, at: int) -> Codec:
        """How the piece that begins at `at` travels from a rank to its owner."""
        return Raw(self.dtype) if self.codec is None else made_for(self.codec, self.seed, rank, self.first + at)

    def server(self, at: int) -> Codec:
        """How the sum of a piece travels from its owner to everybody."""
        return Raw(self.dtype) if self.codec is None or self.gather else made_for(self.codec, self.seed, SERVER, self.first + at)

    def nbytes(self) -> int:
        """What one sender sends."""
        return sum(self.sender(0, a).nbytes(b - a) for _, (a, b) in self.pieces)

    def add(self, total: Tensor, x: Tensor) -> None:
        if self.union:
            total.bitwise_or_(x)
        else:
            total.add_(x)


def pieces(cuts: Sequence[Cut], group: int = 1) -> list[tuple[int, Cut]]:
    found = []
    for owner, (start, stop) in enumerate(cuts):
        step = max(group, PIECE // group * group) if group else max(1, stop - start)
        found += [(owner, (at, min(at + step, stop))) for at in range(start, stop, step)]
    return found


class _Paused(Exception):
    def __init__(self, message: Tensor) -> None:
        self.message = message


class _Task:
    """The comm of a task: known answers, then the message."""

    def __init__(self, rank: int, size: int, answers: Sequence[Tensor]) -> None:
        self.rank, self.size, self.bytes_sent, self._answers, self._at = rank, size, 0, answers, 0

    def all_reduce(
        self, x: Tensor, codec: Codec | None = None, seed: int = 0, residual: Residual | None = None, gather: bool = False,
        first: int = 0,
    ) -> Tensor:  # fmt: skip
        return self._next(x)

    def union(self, bits: Tensor) -> Tensor:
        return self._next(bits)

    def broadcast(self, x: Tensor, root: int = 0) -> Tensor:
        return self._next(x)

    def _next(self, x: Tensor) -> Tensor:
        if self._at == len(self._answers):
            raise _Paused(x)
        self._at += 1
        return self._answers[self._at - 1].clone()


def message(
    exchange: Exchange, blueprint: Blueprint, shared: State, ask: Ask, answers: Sequence[Tensor], x: Tensor, turn: Turn, rank: int,
    size: int,
) -> Tensor:  # fmt: skip
    """What this rank brings to the sum that is asked for. x [n] may be overwritten."""
    if not is_finite(x):
        raise DivergedError(f"the update of rank {rank} is not finite in step {turn.step}; lower the learning rate")
    comm = _Task(rank, size, answers)
    exchanger = exchange.start(blueprint, comm)
    exchanger.restore(shared, NOTHING)
    try:
        exchanger(x, comm, turn)
    except _Paused as paused:
        found = paused.message
        if len(found) == ask.n and found.dtype == ask.dtype:
            return found
        what = f"a sum of {len(found)} values of {found.dtype}"
    else:
        what = "none"
    raise RecipeError(
        f"{type(exchange).__name__} asks for a sum of {ask.n} values of {ask.dtype} on the driver, and for {what} in a task: between "
        "its calls to comm it must depend on x, on their answers, on the turn and on shared() alone"
    )


def packed(state: State) -> Any:
    """A state as plain bytes, for a broadcast."""
    return {name: (to_bytes(x), tuple(x.shape)) for name, x in state.tensors.items()}, state.facts


def unpacked(told: Any) -> State:
    tensors, facts = told
    return State({name: from_bytes(x).view(shape).clone() for name, (x, shape) in tensors.items()}, facts)


def to_bytes(x: Tensor) -> Packed:
    return x.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes(), x.dtype


def from_bytes(told: Packed) -> Tensor:
    """On the bytes, which must not be written to."""
    return on_bytes(told[0], told[1])
