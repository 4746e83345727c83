"""A standalone cluster of Spark's own, started by the scripts of docker/: programs arrive by spark-submit, with the package in a zip.

The Python of the cluster has all libraries and not bigdl_lite, so that whatever trains there came in the zip.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
import textwrap
import time
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pyspark
import pytest

from bigdl_lite.engine.session import _java_home
from bigdl_lite.ml.zip import build, main
from tests.conftest import ROOT
from tests.engine.test_faults import descendants, lives

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

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


def bare_python(folder: Path) -> tuple[str, str]:
    """A Python without bigdl_lite, and a folder for its PYTHONPATH with all other libraries, however they are installed."""
    libraries = folder / "site"
    libraries.mkdir()
    for place in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(place).iterdir():
            if "bigdl_lite" not in entry.name and not entry.name.endswith(".pth"):
                (libraries / entry.name).symlink_to(entry)
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')  # without site-packages, and what they link to
    python.chmod(0o755)
    return str(python), str(libraries)


class Cluster:
    """Processes of a standalone cluster, all of them ours and ended by their ids."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.started = folder, list[subprocess.Popen[bytes]]()
        python, libraries = bare_python(folder)
        java = _java_home(with_vector=int(pyspark.__version__.split(".")[0]) >= 4)
        self.environment = {
            "PATH": os.environ["PATH"], "HOME": str(folder), "PYTHONPATH": libraries, "PYSPARK_PYTHON": python,
            "SPARK_LOCAL_IP": "127.0.0.1", "SPARK_EVENTS": str(folder / "events"), "SPARK_WORKER_DIR": str(folder / "work"),
            "SPARK_MASTER_HOST": "127.0.0.1", "SPARK_MASTER_PORT": "0", "SPARK_MASTER_WEBUI_PORT": "0", "SPARK_WORKER_WEBUI_PORT": "0",
            "SPARK_WORKER_CORES": "1", "SPARK_WORKER_MEMORY": "1g", "SPARK_CORES": "2", "SPARK_DAEMON_MEMORY": "256m",
            **({"JAVA_HOME": java} if java else {}),
        }  # fmt: skip

    def begin(self) -> None:
        """A master and two workers, of 1 core and 1 GB each."""
        self.environment["SPARK_MASTER"] = self.start("master.sh", r"Starting Spark master at (spark://\S+)")
        logs = [self.start("worker.sh", None), self.start("worker.sh", None)]
        for log in logs:
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
        self, program: Path, *options: str, arguments: Sequence[str] = (), seconds: float = 300.0
    ) -> subprocess.CompletedProcess[str]:
        """submit.sh with these options; everything that it started is gone when this returns."""
        command = [str(SCRIPTS / "submit.sh"), *QUIET, *options, str(program), *arguments]
        out, err = self.folder / "out", self.folder / "err"
        with out.open("w") as a, err.open("w") as b:
            process = subprocess.Popen(command, cwd=self.folder, env=self.environment, stdin=subprocess.DEVNULL, stdout=a, stderr=b)
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


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    made = Cluster(tmp_path_factory.mktemp("cluster"))
    try:
        made.begin()
        yield made
    finally:
        left = made.close()
    assert not left, "processes of the cluster outlived its workers"


@pytest.fixture
def package(tmp_path: Path) -> Path:
    return build(tmp_path / "bigdl_lite.zip")


@pytest.fixture
def program(tmp_path: Path) -> Callable[[str], Path]:
    def write(body: str) -> Path:
        path = tmp_path / "program.py"
        path.write_text(textwrap.dedent(TRAINS) + textwrap.dedent(body))
        return path

    return write


