"""Famous names, and the parts that each is made of."""

from __future__ import annotations

from collections.abc import Callable

from bigdl_lite.algorithms.algorithm import Advance, Round
from bigdl_lite.algorithms.parts import Gradient, Sum
from bigdl_lite.errors import RecipeError

CATALOGUE: dict[str, Callable[[Advance], Round]] = {
    # every step: the gradients of all workers, summed, divided by the rows, one optimizer step
    "sync-sgd": lambda advance: Round(Gradient(), Sum(), advance),
}


def method(name: str | Callable[[Advance], Round], advance: Advance) -> Round:
    """The Round of a name in the catalogue, or of a function of your own that takes the optimizer and returns a Round."""
    if callable(name):
        made = name(advance)
        if not isinstance(made, Round):
            raise RecipeError(f"algorithm returned {type(made).__name__}, not a Round")
        return made
    if name not in CATALOGUE:
        raise RecipeError(f"algorithm={name!r} is not known; the catalogue has {', '.join(sorted(CATALOGUE))}")
    return CATALOGUE[name](advance)
