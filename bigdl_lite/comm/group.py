"""Ranks that share no memory: where they find one another, and collectives between them. The one door to torch.distributed.

    p  members      n  length of a vector, the same on every member unless said otherwise

Members on CPUs have a link to each other member (comm/link.py), let in by the token of the run (comm/door.py). Where
tensors live on GPUs it is NCCL that carries them.

A Group is a value of its own, not the process-wide default group: several may live in one process, one after the other
or side by side, and none is left behind in a reused worker.
"""

from __future__ import annotations

import contextlib
import functools
import json
import queue
import secrets
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bigdl_lite.comm.comm import Collectives
from bigdl_lite.comm.door import Door, Service, Token, call, listen
from bigdl_lite.comm.link import TENSOR, Link, exchange
from bigdl_lite.errors import BigDLError, MeetingTimeout, PeerLost, RecipeError, WireError


def has_nccl() -> bool:
    """Whether a Group of this process may be of GPUs."""
    return dist.is_nccl_available()


class Store:
    """Small facts that ranks tell one another before they can meet: key -> bytes, with a deadline on every read.

    One rank serves: it listens on `host`, the address that Spark uses for it, and on no other. The others call it. Both ends
    prove that they have the token. One thread at a time; a store that failed once is closed.

    token   the secret of the run; None: one that only this process has, for members that are its threads
    Raises  RecipeError where nothing can listen on host, PeerLost where no store is (any more), MeetingTimeout after the
            deadline, WireError where the other end has another token or says what cannot be understood
    """

    def __init__(self, host: str, port: int, server: bool, deadline: float, token: Token | None = None) -> None:
        self.deadline, self.token = deadline, token or _token_of_this_process()
        self._desk: _Desk | None = None
        self._link: Link | None = None
        if server:
            self._desk = _Desk(host, self.token, deadline)
        else:
            self._link = call(host, port, self.token, "store", 0, deadline, "the store")
        self.host, self.port = host, self._desk.port if self._desk else port
        self.close = weakref.finalize(self, (self._desk or self._link).close)  # called by hand, or when the store is let go

    def put(self, key: str, value: bytes) -> None:
        if self._desk:
            self._desk.put(key, value)
        else:
            self._ask(["put", key, value.hex()])

    def get(self, key: str) -> bytes:
        try:
            found = self._desk.get(key) if self._desk else self._ask(["get", key])
        except MeetingTimeout:
            found = None
        if found is None:
            raise MeetingTimeout(f"nobody told {key!r} to the store at {self.host}:{self.port} in {self.deadline:.0f} s")
        return found

    def _ask(self, question: list[str]) -> bytes | None:
        assert self._link is not None
        self._link.tell(question, self.deadline)
        answer = self._link.hear(self.deadline)
        return None if answer is None else bytes.fromhex(answer)


class _Desk:
    """What the serving rank keeps. Apart from Store, so that threads that serve do not keep a store alive that is let go."""

    def __init__(self, host: str, token: Token, deadline: float) -> None:
        self._facts: dict[str, bytes] = {}
        self._deadline, self._changed, self._closed = deadline, threading.Condition(), False
        try:
            self._service = Service(host, token, "store", self._serve, "bigdl_lite-store")
        except OSError as error:
            raise _unbound(host, error) from error
        self.port = self._service.port

    def put(self, key: str, value: bytes) -> None:
        with self._changed:
            self._facts[key] = value
            self._changed.notify_all()

    def get(self, key: str) -> bytes | None:
        with self._changed:
            self._changed.wait_for(lambda: key in self._facts or self._closed, self._deadline)
            return self._facts.get(key)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._service.close()

    def _serve(self, link: Link) -> None:
        while True:
            match link.hear(None):
                case ["put", str(key), str(value)]:
                    self.put(key, _from_hex(value))
                    link.tell("", self._deadline)
                case ["get", str(key)]:
                    found = self.get(key)
                    link.tell(None if found is None else found.hex(), self._deadline)
                case other:
                    raise WireError(f"a question that no store answers: {str(other)[:80]}")


def _from_hex(text: str) -> bytes:
    try:
        return bytes.fromhex(text)
    except ValueError as error:
        raise WireError(f"a value that is not hexadecimal: {text[:80]!r}") from error


@functools.cache
def _token_of_this_process() -> bytes:
    return secrets.token_bytes(32)


def _unbound(host: str, error: OSError) -> RecipeError:
    return RecipeError(
        f"nothing can listen on {host!r}, the address that Spark uses for this machine: {error}. Give Spark an address of "
        "this machine (SPARK_LOCAL_IP, or spark.driver.host for the driver)"
    )


