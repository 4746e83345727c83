"""A fit that was broken off, and goes on from its last checkpoint: the same weights as one that was not."""

from __future__ import annotations

import json
import logging
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn, optim

from bigdl_lite import TorchClassifier, TorchModel
from bigdl_lite.algorithms import Round
from bigdl_lite.algorithms.parts import Gradient, Sum
from bigdl_lite.data.checkpoint import Checkpoints
from bigdl_lite.errors import BigDLError, CheckpointError, RecipeError
from tests.conftest import flat, frame, problem

X, Y = problem(60)
STEPS = 4  # an epoch: 60 rows, 16 a step


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))


def adam(p):
    return optim.Adam([{"params": p[:3], "lr": 0.02}, {"params": p[3:], "weight_decay": 0.01}], lr=0.01)


class Breaking:
    """A learning rate that falls, and that breaks the fit off before step `at` as long as the file `flag` is there."""

    def __init__(self, flag: Path, at: int) -> None:
        self.flag, self.at = str(flag), at

    def __call__(self, step: int) -> float:
        if step == self.at and os.path.exists(self.flag):
            raise RuntimeError("broken off")
        return 0.97**step


class StepLambda:
    """A scheduler factory that pickles."""

    def __init__(self, rate: Breaking) -> None:
        self.rate = rate

    def __call__(self, optimizer):
        return optim.lr_scheduler.LambdaLR(optimizer, self.rate)


@pytest.fixture
def data(spark):
    return frame(spark, X, Y, [25, 35])


def estimator(folder: Path | None, flag: Path, engine: str = "local", at: int = 7, **more):
    given = {
        "module": net, "loss": nn.CrossEntropyLoss(), "optimizer": adam, "scheduler": StepLambda(Breaking(flag, at)), "epochs": 3,
        "schedulerInterval": "step", "batchSize": 16, "numWorkers": 2, "engine": engine, "progress": "none", "clipNorm": 1.0,
        "checkpointDir": str(folder) if folder else None, "checkpointInterval": 2, "checkpointUnit": "step",
    } | more  # fmt: skip
    return TorchClassifier(**{name: value for name, value in given.items() if value is not None})


@pytest.mark.parametrize(("engine", "at"), [("local", 3), ("local", 8), ("local", 11), ("shuffle", 7), ("barrier", 7), ("barrier", 12)])
def test_a_fit_that_was_broken_off_ends_with_the_same_weights(data, tmp_path, engine, at) -> None:
    flag, folder = tmp_path / "flag", tmp_path / "saved"
    whole = estimator(None, flag, engine, at).fit(data)
    flag.touch()
    with pytest.raises(BigDLError, match="broken off"):
        estimator(folder, flag, engine, at).fit(data)
    flag.unlink()
    assert Checkpoints(str(folder), "fit").last().step == (at - 1) // 2 * 2
    model = estimator(folder, flag, engine, at, resume=True).fit(data)
    assert torch.equal(flat(model.module), flat(whole.module)), "to the bit"
    for name, x in whole.module.state_dict().items():
        assert torch.equal(model.module.state_dict()[name], x), name
    told, expected = ([{k: v for k, v in line.items() if k in ("step", "epoch", "loss", "rows", "lr")} for line in m.history]
                      for m in (model, whole))  # fmt: skip
    assert told == expected, "the history is that of one fit"


@pytest.mark.parametrize("missing", ["moments", "scheduler", "position"])
def test_every_part_of_a_checkpoint_counts(data, tmp_path, missing) -> None:
    """The negative control: without one of its parts, the weights are others."""
    flag, folder = tmp_path / "flag", tmp_path / "saved"
    whole = estimator(None, flag).fit(data)
    flag.touch()
    with pytest.raises(BigDLError):
        estimator(folder, flag).fit(data)
    flag.unlink()
    store = Checkpoints(str(folder), "fit")
    saved = store.last()
    if missing == "moments":
        saved.tensors["optimizer/exp_avg"].zero_()
    elif missing == "scheduler":
        saved.facts["state"]["scheduler"]["state"]["last_epoch"] = 0
    else:
        saved = type(saved)(saved.step, 0, 0, saved.loss, saved.model, saved.tensors, saved.facts)
    store.save(saved)
    model = estimator(folder, flag, resume=True).fit(data)
    assert not torch.equal(flat(model.module), flat(whole.module))


