"""A parameter server of workers: its rules by themselves, and then among threads with real links that are as slow as they are told.

What a fit must be is played again by one process from its history: the mean over exactly the rows of the workers that were accepted.

    p  workers      n  of them that make a version (in fits: 3 of 4)
"""

from __future__ import annotations

import math
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from bigdl_lite.algorithms import Gradient, Sum, TorchOptimizer, Update, Work
from bigdl_lite.algorithms.accept import AllBut, Bounded, FirstOf
from bigdl_lite.algorithms.peer import Here, Moment
from bigdl_lite.algorithms.server import Served, backup_workers, bounded_staleness
from bigdl_lite.algorithms.shard import Shard
from bigdl_lite.batch import Batch, order, quotas
from bigdl_lite.comm.block import Block, private
from bigdl_lite.comm.group import Group, Store
from bigdl_lite.comm.link import TENSOR, exchange
from bigdl_lite.engine.keeper import Keeper, dump, forget, parse
from bigdl_lite.engine.meeting import Meeting, Place
from bigdl_lite.engine.rank import block_size, train
from bigdl_lite.engine.recipe import Outcome, Recipe, Saving, Start, silent
from bigdl_lite.errors import BigDLError, MeetingTimeout, PeerLost, RecipeError, UserError, WireError
from bigdl_lite.model.replica import Replica
from tests.engine import test_meeting as nodes

pytestmark = pytest.mark.timeout(30)

PLAIN, MOMENTUM = partial(SGD, lr=0.1), partial(SGD, lr=0.05, momentum=0.9)


# ---- the rules ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 4, 5])
def test_the_n_fastest_make_the_version_and_a_step_takes_as_long_as_the_last_of_them(n: int) -> None:
    rng, p = random.Random(n), 5
    book, start = FirstOf(n, patience=1e9).open(p, 0, leads=True), 0.0
    for version in range(30):
        times = {rank: start + rng.lognormvariate(0, 1) for rank in range(p)}
        made = {}
        for rank, now in sorted(times.items(), key=lambda item: item[1]):
            if not book.late(version):
                book.push(rank, version, now)
            if ranks := book.ready(now):
                made[now] = ranks
        fastest = sorted(times, key=times.__getitem__)[:n]
        assert made == {sorted(times.values())[n - 1]: tuple(sorted(fastest))}, "once, and these"
        assert book.version == version + 1 and [book.counted(r, version) for r in range(p)] == [r in fastest for r in range(p)]
        start = max(times.values())
    assert sum(book.told()["accepted"]) == 30 * n


def test_a_push_that_is_late_repeated_or_early_never_counts() -> None:
    book = FirstOf(2).open(3, 7, leads=True)
    book.push(2, 7, 0.0)
    for rank, step in ((2, 7), (0, 8)):
        with pytest.raises(WireError, match=f"rank {rank} pushed step {step}"):
            book.push(rank, step, 0.0)
    assert book.ready(0.0) == () and book.waits(2) and book.missing() == [0, 1]
    book.push(0, 7, 0.0)
    assert book.ready(0.0) == (0, 2) and book.late(7) and not book.late(8) and not book.waits(2)
    assert book.ready(1e9) == (), "nobody has come: patience has not begun"


def test_all_slices_take_the_same_workers_in_whatever_order_pushes_come_to_them() -> None:
    p, n = 5, 3
    for seed in range(20):
        rng = random.Random(seed)
        leader, *others = (FirstOf(n).open(p, 0, leads=rank == 0) for rank in range(p))
        for version in range(10):
            for rank in rng.sample(range(p), p):
                if not leader.late(version):
                    leader.push(rank, version, 0.0)
                    leader.ready(0.0)
            told, ranks = leader.fixed
            assert told == version and len(set(ranks)) == n
            for book in others:
                made = []
                for event in rng.sample([*range(p), "accept"], p + 1):
                    if event == "accept":
                        book.fix(version, ranks)
                    elif not book.late(version):
                        book.push(event, version, 0.0)
                    made += [found for found in [book.ready(0.0)] if found]
                assert made == [ranks] and book.version == version + 1
        assert all(book.told() == leader.told() for book in others)


