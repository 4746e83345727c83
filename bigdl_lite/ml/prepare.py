"""From the Params of an estimator and a DataFrame to a Job: all that can be wrong is found here, before Spark works."""

from __future__ import annotations

import copy
import logging
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from pyspark.sql import DataFrame
from torch import nn

from bigdl_lite.algorithms import Round, method, with_exchange
from bigdl_lite.algorithms.exchange import is_finite
from bigdl_lite.algorithms.named import NamedOptimizer
from bigdl_lite.algorithms.parts import TorchOptimizer
from bigdl_lite.algorithms.shadow import shadowed
from bigdl_lite.data.columns import Column, Columns
from bigdl_lite.data.parquet import FILE
from bigdl_lite.engine.arrange import arrange
from bigdl_lite.engine.cluster import cluster_of
from bigdl_lite.engine.local import alone
from bigdl_lite.engine.pack import check
from bigdl_lite.engine.profile import profile_for
from bigdl_lite.engine.recipe import Engine, Outcome, Recipe, Start
from bigdl_lite.engine.spark import ROW, is_rdd, read_columns, select
from bigdl_lite.errors import BigDLError, DataError, DivergedError, RecipeError, UserError, report
from bigdl_lite.ml.engines import choose
from bigdl_lite.ml.model import TorchModel, model_of
from bigdl_lite.ml.params import check_params
from bigdl_lite.ml.resume import about, begin, recovery_of, saving_of
from bigdl_lite.ml.rows import computed, from_rdd, require_frame, usable
from bigdl_lite.ml.score import head_of, require_cuda
from bigdl_lite.ml.watching import ears_of, watch_of, weighted_by_class
from bigdl_lite.model.batchnorm import synchronised
from bigdl_lite.model.layout import Blueprint, blueprint
from bigdl_lite.model.loss import by_row
from bigdl_lite.model.replica import Compute, Replica

if TYPE_CHECKING:
    from pyspark import RDD

_LOG = logging.getLogger("bigdl_lite")


@dataclass(frozen=True)
class Job:
    """One fit, ready to run. replica: the module on the driver, which only its settings are checked with."""

    estimator: Any
    engine: Engine
    frame: DataFrame
    recipe: Recipe
    start: Start
    replica: Replica
    maker: Any  # of the module, as the user gave it

    @property
    def plan(self) -> Blueprint:
        return self.recipe.blueprint

    def run(self) -> TorchModel:
        estimator, recipe, columns = self.estimator, self.recipe, self.recipe.columns
        kind = estimator._kind(recipe.loss)
        start, keeper = begin(
            estimator, recipe, self.start, self.replica, lambda: about(estimator._model, recipe, columns, kind, self.maker)
        )
        before = list(keeper.before) if keeper else []
        with ears_of(estimator, recipe, self.engine, start) as told:
            try:
                with computed():
                    outcome = self.engine.fit(self.frame, recipe, start, told, *([keeper] if keeper else []))
            finally:
                if keeper:
                    keeper.close()
            model = self.model(replace(outcome, history=[*before, *outcome.history]), told.seconds, len(before))
            told.ended(model.history, model)
        _LOG.info("%s", model.summary.report)
        return model

    def model(self, outcome: Outcome, seconds: float, before: int = 0) -> TorchModel:
        """The model of an outcome of this job. seconds: of the fit; before: lines of its history that an earlier fit made."""
        estimator, columns = self.estimator, self.recipe.columns
        if not is_finite(outcome.weights):
            raise DivergedError("the weights are not finite after the last step; lower the learning rate or clip gradients (clipNorm)")
        trained = Start(outcome.weights, outcome.buffers, self.start.constants)
        kind = estimator._kind(self.recipe.loss)
        head = trying(
            lambda: head_of(kind, self.plan, trained, columns, outcome.shapes), "the module, on rows of zeros in evaluation mode"
        )
        model = model_of(estimator._model, columns, head, self.plan, self.start, outcome, self.maker)
        model._resetUid(estimator.uid)
        model._facts = {
            "workers": self.recipe.num_workers, "seconds": seconds, "shares": outcome.shares, "before": before,
            "monitor": self.recipe.watch.monitor, "higher": self.recipe.watch.higher,
        }  # fmt: skip
        return estimator._copyValues(model)


