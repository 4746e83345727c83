"""A checkpoint is complete or absent, comes back to the bit, and is refused by name where it is not what was saved.

Faults are real where they can be: children killed with SIGKILL at every system call, a full and a read-only tmpfs, a user
without rights. Elsewhere the file layer is given a false `os`, or an object store in memory.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import math
import os
import random
import re
import resource
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import fs
from safetensors.torch import load as load_tensors
from torch import Tensor, nn

from bigdl_lite.data import checkpoint as module
from bigdl_lite.data import files, manifest
from bigdl_lite.data.checkpoint import Checkpoint, Checkpoints
from bigdl_lite.data.manifest import decode, encode, from_json, pack, to_json
from bigdl_lite.errors import CheckpointError, RecipeError, report, revive

MODEL = {"0.weight": ["float32", [3, 5]], "0.bias": ["float32", [3]]}
CALLS = ("open", "write", "fsync", "close", "replace", "unlink", "mkdir", "scandir")


def example(step: int, loss: float = 1.0, tensors: dict[str, Tensor] | None = None, facts: dict[str, Any] | None = None) -> Checkpoint:
    """A checkpoint whose every value depends on its step."""
    generator = torch.Generator().manual_seed(step)
    made = {
        "weights": torch.randn(18, generator=generator),
        "buffers": torch.randn(2, generator=generator, dtype=torch.float64),
        "optimizer/0/0/exp_avg": torch.randn(18, generator=generator),
        "optimizer/0/0/step": torch.tensor(float(step)),
    }
    return Checkpoint(step, step // 10, step % 10, loss, MODEL, made if tensors is None else tensors, facts or {"seed": step})


def same(a: Checkpoint | None, b: Checkpoint) -> bool:
    def plain(c: Checkpoint) -> Any:
        tensors = {k: (x.dtype, x.shape, x.reshape(-1).view(torch.uint8).tolist()) for k, x in c.tensors.items()}
        return c.step, c.epoch, c.at, repr(c.loss), list(c.model.items()), tensors, c.facts

    return a is not None and plain(a) == plain(b)


def names(store: Checkpoints) -> list[str]:
    return sorted(store.folder.entries())


def is_tidy(store: Checkpoints) -> bool:
    """Nothing but pairs of a manifest and its tensors."""
    found = names(store)
    return sorted(itertools.chain(*((s.manifest, s.tensors) for s in module._published(found)))) == found


def newest(store: Checkpoints, suffix: str) -> Path:
    saved = module._published(names(store))[-1]
    return Path(store.folder.path, saved.manifest if suffix == "json" else saved.tensors)


def child(act: Callable[[], str]) -> Callable[[], str]:
    """Runs act in a forked process. The result waits for it: what it said, or 'killed'."""
    back, out = os.pipe()
    process = os.fork()
    if not process:
        try:
            os.close(back)
            os.write(out, act().encode())
        except BaseException as error:
            os.write(out, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(out)

    def wait() -> str:
        with os.fdopen(back, "rb") as source:
            said = source.read().decode()
        _, status = os.waitpid(process, 0)
        return "killed" if os.WIFSIGNALED(status) else said

    wait.process = process  # type: ignore[attr-defined]
    return wait


# ---------------------------------------------------------------------------------------------------------- what comes back


def test_a_checkpoint_comes_back_to_the_bit(tmp_path: Path) -> None:
    store = Checkpoints(str(tmp_path / "not" / "yet"), "run-1")
    assert store.last() is None and store.best() is None and store.steps() == []
    store.save(example(7, 0.25))
    for loaded in (store.last(), store.best(), store.at(7), Checkpoints(str(tmp_path / "not" / "yet"), "run-1").last()):
        assert same(loaded, example(7, 0.25))
    assert store.steps() == [7] and is_tidy(store)


@pytest.mark.parametrize("dtype", manifest._DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (2, 3)], ids=str)
def test_tensors_of_any_dtype_and_shape_come_back(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.arange(max(1, math.prod(shape)))[: math.prod(shape)].reshape(shape).to(dtype)
    saved = example(1, tensors={"x": x, "other": torch.ones(3, dtype=torch.uint8), "t": torch.arange(6.0).view(2, 3).T})
    store = Checkpoints(str(tmp_path), "run")
    store.save(saved)
    assert same(store.last(), saved)


def test_nothing_at_all_can_be_saved(tmp_path: Path) -> None:
    store = Checkpoints(str(tmp_path), "run")
    store.save(Checkpoint(0, 0, 0, math.nan, {}, {}, {}))
    assert same(store.last(), Checkpoint(0, 0, 0, math.nan, {}, {}, {})) and store.best() is None


def test_slices_of_one_vector_are_saved_without_a_copy_and_as_safetensors_reads_them() -> None:
    whole = torch.randn(1000)
    nbytes, parts = pack({"a": whole[:600], "b": whole[600:], "c": torch.zeros(3, dtype=torch.int8)})
    head, a, b, c = parts
    whole[0], whole[600] = 5.0, 6.0  # seen through the parts: they are the vector's own memory
    data = b"".join([head, a, b, c])
    loaded = load_tensors(data)
    assert len(data) == nbytes and torch.equal(loaded["a"], whole[:600]) and torch.equal(loaded["b"], whole[600:])
    assert loaded["c"].tolist() == [0, 0, 0]


@pytest.mark.parametrize("x", [torch.zeros(2, dtype=torch.complex64), torch.zeros(2, 2).to_sparse()], ids=["complex", "sparse"])
def test_a_tensor_that_cannot_be_held_is_refused_before_anything_is_written(tmp_path: Path, x: Tensor) -> None:
    store = Checkpoints(str(tmp_path), "run")
    with pytest.raises(CheckpointError, match=r"tensor 'moment'.*cannot be held"):
        store.save(example(1, tensors={"moment": x}))
    assert names(store) == []


@pytest.mark.parametrize(("run", "keep", "said"), [("../up", 2, "names a folder"), ("", 2, "names a folder"), ("r", 0, "keep is 0")])
def test_settings_that_cannot_work_are_refused_at_once(run: str, keep: int, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        Checkpoints("somewhere", run, keep)


# ----------------------------------------------------------------------------------------------------------- last, best, at


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    store = Checkpoints(str(tmp_path), "run", keep=2)
    kept = []
    for step, loss in enumerate([5.0, 3.0, 4.0, 3.0, math.nan, math.inf, 2.0, 9.0, 9.0]):
        store.save(example(step, loss))
        kept.append(store.steps())
        assert is_tidy(store) and store.last().step == step
    assert kept == [[0], [0, 1], [1, 2], [1, 2, 3], [1, 3, 4], [1, 4, 5], [5, 6], [6, 7], [6, 7, 8]]
    assert store.best().step == 6 and same(store.best(), example(6, 2.0))
    assert Checkpoints(str(tmp_path), "run").best().step == 6  # read from disk, not remembered


def test_a_fit_that_went_back_ends_with_what_it_saved_last(tmp_path: Path) -> None:
    store = Checkpoints(str(tmp_path), "run", keep=3)
    for step in (10, 20, 30):
        store.save(example(step, loss=100.0 - step))
    again = example(20, loss=50.0)
    store.save(again)
    assert store.last().step == 20 and same(store.at(20), again) and store.steps() == [10, 30, 20] and is_tidy(store)


def test_a_step_without_a_checkpoint_is_named_beside_those_that_have_one(tmp_path: Path) -> None:
    store = Checkpoints(str(tmp_path), "run")
    with pytest.raises(CheckpointError, match="no checkpoint of step 3; it has: none"):
        store.at(3)
    store.save(example(1))
    store.save(example(2))
    with pytest.raises(CheckpointError, match="no checkpoint of step 3; it has: 1, 2"):
        store.at(3)


def test_files_of_others_are_neither_read_nor_deleted(tmp_path: Path) -> None:
    store = Checkpoints(str(tmp_path), "run", keep=1)
    store.folder.create()
    others = ["notes.txt", "model.safetensors", "config.json", "step-1.safetensors", "000001.json.part"]
    for name in others:
        Path(store.folder.path, name).write_text("{}")
        os.utime(Path(store.folder.path, name), (0, 0))
    for step in range(4):
        store.save(example(step, 9.0 - step))
    assert set(others) < set(names(store)) and len(names(store)) == len(others) + 2


# ------------------------------------------------------------------------------------------------------- what is refused


def change(path: Path, act: Callable[[bytes], bytes]) -> None:
    path.write_bytes(act(path.read_bytes()))


def forge(**changes: Any) -> Callable[[bytes], bytes]:
    """A manifest with other contents, and right checksums."""

    def act(data: bytes) -> bytes:
        body = json.loads(data)
        del body["bigdl_lite"], body["sha256"], body["nbytes"]
        return encode(body | changes)

    return act


def flipped(data: bytes) -> bytes:
    return data[:-20] + bytes([data[-20] ^ 4]) + data[-19:]


@pytest.mark.parametrize(
    ("suffix", "act", "said"),
    [
        ("safetensors", lambda d: d[:-1], r"safetensors is truncated: it has \d+ bytes where \d+ were written"),
        ("safetensors", lambda d: b"", r"safetensors is truncated: it has 0 bytes"),
        ("safetensors", lambda d: d + b"x", "safetensors is too long"),
        ("safetensors", flipped, r"safetensors is damaged: its sha256 is \w+\.\.\. where \w+\.\.\. was written"),
        ("json", lambda d: d[:-1], r"json is truncated: it has \d+ bytes where \d+ were written"),
        ("json", lambda d: d + b"\n", "json is too long"),
        ("json", flipped, "json is damaged: its sha256"),
        ("json", lambda d: b"", "json is empty: it is foreign or damaged"),
        ("json", lambda d: d[:30], "does not begin as a checkpoint of bigdl_lite does: it is foreign or damaged"),
        ("json", lambda d: b'{"architectures": ["BertModel"]}', "does not begin as a checkpoint of bigdl_lite does"),
        ("json", forge(format=2, version="7.0"), r"by a newer bigdl_lite, 7\.0, in format 2.*go on with bigdl_lite 7\.0"),
        ("json", forge(format=0, version="0.0.1"), r"by an older bigdl_lite, 0\.0\.1, in format 0; this is .*, which reads format 1"),
        ("json", forge(format="x"), "in format x"),
        ("json", forge(step=3), "no checkpoint that bigdl_lite wrote: ValueError: it is of step 3, its name says 2"),
        ("json", forge(tensors={}), "no checkpoint that bigdl_lite wrote: KeyError"),
        ("json", forge(tensors={"nbytes": 1e300, "sha256": ""}), r"truncated: it has \d+ bytes where 1e\+300"),
        ("json", forge(loss="low"), "no checkpoint that bigdl_lite wrote: it has no loss"),
        ("json", forge(facts={"~": "code", "of": "exit()"}), "no checkpoint that bigdl_lite wrote: ValueError: 'code' is no kind"),
    ],
)
def test_what_is_not_whole_or_not_ours_is_refused_and_the_way_out_is_named(tmp_path: Path, suffix: str, act: Any, said: str) -> None:
    store = Checkpoints(str(tmp_path), "run")
    store.save(example(1, 3.0))
    store.save(example(2, 2.0))
    path = newest(store, suffix)
    change(path, act)
    for read in (store.last, lambda: store.at(2), Checkpoints(str(tmp_path), "run").last):
        with pytest.raises(CheckpointError, match=said) as info:
            read()
        assert str(path.parent) in str(info.value) and module._published(names(store))[-1].writer in str(info.value)
        assert "take at(1) instead, or delete 000002" in str(info.value) or "go on with bigdl_lite" in str(info.value)
    assert same(store.at(1), example(1, 3.0))
    newest(store, "json").unlink()  # the way out that was named
    assert same(store.last(), example(1, 3.0))
    store.save(example(3))
    assert same(store.last(), example(3))


def test_a_damaged_manifest_stops_best_and_not_save(tmp_path: Path) -> None:
    store = Checkpoints(str(tmp_path), "run")
    store.save(example(1, 3.0))
    change(newest(store, "json"), flipped)
    fresh = Checkpoints(str(tmp_path), "run")
    fresh.save(example(2, 4.0))
    with pytest.raises(CheckpointError, match=r"damaged.*best\(\) reads them all: delete 000001"):
        fresh.best()
    fresh.save(example(3, 5.0))
    assert fresh.best().step == 2 and is_tidy(fresh)


def test_a_manifest_without_its_tensors_is_refused_by_the_name_of_what_is_missing(tmp_path: Path) -> None:
    store = Checkpoints(str(tmp_path), "run")
    store.save(example(1))
    path = newest(store, "safetensors")
    path.unlink()
    with pytest.raises(CheckpointError, match=rf"{path.name} is missing; no other checkpoint is left"):
        store.last()


def test_tensors_of_another_checkpoint_are_not_taken(tmp_path: Path) -> None:
    store = Checkpoints(str(tmp_path), "run")
    store.save(example(1))
    foreign = newest(store, "safetensors").read_bytes()
    store.save(example(2))
    newest(store, "safetensors").write_bytes(foreign)
    with pytest.raises(CheckpointError, match="is damaged"):
        store.last()


def test_a_pickle_in_the_place_of_the_tensors_is_not_run(tmp_path: Path) -> None:
    evil = b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR."
    store = Checkpoints(str(tmp_path), "run")
    store.save(example(1))
    newest(store, "safetensors").write_bytes(evil)
    change(newest(store, "json"), forge(tensors={"nbytes": len(evil), "sha256": hashlib.sha256(evil).hexdigest()}))
    with pytest.raises(CheckpointError, match="no checkpoint that bigdl_lite wrote: SafetensorError"):
        store.last()
    assert not (tmp_path / "ran").exists()


def test_every_single_bit_of_a_manifest_counts() -> None:
    data = encode({"format": 1, "version": "0.1.0", "step": 12, "facts": {"seed": 1, "text": "a"}})
    whole = decode(data, "file", "way")
    for i, bit in itertools.product(range(len(data)), range(8)):
        with pytest.raises(CheckpointError):
            decode(data[:i] + bytes([data[i] ^ 1 << bit]) + data[i + 1 :], "file", "way")
    for i in range(len(data)):
        with pytest.raises(CheckpointError):
            decode(data[:i], "file", "way")
    assert decode(data, "file", "way") == whole


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoints, dict[str, bytes]]:
    store = Checkpoints(str(tmp_path_factory.mktemp("fuzz")), "run")
    store.save(example(5))
    return store, {suffix: newest(store, suffix).read_bytes() for suffix in ("json", "safetensors")}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True)
@given(st.data())
def test_no_damage_is_ever_loaded(one: tuple[Checkpoints, dict[str, bytes]], data: st.DataObject) -> None:
    store, whole = one
    suffix = data.draw(st.sampled_from(sorted(whole)))
    bytes_ = bytearray(whole[suffix])
    places = st.integers(0, len(bytes_) - 1)
    match data.draw(st.sampled_from(["flip", "cut", "zero", "swap", "repeat"])):
        case "flip":
            for i in data.draw(st.lists(places, min_size=1, max_size=4)):
                bytes_[i] ^= data.draw(st.integers(1, 255))
        case "cut":
            del bytes_[data.draw(places) :]
        case "zero":
            a, b = sorted((data.draw(places), data.draw(places)))
            bytes_[a:b] = bytes(b - a)
        case "swap":
            a = data.draw(places)
            bytes_ = bytes_[a:] + bytes_[:a]
        case "repeat":
            bytes_ += bytes_[data.draw(places) :]
    path = newest(store, suffix)
    path.write_bytes(bytes_)
    try:
        assert same(store.last(), example(5)) and bytes(bytes_) == whole[suffix]
    except CheckpointError:
        assert bytes(bytes_) != whole[suffix]
    finally:
        path.write_bytes(whole[suffix])


# ------------------------------------------------------------------------------------------------------ of which model


@pytest.mark.parametrize(
    ("given_", "said"),
    [
        (MODEL | {"0.bias": ["float32", [4]]}, r"parameter 1 it has '0\.bias' float32 \[3\], this module has '0\.bias' float32 \[4\]"),
        (MODEL | {"0.bias": ["float64", [3]]}, r"this module has '0\.bias' float64 \[3\]"),
        (MODEL | {"1.bias": ["float32", [3]]}, r"parameter 2 it has nothing more, this module has '1\.bias'"),
        ({"0.weight": ["float32", [3, 5]]}, "this module has nothing more"),
        (dict(reversed(MODEL.items())), r"parameter 0 it has '0\.weight' float32 \[3, 5\], this module has '0\.bias'"),
    ],
)
def test_the_checkpoint_of_another_model_is_refused_by_the_first_difference(tmp_path: Path, given_: Any, said: str) -> None:
    store = Checkpoints(str(tmp_path), "run")
    store.save(example(1))
    loaded = store.last()
    loaded.require(MODEL)
    loaded.require({name: (torch.float32, torch.Size(shape)) for name, (_, shape) in MODEL.items()})
    with pytest.raises(CheckpointError, match=said):
        loaded.require(given_)


# ---------------------------------------------------------------------------------------------------- facts and schedulers

KEYS = st.text() | st.integers() | st.tuples(st.integers(), st.floats(allow_nan=False)) | st.just("~")
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda x: st.lists(x, max_size=3) | st.lists(x, max_size=3).map(tuple) | st.dictionaries(KEYS, x, max_size=3),
    max_leaves=12,
)


@settings(deadline=None, derandomize=True)
@given(PLAIN)
def test_facts_come_back_in_their_types(value: Any) -> None:
    text = json.dumps(to_json(value), allow_nan=False)
    assert repr(from_json(json.loads(text))) == repr(value)  # repr tells 1 from 1.0, a tuple from a list, and nan from nothing


def test_counters_and_small_tensors_come_back() -> None:
    value = {"c": Counter({3: 2, 5: 1}), "lr": torch.tensor(0.1), "b": torch.tensor([math.nan, math.inf, -0.0], dtype=torch.bfloat16)}
    back = from_json(json.loads(json.dumps(to_json(value), allow_nan=False)))
    assert type(back["c"]) is Counter and back["c"] == value["c"] and repr(back) == repr(value)


SCHEDULERS: list[Callable[[Any], Any]] = [
    lambda o: torch.optim.lr_scheduler.StepLR(o, 2),
    lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [2, 4, 4]),
    lambda o: torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.5, total_steps=20),
    lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2, cycle_momentum=False),
    lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
    lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    lambda o: torch.optim.lr_scheduler.SequentialLR(
        o, [torch.optim.lr_scheduler.ConstantLR(o), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
]


@pytest.mark.parametrize("make", SCHEDULERS)
def test_a_scheduler_goes_on_from_its_checkpoint(tmp_path: Path, make: Callable[[Any], Any]) -> None:
    def fresh() -> tuple[torch.optim.Optimizer, Any]:
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
        return optimizer, make(optimizer)

    def walk(optimizer: torch.optim.Optimizer, scheduler: Any, steps: int) -> list[float]:
        rates = []
        for _ in range(steps):
            optimizer.step()
            scheduler.step(*([1.0] if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau) else []))
            rates.append(optimizer.param_groups[0]["lr"])
        return rates

    optimizer, scheduler = fresh()
    walk(optimizer, scheduler, 3)
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    store = Checkpoints(str(tmp_path), "run")
    store.save(example(3, facts={"scheduler": scheduler.state_dict(), "groups": groups}))
    facts = store.last().facts
    again, resumed = fresh()
    resumed.load_state_dict(facts["scheduler"])
    again.param_groups[0].update(facts["groups"][0])
    assert walk(again, resumed, 7) == walk(optimizer, scheduler, 7)


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"scheduler": {"fns": [print, 1]}}, r"facts\['scheduler'\]\['fns'\]\[0\] is a builtin_function_or_method"),
        ({"x": {1, 2}}, r"facts\['x'\] is a set"),
        ({"x": b"bytes"}, "is a bytes"),
        ({"x": torch.zeros(2000)}, r"is a tensor \[2000\] of torch.float32"),
        ({(1, b"k"): 1}, r"facts\[key .*\]\[1\] is a bytes"),
    ],
)
def test_what_json_cannot_hold_is_refused_by_its_path(tmp_path: Path, facts: dict[Any, Any], said: str) -> None:
    store = Checkpoints(str(tmp_path), "run")
    with pytest.raises(CheckpointError, match=said):
        store.save(example(1, facts=facts))
    assert names(store) == []


def test_facts_that_hold_themselves_or_are_endless_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ring: dict[str, Any] = {}
    ring["again"] = ring
    store = Checkpoints(str(tmp_path), "run")
    with pytest.raises(CheckpointError, match="does it hold itself"):
        store.save(example(1, facts=ring))
    monkeypatch.setattr(manifest, "MOST", 2000)
    with pytest.raises(CheckpointError, match="belongs in `tensors`"):
        store.save(example(1, facts={"history": [0.5] * 1000}))
    assert names(store) == []


# ----------------------------------------------------------------------------------- a fault at every call to the system


class Faulty:
    """An `os` whose k-th call fails: before it is done, half done (a write), or done and yet reported as failed."""

    def __init__(self, k: int, how: str, fault: Callable[[], None]) -> None:
        self.k, self.how, self.fault = k, how, fault
        self.calls: list[tuple[str, Any]] = []

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in CALLS:
            return real

        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, args[0]))
            mine = len(self.calls) - 1 == self.k
            if mine and name == "write" and self.how == "half":
                real(args[0], args[1][: len(args[1]) // 2])
            if mine and self.how != "after" and name != "close":  # close always closes
                self.fault()
            done = None if name == "fsync" else real(*args, **kwargs)  # the disk is not what is tested here
            if mine:
                self.fault()
            return done

        return call


def no_space() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def prepared(folder: Path) -> Checkpoints:
    """A run whose next save does everything: a dead writer's files to sweep, and an old checkpoint to delete."""
    store = Checkpoints(str(folder), "run", keep=1)
    store.save(example(1, 2.0))
    gone = f"{module._here()}-{dead_process()}-00000000"
    for name in (f"step-00000002.{gone}.safetensors", f"000002.step-00000002.{gone}.json.part"):
        Path(store.folder.path, name).write_bytes(b"half")
    return store


