"""The memory that the ranks of one node share: they meet, they see each other's numbers, and they learn of a loss.

One contract, two kinds of ranks: threads over private memory, and processes that were started apart over a window of the first.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest
import torch

from bigdl_lite.comm import block as block_module
from bigdl_lite.comm.block import Block, Size, create, join, mailbox, private
from bigdl_lite.comm.window import HEADER, look
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


def stay(block: Block) -> bool:
    """Writes its rank, meets the others, and waits for its end."""
    block.grads[block.me].fill_(block.me + 1.0)
    block.wait()
    signal.pause()
    return True


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


def _rank(q: int, r: int, deadline: float, tell: Connection, act: Callable[..., bool], args: Any) -> None:
    """The first rank tells the address of its mailbox, the others hear it; then all tell what they saw."""
    torch.set_num_threads(1)
    size = size_of(q)
    try:
        if r == 0:
            mail = mailbox()
            tell.send(mail.address)
            memory = create(mail, size.nbytes)
        else:
            mail = look(tell.recv())
            memory = join(mail, LONG)
        block = Block(memory, size, r, deadline)
        block.wait()
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
def start(starter: Any) -> Iterator[Callable[..., Any]]:
    """Starts ranks as processes: those, the ends of their pipes, and the address of the first one's mailbox."""
    alive: list[Any] = []

    def run(q: int, act: Callable[..., bool], *args: Any, deadline: float = LONG) -> tuple[list[Any], list[Connection], str]:
        ends = []
        for r in range(q):
            mine, theirs = starter.Pipe()
            process = starter.Process(target=_rank, args=(q, r, deadline, theirs, act, args), daemon=True)
            process.start()
            theirs.close()
            alive.append(process)
            ends.append(mine)
        assert ends[0].poll(LONG)
        address = ends[0].recv()
        for end in ends[1:]:
            end.send(address)
        return alive[-q:], ends, address

    yield run
    for process in alive:
        process.kill()
        process.join()


@pytest.fixture
def processes(start: Callable[..., Any]) -> Callable[..., list[Any]]:
    def run(q: int, act: Callable[..., bool], *args: Any, deadline: float = LONG) -> list[Any]:
        _, ends, _ = start(q, act, *args, deadline=deadline)
        seen: dict[Any, Any] = {}
        while len(seen) < q:
            ready = wait([end for end in ends if end not in seen], timeout=LONG)
            assert ready, "a rank neither returned nor died"
            for end in ready:
                try:
                    seen[end] = end.recv()
                except EOFError:
                    seen[end] = "died"
        return [seen[end] for end in ends]

    return run


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


def left() -> set[str]:
    """What ranks could have left where files outlive processes."""
    shared = {f"/dev/shm/{name}" for name in os.listdir("/dev/shm")}
    return shared | {name for name in os.listdir(tempfile.gettempdir()) if "bigdl" in name.lower()}


def test_ranks_that_are_killed_leave_nothing_in_shared_memory_or_on_disk(start: Callable[..., Any]) -> None:
    before = left()
    ranks, _, address = start(3, stay)
    mail = look(address)
    assert mail is not None
    block = Block(join(mail, LONG), size_of(3), 0, LONG, watch=False)  # a view beside theirs, to see that they are there
    pause = threading.Event()
    while [float(grad[0]) for grad in block.grads] != [1.0, 2.0, 3.0]:
        pause.wait(1e-3)
    assert left() == before and look(address) is not None
    for rank in ranks:
        os.kill(rank.pid, signal.SIGKILL)
    for rank in ranks:
        rank.join(LONG)
        assert rank.exitcode == -signal.SIGKILL
    assert left() == before and look(address) is None
    with pytest.raises(PeerLost, match="the block with it"):  # the letter is still to be read, the block is not
        join(mail, LONG)


def test_what_a_rank_left_would_be_seen() -> None:
    """Negative control."""
    before = left()
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as one, tempfile.NamedTemporaryFile(prefix="bigdl_lite-") as two:
        assert left() - before == {one.name, os.path.basename(two.name)}


# ---- the memory ---------------------------------------------------------------------------------------------------------

