"""Plain torch DistributedDataParallel on two processes: the yardstick without Spark.

    python -m torch.distributed.run --standalone --nproc-per-node 2 -m tests.bench.ddp W1 FOLDER STEPS OUT [--fused]

All rows are in memory before the first step; rank r has rows r::p in an order dealt anew for each epoch, and gives
batch / p of them to a step. gloo on loopback, one thread a process, the optimizer exactly as the workload writes it;
--fused asks torch for its one-pass kernel instead, which a user of DDP has to know of.

Rank 0 writes {"seconds", "phases": {"data", "compute + all-reduce", "optimizer"}, "loss"}, a list of all steps each. DDP
overlaps the all-reduce with the backward pass, so the two cannot be told apart.

    p  ranks
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from tests.bench.workloads import WORKLOADS, Workload

ROOT = Path(__file__).resolve().parents[2]
RANKS = 2
MODULE = "tests.bench.ddp"


def fused(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The same rule with the same settings, in torch's one-pass kernel."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return type(optimizer)(parameters, **{**optimizer.defaults, "fused": True, "foreach": None})  # type: ignore[call-arg]


def rank(work: Workload, path: Path, steps: int, fuse: bool) -> dict[str, Any]:
    """Trains this process's replica; the seconds of each step."""
    me, p = dist.get_rank(), dist.get_world_size()
    inputs, target = work.tensors(path)
    inputs, target = [x[me::p].contiguous() for x in inputs], target[me::p].contiguous()
    module, loss = DistributedDataParallel(work.make()), work.loss()
    optimizer = work.optimizer(module.parameters())
    if fuse:
        optimizer = fused(optimizer)
    mine, rows = work.batch // p, len(target)
    generator = torch.Generator().manual_seed(me)
    seconds, phases, losses = [], {"data": [], "compute + all-reduce": [], "optimizer": []}, []
    deal, at = torch.randperm(rows, generator=generator), 0
    dist.barrier()
    for _ in range(steps):
        began = time.perf_counter()
        if at + mine > rows:
            deal, at = torch.randperm(rows, generator=generator), 0
        index = deal[at : at + mine]
        at += mine
        batch, wanted = [x[index] for x in inputs], target[index]
        ready = time.perf_counter()
        optimizer.zero_grad()
        value = loss(module(*batch), wanted)
        value.backward()
        worked = time.perf_counter()
        optimizer.step()
        losses.append(float(value))
        done = time.perf_counter()
        seconds.append(done - began)
        for name, spent in zip(phases, (ready - began, worked - ready, done - worked), strict=True):
            phases[name].append(spent)
    return {"seconds": seconds, "phases": phases, "loss": losses}


def ddp(work: Workload, path: Path, steps: int, fuse: bool = False) -> dict[str, Any]:
    """Runs two ranks from here, and returns what rank 0 wrote."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "told.json")
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", str(RANKS),
            "-m", MODULE, work.name, str(path), str(steps), str(out), *(["--fused"] if fuse else []),
        ]  # fmt: skip
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        with tempfile.TemporaryFile() as said:
            process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=said, stderr=subprocess.STDOUT)
            try:
                process.wait(timeout=600)
            finally:
                if process.poll() is None:
                    process.terminate()
                    process.wait()
            if process.returncode:
                said.seek(0)
                raise RuntimeError(f"DDP on {work.name} ended with {process.returncode}:\n{said.read().decode()[-3000:]}")
        return json.loads(out.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", choices=WORKLOADS)
    parser.add_argument("path", type=Path)
    parser.add_argument("steps", type=int)
    parser.add_argument("out", type=Path)
    parser.add_argument("--fused", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    told = rank(WORKLOADS[asked.work], asked.path, asked.steps, asked.fused)
    if dist.get_rank() == 0:
        asked.out.write_text(json.dumps(told))
    dist.barrier()
    os._exit(0)  # now and then gloo's threads abort a process that ends in the ordinary way, after all work is done


if __name__ == "__main__":
    main()
