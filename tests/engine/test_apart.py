"""Peers in the engines: one result whoever runs it, saved and resumed, told to the history, and refused by name where it cannot be."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam

from bigdl_lite.algorithms import CATALOGUE, Round, TorchOptimizer, with_exchange
from bigdl_lite.algorithms.gossip import Choco, Difference, Whole, gossip
from bigdl_lite.algorithms.pipe import pipe_sgd
from bigdl_lite.algorithms.quasiglobal import qg_dsgdm
from bigdl_lite.comm.block import Block, private
from bigdl_lite.comm.graph import ShiftOne
from bigdl_lite.comm.group import Group, Store
from bigdl_lite.engine.keeper import Keep, Keeper, forget
from bigdl_lite.engine.meeting import Meeting, Place
from bigdl_lite.engine.rank import block_size, train
from bigdl_lite.engine.recipe import Outcome, Recipe, Saving, Start, silent
from bigdl_lite.errors import CheckpointError, DivergedError, PeerLost, RecipeError
from bigdl_lite.model.replica import Replica
from bigdl_lite.wire.codec import BFloat16
from bigdl_lite.wire.lossy import MinMax8, Sign
from bigdl_lite.wire.sparse import TopK
from tests.engine import test_meeting as nodes

pytestmark = pytest.mark.timeout(60)

PLAIN = partial(SGD, lr=0.1)
MOMENTUM = partial(SGD, lr=0.05, momentum=0.9)

# algorithm, optimizer: what needs no clock, so that every engine must give the same bits
METHODS: dict[str, tuple[Any, Any]] = {
    "d-psgd": (CATALOGUE["d-psgd"], MOMENTUM),
    "dsgd on a star": (gossip("star"), partial(Adam, lr=0.01)),
    "every second step": (gossip("ring", each=2), PLAIN),
    "shift-one": (CATALOGUE["shift-one"], PLAIN),
    "one-peer-exponential": (CATALOGUE["one-peer-exponential"], PLAIN),
    "matcha": (CATALOGUE["matcha"], PLAIN),
    "dcd-psgd": (gossip("ring", Difference(MinMax8(group=64))), PLAIN),
    "choco-sgd": (gossip("ring", Choco(TopK(0.2), gamma=0.3)), PLAIN),
    "qg-dsgdm": (CATALOGUE["qg-dsgdm"], MOMENTUM),
    "qg-dsgdm-n, every third step": (qg_dsgdm("complete", nesterov=True, each=3), partial(SGD, lr=0.05, momentum=0.9, nesterov=True)),
    "qg-dadam": (CATALOGUE["qg-dadam"], partial(Adam, lr=0.01)),
    "pipe-sgd": (CATALOGUE["pipe-sgd"], PLAIN),
    "pipe-sgd, sign, warm-up": (pipe_sgd(Sign(group=64), warmup=4), PLAIN),
}  # fmt: skip
every_method = pytest.mark.parametrize("name", METHODS)


def recipe(name: str | Callable[..., Round], p: int, optimizer: Any = None, **settings: Any) -> tuple[Recipe, Start]:
    algorithm, usual = METHODS[name] if isinstance(name, str) else (name, PLAIN)
    made, start = nodes.recipe(settings.pop("module", None) or nodes.net(), p, optimizer or usual, **settings)
    round_ = algorithm(made.round.advance)
    replica = Replica(made.blueprint, start.weights.clone(), None, start.constants, made.loss)
    round_.advance.check(replica)
    return replace(made, round=prepared(round_, made, replica, p)), start


def prepared(round_: Round, made: Recipe, replica: Replica, p: int) -> Round:
    return replace(round_, peer=round_.peer.prepared(made.blueprint, replica, round_.advance, p)) if round_.peer else round_


def apart(made: Recipe, start: Start, keep: Keep = forget, watch: Any = None) -> list[Any]:
    """Every rank in a thread of its own, with memory of its own and links to the others; what each returned or raised."""
    p, places = made.num_workers, tuple((r,) for r in range(made.num_workers))
    hall = Store(nodes.HOST, 0, True, made.deadline)
    given, seen = nodes.shares(p), [None] * p

    def rank(r: int) -> None:
        size = block_size(made, 1)
        block = Block(private(size.nbytes), size, 0, made.deadline, watch=False)
        rail = leaders = reach = None
        if p > 1:
            store = Store(nodes.HOST, hall.port, False, made.deadline)
            rail, leaders = (Group(store, name, r, p, nodes.HOST) for name in ("rail", "leaders"))
            reach = (store, nodes.HOST)
        meeting = Meeting(Place(r, places), block, rail, leaders, None, reach)
        try:
            if watch:
                watch(r, meeting)
            found = train(given[r], [s.rows for s in given], made, start, meeting, silent, keep)
            seen[r] = replace(found, weights=found.weights.clone())
            meeting.close()
        except BaseException as error:
            seen[r] = error
            meeting.fail()

    threads = [threading.Thread(target=rank, args=(r,), daemon=True) for r in range(p)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(50)
    assert not any(thread.is_alive() for thread in threads), "a rank hangs"
    return seen


def steps(outcome: Outcome) -> list[dict[str, Any]]:
    return [line for line in outcome.history if "step" in line]


def epochs(outcome: Outcome) -> list[dict[str, Any]]:
    return [line for line in outcome.history if "steps" in line]


# ---- one result ---------------------------------------------------------------------------------------------------------


@every_method
def test_ranks_with_links_give_the_bits_of_ranks_that_take_turns(name: str) -> None:
    made, start = recipe(name, 4)
    local, found = nodes.locally(made, start), nodes.outcomes(apart(made, start))
    assert all(torch.equal(x.weights, local.weights) and torch.equal(x.buffers, local.buffers) for x in found)
    assert [x["loss"] for x in found[0].history] == [x["loss"] for x in local.history]
    assert not torch.equal(local.weights, start.weights)


@every_method
def test_one_worker_is_plain_torch(name: str) -> None:
    """U1: nobody to talk to, no byte sent; but for codecs, quasi-global momentum and the delay, exactly torch's own loop."""
    made, start = recipe(name, 1)
    ours = nodes.locally(made, start)
    assert sum(x["bytes_sent"] for x in steps(ours)) == 0
    if any(word in name for word in ("dcd", "choco", "qg", "pipe")):
        return
    plain = nodes.locally(*nodes.recipe(nodes.net(), 1, METHODS[name][1]))
    torch.testing.assert_close(ours.weights, plain.weights, rtol=0, atol=1e-6)
    assert ours.weights.shape == plain.weights.shape


