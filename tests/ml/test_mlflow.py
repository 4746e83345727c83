"""MLflow's own ways to keep a model, with models of ours: what they load gives the same outputs."""

from __future__ import annotations

import inspect
import os

import numpy as np
import pytest
import torch
from pyspark.ml import Pipeline, PipelineModel
from pyspark.ml.feature import SQLTransformer

from bigdl_lite import TorchClassifier, TorchModel
from bigdl_lite.observe.events import Callbacks
from bigdl_lite.observe.mlflow import MLflow
from tests.conftest import frame, mlp, problem
from tests.observe.made import start

mlflow = pytest.importorskip("mlflow", reason="needs mlflow: pip install 'bigdl_lite[mlflow]'")
pytest.importorskip("sqlalchemy", reason="a store on this machine needs sqlalchemy and alembic: pip install 'bigdl_lite[mlflow]'")
pytest.importorskip("alembic", reason="a store on this machine needs sqlalchemy and alembic: pip install 'bigdl_lite[mlflow]'")

X, Y = problem(40)
formats = pytest.mark.skipif(
    "serialization_format" not in inspect.signature(mlflow.pytorch.save_model).parameters,
    reason=f"mlflow {mlflow.__version__} cannot be told how to write a module; a newer one can",
)
pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store on this machine, mlflow's current one while these tests run; and a place where Spark may write."""
    folder, before = tmp_path_factory.mktemp("mlflow"), mlflow.get_tracking_uri()
    here = os.getcwd()
    os.chdir(folder)  # a store makes a folder mlruns where it is opened
    os.environ["MLFLOW_DFS_TMP"] = str(folder / "spark")
    mlflow.set_tracking_uri(f"sqlite:///{folder}/runs.db")
    mlflow.set_experiment(experiment_id=mlflow.create_experiment("models", artifact_location=(folder / "artifacts").as_uri()))
    yield folder
    os.chdir(here)
    del os.environ["MLFLOW_DFS_TMP"]
    mlflow.set_tracking_uri(before)


@pytest.fixture(scope="module")
def df(spark):
    return frame(spark, X, Y, [40]).cache()


@pytest.fixture(scope="module")
def pipeline(df):
    classifier = TorchClassifier(module=mlp, batchSize=20, epochs=1, engine="local", numWorkers=1, progress="none")
    return Pipeline(stages=[SQLTransformer(statement="SELECT * FROM __THIS__"), classifier]).fit(df)


def scores(model, df):
    return np.array([row.rawPrediction.toArray() for row in model.transform(df).collect()])


def needs():
    """Named, so that mlflow does not load the model in another process to find out."""
    return mlflow.spark.get_default_pip_requirements()


@pytest.mark.slow
def test_a_pipeline_with_our_model_goes_through_mlflow_spark(store, df, pipeline):
    with mlflow.start_run():
        info = mlflow.spark.log_model(pipeline, "model", pip_requirements=needs())
    loaded = mlflow.spark.load_model(info.model_uri)
    assert isinstance(loaded, PipelineModel) and isinstance(loaded.stages[-1], TorchModel)
    np.testing.assert_array_equal(scores(loaded, df), scores(pipeline, df))


@pytest.mark.slow
def test_the_callback_logs_the_model_of_a_fit(store, df, pipeline):
    model = pipeline.stages[-1]
    with Callbacks([MLflow(log_model=True)], run="run-1") as told:
        told(start())
        told.ended(model.history, model)
    (run,) = mlflow.MlflowClient().search_runs([mlflow.get_experiment_by_name("models").experiment_id], order_by=["created DESC"])[:1]
    assert run.info.status == "FINISHED"
    loaded = mlflow.spark.load_model(f"runs:/{run.info.run_id}/model")
    np.testing.assert_array_equal(scores(loaded, df), scores(model, df))


@formats
def test_the_module_goes_through_mlflow_pytorch_without_a_pickle(store, pipeline):
    module, x = pipeline.stages[-1].module, torch.from_numpy(X)
    with mlflow.start_run():
        how = {"input_example": X[:2], "serialization_format": "pt2", "pip_requirements": ["torch"]}
        info = mlflow.pytorch.log_model(module, name="module", **how)
    loaded = mlflow.pytorch.load_model(info.model_uri)
    torch.testing.assert_close(loaded(x), module(x), rtol=0, atol=1e-6)  # for any number of rows
    assert (loaded(x) - mlp()(x)).abs().max() > 1e-3


@formats
def test_the_module_goes_through_mlflow_pytorch_as_a_pickle_where_that_is_allowed(store, pipeline, monkeypatch):
    module, x = pipeline.stages[-1].module, torch.from_numpy(X)
    with mlflow.start_run():
        info = mlflow.pytorch.log_model(module, name="pickled", serialization_format="pickle", pip_requirements=["torch"])
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "true")
    torch.testing.assert_close(mlflow.pytorch.load_model(info.model_uri)(x), module(x), rtol=0, atol=0)
