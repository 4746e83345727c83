"""MLflow: a fit as a run, with its settings, its losses and its picture.

MLflow's active run belongs to the thread that calls fit, and events come from others: so the run is found or started there, and
everything after it goes to the run by its id.
"""

from __future__ import annotations

import importlib.util
import logging
import time
from dataclasses import dataclass, field
from typing import Any

from bigdl_lite.errors import RecipeError
from bigdl_lite.observe.events import Callback, EpochEnded, FitEnded, FitFailed, FitStarted, StepEnded, Validated
from bigdl_lite.observe.summary import Summary

_LOG = logging.getLogger("bigdl_lite")
_STEPS = 500  # of which metrics are logged, where `every` does not say
_BATCH = 200  # metrics of one call; MLflow takes 1000 at most
_SECONDS = 2.0  # that a metric may wait for its call
_LONGEST = 500  # characters of a setting; older servers take no more


@dataclass
class _Run:
    """id of the run; own: whether we started it, and end it; active: whether it is this thread's active run, too."""

    id: str
    client: Any
    own: bool
    active: bool
    every: int = 1
    engine: str = ""
    workers: int = 0
    waiting: list[Any] = field(default_factory=list)
    sent: float = field(default_factory=time.monotonic)


class MLflow(Callback):
    """Logs a fit into the active MLflow run of the thread that calls fit; where there is none, into a run of its own, which it ends.

    run_name, experiment   of the run that it starts
    tracking_uri           where; None: where mlflow logs anyway
    log_model              whether the TorchModel is logged at the end; mlflow.spark.load_model("runs:/<id>/model") loads it as the only
                           stage of a PipelineModel. It is saved as model.save() does it: nothing is pickled
    every                  metrics of every such step; None: of some 500 in all

        params     the settings of the estimator; engine, workers, steps, rows
        metrics    loss, learning_rate, rows_per_second; epoch_loss; val_loss, val_accuracy, ...; all at the number of steps done
        artifacts  report.txt, and fit.png where matplotlib is installed

    Raises ImportError where mlflow (or mlflow-skinny) is missing. What the tracking server refuses before the first step is an error
    of fit; later it is a warning, and the fit goes on.
    """

    def __init__(
        self, run_name: str | None = None, experiment: str | None = None, tracking_uri: str | None = None, log_model: bool = False,
        every: int | None = None,
    ) -> None:  # fmt: skip
        if every is not None and every < 1:
            raise RecipeError(f"every is {every}, must be at least 1")
        if importlib.util.find_spec("mlflow") is None:
            raise ImportError("MLflow needs the mlflow package: pip install 'bigdl_lite[mlflow]'")
        self.run_name, self.experiment, self.tracking_uri = run_name, experiment, tracking_uri
        self.log_model, self.every = log_model, every
        self._runs: dict[str, _Run] = {}  # fits may run side by side

    def before_fit(self, run: str) -> None:
        import mlflow

        here = self.tracking_uri in (None, mlflow.get_tracking_uri())
        if self.log_model and not here:
            raise RecipeError(
                f"log_model=True logs where mlflow logs anyway, which is {mlflow.get_tracking_uri()}: say "
                f"mlflow.set_tracking_uri({self.tracking_uri!r}) and leave tracking_uri out"
            )
        client = mlflow.MlflowClient(tracking_uri=self.tracking_uri)
        active = mlflow.active_run() if here else None
        if active is not None:
            if self.run_name or self.experiment:
                _LOG.warning("an MLflow run is active: the fit is logged into it, run_name and experiment are not used")
            self._runs[run] = _Run(active.info.run_id, client, own=False, active=True)
            return
        chosen = self._experiment(client)
        made: Any = (
            mlflow.start_run(run_name=self.run_name, experiment_id=chosen) if here
            else client.create_run(chosen or "0", run_name=self.run_name)
        )  # fmt: skip
        self._runs[run] = _Run(made.info.run_id, client, own=True, active=here)

    def on_fit_started(self, event: FitStarted) -> None:
        from mlflow.entities import Param

        run = self._runs[event.run]
        run.every = self.every or max(1, event.steps // _STEPS)
        run.engine, run.workers = event.engine, event.workers
        settings = {
            **event.params, "engine": event.engine, "workers": event.workers, "epochs": event.epochs, "steps": event.steps,
            "rows": event.rows,
        }  # fmt: skip
        try:
            run.client.log_batch(run.id, params=[Param(key, str(value)[:_LONGEST]) for key, value in settings.items()])
        except Exception as error:  # a run keeps the first value of a setting, and this may be the second fit in a run of the user's
            if run.own:
                raise
            _LOG.warning("the settings are not logged into the active MLflow run: %s", error)

    def on_step(self, event: StepEnded) -> None:
        if event.step % self._runs[event.run].every == 0:
            speed = event.rows / max(1e-9, event.seconds)
            self._note(event.run, {"loss": event.loss, "learning_rate": event.lr, "rows_per_second": speed}, event.step + 1)

    def on_epoch(self, event: EpochEnded) -> None:
        self._note(event.run, {"epoch_loss": event.loss}, event.done)

    def on_validation(self, event: Validated) -> None:
        self._note(event.run, dict(event.metrics), event.step)

    def on_fit_ended(self, event: FitEnded) -> None:
        run = self._runs[event.run]
        try:
            self._send(run)
            self._artifacts(run, Summary(event.history, run.engine, run.workers, event.seconds), event.model)
        finally:
            self._end(event.run, "FINISHED")

    def on_fit_failed(self, event: FitFailed) -> None:
        run = self._runs.get(event.run)
        if run is None:
            return
        try:
            self._send(run)
        finally:
            self._end(event.run, "FAILED" if isinstance(event.error, Exception) else "KILLED")

    def _experiment(self, client: Any) -> str | None:
        """The id of `experiment`, which is made where it is new."""
        if self.experiment is None:
            return None
        found = client.get_experiment_by_name(self.experiment)
        return found.experiment_id if found is not None else client.create_experiment(self.experiment)

    def _note(self, name: str, values: dict[str, float], step: int) -> None:
        from mlflow.entities import Metric

        run, now = self._runs[name], int(1000 * time.time())
        run.waiting += [Metric(key, float(value), now, step) for key, value in values.items()]
        if len(run.waiting) >= _BATCH or time.monotonic() - run.sent >= _SECONDS:
            self._send(run)

    def _send(self, run: _Run) -> None:
        waiting, run.waiting, run.sent = run.waiting, [], time.monotonic()
        for at in range(0, len(waiting), _BATCH):
            run.client.log_batch(run.id, metrics=waiting[at : at + _BATCH])

    def _artifacts(self, run: _Run, summary: Summary, model: Any) -> None:
        run.client.log_text(run.id, f"{summary!r}\n\n{summary.report}\n", "report.txt")
        if importlib.util.find_spec("matplotlib") is not None and summary.history:
            run.client.log_figure(run.id, summary.plot(), "fit.png")
        if self.log_model and model is not None:
            import mlflow.spark
            import torch

            needs = [*mlflow.spark.get_default_pip_requirements(), f"torch=={torch.__version__.split('+')[0]}", "bigdl_lite"]
            mlflow.spark.log_model(model, "model", pip_requirements=needs)

    def _end(self, name: str, status: str) -> None:
        import mlflow

        run = self._runs.pop(name)
        if not run.own:
            return
        active = mlflow.active_run() if run.active else None
        if active is not None and active.info.run_id == run.id:
            mlflow.end_run(status)
        else:
            run.client.set_terminated(run.id, status)
