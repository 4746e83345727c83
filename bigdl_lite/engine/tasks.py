"""The tasks of the shuffle engine: what runs on executors. Pure functions of what they are given; the rest is a cache.

Those that look at memory are in looker.py.

    p  workers (tasks of the map)      k  slices, each with an owner (tasks of the combine)
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from itertools import accumulate, pairwise
from socket import gethostname
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from bigdl_lite.algorithms import Side, Turn, Update, Work
from bigdl_lite.batch import Batch, mix, order
from bigdl_lite.comm.window import Look, look
from bigdl_lite.data.arrow import shapes, shares
from bigdl_lite.data.store import save
from bigdl_lite.engine.cache import cached, folder, forget, gradient_of, recipe_of, replica_of, share_of
from bigdl_lite.engine.device import CPU, current, task_device
from bigdl_lite.engine.device import look as look_at_gpu
from bigdl_lite.engine.order import Order
from bigdl_lite.engine.recipe import Recipe
from bigdl_lite.engine.replay import from_bytes, message, unpacked
from bigdl_lite.engine.shipped import Shipped
from bigdl_lite.engine.spark import Keyed, gpus, partition_id
from bigdl_lite.engine.worker import require_versions, settle
from bigdl_lite.errors import report
from bigdl_lite.model.replica import Replica
from bigdl_lite.wire import frame as wire
from bigdl_lite.wire.codec import Codec, Raw, decoded, encoded, on_bytes

# ---- shares -----------------------------------------------------------------------------------------------------------

TOKEN = "partition int, rows long, held long, shapes string, error string, sees boolean, gpu string"
_TOKEN = pa.schema([
    ("partition", pa.int32()), ("rows", pa.int64()), ("held", pa.int64()), ("shapes", pa.string()), ("error", pa.string()),
    ("sees", pa.bool_()), ("gpu", pa.string()),
])  # fmt: skip


def decoder_of(
    static: Any, run: str, address: str, versions: dict[str, str]
) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    """Puts the decoded share on this executor's disk. sees: whether the driver's memory at `address` can be seen here; gpu: a Given.

    versions  of the driver's packages, which must be those of this executor
    """

    def main(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        settle()
        partition = partition_id()
        sees = bool(address) and look(address) is not None
        told: dict[str, Any] = {
            "partition": partition, "rows": 0, "held": 0, "shapes": "null", "error": None, "sees": sees, "gpu": "{}",
        }  # fmt: skip
        try:
            require_versions(versions)
            recipe = recipe_of(static, run)
            told["gpu"] = json.dumps(asdict(look_at_gpu(gpus(), recipe.device, gethostname())))
            found, held = shares(batches, recipe.columns, partition, recipe.watch.holdout)
            for key, rows, part in ((str(partition), "rows", found), (f"{partition}-held", "held", held)):
                if part is not None:
                    save(folder(run), key, part)
                    told |= {rows: part.rows, "shapes": json.dumps(shapes(part))}
        except Exception as error:
            told["error"] = json.dumps(report(error, f"partition {partition}"))
        yield pa.RecordBatch.from_pylist([told], schema=_TOKEN)

    return main


def remover_of(run: str) -> Callable[[Iterable[Any]], None]:
    def task(tokens: Iterable[Any]) -> None:
        list(tokens)
        forget(run)
        shutil.rmtree(folder(run), ignore_errors=True)

    return task


# ---- the local work ---------------------------------------------------------------------------------------------------


def device_of(kind: str, rank: int) -> torch.device:
    """Where this task computes, one of many that were all found to have a GPU or not; RecipeError where this one has none."""
    return CPU if kind == "cpu" else task_device(gpus(), kind, rank)[0]


def _on_cpu(update: Update | None, side: wire.Frame) -> tuple[Update | None, wire.Frame]:
    return None if update is None else replace(update, vector=update.vector.cpu()), side


def _rows(rank: int, recipe: Recipe, now: Order, device: torch.device) -> list[Batch] | None:
    """This rank's batches of the round; None where its share is not on this executor."""
    rows = share_of(now.run, rank, str(rank), now.counts[rank])
    if rows is None:
        return None
    dealt = cached(now.run, ("deal", rank), dict)  # of one epoch, by its number
    if now.epoch not in dealt:
        dealt.clear()
        dealt[now.epoch] = order(rows.rows, recipe.seed, now.epoch, rank)
    edges = [now.first[rank], *(now.first[rank] + done for done in accumulate(now.batches[rank]))]
    return [rows.take(dealt[now.epoch][a:b], device) for a, b in pairwise(edges)]


