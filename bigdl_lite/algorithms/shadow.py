"""Companions of the weights: a running average of them, and a copy of the best so far, each owner's slice with its owner.

    Shadow(advance, average, best)     an Advance around any other, which advances as it would alone

        average   EMA or SWA, see means.py: what a running average takes in, and when
        best      a copy of the slice, made when the engine says so

    shown()       what validation and the final model use: the average, once there is one
    keep_best()   copies what is shown;  best() gives it back

A weight moves in the same few rounded operations wherever the vector is cut, so that averages do not depend on the number of
owners. Where each worker has weights of its own (gossip), each has a shadow of its own, taken after its own step and before it
mixes; mixing keeps the mean, so the mean of the shadows is the shadow of the mean.

Buffers (running means of BatchNorm) are no part of the slice: with an average they are those of the last step, which torch
recommends to compute anew with one pass over the rows (torch.optim.swa_utils.update_bn).

    n  length of the flat weights      k  of one slice
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bigdl_lite.algorithms.algorithm import Advance, DurableAdvancer, State, Update, durable
from bigdl_lite.algorithms.means import EMA, SWA, Average
from bigdl_lite.errors import CheckpointError, RecipeError
from bigdl_lite.model.replica import Replica
from bigdl_lite.vector import Cut

__all__ = ["EMA", "SWA", "Average", "Shadow", "Shadowed", "shadowed", "warn_unkept"]

_LOG = logging.getLogger("bigdl_lite")
_AVERAGE, _BEST = "shadow/average", "shadow/best"  # [k] of an owner, [n] joined
_CHUNK = 1 << 20  # values that are averaged at a time, so that the difference needs no memory of the length of the slice


@dataclass(frozen=True)
class Shadow:
    """Advances as `advance` does, and keeps companions of each slice.

    average   EMA, SWA, or whatever fits Average; None: what is shown are the weights
    best      whether keep_best() may be called

    A step is one call of the advancer's step(): a round of local SGD; each push where a parameter server applies them one by one.

    Cost  one slice of memory for each companion, from its first use on; two or three passes over the slice when an average
          takes the weights. An average is kept in float32 where the weights are of 16 bits: in their own it would stand still.
    """

    advance: Advance
    average: Average | None = None
    best: bool = False

    def __post_init__(self) -> None:
        if self.average is None and not self.best:
            raise RecipeError("Shadow keeps nothing: give it an average, or best=True, or take the advance as it is")
        if isinstance(self.advance, Shadow):
            raise RecipeError("a Shadow around a Shadow: one keeps an average and the best")

    def __getattr__(self, name: str) -> Any:
        """What peers look for in an optimizer (scheduler, per): that of the wrapped one."""
        if name.startswith("__") or name == "advance":  # asked for while it is unpickled
            raise AttributeError(name)
        return getattr(self.advance, name)

    @property
    def measures(self) -> bool:
        return self.advance.measures

    def cuts(self, replica: Replica, p: int) -> list[Cut]:
        return self.advance.cuts(replica, p)

    def start(self, replica: Replica, cut: Cut) -> Shadowed:
        return Shadowed(self, replica, cut)

    def check(self, replica: Replica) -> None:
        self.advance.check(replica)

    def check_state(self, replica: Replica, saved: State | None = None) -> None:
        durable(self.advance).check_state(replica, None if saved is None else _without(saved))
        if saved is not None:
            _check(self, saved, replica.layout.n)
            _warn(saved.facts["shadow"], self._told())

    def join(self, states: Iterable[State]) -> State:
        """See Durable.join.  Cost: no memory but that of the result.  Raises CheckpointError where owners disagree."""
        tensors: dict[str, Tensor] = {}
        told: list[dict[str, Any]] = []

        def inner() -> Iterator[State]:
            for state in states:
                mine = state.facts["shadow"]
                for name in (_AVERAGE, _BEST):
                    if name in state.tensors:
                        if name not in tensors:
                            tensors[name] = torch.zeros(mine["n"], dtype=state.tensors[name].dtype)
                        tensors[name][slice(*mine["cut"])].copy_(state.tensors[name])
                told.append(mine)
                rest = _without(state)
                del state  # the owner's memory is let go before the next one is asked for
                yield rest
                del rest

        joined = durable(self.advance).join(inner())
        held = sum(stop - start for start, stop in (mine["cut"] for mine in told))
        shared = [{key: value for key, value in mine.items() if key != "cut"} for mine in told]
        other = next((mine for mine in shared if mine != shared[0]), None)
        if other is not None:
            raise CheckpointError(f"owners differ in what they have averaged, {shared[0]} and {other}: fit without checkpoints")
        if held != shared[0]["n"]:
            raise CheckpointError(f"the averages of the owners make up {held} of {shared[0]['n']} weights")
        return State({**joined.tensors, **tensors}, {**joined.facts, "shadow": shared[0]})

    def _told(self) -> dict[str, Any]:
        """What is kept, as a checkpoint tells it."""
        return {"average": None if self.average is None else repr(self.average), "best": self.best}


class Shadowed:
    """The advancer of one slice with its companions. What it does not know itself is asked of the wrapped one."""

    def __init__(self, how: Shadow, replica: Replica, cut: Cut) -> None:
        self.how, self.cut, self.n = how, cut, replica.layout.n
        self.weights = replica.weights.detach()[slice(*cut)]
        self.inner: DurableAdvancer = how.advance.start(replica, cut)  # type: ignore[assignment]
        self.steps = self.epochs = self.taken = 0
        self._average: Tensor | None = None
        self._best: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        """What peers look for in an advancer (optimizer, pieces, scheduler, held): that of the wrapped one."""
        if name.startswith("__") or name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)

    def measure(self, update: Update) -> float:
        return self.inner.measure(update)

    def step(self, update: Update, measured: float) -> None:
        self.inner.step(update, measured)
        self._after_step()

    def end_step(self) -> None:
        """A step that somebody else has made."""
        self.inner.end_step()  # type: ignore[attr-defined]
        self._after_step()

    def _after_step(self) -> None:
        self.steps += 1
        self._take_in("step", self.steps)

    def end_epoch(self, loss: float) -> None:
        self.inner.end_epoch(loss)
        self.epochs += 1
        self._take_in("epoch", self.epochs)

    def _take_in(self, unit: str, done: int) -> None:
        average = self.how.average
        if average is None or average.per != unit or not average.due(done):
            return
        if self._average is None:
            self._average = self.weights.to(_wide(self.weights.dtype), copy=True)
        else:
            _toward(self._average, self.weights, average.rate(self.taken))
        self.taken += 1

    def rates(self) -> list[float]:
        return self.inner.rates()

    def shown(self) -> Tensor | None:
        """The average [k] in the dtype of the weights, to be read before the next step only; None: the weights as they are."""
        return None if self._average is None else self._average.to(self.weights.dtype)

    def keep_best(self) -> None:
        """Copies what is shown now. An engine calls it on every owner, between two steps."""
        assert self.how.best, "Shadow(best=True) keeps the best"
        shown = self.shown()
        if self._best is None:
            self._best = torch.empty_like(self.weights)
        self._best.copy_(self.weights if shown is None else shown)

    def best(self) -> Tensor | None:
        """What keep_best() copied last [k], to be read only; None: it was not called yet."""
        return self._best

    def state(self) -> State:
        inner, kept = self.inner.state(), {_AVERAGE: self._average, _BEST: self._best}
        told = {
            **self.how._told(), "steps": self.steps, "epochs": self.epochs, "taken": self.taken, "found": self._best is not None,
            "n": self.n, "cut": self.cut,
        }  # fmt: skip
        return State({**inner.tensors, **{name: x for name, x in kept.items() if x is not None}}, {**inner.facts, "shadow": told})

    def restore(self, state: State) -> None:
        _check(self.how, state, self.n)
        self.inner.restore(_without(state))
        told = state.facts["shadow"]
        self.steps, self.epochs = told["steps"], told["epochs"]
        if self.how.average is not None:
            self.taken = told["taken"]
            self._average = self._part(state, _AVERAGE) if self.taken else None
        if self.how.best:
            self._best = self._part(state, _BEST) if told["found"] else None

    def _part(self, state: State, name: str) -> Tensor:
        return state.tensors[name][slice(*self.cut)].to(self.weights.device, copy=True)


def shadowed(advance: Advance, average: Average | None = None, best: bool = False) -> Advance:
    """The advance with a shadow, or as it is where nothing is to be kept."""
    return Shadow(advance, average, best) if average is not None or best else advance  # type: ignore[return-value]


def warn_unkept(advance: Advance, saved: State) -> None:
    """Says in the log what a checkpoint keeps and an advance without a shadow does not.

    It is no error: training goes on to the same weights, to the bit. A Shadow's own check_state() says it by itself.
    """
    if "shadow" in saved.facts and not isinstance(advance, Shadow):
        _warn(saved.facts["shadow"], {"average": None, "best": False})


def _warn(saved: dict[str, Any], now: dict[str, Any]) -> None:
    lost = [str(saved["average"] if key == "average" else "the best weights") for key in now if saved[key] and not now[key]]
    if lost:
        _LOG.warning("the checkpoint keeps %s, this fit does not: it goes on without", " and ".join(lost))


def _without(state: State) -> State:
    """The state of the wrapped advance."""
    tensors = {name: x for name, x in state.tensors.items() if name not in (_AVERAGE, _BEST)}
    return State(tensors, {key: value for key, value in state.facts.items() if key != "shadow"})


def _check(how: Shadow, saved: State, n: int) -> None:
    """Raises CheckpointError where a state lacks what this shadow keeps, or keeps another average."""
    told, mine = saved.facts.get("shadow"), how._told()
    fresh = "begin anew from its weights, as another run"
    if told is None:
        kept = " and ".join([*([mine["average"]] if mine["average"] else []), *(["the best weights"] if how.best else [])])
        raise CheckpointError(f"the checkpoint was saved without {kept}, which this fit keeps: go on without, or {fresh}")
    if how.average is not None and told["average"] != mine["average"]:
        raise CheckpointError(f"the checkpoint keeps {told['average']}, this fit {mine['average']}: give the same, or {fresh}")
    if how.best and not told["best"]:
        raise CheckpointError(f"the checkpoint was saved without the best weights, which this fit keeps: go on without, or {fresh}")
    for name, needed in ((_AVERAGE, how.average is not None and told["taken"]), (_BEST, how.best and told["found"])):
        found = saved.tensors.get(name)
        if needed and (found is None or list(found.shape) != [n]):
            what = "is missing" if found is None else f"is of shape {list(found.shape)}"
            raise CheckpointError(f"the checkpoint's tensor {name!r} {what}; a shadow of {n} weights needs it in [{n}]")


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _toward(average: Tensor, weights: Tensor, rate: float) -> None:
    """average += rate (weights - average): three operations, each rounded alike in all lanes of any kernel, as lerp_ need not be."""
    for at in range(0, len(average), _CHUNK):
        to = average[at : at + _CHUNK]
        to.add_((weights[at : at + _CHUNK] - to).mul_(rate))
