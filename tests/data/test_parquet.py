"""Rows of Parquet files by number: the same values as the whole file has in those places."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from bigdl_lite.data.arrow import share
from bigdl_lite.data.columns import Column, Columns
from bigdl_lite.data.parquet import FILE, INDEX, fetch, local_path, plain
from bigdl_lite.errors import DataError

N = 30_000


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two files of 30,000 rows in row groups of 7,000: a, b float; list [3] double; id long, the row's number over both."""
    folder = tmp_path_factory.mktemp("with a space, and ü")
    paths, rng = [], np.random.default_rng(0)
    for k in range(2):
        x = rng.standard_normal((3, N))
        table = pa.table({
            "a": pa.array(x[0].astype("f4")), "b": pa.array(x[1].astype("f4")),
            "list": pa.ListArray.from_arrays(np.arange(0, 3 * N + 1, 3, dtype="i4"), pa.array(rng.standard_normal(3 * N))),
            "id": pa.array(np.arange(N) + k * N), "unread": pa.array(["x"] * N),
        })  # fmt: skip
        pq.write_table(table, folder / f"{k}.parquet", row_group_size=7000)
        paths.append(folder / f"{k}.parquet")
    return paths


INPUTS = Column("a to b", torch.float32, members=("b", "a")), Column("list", torch.float32)
COLUMNS = Columns(INPUTS, Column("id", torch.int64), None, True)


def wanted(path, rows):
    rows = np.asarray(rows, "i8")
    return pa.RecordBatch.from_arrays([pa.array([path.as_uri()] * len(rows), pa.string()), pa.array(rows)], [FILE, INDEX])


def expected(path, rows):
    table = pq.read_table(path).take(pa.array(np.asarray(rows, "i8")))
    both = np.stack([table.column("b").to_numpy(), table.column("a").to_numpy()], 1)
    return both, np.array(table.column("list").to_pylist(), "f4").reshape(-1, 3), table.column("id").to_numpy()


ORDERS = {
    "all": lambda rng: [np.arange(i, min(i + 10_000, N)) for i in range(0, N, 10_000)],
    "few": lambda rng: [np.array([0]), np.array([6_999, 7_000, 13_999]), np.array([N - 1])],
    "every third": lambda rng: [np.arange(0, N, 3)],
    "gaps over row groups": lambda rng: [np.array([5, 21_000, 21_001, 28_001])],
    "backwards": lambda rng: [np.array([25_000, 24_999, 3, 3, 9_000])],
    "any": lambda rng: [rng.integers(0, N, 50) for _ in range(3)],
    "none, then some": lambda rng: [np.array([], "i8"), np.array([7])],
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_rows_come_as_they_were_asked_for(files, order) -> None:
    batches = order(np.random.default_rng(1))
    got = share([wanted(files[0], rows) for rows in batches], COLUMNS, 0)
    both, lists, ids = expected(files[0], np.concatenate(batches))
    np.testing.assert_array_equal(got.inputs[0].numpy(), both)
    np.testing.assert_array_equal(got.inputs[1].numpy(), lists)
    np.testing.assert_array_equal(got.target.numpy(), ids)


def test_a_batch_may_name_several_files(files) -> None:
    parts = [wanted(files[1], [3, 4]), wanted(files[0], [8_000]), wanted(files[1], [0])]
    mixed = pa.Table.from_batches(parts).combine_chunks().to_batches()[0]
    assert share([mixed], COLUMNS, 0).target.tolist() == [N + 3, N + 4, 8_000, N]


@pytest.mark.parametrize("row", [N, 2 * N])
def test_a_row_that_is_not_there_is_an_error(files, row) -> None:
    with pytest.raises(DataError, match=rf"has {N} rows, row {row} is wanted"):
        list(fetch([wanted(files[0], [row])], COLUMNS.all))


def test_a_file_that_is_gone_is_an_error(files, tmp_path) -> None:
    with pytest.raises(DataError, match=r"gone\.parquet cannot be read"):
        list(fetch([wanted(tmp_path / "gone.parquet", [0])], COLUMNS.all))


def test_a_null_in_columns_named_together_is_told_by_its_own_name(tmp_path) -> None:
    table = pa.table({"a": pa.array([1.0, 2.0], pa.float32()), "b": pa.array([1.0, None], pa.float32())})
    pq.write_table(table, tmp_path / "x.parquet")
    columns = Columns((Column("a to b", torch.float32, members=("a", "b")),), None, None, True)
    with pytest.raises(DataError, match=r"column 'b' has 1 null"):
        share([wanted(tmp_path / "x.parquet", [0, 1])], columns, 0)


def test_only_file_uris_are_paths() -> None:
    assert local_path("file:///a%20b/c") == "/a b/c" == local_path("file:/a%20b/c")
    assert local_path("hdfs://host/a") is local_path("s3a://bucket/a") is local_path("file://host/a") is local_path("/a") is None


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (pa.float32(), "float"), (pa.int8(), "int8"), (pa.list_(pa.float64()), "list of double"), (pa.binary(), "binary"),
        (pa.large_list(pa.list_(pa.int64())), "list of list of int64"), (pa.list_(pa.bool_(), 3), "list of bool"),
        (pa.uint32(), None), (pa.float16(), None), (pa.string(), None), (pa.decimal128(5, 2), None), (pa.timestamp("us"), None),
        (pa.list_(pa.string()), None), (pa.struct([("x", pa.float32())]), None),
    ],
)  # fmt: skip
def test_types_that_spark_and_arrow_read_alike(kind, name) -> None:
    assert plain(kind) == name