def dead_process() -> int:
    with subprocess.Popen(["true"]) as process:
        pass
    return process.pid


def counted(store: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """The calls of a save of step 2."""
    faulty = Faulty(-1, "before", no_space)
    with monkeypatch.context() as patch:
        patch.setattr(files, "os", faulty)
        store.save(example(2, 1.0))
    assert is_tidy(store) and store.steps() == [2]
    return faulty.calls


def test_the_order_of_a_save_is_the_one_that_a_crash_cannot_hurt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Checkpoints(str(tmp_path), "run", keep=1)
    store.save(example(1, 2.0))
    calls = [(name, str(at).rpartition(".")[2] if isinstance(at, str) else "") for name, at in counted(store, monkeypatch)]
    run = str(tmp_path / "run").rpartition(".")[2]
    to_disk = [("fsync", ""), ("close", "")]
    folder = [("open", run), *to_disk]
    expected = [
        ("open", "safetensors"), *5 * [("write", "")], *to_disk, *folder,
        ("open", "part"), ("write", ""), *to_disk, *folder,
        ("replace", "part"), *folder,
        ("unlink", "json"), *folder,
        ("unlink", "safetensors"), *folder,
    ]  # fmt: skip
    assert [call for call in calls if call[0] != "scandir"] == expected
    assert sum(name == "fsync" for name, _ in calls) == 7  # as the docstring says


@pytest.mark.parametrize("how", ["before", "half", "after"])
def test_an_error_at_any_call_leaves_the_older_or_the_newer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    calls = counted(prepared(tmp_path / "counted"), monkeypatch)
    outcomes = Counter()
    for k, (name, _) in enumerate(calls):
        if how == "half" and name != "write":
            continue
        store = prepared(tmp_path / f"{how}{k}")
        with monkeypatch.context() as patch:
            patch.setattr(files, "os", Faulty(k, how, no_space))
            try:
                store.save(example(2, 1.0))
                refused = False
            except CheckpointError as error:
                refused = True
                assert "step 2 could not be saved" in str(error) and "No space left on device" in str(error)
        outcomes[refused] += 1
        fresh = Checkpoints(str(tmp_path / f"{how}{k}"), "run", keep=1)
        assert same(fresh.last(), example(1, 2.0) if refused else example(2, 1.0)), (k, name)
        if refused:  # our aside files are gone; what the dead writer left may still wait for a better day
            left = [s for s in names(fresh) if f"-{os.getpid()}-" in s]
            assert len(left) == 2 and is_tidy_of(left), (k, name, left)
        fresh.save(example(3, 0.5))
        assert same(fresh.last(), example(3, 0.5)) and same(fresh.best(), example(3, 0.5)) and fresh.steps() == [3]
    assert outcomes[True] and (how == "half" or outcomes[False])


def is_tidy_of(found: list[str]) -> bool:
    (saved,) = module._published(found)
    return sorted(found) == sorted([saved.manifest, saved.tensors])


@pytest.mark.parametrize("how", ["before", "half"])
def test_a_kill_at_any_call_leaves_the_older_or_the_newer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    calls = counted(prepared(tmp_path / "counted"), monkeypatch)
    published = [name for name, _ in calls].index("replace")
    for k, (name, _) in enumerate(calls):
        if how == "half" and name != "write":
            continue
        def act(k: int = k) -> str:
            store = prepared(tmp_path / f"{how}{k}")
            files.os = Faulty(k, how, kill)  # in the child alone
            store.save(example(2, 1.0))
            return "survived"

        assert child(act)() == "killed"
        fresh = Checkpoints(str(tmp_path / f"{how}{k}"), "run", keep=1)
        assert same(fresh.last(), example(2, 1.0) if k > published else example(1, 2.0)), (k, name)
        fresh.save(example(3, 0.5))
        assert same(fresh.last(), example(3, 0.5)) and fresh.steps() == [3] and is_tidy(fresh), (k, name)


@pytest.mark.parametrize("further", range(1, 12))
def test_a_kill_while_an_error_is_cleaned_up_leaves_no_manifest_without_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, further: int
) -> None:
    """The rename was done and yet reported as failed; the process dies while it takes the checkpoint back."""
    calls = counted(prepared(tmp_path / "counted"), monkeypatch)
    k = [name for name, _ in calls].index("replace")

    def act() -> str:
        store = prepared(tmp_path / "run")

        def lost() -> None:
            files.os = Faulty(further - 1, "before", kill)
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        files.os = Faulty(k, "after", lost)
        store.save(example(2, 1.0))
        return "survived"

    assert child(act)().startswith(("killed", "CheckpointError: step 2"))
    fresh = Checkpoints(str(tmp_path / "run"), "run", keep=1)
    assert same(fresh.last(), example(1, 2.0)) or (further == 1 and same(fresh.last(), example(2, 1.0)))
    fresh.save(example(3, 0.5))
    assert same(fresh.last(), example(3, 0.5)) and is_tidy(fresh)


