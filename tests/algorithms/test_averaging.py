"""Asynchronous averages: nobody waits in a step, nothing that a worker did is lost, and at a report all have the same bits.

Ranks are threads with real links between them (tests/engine/test_apart.py).

    n  length of the flat weights      p  workers
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam

from bigdl_lite.algorithms import Gradient, Round, TorchOptimizer, Update, Work, method
from bigdl_lite.algorithms.averaging import Averaging, _Averaging, async_average
from bigdl_lite.algorithms.peer import Here, Moment
from bigdl_lite.batch import Batch
from bigdl_lite.comm.room import Room
from bigdl_lite.engine.keeper import Keeper
from bigdl_lite.engine.meeting import Meeting
from bigdl_lite.engine.recipe import Outcome, Saving
from bigdl_lite.errors import DivergedError, PeerLost, RecipeError
from bigdl_lite.model.layout import blueprint
from bigdl_lite.model.replica import Replica
from tests.algorithms.world import same_bits, together
from tests.engine import test_meeting as nodes
from tests.engine.test_apart import apart, epochs, recipe, steps

pytestmark = pytest.mark.timeout(60)

PLAIN = partial(SGD, lr=0.1)
MOMENTUM = partial(SGD, lr=0.05, momentum=0.9)


@dataclass(frozen=True)
class Paced:
    """A gradient that takes each rank its own seconds. began: when each rank began each of its steps; at: its weights then."""

    seconds: Callable[[int], float] = lambda rank: 0.0
    dies: tuple[int, int] = (-1, -1)  # rank and step
    began: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))
    at: dict[int, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    moves: ClassVar[bool] = False

    def batches(self, epoch: int) -> int:
        return 1

    def __call__(self, replica: Replica, batches: Sequence[Batch], work: Work) -> tuple[Update, float]:
        self.began[work.rank].append(time.perf_counter())
        self.at[work.rank].append(replica.weights.clone())
        if (work.rank, work.step) == self.dies:
            raise OSError("the machine is gone")
        time.sleep(self.seconds(work.rank))
        return Gradient()(replica, batches, work)


def paced(local: Paced, interval: float = 0.0, warmup: int = 0) -> Callable[[Any], Round]:
    return lambda advance: replace(async_average(interval, warmup)(advance), local=local)


def trained(algorithm: Any, p: int, optimizer: Any = PLAIN, watch: Any = None, **settings: Any) -> list[Outcome]:
    return nodes.outcomes(apart(*recipe(algorithm, p, optimizer, **settings), watch=watch))


def more_rows(monkeypatch: pytest.MonkeyPatch, n: int) -> tuple[Tensor, Tensor]:
    """Makes all shares even, of n rows together; returns these."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, nodes.FEATURES, generator=generator)
    y = (x @ torch.randn(nodes.FEATURES, nodes.CLASSES, generator=generator)).argmax(1)
    monkeypatch.setattr(nodes, "shares", lambda p: [Batch((a,), b) for a, b in zip(x.chunk(p), y.chunk(p), strict=True)])
    return x, y


def close(a: Tensor, b: Tensor, atol: float = 1e-6) -> bool:
    return torch.allclose(a, b, rtol=0, atol=atol)


# ---- one result ---------------------------------------------------------------------------------------------------------


def test_one_worker_is_plain_sgd_to_the_bit() -> None:
    """Batches of 8 rows, and of one: powers of two, whose inverse is exact."""
    settings = {"batch_size": 8, "epochs": 5}
    plain = nodes.locally(*nodes.recipe(nodes.net(), 1, MOMENTUM, **settings))
    (found,) = trained(async_average(interval=0.0), 1, MOMENTUM, **settings)
    assert same_bits(found.weights, plain.weights)
    assert [x["loss"] for x in steps(found)] == [x["loss"] for x in steps(plain)]


