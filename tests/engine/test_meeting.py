"""Ranks on several nodes, in one process: each node has memory of its own, and gloo runs between nodes.

The result must be the local engine's, wherever the ranks live. LocalEngine's threads take turns, these do not; torch's
random state belongs to the process, so the networks here draw nothing.

    p  ranks      M  nodes      L  ranks of the smallest node
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam

from bigdl_lite.algorithms import method
from bigdl_lite.algorithms.parts import TorchOptimizer
from bigdl_lite.batch import Batch
from bigdl_lite.comm.block import Block, private
from bigdl_lite.comm.group import Group, Store
from bigdl_lite.data.columns import Column, Columns
from bigdl_lite.engine.local import LocalEngine
from bigdl_lite.engine.meeting import SIDE, Meeting, Place
from bigdl_lite.engine.rank import block_size, train
from bigdl_lite.engine.recipe import Outcome, Recipe, Start, silent
from bigdl_lite.errors import DivergedError, MeetingTimeout, PeerLost
from bigdl_lite.model.batchnorm import synchronised
from bigdl_lite.model.layout import blueprint
from bigdl_lite.vector import slices

pytestmark = pytest.mark.timeout(60)

HOST, DEADLINE = "127.0.0.1", 20.0
FEATURES, CLASSES = 6, 3
COLUMNS = Columns((Column("x", torch.float32, 1),), Column("y", torch.int64))

NODES = {
    "one node of two": ((0, 1),),
    "two nodes of one": ((0,), (1,)),
    "two nodes of two": ((0, 1), (2, 3)),
    "two nodes of two, interleaved": ((0, 2), (1, 3)),
    "one and two": ((0,), (1, 2)),
    "two and one": ((0, 1), (2,)),
    "one, two and one": ((0,), (1, 3), (2,)),
}
every_nodes = pytest.mark.parametrize("nodes", NODES.values(), ids=NODES)


def net(*middle: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, 60), *middle, nn.Tanh(), nn.Linear(60, CLASSES))


def shares(p: int, n: int = 41) -> list[Batch]:
    """Shares of different lengths, the second one empty."""
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.standard_normal((n, FEATURES)).astype("f4"))
    y = (x @ torch.from_numpy(rng.standard_normal((FEATURES, CLASSES)).astype("f4"))).argmax(1)
    edges = [*[0, 5, 5, 20][:p], n]
    return [Batch((x[a:b],), y[a:b]) for a, b in pairwise(edges)]


def recipe(module: nn.Module, p: int, optimizer: Any, **settings: Any) -> tuple[Recipe, Start]:
    made, weights, buffers, constants = blueprint(module)
    how = method("sync-sgd", TorchOptimizer(optimizer, clip_norm=settings.pop("clip_norm", None)))
    settings = {"batch_size": 10, "epochs": 3, "deadline": DEADLINE, "loss": nn.CrossEntropyLoss(), **settings}
    made = Recipe(blueprint=made, round=how, columns=COLUMNS, num_workers=p, **settings)
    return made, Start(weights, buffers, constants)


def locally(made: Recipe, start: Start) -> Outcome:
    schema = pa.schema([("x", pa.list_(pa.float32())), ("y", pa.int64())])
    frame = [
        [pa.RecordBatch.from_pydict({"x": s.inputs[0].tolist(), "y": s.target.tolist()}, schema=schema)]
        for s in shares(made.num_workers)
    ]
    return LocalEngine().fit(frame, made, start)


def spread(made: Recipe, start: Start, nodes: Sequence[tuple[int, ...]], watch: Any = None) -> list[Any]:
    """Every rank in a thread of its own; what each returned or raised. `watch` sees each meeting before it starts."""
    p, nodes = made.num_workers, tuple(nodes)
    hall = Store(HOST, 0, True, DEADLINE)
    sizes = [block_size(made, len(ranks)) for ranks in nodes]
    memories = [private(size.nbytes) for size in sizes]
    given, seen = shares(p), [None] * p

    def rank(r: int) -> None:
        place = Place(r, nodes)
        block = Block(memories[place.node], sizes[place.node], place.local, made.deadline, watch=False)
        rail = leaders = None
        if len(nodes) > 1 and place.local < place.rails:
            store = Store(HOST, hall.port, False, DEADLINE)
            rail = Group(store, f"rail{place.local}", place.node, len(nodes), HOST)
            leaders = Group(store, "leaders", place.node, len(nodes), HOST) if place.local == 0 else None
        meeting = Meeting(place, block, rail, leaders)
        try:
            if watch:
                watch(r, meeting)
            found = train(given[r], [s.rows for s in given], made, start, meeting, silent)
            seen[r] = Outcome(found.weights.clone(), found.buffers, found.history)
            meeting.close()
        except Exception as error:
            seen[r] = error
            meeting.fail()

    threads = [threading.Thread(target=rank, args=(r,), daemon=True) for r in range(p)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return seen


def outcomes(seen: list[Any]) -> list[Outcome]:
    errors = [x for x in seen if isinstance(x, BaseException)]
    for error in sorted(errors, key=lambda x: isinstance(x, PeerLost)):  # who only lost a peer says nothing new
        raise error
    return seen


def equal(found: list[Outcome], reference: Outcome) -> None:
    """All ranks to the bit among themselves, and the reference to 1e-6."""
    for outcome in found:
        assert torch.equal(outcome.weights, found[0].weights) and torch.equal(outcome.buffers, found[0].buffers)
    torch.testing.assert_close(found[0].weights, reference.weights, rtol=0, atol=1e-6)
    torch.testing.assert_close(found[0].buffers, reference.buffers, rtol=0, atol=1e-6)


@every_nodes
@pytest.mark.parametrize("optimizer", [partial(SGD, lr=0.1, momentum=0.9), partial(Adam, lr=0.01)], ids=["sgd", "adam"])
def test_ranks_on_nodes_train_as_the_local_engine_does(nodes: tuple[tuple[int, ...], ...], optimizer: Any) -> None:
    made, start = recipe(net(), sum(map(len, nodes)), optimizer)
    reference = locally(made, start)
    assert not torch.equal(reference.weights, start.weights)
    equal(outcomes(spread(made, start, nodes)), reference)


@every_nodes
def test_clipping_and_buffers_cross_nodes(nodes: tuple[tuple[int, ...], ...]) -> None:
    """The norm is summed over owners on all nodes; running statistics are merged over all ranks."""
    settings = {"clip_norm": 0.05, "batch_size": 41}  # plain batch norm refuses a rank with one row alone
    made, start = recipe(net(nn.BatchNorm1d(60)), sum(map(len, nodes)), partial(SGD, lr=0.1), **settings)
    equal(outcomes(spread(made, start, nodes)), locally(made, start))


@every_nodes
def test_layers_that_meet_in_forward_meet_across_nodes(nodes: tuple[tuple[int, ...], ...]) -> None:
    module = synchronised(net(nn.BatchNorm1d(60)))
    made, start = recipe(module, sum(map(len, nodes)), partial(SGD, lr=0.1, momentum=0.9), batch_size=20)
    equal(outcomes(spread(made, start, nodes)), locally(made, start))


class Norm(torch.optim.Optimizer):
    """A rule that needs whole tensors."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            scale = torch.linalg.vector_norm(p) / (torch.linalg.vector_norm(p.grad) + 1e-6)
            p.sub_(p.grad * scale * self.param_groups[0]["lr"])


