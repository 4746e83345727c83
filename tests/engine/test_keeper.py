"""The state of a fit on its way: whole or not at all, to the bit, and never worth the training.

The parts are real ones, of a small fit of the local engine. A fit that goes on from what the keeper kept must end as if
nothing had happened.
"""

from __future__ import annotations

import gc
import json
import logging
import threading
import weakref
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import Adam

from bigdl_lite.algorithms import State, method
from bigdl_lite.algorithms.parts import TorchOptimizer
from bigdl_lite.data.checkpoint import Checkpoints
from bigdl_lite.data.columns import describe
from bigdl_lite.data.manifest import to_json, unpack
from bigdl_lite.engine.keeper import Keeper, Part, dump, joined, model_of, parse, start_from
from bigdl_lite.engine.local import LocalEngine
from bigdl_lite.engine.recipe import Outcome, Position, Recipe, Saving, Start
from bigdl_lite.errors import CheckpointError, WireError
from bigdl_lite.model.layout import blueprint

pytestmark = pytest.mark.timeout(60)

OWNERS, STEPS, LONG = 3, 6, 30.0  # 3 epochs of 2 steps; no test that works waits for LONG


def problem() -> tuple[list[list[pa.RecordBatch]], Recipe, Start]:
    torch.manual_seed(0)
    schema = pa.schema([("x", pa.list_(pa.float32())), ("y", pa.int64())])
    x, y = torch.randn(24, 4), torch.randint(0, 3, (24,))
    frame = [
        [pa.RecordBatch.from_pydict({"x": x[a:b].tolist(), "y": y[a:b].tolist()}, schema=schema)] for a, b in pairwise([0, 12, 18, 24])
    ]
    plan, weights, buffers, constants = blueprint(nn.Sequential(nn.Linear(4, 60), nn.BatchNorm1d(60), nn.Linear(60, 3)))
    scheduler = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    rule = method("sync-sgd", TorchOptimizer(partial(Adam, lr=0.05), scheduler=scheduler))
    columns = describe(schema, ["x"], "y", torch.float32)
    made = Recipe(plan, nn.CrossEntropyLoss(), rule, columns, OWNERS, 12, 3, deadline=20.0, saving=Saving(1, "step"))
    return frame, made, Start(weights, buffers, constants)


def as_bytes(part: Part) -> Tensor:
    nbytes, pieces = dump(part)
    data = b"".join(bytes(piece) for piece in pieces)
    assert len(data) == nbytes
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


class Collect:
    """Keeps a copy of every part."""

    wish = False

    def __init__(self) -> None:
        self.parts: dict[int, dict[int, Part]] = {}

    def __call__(self, part: Part) -> None:
        self.parts.setdefault(part.now.step, {})[part.rank] = parse(as_bytes(part))


FRAME, RECIPE, START = problem()
_collect = Collect()
OUTCOME = LocalEngine().fit(FRAME, RECIPE, START, keep=_collect)
PARTS = _collect.parts


def whole(step: int, save: bool = True) -> list[Part]:
    return [replace(PARTS[step][rank], save=save) for rank in range(OWNERS)]


def same(a: Part, b: Part) -> bool:
    """To the bit; to_json knows tuples from lists, and nan."""
    tensors = [{"weights": x.weights, "buffers": x.buffers, **x.state.tensors} for x in (a, b)]
    bits = [{k: (x.dtype, x.shape, x.contiguous().reshape(-1).view(torch.uint8).tolist()) for k, x in t.items()} for t in tensors]
    names = ("now", "save", "rank", "cut", "owners", "sums", "lines", "counts", "shapes")
    rest = [json.dumps([to_json(x.state.facts), *(getattr(x, name) for name in names)]) for x in (a, b)]
    return bits[0] == bits[1] and rest[0] == rest[1]


def go_on(start: Start) -> Outcome:
    return LocalEngine().fit(FRAME, RECIPE, replace(start, constants=START.constants))


