"""What processes and folders hold, now and at most: for benchmarks that are not about seconds.

    PSS   a process's own pages, and of each page that it shares with others its even part: sums over processes are true
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

KINDS = {"Pss": "all", "Pss_Anon": "private", "Pss_File": "files", "Pss_Shmem": "shared memory"}


class Watched:
    """with Watched(look, period): ... calls `look` again and again, every `period` seconds, and once more at the end."""

    def __init__(self, look: Callable[[], Any], period: float) -> None:
        self._look, self._period = look, period
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Watched:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._ended.set()
        self._thread.join()
        self._look()

    def _run(self) -> None:
        while not self._ended.is_set():
            began = time.monotonic()
            self._look()
            self._ended.wait(max(0.0, self._period - (time.monotonic() - began)))


class Most(Watched):
    """with Most(measure, period) as found: ...; found.most is the largest number that `measure` gave."""

    def __init__(self, measure: Callable[[], int], period: float) -> None:
        self.most = 0
        super().__init__(lambda: setattr(self, "most", max(self.most, measure())), period)


def pss(pid: int) -> dict[str, int]:
    """Bytes by kind of page and in all; of a process that has ended 0."""
    found = dict.fromkeys(KINDS.values(), 0)
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
            kind, _, size = line.partition(":")
            if kind in KINDS:
                found[KINDS[kind]] = 1024 * int(size.split()[0])
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


def is_worker(line: list[str]) -> bool:
    """Whether a command line is that of a Python daemon of a Spark executor, or of a worker, which is a fork of it."""
    return line[1:2] == ["-m"] and any(x in line[2:4] for x in ("bigdl_lite.engine.daemon", "pyspark.daemon"))


def workers() -> list[int]:
    """The Python daemons and workers of this process's Spark session."""
    return [pid for pid in descendants(os.getpid())[1:] if is_worker(command(pid))]


def on_disk(folders: list[Path]) -> int:
    """Bytes in all files below the folders."""
    total = 0
    for folder in folders:
        for place, _, files in os.walk(folder):
            for file in files:
                try:
                    total += os.stat(os.path.join(place, file)).st_size
                except FileNotFoundError:
                    continue
    return total
