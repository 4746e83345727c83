"""The two tasks of doctor(). They are shipped by value and need only the standard library, so that an executor without torch, or
without this package, says so in place of failing: hence their imports inside, and dicts for what they say.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from types import FunctionType
from typing import Any

LABEL = "doctor"  # what its handshakes are for (comm/door.py)


def by_value(function: Any) -> Any:
    """A copy of a function that is pickled with its code: not found under its name, it is not taken for an import."""
    return FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__)


def here(way: tuple[str, int, str] | None, patience: float, free: Callable[[], int]) -> Callable[[Any], Iterator[dict[str, Any]]]:
    """A task that says about its process what Place holds. way: host, port and token of the driver's door; None: there is none.

    torch is looked up, not imported, where Spark gave no GPU: that alone may take longer than all else.
    """

    def look(rows: Iterable[Any]) -> Iterator[dict[str, Any]]:
        import glob
        import importlib.metadata
        import importlib.util
        import os
        import platform
        import shutil
        import socket
        import sys
        import tempfile

        from pyspark import TaskContext

        def version(name: str) -> str:
            if name not in sys.modules and importlib.util.find_spec(name) is None:
                return ""
            if name in sys.modules or name == "bigdl_lite":  # cheap, and a copy on PYTHONPATH has no metadata, or an older one's
                return str(getattr(importlib.import_module(name), "__version__", "without a version"))
            try:
                return importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                return str(getattr(importlib.import_module(name), "__version__", "without a version"))

        def disk(path: str) -> tuple[str, int, str]:
            try:
                with tempfile.TemporaryFile(dir=path) as file:
                    file.write(b"x")
                    file.flush()
                return path, shutil.disk_usage(path).free, ""
            except OSError as error:
                return path, 0, str(error)

        def memory() -> str:
            try:
                os.close(os.memfd_create("bigdl_lite"))
                return ""
            except (AttributeError, OSError) as error:
                return str(error)

        def driver() -> str:
            if way is None:
                return ""
            try:
                from bigdl_lite.comm.door import call

                call(way[0], way[1], way[2], LABEL, 0, patience, "the driver").close()
                return ""
            except Exception as error:
                return f"{type(error).__name__}: {error}"

        def cuda() -> str:
            try:
                from bigdl_lite.engine.device import look as look_at

                return look_at(gpus, "auto").why or "yes"
            except Exception as error:
                return f"{type(error).__name__}: {error}"

        context, host = TaskContext.get(), socket.gethostname()
        given = context.resources().get("gpu") if context else None
        gpus = tuple(given.addresses) if given else ()
        names = ("bigdl_lite", "torch", "pyarrow", "numpy")
        folders = [x for x in os.environ.get("SPARK_LOCAL_DIRS", "").split(",") if x] if context else []
        yield {
            "host": host, "executor": f"{host}:{os.getppid()}", "cores": len(os.sched_getaffinity(0)),
            "versions": {"python": platform.python_version(), **{name: version(name) for name in names}},
            "memory": free(), "memory_error": memory(), "disks": tuple(map(disk, folders or [tempfile.gettempdir()])),
            "gpus": gpus, "gpu_devices": len(glob.glob("/dev/nvidia[0-9]*")), "cuda": cuda() if gpus else "",
            "thp": os.environ.get("THP_MEM_ALLOC_ENABLE") == "1", "driver_error": driver(),
        }  # fmt: skip

    return look


def meet(token: str, patience: float) -> Callable[[Any], Iterator[dict[str, Any]]]:
    """A barrier task that calls the ranks 1, 2, 4, ... after its own, as ranks of a fit call one another, and says what Rank holds."""

    def call_peers(rows: Iterable[Any]) -> Iterator[dict[str, Any]]:
        import json
        import os
        import socket

        from pyspark import BarrierTaskContext

        context = BarrierTaskContext.get()
        me, infos = context.partitionId(), context.getTaskInfos()
        p, host = len(infos), infos[me].address.rsplit(":", 1)[0]
        steps = [1 << k for k in range(p.bit_length()) if 1 << k < p]
        visits, all_here = [], threading.Event()

        def welcome(link: Any) -> None:
            visits.append(link)
            if len(visits) >= len(steps):
                all_here.set()

        listens, service, port = "", None, 0
        try:
            from bigdl_lite.comm.door import Service, call

            service = Service(socket.gethostbyname(host), token, LABEL, welcome)
            port = service.port
        except Exception as error:
            listens = f"{type(error).__name__}: {error}"
        mail = -1
        try:
            try:
                mail = os.memfd_create("bigdl_lite")
                os.write(mail, token.encode())
            except (AttributeError, OSError):
                mail = -1
            hello = {"host": host, "port": port, "mail": f"/proc/{os.getpid()}/fd/{mail}"}
            everyone = [json.loads(told) for told in context.allGather(json.dumps(hello))]
            seen = []
            for r, other in enumerate(everyone):
                try:
                    with open(other["mail"], "rb") as file:
                        if os.pread(file.fileno(), len(token), 0) == token.encode():
                            seen.append(r)
                except OSError:  # on another host, in another container, or another user's
                    pass
            unreached = {}
            for step in steps if service else []:
                r = (me + step) % p
                try:
                    call(everyone[r]["host"], everyone[r]["port"], token, LABEL, me, patience, f"rank {r}").close()
                except Exception as error:
                    unreached[r] = f"{type(error).__name__}: {error}"
                    break  # one is enough to know, and each may take all the time there is
            if service and steps:
                all_here.wait(patience)  # who cannot come says so itself
        finally:
            if service:
                service.close()
            if mail >= 0:
                os.close(mail)
        yield {"rank": me, "host": host, "seen": tuple(seen), "listens": listens, "unreached": unreached}

    return call_peers
