"""Exchanges in the engines: one result whoever runs it, saved and resumed, and refused by name where it cannot be had."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam

from bigdl_lite import BarrierEngine, TorchEstimator
from bigdl_lite.algorithms import Coded, Round, Update, local_sgd
from bigdl_lite.algorithms.exchange import Stateless, Turn
from bigdl_lite.algorithms.gradiveq import GradiVeQ
from bigdl_lite.algorithms.powersgd import PowerSGD
from bigdl_lite.algorithms.rows import S2, UnionRows
from bigdl_lite.comm.block import Block, private
from bigdl_lite.comm.comm import Comm
from bigdl_lite.comm.group import Group, Store
from bigdl_lite.engine.meeting import SIDE, Meeting, Place
from bigdl_lite.engine.rank import block_size, train
from bigdl_lite.engine.recipe import Outcome, Recipe, Start, silent
from bigdl_lite.errors import BigDLError, CheckpointError, DivergedError, RecipeError, UserError
from bigdl_lite.model.layout import Blueprint
from bigdl_lite.wire.codec import BFloat16, Float16, Raw
from bigdl_lite.wire.lossy import QSGD, MinMax8, Sign
from bigdl_lite.wire.sparse import RandomK, TopK
from tests.conftest import flat, frame, problem, uneven
from tests.engine import test_meeting as nodes

X, Y = problem(90)
MOMENTUM = partial(SGD, lr=0.1, momentum=0.9)


class Tagged(nn.Module):
    """A table of rows, few of which a batch uses, and something to make of them."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, tags: Tensor) -> Tensor:
        return self.head(torch.tanh(self.table(tags).mean(1)))


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 32), nn.Tanh(), nn.Linear(32, 3))


# without rank state: all three engines
STATELESS = {
    "dense": Coded(Raw()), "bf16": Coded(BFloat16()), "fp16": Coded(Float16()), "min-max": Coded(MinMax8(group=32)),
    "qsgd": Coded(QSGD(15, group=32)), "top-k": Coded(TopK(0.2), gather=True), "random-k": Coded(RandomK(0.2, group=64)),
    "powersgd": PowerSGD(rank=2, residual=False, min_compression=1.0), "gradiveq": GradiVeQ(slice=16, rank=4, train=3, compressed=4),
}  # fmt: skip
# with a residual on each rank: the engines whose ranks live as long as the fit
REMEMBERING = {
    "sign": Coded(Sign(group=32), residual=True), "top-k": Coded(TopK(0.1), residual=True, gather=True),
    "powersgd": PowerSGD(rank=2, min_compression=1.0),
}  # fmt: skip
SPARSE = {"union-rows": UnionRows(), "s2": S2(beta=0.5), "s2, three rows": S2(beta=0.3, rows=3)}


@pytest.fixture(scope="module")
def data(spark: Any) -> Any:
    return frame(spark, X, Y, uneven(90, 3)).cache()


@pytest.fixture(scope="module")
def tags(spark: Any) -> Any:
    rng = np.random.default_rng(0)
    rows = [(rng.integers(0, 40, 3).tolist(), int(k % 3)) for k in range(90)]
    return spark.createDataFrame(rows, "features array<int>, label long").repartition(3).cache()


def fit(data: Any, engine: Any, exchange: Any = None, module: Any = net, workers: int = 3, **more: Any) -> Any:
    settings = {"loss": nn.CrossEntropyLoss(), "batchSize": 32, "epochs": 3, "progress": "none", "deadline": 30.0} | more
    made = TorchEstimator(module=module, optimizer=settings.pop("optimizer", MOMENTUM), numWorkers=workers, engine=engine, **settings)
    return (made if exchange is None else made.copy({made.exchange: exchange})).fit(data)


def weights(*args: Any, **more: Any) -> Tensor:
    return flat(fit(*args, **more).module)


# ---- one result ---------------------------------------------------------------------------------------------------------


QUICK = ("min-max", "powersgd", "gradiveq")  # one that is cut, one of two sums, one with a broadcast: the others are slow
KINDS = [
    pytest.param(name, engine, marks=[] if name in QUICK else pytest.mark.slow, id=f"{name}-{engine}")
    for name in STATELESS for engine in ("barrier", "shuffle")
]  # fmt: skip


@pytest.mark.parametrize(("name", "engine"), KINDS)
def test_both_spark_engines_give_the_bits_of_the_local_one(data: Any, name: str, engine: str) -> None:
    ours, local = (weights(data, where, STATELESS[name], epochs=2) for where in (engine, "local"))
    assert torch.equal(ours, local)


