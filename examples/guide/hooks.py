"""What the site is made of beside the pages here, run by mkdocs (see .mkdocs.yml).

    README.md, and files that a page links to     -> pages of their own; of tests, the functions that are named
    <!-- names: package folders -->               -> a ::: line for each public name from these folders
    docstrings                                    -> prose as prose, tables and examples as they were typed

A link in a page is written as in the repository, [text](../../README.md#engines), so that it works there too.
"""

from __future__ import annotations

import ast
import html
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[2]
_LINK = re.compile(r"\]\(\.\./\.\./([\w./-]+)(?:#([\w-]+))?\)")
_IN_README = re.compile(r"\]\((?!https?:)([\w./-]+)(?:#([\w-]+))?\)")
_NAMES = re.compile(r"<!-- names: (\w+)((?: \w+)*) -->")
_LANGUAGES = {".py": "python", ".md": "markdown", ".yaml": "yaml", ".yml": "yaml", ".sh": "sh"}


# ---- pages -----------------------------------------------------------------------------------------------------------


def on_files(files: Any, config: Any) -> Any:
    """Adds README.md, and a page for each file of the repository that it or some page links to."""
    linked: dict[str, set[str]] = {}
    for page in sorted(Path(config.docs_dir).glob("*.md")):
        for path, name in _LINK.findall(page.read_text()):
            linked.setdefault(path, set()).add(name)
    readme = (ROOT / "README.md").read_text()
    for path, _ in _IN_README.findall(readme):
        linked.setdefault(path, set()).add("")
    for path, names in linked.items():
        if page_of(path).startswith("source/") and (ROOT / path).exists():
            files.append(File.generated(config, page_of(path), content=_source(path, names - {""})))
    files.append(File.generated(config, "readme.md", content=_IN_README.sub(_in_site, readme)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    return _NAMES.sub(_names, _LINK.sub(_in_site, markdown))


def page_of(path: str) -> str:
    """The page of a file or folder of the repository."""
    if path == "README.md" or path.startswith("examples/guide/"):
        return path.removeprefix("examples/guide/").replace("README", "readme")
    return f"source/{path.strip('/').replace('.', '_')}.md"


def _in_site(found: re.Match[str]) -> str:
    path, name = found.groups()
    return f"]({page_of(path)}{f'#{name}' if name else ''})"


def _source(path: str, names: set[str]) -> str:
    """The text of a file; of a file of tests, the functions of these names; of a folder, what is in it."""
    if (ROOT / path).is_dir():
        return "\n".join(
            [f"# {path}", "", *(f"- `{each.name}`" for each in sorted((ROOT / path).iterdir()) if each.name[0] not in "._")]
        )
    text = (ROOT / path).read_text()
    language = _LANGUAGES.get(Path(path).suffix, "text")
    parts = [f"# {path}"]
    if names:
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef) and node.name in names:
                first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                lines = text.splitlines()[first - 1 : node.end_lineno]
                parts.append(f"## {node.name} {{#{node.name}}}\n\n{_fenced(lines, language)}")
    else:
        parts.append(_fenced(text.splitlines(), language))
    return "\n\n".join(parts) + "\n"


def _names(found: re.Match[str]) -> str:
    """`bigdl_lite ml data`: a ::: line for each name that `bigdl_lite` exports from its folders ml and data; without folders, all."""
    package, folders = found[1], found[2].split()
    where = exported(package)
    kept = [name for name, module in where.items() if not folders or module.split(".")[0] in folders]
    return "\n\n".join(f"::: {_dotted(package)}.{name}" for name in kept)


def _dotted(package: str) -> str:
    return "bigdl_lite" if package == "bigdl_lite" else f"bigdl_lite.{package}"


def exported(package: str) -> dict[str, str]:
    """{name: module} of what a package exports, sorted as there; read, not imported."""
    tree = ast.parse((ROOT / _dotted(package).replace(".", "/") / "__init__.py").read_text())
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "_WHERE":
            return ast.literal_eval(node.value)
    raise ValueError(f"{package}/__init__.py has no _WHERE")


# ---- docstrings ------------------------------------------------------------------------------------------------------


class AsTyped(griffe.Extension):
    """Docstrings here are plain text with tables, whose columns Markdown would run together."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_typed(obj.docstring.value)


def as_typed(docstring: str) -> str:
    """A docstring as Markdown that shows it as it was typed: paragraphs of prose, and the rest in fences."""
    parts: list[tuple[str, list[str]]] = []
    for paragraph in re.split(r"\n\s*\n", docstring.strip("\n")):
        lines = paragraph.splitlines()
        kind = _kind(lines)
        if parts and parts[-1][0] == kind != "prose":
            parts[-1][1].extend(["", *lines])
        else:
            parts.append((kind, lines))
    return "\n\n".join(_escaped(" ".join(lines)) if kind == "prose" else _fenced(lines, kind) for kind, lines in parts)


def _kind(lines: list[str]) -> str:
    if any(line.lstrip().startswith(">>> ") for line in lines):
        return "pycon"
    typed = any(line.startswith(" ") or re.search(r"\S {2,}\S", line) for line in lines)
    return "text" if typed else "prose"


def _fenced(lines: list[str], language: str) -> str:
    return "\n".join([f"````{language}", *lines, "````"])


def _escaped(prose: str) -> str:
    """Without Markdown's meaning, but for backticks."""
    parts = re.split(r"(`[^`]*`)", prose)
    return "".join(part if part.startswith("`") else re.sub(r"([\\*_\[\]#|])", r"\\\1", html.escape(part, False)) for part in parts)
