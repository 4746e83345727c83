"""What every advance keeps: slices advanced apart are the whole vector advanced at once.

The reference is plain torch: the same optimizer, the same mean gradients, whole tensors, one process.

    n  flat weights      p  owners of slices
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, RMSprop
from torch.optim.lr_scheduler import CosineAnnealingLR, ReduceLROnPlateau, StepLR

from bigdl_lite.algorithms import Update
from bigdl_lite.algorithms.parts import TorchOptimizer
from bigdl_lite.algorithms.shadow import EMA, SWA, Shadow
from bigdl_lite.errors import RecipeError
from bigdl_lite.model.layout import blueprint
from bigdl_lite.model.replica import Replica
from bigdl_lite.vector import aligned, slices

STEPS, STEPS_OF_AN_EPOCH, ROWS = 10, 3, 8.0
OWNERS = [1, 2, 3, 5]


class MatrixNorm(torch.optim.Optimizer):
    """A rule that needs whole tensors: each step is as long as the tensor's own norm says (a small LARS)."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["seen"] = state.get("seen", 0) + 1
                norm = torch.linalg.matrix_norm(p) if p.ndim == 2 else torch.linalg.vector_norm(p)
                grad = torch.linalg.vector_norm(p.grad)
                p.sub_(p.grad, alpha=float(group["lr"] * (norm + 0.1) / (grad + 1e-6) / state["seen"]))


def two_groups(rule: Any) -> Callable[[Any], torch.optim.Optimizer]:
    """Every second tensor in a group with a rate of its own, out of order, so that groups interleave in the flat vector."""
    return lambda params: rule([{"params": list(params)[::-2], "lr": 3e-3}, {"params": list(params)[-2::-2]}])


def named_groups(params: Any) -> torch.optim.Optimizer:
    """As a user writes it, by name; falls back on position for the reference, which has a plain list."""
    named = getattr(params, "named", None) or dict(zip(NAMES, params, strict=True))
    head = [p for name, p in named.items() if name.startswith("4.")]
    body = [p for name, p in named.items() if not name.startswith("4.")]
    return AdamW([{"params": head, "lr": 1e-2, "weight_decay": 0.3}, {"params": body}], lr=1e-3)


ELEMENTWISE = {
    "sgd": partial(SGD, lr=0.1),
    "sgd momentum": partial(SGD, lr=0.1, momentum=0.9, weight_decay=1e-2),
    "sgd nesterov": partial(SGD, lr=0.1, momentum=0.9, nesterov=True),
    "adam": partial(Adam, lr=1e-2),
    "adam amsgrad": partial(Adam, lr=1e-2, amsgrad=True),
    "adam foreach": partial(Adam, lr=1e-2, foreach=True),
    "adamw": partial(AdamW, lr=1e-2, weight_decay=0.1),
    "adagrad": partial(Adagrad, lr=0.1),
    "adagrad accumulated": partial(Adagrad, lr=0.1, initial_accumulator_value=0.5),
    "rmsprop": partial(RMSprop, lr=1e-2, momentum=0.5, centered=True),
    "nadam": partial(torch.optim.NAdam, lr=1e-2),
    "radam": partial(torch.optim.RAdam, lr=1e-2),
    "adamax": partial(torch.optim.Adamax, lr=1e-2),
    "adadelta": partial(torch.optim.Adadelta, lr=1.0),
    "rprop": partial(torch.optim.Rprop, lr=1e-2),
    "asgd": partial(torch.optim.ASGD, lr=1e-2),
    "sgd momentum, two groups": two_groups(partial(SGD, lr=0.1, momentum=0.9)),
    "adam, two groups": two_groups(partial(Adam, lr=1e-2)),
    "adamw, two groups": two_groups(partial(AdamW, lr=1e-2)),
    "adagrad, two groups": two_groups(partial(Adagrad, lr=1e-2)),
    "rmsprop, two groups": two_groups(partial(RMSprop, lr=1e-2)),
    "adamw, groups by name": named_groups,
}  # fmt: skip
WHOLE = {
    "a class of one's own": MatrixNorm,
    "a class of one's own, two groups": two_groups(MatrixNorm),
    "a subclass of SGD": type("MySGD", (SGD,), {}),
}
if hasattr(torch.optim, "Adafactor"):  # since torch 2.5
    WHOLE["adafactor"] = partial(torch.optim.Adafactor, lr=1e-2)


