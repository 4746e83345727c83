"""Ranks that share no memory: collectives over gloo (or NCCL where tensors live on GPUs). The one door to torch.distributed.

    p  members      n  length of a vector, the same on every member unless said otherwise

A Group is a value of its own, not the process-wide default group: several may live in one process, one after the other
or side by side, and none is left behind in a reused worker.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from bigdl_lite.errors import MeetingTimeout, PeerLost
from bigdl_lite.vector import slices


class Store:
    """Small facts that ranks tell one another before they can meet: key -> bytes, with a deadline on every read."""

    def __init__(self, host: str, port: int, server: bool, deadline: float) -> None:
        self.deadline = deadline
        try:
            self._store = dist.TCPStore(
                host, port, is_master=server, wait_for_workers=False, timeout=timedelta(seconds=deadline)
            )
        except RuntimeError as error:
            text = str(error).splitlines()[0]
            raise MeetingTimeout(f"no store at {host}:{port} (deadline {deadline:.0f} s): {text}") from error
        self.host, self.port = host, self._store.port

    def put(self, key: str, value: bytes) -> None:
        self._store.set(key, value)

    def get(self, key: str) -> bytes:
        try:
            return self._store.get(key)
        except (RuntimeError, dist.DistError) as error:
            raise MeetingTimeout(f"nobody told {key!r} to the store at {self.host}:{self.port} in {self.deadline:.0f} s") from error

    def part(self, prefix: str) -> dist.Store:
        return dist.PrefixStore(prefix, self._store)


class Group:
    """p members that exchange tensors; each call is made by all members in the same order.

    Raises MeetingTimeout or PeerLost where a member is silent too long or gone.
    """

    def __init__(self, store: Store, name: str, rank: int, size: int, host: str, device: torch.device | None = None) -> None:
        self.rank, self.size, self.deadline = rank, size, store.deadline
        self.bytes_sent = 0  # payload, without headers
        timeout = timedelta(seconds=store.deadline)
        with self._told(f"rendezvous {name!r}"):
            if device is not None and device.type == "cuda":
                options = dist.ProcessGroupNCCL.Options()
                options._timeout = timeout
                self._group = dist.ProcessGroupNCCL(store.part(name), rank, size, options)
            else:
                options = dist.ProcessGroupGloo._Options()
                options._timeout = timeout
                # bound to the address that Spark itself uses, never to all interfaces
                options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
                self._group = dist.ProcessGroupGloo(store.part(name), rank, size, options)

    def all_to_all(self, out: Sequence[Tensor]) -> list[Tensor]:
        """Sends out[j] to member j, whose in[self.rank] it becomes; lengths may differ by receiver but are slices of one n.

        Every member receives p tensors as long as its own out[rank].  Cost: the sum of the others' lengths, sent.
        """
        mine = out[self.rank]
        received = [torch.empty_like(mine) for _ in range(self.size)]
        received[self.rank] = mine
        with self._told("all_to_all"):
            work = []
            for step in range(1, self.size):
                to, source = (self.rank + step) % self.size, (self.rank - step) % self.size
                # an empty slice is not sent: both sides know its length
                if out[to].numel():
                    work.append(self._group.send([out[to].contiguous()], to, self.rank))
                    self.bytes_sent += out[to].nbytes
                if mine.numel():
                    work.append(self._group.recv([received[source]], source, source))
            for w in work:
                w.wait()
        return received

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """The sum of x [n] over members, in member order, on the slice that this member owns (slices(n, p)[rank]).

        Cost: n - len(slice) values sent by each member.
        """
        parts = self.all_to_all([x[start:stop] for start, stop in slices(len(x), self.size)])
        total = parts[0].clone()
        for part in parts[1:]:
            total.add_(part)
        return total

    def all_gather(self, mine: Tensor, out: Sequence[Tensor]) -> None:
        """Fills out[j] with member j's tensor; lengths may differ between members.  Cost: (p - 1) len(mine) values sent."""
        if mine.numel() and out[self.rank].data_ptr() != mine.data_ptr():
            out[self.rank].copy_(mine)
        with self._told("all_gather"):
            work = []
            for step in range(1, self.size):
                to, source = (self.rank + step) % self.size, (self.rank - step) % self.size
                if mine.numel():
                    work.append(self._group.send([mine.contiguous()], to, self.rank))
                    self.bytes_sent += mine.nbytes
                if out[source].numel():
                    work.append(self._group.recv([out[source]], source, source))
            for w in work:
                w.wait()

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of x over members, in member order: equal to the bit on all.  Cost: (p - 1) n values sent; for small x."""
        parts = [torch.empty_like(x) for _ in range(self.size)]
        self.all_gather(x, parts)
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total

    def close(self) -> None:
        """Closes the connections, which ends the wait of every other member at once."""
        self._group = None

    @contextlib.contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """torch's errors as ours. gloo raises in send and recv too, where it knows already that a connection is dead."""
        try:
            yield
        except RuntimeError as error:
            text = str(error).splitlines()[0]
            kind = MeetingTimeout if "imed out" in text or "imeout" in text else PeerLost
            raise kind(f"member {self.rank} of {self.size} in {what} (deadline {self.deadline:.0f} s): {text}") from error
