"""Driver and executors of different versions: said before the first step, with both. And what Sparks say in their own ways."""

from __future__ import annotations

from functools import partial

import pytest
from torch import nn

from bigdl_lite import TorchClassifier
from bigdl_lite.engine import barrier, shuffle, worker
from bigdl_lite.engine.again import again
from bigdl_lite.errors import PeerLost, RecipeError
from tests.conftest import frame, problem

X, Y = problem(20)


@pytest.mark.parametrize("engine", ["barrier", "shuffle"])
@pytest.mark.parametrize("name", ["torch", "bigdl_lite"])
def test_an_executor_of_another_version_is_named_before_the_first_step(spark, monkeypatch, engine, name) -> None:
    here = worker.versions()
    for module in (barrier, shuffle):  # the driver claims another; the executors are other processes
        monkeypatch.setattr(module, "versions", lambda: here | {name: "1.2"})
    estimator = TorchClassifier(module=nn.Linear(5, 3), numWorkers=2, engine=engine, progress="none")
    with pytest.raises(RecipeError, match=rf"has {name} {here[name]}, the driver has 1\.2"):
        estimator.fit(frame(spark, X, Y, [10, 10]))
    monkeypatch.undo()
    assert estimator.fit(frame(spark, X, Y, [10, 10])).history


def test_a_build_is_no_version() -> None:
    assert worker.versions()["torch"].count(".") == 1 and "+" not in worker.versions()["torch"]
    worker.require_versions(worker.versions())


@pytest.mark.parametrize("said", ["java.net.SocketException: Socket is closed", "java.nio.channels.CancelledKeyException"])
def test_a_worker_that_spark_itself_had_ended_is_a_lost_rank_and_other_sockets_are_not(said) -> None:
    """Spark 3.5 and 4.0 keep the worker of a cancelled task for the next one, which fails: the stage runs again, with another."""
    error = f"Stage failed because barrier task ResultTask(22, 1) finished unsuccessfully.\n{said}\n"
    assert isinstance(barrier._loss(RuntimeError(error)), PeerLost)
    assert barrier._loss(RuntimeError("java.net.SocketException: Permission denied")) is None


def test_a_job_that_got_such_a_worker_is_begun_again_and_no_other() -> None:
    tries = []

    def job(said: str, fails: int) -> int:
        tries.append(said)
        if len(tries) <= fails:
            raise RuntimeError(said)
        return len(tries)

    assert again(partial(job, "java.net.SocketException: Socket is closed", 2)) == 3
    tries.clear()
    with pytest.raises(RuntimeError, match="lost"):
        again(partial(job, "lost", 1))
    tries.clear()
    with pytest.raises(RuntimeError, match="Cancelled"):
        again(partial(job, "CancelledKeyException", 9))
    assert len(tries) == 4
