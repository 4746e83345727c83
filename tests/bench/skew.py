"""What quasi-global momentum gains where workers have rows of few classes, against each worker's own momentum.

Pictures of digits (scikit-learn's, 8x8), shared out by label_skew: alpha 0.02, where most workers have one or two classes, to 10, where
all have all. Three hidden layers: with one the pictures are too easy, and the gaps a point at most. Both methods mix models after
SGD's Nesterov step, with the same neighbours: on a ring of 8 workers, and on the Davis social network of 32. Each gets the rate that is
best for it, of the same ones; a fit that diverges counts as a guess.

Told are the shares of right answers on 357 pictures held out: of the mean of the models, which a fit returns, and of the workers' own
models on average. Rates are chosen by the sum of the two over the seeds that are reported, for both methods alike.

The quasi-global momentum forgets five times more slowly (with 0.9 and Nesterov's step it takes 52 steps, not 10, to come to its
size), so it begins more slowly: in fits as short as these it lags where shares are alike, and the more the fewer steps there are.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from bigdl_lite.algorithms import Round, TorchOptimizer
from bigdl_lite.algorithms.gossip import gossip
from bigdl_lite.algorithms.quasiglobal import qg_dsgdm
from bigdl_lite.data.columns import Column, Columns
from bigdl_lite.engine.keeper import Part
from bigdl_lite.engine.local import LocalEngine
from bigdl_lite.engine.recipe import Recipe, Saving, Start, silent
from bigdl_lite.errors import DivergedError
from bigdl_lite.model.layout import blueprint
from bigdl_lite.model.replica import Replica
from bigdl_lite.testing import label_skew
from tests.bench.report import Claim, Context, Row

ALPHAS = (0.02, 0.1, 10.0)
TRAIN, BATCH, SEEDS = 1_440, 15, 3  # rows to train with; rows of a worker in a step
GUESS, POINTS = 10.0, 1.0  # per cent right of a guess; points of a gap
COLUMNS = Columns((Column("pixels", torch.float32, 1),), Column("digit", torch.int64))


@dataclass(frozen=True)
class Network:
    """A topology by its name. rates: those tried; with half of the first, and twice the last, both were worse, or diverged."""

    name: str
    workers: int
    steps: int
    rates: tuple[float, ...]


NETWORKS = (Network("ring", 8, 240, (0.1, 0.2)), Network("davis", 32, 180, (0.1, 0.2)))
OURS, OTHER = "QG-DSGDm-N", "DSGDm-N"
METHODS: dict[str, Callable[[str], Callable[..., Round]]] = {
    OURS: lambda topology: qg_dsgdm(topology, nesterov=True),
    OTHER: lambda topology: gossip(topology),
}


def net() -> nn.Module:  # [B, 64] -> [B, 10]
    layers: list[nn.Module] = []
    for _ in range(3):
        layers += [nn.Linear(64, 64), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(64, 10))


def falling(steps: int, optimizer: torch.optim.Optimizer) -> Any:
    """A tenth from half of the steps on, and a tenth of that for the last quarter."""
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, [steps // 2, 3 * steps // 4])


@lru_cache
def pictures(seed: int) -> tuple[Tensor, Tensor]:
    """Pixels [1797, 64], from 0 to 1, and digits [1797], in an order of the seed: the first TRAIN are to train with."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(seed).permutation(len(found.data))
    return torch.from_numpy((found.data[order] / 16).astype("f4")), torch.from_numpy(found.target[order])


def shares(where: Network, alpha: float, seed: int) -> list[list[pa.RecordBatch]]:
    """The rows of each worker, as often as its steps need them: one epoch in all, for workers wait for one another where one ends."""
    x, y = (part[:TRAIN].numpy() for part in pictures(seed))
    owners, times = label_skew(y, alpha, where.workers, seed), where.steps * BATCH * where.workers // TRAIN
    dealt = (np.tile(np.flatnonzero(owners == rank), times) for rank in range(where.workers))
    return [[_batch(x[rows], y[rows])] for rows in dealt]


def _batch(x: np.ndarray, y: np.ndarray) -> pa.RecordBatch:
    edges = np.arange(0, x.size + 1, x.shape[1], dtype=np.int32)
    return pa.RecordBatch.from_pydict({"pixels": pa.ListArray.from_arrays(edges, x.reshape(-1)), "digit": pa.array(y)})


class Models:
    """A Keep that remembers each worker's own model as it is in the end."""

    wish = False

    def __init__(self) -> None:
        self.found: dict[int, Tensor] = {}

    def __call__(self, part: Part) -> None:
        self.found[part.rank] = part.own.tensors["exchange/weights"].clone()


