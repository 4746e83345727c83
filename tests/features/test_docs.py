"""The examples in the docstrings are run as they stand."""

from __future__ import annotations

import doctest
import importlib
import io
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from pyspark.sql import functions as F

from bigdl_lite import features

pytestmark = pytest.mark.timeout(240)  # the first of them starts the Python workers

ROOMS = ["embed", "encoder", "images", "net", "recommend", "sequences", "text"]


def example_folder(path: Path) -> str:
    for i, name in enumerate(("cat", "dog")):
        (path / name).mkdir(parents=True)
        png = io.BytesIO()
        PIL.Image.new("RGB", (4, 4), (i * 200, 0, 0)).save(png, "png")
        (path / name / f"{i}.png").write_bytes(png.getvalue())
    return str(path)


@pytest.mark.parametrize("room", ROOMS)
def test_the_examples_of_a_file_are_true(spark: Any, tmp_path: Path, room: str) -> None:
    module = importlib.import_module(f"bigdl_lite.features.{room}")
    given = {"spark": spark, "F": F, "torch": torch, "folder": example_folder(tmp_path / "images") if room == "images" else ""}
    given |= {name: getattr(features, name) for name in features.__all__} | vars(module)
    runner = doctest.DocTestRunner()
    tests = [test for test in doctest.DocTestFinder().find(module, globs=given) if test.examples]
    said = io.StringIO()
    for test in tests:
        runner.run(test, out=said.write)
    assert tests and not runner.failures, said.getvalue()


def test_every_public_name_has_an_example_or_is_shown_in_one() -> None:
    """A promise of the package, and what would let the test above pass without a single example."""
    text = "\n".join(
        example.source
        for room in ROOMS
        for test in doctest.DocTestFinder().find(importlib.import_module(f"bigdl_lite.features.{room}"))
        for example in test.examples
    )
    made_by_others = {"TableEncoderModel"}
    assert [name for name in features.__all__ if name not in text and name not in made_by_others] == []


def test_an_example_that_is_wrong_is_seen() -> None:
    """Negative control."""
    test = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, 0)
    runner = doctest.DocTestRunner()
    runner.run(test, out=lambda text: None)
    assert runner.failures == 1


def test_the_front_door_is_complete() -> None:
    assert set(features.__all__) == set(features._WHERE) and sorted(features.__all__) == features.__all__
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = features.Nothing