@pytest.mark.parametrize("manifest_too", [True, False])
def test_a_checkpoint_that_goes_as_soon_as_it_came_was_either_replaced_or_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, manifest_too: bool
) -> None:
    """Another writer that is ahead deletes the manifest, then the tensors: no error. The tensors alone are gone: an error."""
    store = Checkpoints(str(tmp_path), "run", keep=1)
    rename, entries, listings = store.folder.rename, store.folder.entries, []

    def rename_and_lose(old: str, new: str) -> None:
        rename(old, new)
        (saved,) = module._published([new])
        Path(store.folder.path, saved.tensors).unlink()
        listings.append(entries())  # begun before the manifest went
        if manifest_too:
            Path(store.folder.path, new).unlink()

    monkeypatch.setattr(store.folder, "rename", rename_and_lose)
    monkeypatch.setattr(store.folder, "entries", lambda: listings.pop() if listings else entries())
    if manifest_too:
        store.save(example(1))
    else:
        with pytest.raises(CheckpointError, match="safetensors is not there after it was written"):
            store.save(example(1))
    assert names(store) == []


def test_ctrl_c_while_saving_is_ctrl_c_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Checkpoints(str(tmp_path), "run")
    store.save(example(1))

    def interrupt() -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(files, "os", Faulty(4, "half", interrupt))
        store.save(example(2))
    assert store.steps() == [1] and is_tidy(store)