def test_more_epochs_go_on_and_a_finished_fit_is_done(data, tmp_path) -> None:
    flag, folder = tmp_path / "flag", tmp_path / "saved"
    two = estimator(folder, flag, checkpointUnit="epoch", checkpointInterval=1, epochs=2).fit(data)
    three = estimator(folder, flag, checkpointUnit="epoch", checkpointInterval=1, resume=True).fit(data)
    whole = estimator(None, flag).fit(data)
    assert torch.equal(flat(three.module), flat(whole.module)) and not torch.equal(flat(two.module), flat(whole.module))
    again = estimator(folder, flag, checkpointUnit="epoch", checkpointInterval=1, resume=True).fit(data)
    assert torch.equal(flat(again.module), flat(whole.module)) and again.history == three.history


@pytest.mark.parametrize("workers", [1, 3])
def test_another_number_of_workers_goes_on_from_the_end_of_an_epoch_only(spark, data, tmp_path, workers) -> None:
    flag, folder = tmp_path / "flag", tmp_path / "saved"
    more = {"checkpointUnit": "epoch", "checkpointInterval": 1}
    estimator(folder, flag, epochs=1, **more).fit(data)
    model = estimator(folder, flag, resume=True, numWorkers=workers, **more).fit(data)
    assert [line["epoch"] for line in model.history if "steps" in line] == [0, 1, 2]
    flag.touch()
    with pytest.raises(BigDLError, match="broken off"):
        estimator(tmp_path / "inside", flag).fit(data)
    with pytest.raises(CheckpointError, match=r"step 6 lies inside epoch 1, which was dealt with rows of shares \[25, 35\]"):
        estimator(tmp_path / "inside", flag, resume=True, numWorkers=workers).fit(data)


def test_what_cannot_go_on_is_refused_on_the_driver_by_name(data, tmp_path) -> None:
    flag, folder = tmp_path / "flag", tmp_path / "saved"
    estimator(folder, flag, epochs=1).fit(data)
    with pytest.raises(RecipeError, match=r"holds a fit that came to step 4: resume=True"):
        estimator(folder, flag, epochs=1).fit(data)
    with pytest.raises(CheckpointError, match=r"was written by Adam, this fit uses SGD"):
        estimator(folder, flag, resume=True, optimizer=lambda p: optim.SGD(p, lr=0.1)).fit(data)
    with pytest.raises(CheckpointError, match=r"is of another model"):
        estimator(folder, flag, resume=True, module=lambda: nn.Linear(5, 3)).fit(data)
    with pytest.raises(CheckpointError, match=r"scheduler"):
        _without_scheduler(folder, flag).fit(data)
    with pytest.raises(RecipeError, match=r"checkpointDir, which is not set"):
        estimator(None, flag, resume=True).fit(data)
    for bad in ({"checkpointInterval": 0}, {"checkpointUnit": "hour"}, {"checkpointKeep": 0}, {"recoveryInterval": -1.0}):
        with pytest.raises(RecipeError, match=next(iter(bad))):
            estimator(folder, flag, **bad).fit(data)


def _without_scheduler(folder, flag):
    made = estimator(folder, flag, resume=True)
    made.clear(made.scheduler)
    return made


class Stateless:
    """An Advance of somebody's own, which knows nothing of checkpoints."""

    measures = False

    def __init__(self, inner) -> None:
        self.inner = inner

    def cuts(self, replica, p):
        return self.inner.cuts(replica, p)

    def start(self, replica, cut):
        return self.inner.start(replica, cut)

    def check(self, replica):
        self.inner.check(replica)


def test_a_method_without_a_state_trains_and_is_refused_a_checkpoint(data, tmp_path) -> None:
    flag = tmp_path / "flag"
    algorithm = lambda advance: Round(Gradient(), Sum(), Stateless(advance))  # noqa: E731
    more = {"algorithm": algorithm, "epochs": 1}
    estimator(None, flag, **more).fit(data)
    with pytest.raises(CheckpointError, match="Stateless cannot be saved"):
        estimator(tmp_path / "saved", flag, **more).fit(data)


