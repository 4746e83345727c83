"""bigdl_lite: train any torch module as a Spark program, on the DataFrame where it lies, and score DataFrames with it.

Nothing is imported from Spark or torch before one of these names is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "BFloat16": "wire.codec",
    "BarrierEngine": "engine.barrier",
    "Choco": "algorithms.gossip",
    "Coded": "algorithms.exchange",
    "Difference": "algorithms.gossip",
    "Float16": "wire.codec",
    "GradiVeQ": "algorithms.gradiveq",
    "MinMax8": "wire.lossy",
    "PowerSGD": "algorithms.powersgd",
    "QSGD": "wire.lossy",
    "RandomK": "wire.sparse",
    "Raw": "data.columns",
    "S2": "algorithms.rows",
    "ShuffleEngine": "engine.shuffle",
    "Sign": "wire.lossy",
    "TopK": "wire.sparse",
    "TorchClassifier": "ml.estimator",
    "TorchEstimator": "ml.estimator",
    "TorchModel": "ml.model",
    "TorchRegressor": "ml.estimator",
    "UnionRows": "algorithms.rows",
    "async_average": "algorithms.averaging",
    "backup_workers": "algorithms.server",
    "bounded_staleness": "algorithms.server",
    "gossip": "algorithms.gossip",
    "local_session": "engine.session",
    "local_sgd": "algorithms.localsgd",
    "pipe_sgd": "algorithms.pipe",
    "qadam": "algorithms.qadam",
    "qg_dadam": "algorithms.quasiglobal",
    "qg_dsgdm": "algorithms.quasiglobal",
    "within": "algorithms.deadline",
}

__all__ = [
    "QSGD", "S2", "BFloat16", "BarrierEngine", "Choco", "Coded", "Difference", "Float16", "GradiVeQ", "MinMax8", "PowerSGD", "RandomK",
    "Raw", "ShuffleEngine", "Sign", "TopK", "TorchClassifier", "TorchEstimator", "TorchModel", "TorchRegressor", "UnionRows",
    "async_average", "backup_workers", "bounded_staleness", "gossip", "local_session", "local_sgd", "pipe_sgd", "qadam", "qg_dadam",
    "qg_dsgdm", "within",
]  # fmt: skip

if TYPE_CHECKING:
    from bigdl_lite.algorithms.averaging import async_average
    from bigdl_lite.algorithms.deadline import within
    from bigdl_lite.algorithms.exchange import Coded
    from bigdl_lite.algorithms.gossip import Choco, Difference, gossip
    from bigdl_lite.algorithms.gradiveq import GradiVeQ
    from bigdl_lite.algorithms.localsgd import local_sgd
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
    from bigdl_lite.ml.estimator import TorchClassifier, TorchEstimator, TorchRegressor
    from bigdl_lite.ml.model import TorchModel
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
