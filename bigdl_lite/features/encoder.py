"""A Table as stages of a pyspark.ml Pipeline: TableEncoder fits it, TableEncoderModel adds the columns.

    <path>/metadata/     as every pyspark.ml stage writes it
    <path>/table.json    the categories, means and standard deviations; nothing in it is ever executed
"""

from __future__ import annotations

from typing import Any

from pyspark.ml import Estimator, Model
from pyspark.ml.param import Param, Params, TypeConverters
from pyspark.ml.util import (
    DefaultParamsReadable,
    DefaultParamsReader,
    DefaultParamsWritable,
    MLReadable,
    MLReader,
    MLWritable,
    MLWriter,
)
from pyspark.sql import DataFrame

from bigdl_lite.data import files
from bigdl_lite.engine.stage import StageReader, StageWriter
from bigdl_lite.errors import RecipeError, WireError
from bigdl_lite.features.embed import FittedTable, Table


class _Columns(Params):
    idsCol = Param(Params._dummy(), "idsCol", "the new column of category ids, array<long>", TypeConverters.toString)
    denseCol = Param(Params._dummy(), "denseCol", "the new column of numbers, array<float>", TypeConverters.toString)

    def __init__(self) -> None:
        super().__init__()
        self._setDefault(idsCol="ids", denseCol="dense")

    def getIdsCol(self) -> str:
        return self.getOrDefault(self.idsCol)

    def getDenseCol(self) -> str:
        return self.getOrDefault(self.denseCol)


class TableEncoder(_Columns, Estimator["TableEncoderModel"], DefaultParamsReadable["TableEncoder"], DefaultParamsWritable):
    """Table.fit as an Estimator.

    table            a Table: which columns are read, and how
    idsCol, denseCol the names of the new columns, as FittedTable.transform() makes them

    >>> from pyspark.ml import Pipeline
    >>> df = spark.createDataFrame([("Rome", 1.0), ("Oslo", 3.0)], "city string, price double")
    >>> encoder = TableEncoder(Table(["price"], {"city": Index()}), idsCol="places")
    >>> Pipeline(stages=[encoder]).fit(df).transform(df).first()
    Row(city='Rome', price=1.0, places=[2], dense=[-1.0])
    """

    table = Param(Params._dummy(), "table", "which columns are read, and how: a Table, as plain JSON", TypeConverters.identity)

    def __init__(self, table: Table | None = None, idsCol: str | None = None, denseCol: str | None = None) -> None:
        super().__init__()
        if table is not None:
            self.setTable(table)
        self._set(**{name: value for name, value in (("idsCol", idsCol), ("denseCol", denseCol)) if value is not None})

    def setTable(self, table: Table) -> TableEncoder:
        if not isinstance(table, Table):
            raise RecipeError(f"TableEncoder takes a Table, got a {type(table).__name__}")
        return self._set(table=table.to_json())

    def getTable(self) -> Table:
        if not self.isDefined(self.table):
            raise RecipeError("table is not set: TableEncoder(Table(dense=[...], categorical={...}))")
        return Table.from_json(self.getOrDefault(self.table))

    def _fit(self, dataset: DataFrame) -> TableEncoderModel:
        return self._copyValues(TableEncoderModel(self.getTable().fit(dataset)))


class TableEncoderModel(_Columns, Model, MLWritable, MLReadable["TableEncoderModel"]):
    """Adds the columns of a FittedTable.

    fitted      the FittedTable: its categories, and what TableNet needs to know
    inputCols   the names of the new columns, in the order in which TableNet takes them
    """

    def __init__(self, fitted: FittedTable | None = None) -> None:
        super().__init__()
        self._fitted = fitted

    @property
    def fitted(self) -> FittedTable:
        if self._fitted is None:
            raise RecipeError("a TableEncoderModel is made by TableEncoder.fit, or loaded")
        return self._fitted

    @property
    def inputCols(self) -> list[str]:
        table = self.fitted.table
        return [*([self.getIdsCol()] if table.categorical else []), *([self.getDenseCol()] if table.dense else [])]

    def _transform(self, dataset: DataFrame) -> DataFrame:
        return self.fitted.transform(dataset, self.getIdsCol(), self.getDenseCol())

    def write(self) -> MLWriter:
        return _Writer(self)

    @classmethod
    def read(cls) -> MLReader[Any]:
        return _Reader()


class _Writer(StageWriter):
    def __init__(self, model: TableEncoderModel) -> None:
        super().__init__()
        self.model = model

    def saveImpl(self, path: str) -> None:
        self.metadata(self.model, path)
        self.model.fitted.save(f"{path}/table.json")


class _Reader(StageReader):
    def load(self, path: str) -> TableEncoderModel:
        metadata = self.metadata(path)
        try:
            model = TableEncoderModel(FittedTable.from_json(files.read(f"{path}/table.json")))
        except FileNotFoundError as error:
            raise WireError(f"{path} is not a saved TableEncoderModel: {error}") from error
        model._resetUid(metadata["uid"])
        DefaultParamsReader.getAndSetParams(model, metadata)
        return model
