"""A stack of k modules computes what each of them computes alone: outputs, gradients, buffers and random numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bigdl_lite.batch import Batch
from bigdl_lite.engine.pack import pack, unpack
from bigdl_lite.errors import RecipeError
from bigdl_lite.model import stack as source
from bigdl_lite.model.layout import blueprint
from bigdl_lite.model.loss import Each, Squeezed, by_row, class_rule, rule_of, summed, weight_of
from bigdl_lite.model.replica import Replica
from bigdl_lite.model.stack import Stack

pytestmark = pytest.mark.timeout(60)

K, B = 3, 8


class Careful(nn.Module):
    """Its control flow looks at values."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(5, 2)

    def forward(self, x):
        y = self.out(x)
        return -y if y.sum() > 0 else y


class Shared(nn.Module):
    """One weight in two places, one that is frozen, and a buffer of complex numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.scale = nn.Linear(5, 5), nn.Linear(5, 5), nn.Parameter(torch.tensor(2.0), requires_grad=False)
        self.b.weight = self.a.weight
        self.register_buffer("turn", torch.tensor([1j]))

    def forward(self, x):
        return self.b(self.a(x)) * self.scale * self.turn.imag


# the module, and whether vmap does it
MODULES: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "mlp": (lambda: nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2)), True),
    "dropout": (lambda: nn.Sequential(nn.Dropout(0.3), nn.Linear(5, 7), nn.Dropout(0.5), nn.Linear(7, 2)), True),
    "shared": (Shared, True),
    "batch norm": (lambda: nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 2)), False),
    "convolution": (lambda: nn.Sequential(nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 2, 3), nn.Flatten()), False),
    "attention": (
        lambda: nn.Sequential(
            nn.Unflatten(1, (5, 1)), nn.Linear(1, 4), nn.TransformerEncoderLayer(4, 2, 8, 0.5, batch_first=True), nn.Flatten()
        ), False,
    ),
    "control flow": (Careful, False),
}  # fmt: skip
every_module = pytest.mark.parametrize("name", MODULES)


def stacked(module: nn.Module) -> Stack:
    """Models that differ: the second and third are moved a little."""
    made = Stack(*blueprint(module), K)
    with torch.no_grad():
        made.stack.add_(torch.arange(K).reshape(K, 1) * torch.linspace(-0.1, 0.1, made.inner.n))
    return made


def alone(made: Stack, i: int) -> nn.Module:
    module = made.one(made.stack.detach()[i].clone()).train(made.training)
    for name, b in module.named_buffers():
        if not b.is_complex():
            j = [span.name for span in made.inner.buffers].index(name)
            b.copy_(getattr(made, f"buffer{j}")[i])
    return module


def seeded(module: nn.Module, x: Tensor, seed: int = 5) -> Tensor:
    torch.manual_seed(seed)
    return module(x)


def rows() -> Tensor:
    return torch.randn(B, 5, generator=torch.Generator().manual_seed(1))


@every_module
def test_each_model_computes_what_it_computes_alone(name):
    torch.manual_seed(0)
    make, together = MODULES[name]
    made, x = stacked(make()), rows()
    singles = [alone(made, i) for i in range(K)]
    output = seeded(made, x)
    assert output.shape[:2] == (B, K) and made._together[True] is together
    for i, single in enumerate(singles):
        torch.testing.assert_close(output[:, i], seeded(single, x))
        assert output[:, i].is_contiguous()
    (output**2).sum().backward()
    for i, single in enumerate(singles):
        fresh = alone(made, i)
        (seeded(fresh, x) ** 2).sum().backward()
        gradient = torch.cat([p.grad.reshape(-1) for p in fresh.parameters() if p.requires_grad])
        torch.testing.assert_close(made.stack.grad[i], gradient)
        for j, span in enumerate(made.inner.buffers):
            torch.testing.assert_close(getattr(made, f"buffer{j}")[i], dict(single.named_buffers())[span.name])


@every_module
def test_so_it_does_in_evaluation(name):
    torch.manual_seed(0)
    made, x = stacked(MODULES[name][0]()).eval(), rows()
    with torch.inference_mode():
        output = made(x)
        for i in range(K):
            torch.testing.assert_close(output[:, i], alone(made, i)(x))


def test_random_numbers_of_other_models_are_seen_and_avoided(monkeypatch):
    torch.manual_seed(0)
    made, x, plain = stacked(MODULES["dropout"][0]()), rows(), source.vmap
    monkeypatch.setattr(source, "vmap", lambda function, randomness: plain(function, randomness="different"))
    assert torch.equal(seeded(made, x)[:, 1], seeded(alone(made, 1), x)) and made._together[True] is False
    made._together[True] = True
    assert not torch.allclose(seeded(made, x)[:, 1], seeded(alone(made, 1), x))


def test_trying_changes_neither_buffers_nor_random_numbers():
    torch.manual_seed(0)
    made = stacked(nn.Sequential(nn.Dropout(0.5), nn.Linear(5, 2)))
    torch.manual_seed(3)
    first = made(rows())
    assert torch.equal(first, seeded(made, rows(), 3))


def test_a_stack_has_one_parameter_and_travels_without_its_weights():
    made = Stack(*blueprint(nn.Sequential(nn.Linear(500, 100), nn.BatchNorm1d(100), nn.Linear(100, 2))), 8)
    assert [name for name, _ in made.named_parameters()] == ["stack"] and made.stack.shape[0] == 8
    plan, weights, _, constants = blueprint(made)
    assert plan.layout.n == 8 * made.inner.n and plan.layout.m == 8 * (1 + made.inner.m) and not constants
    data = pack(plan)
    assert len(data) < weights.nbytes / 8
    again = unpack(data).build(weights, constants)
    x = torch.randn(B, 500)
    assert torch.equal(again(x), made(x)) and again.plan.skeleton is not made.plan.skeleton


def test_weights_of_models_follow_one_another():
    plan, weights, _, constants = blueprint(Stack(*blueprint(nn.Linear(5, 2)), K))
    module = plan.build(weights, constants)
    assert torch.equal(module.one(weights[12:24]).weight, weights[12:22].view(2, 5))


def test_a_module_that_returns_no_single_tensor_is_refused():
    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    with pytest.raises(RecipeError, match=r"one tensor"):
        Stack(*blueprint(Pair(5, 2)), K)(rows())


LOSSES: dict[str, tuple[Any, Callable[[], Tensor], int]] = {
    "classes": (nn.CrossEntropyLoss(torch.tensor([0.5, 2.0]), ignore_index=0), lambda: torch.arange(B) % 2, 2),
    "squeezed": (Squeezed(nn.MSELoss()), lambda: torch.linspace(0, 1, B), 1),
    "a function": (lambda output, target: (output.view(-1) - target).abs().mean(), lambda: torch.linspace(0, 1, B), 1),
}  # fmt: skip


# a function of the user's says a value for each row by itself, where rows have weights
@pytest.mark.parametrize(
    ("name", "weighted"), [("classes", False), ("classes", True), ("squeezed", False), ("squeezed", True), ("a function", False)]
)
def test_each_says_the_loss_of_each_model(name, weighted):
    rule, target, outputs = LOSSES[name]
    rule = by_row(rule) if weighted else rule
    loss, output = Each(rule, K), torch.randn(K, B, outputs).movedim(0, 1)
    batch = Batch((output,), target(), torch.linspace(0, 2, B) if weighted else None)
    weight = weight_of(loss, batch)
    assert weight == weight_of(rule, batch) and rule_of(loss) is rule_of(rule)
    assert class_rule(loss, batch.target) is class_rule(rule, batch.target)
    expected = [summed(rule, output[:, i], batch, weight) for i in range(K)]
    torch.testing.assert_close(summed(loss, output, batch, weight), torch.stack(expected).reshape(K))


def test_a_replica_tells_the_loss_of_each_model_and_the_gradient_of_all():
    torch.manual_seed(0)
    made = stacked(nn.Linear(5, 2))
    plan, weights, _, constants = blueprint(made)
    replica = Replica(plan, weights, torch.zeros_like(weights), constants, Each(nn.CrossEntropyLoss(), K))
    batch = Batch((rows(),), torch.arange(B) % 2)
    total = replica.backward(batch, 0)
    for i in range(K):
        plain, one, *_ = blueprint(alone(made, i))
        single = Replica(plain, one, torch.zeros_like(one), {}, nn.CrossEntropyLoss())
        assert replica.module.told[i].item() == pytest.approx(single.backward(batch, 0), rel=1e-6)
        torch.testing.assert_close(replica.gradient.view(K, -1)[i], single.gradient)
    assert total == pytest.approx(replica.module.told.mean().item(), rel=1e-6)


def test_many_rows_go_in_turn_and_give_the_same():
    torch.manual_seed(0)
    made = stacked(nn.Sequential(nn.Linear(5, 7), nn.Dropout(0.2), nn.Linear(7, 2)))
    plan, weights, _, constants = blueprint(made)
    replica = Replica(plan, weights, torch.zeros_like(weights), constants, Each(nn.CrossEntropyLoss(), K))
    many = source._SMALL // made.inner.n + 1
    batch = Batch((torch.randn(many, 5),), torch.arange(many) % 2)
    assert not replica.module.together(*batch.inputs) and replica.module.together(batch.inputs[0][:-1])
    first, gradient, told = replica.backward(batch, 0), replica.gradient.clone(), replica.module.told.clone()
    replica.module.together = lambda *inputs: True
    assert first == pytest.approx(replica.backward(batch, 0), rel=1e-6)
    torch.testing.assert_close(gradient, replica.gradient, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(told, replica.module.told)
