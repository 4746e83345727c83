"""The tasks of the route through memory: a worker keeps its slot for the rounds of a job, and writes where the driver looks.

    memory               holds                                                        is written by
    the driver's state   weights [n], buffers [m] float64                             the driver, between rounds
    the driver's board   stamp: the number of the round; rates [g] float64            the driver, between rounds
                         seats [p, 256 bytes]: where the memory of each worker is     who does that worker's task
    a worker's own       stamp: the number of the round whose part this is            its owner, and nobody else
                         update [n], its weight, the side as a frame

A number is given once: a round that is repeated gets a new one. A task does the round on the board if that is one of its job's,
whichever that is, so that Spark may run it again or twice. It ends after the last of them, when the board shows a later number, or
when it has waited for two seconds: then it leaves its seat, and says why through Spark, so that nobody waits for it.

    n  flat weights      m  values of the buffers      g  parameter groups      p  workers
"""

from __future__ import annotations

import struct
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch

from bigdl_lite.algorithms import Update
from bigdl_lite.comm.window import Look, Window, look
from bigdl_lite.engine.cache import cached, gradient_of, recipe_of, replica_of
from bigdl_lite.engine.device import CPU
from bigdl_lite.engine.order import Order, loads
from bigdl_lite.engine.shipped import Shipped
from bigdl_lite.engine.spark import note_of_job
from bigdl_lite.engine.tasks import device_of, failed, local_work, state_in
from bigdl_lite.engine.worker import settle
from bigdl_lite.model.layout import Layout
from bigdl_lite.wire import frame as wire

CLOSED = (1 << 63) - 1  # on the board when no round will come any more
_SEAT_BYTES, _SEAT = 256, struct.Struct("<IH")  # checksum and length of the text that follows
_PART = struct.Struct("<qqd")  # bytes of the side's frame; whether there is an update, and its weight
_WAIT = 2.0  # seconds that a task waits for the driver
_NAP = 5e-5, 1e-3  # seconds between two looks at a stamp, at least and at most


def looker_of(static: Any, shipped: Shipped, state: str, board: str, base: Order) -> Callable[[int, Iterable[Any]], Iterator[bytes]]:
    """Several rounds, the driver's weights read and the gradient written where both can see them; through Spark comes only trouble.

    The task is the same in every job, so Spark gets it once; the number of the job's first round and all its orders are a note
    beside it. base knows how many rates there are. state, board: addresses.
    """

    def task(rank: int, tokens: Iterable[Any]) -> Iterator[bytes]:
        settle()
        list(tokens)  # a worker that leaves input unread is not reused
        first, _, orders = note_of_job().partition(" ")
        said = _job(rank, static, shipped, state, board, base, int(first), loads(orders, base))
        if said is not None:
            yield said.dumps()

    return task


def _job(
    rank: int, static: Any, shipped: Shipped, state: str, board: str, base: Order, first: int, orders: list[Order]
) -> wire.Frame | None:
    """Does the rounds of a job; returns what there is to say where not all of them were done."""
    source, seen = (cached(base.run, address, lambda address=address: look(address)) for address in (state, board))
    if source is None or seen is None:
        return wire.note(wire.BLIND, rank, orders[0].round, "the driver's memory cannot be seen")
    seat = seat_in(seen, len(base.rates), rank)
    try:
        said = _rounds(rank, static, shipped, source, seen, seat, base, first, orders)
    except Exception as error:
        said = failed(error, rank, orders[0])
    if said is not None:
        leave(seat, first)
    return said


