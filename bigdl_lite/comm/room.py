"""Members that are threads of one process: a group without sockets, for the local engine and for trying an exchange.

    p  members
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from torch import Tensor

from bigdl_lite.comm.comm import Collectives
from bigdl_lite.errors import MeetingTimeout, PeerLost

Idle = Callable[[int], None]


def _pause(tries: int) -> None:
    time.sleep(1e-6 if tries < 1000 else 1e-4)


class Table:
    """What the members of one room have in common. Assignments to a list are atomic, so there is no lock."""

    def __init__(self, size: int) -> None:
        self.arrived = [0] * size
        self.out: list[Sequence[Tensor]] = [()] * size
        self.failed: list[int] = []


class Room(Collectives):
    """One member. bytes_sent counts what would travel, were the members apart.

    idle      called again and again while waiting; the local engine passes its turn to another thread there
    deadline  seconds that a call waits at most
    """

    def __init__(self, table: Table, rank: int, idle: Idle = _pause, deadline: float = 120.0) -> None:
        self.rank, self.size, self.bytes_sent = rank, len(table.arrived), 0
        self._table, self._idle, self._deadline = table, idle, deadline

    def _trade(self, what: str, out: Sequence[Tensor], into: Sequence[Tensor]) -> None:
        table = self._table
        table.out[self.rank] = out
        self._wait(what)
        for j in range(self.size):
            if j != self.rank and into[j].numel():
                into[j].copy_(table.out[j][self.rank])
        self._wait(what)  # nobody may change what others still read
        self.bytes_sent += sum(x.nbytes for j, x in enumerate(out) if j != self.rank)

    def _wait(self, what: str) -> None:
        table = self._table
        table.arrived[self.rank] += 1
        mine, tries, until = table.arrived[self.rank], 0, time.monotonic() + self._deadline
        while min(table.arrived) < mine:
            if table.failed:
                raise PeerLost(f"member {table.failed[0]} failed; its own error says why")
            if time.monotonic() > until:
                raise MeetingTimeout(f"member {self.rank} of {self.size} waited {self._deadline:.0f} s in {what}")
            self._idle(tries)
            tries += 1

    def close(self) -> None:
        """Ends the wait of the others at once."""
        if self.rank not in self._table.failed:
            self._table.failed.append(self.rank)
