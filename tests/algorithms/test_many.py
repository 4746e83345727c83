"""Models that are trained in one pass are those of separate fits, whatever advances them and however many workers there are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import ExponentialLR, ReduceLROnPlateau, StepLR

from bigdl_lite.algorithms import Update
from bigdl_lite.algorithms.many import Many
from bigdl_lite.algorithms.parts import TorchOptimizer
from bigdl_lite.data.checkpoint import Checkpoints
from bigdl_lite.engine import each
from bigdl_lite.engine.keeper import Keeper, start_from
from bigdl_lite.engine.local import LocalEngine
from bigdl_lite.engine.recipe import Outcome, Saving
from bigdl_lite.errors import CheckpointError, DivergedError
from bigdl_lite.model.loss import Each
from bigdl_lite.model.replica import Replica
from tests.contracts.test_advances import MatrixNorm
from tests.engine import test_local as local

pytestmark = pytest.mark.timeout(60)

SETS: dict[str, tuple[TorchOptimizer, ...]] = {
    "rates": tuple(TorchOptimizer(partial(Adam, lr=lr)) for lr in (0.1, 0.02, 0.003)),
    "rules": (TorchOptimizer(partial(SGD, lr=0.1, momentum=0.9)), TorchOptimizer(partial(Adam, lr=0.02)), TorchOptimizer(MatrixNorm)),
    "limits": tuple(
        TorchOptimizer(partial(SGD, lr=0.5), None, "epoch", *limits) for limits in ((0.1, None), (None, 0.01), (None, None))
    ),
    "schedules": (
        TorchOptimizer(partial(SGD, lr=0.2), partial(StepLR, step_size=1, gamma=0.5)),
        TorchOptimizer(partial(Adam, lr=0.05), partial(ExponentialLR, gamma=0.8), "step"),
        # each model's own loss decides: a threshold that no epoch passes lowers the rate after every one
        TorchOptimizer(partial(SGD, lr=0.2), partial(ReduceLROnPlateau, patience=0, threshold=1.0)),
        TorchOptimizer(partial(SGD, lr=0.2), partial(ReduceLROnPlateau, patience=0, threshold=0.0)),
    ),
}  # fmt: skip


class Last(nn.Module):
    """An LSTM, which vmap cannot do."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.out = nn.LSTM(1, 4, batch_first=True), nn.Linear(4, local.CLASSES)

    def forward(self, x):
        return self.out(self.lstm(x.unsqueeze(2))[0][:, -1])


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = nn.Linear(local.FEATURES, 8), nn.Linear(8, local.CLASSES)
        self.first.weight.requires_grad_(False)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        if self.training:
            self.seen += len(x)
        return self.out(torch.tanh(self.first(x)))


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make()


MODULES: dict[str, Callable[[], nn.Module]] = {
    "mlp": local.net,
    "dropout": lambda: local.net(nn.ReLU(), nn.Dropout(0.4)),
    "batch norm": lambda: local.net(nn.BatchNorm1d(40), nn.ReLU()),
    "lstm": lambda: seeded(Last),
    "frozen": lambda: seeded(Frozen),
}


def fits(module: nn.Module, counts: Sequence[int], advances: Sequence[TorchOptimizer], **settings: Any) -> tuple[list[Outcome], ...]:
    """Together, and one by one."""
    settings = {"batch_size": 10, "epochs": 3, **settings}
    made, start = local.recipe(module, len(counts), SGD, **settings)
    shares = local.shares(*local.data(sum(counts)), counts)
    alone = [
        LocalEngine().fit(shares, replace(made, round=replace(made.round, advance=advance)), start) for advance in advances
    ]  # fmt: skip
    recipe, begin, stack = each.stacked(made, start, advances)
    return each.split(LocalEngine().fit(shares, recipe, begin), stack), alone


