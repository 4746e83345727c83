"""1-bit Adam: Adam to the bit while it warms up, its loss with one bit a value afterwards, and only with both residuals.

    n  values      w  steps of the warm-up      b  Adam's first beta
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW

from bigdl_lite.algorithms.algorithm import Update, durable
from bigdl_lite.algorithms.catalogue import method
from bigdl_lite.algorithms.parts import TorchOptimizer
from bigdl_lite.algorithms.qadam import Momentum, QAdam, qadam
from bigdl_lite.comm.comm import Comm
from bigdl_lite.errors import CheckpointError, RecipeError
from bigdl_lite.model.layout import blueprint
from bigdl_lite.model.replica import Replica
from bigdl_lite.vector import slices
from bigdl_lite.wire.codec import BFloat16, Codec, Raw
from bigdl_lite.wire.lossy import MinMax8, Sign
from tests.algorithms.world import Given, agree, given, plan, resumes, run, same_bits, together, turn

CODECS = [Sign(16), MinMax8(16), BFloat16()]


def grads(n: int, steps: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(n, generator=generator) for _ in range(steps)]


def advanced(make: Callable[[Any], torch.optim.Optimizer], gradients: list[Tensor]) -> Tensor:
    weights = nn.Parameter(torch.linspace(-1, 1, len(gradients[0])))
    optimizer = make([weights])
    for g in gradients:
        weights.grad = g.clone()
        optimizer.step()
    return weights.detach()


def test_the_warm_up_is_adam_to_the_bit() -> None:
    settings = {"lr": 3e-3, "betas": (0.8, 0.99), "eps": 1e-6}
    mine = advanced(partial(QAdam, warmup=50, **settings), grads(1000, 50))
    assert same_bits(mine, advanced(partial(Adam, foreach=False, **settings), grads(1000, 50)))


def test_afterwards_the_variance_stands_still_and_gradients_are_taken_for_momenta() -> None:
    """Against the formula, in float64."""
    lr, b1, b2, eps, warmup, gs = 1e-2, 0.9, 0.99, 1e-8, 3, grads(100, 6)
    w, m, v = torch.linspace(-1, 1, 100).double(), 0.0, 0.0
    for t, g in enumerate(gs, 1):
        if t <= warmup:
            m, v = b1 * m + (1 - b1) * g.double(), b2 * v + (1 - b2) * g.double() ** 2
        else:
            m = g.double()
        k = min(t, warmup)
        w = w - lr * m / (1 - b1**k) / ((v / (1 - b2**k)) ** 0.5 + eps)
    got = advanced(partial(QAdam, lr=lr, betas=(b1, b2), eps=eps, warmup=warmup), gs)
    torch.testing.assert_close(got.double(), w, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("p", [1, 3])
def test_the_momentum_of_an_exact_codec_is_that_of_the_mean_gradient(p: int) -> None:
    where = plan((5, 7), (9,))
    what = given(p, 44, 7)
    ran = run(Momentum(Raw(), warmup=3, beta=0.8), where, what)
    m = torch.zeros(44, dtype=torch.float64)
    for step, (xs, results) in enumerate(zip(what.xs, ran.results, strict=True)):
        g = sum(x.double() for x in xs)
        m = 0.8 * m + 0.2 * g
        torch.testing.assert_close(results[0].double(), g if step < 3 else m, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shapes", [[(5, 7)], [(1,)], [(33, 4), (), (65,)]])
@pytest.mark.parametrize("codec", CODECS, ids=repr)
@pytest.mark.parametrize("p", [1, 2, 5])
def test_bytes_are_those_of_the_formula_and_peers_agree(p: int, codec: Codec, shapes: list[tuple[int, ...]]) -> None:
    where = plan(*shapes)
    n = where.layout.n
    ran = run(Momentum(codec, warmup=2), where, given(p, n, 4))
    assert agree(ran)
    assert ran.sent[:2] == [8 * (p - 1) * n] * 2
    if p * 16 <= n or codec == BFloat16():  # a cut within a group begins a group of its own
        assert ran.sent[2:] == [2 * (p - 1) * codec.nbytes(n)] * 2


@pytest.mark.parametrize("codec", CODECS, ids=repr)
@pytest.mark.parametrize("at", [1, 2, 4])
def test_a_run_that_is_saved_goes_on_as_if_nobody_had_disturbed_it(codec: Codec, at: int) -> None:
    assert resumes(Momentum(codec, warmup=2), plan((33, 4), (3,)), given(3, 135, 6), at)
    assert Momentum(codec).remembers


@pytest.mark.parametrize("codec", CODECS, ids=repr)
def test_what_was_given_and_what_still_waits_is_what_was_brought(codec: Codec) -> None:
    """The invariant of error feedback on both sides, over 5 encoded steps of 3 peers whose shares differ."""
    what = given(3, 135, 7)
    ran = run(Momentum(codec, warmup=2), plan((33, 4), (3,)), what)
    g = [sum(x.double() for x in xs) for xs in what.xs]
    m = 0.09 * g[0] + 0.1 * g[1]
    brought, got = torch.zeros(135).double(), torch.zeros(135).double()
    for step in range(2, 7):
        brought += 0.9 * m + 0.1 * g[step]
        m = ran.results[step][0].double()
        got += m
    kept = [e.own().tensors for e in ran.exchangers]
    waits = sum(own["exchange/mine"].double() for own in kept) + torch.cat([own["exchange/owned"] for own in kept]).double()
    torch.testing.assert_close(got + waits, brought, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("codec", CODECS, ids=repr)
def test_zeros_stay_zeros_and_errors_are_relative(codec: Codec) -> None:
    where, what = plan((33, 4), (3,)), given(3, 135, 4)
    how = Momentum(codec, warmup=2)
    assert not any(step[0].any() for step in run(how, where, Given([[x * 0 for x in xs] for xs in what.xs], what.shares)).results)
    for size in (1e-9, 1e9):
        other = run(how, where, given(3, 135, 4, size=size)).results
        for a, b in zip(run(how, where, what).results[:3], other, strict=False):  # later signs of almost nothing differ
            torch.testing.assert_close(b[0].double() / size, a[0].double(), rtol=1e-3, atol=2e-3)


# ---- the experiment


def network() -> tuple[nn.Module, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1024, 20, generator=generator)
    y = (torch.tanh(x @ torch.randn(20, 16, generator=generator)) @ torch.randn(16, 10, generator=generator)).argmax(1)
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 48), nn.Tanh(), nn.Linear(48, 10)), x, y


def trained(codec: Codec | None, residual: bool = True, p: int = 4, steps: int = 500, warmup: int = 100) -> float:
    """Train loss at the end.  codec None: Adam, exact sums, one process."""
    module, x, y = network()
    where, start, *_ = blueprint(module)
    rows = torch.randint(1024, (steps, p, 16), generator=torch.Generator().manual_seed(1))

    def gradients(module: nn.Module, step: int, rank: int) -> None:
        here = rows[step, rank]
        (nn.functional.cross_entropy(module(x[here]), y[here]) / p).backward()

    def member(comm: Comm | None) -> float:
        weights, gradient = start.clone(), torch.zeros_like(start)
        module = where.build(weights, {}, gradient)
        flat = nn.Parameter(weights)
        optimizer = QAdam([flat], lr=1e-2, warmup=warmup) if comm else Adam([flat], lr=1e-2)
        exchanger = Momentum(codec, warmup).start(where, comm) if comm else None  # type: ignore[arg-type]
        if exchanger and not residual:
            exchanger.residual = None  # the negative control
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 * (1 - step / steps)
            gradient.zero_()
            for rank in [comm.rank] if comm else range(p):
                gradients(module, step, rank)
            flat.grad = exchanger(gradient.clone(), comm, turn(step, 1 / p)) if comm and exchanger else gradient  # type: ignore[arg-type]
            optimizer.step()
        with torch.no_grad():
            return float(nn.functional.cross_entropy(module(x), y))

    return member(None) if codec is None else together(p, member)[0]


@pytest.mark.slow
def test_one_bit_with_both_residuals_reaches_the_loss_of_adam_and_without_them_does_not() -> None:
    """500 steps of 4 peers, 100 of them warm-up, a rate that falls to 0.

    Measured: 0.491 Adam, 0.513 one bit, 0.487 eight bits, 0.764 one bit without residuals.
    """
    dense, one_bit, eight = trained(None), trained(Sign(128)), trained(MinMax8(128))
    without = trained(Sign(128), residual=False)
    assert one_bit <= 1.08 * dense and eight <= 1.02 * dense
    assert without >= 1.3 * dense


# ---- the builder


def started(make: Any, **settings: Any) -> tuple[Any, Replica]:
    """The advance of qadam with a user's factory, and a replica."""
    advance = qadam(TorchOptimizer(make), **settings).advance
    module, *_ = network()
    where, weights, *_ = blueprint(module)
    return advance, Replica(where, weights, None, {}, nn.CrossEntropyLoss())


