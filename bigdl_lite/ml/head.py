"""From a module's output to the columns of a scored DataFrame.

    B  rows      C  classes

    head            output                      columns
    plain           [B] or [B, 1]               prediction double
                    [B, ...]                    prediction array<...<float>>
    classifier      [B, C] logits or log-probs  rawPrediction, probability vectors [C]; prediction the largest
                    [B] or [B, 1] logit or prob the same with C = 2
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from bigdl_lite.errors import DataError, RecipeError

_KINDS = ("plain", "logits", "log-probabilities", "logit", "probability")


@dataclass(frozen=True)
class Head:
    """kind says what the output means; shape is that of one row of it."""

    kind: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise RecipeError(f"head {self.kind!r} is not one of {_KINDS}")
        if self.kind in ("logits", "log-probabilities") and (len(self.shape) != 1 or self.shape[0] < 2):
            raise RecipeError(
                f"a classifier with class scores must return [rows, classes >= 2], the module returns rows of {list(self.shape)}"
            )
        if self.kind in ("logit", "probability") and self.shape not in ((), (1,)):
            raise RecipeError(f"a binary classifier must return [rows] or [rows, 1], the module returns rows of {list(self.shape)}")

    @property
    def scalar(self) -> bool:
        return self.shape in ((), (1,))

    @property
    def sql_type(self) -> str:
        """The type of what to_arrow returns, as Spark writes it."""
        if self.kind != "plain":
            return "struct<raw: array<double>, probability: array<double>, prediction: double>"
        return "double" if self.scalar else "array<" * len(self.shape) + "float" + ">" * len(self.shape)

    def to_arrow(self, output: Tensor) -> pa.Array:
        """output [B, *shape] on the CPU to the column of sql_type."""
        if tuple(output.shape[1:]) != self.shape:
            raise DataError(f"the module returned rows of {list(output.shape[1:])}, in training it was {list(self.shape)}")
        if self.kind == "plain":
            return pa.array(output.double().reshape(-1).numpy()) if self.scalar else _lists(output.float().numpy())
        raw, probability = self._scores(output.double())
        prediction = raw.argmax(1).double()
        parts = [_lists(raw.numpy()), _lists(probability.numpy()), pa.array(prediction.numpy())]
        return pa.StructArray.from_arrays(parts, ["raw", "probability", "prediction"])

    def _scores(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.kind == "logits":
            return x, x.softmax(1)
        if self.kind == "log-probabilities":
            return x, x.exp()
        z = x.reshape(-1)
        if self.kind == "probability":
            return torch.stack([1 - z, z], 1), torch.stack([1 - z, z], 1)
        p = z.sigmoid()
        return torch.stack([-z, z], 1), torch.stack([1 - p, p], 1)


def classifier_kind(loss: object) -> str:
    """What the output of a classifier means, told by its loss."""
    if isinstance(loss, nn.BCEWithLogitsLoss):
        return "logit"
    if isinstance(loss, nn.BCELoss):
        return "probability"
    return "log-probabilities" if isinstance(loss, nn.NLLLoss) else "logits"


def _lists(values: np.ndarray) -> pa.Array:
    """[B, a, b, ...] to nested lists, without a Python object per value."""
    array = pa.array(values.reshape(-1))
    for level in range(values.ndim - 1, 0, -1):
        rows, width = math.prod(values.shape[:level]), values.shape[level]
        array = pa.ListArray.from_arrays(pa.array(np.arange(rows + 1, dtype=np.int32) * width), array)
    return array
