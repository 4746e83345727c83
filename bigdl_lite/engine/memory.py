"""The route through memory, on the driver: weights and updates stay where they are written, and are mapped by those who read them.

A job of Spark costs as much as a small round. So where all workers have a slot at the same time, a job has several rounds, as many
as take about a second; its tasks (looker.py) keep their slots, and driver and workers tell each other by stamps on their memory:

    driver                                      worker
    weights of round 7, stamps 7 on the board   waits for it
    waits                                       works, writes its part to its own memory, stamps that with 7
    adds the parts in rank order, advances      waits
    weights of round 8, stamps 8 ...

The next job is submitted when the last round of this one begins, so that its tasks take the slots when these become free. No job
goes on beyond the rounds that are known to follow each other without a break.

What may go wrong, and what follows. Results are the same bits in any case, for a part is a function of weights, share, seed, round.

    a task leaves (share missing, error in the user's code,     it says so on its seat. The driver gives the job up: it stamps a
    no slot for another of its job for two seconds)             number that no job has, upon which all tasks end; what they said
                                                                comes through Spark; the round is repeated in a job of one round
    a task runs again, or twice                                 it joins in the round on the board; either's part is taken
    a task that Spark has given up reads or writes too late     it writes to its own memory only, and its stamp is not asked for
    a process is gone, with its memory                          the job ends, and the round is repeated
    the job fails                                               the error is raised
    the driver is gone, or busy elsewhere                       tasks end after two seconds

After a job of several rounds that was given up, the next ones are of one round, whose tasks wait for nobody: more of them each time.

    n  flat weights      p  workers
"""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bigdl_lite.algorithms import Side, Update
from bigdl_lite.comm.window import Look, Window, look
from bigdl_lite.engine.looker import CLOSED, board_nbytes, looker_of, nap, part_in, rates_in, seat_in, seated
from bigdl_lite.engine.order import Order, dumps
from bigdl_lite.engine.routes import REFILLS, Blind, Coming, Ground, description, lacking, nothing
from bigdl_lite.engine.spark import Submitters, repeated
from bigdl_lite.engine.tasks import side_of, state_in
from bigdl_lite.errors import PeerLost
from bigdl_lite.wire import frame as wire

SECONDS = 1.0  # that a job of several rounds should take
MOST = 2048  # orders of a job, times workers: its note goes to every task
_FEAR = 64  # jobs of one round, at most, after one of several was given up
_LONG = 0.05
_FEW = 1 << 22  # values that one core passes over before others are awake


@dataclass(frozen=True)
class _Job:
    """Rounds first, first + 1, ..., one for each order."""

    first: int
    orders: list[Order]
    back: Future[list[bytes]]

    @property
    def last(self) -> int:
        return self.first + len(self.orders) - 1

    def does(self, order: Order, number: int) -> bool:
        return self.first <= number <= self.last and self.orders[number - self.first] == order


class _Seat:
    """One worker, as the driver sees it: every memory that its tasks told of since the job began."""

    def __init__(self, memory: memoryview) -> None:
        self._memory, self._bytes = memory, b""
        self._taken: tuple[int, str] | None = None
        self._looks: dict[str, Look] = {}

    def part(self, number: int) -> Look | None:
        """The memory that holds the part of this round, if it is there yet."""
        for seen in self._looks.values():
            if seen.stamp == number:
                return seen
        _, address = self._read() or (0, "")
        if address and address not in self._looks and (seen := look(address)) is not None:
            self._looks[address] = seen
            return seen if seen.stamp == number else None
        return None

    def left(self, job: int) -> bool:
        return self._read() == (job, "")

    def forget(self) -> None:
        """Lets go of memory that is out of use."""
        _, address = self._read() or (0, "")
        self._looks = {known: seen for known, seen in self._looks.items() if known == address}

    def _read(self) -> tuple[int, str] | None:
        now = self._memory.tobytes()
        if now != self._bytes:
            self._bytes, self._taken = now, seated(now)
        return self._taken


