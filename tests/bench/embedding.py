"""Tables of embeddings over links of 100 Mbit/s: the rows of a table that no worker touched need not travel.

A recommender like NCF on a made-up world of MovieLens' size: users and items have tastes, some items are far more popular, and
each user has liked some of them. A row is (user, item, liked or drawn at random); one item of each user is left out, and to be
found among 99 that the user did not like (HR@10: the share of users for whom it is among the first ten). Ranked by how often
they were liked, and by the world's own tastes, items give the HR@10 between which a model's should lie.

    dense         the whole gradient, as it is          union-rows   rows that some worker touched, lossless: equal to dense
    S2, beta      their sketch, beta values for each value of the union

Seconds and bytes are of a fit over slow links; HR@10 is of whole fits, the others over fast links, which do not change it.
Adam, its rate falling to zero, on the same flat gradient for all: a row outside the union has a gradient of zeros, as in dense,
and its moments fade as they do there, so no method has a rule of its own for rows that are not touched. All have one rate, at which
dense is at its fastest, of a few.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from bigdl_lite import BarrierEngine, TorchEstimator
from bigdl_lite.algorithms.rows import S2, UnionRows
from tests.bench.hosts import WORKERS, Hosts, Network, Told, middle, middles, reached, series
from tests.bench.report import Claim, Context, Row

USERS, ITEMS, TASTES = 6_040, 3_706, 2
LIKED, DRAWN = 40, 4  # by each user; at random for each of them
DIM = 32
BATCH, EPOCHS = 1_024 * WORKERS, 2
STEPS = EPOCHS * -(-USERS * LIKED * (1 + DRAWN) // BATCH)
NETWORK = Network("100mbit", "1ms")
TARGET, WINDOW = 0.32, 20 * BATCH
FEWER, FASTER = 0.81, 1.8
S2_USUAL = "S2, beta 0.25"


@dataclass(frozen=True)
class Method:
    """settings: of TorchEstimator. epochs: over slow links, until the loss is reached; seeds: of whole fits, for HR@10."""

    settings: Mapping[str, Any]
    epochs: int = EPOCHS
    seeds: int = 3


def methods() -> dict[str, Method]:
    return {
        "dense": Method({}, epochs=1),
        "union-rows": Method({"exchange": UnionRows()}, epochs=1, seeds=0),
        S2_USUAL: Method({"exchange": S2(beta=0.25)}),
        "S2, beta 0.15": Method({"exchange": S2(beta=0.15)}, seeds=1),
    }


class Recommender(nn.Module):
    """A product of embeddings and an MLP over others, joined by one layer (NCF, He et al., WWW 2017).  [B], [B] -> [B]"""

    def __init__(self) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(USERS, DIM), nn.Embedding(ITEMS, DIM)
        self.users_deep, self.items_deep = nn.Embedding(USERS, DIM), nn.Embedding(ITEMS, DIM)
        self.deep = nn.Sequential(nn.Linear(2 * DIM, 2 * DIM), nn.ReLU(), nn.Linear(2 * DIM, DIM), nn.ReLU())
        self.last = nn.Linear(2 * DIM, 1)
        for table in (self.users, self.items, self.users_deep, self.items_deep):
            nn.init.normal_(table.weight, std=0.1)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        product = self.users(user) * self.items(item)
        deep = self.deep(torch.cat([self.users_deep(user), self.items_deep(item)], 1))
        return self.last(torch.cat([product, deep], 1)).squeeze(1)


def adam(parameters: Any, lr: float = 0.02) -> torch.optim.Optimizer:
    """lr is that of the tables."""
    tables = [p for name, p in parameters.named.items() if name.startswith(("users", "items"))]
    others = [p for name, p in parameters.named.items() if not name.startswith(("users", "items"))]
    return torch.optim.Adam([{"params": tables, "lr": lr}, {"params": others, "lr": 0.01}])


def falling(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / STEPS))


@lru_cache
def world() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What each user has liked [USERS, LIKED + 1], the last of them left out; 99 that the user did not like [USERS, 99]; and how
    much each user would like each item [USERS, ITEMS].
    """
    rng = np.random.default_rng(0)
    taste, kind = (_directions(rng.standard_normal((n, TASTES))) for n in (USERS, ITEMS))
    score = 3 * math.sqrt(TASTES) * taste @ kind.T - 0.8 * np.log(1 + rng.permutation(ITEMS))
    drawn = np.argpartition(-(score + rng.gumbel(size=score.shape)), LIKED, 1)[:, : LIKED + 1]
    liked = rng.permuted(drawn, axis=1)
    others = np.argpartition(np.where(_among(liked), 2.0, rng.random(score.shape)), 99, 1)[:, :99]
    return liked, others, score