def test_a_mount_without_fsync_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Mount:
        def __getattr__(self, name: str) -> Any:
            return getattr(os, name) if name != "fsync" else self.refuse

        def refuse(self, handle: int) -> None:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(files, "os", Mount())
    store = Checkpoints(str(tmp_path), "run")
    store.save(example(1))
    assert same(store.last(), example(1))


def test_writers_killed_at_random_lose_nothing_that_they_had_finished(tmp_path: Path) -> None:
    """15 kills in a row, on a real disk with real fsync."""
    chance, done = random.Random(0), 0
    for i in range(15):
        told, out = os.pipe()

        def act(out: int = out) -> str:
            store = Checkpoints(str(tmp_path), "run")
            begun = store.last()
            for step in itertools.count(1 if begun is None else begun.step + 1):
                big = torch.full((200_000,), float(step))
                store.save(example(step, 1.0 / step, {"weights": example(step).tensors["weights"], "big": big}))
                os.write(out, step.to_bytes(8, "little"))

        writer = child(act)
        os.close(out)
        finished = int.from_bytes(os.read(told, 8), "little")  # it saves at least once
        time.sleep(chance.uniform(0.0, 0.04))
        os.kill(writer.process, signal.SIGKILL)  # type: ignore[attr-defined]
        assert writer() == "killed"
        with os.fdopen(told, "rb") as source:
            finished = max([finished, *(int.from_bytes(x, "little") for x in iter(lambda: source.read(8), b""))])
        for loaded in (Checkpoints(str(tmp_path), "run").last(), Checkpoints(str(tmp_path), "run").best()):
            assert loaded.step in (finished, finished + 1) and loaded.step > done, i
            assert loaded.tensors["big"].unique().tolist() == [loaded.step] and loaded.facts == {"seed": loaded.step}
        done = finished
    store = Checkpoints(str(tmp_path), "run")
    store.save(example(done + 2, 0.0))
    assert is_tidy(store) and done >= 15


