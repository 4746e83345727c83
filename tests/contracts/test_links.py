"""Links between ranks: who gets in, what is refused before memory is touched, and how every wait ends.

Strangers are plain sockets. A stranger has been judged when the door closes its connection, which is what tests wait for.
"""

from __future__ import annotations

import random
import socket
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from bigdl_lite.comm import door as door_module
from bigdl_lite.comm import group as group_module
from bigdl_lite.comm.door import Door, Service, call
from bigdl_lite.comm.group import Group, Store
from bigdl_lite.comm.link import FACT, HEADER_BYTES, MOST, TENSOR, Link, check, exchange, header
from bigdl_lite.errors import BigDLError, MeetingTimeout, PeerLost, RecipeError, WireError

pytestmark = pytest.mark.timeout(60)

HOST, TOKEN, DEADLINE = "127.0.0.1", "0123456789abcdef" * 4, 40.0
ROOT = Path(__file__).resolve().parents[2]


class Hall:
    """A door that keeps whom it let in."""

    def __init__(self, token: Any = TOKEN, label: str = "test") -> None:
        self.links: list[Link] = []
        self._came = threading.Condition()
        self.door = Door(HOST, token, label, self._welcome)

    def _welcome(self, link: Link, rank: int) -> None:
        with self._came:
            self.links.append(link)
            self._came.notify_all()

    def wait(self, count: int) -> list[Link]:
        with self._came:
            assert self._came.wait_for(lambda: len(self.links) >= count, DEADLINE)
        return self.links

    def call(self, token: Any = TOKEN, label: str = "test", deadline: float = DEADLINE) -> Link:
        return call(HOST, self.door.port, token, label, 1, deadline, "the hall")

    def close(self) -> None:
        self.door.close()
        for link in self.links:
            link.close()


@pytest.fixture
def hall() -> Iterator[Hall]:
    made = Hall()
    yield made
    made.close()


@pytest.fixture
def pair(hall: Hall) -> Iterator[tuple[Link, Link]]:
    """Both ends of a link."""
    caller = hall.call()
    yield caller, hall.wait(1)[0]
    caller.close()


@pytest.fixture
def brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strangers are judged within a moment."""
    monkeypatch.setattr(door_module, "_PATIENCE", 0.3)


def stranger(port: int, data: bytes) -> None:
    """Says something and returns when it has been shown out."""
    with socket.create_connection((HOST, port), timeout=DEADLINE) as peer:
        try:
            peer.sendall(data)
            while peer.recv(1024):
                pass
        except ConnectionError:
            pass


def both(*acts: Callable[[], Any]) -> list[Any]:
    """What each returns when all run at once; an error of ours counts as an answer."""

    def run(act: Callable[[], Any]) -> Any:
        try:
            return act()
        except BigDLError as error:
            return error

    with ThreadPoolExecutor(len(acts)) as pool:
        return list(pool.map(run, acts))


# ---- who gets in ----------------------------------------------------------------------------------------------------------


def test_who_has_the_token_gets_in_and_both_ends_can_speak(pair: tuple[Link, Link]) -> None:
    caller, listener = pair
    caller.tell({"a": [1, None, "é"]}, DEADLINE)
    assert listener.hear(DEADLINE) == {"a": [1, None, "é"]}
    listener.tell("back", DEADLINE)
    assert caller.hear(DEADLINE) == "back"


@pytest.mark.parametrize(
    ("token", "label"),
    [(TOKEN[:-1] + "0", "test"), (TOKEN.upper(), "test"), (TOKEN + "0", "test"), (TOKEN, "tests"), (b"\0" * 32, "test")],
    ids=["last letter", "case", "longer", "label", "zeros"],
)
def test_who_has_another_token_or_purpose_is_refused_and_the_next_one_is_not(hall: Hall, token: Any, label: str) -> None:
    with pytest.raises(WireError, match="does not have the token of this run"):
        hall.call(token, label)
    assert not hall.links
    hall.call().close()  # the control: the right ones open the same door
    assert len(hall.wait(1)) == 1


def test_a_caller_that_only_pretends_is_shown_out_by_the_listener(hall: Hall, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not look at the listener's proof, and sends one of its own making: the listener decides for itself."""
    monkeypatch.setattr(door_module.hmac, "compare_digest", lambda a, b: True)
    hall.call(TOKEN[::-1]).close()  # the control: with nothing compared, everyone gets in
    assert len(hall.wait(1)) == 1
    monkeypatch.undo()
    hello = door_module._HELLO.pack(door_module._MAGIC, 1, bytes(32))
    with socket.create_connection((HOST, hall.door.port), timeout=DEADLINE) as peer:
        peer.sendall(hello)
        assert len(peer.recv(64, socket.MSG_WAITALL)) == 64
        peer.sendall(door_module._proof(TOKEN[::-1].encode(), b"caller", 1, bytes(32), bytes(32), b"test"))
        assert peer.recv(1) == b""
    assert len(hall.links) == 1


