"""Who may connect: sockets that listen on one address, and a handshake that both ends must pass before anything else.

    caller     rank 4 | nonce 32  behind 4 bytes of magic
    listener   nonce 32 | proof 32               proof = HMAC-SHA256(token, side | rank | both nonces | label)
    caller     proof 32
    listener   1 byte: come in

The token of the run never crosses the wire. Each end proves that it has it, for this connection (the nonces) and for this
purpose alone (the label), so nothing that was overheard can be used again. Every length is fixed: a stranger makes nobody
allocate anything. Each caller is judged in a thread of its own and has a few seconds for it, so that one who says nothing
keeps nobody out.

Not promised: bytes that follow are neither encrypted nor signed. Who can change packets on the way can change them.
Source: the three-pass mutual authentication of ISO/IEC 9798-4, with the HMAC of RFC 2104.
"""

from __future__ import annotations

import contextlib
import errno
import hmac
import ipaddress
import logging
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable

from bigdl_lite.comm.link import Link
from bigdl_lite.errors import BigDLError, MeetingTimeout, PeerLost, RecipeError, WireError

_LOG = logging.getLogger("bigdl_lite")
_HELLO = struct.Struct("<4sI32s")
_MAGIC, _COME_IN = b"BdLh", b"\x01"
_NONCE = _PROOF = 32
_PATIENCE = 3.0  # seconds within which a caller passes the handshake
_AT_ONCE = 64  # callers that are judged at the same time

Token = str | bytes


def listen(host: str) -> socket.socket:
    """A socket that listens on a free port of one address. OSError where this machine does not have the address.

    Never on all interfaces: an address that stands for all of them is refused as well.
    """
    found = socket.getaddrinfo(host or "0.0.0.0", 0, type=socket.SOCK_STREAM)
    family, _, _, _, address = min(found, key=lambda info: info[0] != socket.AF_INET)
    if ipaddress.ip_address(str(address[0]).split("%")[0]).is_unspecified:
        raise OSError(errno.EADDRNOTAVAIL, f"host={host!r} stands for every interface of this machine; name one address")
    return socket.create_server((str(address[0]), 0), family=family, backlog=128)


class Door:
    """Listens on one address and hands everyone who knows the token to welcome(link, rank), in a thread of its own.

    port      is free and chosen by the system
    Raises    OSError where nothing can listen on host (see listen)
    """

    def __init__(
        self, host: str, token: Token, label: str, welcome: Callable[[Link, int], None], name: str = "bigdl_lite-door"
    ) -> None:
        self._key, self._label, self._welcome, self._name = _key(token), label.encode(), welcome, name
        self._lock, self._closed = threading.RLock(), False
        self._judged: set[socket.socket] = set()
        self._visits: set[threading.Thread] = set()
        self._places = threading.BoundedSemaphore(_AT_ONCE)
        self._socket = listen(host)
        self.port = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._accept, name=name, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Lets nobody in any more. Links that were welcomed are their owner's."""
        with self._lock:
            self._closed = True
            for connection in (self._socket, *self._judged):
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)  # close alone does not wake a thread that waits in accept or recv
        for thread in (self._thread, *tuple(self._visits)):
            if thread is not threading.current_thread():
                thread.join(2.0)
        self._socket.close()

    def _accept(self) -> None:
        while not self._closed:
            try:
                connection, _ = self._socket.accept()
            except OSError:  # closed, or no file descriptor is left: then some may soon be
                time.sleep(0 if self._closed else 0.05)
                continue
            self._places.acquire()
            with self._lock:
                if self._closed:
                    connection.close()
                    return
                self._judged.add(connection)
                visit = threading.Thread(target=self._visit, args=(connection,), name=self._name, daemon=True)
                self._visits.add(visit)
            visit.start()

    def _visit(self, connection: socket.socket) -> None:
        try:
            rank = self._judge(connection)
            if rank is not None:
                self._welcome(Link(connection, f"rank {rank}"), rank)
        except OSError:  # gone again at once
            connection.close()
        finally:
            with self._lock:
                self._visits.discard(threading.current_thread())

    def _judge(self, connection: socket.socket) -> int | None:
        """The rank of a caller who has passed; None, and the connection is closed, for everyone else."""
        try:
            rank = _admit(connection, self._key, self._label, time.monotonic() + _PATIENCE)
        except (OSError, WireError) as error:
            _LOG.debug("shown out at port %d: %s", self.port, error)
            rank = None
        finally:
            self._places.release()
            with self._lock:
                self._judged.discard(connection)
        if rank is None or self._closed:
            connection.close()
            return None
        return rank