def test_the_fit_gives_every_owners_part_after_every_step() -> None:
    assert sorted(PARTS) == list(range(1, STEPS + 1)) and all(sorted(parts) == list(range(OWNERS)) for parts in PARTS.values())
    assert all(len(part.weights) and part.state.tensors for part in PARTS[1].values())


# ---- whole or not at all --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)], ids=str)
@pytest.mark.parametrize("step", [1, 3, 5])
def test_a_state_is_whole_when_all_owners_gave_their_parts_and_a_fit_goes_on_from_it(step: int, order: Sequence[int]) -> None:
    keeper = Keeper(RECIPE)
    assert keeper.last() is None
    for rank in order:
        assert keeper.kept == -1
        keeper(PARTS[step][rank])
    assert keeper.kept == step
    start, lines = keeper.last()
    assert start.now.step == step and [x["step"] for x in lines if "step" in x] == list(range(step))
    found = go_on(start)
    assert torch.equal(found.weights, OUTCOME.weights) and torch.equal(found.buffers, OUTCOME.buffers)
    losses = [[x["loss"] for x in history] for history in ([*lines, *found.history], OUTCOME.history)]
    assert losses[0] == losses[1]


def test_another_state_would_be_seen() -> None:
    """Negative control: one value of one part in another place."""
    parts = whole(3)
    parts[1] = replace(parts[1], weights=parts[1].weights.flip(0))
    start, _ = joined(parts, RECIPE, [])
    assert not torch.equal(go_on(start).weights, OUTCOME.weights)


@pytest.mark.parametrize("missing", range(OWNERS))
def test_without_one_part_the_state_before_counts(missing: int) -> None:
    keeper = Keeper(RECIPE)
    for part in whole(1) + [part for part in whole(2) if part.rank != missing]:
        keeper(part)
    assert keeper.last()[0].now.step == 1
    keeper(PARTS[2][missing])  # too late: the others were let go when the last state was asked for
    assert keeper.last()[0].now.step == 1
    for part in whole(2):  # the stage runs again
        keeper(part)
    assert keeper.last()[0].now.step == 2


def test_the_same_owner_twice_is_one_owner() -> None:
    keeper = Keeper(RECIPE)
    for _ in range(OWNERS):
        keeper(PARTS[1][0])
    assert keeper.last() is None


def test_parts_that_can_no_more_become_whole_are_let_go() -> None:
    """Or a rank whose parts never arrive would cost the driver the memory of all others', state after state."""
    keeper, seen = Keeper(RECIPE), []
    for step in (1, 2):
        part = parse(as_bytes(PARTS[step][0]))
        seen.append(weakref.ref(part.weights))
        keeper(part)
        del part
    gc.collect()
    assert seen[0]() is None and seen[1]() is not None


def test_what_was_joined_lies_in_memory_of_its_own() -> None:
    parts = [parse(as_bytes(part)) for part in whole(2)]
    start, _ = joined(parts, RECIPE, [])
    before = [x.clone() for x in (start.weights, start.buffers, *start.resume.state.tensors.values())]
    for part in parts:
        for x in (part.weights, part.buffers, *part.state.tensors.values()):
            x.zero_()
    after = [start.weights, start.buffers, *start.resume.state.tensors.values()]
    assert len(after) > 3 and all(map(torch.equal, before, after)) and not start.constants


def test_the_history_before_comes_first() -> None:
    keeper = Keeper(RECIPE, lines=[{"step": -1}])
    for part in whole(1):
        keeper(part)
    assert [x["step"] for x in keeper.last()[1]] == [-1, 0]


def test_parts_that_leave_a_gap_are_no_state() -> None:
    with pytest.raises(CheckpointError, match="do not make up all"):
        joined(whole(1)[:2], RECIPE, [])


# ---- saving ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["in the fit", "beside the training"])
def background(request: pytest.FixtureRequest) -> bool:
    return request.param == "beside the training"


def saving(path: Any, background: bool) -> tuple[Keeper, Checkpoints]:
    store = Checkpoints(str(path), "fit")
    keeper = Keeper(RECIPE, store, {"of": "a test"}, {"0.frozen": torch.ones(2)})
    if background:
        keeper.in_background()
    return keeper, store