def local_work(
    rank: int, recipe: Recipe, replica: Replica, state: Callable[[], tuple[Tensor, Tensor]], gradient: Callable[[], Tensor],
    now: Order,
) -> tuple[Update | None, wire.Frame]:  # fmt: skip
    """The update of one rank, and its side; or no update, where there are no rows to work on.

    state     the weights [n] and buffers [m] of the round, copied from
    gradient  the vector [n] that the backward pass writes into
    """
    began = time.perf_counter()
    if not now.quota[rank]:
        return None, _side(Side(rank, 0, 0.0, 0.0, 0.0, 0.0, state()[1]), now.round)
    device = replica.weights.device
    batches = _rows(rank, recipe, now, device)
    if batches is None:
        return None, wire.note(wire.MISS, rank, now.round, None)
    weights, buffers = state()
    replica.weights.copy_(weights)
    replica.buffers = buffers
    replica.write_to(gradient())
    ready = time.perf_counter()
    work = Work(mix(recipe.seed, 2, now.round, rank), now.epoch, now.rates, rank, now.round)
    with current(device):
        update, loss = recipe.round.local(replica, batches, work)
    done = time.perf_counter()
    side = Side(rank, now.quota[rank], update.weight, loss, done - ready, ready - began, replica.buffers)
    return update, _side(side, now.round)


