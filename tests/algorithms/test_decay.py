"""The groups of decay_groups, and that a fit with them is torch's loop with the same groups."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from bigdl_lite.algorithms.decay import decay_groups
from bigdl_lite.algorithms.parts import Parameters
from bigdl_lite.errors import RecipeError
from tests.engine.test_local import FULL, alone, close, fit, net

pytestmark = pytest.mark.timeout(60)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.encoder = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.LayerNorm = nn.LayerNorm([3, 4])  # whose scale has two dimensions
        self.position_bias = nn.Parameter(torch.zeros(2, 4))
        self.temperature = nn.Parameter(torch.tensor(1.0))
        self.frozen = nn.Parameter(torch.zeros(4, 4), requires_grad=False)


DECAYING = ["embedding.weight", "encoder.0.weight"]


def names(groups: list[dict[str, Any]], module: nn.Module) -> list[list[str]]:
    by_id = {id(p): name for name, p in module.named_parameters()}
    return [[by_id[id(p)] for p in group["params"]] for group in groups]


def test_biases_norms_and_what_has_one_dimension_do_not_decay() -> None:
    module = Model()
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    groups = decay_groups(Parameters(trainable), 0.01)
    assert [group["weight_decay"] for group in groups] == [0.01, 0.0]
    assert names(groups, module) == [DECAYING, [name for name in trainable if name not in DECAYING]]
    assert names(decay_groups(module.named_parameters(), 0.01), module) == names(groups, module)  # as in plain torch


def test_other_words_name_what_else_does_not_decay() -> None:
    module = Model()
    assert names(decay_groups(module.named_parameters(), 0.01, ("bias", "norm", "embed")), module)[0] == ["encoder.0.weight"]
    two_dimensions = {name for name, p in module.named_parameters() if p.ndim > 1 and p.requires_grad}
    assert set(names(decay_groups(module.named_parameters(), 0.01, ()), module)[0]) == two_dimensions


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda m: decay_groups(m.named_parameters(), -0.1), "weight_decay=-0.1"),
        (lambda m: decay_groups(m.named_parameters(), float("nan")), "weight_decay=nan"),
        (lambda m: decay_groups(m.named_parameters(), 0.1, "bias"), r"must be a sequence of words, like \('bias',\)"),
        (lambda m: decay_groups(list(m.parameters()), 0.1), "needs parameters with names, and got a list without"),
    ],
)
def test_what_cannot_work_is_refused(make: Any, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        make(Model())


def in_torch(params: Any, weight_decay: float, grouped: bool) -> torch.optim.Optimizer:
    """As one writes it by hand: matrices decay."""
    params = list(params)
    if not grouped:
        return AdamW(params, lr=0.02, weight_decay=weight_decay)
    matrices, others = ([p for p in params if (p.ndim > 1) is kind] for kind in (True, False))
    return AdamW([{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}], lr=0.02)


@pytest.mark.parametrize("counts", [[37], [20, 17], [10, 0, 26, 1]], ids=str)
def test_a_fit_with_them_is_torchs_loop_with_the_same_groups(counts: list[int]) -> None:
    def middle() -> nn.Module:
        return net(nn.LayerNorm(40), nn.Tanh())

    def reference(grouped: bool) -> Tensor:
        return alone(middle(), partial(in_torch, weight_decay=3.0, grouped=grouped), FULL)

    found = fit(middle(), counts, lambda p: AdamW(decay_groups(p, 3.0), lr=0.02), epochs=len(FULL)).weights
    close(found, reference(True))
    assert (found - reference(False)).abs().max() > 1e-2  # negative control: were all to decay