def _directions(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def _among(liked: np.ndarray) -> np.ndarray:
    """Whether a user liked an item [USERS, ITEMS]."""
    mask = np.zeros((USERS, ITEMS), bool)
    np.put_along_axis(mask, liked, True, 1)
    return mask


def rows() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """user, item, liked [n]: each liked item with DRAWN that are drawn from all that this user did not like, in any order."""
    rng = np.random.default_rng(1)
    liked = world()[0]
    user = np.repeat(np.arange(USERS), LIKED)
    mask = _among(liked)
    drawn = rng.integers(0, ITEMS, (len(user), DRAWN))
    while (again := mask[user[:, None], drawn]).any():
        drawn[again] = rng.integers(0, ITEMS, int(again.sum()))
    item = np.concatenate([liked[:, :LIKED].reshape(-1, 1), drawn], 1).ravel()
    label = np.tile(np.array([1.0] + [0.0] * DRAWN, "f4"), len(user))
    deal = rng.permutation(len(item))
    return np.repeat(user, 1 + DRAWN)[deal], item[deal], label[deal]


def write(folder: Path, steps: int | None) -> Path:
    """One Parquet file for each worker; steps: how many batches, None: all rows."""
    path = Path(folder, f"s2-{steps or 'all'}")
    if not path.exists():
        begun = path.with_suffix(".part")
        begun.mkdir(parents=True, exist_ok=True)
        user, item, label = rows()
        each = (steps * BATCH if steps else len(user)) // WORKERS
        table = pa.table({"user": pa.array(user), "item": pa.array(item), "liked": pa.array(label)})
        for i in range(WORKERS):
            pq.write_table(table.slice(i * each, each), begun / f"part-{i}.parquet")
        begun.rename(path)
    return path


def hit_rate(score: Tensor, first: int = 10) -> float:
    """The share of users whose left-out item, the first of those scored [USERS, 100], is among the first ten."""
    return float(((score[:, 1:] >= score[:, :1]).sum(1) < first).float().mean())


def asked() -> np.ndarray:
    """The left-out item of each user, and the 99 it is to be found among [USERS, 100]."""
    liked, others, _ = world()
    return np.concatenate([liked[:, -1:], others], 1)


def of_model(module: nn.Module) -> float:
    items = torch.from_numpy(asked())
    users = torch.arange(USERS)[:, None].expand(-1, items.shape[1])
    with torch.no_grad():
        return hit_rate(module.eval()(users.reshape(-1), items.reshape(-1)).view(USERS, -1))


def of_others() -> dict[str, float]:
    """HR@10 of two that learn nothing: an item's number of likes, and the world's own score."""
    liked, _, score = world()
    likes = np.bincount(liked[:, :LIKED].ravel(), minlength=ITEMS) + np.random.default_rng(0).random(ITEMS)
    places = asked()
    own = np.take_along_axis(score, places, 1)
    return {"by number of likes": hit_rate(torch.from_numpy(likes[places])), "the world's tastes": hit_rate(torch.from_numpy(own))}


def fit(spark: Any, told: Mapping[str, Any]) -> Told:
    """One fit, on a host. told: method, path, seed, epochs."""
    settings: dict[str, Any] = {
        "module": Recommender, "loss": nn.BCEWithLogitsLoss(), "optimizer": adam, "scheduler": falling, "schedulerInterval": "step",
        "inputCols": ["user", "item"], "labelCol": "liked", "batchSize": BATCH, "epochs": told["epochs"], "numWorkers": WORKERS,
        "engine": BarrierEngine(share_memory=False), "progress": "none", "seed": told["seed"], **methods()[told["method"]].settings,
    }  # fmt: skip
    model = TorchEstimator(**settings).fit(spark.read.parquet(told["path"]))
    return series(model.history) | {"hits": of_model(model.module)}


# ---- the benchmark ----------------------------------------------------------------------------------------------------


def measure(context: Context) -> tuple[dict[str, Told], dict[str, list[float]], str]:
    """Of each method: the fit over slow links, and HR@10 for each seed; and what the links measure."""
    path = str(write(context.folder, 30 if context.quick else None))
    timed: dict[str, Told] = {}
    hits: dict[str, list[float]] = {}
    with Hosts() as hosts:
        spark = hosts.spark(__name__)

        def ask(name: str, seed: int, epochs: int) -> Told:
            began = time.monotonic()
            told = spark.ask({"method": name, "path": path, "seed": seed, "epochs": epochs})
            print(f"s2: {name}, {epochs} epochs, seed {seed}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
            return told

        for name, method in methods().items():
            done = 1 if method.epochs == EPOCHS else 0  # the whole fit of seed 0 is the one over slow links
            for seed in range(done, 1 if context.quick else method.seeds):
                hits.setdefault(name, []).append(ask(name, seed, EPOCHS)["hits"])
        measured = hosts.limit(NETWORK)
        for name, method in methods().items():
            timed[name] = ask(name, 0, method.epochs)
            if method.epochs == EPOCHS:
                hits.setdefault(name, []).insert(0, timed[name]["hits"])
    return timed, hits, measured


def of_tables(told: Told) -> float:
    """Bytes a step of one worker for the tables: all without the dense rest, which every method sends as it is."""
    module = Recommender()
    tables = sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Embedding))
    rest = sum(p.numel() for p in module.parameters()) - tables
    return middle(told["nbytes"]) - 2 * (WORKERS - 1) / WORKERS * 4 * rest


