"""What a worker process keeps of a run between its tasks. A cache: any of it can be rebuilt, in any process."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bigdl_lite.batch import Batch
from bigdl_lite.data.store import load
from bigdl_lite.engine.pack import foreign, unpack
from bigdl_lite.engine.recipe import Recipe
from bigdl_lite.engine.shipped import Shipped
from bigdl_lite.engine.worker import local_dir
from bigdl_lite.errors import DataError, revive
from bigdl_lite.model.replica import Replica


@dataclass
class _Kept:
    """What this process keeps of one run: its share, replica, windows."""

    used: float = 0.0
    values: dict[object, Any] = field(default_factory=dict)


_CACHE: dict[str, _Kept] = {}
_IDLE = 60.0  # seconds after which a run that this process has not served is forgotten


def cached(run: str, key: object, make: Callable[[], Any]) -> Any:
    now = time.monotonic()
    for other in [name for name, kept in _CACHE.items() if name != run and now - kept.used > _IDLE]:
        del _CACHE[other]
    kept = _CACHE.setdefault(run, _Kept())
    kept.used = now
    if key not in kept.values:
        made = make()
        if made is None:
            return None
        kept.values[key] = made
    return kept.values[key]


def recipe_of(broadcast: Any, run: str) -> Recipe:
    try:
        return cached(run, "recipe", lambda: unpack(broadcast.value))  # once in a process, not once a task
    except Exception as error:
        raise revive(foreign(error)) from error


def share_of(run: str, rank: int, key: str, rows: int) -> Batch | None:
    """A part of a partition, which had so many rows; None where it is not on this executor."""
    found = cached(run, key, lambda: load(folder(run), key))
    if found is not None and found.rows != rows:
        raise DataError(
            f"partition {rank} had {rows} rows when training began and {found.rows} when it was computed again; "
            "make the DataFrame deterministic (no unseeded rand or limit), or cache it"
        )
    return found


def replica_of(recipe: Recipe, shipped: Shipped, device: torch.device) -> Replica:
    """The replica of this process on a device. Spark may give another GPU to its next task: then there are two."""

    def make() -> Replica:
        found = recipe.blueprint.layout
        weights = torch.empty(found.n, dtype=found.dtype, device=device)
        return Replica(recipe.blueprint, weights, None, shipped.read().constants, recipe.loss, recipe.compute)

    return cached(recipe.run, ("replica", device), make)


def gradient_of(recipe: Recipe, key: object, device: torch.device) -> Tensor:
    """Memory [n] for a gradient, on a device."""
    found = recipe.blueprint.layout
    return cached(recipe.run, (key, device), lambda: torch.zeros(found.n, dtype=found.dtype, device=device))


def folder(run: str) -> Path:
    return Path(local_dir()) / f"bigdl_lite-{run}"


def forget(run: str) -> None:
    _CACHE.pop(run, None)
