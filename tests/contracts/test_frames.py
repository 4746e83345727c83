"""Frames: what was written is read, and anything else is refused before it is touched."""

from __future__ import annotations

import random
import tracemalloc

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bigdl_lite.errors import WireError
from bigdl_lite.wire.frame import COMBINED, ERROR, HEADER_BYTES, MISS, PIECE, SIDE, Frame, loads, note

KINDS = [PIECE, SIDE, ERROR, MISS, COMBINED]

frames = st.builds(
    Frame,
    kind=st.sampled_from(KINDS),
    rank=st.integers(-1, 2**31 - 1),
    slice=st.integers(0, 2**31 - 1),
    round=st.integers(0, 2**63 - 1),
    weight=st.floats(allow_nan=False),
    values=st.integers(0, 2**63 - 1),
    payload=st.binary(max_size=200),
    codec=st.integers(0, 255),
)
fuzz = settings(max_examples=150, deadline=None)
SMALL = Frame(PIECE, 3, 1, 41, 12.0, 2, b"12345678", 7)


@given(frames)
@fuzz
def test_a_frame_comes_back_as_it_left(frame: Frame) -> None:
    assert loads(frame.dumps()) == frame


@given(st.lists(frames, min_size=2, max_size=4))
@fuzz
def test_frames_that_stand_one_after_the_other_are_not_one_frame(several: list[Frame]) -> None:
    """A message is one frame: what was glued together on the way is not taken for its first part."""
    with pytest.raises(WireError, match="bytes follow a frame"):
        loads(b"".join(frame.dumps() for frame in several))


@given(frames)
@fuzz
def test_a_frame_is_its_header_and_its_payload_in_two_buffers(frame: Frame) -> None:
    head, payload = frame.parts()
    assert len(head) == HEADER_BYTES and head + bytes(payload) == frame.dumps()


@given(frames, st.data())
@fuzz
def test_a_truncated_frame_is_refused(frame: Frame, data: st.DataObject) -> None:
    whole = frame.dumps()
    with pytest.raises(WireError):
        loads(whole[: data.draw(st.integers(0, len(whole) - 1))])


@given(st.binary(max_size=300))
@example(b"")
@example(b"BdL1")
@example(b"\x80\x04K\x01.")  # a pickle
@fuzz
def test_garbage_is_refused_and_never_anything_worse(data: bytes) -> None:
    with pytest.raises(WireError):
        loads(data)


@given(frames, st.integers(0, HEADER_BYTES - 1), st.integers(1, 255))
@fuzz
def test_a_flipped_header_byte_gives_another_frame_or_a_refusal(frame: Frame, at: int, flip: int) -> None:
    data = bytearray(frame.dumps())
    data[at] ^= flip
    try:
        read = loads(data)
    except WireError:
        return
    assert len(read.payload) == len(frame.payload)  # whatever the header says, no byte outside was read


@pytest.mark.parametrize("lie", [0, 7, 9, 2**40, 2**63 - 1])
def test_a_payload_length_that_lies_is_refused(lie: int) -> None:
    data = bytearray(SMALL.dumps())
    data[HEADER_BYTES - 8 : HEADER_BYTES] = lie.to_bytes(8, "little")
    with pytest.raises(WireError):
        loads(data)


@pytest.mark.parametrize("at", [HEADER_BYTES - 8, HEADER_BYTES - 16], ids=["length", "values"])
def test_a_negative_length_is_refused(at: int) -> None:
    data = bytearray(SMALL.dumps())
    data[at : at + 8] = (-1).to_bytes(8, "little", signed=True)
    with pytest.raises(WireError, match="claims"):
        loads(data)


def test_bytes_behind_a_frame_are_refused_with_their_number() -> None:
    with pytest.raises(WireError, match="5 bytes follow"):
        loads(SMALL.dumps() + b"extra")


@pytest.mark.parametrize("kind", [0, 6, 10, 255])
def test_an_unknown_kind_is_refused(kind: int) -> None:
    data = bytearray(SMALL.dumps())
    data[4] = kind
    with pytest.raises(WireError, match=f"kind {kind}"):
        loads(data)


def test_reading_copies_no_payload() -> None:
    data = bytearray(SMALL.dumps())
    frame = loads(data)
    data[-1] = ord("x")
    assert bytes(frame.payload) == b"1234567x"


def test_known_bytes() -> None:
    assert HEADER_BYTES == 46
    assert SMALL.dumps().hex() == (
        "42644c31" "01" "07" "03000000" "01000000" "2900000000000000" "0000000000002840" "0200000000000000"
        "0800000000000000"
    ) + b"12345678".hex()  # fmt: skip


@pytest.mark.parametrize("what", [None, {"a": [1, 2.5, "é"]}, [], "text"])
def test_a_note_carries_json(what: object) -> None:
    frame = loads(note(ERROR, 3, 41, what).dumps())
    assert (frame.kind, frame.rank, frame.round, frame.json()) == (ERROR, 3, 41, what)


@given(st.binary(max_size=50))
@example(b"\xff")
@example(b"{")
@settings(max_examples=50, deadline=None)
def test_a_payload_that_is_not_json_is_refused(payload: bytes) -> None:
    try:
        Frame(ERROR, 3, 0, 0, 0.0, 0, payload).json()
    except WireError as error:
        assert "from rank 3 does not hold JSON" in str(error)


def test_json_deeper_than_pythons_stack_is_refused_too() -> None:
    with pytest.raises(WireError, match="does not hold JSON"):
        Frame(ERROR, 3, 0, 0, 0.0, 0, b"[" * 100_000).json()


@pytest.mark.slow
def test_a_hundred_thousand_inputs_are_refused_or_a_frame_and_nothing_else() -> None:
    """Nonsense, valid frames with wrong bytes, frames that are cut or glued together; memory stays that of the input."""
    rng, seen = random.Random(0), {"refused": 0, "read": 0}
    tracemalloc.start()
    try:
        for _ in range(100_000):
            data = _disturbed(rng)
            try:
                frame = loads(data)
            except WireError:
                seen["refused"] += 1
                continue
            seen["read"] += 1
            assert isinstance(frame, Frame) and HEADER_BYTES + len(frame.payload) == len(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert seen["read"] > 10_000 and seen["refused"] > 50_000 and peak < 1 << 20


def _disturbed(rng: random.Random) -> bytes:
    valid = Frame(
        rng.choice(KINDS), rng.randrange(1 << 31), rng.randrange(1 << 31), rng.randrange(1 << 62), rng.random(),
        rng.randrange(1 << 62), rng.randbytes(rng.randrange(50)), rng.randrange(256),
    ).dumps()  # fmt: skip
    how = rng.randrange(5)
    if how == 0:
        return rng.randbytes(rng.randrange(100))
    if how == 1:
        return valid[: rng.randrange(len(valid))]
    if how == 2:
        return valid + rng.randbytes(rng.randrange(1, 50))
    if how == 3:
        return valid[:HEADER_BYTES] + rng.randbytes(rng.randrange(100))
    data = bytearray(valid)
    for _ in range(rng.randrange(4)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)