@pytest.mark.parametrize("optimizer", [MOMENTUM, partial(Adam, lr=0.01)], ids=["momentum", "adam"])
@pytest.mark.parametrize("p", [2, 3, 4])
def test_a_warm_up_of_all_steps_is_synchronous_sgd(p: int, optimizer: Any) -> None:
    """Shares are of different lengths, so that each worker's gradient must count for its rows; one share is empty."""
    synchronous = nodes.locally(*nodes.recipe(nodes.net(), p, optimizer)).weights
    found = trained(async_average(warmup=15), p, optimizer)
    assert all(close(x.weights, synchronous) for x in found)
    free = trained(async_average(interval=0.0), p, optimizer)
    assert not close(free[0].weights, synchronous, 1e-3), "the comparison can fail"


@pytest.mark.parametrize("interval", [0.0, 10.0], ids=["all the time", "at reports"])
@pytest.mark.parametrize("p", [2, 3, 4])
def test_all_ranks_have_the_same_bits_at_a_report_and_not_before(p: int, interval: float) -> None:
    """The last report is the end of the fit, and each epoch begins with the one before."""
    local, last = Paced(), {}
    found = trained(paced(local, interval), p, watch=lambda rank, meeting: last.setdefault(rank, meeting.block.weights))
    assert all(same_bits(last[0], last[rank]) for rank in range(1, p))
    for first in (0, 5, 10):
        assert all(same_bits(local.at[0][first], local.at[rank][first]) for rank in range(1, p))
        assert not close(local.at[0][first + 1], local.at[1][first + 1]), "each has made a step of its own"
    assert all(close(x.weights, last[0]) for x in found)
    assert all(line["consensus"] < 1e-6 for line in epochs(found[0]))  # 9e-8: the mean of equal values is rounded