def run(context: Context) -> tuple[list[Row], list[Claim]]:
    timed, hits, slow = measure(context)
    work = f"tables of {USERS + ITEMS:,} rows of {2 * DIM}, batch {BATCH:,}, {NETWORK}"
    found, spent = [], {}
    for name, told in timed.items():
        seconds, seen = reached(told, TARGET, WINDOW)
        spent[name] = seconds
        when = f"after {seen // BATCH} steps" if math.isfinite(seconds) else f"not reached in {seen // BATCH} steps"
        note = f"{middle(told['seconds']):.3f} s a step; loss {TARGET} {when}; {slow}"
        found.append(Row("s2", work, name, "s", (seconds,), middles(told), note))
    dense = of_tables(timed["dense"])
    for name, told in timed.items():
        mine = of_tables(told)
        note = f"{mine / dense:.3f} of dense"
        found.append(Row("s2", "bytes of the tables, a worker's in a step", name, "kB", (mine / 1e3,), note=note))
    for name, rate in of_others().items():
        found.append(Row("s2", "HR@10 among 100 items", name, "HR@10", (rate,), note="learns nothing"))
    for name, rates in hits.items():
        note = ", ".join(f"{rate:.4f}" for rate in rates) + " by seed"
        found.append(Row("s2", "HR@10 among 100 items", name, "HR@10", tuple(rates), note=note))
    return found, claims(timed, hits, spent)


def claims(timed: dict[str, Told], hits: dict[str, list[float]], spent: dict[str, float]) -> list[Claim]:
    saved = 1 - of_tables(timed[S2_USUAL]) / of_tables(timed["dense"])
    found = [
        Claim("s2", f"{S2_USUAL}: share of the tables' bytes saved against dense", saved, FEWER),
        Claim("s2", f"{S2_USUAL}: seconds to the loss, dense against it", spent["dense"] / spent[S2_USUAL], FASTER),
    ]
    if len(hits["dense"]) > 1:
        spread = statistics.stdev(hits["dense"])
        lost = statistics.mean(hits["dense"]) - statistics.mean(hits[S2_USUAL])
        text = f"{S2_USUAL}: HR@10 lost against dense, in standard deviations of dense over seeds ({spread:.4f})"
        found.append(Claim("s2", text, lost / spread, 2.0, "<="))
    return found
