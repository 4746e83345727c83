"""The state of an optimizer that is advanced in slices, as plain data that no longer knows of the slices.

    take       each owner    views of its own state, piece by piece
    join       one place     the whole, whatever the cuts were
    restore    each owner    its part of the whole, perhaps by other cuts

What is large lies in the tensors:

    "optimizer/<start>/<key>" [k]              taken, element-wise rule: a piece that begins at <start> of the flat weights
    "optimizer/<key>" [n]                      joined; zeros where no group holds the weights
    "optimizer/<parameter>/<key>", any shape   rule that needs whole tensors, taken and joined

and everything else in the facts, as to_json takes it:

    rule, whole, n, dtype    class of the optimizer, whether it gets whole tensors, the flat weights
    pieces                   name, at (start, stop), group; shapes {key: shape} of its tensors; values {key: step count and the like}
    groups                   the hyperparameters as they are now, the learning rates among them
    shared                   what the rule keeps in optimizer.state beside the parameters
    scheduler                name, per ("step" or "epoch") and state_dict(); None without
    cut                      of the owner; not in the joined facts

    n  length of the flat weights      k  of one piece
"""

from __future__ import annotations

import copy
import logging
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from bigdl_lite.algorithms.algorithm import State
from bigdl_lite.data.manifest import from_json, to_json
from bigdl_lite.errors import CheckpointError
from bigdl_lite.model.layout import Layout
from bigdl_lite.vector import Cut, overlap

_LOG = logging.getLogger("bigdl_lite")
_HERE = ("params", "param_names", "foreach", "fused", "capturable", "differentiable")  # how a group is computed in this fit
_DECIDING = ("momentum", "amsgrad", "centered")  # whether torch's rules keep one tensor more
_DRIVEN = ("lr", "momentum", "betas")  # what schedulers change


class Piece(NamedTuple):
    """Values [start, stop) of the flat weights as one parameter of one group: a tensor of the module, or a part of many."""

    parameter: nn.Parameter
    start: int
    stop: int
    group: int
    name: str  # of the tensor where it must be whole, else its start


@dataclass(frozen=True, eq=False)
class Holding:
    """What one owner holds: the optimizer, whose groups are the pieces, and the scheduler, stepped once `per`."""

    optimizer: torch.optim.Optimizer
    scheduler: Any
    per: str
    pieces: list[Piece]
    whole: bool
    cut: Cut
    layout: Layout

    @property
    def rule(self) -> str:
        return type(self.optimizer).__name__

    @property
    def dtype(self) -> str:
        return str(self.layout.dtype).removeprefix("torch.")


def take(held: Holding) -> State:
    """The state of one owner. The tensors share memory with the optimizer and count until its next step; the facts are copies.

    Cost    nothing that grows with n.
    Raises  CheckpointError, with the name and key, where the optimizer or scheduler has what a checkpoint cannot hold.
    """
    optimizer, tensors, pieces = held.optimizer, {}, []
    _refuse_own_ways(optimizer)
    for p, start, stop, group, name in held.pieces:
        shapes, values = {}, {}
        for key, value in optimizer.state.get(p, {}).items():
            if isinstance(value, Tensor) and value.ndim:
                tensors[_name(name, key)], shapes[key] = value.detach(), list(value.shape)
            else:
                values[key] = value
        assert held.whole or all(shape == [stop - start] for shape in shapes.values())
        values = _exact(values, f"{held.rule}.state of {name!r}")
        pieces.append({"name": name, "at": (start, stop), "group": group, "shapes": shapes, "values": values})
    groups = [
        _exact({key: value for key, value in group.items() if key not in _HERE}, f"{held.rule}.param_groups[{i}]")
        for i, group in enumerate(optimizer.param_groups)
    ]
    shared = {key: value for key, value in optimizer.state.items() if not isinstance(key, Tensor)}
    facts = {
        "rule": held.rule, "whole": held.whole, "n": held.layout.n, "dtype": held.dtype, "cut": held.cut, "pieces": pieces,
        "groups": groups, "shared": _exact(shared, f"{held.rule}.state"), "scheduler": _scheduler(held),
    }  # fmt: skip
    return State(tensors, facts)


