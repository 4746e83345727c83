"""TorchModel: what fit gives back."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

from pyspark.ml import Model
from pyspark.ml.functions import array_to_vector
from pyspark.ml.param.shared import HasProbabilityCol, HasRawPredictionCol
from pyspark.ml.util import MLReadable, MLReader, MLWritable, MLWriter
from pyspark.sql import DataFrame
from pyspark.sql import functions as F
from torch import nn

from bigdl_lite.data.columns import Columns
from bigdl_lite.engine.recipe import Outcome, Start
from bigdl_lite.engine.shipped import Shipped
from bigdl_lite.engine.spark import read_columns, select
from bigdl_lite.errors import RecipeError
from bigdl_lite.ml.head import Head
from bigdl_lite.ml.params import HasScoring, check_params
from bigdl_lite.ml.rows import require_frame
from bigdl_lite.ml.score import Scorer, module_of, score
from bigdl_lite.model.layout import Blueprint, blueprint
from bigdl_lite.observe.summary import Summary


class TorchModel(Model, HasScoring, MLWritable, MLReadable["TorchModel"]):
    """A trained module as a pyspark.ml Model.

    module    the trained nn.Module, in evaluation mode, on the driver
    history   a list of dicts, one a step (thinned by logInterval) and one an epoch: see engine.recipe.Outcome
    engine    the engine that trained it
    """

    history: list[dict[str, Any]]
    engine: str

    def __init__(
        self, columns: Columns | None = None, head: Head | None = None, plan: Blueprint | None = None, start: Start | None = None,
        history: list[dict[str, Any]] | None = None, engine: str = "", made_by: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self._setDefault(predictionCol="prediction", predictBatchSize=1024, decoders={})
        self._columns, self._head, self._plan, self._start = columns, head, plan, start
        self._made_by = made_by  # the function or class that makes the module, for save()
        self._module: nn.Module | None = None
        self._shipped: Shipped | None = None
        self._saved: dict[str, Any] | None = None  # model.json, for a model that was loaded
        self.history, self.engine = history or [], engine
        self._facts: dict[str, Any] = {}  # of the fit, beside the history; none for a model that was loaded

    @property
    def summary(self) -> Summary:
        """What the fit came to: losses, the best validation, where the time went; summary.plot() draws it, summary.report says it."""
        return Summary(self.history, self.engine, **self._facts)

    @property
    def module(self) -> nn.Module:
        if self._module is None:
            if self._plan is None:
                raise RecipeError(
                    "this model was saved with a module that this program has not imported: import it before loading, give it with "
                    "model.setModule(module) or TorchModel.load(path, module=...), or say TorchModel.load(path, trust=True)"
                )
            assert self._start is not None
            self._module = module_of(self._plan, self._start)
        return self._module

    def setModule(self, module: nn.Module | Callable[[], nn.Module]) -> TorchModel:
        """Gives a loaded model the module that its weights belong to; names and shapes must be those that were saved."""
        from bigdl_lite.ml.persist import fit_into
        from bigdl_lite.ml.resume import head_from

        assert self._start is not None
        made = module() if callable(module) and not isinstance(module, nn.Module) else module
        if not isinstance(made, nn.Module):
            raise RecipeError(f"setModule takes an nn.Module or a function that returns one, got a {type(made).__name__}")
        self._plan = fit_into(blueprint(made)[0], self._start, self._saved)
        if self._head is None and self._columns is not None:
            self._head = head_from(self._saved, self._plan, self._start, self._columns)
        self._made_by, self._module, self._shipped = module, None, None
        return self

    def _transform(self, dataset: DataFrame) -> DataFrame:
        require_frame(dataset, stream=True)
        scorer = self._scorer()
        self._require_readable(dataset, scorer.columns)
        column = f"__bigdl_lite_{uuid.uuid4().hex}"  # the name of no column
        scored = dataset.withColumn(column, score(dataset, scorer, self._ship(dataset)))
        return self._spread(scored, F.col(column)).drop(column)

    def _spread(self, scored: DataFrame, result: Any) -> DataFrame:
        name = self.getPredictionCol()
        return scored.withColumn(name, result) if name else scored

    def _require_readable(self, dataset: DataFrame, columns: Columns) -> None:
        """Raises DataError for columns that are missing or of a type that no tensor can hold, before any job."""
        assert self._plan is not None
        names = [c.source for c in columns.inputs]
        decoders = {c.name: c.decoder for c in columns.inputs if c.decoder is not None}
        read_columns(select(dataset, names), names, None, self._plan.layout.dtype, decoders)

    def _scorer(self) -> Scorer:
        check_params(self)
        if self._plan is None:
            _ = self.module  # raises with the way out
        if self._head is None:
            raise RecipeError("transform needs a module that returns one tensor, a row for each row; score with model.module instead")
        assert self._plan and self._columns
        names = self._given("inputCols") or [c.source for c in self._columns.inputs]
        if len(names) != len(self._columns.inputs):
            raise RecipeError(f"the module takes {len(self._columns.inputs)} inputs, inputCols names {len(names)}")
        inputs = tuple(c.renamed(name) for c, name in zip(self._columns.inputs, names, strict=True))
        return Scorer(self._plan, Columns(inputs), self._head, self.getPredictBatchSize())

    def _ship(self, dataset: DataFrame) -> Shipped:
        """The weights, sent to the executors once for this model and all its copies."""
        sc = dataset.sparkSession.sparkContext
        if self._shipped is None or self._shipped.application != sc.applicationId:
            assert self._start is not None
            # never destroyed by us: a lazy DataFrame may outlive this model, and Spark's cleaner frees both together
            self._shipped = Shipped.send(sc, self._start)
        return self._shipped

    def write(self) -> MLWriter:
        from bigdl_lite.ml.persist import Writer

        return Writer(self)

    @classmethod
    def read(cls) -> MLReader[Any]:
        from bigdl_lite.ml.persist import Reader

        return Reader(cls)

    @classmethod
    def load(
        cls, path: str, module: nn.Module | Callable[[], nn.Module] | None = None, step: int | str | None = None, trust: bool = False
    ) -> Any:  # fmt: skip
        """The model saved at `path`; or, where step is given, the one of a checkpoint, and path is its checkpointDir.

        step    the number of a step that has a checkpoint, "last", or "best" (the lowest mean loss since the checkpoint before)
        module  the module, or a function that makes it, where the saved name of it cannot be imported here (it was
                defined in a notebook, or given as an object); nothing in the file is ever executed
        trust   whether the Python module that the file names may be imported, where this program has not imported it
        """
        if step is not None:
            from bigdl_lite.ml.resume import load

            return load(cls, path, step, module, trust)
        from bigdl_lite.ml.persist import Reader

        found = Reader(cls, trust).load(path)
        return found.setModule(module) if module is not None else found


class TorchRegressionModel(TorchModel):
    """Adds predictionCol, a double."""


class TorchClassificationModel(TorchModel, HasRawPredictionCol, HasProbabilityCol):
    """Adds rawPredictionCol and probabilityCol, vectors [classes], and predictionCol, the index of the largest, a double.

    A column whose name is set to "" is left out.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._setDefault(rawPredictionCol="rawPrediction", probabilityCol="probability")

    @property
    def numClasses(self) -> int:
        if self._head is None:
            raise RecipeError("a module that does not return one tensor has no number of classes")
        return 2 if self._head.scalar else self._head.shape[0]

    def _spread(self, scored: DataFrame, result: Any) -> DataFrame:
        columns = {
            self.getRawPredictionCol(): array_to_vector(result["raw"]),
            self.getProbabilityCol(): array_to_vector(result["probability"]),
            self.getPredictionCol(): result["prediction"],
        }
        names = [*filter(None, (self.getRawPredictionCol(), self.getProbabilityCol(), self.getPredictionCol()))]
        if len({name.lower() for name in names}) < len(names):
            raise RecipeError(f"rawPredictionCol, probabilityCol and predictionCol must differ, they are {names}")
        return scored.withColumns({name: value for name, value in columns.items() if name})


def model_of(
    kind: type[TorchModel], columns: Columns, head: Head | None, plan: Blueprint, start: Start, outcome: Outcome, made_by: Any
) -> TorchModel:  # fmt: skip
    """The model of an outcome; the frozen parameters are those of the start."""
    trained = Start(outcome.weights, outcome.buffers, start.constants)
    return kind(columns, head, plan, trained, outcome.history, outcome.engine, made_by)