def test_the_token_does_not_cross_the_wire_and_what_does_is_good_for_one_time(hall: Hall) -> None:
    heard = {"up": b"", "down": b""}
    relay = socket.create_server((HOST, 0))

    def carry(source: socket.socket, to: socket.socket, way: str) -> None:
        while data := source.recv(1024):
            heard[way] += data
            to.sendall(data)

    def serve() -> None:
        near, _ = relay.accept()
        far = socket.create_connection((HOST, hall.door.port))
        threading.Thread(target=carry, args=(far, near, "down"), daemon=True).start()
        carry(near, far, "up")

    threading.Thread(target=serve, daemon=True).start()
    caller = call(HOST, relay.getsockname()[1], TOKEN, "test", 1, DEADLINE, "the relay")
    assert len(hall.wait(1)) == 1  # the control: what was heard did open the door
    caller.close()
    relay.close()
    assert len(heard["up"]) == 40 + 32 and len(heard["down"]) == 64 + 1
    for said in heard.values():
        assert TOKEN.encode() not in said and bytes.fromhex(TOKEN) not in said
    stranger(hall.door.port, heard["up"])
    assert len(hall.links) == 1


def test_the_listeners_own_proof_opens_nothing_when_it_is_given_back(hall: Hall) -> None:
    with socket.create_connection((HOST, hall.door.port), timeout=DEADLINE) as peer:
        peer.sendall(door_module._HELLO.pack(door_module._MAGIC, 1, bytes(32)))
        peer.sendall(peer.recv(64, socket.MSG_WAITALL)[32:])
        assert peer.recv(1) == b"" and not hall.links


@pytest.mark.parametrize("token", ["", b"", "short", b"fifteen bytes.."])
def test_a_token_that_protects_nothing_is_refused(token: Any) -> None:
    with pytest.raises(RecipeError, match="protects nothing"):
        Door(HOST, token, "test", lambda link, rank: None)


STRANGERS = {
    "nothing": b"",
    "one byte": b"B",
    "half a hello": b"BdLh" + bytes(10),
    "a hello, and no proof": b"BdLh" + bytes(36),
    "a hello, and a wrong proof": b"BdLh" + bytes(36 + 32),
    "the token itself": TOKEN.encode(),
    "garbage": random.Random(0).randbytes(10_000_000),
    "a message of 2^62 bytes": header(FACT, 0, 1 << 62),
    "a browser": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "a pickle": b"\x80\x04K\x01.",
}


