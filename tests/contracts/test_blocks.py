"""The memory that the ranks of one node share: they meet, they see each other's numbers, and they learn of a loss.

One contract, two kinds of ranks: threads over private memory, and processes that were started apart over one file.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest
import torch

from bigdl_lite.comm.block import Block, Size, create, home, join, private
from bigdl_lite.errors import BigDLError, MeetingTimeout, PeerLost
from bigdl_lite.vector import slices

pytestmark = pytest.mark.timeout(60)

N, MEETINGS, LONG = 37, 1000, 50.0  # LONG: no test that works waits for it

# ---- what a rank does; it returns what it saw, or raises ----------------------------------------------------------------


def meet(block: Block, times: int) -> bool:
    """Every round: all write a gradient, each sums its slice into the weights, all look at the whole."""
    me, q = block.me, block.q
    start, stop = slices(N, q)[me]
    for turn in range(times):
        block.grads[me].fill_(turn * 10.0 + me)
        block.wait()
        block.weights[start:stop] = sum(grad[start:stop] for grad in block.grads)
        block.wait()
        expected = q * turn * 10.0 + q * (q - 1) / 2
        if not bool((block.weights == expected).all()):
            return False
    return True


def fail_at_the_third(block: Block, culprit: int) -> bool:
    for turn in range(10):
        if block.me == culprit and turn == 2:
            block.fail()
            return True
        block.wait()
    return False


def never_come(block: Block, culprit: int) -> bool:
    """The culprit lives, but does not come to the second meeting; it leaves when the others have given up."""
    block.wait()
    if block.me != culprit:
        try:
            block.wait()
        finally:
            block.scratch[block.me, 0] = 1.0
        return False
    pause = threading.Event()
    while block.scratch[:, 0].sum() < block.q - 1:
        pause.wait(1e-3)
    return True


def die_at_the_third(block: Block, culprit: int) -> bool:
    for turn in range(10):
        if block.me == culprit and turn == 2:
            os._exit(9)  # as the kernel's out-of-memory killer would: no finally, no goodbye
        block.wait()
    return False


# ---- ranks as threads, ranks as processes -------------------------------------------------------------------------------


def size_of(q: int) -> Size:
    return Size(N, q, q, 6, 3)


def threads(q: int, act: Callable[..., bool], *args: Any, deadline: float = LONG) -> list[Any]:
    memory, seen = private(size_of(q).nbytes), [None] * q

    def rank(r: int) -> None:
        try:
            seen[r] = act(Block(memory, size_of(q), r, deadline, watch=False), *args)
        except BigDLError as error:
            seen[r] = error

    started = [threading.Thread(target=rank, args=(r,), daemon=True) for r in range(q)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    return seen


def _rank(path: Path, q: int, r: int, deadline: float, tell: Connection, act: Callable[..., bool], args: Any) -> None:
    torch.set_num_threads(1)
    size = size_of(q)
    try:
        memory = create(path, size.nbytes) if r == 0 else join(path, size.nbytes, LONG)
        block = Block(memory, size, r, deadline)
        block.wait()
        if r == 0:
            path.unlink()
        tell.send(act(block, *args))
    except BigDLError as error:
        tell.send(error)


@pytest.fixture(scope="module")
def starter() -> Any:
    """Forks ranks off a clean process that has torch already; pytest's own may hold threads, sockets and a JVM."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bigdl_lite.comm.block", __name__])
    return context


@pytest.fixture
def processes(starter: Any, tmp_path: Path) -> Iterator[Callable[..., list[Any]]]:
    alive: list[Any] = []

    def run(q: int, act: Callable[..., bool], *args: Any, deadline: float = LONG) -> list[Any]:
        path = tmp_path / "block"
        path.touch(mode=0o600)
        ends = []
        for r in range(q):
            mine, theirs = starter.Pipe(duplex=False)
            process = starter.Process(target=_rank, args=(path, q, r, deadline, theirs, act, args), daemon=True)
            process.start()
            theirs.close()
            alive.append(process)
            ends.append(mine)
        seen: dict[Any, Any] = {}
        while len(seen) < q:
            ready = wait([end for end in ends if end not in seen], timeout=LONG)
            assert ready, "a rank neither returned nor died"
            for end in ready:
                try:
                    seen[end] = end.recv()
                except EOFError:
                    seen[end] = "died"
        assert not path.exists()
        return [seen[end] for end in ends]

    yield run
    for process in alive:
        process.kill()
        process.join()


@pytest.fixture(params=["threads", "processes"])
def ranks(request: pytest.FixtureRequest) -> Callable[..., list[Any]]:
    return threads if request.param == "threads" else request.getfixturevalue("processes")


# ---- the contract -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("q", [1, 2, 3])
def test_ranks_meet_a_thousand_times_and_always_see_the_sum(ranks: Callable[..., list[Any]], q: int) -> None:
    assert ranks(q, meet, MEETINGS) == [True] * q


def test_a_rank_that_fails_frees_the_others_and_is_named(ranks: Callable[..., list[Any]]) -> None:
    first, second, third = ranks(3, fail_at_the_third, 1)
    assert second is True
    for error in (first, third):
        assert isinstance(error, PeerLost) and "local rank 1 failed" in str(error)


