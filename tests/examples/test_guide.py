"""The guide: its Python runs as it stands, its pages become a site, and what it claims of tests is there."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import bigdl_lite
from bigdl_lite import features
from tests.conftest import ROOT

pytestmark = pytest.mark.timeout(300)  # the first page starts the Python workers

GUIDE = ROOT / "examples" / "guide"
PAGES = sorted(page.stem for page in GUIDE.glob("*.md"))
NEEDS = {"watching": ["matplotlib", "tensorboard", "mlflow"], "data": ["PIL"]}  # what a page says that it needs


def blocks(page: str) -> list[str]:
    """The Python of a page, with its line numbers, so that an error names the line of the page."""
    text = (GUIDE / f"{page}.md").read_text()
    return ["\n" * text[: found.start(1)].count("\n") + found[1] for found in re.finditer(r"```python\n(.*?)```", text, re.DOTALL)]


def run(page: str, here: dict[str, Any]) -> dict[str, Any]:
    for block in blocks(page):
        exec(compile(block, str(GUIDE / f"{page}.md"), "exec"), here)
    return here


# ---- snippets --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def start(spark: Any) -> dict[str, Any]:
    """What the first page leaves behind, on which all others go on."""
    here = run("index", {"__name__": "__main__"})
    assert here["spark"] is spark
    here["df"].cache()
    return here


def test_the_first_page_trains_a_classifier(start: dict[str, Any]) -> None:
    losses = start["model"].summary.objectiveHistory
    assert len(losses) == 5 and losses[-1] < losses[0]


ALWAYS = ("training", "inference")  # the other pages take a minute together


@pytest.mark.parametrize(
    "page",
    [page if page in ALWAYS else pytest.param(page, marks=pytest.mark.slow) for page in PAGES if page != "index" and blocks(page)],
)
def test_the_python_of_a_page_runs_as_it_stands(
    start: dict[str, Any], page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for library in NEEDS.get(page, []):
        pytest.importorskip(library)
    monkeypatch.chdir(tmp_path)  # where mlflow makes a folder
    run(page, {**start, "folder": str(tmp_path)})


def test_python_that_is_wrong_is_seen_with_the_line_of_its_page(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Negative control."""
    monkeypatch.setitem(globals(), "GUIDE", tmp_path)
    (tmp_path / "wrong.md").write_text("# Wrong\n\n```python\nx = 1\nassert x == 2\n```\n")
    with pytest.raises(AssertionError) as caught:
        run("wrong", {})
    assert caught.traceback[-1].lineno == 4  # from 0


# ---- the table that compares -----------------------------------------------------------------------------------------


def claims(text: str) -> list[tuple[str, list[str]]]:
    """(feature, cells) of each row of the table of features."""
    rows = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return [(cells[0], cells[1:]) for cells in rows[2:]]


def wrong(text: str) -> list[str]:
    """The rows whose first cell says yes without a test of this repository, or with one that is not there."""
    found = []
    for feature, cells in claims(text):
        links = re.findall(r"\]\(\.\./\.\./(tests/[\w/]+\.py)#(test_\w+)\)", cells[0])
        missing = [f"{path}::{name}" for path, name in links if name not in functions(path)]
        if missing or (not links and not cells[0].startswith(("no", "not yet"))):
            found.append(f"{feature}: {missing or cells[0]}")
    return found


def functions(path: str) -> set[str]:
    file = ROOT / path
    return {node.name for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)} if file.is_file() else set()


def test_every_yes_of_ours_is_a_test_of_this_repository() -> None:
    text = (GUIDE / "feature_table.md").read_text()
    assert len(claims(text)) > 25 and wrong(text) == []


def test_what_others_have_is_cited_or_not_claimed() -> None:
    """A cell has a footnote with a link, or is "?" or "n/a"; and every footnote is used."""
    text = (GUIDE / "feature_table.md").read_text()
    notes = set(re.findall(r"^\[\^(\w+)\]:.*https?://", text, re.MULTILINE))
    for feature, cells in claims(text):
        for cell in cells[1:]:
            used = set(re.findall(r"\[\^(\w+)\]", cell))
            assert cell in ("?", "n/a") or (used and used <= notes), (feature, cell)
    assert notes == set(re.findall(r"\[\^(\w+)\](?!:)", text))


