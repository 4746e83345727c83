"""Which engine, and how many workers."""

from __future__ import annotations

import logging
from typing import Any

from pyspark.resource import ResourceProfile
from pyspark.sql import DataFrame, SparkSession

from bigdl_lite.algorithms import Round
from bigdl_lite.engine.barrier import BarrierEngine
from bigdl_lite.engine.cluster import cluster_of
from bigdl_lite.engine.keeper import Keep, forget
from bigdl_lite.engine.local import LocalEngine
from bigdl_lite.engine.profile import in_words
from bigdl_lite.engine.recipe import Engine, Observer, Outcome, Recipe, Start, silent
from bigdl_lite.engine.shuffle import ShuffleEngine
from bigdl_lite.engine.spark import is_classic, shares
from bigdl_lite.errors import RecipeError

_LOG = logging.getLogger("bigdl_lite")


class _LocalFrame:
    """The local engine on a DataFrame: all rows come to the driver."""

    name = LocalEngine.name

    def fit(self, frame: DataFrame, recipe: Recipe, start: Start, observer: Observer = silent, keep: Keep = forget) -> Outcome:
        return LocalEngine().fit(shares(frame, recipe.num_workers), recipe, start, observer, keep)


ENGINES = {"barrier": BarrierEngine, "shuffle": ShuffleEngine, "local": _LocalFrame}


def choose(
    asked: Any, workers: int | None, spark: SparkSession, round_: Round, profile: ResourceProfile | None = None
) -> tuple[Engine, int]:
    """The engine and the number of workers; None: one worker for each slot. profile: of the tasks that train, whose slots count.

    "auto" takes the barrier engine where that many tasks can run at the same time, executors do not come and go (dynamic
    allocation), and the user did not ask Spark to encrypt what moves between machines; else shuffle.
    """
    if profile is not None and (asked == "local" or not isinstance(asked, str)):
        raise RecipeError(
            "resourceProfile is for tasks of Spark, and engine='local' trains on the driver: leave it out"
            if asked == "local" else
            f"resourceProfile is given beside an engine object: {type(asked).__name__}(profile=...) takes it"
        )  # fmt: skip
    if not isinstance(asked, str):
        profile = getattr(asked, "profile", None)
    cluster = cluster_of(spark)
    free = cluster.slots(profile)
    if workers is None and not free:
        raise RecipeError(
            f"there are {in_words(spark, profile, free)} now, and so no number of workers: give numWorkers, or wait for executors "
            "(those of a resourceProfile are started when it is used)"
        )
    p = free if workers is None else workers
    if p < 1:
        raise RecipeError(f"numWorkers is {p}, must be at least 1")
    more = {} if profile is None else {"profile": profile}
    if not isinstance(asked, str):
        return asked, p
    if asked == "auto":
        # what ranks say to one another is not encrypted, and Spark has no barrier where executors come and go
        fit = cluster.beside or not (cluster.encrypts or cluster.elastic)
        # each worker has what no other has; or there are no RDDs
        stays = round_.peer is not None or getattr(round_.exchange, "remembers", False) or not is_classic(spark)
        name = "barrier" if (p <= free and fit) or stays else "shuffle"
        _LOG.info("engine=%s: %d workers, %d slots", name, p, free)
        return ENGINES[name](**more), p
    if asked not in ENGINES:
        raise RecipeError(f"engine={asked!r} is not one of 'auto', {', '.join(map(repr, ENGINES))}")
    return ENGINES[asked](**more), p
