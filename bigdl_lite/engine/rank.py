"""One rank of a fit whose ranks live side by side: processes in the barrier engine, threads in the local one.

    p  ranks      S  batches of an epoch      n  flat weights
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bigdl_lite.algorithms import State, Update, Work, merge_buffers
from bigdl_lite.batch import Batch, mix, order, rounds
from bigdl_lite.comm.block import Size
from bigdl_lite.data.arrow import shapes
from bigdl_lite.engine.apart import train_apart
from bigdl_lite.engine.each import told
from bigdl_lite.engine.history import History, mean_loss
from bigdl_lite.engine.keeper import Keep, Part, forget
from bigdl_lite.engine.meeting import SIDE, Meeting
from bigdl_lite.engine.recipe import Observer, Outcome, Position, Recipe, Start, dealt
from bigdl_lite.engine.trigger import Moment
from bigdl_lite.engine.watch import Judge, best_of, keep_best, shown
from bigdl_lite.model.batchnorm import SyncBatchNorm, connect
from bigdl_lite.model.layout import read_buffers
from bigdl_lite.model.replica import Replica

_SUMS = 4096  # float64 values of a validation that are added at a time


def block_size(recipe: Recipe, q: int) -> Size:
    """The block that q ranks of one node need for this recipe."""
    found = recipe.blueprint.layout
    norms = [m.num_features for m in recipe.blueprint.skeleton.modules() if isinstance(m, SyncBatchNorm)]
    scratch = max(2 * max(norms) + 1 if norms else 0, _SUMS if recipe.watch.validates else int(recipe.watch.listens))
    return Size(found.n, recipe.num_workers, q, SIDE + found.m, scratch, found.dtype)


def train(
    share: Batch, counts: Sequence[int], recipe: Recipe, start: Start, meeting: Meeting, observer: Observer, keep: Keep = forget,
    held: Batch | None = None,
) -> Outcome:  # fmt: skip
    """Trains to the end; every rank returns the same weights and buffers. Rank 0 keeps the history and calls the observer.

    share   this rank's rows, perhaps none (but of the shapes that all shares have)
    start   its weights count on the first rank of each node only, and may be those of the block already
    counts  the rows of every rank
    keep    takes this rank's part of the state after a step where a checkpoint is due, or where rank 0 asks for one
    held    this rank's rows to validate on, perhaps none, where recipe.watch validates
    """
    if recipe.round.peer is not None:
        return train_apart(share, counts, recipe, start, meeting, observer, keep, held)
    return _Rank(share, counts, recipe, start, meeting, observer, keep, held).run()


class _Rank:
    def __init__(
        self, share: Batch, counts: Sequence[int], recipe: Recipe, start: Start, meeting: Meeting, observer: Observer, keep: Keep,
        held: Batch | None,
    ) -> None:  # fmt: skip
        self.share, self.counts, self.recipe, self.meeting, self.keep, self.held = share, counts, recipe, meeting, keep, held
        self.start, self.observer = start, observer
        self.rank, self.block, method = meeting.place.rank, meeting.block, recipe.round
        block, self.staging = self.block, meeting.staging
        self.away = method.local.moves or self.staging is not None  # whether it computes on weights that are not the server's
        self.weights, gradient = block.weights.clone() if self.away else block.weights, block.grads[meeting.place.local]
        if self.staging is not None:
            self.weights, gradient = (torch.empty_like(x, device=self.staging.device) for x in (self.weights, gradient))
        made = start.constants, recipe.loss, recipe.compute
        self.replica = Replica(recipe.blueprint, self.weights, gradient, *made)
        self.served = Replica(recipe.blueprint, block.weights, None, *made) if self.away else self.replica
        connect(self.replica.module, meeting.all_reduce)
        if meeting.reads and start.weights.data_ptr() != block.weights.data_ptr():
            block.weights.copy_(start.weights)
        self.replica.buffers = start.buffers
        block.wait()
        meeting.divide(method.advance.cuts(self.served, meeting.owners))
        self.advancer = method.advance.start(self.served, meeting.cut)
        meeting.start(recipe.blueprint, start.resume.state if start.resume else None)
        self.plan = recipe.plan(counts)
        sums = start.resume.sums if start.resume else None
        self.judge = Judge(recipe.watch, sums.get("judge") if sums else None)
        self.history = History(recipe.log_interval, observer if self.rank == 0 else lambda event: None)
        self.history.start(recipe.steps(len(self.plan)), recipe.epochs, int(self.plan.sum()), sums)
        if start.resume:
            start.resume.check(dealt(recipe, counts, start.now))
            self.advancer.restore(start.resume.state)
        if recipe.watch.validates:
            assert held is not None
            recipe.check_held(counts, int(meeting.all_reduce(torch.tensor([float(held.rows)], dtype=torch.float64))))

    def run(self) -> Outcome:
        step, first, begun = self.start.now
        for epoch in range(first, self.recipe.epochs):
            if self.judge.ended:
                break
            step = self._epoch(epoch, begun if epoch == first else 0, step)
        self._finish()
        if self.judge.buffers is not None:
            self.replica.buffers = self.judge.buffers
        buffers = read_buffers(self.replica.module, self.replica.layout)
        return Outcome(self.block.weights, buffers, self.history.lines, shapes=shapes(self.share), shares=list(self.counts))

    def _finish(self) -> None:
        """The weights that the model gets: the best where they are kept, or the averaged ones."""
        last = best_of(self.advancer) if self.judge.best is not None else None, shown(self.advancer)
        if any(x is not None for x in last):
            self.meeting.total(0.0)  # what others still read of this rank's last state must not change
        self._put(*last)

    def _epoch(self, epoch: int, past: int, step: int) -> int:
        """The rounds of an epoch but the first `past`; returns the number of steps done."""
        deal = order(self.share.rows, self.recipe.seed, epoch, self.rank)
        plan, each = self.plan, rounds(len(self.plan), self.recipe.round.local.batches(epoch))
        row = int(plan[: each[past][0], self.rank].sum()) if past < len(each) else 0
        for at, (a, b) in enumerate(each[past:], past + 1):
            batches, began = [], time.perf_counter()
            for quota in plan[a:b, self.rank]:
                batches.append(self.share.take(deal[row : row + quota], self.weights.device))
                row += int(quota)
            mean = self._step(step, epoch, batches, plan[a:b], began)
            step += 1
            last = at == len(each)
            self._after(Position(step, epoch + last, 0 if last else at), epoch, mean)
            if self.judge.ended:
                break
        return step

    def _step(self, step: int, epoch: int, batches: list[Batch], plan: Any, began: float) -> float:
        """One round: local work, meeting, advance. Returns the mean loss."""
        meeting, method, replica = self.meeting, self.recipe.round, self.replica
        self._load()
        ready, seed = time.perf_counter(), self.recipe.seed
        work = Work(mix(seed, 2, step, self.rank), epoch, self.advancer.rates(), self.rank, step)
        if method.exchange is not None:
            meeting.begin(replica, plan.sum(0).tolist(), step, mix(seed, 3, step))
        update, loss = method.local(replica, batches, work)
        if self.staging is not None:
            self.staging.store(replica.gradient)
        done, mine = time.perf_counter(), int(plan[:, self.rank].sum())
        meeting.tell(mine, update.weight, loss, done - ready, ready - began, replica.buffers, self.keep.wish)
        vector = meeting.exchanged() if method.exchange is not None else None
        sides, sent = meeting.sides()
        self.history.sent(sent)
        mean = mean_loss(sides, step)
        measured = 0.0
        if vector is not None:  # a mean over rows; the loss may weigh them
            rows = sum(side.rows for side in sides)
            update = Update(vector, sum(side.weight for side in sides) / (rows or 1))
        else:
            update = meeting.combine(method.combine, [side.weight for side in sides])
        if meeting.owns:
            measured = self.advancer.measure(update)
        if method.advance.measures:
            measured = meeting.total(measured)
        self.advancer.step(update, measured)
        if replica.layout.m and len(sides) > 1:
            replica.buffers = merge_buffers(sides)
        meeting.publish()
        rates, seconds = self.advancer.rates(), time.perf_counter() - began
        self.history.step(step, epoch, sides, mean, seconds, rates[0], told(self.recipe, sides, rates))
        return mean

    def _after(self, now: Position, epoch: int, mean: float) -> None:
        """What is due between two steps: validation, the end of an epoch, a state for the driver."""
        meeting, judge, last = self.meeting, self.judge, now.at == 0
        moment = Moment(now.step, now.epoch, last, mean, judge.metrics)
        validate = judge.due(moment)
        if last or validate or meeting.wished or self.recipe.due(now):
            self.history.sent(meeting.sent())
        if last:
            mean = self.history.mean
            self.advancer.end_epoch(self.history.means or mean)
        found = self._validate(now.step) if validate else {}
        if last:
            self.history.epoch(epoch, found)
            meeting.agree(f"after epoch {epoch}")
        asked = self._asked() if self.recipe.watch.listens and (last or validate) else False
        judge.end(Moment(now.step, now.epoch, last, mean, judge.metrics), asked)
        due = self.recipe.due(now, bool(judge.ended))
        if due or meeting.wished or judge.ended:
            self.history.sent(meeting.sent())
        if due or meeting.wished:
            sums = self.history.sums(due, judge)
            if meeting.keeps:
                of_node = meeting.exchange is None or meeting.place.node == 0
                cut, state = (meeting.cut, self.advancer.state()) if of_node else ((0, 0), State({}, {}))
                self.keep(Part(
                    now, due, self.rank, cut, self.block.weights[slice(*cut)], state, meeting.keepers, self.replica.buffers, sums,
                    self.history.lines, self.counts, shapes(self.share), *meeting.kept(),
                ))  # fmt: skip

    def _validate(self, step: int) -> dict[str, float]:
        """The values of the held-out rows; where they are the best, owners keep what was measured."""
        assert self.held is not None
        began, mine = time.perf_counter(), shown(self.advancer)
        before = None if mine is None else self.block.weights[slice(*self.meeting.cut)].clone()
        self._put(mine)
        self._load()
        size = max(16, -(-self.recipe.batch_size // self.recipe.num_workers))
        sums = self.replica.measure(self.held.to(self.weights.device), self.recipe.watch.metrics, size)
        flat = torch.cat(sums)
        total = torch.cat([self.meeting.all_reduce(flat[at : at + _SUMS]) for at in range(0, len(flat), _SUMS)])
        self._put(before)
        values = self.recipe.watch.values(total.split([len(x) for x in sums]))
        if self.judge.judge(values, self.replica.buffers) and self.recipe.watch.best:
            keep_best(self.advancer)
        self.history.validation(step, values, time.perf_counter() - began)
        return values

    def _load(self) -> None:
        """Takes the server's weights, where this rank has others."""
        if self.staging is not None:
            self.staging.load(self.weights)
        elif self.away:
            self.weights.copy_(self.block.weights)

    def _put(self, *slices: Tensor | None) -> None:
        """Makes the first of these slices that there is everyone's weights. Owners all have one, or none has."""
        found = next((x for x in slices if x is not None), None)
        if found is not None:
            self.block.weights[slice(*self.meeting.cut)].copy_(found)
            self.meeting.publish()

    def _asked(self) -> bool:
        """Whether the observer wants the fit to end here: rank 0 knows, and tells the others."""
        asks = getattr(self.observer, "asked", None) if self.rank == 0 else None
        return bool(self.meeting.all_reduce(torch.tensor([float(asks is not None and asks())], dtype=torch.float64)))