def net() -> nn.Module:
    """3.4 thousand values in six tensors, so that five owners cut through tensors at borders that are multiples of 64."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 60), nn.Tanh(), nn.Linear(60, 30), nn.Tanh(), nn.Linear(30, 7))


NAMES = [name for name, _ in net().named_parameters()]


def gradients(n: int, steps: int = STEPS, size: float = 1.0) -> list[Tensor]:
    """Mean gradients [n], the same for every way of applying them."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, generator=generator) * size for _ in range(steps)]


def losses(epoch: int) -> float:
    return [1.0, 1.0, 1.0, 0.5][epoch]


def alone(
    make: Any, grads: list[Tensor], module: nn.Module | None = None, clip_norm: float | None = None,
    clip_value: float | None = None, scheduler: Any = None, per: str = "epoch",
) -> Tensor:  # fmt: skip
    """Plain torch."""
    module = module or net()
    params = [p for p in module.parameters() if p.requires_grad]
    optimizer = make(params)
    rate = scheduler(optimizer) if scheduler else None
    for step, grad in enumerate(grads):
        for p, g in zip(params, grad.split([p.numel() for p in params]), strict=True):
            p.grad = g.view_as(p).clone()
        if clip_value is not None:
            nn.utils.clip_grad_value_(params, clip_value)
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(params, clip_norm)
        optimizer.step()
        if rate is not None and per == "step":
            rate.step()
        if rate is not None and per == "epoch" and step % STEPS_OF_AN_EPOCH == STEPS_OF_AN_EPOCH - 1:
            epoch = step // STEPS_OF_AN_EPOCH
            rate.step(*([losses(epoch)] if isinstance(rate, ReduceLROnPlateau) else []))
    return torch.cat([p.detach().reshape(-1) for p in params])


def replica_of(module: nn.Module) -> Replica:
    made, weights, _, constants = blueprint(module)
    return Replica(made, weights, torch.zeros_like(weights), constants, nn.MSELoss())


def state_fits(advancer: Any) -> None:
    """Looked at before the first step: torch's fused kernels do not check lengths, and write beyond a short state."""
    for piece, *_ in advancer.pieces:
        for key, value in advancer.optimizer.state.get(piece, {}).items():
            assert key == "step" or value.shape == piece.shape, f"{key} {list(value.shape)} for {list(piece.shape)} values"