def test_what_is_due_is_saved_and_a_fit_goes_on_from_the_file(tmp_path: Any, background: bool) -> None:
    keeper, store = saving(tmp_path, background)
    for part in whole(3) + whole(4, save=False):
        keeper(part)
    keeper.close()
    saved = store.last()
    assert (saved.step, saved.epoch, saved.at) == (3, 1, 1) and saved.model == model_of(RECIPE)
    assert saved.loss == PARTS[3][0].sums["loss"] and saved.facts["about"] == {"of": "a test"}
    assert keeper.last()[0].now.step == 4  # what was not due is remembered all the same
    start, lines = start_from(saved)
    assert start.constants["0.frozen"].tolist() == [1.0, 1.0] and [x["step"] for x in lines if "step" in x] == [0, 1, 2]
    assert torch.equal(go_on(start).weights, OUTCOME.weights)


@pytest.mark.parametrize("error", [CheckpointError("No space left"), RuntimeError("out of memory"), OSError("gone")], ids=repr)
@pytest.mark.filterwarnings("always")
def test_a_save_that_fails_is_told_and_the_checkpoint_before_it_is_still_there(
    tmp_path: Any, background: bool, error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(checkpoint: Any) -> None:
        raise error

    keeper, store = saving(tmp_path, background)
    for part in whole(1):
        keeper(part)
    assert keeper.ready(LONG)
    with (
        monkeypatch.context() as patched, caplog.at_level(logging.ERROR, "bigdl_lite"),
        pytest.warns(RuntimeWarning, match=f"no checkpoint of step 2: .*{error}"),
    ):  # fmt: skip
        patched.setattr(store, "save", fail)
        for part in whole(2):
            keeper(part)
        assert keeper.ready(LONG)
    assert f"no checkpoint of step 2: {'' if isinstance(error, CheckpointError) else type(error).__name__}" in caplog.text
    assert store.last().step == 1 and keeper.last()[0].now.step == 2
    for part in whole(3):
        keeper(part)
    keeper.close()
    assert store.last().step == 3


class Slow:
    """A disk that takes its time."""

    def __init__(self) -> None:
        self.begun, self.go, self.saved = threading.Event(), threading.Event(), list[tuple[int, str]]()

    def save(self, checkpoint: Any) -> None:
        self.begun.set()
        assert self.go.wait(LONG)
        self.saved.append((checkpoint.step, threading.current_thread().name))


@pytest.mark.parametrize("act", ["a part", "last", "close"])
def test_training_goes_on_beside_a_save_until_the_next_state(act: str) -> None:
    disk = Slow()
    keeper = Keeper(RECIPE, disk)
    keeper.in_background()
    for part in whole(1):
        keeper(part)  # returns while the disk is busy
    assert disk.begun.wait(LONG) and not disk.saved and not keeper.ready(0.01)
    seen: list[Any] = []
    acts = {"a part": lambda: keeper(PARTS[2][0]), "last": keeper.last, "close": keeper.close}
    waiting = threading.Thread(target=lambda: seen.append((acts[act](), list(disk.saved))), daemon=True)
    waiting.start()
    waiting.join(0.1)
    assert not seen
    disk.go.set()
    waiting.join(LONG)
    assert seen[0][1] == disk.saved == [(1, "bigdl_lite-save_0")] and keeper.ready(0.0)
    if act == "last":
        assert seen[0][0][0].now.step == 1
    keeper.close()


def test_without_a_background_a_save_is_done_when_the_last_part_was_given() -> None:
    disk = Slow()
    disk.go.set()
    keeper = Keeper(RECIPE, disk)
    for part in whole(1):
        assert not disk.saved and keeper.ready(0.0)
        keeper(part)
    assert disk.saved == [(1, threading.current_thread().name)]
    keeper.close()


def test_a_keeper_that_saves_nowhere_starts_no_thread() -> None:
    before = threading.active_count()
    keeper = Keeper(RECIPE)
    keeper.in_background()
    for part in whole(1):
        keeper(part)
    assert threading.active_count() == before
    keeper.close()


@pytest.mark.parametrize("lost", ["weights", "buffers"])
def test_a_checkpoint_that_lacks_something_is_none_to_go_on_from(tmp_path: Any, lost: str) -> None:
    keeper, store = saving(tmp_path, False)
    for part in whole(1):
        keeper(part)
    saved = store.last()
    tensors = {name: x for name, x in saved.tensors.items() if name != lost}
    with pytest.raises(CheckpointError, match=f"step 1 holds no '{lost}'; begin anew"):
        start_from(replace(saved, tensors=tensors))


# ---- a part as bytes ------------------------------------------------------------------------------------------------------

KINDS = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8,
    torch.bool,
]  # fmt: skip
counts = st.integers(0, 1 << 70)
leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
keys = st.text(max_size=3) | st.integers()
plain = st.recursive(
    leaves, lambda x: st.lists(x, max_size=3) | st.lists(x, max_size=3).map(tuple) | st.dictionaries(keys, x, max_size=3), max_leaves=8
)


