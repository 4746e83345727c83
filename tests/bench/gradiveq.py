"""Convolutions whose gradients lie near a small linear space, over links of 25 Mbit/s: GradiVeQ sends coordinates in it.

Four classes of smooth images (noise of 5x5, drawn out to 16x16), a net of two convolutions. The second holds 97 % of the values,
one slice of 512 for each of its filters; the rest is sent as it is. A fit over slow links for seconds and bytes, which is also
the first of SEEDS fits, the others over fast links, for the share of right answers. SGD with momentum, the rate a tenth for the
last quarter. The loss is reached where its mean over the last WINDOW rows is at most TARGET; no row is seen twice.

Aggregation is sync_s of a step: all that is not the batch and the gradient, so also encoding, decoding and the optimizer. Steps
are told apart by their bytes: training steps of a cycle send everything, and the last of them the basis too.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from bigdl_lite import BarrierEngine, TorchEstimator
from bigdl_lite.algorithms.gradiveq import GradiVeQ
from tests.bench.hosts import WORKERS, Hosts, Network, Told, middle, reached, series
from tests.bench.report import Claim, Context, Row

SIDE, CLASSES, MODES = 16, 4, 6
FILTERS, CHANNELS, KERNEL = 384, 32, 4
BATCH, STEPS, HELD_OUT = 16 * WORKERS, 300, 4_000
NETWORK = Network("25mbit", "1ms")
HOW = GradiVeQ(slice=CHANNELS * KERNEL**2, rank=48, train=20, compressed=80, min_size=100_000)
SEEDS = 3
TARGET, WINDOW = 0.3, 20 * BATCH
SHORTER, SOONER, POINTS = 5.0, 1.8, 0.5


def methods() -> dict[str, Mapping[str, Any]]:
    return {"dense": {}, "GradiVeQ": {"exchange": HOW}}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, CHANNELS, KERNEL, padding=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(CHANNELS, FILTERS, KERNEL, stride=2, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
            nn.Linear(4 * FILTERS, CLASSES),
        )  # fmt: skip

    def forward(self, image: Tensor) -> Tensor:  # [B, 256] -> [B, 4]
        return self.layers(image.view(-1, 1, SIDE, SIDE))


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def falling(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, [3 * STEPS // 4])


def sample(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images [rows, 256] and classes [rows]: noise around MODES small pictures of each class, which are always the same."""
    pictures = torch.randn(CLASSES, MODES, 1, 5, 5, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, CLASSES, (rows,), generator=generator)
    small = pictures[y, torch.randint(0, MODES, (rows,), generator=generator)] + torch.randn(rows, 1, 5, 5, generator=generator)
    return nn.functional.interpolate(small, (SIDE, SIDE), mode="bilinear", align_corners=True).flatten(1), y


