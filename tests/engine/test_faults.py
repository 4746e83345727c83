"""Faults that are made for real: a killed executor, a killed rank, an interrupted driver."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]

HEAD = """
import json, os, signal, sys, threading, time
import numpy as np, torch
from torch import nn
from bigdl_lite import TorchClassifier, local_session
from tests.conftest import flat, frame, mlp, problem

def children(pid):
    found = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                stat = open(f"/proc/{entry}/stat").read().rsplit(")", 1)[1].split()
                found.setdefault(int(stat[1]), []).append(int(entry))
            except OSError:
                pass
    todo, all_ = [pid], []
    while todo:
        for child in found.get(todo.pop(), []):
            all_.append(child)
            todo.append(child)
    return all_

def command(pid):
    try:
        return open(f"/proc/{pid}/cmdline").read()
    except OSError:
        return ""

X, Y = problem(80)
def estimator(engine, **more):
    return TorchClassifier(module=mlp, optimizer=lambda p: torch.optim.Adam(p, lr=0.01), batchSize=20, engine=engine,
                           numWorkers=2, progress="none", **more)
"""


def descendants(pid: int) -> list[int]:
    parents: dict[int, list[int]] = {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{entry}/stat") as stat:
            parents.setdefault(int(stat.read().rsplit(")", 1)[1].split()[1]), []).append(int(entry))
    todo, found = [pid], []
    while todo:
        todo += (below := parents.get(todo.pop(), []))
        found += below
    return found


def command(pid: int) -> str:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline") as told:
        return told.read()
    return ""


def lives(pid: int) -> bool:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as stat:
        return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    return False


@pytest.fixture
def run(tmp_path):
    """Starts a program; whatever the test does, none is left running."""
    started: list[subprocess.Popen[str]] = []

    def start(body: str) -> subprocess.Popen[str]:
        started.append(_start(body, tmp_path))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def _start(body: str, tmp_path: Path) -> subprocess.Popen[str]:
    script = tmp_path / "program.py"
    script.write_text(HEAD + textwrap.dedent(body))
    env = dict(os.environ, PYTHONPATH=str(ROOT), PYTHONUNBUFFERED="1")
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, str(script)], cwd=tmp_path, env=env, text=True, stdout=pipe, stderr=pipe)


def result(process: subprocess.Popen[str], seconds: float) -> dict:
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == 0, err[-3000:]
    return json.loads(out.strip().splitlines()[-1])


@pytest.mark.slow  # more than two minutes, most of them Spark's own waiting for executors that are gone
@pytest.mark.cluster
@pytest.mark.timeout(540)
def test_shuffle_survives_the_loss_of_executors_in_every_phase(run):
    """Executors are killed five times in one fit: twice in the map, twice in the combine, once with the weights on their way."""
    program = """
    from bigdl_lite.algorithms import Round
    from bigdl_lite.algorithms.parts import Gradient, Sum
    from bigdl_lite.engine.shuffle import ShuffleEngine

    conf = {"spark.ui.showConsoleProgress": "false", "spark.locality.wait": "1s", "spark.excludeOnFailure.enabled": "false",
            "spark.deploy.maxExecutorRetries": "-1", "spark.shuffle.io.maxRetries": "1", "spark.shuffle.io.retryWait": "1s"}
    spark = local_session(cluster=(3, 1, 1024), conf=conf)
    spark.sparkContext.setLogLevel("OFF")
    df = frame(spark, X, Y, [50, 30])
    here = os.getcwd()

    def strike(name):
        flag = os.path.join(here, name)
        if os.path.exists(flag):
            os.rename(flag, flag + " done")  # one task only gets through here
            daemon = os.getppid()
            os.kill(int(open(f"/proc/{daemon}/stat").read().rsplit(")", 1)[1].split()[1]), signal.SIGKILL)
            time.sleep(5)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(5, 40000), nn.Tanh(), nn.Linear(40000, 3))
        def forward(self, x):
            if self.training:
                strike("map")
            return self.net(x)

    class Add:
        linear = True
        def __call__(self, updates):
            strike("combine")
            return Sum()(updates)

    made = estimator(ShuffleEngine(share_memory=False), epochs=4, algorithm=lambda advance: Round(Gradient(), Add(), advance))
    made._set(module=Net)
    import bigdl_lite.ml.watching as module
    plan = {}
    def executors():
        return [p for p in children(os.getpid()) if "CoarseGrainedExecutorBackend" in command(p)]
    class Killer(module.Callbacks):
        def __call__(self, event):
            what = plan.get(event.get("step"))
            if what in ("map", "combine"):
                open(os.path.join(here, what), "w").close()
            elif what == "broadcast":
                victim, send = executors()[0], spark.sparkContext.broadcast
                def broadcast(value):
                    sent = send(value)
                    spark.sparkContext.broadcast = send
                    os.kill(victim, signal.SIGKILL)
                    open(os.path.join(here, "broadcast done"), "w").close()
                    return sent
                spark.sparkContext.broadcast = broadcast
    module.Callbacks = Killer
    quiet = made.fit(df)
    plan = {2: "map", 4: "combine", 6: "broadcast", 8: "map", 10: "combine"}
    lost, hits = [], 0
    class Counter(Killer):
        def __call__(self, event):
            global hits
            for name in ("map done", "combine done", "broadcast done"):
                if os.path.exists(name):
                    os.unlink(name)
                    hits += 1
            super().__call__(event)
    module.Callbacks = Counter
    hurt = made.fit(df)
    calm = sorted(line["seconds"] for line in quiet.history if "step" in line)[8]
    lost = [round(line["seconds"] - calm, 1) for line in hurt.history if line.get("step", 0) - 1 in plan]
    print(json.dumps({"hits": hits, "equal": torch.equal(flat(quiet.module), flat(hurt.module)), "lost": lost, "calm": round(calm, 2),
                      "steps": [line["step"] for line in hurt.history if "step" in line] == list(range(16))}))
    """
    told = result(run(program), 520)
    print(told)
    assert told["hits"] == 5 and told["equal"] and told["steps"]


@pytest.mark.slow  # twelve programs, one after the other: seven minutes
@pytest.mark.timeout(1200)
def test_a_driver_that_is_killed_again_and_again_ends_with_the_same_weights(run, tmp_path):
    """SIGKILL at ten random moments of training; each time the same program is started again, with resume=True."""
    program = """
    spark = local_session(cores=2, conf={"spark.ui.showConsoleProgress": "false"})
    spark.sparkContext.setLogLevel("OFF")
    df = frame(spark, X, Y, [50, 30])
    import bigdl_lite.ml.watching as module
    class Slow(module.Callbacks):
        def __call__(self, event):
            if "step" in event:
                print(json.dumps(event["step"]), flush=True)
    module.Callbacks = Slow
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.1), nn.Linear(8, 3))
        def forward(self, x):
            if self.training:
                time.sleep(0.02)
            return self.net(x)
    made = estimator("ENGINE", epochs=60, checkpointDir=FOLDER, resume=True, checkpointInterval=2, checkpointUnit="step")
    made._set(module=Net)
    weights = flat(made.fit(df).module)
    torch.save(weights, os.path.join(os.getcwd(), "weights"))
    print(json.dumps({"equal": True}))
    """
    rng, engine = random.Random(0), "barrier"
    body = program.replace("ENGINE", engine)
    result(run(body.replace("FOLDER", repr(str(tmp_path / "quiet")))), 120)
    quiet = torch.load(tmp_path / "weights")
    os.unlink(tmp_path / "weights")
    seen, last = [], 0
    for _ in range(10):
        process = run(body.replace("FOLDER", repr(str(tmp_path / "killed"))))
        assert process.stdout is not None
        until = last + rng.randint(3, 20)
        for line in process.stdout:
            if line.strip().isdigit() and int(line) >= until:
                break
        workers = descendants(process.pid)
        process.kill()
        process.wait()
        last = int(line)
        seen.append(last)
        end = time.monotonic() + 30
        while (alive := [pid for pid in workers if lives(pid)]) and time.monotonic() < end:
            time.sleep(0.1)
        assert not alive, f"orphans: {[command(pid) for pid in alive]}"
    assert not [name for name in os.listdir("/dev/shm") if "bigdl" in name]
    result(run(body.replace("FOLDER", repr(str(tmp_path / "killed")))), 120)
    assert torch.equal(torch.load(tmp_path / "weights"), quiet), "to the bit"
    print("killed after steps", seen)
    assert len(set(seen)) == 10


FAULTS = ["killed", "stopped"], ["killed in decode", "stopped in decode", "killed, no states"]


@pytest.mark.cluster
@pytest.mark.timeout(320)
@pytest.mark.slow
def test_gossip_goes_on_or_ends_after_the_loss_of_a_neighbour_and_never_hangs(run):
    """A rank of four is killed, or stopped, in its seventh step. The others go on from the last state of all, or end with an error."""
    program = """
    spark = local_session(cores=4, conf={"spark.ui.showConsoleProgress": "false"})
    spark.sparkContext.setLogLevel("OFF")
    flag = os.path.join(os.getcwd(), "flag")

    class Net(nn.Module):
        def __init__(self, number):
            super().__init__()
            self.net, self.calls, self.number = mlp(), 0, number
        def forward(self, x):
            self.calls += 1
            if self.calls == 7 and self.training and self.number and TaskContext.get().partitionId() == 1 and not os.path.exists(flag):
                open(flag, "w").close()
                os.kill(os.getpid(), self.number)
                time.sleep(0.1)
            return self.net(x)

    from pyspark import TaskContext
    df = frame(spark, X, Y, [20, 20, 20, 20]).cache()
    def fit(number, **more):
        if os.path.exists(flag):
            os.unlink(flag)
        began = time.time()
        made = estimator("barrier", epochs=6, recoveryInterval=0.0, deadline=4.0, algorithm="d-psgd", **more)
        made._set(module=lambda: Net(number), numWorkers=4)
        try:
            model = made.fit(df)
        except Exception as error:
            return type(error).__name__ + ": " + str(error)[:300], os.path.exists(flag), round(time.time() - began, 1)
        return flat(model.module), os.path.exists(flag), round(time.time() - began, 1)

    quiet, _, base = fit(0)
    told = {"base": base}
    for name, number in {"killed": 9, "stopped": 19}.items():
        weights, hit, seconds = fit(number)
        told[name] = {"hit": hit, "equal": torch.is_tensor(weights) and torch.equal(weights, quiet), "seconds": seconds}
        error, hit, seconds = fit(number, maxRecoveries=0)
        told[name + ", policy end"] = {"hit": hit, "error": error if isinstance(error, str) else "none", "seconds": seconds}
    print(json.dumps(told))
    """
    told = result(run(program), 300)
    for name in ("killed", "stopped"):
        assert told[name]["hit"] and told[name]["equal"] and told[name]["seconds"] < told["base"] + 30, told
        ended = told[name + ", policy end"]
        assert ended["hit"] and ended["error"].startswith(("PeerLost", "MeetingTimeout")) and ended["seconds"] < told["base"] + 30, told


@pytest.mark.timeout(420)
@pytest.mark.slow
@pytest.mark.parametrize("names", FAULTS, ids=["training", "more"])
def test_barrier_goes_on_from_the_last_state_after_the_loss_of_a_rank(run, names):
    """One rank is killed, or stopped, in training or while it reads its rows; the weights are those of an undisturbed run.

    Its last state is a step old (recoveryInterval=0), so one step is repeated; without states (inf), all are.
    """
    program = """
    spark = local_session(cores=2, conf={"spark.ui.showConsoleProgress": "false"})
    spark.sparkContext.setLogLevel("OFF")
    flag = os.path.join(os.getcwd(), "flag")
    calls = os.path.join(os.getcwd(), "calls")

    def fault(number):
        if number and TaskContext.get().partitionId() == 1 and not os.path.exists(flag):
            open(flag, "w").close()
            os.kill(os.getpid(), number)
            time.sleep(0.1)

    class Net(nn.Module):
        def __init__(self, number):
            super().__init__()
            self.net, self.calls, self.number = mlp(), 0, number
        def forward(self, x):
            self.calls += 1
            if self.training and TaskContext.get().partitionId() == 0:
                open(calls, "a").write("x")
            if self.calls == 10 and self.training:
                fault(self.number)
            return self.net(x)

    class Decode:
        def __init__(self, number):
            self.number = number
        def __call__(self, data):
            fault(self.number)
            return np.frombuffer(data, "f4")

    raw = spark.createDataFrame([(x.tobytes(), int(y)) for x, y in zip(X, Y)], "features binary, label long").repartition(2).cache()
    def fit(net=0, decode=0, every=0.0, deadline=4.0):
        for path in (flag, calls):
            if os.path.exists(path):
                os.unlink(path)
        began = time.time()
        made = estimator("barrier", epochs=6, recoveryInterval=every, deadline=deadline)
        made._set(module=lambda: Net(net), decoders={"features": Decode(decode)})
        model = made.fit(raw)
        steps = [line["step"] for line in model.history if "step" in line]
        return flat(model.module), os.path.exists(flag), os.path.getsize(calls), steps == list(range(24)), round(time.time() - began, 1)

    quiet, _, calm, _, base = fit()
    told = {"calm": calm, "base": base}
    for name, how in {"killed": dict(net=9), "stopped": dict(net=19), "killed in decode": dict(decode=9),
                      "stopped in decode": dict(decode=19), "killed, no states": dict(net=9, every=float("inf"))}.items():
        if name not in NAMES:
            continue
        weights, hit, made, whole, seconds = fit(**how)
        told[name] = {"hit": hit, "equal": torch.equal(weights, quiet), "steps": whole, "repeated": made - calm, "seconds": seconds}
    class Ill(nn.Module):
        def __init__(self, how):
            super().__init__()
            self.net, self.calls, self.how = mlp(), 0, how
        def forward(self, x):
            self.calls += 1
            if self.training and self.calls == 5 and TaskContext.get().partitionId() == 1:
                if self.how == "NaN":
                    return self.net(x) * float("nan")
                now = int(open("/proc/self/statm").read().split()[0]) * 4096
                resource.setrlimit(resource.RLIMIT_AS, (now + 2**26, resource.getrlimit(resource.RLIMIT_AS)[1]))
                torch.zeros(2**28)
            return self.net(x)
    def error(how):
        made = estimator("barrier", epochs=6, deadline=20.0)
        made._set(module=lambda: Ill(how), decoders={"features": Decode(0)})
        try:
            made.fit(raw)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    told["NaN"], told["memory"] = error("NaN"), error("memory")
    pids = children(os.getpid())
    told["left"] = [n for n in os.listdir("/dev/shm") if "bigdl" in n]
    told["alive"] = [p for p in pids if open(f"/proc/{p}/stat").read().rsplit(")", 1)[1].split()[0] == "T"]
    print(json.dumps(told))
    """
    told = result(run(f"import resource\nfrom pyspark import TaskContext\nNAMES = {names}\n" + textwrap.dedent(program)), 400)
    print(told)
    assert told["left"] == [] and told["calm"] == 24
    assert told["NaN"].startswith("DivergedError") and "step 4 on rank 1" in told["NaN"]
    assert told["memory"].startswith("UserError") and "allocate" in told["memory"] and "rank 1" in told["memory"]
    assert told["alive"] == [], "a stopped process was ended"
    most = {"killed": 2, "stopped": 2, "killed in decode": 0, "stopped in decode": 0, "killed, no states": 24}
    for name in names:
        found = told[name]
        assert found["hit"] and found["equal"] and found["steps"] and 0 <= found["repeated"] <= most[name], (name, found)
    if "killed, no states" in names:
        assert told["killed, no states"]["repeated"] >= 9, "the control: without states all is done again"


@pytest.mark.timeout(120)
@pytest.mark.slow  # a Spark program for each engine
@pytest.mark.parametrize("engine", ["barrier", "shuffle"])
def test_an_interrupt_of_the_driver_cancels_the_jobs(run, engine):
    program = f"""
    spark = local_session(cores=2, conf={{"spark.ui.showConsoleProgress": "false"}})
    spark.sparkContext.setLogLevel("OFF")
    df = frame(spark, X, Y, [50, 30])
    def began(event):
        if event.get("step", 0) >= 3:
            print("training", flush=True)
    import bigdl_lite.ml.watching as module
    class Watch(module.Callbacks):
        def __call__(self, event):
            began(event)
    module.Callbacks = Watch
    try:
        estimator("{engine}", epochs=10**6).fit(df)
    except BaseException as error:
        caught = type(error).__name__
    until = time.time() + 20
    tracker = spark.sparkContext.statusTracker()
    while tracker.getActiveJobsIds() and time.time() < until:
        time.sleep(0.1)
    print(json.dumps({{"caught": caught, "active": len(tracker.getActiveJobsIds()),
                      "works": spark.range(10).count()}}))
    """
    process = run(program)
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "training"
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    told = result(process, 60)
    assert told == {"caught": "KeyboardInterrupt", "active": 0, "works": 10}
