"""Exchanges: how the updates of all peers become one sum that each of them has, when nobody is in the middle.

    Round(local, combine, advance, exchange)

        exchange  between combine and advance: x of this peer -> the sum of x over peers, perhaps only nearly

A peer is a rank, or a node whose ranks have summed in memory first (hierarchical). What a peer brings is its sum over rows divided
by the weight of all rows of the step, so that the sum over peers is the mean, and errors that wait (residuals) are in its units.

An exchange is written against Comm (comm/comm.py) and nothing else. Between its calls to comm it must be a function of x, of
their answers, of the turn, and of its state: so the same code runs among ranks that live side by side (barrier, local), and in
tasks of short jobs that remember nothing (shuffle), where it is played again up to the call whose answer is not known yet.

    n  length of the flat update      p  peers
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from bigdl_lite.algorithms.algorithm import State
from bigdl_lite.comm.comm import Comm, Residual
from bigdl_lite.errors import CheckpointError, RecipeError
from bigdl_lite.model.layout import Blueprint
from bigdl_lite.vector import Cut
from bigdl_lite.wire.codec import Codec, group_of


class Turn(NamedTuple):
    """One step. seed: of the step, the same on all peers. share: this peer's part of the weight of all rows; they sum to 1."""

    step: int
    seed: int
    share: float


class Exchanger(Protocol):
    """The living half of an Exchange: what one peer keeps from step to step."""

    def __call__(self, x: Tensor, comm: Comm, turn: Turn) -> Tensor:
        """The sum of x [n] float32 over peers; equal to the bit on all. May overwrite x, and may return it."""
        ...

    def shared(self) -> State:
        """What every peer must have for the next step, the same on all. Small: shuffle sends it to all tasks in every step.

        Names of tensors begin with "exchange/"; facts are as to_json takes them.
        """
        ...

    def own(self) -> State:
        """What this peer alone has; it needs not be the same as another's. Only for checkpoints."""
        ...

    def restore(self, shared: State, own: State) -> None: ...


class Exchange(Protocol):
    remembers: bool  # whether each peer's own() decides what it sends: then executors must live as long as the fit

    def check(self, blueprint: Blueprint) -> None:
        """Raises RecipeError, on the driver, where it cannot work with this module."""
        ...

    def start(self, blueprint: Blueprint, comm: Comm) -> Exchanger: ...


NOTHING = State({}, {})


def is_finite(x: Tensor) -> bool:
    """Without the copies that torch.isfinite makes."""
    return not x.numel() or all(bool(torch.isfinite(end)) for end in torch.aminmax(x))


class Stateless:
    """The other half of an exchanger that keeps nothing."""

    def shared(self) -> State:
        return NOTHING

    def own(self) -> State:
        return NOTHING

    def restore(self, shared: State, own: State) -> None:
        pass


