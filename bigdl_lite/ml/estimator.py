"""TorchEstimator: fit(df) trains a torch module where the data lies.

From Params to a Recipe, from a DataFrame to a frame of numWorkers partitions, then to an engine; and back to a Model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from pyspark.ml import Estimator
from pyspark.ml.param.shared import HasProbabilityCol, HasRawPredictionCol
from pyspark.ml.util import MLReadable, MLReader, MLWritable, MLWriter
from pyspark.sql import DataFrame
from torch import Tensor, nn

from bigdl_lite.algorithms import Exchange, Round
from bigdl_lite.algorithms.parts import OptimizerFactory, SchedulerFactory, TorchOptimizer
from bigdl_lite.algorithms.shadow import Average
from bigdl_lite.data.columns import Column, Decoder
from bigdl_lite.engine.recipe import Engine
from bigdl_lite.engine.trigger import Trigger
from bigdl_lite.ml.head import classifier_kind
from bigdl_lite.ml.model import TorchClassificationModel, TorchModel, TorchRegressionModel
from bigdl_lite.ml.params import HasTraining, set_given, with_setters
from bigdl_lite.ml.prepare import prepare
from bigdl_lite.ml.search import Models
from bigdl_lite.model.loss import ELEMENTWISE_LOSSES, Squeezed, rule_of
from bigdl_lite.wire.codec import Codec

if TYPE_CHECKING:
    from pyspark import RDD
    from pyspark.ml._typing import ParamMap


class TorchEstimator(Estimator, HasTraining, MLWritable, MLReadable["TorchEstimator"]):
    """Trains any torch module on a DataFrame (or an RDD of (inputs, label) NumPy tuples).

    module            an nn.Module (it is copied), or a function without arguments that returns one; weights are made on the
                      driver, from `seed`
    loss              callable (output, target) -> one number, the mean over the rows
    optimizer         callable (parameters) -> torch.optim.Optimizer; any optimizer, parameter groups included. parameters
                      is the list of trainable parameters, parameters.named the dict of them by name. Or a name, "adam" or "sgd",
                      with learningRate (1e-3), weightDecay and momentum, which grids of Params and saved estimators can hold
    scheduler         callable (optimizer) -> a torch learning rate scheduler, stepped once per schedulerInterval
    inputCols         one column for each positional argument of forward: numbers, arrays, ml vectors, binary (see decoders);
                      a list of columns of numbers in place of one makes one argument [rows, columns] of them
    featuresCol       the one input, as pyspark.ml calls it, in place of inputCols
    handleInvalid     "error", or "skip": rows with a null, NaN or infinity are left out of the fit, and by the model of its scores
    labelCol          the second argument of loss
    decoders          how binary columns are read: {column: Raw(shape, dtype) or function(bytes) -> array}
    batchSize         rows of one step over ALL workers
    numWorkers        workers, each with a share of the rows; None: all slots
    engine            "auto" | "barrier" | "shuffle" | "local", or an engine object such as BarrierEngine(...)
    device            where workers compute, and transform: "auto" (the GPU that Spark gave the task, else the CPU), "cpu", or "cuda",
                      which is an error without a GPU; where executors have GPUs and tasks ask for none, it asks for one a worker
    resourceProfile   a pyspark ResourceProfile: what the tasks that train need (stage-level scheduling); transform takes none
    algorithm         a name in bigdl_lite.algorithms.CATALOGUE ("sync-sgd", "local-sgd", ...), or a function optimizer -> Round
    exchange          how updates travel between workers: a name in bigdl_lite.algorithms.EXCHANGES ("bf16", "topk", ...), a
                      codec, or an exchange; not set: as they are. Each worker is a peer, so that the result does not depend on
                      which of them share a machine; with hierarchical=True those of one machine are one peer
    clipNorm, clipValue   limits on the mean gradient, as torch's clip_grad_norm_ and clip_grad_value_

    checkpointDir     folder for checkpoints, any path that pyarrow.fs opens; written by the driver. checkpointInterval and
                      checkpointUnit ("step" or "epoch") say when, checkpointKeep how many of the newest stay beside the best
    resume            goes on from the last checkpoint there, if there is one, to the same weights as without a break
    recoveryInterval  seconds between the states that engine="barrier" keeps at the driver, to go on from where a rank is lost
    maxRecoveries     losses of ranks after which it gives up with an error that says what was lost; 0: at the first

    weightCol         how much each row counts, in training and validation: sums over rows are weighted, and divided by the weights
    classWeights      "balanced" (costs a job that counts the labels) or a number for each class, for class losses
    validationFraction, validationIndicatorCol   rows held out: a part of them, drawn by a hash of their values and `seed`, so that
                      it depends on no layout; or those where a boolean column says so
    metrics           of the rows held out, beside the loss: names ("accuracy", "auc", "ndcg@10", see METRICS), metrics, or
                      torchmetrics; they are sums over rows, added over workers and divided once
    validationTrigger when, every_epoch() if not set; several_steps(100), every_epoch(5), ...
    monitor, patience, minDelta, restoreBest   the fit ends after more than `patience` validations that are not better by minDelta
                      in `monitor`; the model has the weights of the best one (not where restoreBest=False, or patience is not set)
    endTrigger        ends the fit: max_loss(0.1), max_step(1000) | min_metric("val_accuracy", 0.99), ...
    callbacks         Callback objects, or functions of an event, on the driver; one that returns Stop() ends the fit
    averaging         EMA(decay) or SWA(start): validation sees, and the model has, an average of the weights
    initialModel      a TorchModel of the same module, whose weights training begins with
    limitBatches      batches of an epoch at most: a dry run
    accumulation      forward and backward passes that a worker's part of a batch is divided into: less memory, the same gradient
    precision         "bf16" or "fp16": forward passes under torch.autocast; weights, gradients and optimizer stay as they are
    compile           workers run torch.compile(module), which needs a C++ compiler there and pays for long fits

    BatchNorm and other buffers, in all engines: each worker normalises with the rows of its own share (as in DDP), and
    after every step a buffer is the mean of the workers' values, weighted by their rows. syncBatchNorm=True takes the
    statistics of the whole batch instead (engines barrier and local).
    Frozen parameters are not touched; a trainable one that the loss does not depend on has a gradient of zeros.

    Raises RecipeError and DataError for whatever settings or schema show to be wrong, before any Spark job; DataError for
    rows, and UserError that begins with the traceback of your own code, from the workers.
    """

    _model: type[TorchModel] = TorchModel

    def __init__(
        self, *, module: nn.Module | Callable[[], nn.Module] | None = None, loss: Callable[[Any, Tensor], Tensor] | None = None,
        optimizer: str | OptimizerFactory | None = None, scheduler: SchedulerFactory | None = None,
        schedulerInterval: str | None = None, inputCols: list[str | list[str]] | None = None,
        labelCol: str | None = None, predictionCol: str | None = None,
        decoders: Mapping[str, Decoder] | None = None, batchSize: int | None = None, epochs: int | None = None,
        numWorkers: int | None = None, engine: str | Engine | None = None,
        algorithm: str | Callable[[TorchOptimizer], Round] | None = None, seed: int | None = None,
        exchange: str | Codec | Exchange | None = None, hierarchical: bool | None = None,
        clipNorm: float | None = None, clipValue: float | None = None, syncBatchNorm: bool | None = None,
        logInterval: int | None = None, predictBatchSize: int | None = None, progress: str | None = None,
        checkpointDir: str | None = None, checkpointInterval: int | None = None, checkpointUnit: str | None = None,
        checkpointKeep: int | None = None, resume: bool | None = None, recoveryInterval: float | None = None,
        maxRecoveries: int | None = None, deadline: float | None = None,
        weightCol: str | None = None, classWeights: str | list[float] | None = None,
        validationIndicatorCol: str | None = None, validationFraction: float | None = None,
        metrics: list[Any] | None = None, validationTrigger: Trigger | None = None, monitor: str | None = None,
        patience: int | None = None, minDelta: float | None = None, restoreBest: bool | None = None,
        endTrigger: Trigger | None = None, callbacks: list[Any] | None = None, averaging: Average | None = None,
        initialModel: TorchModel | None = None, limitBatches: int | None = None, accumulation: int | None = None,
        precision: str | None = None, compile: bool | None = None, learningRate: float | None = None,
        weightDecay: float | None = None, momentum: float | None = None, **more: Any,
    ) -> None:  # fmt: skip
        given = {name: value for name, value in locals().items() if name not in ("self", "more", "__class__")} | more
        super().__init__()
        self._setDefault(
            inputCols=["features"], labelCol="label", predictionCol="prediction", batchSize=256, epochs=1, engine="auto",
            algorithm="sync-sgd", seed=0, optimizer="adam", schedulerInterval="epoch", syncBatchNorm=False, logInterval=1,
            predictBatchSize=1024, progress="auto", deadline=120.0, decoders={},
            checkpointInterval=1, checkpointUnit="epoch", checkpointKeep=2, resume=False, recoveryInterval=60.0, maxRecoveries=3,
            hierarchical=False, metrics=[], monitor="val_loss", minDelta=0.0, callbacks=[], accumulation=1, precision="fp32",
            compile=False, device="auto", handleInvalid="error",
        )  # fmt: skip
        self.setParams(**given)

    def setParams(self, **given: Any) -> TorchEstimator:
        """Sets Params by name, as the constructor takes them; None leaves one as it is."""
        unknown = sorted(name for name in given if not self.hasParam(name))
        if unknown:
            raise TypeError(f"{type(self).__name__} has no parameter {unknown[0]!r}")
        set_given(self, given)
        return self

    def write(self) -> MLWriter:
        from bigdl_lite.ml.spelled import EstimatorWriter

        return EstimatorWriter(self)

    @classmethod
    def read(cls) -> MLReader[Any]:
        from bigdl_lite.ml.spelled import EstimatorReader

        return EstimatorReader(cls)

    @classmethod
    def load(cls, path: str, trust: bool = False) -> Any:
        """The estimator saved at `path`. trust: whether Python modules that the file names may be imported for its functions."""
        from bigdl_lite.ml.spelled import EstimatorReader

        return EstimatorReader(cls, trust).load(path)

    def fitMultiple(self, dataset: DataFrame | RDD[Any], paramMaps: Sequence[ParamMap]) -> Iterator[tuple[int, TorchModel]]:
        """A thread-safe iterator of (index, model), as CrossValidator and TrainValidationSplit ask for.

        Models whose Params differ in nothing but optimizer, scheduler and limits on gradients are trained together, in one pass
        over the rows; the results are those of separate fits. See ml/search.py.
        """
        return Models(self.copy(), dataset, paramMaps)

    def _fit(self, dataset: DataFrame | RDD[Any]) -> TorchModel:
        return prepare(self, dataset).run()

    def _loss(self, loss: Any) -> Any:
        return loss

    def _kind(self, loss: Any) -> str:
        return "plain"

    def _target(self, label: Column, loss: Any, floating: torch.dtype) -> Column:
        """What the label becomes: an index for class losses (also from doubles, as ml pipelines have them), a float for
        losses that compare it with the output value by value, else what its column says.
        """
        alone = label.depth == 0 and getattr(label.decoder, "shape", ()) == ()
        if isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss) and alone:
            return replace(label, dtype=torch.int64)
        if isinstance(loss, ELEMENTWISE_LOSSES):
            return replace(label, dtype=floating, unit=isinstance(loss, nn.BCEWithLogitsLoss | nn.BCELoss))
        return label


class TorchClassifier(TorchEstimator, HasRawPredictionCol, HasProbabilityCol):
    """A TorchEstimator for class labels 0 .. C - 1. The module returns class scores [rows, C], by default logits.

    loss  CrossEntropyLoss unless given; with BCEWithLogitsLoss or BCELoss the module has one output, the label is 0 or 1
    """

    _model = TorchClassificationModel

    def __init__(self, *, rawPredictionCol: str | None = None, probabilityCol: str | None = None, **more: Any) -> None:
        super().__init__(**more)
        self._setDefault(loss=nn.CrossEntropyLoss(), rawPredictionCol="rawPrediction", probabilityCol="probability")
        set_given(self, {"rawPredictionCol": rawPredictionCol, "probabilityCol": probabilityCol})

    def _loss(self, loss: Any) -> Any:
        return Squeezed(loss) if isinstance(loss, nn.BCEWithLogitsLoss | nn.BCELoss) else loss

    def _kind(self, loss: Any) -> str:
        return classifier_kind(rule_of(loss))


class TorchRegressor(TorchEstimator):
    """A TorchEstimator for a number. An output of [rows, 1] is compared with a label of [rows] as [rows].

    loss  MSELoss unless given
    """

    _model = TorchRegressionModel

    def __init__(self, **more: Any) -> None:
        super().__init__(**more)
        self._setDefault(loss=nn.MSELoss())

    def _loss(self, loss: Any) -> Any:
        return Squeezed(loss)

    def _target(self, label: Column, loss: Any, floating: torch.dtype) -> Column:
        return replace(super()._target(label, loss, floating), dtype=floating)


with_setters(TorchClassifier)
