"""The tasks of the shuffle engine: what runs on executors. Pure functions of what they are given; the rest is a cache.

    p  workers (tasks of the map)      k  slices, each with an owner (tasks of the combine)
"""

from __future__ import annotations

import json
import shutil
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from bigdl_lite.algorithms import Side, Update
from bigdl_lite.batch import Batch, mix, order
from bigdl_lite.data.arrow import shapes, share
from bigdl_lite.data.store import load, save
from bigdl_lite.engine.pack import foreign, unpack
from bigdl_lite.engine.recipe import Recipe
from bigdl_lite.engine.spark import Shipped, partition_id
from bigdl_lite.engine.worker import local_dir, settle
from bigdl_lite.errors import DataError, report, revive
from bigdl_lite.model.replica import Replica
from bigdl_lite.vector import Cut
from bigdl_lite.wire import frame as wire
from bigdl_lite.wire.codec import Codec, Raw

# values of one piece: 256 KB of float32, because the JVM treats arrays of half a heap region (512 KB at the least) in a
# slow way of their own, and because small pieces let Python and the JVM work at the same time
_PIECE = 1 << 16


@dataclass(frozen=True)
class Order:
    """What a map task needs to know of one round."""

    run: str
    round: int
    epoch: int
    first: tuple[int, ...]  # rows of each share that this epoch has dealt already
    quota: tuple[int, ...]  # rows that each share gives now
    counts: tuple[int, ...]
    cuts: tuple[Cut, ...]

    @property
    def senders(self) -> list[int]:
        return [rank for rank, quota in enumerate(self.quota) if quota]

    @property
    def pieces(self) -> list[tuple[int, Cut]]:
        """The owner and the cut of every piece, in order."""
        return [
            (owner, (at, min(at + _PIECE, stop)))
            for owner, (start, stop) in enumerate(self.cuts)
            for at in range(start, stop, _PIECE)
        ]


_CACHE: OrderedDict[tuple[str, object], Any] = OrderedDict()  # what can be rebuilt: shares and replicas of the last runs
_CACHED = 32


def _cached(key: tuple[str, object], make: Callable[[], Any]) -> Any:
    if key not in _CACHE:
        made = make()
        if made is None:
            return None
        _CACHE[key] = made
        while len(_CACHE) > _CACHED:
            _CACHE.popitem(last=False)
    _CACHE.move_to_end(key)
    return _CACHE[key]


def _static(broadcast: Any, run: str) -> tuple[Recipe, Codec]:
    try:
        return _cached((run, "recipe"), lambda: unpack(broadcast.value))  # once in a process, not once a task
    except Exception as error:
        raise revive(foreign(error)) from error


def _folder(run: str) -> Path:
    return Path(local_dir()) / f"bigdl_lite-{run}"


