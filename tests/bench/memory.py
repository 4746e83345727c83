"""How much memory a set of processes holds at most, shared pages counted once (PSS, see watch.py).

A thread looks about 15 times a second at the descendants of this process. What is chosen by its command line is added
up, and the moment of the largest sum is kept; of a few others only their growth is told.

W3, 25 M parameters, not timed, in a session that has run nothing before: of our engines the Python workers and the
daemon that they are forks of, of DDP the two ranks. Weights, gradients and Adam's two vectors are 101 MB each.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.bench.ddp import ddp
from tests.bench.report import Claim, Context, Row
from tests.bench.training import STEPS, label, ours
from tests.bench.watch import KINDS, Watched, command, descendants, is_worker, pss
from tests.bench.workloads import W3

_PERIOD = 1 / 15

Chosen = Callable[[list[str]], str | None]  # command line -> what to call the process; None: not one of ours


@dataclass
class Peak:
    """Bytes. most: the largest sum; at, whole: seconds from the start to it, and of the run; parts: by process; kinds: by
    kind of page; beside: growth of others during the run.
    """

    most: int = 0
    at: float = 0.0
    whole: float = 0.0
    parts: dict[str, int] = field(default_factory=dict)
    kinds: dict[str, int] = field(default_factory=dict)
    beside: dict[str, int] = field(default_factory=dict)

    def told(self) -> str:
        parts = " + ".join(f"{name} {nbytes / 1e6:,.0f}" for name, nbytes in self.parts.items())
        kinds = ", ".join(f"{name} {nbytes / 1e6:,.0f}" for name, nbytes in self.kinds.items())
        others = ", ".join(f"{name} {nbytes / 1e6:+,.0f}" for name, nbytes in self.beside.items())
        return f"{parts} ({kinds}), after {self.at:.1f} of {self.whole:.1f} s" + (f"; beside: {others}" if others else "")


def workers(line: list[str]) -> str | None:
    """Python processes of a Spark session's executors: the daemon that imported torch, and its forks."""
    return "python" if is_worker(line) else None


def java(line: list[str]) -> str | None:
    return "JVM" if line and line[0].endswith("java") else None


def ranks(line: list[str]) -> str | None:
    """Ranks of tests.bench.ddp, without torch's launcher."""
    return "rank" if "tests.bench.ddp" in line and "torch.distributed.run" not in line else None


def peak(run: Callable[[], Any], chosen: Chosen, beside: Chosen = lambda line: None) -> Peak:
    """The peak of the chosen processes while `run` runs; this process itself is told beside, as 'driver'."""
    found, first, started = Peak(), {}, time.monotonic()

    def look() -> None:
        now = time.monotonic() - started
        parts: dict[str, dict[str, int]] = {}
        others = {"driver": pss(os.getpid())["all"]}
        for pid in descendants(os.getpid())[1:]:
            line = command(pid)
            if name := chosen(line):
                parts[f"{name} {pid}"] = pss(pid)
            elif name := beside(line):
                others[name] = others.get(name, 0) + pss(pid)["all"]
        total = sum(part["all"] for part in parts.values())
        if total > found.most:
            found.most, found.at = total, now
            found.parts = {name: part["all"] for name, part in parts.items() if part["all"]}
            found.kinds = {kind: sum(part[kind] for part in parts.values()) for kind in KINDS.values() if kind != "all"}
        for name, nbytes in others.items():
            first.setdefault(name, nbytes)
            found.beside[name] = max(found.beside.get(name, 0), nbytes - first[name])
        found.whole = now

    with Watched(look, _PERIOD):
        run()
    return found


def run(context: Context) -> tuple[list[Row], list[Claim]]:
    steps = 8 if context.quick else STEPS["W3"]
    path = W3.write(context.folder, rows=steps * W3.batch)
    spark = context.session()
    found: dict[str, list[Peak]] = {"barrier": [], "ddp": []}
    for _ in range(context.repeat):
        found["barrier"].append(peak(lambda: ours(spark, W3, path, "barrier"), workers, java))
        found["ddp"].append(peak(lambda: ddp(W3, path, steps), ranks))
    found["shuffle"] = [peak(lambda: ours(spark, W3, path, "shuffle"), workers, java)]  # last: it leaves workers of its own
    rows = []
    for system, peaks in found.items():
        largest = max(peaks, key=lambda x: x.most)
        rows.append(Row("memory", label(W3), system, "MB", tuple(x.most / 1e6 for x in peaks), note=largest.told()))
    middle = {row.system: row.median for row in rows}
    text = "W3: peak of barrier's workers against the peak of ddp's ranks (PSS)"
    return rows, [Claim("memory", text, middle["barrier"] / middle["ddp"], 0.6, "<=")]
