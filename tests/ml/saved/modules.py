"""The modules of the models that lie here: what was saved must find them under these names for as long as it is to load."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Linear3(nn.Module):
    """Three numbers to three scores; a buffer and a frozen parameter, so that all kinds of tensors are saved."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.scale = nn.Parameter(torch.tensor([2.0]), requires_grad=False)
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x)) * self.scale


class Two(nn.Module):
    """A group of columns and an image of bytes to one number."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(2, 4), nn.Linear(4, 4)
        self.out = nn.Linear(4, 1)

    def forward(self, pair: Tensor, image: Tensor) -> Tensor:
        return self.out(torch.tanh(self.left(pair) + self.right(image.flatten(1).float())))
