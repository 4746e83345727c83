"""k workers on k parts train what one process trains on the whole: for every engine, however the rows lie."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn

from bigdl_lite import BarrierEngine, TorchEstimator
from tests.conftest import flat, frame, mlp, plain_torch, problem, uneven

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)
ADAM = partial(torch.optim.Adam, lr=0.01)
X, Y = problem()


def seeded(make=mlp):
    torch.manual_seed(7)
    return make()


def fit(df, module, optimizer, engine, workers, **more):
    settings = {"batchSize": 1000, "epochs": 20, "progress": "none", "loss": nn.CrossEntropyLoss(), "deadline": 30.0} | more
    return TorchEstimator(module=module, optimizer=optimizer, engine=engine, numWorkers=workers, **settings).fit(df)


# partitions of the DataFrame, workers: equal where they can be, so that shares are exactly the partitions
@pytest.mark.parametrize("k, workers", [(1, 1), (2, 2), (3, 3), (7, 3)])
@pytest.mark.parametrize("optimizer", [SGD, ADAM], ids=["momentum", "adam"])
@pytest.mark.parametrize("engine", ["barrier", "shuffle", "local"])
def test_full_batches_equal_a_plain_torch_loop(spark, engine, optimizer, k, workers):
    if engine == "shuffle" and k == 7:
        workers = 7  # more workers than slots
    alone = plain_torch(seeded(), optimizer, nn.CrossEntropyLoss(), torch.from_numpy(X), torch.from_numpy(Y), 20)
    model = fit(frame(spark, X, Y, uneven(60, k)), seeded(), optimizer, engine, workers)
    assert model.engine == engine
    torch.testing.assert_close(flat(model.module), flat(alone), rtol=0, atol=1e-6)


def test_the_comparison_can_fail(spark):
    """Negative control: a rate that is off by 1 % is seen."""
    alone = plain_torch(seeded(), partial(SGD, lr=0.101), nn.CrossEntropyLoss(), torch.from_numpy(X), torch.from_numpy(Y), 20)
    model = fit(frame(spark, X, Y, [60]), seeded(), SGD, "local", 1)
    assert (flat(model.module) - flat(alone)).abs().max() > 1e-4


def two_groups(parameters):
    return torch.optim.SGD(
        [{"params": parameters[:2], "lr": 0.05}, {"params": parameters[2:], "weight_decay": 0.01}], lr=0.1, momentum=0.9
    )


def halving(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, step_size=5, gamma=0.5)


@pytest.mark.parametrize("engine", ["barrier", "shuffle", "local"])
def test_groups_clipping_and_a_scheduler_equal_a_plain_torch_loop(spark, engine):
    alone = plain_torch(
        seeded(), two_groups, nn.CrossEntropyLoss(), torch.from_numpy(X), torch.from_numpy(Y), 20, 0.2, halving
    )
    df = frame(spark, X, Y, uneven(60, 3))
    model = fit(df, seeded(), two_groups, engine, 3, clipNorm=0.2, scheduler=halving)
    torch.testing.assert_close(flat(model.module), flat(alone), rtol=0, atol=1e-6)
    assert [round(line["lr"], 6) for line in model.history if "step" in line][::5] == [0.05, 0.025, 0.0125, 0.00625]


def everything():
    # no bias before a normalisation: its gradient is rounding noise, which Adam would blow up to full steps
    return nn.Sequential(nn.Linear(5, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 3))


@pytest.mark.parametrize("k, workers", [(1, 1), (2, 2), (3, 3), (7, 2)])
@pytest.mark.parametrize("engine", ["barrier", "shuffle"])
def test_mini_batches_with_normalisation_and_dropout_equal_the_local_engine(spark, engine, k, workers):
    df = frame(spark, X, Y, uneven(60, k))
    settings = {"batchSize": 20, "epochs": 4, "clipNorm": 1.0, "scheduler": halving, "schedulerInterval": "step"}
    alone = fit(df, seeded(everything), ADAM, "local", workers, **settings)
    model = fit(df, seeded(everything), ADAM, engine, workers, **settings)
    torch.testing.assert_close(flat(model.module), flat(alone.module), rtol=0, atol=1e-6)
    for name, value in model.module.named_buffers():
        torch.testing.assert_close(value, alone.module.get_buffer(name), rtol=0, atol=1e-6)
    seen = [line["loss"] for line in model.history]
    assert seen == pytest.approx([line["loss"] for line in alone.history], abs=1e-6)


def test_ranks_that_share_no_memory_equal_ranks_that_do(spark):
    df = frame(spark, X, Y, uneven(60, 3))
    settings = {"batchSize": 20, "epochs": 2, "clipNorm": 0.5}
    together = fit(df, seeded(everything), ADAM, "barrier", 3, **settings)
    apart = fit(df, seeded(everything), ADAM, BarrierEngine(share_memory=False), 3, **settings)
    torch.testing.assert_close(flat(apart.module), flat(together.module), rtol=0, atol=1e-6)
    assert all(line["bytes_sent"] == 0 for line in together.history)
    assert all(line["bytes_sent"] > 0 for line in apart.history)


def normed():
    return nn.Sequential(nn.Linear(5, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))


@pytest.mark.parametrize("engine", ["barrier", "local"])
def test_synchronised_statistics_equal_one_process(spark, engine):
    alone = plain_torch(seeded(normed), SGD, nn.CrossEntropyLoss(), torch.from_numpy(X), torch.from_numpy(Y), 20)
    df = frame(spark, X, Y, uneven(60, 3))
    model = fit(df, seeded(normed), SGD, engine, 3, syncBatchNorm=True)
    torch.testing.assert_close(flat(model.module), flat(alone), rtol=0, atol=1e-5)
    torch.testing.assert_close(model.module[1].running_var, alone[1].running_var, rtol=0, atol=1e-5)
    control = fit(df, seeded(normed), SGD, engine, 3)
    assert (flat(control.module) - flat(alone)).abs().max() > 1e-3, "statistics of each share alone are something else"


@pytest.mark.parametrize("engine", ["barrier", "shuffle"])
def test_shares_do_not_depend_on_how_often_they_are_computed(spark, engine):
    """A shuffle to other numbers of partitions is put in order again: two fits are equal to the bit."""
    df = frame(spark, X, Y, uneven(60, 7)).repartition(5)
    fits = [fit(df, seeded(), ADAM, engine, 2, batchSize=16, epochs=2) for _ in range(2)]
    assert torch.equal(flat(fits[0].module), flat(fits[1].module))


def test_the_users_module_is_left_as_it_was(spark):
    module = seeded()
    before = copy.deepcopy(module.state_dict())
    fit(frame(spark, X, Y, [60]), module, SGD, "local", 1, epochs=1)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
