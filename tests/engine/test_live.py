"""Lines of history over a loopback socket: ours arrive, anything else is ignored, and training never waits.

A stranger's connection is closed by the listener when it has been judged, which is what these tests wait for.
"""

from __future__ import annotations

import json
import queue
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from bigdl_lite.engine.live import Listener, Speaker

pytestmark = pytest.mark.timeout(30)

HOST, TOKEN, WAIT = "127.0.0.1", "5ecret", 5.0


class Heard:
    """What the observer was told, in order."""

    def __init__(self) -> None:
        self.events: queue.Queue[Any] = queue.Queue()
        self.listener = Listener(HOST, TOKEN, self.events.put)

    @property
    def address(self) -> tuple[str, int, str]:
        return self.listener.address

    def next(self) -> Any:
        return self.events.get(timeout=WAIT)

    def send(self, data: bytes) -> None:
        """As a stranger would; returns when the listener has closed the connection."""
        with socket.create_connection(self.address[:2], timeout=WAIT) as peer:
            try:
                peer.sendall(data)
                while peer.recv(1024):
                    pass
            except ConnectionError:  # closed while we were still sending
                pass


@pytest.fixture
def heard() -> Iterator[Heard]:
    made = Heard()
    with made.listener:
        yield made


def speak(heard: Heard, *events: dict[str, Any]) -> None:
    speaker = Speaker(heard.address)
    for event in events:
        speaker(event)
    speaker.close()


def test_lines_arrive_in_order_and_as_they_were(heard: Heard) -> None:
    start = {"start": {"steps": 4, "epochs": 2, "rows": 9}}
    events = [start, {"step": 0, "epoch": 0, "loss": 0.5}, {"epoch": 0, "loss": 1e-30}, {"note": "é"}, {"note": [1, None]}]
    speak(heard, *events)
    assert [heard.next() for _ in events] == events


def test_steps_and_epochs_are_thinned_out_each_for_itself(heard: Heard) -> None:
    """Many short epochs must not flood the driver; many steps must not push the epoch's line out."""
    speaker = Speaker(heard.address)
    for epoch in range(20):
        for step in range(20):
            speaker({"step": 20 * epoch + step, "epoch": epoch})
        speaker({"epoch": epoch, "loss": 1.0})
    speaker({"end": True})
    speaker.close()
    lines = [heard.next()]
    while "end" not in lines[-1]:
        lines.append(heard.next())
    steps, epochs = [x["step"] for x in lines if "step" in x], [x["epoch"] for x in lines if "loss" in x]
    assert steps[0] == 0 and steps == sorted(steps) and len(steps) < 400
    assert epochs[0] == 0 and epochs == sorted(epochs)


def test_a_number_that_json_has_no_name_for_arrives(heard: Heard) -> None:
    speak(heard, {"loss": float("nan")}, {"loss": float("inf")})
    first, second = heard.next(), heard.next()
    assert first["loss"] != first["loss"] and second["loss"] == float("inf")


def test_a_second_speaker_is_heard_after_the_first(heard: Heard) -> None:
    """Spark runs a lost stage again; the new rank 0 connects anew."""
    speak(heard, {"epoch": 0})
    assert heard.next() == {"epoch": 0}
    speak(heard, {"epoch": 1})
    assert heard.next() == {"epoch": 1}


LINE = json.dumps({"epoch": 666}).encode() + b"\n"
STRANGERS = {
    "a wrong token": b"guess\n" + LINE,
    "an empty token": b"\n" + LINE,
    "half a token": TOKEN[:3].encode() + b"\n" + LINE,
    "more than the token": TOKEN.encode() + b"x\n" + LINE,
    "no token": LINE + LINE,
    "a browser": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "not text": b"\xff\xfe\x00\n" + LINE,
    "a token that is not ASCII": "schlüssel\n".encode() + LINE,
    "a pickle": b"\x80\x04K\x01.\n",
    "a line without end": b"x" * (1 << 20),
    "a long line after the token": TOKEN.encode() + b"\n" + b"x" * (1 << 20),
    "garbage after the token": TOKEN.encode() + b"\n{nonsense\n" + LINE,
    "text that is not UTF-8 after the token": TOKEN.encode() + b"\n\xff\xfe\n" + LINE,
}


@pytest.mark.parametrize("data", STRANGERS.values(), ids=STRANGERS)
def test_what_is_not_ours_is_ignored_and_the_listener_lives_on(heard: Heard, data: bytes) -> None:
    heard.send(data)
    speak(heard, {"epoch": 0})
    assert heard.next() == {"epoch": 0} and heard.events.empty()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_json_deeper_than_pythons_stack_is_ignored_too(heard: Heard) -> None:
    heard.send(TOKEN.encode() + b"\n" + b"[" * 60_000 + b"\n")
    speak(heard, {"epoch": 0})
    assert heard.next() == {"epoch": 0}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_observer_that_raises_does_not_end_the_listening() -> None:
    """A progress bar in a closed notebook, say. The line is lost, the next run of the stage is heard."""
    told: queue.Queue[Any] = queue.Queue()

    def observer(event: Any) -> None:
        told.put(event)
        if event["epoch"] == 0:
            raise TypeError("no bar to draw on")

    with Listener(HOST, TOKEN, observer) as listener:
        for epoch in range(2):
            speaker = Speaker(listener.address)
            speaker({"epoch": epoch})
            speaker.close()
            assert told.get(timeout=WAIT) == {"epoch": epoch}


def test_a_silent_stranger_does_not_keep_the_speaker_out(heard: Heard) -> None:
    """A port scanner that connects and waits."""
    with socket.create_connection(heard.address[:2], timeout=WAIT):
        speak(heard, {"epoch": 0})
        try:
            assert heard.events.get(timeout=WAIT / 2) == {"epoch": 0}
        except queue.Empty:
            pytest.fail("the speaker was not heard while a stranger held a connection")


def test_a_long_line_of_ours_is_dropped_with_the_connection(heard: Heard) -> None:
    speak(heard, {"text": "x" * (1 << 18)})
    speak(heard, {"epoch": 1})
    assert heard.next() == {"epoch": 1}


def test_a_line_that_comes_in_pieces_is_one_line(heard: Heard) -> None:
    with socket.create_connection(heard.address[:2], timeout=WAIT) as peer:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in TOKEN.encode() + b"\n" + LINE:
            peer.send(bytes([byte]))
        assert heard.next() == {"epoch": 666}


def test_without_an_address_a_speaker_is_silent() -> None:
    speaker = Speaker(None)
    speaker({"epoch": 0})
    speaker.close()


def test_a_speaker_whose_listener_is_gone_is_silent_from_then_on() -> None:
    made = Heard()
    with made.listener:
        speaker = Speaker(made.address)
        speaker({"epoch": 0})
        assert made.next() == {"epoch": 0}
    for epoch in range(100):
        speaker({"epoch": epoch})  # must neither raise nor wait
    speaker.close()
    late = Speaker(made.address)
    late({"epoch": 0})
    late.close()


def test_the_listener_is_bound_to_its_own_host_and_leaves_no_thread() -> None:
    made = Heard()
    assert made.address[0] == HOST and made.address[2] == TOKEN
    with made.listener:
        assert any(thread.name == "bigdl_lite-live" for thread in threading.enumerate())
    assert not any(thread.name == "bigdl_lite-live" for thread in threading.enumerate())
    with pytest.raises(OSError):
        socket.create_connection(made.address[:2], timeout=1.0)
