"""fitMultiple: models that differ only in how they are advanced are trained in one pass over the rows.

    param maps --> passes: all Params alike but those in OWN --> prepare one Job --> Stack, Each, Many --> one fit --> k models
               \\-> what no pass can hold: a fit of its own

k models in one pass cost one launch of workers, one reading and decoding of the rows, one meeting a step, and, where vmap can do
it, one kernel where k fits need k. Each model is what a fit of it alone gives, up to the rounding of kernels (1e-6 or so): weights,
predictions, history (whose seconds are those of the pass).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from bigdl_lite.engine.each import split, stacked
from bigdl_lite.engine.pack import check
from bigdl_lite.engine.trigger import EveryEpoch, MaxEpoch, MaxStep, SeveralSteps
from bigdl_lite.errors import DivergedError, RecipeError, UserError
from bigdl_lite.ml.model import TorchModel
from bigdl_lite.ml.params import check_params
from bigdl_lite.ml.prepare import Job, advance_of, prepare, trying
from bigdl_lite.ml.resume import recovery_of
from bigdl_lite.ml.rows import computed
from bigdl_lite.ml.watching import ears_of
from bigdl_lite.model.batchnorm import SyncBatchNorm
from bigdl_lite.model.replica import Replica

_LOG = logging.getLogger("bigdl_lite")
_MOST = 50_000_000  # weights of the models of one pass; above it there is little left to save

# the Params in which models of one pass may differ
OWN = (
    "optimizer", "learningRate", "weightDecay", "momentum", "scheduler", "schedulerInterval", "clipNorm", "clipValue", "predictionCol",
    "rawPredictionCol", "probabilityCol", "predictBatchSize", "outputCols", "device",
)  # fmt: skip
# what concerns a fit as a whole, and the value with which it does not
_ALONE: dict[str, Any] = {
    "exchange": None, "averaging": None, "patience": None, "endTrigger": None, "checkpointDir": None, "callbacks": [],
    "syncBatchNorm": False, "compile": False, "algorithm": "sync-sgd",
}  # fmt: skip
_BLIND = (EveryEpoch, SeveralSteps, MaxEpoch, MaxStep)  # triggers that look at no loss, which is not that of one model


class Models(Iterator[tuple[int, TorchModel]]):
    """(index, model) for each param map, from any number of threads. The first that asks for a model of a pass runs it.

    An error of the data, or of Spark, reaches whoever asks for a model of the pass. Where the user's own code fails, or a model
    diverges, each is fitted by itself, so that the error is that of its own Params.
    """

    def __init__(self, estimator: Any, dataset: Any, maps: Sequence[Mapping[Any, Any]]) -> None:
        self._estimators = [estimator.copy(dict(given)) for given in maps]
        self._lock, self._next, self._dataset = threading.Lock(), 0, dataset
        self._passes: dict[int, _Pass] = {}
        for members in alike(self._estimators):
            reason = why_alone(self._estimators[members[0]], len(members))
            if reason:
                _LOG.info("%s: %s", _shown(members), reason)
                continue
            one = _Pass([self._estimators[i] for i in members], dataset)
            _LOG.info("%s are trained in one pass over the rows", _shown(members))
            self._passes |= dict.fromkeys(members, one)

    def __next__(self) -> tuple[int, TorchModel]:
        with self._lock:
            index = self._next
            if index >= len(self._estimators):
                raise StopIteration
            self._next += 1
        estimator, shared = self._estimators[index], self._passes.get(index)
        model = shared.model(estimator) if shared else None
        return index, model or estimator.fit(self._dataset)


def alike(estimators: Sequence[Any]) -> list[list[int]]:
    """The indices of estimators whose Params are the same but for those in OWN, in groups."""
    groups: list[tuple[dict[str, Any], list[int]]] = []
    for i, estimator in enumerate(estimators):
        params = {p.name: estimator._given(p.name) for p in estimator.params if p.name not in OWN}
        found = next((members for other, members in groups if all(_same(other[name], x) for name, x in params.items())), None)
        if found is None:
            groups.append((params, [i]))
        else:
            found.append(i)
    return [members for _, members in groups]


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    try:
        return type(a) is type(b) and bool(a == b)
    except Exception:  # tensors, and whatever else has no one answer: not known to be the same
        return False


def why_alone(estimator: Any, k: int) -> str:
    """Why k estimators that are alike are fitted one by one; "" where they may be trained together."""
    if k == 1:
        return "no other differs from it in optimizer, scheduler, clipNorm and clipValue only"
    given = estimator._given
    for name, value in _ALONE.items():
        if given(name) != value:
            return f"{name} is for a fit as a whole: a fit for each"
    if given("restoreBest"):
        return "restoreBest keeps weights of another moment for each model: a fit for each"
    trigger = given("validationTrigger")
    if trigger is not None and type(trigger) not in _BLIND:
        return "validationTrigger may look at the loss, of which each model has its own: a fit for each"
    return ""


def _shown(members: Sequence[int]) -> str:
    return f"param map{'s' if len(members) > 1 else ''} {', '.join(map(str, members))}"


class _Pass:
    """Estimators that are alike, and their models once somebody has asked for one."""

    def __init__(self, estimators: list[Any], dataset: Any) -> None:
        self.estimators, self.dataset = estimators, dataset
        self.lock = threading.Lock()
        self.error: Exception | None = None
        self.models: list[TorchModel | None] | None = None

    def model(self, estimator: Any) -> TorchModel | None:
        """None where it must be fitted by itself after all."""
        with self.lock:
            if self.models is None and self.error is None:
                try:
                    self.models = [*fit_together(self.estimators, self.dataset)]
                except (UserError, DivergedError, RecipeError) as error:
                    _LOG.info("each model is fitted by itself, because together: %s", error)
                    self.models = [None] * len(self.estimators)
                except Exception as error:
                    self.error = error
            if self.error is not None:
                raise self.error
            assert self.models is not None
            return self.models[next(i for i, other in enumerate(self.estimators) if other is estimator)]


def fit_together(estimators: Sequence[Any], dataset: Any) -> list[TorchModel]:
    """The models of estimators that are alike, from one fit, or from as few as their size allows.

    Raises  RecipeError where they cannot be trained together, and whatever a fit raises.
    """
    for estimator in estimators:
        check_params(estimator)
    first = prepare(estimators[0], dataset)
    if any(isinstance(m, SyncBatchNorm) for m in first.plan.skeleton.modules()):
        raise RecipeError("ranks meet inside SyncBatchNorm, once for each model")
    most = _MOST // first.plan.layout.n
    if most < 2:
        raise RecipeError(f"two models of {first.plan.layout.n} weights are more than {_MOST}")
    jobs = [first, *(_with(first, estimator) for estimator in estimators[1:])]
    return [model for at in range(0, len(jobs), most) for model in _run(jobs[at : at + most])]


def _with(job: Job, estimator: Any) -> Job:
    """The job of an estimator that is like that of `job`."""
    advance = advance_of(estimator)
    trying(lambda: advance.check(job.replica), "the optimizer or scheduler")
    check(optimizer=advance)
    round_ = replace(job.recipe.round, advance=advance)  # type: ignore[arg-type]
    return replace(job, estimator=estimator, recipe=replace(job.recipe, round=round_))


def _run(jobs: Sequence[Job]) -> list[TorchModel]:
    """One fit for all jobs, which differ in their advance only."""
    first, k = jobs[0], len(jobs)
    if k == 1:
        return [first.run()]
    recipe, start, stack = stacked(first.recipe, first.start, [job.recipe.round.advance for job in jobs])  # type: ignore[misc]
    replica = Replica(recipe.blueprint, start.weights.clone(), None, start.constants, recipe.loss)
    trying(lambda: recipe.round.advance.check(replica), "the optimizer or scheduler")
    recipe = replace(recipe, recovery=recovery_of(first.estimator, recipe.round, replica))
    with ears_of(first.estimator, recipe, first.engine, start) as told:
        with computed():
            outcome = first.engine.fit(first.frame, recipe, start, told)
        models = [job.model(of_one, told.seconds) for job, of_one in zip(jobs, split(outcome, stack), strict=True)]
        told.ended(outcome.history, None)
    return models
