"""The shuffle engine: one short Spark job a round, executors that hold no truth.

    driver    weights, server state, round number             all that matters; everything below can be rebuilt
      |  broadcast: the weights
    map       p tasks: (weights, share, round) -> pieces      share and module are caches on the executor
      |  shuffle: piece s of every task to the owner of slice s
    combine   k tasks: sum of the pieces, in rank order
      |  collect
    driver    advance, slice by slice; next round

Where driver and executors are on one machine, values need not travel, and a job may have several rounds: see routes.py, memory.py.

A task is a pure function of (broadcast, partition, seed, round), so Spark may run it again, twice, or elsewhere.
The decoded share lies on the executor's own disk. A small token for each partition is a cached RDD, which makes Spark
prefer that executor; where the executor dies, the token is computed again from the DataFrame's lineage, and with it the
share. A task that finds itself on an executor without its share says so, and the round is repeated after a refill.

    n  flat weights      p  workers (tasks of the map)      k  slices, each with an owner (tasks of the combine)

A slice travels in pieces of 256 KB; its owner adds up a piece as soon as all workers' parts of it are there. A model of
one slice is the driver's own: then the job has one stage.

Source: Dai et al., "BigDL: A Distributed Deep Learning Framework for Big Data", SoCC 2019, Alg. 1 and 2. Here the
optimizer runs on the driver, because the weights pass through it anyway.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from pyspark import StorageLevel
from pyspark.resource import ResourceProfile
from pyspark.sql import DataFrame
from torch import Tensor

from bigdl_lite.algorithms import merge_buffers
from bigdl_lite.algorithms.exchange import NOTHING, put_back
from bigdl_lite.batch import rounds
from bigdl_lite.comm.room import Room, Table
from bigdl_lite.comm.window import Window
from bigdl_lite.data.arrow import Shapes, agree
from bigdl_lite.engine.again import again
from bigdl_lite.engine.cluster import cluster_of
from bigdl_lite.engine.device import Given, Noting, decide
from bigdl_lite.engine.each import told
from bigdl_lite.engine.history import History, mean_loss
from bigdl_lite.engine.keeper import Keep, Part, forget
from bigdl_lite.engine.memory import MemoryRoute
from bigdl_lite.engine.order import Order
from bigdl_lite.engine.pack import pack
from bigdl_lite.engine.recipe import Observer, Outcome, Position, Recipe, Start, dealt, silent
from bigdl_lite.engine.routes import SMALL, Blind, Coming, ExchangeRoute, Ground, Route, ShuffleRoute, measured, nothing, window_for
from bigdl_lite.engine.shipped import Shipped
from bigdl_lite.engine.spark import in_order, is_classic
from bigdl_lite.engine.tasks import TOKEN, decoder_of, remover_of, state_in
from bigdl_lite.engine.trigger import Moment
from bigdl_lite.engine.watch import Judge, best_of, keep_best, shown
from bigdl_lite.engine.worker import versions
from bigdl_lite.errors import PeerLost, RecipeError, blamed, revive
from bigdl_lite.model.batchnorm import SyncBatchNorm
from bigdl_lite.model.replica import Replica

if TYPE_CHECKING:
    from pyspark import RDD, SparkContext

_LOG = logging.getLogger("bigdl_lite")


class ShuffleEngine:
    """share_memory  whether processes of one machine may look at each other's memory; never done with an exchange, nor where
    Spark's encryption is on
    profile  a ResourceProfile that says what the tasks of workers need, GPUs where the application's own tasks have none
    """

    name = "shuffle"

    def __init__(self, share_memory: bool = True, profile: ResourceProfile | None = None) -> None:
        self.share_memory, self.profile = share_memory, profile

    def fit(self, frame: DataFrame, recipe: Recipe, start: Start, observer: Observer = silent, keep: Keep = forget) -> Outcome:
        """Trains on a frame of recipe.num_workers partitions (see spark.arrange)."""
        if not is_classic(frame.sparkSession):
            raise RecipeError("engine='shuffle' needs RDDs, which Spark Connect does not have: take engine='barrier'")
        if any(isinstance(m, SyncBatchNorm) for m in recipe.blueprint.skeleton.modules()):
            raise RecipeError(
                "syncBatchNorm=True makes workers meet inside forward, which tasks of the shuffle engine cannot: "
                "take engine='barrier' or 'local'"
            )
        if recipe.round.peer is not None:
            raise RecipeError(
                f"with {type(recipe.round.peer).__name__} each worker has weights of its own and speaks to others, and tasks of the "
                "shuffle engine keep nothing and speak to nobody: take engine='barrier'"
                + ("" if recipe.round.peer.threads else " or 'local'")
            )
        exchange = recipe.round.exchange
        if exchange is not None and exchange.remembers:
            raise RecipeError(
                f"{exchange!r} keeps a residual on each worker, and tasks of the shuffle engine keep nothing: take engine='barrier' or "
                "'local', or the same exchange with residual=False, where it has one"
            )
        if getattr(exchange, "overlap", False):
            raise RecipeError(
                "overlap=True sends buckets while backward runs, and tasks of the shuffle engine speak to nobody: take "
                "engine='barrier', or overlap=False"
            )
        if exchange is not None and recipe.hierarchical:
            raise RecipeError(
                "hierarchical=True sums in the memory of a node first, and tasks of the shuffle engine do not meet: take "
                "engine='barrier', or hierarchical=False"
            )
        cluster = cluster_of(frame.sparkSession)
        window = window_for(cluster, recipe) if self.share_memory and exchange is None else None
        if window is None or not cluster.beside:
            _check_size(frame.sparkSession.sparkContext, start.weights)
        with cluster.jobs(f"bigdl_lite {recipe.run}: shuffle, {recipe.num_workers} workers"):
            return _Rounds(frame, recipe, start, observer, window, keep, self.profile).run()


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
    def __init__(
        self, frame: DataFrame, recipe: Recipe, start: Start, observer: Observer, window: Window | None, keep: Keep,
        profile: ResourceProfile | None,
    ) -> None:  # fmt: skip
        self.frame, self.recipe, self.window, self.start, self.keep, self.profile = frame, recipe, window, start, keep, profile
        self.sc, cluster = frame.sparkSession.sparkContext, cluster_of(frame.sparkSession)
        found = recipe.blueprint.layout
        if window is None:
            self.weights = start.weights.clone()
        else:
            self.weights, _ = state_in(window, found.n, found.m, found.dtype)
            self.weights.copy_(start.weights)
        self.buffers = start.buffers
        self.history = History(recipe.log_interval, observer)
        sums = start.resume.sums if start.resume else None
        self.judge = Judge(recipe.watch, sums.get("judge") if sums else None)
        self.observer = observer
        self.replica = Replica(recipe.blueprint, self.weights, None, start.constants, recipe.loss)
        self.free = cluster.slots(profile)
        self.owners = max(1, min(recipe.num_workers, self.free))
        exchange = recipe.round.exchange
        k = 1 if self.weights.nbytes < SMALL or exchange is not None else self.owners
        method = recipe.round.advance
        self.cuts = method.cuts(self.replica, k)
        self.advancers = [method.start(self.replica, cut) for cut in self.cuts]
        if start.resume:
            for advancer in self.advancers:
                advancer.restore(start.resume.state)
        self.exchanger = None
        if exchange is not None:
            comm = Room(Table(recipe.num_workers), 0)  # which says only how many there are
            self.exchanger = exchange.start(recipe.blueprint, comm)
            if start.resume:
                put_back(exchange, self.exchanger, start.resume.state, comm)
        self.shipped = Shipped.send(cluster, replace(start, weights=start.weights[:0], resume=None), may_map=window is not None)
        self.static = self.sc.broadcast(pack(recipe))

    def run(self) -> Outcome:
        tokens = self._ingest().persist(StorageLevel.MEMORY_AND_DISK)
        route: Route | None = None
        try:
            counts, held, found, sees, device = self._counts(tokens)
            plan = self.recipe.plan(counts)
            resume = self.start.resume
            self.history.start(self.recipe.steps(len(plan)), self.recipe.epochs, int(plan.sum()), resume.sums if resume else None)
            if resume:
                resume.check(dealt(self.recipe, counts, resume.now))
            begins = np.cumsum(plan, axis=0) - plan
            rates = tuple(self.advancers[0].rates())
            shapes = tuple(map(tuple, found))
            base = Order(self.recipe.run, counts, tuple(self.cuts), rates=rates, held=held, shapes=shapes, device=device)
            ground = Ground(
                self.sc, tokens, self.recipe, self.static, self.shipped, base,
                lambda missing: self.sc.runJob(self._ingest(), list, missing),
            )  # fmt: skip
            if self.exchanger is not None:
                route = ExchangeRoute(ground, self.exchanger, self.owners)
            else:
                if self.window is not None and sees:
                    route = MemoryRoute(ground, self.window, self.recipe.num_workers <= self.free and in_order(self.sc))
                else:
                    route = ShuffleRoute(ground)
            step, first_epoch, begun = self.start.now
            for epoch in range(first_epoch, self.recipe.epochs):
                if self.judge.ended:
                    break
                past = begun if epoch == first_epoch else 0
                each = rounds(len(plan), self.recipe.round.local.batches(epoch))

                def ordered(at: int, step: int, epoch: int = epoch, each: list[tuple[int, int]] = each) -> Order:
                    a, b = each[at]
                    batches, first = tuple(map(tuple, plan[a:b].T.tolist())), tuple(begins[a].tolist())
                    rates = tuple(self.advancers[0].rates())
                    return replace(base, round=step, epoch=epoch, first=first, batches=batches, rates=rates)

                for at in range(past + 1, len(each) + 1):
                    order = ordered(at - 1, step)

                    def coming(k: int, at: int = at, step: int = step, ordered: Any = ordered, end: int = len(each)) -> list[Order]:
                        if self.recipe.watch.every is not None:  # the slots may be wanted for a validation after any round
                            return []
                        return [ordered(i, step + 1 + i - at) for i in range(at, min(at + k, end))]

                    try:
                        mean = self._round(route, order, coming)
                    except Blind as why:
                        _LOG.warning("shuffle: from round %d on values travel through Spark, because %s", step, why)
                        _check_size(self.sc, self.weights)
                        route.close()
                        route = ShuffleRoute(ground)
                        mean = self._round(route, order)
                    step += 1
                    last = at == len(each)
                    self._after(Position(step, epoch + last, 0 if last else at), epoch, mean, ground, found)
                    if self.judge.ended:
                        break
            self._finish()
        finally:
            if route is not None:
                route.close()
            if self.window is not None:
                self.window.close()
            self._clean(tokens)
        return Outcome(self.weights, self.buffers, self.history.lines, ShuffleEngine.name, found, list(counts))

    def _after(self, now: Position, epoch: int, mean: float, ground: Ground, found: Shapes) -> None:
        """What is due between two rounds: validation, the end of an epoch, a checkpoint."""
        last, judge = now.at == 0, self.judge
        validate = judge.due(Moment(now.step, now.epoch, last, mean, judge.metrics))
        if last:
            mean = self.history.mean
            with blamed("the driver, in the scheduler"):
                for advancer in self.advancers:
                    advancer.end_epoch(self.history.means or mean)
        values = self._validate(now.step, ground) if validate else {}
        if last:
            self.history.epoch(epoch, values)
        asks = getattr(self.observer, "asked", bool) if self.recipe.watch.listens and (last or validate) else bool
        judge.end(Moment(now.step, now.epoch, last, mean, judge.metrics), asks())
        if self.recipe.due(now, bool(judge.ended)):
            self._keep(now, ground.order.counts, found)

    def _validate(self, step: int, ground: Ground) -> dict[str, float]:
        """The values of the held-out rows: one job. Where they are the best, the advancers keep what was measured."""
        began, before = time.perf_counter(), self.weights.clone() if shown(self.advancers[0]) is not None else None
        self._put(shown)
        total = measured(ground, self.weights, self.buffers, step)
        if before is not None:
            self.weights.copy_(before)
        values = self.recipe.watch.values(total)
        if self.judge.judge(values, self.buffers) and self.recipe.watch.best:
            for advancer in self.advancers:
                keep_best(advancer)
        self.history.validation(step, values, time.perf_counter() - began)
        return values

    def _put(self, which: Callable[[Any], Tensor | None]) -> None:
        for cut, advancer in zip(self.cuts, self.advancers, strict=True):
            found = which(advancer)
            if found is not None:
                self.weights[slice(*cut)].copy_(found)

    def _finish(self) -> None:
        """The weights that the model gets: the best where they are kept, or the averaged ones."""
        self._put(shown)
        if self.judge.best is not None:
            self._put(best_of)
        if self.judge.buffers is not None:
            self.replica.buffers = self.judge.buffers
            self.buffers = self.replica.buffers

    def _keep(self, now: Position, counts: tuple[int, ...], found: Shapes) -> None:
        sums = self.history.sums(True, self.judge)
        for rank, (cut, advancer) in enumerate(zip(self.cuts, self.advancers, strict=True)):
            mine = self.weights[slice(*cut)], advancer.state(), len(self.cuts)
            kept = (self.exchanger.shared(), self.exchanger.own(), 0) if self.exchanger and not rank else (NOTHING, NOTHING, -1)
            self.keep(Part(now, True, rank, cut, *mine, self.buffers, sums, self.history.lines, counts, found, *kept))

    def _ingest(self) -> RDD[Any]:
        """One token a partition; computing it puts the decoded share on the executor's disk."""
        address = self.window.address if self.window is not None else ""
        rows = self.frame.mapInArrow(decoder_of(self.static, self.recipe.run, address, versions()), TOKEN).rdd
        return rows if self.profile is None else rows.withResources(self.profile)  # and so is every stage that these are part of

    def _counts(self, tokens: RDD[Any]) -> tuple[tuple[int, ...], tuple[int, ...], Shapes, bool, str]:
        """Rows of every share, and those held out; the shapes of one row; whether all workers see the driver's memory; and the
        kind of device that all compute on.
        """
        told = {token.partition: token for token in again(tokens.collect)}
        errors = [json.loads(told[i].error) for i in sorted(told) if told[i].error]
        if errors:
            raise revive(errors[0])
        # no token at all: Spark's optimizer knew the frame to be empty, and started no task
        workers = range(self.recipe.num_workers if told else 0)
        if len(told) < len(workers):  # as Spark 3.5.0 ends a job that was cancelled: without an error
            raise PeerLost(f"Spark gave the rows of {len(told)} of {len(workers)} workers; was the job cancelled?")
        found = agree([json.loads(told[i].shapes) for i in workers], self.recipe.columns)
        counts, held = tuple(told[i].rows for i in workers), tuple(told[i].held for i in workers)
        self.recipe.check_held(counts, sum(held))
        choice = decide([Given(**json.loads(told[i].gpu)) for i in workers], self.recipe.device, apart=True)
        Noting(self.observer).note(choice.line, choice.warns)
        return counts, held, found, all(told[i].sees for i in workers), "cuda" if choice.indices else "cpu"

    def _round(self, route: Route, order: Order, coming: Coming = nothing) -> float:
        """One round; returns its mean loss."""
        began = time.perf_counter()
        sides, updates, sent = route.round(order, self.weights, self.buffers, coming)
        mean = mean_loss(sides, order.round)
        with blamed("the driver, in the optimizer or scheduler"):
            measured = sum(a.measure(u) for a, u in zip(self.advancers, updates, strict=True))
            for advancer, update in zip(self.advancers, updates, strict=True):
                advancer.step(update, measured)
        if self.recipe.blueprint.layout.m:
            self.replica.buffers = merge_buffers(sides)
            self.buffers = self.replica.buffers  # as rounded to their own dtypes
        seconds, rates = time.perf_counter() - began, self.advancers[0].rates()
        self.history.step(order.round, order.epoch, sides, mean, seconds, rates[0], told(self.recipe, sides, rates))
        self.history.sent(sent)
        return mean

    def _clean(self, tokens: RDD[Any]) -> None:
        try:
            tokens.foreachPartition(remover_of(self.recipe.run))
        except Exception:  # the session may be gone, or the jobs cancelled; Spark removes its directories itself
            pass
        tokens.unpersist()
        self.shipped.drop()
        self.static.destroy(blocking=False)
