"""Settings of Spark that change where tasks run and how bytes travel: each engine trains the same weights, or is refused by name.

The table of the guide (deployment.md, "Settings of Spark") says which test tells what.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.cluster.standalone import TRAINS, Cluster, free_port
from tests.cluster.test_submit import package
from tests.engine.test_faults import result, run

__all__ = ["package", "run"]  # fixtures

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(600)]  # eight minutes on two busy cores

HEAD = """
from bigdl_lite import BarrierEngine, ShuffleEngine
def weights(engine, **more):
    return flat(estimator(engine, epochs=3, **more).fit(df).module)
def close(engine):
    return torch.allclose(weights(engine), reference, atol=1e-6)
def refusal(engine):
    try:
        weights(engine)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
def session(conf, cluster=(2, 1, 1024)):
    spark = local_session(cluster=cluster, conf={"spark.ui.showConsoleProgress": "false", **conf})
    spark.sparkContext.setLogLevel("OFF")
    return spark
"""

ELASTIC = """
import time
from bigdl_lite import ShuffleEngine
import bigdl_lite.ml.watching as module
sc, seen, Quiet = spark.sparkContext, [], module.Callbacks
class Watch(module.Callbacks):
    def __call__(self, event):
        if "step" in event:
            seen.append(sc._jsc.sc().getExecutorIds().size())
            if event["step"] == 3:
                until = time.monotonic() + 60  # idle for so long that Spark lets executors go
                while sc._jsc.sc().getExecutorIds().size() > 1 and time.monotonic() < until:
                    time.sleep(0.5)
                seen.append(sc._jsc.sc().getExecutorIds().size())

class Net(nn.Linear):
    def __init__(self, pause):
        super().__init__(3, 3)
        self.pause = pause
    def forward(self, x):
        if self.training:
            time.sleep(self.pause)  # tasks that wait for a slot for more than a second make Spark ask for executors
        return super().forward(x)

def trained(engine, pause):
    made = TorchClassifier(module=lambda: Net(pause), optimizer=lambda p: torch.optim.Adam(p, lr=0.05), batchSize=20, epochs=6,
                           numWorkers=3, engine=engine, progress="none")
    return torch.cat([p.detach().reshape(-1) for p in made.fit(df).module.parameters()])
quiet = trained(ShuffleEngine(share_memory=False), 0.0)
module.Callbacks = Watch
hurt = trained(ShuffleEngine(share_memory=False), 0.7)
module.Callbacks = Quiet
told = {"executors": seen, "equal": torch.equal(quiet, hurt), "auto": fit("auto").engine}
told["close"] = torch.allclose(hurt, trained("local", 0.0), atol=1e-6)
try:
    fit("barrier")
except Exception as error:
    told["refused"] = f"{type(error).__name__}: {error}"
print(json.dumps(told))
"""


STRAGGLER = """
from pyspark import TaskContext
spark = session({"spark.speculation": "true", "spark.speculation.interval": "50ms", "spark.speculation.multiplier": "1.1",
                 "spark.speculation.quantile": "0.1", "spark.speculation.minTaskRuntime": "50ms"}, cluster=(3, 1, 1024))
df = frame(spark, X, Y, [50, 30])
here = os.getcwd()
class Net(nn.Module):
    def __init__(self, slow):
        super().__init__()
        self.net, self.slow = mlp(), slow
    def forward(self, x):
        if self.training and self.slow:
            rank = TaskContext.get().partitionId()
            open(os.path.join(here, f"calls{rank}"), "a").write("x")
            time.sleep(0.5 * rank)
        return self.net(x)
def made(engine, slow):
    est = estimator(engine, epochs=3)
    est._set(module=lambda: Net(slow))
    return flat(est.fit(df).module)
