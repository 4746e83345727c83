"""When workers may read Parquet files themselves, and the DataFrame that tells them which rows.

Spark brings a column to Python through its rows: for a table of 200 columns that is nearly all the time of a fit's start, and
of a transform. Where a DataFrame is a selection from plain Parquet files, Spark runs the same plan (its filters, its pruning)
but hands on only the file and the number of each row; the worker decodes the columns from the file (data/parquet.py).

    condition                                                          because
    projections and filters over Parquet, columns as they lie there    anything computed exists in the JVM alone
    Spark's own Parquet format, by name                                Delta and others know of rows that have been deleted
    every file on a file: path, read by the driver, of equal types     else Spark's conversions would be missed
    no setting under which Spark skips files or finds columns by id    the rows would differ

Off with spark.conf.set("spark.bigdl_lite.readFiles", "false"). Where in doubt, the columns travel as in any other frame.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import to_arrow_type

from bigdl_lite.data.columns import Name, flat
from bigdl_lite.data.parquet import FILE, INDEX, local_path, plain, schema_of
from bigdl_lite.engine.spark import is_classic

_LOG = logging.getLogger("bigdl_lite")

SETTING = "spark.bigdl_lite.readFiles"
_FORMAT = "org.apache.spark.sql.execution.datasources.parquet.ParquetFileFormat"
_FORBIDDEN = ("spark.sql.files.ignoreCorruptFiles", "spark.sql.files.ignoreMissingFiles", "spark.sql.parquet.fieldId.read.enabled")
_FILES = 1000  # whose types are looked at, on the driver; for more of them Spark's way is taken
_FEW = 32  # bytes of a row that Spark brings as fast as its number


def located(frame: DataFrame, names: Sequence[Name]) -> list[Column] | None:
    """The columns FILE and INDEX of a frame, in place of the named ones; None where these must travel themselves."""
    try:
        why = _hindrance(frame, names)
    except Exception as error:  # Spark's inner classes may change, files may be out of the driver's reach
        why = f"{type(error).__name__}: {error}"
    if why:
        _LOG.debug("columns travel through Spark: %s", why)
        return None
    return [F.col("_metadata.file_path").alias(FILE), F.col("_metadata.row_index").alias(INDEX)]


def chain(frame: DataFrame) -> tuple[list[Any], Any]:
    """The projections and filters of a plan, from the top, and the files that they read; None for anything else."""
    node, above = frame._jdf.queryExecution().optimizedPlan(), []
    while kind(node) in ("Project", "Filter"):
        if not node.deterministic() or not node.subqueries().isEmpty():
            return [], None
        above.append(node)
        node = node.child()
    if kind(node) != "LogicalRelation" or kind(node.relation()) != "HadoopFsRelation":
        return [], None
    return above, node


def kind(node: Any) -> str:
    return node.getClass().getSimpleName()


def format_of(leaf: Any) -> str:
    """The class of a relation's file format, by its full name: others are derived from Spark's own."""
    return leaf.relation().fileFormat().getClass().getName()


def _hindrance(frame: DataFrame, names: Sequence[Name]) -> str:
    """Why the named columns of a frame cannot be read from its files; empty where they can."""
    if not is_classic(frame.sparkSession) or frame.isStreaming or "_metadata" in frame.columns:
        return "not a plain frame"
    conf = frame.sparkSession.conf
    if str(conf.get(SETTING, "true")).lower() == "false":
        return f"{SETTING} is false"
    types = {name: to_arrow_type(field.dataType) for name, field in _fields(frame, flat(names)).items()}
    groups = [[types[name] for name in name_] for name_ in names if not isinstance(name_, str)]
    if any(len(set(group)) > 1 or not _number(group[0]) for group in groups):
        return "columns that are named together differ in their types"
    if sum(map(_width, types.values())) <= _FEW:
        return "a row is short"
    leaf = chain(frame)[1]
    if leaf is None or format_of(leaf) != _FORMAT:
        return "not a selection from Parquet files"
    if "ignore" in leaf.relation().options().mkString(",").lower() or any(conf.get(x, "false") == "true" for x in _FORBIDDEN):
        return "a setting of the user's"
    computed = _computed(frame, leaf, list(types))
    if computed:
        return f"column {computed[0]!r} is not one of the files'"
    files = leaf.relation().location().inputFiles()
    return f"{len(files)} files" if len(files) > _FILES else _differ(list(files), types)


def _fields(frame: DataFrame, names: Sequence[str]) -> dict[str, Any]:
    found = {name: [f for f in frame.schema.fields if f.name == name] for name in names}
    several = [name for name, fields in found.items() if len(fields) != 1 or "." in name]
    if several:
        raise ValueError(f"column {several[0]!r} cannot be told from others")
    return {name: fields[0] for name, fields in found.items()}


def _computed(frame: DataFrame, leaf: Any, names: Sequence[str]) -> list[str]:
    """Those of the columns that are not, under the same name, in the files."""
    number = re.compile(r"(.*)#(\d+)L?$", re.DOTALL)

    def told(output: Any) -> list[tuple[str, str]]:
        return [number.fullmatch(text).groups() for text in output.mkString("\0").split("\0")]  # type: ignore[union-attr, misc]

    folders = set(leaf.relation().partitionSchema().fieldNames())  # their values count, also where files have the column too
    in_files = {x: name for name, x in told(leaf.output()) if name not in folders}
    outputs = told(frame._jdf.queryExecution().analyzed().output())
    return [name for name, (_, x) in zip(frame.columns, outputs, strict=True) if name in names and in_files.get(x) != name]


def _differ(files: Sequence[str], types: Mapping[str, pa.DataType]) -> str:
    for uri in files:
        path = local_path(uri)
        if path is None:
            return f"{uri} is not a path"
        schema = schema_of(path)
        for name, wanted in types.items():
            found = schema.field(name).type
            if plain(found) is None or plain(found) != plain(wanted):
                return f"column {name!r} is {found} in {path}, {wanted} in Spark"
    return ""


def _number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


def _width(kind: pa.DataType) -> int:
    """Bytes of a value; lists and binary values are taken for long ones."""
    return kind.bit_width // 8 if pa.types.is_primitive(kind) else 1 << 10
