"""What the state of every advance keeps: a fit that is saved and gone on with, by any cuts, is the fit that nobody disturbed.

Every state goes the way that a checkpoint goes: strict JSON and the bytes of safetensors.

    A, B  numbers of owners before and after      n  flat weights
"""

from __future__ import annotations

import copy
import json
import logging
import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, RMSprop
from torch.optim import lr_scheduler as lr

from bigdl_lite.algorithms import State, Update, durable
from bigdl_lite.algorithms.parts import TorchOptimizer
from bigdl_lite.algorithms.shadow import EMA, Shadow
from bigdl_lite.data.manifest import from_json, pack, to_json
from bigdl_lite.errors import CheckpointError
from bigdl_lite.model.layout import blueprint
from bigdl_lite.model.replica import Replica
from tests.contracts.test_advances import ELEMENTWISE, ROWS, STEPS_OF_AN_EPOCH, WHOLE, WithScale, gradients, net, two_groups

STEPS = 9
MANY = 60  # more than there are tensors, or pieces of 64 values: some own nothing
STOPS = [0, 1, 4, 6]  # before the first step, after it, within an epoch, between two epochs
OWNERS = [(1, 1), (3, 3), (1, 2), (5, 1), (3, 5), (MANY, 2)]


class LARS(torch.optim.Optimizer):
    """A rule on whole tensors with all kinds of state: of another shape, 0-dim, nested, beside the parameters, in the group."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "k": 0})
        self.state["calls"] = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.state["calls"] += 1
        for group in self.param_groups:
            group["k"] += 1
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state |= {"rows": p.new_zeros(len(p.reshape(-1)[::7])), "norm": p.new_ones(()), "seen": [0, {"of": ()}]}
                state["rows"].mul_(0.9).add_(p.grad.reshape(-1)[::7])
                state["norm"].mul_(0.5).add_(torch.linalg.vector_norm(p))
                state["seen"] = [state["seen"][0] + 1, {"of": tuple(p.shape)}]
                scale = state["norm"] * state["rows"].mean() / (self.state["calls"] + group["k"] + state["seen"][0])
                p.sub_(p.grad * scale, alpha=float(group["lr"]))


def skipping(rule: Any) -> Any:
    return lambda params: rule([{"params": list(params)[1:3]}, {"params": list(params)[4:5], "lr": 3e-3}])


def muon(params: Any) -> torch.optim.Optimizer:
    return torch.optim.Muon([p for p in params if p.ndim == 2], lr=1e-2)


RULES: dict[str, Any] = {
    **ELEMENTWISE,
    **WHOLE,
    "sgd, one group without momentum": lambda params: SGD(
        [{"params": list(params)[::2], "momentum": 0.0}, {"params": list(params)[1::2]}], lr=0.1, momentum=0.9
    ),
    "adam without some": skipping(partial(Adam, lr=1e-2)),
    "adagrad without some": skipping(partial(Adagrad, lr=1e-1)),
    "adam, not fused": partial(Adam, lr=1e-2, fused=False, foreach=False),
    "adam, rate as a tensor": lambda params: Adam(params, lr=torch.tensor(0.01), foreach=False),
    "adagrad, decaying": partial(Adagrad, lr=0.1, lr_decay=0.5, initial_accumulator_value=0.5),
    "LARS": LARS,
    "LARS, two groups": two_groups(LARS),
}
if hasattr(torch.optim, "Muon"):  # since torch 2.9
    RULES["muon"] = muon
OF_SLICES = [name for name in RULES if name not in WHOLE and "LARS" not in name and name != "muon"]


class Owners:
    """p owners over shared weights, as in an engine; `grads` are those of all steps, whoever takes them."""

    def __init__(
        self, how: Any, p: int, weights: Tensor | None = None, module: Callable[[], nn.Module] = net, device: str = "cpu"
    ) -> None:
        made, fresh, _, constants = blueprint(module())
        self.how, self.weights = how, (fresh if weights is None else weights.clone()).to(device)
        replica = Replica(made, self.weights, None, constants, nn.MSELoss())
        self.cuts = how.cuts(replica, p)
        self.advancers = [how.start(replica, cut) for cut in self.cuts]

    def walk(self, first: int, last: int) -> Owners:
        grads = gradients(len(self.weights), STEPS)
        for step in range(first, last):
            grad = grads[step].to(self.weights)
            for advancer, (a, b) in zip(self.advancers, self.cuts, strict=True):
                advancer.step(Update(grad[a:b] * ROWS, ROWS), 0.0)
            if step % STEPS_OF_AN_EPOCH == STEPS_OF_AN_EPOCH - 1:
                for advancer in self.advancers:
                    advancer.end_epoch([1.0, 2.0, 0.5][step // STEPS_OF_AN_EPOCH])
        return self

    def state(self) -> State:
        return through_a_file(self.how.join(advancer.state() for advancer in self.advancers))

    def put(self, state: State) -> Owners:
        for advancer in self.advancers:
            advancer.restore(state)
        return self


def through_a_file(state: State) -> State:
    _, parts = pack(state.tensors)
    facts = json.dumps(to_json(state.facts), allow_nan=False)
    return State(safetensors.torch.load(b"".join(bytes(part) for part in parts)), from_json(json.loads(facts)))


def undisturbed(how: Any, p: int = 1, **kind: Any) -> Tensor:
    return Owners(how, p, **kind).walk(0, STEPS).weights


def resumed(how: Any, a: int, b: int, stop: int = 4, change: Callable[[State], State] = lambda state: state, **kind: Any) -> Tensor:
    before = Owners(how, a, **kind).walk(0, stop)
    return Owners(how, b, before.weights, **kind).put(change(before.state())).walk(stop, STEPS).weights


def wherever_it_stops(how: Any, a: int, b: int, **kind: Any) -> Iterator[tuple[int, Tensor]]:
    """The weights of fits that were stopped at each of STOPS with a owners and went on with b."""
    before = Owners(how, a, **kind)
    for first, stop in pairwise([0, *STOPS]):
        before.walk(first, stop)
        yield stop, Owners(how, b, before.weights, **kind).put(before.state()).walk(stop, STEPS).weights


def told(owners: Owners) -> list[Any]:
    """All that an owner holds but tensors and pieces, as text."""
    return [to_json({**advancer.state().facts, "pieces": [], "cut": (), "shared": {}}) for advancer in owners.advancers]


@pytest.mark.parametrize(("a", "b"), OWNERS)
@pytest.mark.parametrize("name", RULES)
def test_a_fit_that_is_resumed_is_the_fit_that_was_not_disturbed(name: str, a: int, b: int) -> None:
    how = TorchOptimizer(RULES[name])
    expected = undisturbed(how, b)
    assert torch.equal(expected, undisturbed(how))
    for stop, weights in wherever_it_stops(how, a, b):
        assert torch.equal(weights, expected), f"stopped after {stop}"


@pytest.mark.parametrize(("a", "b"), OWNERS)
@pytest.mark.parametrize("name", ["sgd momentum", "adamw, groups by name", "LARS"])
def test_a_fit_with_a_shadow_is_resumed_like_one_without(name: str, a: int, b: int) -> None:
    how = Shadow(TorchOptimizer(RULES[name], SCHEDULERS["one cycle"] if name != "LARS" else None, "step"), EMA(0.9))
    expected = Owners(how, b).walk(0, STEPS)
    assert torch.equal(expected.weights, undisturbed(how.advance))
    for stop in STOPS:
        before = Owners(how, a).walk(0, stop)
        after = Owners(how, b, before.weights).put(before.state()).walk(stop, STEPS)
        assert torch.equal(after.weights, expected.weights), f"stopped after {stop}"
        assert to_json(after.state().facts) == to_json(expected.state().facts)
        assert torch.equal(after.state().tensors["shadow/average"], expected.state().tensors["shadow/average"])


@pytest.mark.parametrize("name", RULES)
def test_the_joined_state_is_the_same_for_all_cuts(name: str) -> None:
    one, *others = (Owners(TorchOptimizer(RULES[name]), p).walk(0, 4).state() for p in (1, 2, 5, MANY))
    for other in others:
        assert other.facts == one.facts or to_json(other.facts) == to_json(one.facts)
        assert other.tensors.keys() == one.tensors.keys()
        assert all(torch.equal(x, one.tensors[key]) and x.dtype == one.tensors[key].dtype for key, x in other.tensors.items())


@pytest.mark.parametrize("p", [1, 3])
@pytest.mark.parametrize("name", RULES)
def test_what_was_put_back_is_told_again(name: str, p: int) -> None:
    how = TorchOptimizer(RULES[name], partial(lr.StepLR, step_size=1, gamma=0.7), "step")
    before = Owners(how, p).walk(0, 4)
    after = Owners(how, p, before.weights).put(before.state())
    assert to_json(after.state().facts) == to_json(before.state().facts)
    assert [x.rates() for x in after.advancers] == [x.rates() for x in before.advancers]
    assert before.advancers[0].rates() != Owners(how, p).advancers[0].rates()


class Warm:
    """A function that is an object: torch saves what it holds."""

    def __init__(self, by: float = 0.5) -> None:
        self.by, self.calls = by, 0

    def __call__(self, step: int) -> float:
        self.calls += 1
        return self.by ** min(step, self.calls)


def sequence(optimizer: Any) -> Any:
    return lr.SequentialLR(optimizer, [lr.LinearLR(optimizer, 0.1, total_iters=3), lr.CosineAnnealingLR(optimizer, 5)], [2])


def chain(optimizer: Any) -> Any:
    return lr.ChainedScheduler([lr.ConstantLR(optimizer, 0.3, 3), lr.ExponentialLR(optimizer, 0.8)])


SCHEDULERS: dict[str, Any] = {
    "lambda": partial(lr.LambdaLR, lr_lambda=lambda step: 0.8**step),
    "an object as lambda": lambda optimizer: lr.LambdaLR(optimizer, Warm()),
    "multiplicative": partial(lr.MultiplicativeLR, lr_lambda=lambda step: 0.7),
    "step": partial(lr.StepLR, step_size=2, gamma=0.5),
    "milestones": partial(lr.MultiStepLR, milestones=[1, 2, 2, 5], gamma=0.5),
    "exponential": partial(lr.ExponentialLR, gamma=0.7),
    "polynomial": partial(lr.PolynomialLR, total_iters=20, power=2.0),
    "cosine": partial(lr.CosineAnnealingLR, T_max=7),
    "warm restarts": partial(lr.CosineAnnealingWarmRestarts, T_0=2, T_mult=2),
    "one cycle": partial(lr.OneCycleLR, max_lr=0.2, total_steps=12),
    "one cycle, three phases": partial(lr.OneCycleLR, max_lr=[0.2, 0.1], total_steps=12, three_phase=True),
    "cyclic": partial(lr.CyclicLR, base_lr=0.01, max_lr=0.2, step_size_up=3, mode="triangular2"),
    "cyclic, exponential": partial(lr.CyclicLR, base_lr=0.01, max_lr=0.2, step_size_up=2, mode="exp_range", gamma=0.9),
    "cyclic, by a function": partial(lr.CyclicLR, base_lr=0.01, max_lr=0.2, step_size_up=2, scale_fn=lambda x: 0.5**x),
    "plateau": partial(lr.ReduceLROnPlateau, factor=0.5, patience=0),
    "one after the other": sequence,
    "chained": chain,
}  # fmt: skip
PER = [(name, per) for name in SCHEDULERS for per in ("step", "epoch") if (name, per) != ("plateau", "step")]
RATE = torch.tensor(0.01)  # one for all owners and both groups, as users write it; schedulers write into it
MOVING = {
    "sgd momentum": two_groups(partial(SGD, lr=0.1, momentum=0.9)),
    "adam": two_groups(partial(Adam, lr=1e-2)),
    "a tensor": lambda params: AdamW([{"params": list(params)[:2]}, {"params": list(params)[2:]}], lr=RATE, foreach=False),
}


def writes_into_its_own_start() -> bool:
    """Whether torch's SequentialLR takes a rate that is a tensor for its initial one too, and then writes into it: 2.4 does."""
    optimizer = SGD([torch.zeros(1, requires_grad=True)], lr=RATE.clone(), foreach=False)
    sequence(optimizer)
    group = optimizer.param_groups[0]
    return group["initial_lr"] is group["lr"]


