"""TorchEstimator: fit(df) trains a torch module where the data lies.

From Params to a Recipe, from a DataFrame to a frame of numWorkers partitions, then to an engine; and back to a Model.
"""

from __future__ import annotations

import copy
import uuid
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from pyspark import RDD
from pyspark.ml import Estimator
from pyspark.ml.param.shared import HasProbabilityCol, HasRawPredictionCol
from pyspark.sql import DataFrame
from torch import Tensor, nn

from bigdl_lite.algorithms import Exchange, Round, method, with_exchange
from bigdl_lite.algorithms.exchange import is_finite
from bigdl_lite.algorithms.parts import OptimizerFactory, SchedulerFactory, TorchOptimizer
from bigdl_lite.data.columns import Column, Decoder
from bigdl_lite.data.parquet import FILE
from bigdl_lite.engine.arrange import arrange
from bigdl_lite.engine.pack import check
from bigdl_lite.engine.recipe import Engine, Recipe, Start
from bigdl_lite.engine.spark import ROW, read_columns, select
from bigdl_lite.errors import BigDLError, DivergedError, RecipeError, UserError, report
from bigdl_lite.ml.engines import choose
from bigdl_lite.ml.head import classifier_kind
from bigdl_lite.ml.model import TorchClassificationModel, TorchModel, TorchRegressionModel, model_of
from bigdl_lite.ml.params import HasTraining, check_params, set_given
from bigdl_lite.ml.resume import about, begin, recovery_of, saving_of
from bigdl_lite.ml.rows import computed, from_rdd, require_frame
from bigdl_lite.ml.score import head_of
from bigdl_lite.model.batchnorm import synchronised
from bigdl_lite.model.layout import blueprint
from bigdl_lite.model.replica import ELEMENTWISE_LOSSES, Replica, Squeezed
from bigdl_lite.observe.progress import Progress
from bigdl_lite.wire.codec import Codec


def _adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-3)


