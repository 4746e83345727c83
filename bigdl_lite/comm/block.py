"""The memory that the ranks of one node share: one copy of the weights, one gradient vector per rank, small notes.

    header    int64 [64 + 2 q]    who failed; for each local rank its process id and its count of arrivals
    weights   [n]                 one copy for the node
    grads     [q, n]              one row per local rank, written by its backward pass
    sides     float64 [p, s]      a few numbers of every rank of the job (loss, rows, seconds, buffers)
    scratch   float64 [p, w]      for sums of small vectors over ranks (batch statistics)

    n  flat weights      p  ranks of the job      q  ranks on this node      s, w  widths

It lies in a window of the node's first rank (window.py), so that nothing of it is left when its ranks are gone, however they went.

A rank writes only its own row, its own arrival count, and (between two waits) its own slice of the rest; so no lock is
needed, only wait(). Measured for 25 M parameters and 2 ranks, Adam: tests/bench/meeting.py.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bigdl_lite.comm.window import HEADER, Look, Window, available, look
from bigdl_lite.errors import MeetingTimeout, PeerLost

_FAILED, _HEADER = 1, 64
_ALIGN = 4096
_LETTER = 256  # bytes of a mailbox

Idle = Callable[[int], None]


def _pause(tries: int) -> None:
    """Gives the core away: at once at first (a peer is often microseconds behind), then for longer and longer."""
    if tries < 50:
        os.sched_yield()
    else:
        time.sleep(min(1e-3, 2e-5 * (tries - 49)))


@dataclass(frozen=True)
class Size:
    """The five lengths that fix a block, and the dtype of weights and gradients."""

    n: int
    p: int
    q: int
    s: int
    w: int
    dtype: torch.dtype = torch.float32

    @property
    def parts(self) -> list[int]:
        vector = self.n * self.dtype.itemsize
        return [8 * (_HEADER + 2 * self.q), vector, *([vector] * self.q), 8 * self.p * self.s, 8 * self.p * self.w]

    @property
    def nbytes(self) -> int:
        """Cost on a node: q + 1 copies of the weights, each part rounded up to a page."""
        return sum(-(-part // _ALIGN) * _ALIGN for part in self.parts)


class Block:
    """One rank's view of the block. Make it with `create` on one rank of the node and `join` on the others.

    deadline  seconds that wait() waits at most
    idle      called again and again while waiting; the local engine passes its turn to another thread there
    """

    def __init__(
        self, memory: Look, size: Size, me: int, deadline: float, idle: Idle = _pause, watch: bool = True
    ) -> None:
        self.me, self.q, self.deadline = me, size.q, deadline
        self._memory, self._idle, self._watch = memory, idle, watch
        at = 0

        def room(kind: torch.dtype, count: int) -> Tensor:
            nonlocal at
            found = memory.values(kind, count, at)
            at += -(-count * kind.itemsize // _ALIGN) * _ALIGN
            return found

        self._header = room(torch.int64, _HEADER + 2 * size.q).numpy()
        self.weights = room(size.dtype, size.n)
        self.grads = [room(size.dtype, size.n) for _ in range(size.q)]
        self.sides = room(torch.float64, size.p * size.s).view(size.p, size.s)
        self.scratch = room(torch.float64, size.p * size.w).view(size.p, size.w)
        self._pids = self._header[_HEADER : _HEADER + size.q]
        self._arrivals = self._header[_HEADER + size.q :]
        self._pids[me] = os.getpid()

    def take_own(self, n: int, dtype: torch.dtype, device: torch.device) -> None:
        """From now on this rank has weights [n] and a gradient [n] of its own, on its device; notes and sums stay shared."""
        self.weights = torch.empty(n, dtype=dtype, device=device)
        self.grads = [torch.zeros(n if r == self.me else 0, dtype=dtype, device=device) for r in range(self.q)]

    def wait(self) -> None:
        """Returns when every rank of the node has called it as often as this one.

        Raises PeerLost where a rank has failed or its process is gone, MeetingTimeout after the deadline.
        """
        self._arrivals[self.me] += 1
        mine = self._arrivals[self.me]
        tries, started, looked = 0, 0.0, 0.0
        while True:
            if (self._arrivals >= mine).all():
                # a rank that failed after its last arrival has set the flag before it left
                if self._header[_FAILED]:
                    self._lost()
                return
            if self._header[_FAILED]:
                self._lost()
            self._idle(tries)
            tries += 1
            if tries % 64:
                continue
            now = time.monotonic()
            started = started or now
            if self._watch and now - looked > 0.2:
                looked = now
                self._check_alive(mine)
            if now - started > self.deadline:
                late = [r for r in range(self.q) if self._arrivals[r] < mine]
                raise MeetingTimeout(
                    f"local rank {self.me} waited {self.deadline:.0f} s for local rank(s) {late} of {self.q} "
                    f"(meeting {mine}); are those tasks still running?"
                )

    def fail(self) -> None:
        """Tells the other ranks of the node that this one will not come again."""
        self._header[_FAILED] = self.me + 1

    def close(self) -> None:
        """Lets go of the memory; tensors that point into it must not be used again."""
        self._header = self._pids = self._arrivals = None
        self.weights = self.sides = self.scratch = None
        self.grads = []
        self._memory = None

    def _lost(self) -> None:
        raise PeerLost(f"local rank {int(self._header[_FAILED]) - 1} failed; its own error says why")

    def _check_alive(self, mine: int) -> None:
        for r in range(self.q):
            pid = int(self._pids[r])
            if self._arrivals[r] < mine and pid:
                try:
                    os.kill(pid, 0)
                except ProcessLookupError:
                    self._header[_FAILED] = r + 1
                    raise PeerLost(f"the process of local rank {r} (pid {pid}) is gone; was it killed for memory?") from None
                except PermissionError:
                    pass


def mailbox() -> Window:
    """A small window of one rank, through which those of its node learn where the block is. Whoever can look at it is on its node."""
    return Window(_LETTER)


def create(mail: Window, size: int) -> Window:
    """The block's memory, made by the node's first rank, and its address put into that rank's mailbox.

    Raises MemoryError or OSError where there is no room: it is reserved now, because later the process would be killed instead.
    """
    free = available()
    if size > free:  # the kernel would kill processes to find the room
        raise MemoryError(
            f"the ranks of this node share {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB of its memory are free: put fewer ranks on a "
            "node, or free some memory"
        )
    memory = Window(size)
    letter = memory.address.encode().ljust(_LETTER)
    mail.values(torch.uint8, _LETTER).copy_(torch.frombuffer(bytearray(letter), dtype=torch.uint8))
    mail.mark(1)
    return memory


def join(mail: Look, deadline: float) -> Look:
    """The block's memory, as soon as its address is in the first rank's mailbox."""
    until, tries = time.monotonic() + deadline, 0
    while mail.stamp != 1:
        if time.monotonic() > until:
            raise MeetingTimeout(f"no shared block appeared within {deadline:.0f} s; has its creator died?")
        tries += 1
        time.sleep(min(0.05, 1e-4 * tries))
    memory = look(bytes(mail.values(torch.uint8, _LETTER).tolist()).decode().strip())
    if memory is None:
        raise PeerLost("the process of the node's first rank is gone, and the block with it")
    return memory


def private(size: int) -> Look:
    """Memory for ranks that are threads of one process; page-aligned like a shared one, so that kernels round alike."""
    return Look(mmap.mmap(-1, HEADER + size))
