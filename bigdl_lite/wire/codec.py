"""Codecs: how a flat vector becomes bytes.

A codec is a frozen value. It says beforehand how long its encoding will be, and which values it encodes together.
Which exchanges a step makes is another question, and lives elsewhere (comm/comm.py, algorithms/exchange.py).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from bigdl_lite.errors import RecipeError, WireError


class Codec(Protocol):
    """x [n] float32  <->  bytes.  Deterministic: a retried task sends the same bytes.

    tag    written on the wire: never reused, never renumbered. 255 is for codecs of users
    group  values that are encoded together: a vector may be cut at multiples of it. 1: anywhere; 0: nowhere
    at     the codec for one vector: seed is that of the step, the same on all ranks; rank that of the sender (-1: of a sum);
           first the place of x[0] in the flat vector. Only codecs with random numbers need it: made_for() asks

    encode and decode are given at least one value; decode returns memory of its own (Raw alone may return a view).
    A class without tag, group or at has 255, 0 and itself. `contracts` (True where it is not there) says whether what is lost of a
    vector is shorter than the vector, which error feedback needs.
    """

    tag: ClassVar[int]

    def encode(self, x: Tensor) -> bytes | memoryview: ...

    def decode(self, data: bytes | memoryview, n: int) -> Tensor: ...

    def nbytes(self, n: int) -> int: ...


def group_of(codec: Codec) -> int:
    return int(getattr(codec, "group", 0))


def made_for(codec: Codec, seed: int, rank: int, first: int) -> Codec:
    """The codec with the random numbers of this step, sender and place, where it uses any."""
    make = getattr(codec, "at", None)
    return make(seed, rank, first) if make else codec


def length(codec: Codec, n: int) -> int:
    """Bytes of n values; a codec is never asked for none."""
    return codec.nbytes(n) if n else 0


def encoded(codec: Codec, x: Tensor) -> bytes | memoryview:
    """x [n] in the bytes that were promised. Raises RecipeError where the codec makes another number of them."""
    if not len(x):
        return b""
    data = codec.encode(x)
    if len(data) != codec.nbytes(len(x)):
        raise RecipeError(
            f"{codec!r} promises {codec.nbytes(len(x))} bytes for {len(x)} values (nbytes) and makes {len(data)} of them (encode)"
        )
    return data


def decoded(codec: Codec, data: bytes | memoryview, n: int, own: bool = True) -> Tensor:
    """[n], in memory of its own unless `own` is False. Raises RecipeError where the codec makes something else of them."""
    if not n:
        return torch.empty(0, dtype=getattr(codec, "dtype", torch.float32))
    x = codec.decode(data, n)
    if isinstance(codec, Raw):
        return x.clone() if own else x
    if x.shape != (n,) or x.dtype != torch.float32:
        raise RecipeError(f"{codec!r} decodes {list(x.shape)} of {x.dtype}, must be [{n}] of torch.float32")
    return x


def on_bytes(data: bytes | memoryview, dtype: torch.dtype, count: int = -1, offset: int = 0) -> Tensor:
    """A tensor on bytes that must not be written to: only to be copied from, so torch's warning of that is not wanted."""
    if not len(data) or not count:
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
    group: ClassVar[int] = 1
    dtype: torch.dtype = torch.float32

    def encode(self, x: Tensor) -> memoryview:
        return memoryview(x.detach().contiguous().view(torch.uint8).numpy())

    def decode(self, data: bytes | memoryview, n: int) -> Tensor:
        _check(self, data, n)
        return on_bytes(data, self.dtype, n)

    def nbytes(self, n: int) -> int:
        return n * self.dtype.itemsize


@dataclass(frozen=True)
class BFloat16:
    """Rounded to bfloat16 (8 bits of mantissa), summed in float32 after decoding.  [n] <-> 2 n bytes."""

    tag: ClassVar[int] = 1
    group: ClassVar[int] = 1

    def encode(self, x: Tensor) -> memoryview:
        return memoryview(x.detach().to(torch.bfloat16).view(torch.uint8).numpy())

    def decode(self, data: bytes | memoryview, n: int) -> Tensor:
        _check(self, data, n)
        return on_bytes(data, torch.bfloat16, n).float()

    def nbytes(self, n: int) -> int:
        return 2 * n


@dataclass(frozen=True)
class Float16:
    """Rounded to IEEE half precision (11 bits of mantissa), summed in float32 after decoding.  [n] <-> 2 n bytes.

    Error of a value: 2^-11 of it, but 2^-25 below 2^-14. Beyond 65504 it saturates; infinity and NaN stay what they are.
    """

    tag: ClassVar[int] = 2
    group: ClassVar[int] = 1

    def encode(self, x: Tensor) -> memoryview:
        x = x.detach()
        half = x.to(torch.float16)
        over = half.isinf()
        if over.any():
            half = torch.where(over & x.isfinite(), x.sign().mul(65504.0).to(torch.float16), half)
        return memoryview(half.contiguous().view(torch.uint8).numpy())

    def decode(self, data: bytes | memoryview, n: int) -> Tensor:
        _check(self, data, n)
        return on_bytes(data, torch.float16, n).float()

    def nbytes(self, n: int) -> int:
        return 2 * n
