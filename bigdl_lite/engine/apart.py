"""One rank of a fit whose ranks have no common meeting point: each has weights of its own, and a peer (algorithms/peer.py).

    step      local work; the peer does what it does, with whom it likes
    report    every few steps, at the ends of epochs, and where a state is due: what ranks noted of their steps is told to all

A report is the only moment at which all ranks wait for one another:

    settle -> notes of all ranks -> history -> mean of the weights -> how far from it each rank is -> state, where it is due

    p  ranks      S  steps of an epoch      n  flat weights      m  values of the buffers
"""

from __future__ import annotations

import contextlib
import math
import time
import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bigdl_lite.algorithms import Side, State, Work, durable, merge_buffers
from bigdl_lite.algorithms.exchange import parted
from bigdl_lite.algorithms.peer import Here, Peering, distance
from bigdl_lite.algorithms.peer import Moment as Turn
from bigdl_lite.batch import Batch, mix, order
from bigdl_lite.comm.comm import Collectives
from bigdl_lite.comm.room import Room, Table
from bigdl_lite.data.arrow import shapes
from bigdl_lite.engine.history import History, mean_loss
from bigdl_lite.engine.keeper import Keep, Part, forget
from bigdl_lite.engine.meeting import Meeting
from bigdl_lite.engine.recipe import Observer, Outcome, Position, Recipe, Start, dealt
from bigdl_lite.engine.trigger import Moment
from bigdl_lite.engine.watch import Judge
from bigdl_lite.errors import CheckpointError, DivergedError
from bigdl_lite.model.layout import read_buffers
from bigdl_lite.model.replica import Replica

# what a rank notes of one step; _ENDED: seconds since all were together last
_STEP, _ROWS, _WEIGHT, _LOSS, _COMPUTE, _DATA, _ENDED, _BYTES, _RATE, _USED, _WIDTH = range(11)


def train_apart(
    share: Batch, counts: Sequence[int], recipe: Recipe, start: Start, meeting: Meeting, observer: Observer, keep: Keep = forget,
    held: Batch | None = None,
) -> Outcome:  # fmt: skip
    """Trains to the end; every rank returns the mean of all ranks' weights. See engine/rank.py for the arguments."""
    fit = _Fit(share, counts, recipe, start, meeting, observer, keep, held)
    with contextlib.closing(fit.peering):
        return fit.run()


