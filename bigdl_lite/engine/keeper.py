"""The state of a fit on its way to a checkpoint, or kept to go on from after a loss.

    owners     each gives its Part: a slice of the weights, and the state of the optimizer for it
    Keeper     on the driver; a state is whole when all owners have given their parts of one step
    disk       where a checkpoint is due (data/checkpoint.py); always written by the driver

Nothing here knows of tasks or sockets: parts come from threads (local), rounds (shuffle), or over a link (barrier).
"""

from __future__ import annotations

import json
import logging
import threading
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor

from bigdl_lite.algorithms import State, durable
from bigdl_lite.algorithms.exchange import NOTHING, merged
from bigdl_lite.data.checkpoint import Checkpoint, Checkpoints
from bigdl_lite.data.manifest import from_json, pack, to_json, unpack
from bigdl_lite.engine.recipe import Position, Recipe, Resume, Start, dealt
from bigdl_lite.errors import CheckpointError, WireError
from bigdl_lite.vector import Cut

_CONSTANT = "constant/"
_LOG = logging.getLogger("bigdl_lite")


@dataclass(frozen=True)
class Part:
    """What one owner knows at a moment. Its tensors may be views: they count until the owner's next step (but see Keeper.kept).

    save      whether a checkpoint is due, or the state is only to be kept
    cut       of the flat weights that `weights` and `state` belong to; owners: how many there are
    buffers, sums, lines    the same on every rank, but the lines of the history, which rank 0 alone has
    counts, shapes          rows of each share; the shape of one row in each column
    shared, own, peer       with an exchange: what its peers share, what this one has alone, its number; -1: no peer

    A peer that owns no weights whose state nobody else brings has no facts in `state`.
    """

    now: Position
    save: bool
    rank: int
    cut: Cut
    weights: Tensor
    state: State
    owners: int
    buffers: Tensor
    sums: dict[str, Any]
    lines: Sequence[dict[str, Any]]
    counts: Sequence[int]
    shapes: Sequence[Sequence[int]]
    shared: State = NOTHING
    own: State = NOTHING
    peer: int = -1


class Keep(Protocol):
    """What a rank gives its parts to. wish: whether rank 0 wants the state after the next step to be kept."""

    wish: bool

    def __call__(self, part: Part) -> None: ...


class _Forget:
    wish = False

    def __call__(self, part: Part) -> None:
        pass


forget = _Forget()


