"""What the driver of the shuffle engine tells its tasks of one round."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace

from bigdl_lite.engine.replay import Ask, pieces
from bigdl_lite.vector import Cut


@dataclass(frozen=True)
class Order:
    """What a map task needs to know of one round. held: rows of each partition that are for validation; shapes: of one row."""

    run: str
    counts: tuple[int, ...]
    cuts: tuple[Cut, ...]
    round: int = -1
    epoch: int = -1
    first: tuple[int, ...] = ()  # rows of each share that this epoch has dealt already
    batches: tuple[tuple[int, ...], ...] = ()  # rows that each share gives to each batch of the round
    rates: tuple[float, ...] = ()  # of the parameter groups
    ask: Ask | None = None  # with an exchange: what is to be summed
    held: tuple[int, ...] = ()
    shapes: tuple[tuple[int, ...], ...] = ()
    device: str = "cpu"  # or "cuda": where all tasks compute

    @property
    def quota(self) -> list[int]:
        """Rows that each share gives."""
        return [sum(batches) for batches in self.batches]

    @property
    def senders(self) -> list[int]:
        return [rank for rank, quota in enumerate(self.quota) if quota]

    @property
    def pieces(self) -> list[tuple[int, Cut]]:
        """The owner and the cut of every piece, in order."""
        return pieces(self.cuts) if self.ask is None else self.ask.pieces


def dumps(orders: Iterable[Order]) -> str:
    """What differs between the rounds of a run, without the rates, which may be known only when a round begins."""
    return json.dumps([[x.round, x.epoch, x.first, x.batches] for x in orders])


def loads(text: str, base: Order) -> list[Order]:
    return [
        replace(base, round=round_, epoch=epoch, first=tuple(first), batches=tuple(map(tuple, batches)))
        for round_, epoch, first, batches in json.loads(text)
    ]
