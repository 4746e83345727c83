"""What ranks tell the driver over a loopback socket: ours arrives, anything else is ignored, and who is lost is noticed.

A stranger's connection is closed by the listener when it has been judged, which is what these tests wait for.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bigdl_lite.algorithms import State
from bigdl_lite.comm import door
from bigdl_lite.comm.block import Size
from bigdl_lite.comm.door import call
from bigdl_lite.comm.link import FACT, MOST, TENSOR, Link, exchange, header
from bigdl_lite.comm.window import Window
from bigdl_lite.engine import barrier, hall, live
from bigdl_lite.engine.cluster import Connect, cluster_of
from bigdl_lite.engine.keeper import Part, dump
from bigdl_lite.engine.live import Address, Listener, Speaker
from bigdl_lite.engine.recipe import Position, silent
from bigdl_lite.errors import CheckpointError, PeerLost, RecipeError
from tests.engine.test_keeper import same

pytestmark = pytest.mark.timeout(30)

ROOT = Path(__file__).resolve().parents[2]
HOST, TOKEN, WAIT, NEVER = "127.0.0.1", "a 5ecret of this run", 20.0, 1000.0


class Heard:
    """What the observer was told, in order."""

    def __init__(self) -> None:
        self.events: queue.Queue[Any] = queue.Queue()
        self.listener = Listener(HOST, TOKEN, self.events.put)

    @property
    def address(self) -> Address:
        return self.listener.address

    @property
    def port(self) -> tuple[str, int]:
        return self.address.host, self.address.port

    def next(self) -> Any:
        return self.events.get(timeout=WAIT)

    def send(self, data: bytes) -> None:
        """As a stranger would; returns when the listener has closed the connection."""
        with socket.create_connection(self.port, timeout=WAIT) as peer:
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


LINE = json.dumps({"epoch": 666}).encode()
STRANGERS = {
    "a wrong token": b"guess\n" + LINE,
    "the token in clear": TOKEN.encode() + b"\n" + LINE,
    "a line without a token": header(FACT, 0, len(LINE)) + LINE,
    "half a hello": b"BdLh" + bytes(10),
    "a hello, a proof of nothing, and a line": b"BdLh" + bytes(36 + 32) + header(FACT, 0, len(LINE)) + LINE,
    "a browser": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "not text": b"\xff\xfe\x00\n" + LINE,
    "a pickle": b"\x80\x04K\x01.\n",
    "a lot": b"x" * (1 << 20),
}


@pytest.mark.parametrize("data", STRANGERS.values(), ids=STRANGERS)
def test_what_is_not_ours_is_ignored_and_the_listener_lives_on(
    heard: Heard, data: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door, "_PATIENCE", 0.3)
    heard.send(data)
    speak(heard, {"epoch": 0})
    assert heard.next() == {"epoch": 0} and heard.events.empty()


NONSENSE = {
    "a long line": header(FACT, 0, MOST + 1) + b"x" * (MOST + 1),
    "garbage": b"{nonsense\n" * 10,
    "a line that is not JSON": header(FACT, 0, 9) + b"{nonsense",
    "text that is not UTF-8": header(FACT, 0, 2) + b"\xff\xfe",
    "JSON deeper than Python's stack": header(FACT, 0, 60_000) + b"[" * 60_000,
    "a line out of turn": header(FACT, 7, len(LINE)) + LINE,
}


def line(listener: Listener) -> Link:
    """As a speaker's, to say over it what no speaker says."""
    made = call(HOST, listener.address.port, TOKEN, "live", 0, WAIT, "the driver")
    made._socket.setblocking(True)
    return made


@pytest.mark.parametrize("data", NONSENSE.values(), ids=NONSENSE)
def test_nonsense_from_one_who_has_the_token_is_dropped_with_the_connection(heard: Heard, data: bytes) -> None:
    speaker = line(heard.listener)
    try:
        speaker._socket.sendall(data)
    except ConnectionError:  # closed while we were still sending
        pass
    with pytest.raises(PeerLost):
        speaker.hear(WAIT)
    speak(heard, {"epoch": 0})
    assert heard.next() == {"epoch": 0} and heard.events.empty()


