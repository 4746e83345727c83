"""Quasi-global momentum: momentum of what really happened to the model, gossip included.

    l = b m + g        u = g + b l (Nesterov) or l        x <- sum_j W[i, j] (x_j - lr u_j)
    m <- mu m + (1 - mu) (x_before - x_after) / lr        mu = b unless given

Where shares differ, a worker's own momentum follows its own rows and drives models apart. m follows what all of them did, as
far as gossip has brought it here, and costs no byte more: x_after is what the worker has anyway.

    qg-dadam   moments of the same kind, of the difference divided by its norm

Source: Lin, Karimireddy, Stich, Jaggi, "Quasi-Global Momentum: Accelerating Decentralized Deep Learning on Heterogeneous Data",
ICML 2021, Alg. 1 (QG-DSGDm, QG-DSGDm-N) and the corrected variant of QG-DAdam in the authors' code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from bigdl_lite.algorithms.algorithm import Advance, Round
from bigdl_lite.algorithms.gossip import Plan, Topology, gossip
from bigdl_lite.algorithms.parts import OptimizerFactory, Parameters, TorchOptimizer
from bigdl_lite.errors import RecipeError


class _Settled(torch.optim.Optimizer):
    """An optimizer whose momentum is told afterwards what became of the weights."""

    elementwise: ClassVar[bool] = True

    def settle(self, moved: Mapping[Tensor, Tensor]) -> None:
        """moved[p]: how far p has come in all, before minus after, since the last call."""
        raise AssertionError("each rule has its own")

    def _each(self) -> list[tuple[Tensor, dict[str, Any], dict[str, Any]]]:
        return [(p, self.state[p], group) for group in self.param_groups for p in group["params"]]


class QuasiGlobalSGD(_Settled):
    """SGD with momentum whose buffer only settle() changes. State: momentum_buffer, and rate, the learning rates since then, summed."""

    def __init__(
        self, params: Any, lr: float = 1e-3, momentum: float = 0.9, nesterov: bool = False, weight_decay: float = 0.0,
        mu: float | None = None,
    ) -> None:  # fmt: skip
        mu = momentum if mu is None else mu
        super().__init__(params, {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay, "mu": mu})
        for group in self.param_groups:
            if not 0 <= group["momentum"] < 1 or not 0 <= group["mu"] < 1:
                raise RecipeError(
                    f"quasi-global momentum with momentum={group['momentum']} and mu={group['mu']}: both must be in [0, 1)"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None if closure is None else closure()
        for p, state, group in self._each():
            if p.grad is None:
                continue
            if not state:
                state["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                state["rate"] = 0.0
            b, lr = group["momentum"], float(group["lr"])
            g = p.grad.add(p, alpha=group["weight_decay"]) if group["weight_decay"] else p.grad
            u = g.add(state["momentum_buffer"], alpha=b)
            if group["nesterov"]:
                u = g.add(u, alpha=b)
            p.add_(u, alpha=-lr)
            state["rate"] += lr
        return loss

    @torch.no_grad()
    def settle(self, moved: Mapping[Tensor, Tensor]) -> None:
        for p, state, group in self._each():
            if p not in moved or not state:
                continue
            by = (1 - group["mu"]) / state["rate"] if state["rate"] else 0.0  # a rate of 0 moves nothing by itself
            state["momentum_buffer"].mul_(group["mu"]).add_(moved[p], alpha=by)
            state["rate"] = 0.0


class QuasiGlobalAdam(_Settled):
    """Adam whose moments only settle() changes. State: step, exp_avg, exp_avg_sq."""

    def __init__(
        self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.99), eps: float = 1e-8, weight_decay: float = 0.0
    ) -> None:  # fmt: skip
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None if closure is None else closure()
        for p, state, group in self._each():
            if p.grad is None:
                continue
            if not state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state["step"] += 1
            step, (b1, b2) = int(state["step"]), group["betas"]
            g = p.grad.add(p, alpha=group["weight_decay"]) if group["weight_decay"] else p.grad
            first = state["exp_avg"].mul(b1).add_(g, alpha=1 - b1)
            second = state["exp_avg_sq"].mul(b2).addcmul_(g, g, value=1 - b2)
            scale = second.sqrt_().div_(math.sqrt(1 - b2**step)).add_(group["eps"])
            p.addcdiv_(first, scale, value=-float(group["lr"]) / (1 - b1**step))
        return loss

    @torch.no_grad()
    def settle(self, moved: Mapping[Tensor, Tensor]) -> None:
        norm = math.sqrt(sum(float(torch.linalg.vector_norm(x, dtype=torch.float64)) ** 2 for x in moved.values()))
        for p, state, group in self._each():
            if p not in moved or not state:
                continue
            d, (b1, b2) = moved[p] / (norm + 1e-8), group["betas"]
            state["exp_avg"].mul_(b1).add_(d, alpha=1 - b1)
            state["exp_avg_sq"].mul_(b2).addcmul_(d, d, value=1 - b2)


@dataclass(frozen=True)
class _From:
    """An optimizer factory: the groups of the user's SGD or Adam in a rule with quasi-global momentum."""

    factory: OptimizerFactory
    name: str
    rule: type[_Settled]
    nesterov: bool = False
    mu: float | None = None

    def __call__(self, params: Parameters) -> _Settled:
        made = self.factory(params)
        wanted = torch.optim.SGD if self.rule is QuasiGlobalSGD else torch.optim.Adam
        if type(made) is not wanted:
            got = type(made).__name__
            raise RecipeError(f"{self.name} takes the settings of torch.optim.{wanted.__name__}, the optimizer is {got}")
        groups = []
        for i, group in enumerate(made.param_groups):
            wrong = [f"{key}={group[key]}" for key in ("dampening", "amsgrad", "maximize") if group.get(key)]
            if wrong:
                raise RecipeError(f"{self.name} takes {wanted.__name__} without {', '.join(wrong)} (group {i}): leave it out")
            if group.get("decoupled_weight_decay"):
                raise RecipeError(f"{self.name} takes {wanted.__name__} with its own weight decay, not AdamW's (group {i})")
            keys = ("params", "lr", "momentum", "betas", "eps", "weight_decay", "initial_lr")
            kept = {key: group[key] for key in keys if key in group}
            if self.rule is QuasiGlobalSGD:
                if bool(group["nesterov"]) and not self.nesterov:
                    raise RecipeError(f"{self.name} has no Nesterov step, and group {i} asks for it: take 'qg-dsgdm-n'")
                kept |= {"nesterov": self.nesterov, "mu": group["momentum"] if self.mu is None else self.mu}
                if not group["momentum"]:
                    raise RecipeError(f"{self.name} needs SGD with momentum, group {i} has none: give it, or take 'dsgd'")
            groups.append(kept)
        return self.rule(groups)