@pytest.mark.parametrize("exchange", REMEMBERING.values(), ids=REMEMBERING)
def test_what_ranks_remember_is_the_same_in_barrier_and_local(data: Any, exchange: Any) -> None:
    assert torch.equal(weights(data, "barrier", exchange), weights(data, "local", exchange))


@pytest.mark.parametrize("engine", [pytest.param("barrier", marks=pytest.mark.slow), "shuffle"])
@pytest.mark.parametrize("exchange", SPARSE.values(), ids=SPARSE)
def test_rows_of_tables_travel_alike_in_all_engines(tags: Any, exchange: Any, engine: str) -> None:
    made = [weights(tags, name, exchange, Tagged, epochs=2) for name in (engine, "local")]
    assert torch.equal(*made)
    exact = weights(tags, "local", None, Tagged, epochs=2)
    assert torch.allclose(made[0], exact, atol=1e-6) == isinstance(exchange, UnionRows)  # the sketch is not exact


def test_dense_is_what_comes_without_an_exchange(data: Any) -> None:
    exact = weights(data, "local")
    assert torch.allclose(weights(data, "local", "dense"), exact, atol=1e-6)
    assert torch.equal(weights(data, "local", "dense", workers=1), weights(data, "local", workers=1))
    assert not torch.allclose(weights(data, "local", "minmax8"), exact, atol=1e-6), "the comparison can fail"


@pytest.mark.parametrize("k", [1, 2, 5])
def test_where_rows_lie_does_not_change_an_exact_exchange(spark: Any, k: int) -> None:
    made = [weights(frame(spark, X, Y, uneven(90, n)), "local", "dense", workers=n, batchSize=1000) for n in (k, 3)]
    assert torch.allclose(*made, atol=1e-6)


# ---- between nodes ------------------------------------------------------------------------------------------------------


