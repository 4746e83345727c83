"""The shuffle engine: one short Spark job a round, executors that hold no truth.

    driver    weights, server state, round number             all that matters; everything below can be rebuilt
      |  broadcast: the weights
    map       p tasks: (weights, share, round) -> pieces      share and module are caches on the executor
      |  shuffle: piece s of every task to the owner of slice s
    combine   k tasks: sum of the pieces, in rank order
      |  collect
    driver    advance, slice by slice; next round

A task is a pure function of (broadcast, partition, seed, round), so Spark may run it again, twice, or elsewhere.
The decoded share lies on the executor's own disk. A small token for each partition is a cached RDD, which makes Spark
prefer that executor; where the executor dies, the token is computed again from the DataFrame's lineage, and with it the
share. A task that finds itself on an executor without its share says so, and the round is repeated after a refill.

    n  flat weights      p  workers (tasks of the map)      k  slices, each with an owner (tasks of the combine)

A slice travels in pieces of 1 MB; its owner adds up a piece as soon as all workers' parts of it are there.

Source: Dai et al., "BigDL: A Distributed Deep Learning Framework for Big Data", SoCC 2019, Alg. 1 and 2. Here the
optimizer runs on the driver, because the weights pass through it anyway.
"""

from __future__ import annotations

import json
import shutil
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from pyspark import RDD, SparkContext, StorageLevel
from pyspark.sql import DataFrame
from torch import Tensor

from bigdl_lite.algorithms import Side, Update, merge_buffers
from bigdl_lite.batch import Batch, mix, order, quotas
from bigdl_lite.data.arrow import Shapes, agree, share, shapes
from bigdl_lite.data.store import load, save
from bigdl_lite.engine.history import History, mean_loss
from bigdl_lite.engine.pack import foreign, pack, unpack
from bigdl_lite.engine.recipe import Observer, Outcome, Recipe, Start, silent
from bigdl_lite.engine.spark import Shipped, exchange, is_classic, jobs, slots
from bigdl_lite.engine.worker import local_dir, settle
from bigdl_lite.errors import DataError, PeerLost, RecipeError, report, revive
from bigdl_lite.model.batchnorm import SyncBatchNorm
from bigdl_lite.model.replica import Replica
from bigdl_lite.vector import Cut
from bigdl_lite.wire import frame as wire
from bigdl_lite.wire.codec import Codec, Raw

_SMALL = 1 << 18  # bytes of a slice under which one more task costs more than it saves
_PIECE = 1 << 18  # values of one piece: large arrays are slow in the JVM, and small ones let the two sides work at once
_REFILLS = 20


class ShuffleEngine:
    """codec: how a slice of an update travels through the shuffle."""

    name = "shuffle"

    def __init__(self, codec: Codec | None = None) -> None:
        self.codec = codec

    def fit(self, frame: DataFrame, recipe: Recipe, start: Start, observer: Observer = silent) -> Outcome:
        """Trains on a frame of recipe.num_workers partitions (see spark.arrange)."""
        if not is_classic(frame):
            raise RecipeError("engine='shuffle' needs RDDs, which Spark Connect does not have: take engine='barrier'")
        if any(isinstance(m, SyncBatchNorm) for m in recipe.blueprint.skeleton.modules()):
            raise RecipeError(
                "syncBatchNorm=True makes workers meet inside forward, which tasks of the shuffle engine cannot: "
                "take engine='barrier' or 'local'"
            )
        sc = frame.sparkSession.sparkContext
        _check_size(sc, start.weights)
        with jobs(sc, f"bigdl_lite {recipe.run}: shuffle, {recipe.num_workers} workers"):
            return _Rounds(frame, recipe, start, observer, self.codec or Raw(recipe.blueprint.layout.dtype)).run()