def qg_dsgdm(
    topology: Topology = "ring", nesterov: bool = False, mu: float | None = None, each: int = 1, plan: Plan | None = None
) -> Callable[[Advance], Round]:  # fmt: skip
    """The algorithm of SGD with quasi-global momentum, for a user's torch.optim.SGD(momentum=...); arguments as gossip() has them.

    Bytes as gossip. Memory: m, and one vector of n values more.
    """
    name = "qg-dsgdm-n" if nesterov else "qg-dsgdm"
    return _with(name, QuasiGlobalSGD, topology, each, plan, nesterov, mu)


def qg_dadam(topology: Topology = "ring", each: int = 1, plan: Plan | None = None) -> Callable[[Advance], Round]:
    """The algorithm of Adam with quasi-global moments, for a user's torch.optim.Adam."""
    return _with("qg-dadam", QuasiGlobalAdam, topology, each, plan)


def _with(
    name: str, rule: type[_Settled], topology: Topology, each: int, plan: Plan | None, nesterov: bool = False, mu: float | None = None
) -> Callable[[Advance], Round]:  # fmt: skip
    def changed(advance: Advance) -> Advance:
        if not isinstance(advance, TorchOptimizer):
            raise RecipeError(f"{name} needs a torch optimizer, not {type(advance).__name__}")
        return replace(advance, factory=_From(advance.factory, name, rule, nesterov, mu))

    return gossip(topology, each=each, plan=plan, advance=changed)
