"""What every codec keeps: its length is known beforehand, and values come back within its bound.

A new codec is one more row of FAITHFUL or LOSSY.
"""

from __future__ import annotations

import inspect
import math
import pickle
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bigdl_lite.errors import RecipeError, WireError
from bigdl_lite.wire import codec as plain
from bigdl_lite.wire import lossy, sparse
from bigdl_lite.wire.codec import BFloat16, Float16, Raw, group_of, made_for
from bigdl_lite.wire.lossy import QSGD, MinMax8, Sign
from bigdl_lite.wire.pieces import noise, packed, unpacked, words
from bigdl_lite.wire.sparse import RandomK, TopK

Bound = Callable[[Tensor], Tensor]  # x [n] -> the largest error that each value may have [n]
SERVER = -1
ULP = 2.0**-23


def relative(error: float) -> Bound:
    return lambda x: error * x.abs()


def half(x: Tensor) -> Tensor:
    return (2.0**-11 * x.abs()).clamp(min=2.0**-25) + (x.abs() - 65504).clamp(min=0)


def grouped(group: int, of: Bound) -> Bound:
    """A bound that is computed group by group, in float64."""
    return lambda x: torch.cat([of(v) for v in x.double().split(group or max(1, len(x)))])


def steps(v: Tensor) -> Tensor:
    """MinMax8: half a step, the rounding of its arithmetic, and half an ulp of the result."""
    return ((v.max() - v.min()) / 510 * (1 + 2e-4) + ULP / 2 * v.abs().max()).expand(len(v)) if len(v) else v


def levels(s: int) -> Bound:
    return lambda v: (v.norm() / s * (1 + 1e-5)).expand(len(v))


def shrunk(s: int) -> Bound:
    return lambda v: levels(s)(v) + v.abs()


def signs(v: Tensor) -> Tensor:
    return (v.abs() - v.abs().mean()).abs() + 1e-6 * v.abs().mean() if len(v) else v


def largest(ratio: float) -> Bound:
    """TopK: nothing for those that are kept, all for the others."""

    def of(x: Tensor) -> Tensor:
        kept = x.abs() >= x.abs().sort(descending=True).values[: math.ceil(ratio * len(x))].min() if len(x) else x.bool()
        return torch.where(kept, 0.0, x.abs())

    return of


# codec, dtype of the vectors it takes, bound
FAITHFUL = [
    (Raw(), torch.float32, relative(0.0)),
    (Raw(torch.float64), torch.float64, relative(0.0)),
    (Raw(torch.bfloat16), torch.bfloat16, relative(0.0)),
    (BFloat16(), torch.float32, relative(2.0**-8)),
    (Float16(), torch.float32, half),
]
LOSSY = [
    (MinMax8(), torch.float32, grouped(2048, steps)),
    (MinMax8(group=5), torch.float32, grouped(5, steps)),
    (MinMax8(group=0), torch.float32, grouped(0, steps)),
    (QSGD(), torch.float32, grouped(512, levels(127))),
    (QSGD(levels=1, group=64), torch.float32, grouped(64, levels(1))),
    (QSGD(levels=7, group=0), torch.float32, grouped(0, levels(7))),
    (QSGD(levels=15, group=128, contract=True), torch.float32, grouped(128, shrunk(15))),
    (QSGD(levels=1000, group=64), torch.float32, grouped(64, levels(1000))),
    (Sign(), torch.float32, grouped(2048, signs)),
    (Sign(group=64), torch.float32, grouped(64, signs)),
    (TopK(0.1), torch.float32, largest(0.1)),
    (TopK(1), torch.float32, relative(0.0)),
    (RandomK(0.25), torch.float32, relative(1.0)),
    (RandomK(0.1, group=0), torch.float32, relative(1.0)),
    (RandomK(0.25, group=16, scaled=True), torch.float32, relative(15.0)),  # one of a group of one to 16
]
CODECS = FAITHFUL + LOSSY
LENGTHS = [0, 1, 7, 8, 9, 1000, 5000]

every_codec = pytest.mark.parametrize(("codec", "dtype", "bound"), CODECS, ids=[repr(codec) for codec, *_ in CODECS])
every_faithful_codec = pytest.mark.parametrize(("codec", "dtype", "bound"), FAITHFUL, ids=[repr(codec) for codec, *_ in FAITHFUL])
every_lossy_codec = pytest.mark.parametrize("codec", [codec for codec, *_ in LOSSY], ids=repr)
every_length = pytest.mark.parametrize("n", LENGTHS)
drawn = settings(deadline=None, max_examples=25)


