"""From a module's output to the columns of a scored DataFrame.

    B  rows      C  classes

    head            output                      columns
    plain           [B] or [B, 1]               prediction double
                    [B, ...]                    prediction array<...<float>>
                    several tensors, by name    prediction struct with a field for each, or a column for each (outputCols)
    classifier      [B, C] logits or log-probs  rawPrediction, probability vectors [C]; prediction the largest
                    [B] or [B, 1] logit or prob the same with C = 2

Several tensors have the names of the dict or NamedTuple that forward returns; those of a tuple or list are output0, output1, ...
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor, nn

from bigdl_lite.errors import DataError, RecipeError
from bigdl_lite.model.sums import KINDS


@dataclass(frozen=True)
class Head:
    """kind says what the output means; shape is that of one row of it."""

    kind: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise RecipeError(f"head {self.kind!r} is not one of {KINDS}")
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

    def empty(self) -> Tensor:
        """The output for no rows."""
        return torch.empty(0, *self.shape)

    def to_arrow(self, output: Any) -> pa.Array:
        """output [B, *shape] on the CPU to the column of sql_type."""
        if not isinstance(output, Tensor):
            raise DataError(f"the module returned a {type(output).__name__}, in training it was a tensor")
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


@dataclass(frozen=True)
class Heads:
    """Several tensors of a module, each a plain column under its name: the fields of a struct.

    fields  the names of the fields, where they are not those of the outputs
    """

    names: tuple[str, ...]
    heads: tuple[Head, ...]
    fields: tuple[str, ...] = ()
    kind: ClassVar[str] = "plain"

    @property
    def sql_type(self) -> str:
        """The type of what to_arrow returns, as Spark writes it."""
        pairs = zip(self.fields or self.names, self.heads, strict=True)
        told = (f"`{name.replace('`', '``')}`: {head.sql_type}" for name, head in pairs)
        return f"struct<{', '.join(told)}>"

    def renamed(self, fields: Mapping[str, str]) -> Heads:
        """With fields of other names: {output: field}."""
        return replace(self, fields=tuple(fields[name] for name in self.names))

    def only(self, names: Sequence[str]) -> Heads:
        """The named ones, in that order. Raises RecipeError for a name that the module does not return."""
        missing = [name for name in names if name not in self.names]
        if missing:
            raise RecipeError(f"the module has no output {missing[0]!r}, it returns {', '.join(map(repr, self.names))}")
        return Heads(tuple(names), tuple(self.heads[self.names.index(name)] for name in names))

    def empty(self) -> dict[str, Tensor]:
        """The outputs for no rows."""
        return {name: head.empty() for name, head in zip(self.names, self.heads, strict=True)}

    def to_arrow(self, output: Any) -> pa.Array:
        """The tensors of output, on the CPU, to the column of sql_type; output has more of them perhaps, which are left out."""
        found = named(output)
        missing = [name for name in self.names if found is None or name not in found]
        if missing:
            got = f"outputs {list(found)}" if found else f"a {type(output).__name__}"
            raise DataError(f"the module returned {got}, in training there was an output {missing[0]!r}")
        assert found is not None
        parts = [head.to_arrow(found[name]) for name, head in zip(self.names, self.heads, strict=True)]
        return pa.StructArray.from_arrays(parts, list(self.fields or self.names))


def named(output: Any) -> dict[str, Any] | None:
    """What a module returned, by name; None where it has no parts: it is one tensor, or nothing known."""
    if isinstance(output, Mapping):
        return {str(name): x for name, x in output.items()}
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return dict(zip(output._fields, output, strict=True))
    return {f"output{i}": x for i, x in enumerate(output)} if isinstance(output, tuple | list) else None


def head_from_rows(kind: str, two: Any, three: Any) -> Head | Heads | None:
    """The head of a module, told by what it returned for two rows and for three; None where no tensor has a row for each.

    Tensors of another length (a penalty, a state) are no columns, and are left out.
    """

    def by_row(x: Any, y: Any) -> bool:
        tensors = isinstance(x, Tensor) and isinstance(y, Tensor)
        return tensors and x.ndim > 0 and y.ndim > 0 and (len(x), len(y)) == (2, 3) and x.shape[1:] == y.shape[1:]

    if isinstance(two, Tensor):
        return Head(kind, tuple(two.shape[1:])) if by_row(two, three) else None
    parts, others = named(two) or {}, named(three) or {}
    kept = {name: x for name, x in parts.items() if by_row(x, others.get(name))}
    if not kept or kind != "plain":  # which of them holds the scores of the classes, nobody has said
        return None
    return Heads(tuple(kept), tuple(Head(kind, tuple(x.shape[1:])) for x in kept.values()))


def cut(output: Any, k: int, rows: int) -> Any:
    """output with the first k of its `rows` rows, on the CPU, in the form that the module gave it."""
    if isinstance(output, Tensor):
        return (output[:k] if output.ndim and len(output) == rows else output).cpu()
    if isinstance(output, dict):
        made = copy.copy(output)  # of its own class: a loss may read its attributes
        for name, x in output.items():
            made[name] = cut(x, k, rows)
        return made
    if isinstance(output, tuple | list):
        parts = [cut(x, k, rows) for x in output]
        return type(output)(*parts) if hasattr(output, "_fields") else type(output)(parts)
    return output


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
