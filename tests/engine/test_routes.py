"""How values travel changes nothing: memory or Spark's shuffle, one stage or two, whatever is lost on the way."""

from __future__ import annotations

import os
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from bigdl_lite import BarrierEngine, ShuffleEngine, TorchEstimator
from bigdl_lite.engine import barrier, memory, routes, shipped, shuffle
from bigdl_lite.engine.cluster import cluster_of
from bigdl_lite.engine.recipe import Start
from bigdl_lite.errors import PeerLost, RecipeError
from tests.conftest import flat, frame, mlp, problem, uneven

X, Y = problem()


def wide() -> nn.Module:
    """Large enough for a second stage, and for a result of several partitions."""
    return nn.Sequential(nn.Linear(5, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 600), nn.ReLU(), nn.Linear(600, 3))


def fit(spark, engine, make=mlp, **more):
    torch.manual_seed(5)
    settings = {"batchSize": 25, "epochs": 2, "numWorkers": 2, "progress": "none", "loss": nn.CrossEntropyLoss(), "deadline": 60.0}
    adam = partial(torch.optim.Adam, lr=0.01)
    return TorchEstimator(module=make(), optimizer=adam, engine=engine, **(settings | more)).fit(frame(spark, X, Y, uneven(60, 2)))


@pytest.mark.parametrize("make", [mlp, wide], ids=["one-owner", "two-owners"])
def test_through_memory_and_through_spark_the_weights_are_the_same_bits(spark, make) -> None:
    seen = []
    by_memory = fit(spark, _Watched(seen), make)
    by_value = fit(spark, _Watched(seen, share_memory=False), make)
    assert seen == ["MemoryRoute", "ShuffleRoute"]
    assert torch.equal(flat(by_memory.module), flat(by_value.module))
    lines = [[line["loss"] for line in model.history] for model in (by_memory, by_value)]
    assert lines[0] == lines[1]


class _Watched(ShuffleEngine):
    """Says which route was taken in the end."""

    def __init__(self, seen: list[str], **more) -> None:
        super().__init__(**more)
        self.seen = seen

    def fit(self, *args, **kwargs):
        taken = []
        before = shuffle._Rounds._round

        def round_(rounds, route, order, *coming):
            taken[:] = [type(route).__name__]
            before(rounds, route, order, *coming)

        shuffle._Rounds._round = round_
        try:
            return super().fit(*args, **kwargs)
        finally:
            shuffle._Rounds._round = before
            self.seen += taken


def test_where_memory_is_not_seen_any_more_values_travel_through_spark(spark, monkeypatch, caplog) -> None:
    quiet, seen = fit(spark, "shuffle"), []
    before = memory.MemoryRoute.round

    def round_(self, order, weights, buffers, *coming):
        if order.round == 2:
            raise routes.Blind("an executor came up elsewhere")
        return before(self, order, weights, buffers, *coming)

    monkeypatch.setattr(memory.MemoryRoute, "round", round_)
    hurt = fit(spark, _Watched(seen))
    assert seen == ["ShuffleRoute"] and "from round 2 on" in caplog.text
    assert torch.equal(flat(quiet.module), flat(hurt.module))


@pytest.mark.parametrize("name", ["spark.io.encryption.enabled", "spark.network.crypto.enabled"])
def test_with_encryption_nothing_moves_past_spark(name: str) -> None:
    found = SimpleNamespace(n=10, m=0, dtype=torch.float32)
    recipe = SimpleNamespace(blueprint=SimpleNamespace(layout=found), num_workers=2)

    def application(value: str):
        context = SimpleNamespace(master="local[2]", applicationId="app", getConf=lambda: {name: value})
        return cluster_of(SimpleNamespace(sparkContext=context, _jsparkSession=None))

    assert routes.window_for(application("false"), recipe) is not None  # the control
    assert routes.window_for(application("true"), recipe) is None
    assert shipped.mappable(application("false"), 10) is not None
    assert shipped.mappable(application("true"), 10) is None


def test_weights_beyond_the_heap_are_refused_with_the_numbers(spark) -> None:
    heap = spark._jvm.java.lang.Runtime.getRuntime().maxMemory()
    within, beyond = (torch.empty(int(heap * share) // 4) for share in (0.3, 0.45))
    shuffle._check_size(spark.sparkContext, within)
    with pytest.raises(RecipeError, match=r"MiB of heap and spark.driver.maxResultSize=1024 MiB.*raise spark.driver.memory to"):
        shuffle._check_size(spark.sparkContext, beyond)


def test_a_result_of_many_partitions_and_a_start_of_many_pieces(spark, monkeypatch) -> None:
    """The way of large models on a cluster: nothing mapped, weights in pieces out and in partitions back."""
    whole = fit(spark, "barrier", wide)
    monkeypatch.setattr(barrier, "_PARTITION", 1 << 18)
    monkeypatch.setattr(barrier, "mappable", lambda sc, nbytes: None)
    monkeypatch.setattr(shipped, "mappable", lambda sc, nbytes: None)
    assert torch.equal(flat(fit(spark, "barrier", wide).module), flat(whole.module))


def test_start_in_pieces_is_what_was_sent(spark, monkeypatch) -> None:
    monkeypatch.setattr(shipped, "_PIECE", 1 << 12)
    constants = {"a": torch.randn(33, 31), "b": torch.arange(7), "empty": torch.empty(0), "half": torch.randn(5).bfloat16()}
    start = Start(torch.randn(2_500), torch.randn(3, dtype=torch.float64), constants)
    for may_map in (False, True):
        sent = shipped.Shipped.send(cluster_of(spark), start, may_map)
        assert bool(sent.address) == may_map and bool(sent.pieces) != may_map
        weights = torch.empty(2_500)
        back = sent.read(weights)
        assert back.weights is weights and torch.equal(weights, start.weights) and torch.equal(back.buffers, start.buffers)
        assert back.constants.keys() == constants.keys()
        for name, x in constants.items():
            assert torch.equal(back.constants[name], x) and back.constants[name].dtype == x.dtype
        assert not len(sent.read().weights)
        sent.drop()


def test_nothing_is_left_in_shared_memory(spark) -> None:
    before = sorted(os.listdir("/dev/shm"))
    fit(spark, "shuffle")
    fit(spark, BarrierEngine())
    assert sorted(os.listdir("/dev/shm")) == before


def test_rows_of_some_workers_only_are_an_error_that_says_so() -> None:
    """As Spark 3.5.0 may end a job that was cancelled."""
    tokens = SimpleNamespace(collect=lambda: [SimpleNamespace(partition=1, error="")])
    with pytest.raises(PeerLost, match=r"the rows of 1 of 3 workers; was the job cancelled\?"):
        shuffle._Rounds._counts(SimpleNamespace(recipe=SimpleNamespace(num_workers=3)), tokens)