def test_an_observer_that_raises_does_not_end_the_listening() -> None:
    """A progress bar in a closed notebook, say. It hears no more of this rank, the next run of the stage is heard."""
    told: queue.Queue[Any] = queue.Queue()

    def observer(event: Any) -> None:
        told.put(event)
        if event.get("epoch") == 0:
            raise TypeError("no bar to draw on")

    with Listener(HOST, TOKEN, observer) as listener:
        for epoch in range(2):
            speaker = Speaker(listener.address)
            speaker({"epoch": epoch})
            speaker({"note": epoch})
            speaker.close()
            assert told.get(timeout=WAIT) == {"epoch": epoch}
        assert told.get(timeout=WAIT) == {"note": 1}  # before the end, which may come before what is still on its way
    assert told.empty()


def test_a_silent_stranger_does_not_keep_the_speaker_out(heard: Heard) -> None:
    """A port scanner that connects and waits."""
    with socket.create_connection(heard.port, timeout=WAIT):
        speak(heard, {"epoch": 0})
        try:
            assert heard.events.get(timeout=WAIT / 2) == {"epoch": 0}
        except queue.Empty:
            pytest.fail("the speaker was not heard while a stranger held a connection")


def test_a_long_line_of_ours_is_dropped_alone(heard: Heard) -> None:
    speak(heard, {"text": "x" * MOST}, {"epoch": 1})
    assert heard.next() == {"epoch": 1}


def test_a_line_that_comes_in_pieces_is_one_line(heard: Heard) -> None:
    speaker = line(heard.listener)
    for byte in header(FACT, 0, len(LINE)) + LINE:
        speaker._socket.send(bytes([byte]))
    assert heard.next() == {"epoch": 666}
    speaker.close()


def test_without_an_address_a_speaker_is_silent() -> None:
    speaker = Speaker(None)
    speaker({"epoch": 0})
    assert not speaker.connected
    speaker.close()


def test_a_speaker_whose_listener_is_gone_is_silent_from_then_on() -> None:
    made = Heard()
    with made.listener:
        speaker = Speaker(made.address)
        speaker({"epoch": 0})
        assert made.next() == {"epoch": 0}
    for epoch in range(100):
        speaker({"note": epoch})  # must neither raise nor wait
    assert not speaker.connected
    speaker.close()
    late = Speaker(made.address)
    late({"epoch": 0})
    late.close()


def test_the_listener_is_bound_to_its_own_host_and_leaves_no_thread() -> None:
    made = Heard()
    assert made.address.host == HOST and made.address.token == TOKEN
    with made.listener:
        assert any(thread.name == "bigdl_lite-live" for thread in threading.enumerate())
    assert not any(thread.name == "bigdl_lite-live" for thread in threading.enumerate())
    with pytest.raises(OSError):
        socket.create_connection(made.port, timeout=1.0)


# ---- who is lost ----------------------------------------------------------------------------------------------------------


def until(condition: Callable[[], Any]) -> None:
    end, pause = time.monotonic() + WAIT, threading.Event()
    while not condition():
        assert time.monotonic() < end, "what had to come did not"
        pause.wait(2e-3)


class Driver:
    """A listener with its keeper and its list of losses. The keeper holds parts as they are, and is ready when the test says so."""

    def __init__(self, deadline: float = NEVER, observer: Any = silent, **settings: Any) -> None:
        self.parts: list[Part] = []
        self.saved = threading.Event()
        self.saved.set()
        self.losses: queue.Queue[str] = queue.Queue()
        self.listener = Listener(HOST, TOKEN, observer, self, deadline, self.losses.put, **settings)

    @property
    def kept(self) -> int:
        return self.parts[-1].now.step if self.parts else -1

    def ready(self, seconds: float) -> bool:
        return self.saved.wait(seconds)

    def __call__(self, part: Part) -> None:
        self.parts.append(part)

    def watched(self) -> dict[int, float]:
        """When each rank was heard last."""
        return dict(self.listener._heard.values())

    def __enter__(self) -> Driver:
        self.listener.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.listener.__exit__(*error)


