"""One rank of a fit whose ranks live side by side: processes in the barrier engine, threads in the local one.

    p  ranks      S  batches of an epoch      n  flat weights
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from bigdl_lite.algorithms import State, Update, Work, merge_buffers
from bigdl_lite.batch import Batch, mix, order, quotas, rounds
from bigdl_lite.comm.block import Size
from bigdl_lite.data.arrow import shapes
from bigdl_lite.engine.apart import train_apart
from bigdl_lite.engine.history import History, mean_loss
from bigdl_lite.engine.keeper import Keep, Part, forget
from bigdl_lite.engine.meeting import SIDE, Meeting
from bigdl_lite.engine.recipe import Observer, Outcome, Position, Recipe, Start, dealt
from bigdl_lite.model.batchnorm import SyncBatchNorm, connect
from bigdl_lite.model.layout import read_buffers
from bigdl_lite.model.replica import Replica


def block_size(recipe: Recipe, q: int) -> Size:
    """The block that q ranks of one node need for this recipe."""
    found = recipe.blueprint.layout
    norms = [m.num_features for m in recipe.blueprint.skeleton.modules() if isinstance(m, SyncBatchNorm)]
    return Size(found.n, recipe.num_workers, q, SIDE + found.m, 2 * max(norms) + 1 if norms else 0, found.dtype)


def train(
    share: Batch, counts: Sequence[int], recipe: Recipe, start: Start, meeting: Meeting, observer: Observer, keep: Keep = forget
) -> Outcome:
    """Trains to the end; every rank returns the same weights and buffers. Rank 0 keeps the history and calls the observer.

    share   this rank's rows, perhaps none (but of the shapes that all shares have)
    start   its weights count on the first rank of each node only, and may be those of the block already
    counts  the rows of every rank
    keep    takes this rank's part of the state after a step where a checkpoint is due, or where rank 0 asks for one
    """
    if recipe.round.peer is not None:
        return train_apart(share, counts, recipe, start, meeting, observer, keep)
    rank, method, block = meeting.place.rank, recipe.round, meeting.block
    weights = block.weights.clone() if method.local.moves else block.weights
    replica = Replica(recipe.blueprint, weights, block.grads[meeting.place.local], start.constants, recipe.loss)
    served = Replica(recipe.blueprint, block.weights, None, start.constants, recipe.loss) if method.local.moves else replica
    connect(replica.module, meeting.all_reduce)
    if meeting.place.local == 0 and start.weights.data_ptr() != block.weights.data_ptr():
        block.weights.copy_(start.weights)
    replica.buffers = start.buffers
    block.wait()
    meeting.divide(method.advance.cuts(served, meeting.owners))
    advancer = method.advance.start(served, meeting.cut)
    meeting.start(recipe.blueprint, start.resume.state if start.resume else None)
    plan = quotas(counts, recipe.batch_size)
    history = History(recipe.log_interval, observer if rank == 0 else lambda event: None)
    history.start(recipe.steps(len(plan)), recipe.epochs, int(plan.sum()), start.resume.sums if start.resume else None)
    if start.resume:
        start.resume.check(dealt(recipe, counts, start.now))
        advancer.restore(start.resume.state)
    step, first, begun = start.now
    for epoch in range(first, recipe.epochs):
        deal = order(share.rows, recipe.seed, epoch, rank)
        past = begun if epoch == first else 0
        each = rounds(len(plan), method.local.batches(epoch))
        row = int(plan[: each[past][0], rank].sum()) if past < len(each) else 0
        for at, (a, b) in enumerate(each[past:], past + 1):
            began = time.perf_counter()
            batches, mine = [], 0
            for quota in plan[a:b, rank]:
                batches.append(share.take(deal[row : row + quota]).to(block.weights.device))
                row, mine = row + int(quota), mine + int(quota)
            if method.local.moves:
                weights.copy_(block.weights)
            ready = time.perf_counter()
            work = Work(mix(recipe.seed, 2, step, rank), epoch, advancer.rates(), rank, step)
            if method.exchange is not None:
                meeting.begin(replica, plan[a:b].sum(0).tolist(), step, mix(recipe.seed, 3, step))
            told, loss = method.local(replica, batches, work)
            done = time.perf_counter()
            meeting.tell(mine, told.weight, loss, done - ready, ready - began, replica.buffers, keep.wish)
            vector = meeting.exchanged() if method.exchange is not None else None
            sides, sent = meeting.sides()
            history.sent(sent)
            mean = mean_loss(sides, step)
            measured = 0.0
            if vector is not None:  # a mean over rows; the loss may weigh them
                rows = sum(side.rows for side in sides)
                update = Update(vector, sum(side.weight for side in sides) / (rows or 1))
            elif meeting.owns:
                update = meeting.combine(method.combine, [side.weight for side in sides])
            else:  # a slice of no values, whose scheduler goes on like everyone's
                update = Update(block.weights.new_empty(0), 1.0)
            if meeting.owns:
                measured = advancer.measure(update)
            if method.advance.measures:
                measured = meeting.total(measured)
            advancer.step(update, measured)
            if replica.layout.m and len(sides) > 1:
                replica.buffers = merge_buffers(sides)
            meeting.publish()
            history.step(step, epoch, sides, mean, time.perf_counter() - began, advancer.rates()[0])
            step += 1
            last = at == len(each)
            now = Position(step, epoch + last, 0 if last else at)
            due = recipe.due(now)
            if last or due or meeting.wished:
                history.sent(meeting.sent())
            if last:
                advancer.end_epoch(history.epoch(epoch))
                meeting.agree(f"after epoch {epoch}")
            if due or meeting.wished:
                sums = history.sums(due)
                if meeting.keeps:
                    of_node = meeting.exchange is None or meeting.place.node == 0
                    cut, state = (meeting.cut, advancer.state()) if of_node else ((0, 0), State({}, {}))
                    keep(Part(
                        now, due, rank, cut, block.weights[slice(*cut)], state, meeting.keepers, replica.buffers, sums, history.lines,
                        counts, shapes(share), *meeting.kept(),
                    ))  # fmt: skip
    return Outcome(block.weights, read_buffers(replica.module, replica.layout), history.lines, shapes=shapes(share))
