"""The loop everyone writes first: mapPartitions, treeAggregate of pickled NumPy gradients, an optimizer on the driver, broadcast.

Its rows are dealt into batches before the first round, so that a round is nothing but weights out and gradients back.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.bench.workloads import Workload

WORKERS = 2

Part = tuple[list[np.ndarray] | None, float]  # gradients, seconds of the slowest worker


def _plus(a: Part, b: Part) -> Part:
    if a[0] is None or b[0] is None:
        return b if a[0] is None else a
    return [p + q for p, q in zip(a[0], b[0], strict=True)], max(a[1], b[1])


def naive(spark: Any, work: Workload, path: Path, steps: int) -> dict[str, Any]:
    """Seconds of each round, and of the slowest worker's forward and backward in it."""
    sc = spark.sparkContext
    inputs, target = work.tensors(path)
    half = work.batch // WORKERS
    parts = []
    for r in range(WORKERS):
        cuts = [slice(s * work.batch + r * half, s * work.batch + (r + 1) * half) for s in range(steps)]
        parts.append([([x[cut].numpy() for x in inputs], target[cut].numpy()) for cut in cuts])
    shares = sc.parallelize(parts, WORKERS).cache()
    shares.count()
    module = work.make()
    optimizer = work.optimizer(module.parameters())
    seconds, compute = [], []
    for step in range(steps):
        began = time.perf_counter()
        weights = sc.broadcast([p.detach().numpy() for p in module.parameters()])

        def gradient(rows: Iterable[Any], step: int = step, weights: Any = weights) -> Iterator[Part]:
            torch.set_num_threads(1)
            (share,) = rows
            started = time.perf_counter()
            replica = work.make()
            for p, w in zip(replica.parameters(), weights.value, strict=True):
                p.data = torch.from_numpy(w.copy())
            batch, wanted = share[step]
            loss = work.loss()(replica(*map(torch.from_numpy, batch)), torch.from_numpy(wanted))
            loss.backward()
            yield [p.grad.numpy() for p in replica.parameters()], time.perf_counter() - started

        total, spent = shares.mapPartitions(gradient).treeAggregate((None, 0.0), _plus, _plus)
        for p, g in zip(module.parameters(), total, strict=True):
            p.grad = torch.from_numpy(g / WORKERS)
        optimizer.step()
        weights.destroy()
        seconds.append(time.perf_counter() - began)
        compute.append(spent)
    shares.unpersist()
    rest = [a - b for a, b in zip(seconds, compute, strict=True)]
    return {"seconds": seconds, "phases": {"compute": compute, "sync": rest}}