SIZES = [
    Size(N, 3, 2, 6, 3), Size(5000, 4, 4, 9, 0), Size(1, 1, 1, 6, 0, torch.float64), Size(1025, 2, 2, 6, 1, torch.bfloat16),
]  # fmt: skip
every_size = pytest.mark.parametrize("size", SIZES, ids=str)


@every_size
def test_a_block_takes_exactly_the_memory_that_its_size_says(size: Size) -> None:
    memory = create(mailbox(), size.nbytes)
    block = Block(memory, size, 0, LONG, watch=False)
    file = os.fstat(memory._file)
    assert file.st_size == HEADER + size.nbytes <= file.st_blocks * 512  # reserved, not sparse
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


def mapped() -> int:
    """Mappings of windows in this process."""
    return Path("/proc/self/maps").read_text().count("memfd:bigdl_lite")


def windows() -> int:
    """Windows that this process holds open."""
    links = Path("/proc/self/fd").iterdir()
    return sum("memfd:bigdl_lite" in os.readlink(link) for link in links if link.is_symlink())


def test_a_block_lives_on_until_its_last_rank_lets_go_and_is_unmapped_then() -> None:
    gc.collect()
    before, opened, size, mail = mapped(), windows(), size_of(2), mailbox()
    mine = create(mail, size.nbytes)
    theirs = join(look(mail.address), LONG)
    blocks = [Block(mine, size, 0, LONG), Block(theirs, size, 1, LONG)]
    assert mapped() == before + 3 and windows() > opened
    mine.close()
    with pytest.raises(PeerLost):  # nobody new can look
        join(look(mail.address), LONG)
    blocks[0].close()
    del mine
    blocks[1].weights[3] = 7.0
    assert blocks[1].weights[3] == 7.0 and mapped() == before + 2
    blocks[1].close()
    del theirs, mail
    gc.collect()
    assert mapped() == before and windows() == opened


def test_memory_that_is_not_there_is_an_error_and_nothing_is_reserved(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel would otherwise kill processes until there is room, and not this one first."""
    mail = mailbox()
    before = windows()
    with pytest.raises(MemoryError, match=r"share 1152921504\.6 GB, and .* GB of its memory are free"):
        create(mail, 1 << 60)
    monkeypatch.setattr(block_module, "available", lambda: 4095)
    with pytest.raises(MemoryError, match="fewer ranks on a node"):
        create(mail, 4096)
    assert windows() == before and mail.stamp == 0
    with pytest.raises(MeetingTimeout, match="no shared block appeared"):
        join(look(mail.address), 0.05)
    monkeypatch.setattr(block_module, "available", lambda: 4096)
    memory = create(mail, 4096)  # the control
    assert memory.nbytes == 4096 and windows() > before and mail.stamp == 1


def test_a_block_that_is_not_ready_is_not_joined() -> None:
    mail, size = mailbox(), size_of(2)
    with pytest.raises(MeetingTimeout, match="no shared block appeared within"):
        join(look(mail.address), 0.05)
    memory = create(mail, size.nbytes)
    memory.values(torch.uint8, 1)[0] = 5
    assert join(look(mail.address), 0.05).values(torch.uint8, 1)[0] == 5  # the control: now it is


def test_who_came_early_joins_as_soon_as_the_block_is_there() -> None:
    mail, size, seen = mailbox(), size_of(2), []
    early = threading.Thread(target=lambda: seen.append(join(look(mail.address), LONG)), daemon=True)
    early.start()
    memory = create(mail, size.nbytes)
    early.join(LONG)
    memory.values(torch.uint8, 1)[0] = 5
    assert seen[0].values(torch.uint8, 1)[0] == 5


def test_waiting_calls_idle_with_the_number_of_tries() -> None:
    memory, size, tries = private(size_of(2).nbytes), size_of(2), []
    other = Block(memory, size, 1, LONG, watch=False)

    def idle(number: int) -> None:
        tries.append(number)
        if number == 4:
            other.wait()

    Block(memory, size, 0, LONG, idle, watch=False).wait()
    assert tries == [0, 1, 2, 3, 4]
