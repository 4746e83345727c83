"""What the driver's program knows and asks of the Spark application behind its session: with a JVM of its own, or through Connect.

                     Classic                                Connect (no RDD, no broadcast, no SparkContext)
    slots            the scheduler tells                    a job whose tasks are counted
    starting bytes   broadcasts, or memory of the driver    in the function that tasks run, or artifacts: files of the session
    result           memory of the driver, or rows          rows
    cancel           by a tag of the jobs                   by a tag of the operations
    settings         of the SparkContext                    of the server, as spark.conf tells them

What trains through Connect is engine "barrier" on mapInArrow, and "local"; the rest of the package sees no difference.
"""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pyarrow as pa

from bigdl_lite.engine.profile import slots_of
from bigdl_lite.engine.spark import SPARK_ERRORS, collect, is_classic
from bigdl_lite.errors import RecipeError

if TYPE_CHECKING:
    from pyspark.resource import ResourceProfile
    from pyspark.sql import DataFrame, SparkSession

_ENCRYPTION = (
    "spark.io.encryption.enabled", "spark.network.crypto.enabled", "spark.authenticate.enableSaslEncryption", "spark.ssl.rpc.enabled",
)  # fmt: skip
_FRESH = 10.0  # seconds
_COUNTED: dict[str, tuple[float, int]] = {}  # slots of a session of Connect, and when; a fit asks twice
_INLINE = 1 << 20  # bytes that travel with a function; a server takes messages of 128 MB, and gets them again with every plan


class Piece(Protocol):
    """Bytes that a task reads: value. destroy() on the driver, when no task needs them any more."""

    @property
    def value(self) -> bytes: ...

    def destroy(self) -> None: ...


class Cluster(Protocol):
    """key       of the application, for caches; master as Spark names it
    beside    whether all tasks run on the driver's machine (local[...]), and see the memory of this process
    elastic   whether executors come and go by themselves; Spark runs no barrier stage then
    encrypts  whether the user asked Spark to encrypt what it moves or writes
    instead   of the barrier engine, for messages: "take engine='shuffle', or ", where there is that one
    reach     what to do, for messages, where executors cannot call this program
    """

    key: str
    master: str
    beside: bool
    elastic: bool
    encrypts: bool
    instead: str
    reach: str

    def slots(self, profile: ResourceProfile | None = None) -> int:
        """How many tasks, of a profile, can run at once, now."""
        ...

    def setting(self, name: str, default: str) -> str: ...

    def host(self) -> str:
        """The address at which executors can call this program, if they can call it at all. OSError where there is none."""
        ...

    def jobs(self, description: str) -> AbstractContextManager[str]:
        """Jobs started inside carry a tag, which the block gets, and are cancelled where it ends in an exception.

        Ctrl-C in the driver, or a cancelled notebook cell, thus ends the tasks too. The user's own tags, groups and description
        are left as they were.
        """
        ...

    def cancel(self, tag: str) -> None:
        """Ends the jobs with this tag; from any thread."""
        ...

    def send(self, pieces: Iterable[bytes]) -> list[Piece]: ...

    def rows(self, frame: DataFrame, parts: int) -> Iterable[Any]:
        """All rows of a frame, in any order; parts: in how many pieces they come, where they are too many for one."""
        ...


def cluster_of(session: SparkSession) -> Cluster:
    return Classic(session) if is_classic(session) else Connect(session)


class _Settings(ABC):
    @abstractmethod
    def setting(self, name: str, default: str) -> str: ...

    @property
    def elastic(self) -> bool:
        return self.setting("spark.dynamicAllocation.enabled", "false").lower() == "true"

    @property
    def encrypts(self) -> bool:
        return any(self.setting(name, "false").lower() == "true" for name in _ENCRYPTION)


class Classic(_Settings):
    instead = "take engine='shuffle', or "
    reach = "set spark.driver.host to an address of this machine"

    def __init__(self, session: SparkSession) -> None:
        self._session, self._context = session, session.sparkContext
        self.key, self.master = self._context.applicationId, self._context.master
        self.beside = self.master.split("[")[0] == "local"

    def slots(self, profile: ResourceProfile | None = None) -> int:
        return slots_of(self._session, profile)

    def setting(self, name: str, default: str) -> str:
        return self._context.getConf().get(name, default)

    def host(self) -> str:
        return self.setting("spark.driver.host", "127.0.0.1")

    @contextlib.contextmanager
    def jobs(self, description: str) -> Iterator[str]:
        sc, tag = self._context, _new_tag()
        before = sc.getLocalProperty("spark.job.description")
        sc.addJobTag(tag)
        sc.setJobDescription(description)
        try:
            with _cancelled(self, tag):
                yield tag
        finally:
            with contextlib.suppress(Exception):
                sc.removeJobTag(tag)
                sc.setJobDescription(before)

    def cancel(self, tag: str) -> None:
        self._context.cancelJobsWithTag(tag)

    def send(self, pieces: Iterable[bytes]) -> list[Piece]:
        return [self._context.broadcast(piece) for piece in pieces]

    def rows(self, frame: DataFrame, parts: int) -> Iterable[Any]:
        return collect(frame).to_pylist() if parts <= 1 else _stream(frame.repartition(parts, "part"))