def _refuse_own_ways(optimizer: torch.optim.Optimizer) -> None:
    rule, plain = type(optimizer), torch.optim.Optimizer
    inner = [name for name, value in vars(optimizer).items() if isinstance(value, plain)]
    own = [name for name in ("state_dict", "load_state_dict") if getattr(rule, name) is not getattr(plain, name)]
    if inner or own:
        what = f"holds another optimizer, {inner[0]!r}" if inner else f"has a {own[0]}() of its own"
        raise CheckpointError(
            f"{rule.__name__} {what}, so that its state cannot be told by slices; take a rule that keeps all in `state`, "
            "or fit without checkpoints"
        )


def _exact(value: Any, name: str) -> Any:
    """A copy of plain values, to the bit; whatever else is refused by name."""
    return from_json(to_json(value, name))


def _name(*parts: Any) -> str:
    return "/".join(["optimizer", *map(str, parts)])


def _scheduler(held: Holding) -> dict[str, Any] | None:
    if held.scheduler is None:
        return None
    name = _spelled(held.scheduler)
    try:
        told = held.scheduler.state_dict()
    except Exception as error:
        raise CheckpointError(f"the scheduler {name} does not tell its state: {type(error).__name__}: {error}") from error
    return {"name": name, "per": held.per, "state": _exact(told, name)}


def _spelled(scheduler: Any) -> str:
    inner = ", ".join(map(_spelled, getattr(scheduler, "_schedulers", ())))
    return type(scheduler).__name__ + (f"({inner})" if inner else "")


def join(states: Iterable[State]) -> State:
    """The states of all owners as one that is the same for all cuts, and shares no memory with them.

    states  in any order; each is let go before the next is asked for. Owners of nothing may be among them, or not.

    Cost    one copy of the tensors, on the CPU; no memory but that of the result.
    Raises  CheckpointError where a slice is missing, or where owners disagree, as they must not: a hyperparameter that the
            rule has computed from its own slice depends on the cuts, and no fit with other cuts could go on with it.
    """
    tensors: dict[str, Tensor] = {}
    told: list[dict[str, Any]] = []
    for given, facts in states:
        told.append(facts)  # small, unlike the tensors
        for piece in facts["pieces"]:
            for key in piece["shapes"]:
                x = given[_name(piece["name"], key)]
                name = _name(piece["name"], key) if facts["whole"] else _name(key)
                if name not in tensors:
                    shape = x.shape if facts["whole"] else (facts["n"],)
                    tensors[name] = torch.zeros(shape, dtype=x.dtype)
                assert tensors[name].dtype == x.dtype
                (tensors[name] if facts["whole"] else tensors[name][slice(*piece["at"])]).copy_(x)
        given = x = None  # lets go of the owner's memory
    _check_complete(told[0]["n"], [facts["cut"] for facts in told])
    active = [facts for facts in told if facts["pieces"]] or told[:1]  # owners of nothing never step their optimizer
    joined = {key: _agreed(key, [facts[key] for facts in active]) for key in ("rule", "whole", "n", "dtype", "scheduler", "shared")}
    joined["groups"] = []
    for i in range(len(active[0]["groups"])):
        mine = [facts for facts in active if any(piece["group"] == i for piece in facts["pieces"])] or active
        groups = [facts["groups"][i] for facts in mine]
        joined["groups"].append({key: _agreed(f"{key!r} of group {i}", [g.get(key) for g in groups]) for key in groups[0]})
    joined["pieces"] = list(_merged([piece for facts in told for piece in facts["pieces"]], joined["whole"]))
    return State(tensors, joined)