@pytest.mark.parametrize(("a", "b"), [(2, 2), (3, 1)])
@pytest.mark.parametrize("rule", MOVING)
@pytest.mark.parametrize(("name", "per"), PER)
def test_a_scheduler_goes_on_where_it_was(name: str, per: str, rule: str, a: int, b: int) -> None:
    if (name, rule) == ("one after the other", "a tensor") and writes_into_its_own_start():
        pytest.skip("this torch loses the initial rate of SequentialLR where that is a tensor, broken off or not")
    how = TorchOptimizer(MOVING[rule], SCHEDULERS[name], per)
    expected = undisturbed(how, b)
    for stop, weights in wherever_it_stops(how, a, b):
        assert torch.equal(weights, expected), f"stopped after {stop}"
    before = Owners(how, a).walk(0, 7)
    after = Owners(how, b, before.weights).put(before.state())
    assert told(after) == told(before)[:1] * b
    assert float(RATE) == torch.tensor(0.01).item()


@pytest.mark.parametrize(("name", "per"), [(name, per) for name, per in PER if name != "plateau"])
def test_without_its_scheduler_a_fit_goes_another_way(name: str, per: str) -> None:
    """Negative control: rates, momentum and scheduler as a new fit has them."""
    how = TorchOptimizer(MOVING["sgd momentum"], SCHEDULERS[name], per)
    fresh = Owners(how, 1).state().facts

    def forget(state: State) -> State:
        return state._replace(facts=state.facts | {"scheduler": fresh["scheduler"], "groups": fresh["groups"]})

    assert not torch.equal(resumed(how, 1, 1, change=forget), undisturbed(how))


