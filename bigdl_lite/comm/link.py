"""A link: one connection to one peer, and messages that are checked before any memory is touched.

    magic 4 | kind 1 | tag 8 | length 8 | payload        little-endian

A receiver says beforehand what must come: which kind, with which tag (both ends count), and for a tensor exactly how many
bytes. Anything else ends the link. A tensor is received into its own memory and sent out of it: nothing is copied, and
nothing is unpickled. A fact is JSON of bounded length.

How a connection comes about, and who may have one, is in comm/door.py. From then on bytes travel in clear.
"""

from __future__ import annotations

import contextlib
import json
import math
import select
import socket
import struct
import time
from collections.abc import Collection
from typing import Any

from bigdl_lite.errors import MeetingTimeout, PeerLost, WireError

FACT, TENSOR = 1, 2
MOST = 1 << 20  # bytes of a fact
_MAGIC = b"BdL2"
_HEADER = struct.Struct("<4sBQQ")
HEADER_BYTES = _HEADER.size


def header(kind: int, tag: int, length: int) -> bytes:
    return _HEADER.pack(_MAGIC, kind, tag, length)


def check(head: bytes | bytearray, kind: int, tag: int, least: int, most: int) -> int:
    """The length of the payload behind a header. Raises WireError unless it is the header that is expected."""
    if len(head) != HEADER_BYTES:
        raise WireError(f"{len(head)} bytes are no header, which takes {HEADER_BYTES}")
    magic, its_kind, its_tag, length = _HEADER.unpack(head)
    if magic != _MAGIC:
        raise WireError(f"not a message: starts with {magic!r}")
    if (its_kind, its_tag) != (kind, tag):
        raise WireError(f"a message of kind {its_kind} and tag {its_tag} came, kind {kind} and tag {tag} was expected")
    if not least <= length <= most:
        wanted = f"{most}" if least == most else f"{least} to {most}"
        raise WireError(f"a message of {length} bytes came, {wanted} were expected")
    return length


