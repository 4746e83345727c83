"""One meeting of two ranks beside gloo's all-reduce and a full Adam on both: the exchange alone, without compute or Spark.

    ours    wait; sum of the two gradient rows on the own slice; Adam on it; wait           Block, Meeting, TorchOptimizer
    gloo    all_reduce of one flat gradient; divided; Adam on all of it, on both ranks      torch.distributed

Both leave the same new weights on both ranks. The same two processes do both in turn, on 25 M parameters in float32, one
thread each. They also copy and add large tensors, both at once: the faster of the two, in bytes read and written a
second, is the memory traffic that the machine is able to.

A meeting must move, in bytes over both ranks (s = 4 n: each value of the flat vector belongs to one of them):

    sum     g0 <- g0 + g1          reads 2 s, writes 1 s
    mean    g0 <- g0 / rows        reads 1 s, writes 1 s
    Adam    p, m, v from g0        reads 4 s, writes 3 s, fused in one pass
                                   12 s in all

    n  parameters      p  ranks
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from bigdl_lite.algorithms.parts import Sum, TorchOptimizer
from bigdl_lite.comm.block import Block, Size, create, join, mailbox
from bigdl_lite.comm.window import look
from bigdl_lite.engine.meeting import SIDE, Meeting, Place
from bigdl_lite.model.layout import blueprint
from bigdl_lite.model.replica import Replica
from tests.bench.ddp import fused
from tests.bench.report import Claim, Context, Row
from tests.bench.workloads import W3, adam, mlp

RANKS, WARM, ROUNDS = 2, 3, 12
ROW = 64  # rows that each rank is said to bring
_TRAFFIC = 12  # passes over s bytes, see above


def _block(rank: int, n: int) -> Block:
    size, mail, addresses = Size(n, RANKS, RANKS, SIDE, 0), mailbox(), [""] * RANKS
    dist.all_gather_object(addresses, mail.address)
    first = look(addresses[0])
    assert first is not None
    block = Block(create(mail, size.nbytes) if rank == 0 else join(first, 60.0), size, rank, 60.0)
    block.wait()
    return block


def _ours(rank: int, millions: float, seconds: dict[str, list[float]]) -> Callable[[], None]:
    """A function that holds one meeting, and adds the seconds of its parts."""
    work = mlp(millions, 0, W3.batch)
    plan, weights, _, constants = blueprint(work.make())
    n = plan.layout.n
    block = _block(rank, n)
    meeting = Meeting(Place(rank, (tuple(range(RANKS)),)), block, None, None)
    replica = Replica(plan, block.weights, block.grads[rank], constants, nn.MSELoss())
    if rank == 0:
        block.weights.copy_(weights)
    block.wait()
    optimizer = TorchOptimizer(adam)
    meeting.divide(optimizer.cuts(replica, RANKS))
    advancer, rule = optimizer.start(replica, meeting.cut), Sum()
    generator = torch.Generator().manual_seed(rank)
    gradient = torch.randn(n, generator=generator)

    def hold() -> None:
        block.grads[rank].copy_(gradient)  # what a backward pass has written
        meeting.block.wait()
        began = time.perf_counter()
        meeting.tell(ROW, float(ROW), 0.0, 0.0, 0.0, replica.buffers)
        sides, _ = meeting.sides()
        met = time.perf_counter()
        update = meeting.combine(rule, [side.weight for side in sides])
        summed = time.perf_counter()
        advancer.step(update, 0.0)
        stepped = time.perf_counter()
        meeting.publish()
        done = time.perf_counter()
        for name, spent in (("wait", met - began + done - stepped), ("sum", summed - met), ("mean + optimizer", stepped - summed)):
            seconds[f"ours/{name}"].append(spent)
        seconds["ours"].append(done - began)

    return hold


def _gloo(rank: int, millions: float, fuse: bool, name: str, seconds: dict[str, list[float]]) -> Callable[[], None]:
    module = mlp(millions, 0, W3.batch).make()
    optimizer = adam(module.parameters())
    if fuse:
        optimizer = fused(optimizer)
    sizes = [p.numel() for p in module.parameters()]
    gradient = torch.randn(sum(sizes), generator=torch.Generator().manual_seed(rank))
    flat = torch.empty_like(gradient)
    for p, g in zip(module.parameters(), flat.split(sizes), strict=True):
        p.grad = g.view_as(p)  # the backward pass writes into the flat vector: nothing is gathered or scattered

    def hold() -> None:
        flat.copy_(gradient)
        dist.barrier()
        began = time.perf_counter()
        dist.all_reduce(flat)
        reduced = time.perf_counter()
        flat.div_(RANKS)
        optimizer.step()
        done = time.perf_counter()
        for part, spent in (("all-reduce", reduced - began), ("mean + optimizer", done - reduced)):
            seconds[f"{name}/{part}"].append(spent)
        seconds[name].append(done - began)

    return hold


def _traffic(n: int) -> Callable[[], list[float]]:
    """A function that tells bytes a second, read and written by this process while the others do the same: copy_ and add_."""
    a, b = torch.ones(n), torch.zeros(n)

    def speed(move: Callable[[Tensor], Tensor], passes: int) -> float:
        dist.barrier()
        began = time.perf_counter()
        for _ in range(4):
            move(a)
        return 4 * passes * a.nbytes / (time.perf_counter() - began)

    return lambda: [speed(b.copy_, 2), speed(b.add_, 3)]


def _rank(rank: int, millions: float, rounds: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    seconds: dict[str, list[float]] = {
        name: [] for name in (
            "ours", "ours/wait", "ours/sum", "ours/mean + optimizer", "gloo", "gloo/all-reduce", "gloo/mean + optimizer",
            "gloo fused", "gloo fused/all-reduce", "gloo fused/mean + optimizer",
        )
    }  # fmt: skip
    ours = _ours(rank, millions, seconds)
    plain, fast = _gloo(rank, millions, False, "gloo", seconds), _gloo(rank, millions, True, "gloo fused", seconds)
    copy, speed = _traffic(int(millions * 1e6)), []
    for _ in range(WARM + rounds):
        ours()
        plain()
        fast()
        speed.append(copy())
    told = {name: found[WARM:] for name, found in seconds.items()}
    Path(folder, f"rank{rank}.json").write_text(json.dumps({"seconds": told, "speed": speed[WARM:]}))
    dist.barrier()
    dist.destroy_process_group()


def run(context: Context) -> tuple[list[Row], list[Claim]]:
    millions, rounds = (2.0, 4) if context.quick else (25.0, ROUNDS)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    middle = statistics.median
    values: dict[str, list[float]] = {"ours": [], "gloo": [], "gloo fused": []}
    phases: dict[str, dict[str, list[float]]] = {name: {} for name in values}
    speeds: list[tuple[float, ...]] = []
    for _ in range(context.repeat):
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(_rank, (millions, rounds, folder), RANKS)
            told = [json.loads(Path(folder, f"rank{rank}.json").read_text()) for rank in range(RANKS)]
        for name in values:
            # a round takes as long as its slower rank
            values[name].append(middle(max(pair) for pair in zip(*(x["seconds"][name] for x in told), strict=True)))
            for full in told[0]["seconds"]:
                owner, _, part = full.partition("/")
                if owner == name and part:
                    phases[name].setdefault(part, []).append(middle(told[0]["seconds"][full]))
        speeds.append(tuple(sum(middle(both[kind] for both in x["speed"]) for x in told) for kind in range(2)))
    n = sum(p.numel() for p in mlp(millions, 0, W3.batch).make().parameters())
    must = _TRAFFIC * 4 * n
    speed = max(middle(column) for column in zip(*speeds, strict=True))
    ideal = must / speed
    notes = {
        "ours": f"must move {_TRAFFIC} x {4 * n / 1e6:.0f} MB = {must / 1e9:.2f} GB (sum 3, mean 2, Adam 7); at the "
                f"{speed / 1e9:.1f} GB/s of plain traffic {ideal * 1e3:.0f} ms: {middle(values['ours']) / ideal:.2f} "
                "times that",
        "gloo": "optimizer as written: several passes over each tensor", "gloo fused": "optimizer with fused=True",
    }  # fmt: skip
    workload = f"{n / 1e6:.1f} M parameters, 2 ranks"
    rows = [
        Row("meeting", workload, name, "s", tuple(found), {part: middle(spent) for part, spent in phases[name].items()}, notes[name])
        for name, found in values.items()
    ]
    for kind, column in zip(("copy_", "add_"), zip(*speeds, strict=True), strict=True):
        rows.append(Row("meeting", workload, f"{kind} by both at once", "GB/s", tuple(x / 1e9 for x in column), note="read + written"))
    of = {row.system: row.median for row in rows}
    return rows, [
        Claim("meeting", "gloo all-reduce + full Adam against a meeting (s)", of["gloo"] / of["ours"], 3.0),
        Claim("meeting", "gloo all-reduce + fused full Adam against a meeting (s)", of["gloo fused"] / of["ours"], 1.0),
    ]