def _side(side: Side, round: int) -> wire.Frame:
    numbers = np.array([side.rows, side.weight, side.loss, side.compute_s, side.data_s], dtype="<f8")
    payload = numbers.tobytes() + side.buffers.numpy().astype("<f8").tobytes()
    return wire.Frame(wire.SIDE, side.rank, 0, round, float(side.rows), len(payload) // 8, payload)


def side_of(frame: wire.Frame) -> Side:
    numbers = torch.frombuffer(bytearray(frame.payload), dtype=torch.float64)
    rows, weight, loss, compute_s, data_s = numbers[:5].tolist()
    return Side(frame.rank, int(rows), weight, loss, compute_s, data_s, numbers[5:])


def failed(error: Exception, rank: int, now: Order) -> wire.Frame:
    return wire.note(wire.ERROR, rank, now.round, report(error, f"worker {rank} (partition {rank})"))


def state_in(memory: Look, n: int, m: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weights [n] and buffers [m] float64 on the driver's memory."""
    return memory.values(dtype, n), memory.values(torch.float64, m, -(-n * dtype.itemsize // 8) * 8)


def state_nbytes(n: int, m: int, dtype: torch.dtype) -> int:
    return -(-n * dtype.itemsize // 8) * 8 + 8 * m


# ---- the route through Spark's shuffle --------------------------------------------------------------------------------


def mapper_of(static: Any, shipped: Shipped, state: Any, now: Order) -> Callable[[int, Iterable[Any]], Keyed]:
    def task(rank: int, tokens: Iterable[Any]) -> Keyed:
        settle()
        list(tokens)
        try:
            yield from _by_value(rank, recipe_of(static, now.run), shipped, state, now)
        except Exception as error:
            yield 0, failed(error, rank, now).dumps()

    return task


def _by_value(rank: int, recipe: Recipe, shipped: Shipped, state: Any, now: Order) -> Keyed:
    found = recipe.blueprint.layout
    device = device_of(now.device, rank)
    replica = replica_of(recipe, shipped, device)
    key = "gradient" if now.ask is None else ("gradient", rank)
    gradient = lambda: gradient_of(recipe, key, device)  # noqa: E731

    def received() -> tuple[Tensor, Tensor]:
        weights, buffers, *_ = state.value
        return on_bytes(weights, found.dtype), on_bytes(buffers, torch.float64)

    if now.ask is None:
        update, side = _on_cpu(*local_work(rank, recipe, replica, received, gradient, now))
        vector = None if update is None else update.vector
    else:
        kept = cached(now.run, ("update", rank), dict)  # of one round, so that its later jobs need not compute again
        if now.round not in kept:
            kept.clear()
            kept[now.round] = _on_cpu(*local_work(rank, recipe, replica, received, gradient, now))
        update, side = kept[now.round]
        if side.kind != wire.SIDE:
            kept.clear()
        vector = None if update is None else _message(rank, recipe, update, state, now)
    yield 0, side.dumps()
    if update is not None:
        assert vector is not None
        for i, (owner, (start, stop)) in enumerate(now.pieces):
            codec: Codec = Raw(found.dtype) if now.ask is None else now.ask.sender(rank, start)
            payload = encoded(codec, vector[start:stop])
            tag = getattr(codec, "tag", 255)
            yield owner, wire.Frame(wire.PIECE, rank, i, now.round, update.weight, stop - start, payload, tag).dumps()


def _message(rank: int, recipe: Recipe, update: Update, state: Any, now: Order) -> Tensor:
    """What this rank brings to the sum that the exchange asks for."""
    assert now.ask is not None
    _, _, shared, answers = state.value
    quota = now.quota
    turn = Turn(now.round, mix(recipe.seed, 3, now.round), quota[rank] / sum(quota))
    known = [from_bytes(x) for x in answers]
    x = update.vector / sum(quota)
    exchange = recipe.round.exchange
    return message(exchange, recipe.blueprint, unpacked(shared), now.ask, known, x, turn, rank, len(quota))


def combiner_of(static: Any, now: Order) -> Callable[[int, Iterable[bytes]], Iterator[bytes]]:
    def task(owner: int, pieces: Iterable[bytes]) -> Iterator[bytes]:
        settle()
        yield from combined(owner, pieces, recipe_of(static, now.run), now)

    return task


def combined(owner: int, pieces: Iterable[bytes], recipe: Recipe, now: Order) -> Iterator[bytes]:
    """Every piece of an owner as soon as all parts of it are there; sides, errors and missing shares as they are."""
    waiting: dict[int, dict[int, wire.Frame]] = {}
    for data in pieces:
        frame = wire.loads(data)
        if frame.kind != wire.PIECE:
            yield data  # the driver's business
            continue
        parts = waiting.setdefault(frame.slice, {})
        parts[frame.rank] = frame
        if len(parts) < len(now.senders):
            continue
        frames = [parts[rank] for rank in now.senders]
        del waiting[frame.slice]
        if now.ask is None:
            raw = Raw(recipe.blueprint.layout.dtype)
            # the first vector is summed into
            total = recipe.round.combine([Update(_decoded(raw, x, own=not i), x.weight) for i, x in enumerate(frames)]).vector
            codec: Codec = raw
        else:
            at = now.pieces[frame.slice][1][0]
            total = _decoded(now.ask.sender(frames[0].rank, at), frames[0])
            for part in frames[1:]:
                now.ask.add(total, _decoded(now.ask.sender(part.rank, at), part, own=False))
            codec = now.ask.server(at)
        payload = encoded(codec, total)
        yield wire.Frame(wire.COMBINED, owner, frame.slice, now.round, 0.0, len(total), payload).dumps()


def _decoded(codec: Codec, frame: wire.Frame, own: bool = True) -> Tensor:
    return decoded(codec, frame.payload, frame.values, own)
