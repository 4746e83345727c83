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
    durable,
    merge_buffers,
)
from bigdl_lite.algorithms.catalogue import CATALOGUE, method

__all__ = [
    "CATALOGUE", "Advance", "Advancer", "Combine", "Durable", "DurableAdvancer", "Local", "Round", "Side", "State", "Update",
    "durable", "merge_buffers", "method",
]  # fmt: skip
