"""GradiVeQ: projecting commutes with summing; a learned basis loses little, a random one nearly everything.

    M  slice      d  rank      y  the exact sum
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from bigdl_lite.algorithms.exchange import NOTHING
from bigdl_lite.algorithms.gradiveq import GradiVeQ
from bigdl_lite.errors import CheckpointError, RecipeError
from bigdl_lite.model.layout import blueprint
from tests.algorithms.world import Given, Lockstep, agree, given, plan, replays, resumes, run, same_bits, saved

SMALL = GradiVeQ(slice=8, rank=3, train=2, compressed=3)
SHAPES = [[(10, 8), (8,)], [(3, 9), (5,), (4, 3, 2, 2), (2, 2)], [(16,), (33, 1)]]
LAYERS = [(1, 10, 8), (2, 9, 12), (1, 4, 17)]  # layers, slices of all, values outside


def total(xs: list[Tensor]) -> Tensor:
    return sum(x.double() for x in xs)  # type: ignore[return-value]


@pytest.mark.parametrize("p", [1, 2, 3, 8])
def test_the_sum_of_projections_is_the_projection_of_the_sum(p: int) -> None:
    where = plan(*SHAPES[1])
    what = given(p, where.layout.n, 5)
    ran = run(SMALL, where, what)
    assert agree(ran)
    basis = ran.exchangers[0].shared().tensors["exchange/basis"].double()
    u, mu = basis[..., :3], basis[..., 3]
    for step in range(5):
        y = total(what.xs[step])
        if step >= 2:
            for layer, (a, b) in enumerate([(0, 24), (32, 80)]):
                slices = y[a:b].view(-1, 8)  # a view of y
                slices.copy_((slices - mu[layer]) @ u[layer] @ u[layer].T + mu[layer])
        torch.testing.assert_close(ran.results[step][0].double(), y, rtol=1e-5, atol=1e-5)


def test_what_was_decoded_is_encoded_without_loss() -> None:
    where = plan((10, 8))
    what = given(2, 80, 4)
    what.xs[3][:] = [x.clone() for x in run(SMALL, where, Given(what.xs[:3], what.shares)).results[2]]
    what.xs[3][1].zero_()
    ran = run(SMALL, where, what)
    torch.testing.assert_close(ran.results[3][0], ran.results[2][0], rtol=1e-5, atol=1e-5)


def test_the_basis_is_that_of_the_sums_and_orthonormal() -> None:
    """Against the singular vectors of the centred slices, which are the same directions by another way."""
    where = plan((40, 8))
    what = given(3, 320, 2, lambda s, r, g: (torch.randn(40, 8, generator=g) * torch.tensor([9.0, 5, 3, 1, 1, 1, 1, 1]) + 2).view(-1))
    basis = run(SMALL, where, what).exchangers[2].shared().tensors["exchange/basis"][0].double()
    y = torch.cat([total(xs).view(-1, 8) for xs in what.xs])
    torch.testing.assert_close(basis[:, 3], y.mean(0), rtol=1e-6, atol=1e-6)
    directions = torch.linalg.svd(y - y.mean(0)).Vh[:3].T
    torch.testing.assert_close((basis[:, :3].T @ directions).abs(), torch.eye(3).double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("p", [1, 2, 5])
@pytest.mark.parametrize("number", range(3))
def test_bytes_are_those_of_the_formula(number: int, p: int) -> None:
    where = plan(*SHAPES[number])
    layers, slices, outside = LAYERS[number]
    exact, packed = 8 * (p - 1) * where.layout.n, 8 * (p - 1) * (outside + slices * 3)
    told = 4 * (p - 1) * layers * 8 * 4
    ran = run(SMALL, where, given(p, where.layout.n, 10))
    assert ran.sent == [exact, exact + told, packed, packed, packed] * 2
    assert agree(ran)


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("p", [1, 3])
def test_tasks_that_remember_nothing_say_the_same(number: int, p: int) -> None:
    where = plan(*SHAPES[number])
    assert replays(SMALL, where, given(p, where.layout.n, 8))
    assert not SMALL.remembers


@pytest.mark.parametrize("at", [1, 2, 3, 5, 6])
def test_a_run_that_is_saved_goes_on_as_if_nobody_had_disturbed_it(at: int) -> None:
    where = plan(*SHAPES[1])
    assert resumes(SMALL, where, given(3, where.layout.n, 8), at)


def test_shares_do_not_matter() -> None:
    where = plan((10, 8))
    what = given(3, 80, 4)
    other = run(SMALL, where, Given(what.xs, what.shares[::-1]))
    assert all(same_bits(a[0], b[0]) for a, b in zip(run(SMALL, where, what).results, other.results, strict=True))


@pytest.mark.parametrize("size", [1e-9, 1e9])
def test_the_error_is_relative(size: float) -> None:
    where = plan((10, 8), (4,))
    small, large = (run(SMALL, where, given(3, 84, 5, size=s)).results for s in (1.0, size))
    for a, b in zip(small, large, strict=True):
        torch.testing.assert_close(b[0].double() / size, a[0].double(), rtol=1e-3, atol=1e-4)


def test_zeros_stay_zeros_in_every_step() -> None:
    where = plan((10, 8), (4,))
    what = given(3, 84, 5)
    assert not any(step[0].any() for step in run(SMALL, where, Given([[x * 0 for x in xs] for xs in what.xs], what.shares)).results)
    for x in what.xs[3]:
        x.zero_()  # after steps whose mean is not zero
    assert not run(SMALL, where, what).results[3][0].any()


# ---- corner cases


def test_fewer_slices_than_directions_leave_columns_of_zeros() -> None:
    """Two slices in all: one direction beside the mean, and what lies in it comes back."""
    where, how = plan((1, 8)), GradiVeQ(slice=8, rank=3, train=2, compressed=3)
    what = given(2, 8, 2)
    what.xs.append([0.3 * a + 0.7 * b for a, b in zip(*what.xs, strict=True)])
    ran = run(how, where, what)
    basis = ran.exchangers[1].shared().tensors["exchange/basis"][0]
    assert basis[:, 0].norm() == pytest.approx(1.0) and not basis[:, 1:3].any()
    torch.testing.assert_close(ran.results[2][0].double(), total(what.xs[2]), rtol=1e-5, atol=1e-5)


def test_a_layer_whose_gradient_never_changes_is_decoded_as_its_mean() -> None:
    where = plan((3, 8), (2,))
    same = torch.arange(1.0, 9.0).repeat(3)
    what = given(2, 26, 4, lambda s, r, g: torch.cat([same, torch.ones(2)]))
    ran = run(SMALL, where, what)
    assert not ran.exchangers[0].shared().tensors["exchange/basis"][..., :3].any()
    torch.testing.assert_close(ran.results[3][0], torch.cat([same, torch.ones(2)]), rtol=1e-5, atol=1e-5)


def test_a_step_that_is_not_a_number_is_no_sample() -> None:
    where, how = plan((10, 8)), GradiVeQ(slice=8, rank=3, train=3, compressed=3)
    what = given(2, 80, 4)
    what.xs[1][0][5] = float("nan")
    ran = run(how, where, what)
    assert ran.exchangers[0].shared().tensors["exchange/basis"].isfinite().all()
    assert ran.results[3][0].isfinite().all()


@pytest.mark.parametrize("how, first", [("without a basis", 3), ("without the moments", 1)])
def test_after_a_resume_without_state_all_steps_are_exact_until_a_whole_phase_was_seen(how: str, first: int) -> None:
    where = plan((10, 8))
    what = given(3, 80, 9)
    kept = [saved(e.shared()) for e in run(SMALL, where, Given(what.xs[:first], what.shares)).exchangers]
    begin = (lambda rank, e: e.restore(kept[rank], NOTHING)) if how == "without the moments" else None
    ran = run(SMALL, where, what, first, begin)
    assert agree(ran)
    exact = [torch.allclose(r[0].double(), total(xs), rtol=1e-5, atol=1e-5) for r, xs in zip(ran.results, what.xs[first:], strict=True)]
    assert exact == [True] * (7 - first) + [False] * 2


def test_a_state_of_another_slice_is_refused() -> None:
    where = plan((10, 8))
    made = run(SMALL, where, given(2, 80, 3)).exchangers[0]
    other = GradiVeQ(slice=4, rank=3).start(where, None)  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"\[1, 8, 4\], this GradiVeQ needs \[1, 4, 4\]"):
        other.restore(made.shared(), NOTHING)


def test_settings_that_cannot_work_are_refused() -> None:
    for wrong in ({"rank": 256}, {"rank": 0}, {"train": 0}, {"compressed": 0}):
        with pytest.raises(RecipeError, match="at least 1"):
            GradiVeQ(**wrong)
    with pytest.raises(RecipeError, match="256 values and more; the largest of this module has 6"):
        GradiVeQ().check(blueprint(nn.Linear(2, 3))[0])
    assert GradiVeQ(min_size=100).layers(plan((9, 30), (300,)).layout) == [(0, 256)]
    assert GradiVeQ(min_size=271).layers(plan((9, 30)).layout) == []


# ---- the experiment of the card


def images(rows: int = 2000) -> tuple[Tensor, Tensor]:
    """16 x 16 pixels, smooth: 5 x 5 random numbers enlarged, a little noise; 4 classes that overlap."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (rows,), generator=generator)
    coarse = torch.randn(rows, 25, generator=generator) + 0.45 * torch.randn(4, 25, generator=generator)[labels]
    smooth = nn.functional.interpolate(coarse.view(-1, 1, 5, 5), (16, 16), mode="bilinear", align_corners=True)
    return smooth.flatten(1) + 0.03 * torch.randn(rows, 256, generator=generator), labels


