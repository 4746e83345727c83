"""What a Python task on an executor pays besides its work, and how to stop paying it. The one place for that.

Called at the head of every task of ours; each measure lasts as long as the reused worker process, and touches nothing
that a user's own task could notice.

    cost of a task as shipped                          remedy here
    importlib.invalidate_caches() makes zipimport      the zip importers' own invalidate_caches does nothing: an archive
    re-read pyspark.zip and a jar: 100-400 ms          on the path of a running application does not change
    (Spark < 4.3)
    a full garbage collection of a large heap          objects alive after the imports are frozen, once
    threads of N workers fighting for the cores        torch computes with one thread a task

What needs a setting of the application (Unix domain sockets, torch imported once before the fork, large pages) is in
session.py and daemon.py.
"""

from __future__ import annotations

import contextlib
import gc
import os
import platform
import socket
import sys
import zipimport

import torch

from bigdl_lite.data.manifest import VERSION
from bigdl_lite.errors import RecipeError

_done = False


def settle() -> None:
    """Idempotent and cheap: one attribute test after the first call in a process."""
    global _done
    if _done:
        return
    _done = True
    zipimport.zipimporter.invalidate_caches = lambda self: None  # type: ignore[method-assign]
    torch.set_num_threads(1)
    with contextlib.suppress(RuntimeError):  # set before by someone else, or parallel work has begun
        torch.set_num_interop_threads(1)
    gc.freeze()


def versions() -> dict[str, str]:
    """What must be the same on the driver and on every executor; pyspark itself sees to Python's."""
    return {"bigdl_lite": VERSION, "torch": ".".join(torch.__version__.split("+")[0].split(".")[:2])}


def require_versions(wanted: dict[str, str]) -> None:
    """Raises RecipeError, in a task, where this executor's packages are not those of the driver: results would differ."""
    here = versions()
    other = [name for name in wanted if here.get(name) != wanted[name]]
    if other:
        raise RecipeError(
            f"the executor on {socket.gethostname()} has {other[0]} {here.get(other[0])}, the driver has {wanted[other[0]]} (Python "
            f"{platform.python_version()} at {sys.executable}): install the same on all, or send one environment along "
            "(spark-submit --archives)"
        )


def local_dir() -> str:
    """This executor's own scratch directory, which Spark removes with the executor."""
    found = os.environ.get("SPARK_LOCAL_DIRS", "").split(",")[0]
    return found if found and os.path.isdir(found) else "/tmp"
