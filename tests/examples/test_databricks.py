"""The manners that a Databricks notebook asks of a library, as far as open-source Spark can show them: the session stays the user's,
paths of volumes and of dbfs, a cancelled cell, and what %pip install brings."""

from __future__ import annotations

import ast
import contextlib
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from pyspark import SparkContext
from pyspark.sql import SparkSession

from bigdl_lite import TorchClassifier, TorchModel
from bigdl_lite.observe.events import STOP, StepEnded, Stop
from tests.conftest import ROOT, flat, frame, mlp, problem

X, Y = problem(80)
FOREVER = 10**6


def classifier(engine: str = "barrier", **more: Any) -> TorchClassifier:
    adam = partial(torch.optim.Adam, lr=0.01)
    return TorchClassifier(module=mlp, optimizer=adam, batchSize=20, numWorkers=2, engine=engine, progress="none", seed=3, **more)


# The session ------------------------------------------------------------------------------------------------------------------

# who may: local_session() makes a session; the others ask for the one there is, which getOrCreate() without settings gives
MAKERS = {"engine/session.py"}
ASKERS = {"engine/session.py", "engine/spark.py"}


def manners(source: str) -> set[str]:
    """What a source does that only the owner of a session should."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else None
        if name == "dbutils" or (isinstance(node, ast.ImportFrom) and str(node.module).endswith("dbutils")):
            found.add("dbutils")
        if isinstance(node, ast.Call):
            text = ast.unparse(node.func)
            if text.endswith((".config", ".master", ".appName", ".remote")) and "builder" in text:
                found.add("configures a session")
            if text.split(".")[-1] in ("SparkContext", "local_session", "newSession"):
                found.add("makes a session")
            if text.endswith(".getOrCreate"):
                found.add("asks for the session")
            if text.endswith(".stop") and not node.args:
                found.add("stops")
    return found


def test_nothing_in_the_package_makes_configures_or_stops_a_session_but_local_session() -> None:
    for path in sorted((ROOT / "bigdl_lite").rglob("*.py")):
        name = path.relative_to(ROOT / "bigdl_lite").as_posix()
        may = {"makes a session", "configures a session"} if name in MAKERS else set()
        may |= {"asks for the session"} if name in ASKERS else set()
        assert manners(path.read_text()) <= may, name


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("dbutils.fs.ls('/')", "dbutils"),
        ("spark.stop()", "stops"),
        ("sc = SparkContext(conf=conf)", "makes a session"),
        ("SparkSession.builder.appName('x')", "configures a session"),
    ],
)
def test_bad_manners_would_be_seen(line: str, what: str) -> None:
    assert what in manners(line)


def test_a_fit_and_what_follows_it_leave_the_session_to_its_owner(spark: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: Any, **__: Any) -> None:
        raise AssertionError("this is the owner's business")

    before = {row.key: row.value for row in spark.sql("SET").collect()}
    for kind, name in ((SparkContext, "__init__"), (SparkContext, "stop"), (SparkSession, "stop")):
        monkeypatch.setattr(kind, name, forbidden)
    with pytest.raises(AssertionError):  # the control: it would be noticed
        spark.stop()
    df = frame(spark, X, Y, [50, 30])
    model = classifier(epochs=1).fit(df)
    model.write().overwrite().save(str(tmp_path / "model"))
    spark.udf.register("said", model.udf())
    assert TorchModel.load(str(tmp_path / "model")).transform(df).count() == 80
    df.createOrReplaceTempView("rows_of_databricks")
    try:
        assert spark.sql("SELECT said(features).prediction AS said FROM rows_of_databricks").count() == 80
    finally:
        spark.catalog.dropTempView("rows_of_databricks")
        spark.sql("DROP TEMPORARY FUNCTION IF EXISTS said")
    assert {row.key: row.value for row in spark.sql("SET").collect()} == before


# Paths ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def mounts() -> Iterator[tuple[Path, Path]]:
    """Folders of our own below /Volumes and /dbfs, which are removed again, and those above where nobody else needs them."""
    name, above = f"bigdl_lite_{os.getpid()}", (Path("/Volumes"), Path("/dbfs"))
    missing = [path for path in above if not path.exists()]
    wanted = above[0] / name, above[1] / name
    try:
        for path in wanted:
            path.mkdir(parents=True)
        yield wanted
    except PermissionError as error:
        pytest.skip(f"only root may make a folder below /: {error}")
    finally:
        for path in wanted:
            shutil.rmtree(path, ignore_errors=True)
        for path in missing:
            with contextlib.suppress(OSError):  # another run of these tests is in it
                path.rmdir()


@pytest.fixture
def dbfs(spark: Any, mounts: tuple[Path, Path]) -> Iterator[str]:
    """dbfs:/ for Spark too, whose files lie below /dbfs, as they do on Databricks."""
    conf = spark.sparkContext._jsc.hadoopConfiguration()
    name = mounts[1].name
    settings = {
        "fs.dbfs.impl": "org.apache.hadoop.fs.viewfs.ViewFileSystemOverloadScheme",
        "fs.viewfs.overload.scheme.target.file.impl": "org.apache.hadoop.fs.LocalFileSystem",
        f"fs.viewfs.mounttable.default.link./{name}": f"file://{mounts[1]}",
    }
    for key, value in settings.items():
        conf.set(key, value)
    yield f"dbfs:/{name}"
    for key in settings:
        conf.unset(key)


def a_model_and_its_checkpoints_live_at(path: str, local: Path, spark: Any) -> None:
    df = frame(spark, X, Y, [50, 30])
    settings = {"checkpointDir": f"{path}/checkpoints", "checkpointUnit": "step", "checkpointInterval": 2}
    model = classifier(epochs=1, **settings).fit(df)
    assert list(local.glob("checkpoints/**/*.safetensors"))
    again = classifier(epochs=2, resume=True, **settings).fit(df)
    assert torch.equal(flat(again.module), flat(classifier(epochs=2).fit(df).module))
    model.write().overwrite().save(f"{path}/model")
    assert (local / "model" / "weights.safetensors").stat().st_size
    assert torch.equal(flat(TorchModel.load(f"{path}/model").module), flat(model.module))


def test_checkpoints_and_models_live_in_a_volume(spark: Any, mounts: tuple[Path, Path]) -> None:
    a_model_and_its_checkpoints_live_at(str(mounts[0]), mounts[0], spark)


def test_checkpoints_and_models_live_in_dbfs(spark: Any, mounts: tuple[Path, Path], dbfs: str) -> None:
    a_model_and_its_checkpoints_live_at(dbfs, mounts[1], spark)


# A cancelled cell -------------------------------------------------------------------------------------------------------------

CELL = "the cell of a notebook"
SECONDS = 20.0  # within which all must be over, on a machine that is busy; it takes less than one


def interrupt(sc: Any) -> None:
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)  # as a kernel is interrupted: also out of a read


CANCELS: Mapping[str, Callable[[Any], None]] = {
    "interrupt": interrupt,
    "group": lambda sc: sc.cancelJobGroup(CELL),
    "all jobs": lambda sc: sc.cancelAllJobs(),
}


class Cancels:
    """Calls for the end from another thread, as a notebook's server does, once training has begun.

    Spark cancels the jobs that are active at that moment, and between two jobs of the shuffle engine there may be none: so it is
    called again until the fit has ended, but for an interrupt, which is never lost.
    """

    def __init__(self, cancel: Callable[[], None], again: bool) -> None:
        self.began, self.over, self.at = threading.Event(), threading.Event(), 0.0
        self.thread = threading.Thread(target=self.run, args=(cancel, again), daemon=True)

    def __call__(self, event: Any) -> Stop | None:
        if isinstance(event, StepEnded):
            self.began.set()
        return STOP if self.at and time.monotonic() > self.at + SECONDS else None  # or the fit would last for ever

    def __enter__(self) -> Cancels:
        self.thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.over.set()
        self.thread.join(10.0)

    def run(self, cancel: Callable[[], None], again: bool) -> None:
        if self.began.wait(60.0) and not self.over.is_set():
            self.at = time.monotonic()
            cancel()
            while again and not self.over.wait(0.05):
                cancel()


def busy(sc: Any) -> bool:
    tracker = sc.statusTracker()
    return bool(tracker.getActiveJobsIds() or tracker.getActiveStageIds())


@pytest.mark.parametrize("engine", ["barrier", "shuffle"])
def test_a_cancelled_cell_ends_the_fit_and_all_its_jobs(spark: Any, engine: str) -> None:
    sc, df = spark.sparkContext, frame(spark, X, Y, [50, 30])
    usual = flat(classifier(engine, epochs=1).fit(df).module)
    for name, cancel in CANCELS.items():
        sc.setJobGroup(CELL, "as a notebook sets it for each cell")
        try:
            with Cancels(partial(cancel, sc), again=name != "interrupt") as watch:
                with pytest.raises(KeyboardInterrupt if name == "interrupt" else Exception) as caught:
                    classifier(engine, epochs=FOREVER, callbacks=[watch]).fit(df)
        finally:
            sc.setLocalProperty("spark.jobGroup.id", None)
            sc.setLocalProperty("spark.job.description", None)
        until = watch.at + SECONDS
        assert watch.at and time.monotonic() < until, f"{name}: {caught.value}"
        assert name == "interrupt" or "cancel" in str(caught.value).lower()
        while busy(sc):
            assert time.monotonic() < until, f"{name}: jobs go on"
            time.sleep(0.02)
    assert torch.equal(flat(classifier(engine, epochs=1).fit(df).module), usual), "the session can be used as before"


@pytest.mark.parametrize("engine", ["barrier", "shuffle"])
def test_the_cancelled_cell_of_another_is_none_of_ours(spark: Any, engine: str) -> None:
    sc = spark.sparkContext
    with Cancels(lambda: sc.cancelJobGroup("another's cell"), again=True) as watch:
        model = classifier(engine, epochs=2, callbacks=[watch]).fit(frame(spark, X, Y, [50, 30]))
    assert watch.at and len([line for line in model.history if "step" not in line]) == 2


# %pip install -----------------------------------------------------------------------------------------------------------------

# Packages of the runtimes, as github.com/pietern/databricks-environments lists them in dbr/17.3.x-cpu-ml-scala2.13/constraints.txt
# (17.3.x-gpu-ml is the same in these), 16.4.x-cpu-ml-scala2.12, 15.4.x-cpu-ml-scala2.12 and 17.3.x-scala2.13; read in November 2026.
RUNTIMES = {
    "17.3 LTS ML": {"torch": "2.7.0", "numpy": "2.1.3", "pyarrow": "19.0.1", "safetensors": "0.6.2", "networkx": "3.4.2"},
    "16.4 LTS ML": {"torch": "2.6.0", "numpy": "1.26.4", "pyarrow": "15.0.2", "safetensors": "0.4.4", "networkx": "3.2.1"},
    "15.4 LTS ML": {"torch": "2.3.1", "numpy": "1.23.5", "pyarrow": "14.0.1", "safetensors": "0.4.2", "networkx": "3.1"},
    "17.3 LTS": {"numpy": "2.1.3", "pyarrow": "19.0.1"},
}


def required() -> list[Requirement]:
    """What setup.py asks for, read and not run."""
    for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())):
        if isinstance(node, ast.keyword) and node.arg == "install_requires":
            return [Requirement(text) for text in ast.literal_eval(node.value)]
    raise AssertionError("setup.py has no install_requires")


def brought(runtime: str) -> set[str]:
    """The packages that pip would install there: those that are absent, and those of a version that will not do."""
    there = RUNTIMES[runtime]
    return {need.name for need in required() if need.name not in there or there[need.name] not in need.specifier}


@pytest.mark.parametrize("runtime", ["17.3 LTS ML", "16.4 LTS ML"])
def test_pip_brings_nothing_that_an_ml_runtime_has(runtime: str) -> None:
    assert brought(runtime) == set()


def test_on_other_runtimes_pip_brings_what_is_not_there_and_the_docs_say_so() -> None:
    assert brought("17.3 LTS") == {"torch", "safetensors", "networkx"}
    assert brought("15.4 LTS ML") == {"torch", "numpy", "pyarrow", "safetensors"}  # the control: it is too old, and not supported
    page = " ".join((ROOT / "examples" / "guide" / "deployment.md").read_text().split())
    assert "16.4 LTS ML and 17.3 LTS ML" in page and "brings torch, safetensors and networkx" in page


def test_pip_brings_no_spark() -> None:
    assert "pyspark" not in {need.name for need in required()}
