"""Checkpoints on disk: complete or absent, checked before they are believed, and free of pickle.

    <path>/<run>/step-00000120.<writer>.safetensors           all tensors; without its manifest it is nothing
    <path>/<run>/000017.step-00000120.<writer>.json           the manifest: written aside (.part), renamed last
                 |      |             |
                 |      |             machine-process-random: no two saves share a name, so none can mix with another
                 |      rounds done
                 the 17th save of the run: the highest is the last, also where a fit went back to an earlier step

The manifest holds the numbers of the fit, the shape of its model, and the length and sha256 of the tensors (manifest.py).

The order of a save makes a crash harmless: tensors, manifest aside, rename; then the oldest go, manifest first. Each step is on
the disk before the next begins (files.py). What a dead writer left is swept by the next save. No folder is ever renamed, so a
mount or an object store will do.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import math
import os
import platform
import re
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from safetensors.torch import load as load_tensors
from torch import Tensor

from bigdl_lite.data.files import Entry, open_folder
from bigdl_lite.data.manifest import FORMAT, MOST, VERSION, check_digest, check_length, decode, encode, from_json, pack, to_json
from bigdl_lite.errors import CheckpointError, RecipeError

_LOG = logging.getLogger("bigdl_lite")
_STALE = 3600.0  # seconds after which a file without a manifest belongs to nobody, alive or not
_TRIES = 5  # readings of a folder in which another writer deletes

_WRITER = r"(?P<writer>[0-9a-f]{8}-\d{1,9}-[0-9a-f]{8})"
_TENSORS = re.compile(rf"step-\d{{8,}}\.{_WRITER}\.safetensors")
_MANIFEST = re.compile(rf"(?P<serial>\d{{6,}})\.step-(?P<step>\d{{8,}})\.{_WRITER}\.json")
_ASIDE = re.compile(rf"{_MANIFEST.pattern}\.part")
_WAYS = {
    errno.ENOSPC: "free some space, or save elsewhere", errno.EDQUOT: "free some space, or save elsewhere",
    errno.EFBIG: "raise the limit on the size of a file", errno.EROFS: "save where this process may write",
    errno.EACCES: "save where this process may write", errno.EPERM: "save where this process may write",
    errno.ENOTDIR: "give the path of a folder", errno.EEXIST: "give the path of a folder",
}  # fmt: skip

Shapes = Mapping[str, Sequence[Any]]


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A moment of a fit, between two steps.

    step, epoch, at   steps done in all; the epoch that the next one belongs to; the steps of that epoch already done
    loss              what best() goes by: lower is better (of an accuracy, give the negative), NaN is never best
    model             name -> [dtype, shape] of every parameter, in flat order
    tensors           "weights" [n], "buffers" [m] float64, "optimizer/<key>" or "optimizer/<parameter>/<key>", "constant/<parameter>",
                      on any device. Nobody may write to them while they are saved. Loaded ones lie in memory of their own.
    facts             all else, as to_json takes it: scheduler, seed, batch size, workers, rows, versions
    """

    step: int
    epoch: int
    at: int
    loss: float
    model: Shapes
    tensors: dict[str, Tensor]
    facts: dict[str, Any]

    def require(self, model: Shapes) -> None:
        """Raises CheckpointError, naming the first difference, where this is the checkpoint of another model."""
        saved, given = _plain(self.model), _plain(model)
        for i in range(max(len(saved), len(given))):
            a, b = (f"{x[i][0]!r} {x[i][1]} {x[i][2]}" if i < len(x) else "nothing more" for x in (saved, given))
            if a != b:
                raise CheckpointError(
                    f"the checkpoint of step {self.step} is of another model: as parameter {i} it has {a}, this module has {b}; "
                    "give the module that was trained, or begin anew under another run"
                )


def _plain(model: Shapes) -> list[tuple[str, str, list[int]]]:
    return [(name, str(dtype).removeprefix("torch."), list(shape)) for name, (dtype, shape) in model.items()]


class _Saved(NamedTuple):
    """A published checkpoint, as its name tells; they sort from the first saved to the last."""

    serial: int
    writer: str
    step: int

    @property
    def manifest(self) -> str:
        return f"{self.serial:06d}.step-{self.step:08d}.{self.writer}.json"

    @property
    def tensors(self) -> str:
        return f"step-{self.step:08d}.{self.writer}.safetensors"