def trained(how: GradiVeQ | None, basis: Callable[..., Tensor] | None = None, steps: int = 1000, p: int = 4) -> tuple[float, float]:
    """The train loss at the end, and what compressed steps left out: its energy by that of y."""
    torch.manual_seed(0)
    inputs, labels = images()
    module = nn.Sequential(nn.Linear(256, 32), nn.Tanh(), nn.Linear(32, 4))
    where, weights, *_ = blueprint(module)
    module = where.build(weights, {}, gradient := torch.zeros_like(weights))
    exchange = Lockstep(how, where, p) if how else None
    if exchange and basis:
        exchange.exchangers[0]._basis = basis  # type: ignore[attr-defined]
    generator, left, all_ = torch.Generator().manual_seed(1), 0.0, 0.0
    for step in range(steps):
        xs = []
        for _ in range(p):
            rows = torch.randint(len(inputs), (32,), generator=generator)
            gradient.zero_()
            (nn.functional.cross_entropy(module(inputs[rows]), labels[rows]) / p).backward()
            xs.append(gradient.clone())
        y = sum(xs[1:], start=xs[0])
        got = exchange(xs, step) if exchange else y
        if how and step % (how.train + how.compressed) >= how.train:
            left, all_ = left + float((got - y)[:8192].square().sum()), all_ + float(y[:8192].square().sum())
        weights.sub_(got, alpha=0.1)
    with torch.no_grad():
        return float(nn.functional.cross_entropy(module(inputs), labels)), left / (all_ or 1.0)


