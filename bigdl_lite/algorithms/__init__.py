"""Methods, free of Spark: values made of parts that fit by type."""

from bigdl_lite.algorithms.algorithm import (
    Advance,
    Advancer,
    Combine,
    Durable,
    DurableAdvancer,
    Local,
    Round,
    Side,
    State,
    Update,
    Work,
    durable,
    merge_buffers,
)
from bigdl_lite.algorithms.catalogue import CATALOGUE, EXCHANGES, method, with_exchange
from bigdl_lite.algorithms.exchange import Coded, Exchange, Exchanger, Turn
from bigdl_lite.algorithms.localsgd import local_sgd
from bigdl_lite.algorithms.parts import Gradient, Sum, TorchOptimizer

__all__ = [
    "CATALOGUE", "EXCHANGES", "Advance", "Advancer", "Coded", "Combine", "Durable", "DurableAdvancer", "Exchange", "Exchanger",
    "Gradient", "Local", "Round", "Side", "State", "Sum", "TorchOptimizer", "Turn", "Update", "Work", "durable", "local_sgd",
    "merge_buffers", "method", "with_exchange",
]  # fmt: skip
