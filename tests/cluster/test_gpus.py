"""GPUs as Spark deals them out, without one: a script that claims two for each executor, and a torch that can use none.

So every task has the address of a GPU, all is scheduled by it, and the sums are made on CPUs, which one line says.
"""

from __future__ import annotations

import textwrap
from typing import Any

import pytest
import torch

from tests.engine.test_faults import result, run

__all__ = ["run"]  # the fixture

pytestmark = [
    pytest.mark.cluster, pytest.mark.timeout(300),
    pytest.mark.skipif(torch.cuda.is_available(), reason="claims GPUs that are not there, beside one that is"),
]  # fmt: skip

# a cluster whose executors claim GPUs; fit() says what a fit did, and which task had what
HEAD = """
import logging, stat
from bigdl_lite.engine.barrier import BarrierEngine
from bigdl_lite.engine.profile import slots_of
from pyspark import TaskContext
from pyspark.resource import ExecutorResourceRequests, ResourceProfileBuilder, TaskResourceRequests

here, said = os.getcwd(), []
class Ear(logging.Handler):
    def emit(self, record):
        said.append(f"{record.levelname} {record.getMessage()}")
logging.getLogger("bigdl_lite").addHandler(Ear())

def cluster(executors, cores, addresses, **conf):
    script = os.path.join(here, "discover.sh")
    with open(script, "w") as file:
        file.write("#!/bin/sh\\necho '" + json.dumps({"name": "gpu", "addresses": addresses}) + "'\\n")
    os.chmod(script, stat.S_IRWXU)
    each = {f"spark.{of}.resource.gpu.{key}": value for of in ("worker", "executor")
            for key, value in (("amount", len(addresses)), ("discoveryScript", script))}
    spark = local_session(cluster=(executors, cores, 1024), conf={"spark.ui.showConsoleProgress": "false", **each, **conf})
    spark.sparkContext.setLogLevel("OFF")
    while spark.sparkContext._jsc.sc().getExecutorMemoryStatus().size() <= executors:
        time.sleep(0.1)
    return spark

class Net(nn.Module):
    def __init__(self, where):
        super().__init__()
        self.net, self.where = mlp(), where
    def forward(self, x):
        task = TaskContext.get()
        if task is not None:
            given = task.resources().get("gpu")
            told = {"executor": os.getppid(), "worker": os.getpid(), "rank": task.partitionId(),
                    "addresses": given.addresses if given else None, "visible": os.environ.get("CUDA_VISIBLE_DEVICES")}
            with open(self.where, "a") as file:
                file.write(json.dumps(told) + "\\n")
        return self.net(x)

def seen(where):
    with open(where, "a+") as file:
        file.seek(0)
        return [json.loads(line) for line in file]

fits = 0
def fit(df, **settings):
    global fits
    fits, said[:] = fits + 1, []
    where = os.path.join(here, f"fit{fits}")
    made = TorchClassifier(module=lambda: Net(where), batchSize=40, epochs=1, progress="none", seed=1, **settings)
    try:
        model, error = made.fit(df), ""
    except Exception as caught:
        model, error = None, f"{type(caught).__name__}: {caught}"
    told = [t for t in seen(where)]
    return model, {"error": error, "lines": [line for line in said if "training on" in line],
                   "shares": len(model.summary.shares) if model else 0,
                   "tasks": sorted({(t["executor"], t["rank"], *(t["addresses"] or [])) for t in told}),
                   "workers": sorted({(t["worker"], *(t["addresses"] or [])) for t in told}),
                   "visible": sorted({str(t["visible"]) for t in told})}
"""


def told(run: Any, program: str, seconds: float = 280.0) -> dict[str, Any]:
    found = result(run(HEAD + textwrap.dedent(program)), seconds)
    print(found)
    return found


def by_executor(fit: dict[str, Any]) -> list[list[str]]:
    """The addresses that the ranks on each executor had, in order."""
    found: dict[int, list[str]] = {}
    for executor, _, *addresses in fit["tasks"]:
        found.setdefault(executor, []).extend(addresses)
    return sorted(sorted(x) for x in found.values())