def test_loaded_tensors_may_be_written_to(tmp_path: Path) -> None:
    store = Checkpoints(str(tmp_path), "run")
    store.save(example(1))
    loaded = store.last().tensors
    loaded["weights"].zero_()
    assert torch.equal(loaded["optimizer/0/0/exp_avg"], example(1).tensors["optimizer/0/0/exp_avg"])
    assert same(store.last(), example(1))


def test_two_writers_and_a_reader_of_one_run_never_see_a_mixture(tmp_path: Path) -> None:
    def writer(who: int) -> Callable[[], str]:
        def act() -> str:
            store = Checkpoints(str(tmp_path), "run", keep=1)
            for step in range(1, 26):
                loss = 100.0 - step
                store.save(example(step, loss, {"big": torch.full((20_000,), 1000.0 * who + step)}, {"who": who}))
            return "done"

        return act

    writers = [child(writer(who)) for who in (1, 2)]
    store, reached = Checkpoints(str(tmp_path), "run", keep=1), 0
    while reached < 25:
        for loaded in (store.last(), store.best()):
            if loaded is not None:
                assert loaded.tensors["big"].unique().tolist() == [1000.0 * loaded.facts["who"] + loaded.step]
                reached = max(reached, loaded.step)
    assert [wait() for wait in writers] == ["done", "done"]
    assert store.last().step == 25 and is_tidy(store) and len(names(store)) <= 4