told = {"equal": torch.equal(made("barrier", False), made("barrier", True))}
told["calls"] = [os.path.getsize(f"calls{rank}") for rank in (0, 1)]
print(json.dumps(told))
"""


def test_executors_that_come_and_go_beside_an_external_shuffle_service_change_no_bit(tmp_path: Path, package: Path) -> None:
    cluster, port = Cluster(tmp_path / "cluster"), free_port()
    cluster.environment |= {
        "SPARK_WORKER_CORES": "3", "SPARK_WORKER_MEMORY": "3g", "SPARK_CORES": "3",
        "SPARK_WORKER_OPTS": f"-Dspark.shuffle.service.enabled=true -Dspark.shuffle.service.port={port}",
    }  # fmt: skip
    settings = {
        "spark.executor.cores": "1", "spark.shuffle.service.enabled": "true", "spark.shuffle.service.port": str(port),
        "spark.dynamicAllocation.enabled": "true", "spark.dynamicAllocation.initialExecutors": "3",
        "spark.dynamicAllocation.minExecutors": "1", "spark.dynamicAllocation.maxExecutors": "3",
        "spark.dynamicAllocation.executorIdleTimeout": "2s", "spark.dynamicAllocation.cachedExecutorIdleTimeout": "2s",
    }  # fmt: skip
    options = [word for pair in settings.items() for word in ("--conf", "=".join(pair))]
    program = tmp_path / "program.py"
    program.write_text(TRAINS + ELASTIC)
    try:
        cluster.begin(workers=1)
        done = cluster.submit(program, "--py-files", str(package), *options)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        told = json.loads(done.stdout.strip().splitlines()[-1])
        print(told)
        assert told["equal"] and told["close"] and told["auto"] == "shuffle"
        assert min(told["executors"]) == 1 and max(told["executors"][told["executors"].index(1) :]) > 1, "they left, and others came"
        assert told["refused"].startswith("RecipeError") and "dynamicAllocation" in told["refused"]
        executors = "".join(log.read_text() for log in (cluster.folder / "work").rglob("stderr"))
        assert "Registering executor with local external shuffle service." in executors
    finally:
        left = cluster.close()
    assert not left


@pytest.mark.parametrize("adaptive", ["true", "false"])
def test_kryo_and_adaptive_execution_change_nothing(run, adaptive: str) -> None:
    program = f"""{HEAD}
spark = session({{"spark.serializer": "org.apache.spark.serializer.KryoSerializer", "spark.kryo.registrationRequired": "false",
                  "spark.sql.adaptive.enabled": "{adaptive}", "spark.sql.shuffle.partitions": "5"}})
# adaptive execution makes fewer partitions of these; sorted, because what comes from two executors comes in any order
df = frame(spark, X, Y, [50, 30]).repartition("label").sortWithinPartitions("features")
reference = weights("local")
print(json.dumps({{engine: close(engine) for engine in ("barrier", "shuffle")}} | {{"spark's": close(ShuffleEngine(share_memory=False)),
                  "serializer": spark.sparkContext.getConf().get("spark.serializer"), "parts": df.rdd.getNumPartitions()}}))
"""
    told = result(run(program), 300)
    print(told)
    assert told["barrier"] and told["shuffle"] and told["spark's"] and told["serializer"].endswith("KryoSerializer")
    assert (told["parts"] < 5) == (adaptive == "true"), "the control: the setting did something"


def test_speculation_runs_no_rank_twice(run) -> None:
    """Spark copies a task that is slow, but not one of a barrier stage: the straggler takes each of its steps once."""
    told = result(run(HEAD + STRAGGLER), 300)
    assert told == {"equal": True, "calls": [12, 12]}


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
def test_with_tls_between_drivers_and_executors_shuffle_trains_and_barrier_is_refused(run, tmp_path: Path) -> None:
    key, certificate, store = (tmp_path / name for name in ("key.pem", "cert.pem", "store.p12"))
    make = f"req -x509 -newkey rsa:2048 -nodes -keyout {key} -out {certificate} -days 1 -subj /CN=localhost"
    export = f"pkcs12 -export -inkey {key} -in {certificate} -out {store} -passout pass:secret1"
    for arguments in (make, export):
        subprocess.run(["openssl", *arguments.split()], check=True, capture_output=True, timeout=60)
    program = f"""{HEAD}
spark = session({{"spark.authenticate": "true", "spark.authenticate.secret": "a secret", "spark.ssl.rpc.enabled": "true",
                  "spark.ssl.rpc.protocol": "TLSv1.3", "spark.ssl.rpc.keyStore": "{store}", "spark.ssl.rpc.keyStorePassword": "secret1",
                  "spark.ssl.rpc.keyPassword": "secret1", "spark.ssl.rpc.keyStoreType": "PKCS12",
                  "spark.ssl.rpc.trustStore": "{store}", "spark.ssl.rpc.trustStorePassword": "secret1",
                  "spark.ssl.rpc.trustStoreType": "PKCS12"}})
df = frame(spark, X, Y, [50, 30])
reference = weights("local")
print(json.dumps({{"shuffle": close("shuffle"), "auto": estimator("auto", epochs=1).fit(df).engine, "refused": refusal("barrier"),
                  "allowed": close(BarrierEngine(allow_clear=True))}}))
"""
    told = result(run(program), 300)
    assert told["shuffle"] and told["allowed"] and told["auto"] == "shuffle"
    assert told["refused"].startswith("RecipeError") and "allow_clear=True" in told["refused"]
