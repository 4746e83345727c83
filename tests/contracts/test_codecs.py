"""What every codec keeps: its length is known beforehand, and values come back within its bound.

A new codec is one more row of CODECS.
"""

from __future__ import annotations

import inspect
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from bigdl_lite.errors import WireError
from bigdl_lite.wire import codec as module
from bigdl_lite.wire.codec import BFloat16, Raw

# codec, dtype of the vectors it takes, largest relative error of one value
CODECS = [
    (Raw(), torch.float32, 0.0),
    (Raw(torch.float64), torch.float64, 0.0),
    (Raw(torch.bfloat16), torch.bfloat16, 0.0),
    (BFloat16(), torch.float32, 2.0**-8),
]
LENGTHS = [0, 1, 7, 8, 9, 1000]

every_codec = pytest.mark.parametrize(("codec", "dtype", "bound"), CODECS, ids=lambda x: repr(x))
every_length = pytest.mark.parametrize("n", LENGTHS)


def sample(n: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """n values of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=generator) * 10.0 ** torch.randint(-20, 20, (n,), generator=generator)
    return x.to(dtype)


def wired(codec: Any, x: Tensor) -> bytearray:
    """The encoding as it comes off a wire."""
    return bytearray(codec.encode(x))


def near(a: Tensor, b: Tensor, bound: float) -> bool:
    return bool(((a - b).abs() <= bound * b.abs()).all())


@every_codec
@every_length
def test_an_encoding_is_as_long_as_promised(codec: Any, dtype: torch.dtype, bound: float, n: int) -> None:
    assert len(wired(codec, sample(n, dtype))) == codec.nbytes(n)


@every_codec
@every_length
def test_values_come_back_within_the_bound(codec: Any, dtype: torch.dtype, bound: float, n: int) -> None:
    x = sample(n, dtype)
    back = codec.decode(wired(codec, x), n)
    assert back.shape == (n,) and back.dtype == dtype and near(back, x, bound)


@every_codec
def test_encoding_is_deterministic_and_leaves_the_vector_alone(codec: Any, dtype: torch.dtype, bound: float) -> None:
    x = sample(100, dtype)
    before = x.clone()
    assert wired(codec, x) == wired(codec, x) and torch.equal(x, before)


@every_codec
def test_a_strided_or_trainable_vector_is_encoded_by_its_values(codec: Any, dtype: torch.dtype, bound: float) -> None:
    x = sample(60, dtype)
    assert wired(codec, x[::3]) == wired(codec, x[::3].clone())
    assert wired(codec, x.clone().requires_grad_()) == wired(codec, x)


@every_codec
@pytest.mark.parametrize("wrong", [-1, 1, 100])
def test_bytes_of_a_foreign_length_are_refused(codec: Any, dtype: torch.dtype, bound: float, wrong: int) -> None:
    data = (wired(codec, sample(9, dtype)) + bytes(100))[: codec.nbytes(9) + wrong]
    with pytest.raises(WireError, match=rf"9 values take {codec.nbytes(9)} bytes, got {len(data)}"):
        codec.decode(data, 9)


@every_codec
def test_nothing_decodes_from_nothing_and_only_from_nothing(codec: Any, dtype: torch.dtype, bound: float) -> None:
    assert len(codec.decode(b"", 0)) == 0
    with pytest.raises(WireError):
        codec.decode(b"x", 0)


@pytest.mark.parametrize(("codec", "dtype", "bound"), [row for row in CODECS if row[0].linear], ids=lambda x: repr(x))
def test_a_linear_codec_may_be_summed_after_encoding(codec: Any, dtype: torch.dtype, bound: float) -> None:
    a, b = sample(50, dtype, 1), sample(50, dtype, 2)
    summed = codec.decode(wired(codec, a), 50) + codec.decode(wired(codec, b), 50)
    assert near(codec.decode(wired(codec, a + b), 50), summed, bound)


@every_codec
def test_infinity_and_nan_survive_so_that_divergence_is_seen(codec: Any, dtype: torch.dtype, bound: float) -> None:
    back = codec.decode(wired(codec, torch.tensor([float("inf"), float("-inf"), float("nan")], dtype=dtype)), 3)
    assert back[0] == float("inf") and back[1] == float("-inf") and torch.isnan(back[2])


@every_codec
def test_a_codec_is_a_value_that_pickles_and_compares(codec: Any, dtype: torch.dtype, bound: float) -> None:
    assert pickle.loads(pickle.dumps(codec)) == codec and hash(codec) == hash(pickle.loads(pickle.dumps(codec)))


def test_every_codec_of_the_module_is_in_this_suite_and_no_two_share_a_tag() -> None:
    kinds = [
        kind for _, kind in inspect.getmembers(module, inspect.isclass)
        if kind.__module__ == module.__name__ and kind is not module.Codec
    ]  # fmt: skip
    assert set(kinds) == {type(codec) for codec, *_ in CODECS}
    tags = [kind.tag for kind in kinds]
    assert len(set(tags)) == len(tags) and all(0 <= tag < 256 for tag in tags)


def test_tags_never_change() -> None:
    assert (Raw.tag, BFloat16.tag) == (0, 1)


def test_known_bytes() -> None:
    assert bytes(Raw().encode(torch.tensor([1.0, -2.0]))).hex() == "0000803f000000c0"
    assert bytes(BFloat16().encode(torch.tensor([1.0, -2.0]))).hex() == "803f00c0"


def test_raw_copies_nothing() -> None:
    x = torch.zeros(4)
    view = Raw().encode(x)
    x[0] = 1.0
    assert bytes(view)[:4].hex() == "0000803f"
    data = bytearray(16)
    Raw().decode(data, 4)[0] = 1.0
    assert data[:4].hex() == "0000803f"
