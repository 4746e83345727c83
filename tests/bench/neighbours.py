"""Neighbours, delays, and skewed rows: which method without a meeting point on which network, against those with one.

The MLP and the rows of network.py on four hosts. With even rows: seconds to a fixed loss. With skewed rows (Dirichlet, ALPHA):
the share of right answers of the mean model on rows held out, after all steps, on the fast network; there the loss of a step says
little, since each worker knows its own rows best. All have the same first weights; learning rates as in network.py: one for SGD
with momentum, a lower one where a delay or error feedback forbids momentum.
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
from torch import nn

from bigdl_lite import BarrierEngine, TorchEstimator
from bigdl_lite.algorithms import local_sgd
from bigdl_lite.algorithms.averaging import async_average
from bigdl_lite.algorithms.pipe import pipe_sgd
from bigdl_lite.testing import label_skew
from bigdl_lite.wire.lossy import MinMax8
from tests.bench import network
from tests.bench.hosts import WORKERS, Hosts, Network, Told, series
from tests.bench.network import BANDWIDTH, BATCH, FEATURES, LATENCY, adam, make, quality, sample, sgd
from tests.bench.report import Claim, Context, Row

FAST = Network("1gbit", "1ms")
NETWORKS = (FAST, LATENCY, BANDWIDTH)
ALPHA, STEPS, ROUNDS = 0.1, 48, 4  # ROUNDS: epochs on skewed rows
LOW = partial(sgd, lr=0.5, momentum=0.0)


def methods() -> dict[str, Mapping[str, Any]]:
    return {
        "dense": {"exchange": "dense"},
        "minmax8": {"exchange": "minmax8"},
        "local SGD, H=16": {"algorithm": local_sgd(16)},
        "pipe-sgd": {"algorithm": "pipe-sgd", "optimizer": LOW},
        "pipe-sgd, 8 bits": {"algorithm": pipe_sgd(MinMax8()), "optimizer": LOW},
        "d-psgd": {"algorithm": "d-psgd"},
        "shift-one": {"algorithm": "shift-one"},
        "dcd-psgd": {"algorithm": "dcd-psgd"},
        "choco-sgd": {"algorithm": "choco-sgd"},
        "qg-dsgdm": {"algorithm": "qg-dsgdm"},
        "qg-dadam": {"algorithm": "qg-dadam", "optimizer": adam},
        "async-average": {"algorithm": async_average(0.05)},
    }


def skewed(folder: Path, steps: int) -> Path:
    """The rows of network.write, one file a worker, dealt by label_skew."""
    path = Path(folder, f"neighbours-{steps}-{ALPHA}")
    if not path.exists():
        begun = path.with_suffix(".part")
        begun.mkdir(parents=True, exist_ok=True)
        x, y = sample(steps * BATCH, 1)
        of = label_skew(y, ALPHA, WORKERS, seed=0)
        for worker in range(WORKERS):
            mine = x[of == worker]
            edges = np.arange(0, mine.size + 1, FEATURES, dtype="i4")
            table = pa.table({"x": pa.ListArray.from_arrays(edges, mine.ravel()), "y": pa.array(y[of == worker])})
            pq.write_table(table, begun / f"part-{worker}.parquet")
        begun.rename(path)
    return path


def fit(spark: Any, told: Mapping[str, Any]) -> Told:
    """told: method, path, epochs."""
    settings: dict[str, Any] = {
        "module": make, "loss": nn.CrossEntropyLoss(), "optimizer": sgd, "inputCols": ["x"], "labelCol": "y", "batchSize": BATCH,
        "numWorkers": WORKERS, "engine": BarrierEngine(share_memory=False), "progress": "none", **methods()[told["method"]],
    }  # fmt: skip
    model = TorchEstimator(epochs=told["epochs"], **settings).fit(spark.read.parquet(told["path"]))
    apart = [line["consensus"] for line in model.history if "consensus" in line]
    return series(model.history) | {"quality": quality(model.module), "consensus": apart[-1] if apart else 0.0}


def run(context: Context) -> tuple[list[Row], list[Claim]]:
    steps = 12 if context.quick else STEPS
    even, uneven = str(network.write(context.folder, steps)), str(skewed(context.folder, steps))
    rows: list[Row] = []
    with Hosts() as hosts:
        spark, ddp = hosts.spark(__name__), hosts.ranks(network.__name__)

        def ask(name: str, path: str, epochs: int = 1) -> Told | None:
            began = time.monotonic()
            try:
                found = (ddp if name == "DDP" else spark).ask({"method": name, "path": path, "epochs": epochs})
            except RuntimeError as error:
                print(f"neighbours: {name} failed: {error}", file=sys.stderr, flush=True)
                return None
            print(f"neighbours: {name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
            return found

        ask("dense", even)  # what starts with the first fit is not the network's
        for name in methods():
            if told := ask(name, uneven, 1 if context.quick else ROUNDS):
                loss, right = told["quality"]
                note = f"loss {loss:.3f} held out, models {told['consensus']:.2f} from their mean at the end"
                rows.append(Row("neighbours", f"rows skewed, alpha {ALPHA}", name, "% right", (100 * right,), {}, note))
        for at in NETWORKS[-1:] if context.quick else NETWORKS:
            measured = hosts.limit(at)
            for name in (*(("DDP",) if at == LATENCY else ()), *methods()):
                if told := ask(name, even):
                    row = network.row(at, name, told, measured)
                    rows.append(Row("neighbours", row.workload, name, row.unit, row.values, row.phases, row.note))
    return rows, claims(rows)


def claims(rows: list[Row]) -> list[Claim]:
    """The best of the methods without a meeting point against the synchronous one, on each network."""
    found = []
    for at in NETWORKS:
        seconds = {row.system: row.median for row in rows if row.workload == str(at) and math.isfinite(row.median)}
        without = {name: s for name, s in seconds.items() if name not in ("dense", "minmax8", "local SGD, H=16")}
        if without and "dense" in seconds:
            best = min(without, key=lambda name: without[name])
            found.append(Claim("neighbours", f"{at}: seconds to the loss, dense against {best}", seconds["dense"] / without[best], 1.0))
    step = {row.system: float(row.note.split(" s and")[0]) for row in rows if row.workload == str(LATENCY)}
    if "DDP" in step and "shift-one" in step:
        ratio = step["DDP"] / step["shift-one"]
        found.append(Claim("neighbours", f"{LATENCY}: seconds of a step, DDP's ring against shift-one", ratio, 2.5))
    return found
