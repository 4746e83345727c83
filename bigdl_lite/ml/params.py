"""The Params of estimators and models, each said once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyspark.ml.param import Param, Params, TypeConverters
from pyspark.ml.param.shared import HasInputCols, HasLabelCol, HasPredictionCol, HasSeed

from bigdl_lite.errors import RecipeError


def _param(name: str, doc: str, convert: Callable[[Any], Any] = TypeConverters.identity) -> Param[Any]:
    return Param(Params._dummy(), name, doc, typeConverter=convert)


def _names(value: Any) -> list[str | list[str]]:
    """A list of names; a list of names in it stands for one input."""
    if not isinstance(value, list | tuple):
        raise TypeError("must be a list of column names, or of lists of them")
    made = [name if isinstance(name, str) else TypeConverters.toListString(list(name)) for name in value]
    return made


class HasScoring(HasInputCols, HasPredictionCol):
    """What a model needs to score."""

    inputCols = _param("inputCols", "one column, or a list of columns of numbers, for each argument of forward", _names)
    predictBatchSize = _param("predictBatchSize", "rows of one forward pass in transform", TypeConverters.toInt)
    decoders = _param("decoders", "how binary columns are read: {column: Raw(shape, dtype) or function(bytes) -> array}")

    def getPredictBatchSize(self) -> int:
        return self.getOrDefault(self.predictBatchSize)

    def getDecoders(self) -> dict[str, Any]:
        return self.getOrDefault(self.decoders)


class HasTraining(HasScoring, HasLabelCol, HasSeed):
    """What an estimator needs to train."""

    module = _param("module", "an nn.Module, or a function without arguments that returns one")
    loss = _param("loss", "callable (output, target) -> one number, the mean over rows")
    optimizer = _param("optimizer", "callable (parameters) -> torch.optim.Optimizer; parameters is a list, and .named a dict")
    scheduler = _param("scheduler", "callable (optimizer) -> a torch learning rate scheduler")
    schedulerInterval = _param("schedulerInterval", "the scheduler steps once per 'step' or 'epoch'", TypeConverters.toString)
    batchSize = _param("batchSize", "rows of one step over all workers", TypeConverters.toInt)
    epochs = _param("epochs", "how often each row is seen", TypeConverters.toInt)
    numWorkers = _param("numWorkers", "workers, each with a share of the rows; not set: all slots", TypeConverters.toInt)
    engine = _param("engine", "'auto', 'barrier', 'shuffle' or 'local', or an engine object")
    algorithm = _param("algorithm", "a name from bigdl_lite.algorithms.CATALOGUE, or a function optimizer -> Round")
    clipNorm = _param("clipNorm", "largest norm of the whole gradient; not set: no limit", TypeConverters.toFloat)
    clipValue = _param("clipValue", "largest magnitude of one value of the gradient; not set: no limit", TypeConverters.toFloat)
    syncBatchNorm = _param(
        "syncBatchNorm", "batch statistics over the rows of all workers, not of each worker's share", TypeConverters.toBoolean
    )
    logInterval = _param("logInterval", "keep every so many steps in the history", TypeConverters.toInt)
    progress = _param("progress", "'auto', 'bar', 'log' or 'none'", TypeConverters.toString)
    deadline = _param("deadline", "seconds that a worker waits for another before it is an error", TypeConverters.toFloat)

    def getModule(self) -> Any:
        return self.getOrDefault(self.module)

    def getLoss(self) -> Any:
        return self.getOrDefault(self.loss)

    def getOptimizer(self) -> Any:
        return self.getOrDefault(self.optimizer)

    def getBatchSize(self) -> int:
        return self.getOrDefault(self.batchSize)

    def getEpochs(self) -> int:
        return self.getOrDefault(self.epochs)

    def getEngine(self) -> Any:
        return self.getOrDefault(self.engine)

    def _given(self, name: str) -> Any:
        """The value of a Param, None where it is neither set nor has a default."""
        param = self.getParam(name)
        return self.getOrDefault(param) if self.isDefined(param) else None


def set_given(params: Params, given: dict[str, Any]) -> None:
    """Sets what was given; None means that the default holds. Raises RecipeError for a value of the wrong type."""
    for name, value in given.items():
        if value is None:
            continue
        try:
            params._set(**{name: value})
        except TypeError as error:
            raise RecipeError(f"{name}={value!r}: {error}") from error
