"""What is decided about GPUs, without one: from an address to a device, one decision for all ranks, how they then meet.

Where a decision ends in arithmetic, the device is the CPU: a rank that stages, or has vectors of its own, does the same there.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam

from bigdl_lite import batch as batch_module
from bigdl_lite.batch import Batch
from bigdl_lite.comm import group as group_module
from bigdl_lite.comm.block import Block, Size, private
from bigdl_lite.comm.group import Group, Store
from bigdl_lite.comm.room import Room, Table
from bigdl_lite.engine import device as device_module
from bigdl_lite.engine import tasks
from bigdl_lite.engine.cache import forget, gradient_of, replica_of
from bigdl_lite.engine.device import CPU, Choice, Given, Noting, Staging, current, decide, index_of, look, task_device
from bigdl_lite.engine.meeting import Meeting, Place
from bigdl_lite.engine.order import Order
from bigdl_lite.engine.rank import block_size, train
from bigdl_lite.engine.recipe import Outcome, Recipe, Start, silent
from bigdl_lite.errors import RecipeError
from bigdl_lite.model.batchnorm import synchronised
from tests.contracts.test_groups import in_order, ranks, vector
from tests.engine.test_meeting import NODES, equal, locally, net, outcomes, recipe, shares

pytestmark = pytest.mark.timeout(60)

HOST, DEADLINE = "127.0.0.1", 20.0
A, B = "GPU-aaaa0000-1111", "GPU-bbbb0000-2222"

# ---- an address ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "visible", "count", "uuids", "index"),
    [
        ("0", None, 2, [], 0), ("1", None, 2, [], 1), ("3", "2,3", 2, [], 1), ("2", "2,3", 2, [], 0), ("0", "0", 1, [], 0),
        ("0", "1,0", 2, [], 1), ("3", " 2 , 3 ", 2, [], 1), ("2", "2,-1,3", 1, [], 0),
        (A, None, 2, [B, A], 1), (A, "1,0", 2, [B, A], 1), (A, f"{B},{A}", 2, [], 1), (A, f"{B},GPU-aaaa", 2, [], 1),
        ("GPU-bbbb", None, 2, [A, B], 1), ("MIG-1f2e", "MIG-1f2e", 1, [], 0),
    ],
)  # fmt: skip
def test_an_address_is_a_number_of_torchs(address: str, visible: str | None, count: int, uuids: list[str], index: int) -> None:
    assert index_of(address, visible, count, uuids) == index


@pytest.mark.parametrize(
    ("address", "visible", "count", "uuids"),
    [
        ("2", None, 2, []),  # the machine has no such GPU
        ("0", "2,3", 2, []),  # hidden: what torch calls 0 is another
        ("3", "2,-1,3", 1, []),  # CUDA's list ends at the first that is none
        ("3", "2,3", 1, []),  # listed, but CUDA does not show it
        ("0", "", 0, []), ("0", "-1", 0, []), ("0", f"{A},{B}", 2, []), (A, None, 2, []), (A, None, 1, [B]),
        ("GPU-", f"{A},{B}", 2, []),
    ],
)  # fmt: skip
def test_an_address_that_is_not_among_the_visible_is_an_error_with_both(
    address: str, visible: str | None, count: int, uuids: list[str]
) -> None:
    with pytest.raises(RecipeError) as caught:
        index_of(address, visible, count, uuids)
    assert repr(address) in str(caught.value) and f"torch sees {count}" in str(caught.value)
    assert ("is not set" if visible is None else f"CUDA_VISIBLE_DEVICES is {visible!r}") in str(caught.value)


def test_an_address_that_is_no_address_is_an_error() -> None:
    with pytest.raises(RecipeError, match="'tpu0', which is neither a number nor a UUID"):
        index_of("tpu0", None, 1)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A process that sees so many GPUs, under this CUDA_VISIBLE_DEVICES; nothing can be computed on those in `broken`."""

    def there(count: int, visible: str | None = None, broken: Sequence[int] = (), nccl: bool = True) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace())
        monkeypatch.setattr(device_module, "_broken", lambda i: "torch cannot compute on it" if i in broken else "")
        monkeypatch.setattr(device_module, "has_nccl", lambda: nccl)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    return there