@pytest.mark.usefixtures("brisk")
@pytest.mark.parametrize("data", STRANGERS.values(), ids=STRANGERS)
def test_strangers_are_shown_out_and_make_nobody_allocate(hall: Hall, data: bytes) -> None:
    tracemalloc.start()
    try:
        stranger(hall.door.port, data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20 and not hall.links
    hall.call().close()
    assert len(hall.wait(1)) == 1


def test_strangers_who_say_nothing_keep_nobody_out(hall: Hall) -> None:
    silent = [socket.create_connection((HOST, hall.door.port)) for _ in range(20)]
    hall.call().close()
    assert len(hall.wait(1)) == 1
    for peer in silent:
        peer.close()


def test_they_would_if_one_were_judged_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of the test above."""
    monkeypatch.setattr(door_module, "_AT_ONCE", 1)
    slow = Hall()
    silent = socket.create_connection((HOST, slow.door.port))
    with pytest.raises(MeetingTimeout, match=r"the hall at 127.0.0.1:\d+ let nobody in within 0 s"):
        slow.call(deadline=0.5)
    silent.close()
    slow.close()


def test_strangers_disturb_no_group_that_meets(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the store as at every member's door, before the members come and while they meet."""
    visited: list[str] = []
    silent: list[socket.socket] = []

    def haunted(host: str, token: Any, label: str, welcome: Any) -> Door:
        made = Door(host, token, label, welcome)
        silent.append(socket.create_connection((HOST, made.port)))
        stranger(made.port, STRANGERS["a hello, and a wrong proof"])
        visited.append(label)
        return made

    monkeypatch.setattr(group_module, "Door", haunted)
    hall = Store(HOST, 0, True, DEADLINE, TOKEN)
    silent.append(socket.create_connection((HOST, hall.port)))
    stranger(hall.port, STRANGERS["garbage"])

    def member(rank: int) -> list[float]:
        store = hall if rank == 0 else Store(HOST, hall.port, False, DEADLINE, TOKEN)
        group = Group(store, "g", rank, 3, HOST)
        found = group.all_reduce(torch.tensor([1.0, rank])).tolist()
        group.close()
        return found

    assert both(*(lambda r=r: member(r) for r in range(3))) == [[3.0, 3.0]] * 3
    assert sorted(visited) == ["g/0", "g/1", "g/2"]
    for peer in silent:
        peer.close()
    hall.close()


def test_members_with_another_token_do_not_meet() -> None:
    hall = Store(HOST, 0, True, DEADLINE, TOKEN)
    with pytest.raises(WireError, match=r"the store at 127\.0\.0\.1"):
        Store(HOST, hall.port, False, DEADLINE, TOKEN[::-1])
    Store(HOST, hall.port, False, DEADLINE, TOKEN).put("a", b"1")  # the control
    assert hall.get("a") == b"1"
    hall.close()


def test_a_closed_door_is_closed_at_once_and_leaves_no_thread() -> None:
    hall = Hall()
    silent = socket.create_connection((HOST, hall.door.port))
    link = hall.call()
    hall.wait(1)
    hall.door.close()
    assert silent.recv(1) == b""
    assert not any(thread.name == "bigdl_lite-door" for thread in threading.enumerate())
    with pytest.raises(PeerLost, match=r"the hall at .* cannot be reached"):
        hall.call()
    link.tell("still here", DEADLINE)  # who was let in stays
    assert hall.links[0].hear(DEADLINE) == "still here"
    hall.close()


def test_a_service_hangs_up_on_its_visitors_when_it_closes() -> None:
    served = Service(HOST, TOKEN, "test", lambda link: link.tell(link.hear(None), DEADLINE))
    link = call(HOST, served.port, TOKEN, "test", 0, DEADLINE, "the service")
    served.close()
    with pytest.raises(PeerLost):
        link.hear(DEADLINE)
    assert not any(thread.name == "bigdl_lite-door" for thread in threading.enumerate())


# ---- where it listens -----------------------------------------------------------------------------------------------------


def listeners() -> dict[int, str]:
    """port -> address, as the kernel prints it, of all that listens on this machine."""
    found = {}
    for table in ("tcp", "tcp6"):
        path = Path("/proc/net", table)
        for line in path.read_text().splitlines()[1:] if path.exists() else []:
            _, local, _, state, *_ = line.split()
            if state == "0A":
                address, port = local.split(":")
                found[int(port, 16)] = address
    return found


LOOPBACK, ANY = "0100007F", "00000000"


def test_nothing_listens_on_all_interfaces(monkeypatch: pytest.MonkeyPatch) -> None:
    doors: list[Door] = []
    during: dict[int, str] = {}

    def kept(*args: Any) -> Door:
        doors.append(Door(*args))
        return doors[-1]

    def watched(*args: Any) -> Link:
        during.update(listeners())
        return call(*args)

    monkeypatch.setattr(group_module, "Door", kept)
    monkeypatch.setattr(group_module, "call", watched)
    hall = Store(HOST, 0, True, DEADLINE, TOKEN)

    def member(rank: int) -> Group:
        return Group(hall if rank == 0 else Store(HOST, hall.port, False, DEADLINE, TOKEN), "g", rank, 2, HOST)

    for group in both(lambda: member(0), lambda: member(1)):
        assert isinstance(group, Group)
        group.close()
    assert len(doors) == 2 and [during[at.port] for at in (hall, *doors)] == [LOOPBACK] * 3
    assert not {made.port for made in doors} & listeners().keys()  # they have met: their doors are gone
    hall.close()
    assert hall.port not in listeners()


def test_the_reader_sees_who_does_listen_on_all_interfaces() -> None:
    """Negative control of the test above."""
    with socket.create_server(("", 0)) as open_to_all:
        assert listeners()[open_to_all.getsockname()[1]] == ANY


@pytest.mark.parametrize("host", ["", "0.0.0.0", "::", "192.0.2.1"])
def test_an_address_that_is_all_or_another_machines_is_refused_with_the_way_out(host: str) -> None:
    with pytest.raises(RecipeError, match=r"nothing can listen on .*SPARK_LOCAL_IP"):
        Store(host, 0, True, 0.5, TOKEN)
    hall = Store(HOST, 0, True, 0.5, TOKEN)
    with pytest.raises(RecipeError, match=r"nothing can listen on .*SPARK_LOCAL_IP"):
        Group(hall, "g", 0, 2, host)
    hall.close()


def test_the_store_that_nccl_meets_in_listens_on_one_address_too(monkeypatch: pytest.MonkeyPatch) -> None:
    class Nccl:
        class Options:
            pass

        def __init__(self, store: Any, rank: int, size: int, options: Any) -> None:
            store.set(f"from {rank}", b"here")
            assert store.get(f"from {1 - rank}") == b"here"
            self.store = store  # as NCCL does: the server must outlive the other's question

    monkeypatch.setattr(group_module.dist, "ProcessGroupNCCL", Nccl, raising=False)
    hall = Store(HOST, 0, True, DEADLINE, TOKEN)
    before = listeners()

    def member(rank: int) -> Group:
        store = hall if rank == 0 else Store(HOST, hall.port, False, DEADLINE, TOKEN)
        return Group(store, "rail", rank, 2, HOST, torch.device("cuda", 0))

    groups = both(lambda: member(0), lambda: member(1))
    assert all(isinstance(group, Group) for group in groups), groups
    new = {port: address for port, address in listeners().items() if port not in before}
    assert LOOPBACK in new.values() and ANY not in new.values() and "0" * 32 not in new.values(), new
    for group in groups:
        group.close()
    hall.close()


# ---- messages -------------------------------------------------------------------------------------------------------------


def raw(link: Link, data: bytes) -> None:
    """Bytes as they are, past all that a link would check."""
    link._socket.setblocking(True)
    link._socket.sendall(data)


def into(link: Link, tag: int, nbytes: int) -> bytes:
    room = memoryview(bytearray(nbytes))
    link.receive(tag, room)
    exchange([link], DEADLINE)
    return bytes(room)


def test_a_message_that_is_as_expected_fills_its_memory(pair: tuple[Link, Link]) -> None:
    """The control of the tests that follow."""
    caller, listener = pair
    raw(caller, header(TENSOR, 7, 5) + b"12345")
    assert into(listener, 7, 5) == b"12345"


WRONG = {
    "too long": (header(TENSOR, 7, 6) + b"123456", "6 bytes came, 5 were expected"),
    "too short": (header(TENSOR, 7, 4) + b"1234", "4 bytes came, 5 were expected"),
    "huge": (header(TENSOR, 7, (1 << 64) - 1) + b"12345", "18446744073709551615 bytes came, 5 were expected"),
    "another tag": (header(TENSOR, 8, 5) + b"12345", "tag 8 came, kind 2 and tag 7 was expected"),
    "another kind": (header(FACT, 7, 5) + b"12345", "kind 1 and tag 7 came"),
    "no header": (b"x" * 50, "not a message: starts with b'xxxx'"),
}


@pytest.mark.parametrize(("data", "said"), WRONG.values(), ids=WRONG)
def test_a_message_that_is_not_as_expected_is_refused_before_memory_is_touched(pair: Any, data: bytes, said: str) -> None:
    caller, listener = pair
    raw(caller, data)
    room = bytearray(b"-----")
    listener.receive(7, memoryview(room))
    with pytest.raises(WireError, match=said):
        exchange([listener], DEADLINE)
    assert room == b"-----"
    with pytest.raises(PeerLost):  # and both ends know
        caller.hear(DEADLINE)
    with pytest.raises(PeerLost):
        listener.hear(DEADLINE)


@pytest.mark.parametrize("length", [MOST + 1, 1 << 40, (1 << 64) - 1])
def test_a_fact_that_is_too_long_is_refused_without_room_for_it(pair: tuple[Link, Link], length: int) -> None:
    caller, listener = pair
    raw(caller, header(FACT, 0, length) + b"x" * 1000)
    tracemalloc.start()
    try:
        with pytest.raises(WireError, match=f"{length} bytes came, 0 to {MOST} were expected"):
            listener.hear(DEADLINE)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 18


def test_the_longest_fact_arrives_and_a_longer_one_is_not_sent(pair: tuple[Link, Link]) -> None:
    caller, listener = pair
    text = "x" * (MOST - 2)
    assert both(lambda: caller.tell(text, DEADLINE), lambda: listener.hear(DEADLINE))[1] == text
    with pytest.raises(WireError, match=f"a fact of {MOST + 1} bytes"):
        caller.tell(text + "x", DEADLINE)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"\x80\x04K\x01."], ids=lambda x: str(x[:5]))
