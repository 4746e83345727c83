"""What overlap saves where a step computes about as long as it sends: buckets leave while backward still runs.

An MLP of twelve equal layers (0.8 M parameters) on two hosts, its gradient in bf16. Rows and rate are chosen so that sending takes
about as long as computing, and so that few packets are sent: hosts that are emulated pay for each with the cores that compute.
Forward, and backward of the last layer, hide nothing: at the best three tenths of the sum are saved. Each way is measured in turn,
and both must end with the same weights.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bigdl_lite import BarrierEngine, TorchEstimator
from bigdl_lite.algorithms import Coded
from bigdl_lite.wire.codec import BFloat16
from tests.bench import network
from tests.bench.hosts import Hosts, Network, Told, middle, middles, series
from tests.bench.report import Claim, Context, Row
from tests.bench.workloads import Seeded

WORKERS = 2  # no more than the machine has cores: where compute waits for a core, sending is in its way
WIDTH, LAYERS, BATCH, WARM = 256, 12, 4096 * WORKERS, 2
NETWORK = Network("50mbit", "0.2ms")
WAYS = {"after backward": {}, "beside backward": {"overlap": True, "bucket": WIDTH * WIDTH}}


def net() -> nn.Module:  # [B, 64] -> [B, 10]
    layers: list[nn.Module] = [nn.Linear(network.FEATURES, WIDTH), nn.ReLU()]
    for _ in range(LAYERS):
        layers += [nn.Linear(WIDTH, WIDTH), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(WIDTH, network.CLASSES))


make = Seeded(net)


def fit(spark: Any, told: Mapping[str, Any]) -> Told:
    model = TorchEstimator(
        module=make, loss=nn.CrossEntropyLoss(), optimizer=network.sgd, inputCols=["x"], labelCol="y", batchSize=BATCH,
        numWorkers=WORKERS, engine=BarrierEngine(share_memory=False), progress="none", exchange=Coded(BFloat16(), **WAYS[told["way"]]),
    ).fit(spark.read.parquet(told["path"]))  # fmt: skip
    flat = torch.cat([p.detach().reshape(-1) for p in model.module.parameters()])
    return series(model.history, WORKERS) | {"crc": zlib.crc32(memoryview(flat.view(torch.uint8).numpy()))}


def run(context: Context) -> tuple[list[Row], list[Claim]]:
    path = network.write(Path(context.folder), (4 if context.quick else 10) * BATCH // network.BATCH)
    found: dict[str, list[Told]] = {way: [] for way in WAYS}
    with Hosts(WORKERS) as hosts:
        spark = hosts.spark(__name__)
        spark.ask({"way": "after backward", "path": str(path)})  # what starts with the first fit is not measured
        measured = hosts.limit(NETWORK)
        for _ in range(context.repeat):
            for way in WAYS:
                found[way].append(spark.ask({"way": way, "path": str(path)}))
    crcs = {told["crc"] for tolds in found.values() for told in tolds}
    rows = []
    for way, tolds in found.items():
        each = tuple(middle(told["seconds"][WARM:]) for told in tolds)
        rows.append(Row("overlap", str(NETWORK), way, "s", each, middles(tolds[0], slice(WARM, None)), measured))
    after, beside = (row.median for row in rows)
    return rows, [
        Claim("overlap", "seconds of a step, buckets beside backward against after it", beside / after, 0.75, "<="),
        Claim("overlap", "different weights in the end, of all fits both ways", float(len(crcs)), 1.0, "<="),
    ]
