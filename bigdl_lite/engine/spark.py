"""The door to Spark: frames in shape for the engines, slots, jobs that can be cancelled. Version differences end here.

    p  workers
"""

from __future__ import annotations

import os
import queue
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from pyspark import InheritableThread, TaskContext
from pyspark.errors import PySparkException
from pyspark.serializers import NoOpSerializer, pack_long
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import to_arrow_schema
from pyspark.sql.types import (
    ArrayType,
    BooleanType,
    DataType,
    DecimalType,
    IntegerType,
    NumericType,
    StructField,
    StructType,
    UserDefinedType,
)  # fmt: skip

from bigdl_lite.data.columns import Columns, Decoder, Name, describe, field, flat, require, title
from bigdl_lite.errors import DataError, RecipeError

if TYPE_CHECKING:
    from pyspark import RDD, SparkContext

try:
    from py4j.protocol import Py4JJavaError
except ImportError:  # the client of Spark Connect alone has no JVM to speak to
    SPARK_ERRORS: tuple[type[Exception], ...] = (PySparkException,)
else:
    SPARK_ERRORS = (PySparkException, Py4JJavaError)

ROW = "__bigdl_lite_row"  # the column of row numbers, where rows have to be put in order again


def select(frame: DataFrame, names: Sequence[Name]) -> DataFrame:
    """The named columns, each of a type that Arrow can carry: ml vectors become arrays, decimals doubles.

    Columns that are named together become one array: one value a row is much cheaper for Spark than two hundred.
    What comes out is named as field() says, which is safe where the user's name is not.

    Raises DataError where a name is missing or stands for several columns.
    """
    names = list({title(name): name for name in names}.values())
    made = as_columns(frame, names)
    return frame.select(*(column.alias(field(title(name))) for name, column in zip(names, made, strict=True)))


def as_columns(frame: DataFrame, names: Sequence[Name]) -> list[Column]:
    """Each column, or group of columns, as an expression of a type that Arrow can carry."""
    wanted, schema = flat(names), frame.schema
    require(wanted, schema.names)
    _require_one(wanted, schema.names, frame)
    kinds = {found.name: found.dataType for found in schema.fields}
    return [_as_column(name, kinds[name]) if isinstance(name, str) else _as_array(name, kinds) for name in names]


def _require_one(names: Sequence[str], present: Sequence[str], frame: DataFrame) -> None:
    """Raises DataError where Spark, which takes x and X for one name unless it is told otherwise, would find several."""
    if len({name.lower() for name in present}) == len(present):
        return
    exact = str(frame.sparkSession.conf.get("spark.sql.caseSensitive", "false")).lower() == "true"
    for name in names:
        alike = [other for other in present if other == name or (not exact and other.lower() == name.lower())]
        if len(alike) > 1:
            raise DataError(f"column {name!r} is ambiguous: the DataFrame has {', '.join(map(repr, alike))}; rename one of them")


def _as_column(name: str, kind: DataType) -> Column:
    from pyspark.ml.functions import vector_to_array
    from pyspark.ml.linalg import VectorUDT

    column = F.col(_quoted(name))
    if isinstance(kind, VectorUDT):
        # float64, so that a column of doubles and a vector of doubles are the same to the bit; it raises on a null itself
        return F.when(column.isNotNull(), vector_to_array(column))
    if isinstance(kind, UserDefinedType):
        raise DataError(f"column {name!r} is of type {kind.simpleString()}, which no tensor can hold")
    depth, inner = 0, kind
    while isinstance(inner, ArrayType):
        depth, inner = depth + 1, inner.elementType
    if isinstance(inner, DecimalType):
        return column.cast("array<" * depth + "double" + ">" * depth)
    return column


