"""The barrier engine: one barrier stage for the whole fit, ranks that meet in memory and over the network.

    DataFrame -> mapInArrow(barrier=True): p tasks, all or none, at the same time
                   decode the partition -> one allGather (who, where, how many rows) -> train -> rank 0 yields the outcome
              -> repartition(1)          a shuffle at the end, because Spark retries a barrier stage only before a shuffle
              -> the driver

A user's error ends the stage in peace: the failing rank tells the others through the block, and yields its error as a
row, so Spark does not repeat in vain what will fail again. A lost process fails the stage, and Spark runs it again.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import secrets
import socket
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from pyspark import BarrierTaskContext
from pyspark.sql import DataFrame

from bigdl_lite.batch import Batch
from bigdl_lite.comm.block import Block, create, home, join, private
from bigdl_lite.comm.group import Group, Store
from bigdl_lite.comm.window import Window, pour
from bigdl_lite.data.arrow import agree, nothing, shapes, share
from bigdl_lite.engine.live import Listener, Speaker
from bigdl_lite.engine.meeting import Meeting, Place
from bigdl_lite.engine.pack import foreign, pack, unpack
from bigdl_lite.engine.rank import block_size, train
from bigdl_lite.engine.recipe import Observer, Outcome, Recipe, Start, silent
from bigdl_lite.engine.shipped import Shipped, mappable
from bigdl_lite.engine.spark import collect, gpu, jobs, slots, stream
from bigdl_lite.engine.worker import local_dir, settle
from bigdl_lite.errors import DataError, MeetingTimeout, PeerLost, RecipeError, report, revive

_SCHEMA = "kind string, rank int, part int, payload binary"
_ARROW = pa.schema([("kind", pa.string()), ("rank", pa.int32()), ("part", pa.int32()), ("payload", pa.binary())])
_PART = 1 << 18  # bytes of weights in one row: arrays of half a heap region are slow in the JVM, and waste it
_PARTITION = 1 << 24  # bytes of weights in one partition of the result, on average


class BarrierEngine:
    """share_memory=False makes every rank a node of its own, which speaks to the others over sockets alone, and to the
    driver through Spark alone.
    """

    name = "barrier"

    def __init__(self, share_memory: bool = True) -> None:
        self.share_memory = share_memory

    def fit(self, frame: DataFrame, recipe: Recipe, start: Start, observer: Observer = silent) -> Outcome:
        """Trains on a frame of recipe.num_workers partitions (see spark.arrange)."""
        p, sc = recipe.num_workers, frame.sparkSession.sparkContext
        free = slots(frame.sparkSession)
        if p > free:
            raise RecipeError(
                f"numWorkers={p} needs {p} tasks at the same time in the barrier engine, this application has {free} slots: "
                f"ask for fewer workers, give Spark more cores, or take engine='shuffle'"
            )
        host = sc.getConf().get("spark.driver.host", "127.0.0.1")
        shipped = Shipped.send(sc, start, may_map=self.share_memory)
        result = mappable(sc, start.weights.nbytes) if self.share_memory else None
        parts = 1 if result else -(-start.weights.nbytes // _PARTITION)
        try:
            with jobs(sc, f"bigdl_lite {recipe.run}: barrier, {p} ranks"), _listen(host, observer) as live:
                way = _Way(shipped, result.address if result else "", live.address if live else None, self.share_memory)
                main = _task(pack(recipe), way)
                told = frame.mapInArrow(main, _SCHEMA, barrier=True)
                if parts <= 1:
                    rows = collect(told.repartition(1)).to_pylist()
                else:  # a partition at a time, because the driver's JVM may be smaller than the weights
                    rows = stream(told.repartition(parts, "part"))
                return _outcome(rows, recipe, result)
        finally:
            shipped.drop()
            if result:
                result.close()


def _listen(host: str, observer: Observer) -> Any:
    try:
        return Listener(host, secrets.token_hex(16), observer)
    except OSError:  # the driver's own host name cannot be bound here: no live lines, the rest works
        return contextlib.nullcontext()


@dataclass(frozen=True)
class _Way:
    """How a rank speaks with the driver. result: where the driver maps the weights, if it does; live: for lines of history."""

    shipped: Shipped
    result: str
    live: tuple[str, int, str] | None
    share_memory: bool


def _outcome(rows: Iterable[Any], recipe: Recipe, result: Window | None) -> Outcome:
    found = recipe.blueprint.layout
    weights = result.values(found.dtype, found.n) if result else torch.empty(found.n, dtype=found.dtype)
    data, got, errors, rest, seen = memoryview(weights.view(torch.uint8).numpy()), 0, [], None, False
    for row in rows:
        seen = True
        if row["kind"] == "weights":
            at, payload = row["part"] * _PART, row["payload"]
            data[at : at + len(payload)] = payload
            got += len(payload)
        elif row["kind"] == "rest":
            rest = json.loads(bytes(row["payload"]))
        else:
            errors.append((row["rank"], bytes(row["payload"])))
    if not seen:  # Spark's optimizer knew the frame to be empty, and started no task
        agree([], recipe.columns)
    if errors:
        told = [json.loads(payload) for _, payload in sorted(errors)]
        # a rank that only lost its peer says nothing new
        raise revive(next((x for x in told if x["kind"] not in (PeerLost.__name__, MeetingTimeout.__name__)), told[0]))
    if rest is None or got != (0 if result else len(data)):
        raise PeerLost(f"{got} of {len(data)} bytes of weights came back; see the executors' logs")
    buffers = torch.tensor([float.fromhex(x) for x in rest["buffers"]], dtype=torch.float64)
    return Outcome(weights, buffers, rest["history"], BarrierEngine.name, rest["shapes"])


def _task(packed: bytes, way: _Way) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    def main(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        settle()
        try:
            recipe = unpack(packed)
        except Exception as error:  # the same on every rank, so none of them waits
            yield _row("error", BarrierTaskContext.get().partitionId(), json.dumps(foreign(error)).encode())
            return
        yield from _rank(batches, recipe, way)
        gc.collect()  # a reused worker must not keep this fit's block mapped

    return main


def _rank(batches: Iterator[pa.RecordBatch], recipe: Recipe, way: _Way) -> Iterator[pa.RecordBatch]:
    context = BarrierTaskContext.get()
    rank = context.partitionId()
    where = f"rank {rank} (partition {rank})"
    mine, failure = None, None
    try:
        mine = share(batches, recipe.columns, rank)
    except Exception as error:
        failure = report(error, where)
    hall = _Hall(context, recipe, way.share_memory)
    try:
        everyone = hall.gather(mine, failure)
        if failure or any(other["failure"] for other in everyone):
            if failure:
                yield _row("error", rank, json.dumps(failure).encode())
            return
        meeting = None
        try:
            agreed = agree([other["shapes"] for other in everyone], recipe.columns)
            mine = nothing(recipe.columns, agreed) if mine is None else mine
            meeting = hall.enter(everyone)
            speaker = Speaker(way.live if rank == 0 else None)
            start = way.shipped.read(meeting.block.weights if meeting.place.local == 0 else None)
            outcome = train(mine, [other["rows"] for other in everyone], recipe, start, meeting, speaker)
            speaker.close()
        except Exception as error:
            if meeting is not None:
                meeting.fail()
            if not isinstance(error, DataError) or rank == 0 or "partition" not in str(error):
                yield _row("error", rank, json.dumps(report(error, where)).encode())
            return
        if rank == 0:
            yield from _result(outcome, way.result)
        meeting.close()
    finally:
        hall.leave()


def _row(kind: str, rank: int, payload: bytes | memoryview, part: int = 0) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays(
        [pa.array([kind]), pa.array([rank], pa.int32()), pa.array([part], pa.int32()), pa.array([payload], pa.binary())],
        schema=_ARROW,
    )


def _result(outcome: Outcome, address: str) -> Iterator[pa.RecordBatch]:
    weights = outcome.weights.detach()
    if address:
        if not pour(address, weights):
            raise PeerLost("the driver's memory cannot be seen from this worker; are they in one container?")
    else:
        data = memoryview(weights.cpu().view(torch.uint8).numpy())
        for part, at in enumerate(range(0, len(data), _PART)):
            yield _row("weights", 0, data[at : at + _PART], part)
    # hexadecimal floats: JSON has no NaN, and the bits must survive
    rest = {"history": outcome.history, "shapes": outcome.shapes, "buffers": [x.hex() for x in outcome.buffers.tolist()]}
    yield _row("rest", 0, json.dumps(rest).encode())


class _Hall:
    """Where ranks find one another: who shares memory with whom, and the address of those who do not.

    Each rank leaves a token file where shared memory would be; those who can see it are on its node. The token of a
    node's first rank becomes the block. Tokens are gone before training begins, so a killed rank leaves nothing behind.
    """

    def __init__(self, context: BarrierTaskContext, recipe: Recipe, share_memory: bool) -> None:
        self.context, self.recipe = context, recipe
        self.rank = context.partitionId()
        self.host = context.getTaskInfos()[self.rank].address.rsplit(":", 1)[0]
        self.device = gpu(context)
        self.store: Store | None = None
        size = block_size(recipe, recipe.num_workers).nbytes
        self.share_memory = share_memory and self.device is None
        folder = home(size, local_dir())
        self.token = Path(folder) / f"bigdl_lite-{recipe.run}-{secrets.token_hex(8)}"

    def gather(self, mine: Batch | None, failure: dict[str, str] | None) -> list[dict[str, Any]]:
        """What every rank has to say, in rank order: the one all-gather through Spark, which takes up to a second."""
        if self.share_memory:
            self.token.touch(mode=0o600)
        port = 0
        if self.rank == 0:
            self.store = Store(self.host, 0, True, self.recipe.deadline)
            port = self.store.port
        hello = {
            "host": self.host, "port": port, "token": str(self.token), "failure": failure is not None,
            "rows": mine.rows if mine else 0, "shapes": shapes(mine),
        }  # fmt: skip
        return [json.loads(told) for told in self.context.allGather(json.dumps(hello))]

    def enter(self, everyone: list[dict[str, Any]]) -> Meeting:
        recipe, p = self.recipe, len(everyone)
        seen = [r for r in range(p) if r == self.rank or (self.share_memory and os.path.exists(everyone[r]["token"]))]
        nodes: tuple[tuple[int, ...], ...] = (tuple(range(p)),)
        if len(seen) < p:
            if self.store is None:
                self.store = Store(everyone[0]["host"], everyone[0]["port"], False, recipe.deadline)
            self.store.put(f"node/{self.rank}", json.dumps(seen).encode())
            views = [tuple(json.loads(self.store.get(f"node/{r}"))) for r in range(p)]
            nodes = tuple(sorted(set(views)))
            if sorted(r for ranks in nodes for r in ranks) != list(range(p)):
                raise PeerLost(f"ranks do not agree on who shares memory with whom: {views}")
        place = Place(self.rank, nodes)
        block = self._block(place, everyone)
        rail = leaders = None
        if len(nodes) > 1:
            assert self.store is not None
            ip = socket.gethostbyname(self.host)
            if place.local < place.rails:
                rail = Group(self.store, f"rail{place.local}", place.node, len(nodes), ip, self.device)
            if place.local == 0:
                leaders = Group(self.store, "leaders", place.node, len(nodes), ip)
        return Meeting(place, block, rail, leaders)

    def _block(self, place: Place, everyone: list[dict[str, Any]]) -> Block:
        ranks = place.nodes[place.node]
        size = block_size(self.recipe, len(ranks))
        if len(ranks) == 1:
            block = Block(private(size.nbytes), size, 0, self.recipe.deadline, watch=False)
            if self.device is not None:
                block.weights = block.weights.to(self.device)
                block.grads = [grad.to(self.device) for grad in block.grads]
            return block
        path = Path(everyone[ranks[0]]["token"])
        if place.local == 0:
            memory = create(path, size.nbytes)
        else:
            memory = join(path, size.nbytes, self.recipe.deadline)
        block = Block(memory, size, place.local, self.recipe.deadline)
        block.wait()  # all have it open
        self.leave()
        return block

    def leave(self) -> None:
        """Removes this rank's token; a mapped block lives on until its last rank lets go."""
        self.token.unlink(missing_ok=True)