def test_workers_of_equal_speed_train_as_well_as_synchronously(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = more_rows(monkeypatch, 900)
    settings = {"batch_size": 30, "epochs": 5}
    synchronous = nodes.locally(*nodes.recipe(nodes.net(), 3, PLAIN, **settings))
    found = trained(paced(Paced(lambda rank: 1e-3)), 3, **settings)[0]
    losses = [line["loss"] for line in epochs(found)]
    assert losses == sorted(losses, reverse=True)
    assert abs(losses[-1] / epochs(synchronous)[-1]["loss"] - 1) <= 0.03  # 0.196 and 0.195, from 0.63 in the first epoch
    made = blueprint(nodes.net())[0]
    right = [float((made.build(fit.weights, {})(x).argmax(1) == y).float().mean()) for fit in (found, synchronous)]
    assert right[0] >= 0.9 and abs(right[0] - right[1]) <= 0.02  # 0.977 and 0.978
    assert [line["step"] for line in steps(found)] == list(range(150)) and sum(line["rows"] for line in steps(found)) == 5 * 900


# ---- who waits for whom -------------------------------------------------------------------------------------------------------


def seconds_of_a_step(slow: bool, unit: float = 0.005, warmup: int = 0) -> float:
    """The mean of the two faster of three ranks, between reports: a mean, since a median does not see who waits now and then."""
    local = Paced(lambda rank: unit * (5 if slow and rank == 2 else 1))
    trained(paced(local, 0.0, warmup), 3, batch_size=12, epochs=1)
    began = [local.began[rank] for rank in (0, 1)]
    return max((each[-1] - each[5]) / (len(each) - 6) for each in began)


@pytest.mark.slow
def test_a_slow_worker_holds_up_nobody_in_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Card 2 (e) 6: one rank sleeps 5 times as long. Once more where others took the cores away."""
    more_rows(monkeypatch, 720)
    for tries in range(2):
        alone, beside = seconds_of_a_step(slow=False), seconds_of_a_step(slow=True)
        if alone / beside >= 0.8:  # 0.91 to 1.00
            break
        assert not tries, f"{alone / beside:.2f}"
    waiting = seconds_of_a_step(slow=True, warmup=60)
    assert alone / waiting < 0.4, "the same ranks in synchronous steps do wait"  # 0.22


def test_a_round_waits_for_the_slowest_worker_and_a_step_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow worker takes part in a round with each of its steps, while another makes several."""
    more_rows(monkeypatch, 120)
    rounds: list[float] = []
    local = Paced(lambda rank: 0.02 if rank == 1 else 0.002)

    def watch(rank: int, meeting: Meeting) -> None:
        if rank == 1:
            counted(meeting, rounds)

    trained(paced(local), 2, watch=watch, batch_size=6, epochs=1)
    during = [x for x in rounds if x < local.began[0][-1]]
    assert 1 <= len(during) < 10, "of 20 steps of the fast worker"
    assert 10 <= len(rounds) <= 25, "about one a step of the slow one"


def counted(meeting: Meeting, rounds: list[float]) -> None:
    """Notes when this rank begins a sum over all ranks."""
    before = meeting.rail.all_reduce

    def noted(*given: Any) -> Tensor:
        rounds.append(time.perf_counter())
        return before(*given)

    meeting.rail.all_reduce = noted


def test_the_averages_of_a_report_are_told() -> None:
    assert all(line["averages"] >= 1 for line in epochs(trained(async_average(), 3)[0]))


def test_the_averages_of_an_epoch_are_told() -> None:
    rounds: list[float] = []
    found = trained(paced(Paced(lambda rank: 0.005)), 2, watch=lambda rank, meeting: rank or counted(meeting, rounds))
    assert sum(line["averages"] for line in epochs(found[0])) == len(rounds)


def test_an_interval_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """40 steps of 5 ms and more, and at least 80 ms between two averages."""
    more_rows(monkeypatch, 240)
    rounds: list[float] = []
    local = Paced(lambda rank: 0.005)
    trained(paced(local, 0.08), 2, watch=lambda rank, meeting: rank or counted(meeting, rounds), batch_size=6, epochs=1)
    inside = [x for x in rounds if x < local.began[0][-1]]
    assert len(inside) >= 2 and all(b - a >= 0.08 for a, b in pairwise(inside))


@pytest.mark.parametrize("p", [1, 2, 3, 5])
def test_a_round_costs_what_is_written(p: int) -> None:
    """8 (p - 1) / p bytes a value of each worker, and so for one value more: whether it has come to the report."""
    made, weights, _, constants = blueprint(nodes.net())

    def rank(room: Room) -> int:
        replica = Replica(made, weights.clone(), torch.zeros_like(weights), constants, nn.CrossEntropyLoss())
        peering = Averaging().start(Here(made, replica, TorchOptimizer(PLAIN), room, False, None, False, 0, 60.0))
        assert peering.settle() == {"averages": 1}, "all come at once"
        return peering.bytes_sent

    assert sum(together(p, rank)) == 8 * (p - 1) * (len(weights) + 1)


# ---- the delta form --------------------------------------------------------------------------------------------------------------


class Other:
    """A comm to one other worker, whose snapshot is known and whose answer comes when it is let go."""

    rank, size, bytes_sent = 0, 2, 0

    def __init__(self, other: float) -> None:
        self.other, self.let_go = other, threading.Event()

    def all_reduce(self, told: Tensor) -> Tensor:
        assert self.let_go.wait(10)
        return told + torch.tensor([self.other / 2, 0.0])


def test_what_was_done_during_a_round_is_kept() -> None:
    """x = 10 when the round begins, and the other has 20, so that the mean is 15. Two steps of -1 meanwhile: 15 - 2.

    Taking the mean in place of x would lose both of them.
    """
    made, weights, _, constants = blueprint(nn.Linear(1, 1, bias=False))
    replica = Replica(made, weights, torch.zeros(1), constants, nn.MSELoss())
    other = Other(20.0)
    here = Here(made, replica, TorchOptimizer(partial(SGD, lr=1.0)), other, False, None, False, 0, 60.0)  # type: ignore[arg-type]
    peering = _Averaging(Averaging(interval=1000.0), here)
    replica.weights.fill_(11.0)

    def step(number: int) -> float:
        """The gradient of each worker's row is 1."""
        assert peering.step(Update(torch.ones(1), 1.0), Moment(number, [1, 1], number)) == number + 1
        return float(replica.weights)

    assert step(0) == 10.0  # and the round begins
    assert [step(1), step(2)] == [9.0, 8.0]  # nobody waits
    other.let_go.set()
    peering._round._thread.join()
    assert step(3) == 15.0 - 3  # this step too came before the mean was taken
    replaced = 15.0
    assert peering.rounds == 1 and float(replica.weights) != replaced, "that form forgets three steps"
    assert step(4) == 11.0 and peering._round is None  # the next round is 1000 s away


@pytest.mark.parametrize("rows", [[2, 6], [8, 0], [0, 8]], ids=str)
def test_a_gradient_counts_for_its_rows(rows: list[int]) -> None:
    """The uniform mean of workers' gradients is then the mean over rows: here of 3 and of 5, summed over the rows of each."""
    total = 0.0
    for rank, gradient in enumerate((3.0, 5.0)):
        update = Update(torch.tensor([gradient * rows[rank]]), float(rows[rank]))
        total += float(Moment(0, rows, 0).scaled(update, rank).vector) / 2
    assert total == pytest.approx((3.0 * rows[0] + 5.0 * rows[1]) / 8)


# ---- what cannot be ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("warmup", [0, 15], ids=["beside", "in the warm-up"])
@pytest.mark.parametrize("step", [0, 7])
def test_a_rank_that_dies_ends_the_others(step: int, warmup: int) -> None:
    made, start = recipe(paced(Paced(lambda rank: 1e-3, dies=(2, step)), 0.0, warmup), 4, deadline=10.0)
    began = time.monotonic()
    seen = apart(made, start)
    assert isinstance(seen[2], OSError)
    assert all(isinstance(x, PeerLost) for rank, x in enumerate(seen) if rank != 2)
    assert time.monotonic() - began < 5.0, "it is known at once, and not at the deadline"


def test_a_connection_that_dies_ends_all() -> None:
    """The error comes up in the thread beside, and the step after it raises it."""

    def watch(rank: int, meeting: Meeting) -> None:
        if rank == 1:

            def gone(*given: Any) -> Tensor:
                raise OSError("the network is gone")

            meeting.rail.all_reduce = gone

    seen = apart(*recipe(async_average(interval=0.0), 3, deadline=10.0), watch=watch)
    assert isinstance(seen[1], OSError) and isinstance(seen[0], PeerLost) and isinstance(seen[2], PeerLost)


def test_numbers_that_are_none_end_the_fit() -> None:
    seen = apart(*recipe(async_average(interval=0.0), 2, partial(SGD, lr=3e38), deadline=10.0))
    assert any(isinstance(x, DivergedError) for x in seen) and all(isinstance(x, DivergedError | PeerLost) for x in seen)


def test_the_local_engine_refuses_it_by_name() -> None:
    with pytest.raises(RecipeError, match=r"Averaging .*take turns: take engine='barrier'"):
        nodes.locally(*recipe(async_average(), 2))


def test_settings_that_cannot_be_are_refused() -> None:
    for settings in ({"interval": -0.1}, {"warmup": -1}):
        with pytest.raises(RecipeError, match="below 0"):
            async_average(**settings)
    assert method("async-average", TorchOptimizer(PLAIN)).peer == Averaging(0.5, 0)


def test_a_fit_goes_on_to_the_same_bits() -> None:
    """One worker, with momentum of its own, saved inside an epoch."""
    made, start = recipe(async_average(interval=0.0), 1, MOMENTUM)
    (whole,) = nodes.outcomes(apart(made, start))
    saving = replace(made, saving=Saving(7, "step"))
    kept: list[Any] = []

    class Remembering(Keeper):
        def __call__(self, part: Any) -> None:
            super().__call__(replace(part, weights=part.weights.clone()))
            if self.kept == 7 and not kept:
                kept.append(self.last())

    nodes.outcomes(apart(saving, start, Remembering(saving)))
    resumed, _ = kept[0]
    assert resumed.now.step == 7
    (rest,) = nodes.outcomes(apart(made, replace(resumed, constants=start.constants)))
    assert same_bits(rest.weights, whole.weights)