class _Fit:
    def __init__(
        self, share: Batch, counts: Sequence[int], recipe: Recipe, start: Start, meeting: Meeting, observer: Observer, keep: Keep,
        held: Batch | None,
    ) -> None:  # fmt: skip
        self.share, self.counts, self.recipe, self.keep, self.held = share, counts, recipe, keep, held
        self.rank, self.weights, self.peer = meeting.place.rank, meeting.block.weights, recipe.round.peer
        inline = meeting.rail is None or isinstance(meeting.rail, Room)
        self.all: Collectives = meeting.leaders or Room(Table(1), 0)  # for reports; the rail is the peer's
        made = start.constants, recipe.loss, recipe.compute
        self.replica = Replica(recipe.blueprint, self.weights, meeting.block.grads[0], *made)
        if start.weights.data_ptr() != self.weights.data_ptr():
            self.weights.copy_(start.weights)
        self.replica.buffers = start.buffers
        self.plan = recipe.plan(counts)
        self.steps = recipe.epochs * len(self.plan)
        self.history = History(recipe.log_interval, observer if self.rank == 0 else lambda event: None)
        sums = start.resume.sums if start.resume else None
        self.history.start(self.steps, recipe.epochs, int(self.plan.sum()), sums)
        self.judge = Judge(recipe.watch, sums.get("judge") if sums else None)
        self.asks = getattr(observer, "asked", None) if self.rank == 0 else None
        self.step, *_ = start.now
        self.mean = start.weights.detach().clone().to(self.weights.device)  # of the last report
        self.served = Replica(recipe.blueprint, self.mean, None, *made) if recipe.watch.validates else None
        if held is not None and recipe.watch.validates:
            recipe.check_held(counts, int(self._total(torch.tensor([float(held.rows)], dtype=torch.float64))))
        comm = meeting.rail or Room(Table(1), 0)
        weighs = self.replica.weighs(share) or getattr(recipe.round.local, "drops", False)
        weighs = any(float(x) for x in _gathered(self.all, torch.tensor([float(weighs)], dtype=torch.float64), [1] * self.all.size))
        here = Here(
            recipe.blueprint, self.replica, recipe.round.advance, comm, inline, meeting.reach, weighs, self.step, recipe.deadline
        )  # fmt: skip
        self.resume = start.resume
        if self.resume:
            self.resume.check(dealt(recipe, counts, start.now))
        self.peering: Peering = self.peer.start(here)
        self.notes: list[list[float]] = []
        self.sent, self.together = 0, 0.0

    def run(self) -> Outcome:
        deal, of, until = torch.empty(0, dtype=torch.int64), -1, self._until()
        if self.resume:
            self._restore(self.resume.state)
        self.together = time.perf_counter()  # all have met in __init__
        while self.step < self.steps and not self.judge.ended:
            began = time.perf_counter()
            epoch, at = divmod(self.step, len(self.plan))
            if epoch != of:
                deal, of = order(self.share.rows, self.recipe.seed, epoch, self.rank), epoch
            first, rows = int(self.plan[:at, self.rank].sum()), int(self.plan[at, self.rank])
            batch = self.share.take(deal[first : first + rows], self.weights.device)
            now = Turn(self.step, self.plan[at].tolist(), mix(self.recipe.seed, 3, self.step))
            self.peering.begin(now)
            ready = time.perf_counter()
            work = Work(mix(self.recipe.seed, 2, self.step, self.rank), epoch, self.peering.advancer.rates(), self.rank, self.step)
            update, loss = self.recipe.round.local(self.replica, [batch], work)
            done = time.perf_counter()
            if not math.isfinite(loss):  # others may see it only at the next report
                mean_loss([Side(self.rank, rows, update.weight, loss, 0.0, 0.0, torch.empty(0))], self.step)
            weight, rate = update.weight, work.rates[0]
            then = self.peering.step(update, now)
            sent, self.sent = self.sent, self.peering.bytes_sent + self.all.bytes_sent
            used = float(getattr(self.peering, "used", True))
            self.notes.append([
                self.step, rows, weight, loss, done - ready, ready - began, time.perf_counter() - self.together,
                self.sent - sent, rate, used,
            ])  # fmt: skip
            self.step = then
            if then >= until:
                self._report(until)
                until = self._until()
        buffers = read_buffers(self.replica.module, self.replica.layout)
        return Outcome(self.mean, buffers, self.history.lines, shapes=shapes(self.share), shares=list(self.counts))

    def _until(self) -> int:
        """The step before which the next report is."""
        found = [(self.step // len(self.plan) + 1) * len(self.plan)] if len(self.plan) else [0]
        saving = self.recipe.saving
        for interval in (self.peer.every, saving.interval if saving is not None and saving.unit == "step" else 0):
            if interval:
                found.append((self.step // interval + 1) * interval)
        return min(*found, self.steps) if len(found) > 1 else found[0]

    def _report(self, step: int) -> None:
        """What all ranks know when `step` steps are done."""
        last = step % len(self.plan) == 0
        now = Position(step, step // len(self.plan), step % len(self.plan))
        if step == self.steps:
            self.peering.finish()
        told = self.peering.settle()
        wished = self._tell()
        if last:
            self.peering.advancer.end_epoch(self.history.mean)
        due = self.recipe.due(now)
        if last or due or wished:
            told |= self._average(f"after step {step}")
        if last:
            told |= self._validate(step)
            mean = self.history.epoch(now.epoch - 1, told)
            self._judge(Moment(step, now.epoch, True, mean, self.judge.metrics))
            due = self.recipe.due(now, bool(self.judge.ended))
        if due or wished:
            self._keep(now, due)

    def _validate(self, step: int) -> dict[str, float]:
        """The values of the held-out rows, by the mean of the weights; none where nothing is held out."""
        watch, began = self.recipe.watch, time.perf_counter()
        if self.served is None:
            return {}
        assert self.held is not None
        self.served.buffers = self.replica.buffers
        sums = self.served.measure(self.held.to(self.mean.device), watch.metrics, max(16, -(-self.recipe.batch_size // self.all.size)))
        values = watch.values(self._total(torch.cat(sums)).split([len(x) for x in sums]))
        self.judge.judge(values, self.replica.buffers)
        self.history.validation(step, values, time.perf_counter() - began)
        return values

    def _judge(self, now: Moment) -> None:
        """Whether the fit ends here; then peers finish what is under way."""
        asked = False
        if self.recipe.watch.listens:
            asked = bool(self._total(torch.tensor([float(self.asks is not None and self.asks())], dtype=torch.float64)))
        self.judge.end(now, asked)
        if self.judge.ended and now.step < self.steps:
            self.peering.finish()
            self.peering.settle()
            self._average(f"after step {now.step}")

    def _total(self, x: Tensor) -> Tensor:
        """The sum of a vector over all ranks, in rank order."""
        return torch.stack(_gathered(self.all, x, [len(x)] * self.all.size)).sum(0)

    def _tell(self) -> bool:
        """Tells all ranks what this one noted since the last report; history becomes that of all. Whether rank 0 wants a state."""
        buffers = self.replica.buffers
        count = torch.tensor([float(len(self.notes))], dtype=torch.float64)
        counts = _gathered(self.all, count, [1] * self.all.size)
        self.together = time.perf_counter()
        notes = torch.tensor(self.notes, dtype=torch.float64).reshape(-1, _WIDTH)
        mine = torch.cat([torch.tensor([float(self.keep.wish)], dtype=torch.float64), buffers, notes.reshape(-1)])
        m = len(buffers)
        tables = _gathered(self.all, mine, [1 + m + int(c) * _WIDTH for c in counts])
        by_step: dict[int, list[tuple[int, Any]]] = {}
        for rank, table in enumerate(tables):
            for note in table[1 + m :].view(-1, _WIDTH).tolist():
                by_step.setdefault(int(note[_STEP]), []).append((rank, note))
        ended = 0.0
        for step, found in sorted(by_step.items()):
            ended = self._line(step, found, ended)
        if m and len(tables) > 1:
            rows = [int(table[1 + m :].view(-1, _WIDTH)[:, _ROWS].sum()) for table in tables]
            sides = [Side(r, k, k, 0.0, 0.0, 0.0, table[1 : 1 + m]) for r, (k, table) in enumerate(zip(rows, tables, strict=True))]
            self.replica.buffers = merge_buffers(sides)
        self.notes = []
        return bool(tables[0][0])

    def _line(self, step: int, found: list[tuple[int, Any]], before: float) -> float:
        """The line of a step, which took from the end of the one before until the last of its ranks was done. Returns that end."""
        nothing = torch.empty(0, dtype=torch.float64)
        used = [(rank, x) for rank, x in found if x[_USED]] or found
        sides = [Side(r, int(x[_ROWS]), x[_WEIGHT], x[_LOSS], x[_COMPUTE], x[_DATA], nothing) for r, x in used]
        ended = max(before, *(x[_ENDED] for _, x in used))
        more = {} if len(used) == self.all.size else {"accepted": [rank for rank, _ in used]}
        epoch = step // len(self.plan)
        self.history.step(step, epoch, sides, mean_loss(sides, step), ended - before, used[0][1][_RATE], more)
        self.history.sent(int(sum(x[_BYTES] for _, x in found)))
        return ended

    def _average(self, when: str) -> dict[str, float]:
        """Takes the mean of all ranks' weights, and says how far from it they are: the root of the mean squared distance."""
        p = self.all.size
        if self.peer.alike:
            self.mean.copy_(self.weights)
            self._agree(when)
            return {}
        mine = self.weights.detach().cpu()
        self.mean.copy_(self.all.all_reduce(mine / p))
        apart = self.all.all_reduce(torch.tensor([distance(mine, self.mean.cpu())], dtype=torch.float64))
        return {"consensus": math.sqrt(float(apart) / p)}

    def _agree(self, when: str) -> None:
        crc = zlib.crc32(memoryview(self.weights.detach().cpu().view(torch.uint8).numpy()))
        found = [int(x) for x in _gathered(self.all, torch.tensor([float(crc)], dtype=torch.float64), [1] * self.all.size)]
        other = next((r for r, x in enumerate(found) if x != found[0]), None)
        if other is not None:
            raise DivergedError(
                f"ranks 0 and {other} no longer have the same weights {when} (CRC {found[0]:08x} and {found[other]:08x}): the peers, "
                "or the optimizer, compute differently on two machines"
            )

    def _keep(self, now: Position, due: bool) -> None:
        sums = self.history.sums(due, self.judge)
        advancer, cut = self.peering.advancer, getattr(self.peering, "cut", None)
        if cut is None and self.rank:  # all have all of it; what is this rank's alone comes as its own
            cut, state = (0, 0), State({}, {})
        else:
            cut, state = cut or (0, len(self.weights)), advancer.state()
        own = self.peering.own()
        if not self.peer.alike:
            mine = durable(self.recipe.round.advance).join([advancer.state()])
            tensors = {f"exchange/{name}": x for name, x in mine.tensors.items()}
            own = State({**own.tensors, **tensors, "exchange/weights": self.weights}, {**own.facts, "advance": mine.facts})
        self.keep(Part(
            now, due, self.rank, cut, self.mean[slice(*cut)], state, self.all.size, self.replica.buffers, sums, self.history.lines,
            self.counts, shapes(self.share), State({}, {}), own, self.rank,
        ))  # fmt: skip
        _gathered(self.all, torch.zeros(1), [1] * self.all.size)  # nobody moves before all have given theirs

    def _restore(self, saved: State) -> None:
        """Puts this rank's own weights and state back."""
        rest, _, owns = parted(saved)
        each = not self.peer.alike or getattr(getattr(self.peer, "exchange", None), "remembers", False)
        if len(owns) != self.all.size and (each or not owns):
            raise CheckpointError(
                f"the checkpoint holds the weights of {len(owns)} workers, each its own, and there are {self.all.size} now: go on "
                "with as many as before, or begin anew in another folder"
            )
        own, state = owns[self.rank % len(owns)], rest  # where each has the same, any will do
        if not self.peer.alike:
            facts = dict(own.facts)
            tensors = dict(own.tensors)
            self.weights.copy_(tensors.pop("exchange/weights"))
            mine = {name: tensors.pop(name) for name in [*tensors] if name.startswith(("exchange/optimizer/", "exchange/shadow/"))}
            state = State({name.removeprefix("exchange/"): x for name, x in mine.items()}, facts.pop("advance"))
            own = State(tensors, facts)
        self.peering.advancer.restore(state)
        self.peering.restore(own)


def _gathered(all_: Collectives, mine: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    """The vectors of all ranks, of these lengths."""
    found = [torch.empty(length, dtype=mine.dtype) for length in lengths]
    all_.all_gather(mine, found)
    return found
