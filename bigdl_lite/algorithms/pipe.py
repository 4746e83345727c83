"""Pipe-SGD: the updates of one step travel while the next one is computed.

    step t     g_t = grad(x_t);  wait for G_(t-1);  send g_t;  x_(t+1) = x_t - lr G_(t-1)        G_t = sum over workers of g_t
    at the end G of the last step is applied

Every update is applied once, one step late, and all workers apply the same ones: their weights are the same bits. The first step
has no update, so the optimizer is not called in it. A step then takes the longer of its two halves instead of their sum:

    synchronous   compute + exchange            piped   max(compute, exchange)

so that twice as fast is the most that the pipeline alone can be, where both are equal; what is more comes from a codec.

What it costs is stability. With curvature c and momentum b, a rate is stable below 2 (1 + b) / c without a delay, and below
(1 - b) / c with this one: at b = 0.9 that is 38 times less. A fit with momentum gets a warning.

    n  length of the flat weights

Source: Li et al., "Pipe-SGD: A Decentralized Pipelined SGD Framework for Distributed Deep Net Training", NeurIPS 2018, Alg. 1.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from bigdl_lite.algorithms.algorithm import Advance, DurableAdvancer, Round, State, Update
from bigdl_lite.algorithms.exchange import Coded, Exchange, Turn
from bigdl_lite.algorithms.parts import Gradient, Sum
from bigdl_lite.algorithms.peer import Here, Moment, require_finite
from bigdl_lite.comm.beside import Beside
from bigdl_lite.errors import RecipeError
from bigdl_lite.model.layout import Blueprint
from bigdl_lite.model.replica import Replica
from bigdl_lite.wire.codec import Codec, Raw

_DENSE = Coded(Raw())


class Predicted(NamedTuple):
    """Seconds of a step, and how many times faster the pipeline is."""

    synchronous: float
    piped: float
    gain: float


def predicted(compute: float, exchange: float, update: float = 0.0, ratio: float = 1.0) -> Predicted:
    """What the pipeline gains, from the seconds of a synchronous step: its compute, exchange, and optimizer's update.

    ratio  by how much a codec shortens the exchange inside the pipeline; the synchronous step has none
    """
    piped = max(compute + update, exchange / ratio)
    whole = compute + update + exchange
    return Predicted(whole, piped, whole / piped if piped else 1.0)


def stable_rate(curvature: float, momentum: float = 0.0, delay: int = 1) -> float:
    """The largest learning rate at which heavy-ball SGD on a quadratic of this curvature does not diverge; delay 0 or 1."""
    if delay not in (0, 1):
        raise RecipeError(f"delay={delay}: known for 0 and 1")
    return (2 * (1 + momentum) if delay == 0 else 1 - momentum) / curvature


@dataclass(frozen=True)
class Pipelined:
    """The peer whose updates are one step late.

    exchange  how updates are summed while the next step computes; any, with residuals too
    warmup    first steps without delay

    Cost  that of the exchange, and one vector of n values more.
    """

    exchange: Exchange = _DENSE
    warmup: int = 0
    alike: ClassVar[bool] = True
    every: ClassVar[int] = 50
    keeps: ClassVar[bool] = True
    threads: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.warmup < 0:
            raise RecipeError(f"Pipelined(warmup={self.warmup}): at least 0 steps")
        if getattr(self.exchange, "overlap", False):
            raise RecipeError("overlap=True sends buckets while backward runs, and the pipeline sends the whole update: leave it out")

    def prepared(self, blueprint: Blueprint, replica: Replica, advance: Advance, p: int) -> Pipelined:
        self.exchange.check(blueprint)
        made = getattr(advance.start(replica, (0, len(replica.weights))), "optimizer", None)
        for group in made.param_groups if made is not None else ():
            lr, b = float(group.get("lr", 0.0)), float(group.get("momentum", 0.0) or 0.0)
            if b > 0:
                told = (
                    f"pipe-sgd applies each update one step late, and with momentum={b} the largest stable learning rate is then "
                    f"{stable_rate(1.0, b, 0) / stable_rate(1.0, b):.0f} times smaller: lr={lr} may diverge; "
                    f"lr={lr * stable_rate(1.0, b) / stable_rate(1.0, b, 0):.2g} is as far from its limit as before"
                )
                warnings.warn(told, RuntimeWarning, stacklevel=2)
                break
        return self

    def start(self, here: Here) -> _Pipelined:
        return _Pipelined(self, here)


class _Pipelined:
    def __init__(self, how: Pipelined, here: Here) -> None:
        self.how, self.here, self.comm = how, here, here.comm
        self.weights = here.replica.weights
        self.advancer: DurableAdvancer = here.advance.start(here.replica, (0, len(self.weights)))
        self.exchanger = how.exchange.start(here.blueprint, here.comm)
        self._under_way: Beside[Update] | None = None
        self._late: Update | None = None  # came in, and is not applied yet

    def begin(self, now: Moment) -> None:
        pass

    def step(self, update: Update, now: Moment) -> int:
        total, rank = sum(now.rows) or 1, self.comm.rank
        x = (update.vector / total).cpu()
        require_finite(x, "update", rank, now.step)
        turn = Turn(now.step, now.seed, now.rows[rank] / total)
        if now.step < self.how.warmup:
            self._apply(self._exchange(x, update.weight / total, turn))
            return now.step + 1
        self.settle()
        late, self._late = self._late, None
        self._under_way = Beside(self._exchange, x, update.weight / total, turn, inline=self.here.inline)
        if late is not None:
            self._apply(late)
        return now.step + 1

    def _exchange(self, x: Tensor, weight: float, turn: Turn) -> Update:
        """The mean over rows, and what the loss divides by, over rows."""
        total = self.exchanger(x, self.comm, turn)
        if self.here.weighs:
            weight = float(self.comm.all_reduce(torch.tensor([weight], dtype=torch.float64)))
        else:
            weight = 1.0
        return Update(total.to(self.weights.device), weight)

    def _apply(self, update: Update) -> None:
        self.advancer.step(update, self.advancer.measure(update))

    def settle(self) -> dict[str, Any]:
        if self._under_way is not None:
            self._late, self._under_way = self._under_way.result(), None
        return {}

    def finish(self) -> None:
        self.settle()
        if self._late is not None:
            self._apply(self._late)
            self._late = None

    @property
    def bytes_sent(self) -> int:
        return self.comm.bytes_sent

    def own(self) -> State:
        kept = self.exchanger.own() if self.how.exchange.remembers else State({}, {})
        shared = {f"exchange/all/{name}": x for name, x in self.exchanger.shared().tensors.items()}
        facts = {"own": kept.facts, "shared": self.exchanger.shared().facts, "weight": None}
        tensors = {**kept.tensors, **shared}
        if self._late is not None:
            tensors["exchange/late"], facts["weight"] = self._late.vector.cpu(), self._late.weight
        return State(tensors, facts)

    def restore(self, own: State) -> None:
        tensors = dict(own.tensors)
        late = tensors.pop("exchange/late", None)
        prefix = "exchange/all/"
        shared = {name.removeprefix(prefix): tensors.pop(name) for name in [*tensors] if name.startswith(prefix)}
        self.exchanger.restore(State(shared, own.facts["shared"]), State(tensors, own.facts["own"]))
        if late is not None:
            self._late = Update(late.clone().to(self.weights.device), float(own.facts["weight"]))

    def close(self) -> None:
        pass  # what is under way ends with the connections, or at its deadline


def pipe_sgd(exchange: Exchange | Codec | None = None, warmup: int = 0) -> Callable[[Advance], Round]:
    """The algorithm whose updates travel while the next step computes; exchange as in TorchEstimator, warmup in steps."""
    made: Any = _DENSE if exchange is None else Coded(exchange) if callable(getattr(exchange, "encode", None)) else exchange
    peer = Pipelined(made, warmup)
    return lambda advance: Round(Gradient(), Sum(), advance, peer=peer)
