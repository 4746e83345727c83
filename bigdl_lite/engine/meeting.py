"""Where ranks meet: memory between the ranks of a node, a group between nodes.

    M  nodes      L  ranks of the smallest node      M L  owners; larger nodes have ranks that own nothing

Owner l M + m is local rank l of node m. A step, as seen by owner (l, m):

    node    wait; sum slice l over the node's gradient rows                 memory
    rail    all-to-all of the M parts of slice l; sum in node order         network   (M = 1: nothing)
    self    advance the own part                                            optimizer
    rail    all-gather of slice l's weights                                 network   (M = 1: nothing)
    node    wait                                                            everyone has the new weights

Ranks with one local number form a rail: all of them send at once, so every link carries 1 / L of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bigdl_lite.algorithms import Combine, Side, Update
from bigdl_lite.comm.block import Block
from bigdl_lite.comm.group import Group
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
    """

    def __init__(self, place: Place, block: Block, rail: Group | None, leaders: Group | None) -> None:
        self.place, self.block, self.rail, self.leaders = place, block, rail, leaders
        self.owns = place.local < place.rails
        self.owners = place.rails * len(place.nodes)
        self.wished = False  # whether rank 0 wants the state after this step to be kept; known to all after sides()
        self._told = 0  # bytes already accounted for

    def divide(self, cuts: Sequence[Cut]) -> None:
        """Takes the cuts of all owners, M L of them."""
        m = len(self.place.nodes)
        first = self.place.local * m
        self.slice = list(cuts[first : first + m]) if self.owns else [(0, 0)] * m
        self.cut = self.slice[self.place.node]

    def tell(
        self, rows: int, weight: float, loss: float, compute_s: float, data_s: float, buffers: Tensor, wish: bool = False
    ) -> None:  # fmt: skip
        """Puts this rank's side on the table."""
        mine = self.block.sides[self.place.rank]
        mine[:SIDE] = torch.tensor([rows, weight, loss, compute_s, data_s, self._sent(), 0.0, wish], dtype=torch.float64)
        mine[SIDE:] = buffers

    def _sent(self) -> int:
        """Bytes that this rank has sent to other nodes since it last said so."""
        sent = sum(g.bytes_sent for g in (self.rail, self.leaders) if g)
        new, self._told = sent - self._told, sent
        return new

    def sides(self) -> tuple[list[Side], int]:
        """The sides of all ranks, and the bytes that they sent in the step before. All ranks are here when it returns."""
        self.block.wait()
        self._spread(self.block.sides)
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
        """The combined update of this owner's cut. weights[r] is that of rank r's update."""
        start, stop = self.slice[0][0], self.slice[-1][1]
        ranks = self.place.nodes[self.place.node]
        update = rule([
            Update(grad[start:stop], weights[r]) for r, grad in zip(ranks, self.block.grads, strict=True)
        ])  # fmt: skip
        if self.rail is None:
            return update
        parts = self.rail.all_to_all([update.vector[a - start : b - start] for a, b in self.slice])
        of_nodes = [sum(weights[r] for r in ranks) for ranks in self.place.nodes]
        return rule([Update(x, w) for x, w in zip(parts, of_nodes, strict=True)])

    def total(self, measured: float) -> float:
        """The sum of one number over all ranks, in rank order."""
        self.block.sides[self.place.rank, _MEASURE] = measured
        self.block.wait()
        self._spread(self.block.sides)
        return float(self.block.sides[:, _MEASURE].sum())

    def publish(self) -> None:
        """Makes the advanced weights everyone's. All ranks have them when it returns."""
        if self.rail is not None:
            self.rail.all_gather(self.block.weights[slice(*self.cut)], [self.block.weights[a:b] for a, b in self.slice])
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
        for group in (self.rail, self.leaders):
            if group is not None:
                group.close()

    def _spread(self, table: Tensor) -> None:
        """Brings the rows that other nodes hold; rows [p, k]. One more wait, where there are other nodes."""
        nodes = self.place.nodes
        if len(nodes) == 1:
            return
        if self.leaders is not None:
            width = table.shape[1]
            incoming = [torch.empty(len(ranks) * width, dtype=table.dtype) for ranks in nodes]
            self.leaders.all_gather(table[list(nodes[self.place.node])].reshape(-1), incoming)
            for ranks, rows in zip(nodes, incoming, strict=True):
                if ranks != nodes[self.place.node]:
                    table[list(ranks)] = rows.view(len(ranks), width)
        self.block.wait()
