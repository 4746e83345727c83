"""What a codec saves in a round of the shuffle engine: 25 M parameters, values through Spark, as on several machines.

All through Spark's shuffle and broadcasts, also on one machine: fp32 without an exchange (ShuffleEngine(share_memory=False)), and
the exchanges dense, bf16 and minmax8. Weights go out as they are in all of them; what a codec changes is the way back:
pieces to their owners, and sums to the driver. Between processes of one machine bytes are cheap, so this is the price of
encoding, and the least that is saved.
"""

from __future__ import annotations

import statistics
from typing import Any

from torch import nn

from bigdl_lite import ShuffleEngine, TorchEstimator
from tests.bench.report import Claim, Context, Row
from tests.bench.workloads import mlp

WARM = 2
WAYS: dict[str, dict[str, Any]] = {
    "fp32": {}, "dense": {"exchange": "dense"}, "bf16": {"exchange": "bf16"}, "minmax8": {"exchange": "minmax8"},
}  # fmt: skip


def run(context: Context) -> tuple[list[Row], list[Claim]]:
    work = mlp(1.0 if context.quick else 25.0, 12 * 64, 64)
    frame = context.session().read.parquet(str(work.write(context.folder)))
    steps: dict[str, list[dict[str, Any]]] = {name: [] for name in WAYS}
    for _ in range(context.repeat):
        for name, more in WAYS.items():
            model = TorchEstimator(
                module=work.make, loss=nn.MSELoss(), optimizer=work.optimizer, inputCols=work.inputs, labelCol=work.label,
                batchSize=work.batch, numWorkers=2, engine=ShuffleEngine(share_memory=False), progress="none", **more,
            ).fit(frame)  # fmt: skip
            steps[name] += [line for line in model.history if "step" in line][WARM:]
    rows = []
    for name, found in steps.items():
        middle = {phase: statistics.median(x[key] for x in found) for phase, key in (("compute", "compute_s"), ("sync", "sync_s"))}
        sent = statistics.median(x["bytes_sent"] for x in found)
        rows.append(
            Row("codecs", work.title, f"shuffle by value, {name}", "s", tuple(x["seconds"] for x in found), middle,
                f"{sent / 1e6:.0f} MB into the shuffle")
        )  # fmt: skip
    middles = {name: statistics.median(x["sync_s"] for x in found) for name, found in steps.items()}
    claims = [
        Claim("codecs", f"sync of a round, {name} against fp32", middles[name] / middles["fp32"], 1.0, "<=")
        for name in ("bf16", "minmax8")
    ]
    return rows, claims
