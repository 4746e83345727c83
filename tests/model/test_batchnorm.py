"""Batch normalisation over parts is batch normalisation over the whole, forward and backward.

Ranks are threads; what they sum goes through a table, as in the engines.
"""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bigdl_lite.batch import Batch
from bigdl_lite.model.batchnorm import SyncBatchNorm, connect, synchronised
from bigdl_lite.model.layout import blueprint
from bigdl_lite.model.replica import Replica

pytestmark = pytest.mark.timeout(60)

# rows of each part; an empty one is what Spark deals
PARTS = [[12], [6, 6], [1, 11], [5, 0, 7], [3, 3, 3, 3], [0, 12]]
every_parts = pytest.mark.parametrize("parts", PARTS, ids=str)


class Table:
    """all_reduce for k threads: everyone writes a row, everyone sums them in order."""

    def __init__(self, k: int) -> None:
        self.rows: list[Tensor | None] = [None] * k
        self.barrier = threading.Barrier(k, timeout=20)

    def of(self, rank: int) -> Any:
        def all_reduce(x: Tensor) -> Tensor:
            self.rows[rank] = x.detach().clone()
            self.barrier.wait()
            total = torch.stack(self.rows).sum(0)
            self.barrier.wait()
            return total

        return all_reduce


def in_threads(k: int, act: Any) -> list[Any]:
    seen: list[Any] = [None] * k

    def run(r: int) -> None:
        try:
            seen[r] = act(r)
        except BaseException as error:
            seen[r] = error

    started = [threading.Thread(target=run, args=(r,), daemon=True) for r in range(k)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    for x in seen:
        if isinstance(x, BaseException):
            raise x
    return seen


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


NORMS = {
    "1d": (nn.BatchNorm1d, {}, [12, 3]),
    "1d with length": (nn.BatchNorm1d, {}, [12, 3, 4]),
    "2d": (nn.BatchNorm2d, {}, [12, 3, 4, 5]),
    "3d": (nn.BatchNorm3d, {}, [12, 3, 2, 2, 2]),
    "not affine": (nn.BatchNorm1d, {"affine": False}, [12, 3]),
    "no running statistics": (nn.BatchNorm1d, {"track_running_stats": False}, [12, 3]),
    "cumulative": (nn.BatchNorm1d, {"momentum": None}, [12, 3]),
    "momentum and eps": (nn.BatchNorm1d, {"momentum": 0.3, "eps": 0.1}, [12, 3]),
}


def problem(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """The plain layer with weights that are not 1 and 0, an input far from normal, and a gradient of the output."""
    kind, settings, shape = NORMS[name]
    generator = torch.Generator().manual_seed(0)
    layer = kind(3, **settings)
    for p in layer.parameters():
        nn.init.uniform_(p, 0.5, 2.0, generator=generator)
    x = torch.randn(shape, generator=generator) * 3 + 5
    return layer, x, torch.randn(shape, generator=generator)


@every_parts
@pytest.mark.parametrize("name", NORMS)
def test_parts_normalised_together_are_the_whole_normalised_at_once(name: str, parts: list[int]) -> None:
    layer, x, slope = problem(name)
    x_whole = x.clone().requires_grad_()
    expected = layer(x_whole)
    (expected * slope).sum().backward()

    plain, _, _ = problem(name)
    table = Table(len(parts))

    def rank(r: int) -> tuple[nn.Module, Tensor, Tensor]:
        mine = synchronised(nn.Sequential(copy.deepcopy(plain)))
        connect(mine, table.of(r))
        part = x.split(parts)[r].clone().requires_grad_()
        out = mine(part)
        (out * slope.split(parts)[r]).sum().backward()
        return mine[0], out.detach(), part.grad

    found = in_threads(len(parts), rank)
    close(torch.cat([out for _, out, _ in found]), expected.detach())
    close(torch.cat([grad for _, _, grad in found]), x_whole.grad)
    for (key, p), *others in zip(layer.named_parameters(), *(m.parameters() for m, _, _ in found), strict=True):
        torch.testing.assert_close(sum(q.grad for q in others), p.grad, rtol=1e-6, atol=1e-5, msg=key)
    for mine, _, _ in found:
        for key, b in layer.named_buffers():
            close(dict(mine.named_buffers())[key], b)


def test_parts_normalised_apart_differ() -> None:
    """Negative control: the plain layer on each part gives other outputs and other statistics."""
    layer, x, _ = problem("1d")
    apart = copy.deepcopy(layer)
    expected = layer(x)
    found = torch.cat([apart(part) for part in x.split([5, 7])])
    assert (found - expected).abs().max() > 1e-2
    assert (apart.running_mean - layer.running_mean).abs().max() > 1e-2


@every_parts
def test_replicas_of_a_network_give_the_gradient_of_the_whole(parts: list[int]) -> None:
    def net() -> nn.Module:
        torch.manual_seed(1)
        first, second = [nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU()], [nn.Linear(6, 6), nn.BatchNorm1d(6)]
        return nn.Sequential(*first, *second, nn.Linear(6, 3))

    generator = torch.Generator().manual_seed(2)
    x, y = torch.randn(12, 5, generator=generator), torch.randint(0, 3, (12,), generator=generator)
    module, loss = net().double(), nn.CrossEntropyLoss()
    value = loss(module(x.double()), y) * 12
    value.backward()

    made, weights, buffers, constants = blueprint(synchronised(net().double()))
    table = Table(len(parts))
    torch.manual_seed(3)

    def rank(r: int) -> tuple[Tensor, float, Tensor]:
        replica = Replica(made, weights, torch.zeros_like(weights), constants, loss)
        connect(replica.module, table.of(r))
        replica.buffers = buffers
        told = replica.backward(Batch((x.double().split(parts)[r],), y.split(parts)[r]), seed=0)
        return replica.gradient, told, replica.buffers

    found = in_threads(len(parts), rank)
    close(sum(gradient for gradient, _, _ in found), torch.cat([p.grad.reshape(-1) for p in module.parameters()]))
    assert sum(told for _, told, _ in found) == pytest.approx(float(value.detach()), abs=1e-6)
    expected = torch.cat([b.double().reshape(-1) for b in module.buffers()])
    for _, _, after in found:
        close(after, expected)


def test_one_rank_that_is_not_connected_is_a_plain_batch_norm() -> None:
    layer, x, _ = problem("2d")
    alone = synchronised(nn.Sequential(copy.deepcopy(layer)))
    close(alone(x), layer(x))


@pytest.mark.parametrize("name", NORMS)
def test_evaluation_is_that_of_the_plain_layer_and_meets_nobody(name: str) -> None:
    layer, x, _ = problem(name)
    layer(x)
    mine = synchronised(nn.Sequential(copy.deepcopy(layer))).eval()
    met: list[Tensor] = []
    connect(mine, lambda sums: met.append(sums) or sums)
    close(mine(x), layer.eval()(x))
    assert not met or layer.running_mean is None  # without running statistics there is nothing to evaluate with


def test_input_without_channels_is_refused_with_its_shape() -> None:
    with pytest.raises(ValueError, match=r"takes \[rows, channels, ...\], got \[4\]"):
        SyncBatchNorm(3)(torch.zeros(4))


def test_a_replaced_layer_shares_parameters_and_buffers_and_nothing_else_changes() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.BatchNorm1d(3), nn.LayerNorm(3)), nn.BatchNorm1d(3).eval())
    before = dict(module.named_parameters()) | dict(module.named_buffers())
    assert synchronised(module) is module
    after = dict(module.named_parameters()) | dict(module.named_buffers())
    assert before.keys() == after.keys() and all(before[k] is after[k] for k in before)
    kinds = [type(m) for m in module.modules() if not list(m.children())]
    assert kinds == [nn.Linear, SyncBatchNorm, nn.LayerNorm, SyncBatchNorm]
    assert module[1][0].training and not module[2].training
    synchronised(module)  # twice does no harm
    assert all(before[k] is x for k, x in module.named_parameters())


def test_a_layer_that_stands_in_two_places_is_replaced_in_both_and_stays_one() -> None:
    norm = nn.BatchNorm1d(3)
    module = synchronised(nn.Sequential(norm, nn.ReLU(), norm))
    assert isinstance(module[0], SyncBatchNorm) and isinstance(module[2], SyncBatchNorm)
    assert module[0].weight is module[2].weight


def test_a_network_that_is_nothing_but_a_batch_norm_is_replaced_too() -> None:
    assert isinstance(synchronised(nn.BatchNorm1d(3)), SyncBatchNorm)


def test_large_means_lose_no_digits() -> None:
    """S2 / N - mean^2 cancels; the sums are in float64 for this."""
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0)) + 1e4
    out = synchronised(nn.Sequential(nn.BatchNorm1d(3)))(x)
    expected = (x.double() - x.double().mean(0)) / (x.double().var(0, unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=1e-5)
