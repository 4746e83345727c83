"""What the kernel counts, host by host: processor seconds and bytes on the wire. For hosts that are namespaces of one machine.

A host is told by its network namespace; hosts of executors are those in which an executor runs. Processes that emulate the
network itself are left out.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")
_EXECUTOR, _EMULATION = "CoarseGrainedExecutorBackend", "vcluster.py"


@dataclass(frozen=True)
class Count:
    """Of one host, since its processes began: processor seconds, bytes sent and received on eth0."""

    cpu: float = 0.0
    sent: int = 0
    received: int = 0

    def __add__(self, other: Count) -> Count:
        return Count(self.cpu + other.cpu, self.sent + other.sent, self.received + other.received)

    def __sub__(self, other: Count) -> Count:
        return Count(self.cpu - other.cpu, self.sent - other.sent, self.received - other.received)

    def __truediv__(self, steps: float) -> Count:
        return Count(self.cpu / steps, int(self.sent / steps), int(self.received / steps))


def counted() -> tuple[Count, Count, float]:
    """The host of this process; the sum over the hosts of executors; processor seconds of all else that this machine does.

    All else is other people's work, the network that is emulated, and what the kernel does for no process.
    """
    busy = _busy()
    mine, here = os.stat("/proc/self/ns/net").st_ino, {}
    executors = set()
    for pid, space, command in _processes():
        if _EMULATION in command:
            continue
        if _EXECUTOR in command:
            executors.add(space)
        before = here.get(space)
        try:
            found = Count(_seconds(pid), *(_wire(pid) if before is None else (0, 0)))
        except OSError:  # it has just ended
            continue
        here[space] = found if before is None else before + found
    others = sum((here[space] for space in executors - {mine}), Count())
    return here[mine], others, busy - here[mine].cpu - others.cpu


def _busy() -> float:
    """Processor seconds of this machine that were not idle, those that its host took from it included."""
    user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:9])
    return (user + nice + system + irq + softirq + steal) / _TICKS


def _processes() -> Iterator[tuple[str, int, str]]:
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            space = os.stat(f"/proc/{pid}/ns/net").st_ino
            yield pid, space, Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue


def _seconds(pid: str) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def _wire(pid: str) -> tuple[int, int]:
    """Bytes that left and reached the namespace of this process."""
    for line in Path(f"/proc/{pid}/net/dev").read_text().splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == "eth0":
            found = counts.split()
            return int(found[8]), int(found[0])
    return 0, 0
