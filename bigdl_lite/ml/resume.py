"""Checkpoints of an estimator's fits: begin or go on, and a model made of one.

    <checkpointDir>/fit/      see data/checkpoint.py; written by the driver, in all engines
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from bigdl_lite.algorithms import Round, durable
from bigdl_lite.algorithms.shadow import warn_unkept
from bigdl_lite.data.checkpoint import Checkpoints
from bigdl_lite.data.columns import Columns
from bigdl_lite.engine.keeper import Keeper, model_of, start_from
from bigdl_lite.engine.recipe import Recipe, Saving, Start
from bigdl_lite.errors import CheckpointError, RecipeError
from bigdl_lite.ml.persist import column_to_json, columns_from_json, dtype_named, find, name_of
from bigdl_lite.ml.score import head_of
from bigdl_lite.model.replica import Replica

_LOG = logging.getLogger("bigdl_lite")
_RUN = "fit"


def saving_of(estimator: Any) -> Saving | None:
    """When checkpoints are due; None without checkpointDir."""
    if estimator._given("checkpointDir") is None:
        if estimator._given("resume"):
            raise RecipeError("resume=True goes on from the last checkpoint in checkpointDir, which is not set")
        return None
    return Saving(estimator._given("checkpointInterval"), estimator._given("checkpointUnit"))


def recovery_of(estimator: Any, round_: Round, replica: Replica) -> float:
    """Seconds between the states that are kept to go on from; inf where the method's state cannot be told."""
    if round_.peer is not None and not round_.peer.keeps:
        return math.inf
    try:
        durable(round_.advance).check_state(replica)
    except CheckpointError as error:
        _LOG.info("after a loss the fit would begin anew: %s", error)
        return math.inf
    return float(estimator._given("recoveryInterval"))


def begin(
    estimator: Any, recipe: Recipe, start: Start, replica: Replica, describe: Callable[[], dict[str, Any]]
) -> tuple[Start, Keeper | None]:
    """Where the fit begins, and who saves it; None without checkpointDir. describe is called only where there is something to save.

    Raises CheckpointError where a checkpoint is of another module, optimizer or scheduler, or where the state could not be
    saved; RecipeError where the folder holds checkpoints and resume=True was not given.
    """
    if recipe.saving is None:
        return start, None
    peer = recipe.round.peer
    if peer is not None and not peer.keeps:
        raise CheckpointError(
            f"{peer!r} is at no moment in a state that could be saved: fit without checkpointDir, or take another algorithm"
        )
    about, folder = describe(), estimator._given("checkpointDir")
    store, lines = Checkpoints(folder, _RUN, estimator._given("checkpointKeep")), []
    saved = store.last()
    if saved is not None:
        if not estimator._given("resume"):
            raise RecipeError(
                f"checkpointDir {folder!r} holds a fit that came to step {saved.step}: resume=True goes on from there, any other "
                "folder begins anew"
            )
        saved.require(model_of(recipe))
        found, lines = start_from(saved)
        if saved.facts.get("about", {}).get("buffers") != about["buffers"] or found.buffers.shape != start.buffers.shape:
            raise CheckpointError(f"the checkpoint of step {saved.step} is of another model: its buffers differ from this module's")
        start = replace(found, constants=start.constants)
    durable(recipe.round.advance).check_state(replica, start.resume.state if start.resume else None)
    if start.resume:
        warn_unkept(recipe.round.advance, start.resume.state)
    return start, Keeper(recipe, store, about, start.constants, lines)


def about(cls: type, recipe: Recipe, columns: Columns, kind: str, maker: Any) -> dict[str, Any]:
    """What load() must know beside the tensors; kind is that of the head."""
    found = recipe.blueprint.layout
    return {
        "class": cls.__name__, "module": name_of(maker), "kind": kind,
        "parameters": [[s.name, list(s.shape), str(s.dtype)] for s in found.parameters],
        "buffers": [[s.name, list(s.shape), str(s.dtype)] for s in found.buffers],
        "columns": [column_to_json(c) for c in columns.inputs],
    }  # fmt: skip


def load(cls: type, path: str, step: int | str, module: Any, trust: bool) -> Any:
    """The model of a checkpoint: that of a step, or the "last" or "best" one. See TorchModel.load."""
    store = Checkpoints(path, _RUN)
    if isinstance(step, int):
        saved = store.at(step)
    elif step in ("last", "best"):
        saved = store.last() if step == "last" else store.best()
    else:
        raise RecipeError(f"step is {step!r}, must be the number of a step, 'last' or 'best'")
    if saved is None:
        raise CheckpointError(f"{path} holds no checkpoint of a fit")
    start, lines = start_from(saved)
    try:
        told = saved.facts["about"]
        kinds = {kind.__name__: kind for kind in (cls, *cls.__subclasses__())}
        if told["class"] not in kinds:
            raise CheckpointError(f"{path} holds checkpoints of a {told['class']}, not of a {cls.__name__}")
        columns = columns_from_json(told["columns"], trust)
        told |= {"shapes": saved.facts["shapes"]}
        for _, _, dtype in told["parameters"]:
            dtype_named(dtype)
        made = kinds[told["class"]](columns, None, None, replace(start, resume=None), lines, "")
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: the checkpoint of step {saved.step} does not say what model it is of: {error}") from error
    made._saved = told
    maker = module if module is not None else find(told["module"], trust)
    return made.setModule(maker) if maker is not None else made


def head_from(told: dict[str, Any] | None, plan: Any, start: Start, columns: Columns) -> Any:
    """The head of a model that was loaded from a checkpoint, which does not hold it; None for any other."""
    if not told or "kind" not in told:
        return None
    return head_of(told["kind"], plan, start, columns, told["shapes"])

