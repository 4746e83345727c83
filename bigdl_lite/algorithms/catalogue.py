"""Famous names, and the parts that each is made of."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from bigdl_lite.algorithms.algorithm import Advance, Round
from bigdl_lite.algorithms.averaging import async_average
from bigdl_lite.algorithms.deadline import within
from bigdl_lite.algorithms.exchange import Coded, Exchange
from bigdl_lite.algorithms.gossip import Choco, Difference, gossip, matcha_plan
from bigdl_lite.algorithms.gradiveq import GradiVeQ
from bigdl_lite.algorithms.localsgd import local_sgd
from bigdl_lite.algorithms.parts import Gradient, Sum
from bigdl_lite.algorithms.pipe import pipe_sgd
from bigdl_lite.algorithms.powersgd import PowerSGD
from bigdl_lite.algorithms.qadam import qadam
from bigdl_lite.algorithms.quasiglobal import qg_dadam, qg_dsgdm
from bigdl_lite.algorithms.rows import S2, UnionRows
from bigdl_lite.algorithms.server import backup_workers, bounded_staleness
from bigdl_lite.comm.graph import OnePeerExponential, ShiftOne
from bigdl_lite.errors import RecipeError
from bigdl_lite.model.layout import Blueprint
from bigdl_lite.wire.codec import BFloat16, Codec, Float16, Raw
from bigdl_lite.wire.lossy import QSGD, MinMax8, Sign
from bigdl_lite.wire.sparse import RandomK, TopK

CATALOGUE: dict[str, Callable[[Advance], Round]] = {
    # every step: the gradients of all workers, summed, divided by the rows, one optimizer step
    "sync-sgd": lambda advance: Round(Gradient(), Sum(), advance),
    # 8 steps on each worker, then the mean of the models; after=k: synchronous for k epochs first
    "local-sgd": local_sgd(8),
    "post-local-sgd": local_sgd(8, after=1),
    # Adam; after 100 steps only the momentum travels, one bit a value
    "qadam": qadam,
    # each worker averages with its neighbours on a ring: while it computes, or after its step
    "d-psgd": gossip("ring", early=True),
    "dsgd": gossip("ring"),
    # pairs that change in every step
    "shift-one": gossip(plan=ShiftOne, early=True),
    "one-peer-exponential": gossip(plan=OnePeerExponential),
    # half of the edges of a graph, on average, in every step
    "matcha": gossip(plan=matcha_plan("exponential", budget=0.5)),
    # neighbours exchange coded differences: 8 bits, or one
    "dcd-psgd": gossip("ring", Difference(MinMax8())),
    "choco-sgd": gossip("ring", Choco(Sign(), gamma=0.45)),
    # momentum of what happened to the model, gossip included
    "qg-dsgdm": qg_dsgdm(),
    "qg-dsgdm-n": qg_dsgdm(nesterov=True),
    "qg-dadam": qg_dadam(),
    # updates travel while the next step computes
    "pipe-sgd": pipe_sgd(),
    # means of the models beside the steps, twice a second
    "async-average": async_average(),
    # all workers but the slowest one make a step; or each push is one by itself, and nobody is more than 4 steps ahead, or any number
    "backup-workers": backup_workers(1),
    "bounded-staleness": bounded_staleness(4),
    "async-sgd": bounded_staleness(math.inf),
    # what is not computed within 100 ms is dropped
    "deadline-sgd": within(0.1),
}

EXCHANGES: dict[str, Exchange] = {
    "dense": Coded(Raw()),
    "bf16": Coded(BFloat16()),
    "fp16": Coded(Float16()),
    "minmax8": Coded(MinMax8()),
    "qsgd": Coded(QSGD()),
    "sign": Coded(Sign(), residual=True),
    "topk": Coded(TopK(0.01), residual=True, gather=True),
    "randomk": Coded(RandomK(0.01), residual=True),
    "powersgd": PowerSGD(),
    "gradiveq": GradiVeQ(),
    "union-rows": UnionRows(),
    "s2-reducer": S2(),
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


def with_exchange(round_: Round, given: str | Codec | Exchange | None, blueprint: Blueprint) -> Round:
    """The round with an exchange: a name in EXCHANGES, a codec, which then goes through Coded, or a value of your own.

    Raises RecipeError where it cannot work with the rest of the method, or with the module.
    """
    made: Any = given
    if isinstance(given, str):
        if given not in EXCHANGES:
            raise RecipeError(f"exchange={given!r} is not known; there are {', '.join(sorted(EXCHANGES))}")
        made = EXCHANGES[given]
    elif given is not None and callable(getattr(given, "encode", None)):
        made = Coded(given)  # type: ignore[arg-type]
    elif given is not None and not all(callable(getattr(given, name, None)) for name in ("check", "start")):
        raise RecipeError(
            f"exchange is a {type(given).__name__}, must be one of {', '.join(sorted(EXCHANGES))}, a codec (encode, decode, nbytes), "
            "or an exchange (check, start)"
        )
    if made is None:
        made = round_.exchange or getattr(round_.peer, "exchange", None)
        if made is None:
            return round_
    elif round_.peer is not None and not hasattr(round_.peer, "exchange"):
        raise RecipeError(
            f"{type(round_.peer).__name__} has no common meeting for the exchange {type(made).__name__}: leave out exchange=; codecs "
            "are given to the algorithm (Difference, Choco)"
        )
    elif round_.peer is not None and round_.peer.exchange != Coded(Raw()):
        raise RecipeError(
            f"the algorithm has {round_.peer.exchange!r} inside already: leave out exchange={given!r}, or give it to the algorithm"
        )
    elif round_.exchange is not None:
        raise RecipeError(
            f"the algorithm brings its own exchange, {type(round_.exchange).__name__}: leave out exchange={given!r}, or take another "
            "algorithm"
        )
    if not round_.combine.linear:
        raise RecipeError(
            f"an exchange gives the sum of all updates, and {type(round_.combine).__name__} must see each of them: leave out the "
            f"exchange {type(made).__name__}"
        )
    if blueprint.layout.dtype != torch.float32:
        raise RecipeError(f"an exchange takes updates of float32, the module is of {blueprint.layout.dtype}: leave out the exchange")
    overlaps = getattr(made, "overlap", False)
    if overlaps and not isinstance(round_.local, Gradient):
        raise RecipeError(
            f"overlap=True sends the gradient while backward computes it, and {type(round_.local).__name__} makes something else of "
            "it: leave out overlap"
        )
    if round_.peer is not None:  # it does the exchange itself
        return replace(round_, peer=replace(round_.peer, exchange=made))
    made.check(blueprint)
    return replace(round_, exchange=made)
