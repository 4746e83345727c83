"""What each rank of a stage has to say to all, once, before they meet: through the driver, or through Spark.

Spark's own all-gather looks once a second whether all have come, so every fit would take a second more than it must. Where all
ranks have a connection to the driver (live.py), it hands around what they say, in the time of one message each. One rank without
a connection, and all go through Spark: the driver decides for all, so nobody waits in the other place.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import Any

from bigdl_lite.comm.link import MOST
from bigdl_lite.errors import PeerLost, WireError

_PATIENCE = 2.0  # seconds for the connection of the last rank, after the first word of another


class Gathering:
    """The driver's end, one for a stage of so many ranks; called from the threads that hear them."""

    def __init__(self, ranks: int, patience: float = _PATIENCE) -> None:
        self._ranks, self._patience = ranks, patience
        self._changed = threading.Condition()
        self._here, self._said = set[int](), dict[int, Any]()
        self._first: float | None = None  # when the first word came
        self._decided = False
        self._all: list[Any] | None = None
        self._ended = False

    def here(self, rank: int) -> None:
        """A rank has a connection."""
        with self._changed:
            self._here.add(rank)
            self._changed.notify_all()

    def say(self, rank: int, word: Any, every: float, wait: Callable[[], None]) -> list[Any] | None:
        """What all ranks say, in their order; None: ask Spark. Returns when that is decided, for all ranks alike.

        word      what JSON can say; None where it is too long for a message
        wait      is called every so many seconds until then
        Raises    PeerLost where the stage ends before, or where the rank has spoken already: then Spark runs the stage anew;
                  WireError where there is no such rank
        """
        if not 0 <= rank < self._ranks:
            raise WireError(f"rank {rank} speaks in a stage of {self._ranks} ranks")
        with self._changed:
            if rank in self._said:
                raise PeerLost(f"rank {rank} begins a second time")
            self._said[rank] = word
            self._first = time.monotonic() if self._first is None else self._first
            self._changed.notify_all()
            while not self._ready():
                if self._ended:
                    raise PeerLost("the stage has ended")
                if not self._changed.wait(min(every, self._patience)):
                    self._changed.release()
                    try:
                        wait()
                    finally:
                        self._changed.acquire()
            return self._all

    def end(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _ready(self) -> bool:
        if self._decided:
            return True
        if len(self._said) == self._ranks:
            everyone = [self._said[rank] for rank in sorted(self._said)]
            self._all = everyone if None not in everyone and len(json.dumps({"all": everyone})) <= MOST else None
            self._decided = True
        elif len(self._here) < self._ranks and self._first is not None:
            self._decided = time.monotonic() - self._first >= self._patience
        return self._decided