def speaking(driver: Driver, rank: int, **settings: Any) -> Speaker:
    """A speaker that the driver has heard of."""
    speaker = Speaker(driver.listener.address, rank, **settings)
    until(lambda: rank in driver.watched())
    return speaker


def test_a_rank_that_says_goodbye_is_not_lost_and_one_that_does_not_is() -> None:
    with Driver() as driver:
        for polite in (True, False):
            speaker = speaking(driver, 3)
            assert speaker.connected
            if polite:
                speaker.close()
            else:
                speaker._link.close()
            until(lambda: not driver.watched())  # it was judged before it was let go
            assert driver.losses.qsize() == (not polite)
        assert "rank 3 is gone" in driver.losses.get()


@pytest.fixture
def rank_process() -> Iterator[Callable[[Driver, int], subprocess.Popen[str]]]:
    """Ranks as processes that do nothing but live."""
    started: list[subprocess.Popen[str]] = []

    def start(driver: Driver, rank: int) -> subprocess.Popen[str]:
        code = f"import sys; from bigdl_lite.engine.live import Address, Speaker; s = Speaker({driver.listener.address!r}, {rank})"
        command = [sys.executable, "-c", code + "; sys.stdin.read()"]
        started.append(subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, text=True))
        until(lambda: rank in driver.watched())
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_rank_that_is_killed_is_lost_long_before_the_deadline(rank_process: Any) -> None:
    with Driver(NEVER) as driver:
        os.kill(rank_process(driver, 2).pid, signal.SIGKILL)
        assert driver.losses.get(timeout=WAIT) == (
            "the process of rank 2 is gone, or cannot be reached any more; was it killed for memory?"
        )


@pytest.mark.slow
def test_a_rank_that_is_stopped_is_lost_at_the_deadline_and_one_that_only_has_nothing_to_say_is_not(rank_process: Any) -> None:
    with Driver(3.0) as driver:
        _, stopped = rank_process(driver, 0), rank_process(driver, 1)
        first = driver.watched()
        until(lambda: all(driver.watched()[r] > first[r] + 3.5 for r in range(2)))  # longer than the deadline
        assert driver.losses.empty()
        os.kill(stopped.pid, signal.SIGSTOP)
        assert "rank 1 gave no sign of life for 3 s" in driver.losses.get(timeout=WAIT)


def test_the_loss_is_told_once_whoever_else_goes() -> None:
    with Driver() as driver:
        speakers = [speaking(driver, rank) for rank in range(8)]
        for speaker in speakers:
            speaker._link.close()
        until(lambda: not driver.watched())
    assert driver.losses.qsize() == 1


def test_what_ends_with_the_listener_is_not_lost() -> None:
    with Driver() as driver:
        speaking(driver, 0)
    until(lambda: not driver.watched())
    assert driver.losses.empty()


# ---- parts of the state ---------------------------------------------------------------------------------------------------


