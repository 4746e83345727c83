"""How a round of the shuffle engine travels: out with the weights, back with the combined updates.

    route     weights                  updates                                    combined by       a job has        for
    memory    workers map the driver's the driver maps the workers'               the driver        several rounds   one machine
    shuffle   Spark's broadcast        pieces, through Spark's shuffle            owners, in tasks  one round        any cluster
    exchange  Spark's broadcast        what the exchange makes of them, likewise  owners, in tasks  one sum          any cluster

The first two give the same updates, to the bit: parts are added in rank order. A round is repeated, as often as need be, where an
executor lacks its share, or where memory went with the process that owned it. The first route is in memory.py, the others are here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from bigdl_lite.algorithms import Exchanger, Side, Turn, Update
from bigdl_lite.batch import mix
from bigdl_lite.comm.comm import Residual, divided
from bigdl_lite.comm.window import Window, available
from bigdl_lite.engine.cluster import Cluster
from bigdl_lite.engine.measure import measurer_of, sums_of
from bigdl_lite.engine.order import Order
from bigdl_lite.engine.recipe import Recipe
from bigdl_lite.engine.replay import Ask, Packed, packed, to_bytes
from bigdl_lite.engine.shipped import Shipped
from bigdl_lite.engine.spark import exchange, repeated
from bigdl_lite.engine.tasks import combined, combiner_of, mapper_of, side_of, state_nbytes
from bigdl_lite.errors import PeerLost, revive
from bigdl_lite.wire import frame as wire
from bigdl_lite.wire.codec import Codec, decoded, group_of

if TYPE_CHECKING:
    from pyspark import RDD, SparkContext

REFILLS = 20
SMALL = 1 << 20  # bytes of a vector for which a second stage costs more than it saves


class Blind(Exception):
    """A task does not see the memory that it should: take the other route."""


@dataclass(frozen=True)
class Ground:
    """What all routes stand on. static is the broadcast of the recipe; refill brings back lost shares."""

    sc: SparkContext
    tokens: RDD[Any]
    recipe: Recipe
    static: Any
    shipped: Shipped
    order: Order
    refill: Callable[[list[int]], None]


Coming = Callable[[int], list[Order]]  # the orders of the at most k rounds that follow, and no other job among them


def nothing(k: int) -> list[Order]:
    """Nothing is known of what follows."""
    return []


class Route(Protocol):
    def round(
        self, order: Order, weights: Tensor, buffers: Tensor, coming: Coming = nothing
    ) -> tuple[list[Side], list[Update], int]:  # fmt: skip
        """The sides in rank order, the combined update of each cut of the order, and the bytes sent.

        coming  the rounds that follow without a break; their rates may still change
        """
        ...

    def close(self) -> None: ...


def _settled(run: Callable[[], list[wire.Frame]], ground: Ground, round: int) -> list[wire.Frame]:
    """The frames of a round that every worker could do; runs it again after a refill, where shares were missing."""
    missing: list[int] = []
    for _ in range(REFILLS):
        frames = run()
        missing = lacking(frames)
        if not missing:
            return frames
        ground.refill(missing)
    raise PeerLost(
        f"partitions {missing} were on no executor that ran their task, {REFILLS} times in round {round}; "
        "raise spark.locality.wait, or use fewer and larger executors"
    )


def measured(ground: Ground, weights: Tensor, buffers: Tensor, step: int) -> list[Tensor]:
    """What the rows held out say of these weights: Replica.measure, added over the partitions in their order. One job."""
    state = ground.sc.broadcast((_bytes(weights), _bytes(buffers)))
    run = repeated(ground.tokens, measurer_of(ground.static, ground.shipped, state, ground.order, step))
    try:
        title = f"bigdl_lite {ground.recipe.run}: validation after step {step}"
        frames = _settled(lambda: [wire.loads(data) for data in run("", title)], ground, step)
    finally:
        state.destroy(blocking=False)
    found = [sums_of(f) for f in sorted((f for f in frames if f.kind == wire.SUMS), key=lambda f: f.rank)]
    return [torch.stack(sums).sum(0) for sums in zip(*found, strict=True)]


def lacking(frames: list[wire.Frame]) -> list[int]:
    """The workers whose shares were missing. Raises what went wrong on a worker, Blind where one saw no memory."""
    errors = sorted((f for f in frames if f.kind == wire.ERROR), key=lambda f: f.rank)
    if errors:
        raise revive(errors[0].json())
    blind = [f for f in frames if f.kind == wire.BLIND]
    if blind:
        raise Blind(blind[0].json())
    return sorted({f.rank for f in frames if f.kind == wire.MISS})


def _sides(frames: list[wire.Frame]) -> list[Side]:
    return sorted((side_of(f) for f in frames if f.kind == wire.SIDE), key=lambda side: side.rank)


class ShuffleRoute:
    """Everything inside Spark's own channels. With one owner it is the driver, and the job has one stage."""

    def __init__(self, ground: Ground) -> None:
        self.ground = ground
        found = ground.recipe.blueprint.layout
        self.gradient = torch.zeros(found.n, dtype=found.dtype)

    def round(
        self, order: Order, weights: Tensor, buffers: Tensor, coming: Coming = nothing
    ) -> tuple[list[Side], list[Update], int]:  # fmt: skip
        ground = self.ground
        state = ground.sc.broadcast((_bytes(weights), _bytes(buffers)))
        try:
            frames = _settled(lambda: _job(ground, order, state, len(order.cuts)), ground, order.round)
        finally:
            state.destroy(blocking=False)
        sides = _sides(frames)
        weight = sum(side.weight for side in sides)
        width = self.gradient.itemsize
        target = memoryview(self.gradient.view(torch.uint8).numpy())
        for start, stop, payload in _combined(frames, order):
            target[start * width : stop * width] = payload
        nbytes = len(order.senders) * len(self.gradient) * width
        return sides, [Update(self.gradient[start:stop], weight) for start, stop in order.cuts], nbytes

    def close(self) -> None:
        pass


