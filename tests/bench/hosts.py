"""Hosts with links of their own on one machine, and programs on them that wait for work: for what depends on the network.

    a benchmark   --- a line of JSON -->   Spark's driver on the host "driver", or a rank of DDP on each of w1 .. wN
                  <-- a line of JSON ---

A program starts once, over fast links, and is asked again and again while the links change under it. What it does when it
is asked is the function `fit` (Spark) or `rank` (DDP) of the benchmark's module.

Hosts are network namespaces, made by the script that BIGDL_LITE_VCLUSTER names (see why_not). All of them share the
machine's cores: what is emulated is links, not more processors.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import math
import os
import queue
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[2]
WORKERS = 4
_NAME = "blbench"
_PHASES = {"data": "data_s", "compute": "compute_s", "sync": "sync_s"}

Told = dict[str, Any]  # of one fit, a number for each step: seconds, loss, rows, nbytes (of one worker), phases: {name: ...}


@dataclass(frozen=True)
class Network:
    """The link of every worker: its rate each way, and the delay of what the worker sends."""

    rate: str
    delay: str

    def __str__(self) -> str:
        delay = "no delay" if self.delay == "none" else f"{self.delay[:-2]} ms"
        return re.sub(r"([\d.]+)([mg])bit", lambda x: f"{x[1]} {x[2].upper()}bit/s", self.rate) + f", {delay}"


def why_not() -> str:
    """Why there can be no hosts here; empty where there can."""
    script = os.environ.get("BIGDL_LITE_VCLUSTER", "")
    if not script:
        return "it needs hosts with slow links, and BIGDL_LITE_VCLUSTER names no script that makes them out of network namespaces"
    if not Path(script).is_file():
        return f"BIGDL_LITE_VCLUSTER={script} is no file"
    if os.geteuid():
        return "it makes network namespaces, for which one must be root"
    return ""


class Hosts:
    """with Hosts() as hosts: a Spark cluster of one worker host each, one slot each, and a host for its driver."""

    def __init__(self, workers: int = WORKERS) -> None:
        if reason := why_not():
            raise RuntimeError(reason)
        self.names = [f"w{i + 1}" for i in range(workers)]
        self._programs: list[Program] = []

    def __enter__(self) -> Hosts:
        # a program that is asked to end takes its cluster with it
        self._before = signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended from outside"))
        count = str(len(self.names))
        try:
            told = self._call("up", "--workers", count, "--cores", "1", "--python", sys.executable, "--keep-pythonpath")
        except BaseException:
            with contextlib.suppress(RuntimeError):
                self._call("down")  # what is there of it
            signal.signal(signal.SIGTERM, self._before)
            raise
        self.url = told.split()[-1]
        return self

    def __exit__(self, *_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            for program in self._programs:
                program.close()
        finally:
            self._call("down")
            signal.signal(signal.SIGTERM, self._before)

    def limit(self, network: Network | None, driver: bool = False) -> str:
        """Sets every worker's link, and returns what it measures between two of them. None: as fast as there is.

        driver  whether the driver's link, too, is set from now on
        """
        hosts = [word for name in (*self.names, "driver") for word in ("--host", name)] if driver else []
        self._call("limit", *((network.rate, network.delay) if network else ("none", "none")), *hosts)
        found = re.search(r"([\d.]+) Mbit/s, round trip ([\d.]+) ms", self._call("probe", *self.names[:2]))
        return f"measured {float(found[1]):.3g} Mbit/s, round trip {float(found[2]):.3g} ms" if found else ""

    def spark(self, module: str) -> Program:
        """The program that answers with module.fit(spark, told)."""
        return self._program(["driver"], "fit", module, {})

    def ranks(self, module: str) -> Program:
        """The program that answers with module.rank(told) of rank 0; torch.distributed is ready, with gloo."""
        size = {"WORLD_SIZE": str(len(self.names)), "MASTER_ADDR": self.names[0], "MASTER_PORT": "29500", "GLOO_SOCKET_IFNAME": "eth0"}
        return self._program(self.names, "rank", module, size)

    def _program(self, where: Sequence[str], what: str, module: str, environment: Mapping[str, str]) -> Program:
        commands = [
            [sys.executable, self._script(), "--name", _NAME, "exec", host, "--",
             sys.executable, "-m", "tests.bench.hosts", what, module, "--master", self.url]
            for host in where
        ]  # fmt: skip
        self._programs.append(Program(commands, environment))
        return self._programs[-1]

    def _script(self) -> str:
        return os.environ["BIGDL_LITE_VCLUSTER"]

    def _call(self, *arguments: str) -> str:
        command = [sys.executable, self._script(), "--name", _NAME, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=180)
        if done.returncode:
            raise RuntimeError(f"the virtual cluster, {arguments[0]}: {done.stderr.strip()[-2000:]}")
        return done.stdout


class Program:
    """Processes that are asked together. Its first one's answers count."""

    def __init__(self, commands: Sequence[Sequence[str]], environment: Mapping[str, str]) -> None:
        self._said: IO[bytes] = tempfile.TemporaryFile()
        self._parts: list[subprocess.Popen[str]] = []
        self._lines: list[queue.SimpleQueue[str | None]] = []
        pipe = subprocess.PIPE
        for rank, command in enumerate(commands):
            env = {**os.environ, **environment, "RANK": str(rank)}
            part = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self._said, text=True, cwd=ROOT, env=env)
            lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
            threading.Thread(target=_listen, args=(part.stdout, lines), daemon=True).start()
            self._parts.append(part)
            self._lines.append(lines)

    def ask(self, told: Mapping[str, Any], seconds: float = 600.0) -> Told:
        """The answer. Raises RuntimeError with what was said where it is an error, or where there is none in time."""
        until = time.monotonic() + seconds
        for part in self._parts:
            assert part.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # then there is no answer either
                part.stdin.write(json.dumps(told) + "\n")
                part.stdin.flush()
        answers = []
        for rank, lines in enumerate(self._lines):
            try:
                line = lines.get(timeout=max(0.1, until - time.monotonic()))
            except queue.Empty:
                raise RuntimeError(f"no answer to {told} from process {rank} in {seconds:.0f} s:\n{self._tail()}") from None
            if line is None:
                raise RuntimeError(f"process {rank} ended when it was asked for {told}:\n{self._tail()}")
            answers.append(json.loads(line))
        for answer in answers:
            if "error" in answer:
                raise RuntimeError(f"{told}: {answer['error']}")
        return answers[0]

    def close(self) -> None:
        """The end of its input ends a program; what does not end goes with the hosts."""
        for part in self._parts:
            assert part.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                part.stdin.close()
        for part in self._parts:
            with contextlib.suppress(subprocess.TimeoutExpired):
                part.wait(20)
            part.kill()

    def _tail(self) -> str:
        self._said.seek(0)
        return self._said.read().decode(errors="replace")[-3000:]