def _as_array(names: Sequence[str], kinds: Mapping[str, DataType]) -> Column:
    """One expression for all, because each Column made here costs calls to the JVM."""
    if not names:
        raise RecipeError("inputCols holds an empty list: name at least one column in it")
    casts = []
    for name in names:
        kind = kinds[name]
        if not isinstance(kind, NumericType | BooleanType):
            raise DataError(
                f"column {name!r} is of type {kind.simpleString()}; columns that are named together must each hold one number a row"
            )
        casts.append((_quoted(name), {DecimalType: "double", BooleanType: "float"}.get(type(kind))))
    if any("$" in name for name in names):  # Spark replaces ${x} in SQL, also between backticks
        return F.array(*(F.col(name).cast(wanted) if wanted else F.col(name) for name, wanted in casts))
    return F.expr(f"array({', '.join(f'cast({name} as {wanted})' if wanted else name for name, wanted in casts)})")


def _quoted(name: str) -> str:
    return f"`{name.replace('`', '``')}`"


def read_columns(
    frame: DataFrame, inputs: Sequence[Name], label: str | None, floating: torch.dtype,
    decoders: Mapping[str, Decoder] | None = None, label_dtype: torch.dtype | None = None,
) -> Columns:  # fmt: skip
    """The Columns of a frame that came out of select(); every fault that the schema shows is an error here."""
    fields = []
    for name in dict.fromkeys(title(name) for name in [*inputs, *([] if label is None else [label])]):
        found = frame.schema[field(name)]
        try:
            fields += to_arrow_schema(StructType([found]))
        except Exception as error:  # pyspark's own error for a type without an Arrow form
            raise DataError(f"column {name!r} is of type {found.dataType.simpleString()}, which Arrow cannot carry") from error
    return describe(pa.schema(fields), inputs, label, floating, decoders, label_dtype, ROW if ROW in frame.columns else None)


def is_classic(session: SparkSession) -> bool:
    """Whether there is a JVM of its own, and not a server of Spark Connect."""
    return hasattr(session, "_jsparkSession")


def active_session() -> SparkSession:
    """The session of this thread; else the one that the program has made, or makes."""
    return SparkSession.getActiveSession() or SparkSession.builder.getOrCreate()


def is_rdd(given: Any) -> bool:
    try:
        from pyspark import RDD
    except ImportError:  # the client of Spark Connect alone
        return False
    return isinstance(given, RDD)


def slots(spark: SparkSession) -> int:
    """How many tasks can run at once, now."""
    sc = spark.sparkContext
    scala = sc._jsc.sc()
    return int(scala.maxNumConcurrentTasks(scala.resourceProfileManager().defaultResourceProfile()))


def shares(frame: DataFrame, p: int) -> list[list[pa.RecordBatch]]:
    """All rows on the driver, by partition: for the local engine."""
    part = "__bigdl_lite_part"
    schema = StructType([*frame.schema.fields, StructField(part, IntegerType())])
    # not spark_partition_id(): the optimizer may evaluate that on the driver, where all rows are in partition 0
    table = collect(frame.mapInArrow(_tagger(part), schema))
    return [table.filter(pc.equal(table.column(part), i)).to_batches() for i in range(p)]