def _check_complete(n: int, cuts: list[Cut]) -> None:
    edges = [0, *(edge for cut in sorted(cuts) if cut[0] < cut[1] for edge in cut), n]
    gaps = [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a != b]
    if gaps:
        raise CheckpointError(f"the states of the owners do not make up all {n} weights: {gaps[0]} is missing, or there twice")


def _agreed(what: str, found: list[Any]) -> Any:
    told = [to_json(value) for value in found]
    other = next((i for i, value in enumerate(told) if value != told[0]), None)
    if other is not None:
        raise CheckpointError(
            f"the owners of slices differ in {what}, {found[0]} and {found[other]}: it depends on how the weights are cut, so that "
            "no other fit could go on with it; fit without checkpoints, or with one worker"
        )
    return found[0]


def _merged(pieces: list[dict[str, Any]], whole: bool) -> Iterator[dict[str, Any]]:
    """The pieces in flat order; of an element-wise rule, as if nobody had cut them."""

    def kind(piece: dict[str, Any]) -> Any:
        return to_json([piece["group"], piece["values"], _listed(piece["shapes"])])

    last: dict[str, Any] | None = None
    for piece in sorted(pieces, key=lambda piece: tuple(piece["at"])):
        start, stop = piece["at"]
        if last and not whole and last["at"][1] == start and kind(last) == kind(piece):
            start = last["at"][0]
        elif last:
            yield last
        last = piece | {"at": (start, stop)}
        if not whole:
            last |= {"name": str(start), "shapes": {key: [stop - start] for key in piece["shapes"]}}
    if last:
        yield last


def check(held: Holding, saved: State) -> None:
    """Raises CheckpointError, naming the difference, where a joined state is of another optimizer, scheduler or module."""
    facts = saved.facts
    if "rule" not in facts:
        raise CheckpointError("the checkpoint holds no state of an optimizer; begin anew under another run")
    if facts["rule"] != held.rule:
        _refuse(f"was written by {facts['rule']}", f"uses {held.rule}")
    if facts["whole"] != held.whole:
        kinds = "by slices of the weights", "by whole tensors"
        _refuse(f"was written by a {held.rule} that advances {kinds[facts['whole']]}", f"uses one that advances {kinds[held.whole]}")
    if (facts["n"], facts["dtype"]) != (held.layout.n, held.dtype):
        _refuse(f"is of {facts['n']} weights of {facts['dtype']}", f"has {held.layout.n} of {held.dtype}")
    groups = held.optimizer.param_groups
    if len(facts["groups"]) != len(groups):
        _refuse(f"has {len(facts['groups'])} parameter groups", f"has {len(groups)}")
    for i, (old, new) in enumerate(zip(facts["groups"], groups, strict=True)):
        for key in () if held.whole else _DECIDING:
            driven = held.scheduler is not None and key in _DRIVEN
            if not driven and bool(old.get(key)) != bool(new.get(key)):
                _refuse(f"has {key}={old.get(key)} in group {i}, and the state for it", f"has {key}={new.get(key)}")
    schedulers = [s and f"{s['name']} once per {s['per']}" for s in (facts["scheduler"], _scheduler(held))]
    if schedulers[0] != schedulers[1]:
        _refuse(f"has the scheduler {schedulers[0]}", f"has {schedulers[1]}")
    for piece, home in _homes(held, facts):
        made = held.optimizer.state.get(piece.parameter, {})  # by the constructor: Adagrad does
        kept = home["shapes"].keys() | home["values"].keys()
        if made and made.keys() != kept:
            _refuse(f"keeps {_listed(kept)} of {held.rule}", f"keeps {_listed(made)}")
        for key, shape in home["shapes"].items():
            name = _name(home["name"], key) if held.whole else _name(key)
            needed = shape if held.whole else [held.layout.n]
            found = saved.tensors.get(name)
            if found is None or list(found.shape) != needed:
                what = "is missing" if found is None else f"is of shape {list(found.shape)}"
                raise CheckpointError(f"the checkpoint's tensor {name!r} {what}; {held.rule} needs it in {needed}")