def part(step: int = 1, save: bool = True, fill: float | None = None, n: int = 5) -> Part:
    """A part with tensors of many kinds and facts that JSON has no name for."""
    torch.manual_seed(step)
    kinds = [torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool]
    tensors = {f"optimizer/{i}/m": (torch.randn(3, 2) * 3).to(kind) for i, kind in enumerate(kinds)}
    tensors |= {"optimizer/none": torch.empty(0, 4), "optimizer/turned": torch.randn(4, 3).T, "optimizer/one": torch.tensor(-0.0)}
    facts = {
        "cut": (0, n), "betas": (0.9, (0.999, float("inf"))), "nothing": None, "nan": float("nan"), "lr": torch.tensor(0.1),
        "by number": {3: [1, -2.5], (1, 2): "é"}, "groups": [{"lr": 1e-300}],
    }  # fmt: skip
    weights = torch.randn(n) if fill is None else torch.full((n,), fill)
    sums = {"epoch": {}, "since": [0.0, 0], "loss": float("nan")}
    return Part(
        Position(step, 0, step), save, 0, (0, n), weights, State(tensors, facts), 1, torch.randn(3, dtype=torch.float64), sums,
        [{"step": 0, "loss": float("inf"), "lr": 0.1}], [4, 0], [[3, 2], []],
    )  # fmt: skip


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The addresses at which the driver looked."""
    seen: list[str] = []
    monkeypatch.setattr(live, "look", lambda address, really=live.look: (seen.append(address), really(address))[1])
    return seen


@pytest.mark.parametrize("windows", [True, False], ids=["by window", "by value"])
def test_a_part_arrives_to_the_bit(windows: bool, looks: list[str]) -> None:
    with Driver() as driver:
        speaker = speaking(driver, 0, windows=windows)
        for step in (1, 2, 3):
            speaker.give(part(step))
            assert len(driver.parts) == step and same(driver.parts[-1], part(step))
        assert len(looks) == (3 if windows else 0)
        speaker.close()
    assert same(driver.parts[1], part(2)) and same(driver.parts[2], part(3))  # also when the rank is gone


def test_a_driver_that_cannot_look_is_sent_the_bytes_and_not_asked_to_look_again(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(live, "look", asked.append)  # None: it sees nothing
    with Driver() as driver:
        speaker = speaking(driver, 0, windows=True)
        for step in (1, 2):
            speaker.give(part(step))
        speaker({"note": 1})  # the link is in step
        assert len(asked) == 1 and speaker.connected
        assert same(driver.parts[0], part(1)) and same(driver.parts[1], part(2))
        speaker.close()


def test_the_state_before_the_last_is_not_written_to_because_it_may_still_be_read() -> None:
    with Driver() as driver:
        speaker = speaking(driver, 0, windows=True)
        speaker.give(part(1, fill=1.0))
        speaker.give(part(2, fill=2.0))
        assert [found.weights.tolist() for found in driver.parts] == [[1.0] * 5, [2.0] * 5]
        speaker.give(part(3, fill=3.0))  # the control: these are views, not copies
        assert [found.weights[0].item() for found in driver.parts] == [3.0, 2.0, 3.0]
        speaker.give(part(4, fill=4.0, n=10_000))  # larger than its window: in a new one
        assert [found.weights[0].item() for found in driver.parts] == [3.0, 2.0, 3.0, 4.0]
        speaker.close()
        assert same(driver.parts[3], part(4, fill=4.0, n=10_000))  # as long as the driver looks


def test_the_last_whole_state_is_not_written_to_however_many_later_ones_are_not_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where another rank cannot bring its parts, the fit goes on from an old state after a loss, and not from a mixture."""
    monkeypatch.setattr(Driver, "kept", 1)
    with Driver() as driver:
        speaker = speaking(driver, 0, windows=True)
        for step in (1, 2, 3, 4):
            speaker.give(part(step, fill=float(step)))
        assert [found.weights[0].item() for found in driver.parts] == [1.0, 4.0, 4.0, 4.0]  # all others in the other window
        speaker.close()


def test_a_rank_waits_for_a_save_that_takes_longer_than_the_deadline() -> None:
    with Driver(2.0) as driver:
        speaker = speaking(driver, 0, windows=True)
        driver.saved.clear()
        threading.Timer(3.0, driver.saved.set).start()
        speaker.give(part())
        assert same(driver.parts[0], part()) and driver.losses.empty()
        speaker.close()


