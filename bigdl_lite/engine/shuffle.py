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

A slice travels in pieces of 256 KB; its owner adds up a piece as soon as all workers' parts of it are there.

Source: Dai et al., "BigDL: A Distributed Deep Learning Framework for Big Data", SoCC 2019, Alg. 1 and 2. Here the
optimizer runs on the driver, because the weights pass through it anyway.
"""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import torch
from pyspark import RDD, SparkContext, StorageLevel
from pyspark.sql import DataFrame
from torch import Tensor

from bigdl_lite.algorithms import Update, merge_buffers
from bigdl_lite.batch import quotas
from bigdl_lite.data.arrow import Shapes, agree
from bigdl_lite.engine.history import History, mean_loss
from bigdl_lite.engine.pack import pack
from bigdl_lite.engine.recipe import Observer, Outcome, Recipe, Start, silent
from bigdl_lite.engine.spark import Shipped, exchange, is_classic, jobs, slots
from bigdl_lite.engine.tasks import Order, combiner_of, decoder_of, mapper_of, remover_of, side_of
from bigdl_lite.errors import PeerLost, RecipeError, revive
from bigdl_lite.model.batchnorm import SyncBatchNorm
from bigdl_lite.model.replica import Replica
from bigdl_lite.wire import frame as wire
from bigdl_lite.wire.codec import Codec, Raw

_SMALL = 1 << 18  # bytes of a slice under which one more task costs more than it saves
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
            f"spark.driver.memory to {3 * need / 2**30 + 0.5:.1f}g and maxResultSize above {need / 2**20:.0f}m, "
            "or take engine='barrier'"
        )


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
                    order = Order(self.recipe.run, step, epoch, tuple(first.tolist()), tuple(quota.tolist()), counts, tuple(self.cuts))
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
        return self.frame.mapInArrow(decoder_of(self.static, self.recipe.run), schema).rdd

    def _counts(self, tokens: RDD[Any]) -> tuple[tuple[int, ...], Shapes]:
        """The rows of every share, and the shapes of one row."""
        told = {token.partition: token for token in tokens.collect()}
        errors = [json.loads(told[i].error) for i in sorted(told) if told[i].error]
        if errors:
            raise revive(errors[0])
        # no token at all: Spark's optimizer knew the frame to be empty, and started no task
        workers = range(self.recipe.num_workers if told else 0)
        found = agree([json.loads(told[i].shapes) for i in workers], self.recipe.columns)
        return tuple(told[i].rows for i in workers), found

    def _round(self, tokens: RDD[Any], order: Order) -> None:
        began = time.perf_counter()
        state = self.sc.broadcast((self.weights.view(torch.uint8).numpy().tobytes(), self.buffers.numpy().tobytes()))
        try:
            frames = self._job(tokens, order, state)
        finally:
            state.destroy(blocking=False)
        sides = sorted((side_of(f) for f in frames if f.kind == wire.SIDE), key=lambda side: side.rank)
        mean = mean_loss(sides, order.round)
        weight = sum(side.weight for side in sides)
        self._gather(frames, order)
        updates = [Update(self.gradient[start:stop], weight) for start, stop in self.cuts]
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

    def _gather(self, frames: list[wire.Frame], order: Order) -> None:
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

    def _job(self, tokens: RDD[Any], order: Order, state: Any) -> list[wire.Frame]:
        """Runs the round; refills the executors that lack a share, and runs it again, where tasks report that."""
        for _ in range(_REFILLS):
            mapper = mapper_of(self.static, self.shipped, state, order)
            frames = [wire.loads(data) for data in exchange(tokens, mapper, len(self.cuts), combiner_of(self.static, order))]
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
            tokens.foreachPartition(remover_of(self.recipe.run))
        except Exception:  # the session may be gone, or the jobs cancelled; Spark removes its directories itself
            pass
        tokens.unpersist()
        self.shipped.drop()
        self.static.destroy(blocking=False)
