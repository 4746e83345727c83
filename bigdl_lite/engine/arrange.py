"""A DataFrame in as many partitions as there are workers, the same rows in the same order in each, however often computed.

    what the frame is                              how it is brought to p partitions
    already in p                                   taken as it is
    a selection from whole files (Parquet, ORC)    read in p parts, where files divide evenly
    anything else                                  one shuffle, which writes all rows to local disks once more
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any

from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from bigdl_lite.data.columns import Name
from bigdl_lite.engine.direct import chain, format_of, located
from bigdl_lite.engine.spark import ROW, is_classic, select

_LOG = logging.getLogger("bigdl_lite")

# what Spark will not put into one stage with a barrier, or what hides how many partitions there will be
_UNFIT = re.compile(r"UnionRDD|CoalescedRDD|PartitionPruningRDD|CartesianRDD|PartitionerAwareUnionRDD")

_FORMATS = {f"org.apache.spark.sql.execution.datasources.{x}" for x in ("parquet.ParquetFileFormat", "orc.OrcFileFormat")}
_FILES = 256  # more are not asked for their sizes, one by one
_UNEVEN = 1.25  # how many times its even part a worker may get


def arrange(dataset: DataFrame, names: Sequence[Name], p: int) -> DataFrame:
    """The named columns, as select() gives them, in exactly p partitions.

    Where workers may read them from files, there are FILE and INDEX in their place (see direct.py).
    After a shuffle there is a column ROW of row numbers beside them, by which every share is put in order again, because a
    shuffle delivers blocks in any order.
    """
    where, frame = located(dataset, names), select(dataset, names)
    for found in [frame] if where is None else [dataset.select(*where), frame]:
        if _partitions(found) == p:
            return found
        again = reread(found, p)
        if again is not None:
            return again
    return frame.withColumn(ROW, F.monotonically_increasing_id()).repartition(p, ROW)


def reread(frame: DataFrame, p: int) -> DataFrame | None:
    """The same plan with whole files dealt to p partitions of about one size; None where that is not to be had.

    How much Spark reads at a time is a setting of the session that a relation belongs to. So the relation is put into a
    copy of the user's session, in which nothing else is changed; the user's stays as it is.
    """
    if not is_classic(frame.sparkSession):
        return None
    try:
        above, leaf = chain(frame)
        if leaf is None or format_of(leaf) not in _FORMATS:
            return None
        total = int(leaf.relation().location().sizeInBytes())
        for slack in (1.0, 1.1, _UNEVEN):
            found = _planned(frame, above, leaf, max(1, int(slack * total / p) + 1))
            if _partitions(found) == p:
                return found if _even(found, total, p) else None
    except Exception as error:  # Spark's inner classes may change: then it is the shuffle
        _LOG.info("files are not read in %d parts: %s", p, error)
    return None


def _planned(frame: DataFrame, above: list[Any], leaf: Any, nbytes: int) -> DataFrame:
    """The plan again, its files read `nbytes` at a time."""
    session = frame.sparkSession
    other = type(session)(session.sparkContext, session._jsparkSession.cloneSession())  # with all that the user has set
    for name, value in (("maxPartitionBytes", nbytes), ("minPartitionNum", 1), ("openCostInBytes", 0)):
        other.conf.set(f"spark.sql.files.{name}", str(value))
    old = leaf.relation()
    # Spark takes two relations that differ in their session only for one: an option that no format reads tells them apart
    options = old.options().updated("bigdl_lite", other._jsparkSession.sessionUUID())
    parts = (old.location(), old.partitionSchema(), old.dataSchema(), old.bucketSpec(), old.fileFormat(), options)
    relation = old.copy(*parts, other._jsparkSession)
    plan = leaf.copy(relation, *(leaf.productElement(i) for i in range(1, leaf.productArity())))
    jvm = other._jvm
    for step in reversed(above):
        plan = step.withNewChildren(jvm.PythonUtils.toSeq([plan]))
    sql = jvm.org.apache.spark.sql
    datasets = sql.classic.Dataset if ".classic." in frame._jdf.getClass().getName() else sql.Dataset  # Spark 4, or 3.5
    return DataFrame(datasets.ofRows(other._jsparkSession, plan), other)


def _even(frame: DataFrame, total: int, p: int) -> bool:
    """Whether no file is cut (rows come in groups that are not) and no partition is much larger than the others."""
    count = 0
    for partition in frame._jdf.queryExecution().toRdd().partitions():
        nbytes = 0
        for file in partition.files():
            count += 1
            if count > _FILES or int(file.start()) or int(file.length()) != int(file.fileSize()):
                return False
            nbytes += int(file.length())
        if nbytes > _UNEVEN * total / p:
            return False
    return True


def _partitions(frame: DataFrame) -> int | None:
    """How many partitions the frame has, None where that is known only after running it."""
    if not is_classic(frame.sparkSession):
        return None
    execution = frame._jdf.queryExecution()
    if "Adaptive" in execution.executedPlan().getClass().getSimpleName():
        return None
    rdd = execution.toRdd()
    return None if _UNFIT.search(rdd.toDebugString()) else rdd.getNumPartitions()