def two_groups(params: Any) -> Adam:
    return Adam([{"params": params[:2], "lr": 1e-3, "betas": (0.9, 0.99)}, {"params": params[2:]}], lr=3e-3, eps=1e-7)


def test_the_groups_of_adam_are_kept_and_advanced_as_adam_does() -> None:
    advance, replica = started(two_groups, warmup=5)
    plain = Replica(*_parts(replica), None, {}, nn.CrossEntropyLoss())
    mine, theirs = (a.start(r, (0, r.layout.n)) for a, r in ((advance, replica), (TorchOptimizer(_looped), plain)))
    assert mine.rates() == [1e-3, 3e-3]
    for g in grads(replica.layout.n, 5):
        mine.step(Update(g.clone(), 1.0), 0.0)
        theirs.step(Update(g.clone(), 1.0), 0.0)
    assert same_bits(replica.weights, plain.weights)


def _parts(replica: Replica) -> tuple[Any, Tensor]:
    return blueprint(replica.module)[0], replica.weights.clone()


def _looped(params: Any) -> Adam:
    made = two_groups(params)
    for group in made.param_groups:
        group["foreach"] = group["fused"] = False
    return made


def test_its_state_is_saved_and_put_back_by_other_owners() -> None:
    advance, replica = started(partial(Adam, lr=1e-2), warmup=3)
    other = Replica(*_parts(replica), None, {}, nn.CrossEntropyLoss())
    gs = grads(replica.layout.n, 8)

    def step(advancers: list[Any], cuts: list[tuple[int, int]], g: Tensor) -> None:
        for advancer, (a, b) in zip(advancers, cuts, strict=True):
            advancer.step(Update(g[a:b].clone(), 1.0), 0.0)

    cuts = advance.cuts(replica, 3)
    owners = [advance.start(replica, cut) for cut in cuts]
    for g in gs[:5]:
        step(owners, cuts, g)
    state = durable(advance).join([owner.state() for owner in owners])
    other.weights.copy_(replica.weights)
    one = [advance.start(other, (0, other.layout.n))]
    one[0].restore(state)
    for g in gs[5:]:
        step(owners, cuts, g)
        step(one, slices(other.layout.n, 1), g)
    assert same_bits(replica.weights, other.weights)