def test_a_fact_that_is_not_json_is_refused(pair: tuple[Link, Link], data: bytes) -> None:
    caller, listener = pair
    raw(caller, header(FACT, 0, len(data)) + data)
    with pytest.raises(WireError, match="is not JSON"):
        listener.hear(DEADLINE)


def test_a_message_may_come_byte_by_byte_and_several_at_once(pair: tuple[Link, Link]) -> None:
    caller, listener = pair
    message = header(TENSOR, 7, 5) + b"12345"
    got = ThreadPoolExecutor(1).submit(into, listener, 7, 5)
    for byte in message:
        raw(caller, bytes([byte]))
    assert got.result(DEADLINE) == b"12345"
    raw(caller, (header(TENSOR, 8, 1) + b"x") * 3)
    assert [into(listener, 8, 1) for _ in range(3)] == [b"x"] * 3


def test_peers_that_send_a_lot_to_each_other_at_once_do_not_wait_for_each_other(pair: tuple[Link, Link]) -> None:
    n = 1 << 26
    payload, rooms = bytes(range(256)) * (n // 256), [bytearray(n), bytearray(n)]

    def act(link: Link, room: bytearray) -> None:
        link.send(TENSOR, 0, payload)
        link.receive(0, memoryview(room))
        exchange([link], DEADLINE)

    assert both(lambda: act(pair[0], rooms[0]), lambda: act(pair[1], rooms[1])) == [None, None]
    assert rooms == [payload, payload]


def test_they_would_if_they_sent_first_and_read_then(pair: tuple[Link, Link]) -> None:
    """Negative control of the test above."""

    def act(link: Link) -> None:
        link.send(TENSOR, 0, bytes(1 << 26))
        exchange([link], 0.5)

    found = both(lambda: act(pair[0]), lambda: act(pair[1]))
    assert any(isinstance(x, MeetingTimeout) for x in found) and all(isinstance(x, MeetingTimeout | PeerLost) for x in found)


def test_what_was_told_before_the_end_still_arrives(pair: tuple[Link, Link]) -> None:
    caller, listener = pair
    caller.tell("last words", DEADLINE)
    caller.close()
    assert listener.hear(DEADLINE) == "last words"
    with pytest.raises(PeerLost, match="rank 1 closed the connection"):
        listener.hear(DEADLINE)


# ---- how waits end --------------------------------------------------------------------------------------------------------

PEER = """
import sys
from bigdl_lite.comm.door import call
from bigdl_lite.comm.link import TENSOR, header
link = call("127.0.0.1", int(sys.argv[1]), sys.argv[2], "test", 1, 30.0, "the hall")
link._socket.sendall(header(TENSOR, 0, 100) + bytes(int(sys.argv[3])))
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def process(hall: Hall) -> Iterator[Callable[[int], subprocess.Popen[str]]]:
    """A peer in a process of its own, which sends so many of 100 bytes and then nothing, but lives."""
    started: list[subprocess.Popen[str]] = []

    def start(nbytes: int) -> subprocess.Popen[str]:
        arguments = [sys.executable, "-c", PEER, str(hall.door.port), TOKEN, str(nbytes)]
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(arguments, cwd=ROOT, stdin=pipe, stdout=pipe, text=True))
        assert started[-1].stdout is not None and started[-1].stdout.readline() == "ready\n"
        return started[-1]

    yield start
    for peer in started:
        peer.kill()
        peer.communicate()


@pytest.mark.parametrize("nbytes", [0, 40])
def test_a_peer_that_is_killed_is_lost_at_once(hall: Hall, process: Any, nbytes: int) -> None:
    """Long before the deadline, which the test itself would not live to see."""
    peer = process(nbytes)
    link = hall.wait(1)[0]
    link.receive(0, memoryview(bytearray(100)))
    waiting = ThreadPoolExecutor(1).submit(exchange, [link], 1000.0)
    peer.kill()
    with pytest.raises(PeerLost, match="rank 1"):
        waiting.result(DEADLINE)


def test_a_peer_that_lives_and_is_silent_is_an_error_at_the_deadline(hall: Hall, process: Any) -> None:
    process(40)
    link = hall.wait(1)[0]
    link.receive(0, memoryview(bytearray(100)))
    with pytest.raises(MeetingTimeout, match="no byte moved for 0 s; waiting for rank 1"):
        exchange([link], 0.4)


def test_a_store_that_is_asked_for_what_nobody_tells_answers_at_the_deadline() -> None:
    hall = Store(HOST, 0, True, DEADLINE, TOKEN)
    store = Store(HOST, hall.port, False, 0.3, TOKEN)
    with pytest.raises(MeetingTimeout, match=r"nobody told 'b' to the store at 127.0.0.1:\d+ in 0 s"):
        store.get("b")
    hall.close()


def test_a_store_that_closes_ends_the_wait_for_its_answer() -> None:
    hall = Store(HOST, 0, True, 1000.0, TOKEN)
    store = Store(HOST, hall.port, False, 1000.0, TOKEN)
    store.put("here", bytes(range(256)))
    assert store.get("here") == hall.get("here") == bytes(range(256))
    asked = ThreadPoolExecutor(1).submit(store.get, "never")
    hall.close()
    with pytest.raises((PeerLost, MeetingTimeout)):
        asked.result(DEADLINE)


@pytest.mark.parametrize("question", [None, "put", ["put", "a"], ["put", "a", "xyz"], ["put", 1, ""], ["get"], {"get": "a"}], ids=str)
def test_a_question_that_no_store_answers_ends_that_visit_alone(question: Any) -> None:
    hall = Store(HOST, 0, True, DEADLINE, TOKEN)
    visitor = call(HOST, hall.port, TOKEN, "store", 0, DEADLINE, "the store")
    visitor.tell(question, DEADLINE)
    with pytest.raises(PeerLost):
        visitor.hear(DEADLINE)
    other = Store(HOST, hall.port, False, DEADLINE, TOKEN)
    other.put("a", b"1")
    assert other.get("a") == b"1"
    hall.close()


# ---- fuzzing --------------------------------------------------------------------------------------------------------------


def mutated(rng: random.Random, valid: bytes) -> bytes:
    """Random bytes, or a valid header that is cut, longer, or wrong in a few places."""
    how = rng.randrange(4)
    if how == 0:
        return rng.randbytes(rng.randrange(2 * len(valid)))
    if how == 1:
        return valid[: rng.randrange(len(valid))]
    if how == 2:
        return valid + rng.randbytes(rng.randrange(1, 9))
    data = bytearray(valid)
    for _ in range(rng.randrange(3)):  # none, at times: then it is valid
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)


@pytest.mark.slow
def test_a_hundred_thousand_headers_are_refused_or_within_bounds() -> None:
    rng, seen = random.Random(0), {"refused": 0, "taken": 0}
    tracemalloc.start()
    try:
        for _ in range(100_000):
            kind, tag, most = rng.choice([FACT, TENSOR]), rng.randrange(1 << 40), rng.randrange(1, MOST)
            data = mutated(rng, header(kind, tag, rng.randrange(most)))
            try:
                length = check(data, kind, tag, 0, most)
            except WireError:
                seen["refused"] += 1
            else:
                seen["taken"] += 1
                assert len(data) == HEADER_BYTES and 0 <= length <= most
                assert data == header(kind, tag, length)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert seen["taken"] > 5_000 and seen["refused"] > 50_000 and peak < 1 << 20


def test_a_thousand_streams_of_nonsense_fill_no_memory_and_end_with_an_error_of_ours(hall: Hall) -> None:
    rng, room = random.Random(1), bytearray(b"-" * 64)
    untouched, links = 0, []
    for turn in range(1, 1001):
        caller = hall.call()
        listener = hall.wait(turn)[turn - 1]
        data = mutated(rng, header(TENSOR, 0, 64)) + rng.randbytes(rng.randrange(100))
        raw(caller, data)
        caller.close()
        listener.receive(0, memoryview(room))
        links.append(listener)
        try:
            exchange([listener], DEADLINE)
        except WireError:
            untouched += room == b"-" * 64
            assert room == b"-" * 64
        except PeerLost:
            room[:] = b"-" * 64  # the beginning of a valid message, and no end
        else:
            assert data[:HEADER_BYTES] == header(TENSOR, 0, 64) and room == data[HEADER_BYTES : HEADER_BYTES + 64]
            room[:] = b"-" * 64
    assert untouched > 300
