"""Local SGD: several optimizer steps on each worker, then one meeting that averages the models.

    LocalSteps   local      H batches, one optimizer step each          -> (weights before - weights after) * rows
    Averaged     advance    weights - mean of the differences           weighted by rows

With one batch a round, plain SGD and no momentum this is synchronous SGD. Until epoch `after`, workers send gradients and
the server's optimizer takes them (post-local SGD), so that the state of the optimizer is the same everywhere.

Source: Stich, "Local SGD Converges Fast and Communicates Little", ICLR 2019; Lin et al., "Don't Use Large Mini-Batches,
Use Local SGD", ICLR 2020 (post-local).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from bigdl_lite.algorithms.algorithm import Advance, Durable, DurableAdvancer, Round, State, Update, Work, durable
from bigdl_lite.algorithms.parts import Gradient, Sum, TorchOptimizer
from bigdl_lite.batch import Batch, mix
from bigdl_lite.errors import CheckpointError, RecipeError
from bigdl_lite.model.replica import Replica
from bigdl_lite.vector import Cut


@dataclass(frozen=True)
class LocalSteps:
    """`steps` optimizer steps on a worker's own weights. The optimizer begins anew in every round, at the server's rates now.

    So momentum and moments live for one round; a worker keeps nothing, and any executor can do its next round.

    Cost  one copy of the weights and the optimizer's state, on each worker.
    """

    optimizer: TorchOptimizer
    steps: int
    after: int = 0  # epochs of synchronous steps before
    moves: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.steps < 1 or self.after < 0:
            raise RecipeError(f"local SGD with steps={self.steps} and after={self.after}: at least 1 step, at least 0 epochs")

    def batches(self, epoch: int) -> int:
        return 1 if epoch < self.after else self.steps

    def __call__(self, replica: Replica, batches: Sequence[Batch], work: Work) -> tuple[Update, float]:
        if work.epoch < self.after:
            return Gradient()(replica, batches, work)
        before = replica.weights.clone()
        advancer = self.optimizer.start(replica, (0, replica.layout.n))
        for group, rate in zip(advancer.optimizer.param_groups, work.rates, strict=True):
            group["lr"] = rate
        weight, total = 0.0, 0.0
        for i, batch in enumerate(batches):
            total += replica.backward(batch, mix(work.seed, i))  # also without rows: a module may meet the other ranks in forward
            update = Update(replica.gradient, replica.weight(batch))
            if update.weight:
                advancer.step(update, advancer.measure(update))
            weight += update.weight
        torch.sub(before, replica.weights, out=replica.gradient)
        return Update(replica.gradient.mul_(weight), weight), total


@dataclass(frozen=True)
class Averaged:
    """The server side: the weights go to the mean of the workers' weights. Its optimizer only keeps the rates, by its scheduler.

    schedulerInterval "step" means once a round.
    """

    optimizer: TorchOptimizer
    after: int = 0

    @property
    def measures(self) -> bool:
        return self.optimizer.measures and self.after > 0

    def cuts(self, replica: Replica, p: int) -> list[Cut]:
        return self.optimizer.cuts(replica, p)

    def start(self, replica: Replica, cut: Cut) -> _Averaged:
        return _Averaged(self, replica, cut)

    def check(self, replica: Replica) -> None:
        self.optimizer.check(replica)

    def check_state(self, replica: Replica, saved: State | None = None) -> None:
        inner: Durable = durable(self.optimizer)
        inner.check_state(replica, None if saved is None else _inner(saved))

    def join(self, states: Iterable[State]) -> State:
        states = list(states)
        joined = durable(self.optimizer).join(_inner(state) for state in states)
        return State(joined.tensors, {"epoch": states[0].facts["epoch"], "optimizer": joined.facts})


def _inner(state: State) -> State:
    if "optimizer" not in state.facts:
        raise CheckpointError("the checkpoint is not one of local SGD; go on with the algorithm that it was saved with")
    return State(state.tensors, state.facts["optimizer"])


class _Averaged:
    def __init__(self, how: Averaged, replica: Replica, cut: Cut) -> None:
        self.how, self.epoch = how, 0
        self.weights = replica.weights[slice(*cut)]
        self.inner: DurableAdvancer = how.optimizer.start(replica, cut)

    def measure(self, update: Update) -> float:
        return self.inner.measure(update) if self.epoch < self.how.after else 0.0

    def step(self, update: Update, measured: float) -> None:
        if self.epoch < self.how.after:
            self.inner.step(update, measured)
            return
        if update.weight:
            with torch.no_grad():
                self.weights.sub_(update.vector.div_(update.weight))
        self.inner.end_step()  # type: ignore[attr-defined]

    def end_epoch(self, loss: float) -> None:
        self.epoch += 1
        self.inner.end_epoch(loss)

    def rates(self) -> list[float]:
        return self.inner.rates()

    def state(self) -> State:
        inner = self.inner.state()
        return State(inner.tensors, {"epoch": self.epoch, "optimizer": inner.facts})

    def restore(self, state: State) -> None:
        self.inner.restore(_inner(state))
        self.epoch = int(state.facts["epoch"])


def local_sgd(steps: int = 8, after: int = 0) -> Callable[[Advance], Round]:
    """The algorithm of `steps` local steps a round, from epoch `after` on (post-local SGD).

    Bytes of a round are those of a synchronous step, so 1 / steps of them in all.
    """

    def made(advance: Advance) -> Round:
        if not isinstance(advance, TorchOptimizer):
            raise RecipeError(f"local SGD needs a torch optimizer, not {type(advance).__name__}")
        return Round(LocalSteps(advance, steps, after), Sum(), Averaged(advance, after))

    return made
