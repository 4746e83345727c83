"""How a round of the shuffle engine travels: out with the weights, back with the combined updates.

    route     weights                         updates                                    combined by        for
    memory    workers map the driver's        the driver maps the workers'               the driver         one machine
    shuffle   Spark's broadcast               pieces, through Spark's shuffle            owners, in tasks   any cluster

Both give the same updates, to the bit: parts are added in rank order. A round is repeated, as often as need be, where an
executor lacks its share, or where memory went with the process that owned it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from pyspark import RDD, SparkContext
from torch import Tensor

from bigdl_lite.algorithms import Side, Update
from bigdl_lite.comm.window import Look, Window, available, look
from bigdl_lite.engine.recipe import Recipe
from bigdl_lite.engine.shipped import Shipped
from bigdl_lite.engine.spark import encrypts, exchange, repeated
from bigdl_lite.engine.tasks import Order, combined, combiner_of, looker_of, mapper_of, side_of, state_in, state_nbytes
from bigdl_lite.errors import PeerLost, revive
from bigdl_lite.wire import frame as wire
from bigdl_lite.wire.codec import Codec

_REFILLS = 20


class Blind(Exception):
    """A task does not see the memory that it should: take the other route."""


@dataclass(frozen=True)
class Ground:
    """What both routes stand on. static is the broadcast of (recipe, codec); refill brings back lost shares."""

    sc: SparkContext
    tokens: RDD[Any]
    recipe: Recipe
    codec: Codec
    static: Any
    shipped: Shipped
    order: Order
    refill: Callable[[list[int]], None]


class Route(Protocol):
    def round(self, order: Order, weights: Tensor, buffers: Tensor) -> tuple[list[Side], list[Update], int]:
        """The sides in rank order, the combined update of each cut of the order, and the bytes sent."""
        ...

    def close(self) -> None: ...


def _settled(run: Callable[[], list[wire.Frame]], ground: Ground, round: int) -> list[wire.Frame]:
    """The frames of a round that every worker could do; runs it again after a refill, where shares were missing."""
    missing: list[int] = []
    for _ in range(_REFILLS):
        frames = run()
        errors = sorted((f for f in frames if f.kind == wire.ERROR), key=lambda f: f.rank)
        if errors:
            raise revive(errors[0].json())
        blind = [f for f in frames if f.kind == wire.BLIND]
        if blind:
            raise Blind(blind[0].json())
        missing = sorted({f.rank for f in frames if f.kind == wire.MISS})
        if not missing:
            return frames
        ground.refill(missing)
    raise PeerLost(
        f"partitions {missing} were on no executor that ran their task, {_REFILLS} times in round {round}; "
        "raise spark.locality.wait, or use fewer and larger executors"
    )


def _sides(frames: list[wire.Frame]) -> list[Side]:
    return sorted((side_of(f) for f in frames if f.kind == wire.SIDE), key=lambda side: side.rank)


class ShuffleRoute:
    """Everything inside Spark's own channels. With one owner it is the driver, and the job has one stage."""

    def __init__(self, ground: Ground) -> None:
        self.ground = ground
        found = ground.recipe.blueprint.layout
        self.gradient = torch.zeros(found.n, dtype=found.dtype)

    def round(self, order: Order, weights: Tensor, buffers: Tensor) -> tuple[list[Side], list[Update], int]:
        ground = self.ground
        state = ground.sc.broadcast((_bytes(weights), _bytes(buffers)))
        try:
            frames = _settled(lambda: self._job(order, state), ground, order.round)
        finally:
            state.destroy(blocking=False)
        sides = _sides(frames)
        weight = sum(side.weight for side in sides)
        self._gather(frames, order)
        nbytes = len(order.senders) * sum(ground.codec.nbytes(stop - start) for _, (start, stop) in order.pieces)
        return sides, [Update(self.gradient[start:stop], weight) for start, stop in order.cuts], nbytes

    def _job(self, order: Order, state: Any) -> list[wire.Frame]:
        ground = self.ground
        mapper = mapper_of(ground.static, ground.shipped, state, order)
        if len(order.cuts) > 1:
            back = exchange(ground.tokens, mapper, len(order.cuts), combiner_of(ground.static, order))
        else:
            pieces = repeated(ground.tokens, lambda rank, rows: (data for _, data in mapper(rank, rows)))("")
            back = list(combined(0, pieces, ground.recipe, ground.codec, order))
        return [wire.loads(data) for data in back]

    def _gather(self, frames: list[wire.Frame], order: Order) -> None:
        """The combined pieces, each at its place in the gradient."""
        pieces, missing = order.pieces, set(range(len(order.pieces)))
        target = memoryview(self.gradient.view(torch.uint8).numpy())
        width = self.gradient.itemsize
        for f in frames:
            if f.kind == wire.COMBINED:
                start, stop = pieces[f.slice][1]
                target[start * width : stop * width] = f.payload
                missing.discard(f.slice)
        if missing:
            raise PeerLost(f"{len(missing)} of {len(pieces)} pieces did not come back in round {order.round}")

    def close(self) -> None:
        pass