def test_a_rank_that_does_not_come_is_named_at_the_deadline(ranks: Callable[..., list[Any]]) -> None:
    first, second, third = ranks(3, never_come, 1, deadline=0.3)
    assert second is True
    for error in (first, third):
        assert isinstance(error, MeetingTimeout) and "[1] of 3" in str(error), error


def test_a_process_that_is_killed_is_noticed_long_before_the_deadline(processes: Callable[..., list[Any]]) -> None:
    first, second, third = processes(3, die_at_the_third, 1)
    assert second == "died"
    assert all(isinstance(error, PeerLost) for error in (first, third))  # a wait to the deadline is a MeetingTimeout
    assert any("is gone; was it killed for memory?" in str(error) for error in (first, third))


# ---- the memory ---------------------------------------------------------------------------------------------------------

SIZES = [
    Size(N, 3, 2, 6, 3), Size(5000, 4, 4, 9, 0), Size(1, 1, 1, 6, 0, torch.float64), Size(1025, 2, 2, 6, 1, torch.bfloat16),
]  # fmt: skip
every_size = pytest.mark.parametrize("size", SIZES, ids=str)


@every_size
def test_a_block_takes_exactly_the_memory_that_its_size_says(size: Size, tmp_path: Path) -> None:
    path = tmp_path / "block"
    path.touch()
    block = Block(create(path, size.nbytes), size, 0, LONG, watch=False)
    assert path.stat().st_size == size.nbytes and path.stat().st_blocks * 512 >= size.nbytes  # reserved, not sparse
    parts = [block.weights, *block.grads, block.sides, block.scratch]
    starts = [x.data_ptr() - block.weights.data_ptr() for x in parts if x.numel()]
    ends = [x.data_ptr() - block.weights.data_ptr() + x.nbytes for x in parts if x.numel()]
    assert all(stop <= start for stop, start in zip(ends[:-1], starts[1:], strict=True)), "parts overlap"
    header = 4096 * -(-8 * (64 + 2 * size.q) // 4096)
    assert header + -(-ends[-1] // 4096) * 4096 == size.nbytes


@every_size
def test_every_part_has_the_shape_and_dtype_that_its_legend_says_and_starts_at_a_page(size: Size) -> None:
    block = Block(private(size.nbytes), size, 0, LONG, watch=False)
    assert block.weights.shape == (size.n,) and len(block.grads) == size.q
    assert all(grad.shape == (size.n,) and grad.dtype == size.dtype == block.weights.dtype for grad in block.grads)
    assert block.sides.shape == (size.p, size.s) and block.scratch.shape == (size.p, size.w)
    assert block.sides.dtype == block.scratch.dtype == torch.float64
    assert all(x.data_ptr() % 4096 == 0 for x in (block.weights, *block.grads, block.sides))


def test_a_block_that_was_let_go_is_unmapped_and_its_file_is_gone(tmp_path: Path) -> None:
    path, size = tmp_path / "let-go", size_of(2)
    path.touch()
    mine, theirs = create(path, size.nbytes), join(path, size.nbytes, LONG)
    blocks = [Block(mine, size, 0, LONG), Block(theirs, size, 1, LONG)]
    path.unlink()
    blocks[0].weights[3] = 7.0
    assert blocks[1].weights[3] == 7.0  # lives on until its last rank lets go
    assert "let-go" in Path("/proc/self/maps").read_text()
    del mine, theirs
    for block in blocks:
        block.close()
    gc.collect()
    assert "let-go" not in Path("/proc/self/maps").read_text() and not path.exists()


def test_a_disk_without_room_is_an_error_and_not_a_crash(tmp_path: Path) -> None:
    path = tmp_path / "block"
    path.touch()
    with pytest.raises(OSError):
        create(path, 1 << 60)


@pytest.mark.parametrize("written", [None, 0, 100, size_of(2).nbytes], ids=["no file", "empty", "short", "zeros"])
def test_a_block_that_is_not_ready_is_not_joined(tmp_path: Path, written: int | None) -> None:
    path = tmp_path / "block"
    if written is not None:
        path.write_bytes(bytes(written))
    with pytest.raises(MeetingTimeout, match="no shared block appeared at"):
        join(path, size_of(2).nbytes, 0.05)


def test_a_block_lives_in_shared_memory_where_it_fits_and_on_the_local_disk_where_not() -> None:
    assert home(1, "/scratch") == ("/dev/shm" if os.access("/dev/shm", os.W_OK) else "/scratch")
    assert home(1 << 60, "/scratch") == "/scratch"


def test_waiting_calls_idle_with_the_number_of_tries() -> None:
    memory, size, tries = private(size_of(2).nbytes), size_of(2), []
    other = Block(memory, size, 1, LONG, watch=False)

    def idle(number: int) -> None:
        tries.append(number)
        if number == 4:
            other.wait()

    Block(memory, size, 0, LONG, idle, watch=False).wait()
    assert tries == [0, 1, 2, 3, 4]
