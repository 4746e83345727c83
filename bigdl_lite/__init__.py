"""bigdl_lite: train any torch module as a Spark program, on the DataFrame where it lies, and score DataFrames with it.

Nothing is imported from Spark or torch before one of these names is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "AUC": "model.ranking",
    "AUCPR": "model.ranking",
    "Accuracy": "model.classes",
    "BFloat16": "wire.codec",
    "BarrierEngine": "engine.barrier",
    "Callback": "observe.events",
    "Choco": "algorithms.gossip",
    "Coded": "algorithms.exchange",
    "Difference": "algorithms.gossip",
    "EMA": "algorithms.means",
    "F1": "model.classes",
    "Float16": "wire.codec",
    "GradiVeQ": "algorithms.gradiveq",
    "HitRatio": "model.ranking",
    "MAE": "model.sums",
    "MLflow": "observe.mlflow",
    "MSE": "model.sums",
    "Mean": "model.sums",
    "MinMax8": "wire.lossy",
    "NDCG": "model.ranking",
    "PowerSGD": "algorithms.powersgd",
    "Precision": "model.classes",
    "QSGD": "wire.lossy",
    "R2": "model.sums",
    "RMSE": "model.sums",
    "RandomK": "wire.sparse",
    "Raw": "data.columns",
    "Recall": "model.classes",
    "S2": "algorithms.rows",
    "SWA": "algorithms.means",
    "ShuffleEngine": "engine.shuffle",
    "Sign": "wire.lossy",
    "Stop": "observe.events",
    "Summary": "observe.summary",
    "TensorBoard": "observe.tensorboard",
    "TopK": "wire.sparse",
    "TorchClassifier": "ml.estimator",
    "TorchEstimator": "ml.estimator",
    "TorchMetric": "model.torchmetric",
    "TorchModel": "ml.model",
    "TorchRegressor": "ml.estimator",
    "UnionRows": "algorithms.rows",
    "async_average": "algorithms.averaging",
    "backup_workers": "algorithms.server",
    "bounded_staleness": "algorithms.server",
    "decay_groups": "algorithms.decay",
    "doctor": "ml.doctor",
    "every_epoch": "engine.trigger",
    "gossip": "algorithms.gossip",
    "local_session": "engine.session",
    "local_sgd": "algorithms.localsgd",
    "max_epoch": "engine.trigger",
    "max_loss": "engine.trigger",
    "max_step": "engine.trigger",
    "metric_of": "model.metrics",
    "min_metric": "engine.trigger",
    "pipe_sgd": "algorithms.pipe",
    "qadam": "algorithms.qadam",
    "qg_dadam": "algorithms.quasiglobal",
    "qg_dsgdm": "algorithms.quasiglobal",
    "several_steps": "engine.trigger",
    "within": "algorithms.deadline",
}

__all__ = [
    "AUC", "AUCPR", "EMA", "F1", "MAE", "MSE", "NDCG", "QSGD", "R2", "RMSE", "S2", "SWA", "Accuracy", "BFloat16", "BarrierEngine",
    "Callback", "Choco", "Coded", "Difference", "Float16", "GradiVeQ", "HitRatio", "MLflow", "Mean", "MinMax8", "PowerSGD",
    "Precision", "RandomK", "Raw", "Recall", "ShuffleEngine", "Sign", "Stop", "Summary", "TensorBoard", "TopK", "TorchClassifier",
    "TorchEstimator", "TorchMetric", "TorchModel", "TorchRegressor", "UnionRows", "async_average", "backup_workers",
    "bounded_staleness", "decay_groups", "doctor", "every_epoch", "gossip", "local_session", "local_sgd", "max_epoch", "max_loss",
    "max_step", "metric_of", "min_metric", "pipe_sgd", "qadam", "qg_dadam", "qg_dsgdm", "several_steps", "within",
]  # fmt: skip

if TYPE_CHECKING:
    from bigdl_lite.algorithms.averaging import async_average
    from bigdl_lite.algorithms.deadline import within
    from bigdl_lite.algorithms.decay import decay_groups
    from bigdl_lite.algorithms.exchange import Coded
    from bigdl_lite.algorithms.gossip import Choco, Difference, gossip
    from bigdl_lite.algorithms.gradiveq import GradiVeQ
    from bigdl_lite.algorithms.localsgd import local_sgd
    from bigdl_lite.algorithms.means import EMA, SWA
    from bigdl_lite.algorithms.pipe import pipe_sgd
    from bigdl_lite.algorithms.powersgd import PowerSGD
    from bigdl_lite.algorithms.qadam import qadam
    from bigdl_lite.algorithms.quasiglobal import qg_dadam, qg_dsgdm
    from bigdl_lite.algorithms.rows import S2, UnionRows
    from bigdl_lite.algorithms.server import backup_workers, bounded_staleness
    from bigdl_lite.data.columns import Raw
    from bigdl_lite.engine.barrier import BarrierEngine
    from bigdl_lite.engine.session import local_session
    from bigdl_lite.engine.shuffle import ShuffleEngine
    from bigdl_lite.engine.trigger import every_epoch, max_epoch, max_loss, max_step, min_metric, several_steps
    from bigdl_lite.ml.doctor import doctor
    from bigdl_lite.ml.estimator import TorchClassifier, TorchEstimator, TorchRegressor
    from bigdl_lite.ml.model import TorchModel
    from bigdl_lite.model.classes import F1, Accuracy, Precision, Recall
    from bigdl_lite.model.metrics import metric_of
    from bigdl_lite.model.ranking import AUC, AUCPR, NDCG, HitRatio
    from bigdl_lite.model.sums import MAE, MSE, R2, RMSE, Mean
    from bigdl_lite.model.torchmetric import TorchMetric
    from bigdl_lite.observe.events import Callback, Stop
    from bigdl_lite.observe.mlflow import MLflow
    from bigdl_lite.observe.summary import Summary
    from bigdl_lite.observe.tensorboard import TensorBoard
    from bigdl_lite.wire.codec import BFloat16, Float16
    from bigdl_lite.wire.lossy import QSGD, MinMax8, Sign
    from bigdl_lite.wire.sparse import RandomK, TopK


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] == "pyspark":
            raise ImportError("bigdl_lite needs Spark, which is not installed: pip install 'bigdl_lite[local]'") from error
        raise