class Keeper:
    """Takes parts in any order, remembers the last whole state, and saves those that are due.

    checkpoints  where to; None: the state is only remembered
    about        what load() needs to make a model of a checkpoint; constants: the frozen parameters, which it needs too

    A save that fails is an error in the log and a warning, and training goes on: the checkpoint before it is whole.
    """

    wish = False

    def __init__(
        self, recipe: Recipe, checkpoints: Checkpoints | None = None, about: dict[str, Any] | None = None,
        constants: dict[str, Tensor] | None = None, lines: Sequence[dict[str, Any]] = (),
    ) -> None:  # fmt: skip
        self.recipe, self.checkpoints, self.about, self.before = recipe, checkpoints, about or {}, list(lines)
        self.constants = constants or {}
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._saving: Future[None] | None = None
        self._step, self._parts = -1, dict[int, Part]()
        self._whole: list[Part] = []

    def in_background(self) -> None:
        """From now on saves run beside the training; the parts of the next state then wait for them."""
        if self._pool is None and self.checkpoints is not None:
            self._pool = ThreadPoolExecutor(1, "bigdl_lite-save")

    def __call__(self, part: Part) -> None:
        self._settle()
        with self._lock:
            if part.now.step != self._step:  # owners meet in every step: what is missing of another one will not come
                self._step, self._parts = part.now.step, {}
            self._parts[part.rank] = part
            if len(self._parts) < part.owners:
                return
            self._whole = [self._parts[rank] for rank in sorted(self._parts)]
            self._parts = {}
            if not (part.save and self.checkpoints):
                return
            whole = self._whole
            if self._pool is None:
                self._save(whole)
            else:
                self._saving = self._pool.submit(self._save, whole)

    def ready(self, seconds: float) -> bool:
        """Whether the save that is under way is done, after at most so many seconds."""
        saving = self._saving
        return saving is None or bool(wait([saving], seconds).done)

    @property
    def kept(self) -> int:
        """The step of the last whole state, whose parts must not change before the next one is whole; -1: none."""
        whole = self._whole
        return whole[0].now.step if whole else -1

    def last(self) -> tuple[Start, list[dict[str, Any]]] | None:
        """The last whole state, without the constants, and the history until then; parts of a later one are let go."""
        self._settle()
        with self._lock:
            self._parts = {}
            return joined(self._whole, self.recipe, self.before) if self._whole else None

    def close(self) -> None:
        """Waits for the save that is under way."""
        self._settle()
        if self._pool is not None:
            self._pool.shutdown()

    def _settle(self) -> None:
        if self._saving is not None:
            wait([self._saving])

    def _save(self, parts: Sequence[Part]) -> None:
        try:
            start, lines = joined(parts, self.recipe, self.before)
            assert self.checkpoints is not None
            self.checkpoints.save(self._checkpoint(start, lines, parts[0]))
        except Exception as error:  # memory that is short, say: no state of a disk is worth the training
            why = str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
            _LOG.error("no checkpoint of step %d: %s", parts[0].now.step, why)
            warnings.warn(f"no checkpoint of step {parts[0].now.step}: {why}", RuntimeWarning, stacklevel=2)

    def _checkpoint(self, start: Start, lines: list[dict[str, Any]], part: Part) -> Checkpoint:
        resume = start.resume
        assert resume is not None
        facts = {
            "state": resume.state.facts, "sums": resume.sums, "dealt": resume.dealt, "history": lines, "about": self.about,
            "shapes": [list(shape) for shape in part.shapes],
        }  # fmt: skip
        constants = {_CONSTANT + name: x for name, x in self.constants.items()}
        tensors = {"weights": start.weights, "buffers": start.buffers, **resume.state.tensors, **constants}
        return Checkpoint(*resume.now, part.sums["loss"], model_of(self.recipe), tensors, facts)


def joined(parts: Sequence[Part], recipe: Recipe, before: Sequence[dict[str, Any]]) -> tuple[Start, list[dict[str, Any]]]:
    """All owners' parts as the start of a fit that goes on, in memory of its own, and the history until then."""
    first = parts[0]
    weights = torch.empty(recipe.blueprint.layout.n, dtype=recipe.blueprint.layout.dtype)
    for part in parts:
        weights[slice(*part.cut)] = part.weights.detach()
    state = durable(recipe.round.advance).join(part.state for part in parts if part.state.facts)
    peers = sorted((part for part in parts if part.peer >= 0), key=lambda part: part.peer)
    if peers:
        copied = [State({name: x.clone() for name, x in s.tensors.items()}, s.facts) for s in (first.shared, *(p.own for p in peers))]
        state = merged(state, copied[0], copied[1:])
    sums = {key: value for key, value in first.sums.items() if key != "loss"}
    resume = Resume(first.now, state, sums, dealt(recipe, first.counts, first.now))
    return Start(weights, first.buffers.clone(), {}, resume), [*before, *first.lines]