def description(recipe: Recipe, first: Order, last: Order) -> str:
    """What Spark's own pages call a job of these rounds."""
    steps = f"step {first.round}" if first.round == last.round else f"steps {first.round} to {last.round}"
    return f"bigdl_lite {recipe.run}: shuffle, epoch {first.epoch + 1} of {recipe.epochs}, {steps}"


def _job(ground: Ground, order: Order, state: Any, owners: int) -> list[wire.Frame]:
    """One job of two stages, or of one where the driver is the only owner."""
    mapper = mapper_of(ground.static, ground.shipped, state, order)
    ground.sc.setJobDescription(description(ground.recipe, order, order))
    if owners > 1:
        back = exchange(ground.tokens, mapper, owners, combiner_of(ground.static, order))
    else:
        pieces = repeated(ground.tokens, lambda rank, rows: (data for _, data in mapper(rank, rows)))("")
        back = list(combined(0, pieces, ground.recipe, order))
    return [wire.loads(data) for data in back]


def _combined(frames: list[wire.Frame], order: Order) -> Iterator[tuple[int, int, bytes | memoryview]]:
    """The place and the payload of every combined piece. Raises PeerLost where one is missing."""
    pieces, missing = order.pieces, set(range(len(order.pieces)))
    for f in frames:
        if f.kind == wire.COMBINED:
            missing.discard(f.slice)
            yield *pieces[f.slice][1], f.payload
    if missing:
        raise PeerLost(f"{len(missing)} of {len(pieces)} pieces did not come back in round {order.round}")