# ------------------------------------------------------------------------------------------- what dead writers leave behind


def test_what_a_dead_writer_left_is_swept_and_what_a_living_one_writes_is_not(tmp_path: Path) -> None:
    store = Checkpoints(str(tmp_path), "run")
    store.folder.create()
    here = module._here()
    other = f"{int(here, 16) ^ 1:08x}"
    gone = dead_process()
    left = {
        f"{here}-{gone}-00000001": False,  # dead
        f"{here}-{os.getpid()}-00000002": True,  # alive
        f"{here}-1-00000003": True,  # alive, and not ours to signal
        f"{other}-{gone}-00000004": True,  # on another machine, where that process may live
        f"{other}-{gone}-00000005": False,  # there too, and silent for two hours
    }
    for writer in left:
        for name in (f"step-00000009.{writer}.safetensors", f"000009.step-00000009.{writer}.json.part"):
            Path(store.folder.path, name).write_bytes(b"half")
            if writer.endswith("5"):
                os.utime(Path(store.folder.path, name), (time.time() - 7200,) * 2)
    store.save(example(1))
    for writer, stays in left.items():
        assert sum(writer in name for name in names(store)) == 2 * stays
    assert store.steps() == [1] and same(store.last(), example(1))


def test_a_writer_that_publishes_and_dies_while_we_sweep_keeps_its_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Checkpoints(str(tmp_path), "run")
    assert child(lambda: str(store.save(example(5, 0.5))))() == "None"
    published = newest(store, "json")
    waiting = published.rename(f"{published}.part")
    real = module._is_dead

    def and_now(writer: str) -> bool:
        if waiting.exists():
            waiting.rename(published)
        return real(writer)

    monkeypatch.setattr(module, "_is_dead", and_now)
    store.save(example(6, 1.0))
    assert same(store.at(5), example(5, 0.5)) and same(store.best(), example(5, 0.5))