class MemoryRoute:
    """On one machine: weights and gradients stay where they are written, and are mapped by those who read them.

    A worker writes to its own memory only, and only while the driver waits for it. The driver writes the weights only
    between rounds. A task that Spark has given up may read or write too late, but into memory whose content nobody takes.

    Cost: nothing is copied between processes; the sum reads p vectors of n values, once.
    """

    def __init__(self, ground: Ground, window: Window) -> None:
        self.ground, self.window = ground, window
        found = ground.recipe.blueprint.layout
        self.weights, self.buffers = state_in(window, found.n, found.m, found.dtype)
        self._job = repeated(ground.tokens, looker_of(ground.static, ground.shipped, window.address, ground.order))
        self._seen: dict[str, Look] = {}

    def round(self, order: Order, weights: Tensor, buffers: Tensor) -> tuple[list[Side], list[Update], int]:
        assert weights.data_ptr() == self.weights.data_ptr()
        self.buffers.copy_(buffers)
        for _ in range(_REFILLS):
            frames = _settled(lambda: [wire.loads(x) for x in self._job(order.dumps())], self.ground, order.round)
            found = self._updates(frames, order.round)
            if found is not None:
                break
        else:
            raise Blind("workers' memory was gone before it could be read")
        combine = self.ground.recipe.round.combine
        updates = [
            combine([replace(update, vector=update.vector[start:stop]) for update in found]) for start, stop in order.cuts
        ]
        return _sides(frames), updates, 0

    def _updates(self, frames: list[wire.Frame], round: int) -> list[Update] | None:
        """The workers' updates in rank order; None where the memory of one is gone."""
        layout, now, made = self.ground.recipe.blueprint.layout, {}, []
        for f in sorted((f for f in frames if f.kind == wire.PLACED), key=lambda f: f.rank):
            placed = f.json()
            address = placed["address"]
            seen = self._seen.get(address) or look(address)
            if seen is None or seen.stamp != round:
                return None
            now[address] = seen
            made.append(Update(seen.values(layout.dtype, layout.n), placed["weight"]))
        self._seen = now
        return made

    def close(self) -> None:
        self.window.close()


def _bytes(x: Tensor) -> bytes:
    return x.detach().contiguous().view(torch.uint8).numpy().tobytes()


def window_for(sc: SparkContext, recipe: Recipe) -> Window | None:
    """The driver's memory for weights that workers may look at; None where that is not to be.

    Not with Spark's encryption, which asks that nothing moves past it, and not where memory is short: each worker needs
    one vector, and half of what is free must be left.
    """
    found = recipe.blueprint.layout
    nbytes = state_nbytes(found.n, found.m, found.dtype)
    if encrypts(sc) or 2 * (recipe.num_workers + 1) * nbytes > available():
        return None
    try:
        return Window(nbytes)
    except (OSError, MemoryError):
        return None
