"""Which parameters decay: the groups of an optimizer that leaves biases and norms alone.

    optimizer=lambda p: AdamW(decay_groups(p, 0.01), lr=1e-3)

Weight decay keeps matrices small. A bias, or the scale of a norm, is pulled to zero by it and gains nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from bigdl_lite.algorithms.parts import Parameters
from bigdl_lite.errors import RecipeError


def decay_groups(
    parameters: Parameters | Iterable[tuple[str, nn.Parameter]], weight_decay: float, no_decay: Sequence[str] = ("bias", "norm")
) -> list[dict[str, Any]]:
    """Two groups, in this order, perhaps empty: with `weight_decay`, and with none.

    parameters  what an optimizer factory is called with; in plain torch module.named_parameters()
    no_decay    a parameter does not decay where its name ("encoder.norm1.weight") holds one of these, in small or capital
                letters; nor where it has one dimension or none, as every bias has and nearly every norm's scale

    Raises  RecipeError where weight_decay is negative, or where the parameters have no names.
    """
    if not 0 <= weight_decay < math.inf:
        raise RecipeError(f"decay_groups(weight_decay={weight_decay}): must be at least 0, and finite")
    if isinstance(no_decay, str):
        raise RecipeError(f"decay_groups(no_decay={no_decay!r}): must be a sequence of words, like ({no_decay!r},)")
    named = getattr(parameters, "named", None)
    if named is None:
        pairs = list(parameters)
        if not all(isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs):
            raise RecipeError(
                f"decay_groups needs parameters with names, and got a {type(parameters).__name__} without: give it what the optimizer "
                "factory is called with, or module.named_parameters()"
            )
        named = {name: p for name, p in pairs if p.requires_grad}
    words = [word.lower() for word in no_decay]
    decays = {name: p.ndim > 1 and not any(word in name.lower() for word in words) for name, p in named.items()}
    with_, without = ([p for name, p in named.items() if decays[name] is kind] for kind in (True, False))
    return [{"params": with_, "weight_decay": weight_decay}, {"params": without, "weight_decay": 0.0}]