# ----------------------------------------------------------------------------------- full disks, and those that refuse us


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    where = tmp_path / "tiny"
    where.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", where], capture_output=True).returncode:
        pytest.skip("only root may mount a file system of one megabyte; test_a_file_that_may_not_grow... stands in")
    yield where
    subprocess.run(["umount", where], check=True)


def big(step: int, n: int) -> Checkpoint:
    return example(step, tensors={"big": torch.full((n,), float(step))})


def test_a_full_disk_is_a_loud_error_that_costs_only_the_new_checkpoint(tiny: Path) -> None:
    store = Checkpoints(str(tiny), "run")
    store.save(big(1, 100_000))
    before = names(store)
    with pytest.raises(CheckpointError) as info:
        store.save(big(2, 200_000))
    told = str(info.value)
    assert f"step 2 could not be saved in {tiny}/run" in told and "No space left on device" in told
    assert re.search(r"it needs 8000\d\d bytes", told) and "the checkpoint of step 1 is whole" in told and "free some space" in told
    free = int(told.partition(" bytes and ")[2].partition(" are free")[0])
    assert 500_000 < free < 800_000
    assert names(store) == before and same(store.last(), big(1, 100_000))
    store.save(big(3, 100_000))  # what fits goes on
    assert same(store.last(), big(3, 100_000))
    back = revive(report(info.value, "rank 0"))
    assert type(back) is CheckpointError and str(back) == told


def test_a_disk_that_a_dead_writer_filled_has_room_again(tiny: Path) -> None:
    store = Checkpoints(str(tiny), "run")
    store.save(big(1, 50_000))
    Path(store.folder.path, f"step-00000002.{module._here()}-{dead_process()}-00000000.safetensors").write_bytes(bytes(700_000))
    store.save(big(2, 100_000))
    assert same(store.last(), big(2, 100_000)) and is_tidy(store)


def test_a_disk_that_became_read_only_can_still_be_read(tiny: Path) -> None:
    store = Checkpoints(str(tiny), "run")
    store.save(example(1))
    subprocess.run(["mount", "-o", "remount,ro", tiny], check=True)
    with pytest.raises(CheckpointError, match=r"Read-only file system.*step 1 is whole; save where this process may write"):
        store.save(example(2))
    assert same(store.last(), example(1))


def test_a_file_that_may_not_grow_is_a_loud_error(tmp_path: Path) -> None:
    store = Checkpoints(str(tmp_path), "run")
    store.save(example(1))

    def act() -> str:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        store.save(big(2, 50_000))
        return "saved"

    told = child(act)()
    assert told.startswith("CheckpointError: step 2") and "File too large" in told and "raise the limit" in told
    assert same(store.last(), example(1)) and is_tidy(store)


def test_a_folder_that_we_may_not_write_is_a_loud_error() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        store = Checkpoints(folder, "run")
        store.save(example(1))
        os.chmod(store.folder.path, 0o555)

        def act(run: str) -> Callable[[], str]:
            def inner() -> str:
                if os.getuid() == 0:  # root is above permissions
                    os.setresuid(65534, 65534, 65534)
                mine = Checkpoints(folder, run)
                assert run == "new" or same(mine.last(), example(1))
                mine.save(example(2))
                return "saved"

            return inner

        os.chmod(folder, 0o555)
        told = [child(act(run))() for run in ("run", "new")]
        os.chmod(folder, 0o755)
        os.chmod(store.folder.path, 0o755)
        for said, run in zip(told, ("run", "new"), strict=True):
            assert said.startswith(f"CheckpointError: step 2 could not be saved in {folder}/{run}: PermissionError"), said
            assert "save where this process may write" in said
        assert "the checkpoint of step 1 is whole" in told[0] and same(store.last(), example(1)) and is_tidy(store)