def test_one_bit_is_the_default_and_the_method_brings_its_exchange() -> None:
    made = method(partial(qadam, warmup=7), TorchOptimizer(partial(Adam, lr=1e-3)))
    assert made.exchange == Momentum(Sign(), 7, 0.9)


@pytest.mark.parametrize("make, says", [
    (partial(SGD, lr=0.1), "is SGD: take Adam"),
    (partial(AdamW, lr=0.1), "is AdamW: take Adam"),
    (partial(Adam, amsgrad=True), "without amsgrad=True"),
    (partial(Adam, weight_decay=0.1), "without weight_decay=0.1"),
    (partial(Adam, betas=(0.8, 0.99)), r"beta=0.9, Adam has betas=\(0.8, 0.99\) in group 0"),
    (lambda ps: Adam([{"params": ps[:1]}, {"params": ps[1:], "betas": (0.5, 0.9)}]), "in group 1"),
])  # fmt: skip
def test_what_is_not_plain_adam_is_refused_on_the_driver(make: Any, says: str) -> None:
    advance, replica = started(make)
    with pytest.raises(RecipeError, match=says):
        advance.check(replica)


def test_clipping_other_advances_and_impossible_settings_are_refused() -> None:
    for clip in ({"clip_norm": 1.0}, {"clip_value": 1.0}):
        with pytest.raises(RecipeError, match="cannot clip"):
            qadam(TorchOptimizer(Adam, **clip))
    with pytest.raises(RecipeError, match=r"needs torch.optim.Adam as the optimizer, not object"):
        qadam(object())  # type: ignore[arg-type]
    for wrong in ({"warmup": 0}, {"beta": 1.0}):
        with pytest.raises(RecipeError, match="at least 1, and in"):
            qadam(TorchOptimizer(Adam), **wrong)
    with pytest.raises(RecipeError, match="at least 1"):
        QAdam([nn.Parameter(torch.zeros(1))], warmup=0)
    with pytest.raises(RecipeError, match="no weight_decay"):
        QAdam([nn.Parameter(torch.zeros(1))], weight_decay=0.1)


def test_a_checkpoint_of_another_warm_up_is_refused() -> None:
    where, what = plan((33, 4)), given(2, 132, 2)
    kept = [(e.shared(), e.own()) for e in run(Momentum(Sign(), 1), where, what).exchangers]
    with pytest.raises(CheckpointError, match="a warm-up of 1 steps, not 2"):
        run(Momentum(Sign(), 2), where, what, begin=lambda rank, e: e.restore(*kept[rank]))
