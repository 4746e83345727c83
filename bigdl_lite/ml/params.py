"""The Params of estimators and models, each said once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pyspark.ml.param import Param, Params, TypeConverters
from pyspark.ml.param.shared import HasInputCols, HasLabelCol, HasPredictionCol, HasSeed

from bigdl_lite.data.columns import Raw
from bigdl_lite.errors import RecipeError
from bigdl_lite.model.replica import PRECISIONS

_MOST_WORKERS = 1 << 16  # each is a task
_MOST_SECONDS = (2**31 - 1) // 1000  # of a socket's timeout: 32 bits of milliseconds, 24 days


def _param(name: str, doc: str, convert: Callable[[Any], Any] = TypeConverters.identity) -> Param[Any]:
    return Param(Params._dummy(), name, doc, typeConverter=convert)


def _int(value: Any) -> int:
    try:
        return TypeConverters.toInt(value)
    except OverflowError:  # pyspark compares it with its float
        raise TypeError("so large a number is not taken") from None


def _float(value: Any) -> float:
    try:
        return TypeConverters.toFloat(value)
    except OverflowError:
        raise TypeError("so large a number is not taken") from None


def _text(value: Any) -> str:
    if not isinstance(value, str):  # pyspark's own converter asks NumPy for what NumPy 2 does not have
        raise TypeError(f"must be a string, got {value!r}")
    return str(value)


def _list(value: Any) -> list[Any]:
    """A list; one thing alone stands for a list of it."""
    return list(value) if isinstance(value, list | tuple) else [value]


def _names(value: Any) -> list[str | list[str]]:
    """A list of names; a list of names in it stands for one input."""
    if isinstance(value, list | tuple):
        made = [list(item) if isinstance(item, list | tuple) else item for item in value]
        if all(isinstance(name, str) for item in made for name in (item if isinstance(item, list) else [item])):
            return made
    raise TypeError("must be a list of column names, or of lists of them")


def _outputs(value: Any) -> dict[str, str] | list[str]:
    """{output: column}, or a list of outputs whose columns are named as they are."""
    if isinstance(value, Mapping) and all(isinstance(name, str) for pair in value.items() for name in pair):
        return dict(value)
    if isinstance(value, list | tuple) and all(isinstance(name, str) for name in value):
        return list(value)
    raise TypeError("must be a dict {output: column}, or a list of outputs")


class HasScoring(HasInputCols, HasPredictionCol, HasLabelCol):
    """What a model needs to score, and to say how well."""

    predictionCol = _param("predictionCol", "the column of predictions that transform adds", _text)
    inputCols = _param("inputCols", "one column, or a list of columns of numbers, for each argument of forward", _names)
    featuresCol = _param("featuresCol", "the one column that forward takes, in place of inputCols", _text)
    handleInvalid = _param("handleInvalid", "rows with nulls, NaN or infinity: 'error', or 'skip', which leaves them out", _text)
    predictBatchSize = _param("predictBatchSize", "rows of one forward pass in transform", _int)
    decoders = _param("decoders", "how binary columns are read: {column: Raw(shape, dtype) or function(bytes) -> array}")
    labelCol = _param("labelCol", "the column that is the second argument of loss", _text)
    outputCols = _param(
        "outputCols", "a column for each output of a module that returns several, {output: column}, in place of predictionCol", _outputs
    )
    device = _param(
        "device", "where fit and transform compute: 'auto' (the GPU that Spark gave the task, else the CPU), 'cpu', 'cuda'", _text
    )

    def _inputs(self) -> Any:
        """The names of the inputs, None where none are set. RecipeError where both Params name them."""
        features = self._given("featuresCol")
        if features is None:
            return self._given("inputCols")
        if self.isSet(self.inputCols):
            raise RecipeError(f"featuresCol={features!r} and inputCols={self.getInputCols()} both name the inputs: leave one out")
        return [features]

    def getPredictBatchSize(self) -> int:
        return self.getOrDefault(self.predictBatchSize)

    def getDecoders(self) -> dict[str, Any]:
        return self.getOrDefault(self.decoders)

    def _given(self, name: str) -> Any:
        """The value of a Param, None where it is neither set nor has a default."""
        param = self.getParam(name)
        return self.getOrDefault(param) if self.isDefined(param) else None


class HasTraining(HasScoring, HasSeed):
    """What an estimator needs to train."""

    module = _param("module", "an nn.Module, or a function without arguments that returns one")
    loss = _param("loss", "callable (output, target) -> one number, the mean over rows")
    optimizer = _param(
        "optimizer", "a name ('adam', 'sgd', ...), or callable (parameters) -> torch.optim.Optimizer; parameters.named is a dict"
    )
    learningRate = _param("learningRate", "of an optimizer by name; not set: 1e-3", _float)
    weightDecay = _param("weightDecay", "of an optimizer by name; not set: torch's default", _float)
    momentum = _param("momentum", "of 'sgd' or 'rmsprop' by name; not set: none", _float)
    scheduler = _param("scheduler", "callable (optimizer) -> a torch learning rate scheduler")
    schedulerInterval = _param("schedulerInterval", "the scheduler steps once per 'step' or 'epoch'", _text)
    weightCol = _param("weightCol", "the column that says how much each row counts; not set: all alike", _text)
    classWeights = _param("classWeights", "'balanced', or a number for each class, by which its rows count more or less")
    validationIndicatorCol = _param("validationIndicatorCol", "a boolean column: whether a row is for validation", _text)
    validationFraction = _param("validationFraction", "of the rows that are held out for validation, drawn by their values", _float)
    metrics = _param("metrics", "of the rows held out: names from bigdl_lite.METRICS, metrics, or torchmetrics", _list)
    validationTrigger = _param("validationTrigger", "when the rows held out are measured; not set: at the ends of epochs")
    monitor = _param("monitor", "the value that says which weights are better: 'val_loss', 'val_accuracy', ...", _text)
    patience = _param("patience", "validations without a better value after which the fit ends; not set: it does not", _int)
    minDelta = _param("minDelta", "by how much a value must be better to count", _float)
    restoreBest = _param("restoreBest", "whether the model has the weights of the best validation", TypeConverters.toBoolean)
    endTrigger = _param("endTrigger", "when the fit ends before its epochs are done, max_loss(0.1) | max_step(1000), say")
    callbacks = _param("callbacks", "bigdl_lite.Callback objects or functions of an event, called on the driver", _list)
    averaging = _param("averaging", "EMA(decay) or SWA(start): the weights that are validated, and that the model has, are averages")
    initialModel = _param("initialModel", "a TorchModel whose weights training begins with")
    limitBatches = _param("limitBatches", "batches of an epoch at most, for a dry run", _int)
    accumulation = _param("accumulation", "passes that a worker's part of a batch is divided into, to need less memory", _int)
    precision = _param("precision", "of forward passes: 'fp32', 'bf16' or 'fp16' (torch.autocast)", _text)
    compile = _param("compile", "whether workers compile the module with torch.compile", TypeConverters.toBoolean)
    batchSize = _param("batchSize", "rows of one step over all workers", _int)
    epochs = _param("epochs", "how often each row is seen", _int)
    seed = _param("seed", "of the first weights, of the order of rows and of dropout", _int)
    numWorkers = _param("numWorkers", "workers, each with a share of the rows; not set: all slots", _int)
    resourceProfile = _param(
        "resourceProfile", "a pyspark ResourceProfile: what tasks that train need, where those of the application have no GPU, say"
    )
    engine = _param("engine", "'auto', 'barrier', 'shuffle' or 'local', or an engine object")
    exchange = _param("exchange", "how updates travel: a name from bigdl_lite.algorithms.EXCHANGES, a codec, or an exchange")
    hierarchical = _param(
        "hierarchical", "with an exchange, workers of one machine sum in memory first and are one peer", TypeConverters.toBoolean
    )
    algorithm = _param("algorithm", "a name from bigdl_lite.algorithms.CATALOGUE, or a function optimizer -> Round")
    clipNorm = _param("clipNorm", "largest norm of the whole gradient; not set: no limit", _float)
    clipValue = _param("clipValue", "largest magnitude of one value of the gradient; not set: no limit", _float)
    syncBatchNorm = _param(
        "syncBatchNorm", "batch statistics over the rows of all workers, not of each worker's share", TypeConverters.toBoolean
    )
    logInterval = _param("logInterval", "keep every so many steps in the history", _int)
    progress = _param("progress", "'auto', 'bar', 'log' or 'none'", _text)
    checkpointDir = _param("checkpointDir", "folder for checkpoints: a path, or a URI that pyarrow.fs opens", _text)
    checkpointInterval = _param("checkpointInterval", "steps or epochs from one checkpoint to the next", _int)
    checkpointUnit = _param("checkpointUnit", "of checkpointInterval: 'step' or 'epoch'", _text)
    checkpointKeep = _param("checkpointKeep", "how many of the newest checkpoints stay, beside the best", _int)
    resume = _param("resume", "go on from the last checkpoint in checkpointDir, if there is one", TypeConverters.toBoolean)
    maxRecoveries = _param(
        "maxRecoveries", "losses of workers after which a fit in the barrier engine ends with the error; 0: at the first", _int
    )
    recoveryInterval = _param(
        "recoveryInterval", "seconds between the states that a fit in the barrier engine goes on from after a loss", _float
    )
    deadline = _param("deadline", "seconds that a worker waits for another before it is an error", _float)

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


def _number(least: float, most: float = float("inf")) -> Callable[[Any], bool]:
    return lambda value: least <= value <= most


def _reads(decoders: Any) -> bool:
    return isinstance(decoders, Mapping) and all(
        isinstance(name, str) and (isinstance(how, Raw) or callable(how)) for name, how in decoders.items()
    )


def _weighs(given: Any) -> bool:
    numbers = isinstance(given, list | tuple) and given and all(isinstance(x, int | float) and 0 < x < float("inf") for x in given)
    return bool(numbers) or given == "balanced"


# what a value of the right type must be besides; where a name is looked up (engine, algorithm), that is told there
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(
        (
            "batchSize", "epochs", "logInterval", "predictBatchSize", "checkpointInterval", "checkpointKeep", "limitBatches",
            "accumulation",
        ),
        (_number(1), "at least 1"),
    ),
    "validationFraction": (lambda part: 0 < part < 1, "above 0 and below 1"),
    **dict.fromkeys(("patience", "minDelta"), (_number(0), "at least 0")),
    "precision": (lambda text: text in PRECISIONS, f"one of {', '.join(map(repr, PRECISIONS))}"),
    **dict.fromkeys(("validationTrigger", "endTrigger"), (callable, "a trigger, such as every_epoch() or max_loss(0.1)")),
    "averaging": (lambda given: callable(getattr(given, "due", None)), "EMA(...) or SWA(...)"),
    "classWeights": (_weighs, "'balanced' or a list of numbers above 0"),
    "checkpointUnit": (lambda text: text in ("step", "epoch"), "'step' or 'epoch'"),
    "maxRecoveries": (_number(0), "at least 0"),
    "recoveryInterval": (_number(0), "at least 0 seconds"),
    "numWorkers": (_number(1, _MOST_WORKERS), f"at least 1 and at most {_MOST_WORKERS}"),
    "seed": (_number(-(2**63), 2**63 - 1), "a whole number of 64 bits"),
    "deadline": (lambda seconds: 0 < seconds <= _MOST_SECONDS, f"above 0 and at most {_MOST_SECONDS} seconds"),
    **dict.fromkeys(("clipNorm", "clipValue"), (lambda limit: limit > 0, "above 0")),
    "schedulerInterval": (lambda text: text in ("step", "epoch"), "'step' or 'epoch'"),
    "progress": (lambda text: text in ("auto", "bar", "log", "none"), "'auto', 'bar', 'log' or 'none'"),
    **dict.fromkeys(("module", "loss", "scheduler"), (callable, "callable")),
    "optimizer": (lambda given: isinstance(given, str) or callable(given), "a name or callable"),
    **dict.fromkeys(("learningRate", "weightDecay", "momentum"), (_number(0), "at least 0")),
    "engine": (
        lambda given: isinstance(given, str) or (callable(getattr(given, "fit", None)) and not isinstance(given, type)),
        "'auto', 'barrier', 'shuffle', 'local' or an engine object",
    ),
    "algorithm": (lambda given: isinstance(given, str) or callable(given), "a name or a function optimizer -> Round"),
    "handleInvalid": (lambda text: text in ("error", "skip"), "'error' or 'skip'"),
    "inputCols": (lambda names: [] not in names, "a list of names, or of lists that each have a name"),
    "outputCols": (lambda outputs: len(outputs) > 0, "at least one output"),
    "device": (lambda name: name in ("auto", "cpu", "cuda"), "'auto', 'cpu' or 'cuda'"),
    "resourceProfile": (lambda given: hasattr(given, "taskResources"), "a pyspark.resource.ResourceProfile"),
    "decoders": (_reads, "a dict from names of columns to Raw(shape, dtype) or to functions from bytes to arrays"),
}


def check_params(stage: HasScoring) -> None:
    """Raises RecipeError, which names the Param, where a value cannot work."""
    for param in stage.params:
        value = stage._given(param.name)
        if value is None:
            if stage.hasDefault(param) or param.name in ("module", "loss"):
                raise RecipeError(f"{param.name} is not set")
        elif param.name in _RULES and not _RULES[param.name][0](value):
            shown = repr(value) if isinstance(value, int | float | str | list) else f"a {type(value).__name__}"
            raise RecipeError(f"{param.name} is {shown}, must be {_RULES[param.name][1]}")


def set_given(params: Params, given: dict[str, Any]) -> None:
    """Sets what was given; None means that the default holds. Raises RecipeError for a value of the wrong type."""
    for name, value in given.items():
        if value is None:
            continue
        try:
            params._set(**{name: value})
        except TypeError as error:
            raise RecipeError(f"{name}={value!r}: {error}") from error


def with_setters(cls: type[Params]) -> None:
    """Gives a class setX for each of its Params, as pyspark.ml has them: est.setBatchSize(32).setEpochs(3)."""

    def setter(name: str) -> Callable[[Params, Any], Params]:
        def change(self: Params, value: Any) -> Params:
            set_given(self, {name: value})
            return self

        change.__doc__ = f"Sets {name}; None leaves it as it is."
        return change

    for name in dir(cls):
        method = f"set{name[0].upper()}{name[1:]}"
        if isinstance(getattr(cls, name, None), Param) and not hasattr(cls, method):
            setattr(cls, method, setter(name))


with_setters(HasScoring)
with_setters(HasTraining)