def decoder_of(static: Any, run: str) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    def main(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        settle()
        partition = partition_id()
        told: dict[str, Any] = {"partition": partition, "rows": 0, "shapes": "null", "error": None}
        try:
            found = share(batches, _static(static, run)[0].columns, partition)
            if found is not None:
                save(_folder(run), str(partition), found)
                told |= {"rows": found.rows, "shapes": json.dumps(shapes(found))}
        except Exception as error:
            told["error"] = json.dumps(report(error, f"partition {partition}"))
        types = pa.schema([("partition", pa.int32()), ("rows", pa.int64()), ("shapes", pa.string()), ("error", pa.string())])
        yield pa.RecordBatch.from_pylist([told], schema=types)

    return main


def mapper_of(static: Any, shipped: Shipped, state: Any, now: Order) -> Callable[[int, Iterable[Any]], Iterator[tuple[int, bytes]]]:
    def task(rank: int, tokens: Iterable[Any]) -> Iterator[tuple[int, bytes]]:
        settle()
        list(tokens)  # a worker that leaves input unread is not reused
        try:
            yield from _local(rank, _static(static, now.run), shipped, state.value, now)
        except Exception as error:
            yield 0, wire.note(wire.ERROR, rank, now.round, report(error, f"worker {rank} (partition {rank})")).dumps()

    return task


def _local(
    rank: int, static: tuple[Recipe, Codec], shipped: Shipped, state: tuple[bytes, bytes], now: Order
) -> Iterator[tuple[int, bytes]]:
    recipe, codec = static
    began = time.perf_counter()
    replica = _cached((recipe.run, "replica"), lambda: _replica(recipe, shipped))
    buffers = torch.frombuffer(bytearray(state[1]), dtype=torch.float64) if state[1] else replica.buffers
    quota = now.quota[rank]
    if not quota:
        yield 0, _side_frame(Side(rank, 0, 0.0, 0.0, 0.0, 0.0, buffers), now.round)
        return
    rows = _cached((recipe.run, rank), lambda: load(_folder(recipe.run), str(rank)))
    if rows is None:
        yield 0, wire.note(wire.MISS, rank, now.round, None).dumps()
        return
    if rows.rows != now.counts[rank]:
        raise DataError(
            f"partition {rank} had {now.counts[rank]} rows when training began and {rows.rows} when it was computed again; "
            "make the DataFrame deterministic (no unseeded rand or limit), or cache it"
        )
    deal = _cached((recipe.run, ("order", now.epoch, rank)), lambda: order(rows.rows, recipe.seed, now.epoch, rank))
    batch: Batch = rows.take(deal[now.first[rank] : now.first[rank] + quota])
    replica.weights.view(torch.uint8).numpy()[:] = np.frombuffer(state[0], np.uint8)
    replica.buffers = buffers
    ready = time.perf_counter()
    update, loss = recipe.round.local(replica, [batch], mix(recipe.seed, 2, now.round, rank))
    done = time.perf_counter()
    for i, (owner, (start, stop)) in enumerate(now.pieces):
        payload = codec.encode(update.vector[start:stop])
        yield owner, wire.Frame(wire.PIECE, rank, i, now.round, update.weight, stop - start, payload, codec.tag).dumps()
    side = Side(rank, quota, update.weight, loss, done - ready, ready - began, replica.buffers)
    yield 0, _side_frame(side, now.round)


def _replica(recipe: Recipe, shipped: Shipped) -> Replica:
    found = recipe.blueprint.layout
    weights = torch.empty(found.n, dtype=found.dtype)
    return Replica(recipe.blueprint, weights, torch.zeros_like(weights), shipped.read().constants, recipe.loss)


def combiner_of(static: Any, now: Order) -> Callable[[int, Iterable[bytes]], Iterator[bytes]]:
    def task(owner: int, pieces: Iterable[bytes]) -> Iterator[bytes]:
        settle()
        recipe, codec = _static(static, now.run)
        waiting: dict[int, dict[int, wire.Frame]] = {}
        for data in pieces:
            frame = wire.loads(data)
            if frame.kind != wire.PIECE:
                yield data  # a side, an error, or a missing share: the driver's business
                continue
            parts = waiting.setdefault(frame.slice, {})
            parts[frame.rank] = frame
            if len(parts) < len(now.senders):
                continue
            total = recipe.round.combine([_decode(parts[rank], codec) for rank in now.senders])
            del waiting[frame.slice]
            payload = Raw(total.vector.dtype).encode(total.vector)
            yield wire.Frame(wire.COMBINED, owner, frame.slice, now.round, total.weight, len(total.vector), payload).dumps()

    return task


def _decode(frame: wire.Frame, codec: Codec) -> Update:
    # a copy: the first vector is summed into, and bytes must not be written to
    return Update(codec.decode(bytearray(frame.payload), frame.values), frame.weight)


def _side_frame(side: Side, round: int) -> bytes:
    numbers = np.array([side.rows, side.weight, side.loss, side.compute_s, side.data_s], dtype="<f8")
    payload = numbers.tobytes() + side.buffers.numpy().astype("<f8").tobytes()
    return wire.Frame(wire.SIDE, side.rank, 0, round, float(side.rows), len(payload) // 8, payload).dumps()


def side_of(frame: wire.Frame) -> Side:
    numbers = torch.frombuffer(bytearray(frame.payload), dtype=torch.float64)
    rows, weight, loss, compute_s, data_s = numbers[:5].tolist()
    return Side(frame.rank, int(rows), weight, loss, compute_s, data_s, numbers[5:])


def remover_of(run: str) -> Callable[[Iterable[Any]], None]:
    def task(tokens: Iterable[Any]) -> None:
        list(tokens)
        for key in [key for key in _CACHE if key[0] == run]:
            del _CACHE[key]
        shutil.rmtree(_folder(run), ignore_errors=True)

    return task