@dataclass(frozen=True)
class Fit:
    """Per cent of right answers, of the mean model and of the workers' own; distance of these from their mean; bytes sent."""

    mean: float
    local: float
    apart: float
    nbytes: int


def fit(method: str, where: Network, alpha: float, lr: float, seed: int) -> Fit | None:
    """One fit in the local engine; None where it diverges."""
    p, keep = where.workers, Models()
    torch.manual_seed(seed)
    made, weights, buffers, constants = blueprint(net())
    factory = partial(torch.optim.SGD, lr=lr, momentum=0.9, nesterov=True)
    round_ = METHODS[method](where.name)(TorchOptimizer(factory, partial(falling, where.steps), per="step"))
    replica = Replica(made, weights.clone(), None, constants, nn.CrossEntropyLoss())
    assert round_.peer is not None
    round_ = replace(round_, peer=round_.peer.prepared(made, replica, round_.advance, p))
    recipe = Recipe(
        blueprint=made, loss=nn.CrossEntropyLoss(), round=round_, columns=COLUMNS, num_workers=p, batch_size=BATCH * p, epochs=1,
        seed=seed, saving=Saving(1),
    )  # fmt: skip
    try:
        ended = LocalEngine().fit(shares(where, alpha, seed), recipe, Start(weights, buffers, constants), silent, keep)
    except DivergedError:
        return None
    x, y = (part[TRAIN:] for part in pictures(seed))

    @torch.no_grad()
    def right(model: Tensor) -> float:
        replica.weights.copy_(model)
        return 100 * float((replica.module(x).argmax(1) == y).float().mean())

    local = statistics.mean(right(model) for model in keep.found.values())
    nbytes = sum(line["bytes_sent"] for line in ended.history if "step" in line)
    return Fit(right(ended.weights), local, ended.history[-1]["consensus"], nbytes)


@dataclass
class Found:
    """What one method came to at one rate: a fit for each seed."""

    lr: float
    fits: list[Fit | None] = field(default_factory=list)

    def of(self, what: str) -> tuple[float, ...]:
        return tuple(GUESS if found is None else getattr(found, what) for found in self.fits)

    @property
    def rank(self) -> float:
        return statistics.mean(self.of("mean")) + statistics.mean(self.of("local"))


def best(method: str, where: Network, alpha: float, seeds: int) -> Found:
    """The method at its best rate."""
    found = []
    for lr in where.rates:
        began = time.monotonic()
        found.append(Found(lr, [fit(method, where, alpha, lr, seed) for seed in range(seeds)]))
        told = " ".join(f"{mean:.1f}/{local:.1f}" for mean, local in zip(found[-1].of("mean"), found[-1].of("local"), strict=True))
        took = time.monotonic() - began
        print(f"skew: {where.name}, alpha {alpha:g}, {method}, rate {lr:g}: {told}, {took:.0f} s", file=sys.stderr, flush=True)
    return max(found, key=lambda x: x.rank)


def run(context: Context) -> tuple[list[Row], list[Claim]]:
    rows, claims = [], []
    for where in [replace(x, steps=48) for x in NETWORKS] if context.quick else NETWORKS:
        sent: set[int] = set()
        for alpha in ALPHAS:
            found = {method: best(method, where, alpha, 1 if context.quick else SEEDS) for method in METHODS}
            sent |= {x.nbytes for told in found.values() for x in told.fits if x}
            for what, whose in (("mean", "the mean model"), ("local", "the workers' own models")):
                work = f"{where.name} of {where.workers}, alpha {alpha:g}: {whose}"
                for method, told in found.items():
                    apart = statistics.mean(told.of("apart"))
                    spread = ", ".join(f"{x:.2f}" for x in told.of(what))
                    note = f"{spread} by seed; rate {told.lr:g}; models {apart:.3f} from their mean"
                    rows.append(Row("skew", work, method, "% right", told.of(what), note=note))
                claims.append(_claim(work, alpha, *(statistics.mean(found[method].of(what)) for method in (OURS, OTHER))))
        claims.append(Claim("skew", f"{where.name}: bytes of a fit, most against least, of all fits", max(sent) / min(sent), 1.0, "<="))
    return rows, claims


def _claim(work: str, alpha: float, ours: float, other: float) -> Claim:
    """The paper's: a gap where shares differ, none where they do not."""
    if alpha < 1:
        return Claim("skew", f"{work}: points that {OURS} is better by", ours - other, POINTS)
    return Claim("skew", f"{work}: points between the two", abs(ours - other), POINTS, "<=")