class MemoryRoute:
    """See above. together: whether all workers have a slot at the same time, and jobs get slots in the order of submission.

    Cost: nothing is copied between processes; the sum reads p vectors of n values, once. Until close(), torch has one thread on the
    driver where n is small.
    """

    def __init__(self, ground: Ground, window: Window, together: bool) -> None:
        self.ground, self.window, self.together = ground, window, together
        found, base = ground.recipe.blueprint.layout, ground.order
        p, groups = ground.recipe.num_workers, len(base.rates)
        self.weights, self.buffers = state_in(window, found.n, found.m, found.dtype)
        self.board = Window(board_nbytes(groups, p))
        self.rates = rates_in(self.board, groups)
        self._seats = [_Seat(seat_in(self.board, groups, rank)) for rank in range(p)]
        task = looker_of(ground.static, ground.shipped, window.address, self.board.address, base)
        self._submitters = Submitters(repeated(ground.tokens, task))
        self._job: _Job | None = None
        self._next: _Job | None = None  # submitted ahead
        self._number = self._given = 0  # on the board; the last of any job
        self._size = self._fear = 1  # rounds of the last job, if it found as many; jobs of one round after the next that is given up
        self._wary = 0  # of these, those still to come
        self._waited = SECONDS  # for the parts of the last round
        self._threads = torch.get_num_threads()
        if found.n < _FEW:  # torch's other threads would go on spinning on the cores of the workers
            torch.set_num_threads(1)

    def round(
        self, order: Order, weights: Tensor, buffers: Tensor, coming: Coming = nothing
    ) -> tuple[list[Side], list[Update], int]:  # fmt: skip
        assert weights.data_ptr() == self.weights.data_ptr()
        self.buffers.copy_(buffers)
        self.rates.copy_(self.rates.new_tensor(order.rates))
        parts = self._parts(order, coming)
        updates = [update for _, update in parts if update is not None]
        combine = self.ground.recipe.round.combine
        combined = [combine([replace(update, vector=update.vector[start:stop]) for update in updates]) for start, stop in order.cuts]
        return [side_of(side) for side, _ in parts], combined, 0

    def _parts(self, order: Order, coming: Coming) -> list[tuple[wire.Frame, Update | None]]:
        """The parts of a round in rank order; it is repeated as often as need be."""
        missing: list[int] = []
        for _ in range(REFILLS):
            job = self._begin(order, coming)
            found = self._wait(job)
            if found is not None:
                if self._number == job.last > job.first:
                    self._fear = 1
                return [part_in(seen, self.ground.recipe.blueprint.layout) for seen in found]
            missing = lacking(self._give_up(job))
            if missing:
                self.ground.refill(missing)
        if not missing:
            raise Blind("workers' memory was gone before it could be read")
        raise PeerLost(f"partitions {missing} were on no executor that ran their task, {REFILLS} times in round {order.round}")

    def _begin(self, order: Order, coming: Coming) -> _Job:
        """The job that does this round, which may be under way already; the board now shows its number."""
        order, number = _bare(order), self._number + 1
        job = next((job for job in (self._job, self._next) if job is not None and job.does(order, number)), None)
        if job is not None and job.back.done():  # its tasks have not waited, or are gone for a reason
            job.back.result()
            job = None
        if job is None:
            job = self._submit([order, *self._known(coming, self._rounds() - 1)])
        before, self._number = self._job, max(number, job.first)
        if job is not before:
            self._job, self._next = job, None
            for seat in self._seats:
                seat.forget()
        self.board.mark(self._number)
        if before is not None and job is not before:
            before.back.result()  # its parts are all here, but someone may have cancelled it
        if self._number == job.last > job.first:
            orders = self._known(coming, self._rounds())
            self._next = self._submit(orders) if orders else None
        return job

    def _rounds(self) -> int:
        """Rounds of the next job: at most twice those of the one before."""
        if not self.together:
            return 1
        if self._wary:
            self._wary -= 1
            self._size = 1
        else:
            self._size = max(1, min(2 * self._size, int(SECONDS / self._waited), MOST // len(self._seats)))
        return self._size

    def _known(self, coming: Coming, k: int) -> list[Order]:
        return [_bare(order) for order in coming(k)] if k else []

    def _submit(self, orders: list[Order]) -> _Job:
        first = self._given + 1
        self._given += len(orders)
        title = description(self.ground.recipe, orders[0], orders[-1])
        return _Job(first, orders, self._submitters(f"{first} {dumps(orders)}", title))

    def _wait(self, job: _Job) -> list[Look] | None:
        """The memory of all workers in rank order, with their parts of this round; None where some will not come."""
        found: dict[int, Look] = {}
        began = time.monotonic()
        time.sleep(min(self._waited / 2, _LONG))  # the workers need the cores, and are not ready much sooner than in the last round
        while True:
            over = job.back.done()  # before the last look
            for rank, seat in enumerate(self._seats):
                if rank not in found:
                    if (seen := seat.part(self._number)) is not None:
                        found[rank] = seen
                    elif len(job.orders) > 1 and seat.left(job.first):
                        over = True
            if len(found) == len(self._seats):
                self._waited = time.monotonic() - began
                return [found[rank] for rank in range(len(found))]
            if over:
                return None
            nap(began)

    def _give_up(self, job: _Job) -> list[wire.Frame]:
        """Ends all jobs under way; what the tasks of this one had to say. Raises what made the job fail."""
        self._given += 1
        self._number = self._given
        self.board.mark(self._number)
        if len(job.orders) > 1:
            self._wary, self._fear = self._fear, min(2 * self._fear, _FEAR)
        self._job = self._next = None
        return [wire.loads(data) for data in job.back.result()]

    def close(self) -> None:
        torch.set_num_threads(self._threads)
        self.board.mark(CLOSED)  # ends the tasks that wait
        self.board.close()
        self.window.close()
        self._submitters.close()


def _bare(order: Order) -> Order:
    """Rates are told when a round begins."""
    return replace(order, rates=())