def test_owners_may_own_whole_tensors_or_nothing() -> None:
    made, start = recipe(net(), 4, Norm)
    equal(outcomes(spread(made, start, NODES["two nodes of two"])), locally(made, start))


def test_more_owners_than_values_are_no_trouble() -> None:
    torch.manual_seed(0)
    made, start = recipe(nn.Linear(FEATURES, CLASSES, bias=False), 4, partial(SGD, lr=0.1))
    equal(outcomes(spread(made, start, NODES["two nodes of two"])), locally(made, start))


@every_nodes
def test_the_history_counts_what_crossed_the_network(nodes: tuple[tuple[int, ...], ...]) -> None:
    made, start = recipe(net(), sum(map(len, nodes)), partial(SGD, lr=0.1), epochs=1)
    meetings: dict[int, Meeting] = {}
    found = outcomes(spread(made, start, nodes, lambda r, meeting: meetings.setdefault(r, meeting)))
    told = sum(line["bytes_sent"] for line in found[0].history if "step" in line)
    sent = sum(g.bytes_sent for m in meetings.values() for g in (m.rail, m.leaders) if g)
    # all but the table of sides that carried the last count: leaders send 6 numbers of each rank to each other node
    assert told == sent - 8 * SIDE * len(meetings) * (len(nodes) - 1)
    assert (told > 0) == (len(nodes) > 1)


def test_a_rank_whose_rows_diverge_is_named_on_all_nodes() -> None:
    made, start = recipe(net(), 4, partial(SGD, lr=0.1))

    def loss(output: Any, target: Any) -> Any:
        bad = nn.functional.cross_entropy(output, target)
        return bad * float("inf") if threading.current_thread().name == "bad" else bad

    def name(r: int, meeting: Meeting) -> None:
        if r == 2:
            threading.current_thread().name = "bad"

    object.__setattr__(made, "loss", loss)
    seen = spread(made, start, NODES["two nodes of two"], name)
    told = [x for x in seen if not isinstance(x, PeerLost)]  # a rank may hear of another's leaving first
    assert told and all(isinstance(x, DivergedError) and "in step 0 on rank 2" in str(x) for x in told)


@pytest.mark.parametrize("culprit", [0, 1, 3])
def test_a_rank_that_fails_frees_the_ranks_of_all_nodes(culprit: int) -> None:
    def fail(r: int, meeting: Meeting) -> None:
        if r == culprit:
            raise KeyError("the user's own")

    made, start = recipe(net(), 4, partial(SGD, lr=0.1), deadline=5.0)
    seen = spread(made, start, NODES["two nodes of two"], fail)
    assert isinstance(seen[culprit], KeyError)
    others = [x for r, x in enumerate(seen) if r != culprit]
    assert all(isinstance(x, PeerLost | MeetingTimeout) for x in others), others


# ---- places and slices ----------------------------------------------------------------------------------------------------


@every_nodes
def test_the_cuts_of_all_owners_tile_the_vector_and_a_rail_owns_one_run(nodes: tuple[tuple[int, ...], ...]) -> None:
    size = block_size(recipe(net(), 4, SGD)[0], 1)
    places = [Place(r, nodes) for ranks in nodes for r in ranks]
    owners = places[0].rails * len(nodes)
    cuts, owned = slices(1000, owners), []
    for place in places:
        meeting = Meeting(place, Block(private(size.nbytes), size, 0, 1.0, watch=False), None, None)
        meeting.divide(cuts)
        assert meeting.owns == (place.local < place.rails)
        if meeting.owns:
            owned.append(meeting.cut)
            assert meeting.cut in meeting.slice and len(meeting.slice) == len(nodes)
            assert all(a[1] == b[0] for a, b in pairwise(meeting.slice))
        else:
            assert meeting.cut == (0, 0)
    assert sorted(owned) == cuts


def test_a_place_knows_node_local_number_and_rails() -> None:
    place = Place(3, ((0,), (1, 3), (2,)))
    assert (place.size, place.node, place.local, place.rails) == (4, 1, 1, 1)
