"""What the pipeline gains: updates travel while the next step computes, over a link where both take about as long.

The MLP of overlap.py (0.8 M parameters) on two hosts. Beside each measured gain stands what pipe.predicted() makes of the
synchronous step's own compute and sync. On the slow link the pipeline has 8 bits a value inside, and is compared with synchronous
float32. What the delay does to the loss is measured with the MLP of network.py, on a fast link, at one rate without momentum for
all, on rows held out.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import SGD

from bigdl_lite import BarrierEngine, TorchEstimator
from bigdl_lite.algorithms.pipe import pipe_sgd, predicted
from bigdl_lite.wire.codec import BFloat16
from bigdl_lite.wire.lossy import MinMax8
from tests.bench import network
from tests.bench.hosts import Hosts, Network, Told, middle, middles, series
from tests.bench.overlap import BATCH, WARM, WORKERS, make
from tests.bench.report import Claim, Context, Row

EVEN, SLOW = Network("25mbit", "0.2ms"), Network("20mbit", "0.2ms")
WAYS: dict[str, dict[str, Any]] = {
    "synchronous": {"exchange": "dense"},
    "synchronous, bf16": {"exchange": "bf16"},
    "piped": {"algorithm": pipe_sgd()},
    "piped, bf16": {"algorithm": pipe_sgd(BFloat16())},
    "piped, 8 bits": {"algorithm": pipe_sgd(MinMax8())},
}  # fmt: skip
LARGE = 2 * BATCH  # where bf16 takes as long as to compute: the fewer packets, the less they take of the cores that compute
ON = {EVEN: ("synchronous, bf16", "piped, bf16"), SLOW: ("synchronous", "piped, 8 bits")}
ENDS = ("synchronous", "piped", "piped, 8 bits")
EPOCHS, SEEDS = 5, 3


def sgd(parameters: Any) -> SGD:
    return SGD(parameters, lr=0.1)


def fit(spark: Any, told: Mapping[str, Any]) -> Told:
    """told: way, path, batch; epochs and seed where it is the loss that is asked for."""
    sizes: dict[str, Any] = {"module": make, "batchSize": told.get("batch", BATCH)}
    if "epochs" in told:
        sizes = {"module": network.make, "batchSize": network.BATCH, "epochs": told["epochs"], "seed": told["seed"]}
    model = TorchEstimator(
        loss=nn.CrossEntropyLoss(), optimizer=sgd, inputCols=["x"], labelCol="y", numWorkers=WORKERS,
        engine=BarrierEngine(share_memory=False), progress="none", **sizes, **WAYS[told["way"]],
    ).fit(spark.read.parquet(told["path"]))  # fmt: skip
    return series(model.history, WORKERS) | {"held out": network.quality(model.module)[0] if "epochs" in told else 0.0}


def run(context: Context) -> tuple[list[Row], list[Claim]]:
    path = network.write(Path(context.folder), (4 if context.quick else 10) * BATCH // network.BATCH)
    rows, claims = [], []
    with Hosts(WORKERS) as hosts:
        spark = hosts.spark(__name__)
        ask = lambda way, **more: spark.ask({"way": way, "path": str(path), **more})  # noqa: E731
        for way in ENDS:
            ask(way)  # what starts with the first fit is not measured
        small = str(network.write(Path(context.folder), network.STEPS))
        ends = 1 if context.quick else EPOCHS
        last = {way: tuple(ask(way, path=small, epochs=ends, seed=s)["held out"] for s in range(SEEDS)) for way in ENDS}
        for net, ways in ON.items():
            measured = hosts.limit(net)
            found: dict[str, list[Told]] = {way: [] for way in ways}
            for _ in range(context.repeat):
                for way in ways:
                    found[way].append(ask(way, batch=LARGE if net == EVEN else BATCH))
            for way, tolds in found.items():
                each = tuple(middle(told["seconds"][WARM:]) for told in tolds)
                rows.append(Row("pipe", str(net), way, "s", each, middles(tolds[0], slice(WARM, None)), measured))
            claims += _gains(net, {row.system: row for row in rows if row.workload == str(net)})
    for way, losses in last.items():
        rows.append(Row("pipe", f"rows held out, after {EPOCHS} epochs", way, "loss", losses))
    ratio = sum(last["piped"]) / sum(last["synchronous"])
    claims.append(Claim("pipe", f"loss in the end, piped against synchronous, {SEEDS} seeds", ratio, 1.01, "<="))
    return rows, claims


def _gains(net: Network, rows: dict[str, Row]) -> list[Claim]:
    alone, way, bound = (*ON[net], 1.7) if net == EVEN else (*ON[net], 4.0)
    synchronous = rows[alone]
    phases = synchronous.phases
    ratio = 1.0 if net == EVEN else 4.0
    foreseen = predicted(phases["compute"], phases["sync"], ratio=ratio).gain
    gain = synchronous.median / rows[way].median
    return [
        Claim("pipe", f"{net}: seconds of a step, {alone} against {way} (predicted {foreseen:.2f})", gain, bound),
        Claim("pipe", f"{net}: the gain measured against the predicted one", gain / foreseen, 0.85),
    ]