FALLBACK = "WARNING training on CPUs: 4 ranks have no GPU that torch can use; rank 0 on "


@pytest.mark.slow
def test_every_rank_has_a_gpu_of_its_own_and_slots_are_counted_by_them(run):
    """Two executors of four cores and two GPUs: four ranks, not eight. Workers are used again, with other GPUs."""
    found = told(run, """
    spark = cluster(2, 4, ["0", "1"], **{"spark.task.resource.gpu.amount": 1, "spark.executorEnv.CUDA_VISIBLE_DEVICES": "1,0"})
    df = frame(spark, X, Y, [20, 20, 20, 20])
    model, barrier = fit(df, engine="barrier")
    many = fit(df, engine="barrier", numWorkers=5)[1]
    asks = fit(df, device="cuda")[1]
    cpu = fit(df, device="cpu", engine="barrier")[1]
    workers, deadline = {}, time.monotonic() + 60
    while max(map(len, workers.values()), default=0) < 2 and time.monotonic() < deadline:  # which worker gets which task is chance
        for worker, address in fit(df, engine="barrier")[1]["workers"]:
            workers.setdefault(worker, set()).add(address)
    scored = model.transform(df)
    print(json.dumps({"slots": slots_of(spark, None), "barrier": barrier, "many": many, "asks": asks, "cpu": cpu,
                      "most": max(map(len, workers.values())), "scored": scored.count(),
                      "right": scored.filter("prediction = label").count(), "chosen": model.engine}))
    """)  # fmt: skip
    assert found["slots"] == found["barrier"]["shares"] == 4
    assert by_executor(found["barrier"]) == [["0", "1"], ["0", "1"]]
    lines = found["barrier"]["lines"]
    assert len(lines) == 1 and lines[0].startswith(FALLBACK) and "was given GPU" in lines[0], "one line, not one a rank"
    assert found["barrier"]["visible"] == ["1,0"], "as the executor has it"
    assert "numWorkers=5 needs 5 tasks" in found["many"]["error"] and "has 4 slots (tasks of 1 GPU)" in found["many"]["error"]
    assert found["asks"]["error"].startswith("RecipeError: device is 'cuda', and 4 ranks have no GPU") and not found["asks"]["tasks"]
    assert not found["cpu"]["error"] and found["cpu"]["lines"] == [], "who asks for CPUs hears nothing"
    assert found["most"] == 2, "a worker was used again with another GPU"
    assert found["scored"] == 80


@pytest.mark.slow
def test_shuffle_and_transform_take_gpus_too(run):
    found = told(run, """
    spark = cluster(2, 4, ["0", "1"], **{"spark.task.resource.gpu.amount": 1})
    df = frame(spark, X, Y, [20, 20, 20, 20]).cache()
    model, shuffle = fit(df, engine="shuffle")
    more = fit(df, engine="shuffle", numWorkers=6)[1]
    asks = fit(df, engine="shuffle", device="cuda")[1]
    where = os.path.join(here, "scores")
    scorer = TorchClassifier(module=lambda: Net(where), engine="local", numWorkers=1, progress="none").fit(df)
    open(where, "w").close()
    count = scorer.transform(df).filter("prediction >= 0").count()
    try:
        scorer.copy({scorer.device: "cuda"}).transform(df).filter("prediction >= 0").count()
        refused = ""
    except Exception as error:
        refused = str(error)
    print(json.dumps({"shuffle": shuffle, "more": more, "asks": asks, "count": count, "refused": refused,
                      "scores": sorted({(t["executor"], *t["addresses"]) for t in seen(where)})}))
    """)  # fmt: skip
    shuffle = found["shuffle"]
    assert not shuffle["error"] and shuffle["shares"] == 4 and len(shuffle["lines"]) == 1
    assert {rank for _, rank, _ in shuffle["tasks"]} == {0, 1, 2, 3}, "each task with one address"
    assert not found["more"]["error"] and found["more"]["shares"] == 6, "more workers than GPUs take turns"
    assert found["asks"]["error"].startswith("RecipeError: device is 'cuda', and 4 ranks")
    assert found["count"] == 80 and found["scores"] and "this task was given GPU" in found["refused"]


