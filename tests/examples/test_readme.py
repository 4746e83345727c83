"""What the README shows is run as it stands."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from torch import nn

from bigdl_lite import TorchClassifier
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def df(spark: Any) -> Any:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, 4)).astype("f4")
    rows = [(a.tolist(), int(b)) for a, b in zip(x, (x @ rng.standard_normal((4, 3))).argmax(1), strict=True)]
    return spark.createDataFrame(rows, "features array<float>, label long").repartition(2).cache()


def block(word: str) -> str:
    """The one Python block in which a word stands."""
    (found,) = [text for text in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if word in text]
    return found


def test_the_codec_of_the_readme_trains_by_value_in_all_engines(df: Any) -> None:
    text = block("class Float8")
    assert len(text.strip().splitlines()) < 40
    here: dict[str, Any] = {"df": df, "__name__": "__main__"}
    exec(compile(text, "README.md", "exec"), here)  # by its text: it is not a module that workers could import
    codec, sent = here["Float8"](), here["model"].history[0]["bytes_sent"]
    losses = {}
    for engine in ("local", "barrier", "shuffle"):
        est = TorchClassifier(
            module=lambda: nn.Linear(4, 3), exchange=codec, batchSize=32, epochs=5, engine=engine, numWorkers=2, progress="none"
        )
        losses[engine] = [line["loss"] for line in est.fit(df).history]
    assert losses["local"] == losses["barrier"] == losses["shuffle"] and losses["local"][-1] < losses["local"][0]
    assert sent > 0


def test_a_method_is_tried_on_skewed_rows_and_slow_workers(df: Any, capsys: pytest.CaptureFixture[str]) -> None:
    here: dict[str, Any] = {"df": df, "nn": nn, "TorchClassifier": TorchClassifier, "__name__": "__main__"}
    exec(compile(block("import Delays"), "README.md", "exec"), here)
    assert "times each worker was in time" in capsys.readouterr().out
    assert any("accepted" in line for line in here["model"].history)


def test_names_of_exchanges_and_algorithms_in_the_readme_are_those_of_the_package() -> None:
    from bigdl_lite.algorithms import CATALOGUE, EXCHANGES

    part = README[README.index("## How updates travel") : README.index("## When things break")]
    tables = [line.split("|")[1] for line in part.splitlines() if line.startswith("| `")]
    named = {name for cell in tables for name in re.findall(r'"([a-z0-9-]+)"', cell)}
    assert named == {*EXCHANGES, *CATALOGUE}