def test_what_no_leader_decides_is_refused() -> None:
    book = FirstOf(2).open(4, 3, leads=False)
    for version, ranks in ((4, [0, 1]), (3, [1, 0]), (3, [1, 1]), (3, []), (3, [0, 1, 2]), (3, [0, 4]), (3, ["0", 1]), (3, [True, 2])):
        with pytest.raises(WireError, match="cannot make version"):
            book.fix(version, ranks)
    book.fix(3, [1, 3])
    with pytest.raises(WireError):
        book.fix(3, [1, 3])


def test_fewer_than_n_go_on_when_patience_is_over_and_one_warning_says_so(caplog: Any) -> None:
    book = FirstOf(3, patience=2.0).open(4, 0, leads=True)
    for version, late in ((0, 3.0), (1, 2.0)):
        now = 10.0 * version
        assert book.wakes() == math.inf
        book.push(1, version, now)
        book.push(3, version, now + 1.9)
        assert book.ready(now + 1.9) == () and book.wakes() == now + 2.0
        assert book.ready(now + late) == (1, 3)
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1 and "2 of 3 workers came within 2.0 s (ranks [1, 3])" in told[0]


def test_a_worker_that_never_counts_is_named_once(caplog: Any) -> None:
    book = FirstOf(2).open(3, 100, leads=True)
    for version in range(100, 260):
        assert bool(caplog.records) == (version >= 150)
        for rank in (0, 1):
            book.push(rank, version, 0.0)
        book.ready(0.0)
    told = [record.getMessage() for record in caplog.records]
    assert told == ["rank 2 was accepted in 0 of the last 50 steps: its rows do not count"]


@pytest.mark.parametrize("staleness", [0, 1, 3, math.inf])
def test_nobody_is_further_ahead_than_staleness_in_what_it_does_and_in_what_it_sees(staleness: float) -> None:
    p, most = 4, 0
    for seed in range(30):
        rng, book = random.Random(seed), Bounded(staleness).open(p, 0, leads=False)
        step, pushed, likes = [0] * p, [False] * p, [rng.random() ** 3 for _ in range(p)]
        for _ in range(400):
            able = [r for r in range(p) if not pushed[r] or (not book.waits(r) and book.version >= step[r] + 1 - staleness)]
            assert able, "all wait for one another"
            (r,) = rng.choices(able, [likes[r] for r in able])
            if not pushed[r]:
                book.push(r, step[r], 0.0)
            else:
                step[r] += 1
                assert all(abs(done - step[r]) <= staleness for done in book.done), "of each worker's pushes in these weights"
                book.took(r, step[r])
            pushed[r] = not pushed[r]
            while book.ready(0.0):
                pass
            most = max(most, max(step) - min(step))
            assert most <= staleness + 1  # the slowest may have done its step, and only not taken the weights for the next one
    assert most > min(staleness, 10)


def test_clocks_know_who_cannot_be_where_it_says() -> None:
    book = Bounded(1).open(2, 5, leads=False)
    for step in (4, 6):
        with pytest.raises(WireError, match="has done 5"):
            book.push(0, step, 0.0)


def test_what_cannot_work_is_refused_with_numbers() -> None:
    made = lambda how, p, **more: Served(how).prepared(None, None, TorchOptimizer(PLAIN, **more), p)  # noqa: E731
    assert made(AllBut(1, 5.0), 4).rule == FirstOf(3, 5.0) and made(Bounded(math.inf), 1).rule.staleness == math.inf
    for refused, words in [
        (lambda: FirstOf(0), "n=0"), (lambda: FirstOf(1, 0.0), "patience=0"), (lambda: AllBut(-1), "-1"), (lambda: Bounded(-1), "-1"),
        (lambda: Bounded(math.nan), "nan"), (lambda: made(FirstOf(5), 4), "5 workers.*are 4"),
        (lambda: made(AllBut(4), 4), "backups=4 of 4"), (lambda: made(Bounded(1), 4, clip_norm=1.0), "clipNorm"),
        (lambda: made(Bounded(1), 4, scheduler=object, per="step"), "schedulerInterval='step'"),
    ]:  # fmt: skip
        with pytest.raises(RecipeError, match=words):
            refused()
    made(Bounded(1), 4, clip_value=1.0), made(AllBut(1), 4, scheduler=object, per="step")


