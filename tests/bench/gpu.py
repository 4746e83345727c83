"""Rows a second on one GPU: barrier with one rank beside the loop that everyone writes, the same module, batch and optimizer.

    barrier        our engine on a DataFrame of Parquet files, device="cuda"; seconds of steps as in model.history
    plain torch    one process, rows in memory as page-locked tensors, copied to the GPU a batch at a time; no Spark
    ... bf16       both under torch.autocast

Each repetition runs each system once, in turn. Its value is batch / median seconds of the steps after the first WARM. Both read the
loss after every step, so that a step's seconds are all of it. The note of a row has the GPU's name.

Without a GPU that torch can use it is left out, with a line that says so: `why_not`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.bench.report import Claim, Context, Row
from tests.bench.workloads import W1, W2, W3, Workload

WARM = {"W1": 50, "W2": 20, "W3": 5}
STEPS = {"W1": 300, "W2": 60, "W3": 40}
CLOSE = 0.8  # of plain torch's rows a second


def why_not() -> str:
    """Why nothing can be measured here; "" where it can."""
    if torch.cuda.is_available():
        return ""
    return f"torch {torch.__version__} sees no GPU on this machine; run `python -m tests.bench gpu` where torch.cuda.is_available()"


def plain(work: Workload, path: Path, steps: int, precision: str) -> list[float]:
    """Seconds of each step of a loop without Spark."""
    inputs, target = work.tensors(path)
    inputs, target = [x.pin_memory() for x in inputs], target.pin_memory()
    device, rows = torch.device("cuda"), len(target)
    module, loss = work.make().to(device).train(), work.loss()
    optimizer = work.optimizer(module.parameters())
    generator, seconds = torch.Generator().manual_seed(0), []
    deal, at = torch.randperm(rows, generator=generator), 0
    for _ in range(steps):
        began = time.perf_counter()
        if at + work.batch > rows:
            deal, at = torch.randperm(rows, generator=generator), 0
        index = deal[at : at + work.batch]
        at += work.batch
        *batch, wanted = (x[index].pin_memory().to(device, non_blocking=True) for x in (*inputs, target))
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=precision == "bf16"):
            value = loss(module(*batch), wanted)
        value.backward()
        optimizer.step()
        float(value)
        seconds.append(time.perf_counter() - began)
    torch.cuda.synchronize()
    return seconds


def ours(spark: Any, work: Workload, path: Path, precision: str) -> list[float]:
    estimator = work.estimator("barrier", numWorkers=1, device="cuda", precision=precision)
    return [line["seconds"] for line in estimator.fit(spark.read.parquet(str(path))).history if "step" in line]


def measure(context: Context, work: Workload) -> list[Row]:
    steps = 8 if context.quick else STEPS[work.name]
    warm, spark = min(WARM[work.name], steps // 2), context.session()
    path = work.write(context.folder, rows=steps * work.batch)
    systems: dict[str, Callable[[], list[float]]] = {}
    for precision in ("fp32", "bf16"):
        more = "" if precision == "fp32" else " bf16"
        systems[f"barrier{more}"] = lambda precision=precision: ours(spark, work, path, precision)
        systems[f"plain torch{more}"] = lambda precision=precision: plain(work, path, steps, precision)
    found: dict[str, list[float]] = {name: [] for name in systems}
    for _ in range(context.repeat):
        for name, run in systems.items():
            found[name].append(work.batch / statistics.median(run()[warm:]))
    note = f"{torch.cuda.get_device_name()}, torch {torch.__version__}; {steps - warm} steps"
    return [Row("gpu", f"{work.name} {work.title}", name, "rows/s", tuple(values), {}, note) for name, values in found.items()]


def run(context: Context) -> tuple[list[Row], list[Claim]]:
    if reason := why_not():
        raise RuntimeError(reason)
    rows, claims = [], []
    for work in (W1, W2, W3):
        mine = measure(context, work)
        rows += mine
        speed = {row.system: row.median for row in mine}
        for more in ("", " bf16"):
            text = f"{work.name}: barrier{more} against plain torch{more} on the same GPU (rows/s)"
            claims.append(Claim("gpu", text, speed[f"barrier{more}"] / speed[f"plain torch{more}"], CLOSE))
    return rows, claims