def test_two_tasks_of_one_worker_have_the_gpus_that_spark_gave_them_and_no_variable_changes(cuda: Any) -> None:
    cuda(2, "2,3")
    before = dict(os.environ)
    assert [look([x], "auto", "h").index for x in ("2", "3", "2")] == [0, 1, 0]
    assert [task_device([x], "auto")[0] for x in ("3", "2")] == [torch.device("cuda:1"), torch.device("cuda:0")]
    assert dict(os.environ) == before
    os.environ["CUDA_VISIBLE_DEVICES"] = "3"  # negative control: had the first task left it, the second would find nothing
    assert "'2'" in look(["2"], "auto").why


def test_without_need_cuda_is_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("CUDA was asked"))
    assert look([], "auto", "h") == look(["0"], "cpu", "h") == Given("h")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_torch_that_cannot_use_the_gpu_says_why() -> None:
    why = look(["1"], "auto", "h").why
    assert "built without CUDA" in why or "finds no CUDA device" in why
    assert task_device(["1"], "auto") == (CPU, why)
    with pytest.raises(RecipeError, match=r"device is 'cuda', and this task was given GPU 1, but torch .* device='auto'"):
        task_device(["1"], "cuda")


def test_a_gpu_that_is_taken_by_others_is_none(cuda: Any) -> None:
    cuda(2, broken=[1])
    assert (look(["0"], "auto").index, look(["1"], "auto").index) == (0, -1)
    assert look(["1"], "auto").why == "torch cannot compute on it"


# ---- all ranks ----------------------------------------------------------------------------------------------------------


def on(gpu: str, index: int = 0, nccl: bool = True) -> Given:
    return Given("h", str(index), index, gpu, 2, nccl)


BARE, BLIND, SEES = Given("h"), Given("h", "1", why="torch is built without CUDA"), Given("h", count=2, nccl=True)


@pytest.mark.parametrize(
    ("told", "asked", "more", "choice"),
    [
        ([BARE, BARE], "auto", {}, Choice()),
        ([on("a"), on("b")], "cpu", {}, Choice()),
        ([on("a"), on("b", 1)], "auto", {}, Choice("nccl", (0, 1))),
        ([on("a"), on("b", 0)], "cuda", {}, Choice("nccl", (0, 0))),  # of two machines
        ([on("a"), on("a")], "auto", {}, Choice("memory", (0, 0))),  # NCCL refuses two ranks of one GPU
        ([on("a"), on("b", 1), on("b", 1)], "auto", {}, Choice("memory", (0, 1, 1))),
        ([on("a"), on("b", 1, nccl=False)], "auto", {}, Choice("memory", (0, 1))),
        ([on("a", nccl=False)], "auto", {}, Choice("nccl", (0,))),  # meets nobody
        ([on("a"), on("b", 1)], "auto", {"hierarchical": True}, Choice("memory", (0, 1))),
        ([on("a"), on("a")], "auto", {"apart": True}, Choice("apart", (0, 0))),
        ([SEES, SEES, SEES], "cuda", {}, Choice("memory", (0, 1, 0))),  # nothing given, two there: in turn
        ([SEES, SEES], "cuda", {}, Choice("nccl", (0, 1))),
    ],
)  # fmt: skip
def test_one_decision_for_all(told: list[Given], asked: str, more: dict[str, bool], choice: Choice) -> None:
    found = decide(told, asked, **more)
    assert (found.meeting, found.indices, found.warns) == (choice.meeting, choice.indices, False)
    assert bool(found.line) == bool(found.indices)  # who computes on CPUs as always hears nothing
    assert [found.device(r).type for r in range(len(told))] == ["cuda" if choice.indices else "cpu"] * len(told)