def spread(recipe: Recipe, start: Start, places: tuple[tuple[int, ...], ...]) -> list[Outcome]:
    """Every rank in a thread of its own, nodes with memory of their own, links between them."""
    p, hall = recipe.num_workers, Store(nodes.HOST, 0, True, nodes.DEADLINE)
    memories = [private(block_size(recipe, len(ranks)).nbytes) for ranks in places]
    given, seen = nodes.shares(p), [None] * p

    def rank(r: int) -> None:
        place = Place(r, places)
        block = Block(memories[place.node], block_size(recipe, len(places[place.node])), place.local, recipe.deadline, watch=False)
        rail = leaders = None
        if place.local == 0:
            store = Store(nodes.HOST, hall.port, False, nodes.DEADLINE)
            rail, leaders = (Group(store, name, place.node, len(places), nodes.HOST) for name in ("rail", "leaders"))
        meeting = Meeting(place, block, rail, leaders, recipe.round.exchange)
        try:
            found = train(given[r], [s.rows for s in given], recipe, start, meeting, silent)
            seen[r] = Outcome(found.weights.clone(), found.buffers, found.history)
            meeting.close()
        except BaseException as error:
            seen[r] = error
            meeting.fail()

    threads = [threading.Thread(target=rank, args=(r,), daemon=True) for r in range(p)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for found in seen:
        if isinstance(found, BigDLError) and not isinstance(found, DivergedError):
            raise found
    return seen


def recipe(p: int, exchange: Any, **settings: Any) -> tuple[Recipe, Start]:
    made, start = nodes.recipe(nodes.net(), p, MOMENTUM, **settings)
    return replace(made, round=replace(made.round, exchange=exchange)), start


@pytest.mark.parametrize("places", [((0, 1), (2, 3)), ((0, 2), (1, 3)), ((0,), (1, 3), (2,)), ((0, 1, 2, 3),)], ids=str)
def test_ranks_of_a_node_sum_before_their_node_exchanges(places: tuple[tuple[int, ...], ...]) -> None:
    made, start = recipe(4, Coded(Raw()), hierarchical=True, clip_norm=0.5)
    exact = nodes.locally(replace(made, round=replace(made.round, exchange=None)), start)
    found = spread(made, start, places)
    assert all(torch.equal(x.weights, found[0].weights) for x in found) and torch.allclose(found[0].weights, exact.weights, atol=1e-6)
    n, sides, m = made.blueprint.layout.n, SIDE + made.blueprint.layout.m, len(places)
    # 2 (M - 1) vectors, the sides, and 2 more tables of sides: the sum that clipping needs, and none in this step after it
    tables = 2 * sum((m - 1) * len(ranks) * 8 * sides for ranks in places)
    assert found[0].history[0]["bytes_sent"] == 2 * (m - 1) * 4 * n + tables


@pytest.mark.parametrize("p", [2, 3, 4])
def test_apart_ranks_send_what_the_formula_says(p: int) -> None:
    for exchange, nbytes in ((Coded(Raw()), lambda n: 4 * n), (Coded(BFloat16()), lambda n: 2 * n), (Coded(MinMax8(64)), None)):
        made, start = recipe(p, exchange)
        n, sides = made.blueprint.layout.n, SIDE + made.blueprint.layout.m
        expected = 2 * (p - 1) * (exchange.codec.nbytes(n) if nbytes is None else nbytes(n)) + p * (p - 1) * 8 * sides
        assert nodes.locally(made, start).history[0]["bytes_sent"] == expected


class Shared(nn.Module):
    """A weight that is used twice, and one that is not used."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.idle = nn.Linear(30, 30)
        self.first, self.twice = nn.Linear(nodes.FEATURES, 40), nn.Linear(40, 40)
        self.last = nn.Linear(40, nodes.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.twice(torch.tanh(self.twice(torch.tanh(self.first(x)))))))


@pytest.mark.parametrize("bucket", [200, 1 << 21])
@pytest.mark.parametrize("module", [nodes.net, Shared], ids=["net", "shared and idle weights"])
def test_overlap_changes_no_bit(bucket: int, module: Any) -> None:
    for way in (Coded(Raw()), Coded(MinMax8(64), residual=True), Coded(QSGD(15, group=64), gather=True)):
        found = []
        for exchange in (way, replace(way, overlap=True, bucket=bucket)):
            made, start = nodes.recipe(module(), 3, MOMENTUM)
            made = replace(made, round=replace(made.round, exchange=exchange))
            outcome = spread(made, start, ((0,), (1,), (2,)))[0]
            found.append((outcome.weights, [line["bytes_sent"] for line in outcome.history]))
        assert torch.equal(found[0][0], found[1][0]) and found[0][1] == found[1][1]


# ---- local SGD ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["barrier", "shuffle"])
@pytest.mark.parametrize("exchange", [None, "bf16"])
def test_local_steps_are_the_same_in_all_engines(data: Any, engine: str, exchange: Any) -> None:
    more = {"algorithm": local_sgd(2, after=1), "scheduler": lambda o: torch.optim.lr_scheduler.StepLR(o, 1, 0.5)}
    models = [fit(data, name, exchange, **more) for name in (engine, "local")]
    assert torch.equal(*(flat(model.module) for model in models))
    for model in models:
        assert [(x["rows"], x["lr"]) for x in model.history if "step" in x] == [
            (32, 0.1), (32, 0.1), (26, 0.1), (64, 0.05), (26, 0.05), (64, 0.025), (26, 0.025),
        ]  # fmt: skip


def test_one_plain_local_step_is_a_synchronous_one(data: Any) -> None:
    plain = {"optimizer": partial(SGD, lr=0.1)}
    exact = weights(data, "local", **plain)
    assert torch.allclose(weights(data, "local", algorithm=local_sgd(1), **plain), exact, atol=1e-6)
    assert not torch.allclose(weights(data, "local", algorithm=local_sgd(2), **plain), exact, atol=1e-4), "more steps are not"


def test_one_worker_takes_its_local_steps_like_plain_torch(data: Any) -> None:
    """With the whole epoch in one round, so that the optimizer never begins anew."""
    alone = {"workers": 1, "epochs": 1, "optimizer": partial(Adam, lr=0.01)}
    assert torch.allclose(weights(data, "local", algorithm=local_sgd(99), **alone), weights(data, "local", **alone), atol=1e-6)


def test_h_steps_a_round_send_one_hth_of_the_bytes() -> None:
    sent = []
    for steps in (1, 4):
        made, start = nodes.recipe(nodes.net(), 3, partial(SGD, lr=0.1), batch_size=3, epochs=1)
        made = replace(made, round=replace(local_sgd(steps)(made.round.advance), exchange=Coded(Raw())))
        history = nodes.locally(made, start).history
        sent.append([line["bytes_sent"] for line in history if "step" in line])
    assert len(sent[0]) == 14 and len(sent[1]) == 4 and {*sent[0]} == {*sent[1]}


# ---- saved and resumed --------------------------------------------------------------------------------------------------

RESUMED = {
    "top-k": {"exchange": REMEMBERING["top-k"]}, "sign": {"exchange": REMEMBERING["sign"]},
    "overlap": {"exchange": Coded(MinMax8(32), residual=True, overlap=True, bucket=64)},
    "powersgd": {"exchange": REMEMBERING["powersgd"]}, "gradiveq": {"exchange": STATELESS["gradiveq"]},
    "qsgd": {"exchange": STATELESS["qsgd"]}, "local": {"algorithm": local_sgd(2, after=1)},
    "qadam": {"algorithm": "qadam", "optimizer": partial(Adam, lr=0.01)},
}  # fmt: skip


@pytest.mark.parametrize("more", RESUMED.values(), ids=RESUMED)
def test_a_fit_that_was_broken_off_ends_with_the_same_weights(data: Any, tmp_path: Any, more: Any) -> None:
    settings = {"epochs": 4} | {key: value for key, value in more.items() if key != "exchange"}
    whole = weights(data, "local", more.get("exchange"), **settings)
    saving = {"checkpointDir": str(tmp_path), "checkpointInterval": 1, "checkpointUnit": "step"}
    fit(data, "local", more.get("exchange"), **settings | {"epochs": 2}, **saving)
    assert torch.equal(weights(data, "local", more.get("exchange"), **settings, **saving, resume=True), whole)


@pytest.mark.parametrize(("engine", "name"), [("barrier", "top-k"), ("shuffle", "gradiveq")])
def test_it_goes_on_in_the_spark_engines_too(data: Any, tmp_path: Any, engine: str, name: str) -> None:
    exchange, saving = RESUMED[name]["exchange"], {"checkpointDir": str(tmp_path), "checkpointUnit": "step"}
    fit(data, engine, exchange, epochs=2, **saving)
    assert torch.equal(weights(data, engine, exchange, epochs=4, **saving, resume=True), weights(data, "local", exchange, epochs=4))


def test_a_residual_is_needed_to_go_on(data: Any, tmp_path: Any) -> None:
    """Negative control, and what is refused: without the residual, or with other workers, the fit would be another."""
    saving = {"checkpointDir": str(tmp_path), "resume": True}
    fit(data, "local", REMEMBERING["sign"], epochs=1, **saving)
    with pytest.raises(CheckpointError, match="3 peers keep, and Coded has 2 now"):
        fit(data, "local", REMEMBERING["sign"], workers=2, epochs=2, **saving)
    with pytest.raises(CheckpointError, match="which needs"):
        fit(data, "local", REMEMBERING["top-k"], epochs=2, **saving)


def test_inside_an_epoch_the_rounds_must_be_as_long_as_before(data: Any, tmp_path: Any) -> None:
    """Else rows would come twice, or never."""
    saving = {"checkpointDir": str(tmp_path), "checkpointUnit": "step"}
    broken = {"loss": Breaking(str(tmp_path / "flag")), "epochs": 2, "batchSize": 10, **saving}
    with pytest.raises(UserError, match="broken off"):
        fit(data, "local", algorithm=local_sgd(2), **broken)
    with pytest.raises(CheckpointError, match="dealt with batches of a round 2; this fit has 1"):
        fit(data, "local", algorithm=local_sgd(1), **broken, resume=True)
    whole = weights(data, "local", algorithm=local_sgd(2), epochs=2, batchSize=10)
    assert torch.equal(weights(data, "local", algorithm=local_sgd(2), **broken, resume=True), whole)


class Breaking(nn.CrossEntropyLoss):
    """Raises in the third or fourth round of the first fit, when the state after the first is surely saved."""

    def __init__(self, flag: str) -> None:
        super().__init__()
        self.flag, self.calls = flag, 0

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 18 and not os.path.exists(self.flag):
            open(self.flag, "w").close()
            raise RuntimeError("broken off")
        return super().forward(output, target)


# ---- refused by name ----------------------------------------------------------------------------------------------------


def robust(advance: Any) -> Round:
    @dataclass(frozen=True)
    class Median:
        linear: bool = False

        def __call__(self, updates: Any) -> Update:
            raise AssertionError("never called")

    from bigdl_lite.algorithms import Gradient

    return Round(Gradient(), Median(), advance)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown name": ({"exchange": "gzip"}, r"exchange='gzip' is not known; there are bf16, dense"),
    "neither codec nor exchange": ({"exchange": 3}, "exchange is a int, must be one of"),
    "residual in shuffle": ({"exchange": "topk", "engine": "shuffle"}, "take engine='barrier' or 'local', or the same exchange with"),
    "overlap in shuffle": ({"exchange": Coded(Raw(), overlap=True), "engine": "shuffle"}, "take engine='barrier', or overlap=False"),
    "hierarchical in shuffle": ({"exchange": "bf16", "engine": "shuffle", "hierarchical": True}, "or hierarchical=False"),
    "overlap of a node": ({"exchange": Coded(Raw(), overlap=True), "hierarchical": True}, "leave out one of them"),
    "overlap of a whole vector": ({"exchange": Coded(TopK(0.1), overlap=True)}, "encodes the whole vector at once"),
    "overlap of local SGD": ({"exchange": Coded(Raw(), overlap=True), "algorithm": "local-sgd"}, "leave out overlap"),
    "residual that grows": ({"exchange": Coded(RandomK(0.1, scaled=True), residual=True)}, "would grow for ever"),
    "doubles": ({"exchange": "bf16", "module": lambda: net().double()}, "updates of float32, the module is of torch.float64"),
    "two exchanges": ({"exchange": "bf16", "algorithm": "qadam", "optimizer": Adam}, "brings its own exchange, Momentum"),
    "momentum of another optimizer": ({"algorithm": "qadam"}, "Adam"),
    "a rule that must see all updates": ({"exchange": "bf16", "algorithm": robust}, "and Median must see each of them"),
    "rows of no table": ({"exchange": "union-rows"}, "Embedding"),
    "no local step": ({"algorithm": local_sgd(0)}, "at least 1 step"),
}  # fmt: skip


@pytest.mark.parametrize(("more", "match"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_work_is_refused_before_any_job(data: Any, more: Any, match: str) -> None:
    group = data.sparkSession.sparkContext.statusTracker()
    before = len(group.getJobIdsForGroup(None))
    with pytest.raises(RecipeError, match=match):
        fit(data, **{"engine": "local"} | more)
    assert len(group.getJobIdsForGroup(None)) == before


def test_auto_takes_the_engine_that_an_exchange_can_work_in(data: Any) -> None:
    assert fit(data, "auto", "topk", epochs=1).engine == "barrier"
    assert fit(data, BarrierEngine(share_memory=False), "bf16", epochs=1).engine == "barrier"


# ---- what must be seen --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Crooked:
    """Gives each peer another sum."""

    remembers: bool = False

    def check(self, blueprint: Blueprint) -> None:
        pass

    def start(self, blueprint: Blueprint, comm: Comm) -> Any:
        class Exchanger(Stateless):
            def __call__(self, x: Tensor, comm: Comm, turn: Turn) -> Tensor:
                return comm.all_reduce(x) + 1e-6 * comm.rank

        return Exchanger()


def test_ranks_whose_weights_part_are_told() -> None:
    made, start = recipe(3, Crooked())
    with pytest.raises(DivergedError, match="ranks 0 and 1 no longer have the same weights after epoch 0"):
        nodes.locally(made, start)


@dataclass(frozen=True)
class Fickle(Crooked):
    """Asks for another sum in a task than on the driver."""

    def start(self, blueprint: Blueprint, comm: Comm) -> Any:
        class Exchanger(Stateless):
            def __call__(self, x: Tensor, comm: Comm, turn: Turn) -> Tensor:
                return comm.all_reduce(x[: len(x) - int(x.any())]).resize_(len(x))

        return Exchanger()


def test_an_exchange_that_cannot_be_replayed_is_told(data: Any) -> None:
    with pytest.raises(RecipeError, match=r"Fickle asks for a sum of 291 values .* on the driver, and for a sum of 290"):
        fit(data, "shuffle", Fickle())


class Steep(nn.Module):
    """A finite loss whose gradient is not."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :3] * 0 + self.w.abs().sqrt()


@pytest.mark.parametrize("engine", ["local", "barrier", "shuffle"])
def test_an_update_that_is_not_finite_is_not_hidden_by_a_codec(data: Any, engine: str) -> None:
    with pytest.raises(DivergedError, match="update of rank 0 is not finite in step 0"):
        fit(data, engine, "sign" if engine != "shuffle" else "minmax8", Steep)


def test_every_run_tells_the_ratio_of_sync_to_compute(data: Any) -> None:
    for line in fit(data, "local", "bf16").history:
        assert line["sync_ratio"] == pytest.approx(line["sync_s"] / line["compute_s"]) and line["bytes_sent"] > 0