def test_the_python_of_the_cluster_does_not_have_the_package(cluster: Cluster) -> None:
    done = subprocess.run(
        [cluster.environment["PYSPARK_PYTHON"], "-c", "import torch, pyspark; import bigdl_lite"], cwd=cluster.folder,
        env=cluster.environment, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and "No module named 'bigdl_lite'" in done.stderr


def test_a_program_trains_on_the_cluster_with_the_package_that_came_in_a_zip(cluster: Cluster, package: Path, program) -> None:
    body = """
    import os
    where = spark.sparkContext.parallelize(range(2), 2).map(lambda i: os.path.abspath(__import__("bigdl_lite").__file__)).collect()
    losses = {engine: [line["loss"] for line in fit(engine).history if "steps" in line] for engine in ("barrier", "shuffle")}
    found = {"driver": bigdl_lite.__file__, "executors": sorted(where), "master": spark.sparkContext.master}
    print(json.dumps({"losses": losses, **found}))
    """
    done = cluster.submit(program(body), "--py-files", str(package))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    told = json.loads(done.stdout.strip().splitlines()[-1])
    assert told["master"] == cluster.environment["SPARK_MASTER"]
    assert all("bigdl_lite.zip" in path for path in (told["driver"], *told["executors"]))
    assert all(str(cluster.folder / "work") in path for path in told["executors"]), told["executors"]
    assert told["losses"]["barrier"] == pytest.approx(told["losses"]["shuffle"], abs=1e-6)
    assert told["losses"]["barrier"][-1] < told["losses"]["barrier"][0]


@pytest.mark.slow
def test_an_error_in_training_is_an_exit_code_and_the_users_traceback(cluster: Cluster, package: Path, program) -> None:
    body = """
    def odd(output, target):
        raise ValueError("no such loss")

    fit("barrier", loss=odd)
    print("trained")
    """
    done = cluster.submit(program(body), "--py-files", str(package))
    assert done.returncode == 1 and "trained" not in done.stdout
    last = done.stdout[done.stdout.rindex("UserError: Traceback") :]  # Spark puts what a program says to stderr there too
    assert 'raise ValueError("no such loss")' in last and "ValueError: no such loss" in last and "in odd" in last


def test_cluster_mode_is_refused_by_spark_itself(cluster: Cluster, program) -> None:
    done = cluster.submit(program(""), "--deploy-mode", "cluster")
    assert done.returncode != 0
    assert "Cluster deploy mode is currently not supported for python applications on standalone clusters" in done.stderr


@pytest.mark.slow
def test_the_quickstart_runs_on_the_cluster_and_the_history_server_shows_it(cluster: Cluster, package: Path) -> None:
    done = cluster.submit(ROOT / "examples" / "quickstart.py", "--py-files", str(package), arguments=["--epochs", "6"])
    assert done.returncode == 0, done.stdout[-4000:]
    assert "engine          barrier" in done.stdout and "the same predictions from the saved model" in done.stdout
    cluster.environment["SPARK_UI_PORT"] = "0"
    port = cluster.start("history.sh", r"HistoryServer, and started at http://\S+:(\d+)")
    until = time.monotonic() + 30
    shown: list[str] = []
    while "quickstart.py" not in shown and time.monotonic() < until:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/applications", timeout=5) as answer:
            shown = [application["name"] for application in json.load(answer)]
        time.sleep(0.2)
    assert "quickstart.py" in shown


def test_the_zip_is_the_package_and_always_the_same_bytes(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([]) == 0 and "bigdl_lite.zip" in capsys.readouterr().out
    first = Path("bigdl_lite.zip").read_bytes()
    assert main(["other.zip"]) == 0 and Path("other.zip").read_bytes() == first
    sources = [path for path in (ROOT / "bigdl_lite").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    with zipfile.ZipFile("bigdl_lite.zip") as file:
        assert set(file.namelist()) == {str(path.relative_to(ROOT)) for path in sources}
    code = "import bigdl_lite, bigdl_lite.ml.zip as z; print(bigdl_lite.__file__); z.build('again.zip')"
    here = {**os.environ, "PYTHONPATH": "bigdl_lite.zip"}
    done = subprocess.run([sys.executable, "-c", code], env=here, capture_output=True, text=True, timeout=60, check=False)
    assert "bigdl_lite.zip" in done.stdout and "imported from a zip file already" in done.stderr
    assert main(["--help"]) == 2
