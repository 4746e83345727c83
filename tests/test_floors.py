"""Imports go down, outside libraries have doors, and importing the package starts nothing.

The rules are read out of the source with ast; a fabricated tree that breaks each of them shows that the reader sees it.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "bigdl_lite"
MOST_LINES = 350

FLOORS = {
    "vector": 0, "batch": 0, "errors": 0,
    "wire": 1, "data": 1, "model": 1,
    "comm": 2, "compression": 2, "coding": 2, "graph": 2,
    "algorithms": 3, "embedding": 3, "parallel": 3,
    "engine": 4, "plan": 4, "observe": 4,
    "ml": 5, "testing": 5, "features": 5,
    "__init__": 6,  # the front door sees every floor, and nobody inside goes through it
}  # fmt: skip
GROUND_FILES = {"vector", "batch", "errors"}  # they share one folder: the package's own

# the files (or folders, with a slash) through which an outside library may be reached
_WITH_SPARK = (
    "spark", "cluster", "arrange", "direct", "barrier", "hall", "stage",
    "shuffle", "routes", "shipped", "pack", "profile", "session", "daemon", "worker",
)  # fmt: skip
SPARK = {f"engine/{name}.py" for name in _WITH_SPARK} | {"ml/", "features/", "testing/skew.py"}
DOORS = {
    "pyspark": SPARK,
    "py4j": SPARK,
    "torch.distributed": {"comm/group.py"},
    "pyarrow": {"data/", "engine/", "ml/", "features/"},
    "pickling": {"engine/pack.py"},
}
PICKLERS = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "copyreg"}
TORCH_PICKLERS = {"torch.load", "torch.save", "torch.serialization"}


def names(path: str, text: str) -> Iterator[str]:
    """Every dotted name that a file imports, and every torch.<name> that it uses."""
    folder = [PACKAGE, *path.split("/")[:-1]]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [] if not node.level else folder[: len(folder) - node.level + 1]
            yield from (".".join([*base, *([node.module] if node.module else []), alias.name]) for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
            yield f"torch.{node.attr}"


def room(path: str) -> str:
    """The folder of a file, or the file itself where it lies on the ground."""
    return path.split("/")[0].removesuffix(".py")


def libraries(name: str) -> set[str]:
    """The guarded libraries that a dotted name reaches."""
    parts = name.split(".")
    found = {parts[0], ".".join(parts[:2])} & DOORS.keys()
    if PICKLERS & set(parts) or any((name + ".").startswith(p + ".") for p in TORCH_PICKLERS):
        found.add("pickling")
    return found


def faults(files: Mapping[str, str]) -> list[str]:
    """What is wrong in a tree of sources, path -> text; paths are relative to the package."""
    wrong = []
    for path, text in sorted(files.items()):
        here = room(path)
        if here not in FLOORS:
            wrong.append(f"{path}: {here!r} has no floor")
            continue
        if text.count("\n") > MOST_LINES:
            wrong.append(f"{path}: {text.count(chr(10))} lines, at most {MOST_LINES}")
        for name in names(path, text):
            for library in libraries(name):
                if not any(path == door or (door.endswith("/") and path.startswith(door)) for door in DOORS[library]):
                    wrong.append(f"{path}: {name} is no business of this file")
            parts = name.split(".")
            if parts[0] != PACKAGE:
                continue
            there = parts[1] if len(parts) > 1 else "__init__"
            if there not in FLOORS or there == "__init__":
                wrong.append(f"{path}: {name} goes through the front door")
            elif FLOORS[there] > FLOORS[here]:
                wrong.append(f"{path}: {name} goes up")
            elif FLOORS[there] == FLOORS[here] and there != here and not {there, here} <= GROUND_FILES:
                wrong.append(f"{path}: {name} is a neighbour's")
    return wrong


def sources() -> dict[str, str]:
    home = ROOT / PACKAGE
    return {str(path.relative_to(home)): path.read_text(encoding="utf-8") for path in sorted(home.rglob("*.py"))}


def test_imports_go_down_and_every_library_has_its_door() -> None:
    lengthy = [fault for fault in faults(sources()) if " lines, " not in fault]
    assert not lengthy, "\n".join(lengthy)


def test_every_file_can_be_read_in_one_sitting() -> None:
    assert not [fault for fault in faults(sources()) if " lines, " in fault]


def test_the_reader_finds_the_package() -> None:
    assert {"vector.py", "comm/group.py", "ml/estimator.py"} <= sources().keys()


@pytest.mark.parametrize(
    ("path", "text", "said"),
    [
        ("comm/x.py", "from bigdl_lite.engine.recipe import Recipe", "goes up"),
        ("comm/x.py", "def f():\n    import bigdl_lite.ml.model", "goes up"),
        ("comm/x.py", "from ..ml import model", "goes up"),
        ("batch.py", "from bigdl_lite.wire import frame", "goes up"),
        ("wire/x.py", "from bigdl_lite.data.arrow import share", "a neighbour's"),
        ("engine/x.py", "from bigdl_lite import observe", "a neighbour's"),
        ("ml/x.py", "from bigdl_lite import TorchModel", "front door"),
        ("ml/x.py", "import bigdl_lite", "front door"),
        ("helpers/x.py", "", "has no floor"),
        ("algorithms/x.py", "from pyspark.sql import DataFrame", "no business"),
        ("engine/rank.py", "import pyspark", "no business"),
        ("engine/x.py", "import torch.distributed as dist", "no business"),
        ("engine/x.py", "from torch import distributed", "no business"),
        ("engine/x.py", "import torch\ntorch.distributed.barrier()", "no business"),
        ("engine/spark.py", "import pickle", "no business"),
        ("ml/x.py", "from pyspark import cloudpickle", "no business"),
        ("data/x.py", "import torch\ntorch.load('x')", "no business"),
        ("model/x.py", "import pyarrow.compute as pc", "no business"),
        ("wire/x.py", "\n" * 351, "at most 350"),
    ],
)
def test_the_reader_sees_what_is_forbidden(path: str, text: str, said: str) -> None:
    found = faults({path: text})
    assert len(found) == 1 and said in found[0], found


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("batch.py", "from bigdl_lite.errors import DataError\nfrom . import vector"),
        ("comm/x.py", "from bigdl_lite.comm.block import Block\nfrom ..vector import Cut"),
        ("comm/group.py", "import torch.distributed as dist"),
        ("engine/pack.py", "from pyspark import cloudpickle"),
        ("ml/x.py", "from safetensors.torch import load, save\nimport pyspark"),
        ("__init__.py", "from bigdl_lite.ml.model import TorchModel"),
    ],
)
def test_the_reader_is_silent_about_what_is_allowed(path: str, text: str) -> None:
    assert faults({path: text}) == []


def test_importing_the_package_loads_no_library_and_starts_nothing() -> None:
    code = (
        "import sys, json, threading\n"
        "before = set(sys.modules)\n"
        "import bigdl_lite\n"
        "heavy = {'torch', 'pyspark', 'py4j', 'pyarrow', 'numpy', 'pandas', 'socket', 'subprocess', 'multiprocessing'}\n"
        "children = open(f'/proc/self/task/{threading.get_native_id()}/children').read().split()\n"
        "print(json.dumps([sorted(heavy & (set(sys.modules) - before)), threading.active_count(), children]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    loaded, threads, children = json.loads(done.stdout)
    assert (loaded, threads, children) == ([], 1, [])


def test_what_the_front_door_promises_is_sorted_complete_and_there() -> None:
    import bigdl_lite

    in_order = sorted(bigdl_lite.__all__, key=lambda name: (not name.isupper(), name[0].islower(), name))  # as ruff sorts them
    assert bigdl_lite.__all__ == in_order and set(bigdl_lite.__all__) == set(bigdl_lite._WHERE)
    for name, where in bigdl_lite._WHERE.items():
        path = ROOT / PACKAGE / (where.replace(".", "/") + ".py")
        body = ast.parse(path.read_text(encoding="utf-8")).body
        defined = {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        assert name in defined, f"{name} is not defined in {path}"
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = bigdl_lite.Nothing