def _refuse(saved: str, given: str) -> NoReturn:
    raise CheckpointError(f"the checkpoint {saved}, this fit {given}; give what it was saved with, or begin anew under another run")


def _listed(keys: Iterable[Any]) -> str:
    return ", ".join(sorted(map(str, keys))) or "nothing"


def _homes(held: Holding, facts: dict[str, Any]) -> list[tuple[Piece, dict[str, Any]]]:
    """Every piece with the one of the checkpoint that it is, or lies in."""
    saved, homes = facts["pieces"], []
    starts = [home["at"][0] for home in saved]
    for piece in held.pieces:
        home = saved[bisect_right(starts, piece.start) - 1] if saved else {"name": "", "at": (0, 0), "group": -1}
        (start, stop), at = home["at"], (piece.start, piece.stop)
        fits = (home["name"], start, stop) == (piece.name, *at) if held.whole else start <= at[0] and at[1] <= stop
        if not fits or home["group"] != piece.group:
            what = f"{piece.name!r}" if held.whole else f"weights [{at[0]}, {at[1]})"
            _refuse(f"has {what} in another group of {held.rule}, or in parts, or not at all", f"has them in group {piece.group}")
        homes.append((piece, home))
    common = (overlap(home["at"], held.cut) for home in saved)
    unheld = sum(stop - start for start, stop in common) - sum(piece.stop - piece.start for piece in held.pieces)
    if unheld:
        _refuse(f"has the state of {unheld} weights more in {held.cut}", f"has no group of {held.rule} for them")
    return homes


def warn_of_settings(held: Holding, saved: State) -> None:
    """Says where the factory now gives other hyperparameters: those of the checkpoint count, as in torch."""
    driven = _DRIVEN if held.scheduler is not None else ()
    for i, (old, new) in enumerate(zip(saved.facts["groups"], held.optimizer.param_groups, strict=True)):
        for key in sorted((old.keys() & new.keys()).difference(driven)):
            if to_json(old[key]) != to_json(new[key]):
                _LOG.warning("group %d of %s goes on with %s=%s of the checkpoint, not %s", i, held.rule, key, old[key], new[key])


def restore(held: Holding, saved: State) -> None:
    """Puts a joined state in place of the state of a new optimizer and scheduler, which read nothing of it afterwards.

    Cost    one copy of this owner's part of the tensors.
    Raises  as check() does, before anything is changed.
    """
    check(held, saved)
    facts = copy.deepcopy(saved.facts)  # schedulers and groups write into theirs
    if held.scheduler is not None:
        try:
            held.scheduler.load_state_dict(facts["scheduler"]["state"])
        except Exception as error:
            name = facts["scheduler"]["name"]
            raise CheckpointError(f"the scheduler {name} does not take its state back: {type(error).__name__}: {error}") from error
    for group, old in zip(held.optimizer.param_groups, facts["groups"], strict=True):
        for key, value in old.items():
            if isinstance(value, Tensor) and isinstance(group.get(key), Tensor):
                group[key].copy_(value)  # in place: groups may share the tensor of a rate, and schedulers write into it
            else:
                group[key] = value
    held.optimizer.state.update(facts["shared"])
    for piece, home in _homes(held, facts):
        p, group = piece.parameter, held.optimizer.param_groups[piece.group]
        state = {key: _placed(key, value, p, group) for key, value in home["values"].items()}
        for key in home["shapes"]:
            x = saved.tensors[_name(piece.name, key)] if held.whole else saved.tensors[_name(key)][piece.start : piece.stop]
            state[key] = x.to(p.device, copy=True)
        if state:
            held.optimizer.state[p] = state


def _placed(key: Any, value: Any, p: nn.Parameter, group: dict[str, Any]) -> Any:
    """A small value where torch's load_state_dict would put it: step counts stay on the CPU unless a kernel reads them."""
    if not isinstance(value, Tensor):
        return value
    if key != "step":
        return value.to(p.device)
    return value.to(p.device, torch.float32) if group.get("fused") or group.get("capturable") else value