def announce(driver: Driver, data: bytes, nbytes: int | None = None, address: str = "", tag: int = 1) -> tuple[Link, Any]:
    """As rank 0, by hand: what comes of a part of these bytes."""
    rank = line(driver.listener)
    rank._socket.setblocking(False)
    rank.tell({"alive": 0}, WAIT)
    rank.tell({"state": len(data) if nbytes is None else nbytes, "address": address, "tag": tag}, WAIT)
    answer = rank.hear(WAIT)
    if "blind" in answer:
        rank.send(TENSOR, tag, data)
        exchange([rank], WAIT)
        answer = rank.hear(WAIT)
    return rank, answer


def good(step: int = 1) -> bytes:
    return b"".join(bytes(piece) for piece in dump(part(step))[1])


def test_while_a_save_is_under_way_the_driver_says_so() -> None:
    with Driver(0.4) as driver:
        driver.saved.clear()
        rank, answer = announce(driver, good())
        assert answer == {"wait": True} and rank.hear(WAIT) == {"wait": True} and not driver.parts
        driver.saved.set()
        while "wait" in (answer := rank.hear(WAIT)):
            pass
        assert answer == {"ok": True} and same(driver.parts[0], part())
        rank.tell({"bye": 0}, WAIT)
        rank.close()


def test_a_part_of_a_stage_that_has_ended_is_not_taken() -> None:
    """It waited for a save, and would mix with the parts of the next run of the stage."""
    driver = Driver()
    with driver:
        driver.saved.clear()
        driver.ready = lambda seconds: driver.saved.wait(WAIT)
        rank = line(driver.listener)
        rank._socket.setblocking(False)
        window = Window(len(good()))
        window.values(torch.uint8, window.nbytes).copy_(torch.frombuffer(bytearray(good()), dtype=torch.uint8))
        for state in ({"note": 1}, {"state": window.nbytes, "address": window.address, "tag": 1}):
            rank.tell(state, WAIT)
        ending = threading.Thread(target=driver.listener.__exit__, args=(None, None, None))
        ending.start()
        with pytest.raises(PeerLost):
            rank.hear(WAIT)
        driver.saved.set()
        ending.join()
    until(lambda: not driver.listener._heard)
    assert not driver.parts


@pytest.mark.parametrize("save", [True, False], ids=["checkpoint", "only to be kept"])
@pytest.mark.parametrize("how", ["no address", "nobody listens", "refused", "no memory", "a state that no checkpoint holds"])
def test_a_part_that_cannot_be_brought_is_an_error_where_a_checkpoint_is_due(
    monkeypatch: pytest.MonkeyPatch, how: str, save: bool
) -> None:
    said = {
        "no address": r"of the checkpoint of step 1 to the driver at an address that this run does not have: there is no connection",
        "nobody listens": rf"rank 0 cannot bring its part .* to the driver at {HOST}:\d+: .*or take engine='shuffle'",
        "refused": "at most 100 are taken", "no memory": "beside the training: 7 are free",
        "a state that no checkpoint holds": "complex64",
    }[how]  # fmt: skip
    tensors = {"optimizer/z": torch.zeros(1, dtype=torch.complex64)} if "state" in how else {}
    given = replace(part(save=save), state=State(tensors, {}))
    with Driver(most=100 if how == "refused" else 1 << 36) as driver:
        speaker = Speaker(None) if how == "no address" else speaking(driver, 0, windows=how == "no memory")
        if how == "nobody listens":
            driver.listener.__exit__(None, None, None)
        if how == "no memory":
            monkeypatch.setattr(live, "available", lambda: 7)
        if save:
            with pytest.raises(CheckpointError, match=said):
                speaker.give(given)
        else:
            speaker.give(given)
        assert not driver.parts and driver.losses.empty()
        assert speaker.connected == (how in ("refused", "no memory", "a state that no checkpoint holds"))
        speaker.close()


