"""How much memory a set of processes holds at most, shared pages counted once.

    PSS   a process's own pages, and of each page that it shares with others its even part: sums over processes are true

A thread looks about 15 times a second at the descendants of this process. What is chosen by its command line is added
up, and the moment of the largest sum is kept; of a few others only their growth is told.

W3, 25 M parameters, not timed, in a session that has run nothing before: of our engines the Python workers and the
daemon that they are forks of, of DDP the two ranks. Weights, gradients and Adam's two vectors are 101 MB each.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.bench.ddp import ddp
from tests.bench.report import Claim, Context, Row
from tests.bench.training import STEPS, label, ours
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


_KINDS = {"Pss": "all", "Pss_Anon": "private", "Pss_File": "files", "Pss_Shmem": "shared memory"}


def pss(pid: int) -> dict[str, int]:
    """Bytes by kind of page and in all; of a process that has ended 0."""
    found = dict.fromkeys(_KINDS.values(), 0)
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
            kind, _, size = line.partition(":")
            if kind in _KINDS:
                found[_KINDS[kind]] = 1024 * int(size.split()[0])
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        pass
    return found


def descendants(root: int) -> list[int]:
    """root and all processes that came of it, parents first."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                stat = Path(f"/proc/{name}/stat").read_text()
            except (FileNotFoundError, ProcessLookupError):
                continue
            parent = int(stat.rpartition(")")[2].split()[1])  # the name before it may hold blanks and brackets
            children.setdefault(parent, []).append(int(name))
    found = [root]
    for pid in found:
        found += sorted(children.get(pid, []))
    return found


def command(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")[:-1]
    except (FileNotFoundError, ProcessLookupError):
        return []


def workers(line: list[str]) -> str | None:
    """Python processes of a Spark session's executors: the daemon that imported torch, and its forks."""
    return "python" if line[1:2] == ["-m"] and any(x in line[2:4] for x in ("bigdl_lite.engine.daemon", "pyspark.daemon")) else None


def java(line: list[str]) -> str | None:
    return "JVM" if line and line[0].endswith("java") else None


def ranks(line: list[str]) -> str | None:
    """Ranks of tests.bench.ddp, without torch's launcher."""
    return "rank" if "tests.bench.ddp" in line and "torch.distributed.run" not in line else None


def peak(run: Callable[[], Any], chosen: Chosen, beside: Chosen = lambda line: None) -> Peak:
    """The peak of the chosen processes while `run` runs; this process itself is told beside, as 'driver'."""
    found, ended = Peak(), threading.Event()
    watcher = threading.Thread(target=_watch, args=(found, ended, chosen, beside), daemon=True)
    watcher.start()
    try:
        run()
    finally:
        ended.set()
        watcher.join()
    return found


def _watch(found: Peak, ended: threading.Event, chosen: Chosen, beside: Chosen) -> None:
    first: dict[str, int] = {}
    started = time.monotonic()
    while not ended.is_set():
        began = time.monotonic()
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
            found.most, found.at = total, began - started
            found.parts = {name: part["all"] for name, part in parts.items() if part["all"]}
            found.kinds = {kind: sum(part[kind] for part in parts.values()) for kind in _KINDS.values() if kind != "all"}
        for name, nbytes in others.items():
            first.setdefault(name, nbytes)
            found.beside[name] = max(found.beside.get(name, 0), nbytes - first[name])
        found.whole = time.monotonic() - started
        ended.wait(max(0.0, _PERIOD - (time.monotonic() - began)))


def run(context: Context) -> tuple[list[Row], list[Claim]]:
    steps = 8 if context.quick else STEPS["W3"]
    path = W3.write(context.folder, rows=steps * W3.batch)
    spark = context.session()
    found: dict[str, list[Peak]] = {"barrier": [], "ddp": []}
    for _ in range(min(context.repeat, 3)):
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