class Group(Collectives):
    """p members that exchange tensors (comm.py); each call is made by all members in the same order.

    Tensors on CPUs travel over links that the token of the store has opened, bound to `host`; in clear. NCCL (device is a
    GPU) makes connections of its own, which are neither authenticated nor encrypted, and so is the store of torch that it
    meets in: bound to `host`, it lets in everyone who reaches it.

    Raises MeetingTimeout or PeerLost where a member is silent too long or gone, WireError where one sends what was not
    expected. After an error the group is closed.
    """

    def __init__(self, store: Store, name: str, rank: int, size: int, host: str, device: torch.device | None = None) -> None:
        self.rank, self.size, self.deadline = rank, size, store.deadline
        self.bytes_sent = 0  # payload, without headers
        self._calls = 0
        self._links: dict[int, Link] = {}
        self._nccl: Any = None
        with self._told(f"rendezvous {name!r}"):
            if device is not None and device.type == "cuda":
                self._nccl = _over_nccl(store, name, rank, size, host)
            elif size > 1:
                self._links = _linked(store, name, rank, size, host)

    def close(self) -> None:
        """Closes the connections, which ends the wait of every other member at once."""
        for link in self._links.values():
            link.close()
        self._nccl = None

    def _trade(self, what: str, out: Sequence[Tensor], into: Sequence[Tensor]) -> None:
        self._calls += 1
        out = [x.contiguous() for x in out]
        turns = [((self.rank + step) % self.size, (self.rank - step) % self.size) for step in range(1, self.size)]
        with self._told(what):
            if self._links:
                for to, source in turns:
                    if out[to].numel():
                        self._links[to].send(TENSOR, self._calls, _bytes(out[to]))
                    if into[source].numel():
                        self._links[source].receive(self._calls, _bytes(into[source]))
                exchange(self._links.values(), self.deadline)
            elif turns:
                # one call for all: sends and receives one by one would each wait for the other end to begin with theirs
                mine = self.rank
                given = [x[:0] if j == mine else x for j, x in enumerate(out)]
                self._nccl.alltoall([x[:0] if j == mine else x for j, x in enumerate(into)], given).wait()
        self.bytes_sent += sum(out[to].nbytes for to, _ in turns)

    @contextlib.contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """Errors with who met, in what; torch's as ours."""
        where = f"member {self.rank} of {self.size} in {what} (deadline {self.deadline:.0f} s)"
        try:
            yield
        except BigDLError as error:
            self.close()
            raise type(error)(f"{where}: {error}") from error
        except RuntimeError as error:
            text = str(error).splitlines()[0]
            kind = MeetingTimeout if "imed out" in text or "imeout" in text else PeerLost
            raise kind(f"{where}: {text}") from error


def _bytes(x: Tensor) -> memoryview:
    """The memory of a contiguous tensor itself."""
    assert x.is_contiguous()
    return memoryview(x.detach().view(-1).view(torch.uint8).numpy())


def _linked(store: Store, name: str, rank: int, size: int, host: str) -> dict[int, Link]:
    """A link to each other member. Every member listens; of two, the one with the higher rank calls."""
    came: queue.Queue[tuple[int, Link]] = queue.Queue()
    links: dict[int, Link] = {}
    try:
        door = Door(host, store.token, f"{name}/{rank}", lambda link, other: came.put((other, link)))
    except OSError as error:
        raise _unbound(host, error) from error
    try:
        store.put(f"{name}/{rank}", json.dumps([host, door.port]).encode())
        for other in range(rank):
            address, port = json.loads(store.get(f"{name}/{other}"))
            links[other] = call(address, port, store.token, f"{name}/{other}", rank, store.deadline, f"member {other}")
        until = time.monotonic() + store.deadline
        while missing := [other for other in range(size) if other != rank and other not in links]:
            try:
                other, link = came.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty as error:
                raise MeetingTimeout(f"member(s) {missing} did not come") from error
            link.name = f"member {other}"
            if not rank < other < size:
                link.close()
                continue
            if other in links:  # it called again, because it took its first call for lost
                links[other].close()
            links[other] = link
    except BaseException:
        for link in links.values():
            link.close()
        raise
    finally:
        door.close()
    return links


def _over_nccl(store: Store, name: str, rank: int, size: int, host: str) -> dist.ProcessGroupNCCL:
    """NCCL, and the store of torch that it wants to meet in; that one listens on host alone as well."""
    timeout, key = timedelta(seconds=store.deadline), f"{name}/nccl"
    if rank == 0:
        socket = listen(host)
        port = socket.getsockname()[1]
        store.put(key, json.dumps([host, port]).encode())
        # the socket is torch's from here on; its other backend, the usual one, cannot be given a socket in torch 2.4
        fd = socket.detach()
        meeting = dist.TCPStore(
            host, port, is_master=True, wait_for_workers=False, timeout=timeout, master_listen_fd=fd, use_libuv=False
        )  # fmt: skip
    else:
        address, port = json.loads(store.get(key))
        meeting = dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timeout, use_libuv=False)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return dist.ProcessGroupNCCL(dist.PrefixStore(name, meeting), rank, size, options)
