"""Rows held out for validation: which, told by the rows themselves.

    N  rows      w  32-bit words of one row

Whether a row is held out depends on its values and the seed alone: not on the partition it lies in, the number of workers, or how
often it is computed. Rows with the same values are on the same side, so that no copy of a training row is validated on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bigdl_lite.batch import Batch, mix
from bigdl_lite.errors import RecipeError

_ROWS = 4096  # hashed at a time, so that the words need little memory


@dataclass(frozen=True)
class Holdout:
    """About `fraction` of the rows, drawn by a hash of their inputs and label.

    Cost    one multiplication for each 4 bytes of the rows, once.
    Source  multilinear hashing: Carter and Wegman, "Universal Classes of Hash Functions", JCSS 1979.
    """

    fraction: float
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            raise RecipeError(f"validationFraction is {self.fraction}, must be above 0 and below 1")

    def marks(self, share: Batch) -> Tensor:
        """Which rows are held out, [N] bool."""
        columns = [*share.inputs, *([] if share.target is None else [share.target])]
        total = torch.zeros(share.rows, dtype=torch.int64)
        for i, column in enumerate(columns):
            total += _hashed(column, mix(self.seed, 4, i))
        # the high bits of a multilinear hash are the good ones; one more multiplication spreads what rows of few words have
        total = (total ^ (total >> 32)) * -7046029254386353131
        return ((total >> 11) & ((1 << 53) - 1)).double() / (1 << 53) < self.fraction


def _hashed(column: Tensor, seed: int) -> Tensor:
    """column [N, ...] to [N] int64, which wraps around."""
    rows = column.reshape(len(column), -1).contiguous().view(torch.uint8)
    if rows.shape[1] % 4:
        rows = torch.nn.functional.pad(rows, (0, 4 - rows.shape[1] % 4))
    words = rows.view(torch.int32)
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randint(-(2**63), 2**63 - 1, [words.shape[1] + 1], generator=generator, dtype=torch.int64)
    parts = [(words[at : at + _ROWS].long() * factors[1:]).sum(1) + factors[0] for at in range(0, len(words), _ROWS)]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


def parted(share: Batch, marks: Tensor) -> tuple[Batch | None, Batch | None]:
    """The rows that are not marked, and those that are; None where there are none. marks [N] bool."""
    if not bool(marks.any()):
        return share, None
    kept, held = (~marks).nonzero().reshape(-1), marks.nonzero().reshape(-1)
    return (share.take(kept) if len(kept) else None), share.take(held)
