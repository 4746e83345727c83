"""doctor(spark): what it says of the session that the tests have, and what it says where something is wrong.

Rules are tried on made-up facts: each is silent about good ones and complains about a change that it is there for.
"""

from __future__ import annotations

import contextlib
import json
import logging
import subprocess
import sys
import threading
import types
from typing import Any

import pytest
from pyspark import cloudpickle

from bigdl_lite.comm.window import available
from bigdl_lite.engine.cluster import cluster_of
from bigdl_lite.errors import RecipeError
from bigdl_lite.ml import checks, doctor, facts
from bigdl_lite.ml.doctor import Diagnosis, choice, diagnose
from bigdl_lite.ml.facts import Facts, Place, Rank, Slow, Unknown
from bigdl_lite.ml.probe import by_value, here

NAMES = ["java", "packages", "slots", "barrier", "peers", "memory", "arrow", "gpu", "disk", "settings"]
VERSIONS = {"python": "3.11.7", "bigdl_lite": "0.1.0", "torch": "2.13.0+cpu", "pyarrow": "26.0.1", "numpy": "2.4.6"}
GIB = 2**30


def place(**other: Any) -> Place:
    given: dict[str, Any] = {
        "host": "a", "executor": "a:1", "cores": 4, "versions": VERSIONS, "memory": 8 * GIB, "memory_error": "",
        "disks": (("/data", 50 * GIB, ""),), "gpus": (), "gpu_devices": 0, "cuda": "", "thp": True, "driver_error": "",
    }  # fmt: skip
    return Place(**given | other)


def rank(number: int, **other: Any) -> Rank:
    return Rank(**{"rank": number, "host": "a", "seen": (0, 1), "listens": "", "unreached": {}} | other)


CONF = {
    "spark.python.daemon.module": "bigdl_lite.engine.daemon", "spark.python.unix.domain.socket.enabled": "true",
    "spark.sql.execution.arrow.maxRecordsPerBatch": "10000", "spark.sql.execution.arrow.pyspark.enabled": "true",
    "spark.driver.host": "10.0.0.1",
}  # fmt: skip
GOOD = Facts(
    spark="4.1.0", conf=CONF, driver=place(), classic=True, java="17.0.15", heap=GIB, most_result=GIB, master="spark://a:7077",
    local=False, elastic=False, encrypts=False, slots=2, engine="barrier", door=("10.0.0.1", 4000), tasks=[place(), place()],
    ranks=[rank(0), rank(1)], met_s=1.0,
)  # fmt: skip


def conf(**other: str) -> dict[str, Any]:
    """The good settings but for these; dots are written as double underscores."""
    changed = {**CONF, **{f"spark.{name.replace('__', '.')}": value for name, value in other.items()}}
    return {"conf": {name: value for name, value in changed.items() if value}}


def tasks(**other: Any) -> dict[str, Any]:
    """One of the two tasks runs on another host, where something is different."""
    return {"tasks": [place(), place(**{"host": "b", "executor": "b:1"} | other)]}


# ---- the session of the tests ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(spark: Any) -> Diagnosis:
    spark.sparkContext.parallelize(range(8), 8).map(lambda x: x).count()  # the workers have started
    return doctor.doctor(spark, deadline=60)


def test_a_good_session_passes_all_ten_checks(found: Diagnosis) -> None:
    assert [check.name for check in found.checks] == NAMES
    assert found.ok, found
    assert (found.engine, found.why) == ("barrier", "4 workers fit into 4 slots at once, on one machine")
    told = {check.name: check for check in found.checks}
    assert "on 1 of 1 executor" in told["packages"].found
    assert "4 slots in 1 executor on 1 host" in told["slots"].found and "numWorkers=None means 4" in told["slots"].found
    assert "4 tasks met" in told["barrier"].found
    assert told["peers"].found == "all 4 tasks reach the driver at 127.0.0.1; peers reach one another on 127.0.0.1"
    assert "torch is imported once an executor" in told["settings"].found