def together(how: Any, grads: list[Tensor], p: int, module: nn.Module | None = None, cuts: Any = None) -> Tensor:
    """p owners, each with a replica of its own module over the shared weights, as in an engine."""
    made, weights, _, constants = blueprint(module or net())
    owners = [Replica(made, weights, None, constants, nn.MSELoss()) for _ in range(p)]
    cuts = cuts or how.cuts(owners[0], p)
    advancers = [how.start(owner, cut) for owner, cut in zip(owners, cuts, strict=True)]
    for advancer in advancers:
        state_fits(advancer)
    for step, grad in enumerate(grads):
        updates = [Update(grad[a:b] * ROWS, ROWS) for a, b in cuts]
        measured = sum(advancer.measure(update) for advancer, update in zip(advancers, updates, strict=True))
        for advancer, update in zip(advancers, updates, strict=True):
            advancer.step(update, measured if how.measures else 0.0)
        if step % STEPS_OF_AN_EPOCH == STEPS_OF_AN_EPOCH - 1:
            for advancer in advancers:
                advancer.end_epoch(losses(step // STEPS_OF_AN_EPOCH))
    return weights


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("p", OWNERS)
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_an_elementwise_rule_in_slices_is_the_rule_on_the_whole(name: str, p: int) -> None:
    make = ELEMENTWISE[name]
    grads = gradients(replica_of(net()).layout.n)
    close(together(TorchOptimizer(make), grads, p), alone(make, grads))


@pytest.mark.parametrize("p", OWNERS)
@pytest.mark.parametrize("name", WHOLE)
def test_a_rule_that_needs_whole_tensors_gets_whole_tensors(name: str, p: int) -> None:
    make = WHOLE[name]
    how, replica = TorchOptimizer(make), replica_of(net())
    borders = {0, *(span.stop for span in replica.layout.parameters)}
    assert {edge for cut in how.cuts(replica, p) for edge in cut} <= borders
    shapes = {tuple(p.shape) for p in net().parameters()}
    held = [piece for cut in how.cuts(replica, p) for piece, *_ in how.start(replica, cut).pieces]
    assert {tuple(piece.shape) for piece in held} == shapes and len(held) == len(list(net().parameters()))
    grads = gradients(replica.layout.n)
    close(together(how, grads, p), alone(make, grads))


@pytest.mark.parametrize("p", OWNERS)
@pytest.mark.parametrize("name", ["adam", "adamw, groups by name", "a class of one's own"])
def test_a_shadow_advances_as_what_it_is_put_around(name: str, p: int) -> None:
    how = TorchOptimizer((ELEMENTWISE | WHOLE)[name], SCHEDULERS["StepLR per step"][0], "step", clip_norm=1.0)
    grads = gradients(replica_of(net()).layout.n)
    found = together(how, grads, p)
    for shadow in (Shadow(how, EMA(0.9), best=True), Shadow(how, SWA(start_epoch=1))):
        assert shadow.cuts(replica_of(net()), p) == how.cuts(replica_of(net()), p) and shadow.measures
        assert torch.equal(together(shadow, grads, p), found)


def test_a_rule_that_needs_whole_tensors_differs_where_it_is_cut_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: were the custom rule taken for an element-wise one, its weights would be others."""
    from bigdl_lite.algorithms import parts

    monkeypatch.setattr(parts, "_ELEMENTWISE", (*parts._ELEMENTWISE, MatrixNorm))
    grads = gradients(replica_of(net()).layout.n)
    assert (together(TorchOptimizer(MatrixNorm), grads, 3) - alone(MatrixNorm, grads)).abs().max() > 1e-3


def test_a_wrong_gradient_is_seen() -> None:
    """Negative control: one value in thousands, off by a tenth, in one step."""
    grads = gradients(replica_of(net()).layout.n)
    wrong = [grad.clone() for grad in grads]
    wrong[3][1700] += 0.1
    make = ELEMENTWISE["sgd momentum"]
    assert (together(TorchOptimizer(make), wrong, 3) - alone(make, grads)).abs().max() > 1e-3


@pytest.mark.parametrize("p", [*OWNERS, 200])
def test_cuts_tile_the_vector_whatever_the_number_of_owners(p: int) -> None:
    replica = replica_of(net())
    for make in (Adam, MatrixNorm):
        cuts = TorchOptimizer(make).cuts(replica, p)
        assert len(cuts) == p and cuts[0][0] == 0 and cuts[-1][1] == replica.layout.n
        assert all(a[1] == b[0] for a, b in pairwise(cuts))


def test_elementwise_rules_are_cut_evenly_and_through_tensors() -> None:
    replica = replica_of(net())
    assert TorchOptimizer(Adam).cuts(replica, 3) == aligned(slices(replica.layout.n, 3))


def test_state_exists_once_among_all_owners() -> None:
    replica = replica_of(net())
    how = TorchOptimizer(Adam)
    advancers = [how.start(replica, cut) for cut in how.cuts(replica, 3)]
    for advancer, cut in zip(advancers, how.cuts(replica, 3), strict=True):
        advancer.step(Update(torch.ones(cut[1] - cut[0]), 1.0), 0.0)
    moments = [s["exp_avg"].numel() for advancer in advancers for s in advancer.optimizer.state.values()]
    assert sum(moments) == replica.layout.n and len(moments) == 3  # one long piece each, whatever the number of tensors


@pytest.mark.parametrize("p", OWNERS)
@pytest.mark.parametrize("size", [0.001, 1.0], ids=["below the norm", "above the norm"])
def test_clip_norm_is_that_of_the_whole_gradient(p: int, size: float) -> None:
    grads = gradients(replica_of(net()).layout.n, size=size)
    how = TorchOptimizer(partial(SGD, lr=0.1), clip_norm=1.0)
    assert how.measures
    close(together(how, grads, p), alone(partial(SGD, lr=0.1), grads, clip_norm=1.0))


def test_clip_norm_changes_something() -> None:
    """Negative control of the test above."""
    grads = gradients(replica_of(net()).layout.n)
    clipped = together(TorchOptimizer(partial(SGD, lr=0.1), clip_norm=1.0), grads, 2)
    assert (clipped - alone(partial(SGD, lr=0.1), grads)).abs().max() > 1e-2


@pytest.mark.parametrize("p", OWNERS)
def test_clip_value_is_clip_grad_value(p: int) -> None:
    grads = gradients(replica_of(net()).layout.n)
    make = partial(SGD, lr=0.1, momentum=0.9)
    close(together(TorchOptimizer(make, clip_value=0.3), grads, p), alone(make, grads, clip_value=0.3))


SCHEDULERS = {
    "StepLR per epoch": (partial(StepLR, step_size=2, gamma=0.1), "epoch"),
    "StepLR per step": (partial(StepLR, step_size=3, gamma=0.5), "step"),
    "cosine per step": (partial(CosineAnnealingLR, T_max=STEPS), "step"),
    "plateau per epoch": (partial(ReduceLROnPlateau, factor=0.1, patience=0), "epoch"),
}


@pytest.mark.parametrize("p", [1, 3, 200])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduler_runs_on_every_owner_as_it_would_alone(name: str, p: int) -> None:
    scheduler, per = SCHEDULERS[name]
    grads = gradients(replica_of(net()).layout.n)
    make = partial(SGD, lr=0.1, momentum=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # an owner of nothing must not warn that its optimizer was never stepped
        found = together(TorchOptimizer(make, scheduler, per), grads, p)
    close(found, alone(make, grads, scheduler=scheduler, per=per))
    assert (found - alone(make, grads)).abs().max() > 1e-3  # negative control: the rate matters


def test_rates_are_those_of_now_one_a_group() -> None:
    replica = replica_of(net())
    how = TorchOptimizer(two_groups(partial(SGD, lr=0.1)), partial(StepLR, step_size=1, gamma=0.5), "epoch")
    advancer = how.start(replica, (0, replica.layout.n))
    assert advancer.rates() == [3e-3, 0.1]
    advancer.step(Update(torch.zeros(replica.layout.n), 1.0), 0.0)
    advancer.end_epoch(1.0)
    assert advancer.rates() == pytest.approx([1.5e-3, 0.05])


class WithoutRate(torch.optim.Optimizer):
    """A rule of one's own that has no learning rate; torch asks for none."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            p.sub_(p.grad.sign() * 1e-3)


def test_a_rule_without_a_learning_rate_can_be_watched_too() -> None:
    replica = replica_of(net())
    assert len(TorchOptimizer(WithoutRate).start(replica, (0, replica.layout.n)).rates()) == 1


def test_a_plateau_scheduler_per_step_is_refused_before_any_job() -> None:
    with pytest.raises(RecipeError, match="schedulerInterval='epoch'"):
        TorchOptimizer(partial(SGD, lr=0.1), ReduceLROnPlateau, "step").check(replica_of(net()))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (torch.optim.LBFGS, "LBFGS is not supported.*take Adam or SGD"),
        (torch.optim.SparseAdam, "SparseAdam is not supported"),
        (lambda params: SGD([nn.Parameter(torch.zeros(3, 2))], lr=0.1), r"shape \[3, 2\] that is not one of the module's"),
        (lambda params: SGD([*params, nn.Parameter(torch.zeros(5))], lr=0.1), "not one of the module's trainable"),
        (lambda params: None, "returned NoneType, not a torch.optim.Optimizer"),
    ],
    ids=["LBFGS", "SparseAdam", "foreign", "one foreign among its own", "no optimizer"],
)
def test_an_optimizer_that_cannot_work_is_refused_on_the_driver(make: Any, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        TorchOptimizer(make).check(replica_of(net()))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"per": "batch"}, "schedulerInterval is 'batch'"),
        ({"clip_norm": 0.0}, "clipNorm is 0.0"),
        ({"clip_norm": float("nan")}, "clipNorm is nan"),
        ({"clip_value": -1.0}, "clipValue is -1.0"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_when_it_is_made(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        TorchOptimizer(Adam, **settings)


@pytest.mark.parametrize("p", [1, 3])
def test_a_parameter_that_the_optimizer_does_not_hold_stays(p: int) -> None:
    grads = gradients(replica_of(net()).layout.n)
    make = lambda params: SGD(list(params)[:1], lr=0.1)  # noqa: E731
    close(together(TorchOptimizer(make), grads, p), alone(make, grads))


@pytest.mark.parametrize("p", [1, 2, 3])
def test_frozen_and_tied_parameters_are_no_trouble(p: int) -> None:
    def module() -> nn.Module:
        made = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40), nn.Linear(40, 9))
        torch.manual_seed(3)
        for x in made.parameters():
            nn.init.normal_(x)
        made[1].weight = made[0].weight
        made[0].bias.requires_grad_(False)
        return made

    grads = gradients(replica_of(module()).layout.n)
    make = partial(Adam, lr=1e-2)
    close(together(TorchOptimizer(make), grads, p, module()), alone(make, grads, module()))


