"""The parent of Spark's Python workers: import torch once, then fork.

Spark starts one daemon per executor and forks a worker from it for every task slot. As shipped each worker imports
torch by itself, seconds at a time; here they are born with it, and share its pages.

    spark.python.daemon.module = bigdl_lite.engine.daemon        set by local_session(); on a cluster set it yourself

A fork keeps only the thread that called it. So nothing below may start a pool of threads: no arithmetic on tensors,
no backward, no CUDA call. (pyarrow's allocator has one thread, and looks after it at a fork.) Spark reads the daemon's
address from its stdout, so nothing below may print there either.
"""

from __future__ import annotations

import gc
import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# torch._dynamo: the first torch.optim optimizer imports it, which takes as long again as torch itself.
# The engines bring the rest of bigdl_lite with them.
PRELOADED = (
    "numpy",
    "pyarrow",
    "pandas",
    "torch",
    "torch._dynamo",
    "bigdl_lite.engine.barrier",
    "bigdl_lite.engine.shuffle",
    "pyspark.worker",
)


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """What is printed meanwhile goes to the executor's log, also from C: the file descriptor itself is turned."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def large_pages() -> None:
    """torch asks the system for pages of 2 MB, not 4 KB, where a tensor is large enough.

    A gradient that comes and goes with every step is then a few page faults and not thousands: with 25 M parameters a
    backward pass takes 20 % less. torch looks at this when it allocates for the first time.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def preload(names: tuple[str, ...] = PRELOADED) -> None:
    """Import all that a worker will want, and put it where a worker's garbage collector does not look.

    A module that cannot be imported is only reported: the task that needs it shows the error where the user reads it,
    while a daemon that dies says no more than "Python worker exited unexpectedly".
    """
    with _stdout_to_stderr():
        for name in names:
            try:
                importlib.import_module(name)
            except Exception as error:
                print(f"bigdl_lite.engine.daemon: {name} is not preloaded: {error!r}", file=sys.stderr)
        if "torch" in sys.modules:
            # One worker per slot: more threads would fight for the same cores. A worker may raise it after the fork.
            sys.modules["torch"].set_num_threads(1)
    gc.collect()
    gc.freeze()  # Spark collects garbage after every task; without this it walks all of torch, and unshares its pages


if __name__ == "__main__":
    large_pages()
    preload()
    from pyspark.daemon import manager

    manager()  # with the argv Spark gave: [worker module]
