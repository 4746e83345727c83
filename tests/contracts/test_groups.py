"""Collectives between ranks that share no memory, over links on the loopback address; members are threads here.

    p  members      n  length of a vector
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from bigdl_lite.comm.group import Group, Store
from bigdl_lite.errors import BigDLError, MeetingTimeout, PeerLost, WireError
from bigdl_lite.vector import slices

pytestmark = pytest.mark.timeout(60)

HOST, DEADLINE = "127.0.0.1", 20.0
every_size = pytest.mark.parametrize("p", [1, 2, 3, 4])

Act = Callable[[Group], Any]


def ranks(p: int, act: Callable[[int], Any]) -> list[Any]:
    """What each of p threads returns, or the error that ended it."""
    seen: list[Any] = [None] * p

    def run(r: int) -> None:
        try:
            seen[r] = act(r)
        except Exception as error:
            seen[r] = error

    started = [threading.Thread(target=run, args=(r,), daemon=True) for r in range(p)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    return seen


def meet(p: int, deadline: float = DEADLINE, name: str = "group") -> list[Group]:
    """p members of one group. Each has a store of its own: a store serves one question at a time."""
    hall = Store(HOST, 0, True, deadline)
    found = ranks(p, lambda r: Group(hall if r == 0 else Store(HOST, hall.port, False, deadline), name, r, p, HOST))
    assert all(isinstance(group, Group) for group in found), found
    return found


def run(group: list[Group], act: Act) -> list[Any]:
    """What act returns on every member, all at once; an error of ours counts as an answer."""
    for member in group:
        member.bytes_sent = 0
    seen = ranks(len(group), lambda r: act(group[r]))
    wrong = [x for x in seen if isinstance(x, Exception) and not isinstance(x, BigDLError)]
    if wrong:
        raise wrong[0]
    return seen


@pytest.fixture(scope="module")
def members() -> Iterator[Callable[[int], Callable[[Act], list[Any]]]]:
    """members(p) runs one function on all members of the group of p, which many tests share."""
    groups: dict[int, list[Group]] = {}

    def of(p: int) -> Callable[[Act], list[Any]]:
        if p not in groups:
            groups[p] = meet(p)
        return partial(run, groups[p])

    yield of
    for group in groups.values():
        for member in group:
            member.close()


@pytest.fixture
def broken() -> Iterator[Callable[..., list[Group]]]:
    """Groups that a test may break."""
    made: list[Group] = []

    def make(p: int, deadline: float = DEADLINE) -> list[Group]:
        found = meet(p, deadline)
        made.extend(found)
        return found

    yield make
    for member in made:
        member.close()


def vector(rank: int, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(rank)).to(dtype)


def in_order(parts: list[Tensor]) -> Tensor:
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total


@every_size
@pytest.mark.parametrize("n", [0, 1, 2, 7, 1000])
def test_all_to_all_brings_to_each_member_what_the_others_cut_for_it(members: Any, p: int, n: int) -> None:
    cuts = slices(n, p)  # some are empty where n < p

    def act(group: Group) -> tuple[list[Tensor], int]:
        return group.all_to_all([vector(group.rank, n)[a:b] for a, b in cuts]), group.bytes_sent

    for rank, (found, sent) in enumerate(members(p)(act)):
        a, b = cuts[rank]
        assert len(found) == p and all(torch.equal(found[r], vector(r, n)[a:b]) for r in range(p))
        assert sent == 4 * (n - (b - a))  # the sum of the others' lengths


@every_size
@pytest.mark.parametrize("lengths", [[5, 5, 5, 5], [0, 3, 1, 8], [4, 0, 0, 0], [0, 0, 0, 0]], ids=str)
def test_all_gather_brings_every_members_tensor_to_all(members: Any, p: int, lengths: list[int]) -> None:
    def act(group: Group) -> tuple[list[Tensor], int]:
        out = [torch.empty(k) for k in lengths[:p]]
        group.all_gather(vector(group.rank, lengths[group.rank]), out)
        return out, group.bytes_sent

    for rank, (found, sent) in enumerate(members(p)(act)):
        assert all(torch.equal(found[r], vector(r, lengths[r])) for r in range(p))
        assert sent == 4 * (p - 1) * lengths[rank]


@every_size
def test_all_gather_may_gather_into_the_vector_that_it_sends_from(members: Any, p: int) -> None:
    cuts = slices(10, p)

    def act(group: Group) -> Tensor:
        whole = torch.zeros(10)
        a, b = cuts[group.rank]
        whole[a:b] = vector(0, 10)[a:b]
        group.all_gather(whole[a:b], [whole[a:b] for a, b in cuts])
        return whole

    assert all(torch.equal(found, vector(0, 10)) for found in members(p)(act))


@every_size
@pytest.mark.parametrize("n", [0, 1, 13, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_all_reduce_gives_the_same_bits_to_all_and_leaves_the_input(members: Any, p: int, n: int, dtype: torch.dtype) -> None:
    def act(group: Group) -> tuple[Tensor, Tensor, int]:
        mine = vector(group.rank, n, dtype)
        return group.all_reduce(mine), mine, group.bytes_sent

    expected = in_order([vector(r, n, dtype) for r in range(p)])
    made = members(p)(act)
    for rank, (found, mine, _) in enumerate(made):
        assert torch.equal(found, expected) and torch.equal(mine, vector(rank, n, dtype))
    assert sum(sent for *_, sent in made) == dtype.itemsize * 2 * (p - 1) * n


@every_size
@pytest.mark.parametrize("n", [0, 1, 13])
def test_union_is_the_or_of_all_bits(members: Any, p: int, n: int) -> None:
    made = members(p)(lambda group: (group.union(torch.full([n], 1 << group.rank, dtype=torch.uint8)), group.bytes_sent))
    assert all(torch.equal(found, torch.full([n], 2**p - 1, dtype=torch.uint8)) for found, _ in made)
    assert sum(sent for _, sent in made) == 2 * (p - 1) * n


@every_size
@pytest.mark.parametrize("n", [0, 1, 13])
def test_broadcast_brings_the_roots_vector_to_all_in_memory_of_their_own(members: Any, p: int, n: int) -> None:
    def act(group: Group) -> tuple[Tensor, Tensor, int]:
        mine = vector(group.rank, n)
        return group.broadcast(mine, p - 1), mine, group.bytes_sent

    for rank, (found, mine, sent) in enumerate(members(p)(act)):
        assert torch.equal(found, vector(p - 1, n)) and torch.equal(mine, vector(rank, n))
        assert (not n or found.data_ptr() != mine.data_ptr()) and sent == (4 * (p - 1) * n if rank == p - 1 else 0)


def test_a_tensor_with_gaps_is_sent_by_its_values(members: Any) -> None:
    found = members(2)(lambda group: group.all_reduce(torch.arange(10.0)[::2]))
    assert all(torch.equal(x, torch.arange(10.0)[::2] * 2) for x in found)


def test_calls_may_follow_one_another_without_a_pause(members: Any) -> None:
    def act(group: Group) -> list[float]:
        seen = []
        for turn in range(50):
            seen.append(float(group.all_reduce(torch.tensor([float(turn + group.rank)]))))
            seen.append(float(group.all_reduce(torch.full([7], float(turn))).sum()))
        return seen

    found = members(3)(act)
    for seen in found:
        assert seen == [x for turn in range(50) for x in (3.0 * turn + 3, 21.0 * turn)]


def test_two_groups_may_live_side_by_side(members: Any, broken: Any) -> None:
    one, other = members(2), partial(run, broken(2))
    assert [float(x) for x in one(lambda g: g.all_reduce(torch.ones(1)))] == [2.0, 2.0]
    assert [float(x) for x in other(lambda g: g.all_reduce(torch.full([1], 5.0)))] == [10.0, 10.0]


def test_a_member_that_closes_ends_the_wait_of_the_others(broken: Any) -> None:
    def act(group: Group) -> Any:
        if group.rank == 2:
            group.close()
            return "closed"
        return group.all_to_all([torch.ones(3)] * 3)

    *waiting, closed = run(broken(3), act)
    assert closed == "closed" and all(isinstance(x, PeerLost) for x in waiting), waiting


def test_members_whose_lengths_differ_are_told_with_the_numbers(broken: Any) -> None:
    """Nobody sums what does not belong together, and nobody waits for the rest of it."""
    found = run(broken(2), lambda group: group.all_reduce(torch.ones(3 + group.rank)))
    wrong = [x for x in found if isinstance(x, WireError)]
    assert wrong and all(isinstance(x, WireError | PeerLost) for x in found), found
    assert all("of 2 in all_" in str(x) and "bytes came" in str(x) for x in wrong)


def test_a_member_that_has_missed_a_call_is_out_of_step(broken: Any) -> None:
    """The bytes would fit; the count of calls does not."""

    def act(group: Group) -> Any:
        group._calls += group.rank
        return group.all_reduce(torch.ones(3))

    found = run(broken(2), act)
    assert any(isinstance(x, WireError) and "was expected" in str(x) for x in found), found
    assert all(isinstance(x, WireError | PeerLost) for x in found), found


@pytest.mark.parametrize("n", [1 << 22])
@pytest.mark.parametrize("p", [2, 4])
def test_vectors_larger_than_all_buffers_pass_each_other(members: Any, p: int, n: int) -> None:
    def act(group: Group) -> Tensor:
        return group.all_reduce(torch.full([n], float(group.rank + 1)))

    assert all(torch.equal(found, torch.full([n], p * (p + 1) / 2)) for found in members(p)(act))


@pytest.mark.parametrize("call", ["all_to_all", "all_gather", "all_reduce", "union", "broadcast"])
def test_every_call_on_a_connection_that_is_dead_is_a_lost_peer(broken: Any, call: str) -> None:
    first, second = broken(2)
    second.close()
    x = torch.ones(4)
    act = {
        "all_to_all": lambda: first.all_to_all([x, x]), "all_gather": lambda: first.all_gather(x, [x.clone(), x.clone()]),
        "all_reduce": lambda: first.all_reduce(x), "union": lambda: first.union(x.byte()), "broadcast": lambda: first.broadcast(x, 1),
    }  # fmt: skip
    for _ in range(3):
        with pytest.raises(PeerLost, match="member 0 of 2 in"):
            act[call]()


def test_a_member_that_is_silent_is_an_error_at_the_deadline(broken: Any) -> None:
    """Silent, not gone: its connections stay open."""
    found = run(broken(2, 1.0), lambda group: group.all_reduce(torch.ones(3)) if group.rank == 0 else None)
    assert isinstance(found[0], MeetingTimeout) and "member 0 of 2 in all_to_all (deadline 1 s)" in str(found[0])


def test_a_member_that_never_comes_is_an_error_at_the_deadline() -> None:
    hall = Store(HOST, 0, True, 0.5)
    with pytest.raises(MeetingTimeout, match=r"rendezvous 'alone' .*: member\(s\) \[1\] did not come"):
        Group(hall, "alone", 0, 2, HOST)


def test_a_store_tells_what_it_was_told_and_times_out_with_the_key() -> None:
    hall = Store(HOST, 0, True, 0.5)
    Store(HOST, hall.port, False, DEADLINE).put("node/1", b"[0, 1]")
    assert hall.get("node/1") == b"[0, 1]"
    with pytest.raises(MeetingTimeout, match=r"nobody told 'node/2' .* in 0"):
        hall.get("node/2")


def test_a_store_that_is_not_there_is_an_error_of_ours() -> None:
    closed = Store(HOST, 0, True, 0.5)
    port = closed.port
    del closed
    with pytest.raises(PeerLost, match=r"the store at .* cannot be reached"):
        Store(HOST, port, False, DEADLINE)