def test_without_the_state_of_its_scheduler_a_plateau_is_not_seen() -> None:
    """Negative control: one bad epoch lies before the stop, so that the rate falls only if it is remembered."""
    how = TorchOptimizer(ELEMENTWISE["sgd momentum"], partial(lr.ReduceLROnPlateau, factor=0.1, patience=0))
    fresh = Owners(how, 1).state().facts
    forget = lambda state: state._replace(facts=state.facts | {"scheduler": fresh["scheduler"]})  # noqa: E731
    assert not torch.equal(resumed(how, 1, 1, change=forget), undisturbed(how))


# what torch counts or averages, and then does not use for the weights (Adagrad's step only where the rate decays)
IDLE = {
    "rmsprop": {"step"}, "rmsprop, two groups": {"step"}, "adadelta": {"step"}, "rprop": {"step"},
    "asgd": {"ax", "mu"}, "adagrad": {"step"}, "adagrad accumulated": {"step"}, "adagrad, two groups": {"step"},
    "adagrad without some": {"step"},
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in RULES if name != "sgd" and "subclass" not in name])
def test_every_moment_and_count_matters(name: str) -> None:
    """Negative control: whichever one is lost, the weights become others, unless torch itself does nothing with it."""
    how = TorchOptimizer(RULES[name])
    expected, state = undisturbed(how), Owners(how, 1).walk(0, 4).state()
    pieces = state.facts["pieces"]
    keys = {key for piece in pieces for key in (*piece["shapes"], *piece["values"])}
    assert keys
    idle = {key for key in keys if torch.equal(resumed(how, 1, 1, change=partial(without, key=key)), expected)}
    assert idle == IDLE.get(name, set())


