"""A standalone cluster of Spark's own, started by the scripts of docker/.

Its Python has all libraries and not bigdl_lite, so that whatever trains there came with the program.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyspark

from bigdl_lite.engine.session import _java_home
from tests.conftest import ROOT
from tests.engine.test_faults import descendants, lives

SCRIPTS = ROOT / "docker" / "scripts"
QUIET = ["--conf", "spark.ui.enabled=false", "--conf", "spark.executor.memory=1g", "--conf", "spark.sql.shuffle.partitions=2"]

TRAINS = """
import json
import torch
from pyspark.sql import SparkSession
from torch import nn
import bigdl_lite
from bigdl_lite import TorchClassifier

spark = SparkSession.builder.getOrCreate()
rows = [([float(i % 3 == k) for k in range(3)], i % 3) for i in range(60)]
df = spark.createDataFrame(rows, "features array<float>, label long")

def fit(engine, **more):
    return TorchClassifier(module=lambda: nn.Linear(3, 3), optimizer=lambda p: torch.optim.SGD(p, lr=1.0), batchSize=20, epochs=3,
                           numWorkers=2, engine=engine, progress="none", **more).fit(df)
"""


def libraries(folder: Path) -> Path:
    """All that is installed but bigdl_lite, however that is installed."""
    folder.mkdir()
    for place in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(place).iterdir():
            if "bigdl_lite" not in entry.name and not entry.name.endswith(".pth"):
                (folder / entry.name).symlink_to(entry)
    return folder


def bare_python(folder: Path) -> str:
    """A Python without site-packages, and what they link to."""
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    python.chmod(0o755)
    return str(python)


def java() -> dict[str, str]:
    """The environment that finds the Java which the tests use."""
    home = _java_home(with_vector=int(pyspark.__version__.split(".")[0]) >= 4)
    return {"JAVA_HOME": home} if home else {}


def free_port() -> int:
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        return int(door.getsockname()[1])


class Cluster:
    """Processes of a standalone cluster, all of them ours and ended by their ids."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.started = folder, list[subprocess.Popen[bytes]]()
        self.libraries = libraries(folder / "site")
        self.environment = {
            "PATH": os.environ["PATH"], "HOME": str(folder), "PYTHONPATH": str(self.libraries), "PYSPARK_PYTHON": bare_python(folder),
            "SPARK_LOCAL_IP": "127.0.0.1", "SPARK_EVENTS": str(folder / "events"), "SPARK_WORKER_DIR": str(folder / "work"),
            "SPARK_MASTER_HOST": "127.0.0.1", "SPARK_MASTER_PORT": "0", "SPARK_MASTER_WEBUI_PORT": "0", "SPARK_WORKER_WEBUI_PORT": "0",
            "SPARK_WORKER_CORES": "1", "SPARK_WORKER_MEMORY": "1g", "SPARK_CORES": "2", "SPARK_DAEMON_MEMORY": "256m",
            **java(),
        }  # fmt: skip

    def begin(self, workers: int = 2) -> None:
        """A master and workers, each of as many cores and as much memory as the environment says."""
        self.environment["SPARK_MASTER"] = self.start("master.sh", r"Starting Spark master at (spark://\S+)")
        for log in [self.start("worker.sh", None) for _ in range(workers)]:
            self.said(log, r"Successfully registered with (master)")

    def start(self, script: str, word: str | None) -> str:
        """Starts a script; what the log says in place of the group of `word`, or the path of the log."""
        log = self.folder / f"{script}.{len(self.started)}.log"
        with log.open("wb") as out:
            command, nothing = [SCRIPTS / script], subprocess.DEVNULL
            process = subprocess.Popen(command, cwd=self.folder, env=self.environment, stdin=nothing, stdout=out, stderr=out)
        self.started.append(process)
        return self.said(str(log), word) if word else str(log)

    def said(self, log: str, word: str, seconds: float = 180.0) -> str:
        until = time.monotonic() + seconds
        while not (found := re.search(word, Path(log).read_text())):
            assert time.monotonic() < until and all(process.poll() is None for process in self.started), Path(log).read_text()[-3000:]
            time.sleep(0.1)
        return found[1]

    def submit(
        self, program: Path, *options: str, arguments: Sequence[str] = (), seconds: float = 300.0, environment: Mapping[str, str] = {},
    ) -> subprocess.CompletedProcess[str]:  # fmt: skip
        """submit.sh with these options; everything that it started is gone when this returns."""
        command, nothing = [str(SCRIPTS / "submit.sh"), *QUIET, *options, str(program), *arguments], subprocess.DEVNULL
        out, err = self.folder / "out", self.folder / "err"
        given = {**self.environment, **environment}
        with out.open("w") as a, err.open("w") as b:
            process = subprocess.Popen(command, cwd=self.folder, env=given, stdin=nothing, stdout=a, stderr=b)
        self.started.append(process)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"after {seconds:.0f} s still at\n{err.read_text()[-4000:]}") from None
        finally:
            self._end(process)
            self.started.remove(process)
        return subprocess.CompletedProcess(command, process.returncode, out.read_text(), err.read_text())

    def close(self) -> list[int]:
        """Ends all; the ids of processes that are left."""
        below = [pid for process in self.started for pid in descendants(process.pid)]
        for process in reversed(self.started):
            self._end(process)
        until = time.monotonic() + 10
        while (left := [pid for pid in below if lives(pid)]) and time.monotonic() < until:
            time.sleep(0.1)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return left

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)
