"""Codecs: how a flat vector becomes bytes.

A codec is a frozen value. It says beforehand how long its encoding will be, and whether encoded forms may be summed.
Which exchanges a step makes is another question, and lives elsewhere.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from bigdl_lite.errors import WireError


class Codec(Protocol):
    """x [n] float32  <->  bytes.  `tag` is written on the wire: never reused, never renumbered."""

    tag: ClassVar[int]
    linear: ClassVar[bool]

    def encode(self, x: Tensor) -> bytes | memoryview: ...

    def decode(self, data: bytes | memoryview, n: int) -> Tensor: ...

    def nbytes(self, n: int) -> int: ...


def on_bytes(data: bytes, dtype: torch.dtype, count: int = -1, offset: int = 0) -> Tensor:
    """A tensor on bytes that must not be written to: only to be copied from, so torch's warning of that is not wanted."""
    if not data or not count:
        return torch.empty(0, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.frombuffer(data, dtype=dtype, count=count, offset=offset)


def _check(codec: Codec, data: bytes | memoryview, n: int) -> None:
    if len(data) != codec.nbytes(n):
        raise WireError(f"{codec!r}: {n} values take {codec.nbytes(n)} bytes, got {len(data)}")


@dataclass(frozen=True)
class Raw:
    """The values as they are, little-endian.  [n] <-> n itemsize bytes.  encode and decode copy nothing."""

    tag: ClassVar[int] = 0
    linear: ClassVar[bool] = True
    dtype: torch.dtype = torch.float32

    def encode(self, x: Tensor) -> memoryview:
        return memoryview(x.detach().contiguous().view(torch.uint8).numpy())

    def decode(self, data: bytes | memoryview, n: int) -> Tensor:
        _check(self, data, n)
        return torch.frombuffer(data, dtype=self.dtype, count=n) if n else torch.empty(0, dtype=self.dtype)

    def nbytes(self, n: int) -> int:
        return n * self.dtype.itemsize


@dataclass(frozen=True)
class BFloat16:
    """Rounded to bfloat16 (8 bits of mantissa), summed in float32 after decoding.  [n] <-> 2 n bytes."""

    tag: ClassVar[int] = 1
    linear: ClassVar[bool] = False

    def encode(self, x: Tensor) -> memoryview:
        return memoryview(x.detach().to(torch.bfloat16).view(torch.uint8).numpy())

    def decode(self, data: bytes | memoryview, n: int) -> Tensor:
        _check(self, data, n)
        return torch.frombuffer(data, dtype=torch.bfloat16, count=n).float() if n else torch.empty(0)

    def nbytes(self, n: int) -> int:
        return 2 * n
