"""The lines of the guide that are made to be copied: spark-submit takes each of them, down to where it would call a cluster."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from py4j.protocol import Py4JError

from tests.conftest import ROOT

SECTIONS = ("spark-submit", "Containers", "YARN", "Kubernetes", "Settings of Spark")
PAGE = (ROOT / "examples" / "guide" / "deployment.md").read_text()
GUIDE = "\n".join(part for part in PAGE.split("\n## ") if part.startswith(SECTIONS))
MODULES = ("deploy.k8s.Config$", "deploy.yarn.config.package$")  # Spark knows their settings once they are loaded
PREFIXES = ("spark.executorEnv.", "spark.yarn.appMasterEnv.", "spark.executor.resource.", "spark.task.resource.", "spark.ssl.rpc.")


def lines() -> dict[str, tuple[dict[str, str], list[str]]]:
    """By master and mode: the environment that a line sets, and the arguments of spark-submit."""
    found = {}
    for block in re.findall(r"```bash\n(.*?)```", GUIDE, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(re.sub(r"\s#.*", "", line))
            if "spark-submit" not in words:
                continue
            at = words.index("spark-submit")
            told, given = dict(word.split("=", 1) for word in words[:at]), words[at + 1 :]
            master = given[given.index("--master") + 1].split(":")[0]
            mode = given[given.index("--deploy-mode") + 1] if "--deploy-mode" in given else "client"
            name = f"{master} {mode}" + (" archive" if "--archives" in given and master == "spark" else "")
            assert name not in found, f"two lines for {name}"
            found[name] = told, given
    return found


LINES = lines()
CHILDREN = {  # what spark-submit would start
    "spark client": "org.apache.spark.deploy.PythonRunner",
    "spark client archive": "org.apache.spark.deploy.PythonRunner",
    "yarn client": "org.apache.spark.deploy.PythonRunner",
    "yarn cluster": "org.apache.spark.deploy.yarn.YarnClusterApplication",
    "k8s client": "org.apache.spark.deploy.PythonRunner",
    "k8s cluster": "org.apache.spark.deploy.k8s.submit.KubernetesClientApplication",
}

Submit = Callable[..., str]


@pytest.fixture
def submit(spark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Submit]:
    """All that spark-submit does with a line before it starts or calls anything; the class that it would start."""
    jvm = spark.sparkContext._jvm
    for name in ("program.py", "bigdl_lite.zip", "env.tar.gz"):
        (tmp_path / name).write_text("")

    def call(given: list[str], environment: dict[str, str]) -> str:
        # paths are of the folder in which the JVM was started, which is not the test's
        given = [re.sub(r"^(program\.py|bigdl_lite\.zip|env\.tar\.gz)", lambda found: str(tmp_path / found[0]), word) for word in given]
        words, told = jvm.java.util.ArrayList(), jvm.java.util.HashMap()
        for word in given:
            words.add(word)
        for key, value in environment.items():
            told.put(key, value)
        convert = jvm.org.apache.spark.api.python.PythonUtils
        parsed = jvm.org.apache.spark.deploy.SparkSubmitArguments(convert.toSeq(words), convert.toScalaMap(told))
        return jvm.org.apache.spark.deploy.SparkSubmit().prepareSubmitEnvironment(parsed, jvm.scala.Option.empty())._4()

    yield call


def test_there_is_a_line_for_each_cluster_and_mode() -> None:
    assert LINES.keys() == CHILDREN.keys()


@pytest.mark.parametrize("name", CHILDREN)
def test_spark_submit_takes_the_line(submit: Submit, name: str) -> None:
    environment, given = LINES[name]
    assert submit(given, {"HADOOP_CONF_DIR": "/etc/hadoop/conf", **environment}) == CHILDREN[name]


def test_lines_that_are_wrong_are_refused(submit: Submit) -> None:
    """The controls."""
    _, given = LINES["yarn cluster"]
    for broken, told, said in [
        ([word.replace("--archives", "--archive") for word in given], {"HADOOP_CONF_DIR": "/x"}, "Unrecognized option '--archive'"),
        (given, {}, "HADOOP_CONF_DIR"),
        ([word.replace("yarn", "yarns") for word in given], {"HADOOP_CONF_DIR": "/x"}, "Master must either be yarn or start with"),
        (["--deploy-mode", "cluster", *LINES["spark client"][1]], {}, "not supported for python applications on standalone clusters"),
    ]:
        with pytest.raises(Py4JError, match=re.escape(said)):
            submit(broken, told)


def test_every_setting_in_the_guide_is_one_that_spark_knows(spark: Any) -> None:
    """In lines and tables; Spark itself takes any name without a word."""
    jvm = spark.sparkContext._jvm
    for module in MODULES:
        jvm.java.lang.Class.forName(f"org.apache.spark.{module}", True, jvm.java.lang.Thread.currentThread().getContextClassLoader())

    def known(name: str) -> bool:
        return name.startswith(PREFIXES) or jvm.org.apache.spark.internal.config.ConfigEntry.findEntry(name) is not None

    named = set(re.findall(r"\bspark(?:\.[A-Za-z0-9]+)+(?=[=` ,;:)*])", GUIDE))
    named = {name for name in named if not name.startswith("spark.bigdl_lite.") and not name.endswith((".sh", ".py", ".md"))}
    assert len(named) > 15
    assert [name for name in sorted(named) if not known(name)] == []
    assert not known("spark.executor.memoryOverheadFaktor"), "the control"