def without(state: State, key: str) -> State:
    """As if nothing had been kept under this key: zeros, and a count of one."""
    tensors = {name: torch.zeros_like(x) if name.endswith(f"/{key}") else x for name, x in state.tensors.items()}
    facts = copy.deepcopy(state.facts)
    for piece in facts["pieces"]:
        value = piece["values"].get(key)
        if value is not None:
            piece["values"][key] = torch.ones_like(value) if isinstance(value, Tensor) else [1, {}] if isinstance(value, list) else 1
    return State(tensors, facts)


def test_what_is_kept_beside_the_parameters_matters_too() -> None:
    how = TorchOptimizer(LARS)
    assert not torch.equal(resumed(how, 1, 1, change=lambda s: s._replace(facts=s.facts | {"shared": {"calls": 0}})), undisturbed(how))


@pytest.mark.parametrize("p", [1, 3])
def test_a_state_can_be_put_back_any_number_of_times(p: int) -> None:
    """Nothing that was put back writes into what was saved: not the moments, not a count, not a rate that is a tensor."""
    how = TorchOptimizer(MOVING["a tensor"], chain if writes_into_its_own_start() else sequence, "step")
    before = Owners(how, p).walk(0, 4)
    state = before.state()
    first, second = (Owners(how, p, before.weights).put(state).walk(4, STEPS).weights for _ in range(2))
    assert torch.equal(first, second) and torch.equal(first, undisturbed(how, p))