class TorchEstimator(Estimator, HasTraining):
    """Trains any torch module on a DataFrame (or an RDD of (inputs, label) NumPy tuples).

    module            an nn.Module (it is copied), or a function without arguments that returns one; weights are made on the
                      driver, from `seed`
    loss              callable (output, target) -> one number, the mean over the rows
    optimizer         callable (parameters) -> torch.optim.Optimizer; any optimizer, parameter groups included. parameters
                      is the list of trainable parameters, parameters.named the dict of them by name
    scheduler         callable (optimizer) -> a torch learning rate scheduler, stepped once per schedulerInterval
    inputCols         one column for each positional argument of forward: numbers, arrays, ml vectors, binary (see decoders);
                      a list of columns of numbers in place of one makes one argument [rows, columns] of them
    labelCol          the second argument of loss
    decoders          how binary columns are read: {column: Raw(shape, dtype) or function(bytes) -> array}
    batchSize         rows of one step over ALL workers
    numWorkers        workers, each with a share of the rows; None: all slots
    engine            "auto" | "barrier" | "shuffle" | "local", or an engine object such as BarrierEngine(...)
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
        optimizer: OptimizerFactory | None = None, scheduler: SchedulerFactory | None = None, schedulerInterval: str | None = None,
        inputCols: list[str | list[str]] | None = None, labelCol: str | None = None, predictionCol: str | None = None,
        decoders: Mapping[str, Decoder] | None = None, batchSize: int | None = None, epochs: int | None = None,
        numWorkers: int | None = None, engine: str | Engine | None = None,
        algorithm: str | Callable[[TorchOptimizer], Round] | None = None, seed: int | None = None,
        exchange: str | Codec | Exchange | None = None, hierarchical: bool | None = None,
        clipNorm: float | None = None, clipValue: float | None = None, syncBatchNorm: bool | None = None,
        logInterval: int | None = None, predictBatchSize: int | None = None, progress: str | None = None,
        checkpointDir: str | None = None, checkpointInterval: int | None = None, checkpointUnit: str | None = None,
        checkpointKeep: int | None = None, resume: bool | None = None, recoveryInterval: float | None = None,
        maxRecoveries: int | None = None, deadline: float | None = None, **more: Any,
    ) -> None:  # fmt: skip
        given = {name: value for name, value in locals().items() if name not in ("self", "more", "__class__")} | more
        super().__init__()
        self._setDefault(
            inputCols=["features"], labelCol="label", predictionCol="prediction", batchSize=256, epochs=1, engine="auto",
            algorithm="sync-sgd", seed=0, optimizer=_adam, schedulerInterval="epoch", syncBatchNorm=False, logInterval=1,
            predictBatchSize=1024, progress="auto", deadline=120.0, decoders={},
            checkpointInterval=1, checkpointUnit="epoch", checkpointKeep=2, resume=False, recoveryInterval=60.0, maxRecoveries=3,
            hierarchical=False,
        )  # fmt: skip
        unknown = sorted(name for name in more if not self.hasParam(name))
        if unknown:
            raise TypeError(f"{type(self).__name__} has no parameter {unknown[0]!r}")
        set_given(self, given)

    def _fit(self, dataset: DataFrame | RDD[Any]) -> TorchModel:
        check_params(self)
        given = self._given
        maker, loss = given("module"), given("loss")
        module = _make(maker, given("seed"))
        if given("syncBatchNorm"):
            module = synchronised(module)
        _require_values(module)
        plan, weights, buffers, constants = _try(lambda: blueprint(module), "copy.deepcopy of the module")
        start = Start(weights, buffers, constants)
        inputs, label, decoders = self.getInputCols(), self.getLabelCol(), self.getDecoders()
        if isinstance(dataset, RDD):
            with computed():
                dataset, inputs, label, decoders = from_rdd(dataset)
        require_frame(dataset)
        columns = read_columns(select(dataset, [*inputs, label]), inputs, label, plan.layout.dtype, decoders)
        assert columns.label is not None
        columns = replace(columns, label=self._target(columns.label, loss, plan.layout.dtype))
        advance = TorchOptimizer(
            given("optimizer"), given("scheduler"), given("schedulerInterval"), given("clipNorm"), given("clipValue")
        )
        round_ = _try(lambda: method(given("algorithm"), advance), "the algorithm")
        round_ = _try(lambda: with_exchange(round_, given("exchange"), plan), "the exchange")
        replica = Replica(plan, weights.clone(), None, constants, loss)
        _try(lambda: round_.advance.check(replica), "the optimizer or scheduler")
        loss = self._loss(loss)
        engine, p = choose(given("engine"), given("numWorkers"), dataset.sparkSession, round_)
        if round_.peer is not None:
            peer = _try(lambda: round_.peer.prepared(plan, replica, round_.advance, p), "the algorithm")
            round_ = replace(round_, peer=peer)
        check(module=plan, loss=loss, optimizer=advance, decoders=decoders, exchange=round_.exchange, algorithm=round_.peer)
        with computed():
            frame = arrange(dataset, [*inputs, label], p)
        columns = replace(columns, row=ROW if ROW in frame.columns else None, located=FILE in frame.columns)
        recipe = Recipe(
            plan, loss, round_, columns, p, given("batchSize"), given("epochs"), given("seed"), given("logInterval"),
            given("deadline"), f"{self.uid}-{uuid.uuid4().hex[:8]}", saving_of(self), recovery_of(self, round_, replica),
            given("maxRecoveries"), given("hierarchical"),
        )  # fmt: skip
        start, keeper = begin(self, recipe, start, replica, lambda: about(self._model, recipe, columns, self._kind(loss), maker))
        before = list(keeper.before) if keeper else []
        bar = Progress(given("progress"))
        try:
            with computed():
                outcome = engine.fit(frame, recipe, start, bar, *([keeper] if keeper else []))
        finally:
            bar.close()
            if keeper:
                keeper.close()
        outcome = replace(outcome, history=[*before, *outcome.history])
        if not is_finite(outcome.weights):
            raise DivergedError("the weights are not finite after the last step; lower the learning rate or clip gradients (clipNorm)")
        trained = Start(outcome.weights, outcome.buffers, start.constants)
        head = _try(
            lambda: head_of(self._kind(loss), plan, trained, columns, outcome.shapes), "the module, on rows of zeros in evaluation mode"
        )
        model = model_of(self._model, columns, head, plan, start, outcome, maker)
        model._resetUid(self.uid)
        return self._copyValues(model)

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


def _require_values(module: nn.Module) -> None:
    """Raises RecipeError, which names the parameter, where training has no number to begin with."""
    for name, p in module.named_parameters():
        if isinstance(p, nn.parameter.UninitializedParameter) or not p.requires_grad:
            continue
        if p.is_meta:
            raise RecipeError(f"parameter {name!r} of the module is on the meta device, which holds no values: make it on the CPU")
        if p.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise RecipeError(f"parameter {name!r} of the module is of {p.dtype}, must be of real floats (module.float())")
        if not is_finite(p.detach()):
            raise RecipeError(f"parameter {name!r} of the module has NaN or infinity before training")


def _make(maker: Any, seed: int) -> nn.Module:
    """The module with its first weights; the global random state is left as it was."""
    if isinstance(maker, nn.Module):
        return _try(lambda: copy.deepcopy(maker), "copy.deepcopy of the module")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = _try(maker, "the function that makes the module")
    if not isinstance(made, nn.Module):
        raise RecipeError(f"module() returned {type(made).__name__}, not an nn.Module")
    return made


def _try(call: Callable[[], Any], what: str) -> Any:
    """The result of code of the user's, run on the driver; its errors look like those from workers."""
    try:
        return call()
    except BigDLError:
        raise
    except Exception as error:
        raise UserError(report(error, f"the driver, in {what}")["message"]) from error


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
        return classifier_kind(loss.loss if isinstance(loss, Squeezed) else loss)


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
