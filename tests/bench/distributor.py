"""pyspark.ml.torch.distributor.TorchDistributor: what a Spark user has today for the same work.

    run()  ->  a barrier job  ->  torchrun in each task  ->  a fresh Python, which unpickles the function  ->  its state_dict

The function is written as its documentation tells: gloo, DistributedDataParallel, each rank reads its own files of the
data set by pyarrow, in the quickest of five ways that were tried, and takes half of every batch. local_mode=True is
torchrun on the driver, without the barrier job. A run brings the moments (seconds since 1970) that fits and start need.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import nn

from tests.bench.workloads import Workload

RANKS = 2


@dataclass(frozen=True)
class Told:
    """What one run of TorchDistributor brought. moments: entered, joined, read, stepped (the first step begins), trained."""

    began: float
    ended: float
    moments: dict[str, float]
    loss: float
    steps: int

    @property
    def seconds(self) -> float:
        return self.ended - self.began

    @property
    def first_step(self) -> float:
        return self.moments["stepped"] - self.began

    def phases(self) -> dict[str, float]:
        m = self.moments
        return {
            "start": m["entered"] - self.began, "join": m["joined"] - m["entered"], "data": m["read"] - m["joined"],
            "train": m["trained"] - m["read"], "end": self.ended - m["trained"],
        }  # fmt: skip


def read(files: list[str], columns: list[str], label: str) -> tuple[torch.Tensor, torch.Tensor]:
    """float32 [rows, columns] and labels [rows] of Parquet files: row groups, one column after another into its place."""
    pa.set_cpu_count(1)
    opened = [pq.ParquetFile(file) for file in files]
    x, y, at = np.empty((sum(file.metadata.num_rows for file in opened), len(columns)), np.float32), [], 0
    for file in opened:
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=[*columns, label])
            for j, name in enumerate(columns):
                x[at : at + table.num_rows, j] = table.column(name).to_numpy()
            y.append(table.column(label).to_numpy())
            at += table.num_rows
    return torch.from_numpy(x), torch.from_numpy(np.concatenate(y))


def train(files: list[str], columns: list[str], label: str, module: nn.Module, loss: Any, optimizer: Any, batch: int) -> dict[str, Any]:
    """One epoch, as a user of TorchDistributor writes it. Every rank returns the weights and the moments.

    With local_mode=True all ranks write what they return to one file, and the last of them is what run() gives back.
    """
    moments = {"entered": time.time()}
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, p = dist.get_rank(), dist.get_world_size()
    moments["joined"] = time.time()
    x, y = read(files[rank::p], columns, label)
    y = y.float()
    moments["read"] = time.time()
    replica = DistributedDataParallel(module)
    advance = optimizer(replica.parameters())
    deal, total, steps = torch.randperm(len(x), generator=torch.Generator().manual_seed(rank)), 0.0, 0
    for rows in deal.split(batch // p):
        if not steps:
            moments["stepped"] = time.time()
        advance.zero_grad()
        error = loss(replica(x[rows]), y[rows])
        error.backward()
        advance.step()
        total, steps = total + float(error.detach()), steps + 1
    moments["trained"] = time.time()
    dist.destroy_process_group()
    return {"weights": module.state_dict(), "moments": moments, "loss": total / steps, "steps": steps}


def distribute(spark: Any, work: Workload, path: Path, local_mode: bool) -> Told:
    from pyspark.ml.torch.distributor import TorchDistributor

    files = sorted(str(file) for file in Path(path).glob("*.parquet"))
    assert len(files) % RANKS == 0, files
    (columns,) = work.inputs
    given = (files, list(columns), work.label, work.make(), work.loss(), work.optimizer, work.batch)
    with _as_in_a_notebook():
        began = time.time()
        made = TorchDistributor(num_processes=RANKS, local_mode=local_mode, use_gpu=False).run(train, *given)
        ended = time.time()
    return Told(began, ended, made["moments"], made["loss"], made["steps"])


@contextmanager
def _as_in_a_notebook() -> Iterator[None]:
    """The function travels by value, so that its process imports what it needs, and nothing of ours."""
    from pyspark import cloudpickle

    from tests.bench import distributor, workloads

    root = str(Path(__file__).resolve().parents[2])
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, before]))
    for module in (distributor, workloads):
        cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        for module in (distributor, workloads):
            cloudpickle.unregister_pickle_by_value(module)
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def run(context: Any) -> tuple[list[Any], list[Any]]:
    """Both modes side by side: which is the yardstick."""
    from tests.bench.report import Row
    from tests.bench.workloads import W4

    spark = context.session()
    path = W4.write(context.folder, context.quick)
    told: dict[bool, list[Told]] = {False: [], True: []}
    for _ in range(context.repeat):
        for local_mode in told:
            told[local_mode].append(distribute(spark, W4, path, local_mode))
    return [
        Row("distributor", W4.name, f"TorchDistributor, local_mode={mode}", "s", tuple(x.seconds for x in runs), middle(runs))
        for mode, runs in told.items()
    ], []


def middle(runs: list[Told]) -> dict[str, float]:
    """The phases of the run in the middle."""
    return sorted(runs, key=lambda run: run.seconds)[len(runs) // 2].phases()