def test_taking_copies_nothing_and_joining_shares_nothing() -> None:
    owners = Owners(TorchOptimizer(two_groups(Adam)), 2).walk(0, 2)
    taken = [advancer.state() for advancer in owners.advancers]
    joined = owners.how.join(taken)
    inside = {x.data_ptr() for a in owners.advancers for s in a.optimizer.state.values() for x in s.values() if x.ndim}
    assert inside == {x.data_ptr() for state in taken for x in state.tensors.values()}
    assert not inside & {x.data_ptr() for x in joined.tensors.values()}
    told_then, moment = to_json(taken[0].facts), joined.tensors["optimizer/exp_avg"].clone()
    owners.walk(2, 3)
    assert to_json(taken[0].facts) == told_then  # copies, unlike the tensors
    assert torch.equal(joined.tensors["optimizer/exp_avg"], moment)
    assert not torch.equal(owners.state().tensors["optimizer/exp_avg"], moment)


@pytest.mark.parametrize(
    ("how", "names"),
    [
        (TorchOptimizer(Adam), ("optimizer/exp_avg", "optimizer/exp_avg_sq")),
        (Shadow(TorchOptimizer(Adam), EMA()), ("optimizer/exp_avg", "optimizer/exp_avg_sq", "shadow/average")),
    ],
    ids=["optimizer", "shadow"],
)
def test_joining_needs_no_more_memory_than_the_result(how: Any, names: tuple[str, ...]) -> None:
    owners = Owners(how, 5).walk(0, 1)
    alive: list[Any] = []

    def one_by_one() -> Iterator[State]:
        for advancer in owners.advancers:
            assert not any(x() is not None for x in alive), "the tensors of the owner before are still held"
            tensors, facts = advancer.state()
            tensors = {name: x.clone() for name, x in tensors.items()}
            alive[:] = [weakref.ref(x) for x in tensors.values()]
            yield State(tensors, facts)
            del tensors

    joined = owners.how.join(one_by_one())
    assert {name: x.shape for name, x in joined.tensors.items()} == dict.fromkeys(names, (len(owners.weights),))
    assert sum(x.untyped_storage().nbytes() for x in joined.tensors.values()) == len(names) * owners.weights.nbytes


def test_owners_are_joined_in_any_order_and_those_of_nothing_need_not_come() -> None:
    owners = Owners(TorchOptimizer(Adam, sequence, "step"), MANY).walk(0, 4)
    states = [advancer.state() for advancer in owners.advancers]
    some = owners.how.join(state for state in reversed(states) if state.facts["pieces"])
    assert len([s for s in states if s.facts["pieces"]]) < MANY
    assert to_json(some.facts) == to_json(owners.how.join(states).facts)


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_an_owner_that_is_missing_is_noticed(missing: int) -> None:
    owners = Owners(TorchOptimizer(Adam), 3).walk(0, 1)
    states = [advancer.state() for advancer in owners.advancers]
    with pytest.raises(CheckpointError, match=f"do not make up all {len(owners.weights)} weights"):
        owners.how.join(states[:missing] + states[missing + 1 :])
    with pytest.raises(CheckpointError, match="missing, or there twice"):
        owners.how.join([*states, states[missing]])


def test_counts_that_differ_by_range_are_kept_by_range() -> None:
    owners = Owners(ADAM, 2).walk(0, 4)
    states = [advancer.state() for advancer in owners.advancers]
    states[1].facts["pieces"][0]["values"]["step"].fill_(7.0)
    saved = through_a_file(ADAM.join(states))
    counts = [float(x["step"]) for a in Owners(ADAM, 2).put(saved).advancers for x in a.optimizer.state.values()]
    assert counts == [4.0, 7.0]
    with pytest.raises(CheckpointError, match=r"weights \[0, 3307\) in another group of Adam, or in parts"):
        Owners(ADAM, 1).put(saved)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["sgd momentum", "adam", "adagrad", "rprop", "asgd", "nadam"])