class Checkpoints:
    """The checkpoints of one run: the newest `keep`, and the best. All that goes wrong with them is a CheckpointError.

    Two writers of one run do no harm to each other: whoever renames last is last(); of two in the same instant, either.

    Cost of a save  no copy of the tensors (those on a GPU are copied one at a time), one pass of sha256, one of writing, seven fsyncs.
    Cost of a load  one pass of reading, one of sha256; the file and the tensors are in memory at once.
    """

    def __init__(self, path: str, run: str, keep: int = 2) -> None:
        if not re.fullmatch(r"\w[\w.-]*", run):
            raise RecipeError(f"run is {run!r}; it names a folder: take letters, digits, '.', '_' and '-'")
        if keep < 1:
            raise RecipeError(f"keep is {keep}, must be at least 1")
        self.run, self.keep = run, keep
        self.folder = open_folder(path, run)
        self._losses: dict[str, float] = {}  # of manifests that were read once: they never change

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, from the first saved to the last."""
        latest = {s.step: s for s in _published(self._entries())}
        return [s.step for s in sorted(latest.values())]

    def last(self) -> Checkpoint | None:
        """The one saved last; None where there is none. It never falls back to an older one by itself."""
        return self._load(lambda found: found[-1] if found else None)

    def best(self) -> Checkpoint | None:
        """The first one with the lowest loss; None where no loss is a number."""
        return self._load(lambda found: _lowest({s: self._loss(s) for s in found}))

    def at(self, step: int) -> Checkpoint:
        loaded = self._load(lambda found: next((s for s in reversed(found) if s.step == step), None))
        if loaded is None:
            told = ", ".join(map(str, self.steps())) or "none"
            raise CheckpointError(f"{self.folder.path} has no checkpoint of step {step}; it has: {told}")
        return loaded

    def save(self, checkpoint: Checkpoint) -> None:
        """Saves it, then deletes what is neither among the newest `keep` nor the best. After an error all is as before."""
        nbytes, parts = pack(checkpoint.tensors)
        body = _body(checkpoint, self.run)
        saved, before = _Saved(0, _writer(), checkpoint.step), None
        left: list[str] = []
        try:
            self.folder.create()
            before = max(_published(self.folder.entries()), default=None)
            self._sweep()
            digest = hashlib.sha256()
            left = [saved.tensors]
            self.folder.write(saved.tensors, _through(digest, parts))
            manifest = encode(body | {"tensors": {"nbytes": nbytes, "sha256": digest.hexdigest()}})
            newest = max(_published(self.folder.entries()), default=saved)  # once more: writing took its time
            saved = saved._replace(serial=newest.serial + 1)
            aside = f"{saved.manifest}.part"
            left = [saved.manifest, aside, saved.tensors]  # in this order, so that no manifest outlives its tensors
            self.folder.write(aside, [manifest])
            self.folder.rename(aside, saved.manifest)
            if not (self._is_there(saved, nbytes) or self._is_there(saved, nbytes)):  # twice: another may delete while we list
                raise OSError(f"{saved.tensors} is not there after it was written")
        except BaseException as error:
            with contextlib.suppress(Exception):
                self.folder.delete(*left)
            if not isinstance(error, Exception):  # Ctrl-C
                raise
            raise CheckpointError(self._why(error, checkpoint.step, nbytes, before)) from error
        try:
            self._prune()
        except Exception as error:
            _LOG.warning("step %d is saved, but older checkpoints in %s stay: %s", checkpoint.step, self.folder.path, error)

    def _is_there(self, saved: _Saved, nbytes: int) -> bool:
        entries = self.folder.entries()
        return saved.manifest not in entries or entries.get(saved.tensors, Entry(-1, 0.0)).nbytes == nbytes

    def _why(self, error: Exception, step: int, nbytes: int, before: _Saved | None) -> str:
        free = None
        with contextlib.suppress(OSError):
            free = self.folder.free()
        told = f"step {step} could not be saved in {self.folder.path}: {type(error).__name__}: {error}; it needs {nbytes} bytes"
        told += f" and {free} are free" if free is not None else ""
        told += f"; the checkpoint of step {before.step} is whole" if before else ""
        way = _WAYS.get(getattr(error, "errno", None) or 0)
        return f"{told}; {way}" if way else told

    def _entries(self) -> dict[str, Entry]:
        try:
            return self.folder.entries()
        except OSError as error:
            raise CheckpointError(f"the checkpoints in {self.folder.path} cannot be listed: {error}") from error

    def _load(self, choose: Callable[[list[_Saved]], _Saved | None]) -> Checkpoint | None:
        for _ in range(_TRIES):
            entries, saved = self._entries(), None
            found = _published(entries)
            try:
                saved = choose(found)
                return saved and self._read(saved, entries, self._way(saved, found))
            except FileNotFoundError as error:  # another writer deleted it since it was listed
                gone = error
            except OSError as error:
                raise CheckpointError(f"a checkpoint in {self.folder.path} cannot be read: {error}") from error
        raise CheckpointError(f"{self.folder.path}: {gone.filename or gone} is missing; {self._way(saved, found)}") from gone

    def _way(self, saved: _Saved | None, found: list[_Saved]) -> str:
        others = [s for s in found if s != saved]
        if saved is None or not others:
            return "no other checkpoint is left: begin anew under another run"
        return f"take at({others[-1].step}) instead, or delete {saved.manifest} and the others remain"

    def _manifest(self, saved: _Saved, way: str) -> dict[str, Any]:
        path = f"{self.folder.path}/{saved.manifest}"
        body = decode(self.folder.read(saved.manifest, MOST + 1), path, way)
        try:
            body["loss"] = float(from_json(body["loss"]))
        except Exception as error:
            raise CheckpointError(f"{path} is no checkpoint that bigdl_lite wrote: it has no loss; {way}") from error
        return body

    def _loss(self, saved: _Saved) -> float:
        if saved.manifest not in self._losses:
            way = f"best() reads them all: delete {saved.manifest} where that checkpoint is not needed"
            self._losses[saved.manifest] = self._manifest(saved, way)["loss"]
        return self._losses[saved.manifest]

    def _read(self, saved: _Saved, entries: dict[str, Entry], way: str) -> Checkpoint:
        path = f"{self.folder.path}/{saved.tensors}"
        body = self._manifest(saved, way)
        try:
            nbytes, digest = body["tensors"]["nbytes"], body["tensors"]["sha256"]
            if saved.tensors not in entries:
                raise FileNotFoundError(errno.ENOENT, "no tensors", path)
            check_length(entries[saved.tensors].nbytes, nbytes, path, way)
            data = self.folder.read(saved.tensors, nbytes)
            check_digest(hashlib.sha256(data).hexdigest(), digest, path, way)
            if body["step"] != saved.step:
                raise ValueError(f"it is of step {body['step']}, its name says {saved.step}")
            numbers = body["step"], body["epoch"], body["at"], body["loss"]
            return Checkpoint(*numbers, body["model"], load_tensors(data), from_json(body["facts"]))
        except (OSError, CheckpointError):
            raise
        except Exception as error:  # whole, and yet not as we write it: an invented file
            told = f"{self.folder.path}/{saved.manifest} is no checkpoint that bigdl_lite wrote"
            raise CheckpointError(f"{told}: {type(error).__name__}: {error}; {way}") from error

    def _prune(self) -> None:
        found = _published(self.folder.entries())
        latest = {s.step: s for s in found}  # a step saved again replaces its first
        kept, losses = set(sorted(latest.values())[-self.keep :]), {}
        for s in sorted(latest.values()):
            with contextlib.suppress(CheckpointError, FileNotFoundError):  # a damaged one is never the best
                losses[s] = self._loss(s)
        kept |= {s for s in [_lowest(losses)] if s}
        for s in found:
            if s not in kept:
                self.folder.delete(s.manifest, s.tensors)
                self._losses.pop(s.manifest, None)

    def _sweep(self) -> None:
        """Deletes what writers left that are dead, or that were silent for an hour."""
        dead = [
            name
            for name, entry in self.folder.entries().items()
            if (found := _TENSORS.fullmatch(name) or _ASIDE.fullmatch(name))
            and (_is_dead(found["writer"]) or time.time() - entry.changed > _STALE)
        ]
        if not dead:
            return
        # a writer may have published and then died: only now is it certain which have a manifest
        whole = {s.tensors for s in _published(self.folder.entries())}
        with contextlib.suppress(OSError):  # where it matters, the save that follows will say so
            self.folder.delete(*(name for name in dead if name not in whole))


def _lowest(losses: dict[_Saved, float]) -> _Saved | None:
    return min((s for s, loss in losses.items() if not math.isnan(loss)), key=losses.__getitem__, default=None)


def _published(names: Iterable[str]) -> list[_Saved]:
    found = filter(None, map(_MANIFEST.fullmatch, names))
    return sorted(_Saved(int(m["serial"]), m["writer"], int(m["step"])) for m in found)


def _here() -> str:
    """This machine, or container: a process id means something only inside it."""
    told = [platform.node()]
    with contextlib.suppress(OSError), open("/proc/sys/kernel/random/boot_id", encoding="ascii") as boot:
        told += [boot.read(), str(os.stat("/proc/self/ns/pid").st_ino)]
    return f"{zlib.crc32(''.join(told).encode()):08x}"


def _writer() -> str:
    return f"{_here()}-{os.getpid()}-{os.urandom(4).hex()}"


def _is_dead(writer: str) -> bool:
    here, process, _ = writer.split("-")
    if here != _here():
        return False
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        pass
    return False


def _body(checkpoint: Checkpoint, run: str) -> dict[str, Any]:
    weights = checkpoint.tensors.get("weights")
    n = sum(math.prod(shape) for _, _, shape in _plain(checkpoint.model))
    assert min(checkpoint.step, checkpoint.epoch, checkpoint.at) >= 0
    assert weights is None or not checkpoint.model or weights.numel() == n, f"{weights.numel()} weights for {n} of the model"
    return {
        "format": FORMAT,
        "version": VERSION,
        "torch": str(torch.__version__),
        "saved": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "run": run,
        "step": int(checkpoint.step),
        "epoch": int(checkpoint.epoch),
        "at": int(checkpoint.at),
        "loss": to_json(float(checkpoint.loss)),
        "model": {name: [dtype, shape] for name, dtype, shape in _plain(checkpoint.model)},
        "facts": to_json(checkpoint.facts),
    }


def _through(digest: Any, parts: Iterable[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    for part in parts:
        digest.update(part)
        yield part
