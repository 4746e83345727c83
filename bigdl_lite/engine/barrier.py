"""The barrier engine: one barrier stage for the whole fit, ranks that meet in memory and over the network.

    DataFrame -> mapInArrow(barrier=True): p tasks, all or none, at the same time
                   decode the partition -> all say who, where, how many rows -> train -> rank 0 yields the outcome
              -> the driver

A user's error ends the stage in peace: the failing rank tells the others through the block, and yields its error as a
row, so that nothing is repeated in vain. Whatever else ends a rank ends the stage, and the engine runs it again, from the
last state that all ranks brought to the driver (live.py, keeper.py):

    a rank             how it is noticed                                                      how it ends
    killed             Spark sees the end of its process at once                              the stage fails
    stopped, hanging   the others waited for the deadline, or the driver heard nothing of it   Spark kills it with the stage
    cut off            connections break, or are silent for the deadline                       the ranks give up
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import math
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa
import torch
from pyspark import BarrierTaskContext
from pyspark.resource import ResourceProfile
from pyspark.sql import DataFrame

from bigdl_lite.comm.window import Window, pour
from bigdl_lite.data.arrow import agree, nothing, shares
from bigdl_lite.engine.again import ENDED
from bigdl_lite.engine.cluster import Cluster, cluster_of
from bigdl_lite.engine.device import Choice, Noting, current
from bigdl_lite.engine.hall import Hall
from bigdl_lite.engine.keeper import Keeper, Part
from bigdl_lite.engine.live import Address, Listener, Speaker
from bigdl_lite.engine.pack import foreign, pack, unpack
from bigdl_lite.engine.profile import in_words, map_in_arrow
from bigdl_lite.engine.rank import train
from bigdl_lite.engine.recipe import Observer, Outcome, Recipe, Start, silent
from bigdl_lite.engine.shipped import Shipped, mappable
from bigdl_lite.engine.worker import require_versions, settle, versions
from bigdl_lite.errors import BigDLError, DataError, MeetingTimeout, PeerLost, RecipeError, report, revive

_LOG = logging.getLogger("bigdl_lite")
_LOST = re.compile(  # how Spark says that a process is gone, and how a rank says that another is
    r"Python worker (exited unexpectedly|process terminated)|ExecutorLostFailure|[Ee]xecutor.{0,40} lost|heartbeat timed out|"
    r"Remote RPC client disassociated|Worker.{0,20} lost|FetchFailed|(?:PeerLost|MeetingTimeout): ([^\n]*)|" + ENDED
)
_SCHEMA = "kind string, rank int, part int, payload binary"
_ARROW = pa.schema([("kind", pa.string()), ("rank", pa.int32()), ("part", pa.int32()), ("payload", pa.binary())])
_PART = 1 << 18  # bytes of weights in one row: arrays of half a heap region are slow in the JVM, and waste it
_PARTITION = 1 << 24  # bytes of weights in one partition of the result, on average


class BarrierEngine:
    """share_memory  False makes every rank a node of its own: nobody looks at another's memory, all goes through sockets and Spark
    allow_clear   with Spark's encryption on, whether ranks of several machines may speak past it all the same
    profile       a ResourceProfile that says what the tasks of ranks need, GPUs where the application's own tasks have none

    What ranks say to one another between nodes, and lines of history to the driver, travels past Spark and in clear. Each
    such connection is let in by a secret of the run, which travels in Spark's own task closure, and listens on the address
    that Spark uses; NCCL's connections have no such guard. Memory that ranks of one node share, which processes of the same
    user can read, is not encrypted either. Rows, recipe and, with encryption on, starting weights and the result travel
    through Spark and as Spark protects them.

    So where the user asked Spark to encrypt, fit refuses a cluster unless allow_clear is given (RecipeError, on the driver,
    before any job); on one machine (local[...]) it trains, without live lines and states: checkpoints are refused, and after a
    loss the fit begins anew.
    """

    name = "barrier"

    def __init__(self, share_memory: bool = True, allow_clear: bool = False, profile: ResourceProfile | None = None) -> None:
        self.share_memory, self.allow_clear, self.profile = share_memory, allow_clear, profile

    def fit(
        self, frame: DataFrame, recipe: Recipe, start: Start, observer: Observer = silent, keep: Keeper | None = None
    ) -> Outcome:  # fmt: skip
        """Trains on a frame of recipe.num_workers partitions (see spark.arrange).

        Raises PeerLost or MeetingTimeout where ranks are lost more often than recipe.recoveries.
        """
        p, cluster = recipe.num_workers, cluster_of(frame.sparkSession)
        if cluster.elastic and not cluster.beside:
            raise RecipeError(
                "spark.dynamicAllocation.enabled is true, and Spark runs no barrier stage where executors come and go: "
                f"{cluster.instead}take an application with a fixed number of executors"
            )
        free = cluster.slots(self.profile)
        if p > free:
            has = in_words(frame.sparkSession, self.profile, free)
            raise RecipeError(
                f"numWorkers={p} needs {p} tasks at the same time in the barrier engine, this application has {has}: "
                f"ask for fewer workers, {cluster.instead}give Spark more cores"
            )
        clear = _may_speak_in_clear(cluster, self.allow_clear)
        if keep is not None and not clear:
            raise RecipeError(
                "Spark's encryption is on, and ranks of the barrier engine bring checkpoints to the driver past Spark, in clear: "
                f"{cluster.instead}allow it with engine=BarrierEngine(allow_clear=True)"
            )
        keeper = Keeper(recipe) if keep is None else keep
        keeper.in_background()
        lines, observer = len(keeper.before), Noting(observer)
        for losses in range(recipe.recoveries + 1):
            try:
                outcome = self._stage(cluster, frame, recipe, start, observer, keeper if clear else None)
                return replace(outcome, history=[*keeper.before[lines:], *outcome.history])
            except (PeerLost, MeetingTimeout) as lost:
                if losses == recipe.recoveries:
                    raise type(lost)(f"{lost} (given up after {losses + 1} losses of ranks)") from lost
                last = keeper.last()
                if last is not None:
                    start, keeper.before = replace(last[0], constants=start.constants), last[1]
                step = start.now.step
                _LOG.warning("a rank was lost (%s): the stage runs again, from step %d on; loss %d", lost, step, losses + 1)
        raise AssertionError("not reached")

    def _stage(
        self, cluster: Cluster, frame: DataFrame, recipe: Recipe, start: Start, observer: Noting, keeper: Keeper | None
    ) -> Outcome:  # fmt: skip
        """One barrier stage from start to end. Raises PeerLost where it ended because a rank was lost."""
        p = recipe.num_workers
        shipped = Shipped.send(cluster, start, may_map=self.share_memory)
        result = mappable(cluster, start.weights.nbytes) if self.share_memory else None
        parts = 1 if result else -(-start.weights.nbytes // _PARTITION)
        losses: list[str] = []
        try:
            with cluster.jobs(f"bigdl_lite {recipe.run}: barrier, {p} ranks") as tag:

                def lost(why: str) -> None:
                    losses.append(why)
                    cluster.cancel(tag)  # or Spark would wait for it, or begin again without the last state

                with _listen(cluster, observer, keeper, recipe.deadline, lost, p) as live:
                    way = _Way(
                        shipped, result.address if result else "", live.address if live else None, self.share_memory,
                        secrets.token_hex(32), cluster.beside, versions(),
                    )  # fmt: skip
                    ranks = map_in_arrow(frame, _task(pack(recipe), way), _SCHEMA, barrier=True, profile=self.profile)
                    # a partition at a time where the driver's JVM may be smaller than the weights
                    return _outcome(cluster.rows(ranks, parts), recipe, result, observer)
        except Exception as error:
            loss = PeerLost(losses[0]) if losses and not isinstance(error, BigDLError) else _loss(error)
            if loss is None:
                raise
            raise loss from error
        finally:
            shipped.drop()
            if result:
                result.close()


def _loss(error: Exception) -> PeerLost | MeetingTimeout | None:
    """What Spark reports of a lost rank as an error of ours; None for every other error."""
    if isinstance(error, BigDLError):
        return None
    text = str(error)
    found = _LOST.search(text)
    if found is None:
        return None
    kind = MeetingTimeout if "MeetingTimeout: " in text else PeerLost
    return kind(found[2] or found[0])


def _may_speak_in_clear(cluster: Cluster, allowed: bool) -> bool:
    """Whether anything may travel past Spark's encryption; RecipeError where training needs it and may not."""
    if allowed or not cluster.encrypts:
        return True
    if not cluster.beside:
        raise RecipeError(
            f"Spark's encryption is on, and ranks of the barrier engine on several machines ({cluster.master}) speak to each other "
            f"past Spark, authenticated but in clear: {cluster.instead}allow it with "
            "engine=BarrierEngine(allow_clear=True)"
        )
    return False