def test_modules_of_other_dtypes_are_resumed_in_their_own(dtype: torch.dtype, name: str) -> None:
    how, module = TorchOptimizer(RULES[name]), lambda: net().to(dtype)
    before = Owners(how, 2, module=module).walk(0, 4)
    assert {x.dtype for x in before.state().tensors.values()} == {dtype}
    assert torch.equal(resumed(how, 2, 3, module=module), undisturbed(how, 3, module=module))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("name", ["sgd momentum", "adam", "adagrad", "LARS", "a class of one's own"])
def test_parameters_without_dimensions_and_without_values_are_resumed(name: str) -> None:
    how, module = TorchOptimizer(RULES[name]), partial(WithScale, True)
    for a, b in ((1, 1), (1, 2), (2, 1)):
        assert torch.equal(resumed(how, a, b, module=module), undisturbed(how, b, module=module))


def test_a_whole_tensor_has_its_name_in_the_checkpoint() -> None:
    names = Owners(TorchOptimizer(LARS), 2).walk(0, 1).state().tensors
    assert set(names) == {f"optimizer/{name}/rows" for name, _ in net().named_parameters()}


def frozen_net() -> nn.Module:
    module = net()
    module[0].bias.requires_grad_(False)
    return module


ADAM = TorchOptimizer(partial(Adam, lr=1e-2))
HALVES = TorchOptimizer(lambda params: Adam([{"params": list(params)[:2]}, {"params": list(params)[2:]}]))
REFUSED: dict[str, Any] = {
    "another rule": (ADAM, TorchOptimizer(partial(SGD, lr=0.1)), "written by Adam, this fit uses SGD"),
    "a rule on whole tensors": (ADAM, TorchOptimizer(type("Adam", (Adam,), {})), "by slices of the weights, .* by whole tensors"),
    "other state": (ADAM, TorchOptimizer(partial(Adam, amsgrad=True)), "amsgrad=False in group 0, .* has amsgrad=True"),
    "no momentum": (
        TorchOptimizer(partial(SGD, lr=0.1, momentum=0.9)), TorchOptimizer(partial(SGD, lr=0.1)),
        "momentum=0.9 in group 0, .* momentum=0;",
    ),
    "centered": (TorchOptimizer(partial(RMSprop, centered=True)), TorchOptimizer(RMSprop), "centered=True in group 0"),
    "other groups": (ADAM, HALVES, "has 1 parameter groups, this fit has 2"),
    "other members": (
        HALVES, TorchOptimizer(lambda params: Adam([{"params": list(params)[2:]}, {"params": list(params)[:2]}])),
        r"weights \[\d+, 3307\) in another group",
    ),
    "other whole members": (
        TorchOptimizer(lambda params: LARS([{"params": list(params)[:2]}, {"params": list(params)[2:]}])),
        TorchOptimizer(lambda params: LARS([{"params": list(params)[:3]}, {"params": list(params)[3:]}])),
        "'2.weight' in another group",
    ),
    "more parameters": (TorchOptimizer(lambda params: Adam(list(params)[:2])), ADAM, "in parts, or not at all"),
    "fewer parameters": (ADAM, TorchOptimizer(lambda params: Adam(list(params)[:2])), r"state of \d+ weights more"),
    "a scheduler": (replace(ADAM, scheduler=SCHEDULERS["step"]), ADAM, "has the scheduler StepLR once per epoch, this fit has None"),
    "no scheduler": (ADAM, replace(ADAM, scheduler=SCHEDULERS["step"]), "scheduler None, this fit has StepLR"),
    "another scheduler": (
        replace(ADAM, scheduler=SCHEDULERS["chained"]), replace(ADAM, scheduler=lambda o: lr.ChainedScheduler([lr.StepLR(o, 1)])),
        r"ChainedScheduler\(ConstantLR, ExponentialLR\) once per epoch, this fit has ChainedScheduler\(StepLR\)",
    ),
    "another interval": (
        replace(ADAM, scheduler=SCHEDULERS["step"]), replace(ADAM, scheduler=SCHEDULERS["step"], per="step"), "epoch, .* per step"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_checkpoint_of_another_fit_is_refused(name: str) -> None:
    saving, loading, said = REFUSED[name]
    saved = Owners(saving, 2).walk(0, 4).state()
    after = Owners(loading, 2)
    before = told(after)
    for refuse in (lambda: [a.restore(saved) for a in reversed(after.advancers)], lambda: loading.check_state(replica(), saved)):
        with pytest.raises(CheckpointError, match=said):
            refuse()
    assert told(after) == before  # nothing was changed
    saving.check_state(replica(), saved)  # negative control: its own fit takes it


def replica(module: Callable[[], nn.Module] = net) -> Replica:
    made, weights, _, constants = blueprint(module())
    return Replica(made, weights, None, constants, nn.MSELoss())


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (frozen_net, "is of 3307 weights of float32, this fit has 3247 of float32"),
        (lambda: net().double(), "of float32, this fit has 3307 of float64"),
    ],
    ids=["other shapes", "another dtype"],
)
def test_a_checkpoint_of_another_module_is_refused(module: Any, said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        ADAM.check_state(replica(module), Owners(ADAM, 2).walk(0, 1).state())


@pytest.mark.parametrize(
    ("how", "name"), [(ADAM, "optimizer/exp_avg_sq"), (TorchOptimizer(LARS), "optimizer/0.weight/rows")], ids=["slices", "whole"]
)
def test_tensors_that_are_missing_or_of_another_shape_are_refused(how: TorchOptimizer, name: str) -> None:
    saved = Owners(how, 2).walk(0, 1).state()
    lost = {key: x for key, x in saved.tensors.items() if key != name}
    for tensors, said in ((lost, f"tensor '{name}' is missing"), (lost | {name: torch.zeros(3)}, r"is of shape \[3\]; .* needs")):
        with pytest.raises(CheckpointError, match=said):
            how.check_state(replica(), State(tensors, saved.facts))
        with pytest.raises(CheckpointError, match=said):
            Owners(how, 2).advancers[0].restore(State(tensors, saved.facts))
    with pytest.raises(CheckpointError, match="holds no state of an optimizer"):
        how.check_state(replica(), State(saved.tensors, {}))


def test_state_that_the_constructor_makes_must_be_there() -> None:
    how = TorchOptimizer(Adagrad)
    saved = Owners(how, 1).walk(0, 1).state()
    saved.facts["pieces"][0]["shapes"] = {}
    with pytest.raises(CheckpointError, match="keeps step of Adagrad, this fit keeps step, sum"):
        how.check_state(replica(), saved)


class Wrapped(SGD):
    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)
        self.inner = SGD(self.param_groups[0]["params"], lr=0.1)