@pytest.mark.parametrize(
    ("told", "says"),
    [
        ([BLIND, BLIND], "2 ranks have no GPU that torch can use; rank 0 on h was given GPU 1, but torch is built without CUDA"),
        ([on("a"), BLIND, on("c")], "1 of 3 ranks have no GPU that torch can use, and ranks on CPUs and GPUs do not mix; rank 1 on h"),
        ([on("a"), BARE], "1 of 2 ranks have no GPU that torch can use, and ranks on CPUs and GPUs do not mix; rank 1 on h was "),
    ],
)  # fmt: skip
def test_where_some_cannot_all_take_the_cpu_and_one_line_says_why(told: list[Given], says: str) -> None:
    found = decide(told)
    assert found.indices == () and found.warns and says in found.line and found.line.startswith("training on CPUs: ")
    with pytest.raises(RecipeError) as caught:
        decide(told, "cuda")
    assert says in str(caught.value) and "device='auto'" in str(caught.value)


def test_cuda_without_any_gpu_is_an_error() -> None:
    with pytest.raises(RecipeError, match=r"2 ranks have no GPU .* was given no GPU, and torch sees none: .*spark\.task\.resource"):
        decide([BARE, BARE], "cuda")


def test_a_note_is_logged_once_and_all_else_is_passed_on(caplog: pytest.LogCaptureFixture) -> None:
    heard: list[Any] = []

    class Observer:
        def __call__(self, event: Any) -> None:
            heard.append(event)

        def asked(self) -> bool:
            return True

    noting = Noting(Observer())
    with caplog.at_level(logging.INFO, "bigdl_lite"):
        for event in ({"note": "slow", "warns": True}, {"step": 1}, {"note": "slow", "warns": True}, {"note": "", "warns": False}):
            noting(event)
    assert heard == [{"step": 1}] and noting.asked() and not hasattr(Noting(silent), "asked")
    assert [(record.levelname, record.message) for record in caplog.records] == [("WARNING", "slow")]


def test_the_current_gpu_is_as_it_was_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    class device:
        def __init__(self, wanted: torch.device) -> None:
            self.wanted = wanted

        def __enter__(self) -> None:
            seen.append(self.wanted)

        def __exit__(self, *error: Any) -> None:
            seen.append("as before")

    monkeypatch.setattr(torch.cuda, "device", device)
    with pytest.raises(ZeroDivisionError), current(torch.device("cuda:1")):
        1 / 0  # noqa: B018
    with current(CPU):
        pass
    assert seen == [torch.device("cuda:1"), "as before"]


# ---- copies -------------------------------------------------------------------------------------------------------------


def test_rows_go_to_a_gpu_through_memory_that_is_page_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []

    class Locked:
        def __init__(self, x: Tensor) -> None:
            self.x = x

        def to(self, device: torch.device, non_blocking: bool) -> Tensor:
            sent.append((device, non_blocking))
            return self.x

    monkeypatch.setattr(batch_module, "_locked", lambda x, index: Locked(x.index_select(0, index)))
    rows, index = Batch((torch.arange(6.0),), torch.arange(6)), torch.tensor([4, 1])
    assert rows.take(index).inputs[0].tolist() == rows.take(index, CPU).inputs[0].tolist() == [4.0, 1.0] and not sent
    taken = rows.take(index, torch.device("cuda:1"))
    assert taken.inputs[0].tolist() == [4.0, 1.0] and taken.target.tolist() == [4, 1]
    assert sent == [(torch.device("cuda:1"), True)] * 2