@pytest.mark.slow
def test_half_a_gpu_a_task_is_a_gpu_for_two(run):
    found = told(run, """
    spark = cluster(2, 4, ["7"], **{"spark.task.resource.gpu.amount": 0.5})
    df = frame(spark, X, Y, [20, 20, 20, 20])
    print(json.dumps({"slots": slots_of(spark, None), "barrier": fit(df, engine="barrier")[1], "shuffle": fit(df, engine="shuffle")[1],
                      "many": fit(df, engine="barrier", numWorkers=5)[1]}))
    """)  # fmt: skip
    assert found["slots"] == found["barrier"]["shares"] == 4, "neither 2, the GPUs, nor 8, the cores"
    assert by_executor(found["barrier"]) == [["7", "7"], ["7", "7"]]
    assert not found["shuffle"]["error"] and {task[2] for task in found["shuffle"]["tasks"]} == {"7"}
    assert [len(found[name]["lines"]) for name in ("barrier", "shuffle")] == [1, 1]
    assert "has 4 slots (tasks of 0.5 GPU)" in found["many"]["error"]


@pytest.mark.slow
def test_an_estimator_asks_for_gpus_that_the_applications_tasks_do_not(run):
    """Stage-level scheduling: by a profile, or by device="cuda" alone. Without either, tasks have none (the negative control)."""
    found = told(run, """
    spark = cluster(2, 3, ["0", "1"])
    df = frame(spark, X, Y, [20, 20, 20, 20])
    def profile(amount):
        return ResourceProfileBuilder().require(TaskResourceRequests().cpus(1).resource("gpu", amount)).build
    one, wide = profile(1), ResourceProfileBuilder().require(TaskResourceRequests().cpus(3).resource("gpu", 1)).build
    started = ResourceProfileBuilder().require(ExecutorResourceRequests().cores(1)).require(TaskResourceRequests().cpus(1)).build
    print(json.dumps({
        "slots": [slots_of(spark, x) for x in (None, one, wide)],
        "plain": fit(df, engine="barrier", numWorkers=2)[1],
        "barrier": fit(df, engine="barrier", resourceProfile=one)[1], "shuffle": fit(df, engine="shuffle", resourceProfile=one)[1],
        "object": fit(df, engine=BarrierEngine(profile=one))[1], "twice": fit(df, engine=BarrierEngine(), resourceProfile=one)[1],
        "wide": fit(df, resourceProfile=wide)[1], "many": fit(df, engine="barrier", resourceProfile=one, numWorkers=5)[1],
        "cuda": fit(df, device="cuda")[1], "local": fit(df, engine="local", resourceProfile=one)[1],
        "started": fit(df, resourceProfile=started)[1], "nothing": fit(df, resourceProfile=3)[1]}))
    """)  # fmt: skip
    assert found["slots"] == [6, 4, 2]
    assert not found["plain"]["error"] and all(len(task) == 2 for task in found["plain"]["tasks"]) and not found["plain"]["lines"]
    assert found["barrier"]["shares"] == found["shuffle"]["shares"] == 4 and by_executor(found["barrier"]) == [["0", "1"], ["0", "1"]]
    assert all(len(task) == 3 for task in found["shuffle"]["tasks"]) and len(found["shuffle"]["lines"]) == 1
    assert found["object"]["shares"] == 4 and "BarrierEngine(profile=...) takes it" in found["twice"]["error"]
    assert found["wide"]["shares"] == 2 and len({executor for executor, *_ in found["wide"]["tasks"]}) == 2
    assert "has 4 slots (tasks of 1 GPU)" in found["many"]["error"]
    assert found["cuda"]["error"].startswith("RecipeError: device is 'cuda', and 4 ranks") and "was given GPU" in found["cuda"]["error"]
    assert "engine='local' trains on the driver" in found["local"]["error"]
    assert "Spark refuses resourceProfile" in found["started"]["error"] and "TaskResourceRequests" in found["started"]["error"]
    assert "resourceProfile is 3, must be a pyspark.resource.ResourceProfile" in found["nothing"]["error"]
