"""The estimator behaves as people who know pyspark.ml expect."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from pyspark.ml import Pipeline, PipelineModel
from pyspark.ml.evaluation import BinaryClassificationEvaluator, MulticlassClassificationEvaluator, RegressionEvaluator
from pyspark.ml.feature import VectorAssembler
from pyspark.ml.linalg import Vectors
from pyspark.ml.tuning import CrossValidator, ParamGridBuilder
from pyspark.sql import functions as F
from torch import nn

from bigdl_lite import Raw, TorchClassifier, TorchEstimator, TorchModel, TorchRegressor
from bigdl_lite.errors import RecipeError
from tests.conftest import flat, frame, mlp, problem

X, Y = problem(120)


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.02)


class Two(nn.Module):
    """A user and an item, each an index, and a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(4, 3), nn.Embedding(5, 3)
        self.out = nn.Linear(8, 1)

    def forward(self, user, item, more):
        return self.out(torch.cat([self.user(user), self.item(item), more], 1))


@pytest.fixture(scope="module")
def df(spark):
    return frame(spark, X, Y, [70, 50]).withColumn("weight", F.lit(2.0)).cache()


def quick(**more):
    settings = {"module": mlp, "optimizer": adam, "batchSize": 40, "epochs": 4, "engine": "local", "numWorkers": 1}
    return TorchClassifier(**(settings | {"progress": "none"} | more))


def test_every_param_has_a_default_or_is_required_and_a_doc():
    estimator = TorchEstimator()
    assert {p.name for p in estimator.params if not estimator.isDefined(p)} == {
        "module", "loss", "scheduler", "numWorkers", "clipNorm", "clipValue", "checkpointDir", "exchange", "weightCol", "classWeights",
        "validationIndicatorCol", "validationFraction", "validationTrigger", "patience", "restoreBest", "endTrigger", "averaging",
        "initialModel", "limitBatches", "outputCols", "learningRate", "weightDecay", "momentum", "featuresCol", "resourceProfile",
    }  # fmt: skip
    assert all(p.doc for p in estimator.params)
    assert "rows of one step over all workers" in estimator.explainParam("batchSize")


def test_a_classifier_learns_and_keeps_every_input_column(df):
    model = quick(epochs=10).fit(df)
    scored = model.transform(df)
    assert scored.columns == ["features", "label", "weight", "rawPrediction", "probability", "prediction"]
    assert MulticlassClassificationEvaluator(metricName="accuracy").evaluate(scored) > 0.8
    row = scored.first()
    assert row.probability.toArray().sum() == pytest.approx(1) and row.prediction == row.probability.toArray().argmax()
    assert isinstance(model, TorchModel) and model.numClasses == 3


def test_fit_takes_params_for_one_fit_only(df):
    estimator = quick()
    model = estimator.fit(df, {estimator.epochs: 1, estimator.predictionCol: "guess"})
    assert len([line for line in model.history if "step" not in line]) == 1
    assert "guess" in model.transform(df).columns and estimator.getEpochs() == 4
    assert model.uid == estimator.uid


