"""Shuffle on a cluster that is not calm: stragglers and their copies, executors that come and go, everything encrypted."""

from __future__ import annotations

import pytest

from tests.engine.test_faults import result, run

__all__ = ["run"]  # the fixture

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(440)]  # two minutes and a half on idle cores


def test_speculation_and_executors_that_come_and_go_change_no_bit(run):
    """One executor is slow, so that Spark runs its tasks twice; another leaves between two rounds, and a new one joins."""
    program = """
    from pyspark import TaskContext
    conf = {"spark.ui.showConsoleProgress": "false", "spark.locality.wait": "200ms", "spark.speculation": "true",
            "spark.speculation.interval": "50ms", "spark.speculation.multiplier": "1.1", "spark.speculation.quantile": "0.1",
            "spark.speculation.minTaskRuntime": "50ms", "spark.dynamicAllocation.enabled": "true",
            "spark.dynamicAllocation.shuffleTracking.enabled": "true", "spark.dynamicAllocation.initialExecutors": "3",
            "spark.dynamicAllocation.minExecutors": "1", "spark.dynamicAllocation.maxExecutors": "3",
            "spark.dynamicAllocation.executorIdleTimeout": "3s", "spark.dynamicAllocation.cachedExecutorIdleTimeout": "3s",
            "spark.dynamicAllocation.shuffleTracking.timeout": "3s", "spark.dynamicAllocation.schedulerBacklogTimeout": "1s"}
    spark = local_session(cluster=(3, 1, 1024), conf=conf)
    sc = spark.sparkContext
    sc.setLogLevel("OFF")
    df = frame(spark, X, Y, [50, 30])
    here = os.getcwd()

    class Net(nn.Module):
        def __init__(self, slow):
            super().__init__()
            self.net, self.slow = mlp(), slow
        def forward(self, x):
            if self.training and self.slow:
                slow = os.path.join(here, "slow")
                if TaskContext.get().partitionId() == 1 and not os.path.exists(slow):
                    open(slow, "w").write(os.getcwd())
                open(os.path.join(here, "calls"), "a").write("x")
                time.sleep(2.0 if os.path.exists(slow) and open(slow).read() == os.getcwd() else 0.05)
            return self.net(x)

    made = estimator("shuffle", epochs=3)
    made._set(module=lambda: Net(False))
    quiet = made.fit(df)
    import bigdl_lite.ml.watching as module
    counts = set()
    class Watch(module.Callbacks):
        def __call__(self, event):
            counts.add(sc._jsc.sc().getExecutorIds().size())
            if event.get("step") == 3:
                time.sleep(8)  # idle for so long that Spark lets executors go
    module.Callbacks = Watch
    made._set(module=lambda: Net(True))
    hurt = made.fit(df)
    chosen = estimator("auto", epochs=1).fit(df).engine
    try:
        estimator("barrier", epochs=1).fit(df)
        refused = ""
    except Exception as error:
        refused = f"{type(error).__name__}: {error}"
    print(json.dumps({"equal": torch.equal(flat(quiet.module), flat(hurt.module)), "executors": sorted(counts), "chosen": chosen,
                      "calls": os.path.getsize(os.path.join(here, "calls")), "refused": refused,
                      "steps": len([s for s in hurt.history if "step" in s])}))
    """
    told = result(run(program), 420)
    print(told)
    assert told["equal"] and told["steps"] == 12 and told["chosen"] == "shuffle"
    assert told["calls"] > 24, "tasks ran twice"
    assert len(told["executors"]) > 1, "executors left and joined"
    assert told["refused"].startswith("RecipeError") and "dynamicAllocation" in told["refused"]


def test_with_everything_encrypted_shuffle_trains_and_opens_no_socket(run):
    """spark.authenticate, network crypto and io encryption: the same weights; barrier is refused by name, auto takes shuffle."""
    program = """
    import socket
    conf = {"spark.ui.showConsoleProgress": "false", "spark.authenticate": "true", "spark.authenticate.secret": "a secret",
            "spark.network.crypto.enabled": "true", "spark.io.encryption.enabled": "true"}
    spark = local_session(cluster=(2, 1, 1024), conf=conf)
    spark.sparkContext.setLogLevel("OFF")
    df = frame(spark, X, Y, [50, 30])
    here = os.getcwd()
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()
        def forward(self, x):
            if self.training:
                with open(os.path.join(here, "sockets"), "a") as out:
                    for fd in os.listdir("/proc/self/fd"):
                        try:
                            target = os.readlink("/proc/self/fd/" + fd)
                        except OSError:
                            continue
                        if target.startswith("socket:") or "memfd:bigdl_lite" in target:
                            out.write(target + "\\\\n" if "memfd" in target else "")
            return self.net(x)
    made = estimator("shuffle", epochs=3)
    made._set(module=Net)
    hurt = made.fit(df)
    reference = estimator("local", epochs=3).fit(df)
    told = {"close": torch.allclose(flat(hurt.module), flat(reference.module), atol=1e-6),
            "windows": open(os.path.join(here, "sockets")).read(), "chosen": estimator("auto", epochs=1).fit(df).engine}
    try:
        estimator("barrier", epochs=1).fit(df)
    except Exception as error:
        told["refused"] = f"{type(error).__name__}: {error}"
    from bigdl_lite import BarrierEngine
    allowed = estimator(BarrierEngine(allow_clear=True), epochs=3).fit(df)
    told["allowed"] = torch.allclose(flat(allowed.module), flat(reference.module), atol=1e-6)
    print(json.dumps(told))
    """
    told = result(run(program), 420)
    print(told)
    assert told["close"] and told["allowed"] and told["windows"] == "" and told["chosen"] == "shuffle"
    assert told["refused"].startswith("RecipeError") and "allow_clear=True" in told["refused"]
