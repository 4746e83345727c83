"""Wide and deep: a net for the ids and numbers of a FittedTable.

    ids   [b, k] --- an embedding for each column ---.
    dense [b, d] ------------------------------------+--- hidden layers --- out
        `-------- a weight for each category and for each number (wide) ----- +

Wide is a linear model, which remembers; deep is a net on embeddings, which generalises; their outputs are added.

    b  rows      k  categorical columns      d  dense values

Source: Cheng et al., "Wide & Deep Learning for Recommender Systems", DLRS 2016. Here crossed columns are left to the user.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bigdl_lite.errors import RecipeError
from bigdl_lite.features.embed import FittedTable

_WIDEST = 600


def width_of(size: int) -> int:
    """The length of the embedding of a column of `size` categories: 1.6 size^0.56, at most 600.

    Source: the rule of the fastai library for tables.

    >>> [width_of(size) for size in (3, 100, 10_000, 10_000_000)]
    [3, 21, 278, 600]
    """
    return min(_WIDEST, round(1.6 * size**0.56))


class TableNet(nn.Module):
    """(ids [b, k] int64, dense [b, d]) -> [b, out], or [b] where out is 1: logits, or a number.

    table    a FittedTable: how many categories each column has, and how many numbers there are. Where it has only categories, or
             only numbers, these are the one argument
    hidden   widths of the hidden layers; none, and the embeddings lead straight to the output
    wide     whether the linear part is there
    dropout  probability, after each hidden layer

    >>> table = FittedTable(Table(["price"], {"city": Hashed(9), "shop": Hashed(99)}), {}, (1,), (0.0,), (1.0,))
    >>> net = TableNet(table, hidden=[16])
    >>> net(torch.tensor([[3, 57], [0, 0]]), torch.randn(2, 1)).shape
    torch.Size([2])
    """

    def __init__(
        self, table: FittedTable, hidden: Sequence[int] = (64, 32), out: int = 1, wide: bool = True, dropout: float = 0.0
    ) -> None:  # fmt: skip
        super().__init__()
        if out < 1 or any(n < 1 for n in hidden):
            raise RecipeError(f"TableNet(hidden={list(hidden)}, out={out}): all must be at least 1")
        sizes = table.sizes
        self.has_ids, self.has_dense, self.out = bool(sizes), table.width > 0, out
        self.embeddings = nn.ModuleList(nn.Embedding(size, width_of(size)) for size in sizes)
        before = sum(width_of(size) for size in sizes) + table.width
        layers: list[nn.Module] = []
        for n in hidden:
            layers += [nn.Linear(before, n), nn.ReLU(), *([nn.Dropout(dropout)] if dropout else [])]
            before = n
        self.deep = nn.Sequential(*layers, nn.Linear(before, out))
        for embedding in self.embeddings:
            nn.init.normal_(embedding.weight, std=0.01)  # torch's std of 1 would shout down what is learned
        self.wide_ids = self.wide_dense = None
        if wide and sizes:
            self.wide_ids = nn.Embedding(sum(sizes), out)  # all columns one below the other
            nn.init.zeros_(self.wide_ids.weight)
            starts = torch.tensor([0, *sizes[:-1]]).cumsum(0)
            self.register_buffer("starts", starts, persistent=False)
        if wide and table.width:
            self.wide_dense = nn.Linear(table.width, out, bias=False)

    def forward(self, *inputs: Tensor) -> Tensor:
        ids = inputs[0] if self.has_ids else None
        dense = inputs[-1] if self.has_dense else None
        parts = [] if ids is None else [embedding(ids[:, i]) for i, embedding in enumerate(self.embeddings)]
        y = self.deep(torch.cat([*parts, *([] if dense is None else [dense])], 1))  # [b, out]
        if self.wide_ids is not None:
            y = y + self.wide_ids(ids + self.starts).sum(1)
        if self.wide_dense is not None:
            y = y + self.wide_dense(dense)
        return y.squeeze(1) if self.out == 1 else y