@pytest.mark.parametrize("p", [2, 3, 4])
def test_a_complete_graph_with_equal_weights_is_synchronous_sgd(p: int) -> None:
    """Also with shares of different lengths, one of them empty, and a last batch that divides nothing."""
    made, start = recipe(gossip("complete"), p)
    synchronous = nodes.locally(*nodes.recipe(nodes.net(), p, PLAIN))
    torch.testing.assert_close(nodes.locally(made, start).weights, synchronous.weights, rtol=0, atol=1e-6)
    on_a_ring, _ = recipe(gossip("star"), p)
    if p > 2:
        other = nodes.locally(on_a_ring, start).weights
        assert not torch.allclose(other, synchronous.weights, atol=1e-6), "the comparison can fail"


def test_buffers_are_those_of_all_ranks_at_a_report() -> None:
    norm = nodes.net(nn.BatchNorm1d(60))
    made, start = recipe("d-psgd", 2, module=norm, batch_size=41)
    with_links, local = nodes.outcomes(apart(made, start)), nodes.locally(made, start)
    assert all(torch.equal(x.buffers, local.buffers) for x in with_links)
    assert not torch.equal(local.buffers, start.buffers)


# ---- what a fit tells ------------------------------------------------------------------------------------------------------


def test_every_step_has_a_line_and_every_epoch_the_distance_from_the_mean() -> None:
    made, start = recipe("d-psgd", 4)
    told = nodes.outcomes(apart(made, start))[0]
    assert [x["step"] for x in steps(told)] == list(range(15)) and [x["steps"] for x in epochs(told)] == [5, 5, 5]
    assert sum(x["rows"] for x in steps(told)) == 3 * 41
    assert all(x["consensus"] > 0 for x in epochs(told))
    alike, start = recipe("pipe-sgd", 4)
    assert all("consensus" not in x for x in epochs(nodes.locally(alike, start)))


@pytest.mark.parametrize(("name", "codec_bytes", "peers"), [
    ("d-psgd", lambda n: 4 * n, 2), ("qg-dsgdm", lambda n: 4 * n, 2), ("qg-dadam", lambda n: 4 * n, 2),
    ("shift-one", lambda n: 4 * n, 1), ("dcd-psgd", lambda n: MinMax8(group=64).nbytes(n), 2),
])  # fmt: skip
def test_bytes_are_those_of_the_card(name: str, codec_bytes: Callable[[int], int], peers: int) -> None:
    """What reports cost comes beside it: the same for every method, so the difference to a method that is silent is exact."""
    made, start = recipe(name, 4, epochs=1)
    silent_, _ = recipe(gossip("ring", each=1000), 4, epochs=1)
    sent = [sum(x["bytes_sent"] for x in steps(nodes.locally(x, start))) for x in (made, silent_)]
    n, count = made.blueprint.layout.n, 5
    assert sent[0] - sent[1] == 4 * count * peers * codec_bytes(n)


# ---- a state, and going on --------------------------------------------------------------------------------------------------


