"""Where training begins, or what a model has learnt, on its way from the driver to the executors.

    route       bytes                                             for
    memory      stay where they are; executors map them           master = local[...]: one machine, one user
    broadcast   pieces of 64 MB, each a Spark broadcast           any cluster; through Spark Connect see cluster.py

One broadcast of everything would stand in the JVM's heap in one piece; pieces can go to disk. A weight is copied once on
an executor, from the piece to where it is wanted, and the piece is let go.
"""

from __future__ import annotations

import contextlib
import math
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bigdl_lite.algorithms import State
from bigdl_lite.comm.window import Look, Window, available, look
from bigdl_lite.engine.cluster import Cluster
from bigdl_lite.engine.recipe import Resume, Start
from bigdl_lite.errors import PeerLost
from bigdl_lite.wire.codec import on_bytes

_PIECE = 1 << 26
_ALIGN = 64
_SMALL = 1 << 20  # bytes
_CONSTANT, _STATE = "constant.", "state."


@dataclass(frozen=True)
class _Place:
    """One tensor in the bytes: [start, start + nbytes)."""

    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass
class Shipped:
    """Send it on the driver, read it in a task, drop it on the driver when no task needs it any more."""

    places: dict[str, _Place]
    nbytes: int
    address: str
    pieces: list[Any]
    key: str  # unique to this value, for caches on executors
    application: str
    resume: Resume | None = None  # without its tensors, which travel as the weights do
    _window: list[Window] = field(default_factory=list, repr=False)

    @staticmethod
    def send(cluster: Cluster, start: Start, may_map: bool = False) -> Shipped:
        """may_map: whether tasks may look at this process's memory; they must have ended before drop()."""
        tensors = {"weights": start.weights, "buffers": start.buffers, **{_CONSTANT + k: x for k, x in start.constants.items()}}
        resume = start.resume
        if resume is not None:
            tensors |= {_STATE + k: x for k, x in resume.state.tensors.items()}
            resume = replace(resume, state=State({}, resume.state.facts))
        places, at = {}, 0
        for name, x in tensors.items():
            places[name] = _Place(at, tuple(x.shape), x.dtype)
            at = -(-(at + places[name].nbytes) // _ALIGN) * _ALIGN
        made = Shipped(places, at, "", [], uuid.uuid4().hex, cluster.key, resume)
        window = mappable(cluster, at) if may_map else None
        if window is not None:
            for name, x in tensors.items():
                place = places[name]
                window.values(place.dtype, x.numel(), place.start).copy_(x.reshape(-1))
            made._window.append(window)
            made.address = window.address
        else:
            made.pieces = cluster.send(_cut(tensors, at))
        return made

    def read(self, weights: Tensor | None = None) -> Start:
        """weights [n], on any device, is filled where it is given; without it Start.weights is empty.

        The constants, and the state to go on from, may lie in memory that is shared and must not be written to.
        """
        source = look(self.address) if self.address else None
        if self.address and source is None:
            raise PeerLost("the driver's memory cannot be seen from this worker; are they in one container?")
        found = {}
        for name, place in self.places.items():
            into = weights if name == "weights" else None
            if name == "weights" and weights is None:
                continue
            found[name] = self._tensor(place, source, into)
        constants, state = (
            {name.removeprefix(prefix): x for name, x in found.items() if name.startswith(prefix)} for prefix in (_CONSTANT, _STATE)
        )
        resume = self.resume and replace(self.resume, state=State(state, self.resume.state.facts))
        weights = found.get("weights", torch.empty(0, dtype=self.places["weights"].dtype))
        return Start(weights, found["buffers"], constants, resume)

    def _tensor(self, place: _Place, source: Look | None, into: Tensor | None) -> Tensor:
        if source is not None:
            seen = source.values(place.dtype, math.prod(place.shape), place.start).view(place.shape)
            if into is not None:
                return into.copy_(seen)
            return seen if place.nbytes > _SMALL else seen.clone()  # what is kept keeps all of the memory mapped
        made = torch.empty(place.shape, dtype=place.dtype) if into is None else into
        flat, at, width = made.view(-1), 0, place.dtype.itemsize
        while at < len(flat):  # borders of pieces are multiples of every width, and so are starts
            number, inside = divmod(place.start + at * width, _PIECE)
            count = min(len(flat) - at, (_PIECE - inside) // width)
            flat[at : at + count].copy_(_values(self.pieces[number], inside, count, place.dtype))
            at += count
        return made

    def drop(self) -> None:
        for window in self._window:
            window.close()
        for piece in self.pieces:
            with contextlib.suppress(Exception):  # nothing to free after the session has ended
                piece.destroy()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_window": []}


def mappable(cluster: Cluster, nbytes: int) -> Window | None:
    """Memory of the driver that every task can map; None where tasks may run elsewhere, or where memory is short.

    Not with Spark's encryption, which asks that nothing moves past it.
    """
    if not cluster.beside or cluster.encrypts or 2 * nbytes > available():
        return None
    try:
        return Window(nbytes)
    except (OSError, MemoryError):
        return None


def _cut(tensors: dict[str, Tensor], nbytes: int) -> Iterator[bytes]:
    """All tensors as one row of bytes, each at a multiple of _ALIGN, in pieces of _PIECE."""
    piece = bytearray()
    for x in tensors.values():
        data = memoryview(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()) if x.numel() else memoryview(b"")
        at = 0
        while at < len(data):
            taken = min(_PIECE - len(piece), len(data) - at)
            piece += data[at : at + taken]
            at += taken
            if len(piece) == _PIECE:
                yield bytes(piece)
                piece = bytearray()
        piece += bytes(-len(data) % _ALIGN)
        if len(piece) == _PIECE:
            yield bytes(piece)
            piece = bytearray()
    if piece:
        yield bytes(piece)


def _values(piece: Any, start: int, count: int, dtype: torch.dtype) -> Tensor:
    """On the bytes of one broadcast, which this process does not keep."""
    path = getattr(piece, "_path", None)
    data = piece.load_from_path(path) if path and not hasattr(piece, "_value") else piece.value
    return on_bytes(data, dtype, count, start)