def test_a_copy_is_independent(df):
    estimator = quick()
    other = estimator.copy({estimator.batchSize: 7})
    assert (estimator.getBatchSize(), other.getBatchSize()) == (40, 7)
    model = estimator.fit(df)
    assert model.copy({model.predictionCol: "other"}).transform(df).columns[-1] == "other"
    assert model.getPredictionCol() == "prediction"


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(df):
    a, b, c = (flat(quick(seed=s).fit(df).module) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_history_has_a_line_for_each_step_and_each_epoch(df):
    history = quick(logInterval=2).fit(df).history
    steps = [line for line in history if "step" in line]
    assert [line["step"] for line in steps] == [0, 2, 4, 6, 8, 10]
    epochs = [line for line in history if "step" not in line]
    assert [line["rows"] for line in epochs] == [120] * 4 and epochs[-1]["loss"] < epochs[0]["loss"]
    keys = {"step", "epoch", "loss", "rows", "weight", "lr", "seconds", "compute_s", "sync_s", "data_s", "sync_ratio", "bytes_sent"}
    assert all(set(line) == keys for line in steps)
    assert all(line["seconds"] >= line["compute_s"] for line in steps)


def test_scalar_columns_indices_and_vectors_become_arguments(spark):
    rng = np.random.default_rng(0)
    rows = [
        (int(u), int(i), Vectors.sparse(2, {0: float(u)}) if u % 2 else Vectors.dense([0.5, 1.5]), float(u + i))
        for u, i in zip(rng.integers(0, 4, 50), rng.integers(0, 5, 50), strict=True)
    ]
    df = spark.createDataFrame(rows, ["user", "item", "more", "label"])
    estimator = TorchRegressor(
        module=Two, optimizer=adam, inputCols=["user", "item", "more"], epochs=30, batchSize=16, engine="local", numWorkers=2,
        progress="none",
    )  # fmt: skip
    model = estimator.fit(df)
    scored = model.transform(df)
    assert RegressionEvaluator(metricName="r2").evaluate(scored) > 0.5
    assert dict(scored.dtypes)["prediction"] == "double"


def test_bytes_are_read_as_arrays_of_the_given_shape(spark):
    images = (X[:, :4] * 10).astype("i1")
    rows = [(bytearray(image.tobytes()), int(y)) for image, y in zip(images, Y, strict=True)]
    df = spark.createDataFrame(rows, "image binary, label long")
    net = nn.Sequential(nn.Flatten(), nn.LazyLinear(3))
    net(torch.zeros(1, 2, 2))
    raw = quick(module=Floats(net), inputCols=["image"], decoders={"image": Raw((2, 2), "int8")}).fit(df)
    own = quick(module=Floats(net), inputCols=["image"], decoders={"image": two_by_two}).fit(df)
    assert torch.equal(flat(raw.module), flat(own.module))
    a, b = (m.transform(df).select("prediction").collect() for m in (raw, own))
    assert a == b


def two_by_two(data: bytes) -> np.ndarray:
    return np.frombuffer(data, "i1").reshape(2, 2)


class Floats(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x.float())


def test_an_rdd_of_numpy_tuples_trains_like_the_frame(spark, df):
    pairs = [(x, y) for x, y in zip(X, Y, strict=True)]
    rdd = spark.sparkContext.parallelize(pairs, 2)
    model = quick(batchSize=1000, numWorkers=2).fit(rdd)
    other = quick(batchSize=1000, numWorkers=2).fit(df)
    torch.testing.assert_close(flat(model.module), flat(other.module), rtol=0, atol=1e-6)


def test_a_binary_classifier_with_one_output(df):
    binary = df.withColumn("label", (F.col("label") > 0).cast("double"))
    one = quick(module=lambda: mlp(classes=1), loss=nn.BCEWithLogitsLoss(), epochs=20).fit(binary)
    assert BinaryClassificationEvaluator().evaluate(one.transform(binary)) > 0.8
    assert one.numClasses == 2


def test_cross_validation_runs_fits_side_by_side(df):
    estimator = quick(numWorkers=2, engine="barrier")
    grid = ParamGridBuilder().addGrid(estimator.epochs, [1, 12]).build()
    evaluator = MulticlassClassificationEvaluator(metricName="accuracy")
    found = CrossValidator(estimator=estimator, estimatorParamMaps=grid, evaluator=evaluator, numFolds=2, parallelism=2).fit(df)
    assert found.avgMetrics[1] > found.avgMetrics[0]
    assert found.bestModel.transform(df).count() == 120


def test_a_pipeline_is_saved_and_loaded(spark, tmp_path):
    columns = {f"x{i}": X[:, i].astype("f8").tolist() for i in range(5)}
    rows = list(zip(*columns.values(), Y.astype("f8").tolist(), strict=True))
    df = spark.createDataFrame(rows, [*columns, "label"])
    pipeline = Pipeline(stages=[VectorAssembler(inputCols=list(columns), outputCol="features"), quick()])
    model = pipeline.fit(df)
    model.write().overwrite().save(str(tmp_path / "model"))
    again = PipelineModel.load(str(tmp_path / "model"))
    a, b = (m.transform(df).select("probability", "prediction").collect() for m in (model, again))
    assert a == b
    assert again.stages[1].history == model.stages[1].history and again.stages[1].uid == model.stages[1].uid


def test_a_module_without_an_importable_maker_is_given_when_loading(df, tmp_path):
    model = quick(module=mlp()).fit(df)
    model.save(str(tmp_path / "model"))
    with pytest.raises(ValueError, match="setModule"):
        TorchModel.load(str(tmp_path / "model")).transform(df)
    again = TorchModel.load(str(tmp_path / "model"), module=mlp)
    assert torch.equal(flat(again.module), flat(model.module))
    with pytest.raises(ValueError, match="not the one that was saved"):
        TorchModel.load(str(tmp_path / "model"), module=lambda: mlp(features=6))


def test_a_file_cannot_choose_what_runs(df, tmp_path):
    model = quick().fit(df)
    model.save(str(tmp_path / "model"))
    told = (tmp_path / "model" / "model.json").read_text()
    assert '"tests.conftest:mlp"' in told
    for name in ("os:abort", "subprocess:run", "builtins:exec", "torch:load", "nowhere:f"):
        (tmp_path / "model" / "model.json").write_text(told.replace("tests.conftest:mlp", name))
        loaded = TorchModel.load(str(tmp_path / "model"))
        with pytest.raises(ValueError, match="setModule"):
            _ = loaded.module


@pytest.mark.parametrize("engine", ["barrier", "shuffle"])
def test_code_of_a_notebook_trains_on_executors(spark, engine):
    """Classes and functions of __main__ travel by value."""
    code = """
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(5, 3)
    def forward(self, x):
        return self.inner(x)
def loss(output, target):
    return nn.functional.cross_entropy(output, target)
"""
    notebook = {"__name__": "__main__"}
    exec(compile(code, "<notebook>", "exec"), notebook)
    df = frame(spark, X, Y, [60, 60])
    estimator = TorchEstimator(
        module=notebook["Net"], loss=notebook["loss"], optimizer=adam, engine=engine, numWorkers=2, batchSize=60, progress="none"
    )
    model = estimator.fit(df)
    assert dict(model.transform(df).dtypes)["prediction"] == "array<float>"
    assert len(model.transform(df).first().prediction) == 3


def test_unused_and_frozen_parameters_are_legal(df):
    def make():
        net = mlp()
        net[0].weight.requires_grad_(False)
        net.register_parameter("spare", nn.Parameter(torch.ones(3)))
        return net

    for engine in ("local", "barrier", "shuffle"):
        model = quick(module=make, engine=engine, numWorkers=2).fit(df)
        torch.manual_seed(0)
        assert torch.equal(model.module.spare, torch.ones(3)) and torch.equal(model.module[0].weight, make()[0].weight)
        assert model.transform(df).count() == 120


def test_auto_takes_the_barrier_where_the_workers_fit(df, caplog):
    with caplog.at_level("INFO", "bigdl_lite"):
        assert quick(engine="auto", numWorkers=2, epochs=1).fit(df).engine == "barrier"
        assert quick(engine="auto", numWorkers=6, epochs=1).fit(df).engine == "shuffle"
    assert "engine=shuffle: 6 workers, 4 slots" in caplog.text


class Deep(nn.Module):
    """Its tensors lie two levels deep, where no name is theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x):
        return [[self.net(x), x]]


def test_a_module_without_outputs_that_have_a_name_trains_and_says_that_it_cannot_be_scored_here(df, tmp_path):
    loss = nn.CrossEntropyLoss()
    estimator = TorchEstimator(
        module=Deep, loss=lambda output, target: loss(output[0][0], target), engine="local", numWorkers=1, progress="none"
    )
    model = estimator.fit(df)
    model.save(str(tmp_path / "model"))
    with pytest.raises(ValueError, match="returns one tensor"):
        TorchModel.load(str(tmp_path / "model")).transform(df)


def test_a_file_cannot_have_a_module_imported_unless_it_is_trusted(df, tmp_path, monkeypatch):
    """The name in the file is looked up among what the program has imported; trust=True imports it."""
    (tmp_path / "somebodys_nets.py").write_text(
        "import pathlib, torch.nn\n"
        f"pathlib.Path({str(tmp_path)!r}, 'imported').touch()\n"
        "def make():\n    return torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))\n"
    )
    TorchClassifier(module=mlp, engine="local", numWorkers=1, progress="none").fit(df).save(str(tmp_path / "model"))
    told = json.loads((tmp_path / "model" / "model.json").read_text())
    (tmp_path / "model" / "model.json").write_text(json.dumps(told | {"module": "somebodys_nets:make"}))
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(RecipeError, match="has not imported"):
        TorchModel.load(str(tmp_path / "model")).transform(df)
    assert not (tmp_path / "imported").exists()
    assert TorchModel.load(str(tmp_path / "model"), trust=True).transform(df).count() == df.count()
    assert (tmp_path / "imported").exists()