@every_method
@pytest.mark.parametrize("at", [5, 7], ids=["between epochs", "inside an epoch"])
def test_a_fit_goes_on_to_the_same_bits(name: str, at: int) -> None:
    made, start = recipe(name, 3)
    whole = nodes.locally(made, start)
    kept: list[Any] = []

    class Remembering(Keeper):
        def __call__(self, part: Any) -> None:
            super().__call__(replace(part, weights=part.weights.clone()))
            if self.kept == at and not kept:
                kept.append(self.last())

    saving = replace(made, saving=Saving(at, "step"))
    keeper = Remembering(saving)
    again = locally(saving, start, keeper)
    assert torch.equal(again.weights, whole.weights), "to save changes nothing"
    resumed, lines = kept[0]
    assert resumed.now.step == at
    rest = nodes.locally(replace(made, saving=None), replace(resumed, constants=start.constants))
    assert torch.equal(rest.weights, whole.weights)
    assert [x["loss"] for x in [*lines, *rest.history] if "step" in x] == [x["loss"] for x in steps(whole)]


def locally(made: Recipe, start: Start, keep: Keep) -> Outcome:
    from bigdl_lite.engine.local import LocalEngine

    return LocalEngine().fit(frames(made.num_workers), made, start, silent, keep)


def frames(p: int) -> Sequence[Any]:
    import pyarrow as pa

    schema = pa.schema([("x", pa.list_(pa.float32())), ("y", pa.int64())])
    return [
        [pa.RecordBatch.from_pydict({"x": s.inputs[0].tolist(), "y": s.target.tolist()}, schema=schema)] for s in nodes.shares(p)
    ]  # fmt: skip


def test_the_models_of_other_numbers_of_workers_are_refused() -> None:
    made, start = recipe("d-psgd", 3)
    keeper = Keeper(replace(made, saving=Saving(1)))
    locally(replace(made, saving=Saving(1)), start, keeper)
    saved = keeper.last()
    assert saved is not None
    other, _ = recipe("d-psgd", 2, epochs=4)
    with pytest.raises(CheckpointError, match="weights of 3 workers"):
        nodes.locally(other, replace(saved[0], constants=start.constants))


def test_models_that_are_alike_go_on_with_another_number_of_workers() -> None:
    made, start = recipe("pipe-sgd", 3, epochs=2)
    keeper = Keeper(replace(made, saving=Saving(1)))
    locally(replace(made, saving=Saving(1)), start, keeper)
    saved = keeper.last()
    assert saved is not None
    other, _ = recipe("pipe-sgd", 2, epochs=4)
    again = nodes.locally(other, replace(saved[0], constants=start.constants))
    assert [x["step"] for x in steps(again)] == list(range(10, 20))


# ---- what cannot be ---------------------------------------------------------------------------------------------------------


def test_a_dead_neighbour_ends_the_others_and_nobody_waits() -> None:
    made, start = recipe("d-psgd", 4, deadline=5.0)

    def watch(rank: int, meeting: Meeting) -> None:
        if rank == 2:
            calls = []
            swap = meeting.rail.swap

            def dies(*given: Any) -> list[Tensor]:
                calls.append(1)
                if len(calls) == 4:
                    raise OSError("the machine is gone")
                return swap(*given)

            meeting.rail.swap = dies

    seen = apart(made, start, watch=watch)
    assert isinstance(seen[2], OSError)
    assert all(isinstance(x, PeerLost) for r, x in enumerate(seen) if r != 2)


@pytest.mark.parametrize("name", ["d-psgd", "dcd-psgd", "pipe-sgd"])
def test_numbers_that_are_none_end_the_fit_with_step_and_rank(name: str) -> None:
    made, start = recipe(name, 2, partial(SGD, lr=3e38), epochs=5)
    with pytest.raises(DivergedError, match=r"step \d"):
        nodes.locally(made, start)


def test_what_a_method_cannot_do_is_refused_on_the_driver() -> None:
    with pytest.raises(RecipeError, match="stay the same"):
        recipe(gossip(mix=Difference(MinMax8()), plan=CATALOGUE["shift-one"](TorchOptimizer(PLAIN)).peer.plan), 4)
    made, _ = nodes.recipe(nodes.net(), 2, PLAIN)
    with pytest.raises(RecipeError, match="inside already"):
        with_exchange(pipe_sgd(MinMax8())(TorchOptimizer(PLAIN)), "bf16", made.blueprint)
    assert with_exchange(pipe_sgd()(TorchOptimizer(PLAIN)), "bf16", made.blueprint).peer.exchange.codec == BFloat16()
    with pytest.raises(RecipeError, match="and a plan"):
        gossip("star", plan=ShiftOne)
    with pytest.raises(RecipeError, match="early"):
        gossip("ring", MinMax8(), early=True)
    with pytest.raises(RecipeError, match="32"):
        recipe(gossip("davis"), 4)
    with pytest.raises(RecipeError, match="momentum"):
        recipe("qg-dsgdm", 2, PLAIN)
    with pytest.raises(RecipeError, match=r"torch\.optim\.Adam"):
        recipe("qg-dadam", 2, MOMENTUM)
    assert gossip("ring", Whole())(TorchOptimizer(PLAIN)).peer == gossip("ring")(TorchOptimizer(PLAIN)).peer