def _listen(stream: Any, lines: queue.SimpleQueue[str | None]) -> None:
    for line in stream:
        if line.startswith("{"):
            lines.put(line)
    lines.put(None)


# ---- what was measured ------------------------------------------------------------------------------------------------


def series(history: Sequence[Mapping[str, Any]], workers: int = WORKERS) -> Told:
    """The steps of a history (rounds, where a method has several batches in one)."""
    steps = [line for line in history if "step" in line]
    return {
        "seconds": [x["seconds"] for x in steps], "loss": [x["loss"] for x in steps], "rows": [x["rows"] for x in steps],
        "nbytes": [x["bytes_sent"] / workers for x in steps],
        "phases": {name: [x[key] for x in steps] for name, key in _PHASES.items()},
    }  # fmt: skip


def reached(told: Told, target: float, window: int) -> tuple[float, int]:
    """Seconds and rows until the mean loss of the last `window` rows was at most `target`; infinite, and all rows, where never."""
    rows, losses, spent, seen = told["rows"], told["loss"], 0.0, 0
    for i, seconds in enumerate(told["seconds"]):
        spent += seconds
        seen += rows[i]
        first, n = i + 1, 0
        while first and n < window:
            first -= 1
            n += rows[first]
        if n >= window and sum(x * k for x, k in zip(losses[first : i + 1], rows[first : i + 1], strict=True)) / n <= target:
            return spent, seen
    return math.inf, seen


def middle(values: Sequence[float]) -> float:
    return statistics.median(values)


def middles(told: Told, steps: slice = slice(None)) -> dict[str, float]:
    """Median seconds of each phase."""
    return {name: middle(spent[steps]) for name, spent in told["phases"].items()}


# ---- the programs -----------------------------------------------------------------------------------------------------


def _answer(work: Any) -> None:
    """Does what each line of the input tells, and says on one line what came of it."""
    for line in sys.stdin:
        try:
            found = work(json.loads(line))
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {error}"[:2000]}
        print(json.dumps(found), flush=True)


def _fit(module: Any, master: str) -> None:
    from pyspark.sql import SparkSession

    from bigdl_lite.engine.spark import slots

    settings = {
        "spark.ui.enabled": "false", "spark.ui.showConsoleProgress": "false", "spark.executor.memory": "768m",
        "spark.driver.memory": "1g", "spark.python.daemon.module": "bigdl_lite.engine.daemon", **getattr(module, "SETTINGS", {}),
    }  # fmt: skip
    builder = SparkSession.builder.master(master).appName("bigdl_lite bench")
    for name, value in settings.items():
        builder = builder.config(name, value)
    spark = builder.getOrCreate()
    spark.sparkContext.setLogLevel("ERROR")
    until = time.monotonic() + 90
    workers = getattr(module, "WORKERS", WORKERS)
    while slots(spark) < workers:
        if time.monotonic() > until:
            raise RuntimeError(f"{slots(spark)} of {workers} slots after 90 s")
        time.sleep(0.5)
    _answer(lambda told: module.fit(spark, told))
    spark.stop()


def _rank(module: Any) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    _answer(module.rank)
    os._exit(0)  # now and then gloo's threads abort a process that ends in the ordinary way, after all work is done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("fit", "rank"))
    parser.add_argument("module")
    parser.add_argument("--master", default="")
    asked = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    module = importlib.import_module(asked.module)
    if asked.what == "fit":
        _fit(module, asked.master)
    else:
        _rank(module)


if __name__ == "__main__":
    main()