@st.composite
def tensor(draw: Any, shape: list[int] | None = None, kind: torch.dtype | None = None) -> Tensor:
    """Any bits, some of them nan; now and then not contiguous."""
    shape = draw(st.lists(st.integers(0, 4), max_size=3)) if shape is None else shape
    kind = draw(st.sampled_from(KINDS)) if kind is None else kind
    n = int(torch.Size(shape).numel())
    data = draw(st.binary(min_size=n * kind.itemsize, max_size=n * kind.itemsize))
    if kind == torch.bool:
        return torch.tensor([x > 127 for x in data], dtype=kind).reshape(shape)
    made = torch.frombuffer(bytearray(data), dtype=kind).reshape(shape) if n else torch.empty(shape, dtype=kind)
    return made.T if made.ndim == 2 and draw(st.booleans()) else made


@st.composite
def a_part(draw: Any) -> Part:
    start, n = draw(st.integers(0, 1 << 40)), draw(st.integers(0, 9))
    tensors = draw(st.dictionaries(st.text(max_size=6).map("optimizer/{}".format), tensor(), max_size=4))
    facts = draw(st.dictionaries(st.text(max_size=3), plain, max_size=4))
    lines = draw(st.lists(st.dictionaries(st.text(max_size=3), st.floats() | st.integers(), max_size=3), max_size=3))
    return Part(
        Position(draw(counts), draw(counts), draw(counts)), draw(st.booleans()), draw(counts), (start, start + n),
        draw(st.sampled_from(KINDS[:4]).flatmap(lambda kind: tensor([n], kind))), State(tensors, facts), draw(st.integers(1, 9)),
        draw(tensor([draw(st.integers(0, 5))], torch.float64)), {"loss": draw(st.floats()), "epoch": {}}, lines,
        draw(st.lists(counts, max_size=3)), draw(st.lists(st.lists(counts, max_size=3), max_size=3)),
    )  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(a_part())
def test_a_part_comes_out_of_its_bytes_as_it_was(part: Part) -> None:
    assert same(parse(as_bytes(part)), part)


def test_a_difference_of_one_bit_would_be_seen() -> None:
    """Negative control."""
    part = PARTS[2][0]
    facts = part.state.facts | {"cut": list(part.cut)}
    others = [PARTS[3][0], replace(part, lines=[]), replace(part, state=State(part.state.tensors, facts))]
    weights = part.weights.clone()
    weights.view(torch.uint8)[0] ^= 1
    assert same(part, part) and not any(same(part, other) for other in [*others, replace(part, weights=weights)])


def test_a_part_is_read_where_it_lies() -> None:
    memory = as_bytes(PARTS[1][0])
    part = parse(memory)
    inside = range(memory.data_ptr(), memory.data_ptr() + len(memory))
    tensors = [part.weights, part.buffers, *part.state.tensors.values()]
    assert all(x.data_ptr() in inside and x.data_ptr() % x.itemsize == 0 for x in tensors if x.numel())