GARBAGE = {
    "zeros": bytes(64), "text": b"x" * 64, "one byte": b"\x01", "half a part": good()[: len(good()) // 2],
    "JSON": b"\x02" + bytes(7) + b"{}",
}  # fmt: skip


@pytest.mark.parametrize("data", GARBAGE.values(), ids=GARBAGE)
@pytest.mark.parametrize("windows", [True, False], ids=["by window", "by value"])
def test_what_is_no_part_is_refused_by_name_and_the_next_one_is_taken(
    caplog: pytest.LogCaptureFixture, data: bytes, windows: bool
) -> None:
    window = Window(len(data))
    window.values(torch.uint8, len(data)).copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    with Driver() as driver, caplog.at_level(logging.WARNING, "bigdl_lite"):
        rank, answer = announce(driver, data, address=window.address if windows else "")
        assert "bytes are no part of a state" in answer["refused"] and "refused: WireError" in caplog.text
        other, answer = announce(driver, good())
        assert answer == {"ok": True} and same(driver.parts[0], part()) and driver.losses.empty()
        for link in (rank, other):
            link.tell({"bye": 0}, WAIT)
            link.close()


@pytest.mark.parametrize("nbytes", [0, -1, 1 << 40, 1 << 70])
def test_no_memory_is_taken_for_a_part_that_only_says_to_be_large(nbytes: int) -> None:
    with Driver() as driver:
        rank, answer = announce(driver, b"", nbytes)
        assert answer == {"refused": f"a part of the state of {nbytes} bytes; at most {1 << 36} are taken"}
        rank.tell({"bye": 0}, WAIT)
        rank.close()


@pytest.mark.parametrize("less", [0, 1])
def test_a_part_of_just_the_largest_size_is_taken_and_one_byte_more_is_not(less: int) -> None:
    with Driver(most=len(good()) - less) as driver:
        rank, answer = announce(driver, good())
        assert set(answer) == {"refused" if less else "ok"} and len(driver.parts) == 1 - less
        rank.tell({"bye": 0}, WAIT)
        rank.close()


@pytest.mark.parametrize(
    "event", [{"state": 64, "address": 7, "tag": 1}, {"state": "64", "address": "", "tag": 1}, {"state": 64}, [1], 7], ids=str
)
def test_nonsense_about_a_part_ends_the_connection_and_not_the_listener(event: Any) -> None:
    with Driver() as driver:
        rank = line(driver.listener)
        rank._socket.setblocking(False)
        rank.tell(event, WAIT)
        with pytest.raises(PeerLost):
            rank.hear(WAIT)
        assert announce(driver, good())[1] == {"ok": True}


def test_a_rank_that_falls_silent_in_the_middle_of_its_part_is_lost() -> None:
    with Driver(0.5) as driver:
        rank = line(driver.listener)
        rank._socket.setblocking(False)
        rank.tell({"alive": 4}, WAIT)
        rank.tell({"state": 1000, "address": "", "tag": 1}, WAIT)
        assert rank.hear(WAIT) == {"blind": True}
        assert "rank 4 fell silent while it brought its part" in driver.losses.get(timeout=WAIT)


def test_a_rank_that_falls_silent_after_its_part_is_lost() -> None:
    """While the driver works for a rank, its silence does not count; afterwards it does."""
    with Driver(0.5) as driver:
        _, answer = announce(driver, good())
        assert "rank 0 gave no sign of life" in driver.losses.get(timeout=WAIT)
        assert answer == {"ok": True}


def test_a_rank_keeps_its_connection_where_the_observer_fails(caplog: pytest.LogCaptureFixture) -> None:
    """A checkpoint must not depend on a progress bar."""
    with Driver(observer=lambda event: 1 / 0) as driver, caplog.at_level(logging.WARNING, "bigdl_lite"):
        speaker = speaking(driver, 0)
        for epoch in range(3):
            speaker({"note": epoch})
        speaker.give(part())
        assert same(driver.parts[0], part()) and caplog.text.count("the observer failed") == 1
        speaker.close()


# ---- which channels the barrier engine opens ------------------------------------------------------------------------------


@pytest.mark.parametrize(("host", "port"), [("192.0.2.1", False), (HOST, True)], ids=["not here", "here"])
def test_a_rank_whose_address_is_not_its_machines_may_still_share_memory(
    monkeypatch: pytest.MonkeyPatch, host: str, port: bool
) -> None:
    """Behind a translated address nothing can listen; that is no error before somebody has to call."""
    monkeypatch.setattr(hall, "block_size", lambda recipe, q: Size(1, q, q, 6, 0))
    alone = SimpleNamespace(
        partitionId=lambda: 0, getTaskInfos=lambda: [SimpleNamespace(address=f"{host}:1")], resources=dict, allGather=lambda x: [x]
    )
    recipe = SimpleNamespace(run="r", num_workers=1, deadline=1.0, apart=False, device="cpu", round=SimpleNamespace(exchange=None))
    met = hall.Hall(alone, recipe, True, TOKEN)
    told = met.gather(Speaker(None), None, None)
    assert len(told) == 1 and bool(told[0]["port"]) == port
    if not port:
        elsewhere = [*told, told[0] | {"mail": ""}]
        with pytest.raises(RecipeError, match="nothing can listen on '192"):
            met.enter(elsewhere)
    assert met.enter(told).place.nodes == ((0,),)
    met.leave()


def application(master: str, **conf: str) -> Any:
    settings = {name.replace("_", "."): value for name, value in conf.items()}
    context = SimpleNamespace(master=master, applicationId="app", getConf=lambda: settings)
    return cluster_of(SimpleNamespace(sparkContext=context, _jsparkSession=None))


ENCRYPTED = {"spark_network_crypto_enabled": "true"}


@pytest.mark.parametrize("master", ["spark://host:7077", "yarn", "k8s://https://host", "local-cluster[2,1,1024]"])
def test_ranks_of_a_cluster_do_not_speak_in_clear_past_encryption_unless_that_is_allowed(master: str) -> None:
    with pytest.raises(RecipeError, match=r"engine='shuffle', or allow it with engine=BarrierEngine\(allow_clear=True\)"):
        barrier._may_speak_in_clear(application(master, **ENCRYPTED), False)
    assert barrier._may_speak_in_clear(application(master, **ENCRYPTED), True)
    assert barrier._may_speak_in_clear(application(master), False)  # the control: nothing was to be encrypted


def test_on_one_machine_ranks_train_without_live_lines() -> None:
    assert not barrier._may_speak_in_clear(application("local[4]", **ENCRYPTED), False)
    at, keeper = application("local[4]", spark_driver_host=HOST), SimpleNamespace(checkpoints=None)
    with barrier._listen(at, silent, None, 20.0, silent, 1) as listener:
        assert listener is None
    with barrier._listen(at, silent, keeper, 20.0, silent, 1) as listener:  # the control
        assert listener.address.host == HOST and listener.address.deadline == 20.0


def test_a_driver_without_an_address_is_an_error_only_for_checkpoints() -> None:
    at = application("local[4]", spark_driver_host="192.0.2.1")
    with barrier._listen(at, silent, SimpleNamespace(checkpoints=None), 20.0, silent, 1) as listener:
        assert listener is None
    needed = SimpleNamespace(checkpoints=object())
    with pytest.raises(RecipeError, match=r"cannot listen on 192.0.2.1 .*engine='shuffle', or set spark.driver.host to an address"):
        barrier._listen(at, silent, needed, 20.0, silent, 1)
    unknown = SimpleNamespace(client=SimpleNamespace(host="no.such.name.invalid"), session_id="s", conf={})
    server = Connect(unknown)
    with pytest.raises(OSError):  # behind a proxy, only that knows the name
        server.host()
    with barrier._listen(server, silent, SimpleNamespace(checkpoints=None), 20.0, silent, 1) as listener:
        assert listener is None
    with pytest.raises(RecipeError, match=r"cannot listen on any address .*; fit without checkpointDir$"):
        barrier._listen(server, silent, needed, 20.0, silent, 1)