def _listen(
    cluster: Cluster, observer: Observer, keeper: Keeper | None, deadline: float, lost: Callable[[str], None], ranks: int
) -> Any:  # fmt: skip
    if keeper is None:  # nothing may travel in clear
        return contextlib.nullcontext()
    host = "any address"
    try:
        host = cluster.host()
        return Listener(host, secrets.token_hex(16), observer, keeper, deadline, lost, ranks=ranks)
    except OSError as error:
        if keeper.checkpoints is not None:
            raise RecipeError(
                f"ranks cannot bring checkpoints to the driver: it cannot listen on {host} ({error}); "
                f"{cluster.instead}{cluster.reach}"
            ) from error
        _LOG.info("no live lines, and after a loss the fit begins anew: the driver cannot listen on %s: %s", host, error)
        return contextlib.nullcontext()


@dataclass(frozen=True)
class _Way:
    """How a rank speaks with the driver. result: where the driver maps the weights, if it does; live: for lines of history."""

    shipped: Shipped
    result: str
    live: Address | None
    share_memory: bool
    secret: str = field(repr=False)  # of the run: what ranks prove to one another
    beside: bool  # whether the driver is on the ranks' machine
    versions: dict[str, str]  # of the driver's packages


def _outcome(rows: Iterable[Any], recipe: Recipe, result: Window | None, noting: Noting) -> Outcome:
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
            noting(rest)
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
    return Outcome(weights, buffers, rest["history"], BarrierEngine.name, rest["shapes"], rest["shares"])


