"""Which engine, and how many workers."""

from __future__ import annotations

import logging
from typing import Any

from pyspark.sql import DataFrame, SparkSession

from bigdl_lite.engine.barrier import BarrierEngine
from bigdl_lite.engine.local import LocalEngine
from bigdl_lite.engine.recipe import Engine, Observer, Outcome, Recipe, Start, silent
from bigdl_lite.engine.shuffle import ShuffleEngine
from bigdl_lite.engine.spark import shares, slots
from bigdl_lite.errors import RecipeError

_LOG = logging.getLogger("bigdl_lite")


class _LocalFrame:
    """The local engine on a DataFrame: all rows come to the driver."""

    name = LocalEngine.name

    def fit(self, frame: DataFrame, recipe: Recipe, start: Start, observer: Observer = silent) -> Outcome:
        return LocalEngine().fit(shares(frame, recipe.num_workers), recipe, start, observer)


ENGINES = {"barrier": BarrierEngine, "shuffle": ShuffleEngine, "local": _LocalFrame}


def choose(asked: Any, workers: int | None, spark: SparkSession) -> tuple[Engine, int]:
    """The engine and the number of workers; None: one worker for each slot.

    "auto" takes the barrier engine where that many tasks can run at the same time, else shuffle.
    """
    free = slots(spark)
    p = free if workers is None else workers
    if p < 1:
        raise RecipeError(f"numWorkers is {p}, must be at least 1")
    if not isinstance(asked, str):
        return asked, p
    if asked == "auto":
        name = "barrier" if p <= free else "shuffle"
        _LOG.info("engine=%s: %d workers, %d slots", name, p, free)
        return ENGINES[name](), p
    if asked not in ENGINES:
        raise RecipeError(f"engine={asked!r} is not one of 'auto', {', '.join(map(repr, ENGINES))}")
    return ENGINES[asked](), p
