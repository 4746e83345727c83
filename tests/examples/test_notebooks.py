"""The notebooks run from the first cell to the last: the one of Jupyter in a kernel and a session of its own, the one of Databricks
in a session that is given, as it is there."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT

nbformat = pytest.importorskip("nbformat", reason="running a notebook needs nbformat, nbclient and ipykernel")
nbclient = pytest.importorskip("nbclient", reason="running a notebook needs nbformat, nbclient and ipykernel")
pytest.importorskip("ipykernel", reason="running a notebook needs nbformat, nbclient and ipykernel")
pytest.importorskip("matplotlib", reason="plots need matplotlib: pip install 'bigdl_lite[plot]'")

NOTEBOOKS = ROOT / "examples" / "notebooks"
MACHINE = re.compile(r"(?<![\w.])/(?:home|root|tmp|usr|opt|work|mnt|private|Users|var)/")  # where somebody's files lie


def saved() -> Any:
    return nbformat.read(NOTEBOOKS / "quickstart.ipynb", as_version=4)


def outputs(book: Any, kind: str) -> list[Any]:
    return [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs if output.output_type == kind]


def shown(book: Any) -> str:
    """All text of all outputs."""
    plain = [output.data.get("text/plain", "") for output in outputs(book, "execute_result")]
    return "\n".join([*(output.text for output in outputs(book, "stream")), *plain])


def require_a_whole_run(book: Any) -> None:
    """No error, a bar that is full, a summary, a picture, good figures, and a model that is the same when it was loaded again."""
    text = shown(book)
    assert not outputs(book, "error")
    assert re.search(r"fit: 100%.* 88/88 \[.*epoch 8/8", text) and "Summary\n  engine      barrier, 2 workers" in text
    assert sum("image/png" in output.data for output in outputs(book, "execute_result")) == 1
    (figures,) = [ast.literal_eval(found) for found in re.findall(r"\{'accuracy'.*?\}", text, re.DOTALL)]
    assert min(figures.values()) >= 0.95
    assert text.splitlines()[-1] == "0"  # rows that differ


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_notebook_runs(tmp_path: Path) -> None:
    book = saved()
    for cell in book.cells:
        cell.outputs = [] if cell.cell_type == "code" else cell.get("outputs")
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    client = nbclient.NotebookClient(
        book, timeout=300, kernel_name="python3", coalesce_streams=True, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute(env={**os.environ, "PYTHONPATH": path})
    require_a_whole_run(book)


def test_what_is_saved_with_the_notebook_is_a_whole_run_of_no_machine_in_particular() -> None:
    book = saved()
    require_a_whole_run(book)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not MACHINE.search(shown(book)) and "Traceback" not in shown(book)
    assert (NOTEBOOKS / "quickstart.ipynb").stat().st_size < 200_000
    assert MACHINE.search("in /home/me/digits")  # so there is something that would be found


def cells(source: str) -> Iterator[str]:
    """The Python cells of a Databricks notebook in its source format; those of `# MAGIC` lines are left out."""
    head, source = source.split("\n", 1)
    assert head == "# Databricks notebook source"
    for cell in source.split("\n# COMMAND ----------\n"):
        lines = [line for line in cell.splitlines() if line.strip()]
        magic = [line.startswith("# MAGIC ") or line == "# MAGIC" for line in lines]
        assert all(magic) or not any(magic), "a cell is either of MAGIC lines or of Python"
        if lines and not all(magic):
            yield cell


def settings(spark: Any) -> Mapping[str, str]:
    return {row.key: row.value for row in spark.sql("SET").collect()}


@pytest.mark.timeout(300)
def test_the_notebook_for_databricks_runs_in_the_session_it_is_given(spark: Any, tmp_path: Path) -> None:
    source = (NOTEBOOKS / "databricks_quickstart.py").read_text()
    before, context = settings(spark), spark.sparkContext
    place: dict[str, Any] = {"spark": spark, "__name__": "__main__"}
    try:
        for number, cell in enumerate(cells(source.replace("/Volumes/main/default", str(tmp_path)))):
            exec(compile(cell, f"cell {number}", "exec"), place)
        assert place["accuracy"] >= 0.93
        assert place["wrong"].count() == round((1 - place["accuracy"]) * place["test"].count())  # SQL says the same
        assert (tmp_path / "models" / "digits" / "weights.safetensors").exists()
    finally:
        spark.catalog.dropTempView("digits_to_read")
        spark.sql("DROP TEMPORARY FUNCTION IF EXISTS read_digit")
    assert settings(spark) == before
    assert place["spark"] is spark and spark.sparkContext is context and spark.range(3).count() == 3


def test_the_notebook_for_databricks_makes_no_session_and_needs_no_tools_of_that_place() -> None:
    source = (NOTEBOOKS / "databricks_quickstart.py").read_text()
    code = "\n".join(cells(source))
    for word in ("local_session", "SparkSession", "SparkContext", ".stop(", "dbutils", "display("):
        assert word not in code
    assert "# MAGIC %pip install bigdl_lite\n" in source
    assert source.count("/Volumes/") == 1  # one line says where the model goes
