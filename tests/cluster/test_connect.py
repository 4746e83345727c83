"""The same programs on a classic session and through a real server of Spark Connect, which the tests start."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.cluster import programs
from tests.cluster.standalone import bare_python, java, libraries
from tests.conftest import ROOT

pytest.importorskip("grpc_status", reason="Spark Connect needs pip install 'bigdl_lite[connect]'")
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(300)]

_SERVER = "org.apache.spark.sql.connect.service.SparkConnectServer"


def jars() -> bool:
    import pyspark

    return any(Path(pyspark.__file__).parent.glob("jars/spark-connect_*.jar"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Client:
    """A program that runs other programs through Connect, one after the other."""

    def __init__(self, url: str, folder: Path) -> None:
        folder.mkdir()
        self.url = url
        self.said = open(folder / "stderr", "w+")
        command = [sys.executable, "-m", "tests.cluster.programs", url, str(folder)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=self.said, text=True)
        self.answers: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.answers.put(line)
        self.answers.put("")

    def __call__(self, program: Any) -> Any:
        assert self.process.stdin is not None
        print(program.__name__, file=self.process.stdin, flush=True)
        line = self.answers.get(timeout=240)
        if not line:
            self.said.seek(0)
            raise RuntimeError(f"the client has ended:\n{self.said.read()[-4000:]}")
        told = json.loads(line)
        if "error" in told:
            raise AssertionError(told["error"])
        return told["ok"]

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.said.close()


class Server:
    """environment, settings: beside the ones that every server has here."""

    def __init__(self, master: str, log: Path, environment: Mapping[str, str] = {}, **settings: str) -> None:
        import pyspark

        from bigdl_lite.engine.session import _worker_path

        self.port = free_port()
        home = Path(pyspark.__file__).parent
        environment = {
            **os.environ, "SPARK_HOME": str(home), "PYSPARK_PYTHON": sys.executable, "PYTHONPATH": _worker_path(None) or str(ROOT),
            "SPARK_LOCAL_IP": "127.0.0.1", **java(), **environment,
        }  # fmt: skip
        settings = {
            "spark.connect.grpc.binding.address": "127.0.0.1", "spark.connect.grpc.binding.port": str(self.port),
            "spark.ui.enabled": "false", "spark.python.daemon.module": "bigdl_lite.engine.daemon", "spark.sql.shuffle.partitions": "4",
            "spark.sql.warehouse.dir": str(log.parent / "warehouse"), **settings,
        }  # fmt: skip
        conf = [word for name, value in settings.items() for word in ("--conf", f"{name}={value}")]
        command = [str(home / "bin" / "spark-submit"), "--master", master, "--class", _SERVER, *conf, "spark-internal"]
        with open(log, "w") as out:
            self.process = subprocess.Popen(command, env=environment, stdout=out, stderr=out, cwd=log.parent)
        until = time.monotonic() + 90
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1.0).close()
                break
            except OSError:
                if self.process.poll() is not None or time.monotonic() > until:
                    self.close()
                    raise RuntimeError(f"no server of Spark Connect: {log.read_text()[-3000:]}") from None
                time.sleep(0.2)
        self.url = f"sc://127.0.0.1:{self.port}"

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()


@contextlib.contextmanager
def client_of(folder: Path, master: str, **more: Any) -> Iterator[Client]:
    if not jars():
        pytest.skip("this pyspark brings no server of Spark Connect (4.0 and later do)")
    with contextlib.ExitStack() as stack:
        server = Server(master, folder / "server.log", **more)
        stack.callback(server.close)
        client = Client(server.url, folder / "client")
        stack.callback(client.close)
        yield client


@pytest.fixture(scope="module")
def connect(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with client_of(tmp_path_factory.mktemp("connect"), "local[4]") as client:
        yield client


@pytest.fixture(scope="module")
def far(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """Executors in processes of their own, whose Python has all libraries and not bigdl_lite."""
    folder = tmp_path_factory.mktemp("far")
    there = str(libraries(folder / "site"))
    settings = {
        "spark.executorEnv.PYTHONPATH": there, "spark.executor.memory": "1g", "spark.python.daemon.module": "pyspark.daemon",
    }  # fmt: skip
    bare = {"PYSPARK_PYTHON": bare_python(folder), "PYTHONPATH": there}
    with client_of(folder, "local-cluster[2,1,1024]", environment=bare, **settings) as client:
        yield client


def near(a: Any, b: Any, most: float = 1e-5) -> None:
    np.testing.assert_allclose(np.asarray(a, dtype="f8"), np.asarray(b, dtype="f8"), rtol=most, atol=most)


def test_the_same_program_gives_the_same_model_and_the_same_scores(spark: Any, connect: Client, tmp_path: Path) -> None:
    there, here = connect(programs.full_batches), programs.full_batches(spark, tmp_path)
    near(there["weights"], here["weights"])
    near(there["losses"], here["losses"])
    assert [p for _, p in there["scores"]] == [p for _, p in here["scores"]]
    assert here["losses"][-1] < here["losses"][0]
    with pytest.raises(AssertionError):  # the control: one step less is another model
        near(there["weights"], programs.weights(programs.classifier(epochs=5).fit(programs.table(spark))))


@pytest.mark.slow
def test_validation_metrics_callbacks_and_the_report(connect: Client) -> None:
    told = connect(programs.watched)
    assert told["epochs"] == ["epoch"] * 4 and told["report"]
    assert told["validation"].keys() >= {"val_loss", "val_accuracy"}


@pytest.mark.slow
def test_columns_of_all_kinds(spark: Any, connect: Client, tmp_path: Path) -> None:
    there, here = connect(programs.columns_of_all_kinds), programs.columns_of_all_kinds(spark, tmp_path)
    near(there["weights"], here["weights"])
    near(there["scores"], here["scores"])


def test_weights_that_no_function_carries_travel_as_artifacts(spark: Any, connect: Client, tmp_path: Path) -> None:
    program = programs.more_weights_than_fit_into_a_function
    there, here = connect(program), program(spark, tmp_path)
    near(there["weights"], here["weights"])
    near(there["scores"], here["scores"])


@pytest.mark.slow
def test_scores_in_sql_in_streams_and_in_sums(connect: Client) -> None:
    told = connect(programs.many_ways_to_score)
    assert told["transform"] == told["sql"] == told["stream"]
    assert told["evaluate"]["accuracy"] > 0.6 and told["evaluate"]["loss"] > 0


def test_saved_and_loaded_alone_and_in_a_pipeline(connect: Client) -> None:
    assert connect(programs.saved_and_loaded) == {"loaded": True, "estimator": True, "pipeline": True}


@pytest.mark.slow
def test_a_search(connect: Client) -> None:
    told = connect(programs.searched)
    assert told["better"] == 1


def test_what_cannot_be_says_so(connect: Client) -> None:
    told = connect(programs.refused)
    assert told["shuffle"][0] == "RecipeError" and "Spark Connect does not have" in told["shuffle"][1]
    assert told["too many workers"][0] == "RecipeError" and "numWorkers=99" in told["too many workers"][1]
    assert told["a hole"][0] == "DataError" and "'features'" in told["a hole"][1]
    assert told["no column"][0] == "DataError" and "'nothing'" in told["no column"][1]
    kind, text = told["the user's own"]
    assert kind == "UserError" and text.startswith("Traceback") and "ZeroDivisionError: of the user's own" in text
    assert told["a cast"][0] == "DataError" and told["a cast"][1].startswith("Spark cannot compute the rows: ")


@pytest.mark.slow
def test_local_gives_the_model_of_barrier(spark: Any, connect: Client, tmp_path: Path) -> None:
    here = programs.full_batches(spark, tmp_path)
    near(connect(programs.in_threads_of_this_program)["weights"], here["weights"])


@pytest.mark.slow
def test_a_killed_rank_costs_no_step(connect: Client) -> None:
    told = connect(programs.a_rank_is_killed)
    assert told["killed"]
    near(told["weights"], connect(programs.nothing_happens)["weights"])


@pytest.mark.slow
def test_a_fit_goes_on_from_a_checkpoint(connect: Client) -> None:
    told = connect(programs.goes_on_from_a_checkpoint)
    near(told["resumed"], told["whole"])


@pytest.mark.slow
def test_an_interrupted_fit_ends_soon_and_the_next_one_is_as_ever(spark: Any, connect: Client, tmp_path: Path) -> None:
    told = connect(programs.interrupted)
    assert told["seconds"] < 10
    near(told["weights"], programs.full_batches(spark, tmp_path)["weights"])


@pytest.mark.slow
def test_doctor_says_what_it_can(connect: Client) -> None:
    told = connect(programs.asked_by_doctor)
    assert told["engine"] == "barrier" and "4 workers fit into 4 slots" in told["why"], told["text"]
    assert not told["failed"], told["text"]
    assert "4 slots in 1 executor on 1 host" in told["text"]
    assert "Spark Connect to local[4]" in told["text"]


@pytest.mark.slow
def test_the_package_travels_as_an_artifact_to_executors_elsewhere(spark: Any, far: Client, tmp_path: Path) -> None:
    told = far(programs.the_package_in_a_zip)
    assert "No module named 'bigdl_lite'" in told["without"][1]  # the control
    near(told["weights"], programs.full_batches(spark, tmp_path)["weights"])


@pytest.mark.slow
def test_the_quickstart_runs_as_it_is(connect: Client) -> None:
    command, environment = [sys.executable, "examples/quickstart.py"], {**os.environ, "SPARK_REMOTE": connect.url}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    found = re.search(r"accuracy\D*(0\.\d+)", done.stdout)
    assert found and float(found[1]) > 0.95
