"""Many: a stack of models, each advanced by an optimizer of its own.

    owner     whole models, so that it can clip the gradient of each, and take rules that need whole tensors
    step      each model as if it were alone: its optimizer, scheduler and limits

    n  weights of one model      k  models
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from bigdl_lite.algorithms.algorithm import Advancer, DurableAdvancer, State, Update, durable
from bigdl_lite.algorithms.parts import TorchOptimizer
from bigdl_lite.errors import CheckpointError
from bigdl_lite.model.layout import Layout
from bigdl_lite.model.replica import Replica
from bigdl_lite.vector import Cut, slices

_NAME = "optimizer/"


class _One:
    """What an optimizer looks at in a replica, of model i of a stack."""

    def __init__(self, replica: Replica, i: int) -> None:
        stack: Any = replica.module
        self.layout: Layout = stack.inner
        n = self.layout.n
        self.weights: Tensor = replica.weights.detach()[i * n : (i + 1) * n]
        self.module: nn.Module = stack.one(self.weights)
        self.parameters = [p for p in self.module.parameters() if p.requires_grad]


@dataclass(frozen=True)
class Many:
    """Model i of a stack (model/stack.py) is advanced by advances[i].

    Cost  that of the k optimizers; each owner also makes those of the models that it does not own, for nothing but their rates.
    """

    advances: tuple[TorchOptimizer, ...]
    measures: ClassVar[bool] = False  # an owner has all of a gradient whose norm counts

    def cuts(self, replica: Replica, p: int) -> list[Cut]:
        n = replica.layout.n // len(self.advances)
        return [(start * n, stop * n) for start, stop in slices(len(self.advances), p)]

    def start(self, replica: Replica, cut: Cut) -> _Models:
        return _Models(self, replica, cut)

    def check(self, replica: Replica) -> None:
        for i, advance in enumerate(self.advances):
            advance.check(_One(replica, i))  # type: ignore[arg-type]

    def check_state(self, replica: Replica, saved: State | None = None) -> None:
        if saved is not None and len(saved.facts.get("models", {})) != len(self.advances):
            raise CheckpointError(f"the checkpoint is not of {len(self.advances)} models that are trained together: fit without it")
        for i, advance in enumerate(self.advances):
            durable(advance).check_state(_One(replica, i), None if saved is None else _of(saved, i))  # type: ignore[arg-type]

    def join(self, states: Iterable[State]) -> State:
        joined: dict[int, State] = {}
        for state in states:
            for key in state.facts["models"]:
                joined[int(key)] = self.advances[int(key)].join([_of(state, int(key))])
        missing = sorted(set(range(len(self.advances))) - joined.keys())
        if missing:
            raise CheckpointError(f"the states of the owners have no model {missing[0]} of {len(self.advances)}")
        return _together(joined)


class _Models:
    """The advancer of some models in a row, those inside the cut."""

    def __init__(self, how: Many, replica: Replica, cut: Cut) -> None:
        self.n = replica.layout.n // len(how.advances)
        self.first, last = cut[0] // self.n, cut[1] // self.n
        self.all: list[Advancer] = []
        for i, advance in enumerate(how.advances):
            mine = (0, self.n) if self.first <= i < last else (0, 0)
            self.all.append(advance.start(_One(replica, i), mine))  # type: ignore[arg-type]
        self.own = range(self.first, last)

    def measure(self, update: Update) -> float:
        return 0.0

    def step(self, update: Update, measured: float) -> None:
        for i, advancer in enumerate(self.all):
            at = (i - self.first) * self.n if i in self.own else 0
            part = Update(update.vector[at : at + self.n] if i in self.own else update.vector[:0], update.weight)
            advancer.step(part, advancer.measure(part))

    def end_epoch(self, loss: float | Sequence[float]) -> None:
        """loss: of each model; or one for all."""
        for i, advancer in enumerate(self.all):
            advancer.end_epoch(loss[i] if isinstance(loss, Sequence) else loss)

    def rates(self) -> list[float]:
        """The rate of the first group of each model."""
        return [advancer.rates()[0] for advancer in self.all]

    def state(self) -> State:
        return _together({i: _durable(self.all[i]).state() for i in self.own})

    def restore(self, state: State) -> None:
        for i, advancer in enumerate(self.all):
            _durable(advancer).restore(_of(state, i))


def _durable(advancer: Any) -> DurableAdvancer:
    return advancer


def _together(states: dict[int, State]) -> State:
    tensors = {f"{_NAME}{i}/{name.removeprefix(_NAME)}": x for i, state in states.items() for name, x in state.tensors.items()}
    return State(tensors, {"models": {str(i): state.facts for i, state in states.items()}})


def _of(state: State, i: int) -> State:
    own = f"{_NAME}{i}/"
    tensors = {_NAME + name.removeprefix(own): x for name, x in state.tensors.items() if name.startswith(own)}
    return State(tensors, state.facts["models"][str(i)])
