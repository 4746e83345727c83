"""TorchModel: what fit gives back."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pyspark.ml import Model
from pyspark.ml.functions import array_to_vector
from pyspark.ml.param.shared import HasProbabilityCol, HasRawPredictionCol
from pyspark.ml.util import MLReadable, MLReader, MLWritable, MLWriter
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from torch import nn

from bigdl_lite.data.columns import Columns
from bigdl_lite.engine.cluster import cluster_of
from bigdl_lite.engine.recipe import Outcome, Start
from bigdl_lite.engine.shipped import Shipped
from bigdl_lite.engine.spark import active_session, read_columns, select
from bigdl_lite.errors import RecipeError
from bigdl_lite.ml.head import Head, Heads
from bigdl_lite.ml.params import HasScoring, check_params, with_setters
from bigdl_lite.ml.rows import require_frame, usable
from bigdl_lite.ml.score import Scorer, function, module_of, require_cuda, score
from bigdl_lite.model.layout import Blueprint, blueprint
from bigdl_lite.observe.summary import Summary

if TYPE_CHECKING:
    from bigdl_lite.model.sums import Metric


class TorchModel(Model, HasScoring, MLWritable, MLReadable["TorchModel"]):
    """A trained module as a pyspark.ml Model.

    module    the trained nn.Module, in evaluation mode, on the driver
    history   a list of dicts, one a step (thinned by logInterval) and one an epoch: see engine.recipe.Outcome
    engine    the engine that trained it
    """

    history: list[dict[str, Any]]
    engine: str

    def __init__(
        self, columns: Columns | None = None, head: Head | Heads | None = None, plan: Blueprint | None = None,
        start: Start | None = None, history: list[dict[str, Any]] | None = None, engine: str = "", made_by: Any = None,
        shapes: Sequence[Sequence[int]] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self._setDefault(
            predictionCol="prediction", predictBatchSize=1024, decoders={}, labelCol="label", device="auto", handleInvalid="error"
        )
        self._columns, self._head, self._plan, self._start = columns, head, plan, start
        self._shapes = shapes  # of one row in each input column; None where that was not saved
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
        if self._given("handleInvalid") == "skip":
            dataset = usable(dataset, [c.source for c in scorer.columns.inputs])
        column = f"__bigdl_lite_{uuid.uuid4().hex}"  # the name of no column
        scored = dataset.withColumn(column, score(dataset, scorer, self._ship(dataset.sparkSession)))
        return self._spread(scored, F.col(column)).drop(column)

    def _spread(self, scored: DataFrame, result: Any) -> DataFrame:
        outputs = self._outputs()
        if outputs is not None:
            return scored.withColumns({column: result[name] for name, column in outputs.items()})
        name = self.getPredictionCol()
        return scored.withColumn(name, result) if name else scored

    def _outputs(self) -> dict[str, str] | None:
        """outputCols as {output: column}; None where it is not set."""
        given = self._given("outputCols")
        if given is None:
            return None
        outputs = given if isinstance(given, dict) else {name: name for name in given}
        if len({column.lower() for column in outputs.values()}) < len(given):
            raise RecipeError(f"outputCols must name columns that differ, it is {given}")
        return outputs

    def udf(self) -> Any:
        """The model as a function of columns: model.udf()("features"), or spark.udf.register("score", model.udf()) and then in
        SQL: SELECT score(features) FROM t.

        takes    a column for each argument of forward: a number, an array, binary (with the model's decoders), an ml vector. For
                 columns that were named together, inputCols=[["a", "b"], "image"], either one array, score(array(a, b), image),
                 or each by itself, score(a, b, image)
        returns  what the module's output is: double, array<float>, or a struct of named outputs (those of outputCols, where it is
                 set, under the names of the columns); of a classifier a struct of raw, probability and prediction

        The weights are sent to the executors of the active session here, once for all uses. Before Spark 4.1, whose functions have
        no Arrow columns, values travel as pandas Series.
        """
        scorer = self._scorer()
        outputs = self._outputs()
        if outputs is not None:
            scorer = replace(scorer, head=scorer.head.renamed(outputs))
        return function(scorer, self._ship(active_session()))

    def evaluate(
        self, dataset: DataFrame, metrics: str | Metric | Sequence[str | Metric] = (), labelCol: str | None = None,
        weightCol: str | None = None, loss: Any = None,
    ) -> dict[str, float]:  # fmt: skip
        """How good the model is on the rows of dataset: {name of the metric: its value}, in one Spark job. See ml/evaluate.py.

        metrics    names ("accuracy", "auc", "mse", ...) or values of your own with `name`, `sums` and `value`
        labelCol   of the targets, by default that of the model; weightCol: of the weight of each row, by default 1
        loss       (output, target) -> the mean over the rows; adds "loss". That of torch's classes is taken in float64
        """
        from bigdl_lite.ml.evaluate import evaluate

        return evaluate(self, dataset, metrics, labelCol, weightCol, loss)

    def export(self, path: str, format: str = "onnx", shapes: Mapping[str, Sequence[int]] | None = None) -> None:
        """Writes the module as a program that needs no bigdl_lite, with any number of rows. See ml/export.py.

        format  "onnx", "torchscript" or "pt2" (torch.export)
        shapes  {input column: shape of one row}, only for a model that was saved before shapes were
        """
        from bigdl_lite.ml.export import export

        export(self, path, format, shapes)

    def _require_readable(self, dataset: DataFrame, columns: Columns) -> None:
        """Raises DataError for columns that are missing or of a type that no tensor can hold, before any job."""
        assert self._plan is not None
        names = [c.source for c in columns.inputs]
        decoders = {c.name: c.decoder for c in columns.inputs if c.decoder is not None}
        read_columns(select(dataset, names), names, None, self._plan.layout.dtype, decoders)

    def _scorer(self, whole: bool = False) -> Scorer:
        """whole: with all that the module returns, of whatever form that is; else with what becomes columns."""
        check_params(self)
        if self._plan is None:
            _ = self.module  # raises with the way out
        head, outputs, device = self._head, self._outputs(), self._given("device")
        if not whole:
            if head is None:
                raise RecipeError(
                    "transform needs a module that returns one tensor, a row for each row (or a dict or tuple of them, where it is not "
                    "a classifier's); score with model.module instead"
                )
            if outputs is not None:
                if not isinstance(head, Heads):
                    raise RecipeError(f"outputCols is {self._given('outputCols')}, but the module returns one tensor: leave it out")
                head = head.only(list(outputs))
        if device == "cuda" and cluster_of(active_session()).beside:
            require_cuda("this machine has none that torch can use")
        assert self._plan and self._columns
        names = self._inputs() or [c.source for c in self._columns.inputs]
        if len(names) != len(self._columns.inputs):
            raise RecipeError(f"the module takes {len(self._columns.inputs)} inputs, inputCols (or featuresCol) names {len(names)}")
        inputs = tuple(c.renamed(name) for c, name in zip(self._columns.inputs, names, strict=True))
        return Scorer(self._plan, Columns(inputs), head, self.getPredictBatchSize(), device)

    def _ship(self, spark: SparkSession) -> Shipped:
        """The weights, sent to the executors once for this model and all its copies."""
        cluster = cluster_of(spark)
        if self._shipped is None or self._shipped.application != cluster.key:
            assert self._start is not None
            # never destroyed by us: a lazy DataFrame may outlive this model, and Spark's cleaner frees both together
            self._shipped = Shipped.send(cluster, self._start)
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
        if not isinstance(self._head, Head):
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
    kind: type[TorchModel], columns: Columns, head: Head | Heads | None, plan: Blueprint, start: Start, outcome: Outcome, made_by: Any
) -> TorchModel:  # fmt: skip
    """The model of an outcome; the frozen parameters are those of the start."""
    trained = Start(outcome.weights, outcome.buffers, start.constants)
    shapes = outcome.shapes[: len(columns.inputs)]
    return kind(columns, head, plan, trained, outcome.history, outcome.engine, made_by, shapes)


with_setters(TorchClassificationModel)
