"""Which method on which network: seconds to a fixed loss on four hosts, over links of a given rate and delay.

An MLP of 0.25 M parameters on ten classes, four workers with 32 rows a step each, one epoch: no row is seen twice, so the loss
of a step is the loss on rows not seen yet. Seconds are those of all steps, from the first one on; starting, reading and
ending are not in them. The loss is reached where its mean over the last WINDOW rows is at most TARGET. Each method runs once
on each network. All have the same first weights, the same rows in the same batches, and one thread a worker; DDP and the
methods that need no other have the same optimizer. Error feedback gets SGD without momentum, with which it does best here.

    DDP     DistributedDataParallel over gloo between the same hosts, rows in memory, no Spark
    dense   ours without any relaxation; the others as in methods()

Bytes are those that one worker sends in one step of 128 rows: ours as in model.history (payload), DDP's as its interface
counts them (with headers). Learning rates were chosen once for each optimizer, from a few, on a fast network. Phases are those
of a round, which for local SGD is H steps.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bigdl_lite import BarrierEngine, TorchEstimator
from bigdl_lite.algorithms import local_sgd
from bigdl_lite.algorithms.powersgd import PowerSGD
from bigdl_lite.algorithms.qadam import qadam
from bigdl_lite.batch import order
from tests.bench.hosts import WORKERS, Hosts, Network, Told, middle, middles, reached, series
from tests.bench.report import Claim, Context, Row
from tests.bench.workloads import Seeded

FEATURES, HIDDEN, CLASSES, MODES = 64, 460, 10, 8
BATCH = 32 * WORKERS
STEPS, HELD_OUT = 72, 4_000
TARGET, WINDOW = 0.5, 10 * BATCH
BANDWIDTH, LATENCY = Network("25mbit", "1ms"), Network("1gbit", "50ms")
NETWORKS = tuple(Network(rate, delay) for rate in ("1gbit", "100mbit", "25mbit") for delay in ("1ms", "50ms"))
FASTER, IN_NETWORKS = 2.0, 2


def sgd(parameters: Any, lr: float = 0.2, momentum: float = 0.9) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=lr, momentum=momentum)


def adam(parameters: Any, lr: float = 2e-3) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=lr)


def methods() -> dict[str, Mapping[str, Any]]:
    """What differs from dense, by the method's name: settings of TorchEstimator."""
    plain, slower = partial(sgd, lr=1.0, momentum=0.0), partial(sgd, lr=0.1)
    return {
        "dense": {},
        "bf16": {"exchange": "bf16"},
        "minmax8": {"exchange": "minmax8"},
        "sign, EF": {"exchange": "sign", "optimizer": plain},
        "top 1 %, EF": {"exchange": "topk", "optimizer": plain},
        "PowerSGD, rank 4": {"exchange": PowerSGD(rank=4), "optimizer": slower},
        "local SGD, H=8": {"algorithm": local_sgd(8)},
        "local SGD, H=16": {"algorithm": local_sgd(16)},
        "QAdam": {"algorithm": partial(qadam, warmup=16), "optimizer": adam},
    }


def net() -> nn.Module:  # [B, 64] -> [B, 10]
    return nn.Sequential(
        nn.Linear(FEATURES, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES)
    )


make = Seeded(net)


