"""Where the ranks of a barrier stage find one another, before they meet."""

from __future__ import annotations

import contextlib
import json
import socket
from dataclasses import asdict, replace
from typing import Any

from pyspark import BarrierTaskContext

from bigdl_lite.batch import Batch
from bigdl_lite.comm.block import Block, create, join, mailbox, private
from bigdl_lite.comm.group import Group, Store
from bigdl_lite.comm.window import Look, Window, available, look
from bigdl_lite.data.arrow import shapes
from bigdl_lite.engine.device import CPU, Choice, Given, Staging, decide
from bigdl_lite.engine.device import look as look_at_gpu
from bigdl_lite.engine.live import Speaker
from bigdl_lite.engine.meeting import Meeting, Place
from bigdl_lite.engine.rank import block_size
from bigdl_lite.engine.recipe import Recipe
from bigdl_lite.engine.spark import gpus
from bigdl_lite.errors import PeerLost, RecipeError


class Hall:
    """Where ranks find one another: who shares memory with whom, and the address of those who do not.

    Each rank has a mailbox in its memory (comm/block.py); those who can look at it are on its node. The block of a node is in the
    memory of its first rank. A killed rank leaves nothing behind.
    """

    def __init__(self, context: BarrierTaskContext, recipe: Recipe, share_memory: bool, secret: str) -> None:
        self.context, self.recipe, self.secret = context, recipe, secret
        self.rank = context.partitionId()
        self.host = context.getTaskInfos()[self.rank].address.rsplit(":", 1)[0]
        self.choice, self.device = Choice(), CPU
        self.staging: Staging | None = None
        self.store: Store | None = None
        self.mail = mailbox() if share_memory and not recipe.apart and available() else None
        self.memory: Window | None = None

    def gather(
        self, speaker: Speaker, mine: Batch | None, failure: dict[str, str] | None, held: Batch | None = None
    ) -> list[dict[str, Any]]:
        """What every rank has to say, in rank order: through the driver, or by an all-gather of Spark's, which takes a second."""
        port = 0
        if self.rank == 0:
            with contextlib.suppress(RecipeError):  # no address to listen on: an error only where ranks share no memory
                self.store = Store(self.host, 0, True, self.recipe.deadline, self.secret)
                port = self.store.port
        hello = {
            "host": self.host, "port": port, "mail": self.mail.address if self.mail else "", "failure": failure is not None,
            "rows": mine.rows if mine else 0, "shapes": shapes(mine or held),
            "gpu": asdict(look_at_gpu(gpus(), self.recipe.device, self.host)),
        }  # fmt: skip
        told = speaker.gather(hello)
        return [json.loads(word) for word in self.context.allGather(json.dumps(hello))] if told is None else told

    def enter(self, everyone: list[dict[str, Any]]) -> Meeting:
        """Raises RecipeError, on all ranks alike, where they cannot compute on what the recipe asks for."""
        recipe, p = self.recipe, len(everyone)
        told = [Given(**other["gpu"]) for other in everyone]
        self.choice = decide(told, recipe.device, recipe.apart, recipe.round.exchange is not None and recipe.hierarchical)
        self.device = self.choice.device(self.rank)
        seen = {r: found for r in range(p) if (found := self._mail_of(r, everyone[r]["mail"])) is not None}
        nodes: tuple[tuple[int, ...], ...] = (tuple(range(p)),)
        if len(seen) < p:
            self._open(everyone[0])
            assert self.store is not None
            self.store.put(f"node/{self.rank}", json.dumps(sorted({*seen, self.rank})).encode())
            views = [tuple(json.loads(self.store.get(f"node/{r}"))) for r in range(p)]
            nodes = tuple(sorted(set(views)))
            if sorted(r for ranks in nodes for r in ranks) != list(range(p)):
                raise PeerLost(f"ranks do not agree on who shares memory with whom: {views}")
        place = Place(self.rank, nodes)
        block = self._block(place, seen)
        rail = leaders = reach = near = None
        if self.device != CPU and self.choice.meeting == "memory":
            self.staging = Staging(block, self.device)
        device = self.device if self.choice.meeting == "nccl" and self.device != CPU else None  # else what travels lies on the CPU
        q = len(nodes[place.node])
        if device is not None and q > 1:
            self._open(everyone[0])
            assert self.store is not None
            ip = socket.gethostbyname(self.host)
            near = Group(self.store, f"near{place.node}", place.local, q, ip, device)
        if len(nodes) > 1:
            assert self.store is not None
            ip = socket.gethostbyname(self.host)
            exchange, reach = recipe.round.exchange, (self.store, ip)
            if place.local < (place.rails if exchange is None else 1):
                rail = Group(self.store, f"rail{place.local}", place.node, len(nodes), ip, device)
            if place.local == 0:
                leaders = Group(self.store, "leaders", place.node, len(nodes), ip)
        return Meeting(place, block, rail, leaders, recipe.round.exchange, reach, near, self.staging)

    def _open(self, first: dict[str, Any]) -> None:
        """The store, which the first rank serves."""
        if self.store is None:
            self.store = Store(first["host"], first["port"], self.rank == 0, self.recipe.deadline, self.secret)

    def _mail_of(self, rank: int, address: str) -> Look | None:
        """A rank's mailbox, None where it is on another node."""
        if self.mail is None:
            return None
        return self.mail if rank == self.rank else look(address) if address else None

    def _block(self, place: Place, seen: dict[int, Look]) -> Block:
        ranks = place.nodes[place.node]
        size, own = block_size(self.recipe, len(ranks)), self.device != CPU and self.choice.meeting != "memory"
        n, size = size.n, replace(size, n=0 if own else size.n)
        if len(ranks) == 1:
            block = Block(private(size.nbytes), size, 0, self.recipe.deadline, watch=False)
            if own:
                block.take_own(n, size.dtype, self.device)
            return block
        if place.local == 0:
            assert self.mail is not None
            self.memory = create(self.mail, size.nbytes)
        memory = self.memory or join(seen[ranks[0]], self.recipe.deadline)
        block = Block(memory, size, place.local, self.recipe.deadline)
        if own:
            block.take_own(n, size.dtype, self.device)
        block.wait()  # all have it open
        self.leave()
        return block

    def leave(self) -> None:
        """Nobody new can look; a block lives on until its last rank lets go, and is not page-locked any more."""
        if self.staging is not None:
            self.staging.close()
        for window in (self.mail, self.memory):
            if window is not None:
                window.close()