def test_a_model_of_any_checkpoint_can_be_loaded(data, tmp_path) -> None:
    flag, folder = tmp_path / "flag", tmp_path / "saved"
    model = estimator(folder, flag, checkpointKeep=9).fit(data)
    last = TorchModel.load(str(folder), step="last")
    assert torch.equal(flat(last.module), flat(model.module)) and type(last) is type(model)
    rows, expected = (m.transform(data).select("prediction", "probability").collect() for m in (last, model))
    assert rows == expected
    steps = Checkpoints(str(folder), "fit").steps()
    assert steps == [2, 4, 6, 8, 10, 12]
    four = TorchModel.load(str(folder), step=4)
    assert not torch.equal(flat(four.module), flat(model.module))
    assert [line["step"] for line in four.history if "step" in line] == [0, 1, 2, 3]
    lowest = min(steps, key=lambda step: Checkpoints(str(folder), "fit").at(step).loss)
    assert torch.equal(flat(TorchModel.load(str(folder), step="best").module), flat(TorchModel.load(str(folder), step=lowest).module))
    four.save(str(tmp_path / "model"))
    assert torch.equal(flat(TorchModel.load(str(tmp_path / "model")).module), flat(four.module))
    with pytest.raises(CheckpointError, match="no checkpoint of step 5; it has: 2, 4"):
        TorchModel.load(str(folder), step=5)
    with pytest.raises(RecipeError, match="'last' or 'best'"):
        TorchModel.load(str(folder), step="first")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        TorchModel.load(str(tmp_path / "nothing"), step="last")


def test_frozen_parameters_are_part_of_what_is_loaded(data, tmp_path) -> None:
    def frozen():
        made = net()
        made[0].weight.requires_grad_(False)
        return made

    more = {"module": frozen, "optimizer": lambda p: optim.Adam(p, lr=0.01), "epochs": 1}
    model = estimator(tmp_path / "saved", tmp_path / "flag", **more).fit(data)
    loaded = TorchModel.load(str(tmp_path / "saved"), module=net, step="last")
    for name, x in model.module.state_dict().items():
        assert torch.equal(loaded.module.state_dict()[name], x), name


def test_a_full_disk_costs_checkpoints_and_nothing_else(data, tmp_path) -> None:
    """A file system of 64 KB: the first checkpoints fit, the later ones do not; the last that did is whole."""
    where = tmp_path / "tiny"
    where.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", where], capture_output=True).returncode:
        pytest.skip("only root may mount a file system of 64 KB")
    try:
        flag = tmp_path / "flag"
        whole = estimator(None, flag).fit(data)
        with pytest.warns(RuntimeWarning, match="no checkpoint of step .*No space left.*bytes.*free"):
            model = estimator(where, flag, checkpointInterval=1, checkpointKeep=50).fit(data)
        assert torch.equal(flat(model.module), flat(whole.module))
        last = Checkpoints(str(where), "fit").last()
        assert last is not None and 0 < last.step < 12
        again = estimator(where, flag, checkpointInterval=1, checkpointKeep=1, resume=True).fit(data)
        assert torch.equal(flat(again.module), flat(whole.module)), "and it goes on from there"
    finally:
        subprocess.run(["umount", where], check=True)


@pytest.mark.parametrize("engine", ["local", "shuffle", "barrier"])
def test_a_save_that_fails_is_told_and_training_goes_on(data, tmp_path, monkeypatch, caplog, engine) -> None:
    flag, folder = tmp_path / "flag", tmp_path / "saved"
    whole = estimator(None, flag, engine).fit(data)
    made = estimator(folder, flag, engine)
    real = Checkpoints.save

    def full(self, checkpoint):
        if checkpoint.step == 6:
            raise CheckpointError("No space left on device")
        real(self, checkpoint)

    monkeypatch.setattr(Checkpoints, "save", full)
    with caplog.at_level(logging.ERROR, "bigdl_lite"), pytest.warns(RuntimeWarning, match="no checkpoint of step 6: No space left"):
        model = made.fit(data)
    assert "no checkpoint of step 6" in caplog.text
    assert torch.equal(flat(model.module), flat(whole.module))
    assert Checkpoints(str(folder), "fit").steps()[-1] == 12


def test_a_checkpoint_is_plain_data(data, tmp_path) -> None:
    estimator(tmp_path / "saved", tmp_path / "flag", epochs=1).fit(data)
    names = sorted(os.listdir(tmp_path / "saved" / "fit"))
    manifests = [name for name in names if name.endswith(".json")]
    assert len(names) == 2 * len(manifests) == 4
    told = json.loads((tmp_path / "saved" / "fit" / manifests[-1]).read_text())
    dealt = {"rows of shares": [25, 35], "batchSize": 16, "seed": 0, "batches of a round": 1}
    assert told["step"] == STEPS and told["facts"]["dealt"] == dealt
    assert np.isfinite(told["loss"])
