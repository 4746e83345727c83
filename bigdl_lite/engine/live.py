"""What ranks tell the driver while a long stage runs: signs of life, lines of history, and their part of the state.

The driver listens on the address that Spark itself uses; every rank calls, and both prove with a token that they belong to the
run (comm/door.py). Facts and tensors travel in clear; on the driver's machine the tensors stay in memory and are looked at.

    rank                                                          driver
    {"alive": rank}, every few seconds; {"bye"} at the end        a rank that is silent, or gone without a word, is given up
    {"step" ...} and other lines, from rank 0                     the observer; best effort, training never waits
    {"word"}, once                                                {"wait"} until all ranks have said theirs, then {"all"} (gather.py)
    {"asked"}, from rank 0                                        whether the observer wants the fit to end
    {"kept"}                                                      which state it still needs, and must not be written to
    {"state": nbytes, "address": ...}                             looks there, or says {"blind"}: then the bytes are sent
                                                                  {"wait"} while a save is under way, then {"ok"} or {"refused"}

Where a firewall forbids it, a fit has no live lines and begins anew after a loss; checkpoints are then refused by name.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from bigdl_lite.comm.door import Service, call
from bigdl_lite.comm.link import TENSOR, Link, exchange
from bigdl_lite.comm.window import Window, available, look
from bigdl_lite.engine.gather import Gathering
from bigdl_lite.engine.keeper import Keeper, Part, dump, parse
from bigdl_lite.engine.recipe import Event, Observer, silent
from bigdl_lite.errors import BigDLError, CheckpointError, MeetingTimeout, PeerLost, WireError

_LOG = logging.getLogger("bigdl_lite")
_PATIENCE = 1.0  # seconds that a line may take, and the connection of a rank that needs none
_EVERY = 0.1  # seconds between lines of steps; the history itself has them all
_BUSY = 5.0  # seconds between words to a rank that waits for a save
_MOST = 1 << 36


@dataclass(frozen=True)
class Address:
    host: str
    port: int
    token: str
    deadline: float


class Listener:
    """The driver's end; use it as a context manager. address is for the Speakers.

    lost(why)   is called once, from a thread, where a rank that was there is gone, or gave no sign of life for the deadline
    ranks       of the stage, which say to one another who they are
    most        bytes of a part of the state that are taken at most; of memory a part takes no more than what came
    Raises      OSError where nothing can listen on host
    """

    def __init__(
        self, host: str, token: str, observer: Observer, keeper: Keeper | None = None, deadline: float = 120.0,
        lost: Callable[[str], None] = lambda why: None, most: int = _MOST, ranks: int = 1,
    ) -> None:  # fmt: skip
        self._observer, self._keeper, self._lost, self._deadline, self._most = observer, keeper, lost, deadline, most
        self._one_at_a_time, self._once, self._keeping = threading.Lock(), threading.Lock(), threading.Lock()
        self._pause = min(_BUSY, deadline / 4)
        self._heard: dict[Link, tuple[int, float]] = {}  # rank, and when it was last heard; inf while it is being served
        self._closed, self._ended = threading.Event(), False
        self._gathering = Gathering(ranks)
        self._service = Service(host, token, "live", self._hear, "bigdl_lite-live")
        self._watch = threading.Thread(target=self._look_around, name="bigdl_lite-watch", daemon=True)
        self.address = Address(host, self._service.port, token, deadline)

    def __enter__(self) -> Listener:
        self._watch.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._closed.set()
        with self._keeping:
            self._ended = True
        self._gathering.end()
        self._service.close()

    def _look_around(self) -> None:
        while not self._closed.wait(min(1.0, self._deadline / 4)):
            now = time.monotonic()
            for rank, heard in list(self._heard.values()):
                if now - heard > self._deadline:
                    self._give_up(f"rank {rank} gave no sign of life for {now - heard:.0f} s")

    def _give_up(self, why: str) -> None:
        with self._once:
            first = not self._closed.is_set()
            self._closed.set()
        if first:
            self._lost(why)

    def _hear(self, link: Link) -> None:
        rank, observe = -1, self._observer
        try:
            while True:
                self._heard[link] = rank, time.monotonic() if rank >= 0 else float("inf")
                event = link.hear(None)
                rank = event.get("alive", -1 if "bye" in event else rank)
                self._heard[link] = rank, float("inf")
                if "alive" in event:
                    self._gathering.here(rank)
                elif "state" in event:
                    self._take(link, event)
                elif "asked" in event:
                    link.tell({"asked": bool(getattr(self._observer, "asked", bool)())}, self._deadline)
                elif "kept" in event:
                    link.tell({"kept": self._keeper.kept if self._keeper else -1}, self._deadline)
                elif "word" in event:
                    link.tell({"all": self._gathering.say(rank, event["word"], self._pause, lambda: self._wait(link))}, self._deadline)
                elif "bye" not in event and not self._tell(observe, event):
                    observe = silent
        except PeerLost:
            if rank >= 0:
                self._give_up(f"the process of rank {rank} is gone, or cannot be reached any more; was it killed for memory?")
        except MeetingTimeout as error:
            if rank >= 0:
                self._give_up(f"rank {rank} fell silent while it brought its part of the state: {error}")
        except Exception as error:  # not a line of ours: the next speaker is heard
            _LOG.warning("a speaker was dropped: %s: %s", type(error).__name__, error)
        finally:
            self._heard.pop(link, None)

    def _tell(self, observe: Observer, event: Event) -> bool:
        """Whether the observer took the line: a progress bar that fails must not cost a rank its connection."""
        try:
            with self._one_at_a_time:
                observe(event)
        except Exception as error:
            _LOG.warning("the observer failed and hears no more of this rank: %s: %s", type(error).__name__, error)
            return False
        return True

    def _take(self, link: Link, event: Event) -> None:
        """A part of the state, for the keeper; the rank is told why where it is none."""
        try:
            part = parse(self._memory(link, event["state"], event["address"], event["tag"]))
        except WireError as error:
            _LOG.warning("a part of the state was refused: %s: %s", type(error).__name__, error)
            link.tell({"refused": str(error)}, self._deadline)
            return
        if self._keeper is not None:
            while not self._keeper.ready(self._pause):
                self._wait(link)
            with self._keeping:
                if self._ended:  # meanwhile, and its parts must not mix with those of the next stage
                    raise PeerLost("the stage has ended")
                self._keeper(part)
        link.tell({"ok": True}, self._deadline)

    def _wait(self, link: Link) -> None:
        link.tell({"wait": True}, self._deadline)

    def _memory(self, link: Link, nbytes: int, address: str, tag: int) -> Tensor:
        """The bytes of a part [nbytes] uint8: looked at where they lie, or received."""
        if not 0 < nbytes <= self._most:
            raise WireError(f"a part of the state of {nbytes} bytes; at most {self._most} are taken")
        seen = look(address) if address else None
        if seen is not None:
            return seen.values(torch.uint8, nbytes)
        link.tell({"blind": True}, self._deadline)
        memory = torch.empty(nbytes, dtype=torch.uint8)
        link.receive(tag, memoryview(memory.numpy()))
        exchange([link], self._deadline)
        return memory


class Speaker:
    """A rank's end; call it with events. A connection that is lost is not made again: from then on it is silent.

    rank        gives signs of life from the start; -1: none
    windows     whether the driver may look at this process's memory
    """

    def __init__(self, address: Address | None, rank: int = -1, windows: bool = False) -> None:
        self._link: Link | None = None
        self._address, self._rank, self._lock = address, rank, threading.Lock()
        self._windows: dict[int, Window] | None = {} if windows and available() else None  # by the step of the state in it
        self._last, self._tag = 0.0, 0
        self._closed = threading.Event()
        if address is None:
            return
        try:
            patience = _PATIENCE if rank < 0 else min(3.0, address.deadline)
            self._link = call(address.host, address.port, address.token, "live", max(0, rank), patience, "the driver")
        except BigDLError as error:
            _LOG.info("no connection to the driver beside Spark's: %s", error)
            return
        if rank >= 0:
            self._tell({"alive": rank})
            threading.Thread(target=self._live, args=(min(5.0, address.deadline / 4),), name="bigdl_lite-alive", daemon=True).start()

    @property
    def connected(self) -> bool:
        return self._link is not None

    def __call__(self, event: Event) -> None:
        if "step" in event:
            now = time.monotonic()
            if now - self._last < _EVERY:
                return
            self._last = now
        self._tell(event)

    def asked(self) -> bool:
        """Whether the driver's observer wants the fit to end here."""
        with self._lock:
            if self._link is None or self._address is None:
                return False
            try:
                self._link.tell({"asked": True}, self._address.deadline)
                return bool(_answer(self._link, self._address.deadline)["asked"])
            except BigDLError:
                self._hang_up()
                return False

    def gather(self, word: Any) -> list[Any] | None:
        """What all ranks say, in their order; None where they are to ask Spark: then this holds for all of them.

        Raises  PeerLost or MeetingTimeout where the connection is lost meanwhile, and with it the stage.
        """
        with self._lock:
            if self._link is None or self._address is None:
                return None
            try:
                try:
                    self._link.tell({"word": word}, self._address.deadline)
                except WireError:  # too long, and nothing was sent of it
                    self._link.tell({"word": None}, self._address.deadline)
                found: list[Any] | None = _answer(self._link, self._address.deadline)["all"]
                return found
            except BigDLError:
                self._hang_up()
                raise

    def give(self, part: Part) -> None:
        """Brings a part of the state to the driver; returns when the driver has it.

        Cost    one copy of the part in this process: in one of two windows, which stay, or until it is sent.
        Raises  CheckpointError where a checkpoint is due and the driver cannot be reached or does not take it. Where none is
                due, the state is not kept, and training goes on.
        """
        with self._lock:
            try:
                if self._link is None:
                    raise PeerLost("there is no connection")
                self._give(self._link, part)
            except CheckpointError as error:  # no trouble of the connection
                _LOG.info("the state of step %d is not kept: %s", part.now.step, error)
                if part.save:
                    raise
            except BigDLError as error:
                self._hang_up()
                if part.save:
                    host = f"{self._address.host}:{self._address.port}" if self._address else "an address that this run does not have"
                    raise CheckpointError(
                        f"rank {part.rank} cannot bring its part of the checkpoint of step {part.now.step} to the driver at {host}: "
                        f"{error}; let executors connect to the driver, or take engine='shuffle' (not through Connect)"
                    ) from error

    def _give(self, link: Link, part: Part) -> None:
        assert self._address is not None
        nbytes, pieces = dump(part)
        deadline, self._tag = self._address.deadline, self._tag + 1
        window = None
        if self._windows is not None:
            link.tell({"kept": True}, deadline)
            window = self._window(part.now.step, nbytes, _answer(link, deadline)["kept"])
        memory = window.values(torch.uint8, nbytes) if window else torch.empty(nbytes, dtype=torch.uint8)
        _fill(memory, pieces)
        link.tell({"state": nbytes, "address": window.address if window else "", "tag": self._tag}, deadline)
        answer = _answer(link, deadline)
        if "blind" in answer:
            self._windows = None  # it will not see the next one either
            link.send(TENSOR, self._tag, memoryview(memory.numpy()))
            exchange([link], deadline)
            answer = _answer(link, deadline)
        if "refused" in answer:
            raise CheckpointError(f"the driver did not take the part of rank {part.rank} of step {part.now.step}: {answer['refused']}")

    def _window(self, step: int, nbytes: int, kept: int) -> Window:
        """One of two windows for the state of a step: the one without the last whole state, which the driver may still read."""
        assert self._windows is not None
        free = [held for held in self._windows if held != kept]
        window = self._windows.pop(free[0]) if len(self._windows) == 2 else None
        if window is None or window.nbytes < nbytes:
            window = None  # lets go of the smaller one first
            try:
                if nbytes > (room := available()):
                    raise MemoryError(f"{room} are free")
                window = Window(nbytes)
            except (MemoryError, OSError) as error:
                raise CheckpointError(f"a part of the state takes {nbytes} bytes of memory beside the training: {error}") from error
        self._windows[step] = window
        return window

    def close(self) -> None:
        self._closed.set()
        if self._rank >= 0:
            self._tell({"bye": self._rank})
        with self._lock:
            self._hang_up()
            for window in (self._windows or {}).values():
                window.close()
            self._windows = None

    def _live(self, every: float) -> None:
        while not self._closed.wait(every) and self._link is not None:
            self._tell({"alive": self._rank})

    def _tell(self, event: Event) -> None:
        with self._lock:
            if self._link is None:
                return
            try:
                self._link.tell(event, _PATIENCE)
            except WireError as error:  # the line is too long, and nothing was sent of it
                _LOG.info("a line of history was dropped: %s", error)
            except BigDLError:
                self._hang_up()

    def _hang_up(self) -> None:
        if self._link is not None:
            self._link.close()
            self._link = None


def _answer(link: Link, deadline: float) -> Event:
    """What the driver says in the end: "wait" only says that it lives."""
    while "wait" in (answer := link.hear(deadline)):
        pass
    return answer


def _fill(memory: Tensor, pieces: Iterable[bytes | memoryview]) -> None:
    at, room = 0, memoryview(memory.numpy())
    for piece in pieces:
        room[at : at + len(piece)] = piece
        at += len(piece)
    assert at == len(room)