def sample(rows: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows [rows, 64] float32 around MODES places for each class, and their classes [rows] int64. The places are always the same."""
    places = np.random.default_rng(0).standard_normal((CLASSES, MODES, FEATURES))
    rng = np.random.default_rng(seed)
    y = rng.integers(0, CLASSES, rows)
    x = places[y, rng.integers(0, MODES, rows)] + rng.standard_normal((rows, FEATURES))
    return x.astype("f4"), y


def write(folder: Path, steps: int) -> Path:
    """One Parquet file for each worker, `steps` batches in all."""
    path = Path(folder, f"network-{steps}")
    if not path.exists():
        begun = path.with_suffix(".part")
        begun.mkdir(parents=True, exist_ok=True)
        x, y = sample(steps * BATCH, 1)
        edges = np.arange(0, len(x) * FEATURES + 1, FEATURES, dtype="i4")
        table = pa.table({"x": pa.ListArray.from_arrays(edges, x.ravel()), "y": pa.array(y)})
        for i in range(WORKERS):
            pq.write_table(table.slice(i * len(table) // WORKERS, len(table) // WORKERS), begun / f"part-{i}.parquet")
        begun.rename(path)
    return path


def quality(module: nn.Module) -> tuple[float, float]:
    """Loss and share of right answers on rows held out."""
    x, y = map(torch.from_numpy, sample(HELD_OUT, 2))
    with torch.no_grad():
        out = module.eval()(x)
    return float(nn.functional.cross_entropy(out, y)), float((out.argmax(1) == y).float().mean())


# ---- in the programs on the hosts -------------------------------------------------------------------------------------


def fit(spark: Any, told: Mapping[str, Any]) -> Told:
    """One fit of ours. told: method, path."""
    settings: dict[str, Any] = {
        "module": make, "loss": nn.CrossEntropyLoss(), "optimizer": sgd, "inputCols": ["x"], "labelCol": "y", "batchSize": BATCH,
        "numWorkers": WORKERS, "engine": BarrierEngine(share_memory=False), "progress": "none", **methods()[told["method"]],
    }  # fmt: skip
    model = TorchEstimator(**settings).fit(spark.read.parquet(told["path"]))
    return series(model.history) | {"quality": quality(model.module)}


def rank(told: Mapping[str, Any]) -> Told:
    """One run of DDP. told: path."""
    me, p = dist.get_rank(), dist.get_world_size()
    files = sorted(Path(told["path"]).glob("*.parquet"), key=lambda file: -file.stat().st_size)  # as Spark deals them
    x, y = _rows(files[me])
    module, loss = DistributedDataParallel(make()), nn.CrossEntropyLoss()
    optimizer = sgd(module.parameters())
    mine = BATCH // p
    deal = order(len(y), 0, 0, me)
    seconds: list[float] = []
    losses: list[float] = []
    phases: dict[str, list[float]] = {"data": [], "compute + all-reduce": [], "optimizer": []}
    dist.barrier()
    before = _sent()
    for at in range(0, len(y), mine):
        began = time.perf_counter()
        index = deal[at : at + mine]
        batch, wanted = x[index], y[index]
        ready = time.perf_counter()
        optimizer.zero_grad()
        value = loss(module(batch), wanted)
        value.backward()
        worked = time.perf_counter()
        optimizer.step()
        losses.append(float(value))
        done = time.perf_counter()
        seconds.append(done - began)
        for name, spent in zip(phases, (ready - began, worked - ready, done - worked), strict=True):
            phases[name].append(spent)
    nbytes = (_sent() - before) / len(seconds)
    total = torch.tensor(losses)
    dist.all_reduce(total)  # each rank knows the loss on its own rows
    return {
        "seconds": seconds, "loss": (total / p).tolist(), "rows": [BATCH] * len(seconds), "nbytes": [nbytes] * len(seconds),
        "phases": phases, "quality": quality(module.module),
    }  # fmt: skip


def _rows(file: Path) -> tuple[Tensor, Tensor]:
    table = pq.read_table(file).combine_chunks()
    (x,), (y,) = table["x"].chunks, table["y"].chunks
    return torch.from_numpy(x.flatten().to_numpy().reshape(-1, FEATURES).copy()), torch.from_numpy(y.to_numpy().copy())


def _sent() -> int:
    """Bytes that this host has sent."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, counts = line.partition(":")
        if name.strip() == "eth0":
            return int(counts.split()[8])
    return 0


# ---- the benchmark ----------------------------------------------------------------------------------------------------


def row(network: Network, system: str, told: Told, measured: str) -> Row:
    seconds, rows = reached(told, TARGET, WINDOW)
    batches = sum(told["rows"]) / BATCH
    each = middle(told["seconds"]) * len(told["seconds"]) / batches
    sent = sum(told["nbytes"]) / batches
    loss, right = told["quality"]
    when = f"after {rows // BATCH} steps" if math.isfinite(seconds) else f"not reached in {batches:.0f} steps"
    end = f"in the end {loss:.3f} held out, {100 * right:.1f} % right"
    note = f"{each:.3f} s and {sent / 1e3:,.0f} kB a step; {when}; {end}; {measured}"
    return Row("network", str(network), system, "s", (seconds,), middles(told), note)


def measure(context: Context, networks: tuple[Network, ...]) -> list[Row]:
    path = write(context.folder, 12 if context.quick else STEPS)
    rows = []
    with Hosts() as hosts:
        spark, ddp = hosts.spark(__name__), hosts.ranks(__name__)
        ask = {"DDP": ddp.ask, **{name: partial(_method, spark, name) for name in methods()}}
        for run in ask.values():  # what starts with the first fit is not the network's
            run({"path": str(path)})
            if context.quick:
                break
        for network in networks:
            measured = hosts.limit(network)
            for name, run in ask.items():
                began = time.monotonic()
                try:
                    rows.append(row(network, name, run({"path": str(path)}), measured))
                    print(f"network: {name} on {network}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
                except RuntimeError as error:
                    print(f"network: {name} on {network} failed: {error}", file=sys.stderr, flush=True)
    return rows


def _method(spark: Any, name: str, told: Mapping[str, Any]) -> Told:
    return spark.ask({"method": name, **told})


def claims(rows: list[Row], networks: tuple[Network, ...]) -> list[Claim]:
    found, faster, winners = [], [], {}
    for network in networks:
        seconds = {row.system: row.median for row in rows if row.workload == str(network)}
        relaxed = {name: s for name, s in seconds.items() if name not in ("DDP", "dense") and math.isfinite(s)}
        if not relaxed or "DDP" not in seconds:
            continue
        best = winners[network] = min(relaxed, key=lambda name: relaxed[name])
        faster.append(seconds["DDP"] / relaxed[best])
        found.append(Claim("network", f"{network}: seconds to the loss, DDP against {best}", faster[-1], 1.0))
    if len(faster) >= IN_NETWORKS:
        text = f"the best relaxation against DDP, on the network where that is the number {IN_NETWORKS} in size"
        found.append(Claim("network", text, sorted(faster)[-IN_NETWORKS], FASTER))
    if {BANDWIDTH, LATENCY} <= set(winners):
        text = f"the winner at {BANDWIDTH} ({winners[BANDWIDTH]}) is not the one at {LATENCY} ({winners[LATENCY]}) (1: yes)"
        found.append(Claim("network", text, float(winners[BANDWIDTH] != winners[LATENCY]), 1.0))
    return found


def run(context: Context) -> tuple[list[Row], list[Claim]]:
    networks = (BANDWIDTH, LATENCY) if context.quick else NETWORKS
    rows = measure(context, networks)
    return rows, claims(rows, networks)