@pytest.mark.parametrize("cell", ["yes", "[yes](../../tests/conftest.py#test_of_nothing)", "[yes](../../tests/nothing.py#test_x)"])
def test_a_claim_without_its_test_is_seen(cell: str) -> None:
    """Negative control."""
    assert len(wrong(f"| feature | bigdl_lite |\n|---|---|\n| flies | {cell} |\n")) == 1


# ---- the site --------------------------------------------------------------------------------------------------------


class Links(HTMLParser):
    """The ids of a page, and where it points to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.targets: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.ids |= {given[key] or "" for key in ("id", "name") if key in given}
        self.targets += [given[key] or "" for key in ("href", "src") if key in given]


def broken(site: Path) -> list[str]:
    """Links inside the site that lead nowhere."""
    pages = {path.relative_to(site).as_posix(): Links(path.read_text()) for path in site.rglob("*.html")}
    pages.pop("404.html", None)  # is shown anywhere, so its links begin at the root of a server
    found = []
    for name, page in pages.items():
        for target in page.targets:
            path, _, anchor = target.partition("#")
            if re.match(r"\w+:|//|$", path) and (path or not anchor):
                continue
            to = (site / name).parent.joinpath(path).resolve() if path else site / name
            other = pages.get(to.relative_to(site).as_posix()) if to.is_relative_to(site) else None
            if not to.exists() or (anchor and other is not None and anchor not in other.ids and anchor != "__"):
                found.append(f"{name}: {target}")
    return found


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The guide, built as .mkdocs.yml says, where a warning is an error."""
    for library, package in (("mkdocs", "mkdocs"), ("mkdocstrings_handlers", "mkdocstrings"), ("material", "mkdocs-material")):
        if importlib.util.find_spec(library) is None:
            pytest.skip(f"the site needs {package}: pip install 'bigdl_lite[docs]'")
    folder = tmp_path_factory.mktemp("site").resolve()
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(ROOT / ".mkdocs.yml"), "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_site_is_built_without_a_warning_and_every_page_is_in_it(site: Path) -> None:
    assert [page for page in PAGES if not (site / f"{page}.html").is_file()] == []
    assert (site / "readme.html").is_file() and (site / "summary.png").is_file()


def test_no_link_inside_the_site_leads_nowhere(site: Path) -> None:
    assert broken(site) == []


def repeated(text: str) -> list[str]:
    """Headings that a page has more than once."""
    headings = re.findall(r"^#+ .*", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
    return [heading for heading, times in Counter(headings).items() if times > 1]


def test_no_section_stands_twice() -> None:
    assert [(page, found) for page in PAGES if (found := repeated((GUIDE / f"{page}.md").read_text()))] == []
    assert repeated((ROOT / "README.md").read_text()) == []
    assert repeated("# A\n```bash\n# run\n# run\n```\n## B\ntext\n## B\n") == ["## B"]


def test_a_link_that_leads_nowhere_is_seen(tmp_path: Path) -> None:
    """Negative control."""
    (tmp_path / "a.html").write_text('<h1 id="top">A</h1><a href="#top">1</a><a href="#end">2</a><a href="b.html">3</a>')
    assert broken(tmp_path.resolve()) == ["a.html: #end", "a.html: b.html"]


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    ids = {name for path in site.glob("reference_*.html") for name in Links(path.read_text()).ids}
    assert [name for name in bigdl_lite.__all__ if f"bigdl_lite.{name}" not in ids] == []
    assert [name for name in features.__all__ if f"bigdl_lite.features.{name}" not in ids] == []
    assert "bigdl_lite.Nothing" not in ids


def test_docstrings_keep_their_tables() -> None:
    if importlib.util.find_spec("mkdocs") is None or importlib.util.find_spec("griffe") is None:
        pytest.skip("the hooks of the site need mkdocs: pip install 'bigdl_lite[docs]'")
    spec = importlib.util.spec_from_file_location("guide_hooks", GUIDE / "hooks.py")
    assert spec and spec.loader
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    text = "Prose with a_name, a <b> and `code`\nin two lines.\n\nx  [n] float32\ny  an `index`\n\n>>> 1 + 1\n2\n\n    a    b\n"
    prose, table, example, more = hooks.as_typed(text).split("\n\n")
    assert prose == "Prose with a\\_name, a &lt;b&gt; and `code` in two lines."
    assert table == "````text\nx  [n] float32\ny  an `index`\n````" and more == "````text\n    a    b\n````"
    assert example == "````pycon\n>>> 1 + 1\n2\n````"