def test_it_is_a_value_that_reads_as_a_table(found: Diagnosis) -> None:
    lines = repr(found).splitlines()
    assert lines[0].startswith("bigdl_lite 0.1.0 on Spark ") and " local[4]: " in lines[0]
    assert 'engine="auto" takes "barrier"' in lines[1]
    starts = [line.split()[1] for line in lines[3:] if line[:4].strip() in ("ok", "warn", "fail")]
    assert starts == NAMES and max(map(len, lines)) <= 118
    assert Diagnosis(found.checks, found.engine, found.why, found.about, found.seconds) == found
    told = json.loads(json.dumps(found.to_dict()))
    assert told["ok"] is True and told["engine"] == "barrier" and [check["name"] for check in told["checks"]] == NAMES
    with pytest.raises(AttributeError):
        found.engine = "shuffle"  # type: ignore[misc]


def test_it_prints_nothing_and_leaves_nothing_behind(spark: Any, found: Diagnosis, capfd: Any) -> None:
    sc = spark.sparkContext
    sc.setJobDescription("mine")
    try:

        def state() -> Any:
            cached = sc._jsc.sc().getPersistentRDDs().size()
            mine = {thread.name for thread in threading.enumerate() if thread.name.startswith("bigdl_lite-doctor")}
            settings = sorted(map(tuple, spark.sql("SET").collect()))  # spark.conf.getAll has come with Spark 4
            return sorted(sc.getConf().getAll()), settings, cached, sc.getJobTags(), mine, sc._jsc.sc().isStopped()

        before = state()
        assert doctor.doctor(spark).seconds > 0
        assert state() == before and sc.getLocalProperty("spark.job.description") == "mine"
        assert capfd.readouterr() == ("", "")
    finally:
        sc.setJobDescription(None)


def test_where_other_jobs_hold_the_slots_it_says_so_and_cancels_what_it_asked(spark: Any, found: Diagnosis, tmp_path: Any) -> None:
    sc, gate, held = spark.sparkContext, tmp_path / "open", tmp_path / "held"
    path, mark = str(gate), str(held)

    def hold(rows: Any) -> Any:
        import os
        import time

        open(f"{mark}{next(iter(rows))}", "w").close()
        until = time.monotonic() + 60
        while not os.path.exists(path) and time.monotonic() < until:
            time.sleep(0.02)
        yield 1

    job = threading.Thread(target=lambda: sc.parallelize(range(4), 4).mapPartitions(hold).collect())
    job.start()
    try:
        until = threading.Event()
        while len(list(tmp_path.glob("held*"))) < 4:
            assert not until.wait(0.02)
        busy = {check.name: check for check in doctor.doctor(spark, deadline=3).checks}
    finally:
        gate.touch()
        job.join(60)
    assert busy["slots"].status == "fail" and "0 of 4 tasks had started: other jobs hold the slots" in busy["slots"].found
    assert all(busy[name].status == "warn" and "see slots" in busy[name].found for name in ("packages", "barrier", "peers", "disk"))
    assert busy["java"].status == busy["arrow"].status == "ok", "what needs no task is known"
    assert not sc.statusTracker().getActiveJobsIds()


@pytest.mark.parametrize("closed", [True, False], ids=["no address", "nobody listens"])
def test_a_driver_that_cannot_be_called_is_a_warning(spark: Any, found: Diagnosis, monkeypatch: Any, closed: bool) -> None:
    @contextlib.contextmanager
    def elsewhere(host: str, token: str) -> Any:
        if closed:
            with real("203.0.113.1", token) as way:  # an address that no machine has
                yield way
        with real(host, token) as way:
            pass
        yield way

    real = facts._door
    monkeypatch.setattr(facts, "_door", elsewhere)
    told = {check.name: check for check in doctor.doctor(spark, deadline=60).checks}["peers"]
    assert told.status == "warn" and "takes no checkpoints" in told.advice and "peers reach one another" in told.found
    assert ("the driver cannot listen on" if closed else "4 of 4 tasks cannot reach the driver at 127.0.0.1: PeerLost") in told.found


def test_a_deadline_that_no_task_can_keep_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"deadline=1\.0: the tasks of doctor need 3\.0 seconds"):
        doctor.doctor(None, deadline=1.0)  # type: ignore[arg-type]


