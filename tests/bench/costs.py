"""What a step costs on p executors with links of a given rate and delay: what can be counted is counted, the rest is fitted.

    seconds  =  turns compute  +  base  +  busy (D + turns W)  +  wire B / rate  +  late delay

    p  ranks, one an executor      n  flat weights, b = 4 n bytes      k  owners of slices: p, or 1 where b < 1 MB
    D  processor seconds of the driver in a step     d0 + d1 tasks + d2 (b + R) + d3 S
    W  those of one executor, without compute        w0 + w1 messages + w2 bytes
    B  bytes that pass the busiest link, phase after phase
    turns   1 where every host has processors of its own; max(1, p / C) where all p hosts share C cores, of which those count that
            nobody else kept busy meanwhile

    counted in a step        barrier (nodes of one rank)           shuffle (values through Spark)
    tasks                    0: one stage for the whole fit        p, and k of the second stage where k > 1
    S, the driver sends      0                                     the broadcast, see torrent()
    R, the driver receives   0                                     p b where k = 1, else b
    messages, a rank         6 (p - 1): three exchanges with       2 k: blocks written, and read by its combine
                             each other rank, there and back
    bytes, a rank            2 (2 b (p - 1) / p + 64 (p - 1))      2 b where k = 1, else 3 b + b / p
    B                        half of them: links are duplex        S + R, and b (p - 1) / p where k > 1

A barrier step is reduce-scatter, all-gather, and a side of 64 bytes to each other rank; so all ranks together send
8 n (p - 1) + 64 p (p - 1) bytes, and that is what model.history counts, to the byte. A shuffle step is a broadcast, a map whose p
tasks each write n values in k blocks, a combine, and a collect: p k blocks in all.

D and W come from the kernel's counters, host by host, by non-negative least squares: on a machine that emulates all hosts, what
the driver does for p tasks and what p executors do at the same time both take time in proportion to p, and the clock
alone cannot tell them apart. Then base, busy, wire and late come from the clock, likewise, each point weighed by 1 / seconds. One
expects busy near 1 (nothing overlaps), wire a little above 1 (headers), late near 3 for barrier (three exchanges, one way each).

What is not in it: stragglers (the slowest of p draws grows with p), the driver's garbage collections, switches whose uplinks are
narrower than the sum of their ports, slow start of TCP, locality waits, and losses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from scipy.optimize import nnls

ENGINES = ("barrier", "shuffle")
SMALL, BLOCK, SIDE = 1 << 20, 4 << 20, 64  # of engine/routes.py, of spark.broadcast.blockSize, of engine/meeting.py
TERMS = ("base", "busy", "wire", "late")


@dataclass(frozen=True)
class Counts:
    """What is counted in a step; see the table above. Messages and bytes are those of one rank."""

    tasks: int
    sends: float
    receives: float
    messages: float
    nbytes: float
    wire: float


def torrent(p: int, nbytes: float) -> float:
    """Bytes that the driver sends while p executors fetch a broadcast at the same time, each its blocks in an order of its own.

    At first the driver alone has blocks, and serves all. In its turn r an executor finds the block that it wants at the driver and,
    on average, at the p (r - 1) / blocks executors that fetched it before, and takes one of them:  sum_r p / (1 + p (r - 1) / blocks).
    A model of one block thus leaves the driver p times.
    """
    blocks = max(1, math.ceil(nbytes / BLOCK))
    served = sum(p / (1 + p * r / blocks) for r in range(blocks))
    return nbytes / blocks * max(blocks, served)


def count(engine: str, p: int, n: float) -> Counts:
    b, others = 4.0 * n, (p - 1) / p
    if engine == "barrier":
        sent = 2 * b * others + SIDE * (p - 1)
        return Counts(0, 0.0, 0.0, 6 * (p - 1), 2 * sent, sent)
    if engine != "shuffle":
        raise ValueError(f"engine={engine!r} must be one of {ENGINES}")
    sends = torrent(p, b)
    if b < SMALL:
        return Counts(p, sends, p * b, 2, 2 * b, sends + p * b)
    return Counts(2 * p, sends, b, 2 * p, 3 * b + b / p, sends + b + b * others)


@dataclass(frozen=True)
class Point:
    """A measured configuration.  rate in bytes/s; cpu in processor seconds a step: of the driver, and of one executor.

    seconds  of each step           sent  bytes that all ranks sent in a step, as the engine counts them
    compute  forward and backward of a rank that has a core to itself
    driver_sent, driver_received    bytes on the driver's link in a step, headers included
    others   cores that were busy with what is neither driver nor executor: the emulated links, and whoever else was there
    """

    engine: str
    p: int
    n: int
    rate: float
    delay: float
    cores: int
    seconds: tuple[float, ...]
    compute: float
    driver_cpu: float
    worker_cpu: float
    sent: float
    driver_sent: float
    driver_received: float
    link: str = ""
    others: float = 0.0

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    @property
    def left(self) -> float:
        """Cores that nobody else kept busy."""
        return max(0.25, self.cores - self.others)

    @property
    def turns(self) -> float:
        return max(1.0, self.p / self.left)

    @staticmethod
    def load(told: dict[str, Any]) -> Point:
        return Point(**{**told, "seconds": tuple(told["seconds"])})

    def dump(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Model:
    """Of one engine. driver d0 .. d3, worker w0 .. w2, clock: base, busy, wire, late."""

    engine: str
    driver: tuple[float, ...]
    worker: tuple[float, ...]
    clock: tuple[float, ...]

    def parts(self, p: int, n: float, compute: float, rate: float, delay: float, cores: float = math.inf) -> dict[str, float]:
        """Seconds of a step by what they are for; without `cores`, every host has processors of its own.

        One rank has nobody to exchange with, which is the barrier engine's alone: through Spark it still goes.
        """
        c, turns, own = count(self.engine, p, n), max(1.0, p / cores), max(1.0, 1 / cores)
        base, busy, wire, late = self.clock
        d, w = self.driver, self.worker
        return {
            "compute": turns * compute,
            "base": base + busy * (own * d[0] + turns * w[0]),
            "tasks": busy * own * d[1] * c.tasks,
            "driver's bytes": busy * own * (d[2] * (4 * n + c.receives) * (c.tasks > 0) + d[3] * c.sends),
            "messages": busy * turns * w[1] * c.messages,
            "executors' bytes": busy * turns * w[2] * c.nbytes,
            "wire": wire * c.wire / rate,
            "latency": late * delay * (p > 1 or self.engine == "shuffle"),
        }

    def seconds(self, *where: float, **more: float) -> float:
        return sum(self.parts(*where, **more).values())  # type: ignore[arg-type]

    def at(self, point: Point) -> float:
        """The predicted seconds of a step of this point; its compute is taken as measured."""
        return self.seconds(point.p, point.n, point.compute, point.rate, point.delay, cores=point.left)

    def without(self, term: str) -> Model:
        at = TERMS.index(term)
        return replace(self, clock=tuple(0.0 if i == at else x for i, x in enumerate(self.clock)))


def fit(points: Sequence[Point], without: Sequence[str] = ()) -> Model:
    """The model of the points of one engine. without: terms of the clock that are left out, and the others fitted again.

    Raises ValueError where the points are of several engines, or fewer than the terms.
    """
    (engine, *others) = sorted({point.engine for point in points})
    if others or len(points) < len(TERMS):
        raise ValueError(f"{len(points)} points of {engine}{others} do not make a model: one engine, and at least {len(TERMS)} points")
    counts = [count(engine, x.p, x.n) for x in points]
    spark = engine == "shuffle"
    d = _solved([[1.0, c.tasks, (4.0 * x.n + c.receives) * spark, c.sends] for x, c in zip(points, counts, strict=True)],
                [x.driver_cpu for x in points])  # fmt: skip
    w = _solved([[1.0, c.messages, c.nbytes] for c in counts], [max(0.0, x.worker_cpu - x.compute) for x in points])
    if not spark:
        d = (0.0,) * 4  # the driver hears of a step, and nobody waits for it
    columns = []
    for x, c in zip(points, counts, strict=True):
        made = Model(engine, d, w, (0.0, 1.0, 0.0, 0.0)).at(x) - x.turns * x.compute
        columns.append([float(t not in without) * v for t, v in zip(TERMS, (1.0, made, c.wire / x.rate, x.delay), strict=True)])
    return Model(engine, d, w, _solved(columns, [x.median - x.turns * x.compute for x in points], [x.median for x in points]))


def _solved(rows: Sequence[Sequence[float]], values: Sequence[float], of: Sequence[float] | None = None) -> tuple[float, ...]:
    """Coefficients not below 0 with the least sum of squares of errors, each relative to `of` (None: the values themselves)."""
    y = np.array(values)
    size = y if of is None else np.array(of)
    weights = 1 / np.maximum(size, max(size.max() * 1e-3, 1e-9))
    a = np.array(rows) * weights[:, None]
    scale = np.where((found := np.abs(a).max(0)) > 0, found, 1.0)  # bytes and seconds in one system
    x, _ = nnls(a / scale, y * weights)
    return tuple(float(v) for v in x / scale)


def errors(model: Model, points: Sequence[Point]) -> list[float]:
    """(predicted - measured) / measured."""
    return [model.at(x) / x.median - 1 for x in points]


def typical(found: Sequence[float]) -> float:
    """The median of the errors' sizes."""
    return float(np.median(np.abs(found)))