class ExchangeRoute:
    """Each sum that the exchange asks for is a job (replay.py). exchanger is the driver's, and the only one that lasts.

    owners  that sum a vector, where it is not small
    """

    def __init__(self, ground: Ground, exchanger: Exchanger, owners: int) -> None:
        self.ground, self.exchanger, self.owners = ground, exchanger, owners
        self.zeros = torch.zeros(ground.recipe.blueprint.layout.n)

    def round(
        self, order: Order, weights: Tensor, buffers: Tensor, coming: Coming = nothing
    ) -> tuple[list[Side], list[Update], int]:  # fmt: skip
        ground = self.ground
        comm = _Driver(ground, order, self.owners, (_bytes(weights), _bytes(buffers), packed(self.exchanger.shared())))
        turn = Turn(order.round, mix(ground.recipe.seed, 3, order.round), 0.0)
        total = self.exchanger(self.zeros.clone(), comm, turn)
        if not comm.sides:  # it asked for nothing
            comm.ask(0, torch.float32)
        weight = sum(side.weight for side in comm.sides) / sum(order.quota)
        return comm.sides, [Update(total[start:stop], weight) for start, stop in order.cuts], comm.bytes_sent

    def close(self) -> None:
        pass


class _Driver:
    """The comm of the driver's exchanger: its own vectors say only how long the sums are."""

    def __init__(self, ground: Ground, order: Order, owners: int, state: tuple[Any, ...]) -> None:
        self.rank, self.size, self.bytes_sent = 0, ground.recipe.num_workers, 0
        self.sides: list[Side] = []
        self._ground, self._order, self._owners, self._state = ground, order, owners, state
        self._answers: list[Packed] = []

    def all_reduce(
        self, x: Tensor, codec: Codec | None = None, seed: int = 0, residual: Residual | None = None, gather: bool = False,
        first: int = 0,
    ) -> Tensor:  # fmt: skip
        return self.ask(len(x), x.dtype, codec, seed, gather, first)

    def union(self, bits: Tensor) -> Tensor:
        return self.ask(len(bits), bits.dtype, union=True)

    def broadcast(self, x: Tensor, root: int = 0) -> Tensor:
        self._answers.append(to_bytes(x))
        return x.clone()

    def ask(
        self, n: int, dtype: torch.dtype, codec: Codec | None = None, seed: int = 0, gather: bool = False, first: int = 0,
        union: bool = False,
    ) -> Tensor:  # fmt: skip
        ground, group = self._ground, 1 if codec is None else group_of(codec)
        owners = 1 if not group or n * dtype.itemsize < SMALL else self._owners
        total = torch.zeros(n, dtype=torch.float32 if codec is not None else dtype)
        if n or not self.sides:
            ask = Ask(len(self._answers), n, tuple(divided(n, owners, group)), dtype, codec, seed, gather, first, union)
            order = replace(self._order, ask=ask)
            state = ground.sc.broadcast((*self._state, list(self._answers)))
            try:
                frames = _settled(lambda: _job(ground, order, state, owners), ground, order.round)
            finally:
                state.destroy(blocking=False)
            self.sides = _sides(frames)
            for start, stop, payload in _combined(frames, order):
                total[start:stop] = decoded(ask.server(start), payload, stop - start, own=False)
            self.bytes_sent += len(order.senders) * ask.nbytes()
        self._answers.append(to_bytes(total))
        return total


def _bytes(x: Tensor) -> bytes:
    return x.detach().contiguous().view(torch.uint8).numpy().tobytes()


def window_for(cluster: Cluster, recipe: Recipe) -> Window | None:
    """The driver's memory for weights that workers may look at; None where that is not to be.

    Not with Spark's encryption, which asks that nothing moves past it, and not where memory is short: each worker needs
    one vector, and half of what is free must be left.
    """
    found = recipe.blueprint.layout
    nbytes = state_nbytes(found.n, found.m, found.dtype)
    if cluster.encrypts or 2 * (recipe.num_workers + 1) * nbytes > available():
        return None
    try:
        return Window(nbytes)
    except (OSError, MemoryError):
        return None
