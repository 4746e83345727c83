"""The image and the compose file, as far as they can be judged without an engine that builds them."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

yaml = pytest.importorskip("yaml")

DOCKER = ROOT / "docker"
SCRIPTS = sorted((DOCKER / "scripts").glob("*.sh"))
CONDITIONS = {"service_started", "service_healthy", "service_completed_successfully"}


def faults(compose: dict[str, Any]) -> list[str]:
    """What would keep a compose file from starting: the rules of its schema that matter here."""
    services = compose.get("services") or {}
    wrong = [] if services else ["no services"]
    volumes = compose.get("volumes") or {}
    for name, service in services.items():
        if not ({"image", "build"} & service.keys()):
            wrong.append(f"{name}: neither image nor build")
        for other, how in (service.get("depends_on") or {}).items():
            if other not in services:
                wrong.append(f"{name}: depends on {other}, which is no service")
            elif how.get("condition") not in CONDITIONS:
                wrong.append(f"{name}: depends on {other} under no condition that there is")
            elif how["condition"] == "service_healthy" and "test" not in services[other].get("healthcheck", {}):
                wrong.append(f"{name}: waits for {other} to be healthy, which has no healthcheck")
        for volume in service.get("volumes") or ():
            source = volume.split(":")[0]
            if not source.startswith((".", "/")) and source not in volumes:
                wrong.append(f"{name}: volume {source} is not declared")
        for key, value in (service.get("environment") or {}).items():
            if not isinstance(value, str):
                wrong.append(f"{name}: {key} is a {type(value).__name__}, not text")
        wrong += [f"{name}: port {port} is not text" for port in service.get("ports") or () if not isinstance(port, str)]
    return wrong


@pytest.fixture
def compose() -> dict[str, Any]:
    return yaml.safe_load((DOCKER / "compose.yaml").read_text())


def test_the_compose_file_has_a_master_two_workers_a_history_server_and_a_driver(compose: dict[str, Any]) -> None:
    assert faults(compose) == []
    services = compose["services"]
    assert set(services) == {"master", "worker-1", "worker-2", "history", "submit"}
    assert set(services["submit"]["depends_on"]) == {"worker-1", "worker-2", "history"}
    ran = re.findall(r"(?:docker|examples)/[\w/.]+", str([service["command"] for service in services.values()]))
    assert all((ROOT / path).is_file() for path in ran)
    assert {"examples/quickstart.py", "examples/recommender.py"} <= set(ran) and len({x for x in ran if x.startswith("docker")}) == 4
    assert services["submit"]["environment"]["SPARK_CORES"] == "2", "as many as the workers have"


@pytest.mark.parametrize(
    ("service", "key", "value", "said"),
    [
        ("submit", "depends_on", {"worker": {"condition": "service_started"}}, "depends on worker, which is no service"),
        ("submit", "depends_on", {"master": {"condition": "healthy"}}, "under no condition"),
        ("master", "healthcheck", {}, "has no healthcheck"),
        ("history", "volumes", ["events:/events"], "volume events is not declared"),
        ("worker-1", "environment", {"SPARK_WORKER_CORES": 1}, "is a int, not text"),
        ("master", "ports", [8080], "is not text"),
    ],
)
def test_a_compose_file_with_a_fault_is_seen(compose: dict[str, Any], service: str, key: str, value: Any, said: str) -> None:
    changed = {**compose, "services": {**compose["services"], service: {**compose["services"][service], key: value}}}
    assert any(said in fault for fault in faults(changed)), faults(changed)


def installed(name: str) -> str | None:
    """A program that pip brings, beside this Python or on PATH."""
    return shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))


@pytest.mark.skipif(installed("check-jsonschema") is None, reason="check-jsonschema, which [test] brings, is not installed")
def test_the_compose_file_is_of_the_published_schema(tmp_path: Path) -> None:
    def check(path: Path) -> subprocess.CompletedProcess[str]:
        command = [str(installed("check-jsonschema")), "--builtin-schema", "vendor.compose-spec", str(path)]  # it fetches nothing
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    done = check(DOCKER / "compose.yaml")
    assert done.returncode == 0, done.stdout
    worse = tmp_path / "compose.yaml"
    worse.write_text((DOCKER / "compose.yaml").read_text().replace("depends_on", "depend_on"))
    done = check(worse)
    assert done.returncode != 0 and "'depend_on' was unexpected" in done.stdout


def instructions(text: str) -> list[tuple[str, str]]:
    joined = re.sub(r"\\\n", " ", re.sub(r"(?m)^\s*#.*\n", "", text))
    return [(word.upper(), rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line.strip())]


def test_what_the_dockerfile_copies_is_there_and_reaches_the_builder() -> None:
    told = instructions((DOCKER / "Dockerfile").read_text())
    assert told[0] == ("FROM", "python:3.11-slim-bookworm")
    copied = [path for word, rest in told if word == "COPY" for path in rest.split()[:-1]]
    let_in = {line[1:] for line in (DOCKER / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied and set(copied) == let_in and all((ROOT / path).exists() for path in copied)
    words = [word for word, _ in told]
    assert words.index("USER") < words.index("CMD"), "it does not run as root"
    assert (ROOT / ast.literal_eval(told[-1][1])[0]).is_file()


def test_the_dockerfile_installs_the_torch_that_the_package_asks_for() -> None:
    wanted = re.search(r'"(torch[<>=][^"]*)"', (ROOT / "setup.py").read_text())
    assert wanted and f'"{wanted[1]}"' in (DOCKER / "Dockerfile").read_text()


@pytest.mark.skipif(installed("hadolint") is None, reason="hadolint, which [test] brings to common machines, is not installed")
def test_hadolint_has_nothing_to_say(tmp_path: Path) -> None:
    def lint(path: Path) -> str:
        done = subprocess.run([str(installed("hadolint")), "--no-color", path], capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode == 0) == (done.stdout == ""), done.stderr
        return done.stdout

    assert lint(DOCKER / "Dockerfile") == ""
    worse = tmp_path / "Dockerfile"
    worse.write_text((DOCKER / "Dockerfile").read_text().replace("--no-cache-dir", "").replace("procps=2:4.*", "procps"))
    assert "DL3042" in lint(worse) and "DL3008" in lint(worse)


def test_the_image_begins_with_the_script_that_kubernetes_needs_and_runs_other_commands_as_they_are(tmp_path: Path) -> None:
    told = dict(instructions((DOCKER / "Dockerfile").read_text()))
    (path,) = ast.literal_eval(told["ENTRYPOINT"])
    script = ROOT / Path(path).relative_to(told["WORKDIR"])
    done = subprocess.run([script, "sh", "-c", 'echo "$1"', "sh", "a  b"], capture_output=True, text=True, timeout=10, check=False)
    assert (done.returncode, done.stdout) == (0, "a  b\n")
    assert subprocess.run([script, "sh", "-c", "exit 3"], timeout=10, check=False).returncode == 3


def test_an_executor_gets_the_options_of_its_java_one_by_one(tmp_path: Path) -> None:
    """What Spark on Kubernetes puts into the environment of a pod arrives as arguments, spaces and quotes included."""
    java = tmp_path / "bin" / "java"
    java.parent.mkdir()
    java.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\npwd\n')
    java.chmod(0o755)
    given = {
        "JAVA_HOME": str(tmp_path), "SPARK_HOME": "/spark", "PYSPARK_PYTHON": sys.executable, "TMPDIR": str(tmp_path),
        "SPARK_JAVA_OPT_0": "-Da=b c", "SPARK_JAVA_OPT_1": '-Dq="$HOME"', "SPARK_EXECUTOR_MEMORY": "1024m", "SPARK_EXECUTOR_ID": "1",
        "SPARK_DRIVER_URL": "spark://CoarseGrainedScheduler@10.0.0.1:7078", "SPARK_EXECUTOR_CORES": "2", "SPARK_APPLICATION_ID": "app",
        "SPARK_RESOURCE_PROFILE_ID": "0", "SPARK_EXECUTOR_POD_IP": "10.0.0.2", "SPARK_EXECUTOR_POD_NAME": "pod",
        "SPARK_CONF_DIR": "/opt/spark/conf", "PATH": os.environ["PATH"],
    }  # fmt: skip
    script = DOCKER / "scripts" / "entrypoint.sh"
    done = subprocess.run([script, "executor"], env=given, capture_output=True, text=True, timeout=10, check=False)
    lines = done.stdout.splitlines()
    assert lines[:5] == ["-Da=b c", '-Dq="$HOME"', "-Xms1024m", "-Xmx1024m", "-cp"], done.stderr
    assert lines[5:7] == ["/opt/spark/conf:/spark/jars/*", "org.apache.spark.scheduler.cluster.k8s.KubernetesExecutorBackend"]
    assert dict(zip(lines[7:-1:2], lines[8:-1:2], strict=True)) == {
        "--driver-url": given["SPARK_DRIVER_URL"], "--executor-id": "1", "--cores": "2", "--app-id": "app", "--hostname": "10.0.0.2",
        "--resourceProfileId": "0", "--podName": "pod",
    }  # fmt: skip
    assert Path(lines[-1]).parent == tmp_path and os.access(lines[-1], os.W_OK), "a folder of its own, for --py-files and --archives"
    del given["SPARK_DRIVER_URL"]
    done = subprocess.run([script, "executor"], env=given, capture_output=True, text=True, timeout=10, check=False)
    assert done.returncode != 0 and "SPARK_DRIVER_URL" in done.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_each_script_is_plain_sh_and_may_be_run(script: Path) -> None:
    assert script.read_text().startswith("#!/bin/sh\n#")
    assert subprocess.run(["sh", "-n", script], timeout=10, check=False).returncode == 0
    assert os.access(script, os.X_OK) == (script.name != "spark.sh"), "spark.sh is sourced"
