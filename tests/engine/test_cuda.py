"""On a GPU: the numbers are those of the CPU, wherever ranks meet. What is decided about GPUs is tested without one (test_gpu.py)."""

from __future__ import annotations

import logging
import os
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bigdl_lite import TorchEstimator
from bigdl_lite.batch import Batch
from bigdl_lite.comm.block import Block, Size, private
from bigdl_lite.comm.group import Group, Store
from bigdl_lite.engine.device import Staging
from tests.conftest import flat, frame, mlp, problem
from tests.contracts.test_groups import in_order, ranks, vector

pytestmark = [
    pytest.mark.gpu, pytest.mark.timeout(300),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]  # fmt: skip
several = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")

X, Y = problem(240)


@pytest.fixture(scope="module")
def df(spark: Any) -> Any:
    return frame(spark, X, Y, [100, 140]).cache()


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))


def fit(df: Any, **settings: Any) -> Any:
    given = {
        "module": mlp, "loss": nn.CrossEntropyLoss(), "optimizer": partial(torch.optim.SGD, lr=0.1), "batchSize": 60, "epochs": 3,
        "engine": "barrier", "numWorkers": 1, "seed": 1, "progress": "none",
    }  # fmt: skip
    return TorchEstimator(**{**given, **settings}).fit(df)


def close(one: Any, other: Any, atol: float = 1e-4) -> None:
    torch.testing.assert_close(flat(one.module), flat(other.module), rtol=0, atol=atol)


@pytest.mark.parametrize("engine", ["barrier", "shuffle"])
@pytest.mark.parametrize("module", [mlp, normed])
def test_one_rank_on_a_gpu_trains_what_a_cpu_does(df: Any, engine: str, module: Any) -> None:
    close(fit(df, engine=engine, module=module, device="cuda"), fit(df, engine=engine, module=module, device="cpu"))


def test_more_ranks_than_gpus_share_them_and_meet_in_memory(df: Any, caplog: pytest.LogCaptureFixture) -> None:
    p = 2 * torch.cuda.device_count()
    if p > 4:
        pytest.skip("the session of the tests has four slots, and this machine more than two GPUs")
    with caplog.at_level(logging.INFO, "bigdl_lite"):
        there = fit(df, numWorkers=p, device="cuda", validationFraction=0.2, metrics=["accuracy"])
    assert sum("in the memory of their machines" in record.message for record in caplog.records) == 1
    here = fit(df, numWorkers=p, device="cpu", validationFraction=0.2, metrics=["accuracy"])
    close(there, here)
    assert abs(there.summary.lines("epoch")[-1]["val_loss"] - here.summary.lines("epoch")[-1]["val_loss"]) < 1e-3


@pytest.mark.parametrize("settings", [{"exchange": "bf16"}, {"algorithm": "local-sgd"}, {"clipNorm": 0.1}], ids=str)
def test_two_ranks_with_what_else_a_fit_may_have(df: Any, settings: dict[str, Any]) -> None:
    close(fit(df, numWorkers=2, device="cuda", **settings), fit(df, numWorkers=2, device="cpu", **settings), 1e-2)


@several
def test_a_gpu_each_meets_through_nccl(df: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "bigdl_lite"):
        there = fit(df, numWorkers=2, device="cuda")
    assert sum("through NCCL" in record.message for record in caplog.records) == 1
    close(there, fit(df, numWorkers=2, device="cpu"))


@several
def test_nccls_sums_are_those_of_links() -> None:
    p = torch.cuda.device_count()
    hall = Store("127.0.0.1", 0, True, 60.0)

    def act(r: int) -> tuple[Tensor, list[Tensor]]:
        store, device = hall if not r else Store("127.0.0.1", hall.port, False, 60.0), torch.device("cuda", r)
        group = Group(store, "gpus", r, p, "127.0.0.1", device)
        total = group.all_reduce(vector(r, 1001).to(device))
        out = [torch.empty(k, device=device) for k in range(p)]
        group.all_gather(vector(r, r).to(device), out)
        torch.cuda.synchronize(device)
        group.close()
        return total.cpu(), [x.cpu() for x in out]

    for found in ranks(p, act):
        assert not isinstance(found, Exception), found
        assert torch.equal(found[0], in_order([vector(r, 1001) for r in range(p)]))
        assert all(torch.equal(x, vector(r, r)) for r, x in enumerate(found[1]))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_autocast_trains_nearly_the_same(df: Any, precision: str) -> None:
    half, full = (fit(df, device="cuda", precision=x, epochs=5) for x in (precision, "fp32"))
    assert not torch.equal(flat(half.module), flat(full.module)), "the precision is used"
    close(half, full, 0.05)
    assert half.summary.objectiveHistory[-1] < half.summary.objectiveHistory[0]


def test_rows_go_through_page_locked_memory() -> None:
    rows, index, device = Batch((torch.randn(100, 7),), torch.arange(100)), torch.randperm(100)[:33], torch.device("cuda:0")
    there, here = rows.take(index, device), rows.take(index)
    torch.cuda.synchronize()
    assert there.inputs[0].device == device and torch.equal(there.inputs[0].cpu(), here.inputs[0])
    assert torch.equal(there.target.cpu(), here.target)


def test_a_block_is_page_locked_while_a_rank_stages() -> None:
    size, device = Size(10_000, 2, 2, 0, 0), torch.device("cuda:0")
    block = Block(private(size.nbytes), size, 0, 1.0, watch=False)
    staging = Staging(block, device)
    assert block.weights.is_pinned() and block.grads[0].is_pinned() and not block.grads[1].is_pinned()
    gradient, weights = torch.randn(10_000, device=device), torch.empty(10_000, device=device)
    staging.store(gradient)
    block.weights.copy_(block.grads[0])
    staging.load(weights)
    assert torch.equal(weights, gradient)
    staging.close()
    assert not block.weights.is_pinned()


def test_the_worker_is_as_before_after_a_fit(spark: Any, df: Any) -> None:
    fit(df, device="cuda")

    def look(rows: Any) -> Any:
        yield os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.current_device()

    found = spark.sparkContext.parallelize(range(4), 4).mapPartitions(look).collect()
    assert set(found) == {(os.environ.get("CUDA_VISIBLE_DEVICES"), 0)}


def test_outcomes_lie_on_the_cpu(df: Any) -> None:
    model = fit(df, device="cuda")
    assert all(p.device.type == "cpu" for p in model.module.parameters())