class Service:
    """A door whose visitors are all served until one of the two ends hangs up: serve(link), each in its own thread."""

    def __init__(self, host: str, token: Token, label: str, serve: Callable[[Link], None], name: str = "bigdl_lite-door") -> None:
        self._serve, self._links = serve, set[Link]()
        self._lock, self._closed = threading.RLock(), False
        self._door = Door(host, token, label, self._visit, name)
        self.port = self._door.port

    def close(self) -> None:
        with self._lock:
            self._closed = True
            for link in self._links:
                link.close()
        self._door.close()

    def _visit(self, link: Link, rank: int) -> None:
        with self._lock:
            if self._closed:
                link.close()
                return
            self._links.add(link)
        try:
            self._serve(link)
        except BigDLError as error:  # the visitor's own trouble, and most often the end of its visit
            _LOG.debug("a visit at port %d ended: %s", self.port, error)
        finally:
            link.close()
            with self._lock:
                self._links.discard(link)


def call(host: str, port: int, token: Token, label: str, rank: int, deadline: float, name: str) -> Link:
    """A link to a door, as `rank`; name is the other end's, for errors.

    Raises  PeerLost where nobody listens, MeetingTimeout after the deadline, WireError where who listens has another token.
    """
    key, until = _key(token), time.monotonic() + deadline
    while True:
        left = until - time.monotonic()
        try:
            if left <= 0:
                raise TimeoutError
            connection = socket.create_connection((host, port), timeout=left)
        except TimeoutError as error:
            raise MeetingTimeout(f"{name} at {host}:{port} let nobody in within {deadline:.0f} s") from error
        except OSError as error:
            raise PeerLost(f"{name} at {host}:{port} cannot be reached: {error}") from error
        try:
            _introduce(connection, key, label.encode(), rank, until)
            return Link(connection, name)
        except WireError as error:
            connection.close()
            raise WireError(f"{name} at {host}:{port}: {error}") from error
        except TimeoutError:
            connection.close()
        except OSError:  # shown out, perhaps because this machine was too busy to answer in time: once more
            connection.close()
            time.sleep(0.05)


def _introduce(connection: socket.socket, key: bytes, label: bytes, rank: int, until: float) -> None:
    """The caller's side."""
    mine = secrets.token_bytes(_NONCE)
    connection.sendall(_HELLO.pack(_MAGIC, rank, mine))
    answer = _read(connection, _NONCE + _PROOF, until)
    theirs, proof = answer[:_NONCE], answer[_NONCE:]
    if not hmac.compare_digest(proof, _proof(key, b"listener", rank, mine, theirs, label)):
        raise WireError(f"who listens there does not have the token of this run, or is not {label.decode()!r}")
    connection.sendall(_proof(key, b"caller", rank, mine, theirs, label))
    if _read(connection, 1, until) != _COME_IN:
        raise WireError("an answer that is none of this protocol")


def _admit(connection: socket.socket, key: bytes, label: bytes, until: float) -> int:
    """The listener's side; the rank of a caller who has the token. WireError or OSError for everyone else."""
    magic, rank, theirs = _HELLO.unpack(_read(connection, _HELLO.size, until))
    if magic != _MAGIC:
        raise WireError(f"not a rank of bigdl_lite: starts with {magic!r}")
    mine = secrets.token_bytes(_NONCE)
    connection.sendall(mine + _proof(key, b"listener", rank, theirs, mine, label))
    if not hmac.compare_digest(_read(connection, _PROOF, until), _proof(key, b"caller", rank, theirs, mine, label)):
        raise WireError(f"who says to be rank {rank} does not have the token of this run")
    connection.sendall(_COME_IN)
    return rank


def _proof(key: bytes, side: bytes, rank: int, callers: bytes, listeners: bytes, label: bytes) -> bytes:
    # the sides have different first letters, and all but the label has a fixed length: no two inputs read alike
    return hmac.digest(key, side[:1] + rank.to_bytes(4, "little") + callers + listeners + label, "sha256")


def _read(connection: socket.socket, nbytes: int, until: float) -> bytes:
    """Exactly nbytes; TimeoutError after `until`, ConnectionError where the other end closes first."""
    got = b""
    while len(got) < nbytes:
        connection.settimeout(max(1e-3, until - time.monotonic()))
        more = connection.recv(nbytes - len(got))
        if not more:
            raise ConnectionError(f"closed after {len(got)} of {nbytes} bytes")
        got += more
    return got


def _key(token: Token) -> bytes:
    key = token.encode() if isinstance(token, str) else token
    if len(key) < 16:
        raise RecipeError(f"a token of {len(key)} bytes protects nothing; secrets.token_hex(32) makes a good one")
    return key
