"""The tasks of the shuffle engine where driver and workers look at each other's memory: updates stay where they are written.

A worker has one window for each rank that it has run: the update, and behind it a letter, which tells the driver what a frame
would tell it through Spark.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from bigdl_lite.comm.window import Look, Window, look
from bigdl_lite.engine.order import Order
from bigdl_lite.engine.recipe import Recipe
from bigdl_lite.engine.shipped import Shipped
from bigdl_lite.engine.spark import note_of_job
from bigdl_lite.engine.tasks import CACHE, cached, replica_of, static_of, told_of, work_of
from bigdl_lite.engine.worker import settle
from bigdl_lite.wire import frame as wire


def looker_of(
    static: Any, shipped: Shipped, address: str, base: Order, dtype: torch.dtype
) -> Callable[[int, Iterable[Any]], Iterator[bytes]]:
    """One round, the driver's weights read and the gradient written where both can see them; what travels is small.

    The task is the same in every round, so Spark gets it once; the order of the round is a note beside the job.
    """

    def task(rank: int, tokens: Iterable[Any]) -> Iterator[bytes]:
        settle()
        list(tokens)  # a worker that leaves input unread is not reused
        now = base.loads(note_of_job())
        try:
            frames = list(_by_memory(rank, static_of(static, now.run), shipped, address, now))
        except Exception as error:
            frames = [told_of(error, rank, now)]
        if not (now.post and _posted(rank, now, frames[0], dtype)):
            yield from (frame.dumps() for frame in frames)

    return task


def _posted(rank: int, now: Order, frame: wire.Frame, dtype: torch.dtype) -> bool:
    """Leaves a frame beside the update, stamped; False where there is no room for it."""
    window: Window | None = CACHE[now.run].values.get(("window", rank)) if now.run in CACHE else None
    data = frame.dumps()
    if window is None or not leave_letter(window, data, now.cuts[-1][1], dtype):
        return False
    window.mark(now.round)
    return True


def _by_memory(rank: int, recipe: Recipe, shipped: Shipped, address: str, now: Order) -> Iterator[wire.Frame]:
    source: Look | None = cached(now.run, "source", lambda: look(address))
    if source is None:
        yield wire.note(wire.BLIND, rank, now.round, "the driver's memory cannot be seen")
        return
    found = recipe.blueprint.layout
    replica = cached(now.run, "replica", lambda: replica_of(recipe, shipped))
    try:
        window: Window = cached(now.run, ("window", rank), lambda: Window(window_nbytes(found.n, found.m, found.dtype)))
    except (OSError, MemoryError) as error:
        yield wire.note(wire.BLIND, rank, now.round, f"no memory for {found.n * found.dtype.itemsize} bytes of updates: {error}")
        return
    window.mark(-1)
    target = window.values(found.dtype, found.n)
    update, side = work_of(rank, recipe, replica, lambda: state_in(source, found.n, found.m, found.dtype), lambda: target, now)
    yield side
    if update is not None and update.vector.data_ptr() != target.data_ptr():
        target.copy_(update.vector)
    if side.kind == wire.SIDE and not now.post:
        window.mark(now.round)
        yield wire.note(wire.PLACED, rank, now.round, {"address": window.address, "weight": None if update is None else update.weight})


def window_nbytes(n: int, m: int, dtype: torch.dtype) -> int:
    """An update [n], and behind it a letter: its length and its bytes, enough for a side with buffers [m], or for most errors."""
    return _letter_at(n, dtype) + 8 + max(1 << 14, 8 * m + 1024)


def _letter_at(n: int, dtype: torch.dtype) -> int:
    return -(-n * dtype.itemsize // 8) * 8


def leave_letter(window: Window, data: bytes, n: int, dtype: torch.dtype) -> bool:
    """False where it is too long."""
    at = _letter_at(n, dtype)
    if at + 8 + len(data) > window.nbytes:
        return False
    window.values(torch.int64, 1, at)[0] = len(data)
    window.values(torch.uint8, len(data), at + 8).copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    return True


def letter_in(memory: Look, n: int, dtype: torch.dtype) -> bytes:
    at = _letter_at(n, dtype)
    return memory.values(torch.uint8, int(memory.values(torch.int64, 1, at)[0]), at + 8).numpy().tobytes()


def state_in(memory: Look, n: int, m: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weights [n] and buffers [m] float64 on the driver's memory."""
    return memory.values(dtype, n), memory.values(torch.float64, m, -(-n * dtype.itemsize // 8) * 8)


def state_nbytes(n: int, m: int, dtype: torch.dtype) -> int:
    return -(-n * dtype.itemsize // 8) * 8 + 8 * m
