"""Averages are those of torch.optim.swa_utils.AveragedModel, whoever owns which slice; and the best stays what it was.

The reference is plain torch: the same optimizer, the same mean gradients, whole tensors, one process.

    n  flat weights      p  owners of slices
"""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import StepLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from bigdl_lite.algorithms import State, Update, method
from bigdl_lite.algorithms.accept import Bounded
from bigdl_lite.algorithms.parts import TorchOptimizer
from bigdl_lite.algorithms.server import Served
from bigdl_lite.algorithms.shadow import EMA, SWA, Shadow, shadowed, warn_unkept
from bigdl_lite.data.checkpoint import Checkpoints
from bigdl_lite.engine.keeper import Keeper, start_from
from bigdl_lite.engine.local import LocalEngine
from bigdl_lite.engine.recipe import Saving
from bigdl_lite.errors import CheckpointError, RecipeError
from tests.contracts.test_advances import MatrixNorm, close, gradients, net
from tests.contracts.test_states import STEPS, Owners, replica
from tests.engine import test_local as local
from tests.engine.test_keeper import FRAME, RECIPE, START

pytestmark = pytest.mark.timeout(60)

ADAM = TorchOptimizer(partial(Adam, lr=1e-2))
RULES = {"adam": ADAM, "sgd momentum": TorchOptimizer(partial(SGD, lr=0.1, momentum=0.9)), "whole tensors": TorchOptimizer(MatrixNorm)}
# what is averaged, how torch does it, and after which steps: 9 of them, 3 epochs
AVERAGES: dict[str, tuple[Any, Any, list[int]]] = {
    "EMA": (EMA(0.9), get_ema_multi_avg_fn(0.9), [1, 2, 3, 4, 5, 6, 7, 8, 9]),
    "EMA, late, every 2": (EMA(0.7, every=2, start=4), get_ema_multi_avg_fn(0.7), [4, 6, 8]),
    "SWA of epochs": (SWA(start_epoch=1), None, [3, 6, 9]),
    "SWA of epochs, every 2": (SWA(start_epoch=0, every=2), None, [6]),
    "SWA of steps": (SWA(start_step=2, every=3), None, [2, 5, 8]),
}
every_average = pytest.mark.parametrize("name", AVERAGES)


def averaged(make: Any, rule: Any, after: list[int]) -> Tensor:
    """Plain torch."""
    module = net()
    optimizer, average = make(module.parameters()), AveragedModel(module, multi_avg_fn=rule)
    params = list(module.parameters())
    for step, grad in enumerate(gradients(sum(p.numel() for p in params), STEPS), 1):
        for p, g in zip(params, grad.split([p.numel() for p in params]), strict=True):
            p.grad = g.view_as(p).clone()
        optimizer.step()
        if step in after:
            average.update_parameters(module)
    return torch.cat([p.detach().reshape(-1) for p in average.module.parameters()])


def shown(owners: Owners) -> Tensor:
    return torch.cat([advancer.shown() for advancer in owners.advancers])


def best(owners: Owners) -> Tensor:
    return torch.cat([advancer.best() for advancer in owners.advancers])


def keep_best(owners: Owners) -> Owners:
    for advancer in owners.advancers:
        advancer.keep_best()
    return owners


# ---- averages -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@every_average
def test_averages_are_torchs_and_the_same_bits_for_any_number_of_owners(name: str, rule: str) -> None:
    average, by, after = AVERAGES[name]
    one, *others = (shown(Owners(Shadow(RULES[rule], average), p).walk(0, STEPS)) for p in (1, 2, 3, 5))
    close(one, averaged(RULES[rule].factory, by, after))
    assert all(torch.equal(one, other) for other in others)


@every_average
def test_an_average_that_lacks_one_step_is_seen(name: str) -> None:
    """Negative control of the test above."""
    average, by, after = AVERAGES[name]
    less = after[:-1] or [1]
    assert (shown(Owners(Shadow(ADAM, average), 2).walk(0, STEPS)) - averaged(ADAM.factory, by, less)).abs().max() > 1e-4