def write(folder: Path, steps: int) -> Path:
    """One Parquet file for each worker, `steps` batches in all."""
    path = Path(folder, f"gradiveq-{steps}")
    if not path.exists():
        begun = path.with_suffix(".part")
        begun.mkdir(parents=True, exist_ok=True)
        x, y = sample(steps * BATCH, 1)
        edges = torch.arange(0, x.numel() + 1, SIDE**2, dtype=torch.int32)
        table = pa.table({"image": pa.ListArray.from_arrays(edges.numpy(), x.flatten().numpy()), "label": pa.array(y.numpy())})
        for i in range(WORKERS):
            pq.write_table(table.slice(i * len(table) // WORKERS, len(table) // WORKERS), begun / f"part-{i}.parquet")
        begun.rename(path)
    return path


@lru_cache
def held_out() -> tuple[Tensor, Tensor]:
    return sample(HELD_OUT, 2)


def fit(spark: Any, told: Mapping[str, Any]) -> Told:
    """One fit, on a host. told: method, path, seed."""
    settings: dict[str, Any] = {
        "module": Net, "loss": nn.CrossEntropyLoss(), "optimizer": sgd, "scheduler": falling, "schedulerInterval": "step",
        "inputCols": ["image"], "labelCol": "label", "batchSize": BATCH, "numWorkers": WORKERS, "progress": "none",
        "engine": BarrierEngine(share_memory=False), "seed": told["seed"], **methods()[told["method"]],
    }  # fmt: skip
    model = TorchEstimator(**settings).fit(spark.read.parquet(told["path"]))
    x, y = held_out()
    with torch.no_grad():
        right = float((model.module.eval()(x).argmax(1) == y).float().mean())
    return series(model.history) | {"right": 100 * right}


# ---- the benchmark ----------------------------------------------------------------------------------------------------


def measure(context: Context) -> tuple[dict[str, Told], dict[str, list[float]], str]:
    """Of each method: the fit over slow links, and the share of right answers for each seed; and what the links measure."""
    path = str(write(context.folder, 30 if context.quick else STEPS))
    timed: dict[str, Told] = {}
    right: dict[str, list[float]] = {name: [] for name in methods()}
    with Hosts() as hosts:
        spark = hosts.spark(__name__)
        spark.ask({"method": "dense", "path": str(write(context.folder, 30)), "seed": 0})  # starts what the first fit starts
        for seed in reversed(range(1 if context.quick else SEEDS)):
            if not seed:
                measured = hosts.limit(NETWORK)
            for name in methods():
                began = time.monotonic()
                timed[name] = spark.ask({"method": name, "path": path, "seed": seed})
                right[name].insert(0, timed[name]["right"])
                print(f"gradiveq: {name}, seed {seed}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return timed, right, measured


def phases(told: Told, steps: list[int]) -> dict[str, float]:
    """Median seconds of each phase over the given steps."""
    return {name: middle([spent[i] for i in steps]) for name, spent in told["phases"].items()}


def run(context: Context) -> tuple[list[Row], list[Claim]]:
    timed, right, measured = measure(context)
    n = sum(p.numel() for p in Net().parameters())
    work = f"two convolutions, {n / 1e6:.2f} M values, {NETWORK}"
    dense, ours = timed["dense"], timed["GradiVeQ"]
    rows, spent = [], {}
    for name, told in timed.items():
        seconds, seen = reached(told, TARGET, WINDOW)
        spent[name] = seconds
        when = f"after {seen // BATCH} steps" if math.isfinite(seconds) else f"not reached in {seen // BATCH} steps"
        note = f"loss {TARGET} {when}; {statistics.mean(told['seconds']):.3f} s a step on average; {measured}"
        rows.append(Row("gradiveq", f"to the loss: {work}", name, "s", (seconds,), note=note))
    sent = middle(dense["nbytes"])
    kinds = {
        "dense": (dense, list(range(len(dense["nbytes"])))),
        "GradiVeQ, training steps": (ours, [i for i, x in enumerate(ours["nbytes"]) if x >= sent / 2]),
        "GradiVeQ, compressed steps": (ours, [i for i, x in enumerate(ours["nbytes"]) if x < sent / 2]),
    }
    sync = {}
    for name, (told, steps) in kinds.items():
        spread = tuple(told["phases"]["sync"][i] for i in steps)
        sync[name] = middle(spread)
        note = f"{middle([told['nbytes'][i] for i in steps]) / 1e3:,.0f} kB of a worker in a step; {len(steps)} steps"
        rows.append(Row("gradiveq", f"aggregation in a step: {work}", name, "s", spread, phases(told, steps), note))
    for name, shares in right.items():
        note = ", ".join(f"{share:.2f}" for share in shares) + " by seed"
        rows.append(Row("gradiveq", "right answers held out", name, "% right", tuple(shares), note=note))
    whole = sum(dense["nbytes"]) / sum(ours["nbytes"])
    alone = sent / middle([ours["nbytes"][i] for i in kinds["GradiVeQ, compressed steps"][1]])
    ratios = f"compressed steps alone {alone:.2f}; formula for the large layer alone {HOW.ratio:.2f}"
    rows.append(Row("gradiveq", "bytes, dense / GradiVeQ", "all steps, training and bases included", "times", (whole,), note=ratios))
    lost = statistics.mean(right["dense"]) - statistics.mean(right["GradiVeQ"])
    shorter = sync["dense"] / sync["GradiVeQ, compressed steps"]
    return rows, [
        Claim("gradiveq", "aggregation in a compressed step (s), dense against it", shorter, SHORTER),
        Claim("gradiveq", "seconds to the loss, dense against GradiVeQ", spent["dense"] / spent["GradiVeQ"], SOONER),
        Claim("gradiveq", f"points of right answers lost, mean of {len(right['dense'])} seeds", lost, POINTS, "<="),
    ]