REAL = bytes(as_bytes(PARTS[2][0]).tolist())
HEAD = 8 + int.from_bytes(REAL[:8], "little")
anywhere = st.integers(0, len(REAL) - 1) | st.integers(0, min(HEAD + 400, len(REAL) - 1))  # most often in the headers


def judged(data: bytes) -> bool:
    """Whether the bytes are a part, of kinds that a keeper can take; WireError is the only other answer."""
    try:
        part = parse(torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8))
    except WireError:
        return False
    assert part.weights.shape == (part.cut[1] - part.cut[0],) and part.owners >= 1 and type(part.save) is bool
    assert all(type(x) is int and x >= 0 for x in (*part.now, part.rank, *part.cut, *part.counts))
    Keeper(RECIPE)(part)
    return True


def test_only_the_bytes_of_a_part_are_one() -> None:
    assert judged(REAL)
    assert not any(map(judged, (b"", b"\0" * 8, b"\xff" * 64, REAL[:-1], REAL[:HEAD], REAL[1:], REAL[:8] + b"[]" + REAL[10:])))


@settings(max_examples=500, deadline=None)
@given(st.lists(st.tuples(anywhere, st.integers(0, 255)), max_size=4), st.data())
def test_bytes_that_were_changed_or_cut_are_a_part_or_a_wire_error(changes: list[tuple[int, int]], data: Any) -> None:
    changed = bytearray(REAL)
    for at, value in changes:
        changed[at] = value
    judged(bytes(changed[: data.draw(st.integers(0, len(REAL)) | st.just(len(REAL)))]))


anything = st.recursive(leaves, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=3), x, max_size=3), max_leaves=6)


@settings(max_examples=300, deadline=None)
@given(st.data(), anything)
def test_a_part_with_one_field_of_another_kind_is_a_part_or_a_wire_error(data: Any, value: Any) -> None:
    """Sound JSON and sound tensors, and something else in one place, in either header."""
    told, rest = json.loads(REAL[8:HEAD]), REAL[HEAD:]
    size = 8 + int.from_bytes(rest[:8], "little")
    header = json.loads(rest[8:size])
    place = data.draw(st.sampled_from([told, header, told["facts"], told["sums"], *header.values()]))
    place[data.draw(st.sampled_from(sorted(place)))] = value
    texts = [text + b" " * (-len(text) % 8) for text in (json.dumps(told).encode(), json.dumps(header).encode())]
    judged(b"".join([len(texts[0]).to_bytes(8, "little"), texts[0], len(texts[1]).to_bytes(8, "little"), texts[1], rest[size:]]))


BAD: dict[str, list[Any]] = {
    "rank": [-1, "0", True, [1], 1.0], "owners": [0, None], "save": [1, None], "cut": [[0], [3, 0], [0, 1], "ab", None],
    "now": [[1, 2], 7], "sums": [[], None], "lines": [{}, 1], "counts": [["1"], 3, [-1]], "shapes": [[1], {}, [["a"]]],
    "facts": [[], 3, {"~": "x", "of": []}],
}  # fmt: skip


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in BAD.items() for value in values], ids=str)
def test_a_field_that_no_part_has_is_refused(field: str, value: Any) -> None:
    told = json.loads(REAL[8:HEAD])
    told[field] = value
    text = json.dumps(told).encode()
    text += b" " * (-len(text) % 8)
    assert not judged(len(text).to_bytes(8, "little") + text + REAL[HEAD:])


ENDLESS = {"a": {"data_offsets": [0, float("inf")], "dtype": "F32", "shape": []}}


@pytest.mark.parametrize("header", [[], 7, {"a": 1}, {"a": {}}, ENDLESS], ids=str)
def test_a_header_of_something_else_is_no_safetensors(header: Any) -> None:
    text = json.dumps(header).encode()
    with pytest.raises(ValueError, match="a header that is none of safetensors"):
        unpack(torch.frombuffer(bytearray(len(text).to_bytes(8, "little") + text), dtype=torch.uint8))
