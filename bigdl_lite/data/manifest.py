"""The two files of a checkpoint as bytes: a manifest of strict JSON that proves itself whole, and tensors as safetensors.

    {"bigdl_lite": "checkpoint", "sha256": <of all below>, "nbytes": <of all below>,        this line stays for ever
     "format": 1, "version": "0.1.0", ...}                                                  one key a line

The length tells a truncated file from a damaged one; the format is looked at only when the bytes are whole, so that a file of
another version is not mistaken for a damaged one. Nothing here unpickles, and no name in a file is looked up in Python.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from bigdl_lite.errors import CheckpointError

FORMAT = 1
VERSION = sys.modules[__name__.partition(".")[0]].__version__  # of the package, without a way up to it
MOST = 1 << 26  # bytes of a manifest

_FEW = 1024  # values of a tensor that may stand in JSON
_DEEP = 50
_TAG = "~"
_HEAD = re.compile(rb'\{"bigdl_lite": "checkpoint", "sha256": "([0-9a-f]{64})", "nbytes": (\d{1,12}),\n')
_DTYPES = {  # as safetensors calls them
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_TAGS = {tag: dtype for dtype, tag in _DTYPES.items()}


def encode(body: Mapping[str, Any]) -> bytes:
    """A manifest; body is what json.dumps takes, without nan and inf (see to_json)."""
    lines = ",\n ".join(f"{json.dumps(key)}: {json.dumps(value, allow_nan=False)}" for key, value in body.items())
    rest = f" {lines}}}\n".encode()
    head = f'{{"bigdl_lite": "checkpoint", "sha256": "{hashlib.sha256(rest).hexdigest()}", "nbytes": {len(rest)},\n'
    if len(rest) > MOST - len(head):
        raise CheckpointError(f"the manifest has {len(rest)} bytes, at most {MOST}: what is large in `facts` belongs in `tensors`")
    return head.encode() + rest


def decode(data: bytes, path: str, way: str) -> dict[str, Any]:
    """The body of a manifest that is whole and of our format.

    path, way  where it was read and what the user can do instead, for the CheckpointError
    """
    head = _HEAD.match(data)
    if head is None:
        what = "does not begin as a checkpoint of bigdl_lite does" if data else "is empty"
        raise CheckpointError(f"{path} {what}: it is foreign or damaged; {way}")
    rest, nbytes, digest = data[head.end() :], int(head[2]), head[1].decode()
    check_length(len(data), head.end() + nbytes, path, way)
    check_digest(hashlib.sha256(rest).hexdigest(), digest, path, way)
    try:
        body: dict[str, Any] = json.loads(b"{" + rest)
        found, version = body["format"], body["version"]
    except (ValueError, KeyError, RecursionError) as error:
        raise CheckpointError(f"{path} is no checkpoint that bigdl_lite wrote: {type(error).__name__}: {error}; {way}") from error
    if found != FORMAT:
        age = "a newer" if isinstance(found, int) and found > FORMAT else "an older"
        raise CheckpointError(
            f"{path} was written by {age} bigdl_lite, {version}, in format {found}; this is {VERSION}, which reads format {FORMAT}: "
            f"go on with bigdl_lite {version}, or begin anew under another run"
        )
    return body


def check_length(found: int, written: int, path: str, way: str) -> None:
    if found != written:
        kind = "truncated" if found < written else "too long"
        raise CheckpointError(f"{path} is {kind}: it has {found} bytes where {written} were written; {way}")


def check_digest(found: str, written: str, path: str, way: str) -> None:
    if found != written:
        raise CheckpointError(f"{path} is damaged: its sha256 is {found[:12]}... where {written[:12]}... was written; {way}")


def pack(tensors: Mapping[str, Tensor]) -> tuple[int, Iterator[bytes | memoryview]]:
    """The length of the safetensors file of these tensors, and its bytes in parts that share the tensors' memory.

    safetensors.torch.save makes the same file as one object, after two copies: 1.9 s and 572 MB for 300 MB of tensors.
    """
    header: dict[str, Any] = {}
    placed, at = [], 0
    for name, x in sorted(tensors.items(), key=lambda item: -item[1].itemsize):  # so that every tensor is aligned
        if x.dtype not in _DTYPES or x.layout != torch.strided or name == "__metadata__":
            raise CheckpointError(f"tensor {name!r} ({x.dtype}, {x.layout}) cannot be held in a checkpoint; store it in another form")
        nbytes = x.numel() * x.itemsize
        header[name] = {"dtype": _DTYPES[x.dtype], "shape": list(x.shape), "data_offsets": [at, at + nbytes]}
        placed += [x] if nbytes else []
        at += nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    def parts() -> Iterator[bytes | memoryview]:
        yield len(text).to_bytes(8, "little") + text
        for x in placed:
            yield memoryview(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())

    return 8 + len(text) + at, parts()


def unpack(memory: Tensor) -> dict[str, Tensor]:
    """The tensors of a safetensors file that lies in memory [nbytes] uint8, on that memory. Raises ValueError where it is none."""
    start = 8 + int.from_bytes(bytes(memory[:8].tolist()), "little")
    if not 8 < start <= len(memory):
        raise ValueError(f"a header of {start - 8} bytes in {len(memory)}")
    tensors = {}
    try:
        for name, told in json.loads(memory[8:start].numpy().tobytes()).items():
            first, last = (start + int(x) for x in told["data_offsets"])
            if not start <= first <= last <= len(memory):
                raise ValueError(f"tensor {name!r} lies outside")
            tensors[name] = memory[first:last].view(_TAGS[told["dtype"]]).reshape(told["shape"])
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:  # JSON, but of something else
        raise ValueError(f"a header that is none of safetensors: {type(error).__name__}: {error}") from error
    return tensors


def to_json(value: Any, name: str = "facts") -> Any:
    """A value of plain Python as strict JSON, which from_json gives back in its types, to the bit.

    Takes None, bool, int, float, str, list, tuple, dict with any plain keys, Counter, and tensors of up to 1024 values: what
    state_dict() of torch's schedulers holds. Raises CheckpointError with the path of whatever else it meets.
    """
    if name.count("[") > _DEEP:
        raise CheckpointError(f"{name[:80]}... is nested too deeply for a checkpoint; does it hold itself?")
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {_TAG: "float", "of": repr(float(value))}
    kind = type(value)
    if kind in (list, tuple):
        of = [to_json(x, f"{name}[{i}]") for i, x in enumerate(value)]
        return of if kind is list else {_TAG: "tuple", "of": of}
    if kind is dict and _TAG not in value and all(type(key) is str for key in value):
        return {key: to_json(x, f"{name}[{key!r}]") for key, x in value.items()}
    if kind in (dict, Counter):
        of = [[to_json(key, f"{name}[key {key!r}]"), to_json(x, f"{name}[{key!r}]")] for key, x in value.items()]
        return {_TAG: kind.__name__, "of": of}
    if isinstance(value, Tensor) and value.dtype in _DTYPES and value.numel() <= _FEW:
        of = to_json(value.detach().reshape(-1).tolist(), name)
        return {_TAG: "tensor", "dtype": _DTYPES[value.dtype], "shape": list(value.shape), "of": of}
    what = f"a tensor {list(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else f"a {kind.__qualname__}"
    raise CheckpointError(f"{name} is {what}, which a checkpoint cannot hold; it holds numbers, text, lists, tuples and dicts of them")


def from_json(told: Any) -> Any:
    """What to_json was given."""
    if isinstance(told, list):
        return [from_json(x) for x in told]
    if not isinstance(told, dict):
        return told
    if _TAG not in told:
        return {key: from_json(x) for key, x in told.items()}
    kind, of = told[_TAG], from_json(told["of"])
    if kind == "float":
        return float(of)
    if kind == "tuple":
        return tuple(of)
    if kind == "dict":
        return dict(of)
    if kind == "Counter":
        return Counter(dict(of))
    if kind == "tensor":
        return torch.tensor(of, dtype=_TAGS[told["dtype"]]).reshape(told["shape"])
    raise ValueError(f"{kind!r} is no kind of value that a checkpoint holds")
