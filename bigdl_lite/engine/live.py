"""Lines of history on their way to the driver while a long stage runs. Best effort: training never waits for it.

The driver listens on the address that Spark itself uses; rank 0 connects, proves with a token that it belongs to the
run, and sends one JSON object a line. Where a firewall forbids it, the history still comes back with the result.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import logging
import socket
import threading
import time
from types import TracebackType

from bigdl_lite.engine.recipe import Event, Observer

_LOG = logging.getLogger("bigdl_lite")
_LINE = 1 << 16  # a longer line is not ours
_PATIENCE = 1.0  # seconds within which a peer shows its token
_EVERY = 0.1  # seconds between lines of steps, and between lines of epochs; the history itself has them all


class Listener:
    """The driver's end; use it as a context manager. address is (host, port, token), for the Speaker."""

    def __init__(self, host: str, token: str, observer: Observer) -> None:
        self._observer, self._token = observer, token
        self._socket = socket.create_server((host, 0))
        self._socket.settimeout(0.2)
        self.address = (host, self._socket.getsockname()[1], token)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="bigdl_lite-live", daemon=True)

    def __enter__(self) -> Listener:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._closed.set()
        self._thread.join(2.0)
        self._socket.close()

    def _listen(self) -> None:
        while not self._closed.is_set():
            try:
                peer, _ = self._socket.accept()
                with peer:
                    self._read(peer)
            except OSError:
                continue
            except Exception as error:  # not a line of ours, or an observer that failed: the next speaker is heard
                _LOG.warning("a line of history was dropped: %s: %s", type(error).__name__, error)

    def _read(self, peer: socket.socket) -> None:
        peer.settimeout(0.2)
        known, rest, until = False, b"", time.monotonic() + _PATIENCE
        while known or time.monotonic() < until:  # a stranger that says nothing must not keep the speaker out
            try:
                got = peer.recv(_LINE)
            except TimeoutError:
                if self._closed.is_set():
                    return
                continue
            if not got:
                return
            *lines, rest = (rest + got).split(b"\n")
            if len(rest) > _LINE:
                return
            for line in lines:
                if not known:
                    known = hmac.compare_digest(line, self._token.encode())
                    if not known:
                        return
                else:
                    self._observer(json.loads(line))


class Speaker:
    """The executor's end; call it with events. After the first failure it is silent."""

    def __init__(self, address: tuple[str, int, str] | None) -> None:
        self._socket: socket.socket | None = None
        self._last = {"step": 0.0, "epoch": 0.0}
        if address is None:
            return
        host, port, token = address
        with contextlib.suppress(OSError):
            self._socket = socket.create_connection((host, port), timeout=1.0)
            self._send(token)

    def __call__(self, event: Event) -> None:
        if self._socket is None:
            return
        kind = next((kind for kind in ("step", "epoch") if kind in event), None)
        if kind:
            now = time.monotonic()
            if now - self._last[kind] < _EVERY:
                return
            self._last[kind] = now
        self._send(json.dumps(event))

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()

    def _send(self, line: str) -> None:
        try:
            assert self._socket is not None
            self._socket.sendall(line.encode() + b"\n")
        except OSError:
            self.close()
            self._socket = None
