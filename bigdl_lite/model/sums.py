"""What a metric is: sums over rows that every worker takes of its own, added in rank order, and divided once.

    metric = g(S)     S = sum over rows i of  w_i s(output_i, target_i)        the same S however the rows are dealt

Not the mean of the workers' metrics, which is another number for all but the simplest (an F1, an area under a curve).
Below: the protocol, and the metrics of numbers.

    b  rows      k  sums      m  values in one row of the output      w  weights of rows      y, p  target, output

Sums are float64 and lie where the output lies. Rows of weight 0 are dropped before anything is computed, so they add
nothing even where they hold NaN or labels that do not exist; a value over no rows at all is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from bigdl_lite.errors import RecipeError
from bigdl_lite.model.loss import squeeze

KINDS = ("plain", "logits", "log-probabilities", "logit", "probability")  # what an output means: see ml/head.py


class Metric(Protocol):
    """A frozen dataclass, which compares and pickles by value."""

    @property
    def name(self) -> str:
        """Its key in the history and in what evaluate returns, such as "accuracy"."""
        ...

    @property
    def higher(self) -> bool:
        """Whether more is better."""
        ...

    def sums(self, output: Any, target: Tensor, weight: Tensor) -> Tensor:
        """Sums over the rows, linear in their weights.

        output   [b, ...], or what else the module returns      target  [b, ...]
        weight   [b] float64, not negative
        returns  [k] float64; k depends on nothing but the shapes of one row, so that a worker without rows knows it from
                 two rows of zeros, of weight 0
        """
        ...

    def value(self, sums: Tensor) -> float:
        """The metric, from the sums [k] of all rows."""
        ...


def kept(output: Any, target: Tensor, weight: Tensor) -> tuple[Any, Tensor, Tensor]:
    """The rows whose weight is not 0: output (a tensor, or a dict, list or tuple with tensors), target, weight [b] float64."""
    weight = weight.to(target.device, torch.float64)
    if len(weight) != len(target) or weight.ndim != 1:
        raise RecipeError(f"weights of shape {list(weight.shape)} for {len(target)} rows; a metric takes one weight a row")
    counts = weight != 0
    if bool(counts.all()):
        return _each(output, lambda x: x.detach()), target, weight
    return _each(output, lambda x: x.detach()[counts]), target[counts], weight[counts]


def _each(output: Any, act: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(output, Tensor):
        return act(output)
    if isinstance(output, dict):
        return {key: _each(x, act) for key, x in output.items()}
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return type(output)(*(_each(x, act) for x in output))
    return type(output)(_each(x, act) for x in output) if isinstance(output, list | tuple) else output


def require_tensor(name: str, output: Any) -> Tensor:
    if not isinstance(output, Tensor):
        raise RecipeError(
            f"metric {name!r} takes one tensor, the module returns {type(output).__name__}: take Mean(name, function, higher) "
            "with a function of your own, which sees all that the module returns"
        )
    return output


def ratio(top: float, bottom: float) -> float:
    return top / bottom if bottom else math.nan


# ---- a function of the user's ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mean:
    """The mean over rows of what a function says of each.

    function  (output, target) -> [b] numbers, one a row; it sees some rows at a time, and must not mix them. It travels to
              the workers; to compare as equal after that it must be a function of a module, not a lambda
    higher    whether more is better
    """

    name: str
    function: Callable[[Any, Tensor], Tensor]
    higher: bool

    def sums(self, output: Any, target: Tensor, weight: Tensor) -> Tensor:
        output, target, weight = kept(output, target, weight)
        if not len(weight):  # many a function does not expect to be asked about no rows
            return weight.new_zeros(2)
        values = self.function(output, target)
        if not isinstance(values, Tensor) or values.shape != weight.shape:
            got = f"a tensor of shape {list(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
            raise RecipeError(f"metric {self.name!r}: the function returned {got} for {len(weight)} rows, must be [{len(weight)}]")
        return torch.stack([(values.detach().double() * weight).sum(), weight.sum()])

    def value(self, sums: Tensor) -> float:
        return ratio(*sums.tolist())


# ---- metrics of numbers ----------------------------------------------------------------------------------------------


def _numbers(name: str, output: Any, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """p and y [rows, m] float64, and weight [rows] float64."""
    output = squeeze(require_tensor(name, output), target)
    if output.shape != target.shape:
        raise RecipeError(
            f"metric {name!r} compares value by value, the module returns {list(output.shape)} and the label is {list(target.shape)}; "
            "they must have one shape"
        )
    output, target, weight = kept(output, target, weight)
    m = math.prod(output.shape[1:])
    return output.double().reshape(-1, m), target.double().reshape(-1, m), weight


def _mean_of(values: Tensor, weight: Tensor) -> Tensor:
    """[2]: the weighted sum of values [rows, m], and what to divide it by."""
    return torch.stack([(values.sum(1) * weight).sum(), weight.sum() * values.shape[1]])


@dataclass(frozen=True)
class MSE:
    """Mean squared error over all values. Of a probability, it is the Brier score."""

    name: ClassVar[str] = "mse"
    higher: ClassVar[bool] = False
    kinds: ClassVar[tuple[str, ...]] = ("plain", "probability")

    def sums(self, output: Any, target: Tensor, weight: Tensor) -> Tensor:
        p, y, w = _numbers(self.name, output, target, weight)
        return _mean_of((y - p) ** 2, w)

    def value(self, sums: Tensor) -> float:
        return ratio(*sums.tolist())


@dataclass(frozen=True)
class RMSE(MSE):
    """Root of the mean squared error over all values."""

    name: ClassVar[str] = "rmse"

    def value(self, sums: Tensor) -> float:
        return math.sqrt(ratio(*sums.tolist()))


@dataclass(frozen=True)
class MAE(MSE):
    """Mean absolute error over all values."""

    name: ClassVar[str] = "mae"

    def sums(self, output: Any, target: Tensor, weight: Tensor) -> Tensor:
        p, y, w = _numbers(self.name, output, target, weight)
        return _mean_of((y - p).abs(), w)


@dataclass(frozen=True)
class R2:
    """1 - residual / spread: the share of the label's variance that is explained. Of several values a row, the mean of theirs.

        residual = sum w (y - p)^2      spread = sum w (y - c)^2 - (sum w (y - c))^2 / sum w        k = 1 + 3 m

    The spread is a difference of large numbers where the label lies far from the centre c: its relative error is about
    1e-15 (mean - c)^2 / variance, 1e-7 for a mean of ten thousand standard deviations. A `center` near the mean avoids it;
    it must be one number on all workers, so it is a setting.
    A label of one single value gives 1 where it is met exactly, else 0, as in scikit-learn.
    """

    center: float = 0.0
    name: ClassVar[str] = "r2"
    higher: ClassVar[bool] = True
    kinds: ClassVar[tuple[str, ...]] = ("plain",)

    def sums(self, output: Any, target: Tensor, weight: Tensor) -> Tensor:
        p, y, w = _numbers(self.name, output, target, weight)
        away = y - self.center
        columns = torch.stack([away, away**2, (y - p) ** 2])  # [3, rows, m]
        return torch.cat([w.sum()[None], torch.einsum("srm,r->sm", columns, w).reshape(-1)])

    def value(self, sums: Tensor) -> float:
        count, rest = sums[0], sums[1:].reshape(3, -1)
        if not count:
            return math.nan
        first, second, residual = rest
        spread = second - first**2 / count
        noise = 8 * torch.finfo(torch.float64).eps * second  # below it there is no telling a spread from rounding
        constant = torch.where(residual == 0, 1.0, 0.0).double()
        return float(torch.where(spread > noise, 1 - residual / spread, constant).mean())
