"""Two hosts with links of their own: lossy and slow, cut and healed. The weights are those of the local engine, or it is an error.

Needs network namespaces, so root, and the path of the script that makes hosts of them in BIGDL_LITE_VCLUSTER.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = os.environ.get("BIGDL_LITE_VCLUSTER", "")

pytestmark = [
    pytest.mark.cluster, pytest.mark.timeout(300),
    pytest.mark.skipif(not SCRIPT, reason="BIGDL_LITE_VCLUSTER names no script that makes hosts out of network namespaces"),
]  # fmt: skip

PROGRAM = """
import json, sys, time
import torch
from torch import nn
from pyspark.sql import SparkSession
from bigdl_lite import BarrierEngine, ShuffleEngine, TorchClassifier
import bigdl_lite.ml.watching as module
from bigdl_lite.engine.spark import slots
from tests.conftest import flat, frame, problem

spark = SparkSession.builder.master(sys.argv[1]).config("spark.ui.enabled", "false").config("spark.executor.memory", "1g").getOrCreate()
spark.sparkContext.setLogLevel("OFF")
X, Y = problem(80)
df = frame(spark, X, Y, [50, 30])
until = time.time() + 60
while slots(spark) < 2:
    assert time.time() < until
    time.sleep(0.5)

class Net(nn.Module):
    def __init__(self, pause):
        super().__init__()
        self.net, self.pause = nn.Sequential(nn.Linear(5, 64), nn.Tanh(), nn.Linear(64, 3)), pause
    def forward(self, x):
        if self.training and self.pause:
            time.sleep(self.pause)
        return self.net(x)

class Watch(module.Callbacks):
    def __call__(self, event):
        if "step" in event:
            print(json.dumps({"step": event["step"]}), flush=True)

def fit(engine, pause, deadline, **more):
    made = TorchClassifier(module=lambda: Net(pause), optimizer=lambda p: torch.optim.Adam(p, lr=0.01), batchSize=20, engine=engine,
                           epochs=10, numWorkers=2, progress="none", deadline=deadline, recoveryInterval=0.0, **more)
    return made.fit(df)

reference = fit("local", 0.0, 60.0)
module.Callbacks = Watch
for line in sys.stdin:
    told = json.loads(line)
    engine = {"barrier": BarrierEngine, "shuffle": ShuffleEngine}[told["engine"]](share_memory=False)
    began = time.time()
    try:
        model = fit(engine, told["pause"], told["deadline"])
        found = {"close": torch.allclose(flat(model.module), flat(reference.module), atol=1e-6),
                 "steps": [x["step"] for x in model.history if "step" in x] == list(range(40))}
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {error}"[:500]}
    print(json.dumps(found | {"end": round(time.time() - began, 1)}), flush=True)
"""


def vcluster(*arguments: str) -> str:
    done = subprocess.run([sys.executable, SCRIPT, "--name", "bl", *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def driver(tmp_path_factory) -> Iterator[subprocess.Popen[str]]:
    """A program on a host of its own that runs the fits it is told to."""
    os.environ["PYTHONPATH"] = str(ROOT)
    told = vcluster("up", "--workers", "2", "--rate", "100mbit", "--python", sys.executable, "--keep-pythonpath")
    url = told.strip().splitlines()[-1]
    script = tmp_path_factory.mktemp("program") / "program.py"
    script.write_text(textwrap.dedent(PROGRAM))
    pipe = subprocess.PIPE
    command = [sys.executable, SCRIPT, "--name", "bl", "exec", "driver", "--", sys.executable, str(script), url.split()[-1]]
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True, cwd=ROOT)
    try:
        yield process
    finally:
        assert process.stdin is not None
        process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        process.kill()
        vcluster("down")


@pytest.fixture
def run(driver) -> Callable[..., dict[str, Any]]:
    def call(engine: str, pause: float, deadline: float, fault: Callable[[], None] = lambda: None, at: int = 8) -> dict[str, Any]:
        assert driver.stdin is not None and driver.stdout is not None
        driver.stdin.write(json.dumps({"engine": engine, "pause": pause, "deadline": deadline}) + "\n")
        driver.stdin.flush()
        done = False
        for line in driver.stdout:
            if not line.startswith("{"):
                continue
            told = json.loads(line)
            if "end" in told:
                print(engine, told)
                assert done or told.get("step") is None
                return told
            if told["step"] >= at and not done:
                done = True
                fault()
        raise AssertionError("the driver's program ended")

    yield call
    vcluster("heal", "w1")
    vcluster("limit", "100mbit", "none")


def cut(seconds: float) -> Callable[[], None]:
    def fault() -> None:
        vcluster("cut", "w1")
        time.sleep(seconds)
        vcluster("heal", "w1")

    return fault


@pytest.mark.parametrize("engine", ["barrier", "shuffle"])
def test_a_slow_link_that_loses_packets(run, engine) -> None:
    vcluster("limit", "10mbit", "10ms", "--loss", "2")
    told = run(engine, 0.0, 60.0)
    assert told["close"] and told["steps"]


@pytest.mark.parametrize("engine", ["barrier", "shuffle"])
def test_a_link_that_is_cut_for_a_moment(run, engine) -> None:
    told = run(engine, 0.1, 60.0, cut(3.0))
    assert told["close"] and told["steps"]


def test_a_link_that_is_cut_for_longer_than_the_deadline(run) -> None:
    """The ranks give up, and the fit goes on from its last state when the link is back; or ends in an error that says so."""
    told = run("barrier", 0.1, 5.0, cut(12.0))
    assert (told.get("close") and told["steps"]) or "rank" in told["error"]
    assert run("barrier", 0.0, 60.0)["close"], "and the cluster is as good as before"