def test_a_path_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = Checkpoints(str(tmp_path / "file"), "run")
    with pytest.raises(CheckpointError, match=r"step 1 could not be saved.*give the path of a folder"):
        store.save(example(1))
    with pytest.raises(CheckpointError, match="cannot be listed"):
        store.last()


def test_old_checkpoints_that_cannot_be_deleted_are_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    store = Checkpoints(str(tmp_path), "run", keep=1)
    store.save(example(1))

    def refuse(*names: str) -> None:
        raise PermissionError(errno.EACCES, "sticky")

    monkeypatch.setattr(store.folder, "delete", refuse)
    store.save(example(2, 0.5))
    assert store.last().step == 2 and "step 2 is saved, but older checkpoints" in caplog.text and "sticky" in caplog.text


# ----------------------------------------------------------------------------------------------------------- object stores


class Store(fs.FSSpecHandler):
    """An object store: a file is there once it is closed, nothing is renamed but by a copy, and the k-th call is the last."""

    def __init__(self, k: int = -1, moves: bool = True) -> None:
        super().__init__(fsspec.get_filesystem_class("memory")(skip_instance_cache=True))
        self.k, self.moves, self.calls = k, moves, 0

    def __getattribute__(self, name: str) -> Any:
        if name in ("open_output_stream", "open_input_stream", "move", "copy_file", "delete_file", "get_file_info_selector"):
            self.calls += 1
            if 0 <= self.k < self.calls:  # from here on, the network is gone
                raise ConnectionError("the network is gone")
            if name == "move" and not self.moves:
                raise NotImplementedError
        return super().__getattribute__(name)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    memory = fsspec.get_filesystem_class("memory")
    memory.store.clear()
    memory.pseudo_dirs[:] = [""]
    store = Store()
    monkeypatch.setattr(files, "open_system", lambda path: (fs.PyFileSystem(store), "/bucket/" + path))
    yield store
    memory.store.clear()


@pytest.mark.parametrize("moves", [True, False])
def test_an_object_store_holds_checkpoints(bucket: Store, moves: bool) -> None:
    bucket.moves = moves
    store = Checkpoints("ck", "run", keep=1)
    assert store.last() is None
    for step in (1, 2, 3):
        store.save(example(step, 1.0 / step))
        assert same(store.last(), example(step, 1.0 / step)) and store.steps() == [step] and is_tidy(store)


def test_a_network_that_goes_at_any_call_leaves_the_older_or_the_newer(bucket: Store) -> None:
    store = Checkpoints("ck", "run", keep=1)
    store.save(example(1, 1.0))
    bucket.calls = 0
    store.save(example(2, 0.5))
    total = bucket.calls
    assert total >= 9
    for k in range(total):
        bucket.calls, bucket.k = 0, -1
        here = Checkpoints("ck", f"run{k}", keep=1)
        here.save(example(1, 1.0))
        bucket.calls, bucket.k = 0, k
        try:
            here.save(example(2, 0.5))
            refused = False
        except CheckpointError as error:
            refused = "ConnectionError: the network is gone" in str(error)
            assert refused
        bucket.k = -1
        # the older, or the newer; where the error came after the rename, it cannot be taken back without a network
        assert same(here.last(), example(1, 1.0)) or same(here.last(), example(2, 0.5))
        assert refused or here.last().step == 2
        here.save(example(3, 0.25))
        assert same(here.last(), example(3, 0.25)) and here.steps() == [3]


def test_a_uri_that_pyarrow_opens_will_do() -> None:
    try:
        fs.FileSystem.from_uri("fsspec+memory://checkpoints")
    except ValueError:  # ArrowInvalid
        pytest.skip("pyarrow 15 opens no filesystem of fsspec by its address")
    store = Checkpoints("fsspec+memory://checkpoints", "run")
    store.save(example(1))
    assert same(Checkpoints("fsspec+memory://checkpoints", "run").last(), example(1))


def test_the_mount_of_dbfs_is_where_its_files_are(tmp_path: Path) -> None:
    assert Checkpoints("dbfs:/ml/ck", "run").folder.path == "/dbfs/ml/ck/run"
    assert Checkpoints("/Volumes/a/b", "run").folder.path == "/Volumes/a/b/run"
    assert Checkpoints(f"file://{tmp_path}", "run").folder.path == f"{tmp_path}/run"


# ------------------------------------------------------------------------------------------------------------ single files


def test_a_single_file_is_written_whole_and_nothing_is_left_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in (f"{tmp_path}/a/b/x", f"file://{tmp_path}/a/b/y", "z"):
        files.write(path, b"old")
        files.write(path, memoryview(b"new"))
        assert files.read(path) == b"new"
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(files, "os", Faulty(1, "half", no_space))
        files.write(f"{tmp_path}/a/b/x", b"newest")
    assert files.read(f"{tmp_path}/a/b/x") == b"new"
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()) == ["a/b/x", "a/b/y", "z"]
