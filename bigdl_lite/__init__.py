"""bigdl_lite: train any torch module as a Spark program, on the DataFrame where it lies, and score DataFrames with it.

Nothing is imported from Spark or torch before one of these names is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "BarrierEngine": "engine.barrier",
    "Raw": "data.columns",
    "ShuffleEngine": "engine.shuffle",
    "TorchClassifier": "ml.estimator",
    "TorchEstimator": "ml.estimator",
    "TorchModel": "ml.model",
    "TorchRegressor": "ml.estimator",
    "local_session": "engine.session",
}

__all__ = [
    "BarrierEngine", "Raw", "ShuffleEngine", "TorchClassifier", "TorchEstimator", "TorchModel", "TorchRegressor",
    "local_session",
]  # fmt: skip

if TYPE_CHECKING:
    from bigdl_lite.data.columns import Raw
    from bigdl_lite.engine.barrier import BarrierEngine
    from bigdl_lite.engine.session import local_session
    from bigdl_lite.engine.shuffle import ShuffleEngine
    from bigdl_lite.ml.estimator import TorchClassifier, TorchEstimator, TorchRegressor
    from bigdl_lite.ml.model import TorchModel


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
    except ModuleNotFoundError as error:
        if error.name and error.name.split(".")[0] == "pyspark":
            raise ImportError("bigdl_lite needs Spark, which is not installed: pip install 'bigdl_lite[local]'") from error
        raise
