"""Deadline SGD: with enough time it is synchronous SGD; who is late loses rows, and the others lose nothing.

The clock of most tests goes on only where a worker is said to be slow, so that what is done in time is known to the row.

    p  workers      k  parts of a batch
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam

from bigdl_lite.algorithms import Gradient, Local, Sum, TorchOptimizer, Update, Work, deadline, method
from bigdl_lite.algorithms.deadline import Within, within
from bigdl_lite.algorithms.localsgd import LocalSteps
from bigdl_lite.batch import Batch, order, quotas
from bigdl_lite.engine.recipe import Outcome, Recipe, Start
from bigdl_lite.errors import RecipeError
from bigdl_lite.model.batchnorm import synchronised
from bigdl_lite.model.layout import blueprint
from bigdl_lite.model.replica import Replica
from tests.engine import test_meeting as nodes
from tests.engine.test_apart import steps

pytestmark = pytest.mark.timeout(60)

PLAIN = partial(SGD, lr=0.1)


@dataclass
class Clock:
    """Stands still until somebody waits."""

    now: float = 100.0

    def wait(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(deadline, "time", SimpleNamespace(monotonic=lambda: made.now))
    return made


@dataclass(frozen=True)
class Slow:
    """A gradient that takes some seconds more on one rank; seeds and rows: what it was called with there."""

    wait: Callable[[float], None]
    seconds: float
    rank: int = 1
    seeds: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    moves: ClassVar[bool] = False

    def batches(self, epoch: int) -> int:
        return 1

    def __call__(self, replica: Replica, batches: Sequence[Batch], work: Work) -> tuple[Update, float]:
        if work.rank == self.rank:
            self.wait(self.seconds)
            self.seeds.append(work.seed)
            self.rows.append(batches[0].rows)
        return Gradient()(replica, batches, work)


def recipe(p: int, local: Local, optimizer: Any = PLAIN, **settings: Any) -> tuple[Recipe, Start]:
    made, start = nodes.recipe(settings.pop("module", None) or nodes.net(), p, optimizer, **settings)
    return replace(made, round=replace(made.round, local=local)), start


def synchronous(p: int, optimizer: Any = PLAIN, **settings: Any) -> Outcome:
    return nodes.locally(*nodes.recipe(nodes.net(), p, optimizer, **settings))


def close(a: Tensor, b: Tensor, atol: float = 1e-6) -> bool:
    return torch.allclose(a, b, rtol=0, atol=atol)


# ---- with enough time ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [partial(SGD, lr=0.1, momentum=0.9), partial(Adam, lr=0.01)], ids=["sgd", "adam"])
@pytest.mark.parametrize("p", [1, 3, 4])
@pytest.mark.parametrize("parts", [1, 3, 4, 100])
def test_enough_time_makes_it_synchronous_sgd(clock: Clock, p: int, parts: int, optimizer: Any) -> None:
    """Batches of 10 rows over shares of different lengths, one of them empty: no number of parts divides all of them."""
    found = nodes.locally(*recipe(p, Within(1.0, parts), optimizer))
    assert close(found.weights, synchronous(p, optimizer).weights)
    assert all(line["weight"] == line["rows"] for line in steps(found))


def test_one_part_is_the_batch_to_the_bit(clock: Clock) -> None:
    assert torch.equal(nodes.locally(*recipe(3, Within(1.0, 1))).weights, synchronous(3).weights)


@pytest.mark.parametrize("rule", [
    nn.CrossEntropyLoss(torch.tensor([1.0, 5.0, 0.2])), nn.CrossEntropyLoss(ignore_index=2),
], ids=["weights", "ignored"])  # fmt: skip
def test_a_loss_that_weighs_rows_may_be_cut_in_parts(clock: Clock, rule: Any) -> None:
    """Also where all rows of a part are ignored."""
    found = nodes.locally(*recipe(3, Within(1.0, 4), loss=rule))
    assert close(found.weights, synchronous(3, loss=rule).weights)
    assert not close(found.weights, synchronous(3).weights, 1e-3)


def test_the_history_is_that_of_synchronous_sgd(clock: Clock) -> None:
    found, reference = nodes.locally(*recipe(3, Within(1.0))), synchronous(3)
    for mine, other in zip(steps(found), steps(reference), strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], abs=1e-6)
        assert all(mine[key] == other[key] for key in ("rows", "weight", "bytes_sent"))


def test_the_name_in_the_catalogue_is_synchronous_sgd_with_enough_time(clock: Clock) -> None:
    made, start = nodes.recipe(nodes.net(), 3, PLAIN)
    named = method("deadline-sgd", made.round.advance)
    assert named.local == Within(0.1, 4) and named.combine == Sum() and named.exchange is named.peer is None
    assert named == within(0.1)(TorchOptimizer(PLAIN))
    assert close(nodes.locally(replace(made, round=named), start).weights, synchronous(3).weights)


# ---- with too little ----------------------------------------------------------------------------------------------------------


def counted(p: int, step: int, rank: int, parts: int, done: int, batch_size: int = 10) -> Batch:
    """The rows of a rank in a step of the first epoch that fall into its first `done` parts."""
    shares = nodes.shares(p)
    plan = quotas([share.rows for share in shares], batch_size)
    first, rows = int(plan[:step, rank].sum()), int(plan[step, rank])
    deal = order(shares[rank].rows, 0, 0, rank)[first : first + rows]
    return shares[rank].take(deal[: done * math.ceil(rows / parts)])


@pytest.mark.parametrize(("wait", "done"), [(1.0, 4), (3.0, 3), (3.5, 2), (7.0, 1), (100.0, 1)])
def test_a_slow_worker_loses_rows_and_the_update_is_the_mean_of_the_others(clock: Clock, wait: float, done: int) -> None:
    """7 s for 4 parts, and a worker that takes `wait` seconds for each: a part that began in time counts, and the first always does.

    Two workers have 5 and 36 rows of 41, of which the second is slow.
    """
    slow = Slow(clock.wait, wait)
    made, start = recipe(2, Within(7.0, 4, slow), epochs=1)
    found = nodes.locally(made, start)
    weights, gradient = start.weights.clone(), torch.zeros_like(start.weights)
    module = made.blueprint.build(weights, start.constants, gradient)
    for line in steps(found):
        parts = [counted(2, line["step"], 0, 1, 1), counted(2, line["step"], 1, 4, done)]
        x, y = torch.cat([b.inputs[0] for b in parts]), torch.cat([b.target for b in parts])
        rows = sum(counted(2, line["step"], rank, 1, 1).rows for rank in range(2))
        assert (line["weight"], line["rows"]) == (len(x), rows)
        assert (len(x) < rows) == (done < 4 and counted(2, line["step"], 1, 1, 1).rows > parts[1].rows)
        gradient.zero_()
        loss = nn.functional.cross_entropy(module(x), y)
        loss.backward()
        assert line["loss"] == pytest.approx(loss.item(), abs=1e-6)
        weights.sub_(gradient, alpha=0.1)
    assert close(found.weights, weights)
    assert close(found.weights, synchronous(2, epochs=1).weights) == (done == 4), "rows were lost only where there was no time"


def test_the_deadline_is_that_of_a_step_and_not_of_the_fit(clock: Clock) -> None:
    slow = Slow(clock.wait, 3.5)
    lines = steps(nodes.locally(*recipe(2, Within(7.0, 4, slow), epochs=4)))
    assert [line["rows"] - line["weight"] for line in lines] == [3, 3, 3, 4, 0] * 4  # rows 9, 9, 9, 8 and 1: two parts count


def test_time_that_really_passes_is_measured() -> None:
    """A worker that sleeps longer than a step may take does one part; the other has all of 200 ms."""
    slow = Slow(time.sleep, 0.21)
    lines = steps(nodes.locally(*recipe(2, Within(0.2, 4, slow), epochs=1, batch_size=21)))
    assert [line["rows"] for line in lines] == [21, 20]
    assert slow.rows == [5, 5]  # of 18 and of 18
    assert [line["rows"] - line["weight"] for line in lines] == [13, 13]


def test_rows_that_were_dropped_come_again_in_other_epochs(clock: Clock) -> None:
    """Each epoch deals anew, so that no row of a slow worker is lost for good."""
    seen: list[Tensor] = []

    @dataclass(frozen=True)
    class Seeing(Slow):
        def __call__(self, replica: Replica, batches: Sequence[Batch], work: Work) -> tuple[Update, float]:
            if work.rank == self.rank:
                seen.append(batches[0].inputs[0])
            return super().__call__(replica, batches, work)

    nodes.locally(*recipe(2, Within(1.0, 4, Seeing(clock.wait, 1.0)), epochs=30))
    rows = torch.cat(seen)
    assert len(rows) < 0.4 * 30 * 36 and len(torch.unique(rows, dim=0)) == 36


# ---- one call -----------------------------------------------------------------------------------------------------------------


def alone(module: nn.Module) -> Replica:
    made, weights, _, constants = blueprint(module)
    return Replica(made, weights, torch.full_like(weights, math.nan), constants, nn.CrossEntropyLoss())


def rows(n: int) -> Batch:
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, nodes.FEATURES, generator=generator)
    return Batch((x,), torch.arange(n) % nodes.CLASSES)


@pytest.mark.parametrize("parts", [1, 4])
def test_no_rows_are_an_update_of_no_weight(clock: Clock, parts: int) -> None:
    replica = alone(nodes.net())
    update, loss = Within(1.0, parts)(replica, [rows(0)], Work(0, 0, [0.1]))
    assert update.weight == 0 and loss == 0 and update.vector is replica.gradient and not update.vector.any()


def test_the_first_part_is_done_even_when_the_time_was_up_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count(0.0, 10.0)  # every look at the clock takes ten seconds
    monkeypatch.setattr(deadline, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
    update, _ = Within(1.0, 4)(alone(nodes.net()), [rows(8)], Work(0, 0, [0.1]))
    assert update.weight == 2


@pytest.mark.parametrize(("n", "parts", "expected"), [
    (8, 4, [2, 2, 2, 2]), (9, 4, [3, 3, 3]), (10, 4, [3, 3, 3, 1]), (3, 4, [1, 1, 1]), (1, 4, [1]), (0, 4, [0]),
    (7, 1, [7]), (7, 3, [3, 3, 1]),
])  # fmt: skip
def test_parts_are_even_and_hold_every_row_once(clock: Clock, n: int, parts: int, expected: list[int]) -> None:
    slow, replica = Slow(clock.wait, 0.0), alone(nodes.net())
    update, loss = Within(1.0, parts, slow)(replica, [rows(n)], Work(0, 0, [0.1], rank=1))
    assert slow.rows == expected and update.weight == n
    vector = update.vector.clone()
    other, its_loss = Gradient()(replica, [rows(n)], Work(0, 0, [0.1]))
    assert close(vector, other.vector, 1e-5) and loss == pytest.approx(its_loss, rel=1e-5)


def test_every_part_draws_other_numbers_and_a_repeated_task_the_same(clock: Clock) -> None:
    """Two parts with the same rows give the same gradient without dropout, and others with it."""
    once = rows(4)
    twice = Batch((once.inputs[0].repeat(2, 1),), once.target.repeat(2))
    for module, alike in ((nodes.net(), True), (nodes.net(nn.Dropout(0.5)), False)):
        replica, slow = alone(module), Slow(clock.wait, 2.0)
        work = Work(7, 0, [0.1], rank=1)
        first = Within(1.0, 2, slow)(replica, [twice], work)[0].vector.clone()  # no time for the second part
        both = Within(3.0, 2, slow)(replica, [twice], work)[0].vector.clone()
        assert close(both - first, first) == alike
        assert torch.equal(Within(3.0, 2, slow)(replica, [twice], work)[0].vector, both)
        assert slow.seeds == [slow.seeds[0], *slow.seeds[:1], slow.seeds[2], *slow.seeds[1:3]] and len({*slow.seeds}) == 2


# ---- settings -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seconds", "parts"), [(0.0, 4), (-1.0, 4), (math.nan, 4), (1.0, 0)])
def test_settings_that_cannot_be_are_refused(seconds: float, parts: int) -> None:
    for make in (Within, within):
        with pytest.raises(RecipeError, match=f"seconds={seconds}, parts={parts}.*: above 0, and at least 1"):
            make(seconds, parts)


def test_a_local_that_makes_steps_is_refused() -> None:
    with pytest.raises(RecipeError, match="LocalSteps makes steps"):
        Within(1.0, local=LocalSteps(TorchOptimizer(PLAIN), 8))
    assert not Within(1.0).moves and Within(1.0).batches(3) == 1


def test_layers_that_meet_in_forward_are_refused() -> None:
    """One worker may have fewer parts than another, and what they sum in forward is then of different parts, or of nothing."""
    with pytest.raises(RecipeError, match="syncBatchNorm"):
        recipe(2, Within(1.0), module=synchronised(nodes.net(nn.BatchNorm1d(60))))