def _rounds(
    rank: int, static: Any, shipped: Shipped, state: Look, board: Look, seat: memoryview, base: Order, first: int, orders: list[Order]
) -> wire.Frame | None:
    recipe = recipe_of(static, base.run)
    found = recipe.blueprint.layout
    nbytes = part_nbytes(found)
    try:
        window: Window = cached(base.run, ("window", rank), lambda: Window(nbytes))
    except (OSError, MemoryError) as error:
        return wire.note(wire.BLIND, rank, orders[0].round, f"no memory for {nbytes} bytes of updates: {error}")
    device = device_of(base.device, rank)
    replica = replica_of(recipe, shipped, device)
    target, rates = window.values(found.dtype, found.n), rates_in(board, len(base.rates))
    gradient = target if device == CPU else gradient_of(recipe, "gradient", device)  # an update on a GPU is copied by put_part
    at, last = first, first + len(orders) - 1
    while at <= last:
        number = _turn(board, seat, f"{first} {window.address}", at, last)
        if number is None:  # and nothing of this worker's was touched: the driver may still read it
            return wire.note(wire.EARLY, rank, orders[at - first].round, None)
        at = number + 1
        if window.stamp == number:  # done by this process: the driver may be reading
            continue
        window.mark(-1)
        now = replace(orders[number - first], rates=tuple(rates.tolist()))
        update, side = local_work(rank, recipe, replica, lambda: state_in(state, found.n, found.m, found.dtype), lambda: gradient, now)
        if side.kind != wire.SIDE:
            return side
        put_part(window, found, update, side)
        window.mark(number)
    return None


def _turn(board: Look, seat: memoryview, text: str, at: int, last: int) -> int | None:
    """The number of the round to do, of [at, last], perhaps after a while; None where the driver has given the job up."""
    began = time.monotonic()
    while (number := board.stamp) <= last:
        take(seat, text)  # again and again: another that does the same task may have taken it
        if number >= at:
            return number
        if time.monotonic() - began > _WAIT:
            break
        nap(began)
    return None


def nap(began: float) -> None:
    """Leaves the core to those who work, for a small part of the time that one has waited already (began: time.monotonic())."""
    least, most = _NAP
    time.sleep(min(most, max(least, (time.monotonic() - began) / 50)))


# ---- the board --------------------------------------------------------------------------------------------------------


def board_nbytes(groups: int, workers: int) -> int:
    return 8 * groups + _SEAT_BYTES * workers


def rates_in(board: Look, groups: int) -> torch.Tensor:
    """The rates [g] float64 of the round, on the board itself."""
    return board.values(torch.float64, groups)


def seat_in(board: Look, groups: int, rank: int) -> memoryview:
    return board.view(8 * groups + _SEAT_BYTES * rank, _SEAT_BYTES)


def take(seat: memoryview, text: str) -> None:
    """Writes "job address" on a seat, where it is not there."""
    data = text.encode()
    whole = _SEAT.pack(zlib.crc32(data), len(data)) + data
    assert len(whole) <= len(seat)
    if seat[: len(whole)] != whole:
        seat[: len(whole)] = whole


def leave(seat: memoryview, job: int) -> None:
    """Says that a task of this job is gone, unless a later job has the seat."""
    taken = seated(seat)
    if taken is None or taken[0] <= job:
        take(seat, f"{job} ")


def seated(seat: memoryview | bytes) -> tuple[int, str] | None:
    """The job and the address on a seat; "" where its task is gone, None where nothing can be read, for now."""
    checksum, length = _SEAT.unpack_from(seat)
    data = bytes(seat[_SEAT.size : _SEAT.size + length])
    if not data or zlib.crc32(data) != checksum:  # two may write at the same time
        return None
    job, _, address = data.decode().partition(" ")
    return int(job), address


# ---- a worker's part --------------------------------------------------------------------------------------------------


def part_nbytes(found: Layout) -> int:
    return _behind(found) + _PART.size + wire.HEADER_BYTES + 8 * (5 + found.m)


def put_part(window: Look, found: Layout, update: Update | None, side: wire.Frame) -> None:
    """The update [n] and the side of one round; the update's vector may lie there already."""
    data, target = side.dumps(), window.values(found.dtype, found.n)
    if update is not None and update.vector.data_ptr() != target.data_ptr():
        target.copy_(update.vector)
    room = window.view(_behind(found), _PART.size + len(data))
    _PART.pack_into(room, 0, len(data), update is not None, 0.0 if update is None else update.weight)
    room[_PART.size :] = data


def part_in(window: Look, found: Layout) -> tuple[wire.Frame, Update | None]:
    """The side, and the update on the memory itself."""
    nbytes, has_update, weight = _PART.unpack_from(window.view(_behind(found), _PART.size))
    side = wire.loads(bytes(window.view(_behind(found) + _PART.size, nbytes)))
    return side, Update(window.values(found.dtype, found.n), weight) if has_update else None


def _behind(found: Layout) -> int:
    return -(-found.n * found.dtype.itemsize // 8) * 8