# ---- fits ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Watched:
    """The gradient of a batch, after a pause; writes down with which weights it is computed."""

    pause: Callable[[int, int], float] = lambda rank, step: 0.0
    seen: list[tuple[int, int, Tensor]] = field(default_factory=list)
    moves: ClassVar[bool] = False

    def batches(self, epoch: int) -> int:
        return 1

    def __call__(self, replica: Replica, batches: Sequence[Batch], work: Work) -> tuple[Update, float]:
        self.seen.append((work.rank, work.step, replica.weights.clone()))
        time.sleep(self.pause(work.rank, work.step))
        return Gradient()(replica, batches, work)


def recipe(algorithm: Any, p: int, optimizer: Any = PLAIN, local: Any = None, **settings: Any) -> tuple[Recipe, Start]:
    made, start = nodes.recipe(settings.pop("module", None) or nodes.net(), p, optimizer, **{"deadline": 10.0, **settings})
    round_ = algorithm(made.round.advance)
    peer = round_.peer.prepared(made.blueprint, None, round_.advance, p)
    return replace(made, round=replace(round_, peer=peer, local=local or round_.local)), start


def balanced(p: int, n: int) -> list[Batch]:
    rng = np.random.default_rng(1)
    x = torch.from_numpy(rng.standard_normal((n, nodes.FEATURES)).astype("f4"))
    return [Batch((x[r::p],), (x[r::p, :2].argmax(1))) for r in range(p)]


