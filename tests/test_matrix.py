"""The matrix of Sparks: what it asks pip for, how it counts, and the table in the docs that it writes."""

from __future__ import annotations

import datetime
from importlib import metadata
from pathlib import Path

import pytest

from tests import matrix
from tests.conftest import ROOT

XML = '<testsuites><testsuite name="pytest" errors="1" failures="2" skipped="3" tests="20" time="5.0"></testsuite></testsuites>'
PACKAGES = ("3.11.7", "2.13.0", "2.4.6", "2.3.3", "26.0.1")
OLD = f"before\n\n{matrix.BEGIN}\n\n{matrix.markdown([['3.5.1', *'abcdefghij'], ['2.4.8', *'abcdefghij']])}\n\n{matrix.END}\nafter\n"


def test_the_table_in_the_docs_is_that_of_the_matrix() -> None:
    found = matrix.rows(matrix.DOCS.read_text())
    assert [row[0] for row in found.values()] == [spark.name for spark in matrix.SPARKS]
    for row in found.values():
        said = dict(zip(matrix.HEAD, row, strict=True))
        assert int(said["passed"]) > 0 and min(int(said["failed"]), int(said["skipped"])) >= 0 and said["tests"]
        datetime.date.fromisoformat(said["on"])


def test_the_test_that_no_run_has_is_the_one_of_the_table() -> None:
    assert matrix.TABLE.split("::")[1] in globals()


def test_the_matrix_holds_the_spark_at_hand_or_an_older_one_of_its_line() -> None:
    """So that a new Spark is not only tried by chance."""
    assert ".".join(metadata.version("pyspark").split(".")[:2]) in {spark.line for spark in matrix.SPARKS}


def test_environments_differ_in_spark_alone() -> None:
    spark = matrix.Spark("3.5.9", needs=("NumPy<2",))
    fixed = dict(line.split("==") for line in matrix.constraints(spark) if "==" in line)
    assert fixed["torch"] == metadata.version("torch").split("+")[0] and fixed["pytest"] == metadata.version("pytest")
    assert not {"py4j", "numpy", "bigdl-lite"} & set(fixed), "numpy is the Spark's own business here"
    assert fixed["pyspark"] == "3.5.9" and "NumPy<2" in matrix.constraints(spark), "of every extra that asks for a Spark"
    assert matrix.requirements(spark) == [f"{ROOT}[test]", "pyspark==3.5.9", "NumPy<2"]
    assert "numpy" in dict(line.split("==") for line in matrix.constraints(matrix.Spark("3.5.9")))  # the control


def test_the_oldest_of_all_is_what_setup_py_asks_for() -> None:
    extras = ("pandas<3,>=2.2; extra == 'local'", "pyspark>=3.5; extra == 'local'", "pytest>=8; extra == 'test'")
    found = matrix.floors(["torch<2.14,>=2.4", *extras])
    assert found == ["pandas==2.2", "torch==2.4"]
    fixed = matrix.constraints(next(spark for spark in matrix.SPARKS if spark.oldest))
    assert {"numpy==1.26", "pyspark==3.5.0"} <= set(fixed) and f"torch=={metadata.version('torch').split('+')[0]}" not in fixed


def test_a_kept_environment_is_used_while_its_packages_are_those_that_are_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran, spark = list[list[str]](), matrix.SPARKS[-1]

    def run(command: list[str], check: bool) -> None:
        ran.append(command)
        (tmp_path / spark.version).mkdir(exist_ok=True)

    monkeypatch.setattr(matrix.subprocess, "run", run)
    python = matrix.environment(spark, tmp_path)
    assert [command[2] for command in ran] == ["venv", "pip", "pip"] and ran[1][-1].startswith("torch==")
    ran.clear()
    here = matrix.constraints(spark)
    monkeypatch.setattr(matrix, "constraints", lambda spark: [*here, "another-tool==1.0"])
    assert matrix.environment(spark, tmp_path) == python and not ran
    monkeypatch.setattr(matrix, "constraints", lambda spark: ["numpy==0.1", *(x for x in here if not x.startswith("numpy=="))])
    assert matrix.environment(spark, tmp_path) == python and len(ran) == 3, "the control: another NumPy is here now"


def test_counts_come_from_what_pytest_wrote() -> None:
    found = matrix.counted(XML, matrix.SPARKS[0], 12.0, PACKAGES)
    assert (found.passed, found.failed, found.skipped) == (14, 3, 3)


def test_a_row_takes_the_place_of_the_one_of_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text(OLD)
    monkeypatch.setattr(matrix, "DOCS", page)
    result = matrix.Result(matrix.SPARKS[1], 14, 0, 3, 12.0, PACKAGES)
    matrix.write([result], "2001-02-03")
    rows = matrix.rows(page.read_text())
    assert list(rows) == ["3.5"] and rows["3.5"][0] == matrix.SPARKS[1].version and rows["3.5"][-4:] == ("14", "0", "3", "2001-02-03")
    assert page.read_text().startswith("before\n") and page.read_text().endswith("\nafter\n")


def test_a_row_says_which_tests_ran() -> None:
    said = [matrix.Result(matrix.SPARKS[0], 1, 0, 0, 1.0, PACKAGES, *more).row("2001-02-03") for more in ((), ("tests/wire",))]
    at = matrix.HEAD.index("tests")
    assert [row[at] for row in said] == [matrix.ALL, "tests/wire"]