@pytest.mark.parametrize("code", [0, 712])
def test_what_a_rank_copies_is_page_locked_and_let_go(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """Its own row and the weights, not the rows of others; where the system refuses, copies are only slower."""
    size, calls = Size(1000, 2, 2, 0, 0), []
    block = Block(private(size.nbytes), size, 1, 1.0, watch=False)
    cudart = SimpleNamespace(
        cudaHostRegister=lambda at, nbytes, flags: calls.append(("lock", at, nbytes)) or code,
        cudaHostUnregister=lambda at: calls.append(("free", at)) or 0,
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    mine = [block.weights.data_ptr(), block.grads[1].data_ptr()]
    assert not any(at % 4096 for at in mine), "whole pages"
    staging = Staging(block, torch.device("cuda:0"))
    staging.close()
    staging.close()
    assert calls == [("lock", at, 4000) for at in mine] + ([] if code else [("free", at) for at in mine])
    calls.clear()
    Staging(block, CPU).close()
    assert not calls


# ---- how ranks on GPUs meet ---------------------------------------------------------------------------------------------


def spread(made: Recipe, start: Start, nodes: Sequence[tuple[int, ...]], how: str) -> list[Any]:
    """Every rank in a thread; "memory": with vectors of its own, which it stages; "nccl": and no others, with a group `near`."""
    p, nodes = made.num_workers, tuple(nodes)
    whole = [block_size(made, len(members)) for members in nodes]
    sizes = [Size(0 if how == "nccl" else s.n, s.p, s.q, s.s, s.w, s.dtype) for s in whole]
    memories = [private(size.nbytes) for size in sizes]
    rails, leaders = [Table(len(nodes)) for _ in range(p)], Table(len(nodes))
    near, given = [Table(len(members)) for members in nodes], shares(p)

    def rank(r: int) -> Outcome:
        place = Place(r, nodes)
        block = Block(memories[place.node], sizes[place.node], place.local, made.deadline, watch=False)
        rail = lead = inner = staging = None
        if how == "memory":
            staging = Staging(block, CPU)
        else:
            block.take_own(whole[place.node].n, whole[place.node].dtype, CPU)
            inner = Room(near[place.node], place.local, deadline=DEADLINE) if len(nodes[place.node]) > 1 else None
        if len(nodes) > 1:
            rail = Room(rails[place.local], place.node, deadline=DEADLINE) if place.local < place.rails else None
            lead = Room(leaders, place.node, deadline=DEADLINE) if not place.local else None
        meeting = Meeting(place, block, rail, lead, near=inner, staging=staging)
        try:
            found = train(given[r], [s.rows for s in given], made, start, meeting, silent)
            return Outcome(found.weights.clone(), found.buffers, found.history)
        except Exception:
            meeting.fail()
            raise

    return ranks(p, rank)


HOWS = pytest.mark.parametrize("how", ["memory", "nccl"])
MODULES = {"mlp": net, "batch norm of all": lambda: synchronised(net(nn.BatchNorm1d(60)))}


@HOWS
@pytest.mark.parametrize("nodes", NODES.values(), ids=NODES)
@pytest.mark.parametrize("optimizer", [partial(SGD, lr=0.1, momentum=0.9), partial(Adam, lr=0.01)], ids=["sgd", "adam"])
def test_ranks_with_vectors_of_their_own_train_as_the_local_engine_does(how: str, nodes: Any, optimizer: Any) -> None:
    made, start = recipe(net(), sum(map(len, nodes)), optimizer, clip_norm=0.5)
    equal(outcomes(spread(made, start, nodes, how)), locally(made, start))


@HOWS
@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_so_do_statistics_of_all_and_models_that_move(how: str, make: Any) -> None:
    from bigdl_lite.algorithms import local_sgd, method
    from bigdl_lite.algorithms.parts import TorchOptimizer

    nodes = ((0, 1), (2, 3))
    made, start = recipe(make(), 4, partial(SGD, lr=0.1), seed=3)
    equal(outcomes(spread(made, start, nodes, how)), locally(made, start))
    moved = Recipe(**{**made.__dict__, "round": method(local_sgd(3), TorchOptimizer(partial(SGD, lr=0.1)))})
    if make is net:
        equal(outcomes(spread(moved, start, nodes, how)), locally(moved, start))


def test_a_rank_that_does_not_stage_trains_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: the equality above rests on the copies."""
    made, start = recipe(net(), 2, partial(SGD, lr=0.1))
    monkeypatch.setattr(Staging, "store", lambda self, gradient: None)
    found = outcomes(spread(made, start, ((0, 1),), "memory"))
    assert torch.equal(found[0].weights, start.weights)


class Nccl:
    """A process group that can do what is asked of NCCL here, among threads: one call for all that a member sends and receives."""

    def __init__(self, table: Table, rank: int) -> None:
        self.room, self.rank = Room(table, rank, deadline=DEADLINE), rank

    def alltoall(self, into: list[Tensor], out: list[Tensor]) -> Any:
        assert not into[self.rank].numel() and not out[self.rank].numel(), "nothing for itself"
        assert all(x.is_contiguous() for x in (*into, *out))
        self.room._trade("alltoall", out, into)
        return SimpleNamespace(wait=lambda: None)


def test_what_nccl_is_asked_for_gives_the_same_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    p, table = 3, Table(3)
    monkeypatch.setattr(group_module, "_over_nccl", lambda store, name, rank, size, host: Nccl(table, rank))
    store = Store(HOST, 0, True, DEADLINE)
    made = [Group(store, "gpus", r, p, HOST, torch.device("cuda:0")) for r in range(p)]

    def act(r: int) -> tuple[Tensor, list[Tensor], int]:
        total = made[r].all_reduce(vector(r, 10))
        out = [torch.empty(k) for k in (4, 0, 7)]
        made[r].all_gather(vector(r, (4, 0, 7)[r]), out)
        return total, out, made[r].bytes_sent

    for total, out, _ in ranks(p, act):
        assert torch.equal(total, in_order([vector(r, 10) for r in range(p)]))
        assert all(torch.equal(x, vector(r, k)) for r, (x, k) in enumerate(zip(out, (4, 0, 7), strict=True)))




# ---- tasks of the shuffle engine ----------------------------------------------------------------------------------------


def test_a_worker_whose_next_task_has_another_gpu_has_another_replica_there(cuda: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device follows the address, task by task; the update is the same, and leaves on the CPU. "cpu:0" stands for the GPUs."""
    made, start = recipe(net(), 2, partial(SGD, lr=0.1))
    monkeypatch.setattr(tasks, "share_of", lambda run, rank, key, rows: shares(2)[rank])
    shipped = SimpleNamespace(read=lambda: start)
    now = Order(made.run, (5, 36), ((0, len(start.weights)),), round=0, epoch=0, first=(0, 0), batches=((4,), (6,)))

    def update(device: torch.device) -> Tensor:
        replica = replica_of(made, shipped, device)
        found, _ = tasks._on_cpu(*tasks.local_work(
            1, made, replica, lambda: (start.weights, start.buffers), lambda: gradient_of(made, "gradient", device), now
        ))  # fmt: skip
        assert found is not None and found.vector.device == CPU
        return found.vector.clone()

    try:
        one, other = update(CPU), update(torch.device("cpu:0"))
        assert torch.equal(one, other) and bool(one.any())
        assert replica_of(made, shipped, CPU) is replica_of(made, shipped, CPU) is not replica_of(made, shipped, torch.device("cpu:0"))
    finally:
        forget(made.run)
    cuda(2)
    for address in ("1", "0"):
        monkeypatch.setattr(tasks, "gpus", lambda address=address: (address,))
        assert tasks.device_of("cuda", 0) == torch.device("cuda", int(address)) and tasks.device_of("cpu", 0) == CPU
    cuda(0)
    with pytest.raises(RecipeError, match="this task was given GPU 0, but torch"):
        tasks.device_of("cuda", 0)