def fit(made: Recipe, start: Start, given: list[Batch] | None = None, keep: Any = forget) -> list[Any]:
    """Every rank in a thread of its own, with memory, links and a store of its own; what each returned or raised."""
    p, places = made.num_workers, tuple((r,) for r in range(made.num_workers))
    hall, given, seen = Store(nodes.HOST, 0, True, made.deadline), given or nodes.shares(p), [None] * p

    def rank(r: int) -> None:
        size = block_size(made, 1)
        block = Block(private(size.nbytes), size, 0, made.deadline, watch=False)
        rail = leaders = reach = None
        if p > 1:
            store = Store(nodes.HOST, hall.port, False, made.deadline)
            rail, leaders = (Group(store, name, r, p, nodes.HOST) for name in ("rail", "leaders"))
            reach = (store, nodes.HOST)
        meeting = Meeting(Place(r, places), block, rail, leaders, None, reach)
        try:
            found = train(given[r], [s.rows for s in given], made, start, meeting, silent, keep)
            seen[r] = replace(found, weights=found.weights.clone())
            meeting.close()
        except BaseException as error:
            seen[r] = error
            meeting.fail()

    threads = [threading.Thread(target=rank, args=(r,), daemon=True) for r in range(p)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(25)
    hall.close()
    assert not any(thread.is_alive() for thread in threads), "a rank hangs"
    return seen


def same(seen: list[Any]) -> Outcome:
    """The outcome of all ranks, which end with the same bits."""
    found = nodes.outcomes(seen)
    assert all(torch.equal(x.weights, found[0].weights) for x in found)
    return found[0]


def steps(outcome: Outcome) -> list[dict[str, Any]]:
    return [line for line in outcome.history if "step" in line]


def played(made: Recipe, start: Start, given: list[Batch], outcome: Outcome) -> list[Tensor]:
    """The weights of each version, computed by one process from nothing but who was accepted."""
    weights, versions, p = start.weights.clone(), [start.weights], made.num_workers
    replica = Replica(made.blueprint, weights, torch.zeros_like(weights), start.constants, made.loss)
    advancer = made.round.advance.start(replica, (0, len(weights)))
    plan = quotas([share.rows for share in given], made.batch_size)
    assert [line["step"] for line in steps(outcome)] == list(range(made.epochs * len(plan)))
    for line in steps(outcome):
        epoch, at = divmod(line["step"], len(plan))
        updates = []
        for r in line.get("accepted", range(p)):
            first, rows = int(plan[:at, r].sum()), int(plan[at, r])
            batch = given[r].take(order(given[r].rows, made.seed, epoch, r)[first : first + rows])
            update, _ = Gradient()(replica, [batch], Work(0, epoch, []))
            updates.append(Update(update.vector.clone(), update.weight))
        advancer.step(Sum()(updates), 0.0)
        versions.append(weights.clone())
    return versions


@pytest.mark.parametrize("algorithm", [backup_workers(0), bounded_staleness(0), bounded_staleness(math.inf)], ids=["first", "0", "inf"])
def test_one_worker_is_a_plain_torch_loop_to_the_bit(algorithm: Any) -> None:
    made, start = recipe(algorithm, 1, batch_size=8, epochs=2)
    (share,) = given = balanced(1, 40)
    module = nodes.net()
    optimizer = PLAIN(module.parameters())
    for epoch in range(2):
        for rows in order(40, made.seed, epoch, 0).split(8):
            optimizer.zero_grad()
            made.loss(module(share.inputs[0][rows]), share.target[rows]).backward()
            optimizer.step()
    plain = torch.cat([p.detach().reshape(-1) for p in module.parameters()])
    found = same(fit(made, start, given))
    assert torch.equal(found.weights, plain) and not torch.equal(plain, start.weights)
    assert sum(line["bytes_sent"] for line in steps(found)) == 0
    reference = nodes.locally(*nodes.recipe(nodes.net(), 1, MOMENTUM))
    assert torch.equal(same(fit(*recipe(algorithm, 1, MOMENTUM))).weights, reference.weights)


@pytest.mark.parametrize("optimizer", [PLAIN, MOMENTUM, nodes.Norm], ids=["sgd", "momentum", "whole tensors"])
@pytest.mark.parametrize("p", [2, 4])
def test_without_backups_it_is_synchronous_sgd(p: int, optimizer: Any) -> None:
    """Also with shares of different lengths, one of them empty, and a last batch with a single row."""
    made, start = recipe(backup_workers(0), p, optimizer)
    reference = nodes.locally(*nodes.recipe(nodes.net(), p, optimizer))
    found = same(fit(made, start))
    torch.testing.assert_close(found.weights, reference.weights, rtol=0, atol=1e-6)
    assert [line["loss"] for line in found.history] == pytest.approx([line["loss"] for line in reference.history], abs=1e-5)
    assert not any("accepted" in line for line in steps(found))
    assert [x["accepted"] for x in found.history if "step" not in x] == [[5] * p] * 3


@pytest.mark.parametrize("p", [2, 4])
def test_staleness_of_nothing_is_synchronous_sgd(p: int) -> None:
    local = Watched(lambda rank, step: 0.004 * random.Random(5 * step + rank).random())
    made, start = recipe(bounded_staleness(0), p, local=local)
    reference = nodes.locally(*nodes.recipe(nodes.net(), p, PLAIN))
    torch.testing.assert_close(same(fit(made, start)).weights, reference.weights, rtol=0, atol=1e-5)


def test_more_shards_than_values_are_no_trouble() -> None:
    torch.manual_seed(0)
    made, start = recipe(backup_workers(0), 4, module=nn.Linear(nodes.FEATURES, nodes.CLASSES, bias=False))
    torch.manual_seed(0)
    reference = nodes.locally(*nodes.recipe(nn.Linear(nodes.FEATURES, nodes.CLASSES, bias=False), 4, PLAIN))
    torch.testing.assert_close(same(fit(made, start)).weights, reference.weights, rtol=0, atol=1e-6)


SLOW = 3  # this rank, where one is slow


def straggling(optimizer: Any = MOMENTUM, pause: float = 0.03, backups: int = 1, **more: Any) -> tuple[Any, ...]:
    """A fit of four workers, of whom one is much slower and the others a little, in turns."""
    local = Watched(lambda rank, step: pause if rank == SLOW else 0.003 * random.Random(7 * step + rank).random())
    made, start = recipe(backup_workers(backups), 4, optimizer, local=local, batch_size=16, **{"epochs": 3, **more})
    return made, start, balanced(4, 160), local


@pytest.mark.parametrize("optimizer", [PLAIN, MOMENTUM], ids=["sgd", "momentum"])
def test_weights_are_the_mean_over_exactly_those_who_were_accepted(optimizer: Any) -> None:
    made, start, given, local = straggling(optimizer)
    found = same(fit(made, start, given))
    versions = played(made, start, given, found)
    torch.testing.assert_close(found.weights, versions[-1], rtol=0, atol=1e-6)
    assert all(len(set(line["accepted"])) == 3 for line in steps(found))
    assert all(line["rows"] == 12 for line in steps(found)), "of 16; each worker has 4"
    late = [step for rank, step, _ in local.seen if rank == SLOW and SLOW not in steps(found)[step]["accepted"]]
    assert len(late) >= 3
    for rank, step, weights in local.seen:
        torch.testing.assert_close(weights, versions[step], rtol=0, atol=1e-6, msg=f"rank {rank} computed with no version {step}")
    for step in range(len(versions) - 1):
        assert len({x.numpy().tobytes() for _, at, x in local.seen if at == step}) == 1, "one version, whoever has it"
    told = [line["accepted"] for line in found.history if "steps" in line]
    for epoch, counts in enumerate(told):
        lines = [line["accepted"] for line in steps(found) if line["epoch"] == epoch]
        assert counts == [sum(r in ranks for ranks in lines) for r in range(4)] and sum(counts) == 30


def by_all_workers(patch: Any) -> None:
    patch.setattr(FirstOf, "scaled", lambda self, update, now, rank: Update(update.vector, update.weight * 4 / 3))


def late_ones_too(patch: Any) -> None:
    real, kept = Shard.push, {}

    def push(self: Shard, rank: int, step: int, update: Update) -> Any:
        if self.book.late(step):
            kept[self] = Update(update.vector.clone(), update.weight)
        elif self in kept:
            late = kept.pop(self)
            update = Update(update.vector + late.vector, update.weight + late.weight)
        return real(self, rank, step, update)

    patch.setattr(Shard, "push", push)


@pytest.mark.parametrize("wrong", [by_all_workers, late_ones_too])
def test_other_means_are_found_out(wrong: Callable[[Any], None], monkeypatch: Any) -> None:
    """Dividing by all p, or adding a late gradient to the next version: the comparison above must see it."""
    wrong(monkeypatch)
    made, start, given, _ = straggling(PLAIN)
    found = same(fit(made, start, given))
    assert (found.weights - played(made, start, given, found)[-1]).abs().max() > 1e-4


def test_a_slow_worker_is_left_out_and_holds_up_nobody() -> None:
    seconds = {}
    for backups in (0, 1):
        made, start, given, _ = straggling(PLAIN, 0.05, backups, epochs=1)
        began = time.perf_counter()
        found = same(fit(made, start, given))
        seconds[backups] = sum(line["seconds"] for line in steps(found)[:8])
        assert time.perf_counter() - began < 10
        often = sum(SLOW in line.get("accepted", [SLOW]) for line in steps(found))
        assert often == 10 if backups == 0 else often <= 3
    assert seconds[0] > 2 * seconds[1], seconds


@pytest.mark.parametrize("staleness", [1, 4, math.inf])
def test_bounded_workers_run_ahead_as_far_as_they_may_and_end_alike(staleness: float) -> None:
    lead, at, guard = [0], dict.fromkeys(range(3), 0), threading.Lock()

    def pause(rank: int, step: int) -> float:
        with guard:
            at[rank] = step
            lead[0] = max(lead[0], step - min(at.values()))
        return 0.02 if rank == 2 else 0.0

    made, start = recipe(bounded_staleness(staleness), 3, local=Watched(pause), batch_size=6, epochs=2)
    found = same(fit(made, start, balanced(3, 60)))
    assert len(steps(found)) == 20 and all(line["rows"] == 6 for line in steps(found))
    assert (1 if staleness == 1 else 3) <= lead[0] <= staleness + 1
    assert found.history[-1]["loss"] < found.history[10]["loss"] and found.history[10].keys() >= {"epoch", "steps"}


@pytest.mark.parametrize("algorithm", [backup_workers(0), backup_workers(1), bounded_staleness(0), bounded_staleness(2)])
def test_what_was_saved_in_the_middle_of_an_epoch_is_gone_on_with(algorithm: Any) -> None:
    whole, start = recipe(algorithm, 3, MOMENTUM, saving=Saving(4, "step"), epochs=2)
    keeper, kept = Keeper(whole), []

    class Keep:
        wish = False

        def __call__(self, part: Any) -> None:
            if part.now.step == 8:  # of 10; five in an epoch
                time.sleep(0.02 * part.rank)  # the others are in the next step by then
                keeper(parse(torch.frombuffer(bytearray(b"".join(dump(part)[1])), dtype=torch.uint8)))
                kept.append(part.rank)

    undisturbed = same(fit(whole, start, keep=Keep()))
    found, _ = keeper.last()
    assert sorted(kept) == [0, 1, 2] and found.now.step == 8
    again = same(fit(whole, found))
    assert [line["step"] for line in steps(again)] == [8, 9]
    if whole.round.peer.rule == FirstOf(3, 30.0):
        assert torch.equal(again.weights, undisturbed.weights)
        assert again.history[-1]["accepted"] == [5, 5, 5]


def soon(true: Callable[[], bool], seconds: float = 5.0) -> bool:
    until = time.monotonic() + seconds
    while not true() and time.monotonic() < until:
        time.sleep(0.01)
    return true()


# ---- one rank is gone ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", [backup_workers(0), backup_workers(2), bounded_staleness(1), bounded_staleness(math.inf)])
@pytest.mark.parametrize("culprit", [0, 2])
def test_a_worker_that_fails_ends_the_others_and_their_threads(algorithm: Any, culprit: int) -> None:
    def pause(rank: int, step: int) -> float:
        if (rank, step) == (culprit, 2):
            raise KeyError("the user's own")
        return 0.002

    made, start = recipe(algorithm, 4, local=Watched(pause), batch_size=16)
    began = time.perf_counter()
    seen = fit(made, start, balanced(4, 160))
    assert isinstance(seen[culprit], KeyError) and time.perf_counter() - began < 8
    assert all(isinstance(x, PeerLost) for r, x in enumerate(seen) if r != culprit), seen
    assert soon(lambda: not [thread for thread in threading.enumerate() if "shard" in thread.name])


class Broken(SGD):
    elementwise = True

    def step(self, closure: Any = None) -> None:
        raise KeyError("in the optimizer")


def test_an_optimizer_that_fails_is_the_users_error_on_the_ranks_that_meet_it() -> None:
    made, start = recipe(backup_workers(1), 3, partial(Broken, lr=0.1))
    seen = fit(made, start)
    assert any(isinstance(x, UserError) and "in the optimizer" in str(x) for x in seen)
    assert all(isinstance(x, UserError | PeerLost) for x in seen), seen


# ---- one shard, and who talks to it ---------------------------------------------------------------------------------------


class Ranks:
    """Peers that are moved by hand."""

    def __init__(self, rule: Any, p: int, deadline: float = 5.0) -> None:
        made, start = recipe(lambda advance: replace(backup_workers(0)(advance), peer=Served(rule)), p)
        hall, self.p, self.n = Store(nodes.HOST, 0, True, deadline), p, len(start.weights)

        def make(rank: int) -> Any:
            store = Store(nodes.HOST, hall.port, False, deadline)
            replica = Replica(made.blueprint, start.weights.clone(), torch.zeros(self.n), start.constants, made.loss)
            comm = SimpleNamespace(rank=rank, size=p)
            here = Here(made.blueprint, replica, made.round.advance, comm, False, (store, nodes.HOST), False, 0, deadline)
            return made.round.peer.start(here)

        self.peers = self.all(make)

    def all(self, call: Callable[[int], Any], ranks: Sequence[int] | None = None) -> list[Any]:
        """call(rank), side by side."""
        ranks, found = range(self.p) if ranks is None else ranks, {}
        threads = [threading.Thread(target=lambda r=r: found.update({r: call(r)}), daemon=True) for r in ranks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        return [found[r] for r in ranks]

    def step(self, rank: int, step: int) -> int:
        now = Moment(step, [1] * self.p, 0)
        self.peers[rank].begin(now)
        return self.peers[rank].step(Update(torch.full((self.n,), 1.0 + rank), 1.0), now)

    def weights(self, rank: int) -> Tensor:
        return self.peers[rank].weights

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *given: Any) -> None:
        self.all(lambda rank: self.peers[rank].close())


def test_a_late_worker_goes_on_with_the_newest_weights_and_its_push_is_dropped() -> None:
    with Ranks(FirstOf(2, 5.0), 3) as ranks:
        ranks.peers[2].begin(Moment(0, [1] * 3, 0))  # it computes
        before = ranks.weights(0).clone()
        for step in range(3):
            assert ranks.all(lambda rank, step=step: ranks.step(rank, step), [0, 1]) == [step + 1] * 2
            assert all(ranks.peers[r].used for r in (0, 1))
        torch.testing.assert_close(ranks.weights(0), before - 3 * 0.1 * 1.5)
        assert torch.equal(ranks.weights(2), before)
        assert ranks.step(2, 0) == 3 and not ranks.peers[2].used
        assert all(torch.equal(ranks.weights(r), ranks.weights(0)) for r in range(3)) and not torch.equal(ranks.weights(2), before)
        assert [ranks.peers[r].settle() for r in range(3)] == [{"accepted": [3, 3, 0]}] * 3


def test_what_was_taken_is_never_changed() -> None:
    with Ranks(FirstOf(1), 1) as ranks:
        ranks.step(0, 0)
        version, x = ranks.peers[0].shard.take(0, 1)
        before = x.clone()
        assert version == 1 and ranks.step(0, 1) == 2
        assert torch.equal(x, before) and not torch.equal(x, ranks.weights(0))


def test_answers_of_several_versions_are_asked_for_again_until_all_are_of_one() -> None:
    with Ranks(FirstOf(2, 5.0), 3) as ranks:
        late = ranks.peers[2]
        late.begin(Moment(0, [1] * 3, 0))
        ranks.all(lambda rank: ranks.step(rank, 0), [0, 1])
        real = late.shard.push

        def push(rank: int, step: int, update: Update) -> Any:
            if rank == 2:
                assert soon(lambda: all(ranks.peers[r]._sent[2] for r in (0, 1)))
                ranks.all(lambda rank: ranks.step(rank, 1), [0, 1])  # two shards have answered with version 1; its own is further
            return real(rank, step, update)

        late.shard.push = push
        assert ranks.step(2, 0) == 2 and torch.equal(ranks.weights(2), ranks.weights(0))


def test_where_patience_ends_those_that_came_go_on() -> None:
    with Ranks(FirstOf(3, 0.1), 3) as ranks:
        ranks.peers[1].begin(Moment(0, [1] * 3, 0))
        began = time.perf_counter()
        assert ranks.all(lambda rank: ranks.step(rank, 0), [0, 2]) == [1, 1] and 0.1 <= time.perf_counter() - began < 2
        assert ranks.step(1, 0) == 1 and not ranks.peers[1].used


def test_a_worker_that_says_nothing_is_named_after_the_deadline() -> None:
    def step(rank: int) -> Any:
        with pytest.raises(MeetingTimeout) as caught:
            ranks.step(rank, 0)
        return str(caught.value)

    with Ranks(Bounded(0), 3, deadline=1.0) as ranks:
        ranks.peers[2].begin(Moment(0, [1] * 3, 0))  # it computes, and computes
        began = time.perf_counter()
        assert all("waited 1 s for rank(s) [2] in step 0" in told for told in ranks.all(step, [0, 1]))
        assert time.perf_counter() - began < 4


def test_a_shard_lets_nothing_in_between_a_report_and_its_own_next_step() -> None:
    with Ranks(Bounded(math.inf), 2) as ranks:
        ranks.all(lambda rank: ranks.step(rank, 0))
        ranks.all(lambda rank: ranks.peers[rank].settle())
        kept = ranks.peers[0].shard._slice.clone()
        thread = threading.Thread(target=ranks.step, args=(1, 1), daemon=True)
        thread.start()
        thread.join(0.05)
        assert thread.is_alive() and torch.equal(ranks.peers[0].shard._slice, kept), "which may be read for a checkpoint"
        ranks.peers[0].begin(Moment(1, [1] * 2, 0))
        thread.join(5)
        assert not thread.is_alive() and not torch.equal(ranks.peers[0].shard._slice, kept)


@pytest.mark.parametrize(("rule", "waste"), [(FirstOf(3, 5.0), 0), (Bounded(0), 0), (Bounded(math.inf), 1)])
def test_a_step_sends_what_is_written(rule: Any, waste: int) -> None:
    with Ranks(rule, 3) as ranks:
        for step in range(2):
            ranks.all(lambda rank, step=step: ranks.step(rank, step))
        ranks.all(lambda rank: ranks.peers[rank].settle())
        nbytes = 2 * (3 - 1) * 4 * ranks.n
        assert sum(peer.bytes_sent for peer in ranks.peers) == 2 * nbytes + waste * nbytes // 2, "a report takes the weights once more"


@pytest.mark.parametrize("said", [
    ["push", 0], ["push", "0", 1.0], ["push", -1, 1.0], ["push", True, 1.0], ["push", 0, math.nan], ["push", 0, "1"], ["push", 9, 1.0],
    ["pull", 0.5], ["take", 0], [], 7, None, {"push": 0}, ["accept", 0, [0]],
])  # fmt: skip
def test_what_is_no_question_ends_the_visit_with_an_answer(said: Any) -> None:
    with Ranks(FirstOf(2, 5.0), 2) as ranks:
        ranks.peers[0].begin(Moment(0, [1] * 2, 0))
        link = ranks.peers[1]._links[0]
        link.tell(said, 5.0)
        if said == ["push", 9, 1.0]:  # well-formed, but nobody can be there
            link.send(TENSOR, 1, memoryview(bytes(4 * (ranks.peers[0].cut[1] - ranks.peers[0].cut[0]))))
            exchange([link], 5.0)
        told, error = link.hear(5.0)
        assert told == "failed" and error["kind"] == "WireError" and "rank 1" in error["message"]
        with pytest.raises(BigDLError):
            ranks.step(0, 0)


def test_a_slice_of_another_length_is_not_taken() -> None:
    with Ranks(FirstOf(2, 5.0), 2) as ranks:
        link = ranks.peers[1]._links[0]
        link.tell(["push", 0, 1.0], 5.0)
        link.send(TENSOR, 1, memoryview(bytes(1 << 16)))
        with pytest.raises(BigDLError):
            exchange([link], 5.0)
            link.hear(5.0)
        assert soon(lambda: "65536 bytes came" in str(ranks.peers[0].shard.failed))
