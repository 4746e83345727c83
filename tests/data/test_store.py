"""A share on local disk comes back as it was, or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bigdl_lite.batch import Batch
from bigdl_lite.data.store import load, save

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


def same(a: Batch, b: Batch) -> bool:
    pairs = zip((*a.inputs, a.target), (*b.inputs, b.target), strict=True)
    return all(x is y is None or (x.dtype == y.dtype and torch.equal(x, y)) for x, y in pairs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_share_comes_back_in_its_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    batch = Batch((torch.arange(12).view(4, 3).to(dtype),), torch.arange(4).to(dtype))
    save(tmp_path, "0", batch)
    assert same(load(tmp_path, "0"), batch)


@pytest.mark.parametrize(
    "batch",
    [
        Batch((torch.ones(3), torch.ones(3, 2, 2)), None),
        Batch((torch.ones(3, 0),), torch.ones(3)),
        Batch((torch.ones(0, 5),), torch.ones(0)),
        Batch((torch.arange(12.0).view(3, 4).T,), torch.arange(4)),
    ],
    ids=["no label", "rows of nothing", "no rows", "not contiguous"],
)
def test_shares_of_any_shape_come_back(tmp_path: Path, batch: Batch) -> None:
    save(tmp_path / "not" / "yet", "7", batch)
    assert same(load(tmp_path / "not" / "yet", "7"), batch)


def test_a_share_that_is_not_there_is_none(tmp_path: Path) -> None:
    assert load(tmp_path, "0") is None and load(tmp_path / "nowhere", "0") is None


def test_the_first_of_two_writers_wins_and_the_second_leaves_nothing(tmp_path: Path) -> None:
    first, second = Batch((torch.ones(2),), None), Batch((torch.zeros(2),), None)
    save(tmp_path, "0", first)
    save(tmp_path, "0", second)
    assert same(load(tmp_path, "0"), first) and [p.name for p in tmp_path.iterdir()] == ["0"]


def test_a_share_that_could_not_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, "0", Batch((torch.ones(2),), None))
    assert list(tmp_path.iterdir()) == [] and load(tmp_path, "0") is None


def test_writing_into_a_loaded_share_does_not_reach_the_disk(tmp_path: Path) -> None:
    save(tmp_path, "0", Batch((torch.ones(2),), None))
    load(tmp_path, "0").inputs[0].zero_()
    assert load(tmp_path, "0").inputs[0].tolist() == [1, 1]


def test_a_loaded_share_is_mapped_and_not_read(tmp_path: Path) -> None:
    save(tmp_path, "mapped", Batch((torch.ones(5000),), None))
    batch = load(tmp_path, "mapped")
    assert "mapped/0.raw" in Path("/proc/self/maps").read_text() and batch.rows == 5000


def test_what_is_on_disk_is_json_and_plain_numbers(tmp_path: Path) -> None:
    save(tmp_path, "0", Batch((torch.tensor([1.0, -2.0]),), None))
    assert (tmp_path / "0" / "0.raw").read_bytes().hex() == "0000803f000000c0"
    assert json.loads((tmp_path / "0" / "meta.json").read_text())["inputs"] == 1


def test_a_truncated_column_is_not_taken_for_a_share(tmp_path: Path) -> None:
    save(tmp_path, "0", Batch((torch.ones(2000),), None))
    (tmp_path / "0" / "0.raw").write_bytes(b"\0" * 10)
    with pytest.raises(ValueError):
        load(tmp_path, "0")