def prepare(estimator: Any, dataset: DataFrame | RDD[Any]) -> Job:
    """Raises RecipeError and DataError for whatever the settings or the schema show to be wrong, before any job.

    But an RDD costs a job that takes its first row, and classWeights="balanced" one that counts the labels.
    """
    check_params(estimator)
    given = estimator._given
    lost = getattr(estimator, "_lost", {})
    forgotten = next((name for name in lost if not estimator.isSet(name)), None)
    if forgotten is not None:
        why = lost[forgotten]
        raise RecipeError(f"{forgotten} was not saved with this estimator ({why}): set it again with setParams({forgotten}=...)")
    maker, loss = given("module"), given("loss")
    module = make(maker, given("seed"))
    if given("syncBatchNorm"):
        module = synchronised(module)
    _require_values(module)
    watch = watch_of(estimator, loss)
    if given("initialModel") is not None:
        _warm(module, given("initialModel"))
    plan, weights, buffers, constants = trying(lambda: blueprint(module), "copy.deepcopy of the module")
    start = Start(weights, buffers, constants)
    dataset, columns, inputs = _columns(estimator, dataset, plan, loss)
    advance = advance_of(estimator)
    round_ = trying(lambda: method(given("algorithm"), advance), "the algorithm")
    round_ = trying(lambda: with_exchange(round_, given("exchange"), plan), "the exchange")
    replica = Replica(plan, start.weights.clone(), None, constants, loss)
    trying(lambda: round_.advance.check(replica), "the optimizer or scheduler")
    profile = _profile(estimator, dataset.sparkSession)
    engine, p = choose(given("engine"), given("numWorkers"), dataset.sparkSession, round_, profile)
    if round_.peer is not None:
        peer = trying(lambda: round_.peer.prepared(plan, replica, round_.advance, p), "the algorithm")
        round_ = replace(round_, peer=peer)
    round_ = _shadowed(round_, given("averaging"), watch.best, given("epochs"))
    loss = weighted_by_class(loss, given("classWeights"), dataset, columns.label)  # which may cost a job
    loss = estimator._loss(by_row(loss) if columns.weight is not None else loss)
    check(
        module=plan, loss=loss, optimizer=advance, decoders=estimator.getDecoders(), exchange=round_.exchange, algorithm=round_.peer,
        watch=watch,
    )  # fmt: skip
    more = [c.source for c in (columns.weight, columns.held) if c is not None]
    assert columns.label is not None
    with computed():
        frame = arrange(dataset, [*inputs, columns.label.name, *more], p)
    columns = replace(columns, row=ROW if ROW in frame.columns else None, located=FILE in frame.columns)
    recipe = Recipe(
        plan, loss, round_, columns, p, given("batchSize"), given("epochs"), given("seed"), given("logInterval"), given("deadline"),
        f"{estimator.uid}-{uuid.uuid4().hex[:8]}", saving_of(estimator), recovery_of(estimator, round_, replica),
        given("maxRecoveries"), given("hierarchical"), Compute(given("accumulation"), given("precision"), given("compile")), watch,
        given("limitBatches"), given("device"),
    )  # fmt: skip
    return Job(estimator, engine, frame, recipe, start, replica, maker)


def _profile(estimator: Any, spark: Any) -> Any:
    """The resources of the tasks that train. RecipeError where there can be no GPU, and device='cuda' asks for one."""
    device, engine = estimator._given("device"), estimator._given("engine")
    if device == "cuda" and engine == "local":
        raise RecipeError("device is 'cuda', and engine='local', the reference, computes on CPUs: take another engine")
    if device == "cuda" and cluster_of(spark).beside:
        require_cuda("this machine has none that torch can use")
    profile = estimator._given("resourceProfile")
    return profile_for(spark, device, profile) if isinstance(engine, str) else profile


def optimizer_of(estimator: Any) -> Any:
    """The factory that the Params name, or are."""
    given = estimator._given
    numbers = {name: given(name) for name in ("learningRate", "weightDecay", "momentum")}
    asked = given("optimizer")
    if isinstance(asked, str):
        rate = 1e-3 if numbers["learningRate"] is None else numbers["learningRate"]
        return NamedOptimizer(asked, rate, numbers["weightDecay"], numbers["momentum"])
    other = next((name for name, value in numbers.items() if value is not None), None)
    if other is not None:
        raise RecipeError(f"{other} is for an optimizer by name ('adam', 'sgd', ...), and optimizer is a function: say it there")
    return asked