class Connect(_Settings):
    """A session of Spark Connect. Its server may be anywhere, so nothing is taken for shared with it: no memory, no disk."""

    beside, instead = False, ""
    reach = "fit without checkpointDir"

    def __init__(self, session: SparkSession) -> None:
        self._session = session
        self.key, self.master = session.session_id, self.setting("spark.master", "Spark Connect")

    def slots(self, profile: ResourceProfile | None = None) -> int:
        """As counted in the last ten seconds. spark.default.parallelism counts, where it is set: Connect tells of no executor."""
        counted = _COUNTED.get(self.key)
        if counted is None or time.monotonic() - counted[0] > _FRESH:
            with self.jobs("bigdl_lite: slots"):
                told = collect(self._session.range(1).mapInArrow(_cpus, "cpus int")).column("cpus").to_pylist()
            _COUNTED.clear()
            _COUNTED[self.key] = counted = time.monotonic(), len(told) // max(told)
        return counted[1]

    def setting(self, name: str, default: str) -> str:
        try:
            return self._session.conf.get(name, default) or default
        except SPARK_ERRORS:  # a server may keep its settings to itself
            return default

    def host(self) -> str:
        """That of the network which leads to the server. OSError where only a proxy knows the server's name."""
        server = self._session.client.host.strip("[]")  # type: ignore[attr-defined]
        family, kind, protocol, _, address = socket.getaddrinfo(server, 15002, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)  # of datagrams: nothing is sent
            return str(probe.getsockname()[0])

    @contextlib.contextmanager
    def jobs(self, description: str) -> Iterator[str]:
        """Connect has no descriptions of jobs."""
        tag = _new_tag()
        self._session.addTag(tag)
        try:
            with _cancelled(self, tag):
                yield tag
        finally:
            with contextlib.suppress(Exception):
                self._session.removeTag(tag)

    def cancel(self, tag: str) -> None:
        self._session.interruptTag(tag)

    def send(self, pieces: Iterable[bytes]) -> list[Piece]:
        """Artifacts stay on the disks of server and executors until the session ends: Connect has no way to remove one."""
        made = list(pieces)
        if sum(map(len, made)) <= _INLINE:
            return [_Inline(piece) for piece in made]
        return [self._artifact(piece) for piece in made]

    def _artifact(self, piece: bytes) -> _Artifact:
        name = f"bigdl_lite-{uuid.uuid4().hex}"
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, name)
            path.write_bytes(piece)
            try:
                self._session.addArtifacts(str(path), file=True)
            except OSError as error:
                raise RecipeError(f"{len(piece)} bytes of weights cannot be sent to the server of Spark Connect: {error}") from error
        return _Artifact(name)

    def rows(self, frame: DataFrame, parts: int) -> Iterable[Any]:
        return collect(frame).to_pylist() if parts <= 1 else frame.repartition(parts, "part").toLocalIterator()


def _new_tag() -> str:
    return f"bigdl_lite-{uuid.uuid4().hex[:12]}"


@contextlib.contextmanager
def _cancelled(cluster: Cluster, tag: str) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        with contextlib.suppress(Exception):  # a session that has ended has no job left to cancel
            cluster.cancel(tag)
        if _is_interrupt(error):
            raise KeyboardInterrupt from error
        raise


def _is_interrupt(error: BaseException | None) -> bool:
    """Whether Ctrl-C lies behind an error: pyspark's cleaning-up may raise "job cancelled" over the KeyboardInterrupt."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _stream(frame: DataFrame) -> Iterator[Any]:
    """All rows, one job for each partition, so that neither the driver's JVM nor this process holds them all.

    Not frame.toLocalIterator(): in Spark 4.3 the JVM keeps all that it has handed over until the end.
    """
    rdd = frame.rdd
    for partition in range(rdd.getNumPartitions()):
        yield from rdd.context.runJob(rdd, iter, [partition])


def _cpus(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    from pyspark import TaskContext

    for _ in batches:
        pass
    context = TaskContext.get()
    assert context is not None
    yield pa.RecordBatch.from_arrays([pa.array([context.cpus()], pa.int32())], ["cpus"])


@dataclass(frozen=True)
class _Inline:
    value: bytes = field(repr=False)

    def destroy(self) -> None:
        pass


@dataclass(frozen=True)
class _Artifact:
    name: str

    @property
    def value(self) -> bytes:
        from pyspark import SparkFiles

        with open(os.path.join(SparkFiles.getRootDirectory(), self.name), "rb") as source:
            return source.read()

    def destroy(self) -> None:
        pass
