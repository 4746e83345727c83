"""Programs that run unchanged on a classic session and through Spark Connect: program(spark, folder) -> values that JSON can carry.

    python -m tests.cluster.programs sc://host:port FOLDER      runs those that lines on stdin name; answers are lines on stdout

A process is of one kind: pyspark's functions speak to a JVM or to a server, for all sessions of the process.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bigdl_lite import Callback, Raw, TorchClassifier, TorchModel, TorchRegressor

ROWS = 96


def values() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    x = rng.standard_normal((ROWS, 5)).astype("f4")
    return x, (x @ rng.standard_normal((5, 3))).argmax(1)


def table(spark: Any) -> Any:
    x, y = values()
    rows = [(i, row.tolist(), int(label)) for i, (row, label) in enumerate(zip(x, y, strict=True))]
    return spark.createDataFrame(rows, "id long, features array<float>, label long")


def make_net() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))


def make_wide() -> nn.Module:
    """1.5 MB of weights: more than travels inside a function."""
    return nn.Sequential(nn.Linear(5, 60_000), nn.Tanh(), nn.Linear(60_000, 1))


def classifier(**more: Any) -> TorchClassifier:
    given = {"module": make_net, "optimizer": "sgd", "learningRate": 0.5, "epochs": 6, "batchSize": ROWS, "numWorkers": 3}
    return TorchClassifier(**{**given, "progress": "none", **more})


def weights(model: Any) -> list[float]:
    return torch.cat([p.detach().reshape(-1) for p in model.module.parameters()]).tolist()


def scores(frame: Any, *names: str) -> list[Any]:
    return [[np.asarray(row[name]).tolist() for name in names] for row in frame.orderBy("id").collect()]


# ---- programs ---------------------------------------------------------------------------------------------------------


def full_batches(spark: Any, folder: Path) -> Any:
    """Every step takes all rows, so it does not matter who has which."""
    df = table(spark)
    model = classifier().fit(df)
    told = [line["loss"] for line in model.history if "step" not in line]
    return {"weights": weights(model), "losses": told, "scores": scores(model.transform(df), "probability", "prediction")}


def watched(spark: Any, folder: Path) -> Any:
    """Validation, early stop, weights of classes, what callbacks hear, what the summary says."""
    heard: list[str] = []

    class Ears(Callback):
        def on_epoch(self, event: Any) -> None:
            heard.append("epoch")

    df = table(spark)
    model = classifier(
        validationFraction=0.25, metrics=["accuracy"], restoreBest=True, classWeights="balanced", callbacks=[Ears()], epochs=4
    ).fit(df)
    return {"validation": model.summary.validationHistory[-1], "epochs": heard, "report": "compute" in model.summary.report}


def columns_of_all_kinds(spark: Any, folder: Path) -> Any:
    """ml vectors, several inputs, raw bytes; named groups of columns."""
    from pyspark.ml.feature import VectorAssembler

    x, y = values()
    rows = [(i, *map(float, row), row.tobytes(), float(label)) for i, (row, label) in enumerate(zip(x, y, strict=True))]
    df = spark.createDataFrame(rows, "id long, a double, b double, c double, d double, e double, raw binary, label double")
    df = VectorAssembler(inputCols=["a", "b"], outputCol="vector").transform(df)
    model = TorchRegressor(
        module=Sum, inputCols=["vector", ["c", "d", "e"], "raw"], decoders={"raw": Raw((5,), "float32")}, optimizer="sgd",
        learningRate=0.05, epochs=3, batchSize=ROWS, numWorkers=2, progress="none",
    ).fit(df)  # fmt: skip
    return {"weights": weights(model), "scores": scores(model.transform(df), "prediction")}


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(2, 1), nn.Linear(3, 1), nn.Linear(5, 1)

    def forward(self, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return self.one(a) + self.two(b) + self.three(c)


def more_weights_than_fit_into_a_function(spark: Any, folder: Path) -> Any:
    from bigdl_lite.engine import barrier

    before, barrier._PARTITION = barrier._PARTITION, 1 << 18  # so that the result comes in several partitions
    try:
        df = table(spark).withColumnRenamed("label", "y").selectExpr("id", "features", "float(y) AS label")
        made = TorchRegressor(
            module=make_wide, optimizer="sgd", learningRate=1e-5, epochs=2, batchSize=ROWS, numWorkers=2, progress="none"
        )
        model = made.fit(df)
    finally:
        barrier._PARTITION = before
    return {"weights": weights(model)[::997], "scores": scores(model.transform(df), "prediction")}


def many_ways_to_score(spark: Any, folder: Path) -> Any:
    df = table(spark)
    model = classifier().fit(df)
    spark.udf.register("score", model.udf())
    df.createOrReplaceTempView("t")
    by_sql = spark.sql("SELECT id, score(features).prediction AS p FROM t")
    df.select("id", "features").write.mode("overwrite").parquet(f"{folder}/rows")
    stream = spark.readStream.schema("id long, features array<float>").parquet(f"{folder}/rows")
    query = model.transform(stream).select("id", "prediction").writeStream.format("memory").queryName("scored")
    running = query.option("checkpointLocation", f"{folder}/stream").trigger(availableNow=True).start()
    running.awaitTermination(60)
    return {
        "transform": scores(model.transform(df), "prediction"), "sql": scores(by_sql, "p"),
        "stream": scores(spark.table("scored"), "prediction"),
        "evaluate": model.evaluate(df, ["accuracy", "loss"], loss=nn.CrossEntropyLoss()),
    }  # fmt: skip


def saved_and_loaded(spark: Any, folder: Path) -> Any:
    from pyspark.ml import Pipeline, PipelineModel
    from pyspark.ml.feature import VectorAssembler

    df = table(spark).selectExpr("id", *(f"features[{i}] AS f{i}" for i in range(5)), "label")
    stages = [VectorAssembler(inputCols=[f"f{i}" for i in range(5)], outputCol="features"), classifier()]
    fitted = Pipeline(stages=stages).fit(df)
    model, est = fitted.stages[-1], stages[-1]
    before = scores(fitted.transform(df), "prediction")
    model.save(f"{folder}/model")
    with contextlib.suppress(Exception):
        model.save(f"{folder}/model")
        raise SystemExit("a saved model was overwritten in silence")
    model.write().overwrite().save(f"{folder}/model")
    est.save(f"{folder}/estimator")
    again = type(est).load(f"{folder}/estimator")
    assembled = fitted.stages[0].transform(df)
    found = {
        "loaded": scores(TorchModel.load(f"{folder}/model").transform(assembled), "prediction") == before,
        "estimator": (again.uid, again.getEpochs()) == (est.uid, est.getEpochs()),
    }
    fitted.save(f"{folder}/pipeline")
    found["pipeline"] = scores(PipelineModel.load(f"{folder}/pipeline").transform(df), "prediction") == before
    return found


def searched(spark: Any, folder: Path) -> Any:
    from pyspark.ml.evaluation import MulticlassClassificationEvaluator
    from pyspark.ml.tuning import CrossValidator, ParamGridBuilder

    est = classifier(epochs=3)
    grid = ParamGridBuilder().addGrid(est.learningRate, [1e-4, 0.5]).build()
    judge = MulticlassClassificationEvaluator(metricName="accuracy")
    found = CrossValidator(estimator=est, estimatorParamMaps=grid, evaluator=judge, numFolds=2, seed=1).fit(table(spark))
    return {"better": int(np.argmax(found.avgMetrics)), "weights": len(weights(found.bestModel))}


def refused(spark: Any, folder: Path) -> Any:
    """What cannot be, by name: {case: (type of the error, message)}."""
    df = table(spark)
    holes = df.selectExpr("id", "IF(id = 5, NULL, features) AS features", "label")
    cases = {
        "shuffle": lambda: classifier(engine="shuffle").fit(df),
        "too many workers": lambda: classifier(numWorkers=99).fit(df),
        "a hole": lambda: classifier().fit(holes),
        "no column": lambda: classifier(featuresCol="nothing").fit(df),
        "the user's own": lambda: classifier(module=Broken).fit(df),
        "a cast": lambda: classifier().fit(df.selectExpr("features", "assert_true(id < 50) IS NULL AS ok", "label").where("ok")),
    }
    return {name: _error(case) for name, case in cases.items()}


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            raise ZeroDivisionError("of the user's own")
        return self.linear(x)


def in_threads_of_this_program(spark: Any, folder: Path) -> Any:
    return {"weights": weights(classifier(engine="local").fit(table(spark)))}


def a_rank_is_killed(spark: Any, folder: Path) -> Any:
    """The stage runs again, from the last state that came to this program."""
    flag = folder / "killed"
    model = classifier(module=partial(Dying, str(flag)), epochs=30, recoveryInterval=0.0).fit(table(spark))
    return {"killed": flag.exists(), "weights": weights(model)}


def nothing_happens(spark: Any, folder: Path) -> Any:
    return {"weights": weights(classifier(module=partial(Dying, ""), epochs=30).fit(table(spark)))}


class Dying(nn.Module):
    """Kills its process in the tenth step, once."""

    def __init__(self, flag: str) -> None:
        super().__init__()
        self.net, self.flag, self.steps = make_net(), flag, 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.steps += self.training
        if self.flag and self.steps == 10:
            with contextlib.suppress(FileExistsError):
                os.close(os.open(self.flag, os.O_CREAT | os.O_EXCL))
                os.kill(os.getpid(), signal.SIGKILL)
        return self.net(x)


def goes_on_from_a_checkpoint(spark: Any, folder: Path) -> Any:
    df, there = table(spark), f"{folder}/checkpoints"
    whole = classifier(epochs=4).fit(df)
    classifier(epochs=2, checkpointDir=there).fit(df)
    return {"whole": weights(whole), "resumed": weights(classifier(epochs=4, checkpointDir=there, resume=True).fit(df))}


def interrupted(spark: Any, folder: Path) -> Any:
    """Ctrl-C, or a cancelled cell: the fit ends soon, its tasks with it, and the session is as good as before."""
    began = time.monotonic()
    threading.Timer(6.0, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    try:
        classifier(module=Slow, epochs=200).fit(table(spark))
    except KeyboardInterrupt:
        seconds = time.monotonic() - began - 6.0
    else:
        seconds = float("nan")
    return {"seconds": seconds, "weights": weights(classifier().fit(table(spark)))}


class Slow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = make_net()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.5 if self.training else 0.0)
        return self.net(x)


def asked_by_doctor(spark: Any, folder: Path) -> Any:
    from bigdl_lite import doctor

    found = doctor(spark, deadline=60)  # a server that has just started has no worker yet
    failed = [check.name for check in found.checks if check.status == "fail"]
    return {"engine": found.engine, "why": found.why, "text": repr(found), "failed": failed}


def _error(case: Any) -> list[str]:
    try:
        case()
    except Exception as error:
        return [type(error).__name__, str(error)]
    return ["", "no error"]


def the_package_in_a_zip(spark: Any, folder: Path) -> Any:
    """On executors that do not have the package; classes of this module go by value, as those of a notebook do."""
    from pyspark import cloudpickle

    from bigdl_lite.ml.zip import build

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    without = _error(lambda: classifier(numWorkers=2).fit(table(spark)))
    spark.addArtifacts(str(build(f"{folder}/bigdl_lite.zip")), pyfile=True)
    return {"without": without, "weights": weights(classifier(numWorkers=2).fit(table(spark)))}


def main(url: str, folder: str) -> None:
    from pyspark.sql import SparkSession

    answers, sys.stdout = sys.stdout, sys.stderr  # what programs print is no answer
    torch.set_num_threads(1)
    spark = SparkSession.builder.remote(url).getOrCreate()
    for line in sys.stdin:
        name = line.strip()
        try:
            there = Path(folder, name)
            there.mkdir()
            told = {"ok": globals()[name](spark, there)}
        except BaseException:
            told = {"error": traceback.format_exc()}
        print(json.dumps(told), file=answers, flush=True)
    spark.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
