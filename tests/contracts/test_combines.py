"""What every combine keeps. A new combine is one more row of COMBINES."""

from __future__ import annotations

import pickle
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from bigdl_lite.algorithms import Combine, Update
from bigdl_lite.algorithms.parts import Sum

COMBINES: list[Combine] = [Sum()]

every_combine = pytest.mark.parametrize("combine", COMBINES, ids=repr)


def updates(p: int, k: int = 9, seed: int = 0) -> list[Update]:
    generator = torch.Generator().manual_seed(seed)
    return [Update(torch.randn(k, generator=generator), float(r + 1)) for r in range(p)]


def in_rank_order(vectors: Sequence[Tensor]) -> Tensor:
    total = vectors[0].clone()
    for x in vectors[1:]:
        total = total + x
    return total


@every_combine
@pytest.mark.parametrize("p", [1, 2, 3, 7])
@pytest.mark.parametrize("k", [0, 1, 9])
def test_the_result_is_as_long_as_the_slice(combine: Combine, p: int, k: int) -> None:
    assert combine(updates(p, k)).vector.shape == (k,)


@every_combine
def test_one_update_combines_to_itself(combine: Combine) -> None:
    (only,) = updates(1)
    expected = only.vector.clone()
    found = combine([only])
    assert torch.equal(found.vector, expected) and found.weight == only.weight


@every_combine
def test_the_same_updates_combine_to_the_same_bits(combine: Combine) -> None:
    assert torch.equal(combine(updates(5)).vector, combine(updates(5)).vector)


@every_combine
def test_only_the_first_update_may_be_overwritten(combine: Combine) -> None:
    given, kept = updates(4), updates(4)
    combine(given)
    assert all(torch.equal(a.vector, b.vector) for a, b in zip(given[1:], kept[1:], strict=True))


@pytest.mark.parametrize("combine", [combine for combine in COMBINES if combine.linear], ids=repr)
def test_a_linear_combine_of_combines_is_the_combine_of_all(combine: Combine) -> None:
    a, b, whole = updates(5)[:2], updates(5)[2:], combine(updates(5))
    nodes = combine([combine(a), combine(b)])
    torch.testing.assert_close(nodes.vector, whole.vector, rtol=0, atol=1e-6)
    assert nodes.weight == whole.weight


@every_combine
def test_a_combine_is_a_value(combine: Combine) -> None:
    assert pickle.loads(pickle.dumps(combine)) == combine


@pytest.mark.parametrize("p", [1, 2, 3, 7])
def test_sum_adds_vectors_in_rank_order_to_the_bit_and_weights(p: int) -> None:
    expected = in_rank_order([u.vector for u in updates(p)])
    found = Sum()(updates(p))
    assert torch.equal(found.vector, expected) and found.weight == p * (p + 1) / 2


def test_the_order_of_ranks_is_visible_in_the_bits() -> None:
    """Negative control: were the order free, the test above could pass by accident."""
    vectors = [torch.tensor([1e8]), torch.tensor([1.0]), torch.tensor([-1e8])]
    turned = [vectors[0], vectors[2], vectors[1]]
    assert not torch.equal(in_rank_order(vectors), in_rank_order(turned))


def test_an_update_of_no_rows_changes_nothing() -> None:
    first, second = updates(2)
    expected = first.vector.clone()
    found = Sum()([first, Update(torch.zeros_like(second.vector), 0.0)])
    assert torch.equal(found.vector, expected) and found.weight == first.weight
