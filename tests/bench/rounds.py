"""Seconds per round, side by side in one run: both Spark engines, gloo all-reduce, and the loop everyone writes first.

    python -m tests.bench.rounds [--rounds 8] [--parameters 25] [--json FILE]

25 M parameters, 2 workers, one thread each, batch 128, Adam; data generated from a seed. Every system does the same
work a round: forward and backward on 64 rows a worker, the sum of two gradients, one Adam step, new weights everywhere.

    barrier   one barrier stage; the optimizer is sharded, ranks meet in shared memory
    shuffle   one Spark job a round
    gloo      two processes without Spark: torch.distributed all_reduce of one flat gradient, full Adam on both
    naive     mapPartitions + treeAggregate of pickled NumPy gradients, Adam on the driver, sc.broadcast of the weights

Medians over the rounds after the first three, and the slowest one; the split is that of the slowest rank.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.multiprocessing as mp
from torch import nn

BATCH, WORKERS, FEATURES, WARM = 128, 2, 64, 3


def net(millions: float) -> nn.Module:
    """An MLP of about that many million parameters: 64 -> h -> h -> h/2, one output."""
    h = int((millions * 1e6 / 1.5) ** 0.5)
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(FEATURES, h), nn.ReLU(), nn.Linear(h, h), nn.ReLU(), nn.Linear(h, h // 2), nn.ReLU(), nn.Linear(h // 2, 1)
    )


def data(rounds: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((BATCH * rounds, FEATURES)).astype("f4")
    return x, x[:, :8].sum(1)


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-4)


def summary(name: str, seconds: list[float], compute: list[float], other: str = "") -> dict[str, Any]:
    seconds, compute = seconds[WARM:], compute[WARM:]
    rest = [a - b for a, b in zip(seconds, compute, strict=True)]
    median = statistics.median
    return {
        "system": name, "round_s": median(seconds), "worst_s": max(seconds), "compute_s": median(compute), "sync_s": median(rest),
        "note": other,
    }  # fmt: skip


# ---- ours -------------------------------------------------------------------------------------------------------------


def ours(spark: Any, engine: str, millions: float, rounds: int) -> dict[str, Any]:
    from bigdl_lite import TorchRegressor

    x, y = data(rounds)
    import pandas as pd

    frame = spark.createDataFrame(pd.DataFrame({"features": list(x), "label": y}), "features array<float>, label float")
    estimator = TorchRegressor(
        module=lambda: net(millions), optimizer=adam, batchSize=BATCH, epochs=1, numWorkers=WORKERS, engine=engine, progress="none"
    )
    began = time.perf_counter()
    model = estimator.fit(frame)
    whole = time.perf_counter() - began
    steps = [line for line in model.history if "step" in line]
    return summary(engine, [s["seconds"] for s in steps], [s["compute_s"] for s in steps], f"whole fit {whole:.1f} s")


# ---- gloo -------------------------------------------------------------------------------------------------------------


def gloo_rank(rank: int, millions: float, rounds: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORKERS)
    module, loss = net(millions), nn.MSELoss()
    optimizer = adam(module.parameters())
    x, y = (torch.from_numpy(a) for a in data(rounds))
    seconds, compute = [], []
    for step in range(rounds):
        torch.distributed.barrier()
        began = time.perf_counter()
        rows = slice(step * BATCH + rank * BATCH // 2, step * BATCH + (rank + 1) * BATCH // 2)
        optimizer.zero_grad()
        loss(module(x[rows]).squeeze(1), y[rows]).backward()
        worked = time.perf_counter()
        flat = torch.cat([p.grad.view(-1) for p in module.parameters()])
        torch.distributed.all_reduce(flat)
        flat /= WORKERS
        at = 0
        for p in module.parameters():
            p.grad.copy_(flat[at : at + p.numel()].view_as(p))
            at += p.numel()
        optimizer.step()
        seconds.append(time.perf_counter() - began)
        compute.append(worked - began)
    if rank == 0:
        Path(folder, "times.json").write_text(json.dumps([seconds, compute]))
    torch.distributed.destroy_process_group()


def gloo(millions: float, rounds: int) -> dict[str, Any]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(gloo_rank, (millions, rounds, folder), WORKERS)
        seconds, compute = json.loads(Path(folder, "times.json").read_text())
    return summary("gloo", seconds, compute)


def plus(a: Any, b: Any) -> Any:
    if a[0] is None or b[0] is None:
        return b if a[0] is None else a
    return [p + q for p, q in zip(a[0], b[0], strict=True)], max(a[1], b[1])


# ---- the loop everyone writes first -----------------------------------------------------------------------------------


def naive(spark: Any, millions: float, rounds: int) -> dict[str, Any]:
    sc = spark.sparkContext
    x, y = data(rounds)
    half = BATCH // 2
    parts = [
        [(x[s * BATCH + r * half : s * BATCH + (r + 1) * half], y[s * BATCH + r * half : s * BATCH + (r + 1) * half])
         for s in range(rounds)] for r in range(WORKERS)
    ]  # fmt: skip
    shares = sc.parallelize(parts, WORKERS).cache()
    shares.count()
    module = net(millions)
    optimizer = adam(module.parameters())
    seconds, compute = [], []
    for step in range(rounds):
        began = time.perf_counter()
        weights = sc.broadcast([p.detach().numpy() for p in module.parameters()])

        def gradient(rows: Any, step: int = step, weights: Any = weights) -> Any:
            torch.set_num_threads(1)
            (share,) = rows
            started = time.perf_counter()
            replica = net(millions)
            for p, w in zip(replica.parameters(), weights.value, strict=True):
                p.data = torch.from_numpy(w.copy())
            a, b = share[step]
            loss = nn.MSELoss()(replica(torch.from_numpy(a)).squeeze(1), torch.from_numpy(b))
            loss.backward()
            yield [p.grad.numpy() for p in replica.parameters()], time.perf_counter() - started

        total, work = shares.mapPartitions(gradient).treeAggregate(
            (None, 0.0),
            plus,
            plus,
        )
        for p, g in zip(module.parameters(), total, strict=True):
            p.grad = torch.from_numpy(g / WORKERS)
        optimizer.step()
        weights.destroy()
        seconds.append(time.perf_counter() - began)
        compute.append(work)
    return summary("naive", seconds, compute)


# ---- all of them ------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="rounds of each system, the first three not counted")
    parser.add_argument("--parameters", type=float, default=25, help="millions")
    parser.add_argument("--json", help="write the rows there too")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
    from bigdl_lite import local_session

    rows = [gloo(asked.parameters, asked.rounds)]
    spark = local_session(cores=WORKERS, conf={"spark.driver.memory": "4g", "spark.ui.showConsoleProgress": "false"})
    spark.sparkContext.setLogLevel("ERROR")
    for engine in ("barrier", "shuffle"):
        rows.append(ours(spark, engine, asked.parameters, asked.rounds))
    rows.append(naive(spark, asked.parameters, asked.rounds))
    spark.stop()
    base = rows[0]
    n = sum(p.numel() for p in net(asked.parameters).parameters())
    print(f"\n{n / 1e6:.1f} M parameters, {WORKERS} workers, batch {BATCH}, Adam; {platform.machine()}, {os.cpu_count()} cores, "
          f"torch {torch.__version__}, {asked.rounds - WARM} rounds\n")  # fmt: skip
    print("| system | s / round | worst | compute | sync + optimizer | sync, gloo = 1 | note |\n|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['system']} | {row['round_s']:.3f} | {row['worst_s']:.3f} | {row['compute_s']:.3f} | {row['sync_s']:.3f} "
            f"| {row['sync_s'] / base['sync_s']:.2f} | {row['note']} |"
        )
    if asked.json:
        Path(asked.json).write_text(json.dumps({"parameters": n, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