def close(together: Sequence[Outcome], alone: Sequence[Outcome]) -> None:
    for mine, other in zip(together, alone, strict=True):
        torch.testing.assert_close(mine.weights, other.weights, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(mine.buffers, other.buffers, rtol=1e-5, atol=1e-6)
        assert [set(line) for line in mine.history] == [set(line) for line in other.history]
        for key in ("loss", "lr", "rows", "weight"):
            found, expected = ([line[key] for line in x.history if key in line] for x in (mine, other))
            assert found == pytest.approx(expected, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("counts", [(37,), (20, 0, 17), (9, 9, 9, 5, 5)], ids=str)
@pytest.mark.parametrize("name", SETS)
def test_models_of_one_pass_are_those_of_separate_fits(name, counts):
    together, alone = fits(local.net(), counts, SETS[name])
    close(together, alone)
    for a, b in pairwise(alone):
        assert not torch.allclose(a.weights, b.weights, atol=1e-3)  # else equal models would prove nothing


@pytest.mark.parametrize("name", MODULES)
def test_so_they_are_with_dropout_buffers_frozen_parameters_and_without_vmap(name):
    together, alone = fits(MODULES[name](), (20, 17), SETS["rates"])
    close(together, alone)
    if name in ("batch norm", "lstm"):  # in turn, to the bit
        assert all(torch.equal(a.weights, b.weights) for a, b in zip(together, alone, strict=True))


def test_so_they_are_with_weights_of_classes_labels_that_do_not_count_and_several_passes():
    loss = nn.CrossEntropyLoss(weight=torch.tensor([0.2, 1.0, 3.0]), ignore_index=1)
    compute = local.recipe(local.net(), 1, SGD)[0].compute
    close(*fits(local.net(), (20, 17), SETS["rules"], loss=loss, compute=replace(compute, passes=3)))


def test_a_pass_in_which_one_model_gets_the_rule_of_another_is_seen():
    together, alone = fits(local.net(), (37,), SETS["rates"])
    with pytest.raises(AssertionError):
        close(together, [alone[1], alone[0], alone[2]])


def test_a_loss_that_is_the_mean_over_the_models_trains_others(monkeypatch):
    plain = Replica.backward

    def halved(self, batch, seed):
        total = plain(self, batch, seed)
        if isinstance(self.loss, Each):
            self.gradient.div_(self.loss.k)
        return total

    monkeypatch.setattr(Replica, "backward", halved)
    with pytest.raises(AssertionError):
        close(*fits(local.net(), (37,), SETS["limits"]))


def test_a_model_that_diverges_ends_the_pass():
    with pytest.raises(DivergedError):
        fits(local.net(), (37,), [SETS["rates"][0], TorchOptimizer(partial(SGD, lr=1e38))], epochs=8)


def replica(advances: Sequence[TorchOptimizer]) -> Replica:
    recipe, start, _ = each.stacked(*local.recipe(local.net(), 1, SGD), advances)
    return Replica(recipe.blueprint, start.weights.clone(), None, start.constants, recipe.loss)


@pytest.mark.parametrize("p", [1, 2, 3, 5])
def test_owners_get_whole_models(p):
    advances = SETS["rates"]
    many, made = Many(advances), replica(advances)
    n = made.layout.n // 3
    cuts = many.cuts(made, p)
    assert len(cuts) == p and cuts[0][0] == 0 and cuts[-1][1] == 3 * n
    assert all(a[1] == b[0] for a, b in pairwise(cuts)) and all(x % n == 0 for cut in cuts for x in cut)


@pytest.mark.parametrize("name", SETS)
def test_a_state_is_put_back_whatever_the_cuts(name):
    advances = SETS[name]
    many, k = Many(advances), len(advances)

    def steps(owners: list[Any], made: Replica, cuts: list[Any], first: int, count: int) -> None:
        for step in range(first, first + count):
            gradient = torch.randn(made.layout.n, generator=torch.Generator().manual_seed(step))
            for owner, cut in zip(owners, cuts, strict=True):
                owner.step(Update(gradient[slice(*cut)].clone(), 1.0), 0.0)
                owner.end_epoch([1.0] * k)

    def owners(p: int) -> tuple[list[Any], Replica, list[Any]]:
        made = replica(advances)
        cuts = many.cuts(made, p)
        return [many.start(made, cut) for cut in cuts], made, cuts

    whole = owners(1)
    steps(*whole, 0, 4)
    before = owners(2)
    steps(*before, 0, 2)
    state = many.join([owner.state() for owner in before[0]])
    many.check_state(before[1], state)
    after = owners(5)
    after[1].weights.copy_(before[1].weights)
    for owner in after[0]:
        owner.restore(state)
    steps(*after, 2, 2)
    torch.testing.assert_close(after[1].weights, whole[1].weights, rtol=1e-6, atol=1e-7)
    with pytest.raises(CheckpointError, match=r"no model"):
        many.join([before[0][0].state()])


@pytest.mark.parametrize("name", ["rules", "schedules"])
def test_a_pass_goes_on_from_a_state_on_disk(name, tmp_path):
    """As it does from what the barrier engine keeps at the driver, after a rank is lost."""
    made, start = local.recipe(local.net(), 2, SGD, batch_size=10, epochs=3, saving=Saving(1, "step"))
    shares = local.shares(*local.data(37), [20, 17])
    made, start, stack = each.stacked(made, start, SETS[name])
    whole = Keeper(made, Checkpoints(str(tmp_path), "whole", 20))
    undisturbed = each.split(LocalEngine().fit(shares, made, start, keep=whole), stack)
    again, lines = start_from(Checkpoints(str(tmp_path), "whole", 20).at(6))
    rest = LocalEngine().fit(shares, made, again, keep=Keeper(made, lines=lines))
    gone_on = each.split(replace(rest, history=[*lines, *rest.history]), stack)
    close(gone_on, undisturbed)
    assert all(torch.equal(a.weights, b.weights) for a, b in zip(gone_on, undisturbed, strict=True))