def _tagger(part: str) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    def tag(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        here = partition_id()
        for batch in batches:
            columns = [*batch.columns, pa.array([here] * batch.num_rows, pa.int32())]
            yield pa.RecordBatch.from_arrays(columns, [*batch.schema.names, part])

    return tag


def collect(frame: DataFrame) -> pa.Table:
    """All rows as one Arrow table."""
    if hasattr(frame, "toArrow"):
        return frame.toArrow()
    batches = frame._collect_as_arrow()
    schema = to_arrow_schema(frame.schema)
    return pa.Table.from_batches(batches, schema) if batches else schema.empty_table()


Keyed = Iterator[tuple[int, bytes]]


def exchange(
    rdd: RDD[Any], mapper: Callable[[int, Iterable[Any]], Keyed], k: int, combiner: Callable[[int, Iterable[bytes]], Iterator[bytes]]
) -> list[bytes]:
    """One job of two stages: mapper(partition, rows) makes (owner, bytes), a shuffle brings the bytes of each owner to
    combiner(owner, all bytes for it), and what that makes comes to the driver. In no particular order.

    The bytes cross every border between Python and the JVM as they are. rdd.partitionBy would pickle them on each side and
    hold a task's whole output until it is complete (4 times the copies, half the speed for 25 M parameters).
    """
    from pyspark import RDD

    sc = rdd.context
    made = rdd.mapPartitionsWithIndex(_packed(mapper), preservesPartitioning=True)
    made._bypass_serializer = True  # as rdd.partitionBy does: an owner of 8 bytes, then its bytes, in turn
    pairs = sc._jvm.PairwiseRDD(made._jrdd.rdd()).asJavaPairRDD()
    owned = sc._jvm.PythonRDD.valueOfPair(pairs.partitionBy(sc._jvm.PythonPartitioner(k, id(mapper))))
    combined = RDD(owned, sc, NoOpSerializer()).mapPartitionsWithIndex(combiner)
    combined._bypass_serializer = True
    return RDD(combined._jrdd, sc, NoOpSerializer()).collect()


_NOTE = "bigdl_lite.note"


def repeated(rdd: RDD[Any], task: Callable[[int, Iterable[Any]], Iterator[bytes]]) -> Callable[..., list[bytes]]:
    """A job of one stage that is run again and again: run(note, description) brings what task(partition, rows) makes to the driver.

    The task is made and sent to Spark once. What changes is the note, which a task reads with note_of_job(), and what Spark's own
    pages call the job; "": as it was called before.
    """
    from pyspark import RDD

    sc = rdd.context
    made = rdd.mapPartitionsWithIndex(task, preservesPartitioning=True)
    made._bypass_serializer = True
    back = RDD(made._jrdd, sc, NoOpSerializer())

    def run(note: str, description: str = "") -> list[bytes]:
        sc.setLocalProperty(_NOTE, note)
        if description:
            sc.setJobDescription(description)
        try:
            return back.collect()
        finally:
            sc.setLocalProperty(_NOTE, None)

    return run


def in_order(sc: SparkContext) -> bool:
    """Whether jobs get slots in the order in which they are submitted, and each thread of this program has properties of its own."""
    return sc.getConf().get("spark.scheduler.mode", "FIFO").upper() == "FIFO" and os.environ.get("PYSPARK_PIN_THREAD", "true") == "true"


class Submitters:
    """Two threads that run jobs, so that one can be submitted while another runs: run(note, description) as repeated() makes it.

    They have the tags of the thread that makes them.
    """

    def __init__(self, run: Callable[..., list[bytes]]) -> None:
        self._work: queue.SimpleQueue[tuple[str, str, Future[list[bytes]]] | None] = queue.SimpleQueue()
        self._threads = [InheritableThread(target=self._serve, args=(run,), name="bigdl_lite-submit", daemon=True) for _ in range(2)]
        for thread in self._threads:
            thread.start()

    def __call__(self, note: str, description: str = "") -> Future[list[bytes]]:
        future: Future[list[bytes]] = Future()
        self._work.put((note, description, future))
        return future

    def close(self) -> None:
        for _ in self._threads:
            self._work.put(None)
        for thread in self._threads:
            thread.join(2.0)

    def _serve(self, run: Callable[..., list[bytes]]) -> None:
        while (work := self._work.get()) is not None:
            note, description, future = work
            try:
                future.set_result(run(note, description))
            except BaseException as error:
                future.set_exception(error)


def note_of_job() -> str:
    """Inside a task: the note of its job."""
    context = TaskContext.get()
    assert context is not None
    return context.getLocalProperty(_NOTE) or ""


def _packed(mapper: Callable[[int, Iterable[Any]], Keyed]) -> Callable[[int, Iterable[Any]], Iterator[bytes]]:
    def run(partition: int, rows: Iterable[Any]) -> Iterator[bytes]:
        for owner, data in mapper(partition, rows):
            yield pack_long(owner)
            yield data

    return run


def partition_id() -> int:
    """The partition that this task works on; -1 where there is no task."""
    context = TaskContext.get()
    return context.partitionId() if context else -1


def gpus() -> tuple[str, ...]:
    """Inside a task: the addresses of the GPUs that Spark gave to it."""
    context = TaskContext.get()
    given = context.resources().get("gpu") if context else None
    return tuple(given.addresses) if given else ()
