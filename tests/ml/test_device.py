"""Where transform computes: what Spark gave the task, or what was asked for, or an error."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from pyspark.sql import functions as F
from torch import nn

from bigdl_lite import TorchEstimator
from bigdl_lite.engine import device
from bigdl_lite.errors import RecipeError
from bigdl_lite.ml import score
from tests.conftest import frame, mlp, problem

X, Y = problem(40)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def df(spark):
    return frame(spark, X, Y, [25, 15]).withColumn("id", F.monotonically_increasing_id()).cache()


@pytest.fixture(scope="module")
def model(df):
    return TorchEstimator(module=mlp, loss=nn.CrossEntropyLoss(), engine="local", numWorkers=1, progress="none").fit(df)


def in_a_task(monkeypatch, given, there):
    """A task that Spark gave the GPU of this index (None: none), in a process that sees so many GPUs."""
    monkeypatch.setattr(score, "gpus", lambda: () if given is None else (str(given),))
    monkeypatch.setattr(score, "partition_id", lambda: 3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace())
    monkeypatch.setattr(device, "_broken", lambda i: "")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.parametrize(
    ("asked", "given", "there", "found"),
    [
        ("auto", 1, 2, "cuda:1"), ("auto", None, 2, "cpu"), ("auto", None, 0, "cpu"), ("auto", 0, 0, "cpu"),
        ("cpu", 1, 2, "cpu"), ("cuda", 1, 2, "cuda:1"), ("cuda", None, 2, "cuda:1"),
    ],
)  # fmt: skip
def test_a_task_computes_where_it_should(monkeypatch, asked, given, there, found):
    in_a_task(monkeypatch, given, there)
    assert score.device_of(asked) == torch.device(found)


@pytest.mark.parametrize(("visible", "found"), [(None, "cuda:1"), ("1,0", "cuda:0"), ("0", "cpu")])
def test_the_gpu_is_the_one_that_spark_gave_whatever_the_executor_sees(monkeypatch, caplog, visible, found):
    in_a_task(monkeypatch, 1, 2 if visible != "0" else 1)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert score.device_of("auto") == torch.device(found)
    assert [record.message[:18] for record in caplog.records] == (["scoring on the CPU"] if found == "cpu" else [])


def test_a_gpu_that_is_asked_for_and_not_there_is_an_error(monkeypatch):
    in_a_task(monkeypatch, None, 0)
    with pytest.raises(RecipeError, match=r"spark\.task\.resource\.gpu\.amount.*device='auto'"):
        score.device_of("cuda")


def test_outside_of_a_task_it_is_the_cpu():
    assert score.device_of("auto") == CPU


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_on_this_machine_it_is_an_error_before_any_job(df, model):
    with pytest.raises(RecipeError, match="this machine has none"):
        model.copy({model.device: "cuda"}).transform(df)
    with pytest.raises(RecipeError, match="this machine has none"):
        TorchEstimator(module=mlp, loss=nn.CrossEntropyLoss(), device="cuda").fit(df)
    with pytest.raises(RecipeError, match="engine='local', the reference"):
        TorchEstimator(module=mlp, loss=nn.CrossEntropyLoss(), device="cuda", engine="local").fit(df)
    assert model.copy({model.device: "cpu"}).transform(df).count() == 40


def test_a_device_that_nobody_knows_is_refused(df, model):
    with pytest.raises(RecipeError, match="device is 'tpu', must be 'auto', 'cpu' or 'cuda'"):
        model.copy({model.device: "tpu"}).transform(df)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same_scores(df, model):
    there, here = (
        [row.prediction for row in model.copy({model.device: name}).transform(df).orderBy("id").collect()] for name in ("cuda", "cpu")
    )
    torch.testing.assert_close(torch.tensor(there), torch.tensor(here), rtol=1e-5, atol=1e-5)