def _task(packed: bytes, way: _Way) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    def main(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        settle()
        try:
            require_versions(way.versions)
            recipe = unpack(packed)
        except Exception as error:
            context = BarrierTaskContext.get()
            context.allGather(json.dumps({"failure": True}))  # other executors may have no trouble, and wait
            told = report(error, "an executor") if isinstance(error, BigDLError) else foreign(error)
            yield _row("error", context.partitionId(), json.dumps(told).encode())
            return
        yield from _rank(batches, recipe, way)
        gc.collect()  # a reused worker must not keep this fit's block mapped

    return main


def _rank(batches: Iterator[pa.RecordBatch], recipe: Recipe, way: _Way) -> Iterator[pa.RecordBatch]:
    context = BarrierTaskContext.get()
    rank = context.partitionId()
    where = f"rank {rank} (partition {rank})"
    mine, held, failure = None, None, None
    speaker = Speaker(way.live, rank, way.share_memory and way.beside)
    try:
        mine, held = shares(batches, recipe.columns, rank, recipe.watch.holdout)
    except Exception as error:
        failure = report(error, where)
    hall = None
    try:
        hall = Hall(context, recipe, way.share_memory, way.secret)
        everyone = hall.gather(speaker, mine, failure, held)
        if failure or any(other["failure"] for other in everyone):
            if failure:
                yield _row("error", rank, json.dumps(failure).encode())
            return
        meeting = None
        try:
            agreed = agree([other["shapes"] for other in everyone], recipe.columns)
            mine, held = (nothing(recipe.columns, agreed) if x is None else x for x in (mine, held))
            meeting = hall.enter(everyone)
            if rank == 0 and hall.choice.line:
                speaker(hall.choice.note)
            with current(hall.device):
                start = way.shipped.read(meeting.block.weights if meeting.reads else None)
                keep = _ToDriver(speaker, recipe, rank)
                outcome = train(mine, [other["rows"] for other in everyone], recipe, start, meeting, speaker, keep, held)
        except MeetingTimeout:
            raise  # a rank hangs: only the end of the stage will end it
        except Exception as error:
            if meeting is not None:
                meeting.fail()
            if not isinstance(error, DataError) or rank == 0 or "partition" not in str(error):
                yield _row("error", rank, json.dumps(report(error, where)).encode())
            return
        if rank == 0:
            yield from _result(outcome, way.result, hall.choice)
        meeting.close()
    finally:
        speaker.close()  # or a reused worker would go on saying that it is alive
        if hall is not None:
            hall.leave()


class _ToDriver:
    """Brings this rank's parts to the driver; rank 0 says when, beside the checkpoints that are due."""

    def __init__(self, speaker: Speaker, recipe: Recipe, rank: int) -> None:
        self.speaker, self.every, self.last = speaker, recipe.recovery if rank == 0 else math.inf, time.monotonic()

    @property
    def wish(self) -> bool:
        return self.speaker.connected and time.monotonic() - self.last >= self.every

    def __call__(self, part: Part) -> None:
        self.speaker.give(part)
        self.last = time.monotonic()


def _row(kind: str, rank: int, payload: bytes | memoryview, part: int = 0) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays(
        [pa.array([kind]), pa.array([rank], pa.int32()), pa.array([part], pa.int32()), pa.array([payload], pa.binary())],
        schema=_ARROW,
    )


def _result(outcome: Outcome, address: str, choice: Choice) -> Iterator[pa.RecordBatch]:
    weights = outcome.weights.detach()
    if address:
        if not pour(address, weights):
            raise PeerLost("the driver's memory cannot be seen from this worker; are they in one container?")
    else:
        data = memoryview(weights.cpu().view(torch.uint8).numpy())
        for part, at in enumerate(range(0, len(data), _PART)):
            yield _row("weights", 0, data[at : at + _PART], part)
    # hexadecimal floats: JSON has no NaN, and the bits must survive
    rest = {"history": outcome.history, "shapes": outcome.shapes, "shares": outcome.shares}
    rest |= {"buffers": [x.hex() for x in outcome.buffers.tolist()], **choice.note}
    yield _row("rest", 0, json.dumps(rest).encode())
