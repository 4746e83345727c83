"""One Spark session for the whole run, and the small problems that the tests train on."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def spark() -> Iterator[Any]:
    """Four slots on whatever cores there are."""
    # workers find the package, and the test modules that pickle refers to by name
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    from bigdl_lite import local_session

    # a JVM for short work: the second compiler would take a core for minutes, for code that runs once
    conf = {"spark.ui.showConsoleProgress": "false", "spark.driver.extraJavaOptions": "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC"}
    session = local_session(cores=4, app_name="bigdl_lite tests", conf=conf)
    session.sparkContext.setLogLevel("OFF")
    yield session
    session.stop()


@pytest.fixture(autouse=True)
def _same_threads() -> None:
    torch.set_num_threads(1)


def problem(n: int = 60, features: int = 5, classes: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """x [n, features] float32 and y [n] int64, with a pattern that can be learned."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, features)).astype("f4")
    y = (x @ rng.standard_normal((features, classes))).argmax(1)
    return x, y


def frame(spark: Any, x: np.ndarray, y: np.ndarray, parts: Sequence[int]) -> Any:
    """A DataFrame (features array<float>, label long) whose partitions hold the given numbers of rows."""
    assert sum(parts) == len(x)
    edges = np.cumsum([0, *parts])
    split = [[(x[i].tolist(), int(y[i])) for i in range(a, b)] for a, b in itertools.pairwise(edges)]
    rdd = spark.sparkContext.parallelize(split, len(split)).flatMap(lambda rows: rows)
    return spark.createDataFrame(rdd, "features array<float>, label long")


def uneven(n: int, k: int) -> list[int]:
    """k partitions of n rows, one of them empty where there are several, and no two alike."""
    if k == 1:
        return [n]
    weights = np.arange(1, k)
    counts = (n * weights // weights.sum()).tolist()
    counts[-1] += n - sum(counts)
    return [*counts[:1], 0, *counts[1:]]


def mlp(features: int = 5, classes: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(features, 8), nn.Tanh(), nn.Linear(8, classes))


def plain_torch(
    module: nn.Module, make_optimizer: Any, loss: Any, x: Tensor, y: Tensor, steps: int, clip: float | None = None,
    make_scheduler: Any = None,
) -> nn.Module:  # fmt: skip
    """The loop that everyone writes: full batch, one process."""
    optimizer = make_optimizer(list(module.parameters()))
    scheduler = make_scheduler(optimizer) if make_scheduler else None
    module.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss(module(x), y).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(module.parameters(), clip)
        optimizer.step()
        if scheduler:
            scheduler.step()
    return module


def flat(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()])
