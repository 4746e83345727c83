"""Slow workers: seconds to a fixed loss with backup workers, against those who wait for all and those who wait for nobody.

Eight workers on this machine, each held up before it computes: 60 ms, and ten times as long with a probability of 1 in 10, drawn
anew for each in each step (bigdl_lite.testing.Delays), so that a step of all eight most often has one straggler. A small MLP on the
rows of network.py, 64 rows a worker and step; to compute takes a few milliseconds. Plain SGD. With backups the learning rate grows
with the number of workers whose gradients are taken (linear scaling), from one rate for all of them; the others get the best of
RATES, by their own time. All make the same number of steps; with backups a row that came late is not used.
"""

from __future__ import annotations

import math
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from bigdl_lite import BarrierEngine, TorchEstimator
from bigdl_lite.algorithms.averaging import async_average
from bigdl_lite.algorithms.deadline import within
from bigdl_lite.algorithms.server import backup_workers, bounded_staleness
from bigdl_lite.testing import Delays, slowed
from tests.bench import network
from tests.bench.hosts import Told, middles, reached, series
from tests.bench.report import Claim, Context, Row
from tests.bench.workloads import Seeded

WORKERS, EACH = 8, 64
BATCH, STEPS = WORKERS * EACH, 100
TARGET, WINDOW = 0.22, 8 * BATCH
DELAYS = Delays(unit=0.06, sigma=0.1, probability=0.1, factor=10.0)
RATE = 3.2
RATES = (1.6, 3.2, 4.5)
BACKUPS = (0, 1, 2, 3, 4, 6)


def net() -> nn.Module:  # [B, 64] -> [B, 10]
    return nn.Sequential(nn.Linear(network.FEATURES, 128), nn.ReLU(), nn.Linear(128, network.CLASSES))


make = Seeded(net)


def _rest() -> dict[str, Any]:
    return {
        "asynchronous": bounded_staleness(math.inf),
        "bounded staleness, 2": bounded_staleness(2),
        "asynchronous averaging": async_average(0.1),
        "deadline, 80 ms": within(0.08, parts=4),
    }


def fit(context: Context, path: Path, algorithm: Any, rate: float) -> Told:
    frame = context.session(WORKERS).read.parquet(str(path)).repartition(WORKERS)
    model = TorchEstimator(
        module=make, loss=nn.CrossEntropyLoss(), optimizer=partial(network.sgd, lr=rate, momentum=0.0), inputCols=["x"],
        labelCol="y", batchSize=BATCH, numWorkers=WORKERS, engine=BarrierEngine(), progress="none", epochs=1,
        algorithm=slowed(algorithm, DELAYS),
    ).fit(frame)  # fmt: skip
    return series(model.history, WORKERS) | {"quality": network.quality(model.module)}


def run(context: Context) -> tuple[list[Row], list[Claim]]:
    path = network.write(context.folder, (24 if context.quick else STEPS) * BATCH // network.BATCH)
    rows: list[Row] = []

    def measure(system: str, algorithm: Any, rate: float) -> None:
        began, found = time.monotonic(), []
        for _ in range(context.repeat):
            try:
                found.append(fit(context, path, algorithm, rate))
            except Exception as error:
                print(f"stragglers: {system}: {type(error).__name__}: {str(error)[:200]}", file=sys.stderr, flush=True)
        if found:
            rows.append(_row(system, found, rate))
        print(f"stragglers: {system}, {rate}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)

    fit(context, path, backup_workers(0), RATE)  # what starts with the first fit is not measured
    for b in BACKUPS:
        measure(f"{b} backups", backup_workers(b), RATE * (WORKERS - b) / WORKERS)
    # as many rows as the synchronous run, fewer in each of more steps: what is dropped is made up for
    b = int(min(rows, key=lambda row: row.median if not row.system.startswith("0 ") else math.inf).system.split()[0])
    longer = network.write(context.folder, STEPS * WORKERS // (WORKERS - b) * BATCH // network.BATCH)
    if not context.quick:
        rows.append(_row(f"{b} backups, as many rows", [fit(context, longer, backup_workers(b), RATE * (WORKERS - b) / WORKERS)], RATE))
    for system, algorithm in _rest().items():
        before = len(rows)
        for rate in RATES[:1] if context.quick else RATES:
            measure(system, algorithm, rate)
        rows[before:] = sorted(rows[before:], key=lambda row: row.median)[:1]
    return rows, claims(rows)


def _row(system: str, found: list[Told], rate: float) -> Row:
    ends = [reached(told, TARGET, WINDOW) for told in found]
    loss, right = found[0]["quality"]
    step = sum(found[0]["seconds"]) / len(found[0]["seconds"])
    note = f"{1e3 * step:.0f} ms a step, {ends[0][1]:,} rows until then, rate {rate:.3g}"
    note = f"{note}; in the end {loss:.3f} held out, {100 * right:.1f} % right"
    return Row("stragglers", f"{WORKERS} workers", system, "s", tuple(seconds for seconds, _ in ends), middles(found[0]), note)


def right(row: Row) -> float:
    """The share of right answers that the note tells."""
    return float(row.note.split("held out, ")[1].split(" %")[0])


def claims(rows: list[Row]) -> list[Claim]:
    by = {row.system: row for row in rows}
    all_of = by["0 backups"]
    backed = [by[f"{b} backups"] for b in BACKUPS if b and f"{b} backups" in by]
    best = min(backed, key=lambda row: row.median)
    end = by.get(f"{best.system}, as many rows", best)
    inner = best.system not in (backed[0].system if len(backed) == 1 else "", f"{BACKUPS[-1]} backups")
    found = [
        Claim("stragglers", f"seconds to the loss, synchronous against {best.system}", all_of.median / best.median, 1.0),
        Claim("stragglers", f"points of right answers, {end.system} less synchronous", right(end) - right(all_of), 0.0),
        Claim("stragglers", f"the best number of backups is neither none nor the most ({best.system}; 1: yes)", float(inner), 1.0),
    ]
    if "asynchronous" in by:
        found.insert(1, Claim(
            "stragglers", f"seconds to the loss, asynchronous against {best.system}", by["asynchronous"].median / best.median, 1.0
        ))  # fmt: skip
    return found