class OwnWay(SGD):
    def state_dict(self) -> Any:
        return {}


class HoldsOptimizer:
    """A scheduler as many write it."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def step(self) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return vars(self)


class TellsNothing:
    def __init__(self, optimizer: Any) -> None: ...

    def step(self) -> None: ...


class Weighs:
    """A function that is an object, and holds what no checkpoint can."""

    def __init__(self) -> None:
        self.by = nn.Linear(2, 2)

    def __call__(self, step: int) -> float:
        return 1.0


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (replace(ADAM, scheduler=HoldsOptimizer), r"HoldsOptimizer\['optimizer'\] is a Adam, which a checkpoint cannot hold"),
        (replace(ADAM, scheduler=TellsNothing), "scheduler TellsNothing does not tell its state: AttributeError"),
        (replace(ADAM, scheduler=lambda o: lr.LambdaLR(o, Weighs())), r"LambdaLR\['lr_lambdas'\]\[0\]\['by'\] is a Linear"),
        (replace(ADAM, scheduler=lambda o: lr.LambdaLR(o, math.exp)), "LambdaLR does not tell its state"),
        (TorchOptimizer(lambda p: SGD([{"params": list(p), "by": math.exp}], lr=0.1)), r"SGD.param_groups\[0\]\['by'\] is a builtin"),
        (TorchOptimizer(Wrapped), "Wrapped holds another optimizer, 'inner'"),
        (TorchOptimizer(OwnWay), r"OwnWay has a state_dict\(\) of its own"),
    ],
    ids=["holds optimizer", "tells nothing", "object of an object", "builtin", "group", "wrapper", "own way"],
)
def test_what_no_checkpoint_can_hold_is_refused_by_name_before_any_job(how: TorchOptimizer, said: str) -> None:
    how.check(replica())  # without checkpoints it trains
    with pytest.raises(CheckpointError, match=said):
        how.check_state(replica())


class KeepsObjects(SGD):
    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            self.state[p]["seen"] = {"at": object()}


def test_state_that_is_no_plain_value_is_refused_by_name() -> None:
    owners = Owners(TorchOptimizer(partial(KeepsObjects, lr=0.1)), 1).walk(0, 1)
    with pytest.raises(CheckpointError, match=r"KeepsObjects.state of '0.weight'\['seen'\]\['at'\] is a object"):
        owners.state()


class RateOfItsSlice(SGD):
    """Its rate depends on the gradients that it sees, and so on the cuts."""

    def step(self, closure: Any = None) -> None:
        self.param_groups[0]["lr"] = float(sum(p.grad.abs().sum() for p in self.param_groups[0]["params"])) * 1e-5


def test_hyperparameters_that_depend_on_the_cuts_are_refused() -> None:
    how = TorchOptimizer(partial(RateOfItsSlice, lr=0.1))
    with pytest.raises(CheckpointError, match="owners of slices differ in 'lr' of group 0"):
        Owners(how, 3).walk(0, 1).state()
    Owners(how, 1).walk(0, 1).state()  # negative control


def test_hyperparameters_of_the_checkpoint_count_and_a_change_is_told(caplog: pytest.LogCaptureFixture) -> None:
    saved = Owners(ADAM, 2).walk(0, 1).state()
    other = TorchOptimizer(partial(Adam, lr=0.5, betas=(0.8, 0.9)))
    with caplog.at_level(logging.WARNING, "bigdl_lite"):
        ADAM.check_state(replica(), saved)
        assert not caplog.records
        other.check_state(replica(), saved)
    assert [record.getMessage() for record in caplog.records] == [
        "group 0 of Adam goes on with betas=(0.9, 0.999) of the checkpoint, not (0.8, 0.9)",
        "group 0 of Adam goes on with lr=0.01 of the checkpoint, not 0.5",
    ]
    caplog.clear()
    moving = replace(ADAM, scheduler=partial(lr.OneCycleLR, max_lr=0.2, total_steps=12), per="step")
    with caplog.at_level(logging.WARNING, "bigdl_lite"):
        moving.check_state(replica(), Owners(moving, 2).walk(0, 4).state())
    assert not caplog.records  # rate and betas are others, because the scheduler moved them
    after = Owners(other, 1).put(saved)
    assert after.advancers[0].rates() == [0.01]
    assert after.advancers[0].optimizer.param_groups[0]["betas"] == (0.9, 0.999)


class Still:
    """Somebody else's advance: it trains, and knows nothing of checkpoints."""

    measures = False

    def cuts(self, replica: Replica, p: int) -> Any:
        return ADAM.cuts(replica, p)

    def start(self, replica: Replica, cut: Any) -> Still:
        return self

    def check(self, replica: Replica) -> None: ...

    def step(self, update: Update, measured: float) -> None: ...

    def end_epoch(self, loss: float) -> None: ...


def test_an_advance_without_state_trains_and_is_refused_by_name_where_a_checkpoint_is_asked_for() -> None:
    Owners(Still(), 2).walk(0, STEPS)
    with pytest.raises(CheckpointError, match="Still cannot be saved: it has no check_state and no join"):
        durable(Still())
    assert durable(ADAM) is ADAM


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["sgd momentum", "adam", "adam foreach", "nadam", "asgd", "LARS"])
def test_a_fit_on_a_gpu_is_resumed_there(name: str) -> None:
    how = TorchOptimizer(RULES[name], SCHEDULERS["exponential"], "step")
    expected = undisturbed(how, 2, device="cuda")
    for a in (2, 3):
        for stop, weights in wherever_it_stops(how, a, 2, device="cuda"):
            assert torch.equal(weights, expected), f"stopped after {stop}"
