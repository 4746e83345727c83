"""A job once more, where Spark gave a task the worker process that it had ended with a cancelled task.

Spark 3.5 to 4.1 keep such a process among the idle ones, and the next task that gets it fails before it has begun. A cluster tries
the task again; local[...] does not, nor does a stage with a barrier. Each try takes one such process away.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

ENDED = r"SocketException: Socket is closed|CancelledKeyException|ClosedChannelException"  # as 3.5, 4.0 and 4.1 say it
_TRIES = 4


def again(job: Callable[[], T]) -> T:
    """What job() returns, which must not matter how often it is begun."""
    for _ in range(_TRIES - 1):
        try:
            return job()
        except Exception as error:
            if not re.search(ENDED, str(error)):
                raise
    return job()