def sample(n: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """n values of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=generator) * 10.0 ** torch.randint(-20, 20, (n,), generator=generator)
    return x.to(dtype)


def normal(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def wired(codec: Any, x: Tensor) -> bytearray:
    """The encoding as it comes off a wire."""
    return bytearray(codec.encode(x))


def back(codec: Any, x: Tensor) -> Tensor:
    return codec.decode(wired(codec, x), len(x))


def lost(codec: Any, x: Tensor) -> float:
    """||error||^2 / ||x||^2."""
    x64 = x.double()
    return float((back(codec, x).double() - x64).square().sum() / x64.square().sum())


@every_codec
@every_length
def test_an_encoding_is_as_long_as_promised(codec: Any, dtype: torch.dtype, bound: Bound, n: int) -> None:
    assert len(wired(codec, sample(n, dtype))) == codec.nbytes(n)


@every_codec
@every_length
def test_values_come_back_within_the_bound(codec: Any, dtype: torch.dtype, bound: Bound, n: int) -> None:
    x = sample(n, dtype)
    y = back(codec, x)
    assert y.shape == (n,) and y.dtype == dtype and ((y.double() - x.double()).abs() <= bound(x)).all()


@every_codec
def test_encoding_is_deterministic_and_leaves_the_vector_alone(codec: Any, dtype: torch.dtype, bound: Bound) -> None:
    x = sample(100, dtype)
    before = x.clone()
    assert wired(codec, x) == wired(codec, x) and torch.equal(x, before)


@every_codec
def test_a_strided_or_trainable_vector_is_encoded_by_its_values(codec: Any, dtype: torch.dtype, bound: Bound) -> None:
    x = sample(60, dtype)
    assert wired(codec, x[::3]) == wired(codec, x[::3].clone())
    assert wired(codec, x.clone().requires_grad_()) == wired(codec, x)


@every_codec
@pytest.mark.parametrize("wrong", [-1, 1, 100])
def test_bytes_of_a_foreign_length_are_refused(codec: Any, dtype: torch.dtype, bound: Bound, wrong: int) -> None:
    data = (wired(codec, sample(9, dtype)) + bytes(100))[: codec.nbytes(9) + wrong]
    with pytest.raises(WireError, match=rf"9 values take {codec.nbytes(9)} bytes, got {len(data)}"):
        codec.decode(data, 9)


@every_codec
def test_nothing_decodes_from_nothing_and_only_from_nothing(codec: Any, dtype: torch.dtype, bound: Bound) -> None:
    assert len(codec.decode(b"", 0)) == len(codec.decode(memoryview(b""), 0)) == 0
    with pytest.raises(WireError):
        codec.decode(b"x", 0)


@every_faithful_codec
def test_infinity_and_nan_survive_so_that_divergence_is_seen(codec: Any, dtype: torch.dtype, bound: Bound) -> None:
    y = back(codec, torch.tensor([float("inf"), float("-inf"), float("nan")], dtype=dtype))
    assert y[0] == float("inf") and y[1] == float("-inf") and torch.isnan(y[2])


@every_lossy_codec
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_one_value_that_is_not_finite_is_seen_in_its_group_and_in_no_other(codec: Any, bad: float) -> None:
    n, group = 3000, group_of(codec) or 3000
    for place in (0, 5, 1234, 2999):
        x = normal(n)
        x[place] = bad
        x[(place + 7) % n] = -bad if place == 5 else x[(place + 7) % n]  # another in the same group, or in the next
        y = back(codec, x)
        for a in range(0, n, group):
            assert y[a : a + group].isfinite().all() == x[a : a + group].isfinite().all(), (place, a)
        assert wired(codec, x) == wired(codec, x)


@every_codec
def test_a_codec_is_a_value_that_pickles_and_compares(codec: Any, dtype: torch.dtype, bound: Bound) -> None:
    assert pickle.loads(pickle.dumps(codec)) == codec and hash(codec) == hash(pickle.loads(pickle.dumps(codec)))


def test_every_codec_of_the_modules_is_in_this_suite_and_no_two_share_a_tag() -> None:
    kinds = [
        kind for module in (plain, lossy, sparse) for _, kind in inspect.getmembers(module, inspect.isclass)
        if kind.__module__ == module.__name__ and kind is not plain.Codec
    ]  # fmt: skip
    assert set(kinds) == {type(codec) for codec, *_ in CODECS}
    tags = [kind.tag for kind in kinds]
    assert len(set(tags)) == len(tags) and all(0 <= tag < 255 for tag in tags)


def test_tags_never_change() -> None:
    assert (Raw.tag, BFloat16.tag, Float16.tag) == (0, 1, 2)
    assert (MinMax8.tag, QSGD.tag, Sign.tag, TopK.tag, RandomK.tag) == (3, 4, 5, 6, 7)


def test_known_bytes() -> None:
    assert bytes(Raw().encode(torch.tensor([1.0, -2.0]))).hex() == "0000803f000000c0"
    assert bytes(BFloat16().encode(torch.tensor([1.0, -2.0]))).hex() == "803f00c0"
    assert bytes(Float16().encode(torch.tensor([1.0, -2.0]))).hex() == "003c00c0"


def test_known_bytes_of_lossy_codecs() -> None:
    x = torch.tensor([1.0, -2.0, 0.0, 0.0])
    one, two = "0000803f", "00000040"
    assert wired(MinMax8(), x).hex() == "000000c0" + one + "ff00aaaa"
    assert wired(QSGD(levels=1), torch.tensor([0.0, -2.0, 0.0, 0.0])).hex() == two + "51"  # codes 1 0 1 1, the first lowest
    assert wired(QSGD(levels=127), torch.tensor([0.0, 2.0])).hex() == two + "7ffe"
    assert wired(Sign(), torch.tensor([1.0, -2.0, 0.0, 1.0])).hex() == one + "0d"
    assert wired(TopK(0.5), x).hex() == "0000000001000000" + one + "000000c0"
    assert wired(RandomK(1.0), x[:2]).hex() == one + "000000c0"


def test_raw_copies_nothing() -> None:
    x = torch.zeros(4)
    view = Raw().encode(x)
    x[0] = 1.0
    assert bytes(view)[:4].hex() == "0000803f"
    data = bytearray(16)
    Raw().decode(data, 4)[0] = 1.0
    assert data[:4].hex() == "0000803f"


@pytest.mark.parametrize("codec", [codec for codec, *_ in CODECS if not isinstance(codec, Raw)], ids=repr)
def test_what_is_decoded_has_memory_of_its_own(codec: Any) -> None:
    for n in (0, 9):
        data = bytes(codec.encode(normal(n)))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            y, again = codec.decode(data, n), codec.decode(memoryview(data), n)
        y += 1.0
        assert torch.equal(codec.decode(data, n), again) and bytes(codec.encode(normal(n))) == data


def test_half_precision_saturates() -> None:
    x = torch.tensor([65504.0, 65519.0, 65520.0, -1e30, 3.4e38, 1e-8, 0.0])
    assert back(Float16(), x).tolist() == [65504.0, 65504.0, 65504.0, -65504.0, 65504.0, 0.0, 0.0]


# ------------------------------------------------------------------------------------------------------------ lossy codecs


@pytest.mark.parametrize(
    ("codec", "n", "nbytes"),
    [
        (MinMax8(), 2048, 2048 + 8), (MinMax8(), 2049, 2049 + 16), (MinMax8(), 5000, 5000 + 24),
        (MinMax8(group=0), 5000, 5000 + 8), (MinMax8(group=0), 1, 9), (MinMax8(group=0), 0, 0),
        (QSGD(), 512, 4 + 512), (QSGD(), 1000, 8 + 1000), (QSGD(levels=1), 513, 8 + 129), (QSGD(levels=7), 513, 8 + 257),
        (QSGD(levels=15), 513, 8 + 321), (QSGD(levels=1000), 513, 8 + 706), (QSGD(levels=3, group=0), 17, 4 + 7),
        (Sign(), 2048, 4 + 256), (Sign(), 2049, 8 + 257), (Sign(group=0), 9, 4 + 2),
        (TopK(0.01), 1000, 80), (TopK(0.01), 1001, 88), (TopK(0.01), 1, 8), (TopK(0.07), 100, 56),
        (RandomK(0.01), 1024, 40), (RandomK(0.01), 1025, 44), (RandomK(0.01), 3 * 1024 + 500, 140), (RandomK(0.1, group=0), 55, 24),
    ],
    ids=repr,
)  # fmt: skip
def test_bytes_are_those_of_the_formula(codec: Any, n: int, nbytes: int) -> None:
    assert codec.nbytes(n) == len(wired(codec, normal(n))) == nbytes


@every_lossy_codec
def test_zeros_stay_zeros(codec: Any) -> None:
    x = torch.zeros(3000)
    assert torch.equal(back(codec, x), x)
    x[:2500] = normal(2500)
    y = back(codec, x)
    assert y.isfinite().all() and (isinstance(codec, Sign | MinMax8) or not y[2500:].any())


@every_lossy_codec
@pytest.mark.parametrize("scale", [1e-30, 1e-9, 1e9, 1e30])
def test_the_relative_error_does_not_depend_on_scale(codec: Any, scale: float) -> None:
    x = normal(5000)
    usual = lost(codec, x)
    assert abs(lost(codec, x * scale) - usual) <= 0.1 * usual


@every_lossy_codec
def test_values_near_the_smallest_that_float32_holds_are_no_special_case(codec: Any) -> None:
    small = normal(5000) * 1e-40
    usual = (small.double() * 1e40).float()
    assert back(codec, small).isfinite().all() and lost(codec, small) <= 1.1 * lost(codec, usual) + 1e-6


@pytest.mark.parametrize("codec", [codec for codec, *_ in LOSSY if group_of(codec)], ids=repr)
@pytest.mark.parametrize("rank", [0, 3, SERVER])
def test_a_vector_cut_at_multiples_of_the_group_decodes_to_the_same(codec: Any, rank: int) -> None:
    g = group_of(codec)
    n, first = 37 * g + g // 2 + 1, 5 * g
    x = sample(n, torch.float32)
    whole = made_for(codec, 11, rank, first)
    pieces, nbytes = [], 0
    for a, b in [(0, g), (g, g), (g, 9 * g), (9 * g, n)]:
        piece = made_for(codec, 11, rank, first + a)
        pieces.append(back(piece, x[a:b]))
        nbytes += piece.nbytes(b - a)
    assert torch.equal(torch.cat(pieces), back(whole, x)) and nbytes == whole.nbytes(n)


@every_lossy_codec
def test_blocks_of_the_computation_do_not_show(codec: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x = normal(70000)
    usual = wired(codec, x)
    monkeypatch.setattr("bigdl_lite.wire.pieces._BLOCK", 1)
    if group_of(codec) != 5:  # 14000 blocks
        assert wired(codec, x) == usual


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: MinMax8(group=-1), r"MinMax8\(group=-1\)"),
        (lambda: QSGD(group=-8), r"QSGD\(group=-8\)"),
        (lambda: QSGD(group=100), r"QSGD\(group=100\).*multiple of 8"),
        (lambda: QSGD(levels=0), r"QSGD\(levels=0\)"),
        (lambda: QSGD(levels=40000), r"QSGD\(levels=40000\)"),
        (lambda: Sign(group=12), r"Sign\(group=12\).*multiple of 8"),
        (lambda: TopK(0.0), r"TopK\(ratio=0.0\)"),
        (lambda: TopK(1.5), r"TopK\(ratio=1.5\)"),
        (lambda: TopK(float("nan")), r"TopK\(ratio=nan\)"),
        (lambda: RandomK(-0.1), r"RandomK\(ratio=-0.1\)"),
        (lambda: RandomK(0.1, group=-1), r"RandomK\(group=-1\)"),
    ],
)
def test_settings_that_cannot_work_are_refused_with_their_number(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        make()


@drawn
@given(st.lists(st.floats(width=32, min_value=-(2.0**100), max_value=2.0**100), min_size=1, max_size=40), st.integers(0, 9))
def test_minmax_errs_by_half_a_step(values: list[float], group: int) -> None:
    x = torch.tensor(values, dtype=torch.float32)
    assert ((back(MinMax8(group), x).double() - x.double()).abs() <= grouped(group, steps)(x)).all()


def test_minmax_errs_by_half_a_step_of_its_own_group_and_keeps_constants() -> None:
    x = normal(100_000)
    width = torch.stack([v.max() - v.min() for v in x[:98304].split(2048)]).repeat_interleave(2048)
    error = (back(MinMax8(), x) - x).abs()[:98304]
    assert (error <= width / 510 * (1 + 2e-4)).all() and (error > width / 510 * 0.999).any()
    for constant in (3.14, -1e-42, 3e38):
        assert torch.equal(back(MinMax8(group=8), torch.full((13,), constant)), torch.full((13,), constant))


def test_an_absolute_epsilon_would_lose_small_values() -> None:
    """The published kernel divides by hi - lo + 1e-7: of sigma = 1e-9 it loses far more than of sigma = 1."""
    x = normal(2048) * 1e-9
    scale = 255 / (x.max() - x.min() + 1e-7)
    upper = (x.max() * scale).round()
    theirs = (torch.minimum((x * scale).round(), upper)) / scale
    assert (theirs - x).norm() / x.norm() > 0.05 and lost(MinMax8(), x) ** 0.5 < 0.015


@pytest.mark.parametrize(("s", "energy", "limit"), [(1, 17.4, 22.6), (15, 0.38, 1.5), (127, 0.0053, 0.032)])
def test_qsgd_loses_what_was_measured_and_less_than_was_proven(s: int, energy: float, limit: float) -> None:
    """Measured for normal values, groups of 512; proven: min(g / s^2, sqrt(g) / s)."""
    codec, x = QSGD(levels=s), normal(512 * 300)
    error = (back(codec, x) - x).double().view(-1, 512).square().sum(1) / x.double().view(-1, 512).square().sum(1)
    assert float(error.mean()) == pytest.approx(energy, rel=0.05)
    assert codec.omega(512) == pytest.approx(limit, rel=0.01) and float(error.mean()) <= limit


@pytest.mark.parametrize("codec", [QSGD(levels=1), QSGD(levels=15), RandomK(0.1, group=512, scaled=True)], ids=repr)
def test_without_bias(codec: Any) -> None:
    """One vector at 4000 places: the mean of what is decoded is the vector, within five standard errors and five rare events."""
    copies, x = 4000, normal(512)
    x[:10] = 0
    decoded = back(codec.at(5, 2, 0), x.repeat(copies)).view(copies, 512).double()
    error = (decoded.mean(0) - x).abs()
    assert (error <= 5 * decoded.std(0) / copies**0.5 + 5 * decoded.abs().max() / copies).all() and not decoded[:, :10].any()


def test_errors_of_ranks_average_out_but_with_one_noise_for_all_they_do_not() -> None:
    p, x, codec = 8, normal(512 * 50), QSGD(levels=15)

    def error_of_the_mean(ranks: list[int]) -> float:
        mean = torch.stack([back(codec.at(3, rank, 0), x) for rank in ranks]).double().mean(0)
        return float((mean - x).square().sum())

    independent, same = error_of_the_mean(list(range(p))), error_of_the_mean([0] * p)
    assert same / independent == pytest.approx(p, rel=0.1)


def test_noise_depends_on_seed_rank_and_place() -> None:
    codec, x = QSGD(levels=1), torch.ones(4096)
    codes = [back(codec.at(*where), x) for where in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, SERVER, 0), (0, 0, 4096), (2**62, 7, 2**40)]]
    for i, a in enumerate(codes):
        for b in codes[:i]:
            assert abs(float(torch.corrcoef(torch.stack([a, b]))[0, 1])) < 5 / 64  # five standard errors


def test_qsgd_shrunk_is_a_contraction() -> None:
    """E ||C(v) - v||^2 <= omega / (1 + omega) ||v||^2, where Q itself loses more than there was."""
    x = normal(512 * 100)
    for s in (1, 2, 4):
        codec = QSGD(levels=s)
        omega = codec.omega(512)
        assert lost(replace(codec, contract=True), x) <= omega / (1 + omega) < 1
    assert lost(QSGD(levels=1), x) > 1


@drawn
@given(st.integers(1, 300), st.integers(0, 2**32))
def test_sign_is_a_contraction(n: int, seed: int) -> None:
    x = normal(n, seed) * 10.0 ** (normal(n, seed + 1) * 3)
    kept = float(x.double().abs().sum() ** 2 / (n * x.double().square().sum()))
    assert lost(Sign(group=0), x) == pytest.approx(1 - kept, abs=1e-5) and kept >= 1 / n * (1 - 1e-6)


@drawn
@given(st.lists(st.integers(-5, 5), min_size=1, max_size=60), st.floats(0.01, 1))
def test_topk_keeps_the_best_and_of_equal_ones_the_first(values: list[int], ratio: float) -> None:
    x, codec = torch.tensor(values, dtype=torch.float32), TopK(ratio)
    best = sorted(range(len(x)), key=lambda i: (-abs(values[i]), i))[: codec.kept(len(x))]
    expected = torch.zeros_like(x)
    expected[best] = x[best]
    assert torch.equal(back(codec, x), expected)
    assert np.frombuffer(wired(codec, x), "<i4")[: len(best)].tolist() == sorted(best)


@pytest.mark.parametrize("places", [[0, 9], [-1, 3], [4, 4], [5, 2], [2**31 - 1, 0]])
def test_topk_refuses_places_that_are_none(places: list[int]) -> None:
    data = np.array(places, "<i4").tobytes() + bytes(8)
    with pytest.raises(WireError, match="not 2 ascending ones of 9 values"):
        TopK(0.2).decode(data, 9)


def test_topk_says_where_its_places_end() -> None:
    with pytest.raises(WireError, match="cut the vector"):
        TopK(0.01).encode(torch.zeros(1).expand(2**31))


def test_randomk_keeps_the_same_places_on_all_ranks_and_others_in_the_next_step() -> None:
    codec, x = RandomK(0.1, group=100), normal(1050)
    kept = [back(codec.at(7, rank, 0), x) != 0 for rank in (0, 1, SERVER)]
    assert torch.equal(kept[0], kept[1]) and torch.equal(kept[0], kept[2])
    assert [int(group.sum()) for group in kept[0].split(100)] == [10] * 10 + [5]
    assert not torch.equal(kept[0], back(codec.at(8, 0, 0), x) != 0)
    assert torch.equal(back(codec, x)[back(codec, x) != 0], x[back(codec, x) != 0])


def test_randomk_chooses_every_place_as_often_as_any_other() -> None:
    kept = back(RandomK(0.1, group=50), torch.ones(50 * 4000)).view(4000, 50).mean(0)
    assert (kept - 0.1).abs().max() < 5 * (0.1 * 0.9 / 4000) ** 0.5


def test_randomk_scales_what_is_sent_and_not_once_more_the_sum() -> None:
    x, codec = normal(1000), RandomK(0.25, group=100, scaled=True)
    sent = back(codec.at(1, 0, 0), x)
    assert torch.equal(sent[sent != 0], 4 * x[sent != 0]) and torch.equal(back(codec.at(1, SERVER, 0), sent), sent)


@drawn
@given(st.integers(1, 16), st.integers(0, 70), st.integers(0, 1000))
def test_codes_of_a_few_bits_lie_side_by_side(bits: int, n: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, n).astype("u1" if bits <= 8 else "u2")
    data = packed(codes, bits)
    assert len(data) == math.ceil(n * bits / 8) and (unpacked(data, n, bits) == codes).all()
    if bits <= 8:
        plain_bits = "".join(f"{code:0{bits}b}"[::-1] for code in codes.tolist())
        assert "".join(f"{byte:08b}"[::-1] for byte in data.tolist())[: len(plain_bits)] == plain_bits


def test_random_words_are_those_of_splitmix64() -> None:
    """The first three outputs for seed 0, as published with the reference implementation."""
    assert [hex(w) for w in words(0, np.arange(1, 4)).tolist()] == ["0xe220a8397b1dcdaf", "0x6e789e6aa1b965f4", "0x6c45d188009454f"]


@drawn
@given(st.integers(0, 2**45), st.integers(0, 50), st.integers(0, 50))
def test_noise_is_uniform_and_belongs_to_its_place(first: int, before: int, n: int) -> None:
    u = noise(99, first, before + n)
    assert (u[before:] == noise(99, first + before, n)).all() and (u >= 0).all() and (u < 1).all()
    many = noise(99, first, 10_000)
    assert abs(many.mean() - 0.5) < 5 * (1 / 12 / 10_000) ** 0.5 and len(np.unique(many)) > 9_980
