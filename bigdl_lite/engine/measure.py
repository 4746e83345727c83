"""Validation in the shuffle engine: one job of one stage, in which every task measures the rows held out in its partition."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from bigdl_lite.data.arrow import nothing
from bigdl_lite.engine.cache import recipe_of, replica_of, share_of
from bigdl_lite.engine.device import current
from bigdl_lite.engine.order import Order
from bigdl_lite.engine.recipe import Recipe
from bigdl_lite.engine.shipped import Shipped
from bigdl_lite.engine.tasks import device_of
from bigdl_lite.engine.worker import settle
from bigdl_lite.errors import report
from bigdl_lite.wire import frame as wire
from bigdl_lite.wire.codec import on_bytes


def measurer_of(static: Any, shipped: Shipped, state: Any, base: Order, step: int) -> Callable[[int, Iterable[Any]], Iterator[bytes]]:
    """What the held-out rows of a partition say of the weights that `state` broadcasts, after so many steps."""

    def task(rank: int, tokens: Iterable[Any]) -> Iterator[bytes]:
        settle()
        list(tokens)
        try:
            yield _measured(rank, recipe_of(static, base.run), shipped, state, base, step).dumps()
        except Exception as error:
            yield wire.note(wire.ERROR, rank, step, report(error, f"worker {rank} (partition {rank}), in validation")).dumps()

    return task


def _measured(rank: int, recipe: Recipe, shipped: Shipped, state: Any, base: Order, step: int) -> wire.Frame:
    rows, held = base.held[rank], None
    if rows:
        held = share_of(base.run, rank, f"{rank}-held", rows)
        if held is None:
            return wire.note(wire.MISS, rank, step, None)
    found = recipe.blueprint.layout
    device = device_of(base.device, rank)
    replica = replica_of(recipe, shipped, device)
    weights, buffers = state.value
    replica.weights.copy_(on_bytes(weights, found.dtype))
    replica.buffers = on_bytes(buffers, torch.float64)
    held = nothing(recipe.columns, base.shapes) if held is None else held
    size = max(16, -(-recipe.batch_size // recipe.num_workers))
    with current(device):
        sums = replica.measure(held.to(device), recipe.watch.metrics, size)
    lengths = torch.tensor([len(sums), *map(len, sums)], dtype=torch.float64)
    payload = torch.cat([lengths, *sums]).numpy().astype("<f8").tobytes()
    return wire.Frame(wire.SUMS, rank, 0, step, float(rows), len(payload) // 8, payload)


def sums_of(frame: wire.Frame) -> list[Tensor]:
    numbers = torch.frombuffer(bytearray(frame.payload), dtype=torch.float64)
    k = int(numbers[0])
    return list(numbers[1 + k :].split([int(x) for x in numbers[1 : 1 + k]]))
