"""BigDL's synchronisation, slice by slice: the bits of one process that adds up the same gradients, in as many bytes as its card says.

Source: Dai et al., "BigDL: A Distributed Deep Learning Framework for Big Data", SoCC 2019, Alg. 2. That a task may run again is
shown on a cluster, with executors that are killed: tests/engine/test_faults.py.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bigdl_lite import BarrierEngine, ShuffleEngine, TorchEstimator
from bigdl_lite.batch import Batch, order
from bigdl_lite.comm.block import private
from bigdl_lite.engine import shuffle
from bigdl_lite.model.layout import blueprint
from bigdl_lite.model.replica import Replica
from tests.conftest import flat, frame, problem, uneven

X, Y = problem(61)
MOMENTUM = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 3))  # 84 values: not divided by 5, nor by 9


def one_process(counts: list[int], steps: int) -> Tensor:
    """Adds the gradients of N shares in order and takes one step of torch's SGD on the whole vector."""
    plan, start, _, constants = blueprint(net())
    n = plan.layout.n
    weights, gradient = (private(4096).values(torch.float32, n) for _ in range(2))  # at the start of a page, as in the engines
    weights.copy_(start)
    replica = Replica(plan, weights, gradient, constants, nn.CrossEntropyLoss())
    whole, edges = nn.Parameter(weights), np.cumsum([0, *counts])
    optimizer = MOMENTUM([whole], fused=True)
    for step in range(steps):
        total = torch.zeros(n)
        for rank, (a, b) in enumerate(pairwise(edges)):
            deal = order(b - a, 0, step, rank)
            replica.backward(Batch((torch.from_numpy(X[a:b])[deal],), torch.from_numpy(Y[a:b])[deal]), 0)
            total += gradient
        whole.grad = total / len(X)
        optimizer.step()
    return weights.clone()


def fit(spark: Any, engine: Any, counts: list[int], steps: int) -> Any:
    settings = {"batchSize": 1000, "epochs": steps, "numWorkers": len(counts), "progress": "none", "deadline": 30.0}
    return TorchEstimator(
        module=net(), loss=nn.CrossEntropyLoss(), optimizer=MOMENTUM, engine=engine, **settings
    ).fit(frame(spark, X, Y, counts))  # fmt: skip


@pytest.mark.parametrize("n", [1, 2, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 4))])
def test_fifty_steps_of_n_workers_are_those_of_one_process(spark: Any, n: int) -> None:
    counts = uneven(61, n)
    expected = one_process(counts, 50)
    assert not torch.equal(expected, one_process(counts, 49)), "the comparison can fail"
    for engine in ("local", "barrier", BarrierEngine(share_memory=False)):
        assert torch.equal(flat(fit(spark, engine, counts, 50).module), expected), engine


@pytest.mark.parametrize("n", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_slices_through_the_shuffle_are_too_and_take_the_bytes_of_the_formula(spark: Any, n: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(shuffle, "SMALL", 0)  # or so small a model would have one owner, the driver
    counts = uneven(61, n)
    model = fit(spark, ShuffleEngine(share_memory=False), counts, 10)
    assert torch.equal(flat(model.module), one_process(counts, 10))
    senders = sum(count > 0 for count in counts)
    assert {line["bytes_sent"] for line in model.history if "step" in line} == {senders * 4 * 84}
