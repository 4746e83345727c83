"""What MLflow keeps of a fit, read back from a store on this machine."""

from __future__ import annotations

import sys
import threading

import pytest

from bigdl_lite.errors import RecipeError
from bigdl_lite.observe.events import Callback, Callbacks
from bigdl_lite.observe.mlflow import MLflow
from tests.observe.made import history, start
from tests.observe.test_tensorboard import told

mlflow = pytest.importorskip("mlflow", reason="needs mlflow: pip install 'bigdl_lite[mlflow]'")
pytest.importorskip("sqlalchemy", reason="a store on this machine needs sqlalchemy and alembic: pip install 'bigdl_lite[mlflow]'")
pytest.importorskip("alembic", reason="a store on this machine needs sqlalchemy and alembic: pip install 'bigdl_lite[mlflow]'")

LINES = [start(10, 2), *history(2, 5, validated=True)]


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/runs.db"


@pytest.fixture
def client(uri, tmp_path, request, monkeypatch):
    """A new experiment in the store, which is the current one while a test runs; artifacts lie in tmp_path."""
    monkeypatch.chdir(tmp_path)  # a store makes a folder mlruns where it is opened
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(uri)
    client = mlflow.MlflowClient()
    client.create_experiment(request.node.name, artifact_location=(tmp_path / "artifacts").as_uri())
    mlflow.set_experiment(request.node.name)
    yield client
    while mlflow.active_run():
        mlflow.end_run()
    mlflow.set_tracking_uri(before)


def runs(client, request):
    return client.search_runs([client.get_experiment_by_name(request.node.name).experiment_id])


def metric(client, run, name):
    return {m.step: pytest.approx(m.value) for m in client.get_metric_history(run.info.run_id, name)}


def test_settings_metrics_and_artifacts_of_a_run_of_its_own(client, request, tmp_path):
    told(MLflow(run_name="first"), LINES)
    (run,) = runs(client, request)
    assert run.info.run_name == "first" and run.info.status == "FINISHED" and mlflow.active_run() is None
    assert run.data.params == {"batchSize": "10", "engine": "local", "workers": "2", "epochs": "2", "steps": "10", "rows": "20"}
    lines = LINES[1:]
    assert metric(client, run, "loss") == {line["step"] + 1: line["loss"] for line in lines if "step" in line}
    assert metric(client, run, "epoch_loss") == {5: lines[6]["loss"], 10: lines[13]["loss"]}
    assert metric(client, run, "val_accuracy") == {5: lines[5]["val_accuracy"], 10: lines[12]["val_accuracy"]}
    assert {f.path for f in client.list_artifacts(run.info.run_id)} == {"report.txt", "fit.png"}
    report = open(client.download_artifacts(run.info.run_id, "report.txt", str(tmp_path)), encoding="utf-8").read()
    assert "local, 2 workers" in report and "rows/s in steps" in report


def test_steps_are_thinned_to_some_hundreds(client, request):
    told(MLflow(), [start(2000, 1), *history(1, 2000)])
    (run,) = runs(client, request)
    assert len(metric(client, run, "loss")) == 500 and len(metric(client, run, "epoch_loss")) == 1


def test_a_run_of_the_user_is_used_and_left_open(client, request, caplog):
    with mlflow.start_run(run_name="mine") as mine:
        told(MLflow(experiment="other"), LINES)
        assert "run_name and experiment are not used" in caplog.text
        assert mlflow.active_run().info.run_id == mine.info.run_id and client.get_run(mine.info.run_id).info.status == "RUNNING"
        told(MLflow(), [start(99, 9), *LINES[1:]], run="run-2")  # the settings differ, and cannot be changed: metrics come all the same
        told(MLflow(), LINES, run="run-3", error=RuntimeError("lost"))
        assert client.get_run(mine.info.run_id).info.status == "RUNNING"
    (run,) = runs(client, request)
    assert run.info.run_name == "mine" and run.data.params["steps"] == "10" and run.data.metrics["epoch_loss"] > 0
    assert "settings are not logged" in caplog.text and "Traceback" not in caplog.text


@pytest.mark.parametrize(("error", "status"), [(RuntimeError("lost"), "FAILED"), (KeyboardInterrupt(), "KILLED")])
def test_its_own_run_is_ended_where_the_fit_fails(client, request, error, status):
    told(MLflow(), LINES[:4], error=error)
    (run,) = runs(client, request)
    assert run.info.status == status and len(metric(client, run, "loss")) == 3 and mlflow.active_run() is None


def test_its_own_run_is_ended_where_another_callback_cannot_begin(client, request):
    class Refuses(Callback):
        def before_fit(self, run):
            raise OSError("no such place")

    with pytest.raises(OSError), Callbacks([MLflow(), Refuses()], run="run-1"):
        pass
    assert [run.info.status for run in runs(client, request)] == ["FAILED"] and mlflow.active_run() is None


def test_its_own_run_is_ended_where_the_server_goes_away_in_between(client, request, monkeypatch, caplog):
    def gone(*args, **more):
        raise ConnectionError("no route to the server")

    with Callbacks([MLflow(every=1)], run="run-1") as fit:
        fit(start())
        with monkeypatch.context() as patch:
            patch.setattr(mlflow.MlflowClient, "log_batch", gone)
            for line in history(1, 100):
                fit(line)
        fit.ended(history(1, 100))
    assert caplog.text.count("Traceback") == 1 and "no route to the server" in caplog.text
    (run,) = runs(client, request)
    assert run.info.status == "FINISHED" and mlflow.active_run() is None


def test_lines_from_another_thread_go_to_the_run_of_the_thread_that_calls_fit(client, request):
    with mlflow.start_run() as mine, Callbacks([MLflow()], run="run-1") as fit:
        thread = threading.Thread(target=lambda: [fit(line) for line in LINES])
        thread.start()
        thread.join()
        fit.ended(LINES[1:])
    (run,) = runs(client, request)
    assert run.info.run_id == mine.info.run_id and len(metric(client, run, "loss")) == 10


def test_another_store_may_be_named_and_the_users_is_left_as_it_is(client, request, uri, tmp_path):
    other = f"sqlite:///{tmp_path}/other.db"
    there = mlflow.MlflowClient(tracking_uri=other)
    there.create_experiment("there", artifact_location=(tmp_path / "there").as_uri())
    with mlflow.start_run() as mine:
        told(MLflow(experiment="there", tracking_uri=other), LINES)
        assert mlflow.active_run().info.run_id == mine.info.run_id
    assert mlflow.get_tracking_uri() == uri
    (run,) = there.search_runs([there.get_experiment_by_name("there").experiment_id])
    assert run.info.status == "FINISHED" and run.data.metrics["val_accuracy"] > 0
    assert [not run.data.metrics for run in runs(client, request)] == [True]


def test_an_experiment_is_made_where_it_is_new(client):
    told(MLflow(experiment="new"), LINES)
    assert len(client.search_runs([client.get_experiment_by_name("new").experiment_id])) == 1


def test_a_model_is_not_logged_into_another_store(client, tmp_path):
    callback = MLflow(tracking_uri=f"sqlite:///{tmp_path}/other.db", log_model=True)
    with pytest.raises(RecipeError, match=r"say mlflow.set_tracking_uri\('sqlite:.*other.db'\)"), Callbacks([callback], run="run-1"):
        pytest.fail("the fit began")


def test_a_setting_that_cannot_work_is_refused():
    with pytest.raises(RecipeError, match="every is 0"):
        MLflow(every=0)


def test_without_the_package_the_way_out_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ImportError, match=r"pip install 'bigdl_lite\[mlflow\]'"):
        MLflow()