class Link:
    """One end of a connection. name is the peer's, for errors. One thread at a time; a link that failed is closed.

    Raises (all calls)  PeerLost where the connection is gone, also in the middle of a message; MeetingTimeout where no byte
                        moved for the deadline; WireError where something else came than was expected.
    """

    def __init__(self, connection: socket.socket, name: str) -> None:
        self.name, self.moved = name, 0  # bytes in and out, headers included
        self._socket = connection
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _notice_silent_hosts(connection)
        self._out: list[memoryview] = []
        self._wanted: tuple[int, int, int, int] | None = None
        self._head, self._got = bytearray(HEADER_BYTES), 0
        self._room: memoryview | None = None  # where the payload goes
        self._payload = b""  # of the last fact
        self._told = self._heard = 0

    def send(self, kind: int, tag: int, payload: bytes | memoryview) -> None:
        """Takes a message, which `exchange` sends; payload must not change until then."""
        self.fileno()
        assert not self._out, "one message at a time"
        self._out = [memoryview(header(kind, tag, len(payload))), memoryview(payload)]

    def receive(self, tag: int, room: memoryview) -> None:
        """Names the memory that the next message, a tensor, must fill to the byte; `exchange` brings it."""
        self.fileno()
        assert self._wanted is None, "one message at a time"
        self._wanted, self._room = (TENSOR, tag, len(room), len(room)), room

    def tell(self, fact: Any, deadline: float) -> None:
        """Sends what JSON can say, in at most MOST bytes."""
        data = json.dumps(fact).encode()
        if len(data) > MOST:
            raise WireError(f"a fact of {len(data)} bytes for {self.name}; a fact has at most {MOST}")
        self.send(FACT, self._told, data)
        self._told += 1
        exchange([self], deadline)

    def hear(self, deadline: float | None) -> Any:
        """What the peer tells next. deadline None: waits until one of the two ends is closed."""
        self.fileno()
        self._wanted = (FACT, self._heard, 0, MOST)
        self._heard += 1
        exchange([self], deadline)
        try:
            return json.loads(self._payload)
        except (ValueError, RecursionError) as error:
            self.close()
            raise WireError(f"a fact from {self.name} is not JSON: {error}") from error

    def fileno(self) -> int:
        """Of the socket; PeerLost where the link is closed."""
        if self._socket.fileno() < 0:
            raise PeerLost(f"the connection to {self.name} is closed")
        return self._socket.fileno()

    def advance(self) -> int:
        """Moves what moves at once. Returns the events of poll() that the rest waits for; 0 when all is done."""
        try:
            if self._out:
                self._push()
            if self._wanted is not None:
                self._pull()
        except OSError as error:
            raise PeerLost(f"the connection to {self.name} broke: {error}") from error
        return (select.POLLOUT if self._out else 0) | (select.POLLIN if self._wanted is not None else 0)

    def close(self) -> None:
        """Ends every wait at the other end, and that of another thread at this one. What was sent still arrives."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _push(self) -> None:
        try:
            sent = self._socket.sendmsg(self._out)
        except BlockingIOError:
            return
        self.moved += sent
        while self._out and sent >= len(self._out[0]):
            sent -= len(self._out.pop(0))
        if self._out:
            self._out[0] = self._out[0][sent:]

    def _pull(self) -> None:
        assert self._wanted is not None
        if self._got < HEADER_BYTES:
            if not self._fill(memoryview(self._head), self._got):
                return
            length = check(self._head, *self._wanted)
            if self._room is None:
                self._room = memoryview(bytearray(length))
        if self._fill(self._room, self._got - HEADER_BYTES):
            if self._wanted[0] == FACT:
                self._payload = bytes(self._room)
            self._wanted, self._room, self._got = None, None, 0

    def _fill(self, room: memoryview, got: int) -> bool:
        """One read into what is left of room; whether it is full."""
        if got == len(room):
            return True
        try:
            count = self._socket.recv_into(room[got:])
        except BlockingIOError:
            return False
        if not count:
            inside = f" after {self._got} bytes of a message" if self._got else ""
            raise PeerLost(f"{self.name} closed the connection{inside}")
        self.moved += count
        self._got += count
        return got + count == len(room)


def exchange(links: Collection[Link], deadline: float | None) -> None:
    """Moves all that the links have taken up, in both directions at the same time, until it is done.

    Two peers that first send all and then read would wait for each other for ever as soon as the buffers between them are
    full; here whatever can move, moves, in one thread. After an error all these links are closed: half a message may be on
    its way.

    deadline  seconds during which no byte moves on any link; None: no limit
    """
    try:
        _exchange(links, deadline)
    except BaseException:
        for link in links:
            link.close()
        raise


def _exchange(links: Collection[Link], deadline: float | None) -> None:
    waiting, poll = {}, select.poll()
    for link in links:
        if events := link.advance():
            waiting[link.fileno()] = link
            poll.register(link.fileno(), events)
    until = math.inf if deadline is None else time.monotonic() + deadline
    while waiting:
        ready = poll.poll(None if deadline is None else max(0, math.ceil(1000 * (until - time.monotonic()))))
        for number, _ in ready:
            link = waiting[number]
            before = link.moved
            events = link.advance()
            if events:
                poll.modify(number, events)
            else:
                poll.unregister(number)
                del waiting[number]
            if deadline is not None and link.moved > before:
                until = time.monotonic() + deadline
        if time.monotonic() > until:
            raise MeetingTimeout(f"no byte moved for {deadline:.0f} s; waiting for {', '.join(x.name for x in waiting.values())}")


def _notice_silent_hosts(connection: socket.socket, patience: int = 60) -> None:
    """A host that vanished without a word is noticed after about twice `patience` seconds, even where no wait is running."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", patience), ("TCP_KEEPINTVL", patience // 4), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, option):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)

