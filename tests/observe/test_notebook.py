"""In a notebook: pictures are shown, and a bar without widgets is a plain bar."""

from __future__ import annotations

import textwrap

import pytest

from tests.conftest import ROOT

nbformat = pytest.importorskip("nbformat", reason="running a notebook needs nbformat, nbclient and ipykernel")
nbclient = pytest.importorskip("nbclient", reason="running a notebook needs nbformat, nbclient and ipykernel")
pytest.importorskip("ipykernel", reason="running a notebook needs nbformat, nbclient and ipykernel")
pytest.importorskip("matplotlib", reason="plots need matplotlib: pip install 'bigdl_lite[plot]'")

CELLS = {
    "set-up": f"""
        import sys
        sys.path.insert(0, {str(ROOT)!r})
        sys.modules["ipywidgets"] = None    # not installed
        from bigdl_lite.observe.events import Callbacks
        from bigdl_lite.observe.progress import Progress
        from bigdl_lite.observe.summary import Summary
        from tests.observe.made import history, start
        """,
    "bar": """
        lines = history(2, 5)
        with Callbacks([Progress()]) as told:
            for line in [start(10, 2), *lines]:
                told(line)
            told.ended(lines)
        """,
    "tqdm itself": """
        for name in [name for name in sys.modules if name.startswith("tqdm.auto")]:
            del sys.modules[name]
        import tqdm.auto
        """,
    "picture": "Summary(lines).plot()",
    "table": "Summary(lines)",
}


@pytest.fixture(scope="module")
def shown():
    """The outputs of each cell, by its name."""
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(textwrap.dedent(cell).strip()) for cell in CELLS.values()])
    nbclient.NotebookClient(book, timeout=60, kernel_name="python3").execute()
    return {name: cell.outputs for name, cell in zip(CELLS, book.cells, strict=True)}


def test_a_bar_without_widgets_is_plain_text_and_no_warning(shown):
    said = "".join(output.get("text", "") for output in shown["bar"])
    assert "10/10 [" in said and "epoch 2/2" in said and "Warning" not in said
    # so there was something to be silent about
    assert "IProgress not found" in "".join(output.get("text", "") for output in shown["tqdm itself"])


def test_a_picture_is_shown_once_and_a_summary_as_a_table(shown):
    (picture,) = shown["picture"]
    assert picture.data["image/png"].startswith("iVBORw0KGgo")  # PNG, in base64
    (table,) = shown["table"]
    assert table.data["text/plain"].startswith("Summary\n  engine") and "image/png" not in table.data