@every_average
def test_an_average_changes_nothing_of_the_training(name: str) -> None:
    shadow, alone = (Owners(how, 3).walk(0, STEPS) for how in (Shadow(ADAM, AVERAGES[name][0], best=True), ADAM))
    assert torch.equal(shadow.weights, alone.weights)
    assert not torch.equal(shown(shadow), alone.weights)


def test_before_an_average_begins_the_weights_are_shown_as_they_are() -> None:
    owners = Owners(Shadow(ADAM, EMA(0.9, start=4)), 2).walk(0, 3)
    assert all(advancer.shown() is None for advancer in owners.advancers)
    owners.walk(3, 4)
    assert torch.equal(shown(owners), owners.weights)  # it begins as a copy
    owners.walk(4, 5)
    assert not torch.equal(shown(owners), owners.weights)
    assert all(advancer.shown() is None for advancer in Owners(Shadow(ADAM, best=True), 2).walk(0, 3).advancers)


@pytest.mark.parametrize("p", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_an_average_of_narrow_weights_moves(dtype: torch.dtype, p: int) -> None:
    """In 16 bits 0.001 of a small difference is less than half of the last bit, and the average would stay where it began."""
    owners = Owners(Shadow(RULES["sgd momentum"], EMA(0.999)), p, module=lambda: net().to(dtype)).walk(0, 1)
    own, exact = owners.weights.clone(), owners.weights.to(torch.float64, copy=True)
    for step in range(1, STEPS):
        owners.walk(step, step + 1)
        own.lerp_(owners.weights, 0.001)
        exact.lerp_(owners.weights.double(), 0.001)
    kept = torch.cat([advancer._average for advancer in owners.advancers]).double()
    assert shown(owners).dtype == dtype and torch.allclose(kept, exact, rtol=0, atol=1e-6)
    if dtype != torch.float64:  # negative control
        assert float((own.double() - exact).abs().mean()) > 10 * float((kept - exact).abs().mean())


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: EMA(1.0), r"EMA\(decay=1.0\): must be at least 0 and below 1"),
        (lambda: EMA(float("nan")), "decay=nan"),
        (lambda: EMA(every=0), "every must be at least 1"),
        (lambda: EMA(start=-1), "the start at least 0"),
        (lambda: SWA(), "give start_epoch, which counts epochs, or start_step"),
        (lambda: SWA(1, 1), "one of them"),
        (lambda: SWA(start_epoch=-1), "the start at least 0"),
        (lambda: Shadow(ADAM), "Shadow keeps nothing"),
        (lambda: Shadow(Shadow(ADAM, EMA()), best=True), "a Shadow around a Shadow"),
    ],
)
def test_settings_that_cannot_work_are_refused_when_they_are_made(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        make()


# ---- the best -------------------------------------------------------------------------------------------------------------


def test_the_best_is_what_was_shown_and_does_not_follow_later_steps() -> None:
    for how in (Shadow(ADAM, best=True), Shadow(ADAM, EMA(0.9), best=True)):
        owners = Owners(how, 3).walk(0, 4)
        assert all(advancer.best() is None for advancer in owners.advancers)
        then = owners.weights.clone() if how.average is None else shown(owners).clone()
        alias = [advancer.weights if how.average is None else advancer.shown() for advancer in owners.advancers]
        keep_best(owners).walk(4, STEPS)
        assert torch.equal(best(owners), then)
        assert not torch.equal(torch.cat(alias), then)  # negative control: without the copy it would follow
        now = owners.weights.clone() if how.average is None else shown(owners).clone()
        assert torch.equal(best(keep_best(owners)), now)


def test_companions_cost_nothing_before_they_are_used_and_one_slice_each() -> None:
    owners = Owners(Shadow(ADAM, EMA(0.9, start=2), best=True), 2).walk(0, 1)
    kept = lambda: [(a._average, a._best) for a in owners.advancers]  # noqa: E731
    assert kept() == [(None, None)] * 2
    keep_best(owners.walk(1, 3))
    assert [tuple(len(x) for x in pair) for pair in kept()] == [(b - a, b - a) for a, b in owners.cuts]
    before = [[x.data_ptr() for x in pair] for pair in kept()]
    keep_best(owners.walk(3, 6))
    assert [[x.data_ptr() for x in pair] for pair in kept()] == before


# ---- state ----------------------------------------------------------------------------------------------------------------


def whole(how: Shadow, p: int, stop: int = STEPS) -> Owners:
    return keep_best(Owners(how, p).walk(0, 2)).walk(2, stop)


@pytest.mark.parametrize(("a", "b"), [(1, 1), (3, 3), (3, 2), (1, 5), (60, 2)])
@pytest.mark.parametrize("rule", ["adam", "whole tensors"])
@every_average
def test_a_fit_that_is_resumed_has_the_companions_of_one_that_was_not_disturbed(name: str, rule: str, a: int, b: int) -> None:
    how = Shadow(RULES[rule], AVERAGES[name][0], best=True)
    expected = whole(how, b)
    for stop in (2, 4, 6):  # within an epoch and at the end of one; before there is an average, and after
        before = whole(how, a, stop)
        after = Owners(how, b, before.weights).put(before.state()).walk(stop, STEPS)
        assert torch.equal(after.weights, expected.weights)
        assert torch.equal(shown(after), shown(expected)) and torch.equal(best(after), best(expected))


@pytest.mark.parametrize("lost", ["shadow/average", "shadow/best", "taken", "steps", "epochs"])
def test_whatever_is_lost_of_the_state_is_seen(lost: str) -> None:
    """Negative control of the test above."""
    average = SWA(start_epoch=1, every=2) if lost == "epochs" else SWA(start_step=2, every=2)
    how = Shadow(ADAM, average, best=True)
    before = whole(how, 2, 6)
    state, expected = before.state(), whole(how, 2)
    if "/" in lost:
        state.tensors[lost].zero_()
    else:
        state.facts["shadow"][lost] -= 1
    after = Owners(how, 2, before.weights).put(state).walk(6, STEPS)
    assert not (torch.equal(shown(after), shown(expected)) and torch.equal(best(after), best(expected)))


def test_the_joined_state_is_the_same_for_all_cuts_and_shares_no_memory() -> None:
    how = Shadow(ADAM, EMA(0.9), best=True)
    one, *others = (whole(how, p, 4).state() for p in (1, 3, 60))
    for other in others:
        assert other.facts == one.facts and other.tensors.keys() == one.tensors.keys()
        assert all(torch.equal(x, one.tensors[name]) for name, x in other.tensors.items())
    owners = whole(how, 2, 4)
    taken = [advancer.state() for advancer in owners.advancers]
    assert taken[0].tensors["shadow/average"].data_ptr() == owners.advancers[0]._average.data_ptr()  # taking copies nothing
    joined = how.join(taken).tensors["shadow/average"].clone()
    owners.walk(4, 5)
    assert torch.equal(how.join(taken).tensors["shadow/average"], shown(owners)) and not torch.equal(joined, shown(owners))


def test_a_narrow_average_is_resumed_to_the_bit() -> None:
    how, module = Shadow(ADAM, EMA(0.99)), lambda: net().bfloat16()
    before = Owners(how, 2, module=module).walk(0, 4)
    assert before.state().tensors["shadow/average"].dtype == torch.float32
    after = Owners(how, 3, before.weights, module=module).put(before.state()).walk(4, STEPS)
    expected = Owners(how, 3, module=module).walk(0, STEPS)
    assert torch.equal(after.state().tensors["shadow/average"], expected.state().tensors["shadow/average"])


def test_owners_that_are_missing_or_disagree_are_noticed() -> None:
    how = Shadow(ADAM, EMA(0.9), best=True)
    states = [advancer.state() for advancer in whole(how, 3, 4).advancers]
    with pytest.raises(CheckpointError, match="do not make up all 3307 weights"):
        how.join(states[1:])
    states[1].facts["shadow"]["taken"] += 1
    with pytest.raises(CheckpointError, match="owners differ in what they have averaged"):
        how.join(states)


REFUSED: dict[str, tuple[Any, Any, str]] = {
    "no shadow": (ADAM, Shadow(ADAM, EMA(0.9), best=True), r"without EMA\(decay=0.9, every=1, start=0\) and the best weights"),
    "no best": (Shadow(ADAM, EMA(0.9)), Shadow(ADAM, EMA(0.9), best=True), "without the best weights"),
    "another average": (Shadow(ADAM, EMA(0.9)), Shadow(ADAM, SWA(1)), r"keeps EMA\(decay=0.9.*this fit SWA\(start_epoch=1"),
    "another decay": (Shadow(ADAM, EMA(0.9)), Shadow(ADAM, EMA(0.99)), r"EMA\(decay=0.9, .*EMA\(decay=0.99"),
    "no average": (Shadow(ADAM, best=True), Shadow(ADAM, EMA(0.9)), "keeps None, this fit EMA"),
    "another rule": (Shadow(ADAM, EMA(0.9)), Shadow(RULES["sgd momentum"], EMA(0.9)), "written by Adam, this fit uses SGD"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_checkpoint_that_lacks_what_this_fit_keeps_is_refused(name: str) -> None:
    saving, loading, said = REFUSED[name]
    saved = Owners(saving, 2).walk(0, 4).state()
    after = Owners(loading, 2)
    for refuse in (lambda: loading.check_state(replica(), saved), lambda: after.put(saved)):
        with pytest.raises(CheckpointError, match=said):
            refuse()
    assert after.advancers[0].steps == 0 and after.advancers[0].shown() is None  # nothing was changed
    saving.check_state(replica(), saved)  # negative control: its own fit takes it


@pytest.mark.parametrize("name", ["shadow/average", "shadow/best"])
def test_tensors_that_are_missing_or_of_another_length_are_refused(name: str) -> None:
    how = Shadow(ADAM, EMA(0.9), best=True)
    saved = whole(how, 2, 4).state()
    lost = {key: x for key, x in saved.tensors.items() if key != name}
    for tensors, said in ((lost, "is missing"), (lost | {name: torch.zeros(3)}, r"is of shape \[3\]")):
        with pytest.raises(CheckpointError, match=f"'{name}' {said}"):
            how.check_state(replica(), State(tensors, saved.facts))


def test_a_fit_without_a_shadow_goes_on_from_a_checkpoint_with_one_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    how = Shadow(ADAM, EMA(0.9), best=True)
    before = whole(how, 2, 4)
    saved = before.state()
    with caplog.at_level(logging.WARNING, "bigdl_lite"):
        how.check_state(replica(), saved)
        warn_unkept(ADAM, Owners(ADAM, 1).state())
        assert not caplog.records  # negative control
        ADAM.check_state(replica(), saved)
        warn_unkept(ADAM, saved)
        Shadow(ADAM, best=True).check_state(replica(), saved)
    assert [record.getMessage() for record in caplog.records] == [
        "the checkpoint keeps EMA(decay=0.9, every=1, start=0) and the best weights, this fit does not: it goes on without",
        "the checkpoint keeps EMA(decay=0.9, every=1, start=0), this fit does not: it goes on without",
    ]
    after = Owners(ADAM, 3, before.weights).put(saved).walk(4, STEPS)
    assert torch.equal(after.weights, Owners(ADAM, 1).walk(0, STEPS).weights)
    less = Owners(Shadow(ADAM, best=True), 3, before.weights).put(saved)
    assert torch.equal(best(less), best(before)) and less.advancers[0].shown() is None


class Still:
    """Somebody else's advance, which knows nothing of checkpoints."""

    measures = False
    cuts, start, check = ADAM.cuts, ADAM.start, ADAM.check


def test_a_shadow_of_what_cannot_be_saved_trains_and_cannot_be_saved() -> None:
    how = Shadow(Still(), EMA(0.9))
    assert torch.equal(shown(Owners(how, 2).walk(0, STEPS)), shown(Owners(Shadow(ADAM, EMA(0.9)), 1).walk(0, STEPS)))
    with pytest.raises(CheckpointError, match="Still cannot be saved"):
        how.check_state(replica())


# ---- in its place ---------------------------------------------------------------------------------------------------------


def test_what_engines_and_peers_look_for_is_that_of_the_wrapped_one() -> None:
    inner = TorchOptimizer(partial(SGD, lr=0.1), partial(StepLR, step_size=1, gamma=0.5), "step", clip_norm=1.0)
    how = Shadow(inner, EMA())
    assert how.measures and how.scheduler is inner.scheduler and how.per == "step"
    assert getattr(how, "nothing", None) is None and not hasattr(how, "nothing")
    advancer, alone = (x.start(replica(), (0, 3307)) for x in (how, inner))
    assert isinstance(advancer.optimizer, SGD) and len(advancer.pieces) == len(alone.pieces) and advancer.held.rule == "SGD"
    for x in (advancer, alone):
        x.step(Update(torch.ones(3307), 1.0), x.measure(Update(torch.ones(3307), 1.0)))
        x.end_epoch(1.0)
    assert advancer.rates() == alone.rates() == [0.05]
    advancer.end_step()
    assert advancer.rates() == [0.025] and advancer.steps == 2
    with pytest.raises(RecipeError, match="clipNorm needs the norm of the whole gradient"):
        Served(Bounded(3)).prepared(None, None, how, 2)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="schedulerInterval='step' would count them"):
        Served(Bounded(3)).prepared(None, None, Shadow(replace(inner, clip_norm=None), EMA()), 2)  # type: ignore[arg-type]


def test_nothing_is_put_around_where_nothing_is_to_be_kept() -> None:
    assert shadowed(ADAM) is ADAM
    assert shadowed(ADAM, EMA()) == Shadow(ADAM, EMA()) and shadowed(ADAM, best=True) == Shadow(ADAM, best=True)


def test_settings_compare_by_value_and_pickle_small() -> None:
    how = Shadow(TorchOptimizer(SGD), SWA(start_epoch=2), best=True)
    for copied in (pickle.loads(pickle.dumps(how)), copy.deepcopy(how), replace(how)):
        assert copied == how and repr(copied) == repr(how)
    assert len(pickle.dumps(how.average)) < 200


def kept_by(average: Any, counts: list[int], epochs: int, **settings: Any) -> tuple[Tensor, Tensor]:
    """The weights and the average [n] at the end of a fit of the local engine, as the keeper has them."""
    x, y = local.data(sum(counts))
    made, start = local.recipe(local.net(), len(counts), partial(SGD, lr=0.05, momentum=0.9), epochs=epochs, **settings)
    made = replace(made, round=replace(made.round, advance=Shadow(made.round.advance, average)), saving=Saving(1000))
    keeper = Keeper(made)
    outcome = LocalEngine().fit(local.shares(x, y, counts), made, start, keep=keeper)
    last, _ = keeper.last()
    return outcome.weights, last.resume.state.tensors["shadow/average"]


@pytest.mark.parametrize("counts", [[37], [20, 17], [10, 0, 26, 1]], ids=str)
def test_in_an_engine_averages_are_torchs_too(counts: list[int]) -> None:
    epochs = 8
    for average, by, after in ((EMA(0.8), get_ema_multi_avg_fn(0.8), range(1, 9)), (SWA(start_epoch=5), None, range(5, 9))):
        module, loss = local.net(), nn.CrossEntropyLoss()
        x, y = map(torch.from_numpy, local.data())
        optimizer, reference = SGD(module.parameters(), lr=0.05, momentum=0.9), AveragedModel(module, multi_avg_fn=by)
        for epoch in range(1, epochs + 1):
            optimizer.zero_grad()
            loss(module(x), y).backward()
            optimizer.step()
            if epoch in after:
                reference.update_parameters(module)
        weights, found = kept_by(average, counts, epochs)
        close(found, torch.cat([p.detach().reshape(-1) for p in reference.module.parameters()]))
        close(weights, found)  # what a fit returns is the average
        plain = torch.cat([p.detach().reshape(-1) for p in module.parameters()])
        assert (found - plain).abs().max() > 1e-3  # negative control


@pytest.mark.parametrize("name", ["local-sgd", "post-local-sgd", "d-psgd", "qg-dsgdm", "pipe-sgd", "qadam"])
def test_a_shadow_goes_around_the_advance_of_other_methods(name: str) -> None:
    """They look for optimizer, pieces and end_step(); those of peers that mix find them through the shadow, too."""
    (x, y), weights = local.data(), []
    make = partial(Adam, lr=0.01) if name == "qadam" else partial(SGD, lr=0.05, momentum=0.9 if name == "qg-dsgdm" else 0.0)
    for average in (None, EMA(0.5)):
        made, start = local.recipe(local.net(), 2, make, epochs=4, batch_size=10, saving=Saving(1000))
        round_ = method(name, TorchOptimizer(make))
        round_ = replace(round_, advance=shadowed(round_.advance, average))
        if round_.peer is not None:
            round_ = replace(round_, peer=round_.peer.prepared(made.blueprint, replica(local.net), round_.advance, 2))
        keeper = Keeper(replace(made, round=round_))
        raw = torch.zeros(made.blueprint.layout.n)

        def keep(part: Any, raw: Tensor = raw, keeper: Keeper = keeper) -> None:
            raw[slice(*part.cut)] = part.weights  # what a fit returns in the end may be the average
            keeper(part)

        keep.wish = False  # type: ignore[attr-defined]
        LocalEngine().fit(local.shares(x, y, [20, 17]), keeper.recipe, start, keep=keep)  # type: ignore[arg-type]
        weights.append(raw)
    assert torch.equal(*weights) and weights[0].any()
    shadow = keeper.last()[0].resume.state.tensors["shadow/average"]
    assert 1e-5 < (shadow - weights[1]).abs().max() < 0.2


class Parts:
    """Copies of what all ranks gave at each step."""

    wish = False

    def __init__(self) -> None:
        self.weights: dict[int, Tensor] = {}
        self.averages: dict[int, list[Tensor]] = {}

    def __call__(self, part: Any) -> None:
        if not part.rank:
            self.weights[part.now.step] = part.weights.clone()
        self.averages.setdefault(part.now.step, []).append(part.own.tensors["exchange/shadow/average"].clone())


def test_the_mean_of_the_shadows_of_peers_that_mix_is_the_average_of_their_mean() -> None:
    x, y = local.data()
    made, start = local.recipe(local.net(), 3, partial(SGD, lr=0.05), epochs=4, batch_size=10, saving=Saving(1, "step"))
    round_ = method("d-psgd", Shadow(made.round.advance, EMA(0.8)))
    peer = round_.peer.prepared(made.blueprint, replica(local.net), round_.advance, 3)
    parts = Parts()
    LocalEngine().fit(local.shares(x, y, [17, 12, 8]), replace(made, round=replace(round_, peer=peer)), start, keep=parts)
    expected = parts.weights[1].clone()
    for step in range(2, 1 + len(parts.weights)):
        expected.lerp_(parts.weights[step], 0.2)
    last = torch.stack(parts.averages[len(parts.weights)])
    close(last.mean(0), expected)
    assert len(last) == 3 and (last[0] - last[1]).abs().max() > 1e-3  # negative control: each has its own
    assert (expected - parts.weights[len(parts.weights)]).abs().max() > 1e-3


def test_companions_go_through_a_checkpoint_on_disk_and_a_fit_goes_on_with_them(tmp_path: Any) -> None:
    made = replace(RECIPE, round=replace(RECIPE.round, advance=Shadow(RECIPE.round.advance, EMA(0.7))))
    whole = Keeper(made, Checkpoints(str(tmp_path), "whole", 9))
    undisturbed = LocalEngine().fit(FRAME, made, START, keep=whole)
    store = Checkpoints(str(tmp_path), "whole", 9)
    expected = start_from(store.last())[0].resume.state
    for step in (1, 4):
        start, lines = start_from(store.at(step))
        assert {"shadow/average", "optimizer/exp_avg"} <= start.resume.state.tensors.keys()
        rest = Keeper(made, Checkpoints(str(tmp_path), f"rest{step}", 9), lines=lines)
        found = LocalEngine().fit(FRAME, made, replace(start, constants=START.constants), keep=rest)
        after = rest.last()[0].resume.state
        assert torch.equal(found.weights, undisturbed.weights)
        assert torch.equal(after.tensors["shadow/average"], expected.tensors["shadow/average"])
        assert after.facts["shadow"] == expected.facts["shadow"]
    assert expected.facts["shadow"]["steps"] == 6 and expected.facts["shadow"]["epochs"] == 3