def _check_size(sc: SparkContext, weights: Tensor) -> None:
    most = sc._jsc.sc().conf().getSizeAsBytes("spark.driver.maxResultSize", "1g")
    heap = sc._jvm.java.lang.Runtime.getRuntime().maxMemory()
    need = weights.nbytes
    # the collected slices and the broadcast are in the JVM at the same time, each in one piece
    if (most and need > most) or 2.5 * need > heap:
        raise RecipeError(
            f"the shuffle engine brings {need / 2**20:.0f} MiB of weights through the driver's JVM every round, which has "
            f"{heap / 2**20:.0f} MiB of heap and spark.driver.maxResultSize={most / 2**20:.0f} MiB: raise "
            f"spark.driver.memory to {3 * need / 2**30 + 0.5:.1f}g and maxResultSize above {need / 2**20:.0f}m, or take engine='barrier'"
        )


@dataclass(frozen=True)
class _Order:
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


class _Rounds:
    def __init__(self, frame: DataFrame, recipe: Recipe, start: Start, observer: Observer, codec: Codec) -> None:
        self.frame, self.recipe, self.codec = frame, recipe, codec
        self.sc = frame.sparkSession.sparkContext
        self.weights, self.buffers = start.weights.clone(), start.buffers
        self.gradient = torch.zeros_like(self.weights)
        self.history = History(recipe.log_interval, observer)
        self.replica = Replica(recipe.blueprint, self.weights, None, start.constants, recipe.loss)
        n = recipe.blueprint.layout.n
        k = max(1, min(recipe.num_workers, slots(frame.sparkSession), -(-n * self.weights.itemsize // _SMALL)))
        method = recipe.round.advance
        self.cuts = method.cuts(self.replica, k)
        self.advancers = [method.start(self.replica, cut) for cut in self.cuts]
        self.shipped = Shipped.send(self.sc, start)
        self.static = self.sc.broadcast(pack((recipe, codec)))

    def run(self) -> Outcome:
        tokens = self._ingest().persist(StorageLevel.MEMORY_AND_DISK)
        try:
            counts, found = self._counts(tokens)
            plan = quotas(counts, self.recipe.batch_size)
            self.history.start(plan, self.recipe.epochs)
            dealt = np.cumsum(plan, axis=0) - plan
            step = 0
            for epoch in range(self.recipe.epochs):
                for first, quota in zip(dealt, plan, strict=True):
                    order = _Order(self.recipe.run, step, epoch, tuple(first.tolist()), tuple(quota.tolist()), counts, tuple(self.cuts))
                    self._round(tokens, order)
                    step += 1
                mean = self.history.epoch(epoch)
                for advancer in self.advancers:
                    advancer.end_epoch(mean)
        finally:
            self._clean(tokens)
        return Outcome(self.weights, self.buffers, self.history.lines, ShuffleEngine.name, found)

    def _ingest(self) -> RDD[Any]:
        """One token a partition; computing it puts the decoded share on the executor's disk."""
        schema = "partition int, rows long, shapes string, error string"
        return self.frame.mapInArrow(_decoder(self.static, self.recipe.run), schema).rdd

    def _counts(self, tokens: RDD[Any]) -> tuple[tuple[int, ...], Shapes]:
        """The rows of every share, and the shapes of one row."""
        told = {token.partition: token for token in tokens.collect()}
        errors = [json.loads(told[i].error) for i in sorted(told) if told[i].error]
        if errors:
            raise revive(errors[0])
        workers = range(self.recipe.num_workers)
        found = agree([json.loads(told[i].shapes) for i in workers], self.recipe.columns)
        return tuple(told[i].rows for i in workers), found

    def _round(self, tokens: RDD[Any], order: _Order) -> None:
        began = time.perf_counter()
        state = self.sc.broadcast((self.weights.view(torch.uint8).numpy().tobytes(), self.buffers.numpy().tobytes()))
        try:
            frames = self._job(tokens, order, state)
        finally:
            state.destroy(blocking=False)
        sides = sorted((_side(f) for f in frames if f.kind == wire.SIDE), key=lambda side: side.rank)
        mean = mean_loss(sides, order.round)
        rows = float(sum(order.quota))
        self._gather(frames, order)
        updates = [Update(self.gradient[start:stop], rows) for start, stop in self.cuts]
        measured = sum(a.measure(u) for a, u in zip(self.advancers, updates, strict=True))
        for advancer, update in zip(self.advancers, updates, strict=True):
            advancer.step(update, measured)
        if self.recipe.blueprint.layout.m:
            self.replica.buffers = merge_buffers(sides)
            self.buffers = self.replica.buffers  # as rounded to their own dtypes
        sent = len(order.senders) * sum(self.codec.nbytes(stop - start) for _, (start, stop) in order.pieces)
        seconds, rate = time.perf_counter() - began, self.advancers[0].rates()[0]
        self.history.step(order.round, order.epoch, sides, mean, seconds, rate)
        self.history.sent(sent)

    def _gather(self, frames: list[wire.Frame], order: _Order) -> None:
        """The combined pieces, each at its place in the gradient."""
        pieces, missing = order.pieces, set(range(len(order.pieces)))
        target = memoryview(self.gradient.view(torch.uint8).numpy())
        width = self.gradient.itemsize
        for f in frames:
            if f.kind == wire.COMBINED:
                start, stop = pieces[f.slice][1]
                target[start * width : stop * width] = f.payload
                missing.discard(f.slice)
        if missing:
            raise PeerLost(f"{len(missing)} of {len(pieces)} pieces did not come back in round {order.round}")

    def _job(self, tokens: RDD[Any], order: _Order, state: Any) -> list[wire.Frame]:
        """Runs the round; refills the executors that lack a share, and runs it again, where tasks report that."""
        for _ in range(_REFILLS):
            mapper = _mapper(self.static, self.shipped, state, order)
            frames = [wire.loads(data) for data in exchange(tokens, mapper, len(self.cuts), _combiner(self.static, order))]
            errors = sorted((f for f in frames if f.kind == wire.ERROR), key=lambda f: f.rank)
            if errors:
                raise revive(errors[0].json())
            missing = sorted({f.rank for f in frames if f.kind == wire.MISS})
            if not missing:
                return frames
            self.sc.runJob(self._ingest(), list, missing)
        raise PeerLost(
            f"partitions {missing} were on no executor that ran their task, {_REFILLS} times in round {order.round}; "
            "raise spark.locality.wait, or use fewer and larger executors"
        )

    def _clean(self, tokens: RDD[Any]) -> None:
        try:
            tokens.foreachPartition(_remover(self.recipe.run))
        except Exception:  # the session may be gone, or the jobs cancelled; Spark removes its directories itself
            pass
        tokens.unpersist()
        self.shipped.drop()
        self.static.destroy(blocking=False)


# ---- on the executors -----------------------------------------------------------------------------------------------

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


def _decoder(static: Any, run: str) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    def main(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        from pyspark import TaskContext

        settle()
        partition = TaskContext.get().partitionId()
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


def _mapper(static: Any, shipped: Shipped, state: Any, order: _Order) -> Callable[[int, Iterable[Any]], Iterator[tuple[int, bytes]]]:
    def task(rank: int, tokens: Iterable[Any]) -> Iterator[tuple[int, bytes]]:
        settle()
        list(tokens)  # a worker that leaves input unread is not reused
        try:
            yield from _local(rank, _static(static, order.run), shipped, state.value, order)
        except Exception as error:
            yield 0, wire.note(wire.ERROR, rank, order.round, report(error, f"worker {rank} (partition {rank})")).dumps()

    return task


def _local(
    rank: int, static: tuple[Recipe, Codec], shipped: Shipped, state: tuple[bytes, bytes], order: _Order
) -> Iterator[tuple[int, bytes]]:
    recipe, codec = static
    began = time.perf_counter()
    replica = _cached((recipe.run, "replica"), lambda: _replica(recipe, shipped))
    buffers = torch.frombuffer(bytearray(state[1]), dtype=torch.float64) if state[1] else replica.buffers
    quota = order.quota[rank]
    if not quota:
        yield 0, _side_frame(Side(rank, 0, 0.0, 0.0, 0.0, buffers), order.round)
        return
    rows = _cached((recipe.run, rank), lambda: load(_folder(recipe.run), str(rank)))
    if rows is None:
        yield 0, wire.note(wire.MISS, rank, order.round, None).dumps()
        return
    if rows.rows != order.counts[rank]:
        raise DataError(
            f"partition {rank} had {order.counts[rank]} rows when training began and {rows.rows} when it was computed again; "
            "make the DataFrame deterministic (no unseeded rand or limit), or cache it"
        )
    deal = _cached((recipe.run, ("order", order.epoch, rank)), lambda: _order_of(rows, recipe, order, rank))
    batch: Batch = rows.take(deal[order.first[rank] : order.first[rank] + quota])
    replica.weights.view(torch.uint8).numpy()[:] = np.frombuffer(state[0], np.uint8)
    replica.buffers = buffers
    ready = time.perf_counter()
    update, loss = recipe.round.local(replica, [batch], mix(recipe.seed, 2, order.round, rank))
    done = time.perf_counter()
    for i, (owner, (start, stop)) in enumerate(order.pieces):
        payload = codec.encode(update.vector[start:stop])
        yield owner, wire.Frame(wire.PIECE, rank, i, order.round, update.weight, stop - start, payload, codec.tag).dumps()
    side = Side(rank, quota, loss, done - ready, ready - began, replica.buffers)
    yield 0, _side_frame(side, order.round)


def _replica(recipe: Recipe, shipped: Shipped) -> Replica:
    found = recipe.blueprint.layout
    weights = torch.empty(found.n, dtype=found.dtype)
    return Replica(recipe.blueprint, weights, torch.zeros_like(weights), shipped.read().constants, recipe.loss)


def _order_of(rows: Batch, recipe: Recipe, now: _Order, rank: int) -> Tensor:
    return order(rows.rows, recipe.seed, now.epoch, rank)


def _combiner(static: Any, order: _Order) -> Callable[[int, Iterable[bytes]], Iterator[bytes]]:
    def task(owner: int, pieces: Iterable[bytes]) -> Iterator[bytes]:
        settle()
        recipe, codec = _static(static, order.run)
        waiting: dict[int, dict[int, wire.Frame]] = {}
        for data in pieces:
            frame = wire.loads(data)
            if frame.kind != wire.PIECE:
                yield data  # a side, an error, or a missing share: the driver's business
                continue
            parts = waiting.setdefault(frame.slice, {})
            parts[frame.rank] = frame
            if len(parts) < len(order.senders):
                continue
            total = recipe.round.combine([_decode(parts[rank], codec) for rank in order.senders])
            del waiting[frame.slice]
            payload = Raw(total.vector.dtype).encode(total.vector)
            yield wire.Frame(wire.COMBINED, owner, frame.slice, order.round, total.weight, len(total.vector), payload).dumps()

    return task


def _decode(frame: wire.Frame, codec: Codec) -> Update:
    # a copy: the first vector is summed into, and bytes must not be written to
    return Update(codec.decode(bytearray(frame.payload), frame.values), frame.weight)


def _side_frame(side: Side, round: int) -> bytes:
    numbers = np.array([side.rows, side.loss, side.compute_s, side.data_s], dtype="<f8")
    payload = numbers.tobytes() + side.buffers.numpy().astype("<f8").tobytes()
    return wire.Frame(wire.SIDE, side.rank, 0, round, float(side.rows), len(payload) // 8, payload).dumps()


def _side(frame: wire.Frame) -> Side:
    numbers = torch.frombuffer(bytearray(frame.payload), dtype=torch.float64)
    rows, loss, compute_s, data_s = numbers[:4].tolist()
    return Side(frame.rank, int(rows), loss, compute_s, data_s, numbers[4:])


def _remover(run: str) -> Callable[[Iterable[Any]], None]:
    def task(tokens: Iterable[Any]) -> None:
        list(tokens)
        for key in [key for key in _CACHE if key[0] == run]:
            del _CACHE[key]
        shutil.rmtree(_folder(run), ignore_errors=True)

    return task
