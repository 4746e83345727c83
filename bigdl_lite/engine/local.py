"""The local engine: ranks are threads of this process that take turns. The reference that the others must equal.

Only one rank computes at a time, and gives its turn away only where it waits for the others. So torch's random state,
which belongs to the process, can belong to each rank in its turn, and a run repeats to the bit. Of several fits in one
process, one trains at a time.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import pyarrow as pa
import torch

from bigdl_lite.batch import Batch
from bigdl_lite.comm.block import Block, private
from bigdl_lite.comm.room import Room, Table
from bigdl_lite.data.arrow import agree, nothing, shapes, shares
from bigdl_lite.engine.keeper import Keep, forget
from bigdl_lite.engine.meeting import Meeting, Place
from bigdl_lite.engine.rank import block_size, train
from bigdl_lite.engine.recipe import Observer, Outcome, Recipe, Start, silent
from bigdl_lite.errors import BigDLError, PeerLost, RecipeError, UserError, report

# torch's default generator and number of threads belong to the process: who sets them holds this, so that fits in several threads of
# a program do not draw each other's numbers
_ALONE = threading.RLock()

_RANK = "bigdl_lite-rank-"  # begins the names of the threads
Frame = Sequence[Iterable[pa.RecordBatch]]


class LocalEngine:
    """Memory: all rows, and p + 1 vectors of the length of the weights; 2 p with an exchange, because peers share nothing."""

    name = "local"

    def fit(self, frame: Frame, recipe: Recipe, start: Start, observer: Observer = silent, keep: Keep = forget) -> Outcome:
        """Trains on `frame`, the record batches of each worker's share."""
        p = recipe.num_workers
        if len(frame) != p:
            raise RecipeError(f"{len(frame)} shares for {p} workers; give one to each")
        if recipe.round.peer is not None and recipe.round.peer.threads:
            raise RecipeError(
                f"{type(recipe.round.peer).__name__} lets workers be of different speed, and those of the local engine are threads "
                "that take turns: take engine='barrier'"
            )
        found = [shares(batches, recipe.columns, rank, recipe.watch.holdout) for rank, batches in enumerate(frame)]
        agreed = agree([shapes(share or held) for share, held in found], recipe.columns)
        full = [tuple(nothing(recipe.columns, agreed) if x is None else x for x in pair) for pair in found]
        with alone():
            return _Threads(recipe, start, [share for share, _ in full], [held for _, held in full], observer, keep).run()


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """The random state of this process is the caller's. RecipeError in a rank of a fit, which would wait for itself."""
    if threading.current_thread().name.startswith(_RANK):
        raise RecipeError("a callback of a fit in the local engine cannot run another one: fit when the first has ended")
    with _ALONE:
        yield


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """torch computes with one thread, as each worker on an executor does, so that sums are rounded in the same order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Threads:
    def __init__(
        self, recipe: Recipe, start: Start, shares: list[Batch], held: list[Batch], observer: Observer, keep: Keep
    ) -> None:  # fmt: skip
        self.recipe, self.start, self.shares, self.held, self.observer, self.keep = recipe, start, shares, held, observer, keep
        self.turn = threading.Lock()
        self.outcome: Outcome | None = None
        self.errors: dict[int, BaseException] = {}
        p = recipe.num_workers
        self.nodes = tuple((r,) for r in range(p)) if recipe.apart else (tuple(range(p)),)
        self.size = block_size(recipe, len(self.nodes[0]))
        self.memories = [private(self.size.nbytes) for _ in self.nodes]
        self.rails, self.leaders = Table(len(self.nodes)), Table(len(self.nodes))
        self.blocks: list[Block] = []

    def run(self) -> Outcome:
        p = self.recipe.num_workers
        places = [Place(r, self.nodes) for r in range(p)]
        self.blocks = [
            Block(self.memories[at.node], self.size, at.local, self.recipe.deadline, self._pass_turn, watch=False) for at in places
        ]
        threads = [threading.Thread(target=self._rank, args=(r,), name=f"{_RANK}{r}", daemon=True) for r in range(p)]
        with torch.random.fork_rng(devices=[]), _one_thread():
            for thread in threads:
                thread.start()
            try:
                for thread in threads:
                    while thread.is_alive():
                        thread.join(0.2)  # a join without end could not be interrupted
            except BaseException:
                for block in self.blocks:
                    block.fail()
                raise
        if self.errors:
            rank, error = min(self.errors.items(), key=lambda item: (isinstance(item[1], PeerLost), item[0]))
            if isinstance(error, BigDLError):
                raise error
            raise UserError(report(error, f"rank {rank}")["message"]) from error
        assert self.outcome is not None
        return self.outcome

    def _rank(self, r: int) -> None:
        place, rail, leaders = Place(r, self.nodes), None, None
        if len(self.nodes) > 1:
            rail, leaders = (Room(table, r, self._pass_turn, self.recipe.deadline) for table in (self.rails, self.leaders))
        meeting = Meeting(place, self.blocks[r], rail, leaders, self.recipe.round.exchange)
        with self.turn:
            try:
                counts = [x.rows for x in self.shares]
                outcome = train(self.shares[r], counts, self.recipe, self.start, meeting, self.observer, self.keep, self.held[r])
                if r == 0:
                    self.outcome = replace(outcome, weights=outcome.weights.clone(), engine=LocalEngine.name)
            except BaseException as error:
                self.errors[r] = error
                meeting.fail()

    def _pass_turn(self, tries: int) -> None:
        state = torch.get_rng_state()
        self.turn.release()
        time.sleep(0 if tries < 100 else 1e-4)
        self.turn.acquire()
        torch.set_rng_state(state)
