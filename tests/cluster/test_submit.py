"""A standalone cluster of Spark's own, started by the scripts of docker/: programs arrive by spark-submit, with the package in a zip.

The Python of the cluster has all libraries and not bigdl_lite, so that whatever trains there came in the zip.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bigdl_lite.ml.zip import build, main
from tests.cluster.standalone import TRAINS, Cluster
from tests.conftest import ROOT

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]


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
        path.write_text(TRAINS + textwrap.dedent(body))
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


@pytest.mark.slow  # two programs, one after the other: five minutes on two busy cores
def test_quickstart_and_recommender_run_on_the_cluster_and_the_history_server_shows_their_jobs(cluster: Cluster, package: Path) -> None:
    """What compose.yaml starts and submits, on this machine."""
    done = cluster.submit(ROOT / "examples" / "quickstart.py", "--py-files", str(package), arguments=["--epochs", "6"])
    assert done.returncode == 0, done.stdout[-4000:]
    assert "engine          barrier" in done.stdout and "the same predictions from the saved model" in done.stdout
    done = cluster.submit(ROOT / "examples" / "recommender.py", "--py-files", str(package), arguments=["--small"])
    assert done.returncode == 0, done.stdout[-4000:]

    cluster.environment["SPARK_UI_PORT"] = "0"
    port = cluster.start("history.sh", r"Bound HistoryServer to .* started at http://\S+:(\d+)")

    def ask(path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/applications{path}", timeout=30) as answer:
            return json.load(answer)

    until = time.monotonic() + 60
    while not {"quickstart.py", "recommender.py"} <= (ids := {x["name"]: x["id"] for x in ask("")}).keys():
        assert time.monotonic() < until, ids
        time.sleep(0.2)
    for name in ("quickstart.py", "recommender.py"):
        assert [x["completed"] for x in ask(f"/{ids[name]}")["attempts"]] == [True]
        told = [job.get("description", "") for job in ask(f"/{ids[name]}/jobs")]
        assert any(text.startswith("bigdl_lite") for text in told), told
    with pytest.raises(urllib.error.HTTPError, match="404"):
        ask("/app-of-nobody/jobs")


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
