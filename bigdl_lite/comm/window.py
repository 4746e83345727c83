"""A window: memory of one process that other processes of the same user on the same machine can map.

    header    4096 bytes    secret 16, stamp int64        stamp says which round the values belong to
    values    nbytes

It has no name on any disk. Others reach it through /proc/<pid>/fd/<n> for as long as its owner lives and keeps it open, and
it is gone with its owner, however that ends: there is nothing to sweep. In another container or on another machine the
address leads nowhere, or to something without the secret, and `look` says None: then values must travel.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import secrets
import stat
import struct
from collections.abc import Iterator

import torch
from torch import Tensor

HEADER = 4096
_SECRET = 16
_STAMP = struct.Struct("<q")


class Look:
    """The other end, as long as it is kept: the memory is mapped, not copied."""

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory

    def values(self, dtype: torch.dtype, count: int, offset: int = 0) -> Tensor:
        """count values, as a tensor on the memory itself."""
        if not count:
            return torch.empty(0, dtype=dtype)
        return torch.frombuffer(self._memory, dtype=dtype, count=count, offset=HEADER + offset)

    def view(self, offset: int, nbytes: int) -> memoryview:
        """nbytes bytes of the memory itself."""
        return memoryview(self._memory)[HEADER + offset : HEADER + offset + nbytes]

    @property
    def stamp(self) -> int:
        return _STAMP.unpack_from(self._memory, _SECRET)[0]


class Window(Look):
    """The owner's end. address is what others need to look through it; MemoryError or OSError where there is no room."""

    def __init__(self, nbytes: int) -> None:
        self._file, secret = -1, secrets.token_bytes(_SECRET)
        self._file = os.memfd_create("bigdl_lite", os.MFD_CLOEXEC)
        try:
            os.posix_fallocate(self._file, 0, HEADER + nbytes)  # room now, or an error now
            self._memory = mmap.mmap(self._file, HEADER + nbytes)
        except BaseException:
            self.close()
            raise
        self._memory[:_SECRET] = secret
        self.nbytes = nbytes
        self.address = f"{os.getpid()}/{self._file}/{secret.hex()}/{nbytes}"

    def mark(self, number: int) -> None:
        """Sets the stamp."""
        _STAMP.pack_into(self._memory, _SECRET, number)

    def close(self) -> None:
        """Nobody new can look; tensors on the memory stay valid."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __del__(self) -> None:
        self.close()


def look(address: str) -> Look | None:
    """The memory behind an address; None where it cannot be seen from here."""
    with _opened(address) as file:
        if file is None:
            return None
        try:  # mapped for writing, because torch knows no tensor that is read-only
            return Look(mmap.mmap(file, HEADER + int(address.split("/")[3])))
        except (OSError, ValueError):  # shorter than the address says
            return None


def pour(address: str, x: Tensor) -> bool:
    """Writes x [n], on any device, into the memory behind an address, without mapping it; False where it cannot be seen."""
    with _opened(address) as file:
        if file is None:
            return False
        data = memoryview(x.cpu().contiguous().view(torch.uint8).numpy())
        at = 0
        while at < len(data):
            at += os.pwrite(file, data[at:], HEADER + at)
        return True


@contextlib.contextmanager
def _opened(address: str) -> Iterator[int | None]:
    """The file behind an address; None where it is gone, not ours, in another namespace, or another than it was."""
    pid, number, secret, _ = address.split("/")
    try:
        file = os.open(f"/proc/{int(pid)}/fd/{int(number)}", os.O_RDWR)
    except OSError:
        yield None
        return
    try:
        # a pipe or a terminal has no place to read from
        known = stat.S_ISREG(os.fstat(file).st_mode) and os.pread(file, _SECRET, 0).hex() == secret
        yield file if known else None
    finally:
        os.close(file)


def available() -> int:
    """Bytes of memory that this machine (or this container) can still give; 0 where windows do not exist."""
    if not hasattr(os, "memfd_create"):
        return 0
    try:
        with open("/proc/meminfo") as told:
            free = next(int(line.split()[1]) * 1024 for line in told if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 0
    for most, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            with open(most) as a, open(used) as b:
                limit, taken = a.read().strip(), int(b.read())
            if limit != "max":
                free = min(free, int(limit) - taken)
        except (OSError, ValueError):
            continue
    return max(0, free)