def test_an_executor_without_the_package_says_so(tmp_path: Any) -> None:
    """The task in a Python that has no bigdl_lite."""
    (tmp_path / "task").write_bytes(cloudpickle.dumps(here(("127.0.0.1", 9, "x" * 32), 0.1, by_value(available))))
    code = (
        "import json, pickle, sys\n"
        "sys.meta_path = [finder for finder in sys.meta_path if 'editable' not in str(finder)]\n"
        "print(json.dumps(next(pickle.load(open('task', 'rb'))(()))))\n"
    )
    done = subprocess.run(
        [sys.executable, "-P" if sys.version_info >= (3, 11) else "-I", "-c", code], cwd=tmp_path, env={"PATH": ""}, text=True,
        capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["versions"]["bigdl_lite"] == "" and told["versions"]["torch"] and told["memory"] > 0
    assert "No module named 'bigdl_lite'" in told["driver_error"]
    (check,) = [c for c in diagnose(GOOD.but(tasks=[place(versions=told["versions"])])).checks if c.name == "packages"]
    assert check.status == "fail" and "bigdl_lite is absent on a:1" in check.found and "--py-files" in check.advice


# ---- the rules ---------------------------------------------------------------------------------------------------------


def test_good_facts_are_good() -> None:
    assert [(c.name, c.status, c.advice) for c in diagnose(GOOD).checks] == [(name, "ok", "") for name in NAMES]


LOST = {1: "PeerLost: rank 1 at b:4001 cannot be reached: refused"}


@pytest.mark.parametrize(
    ("name", "status", "word", "change"),
    [
        ("java", "fail", "JAVA_HOME", {"java": "1.8.0_402"}),
        ("java", "warn", "JAVA_HOME", {"java": "25.0.1"}),
        ("java", "ok", "8, 11, 17", {"java": "1.8.0_402", "spark": "3.5.3"}),
        ("java", "warn", "8, 11, 17", {"java": "21.0.1", "spark": "3.5.3"}),
        ("packages", "fail", "torch is 2.12.1 on b:1", tasks(versions={**VERSIONS, "torch": "2.12.1"})),
        ("packages", "warn", "torch is 2.13.1 on b:1", tasks(versions={**VERSIONS, "torch": "2.13.1"})),
        ("packages", "fail", "bigdl_lite is 0.1.1 on b:1", tasks(versions={**VERSIONS, "bigdl_lite": "0.1.1"})),
        ("packages", "fail", "python is 3.12.7 on b:1", tasks(versions={**VERSIONS, "python": "3.12.7"})),
        ("packages", "warn", "python is 3.11.9 on b:1", tasks(versions={**VERSIONS, "python": "3.11.9"})),
        ("packages", "warn", "numpy is 1.26.4 on b:1", tasks(versions={**VERSIONS, "numpy": "1.26.4"})),
        ("packages", "fail", "pyarrow is absent on b:1", tasks(versions={**VERSIONS, "pyarrow": ""})),
        ("slots", "fail", "no executor has registered", {"slots": 0}),
        ("slots", "fail", "No module named", {"tasks": RuntimeError("ModuleNotFoundError: No module named 'bigdl_lite'\n\tat org.x")}),
        ("slots", "warn", "once more", {"tasks": Slow("within 8 s the Python workers of 2 tasks did not all start")}),
        ("slots", "warn", "set numWorkers", {"elastic": True, "engine": "shuffle"}),
        ("slots", "warn", "2 slots on the 1 core of a", {"tasks": [place(cores=1), place(cores=1)]}),
        ("barrier", "warn", "spark.dynamicAllocation.enabled", {"elastic": True, "engine": "shuffle"}),
        ("barrier", "ok", "2 tasks met", {"elastic": True, "local": True}),
        ("barrier", "fail", 'engine="shuffle"', {"ranks": TimeoutError("after 2.0 s 1 of 2 tasks had started")}),
        ("peers", "warn", "set it to an address", {"door": OSError("Cannot assign requested address")}),
        ("peers", "warn", "1 of 2 tasks cannot reach the driver at 10.0.0.1", tasks(driver_error="MeetingTimeout: nobody")),
        ("peers", "fail", "rank 0 on a cannot reach rank 1", {"ranks": [rank(0, seen=(0,), unreached=LOST), rank(1, host="b")]}),
        ("peers", "warn", "rank 0 on a cannot reach rank 1", {"ranks": [rank(0, unreached=LOST), rank(1)]}),
        ("peers", "fail", "cannot listen on c", {"ranks": [rank(0, seen=(0,), host="c", listens="OSError: x"), rank(1, seen=(1,))]}),
        ("peers", "ok", "shuffle needs none", {"elastic": True, "ranks": Unknown("no barrier stage was tried")}),
        ("peers", "warn", "without a barrier stage", {"ranks": TimeoutError("late")}),
        ("memory", "warn", "more memory", tasks(memory=GIB // 2)),
        ("memory", "warn", "over sockets", tasks(memory_error="Function not implemented")),
        ("memory", "warn", "rank 1 cannot look at the memory of rank 0", {"ranks": [rank(0), rank(1, seen=(1,))]}),
        ("memory", "ok", "", {"ranks": [rank(0, seen=(0,)), rank(1, seen=(1,), host="b")]}),
        ("arrow", "warn", "pyspark.enabled=true", conf(sql__execution__arrow__pyspark__enabled="false")),
        ("arrow", "warn", "one batch", conf(sql__execution__arrow__maxRecordsPerBatch="0")),
        ("arrow", "warn", "maxRecordsPerBatch=10000", conf(sql__execution__arrow__maxRecordsPerBatch="100")),
        ("arrow", "fail", "ValueError", conf(sql__execution__arrow__maxRecordsPerBatch="many")),
        ("gpu", "warn", "b has 8 GPUs, and tasks are given none", tasks(gpu_devices=8)),
        ("gpu", "fail", "no task was given a GPU", conf(task__resource__gpu__amount="1")),
        ("gpu", "fail", "finds no CUDA", tasks(gpus=("3",), cuda="torch 2.13.0+cpu finds no CUDA")),
        ("gpu", "ok", "1 of 2 tasks have a GPU", tasks(gpus=("3",), cuda="yes")),
        ("gpu", "warn", "NCCL", {**tasks(gpus=("3",), cuda="yes"), **conf(task__resource__gpu__amount="0.5")}),
        ("disk", "fail", "b cannot write to /data", tasks(disks=(("/data", 0, "Permission denied"),))),
        ("disk", "warn", "512 MiB free in /data on b", tasks(disks=(("/data", GIB // 2, ""),))),
        ("settings", "warn", "saves 2 to 4 s each", conf(python__daemon__module="")),
        ("settings", "warn", "48 ms for 96 ms", conf(python__unix__domain__socket__enabled="")),
        ("settings", "ok", "", {**conf(python__unix__domain__socket__enabled=""), "spark": "4.0.1"}),
        ("settings", "warn", "worker.reuse=true", conf(python__worker__reuse="false")),
        ("settings", "warn", "THP_MEM_ALLOC_ENABLE=1", tasks(thp=False)),
        ("settings", "warn", "allow_clear=True", {"encrypts": True, "engine": "shuffle"}),
        ("settings", "warn", "no checkpoints", {"encrypts": True, "local": True}),
        ("settings", "warn", "raise spark.driver.memory", {"heap": 64 * 2**20}),
        ("settings", "ok", "without limit", {"most_result": 0}),
    ],
)  # fmt: skip
def test_each_rule_complains_of_what_it_is_there_for(name: str, status: str, word: str, change: dict[str, Any]) -> None:
    told = {check.name: check for check in diagnose(GOOD.but(**change)).checks}
    assert told[name].status == status and word in f"{told[name].found} {told[name].advice}", told[name]


def test_the_readme_has_the_gains_that_the_settings_promise(request: Any) -> None:
    readme = (request.config.rootpath / "README.md").read_text()
    table = readme[readme.index("## On a cluster") :]
    promised = diagnose(GOOD.but(**conf(python__daemon__module="", python__unix__domain__socket__enabled=""), **tasks(thp=False)))
    advice = promised.checks[-1].advice
    for gain in ("2 to 4 s", "48 ms", "96 ms", "20 % of a backward pass with 25 M parameters"):
        assert gain in advice and gain in table


def test_a_rule_that_raises_has_failed_with_its_reason_and_the_others_go_on(monkeypatch: Any) -> None:
    def broken(known: Facts) -> Any:
        raise KeyError("odd")

    monkeypatch.setattr(checks, "RULES", {**checks.RULES, "arrow": broken})
    monkeypatch.setattr(doctor, "RULES", checks.RULES)
    found = diagnose(GOOD)
    assert not found.ok and [c.name for c in found.checks if c.status == "fail"] == ["arrow"]
    assert next(c.found for c in found.checks if c.name == "arrow") == "KeyError: 'odd'"


def test_a_fact_that_raises_when_it_is_asked_for_is_the_finding_of_its_rule() -> None:
    told = {check.name: check for check in diagnose(GOOD.but(java=RuntimeError("no JVM"))).checks}
    assert (told["java"].status, told["java"].found) == ("fail", "RuntimeError: no JVM")
    assert {check.status for name, check in told.items() if name != "java"} == {"ok"}


def test_of_an_error_of_spark_the_python_line_is_shown() -> None:
    error = RuntimeError(
        "An error occurred while calling z:org.apache.spark.api.python.PythonRDD.collectAndServe.\n: org.apache.spark.SparkException: "
        "Job aborted\nTraceback (most recent call last):\n  File x\nModuleNotFoundError: No module named 'bigdl_lite'\n\tat org.x"
    )
    assert checks.said(error) == "RuntimeError: ModuleNotFoundError: No module named 'bigdl_lite'"


# ---- the engine --------------------------------------------------------------------------------------------------------


def session(master: str, free: int, **settings: str) -> Any:
    """What engines.choose asks of a session."""
    scala = types.SimpleNamespace(
        maxNumConcurrentTasks=lambda profile: free,
        resourceProfileManager=lambda: types.SimpleNamespace(defaultResourceProfile=lambda: None),
    )
    given = {f"spark.{name.replace('__', '.')}": value for name, value in settings.items()}
    inner = types.SimpleNamespace(sc=lambda: scala)
    context = types.SimpleNamespace(master=master, applicationId="app", _jsc=inner, getConf=lambda: given)
    return types.SimpleNamespace(sparkContext=context, _jsparkSession=None)


@pytest.mark.parametrize(
    ("master", "settings", "engine", "word"),
    [
        ("local[2]", {}, "barrier", "on one machine"),
        ("local[2]", {"io__encryption__enabled": "true"}, "barrier", "on one machine"),
        ("spark://a:7077", {}, "barrier", "the number of executors is fixed"),
        ("yarn", {"dynamicAllocation__enabled": "true"}, "shuffle", "dynamicAllocation"),
        ("yarn", {"network__crypto__enabled": "true"}, "shuffle", "encryption"),
    ],
)
def test_the_reason_is_that_of_the_choice(master: str, settings: dict[str, str], engine: str, word: str) -> None:
    spark = session(master, 2, **settings)
    cluster = cluster_of(spark)
    known = GOOD.but(engine=facts._choice(spark), local=cluster.beside, elastic=cluster.elastic, encrypts=cluster.encrypts)
    found, why = choice(known)
    assert found == engine and word in why


def test_where_barrier_is_chosen_and_does_not_work_the_reason_says_so() -> None:
    engine, why = choice(GOOD.but(ranks=TimeoutError("late")))
    assert engine == "barrier" and 'see barrier: until that is mended, set engine="shuffle"' in why


def test_without_slots_no_engine_can_be_chosen(caplog: Any) -> None:
    with caplog.at_level(logging.INFO, "bigdl_lite"):
        engine, why = choice(GOOD.but(slots=0, engine=RecipeError("numWorkers is 0, must be at least 1")))
    assert engine == "" and "numWorkers is 0" in why
