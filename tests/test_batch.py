"""The order of an epoch: every row once, shares in step, the same answer on every machine."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bigdl_lite.batch import Batch, _divmod_big, mix, order, quotas


@given(st.lists(st.integers(0, 60), min_size=1, max_size=8), st.integers(1, 70))
@settings(max_examples=150, deadline=None)
def test_every_step_is_full_but_the_last_and_every_row_is_dealt_once(counts: list[int], batch_size: int) -> None:
    plan = quotas(counts, batch_size)
    total = sum(counts)
    assert plan.shape == (-(-total // batch_size), len(counts)) and (plan >= 0).all()
    assert plan.sum(0).tolist() == counts
    assert plan.sum(1).tolist() == [min(batch_size, total - s * batch_size) for s in range(len(plan))]


@given(st.lists(st.integers(0, 60), min_size=1, max_size=8), st.integers(1, 70))
@settings(max_examples=50, deadline=None)
def test_no_share_is_more_than_one_row_from_its_proportion(counts: list[int], batch_size: int) -> None:
    left = np.array(counts, dtype=float)
    for quota in quotas(counts, batch_size):
        exact = left * quota.sum() / left.sum()
        assert (np.abs(quota - exact) < 1).all()
        left -= quota


def test_a_known_plan() -> None:
    assert quotas([5, 0, 2], 3).tolist() == [[2, 0, 1], [2, 0, 1], [1, 0, 0]]


def test_counts_beyond_32_bits_are_divided_exactly() -> None:
    counts = [2**40 + 1, 2**40, 1]
    plan = quotas(counts, 2**40)
    assert plan.sum(0).tolist() == counts and (plan >= 0).all()
    left = np.array([7, 0, 12])
    small, big = np.divmod(left * 5, 19), _divmod_big(left, 5, 19)
    assert all((a == b).all() for a, b in zip(small, big, strict=True))


def test_a_batch_of_no_rows_is_refused_with_its_number() -> None:
    with pytest.raises(ValueError, match="batch_size is 0"):
        quotas([3], 0)


@pytest.mark.parametrize("n", [0, 1, 2, 100])
def test_an_order_is_a_permutation(n: int) -> None:
    assert sorted(order(n, 1, 2, 3).tolist()) == list(range(n))


def test_an_order_depends_on_rows_seed_epoch_and_rank_and_on_nothing_else() -> None:
    reference = order(50, 1, 2, 3).tolist()
    torch.manual_seed(99)
    assert order(50, 1, 2, 3).tolist() == reference
    others = [order(50, 9, 2, 3), order(50, 1, 9, 3), order(50, 1, 2, 9), order(51, 1, 2, 3)]
    assert all(other.tolist()[:50] != reference for other in others)


def test_an_order_leaves_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    order(10, 0, 0, 0)
    assert torch.equal(before, torch.get_rng_state())


def test_mixed_seeds_are_the_same_everywhere_and_fit_torch() -> None:
    assert mix(0, 2, 7, 1) == 8274204740914444535
    assert mix(1, 2) != mix(2, 1)
    seeds = {mix(s, step, rank) for s in range(10) for step in range(10) for rank in range(10)}
    assert len(seeds) == 1000 and all(0 <= seed < 2**63 for seed in seeds)


def test_take_copies_the_rows_that_it_names() -> None:
    batch = Batch((torch.arange(12.0).view(4, 3), torch.arange(4)), torch.arange(4.0))
    taken = batch.take(torch.tensor([2, 0]))
    assert taken.rows == 2 and taken.inputs[0].tolist() == [[6, 7, 8], [0, 1, 2]]
    assert taken.inputs[1].tolist() == [2, 0] and taken.target.tolist() == [2, 0]
    taken.inputs[0].zero_()
    assert batch.inputs[0].sum() == 66
    assert Batch(batch.inputs, None).take(torch.tensor([], dtype=torch.int64)).rows == 0


def test_a_batch_that_is_on_the_cpu_stays_there_uncopied() -> None:
    batch = Batch((torch.ones(2),), None)
    assert batch.to(torch.device("cpu")) is batch
