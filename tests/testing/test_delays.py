"""Delays are the same in every process and as long as promised; and they change nothing but the time."""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyspark import cloudpickle
from torch import nn
from torch.optim import SGD

import bigdl_lite.testing
from bigdl_lite.algorithms import CATALOGUE, Gradient, Round, Sum, TorchOptimizer, Update, Work, local_sgd, method
from bigdl_lite.algorithms.deadline import Within
from bigdl_lite.algorithms.localsgd import LocalSteps
from bigdl_lite.data.columns import describe
from bigdl_lite.engine.local import LocalEngine
from bigdl_lite.engine.recipe import Outcome, Recipe, Start
from bigdl_lite.errors import RecipeError
from bigdl_lite.model.layout import blueprint
from bigdl_lite.testing import Delays, Slowed, slowed
from tests.conftest import ROOT, flat, mlp, problem

pytestmark = pytest.mark.timeout(60)

GRID = [(rank, step) for rank in range(8) for step in range(400)]


def drawn(delays: Delays) -> np.ndarray:
    """[3200] seconds."""
    return np.array([delays.seconds(rank, step) for rank, step in GRID])


@pytest.fixture(scope="module")
def usual() -> np.ndarray:
    return drawn(Delays())


def test_another_process_draws_the_same_and_needs_no_spark() -> None:
    code = (
        "import sys, json\n"
        "sys.modules['pyspark'] = None\n"
        "from bigdl_lite.testing import Delays, label_skew\n"
        "print(json.dumps([[Delays(slow=(1,)).seconds(r, s) for r in range(3) for s in range(5)],"
        " label_skew([0, 1, 2] * 20, 0.5, 4).tolist()]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    mine = [Delays(slow=(1,)).seconds(r, s) for r in range(3) for s in range(5)]
    assert json.loads(done.stdout) == [mine, bigdl_lite.testing.label_skew([0, 1, 2] * 20, 0.5, 4).tolist()]


def test_delays_are_lognormal(usual: np.ndarray) -> None:
    logs = np.log(usual[usual < 0.2] / 0.04)  # stragglers take 0.4 s
    error = 0.1 / math.sqrt(len(logs))
    assert abs(logs.mean()) < 3 * error and abs(logs.std() - 0.1) < 3 * error
    assert abs(usual[usual < 0.2].mean() - 0.04 * math.exp(0.1**2 / 2)) < 3 * 0.04 * error


@pytest.mark.parametrize("probability", [0.0, 0.02, 0.5, 1.0])
def test_stragglers_are_as_many_as_said(probability: float) -> None:
    late = (drawn(Delays(sigma=0.0, probability=probability)) > 0.2).mean()
    assert abs(late - probability) <= 3 * math.sqrt(probability * (1 - probability) / len(GRID))


def test_delays_of_ranks_do_not_go_together() -> None:
    plain = drawn(Delays(probability=0.0))  # two stragglers that meet once would say more than all other steps
    ranks = np.corrcoef(np.log(plain.reshape(8, 400)))
    assert abs(ranks[np.triu_indices(8, 1)]).max() < 4 / math.sqrt(400)
    assert len(np.unique(plain)) == len(GRID)


def test_a_slow_rank_is_slow_in_every_step_and_no_other_is_changed() -> None:
    plain, found = drawn(Delays(probability=0.0)).reshape(8, 400), drawn(Delays(probability=0.0, slow=(2, 5))).reshape(8, 400)
    assert np.array_equal(found[[2, 5]], plain[[2, 5]] * 10.0)
    others = [0, 1, 3, 4, 6, 7]
    assert np.array_equal(found[others], plain[others])


def test_being_drawn_makes_a_slow_rank_no_slower() -> None:
    assert {Delays(sigma=0.0, probability=p, slow=(0,)).seconds(0, 7) for p in (0.0, 1.0)} == {0.04 * 10.0}


def test_another_seed_draws_other_delays(usual: np.ndarray) -> None:
    assert np.array_equal(drawn(Delays()), usual)
    assert (drawn(Delays(seed=1)) != usual).all()


def test_no_unit_is_no_delay() -> None:
    assert not drawn(Delays(unit=0.0, probability=1.0, slow=(1,))).any()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"unit": -0.1}, r"unit=-0.1\): must be at least 0"),
        ({"unit": math.inf}, "unit=inf"),
        ({"sigma": -1.0}, r"sigma=-1.0\): must be at least 0"),
        ({"sigma": math.nan}, "sigma=nan"),
        ({"factor": 0.5}, r"factor=0.5\): must be at least 1"),
        ({"probability": 1.5}, r"probability=1.5\): must be from 0 to 1"),
        ({"probability": -0.1}, r"probability=-0.1\)"),
        ({"slow": (1, -2)}, r"slow=\(-2, 1\)\): ranks begin at 0"),
    ],
)
def test_settings_that_cannot_work_are_errors(given: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        Delays(**given)


def test_delays_are_values() -> None:
    assert Delays(slow=[3, 1, 3]) == Delays(slow=(1, 3)) and len({Delays(slow=[1]), Delays(slow=(1,))}) == 1  # type: ignore[arg-type]
    assert Delays() != Delays(seed=1)


def pickled(value: Any) -> Any:
    return cloudpickle.loads(cloudpickle.dumps(value))


@pytest.mark.parametrize("travel", [copy.copy, copy.deepcopy, pickled])
def test_a_slowed_local_travels(travel: Callable[[Any], Any]) -> None:
    it = Slowed(Gradient(), Delays(slow=(1,)))
    assert travel(it) == it
    assert len(cloudpickle.dumps(it)) < 400


# ---- what is slowed ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Other:
    """A Local with more than the protocol asks for."""

    extra: str = "more"
    moves: bool = True

    def batches(self, epoch: int) -> int:
        return 3 + epoch

    def __call__(self, replica: Any, batches: Sequence[Any], work: Work) -> tuple[Update, float]:
        return Update(torch.tensor([float(work.step)]), len(batches)), 0.5


def test_the_rest_of_the_local_is_seen_through_it() -> None:
    it = Slowed(Other(), Delays())
    assert (it.moves, it.batches(0), it.batches(4), it.extra) == (True, 3, 7, "more")
    assert Slowed(Gradient(), Delays()).moves is False
    with pytest.raises(AttributeError, match="'Other' object has no attribute 'nothing'"):
        _ = it.nothing


def test_it_sleeps_first_for_its_rank_and_step(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("bigdl_lite.testing.delays.time.sleep", slept.append)
    delays = Delays(unit=100.0, slow=(2,))
    work = Work(0, 0, [0.1], rank=2, step=9)
    assert Slowed(Other(), delays)(None, [1, 2], work) == (Update(torch.tensor([9.0]), 2), 0.5)  # type: ignore[arg-type, list-item]
    assert slept == [delays.seconds(2, 9)] and slept[0] > 500


def test_slowed_is_the_method_with_another_local() -> None:
    advance, delays = TorchOptimizer(partial(SGD, lr=0.1)), Delays(seed=4)
    assert slowed("sync-sgd", delays)(advance) == Round(Slowed(Gradient(), delays), Sum(), advance)
    made = slowed(local_sgd(5), delays)(advance)
    assert isinstance(made.local.local, LocalSteps) and made.local.batches(0) == 5 and made.local.moves  # type: ignore[attr-defined]
    with pytest.raises(RecipeError, match="algorithm='sync' is not known"):
        slowed("sync", delays)(advance)


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_name_in_the_catalogue_can_be_slowed(name: str) -> None:
    advance = TorchOptimizer(partial(SGD if name != "qadam" else torch.optim.Adam, lr=0.1))
    made, plain = slowed(name, Delays())(advance), method(name, advance)
    inner = (made.local.local.local, plain.local.local) if isinstance(made.local, Within) else (made.local.local, plain.local)  # type: ignore[attr-defined]
    assert type(inner[0]) is type(inner[1])
    assert (made.local.moves, made.local.batches(0)) == (plain.local.moves, plain.local.batches(0))


def fit(algorithm: Any, module: nn.Module | None = None, workers: int = 4) -> Outcome:
    """Twelve steps on sixty rows, in the local engine."""
    x, y = problem()
    made, weights, buffers, constants = blueprint(module or seeded())
    schema = pa.schema([("x", pa.list_(pa.float32())), ("y", pa.int64())])
    parts = zip(np.array_split(x, workers), np.array_split(y, workers), strict=True)
    shares = [[pa.RecordBatch.from_pydict({"x": a.tolist(), "y": b.tolist()}, schema=schema)] for a, b in parts]
    how = method(algorithm, TorchOptimizer(partial(SGD, lr=0.1, momentum=0.9)))
    columns = describe(schema, ["x"], "y", torch.float32)
    recipe = Recipe(made, nn.CrossEntropyLoss(), how, columns, workers, batch_size=20, epochs=4, deadline=20.0)
    return LocalEngine().fit(shares, recipe, Start(weights, buffers, constants))


def seeded() -> nn.Module:
    torch.manual_seed(0)
    net = mlp()
    net.insert(2, nn.Dropout(0.2))  # draws of the random state are part of what must not change
    return net


@pytest.mark.parametrize("algorithm", ["sync-sgd", local_sgd(2)], ids=["sync-sgd", "local-sgd"])
def test_slow_machines_change_no_bit(algorithm: Any) -> None:
    plain, slow = fit(algorithm), fit(slowed(algorithm, Delays(unit=2e-4, slow=(1,))))
    assert torch.equal(plain.weights, slow.weights)
    assert [line["loss"] for line in plain.history] == [line["loss"] for line in slow.history]


def test_a_difference_would_be_seen() -> None:
    """Negative control: the comparison above, on another method."""
    assert not torch.equal(fit("sync-sgd").weights, fit(local_sgd(2)).weights)
    assert not torch.equal(fit("sync-sgd").weights, flat(seeded()))


def test_the_history_shows_the_slowest_worker() -> None:
    delays = Delays(unit=1e-3, sigma=0.0, probability=0.0, factor=20.0, slow=(3,))
    began = time.perf_counter()
    lines = [line for line in fit(slowed("sync-sgd", delays)).history if "step" in line]
    assert min(line["compute_s"] for line in lines) >= 0.02
    assert time.perf_counter() - began >= len(lines) * 0.023  # ranks take turns here, so that delays add up


def test_what_the_kit_promises_is_sorted_and_there() -> None:
    assert bigdl_lite.testing.__all__ == sorted(bigdl_lite.testing.__all__)
    assert all(callable(getattr(bigdl_lite.testing, name)) for name in bigdl_lite.testing.__all__)
