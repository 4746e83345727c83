"""What doctor() asks of a session: a few settings, one job over all slots, one tiny barrier stage. The rules are in checks.py.

    p  tasks, one for each slot
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from pyspark import InheritableThread
from pyspark.sql import SparkSession

from bigdl_lite.algorithms import method
from bigdl_lite.algorithms.parts import TorchOptimizer
from bigdl_lite.comm.door import Service
from bigdl_lite.comm.link import Link
from bigdl_lite.comm.window import available
from bigdl_lite.engine.cluster import cluster_of
from bigdl_lite.engine.spark import collect, is_classic
from bigdl_lite.ml.engines import choose
from bigdl_lite.ml.probe import LABEL, by_value, here, meet

if TYPE_CHECKING:
    from pyspark import SparkContext

MEETING = 2.0  # seconds that are left for the barrier stage; it takes one, most of it an all-gather of Spark's
SETTINGS = (
    "spark.driver.host", "spark.python.daemon.module", "spark.python.unix.domain.socket.enabled", "spark.python.worker.reuse",
    "spark.sql.execution.arrow.maxRecordsPerBatch", "spark.sql.execution.arrow.pyspark.enabled", "spark.task.cpus",
    "spark.task.resource.gpu.amount",
)  # fmt: skip


class Unknown(Exception):
    """A fact that this session does not tell; the message says why."""


class Slow(TimeoutError):
    """All tasks have started, and not all have answered: their Python workers are still starting."""


class Facts:
    """What is known of a session, by name: facts.slots is the value, or raises what asking for it raised."""

    def __init__(self, **known: Any) -> None:
        self._known = known

    def __getattr__(self, name: str) -> Any:
        try:
            found = self._known[name]
        except KeyError:
            raise AttributeError(name) from None
        if isinstance(found, Exception):
            raise found
        return found

    def but(self, **other: Any) -> Facts:
        """The same, with other values for some."""
        return Facts(**{**self._known, **other})


@dataclass(frozen=True)
class Place:
    """What one Python process says about where it runs. memory: bytes a window may take; "" in an error: there is none."""

    host: str
    executor: str  # "host:pid" of what started this process, so the same for all workers of one executor
    cores: int
    versions: dict[str, str]  # "" where a package is absent
    memory: int
    memory_error: str
    disks: tuple[tuple[str, int, str], ...]  # path, bytes free, error
    gpus: tuple[str, ...]  # what Spark gave to this task
    gpu_devices: int  # what the machine shows
    cuda: str  # "" not asked, "yes", or why not
    thp: bool
    driver_error: str  # why this process cannot open a socket to the driver


@dataclass(frozen=True)
class Rank:
    """What one task of a barrier stage says about the others. seen: ranks whose memory it can look at, itself among them."""

    rank: int
    host: str
    seen: tuple[int, ...]
    listens: str  # why it cannot listen on its own address
    unreached: dict[int, str]  # why, by rank


def gather(spark: SparkSession, seconds: float) -> Facts:
    """All facts, within `seconds` (the JVM's own answers come in milliseconds). Leaves nothing behind in the session."""
    until = time.monotonic() + seconds
    conf = {name: _try(lambda name=name: spark.conf.get(name)) for name in SETTINGS}  # an error where it is not set
    known: dict[str, Any] = {
        "spark": _try(lambda: str(spark.version)),
        "conf": {name: str(found) for name, found in conf.items() if not isinstance(found, Exception)},
        "driver": _try(lambda: Place(**next(here(None, 0.0, available)(())))),
    }
    cluster = cluster_of(spark)
    known |= {
        "classic": is_classic(spark),
        "master": _try(lambda: str(cluster.master)),
        "local": _try(lambda: cluster.beside),
        "elastic": _try(lambda: cluster.elastic),
        "encrypts": _try(lambda: cluster.encrypts),
        "slots": _try(cluster.slots),
        "engine": _try(lambda: _choice(spark)),
    }
    known |= _of_jvm(spark) if known["classic"] else dict.fromkeys(_OF_JVM, Unknown("Spark Connect does not tell it"))
    facts, token = Facts(**known, ranks=Unknown("no barrier stage was tried")), secrets.token_hex(16)
    with contextlib.ExitStack() as stack:
        door = _try(lambda: stack.enter_context(_door(cluster.host(), token)))
        way = None if isinstance(door, Exception) else (*door, token)
        look = here(way, 1.0, by_value(available))
        tasks = _try(lambda: _ask(spark, "all slots", look, facts.slots, until - MEETING))
    facts = facts.but(door=door, tasks=tasks if isinstance(tasks, Exception) else [Place(**told) for told in tasks])
    if isinstance(tasks, Exception) or _try(lambda: facts.elastic and not facts.local):
        return facts
    began = time.monotonic()
    ranks = _try(lambda: _ask(spark, "barrier", meet(token, 1.5), facts.slots, until, barrier=True))
    met = ranks if isinstance(ranks, Exception) else [Rank(**told) for told in ranks]
    return facts.but(ranks=met, met_s=time.monotonic() - began)


_OF_JVM = ("java", "heap", "most_result")


def _of_jvm(spark: SparkSession) -> dict[str, Any]:
    sc = spark.sparkContext
    jvm = sc._jvm
    return {
        "java": _try(lambda: str(jvm.java.lang.System.getProperty("java.version"))),
        "heap": _try(lambda: int(jvm.java.lang.Runtime.getRuntime().maxMemory())),
        "most_result": _try(lambda: int(sc._jsc.sc().conf().getSizeAsBytes("spark.driver.maxResultSize", "1g"))),
    }


def _try(ask: Callable[[], Any]) -> Any:
    try:
        return ask()
    except Exception as error:
        return error


def _choice(spark: SparkSession) -> str:
    plain = method("sync-sgd", TorchOptimizer(lambda p: torch.optim.SGD(p, lr=0.1), None, "epoch", None, None))
    return choose("auto", None, spark, plain)[0].name


@contextlib.contextmanager
def _door(host: str, token: str) -> Iterator[tuple[str, int]]:
    """Listens where the driver of a fit listens; whoever knocks and has the token has reached it."""
    service = Service(host, token, LABEL, _silent)
    try:
        yield host, service.port
    finally:
        service.close()


def _silent(link: Link) -> None:
    """Says nothing: that a caller was let in is all it wants to know."""


def _ask(
    spark: SparkSession, what: str, task: Callable[[Iterable[Any]], Iterator[Any]], p: int, until: float, barrier: bool = False
) -> list[Any]:
    """What p tasks answer, in a job that is cancelled at `until`. Raises TimeoutError then, or Spark's own error."""
    seconds, cluster = max(0.1, until - time.monotonic()), cluster_of(spark)
    if p < 1:
        raise Unknown("the application has no slot")
    future: concurrent.futures.Future[list[Any]] = concurrent.futures.Future()
    tags: list[str] = []
    over = threading.Event()

    def run() -> None:
        try:
            with cluster.jobs(f"bigdl_lite doctor: {what}") as tag:
                tags.append(tag)
                told = [] if over.is_set() else _answers(spark, task, p, barrier)
            future.set_result(told)
        except BaseException as error:
            future.set_exception(error)

    kind: Any = InheritableThread if is_classic(spark) else threading.Thread  # what a thread of Connect inherits is its tags
    thread = kind(target=run, name="bigdl_lite-doctor", daemon=True)
    thread.start()
    try:
        return future.result(seconds)
    except concurrent.futures.TimeoutError:
        started = _try(lambda: _started(spark.sparkContext, tags))
        if started == p:
            raise Slow(f"within {seconds:.1f} s the Python workers of {p} tasks did not all start and answer") from None
        some = started if isinstance(started, int) else "not all"  # an older Spark does not tell
        raise TimeoutError(
            f"after {seconds:.1f} s {some} of {p} tasks had started: other jobs hold the slots, or executors are not there yet"
        ) from None
    finally:
        over.set()
        if not future.done():  # the time is up, or Ctrl-C
            for tag in tags:
                with contextlib.suppress(Exception):  # a context that was stopped meanwhile
                    cluster.cancel(tag)
        thread.join(0.2)


def _answers(spark: SparkSession, task: Callable[[Iterable[Any]], Iterator[Any]], p: int, barrier: bool) -> list[Any]:
    if is_classic(spark):
        rdd: Any = spark.sparkContext.parallelize(range(p), p)
        return list((rdd.barrier() if barrier else rdd).mapPartitions(task).collect())

    def by_json(batches: Iterator[Any]) -> Iterator[Any]:  # inside, so that it travels by value: executors may lack the package
        import json

        import pyarrow

        yield pyarrow.RecordBatch.from_pydict({"told": [json.dumps(told) for told in task(batches)]})

    told = collect(spark.range(0, p, 1, p).mapInArrow(by_json, "told string", barrier=barrier)).column("told").to_pylist()
    answers = [json.loads(line) for line in told]
    for answer in answers:
        if "unreached" in answer:  # names in JSON are text
            answer["unreached"] = {int(rank): why for rank, why in answer["unreached"].items()}
    return answers


def _started(sc: SparkContext, tags: Iterable[str]) -> int:
    """How many tasks of the jobs with these tags run, or have run."""
    tracker, n = sc._jsc.sc().statusTracker(), 0
    for job in [job for tag in tags for job in tracker.getJobIdsForTag(tag)]:
        stages = tracker.getJobInfo(job)
        for stage in stages.get().stageIds() if stages.isDefined() else ():
            info = tracker.getStageInfo(stage)
            n += info.get().numActiveTasks() + info.get().numCompletedTasks() if info.isDefined() else 0
    return n