def test_a_learned_basis_trains_as_well_as_all_values_and_a_random_one_does_not() -> None:
    """1 000 steps of 4 peers, M = 256, d = 32, 20 + 80.

    Measured: loss 0.2081, of all values 0.2072, on a random basis 0.273; left out 0.0019, by 16 directions 0.214, by random ones 0.881.
    """

    def random(moments: Tensor, seen: int) -> Tensor:
        u = torch.linalg.qr(torch.randn(256, 32, generator=torch.Generator().manual_seed(7))).Q
        return torch.cat([u, torch.zeros(256, 1)], 1)[None]

    (dense, _), (loss, left) = trained(None), trained(GradiVeQ())
    _, few = trained(GradiVeQ(rank=16), steps=300)
    worse, lost = trained(GradiVeQ(), random)
    assert left <= 0.02 and loss <= 1.02 * dense
    assert few >= 5 * left  # 16 directions are too few
    assert lost >= 0.8 and worse >= 1.05 * dense  # 1 - d / M = 0.875


def test_the_ratio_of_a_cycle_is_not_that_of_its_compressed_steps() -> None:
    """20 exact steps, 80 with an eighth: 3.33 times less, not 8. Counted on one layer of whole slices, without the basis."""
    how, where = GradiVeQ(slice=16, rank=2), plan((32, 16))
    ran = run(how, where, given(2, 512, 100))
    told = 4 * 16 * 3
    assert how.ratio == pytest.approx(10 / 3)
    assert 100 * 8 * 512 / (sum(ran.sent) - told) == pytest.approx(how.ratio, rel=0.01)