def advance_of(estimator: Any) -> TorchOptimizer:
    """How an owner advances its slice."""
    names = ("scheduler", "schedulerInterval", "clipNorm", "clipValue")
    return TorchOptimizer(optimizer_of(estimator), *(estimator._given(name) for name in names))


def _columns(estimator: Any, dataset: DataFrame | RDD[Any], plan: Blueprint, loss: Any) -> tuple[DataFrame, Columns, list[Any]]:
    """The frame, what is read of it, and the names of the inputs."""
    inputs, label, decoders = estimator._inputs(), estimator.getLabelCol(), estimator.getDecoders()
    names = {name: estimator._given(name) for name in ("weightCol", "validationIndicatorCol")}
    if is_rdd(dataset):
        other = next((name for name, value in names.items() if value), None)
        if other:
            raise RecipeError(f"{other} names a column, and an RDD of (inputs, label) has none: make a DataFrame of it")
        with computed():
            dataset, inputs, label, decoders = from_rdd(dataset)
    require_frame(dataset)
    dtype = plan.layout.dtype
    columns = read_columns(select(dataset, [*inputs, label]), inputs, label, dtype, decoders)
    assert columns.label is not None
    weight, held = (_one(dataset, param, name, dtype) for param, name in names.items())
    if held is not None:
        if dataset.schema[held.name].dataType.typeName() != "boolean":
            raise DataError(f"validationIndicatorCol {held.name!r} must be boolean: df.withColumn({held.name!r}, condition)")
        held = replace(held, dtype=torch.int64)
    weight = weight and replace(weight, dtype=dtype, positive=True)
    if estimator._given("handleInvalid") == "skip":
        dataset = usable(dataset, [*inputs, label, *filter(None, names.values())])
    return dataset, replace(columns, label=estimator._target(columns.label, loss, dtype), weight=weight, held=held), inputs


def _one(dataset: DataFrame, param: str, name: str | None, dtype: torch.dtype) -> Column | None:
    """The column of one number a row that a Param names."""
    if not name:
        return None
    (found,) = read_columns(select(dataset, [name]), [name], None, dtype).inputs
    if found.depth:
        raise DataError(f"{param} {name!r} holds arrays; it must hold one number a row")
    return found


def _shadowed(round_: Round, averaging: Any, best: bool, epochs: int) -> Round:
    """With what is kept beside the weights, if anything is."""
    if averaging is None and not best:
        return round_
    if averaging is not None and averaging.per == "epoch" and getattr(averaging, "start", 0) > epochs:
        raise RecipeError(f"averaging={averaging!r} begins after epoch {averaging.start}, and epochs is {epochs}: nothing is averaged")
    if round_.peer is not None:
        raise RecipeError(
            f"with {type(round_.peer).__name__} each worker has weights of its own, of which no average over steps is kept: leave out "
            "averaging and restoreBest, or take another algorithm"
        )
    return replace(round_, advance=shadowed(round_.advance, averaging, best))


def _warm(module: nn.Module, given: Any) -> None:
    """Gives the module the weights and buffers of a model that was trained before."""
    if not isinstance(given, TorchModel) or given._start is None:
        raise RecipeError(f"initialModel is a {type(given).__name__}, must be a TorchModel; or give its module as module=")
    mine, theirs = ({name: f"{x.dtype} {list(x.shape)}" for name, x in m.state_dict().items()} for m in (module, given.module))
    other = next((name for name in [*mine, *theirs] if mine.get(name) != theirs.get(name)), None)
    if other is not None:
        found = [of.get(other, "missing") for of in (theirs, mine)]
        raise RecipeError(f"initialModel is of another module: {other!r} is {found[0]} there, {found[1]} here")
    module.load_state_dict(given.module.state_dict())


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


def make(maker: Any, seed: int) -> nn.Module:
    """The module with its first weights; the global random state is left as it was."""
    if isinstance(maker, nn.Module):
        return trying(lambda: copy.deepcopy(maker), "copy.deepcopy of the module")
    with alone(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = trying(maker, "the function that makes the module")
    if not isinstance(made, nn.Module):
        raise RecipeError(f"module() returned {type(made).__name__}, not an nn.Module")
    return made


def trying(call: Callable[[], Any], what: str) -> Any:
    """The result of code of the user's, run on the driver; its errors look like those from workers."""
    try:
        return call()
    except BigDLError:
        raise
    except Exception as error:
        raise UserError(report(error, f"the driver, in {what}")["message"]) from error