def dump(part: Part) -> tuple[int, Iterator[bytes | memoryview]]:
    """A part as bytes: how many, and in pieces that share the tensors' memory.    length 8 | JSON | safetensors"""
    told = {
        "now": list(part.now), "save": part.save, "rank": part.rank, "cut": list(part.cut), "owners": part.owners,
        "facts": to_json(part.state.facts), "sums": part.sums, "lines": list(part.lines), "counts": [int(x) for x in part.counts],
        "shapes": [list(shape) for shape in part.shapes], "peer": part.peer, "shared": to_json(part.shared.facts),
        "own": to_json(part.own.facts),
    }  # fmt: skip
    text = json.dumps(told).encode()
    text += b" " * (-len(text) % 8)
    halves = {prefix + name: x for prefix, half in _halves(part) for name, x in half.tensors.items()}
    nbytes, pieces = pack({"weights": part.weights.detach(), "buffers": part.buffers, **part.state.tensors, **halves})
    return 8 + len(text) + nbytes, chain([len(text).to_bytes(8, "little") + text], pieces)


def _halves(part: Part) -> tuple[tuple[str, State], ...]:
    return ("shared/", part.shared), ("own/", part.own)


def parse(memory: Tensor) -> Part:
    """The part that dump() wrote to memory [nbytes] uint8, with tensors on that memory. Raises WireError for anything else."""
    try:
        start = 8 + int.from_bytes(bytes(memory[:8].tolist()), "little")
        told = json.loads(memory[8:start].numpy().tobytes())
        tensors = unpack(memory[start:])
        weights, buffers = tensors.pop("weights"), tensors.pop("buffers")
        shared, own = (State(_taken(tensors, half + "/"), from_json(told[half])) for half in ("shared", "own"))
        state = State(tensors, from_json(told["facts"]))
        (start, stop), counts, shapes = told["cut"], told["counts"], told["shapes"]
        part = Part(
            Position(*told["now"]), told["save"], told["rank"], (start, stop), weights, state, told["owners"], buffers, told["sums"],
            told["lines"], counts, shapes, shared, own, told["peer"],
        )  # fmt: skip
        lengths = [*counts, *(x for shape in shapes for x in shape)]
        numbers = [*part.now, part.rank, part.owners - 1, part.peer + 1, start, stop - start, *lengths]
        kinds = [(part.save, bool), (part.sums, dict), (part.lines, list), (counts, list), (shapes, list)]
        kinds += [(half.facts, dict) for half in (state, shared, own)]
        if not all(type(x) is int and x >= 0 for x in numbers) or not all(type(x) is kind for x, kind in kinds):
            raise ValueError("a number or a kind of value that no part has")
        if part.weights.shape != (stop - start,) or part.buffers.ndim != 1:
            raise ValueError(f"weights {list(part.weights.shape)} and buffers {list(part.buffers.shape)} for the cut {part.cut}")
        return part
    except Exception as error:  # what JSON and torch make of nonsense
        raise WireError(f"{len(memory)} bytes are no part of a state: {type(error).__name__}: {error}") from error


def _taken(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under a prefix, taken out."""
    return {name.removeprefix(prefix): tensors.pop(name) for name in [*tensors] if name.startswith(prefix)}


def model_of(recipe: Recipe) -> dict[str, list[Any]]:
    """Names, dtypes and shapes of the parameters, for Checkpoint.require."""
    return {s.name: [str(s.dtype).removeprefix("torch."), list(s.shape)] for s in recipe.blueprint.layout.parameters}


def start_from(saved: Checkpoint) -> tuple[Start, list[dict[str, Any]]]:
    """The start of a fit that goes on from a checkpoint, and the history until then. Raises CheckpointError where it is none."""
    try:
        facts, tensors = saved.facts, dict(saved.tensors)
        weights, buffers = tensors.pop("weights"), tensors.pop("buffers")
        constants = {name.removeprefix(_CONSTANT): tensors.pop(name) for name in [*tensors] if name.startswith(_CONSTANT)}
        resume = Resume(Position(saved.step, saved.epoch, saved.at), State(tensors, facts["state"]), facts["sums"], facts["dealt"])
        return Start(weights, buffers, constants, resume), list(facts["history"])
    except KeyError as error:
        raise CheckpointError(f"the checkpoint of step {saved.step} holds no {error}; begin anew in another folder") from error