@dataclass(frozen=True)
class Coded:
    """Every vector goes through a codec: Q(sum Q(x)), or sum Q(x) with gather.

    residual  what a codec leaves out is kept and sent later (error feedback), by those who send and by those who sum
    gather    each peer sends its encoding to all: less only where nbytes(n) < 8 n / p
    overlap   buckets leave while backward still computes the others; the weights are the same. Engine barrier, one rank a peer,
              gradients only; a codec that encodes the whole vector at once (group 0) cannot
    bucket    values of one bucket, where there is overlap

    Cost, bytes of all p peers: 2 (p - 1) nbytes(n), or p (p - 1) nbytes(n) with gather; with residual also n (1 + 1 / p) values
    of memory each.

    Source: BAGUA's C_LP_S (Gan et al., VLDB 2022); with MinMax8 its ByteGrad. Error feedback: Karimireddy et al., ICML 2019.
    """

    codec: Codec
    residual: bool = False
    gather: bool = False
    overlap: bool = False
    bucket: int = 1 << 21

    @property
    def remembers(self) -> bool:
        return self.residual

    def check(self, blueprint: Blueprint) -> None:
        if self.overlap and not group_of(self.codec):
            raise RecipeError(
                f"{self.codec!r} encodes the whole vector at once, so that nothing can leave before backward has ended: leave out "
                "overlap, or take a codec with a group"
            )
        if self.residual and not getattr(self.codec, "contracts", True):
            raise RecipeError(
                f"{self.codec!r} makes vectors longer than they are, so that what residual=True keeps would grow for ever: take it "
                "without scaling (contract=True, scaled=False), or residual=False"
            )
        if self.bucket < 1:
            raise RecipeError(f"bucket is {self.bucket} values, must be at least 1")

    def buckets(self, n: int) -> list[Cut]:
        """Cuts of [0, n) in the order in which they leave, from the last to the first; all of it without overlap."""
        if not self.overlap:
            return [(0, n)]
        group = group_of(self.codec)
        step = max(group, self.bucket // group * group)
        return [(at, min(at + step, n)) for at in range(0, n, step)][::-1]

    def start(self, blueprint: Blueprint, comm: Comm) -> _Coded:
        cuts = self.buckets(blueprint.layout.n)
        kept = [Residual.zeros(b - a, comm, self.codec, self.gather) if self.residual else None for a, b in cuts]
        return _Coded(self, cuts, kept)


class _Coded:
    def __init__(self, how: Coded, cuts: Sequence[Cut], residuals: Sequence[Residual | None]) -> None:
        self.how, self.cuts, self.residuals = how, cuts, residuals

    def __call__(self, x: Tensor, comm: Comm, turn: Turn) -> Tensor:
        if len(self.cuts) == 1:
            return self.bucket(0, x, comm, turn)
        for i, (a, b) in enumerate(self.cuts):
            x[a:b] = self.bucket(i, x[a:b], comm, turn)
        return x

    def bucket(self, i: int, x: Tensor, comm: Comm, turn: Turn) -> Tensor:
        """The sum over peers of bucket i of the update; buckets are called for in order."""
        how = self.how
        return comm.all_reduce(x, how.codec, turn.seed, self.residuals[i], how.gather, self.cuts[i][0])

    def shared(self) -> State:
        return NOTHING

    def own(self) -> State:
        kept = {}
        for i, residual in enumerate(self.residuals):
            if residual is not None:
                kept |= {f"exchange/{i}/mine": residual.mine, f"exchange/{i}/owned": residual.owned}
        return State(kept, {})

    def restore(self, shared: State, own: State) -> None:
        for i, residual in enumerate(self.residuals):
            if residual is not None:
                copy_into(residual.mine, own, f"exchange/{i}/mine")
                copy_into(residual.owned, own, f"exchange/{i}/owned")


_SHARED = "shared/"


def merged(state: State, shared: State, owns: Sequence[State]) -> State:
    """One state for a checkpoint: the advance's, and the exchange's, its shared half and each peer's own."""
    tensors = {**state.tensors, **{_SHARED + name: x for name, x in shared.tensors.items()}}
    for peer, own in enumerate(owns):
        tensors |= {f"peer{peer}/{name}": x for name, x in own.tensors.items()}
    return State(tensors, {**state.facts, "exchange": {"shared": shared.facts, "own": [own.facts for own in owns]}})


def parted(state: State) -> tuple[State, State, list[State]]:
    """merged() undone. Without an exchange: no peers."""
    facts = dict(state.facts)
    told = facts.pop("exchange", {"shared": {}, "own": []})
    peers = [f"peer{peer}/" for peer in range(len(told["own"]))]

    def under(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): x for name, x in state.tensors.items() if name.startswith(prefix)}

    rest = {name: x for name, x in state.tensors.items() if not name.startswith((_SHARED, *peers))}
    owns = [State(under(prefix), own) for prefix, own in zip(peers, told["own"], strict=True)]
    return State(rest, facts), State(under(_SHARED), told["shared"]), owns


def put_back(exchange: Exchange, exchanger: Exchanger, state: State, comm: Comm) -> None:
    """Restores an exchanger from a merged state. Raises CheckpointError where it is of other peers."""
    _, shared, owns = parted(state)
    if exchange.remembers and len(owns) != comm.size:
        raise CheckpointError(
            f"the checkpoint holds what {len(owns)} peers keep, and {type(exchange).__name__} has {comm.size} now: go on with as many "
            "workers as before, or begin anew in another folder"
        )
    exchanger.restore(shared, owns[comm.rank] if comm.rank < len(owns) else NOTHING)


def copy_into(to: Tensor, state: State, name: str) -> None:
    """Puts a saved tensor back. Raises CheckpointError where it is not there, or of another length."""
    found = state.tensors.get(name)
    if found is None or found.shape != to.shape:
        got = "nothing" if found is None else f"{list(found.shape)}"
        raise CheckpointError(
            f"the checkpoint holds {got} for {name!r}, which needs {list(to.shape)}: go on with the exchange, and with as many "
            "workers, as it was saved with"
        )
    to.copy_(found)
