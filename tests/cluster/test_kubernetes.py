"""Spark on Kubernetes with the image's entry point: the guide's lines, pods that are processes, a driver here or in a pod of its own.

What is real: spark-submit, the driver, what Spark puts into a pod, the entry point, executors that join, training. What is not: see
kubernetes.py.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pyspark
import pytest

from tests.cluster.kubernetes import Kubernetes
from tests.cluster.standalone import TRAINS, free_port, java
from tests.cluster.test_lines import LINES
from tests.conftest import ROOT

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(600)]  # six minutes on two busy cores

SUBMIT = Path(pyspark.__file__).parent / "bin" / "spark-submit"
WORKS = """
print(json.dumps({engine: [x["loss"] for x in fit(engine).history if "steps" in x] for engine in ("barrier", "shuffle")}))
"""
FAILS = """
def odd(output, target):
    raise ValueError("no such loss")
fit("barrier", loss=odd)
"""


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Kubernetes]:
    environment = {
        "PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "PYSPARK_PYTHON": sys.executable,
        "SPARK_LOCAL_IP": "127.0.0.1", **java(),
    }  # fmt: skip
    made = Kubernetes(tmp_path / "pods", ROOT, environment)
    try:
        yield made
    finally:
        made.close()


def submit(
    cluster: Kubernetes, name: str, change: Mapping[str, str], program: Sequence[str], folder: Path
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """A line of the guide, with its words for hosts and for the program replaced."""
    _, given = LINES[name]
    words = [word for word in given if not word.startswith(("local:", "program.py"))]
    words = words[: words.index("--epochs")] if "--epochs" in words else words
    words = [change.get(word, word).replace("https://HOST:6443", cluster.url) for word in words]
    words += ["--conf", "spark.ui.enabled=false", "--conf", "spark.kubernetes.executor.apiPollingInterval=1s"]
    words += ["--conf", "spark.sql.shuffle.partitions=2", *program]
    environment, nothing = {**cluster.environment, "SPARK_HOME": str(SUBMIT.parents[1])}, subprocess.DEVNULL
    return subprocess.run(
        [SUBMIT, *words], cwd=folder, env=environment, stdin=nothing, capture_output=True, text=True, timeout=300, check=False
    )


def here(cluster: Kubernetes) -> list[str]:
    """What a driver in a pod finds through DNS, and ports that are free on a machine that several pods share."""
    found = {"spark.kubernetes.driver.master": cluster.url}
    found |= {name: str(free_port()) for name in ("spark.driver.port", "spark.driver.blockManager.port")}
    return [word for pair in found.items() for word in ("--conf", "=".join(pair))]


def test_executors_in_pods_join_a_driver_outside_and_train(cluster: Kubernetes, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(TRAINS + WORKS)
    done = submit(cluster, "k8s client", {"spark.driver.host=ADDRESS": "spark.driver.host=127.0.0.1"}, [str(program)], tmp_path)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    told = json.loads(done.stdout.strip().splitlines()[-1])
    assert told["barrier"] == pytest.approx(told["shuffle"], abs=1e-6) and told["barrier"][-1] < told["barrier"][0]
    containers = [pod["spec"]["containers"][0] for pod in cluster.pods]
    assert [(c["args"], c["image"]) for c in containers] == [(["executor"], "REGISTRY/bigdl_lite")] * 2
    assert not any("command" in c for c in containers), "so the image's own entry point runs"


def test_the_quickstart_runs_in_cluster_mode(cluster: Kubernetes, tmp_path: Path) -> None:
    program = ["local:///opt/bigdl_lite/examples/quickstart.py", "--epochs", "3"]
    done = submit(cluster, "k8s cluster", {}, [*here(cluster), *program], tmp_path)
    roles = [pod["metadata"]["labels"]["spark-role"] for pod in cluster.pods]
    log = cluster.log(cluster.pods[0]["metadata"]["name"])
    assert done.returncode == 0, done.stderr[-3000:] + log[-4000:]
    assert roles == ["driver", "executor", "executor"]
    assert "engine          barrier" in log and "the same predictions from the saved model" in log


def test_an_error_in_training_in_cluster_mode_fails_the_pod_and_its_log_ends_in_the_users_traceback(
    cluster: Kubernetes, tmp_path: Path
) -> None:  # fmt: skip
    """The exit code is the pod's: spark-submit itself, up to 4.3, tells it in its log and ends with 0 (SPARK-26365)."""
    program = tmp_path / "program.py"
    program.write_text(TRAINS + FAILS)
    done = submit(cluster, "k8s cluster", {}, [*here(cluster), f"local://{program}"], tmp_path)
    name = cluster.pods[0]["metadata"]["name"]
    log, (pod,) = cluster.log(name), cluster.find("pods", name, "")
    assert "UserError: Traceback" in log and 'raise ValueError("no such loss")' in log[log.rindex("UserError: Traceback") :]
    assert pod["status"]["phase"] == "Failed"
    assert pod["status"]["containerStatuses"][0]["state"]["terminated"]["exitCode"] == 1
    assert re.search(r"exit code: 1\b", done.stderr), done.stderr[-3000:]
