"""Methods without a common meeting point, by the front door: in barrier as in local, saved, gone on with, refused."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD

from bigdl_lite import Difference, MinMax8, TorchClassifier, TorchModel, backup_workers, gossip, pipe_sgd, within
from bigdl_lite.errors import CheckpointError, RecipeError
from bigdl_lite.testing import Delays, slowed
from tests.conftest import flat, frame, mlp, problem, uneven

X, Y = problem(90)
PLAIN = partial(SGD, lr=0.1)


@pytest.fixture(scope="module")
def data(spark: Any) -> Any:
    return frame(spark, X, Y, uneven(90, 3)).cache()


def fit(data: Any, engine: Any, algorithm: Any, **more: Any) -> Any:
    settings = {"module": mlp, "optimizer": PLAIN, "batchSize": 32, "epochs": 3, "progress": "none", "deadline": 30.0} | more
    return TorchClassifier(numWorkers=3, engine=engine, algorithm=algorithm, **settings).fit(data)


def epochs(model: Any) -> list[dict[str, Any]]:
    return [line for line in model.history if "steps" in line]


@pytest.mark.parametrize("algorithm", [
    pytest.param(gossip("ring", Difference(MinMax8(group=64))), id="dcd-psgd"),
    pytest.param("qg-dsgdm", id="qg-dsgdm", marks=pytest.mark.slow), pytest.param("shift-one", id="shift-one", marks=pytest.mark.slow),
    pytest.param(pipe_sgd(MinMax8(group=64)), id="pipe-sgd"),
])  # fmt: skip
def test_barrier_gives_the_bits_of_the_local_engine(data: Any, algorithm: Any) -> None:
    optimizer = partial(SGD, lr=0.1, momentum=0.9) if algorithm == "qg-dsgdm" else PLAIN
    made = [fit(data, engine, algorithm, optimizer=optimizer) for engine in ("barrier", "local")]
    assert torch.equal(*(flat(model.module) for model in made))
    assert [line["loss"] for line in made[0].history] == [line["loss"] for line in made[1].history]


@pytest.mark.parametrize("algorithm", [
    "backup-workers", pytest.param("async-sgd", marks=pytest.mark.slow), pytest.param("bounded-staleness", marks=pytest.mark.slow),
    "async-average",
])  # fmt: skip
def test_workers_of_their_own_speed_train(data: Any, algorithm: str) -> None:
    model = fit(data, "auto", algorithm, epochs=10)
    first, *_, last = epochs(model)
    assert last["loss"] < first["loss"] and len([x for x in model.history if "step" in x]) == 30
    if algorithm == "backup-workers":
        assert sum(last["accepted"]) == 2 * 3, "two of three make a step, three steps an epoch"
    for engine in ("local", "shuffle"):
        with pytest.raises(RecipeError, match="engine='barrier'"):
            fit(data, engine, algorithm)


def test_who_is_slow_loses_rows_in_shuffle_too(data: Any) -> None:
    slow = slowed(within(0.03, parts=4), Delays(unit=0.001, factor=100.0, probability=0.0, slow=(2,)))
    model = fit(data, "shuffle", slow)
    steps = [line for line in model.history if "step" in line]
    assert all(0 < line["weight"] < line["rows"] for line in steps), [(line["weight"], line["rows"]) for line in steps]
    enough = fit(data, "shuffle", within(30.0))
    torch.testing.assert_close(flat(enough.module), flat(fit(data, "local", "sync-sgd").module), rtol=0, atol=1e-6)


def test_a_fit_of_models_goes_on_from_its_checkpoint(data: Any, tmp_path: Path) -> None:
    whole = fit(data, "barrier", "d-psgd", epochs=4)
    where = {"checkpointDir": str(tmp_path), "recoveryInterval": 0.0}
    half = fit(data, "barrier", "d-psgd", epochs=2, **where)
    rest = fit(data, "barrier", "d-psgd", epochs=4, resume=True, **where)
    assert torch.equal(flat(rest.module), flat(whole.module)) and not torch.equal(flat(half.module), flat(whole.module))
    assert torch.equal(flat(TorchModel.load(str(tmp_path), step="last", module=mlp).module), flat(whole.module))
    with pytest.raises(CheckpointError, match="weights of 3 workers"):
        made = TorchClassifier(module=mlp, optimizer=PLAIN, batchSize=32, epochs=6, progress="none", numWorkers=2, engine="local")
        made._set(algorithm="d-psgd", checkpointDir=str(tmp_path), resume=True)
        made.fit(data)


def test_what_cannot_be_is_refused_by_name_before_any_job(data: Any) -> None:
    for engine, algorithm, more, told in (
        ("shuffle", "d-psgd", {}, "tasks of the shuffle engine"),
        ("local", gossip("davis"), {}, "32"),
        ("barrier", backup_workers(3), {}, "backups=3"),
        ("barrier", "d-psgd", {"exchange": "bf16"}, "no common meeting"),
        ("barrier", "d-psgd", {"hierarchical": True}, "hierarchical"),
        ("barrier", "backup-workers", {"clipNorm": 1.0}, "clipValue"),
        ("local", "d-psgd", {"syncBatchNorm": True, "module": lambda: nn.Sequential(nn.BatchNorm1d(5), mlp())}, "syncBatchNorm"),
    ):
        with pytest.raises(RecipeError, match=told):
            fit(data, engine, algorithm, **more)
    with pytest.warns(RuntimeWarning, match="38 times smaller"):
        fit(data, "local", "pipe-sgd", optimizer=partial(SGD, lr=0.01, momentum=0.9), epochs=1)
    with pytest.raises(RecipeError, match="maxRecoveries"):
        fit(data, "local", "d-psgd", maxRecoveries=-1)


def test_an_exchange_works_inside_the_pipeline(data: Any) -> None:
    made = [fit(data, "local", "pipe-sgd", exchange=MinMax8(group=64)), fit(data, "local", pipe_sgd(MinMax8(group=64)))]
    assert torch.equal(*(flat(model.module) for model in made))