class WithScale(nn.Module):
    """Parameters without dimensions and without values, which real models have (CLIP's temperature, nn.Linear(0, 0))."""

    def __init__(self, empty: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.body = nn.Linear(20, 20)
        self.none = nn.Linear(0, 0) if empty else nn.Identity()
        self.shift = nn.Parameter(torch.tensor(1.0))


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("name", ["sgd momentum", "adam", "adagrad", "adagrad accumulated", "rmsprop"])
def test_a_parameter_without_dimensions_is_advanced(name: str, p: int) -> None:
    make = ELEMENTWISE[name]
    grads = gradients(replica_of(WithScale(False)).layout.n)
    close(together(TorchOptimizer(make), grads, p, WithScale(False)), alone(make, grads, WithScale(False)))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_parameters_without_values_are_no_trouble() -> None:
    make = ELEMENTWISE["adam"]
    grads = gradients(replica_of(WithScale(True)).layout.n)
    close(together(TorchOptimizer(make), grads, 2, WithScale(True)), alone(make, grads, WithScale(True)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["sgd momentum", "adam"])
def test_modules_of_other_dtypes_advance_in_their_own(dtype: torch.dtype, name: str) -> None:
    make = ELEMENTWISE[name]
    grads = [grad.to(dtype) for grad in gradients(replica_of(net()).layout.n)]
    found = together(TorchOptimizer(make), grads, 2, net().to(dtype))
    assert found.dtype == dtype
    tolerance = 1e-12 if dtype == torch.float64 else 2e-2
    torch.testing.assert_close(found, alone(make, grads, net().to(dtype)), rtol=tolerance, atol=tolerance)


def test_the_mean_is_taken_over_the_weight_of_the_update() -> None:
    replica = replica_of(net())
    before = replica.weights.clone()
    advancer = TorchOptimizer(partial(SGD, lr=1.0)).start(replica, (0, replica.layout.n))
    advancer.step(Update(torch.full([replica.layout.n], 6.0), 4.0), 0.0)
    close(replica.weights, before - 1.5)


def test_checking_advances_nothing() -> None:
    replica = replica_of(net())
    before = replica.weights.clone()
    TorchOptimizer(Adam, partial(StepLR, step_size=1)).check(replica)
    assert torch.equal(replica.weights, before)


def test_the_users_own_module_is_untouched() -> None:
    module = net()
    before = copy.deepcopy(module.state_dict())
    together(TorchOptimizer(Adam), gradients(replica_of(module).layout.n), 2, module)
    assert all(torch.equal(before[name], x) for name, x in module.state_dict().items())
