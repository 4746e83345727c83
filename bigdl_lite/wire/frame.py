"""A frame: what kind of thing these bytes are, whose, of which round, and how long; then the bytes.

    magic 4 | kind 1 | codec tag 1 | rank 4 | slice 4 | round 8 | weight 8 | values 8 | payload length 8 | payload

Fixed little-endian header, lengths checked before anything is touched; nothing is ever unpickled.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from typing import Any

from bigdl_lite.errors import WireError

PIECE, SIDE, ERROR, MISS, COMBINED, BLIND, EARLY, SUMS = 1, 2, 3, 4, 5, 7, 8, 9
_KINDS = {PIECE, SIDE, ERROR, MISS, COMBINED, BLIND, EARLY, SUMS}
_MAGIC = b"BdL1"
_HEADER = struct.Struct("<4sBBiiqdqq")
HEADER_BYTES = _HEADER.size


@dataclass(frozen=True)
class Frame:
    """weight is the number of rows behind the payload; values the length of the vector that it encodes."""

    kind: int
    rank: int
    slice: int
    round: int
    weight: float
    values: int
    payload: bytes | memoryview
    codec: int = 0

    def parts(self) -> tuple[bytes, bytes | memoryview]:
        """Header and payload, for writers that can take two buffers and save the copy."""
        head = _HEADER.pack(
            _MAGIC, self.kind, self.codec, self.rank, self.slice, self.round, self.weight, self.values, len(self.payload)
        )
        return head, self.payload

    def dumps(self) -> bytes:
        return b"".join(self.parts())

    def json(self) -> Any:
        try:
            return json.loads(bytes(self.payload))
        except (ValueError, RecursionError) as error:
            raise WireError(f"a frame of kind {self.kind} from rank {self.rank} does not hold JSON: {error}") from error


def note(kind: int, rank: int, round: int, what: Any) -> Frame:
    """A frame that carries JSON."""
    return Frame(kind, rank, 0, round, 0.0, 0, json.dumps(what).encode())


def loads(data: bytes | memoryview) -> Frame:
    """The one frame that fills `data`. Raises WireError for anything else."""
    frame, end = _read(memoryview(data), 0)
    if end != len(data):
        raise WireError(f"{len(data) - end} bytes follow a frame of {end} bytes")
    return frame


def _read(view: memoryview, at: int) -> tuple[Frame, int]:
    if len(view) - at < HEADER_BYTES:
        raise WireError(f"{len(view) - at} bytes are left, a frame header takes {HEADER_BYTES}")
    magic, kind, codec, rank, slice_, round_, weight, values, length = _HEADER.unpack_from(view, at)
    if magic != _MAGIC or kind not in _KINDS:
        raise WireError(f"not a frame: starts with {bytes(view[at : at + 4])!r}, kind {kind}")
    start = at + HEADER_BYTES
    if length < 0 or values < 0 or start + length > len(view):
        raise WireError(f"a frame claims {length} bytes of payload and {values} values, {len(view) - start} bytes are left")
    return Frame(kind, rank, slice_, round_, weight, values, view[start : start + length], codec), start + length
