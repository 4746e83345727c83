"""Where ranks meet: memory between the ranks of a node, a group between nodes.

    M  nodes      L  ranks of the smallest node      M L  owners; larger nodes have ranks that own nothing

Owner l M + m is local rank l of node m. A step, as seen by owner (l, m):

    node    wait; sum slice l over the node's gradient rows                 memory
    rail    all-to-all of the M parts of slice l; sum in node order         network   (M = 1: nothing)
    self    advance the own part                                            optimizer
    rail    all-gather of slice l's weights                                 network   (M = 1: nothing)
    node    wait                                                            everyone has the new weights

Ranks with one local number form a rail: all of them send at once, so every link carries 1 / L of the model.

With an exchange (algorithms/exchange.py) nodes are peers, and every node advances all of the weights:

    node    wait; each rank sums its part of the node's gradient rows      memory
    first   the exchange: the node's sum -> the sum over nodes             network
    self    advance the own part of the node's weights                     optimizer
    node    wait

The sides of other nodes come beside the exchange, from a thread of the first rank.

Where each rank has weights and gradient on a GPU of its own, a group `near` (NCCL) takes the place of the node's memory for vectors:

    near    all-to-all of the node's slices; sum in local order            node
    rail, self, rail as above
    near    all-gather of the slices                                       node
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bigdl_lite.algorithms import Combine, Side, Sum, Update
from bigdl_lite.algorithms.exchange import NOTHING, Exchange, State, Turn, put_back
from bigdl_lite.algorithms.peer import require_finite
from bigdl_lite.comm.beside import Beside
from bigdl_lite.comm.block import Block
from bigdl_lite.comm.comm import Collectives
from bigdl_lite.comm.room import Room, Table
from bigdl_lite.engine.device import Staging
from bigdl_lite.engine.overlap import Overlap
from bigdl_lite.errors import DivergedError
from bigdl_lite.model.layout import Blueprint
from bigdl_lite.model.replica import Replica
from bigdl_lite.vector import Cut

# the first numbers of a side; buffers follow
_ROWS, _WEIGHT, _LOSS, _COMPUTE, _DATA, _BYTES, _MEASURE, _WISH, SIDE = range(9)


@dataclass(frozen=True)
class Place:
    """Which ranks share which node: nodes[m] lists them in ascending order."""

    rank: int
    nodes: tuple[tuple[int, ...], ...]

    @property
    def size(self) -> int:
        return sum(map(len, self.nodes))

    @property
    def node(self) -> int:
        return next(m for m, ranks in enumerate(self.nodes) if self.rank in ranks)

    @property
    def local(self) -> int:
        return self.nodes[self.node].index(self.rank)

    @property
    def rails(self) -> int:
        return min(map(len, self.nodes))


class Meeting:
    """One rank's side of every meeting of a fit.

    rail    the group of the ranks with this local number, one per node; None on a single node or where this rank owns nothing
    leaders the group of the first ranks of all nodes, which carries sides; None elsewhere
    near    the group of the ranks of this node, whose vectors are not in the block; None where they are, or there is one rank
    staging between the block and the GPU of this rank, which has vectors of its own there; None where it computes in the block

    With an exchange, which then takes the rail of the first ranks, every rank owns its part of the node's weights.
    """

    def __init__(
        self, place: Place, block: Block, rail: Collectives | None, leaders: Collectives | None, exchange: Exchange | None = None,
        reach: Any = None, near: Collectives | None = None, staging: Staging | None = None,
    ) -> None:  # fmt: skip
        self.place, self.block, self.rail, self.leaders, self.exchange = place, block, rail, leaders, exchange
        self.reach = reach  # (store, host), for peers that open doors of their own
        self.near, self.staging = near, staging
        self.reads = place.local == 0 or near is not None  # whether no other rank fills these weights
        self.owns = exchange is not None or place.local < place.rails
        self.owners = place.rails * len(place.nodes) if exchange is None else len(place.nodes[place.node])
        self.wished = False  # whether rank 0 wants the state after this step to be kept; known to all after sides()
        self._told = 0  # bytes already accounted for
        self._mark: int | None = None  # those before the buckets of this step
        self._overlap: Overlap | None = None
        self._gathering: Beside[list[Tensor]] | None = None
        self._comm = None if exchange is None or place.local else rail or Room(Table(1), 0)

    def start(self, blueprint: Blueprint, state: State | None) -> None:
        """Makes the exchanger, where there is an exchange, and puts its saved state back."""
        self._exchanger = None
        if self.exchange is not None and self._comm is not None:
            self._exchanger = self.exchange.start(blueprint, self._comm)
            if state is not None:
                put_back(self.exchange, self._exchanger, state, self._comm)

    @property
    def keepers(self) -> int:
        """How many ranks have something that a checkpoint needs (see keeps)."""
        if self.exchange is None:
            return self.owners
        first = len(self.place.nodes[0])
        return first + len(self.place.nodes) - 1 if self.exchange.remembers else first

    @property
    def keeps(self) -> bool:
        """Whether this rank has something that no other brings: a part of the weights, or its node's residual."""
        if self.exchange is None:
            return self.owns
        return self.place.node == 0 or (self.exchange.remembers and not self.place.local)

    def kept(self) -> tuple[State, State, int]:
        """What all exchangers share, what that of this rank has alone, and the number of its peer; -1: it has none."""
        if self._exchanger is None:
            return NOTHING, NOTHING, -1
        return self._exchanger.shared(), self._exchanger.own(), self.place.node

    def divide(self, cuts: Sequence[Cut]) -> None:
        """Takes the cuts of all owners, `owners` of them."""
        if self.exchange is not None:
            self.cut = cuts[self.place.local]
            self.slice = [self.cut]
            return
        m = len(self.place.nodes)
        first = self.place.local * m
        self.slice = list(cuts[first : first + m]) if self.owns else [(0, 0)] * m
        self.cut = self.slice[self.place.node]
        rest = len(self.place.nodes[self.place.node]) - self.place.rails
        self._spans = [(cuts[at][0], cuts[at + m - 1][1]) for at in range(0, len(cuts), m)] + [(0, 0)] * rest

    def tell(
        self, rows: int, weight: float, loss: float, compute_s: float, data_s: float, buffers: Tensor, wish: bool = False
    ) -> None:  # fmt: skip
        """Puts this rank's side on the table."""
        mine = self.block.sides[self.place.rank]
        sent = self._sent(self._mark)
        mine[:SIDE] = torch.tensor([rows, weight, loss, compute_s, data_s, sent, 0.0, wish], dtype=torch.float64)
        mine[SIDE:] = buffers

    def _total(self) -> int:
        return sum(g.bytes_sent for g in (self.rail, self.leaders) if g)

    def _sent(self, until: int | None = None) -> int:
        """Bytes that this rank has sent to other nodes since it last said so, of the first `until`."""
        sent = self._total() if until is None else until
        self._mark = None
        new, self._told = sent - self._told, sent
        return new

    def sides(self) -> tuple[list[Side], int]:
        """The sides of all ranks, and the bytes that they sent in the step before. All ranks are here when it returns."""
        if self._gathering is None:
            self.block.wait()
            self._spread(self.block.sides)
        else:
            if self.leaders is not None:
                self._place(self.block.sides, self._gathering.result())
            self._gathering = None
            self.block.wait()
        table = self.block.sides.clone()
        numbers = table[:, :SIDE].tolist()
        self.wished = bool(numbers[0][_WISH])
        sides = [
            Side(r, int(x[_ROWS]), x[_WEIGHT], x[_LOSS], x[_COMPUTE], x[_DATA], table[r, SIDE:]) for r, x in enumerate(numbers)
        ]
        return sides, int(sum(x[_BYTES] for x in numbers))

    def sent(self) -> int:
        """The bytes that all ranks sent in the last step, where no later side will carry their number."""
        self.block.sides[self.place.rank, _BYTES] = self._sent()
        self.block.wait()
        self._spread(self.block.sides)
        total = int(self.block.sides[:, _BYTES].sum())
        self.block.wait()
        return total

    def combine(self, rule: Combine, weights: Sequence[float]) -> Update:
        """The combined update of this owner's cut; of no values where this rank owns none. weights[r] is that of rank r's update."""
        start, stop = self.slice[0][0], self.slice[-1][1]
        ranks = self.place.nodes[self.place.node]
        if self.near is None:
            grads = [grad[start:stop] for grad in self.block.grads] if self.owns else []
        else:
            mine = self.block.grads[self.place.local]
            grads = self.near.all_to_all([mine[a:b] for a, b in self._spans])
        if not self.owns:  # its scheduler goes on like everyone's
            return Update(self.block.weights.new_empty(0), 1.0)
        update = rule([Update(grad, weights[r]) for r, grad in zip(ranks, grads, strict=True)])
        if self.rail is None:
            return update
        parts = self.rail.all_to_all([update.vector[a - start : b - start] for a, b in self.slice])
        of_nodes = [sum(weights[r] for r in ranks) for ranks in self.place.nodes]
        return rule([Update(x, w) for x, w in zip(parts, of_nodes, strict=True)])

    def begin(self, replica: Replica, rows: Sequence[int], step: int, seed: int) -> None:
        """Before the local work of a step with an exchange, on rows[r] of rank r: buckets may leave from now on, where it overlaps."""
        self._rows = total = sum(rows) or 1
        self._turn = Turn(step, seed, sum(rows[r] for r in self.place.nodes[self.place.node]) / total)
        if self._exchanger is None or not getattr(self.exchange, "overlap", False) or isinstance(self._comm, Room):
            return
        if self._overlap is None:
            self._overlap = Overlap(replica, self.exchange.buckets(replica.layout.n))
        turn, comm, exchanger = self._turn, self._comm, self._exchanger

        def send(i: int, x: Tensor) -> Tensor:
            x.div_(total)
            require_finite(x, "update", self.place.rank, step)
            return exchanger.bucket(i, x.cpu(), comm, turn)

        self._mark = self._total()
        self._overlap.begin(send)

    def exchanged(self) -> Tensor:
        """The mean over rows on this rank's cut, as the exchange gives it. Sides travel beside it; they are there after sides()."""
        grads = self.block.grads
        self.block.wait()
        if len(self.place.nodes) > 1 and not isinstance(self.rail, Room):
            self._gathering = Beside(self._gathered, self.block.sides)
        if len(grads) > 1:
            Sum()([Update(grad[slice(*self.cut)], 0.0) for grad in grads])
            self.block.wait()
        if self._exchanger is not None:
            assert self._comm is not None
            if self._overlap is not None:
                self._overlap.end()
            else:
                x = grads[0].div_(self._rows)
                require_finite(x, "update", self.place.rank, self._turn.step)
                y = self._exchanger(x.cpu(), self._comm, self._turn)
                if y.data_ptr() != x.data_ptr():
                    x.copy_(y)
        self.block.wait()
        return grads[0][slice(*self.cut)]

    def agree(self, what: str) -> None:
        """Raises DivergedError where nodes that each advance all of the weights no longer have the same bits."""
        if self.exchange is None or len(self.place.nodes) == 1:
            return
        if self.place.local == 0:
            found = zlib.crc32(memoryview(self.block.weights.detach().cpu().view(torch.uint8).numpy()))
            self.block.sides[self.place.rank, _MEASURE] = found
        self.block.wait()
        self._spread(self.block.sides)
        found = [int(self.block.sides[ranks[0], _MEASURE]) for ranks in self.place.nodes]
        self.block.wait()
        other = next((m for m, x in enumerate(found) if x != found[0]), None)
        if other is not None:
            raise DivergedError(
                f"ranks {self.place.nodes[0][0]} and {self.place.nodes[other][0]} no longer have the same weights {what} (CRC "
                f"{found[0]:08x} and {found[other]:08x}): the exchange, or the optimizer, computes differently on two machines"
            )

    def total(self, measured: float) -> float:
        """The sum of one number over all owners, in rank order; the same bits on all ranks."""
        self.block.sides[self.place.rank, _MEASURE] = measured
        self.block.wait()
        self._spread(self.block.sides)
        if self.exchange is not None:  # every node has measured all
            return float(self.block.sides[list(self.place.nodes[0]), _MEASURE].sum())
        return float(self.block.sides[:, _MEASURE].sum())

    def publish(self) -> None:
        """Makes the advanced weights everyone's. All ranks have them when it returns."""
        if self.rail is not None and self.exchange is None:
            self.rail.all_gather(self.block.weights[slice(*self.cut)], [self.block.weights[a:b] for a, b in self.slice])
        if self.near is not None:
            weights = self.block.weights
            self.near.all_gather(weights[slice(*self._spans[self.place.local])], [weights[a:b] for a, b in self._spans])
        self.block.wait()

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of a small float64 vector over all ranks, in rank order; the same bits on all of them."""
        self.block.scratch[self.place.rank, : len(x)] = x.cpu()
        self.block.wait()
        self._spread(self.block.scratch)
        total = self.block.scratch[:, : len(x)].sum(0)
        self.block.wait()
        return total.to(x.device)

    def fail(self) -> None:
        """Ends every wait of the other ranks, on this node and on others."""
        self.block.fail()
        self.close()

    def close(self) -> None:
        if self._overlap is not None:
            self._overlap.close()
        for each in (self.rail, self.leaders, self.near):
            if each is not None:
                each.close()

    def _spread(self, table: Tensor) -> None:
        """Brings the rows that other nodes hold; rows [p, k]. One more wait, where there are other nodes."""
        nodes = self.place.nodes
        if len(nodes) == 1:
            return
        if self.leaders is not None:
            self._place(table, self._gathered(table))
        self.block.wait()

    def _gathered(self, table: Tensor) -> list[Tensor]:
        """The rows that each node holds, on the first rank of a node; elsewhere none."""
        if self.leaders is None:
            return []
        nodes = self.place.nodes
        incoming = [torch.empty(len(ranks) * table.shape[1], dtype=table.dtype) for ranks in nodes]
        self.leaders.all_gather(table[list(nodes[self.place.node])].reshape(-1), incoming)
        return incoming

    def _place(self, table: Tensor, incoming: list[Tensor]) -> None:
        for node, (ranks, rows) in enumerate(zip(self.place.nodes, incoming, strict=True)):
            if node != self.place.node:
                table[list(ranks)] = rows.view(len(ranks), table.shape[1])
