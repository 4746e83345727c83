"""Optimizers by name, with their usual numbers: for grids of Params, and for estimators that are saved."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from bigdl_lite.errors import RecipeError

# those that take their gradients a step at a time, and need nothing but parameters and numbers
OPTIMIZERS = {
    name.lower(): name
    for name in ("Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD")
}


@dataclass(frozen=True)
class NamedOptimizer:
    """An optimizer factory: OPTIMIZERS[name] of torch.optim with these numbers; None: torch's own default.

    learning_rate is lr there; momentum is that of SGD and RMSprop.
    """

    name: str
    learning_rate: float | None = None
    weight_decay: float | None = None
    momentum: float | None = None

    def __post_init__(self) -> None:
        if self.name not in OPTIMIZERS:
            raise RecipeError(f"optimizer={self.name!r} is not one of {', '.join(OPTIMIZERS)}; or give a function of the parameters")
        if self.momentum is not None and self.name not in ("sgd", "rmsprop"):
            raise RecipeError(f"momentum={self.momentum} is for 'sgd' and 'rmsprop', the optimizer is {self.name!r}")

    def __call__(self, parameters: Iterable[Any]) -> torch.optim.Optimizer:
        given = {"lr": self.learning_rate, "weight_decay": self.weight_decay, "momentum": self.momentum}
        rule = getattr(torch.optim, OPTIMIZERS[self.name])
        return rule(parameters, **{key: value for key, value in given.items() if value is not None})
