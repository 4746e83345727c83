"""Stage-level scheduling: tasks that ask for other resources than those of the application. Version differences end here.

    Spark     without dynamic allocation                       with it
    3.4       standalone                                       standalone, YARN, Kubernetes
    3.5.1+    standalone, YARN, Kubernetes: requests of tasks  likewise; executors of the profile are started
              only, on the executors that are there

DataFrame.mapInArrow takes a profile since Spark 4.0. Before, the rows that go into it are given one, which is the same stage.
A column, such as transform's, takes none in any version.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from pyspark.resource import ResourceProfile, ResourceProfileBuilder, TaskResourceRequests
from pyspark.sql import DataFrame, SparkSession

from bigdl_lite.engine.spark import is_classic, slots
from bigdl_lite.errors import RecipeError

if TYPE_CHECKING:
    from pyspark import SparkContext

GPU = "gpu"


def profile_for(spark: SparkSession, device: str, given: ResourceProfile | None) -> ResourceProfile | None:
    """The profile of the tasks that train; None: that of the application.

    With device="cuda", where executors have GPUs and the application's tasks ask for none, it is one GPU a task.
    """
    if given is not None and not is_classic(spark):
        raise RecipeError(
            "resourceProfile is given, and through Spark Connect nobody tells how many tasks of a profile can run at once: give all "
            "tasks of the application what they need, with spark.task.resource.gpu.amount"
        )
    if given is not None or device != "cuda" or not is_classic(spark):
        return given
    default = spark.sparkContext._jsc.sc().resourceProfileManager().defaultResourceProfile()
    if default.taskResourcesJMap().containsKey(GPU) or not default.executorResourcesJMap().containsKey(GPU):
        return None
    return ResourceProfileBuilder().require(TaskResourceRequests().resource(GPU, 1)).build


def slots_of(spark: SparkSession, profile: ResourceProfile | None) -> int:
    """How many tasks of a profile can run at once, now: those of executors that it may use, by whatever they have least of."""
    if profile is None:
        return slots(spark)
    sc = spark.sparkContext
    return int(sc._jsc.sc().maxNumConcurrentTasks(_registered(sc, profile)))


def in_words(spark: SparkSession, profile: ResourceProfile | None, free: int) -> str:
    """The slots in words, with what a task of them has."""
    if not is_classic(spark):  # Spark Connect does not tell
        return f"{free} slots"
    sc = spark.sparkContext
    found = sc._jsc.sc().resourceProfileManager().defaultResourceProfile() if profile is None else _registered(sc, profile)
    gpus = found.taskResourcesJMap().get(GPU)
    return f"{free} slots" + (f" (tasks of {gpus.amount():g} GPU)" if gpus is not None else "")


def map_in_arrow(frame: DataFrame, task: Any, schema: Any, barrier: bool = False, profile: ResourceProfile | None = None) -> DataFrame:
    """frame.mapInArrow in tasks of a profile."""
    more: dict[str, Any] = {"barrier": True} if barrier else {}
    if profile is not None and "profile" in inspect.signature(type(frame).mapInArrow).parameters:
        more["profile"] = profile
    elif profile is not None:
        frame = _under(frame, profile)
    return frame.mapInArrow(task, schema, **more)


def _under(frame: DataFrame, profile: ResourceProfile) -> DataFrame:
    """The same rows, whose stage asks for what the profile says. What comes before a shuffle does not."""
    session = frame.sparkSession
    rows = frame._jdf.queryExecution().toRdd().withResources(_registered(session.sparkContext, profile))
    return DataFrame(session._jsparkSession.internalCreateDataFrame(rows, frame._jdf.schema(), False), session)


def _registered(sc: SparkContext, profile: ResourceProfile) -> Any:
    """The JVM's own profile, known to its scheduler. RecipeError where this cluster cannot do what it says."""
    carrier = sc.emptyRDD()  # pyspark knows how to bring a profile to the JVM, and does it for an RDD only
    try:
        carrier.withResources(profile)
    except Exception as error:
        why = getattr(error, "java_exception", None)
        raise RecipeError(
            f"Spark refuses resourceProfile: {why.getMessage() if why is not None else error}. On executors that are there already, it "
            "may only say what tasks need (TaskResourceRequests), on a standalone cluster, YARN or Kubernetes"
        ) from error
    return carrier._jrdd.rdd().getResourceProfile()
