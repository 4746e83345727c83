"""1-bit Adam: after a warm-up the variance stands still, and peers exchange their momentum, encoded, with error feedback.

    warm-up     g = sum x_i                                 Adam, exactly: m and v as ever
    afterwards  m = Q(sum Q(b m share_i + (1 - b) x_i))     errors of both encodings are kept and sent later
                w <- w - lr (m / c1) / (sqrt(v / c2) + eps)     v, c1 and c2 as they were at the end of the warm-up

Adam is not linear in the gradient, so error feedback cannot repair an encoded gradient; with v fixed the rule is momentum SGD
with a scale for each value, and it can.

    n  length of the flat weights      m, v  moments [n]      b  Adam's first beta      c1, c2  its bias corrections

Source: Tang et al., "1-bit Adam: Communication Efficient Large-Scale Training with Adam's Convergence Speed", ICML 2021;
QAdam in BAGUA (Gan et al., VLDB 2022) is the same with 8 bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from bigdl_lite.algorithms.algorithm import Advance, Round, State
from bigdl_lite.algorithms.exchange import Turn, copy_into
from bigdl_lite.algorithms.parts import Gradient, OptimizerFactory, Parameters, Sum, TorchOptimizer
from bigdl_lite.comm.comm import Comm, Residual
from bigdl_lite.errors import CheckpointError, RecipeError
from bigdl_lite.model.layout import Blueprint
from bigdl_lite.wire.codec import Codec
from bigdl_lite.wire.lossy import Sign

_HOW = ("amsgrad", "maximize", "foreach", "fused", "capturable", "differentiable", "decoupled_weight_decay")  # only of torch's Adam


class QAdam(torch.optim.Optimizer):
    """Adam for `warmup` steps, the same bits as torch.optim.Adam's loop; then p.grad is taken for the momentum itself.

    State as Adam's: step, exp_avg, exp_avg_sq. Element-wise. The bias corrections stay those of step `warmup`. Weight decay is
    refused: Adam's goes into the gradient, and from there into what is exchanged, where this class does not see it.
    """

    elementwise: ClassVar[bool] = True

    def __init__(
        self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0.0, warmup: int = 100,
    ) -> None:  # fmt: skip
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "warmup": warmup})
        for group in self.param_groups:
            if group["weight_decay"]:
                raise RecipeError(f"QAdam has no weight_decay, got {group['weight_decay']}: it must be 0")
            if group["warmup"] < 1:
                raise RecipeError(f"QAdam(warmup={group['warmup']}): at least 1, as the variance must be of some gradients")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._advance(p, p.grad, group)
        return loss

    def _advance(self, p: Tensor, grad: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2), warmup = self.state[p], group["betas"], group["warmup"]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        state["step"] += 1
        step = int(state["step"])
        if step <= warmup:
            state["exp_avg"].lerp_(grad, 1 - beta1)
            state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        else:
            state["exp_avg"].copy_(grad)
        c1, c2 = (1 - beta ** min(step, warmup) for beta in (beta1, beta2))
        scale = (state["exp_avg_sq"].sqrt() / math.sqrt(c2)).add_(group["eps"])
        p.addcdiv_(state["exp_avg"], scale, value=-float(group["lr"]) / c1)


@dataclass(frozen=True)
class Momentum:
    """The exchange of QAdam: gradients as they are for `warmup` steps; then momenta, encoded, each way with its residual.

    Cost, bytes of all peers: 8 (p - 1) n in the warm-up, then 2 (p - 1) codec.nbytes(n). Memory of each: n (2 + 1 / p) values.
    """

    codec: Codec
    warmup: int = 100
    beta: float = 0.9
    remembers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.warmup < 1 or not 0 <= self.beta < 1:
            raise RecipeError(f"Momentum(warmup={self.warmup}, beta={self.beta}): at least 1, and in [0, 1)")

    def check(self, blueprint: Blueprint) -> None:
        pass

    def start(self, blueprint: Blueprint, comm: Comm) -> _Momentum:
        n = blueprint.layout.n
        return _Momentum(self, torch.zeros(n), Residual.zeros(n, comm, self.codec))


class _Momentum:
    """m [n] is the same on all peers, but as long as the weights; so it lies with the residuals in own()."""

    def __init__(self, how: Momentum, m: Tensor, residual: Residual | None) -> None:
        self.how, self.m, self.residual = how, m, residual

    def __call__(self, x: Tensor, comm: Comm, turn: Turn) -> Tensor:
        beta = self.how.beta
        if turn.step < self.how.warmup:
            total = comm.all_reduce(x)
            self.m.lerp_(total, 1 - beta)  # as QAdam and Adam do, to the bit
            return total
        x.mul_(1 - beta).add_(self.m, alpha=beta * turn.share)  # shares sum to 1: so does the momentum
        total = comm.all_reduce(x, self.how.codec, turn.seed, self.residual)
        self.m.copy_(total)
        return total

    def shared(self) -> State:
        return State({}, {})

    def own(self) -> State:
        tensors = {"exchange/momentum": self.m}
        if self.residual is not None:
            tensors |= {"exchange/mine": self.residual.mine, "exchange/owned": self.residual.owned}
        return State(tensors, {"warmup": self.how.warmup})

    def restore(self, shared: State, own: State) -> None:
        if own.facts.get("warmup", self.how.warmup) != self.how.warmup:  # QAdam goes on with that of its saved groups
            raise CheckpointError(
                f"the checkpoint was written with a warm-up of {own.facts['warmup']} steps, not {self.how.warmup}: go on with that"
            )
        copy_into(self.m, own, "exchange/momentum")
        if self.residual is not None:
            copy_into(self.residual.mine, own, "exchange/mine")
            copy_into(self.residual.owned, own, "exchange/owned")


@dataclass(frozen=True)
class _FromAdam:
    """An optimizer factory: the groups of the user's Adam in a QAdam. Called on the driver first, so that errors come early."""

    factory: OptimizerFactory
    warmup: int
    beta: float

    def __call__(self, params: Parameters) -> QAdam:
        made = self.factory(params)
        if type(made) is not torch.optim.Adam:
            raise RecipeError(f"qadam freezes the variance of torch.optim.Adam, the optimizer is {type(made).__name__}: take Adam")
        groups = []
        for i, group in enumerate(made.param_groups):
            wrong = [f"{key}={group[key]}" for key in ("amsgrad", "weight_decay", "maximize") if group.get(key)]
            if wrong:
                raise RecipeError(f"qadam takes Adam without {', '.join(wrong)} (group {i}): leave it out, or take another algorithm")
            if float(group["betas"][0]) != self.beta:
                raise RecipeError(
                    f"qadam exchanges one momentum with beta={self.beta}, Adam has betas={tuple(group['betas'])} in group {i}: "
                    f"give all groups one first beta, and the same to qadam: partial(qadam, beta={group['betas'][0]})"
                )
            groups.append({key: value for key, value in group.items() if key not in _HOW})
        return QAdam(groups, warmup=self.warmup)


def qadam(advance: Advance, codec: Codec | None = None, warmup: int = 100, beta: float = 0.9) -> Round:
    """1-bit Adam for a user's torch.optim.Adam; `algorithm=partial(qadam, warmup=500)` sets more than the defaults.

    codec   None: Sign(), one bit a value
    warmup  steps of plain Adam, about a fifth of all: when v does not change much any more
    beta    Adam's first beta

    Raises RecipeError, on the driver, where the optimizer is not Adam or clips: after the warm-up it would clip the momentum.
    """
    if not isinstance(advance, TorchOptimizer):
        raise RecipeError(f"qadam needs torch.optim.Adam as the optimizer, not {type(advance).__name__}")
    if advance.clip_norm is not None or advance.clip_value is not None:
        raise RecipeError("qadam cannot clip: after the warm-up momentum travels, not the gradient; leave out clipNorm and clipValue")
    frozen = replace(advance, factory=_FromAdam(advance.factory, warmup, beta))
    return Round(Gradient(), Sum(), frozen, Momentum(Sign() if codec is None else codec, warmup, beta))
