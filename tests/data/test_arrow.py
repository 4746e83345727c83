"""Columns to tensors: every type that a DataFrame can hold, and every error by column, partition and way out."""

from __future__ import annotations

import decimal
import re
import warnings
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from bigdl_lite.data.arrow import agree, nothing, shapes, share, tensor
from bigdl_lite.data.columns import Column, Columns, Raw, describe, field, require
from bigdl_lite.errors import DataError, RecipeError, UserError

F, I = torch.float32, torch.int64  # noqa: E741


def batch(**columns: pa.Array) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays(list(columns.values()), names=list(columns))


def one(array: pa.Array, floating: torch.dtype = F, decoder: Any = None, **settings: Any) -> torch.Tensor:
    """A column through the whole path: described from its schema, then turned into a tensor."""
    schema = pa.schema([("x", array.type)])
    columns = describe(schema, ["x"], None, floating, {"x": decoder} if decoder else None, **settings)
    return tensor(array, columns.inputs[0], partition=4)


NUMBERS = [pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32()]


@pytest.mark.parametrize("kind", NUMBERS, ids=str)
def test_integers_become_int64(kind: pa.DataType) -> None:
    found = one(pa.array([3, 0, 7], kind))
    assert found.dtype == torch.int64 and found.tolist() == [3, 0, 7]


@pytest.mark.parametrize("kind", [pa.float32(), pa.float64()], ids=str)
@pytest.mark.parametrize("floating", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_floats_become_the_dtype_of_the_module(kind: pa.DataType, floating: torch.dtype) -> None:
    found = one(pa.array([1.5, -2.0], kind), floating)
    assert found.dtype == floating and found.tolist() == [1.5, -2.0]


def test_booleans_become_zeros_and_ones_of_the_modules_dtype() -> None:
    found = one(pa.array([True, False, True] * 5))
    assert found.dtype == F and found.tolist() == [1.0, 0.0, 1.0] * 5


LISTS = {
    "list": pa.list_(pa.float32()),
    "large list": pa.large_list(pa.float32()),
    "fixed size list": pa.list_(pa.float32(), 2),
}


@pytest.mark.parametrize("kind", LISTS.values(), ids=LISTS)
def test_lists_of_one_length_become_rows(kind: pa.DataType) -> None:
    assert one(pa.array([[1, 2], [3, 4], [5, 6]], kind)).tolist() == [[1, 2], [3, 4], [5, 6]]


NESTED = {
    "lists of lists": pa.list_(pa.list_(pa.int32())),
    "fixed size lists in lists": pa.list_(pa.list_(pa.int32(), 2)),
    "lists in fixed size lists": pa.list_(pa.list_(pa.int32()), 3),
    "fixed size lists of fixed size lists": pa.list_(pa.list_(pa.int32(), 2), 3),
    "large lists of lists": pa.large_list(pa.list_(pa.int32())),
}


@pytest.mark.parametrize("kind", NESTED.values(), ids=NESTED)
def test_nested_lists_become_as_many_dimensions(kind: pa.DataType) -> None:
    rows = np.arange(24).reshape(4, 3, 2)
    found = one(pa.array(rows.tolist(), kind))
    assert found.dtype == I and found.shape == (4, 3, 2) and (found.numpy() == rows).all()


def test_lists_of_booleans_and_of_small_integers() -> None:
    assert one(pa.array([[True, False], [False, True]])).tolist() == [[1, 0], [0, 1]]
    assert one(pa.array([[1, 2]], pa.list_(pa.int8()))).dtype == I


# every array as a window into a longer one: Spark slices record batches, and offsets are easily forgotten
SLICED = {
    "ints": pa.array([9, 9, 1, 2, 3, 9]),
    "floats": pa.array([9.0, 9.0, 1.0, 2.0, 3.0, 9.0]),
    "booleans": pa.array([True, True, True, False, True, True]),
    "lists": pa.array([[9, 9], [9, 9], [1, 2], [3, 4], [5, 6], [9, 9]], LISTS["list"]),
    "large lists": pa.array([[9, 9], [9, 9], [1, 2], [3, 4], [5, 6], [9, 9]], LISTS["large list"]),
    "fixed size lists": pa.array([[9, 9], [9, 9], [1, 2], [3, 4], [5, 6], [9, 9]], LISTS["fixed size list"]),
    "booleans in lists": pa.array([[True] * 3, [True] * 3, [True, False, True], [False] * 3, [True] * 3, [True] * 3]),
} | {name: pa.array(np.arange(36).reshape(6, 3, 2).tolist(), kind) for name, kind in NESTED.items()}


@pytest.mark.parametrize("name", SLICED)
def test_a_slice_of_an_array_is_read_from_its_offset(name: str) -> None:
    window = SLICED[name].slice(2, 3)
    assert window.offset == 2
    assert one(window).tolist() == np.array(window.to_pylist()).tolist()
    assert one(window.slice(1, 1)).tolist() == np.array(window.to_pylist())[1:2].tolist()


def test_ragged_rows_outside_the_slice_do_no_harm() -> None:
    ragged = pa.array([[1], [1, 2], [3, 4], [5, 6, 7]], pa.list_(pa.int64()))
    assert one(ragged.slice(1, 2)).tolist() == [[1, 2], [3, 4]]


def test_nulls_outside_the_slice_do_no_harm() -> None:
    assert one(pa.array([None, 1.0, 2.0, None]).slice(1, 2)).tolist() == [1.0, 2.0]
    inner = pa.array([[None, 1.0], [1.0, 2.0]], pa.list_(pa.float32(), 2))
    assert one(inner.slice(1, 1)).tolist() == [[1.0, 2.0]]


def test_chunked_arrays_are_one_array() -> None:
    column = Column("x", F)
    assert tensor(pa.chunked_array([[1.0], [2.0, 3.0]]), column, 0).tolist() == [1, 2, 3]


@pytest.mark.parametrize("kind", [pa.int64(), pa.float32(), pa.bool_(), *LISTS.values(), *NESTED.values()], ids=str)
def test_no_rows_become_a_tensor_of_no_rows(kind: pa.DataType) -> None:
    assert len(one(pa.array([], kind))) == 0


def test_rows_of_empty_lists_keep_their_number() -> None:
    assert one(pa.array([[], [], []], pa.list_(pa.float32()))).shape == (3, 0)


def test_reading_makes_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one(pa.array([1.0, 2.0]))
        one(pa.array([[1.0, 2.0]]))
        one(pa.array([b"\0" * 8]), decoder=Raw((2,)))
        one(pa.array([b"\0" * 8]), decoder=lambda data: np.frombuffer(data, "f4"))


# ---- binary ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()], ids=str)
@pytest.mark.parametrize("dtype", ["uint8", "int16", "float32", "float64"])
def test_raw_bytes_become_arrays_of_their_shape(kind: pa.DataType, dtype: str) -> None:
    rows = np.arange(5 * 6).reshape(5, 2, 3).astype(dtype)
    array = pa.array([row.tobytes() for row in rows], kind)
    for window, expected in ((array, rows), (array.slice(2, 2), rows[2:4]), (array.slice(5), rows[5:])):
        found = one(window, decoder=Raw((2, 3), dtype))
        assert found.shape == expected.shape and (found.numpy() == expected).all()
    assert found.dtype == (F if dtype.startswith("float") else getattr(torch, dtype))


def test_a_decoders_result_is_writable_and_does_not_touch_arrow() -> None:
    array = pa.array([np.ones(2, "f4").tobytes()])
    found = one(array, decoder=Raw((2,)))
    found.zero_()
    assert np.frombuffer(array[0].as_py(), "f4").tolist() == [1, 1]


def test_raw_bytes_of_another_length_are_refused_with_both_lengths() -> None:
    with pytest.raises(DataError, match=r"'x' holds values of 5 bytes, Raw\(shape=\(2,\).* takes 8 \(partition 4\)"):
        one(pa.array([b"\0" * 8, b"\0" * 5]), decoder=Raw((2,)))


def test_a_function_decodes_bytes() -> None:
    array = pa.array([b"ab", b"cd", b"ef"])
    found = one(array.slice(1), decoder=lambda data: np.frombuffer(data, np.uint8)[::-1].astype("f4"))
    assert found.tolist() == [[100.0, 99.0], [102.0, 101.0]] and found.dtype == F


def test_a_function_whose_results_differ_in_shape_is_refused_with_both_shapes() -> None:
    with pytest.raises(DataError, match=r"decoder of column 'x' returned shapes \(1,\) and \(2,\) \(partition 4\)"):
        one(pa.array([b"a", b"bc"]), decoder=lambda data: np.frombuffer(data, np.uint8))


def test_a_function_may_return_a_number() -> None:
    assert one(pa.array([b"a", b"bc"]), decoder=lambda data: len(data)).tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    "result", [None, "text", [[1], [2, 3]], np.ones(2, "c8"), np.array([object()]), torch.ones(1, requires_grad=True)], ids=repr
)
def test_a_function_that_returns_no_numbers_is_refused(result: object) -> None:
    with pytest.raises(DataError, match=r"the decoder of column 'x' returned a \w+ .*\(partition 4\)"):
        one(pa.array([b"a"]), decoder=lambda data: result)


def test_a_function_may_return_numbers_in_the_other_order_of_bytes() -> None:
    assert one(pa.array([b"\1\2"]), decoder=lambda data: np.frombuffer(data, ">u2")).tolist() == [[258.0]]


def test_a_function_that_raises_is_the_users_own_error_and_names_the_column() -> None:
    with pytest.raises(UserError, match=r"(?s)^Traceback.*KeyError: 'mine'.*partition 4, in the decoder of column 'x'"):
        one(pa.array([b"a"]), decoder=lambda data: {}["mine"])


@pytest.mark.parametrize("dtype", ["object", "U5", "complex64", ">f4", "datetime64[s]", "f4,i4", None])
def test_bytes_of_a_dtype_that_no_tensor_has_are_refused(dtype: Any) -> None:
    with pytest.raises(RecipeError, match=r"Raw\(dtype=.*no tensor has it"):
        Raw((2,), dtype)


@pytest.mark.parametrize("shape", [3, "ab", None, (-1,), (1.5,), (None,)], ids=repr)
def test_a_shape_that_no_array_has_is_refused(shape: Any) -> None:
    with pytest.raises(RecipeError, match=r"Raw\(shape=.*is not the shape of an array"):
        Raw(shape)


def test_a_shape_and_a_dtype_are_written_in_one_way() -> None:
    assert Raw([2, np.int64(3)], np.float32) == Raw((2, 3), "f4") == Raw((2, 3))


# ---- the names that columns travel under ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x", "a b", "列", "_1", "f0 to f9 (0a1b2c3d)"])
def test_a_name_that_spark_takes_for_nothing_else_is_kept(name: str) -> None:
    assert field(name) == name


NAMES = ["a.b", "a`b", "*", "a.*", "", "${x}", "\n", "__bigdl_lite_row"]


@pytest.mark.parametrize("name", NAMES)
def test_any_other_name_is_replaced_and_stands_in_messages(name: str) -> None:
    assert field(name).isidentifier() and len({field(x) for x in NAMES}) == len(NAMES)
    columns = describe(pa.schema([(field(name), pa.float64())]), [name], None, F)
    assert share([batch(**{field(name): pa.array([1.0])})], columns, 0).inputs[0].tolist() == [1.0]
    with pytest.raises(DataError, match=re.escape(f"column {name!r} has 1 null(s)")):
        share([batch(**{field(name): pa.array([None], pa.float64())})], columns, 0)


# ---- what is refused ------------------------------------------------------------------------------------------------------


def test_nulls_are_refused_by_column_row_partition_and_way_out() -> None:
    said = r"'x' has 2 null\(s\), the first in row 11 of partition 4.*df\.na\.drop\(subset=\['x'\]\)"
    with pytest.raises(DataError, match=said):
        tensor(pa.array([1.0, None, None]), Column("x", F), 4, first_row=10)


@pytest.mark.parametrize("rows", [[[1.0, None]], [None, [1.0, 2.0]], [[1.0, 2.0], None]], ids=str)
@pytest.mark.parametrize("kind", LISTS.values(), ids=LISTS)
def test_nulls_in_and_among_lists_are_refused(rows: list[Any], kind: pa.DataType) -> None:
    with pytest.raises(DataError, match=r"column 'x' has 1 null\(s\).*partition 4"):
        one(pa.array(rows, kind))


def test_nulls_inside_nested_lists_are_refused() -> None:
    for rows in ([[[1, None]]], [[[1, 2], None]]):
        with pytest.raises(DataError, match=r"'x' has 1 null\(s\) inside its arrays \(partition 4\)"):
            one(pa.array(rows, NESTED["lists of lists"]))


def test_nulls_in_binary_are_refused() -> None:
    with pytest.raises(DataError, match="'x' has 1 null"):
        one(pa.array([b"\0" * 8, None]), decoder=Raw((2,)))


@pytest.mark.parametrize("rows", [[[1, 2], [3]], [[[1], [2]], [[3], [4, 5]]], [[[1]], [[1], [2]]]], ids=str)
def test_ragged_rows_are_refused_with_both_lengths(rows: list[Any]) -> None:
    with pytest.raises(DataError, match=r"'x' holds arrays of 1 and 2 values \(partition 4\); all rows need one length"):
        one(pa.array(rows))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_refused_by_row(bad: float) -> None:
    with pytest.raises(DataError, match=r"'x' has NaN or infinity in 1 row\(s\), the first in row 1 of partition 4"):
        one(pa.array([[1.0, 2.0], [3.0, bad]]))
    with pytest.raises(DataError, match="the first in row 12"):
        tensor(pa.array([1.0, 2.0, bad]), Column("x", F), 4, first_row=10)


def test_a_value_beyond_the_modules_dtype_is_refused_and_not_made_infinite() -> None:
    with pytest.raises(DataError, match="'x'"):
        one(pa.array([1.0, 1e300]))


def test_a_whole_number_beyond_the_modules_dtype_is_refused_too() -> None:
    with pytest.raises(DataError, match=r"'x' has values too large for torch\.float16"):
        one(pa.array([b"a"]), torch.float16, decoder=lambda data: 10**5)


def test_a_value_that_is_too_large_among_several_columns_names_its_own() -> None:
    column = Column("a to c (00000000)", F, 1, members=("a", "b", "c"))
    with pytest.raises(DataError, match="column 'b' has values too large"):
        tensor(pa.array([[1.0, 1e300, 2.0]]), column, 0)


@pytest.mark.parametrize("bad", [1.5, -0.25, 2, -1])
def test_a_value_outside_0_to_1_is_refused_by_row_where_the_column_says_so(bad: float) -> None:
    with pytest.raises(DataError, match=r"'x' has values outside 0 \.\. 1, which its loss takes, the first in row 11 of partition 4"):
        tensor(pa.array([1, bad, bad]), Column("x", F, unit=True), 4, first_row=10)
    assert tensor(pa.array([1, 0, 0.5]), Column("x", F, unit=True), 4).tolist() == [1, 0, 0.5]
    assert tensor(pa.array([1, bad]), Column("x", F), 4).tolist() == [1, bad]


def test_what_is_not_finite_passes_where_the_column_says_so() -> None:
    found = tensor(pa.array([1.0, float("inf")]), Column("x", F, finite=False), 0)
    assert found.tolist() == [1.0, float("inf")]


def test_a_decoder_that_returns_nan_is_refused() -> None:
    with pytest.raises(DataError, match="'x' has NaN"):
        one(pa.array([b"a"]), decoder=lambda data: np.array([np.nan]))


@pytest.mark.parametrize("bad", [0.5, 1e30, -1e300, float("nan")], ids=str)
def test_a_label_that_is_no_whole_number_is_refused_by_row(bad: float) -> None:
    schema = pa.schema([("x", pa.float64()), ("y", pa.float64())])
    label = describe(schema, ["x"], "y", F, label_dtype=I).label
    with pytest.raises(DataError, match=r"'y' .*row 1 of partition 4"):
        tensor(pa.array([1.0, bad]), label, 4)
    assert tensor(pa.array([1.0, 2.0]), label, 4).tolist() == [1, 2]


def test_a_boolean_label_may_be_a_class() -> None:
    schema = pa.schema([("x", pa.float64()), ("y", pa.bool_())])
    found = tensor(pa.array([True, False]), describe(schema, ["x"], "y", F, label_dtype=I).label, 0)
    assert found.dtype == I and found.tolist() == [1, 0]


REFUSED = {
    "strings": (pa.array(["a"]), "string, which no tensor can hold; index it first"),
    "lists of strings": (pa.array([["a"]]), "which no tensor can hold; index it first"),
    "decimals": (pa.array([decimal.Decimal("1.5")]), r"decimal128\(2, 1\), which no tensor can hold; cast it to a number"),
    "dates": (pa.array([0], pa.date32()), "cast it to a number"),
    "structs": (pa.array([{"a": 1}]), "cast it to a number"),
    "maps": (pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())), "cast it to a number"),
    "nothing": (pa.array([None]), "cast it to a number"),
    "binary": (pa.array([b"a"]), r"'x' is binary: say how to read it with decoders=\{'x': Raw\(shape, dtype\)\}"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_type_that_no_tensor_can_hold_is_refused_with_the_way_out(name: str) -> None:
    array, said = REFUSED[name]
    with pytest.raises(DataError, match=said) as info:
        one(array)
    assert "'x'" in str(info.value)


def test_a_missing_column_is_refused_with_those_that_are_there() -> None:
    with pytest.raises(DataError, match=r"no column 'z'; the DataFrame has 'x', 'y'"):
        require(["x", "z"], ["x", "y"])
    with pytest.raises(DataError, match="no column 'z'"):
        describe(pa.schema([("x", pa.int64())]), ["x"], "z", F)


def test_settings_that_cannot_work_are_refused() -> None:
    schema = pa.schema([("x", pa.int64()), ("b", pa.binary())])
    with pytest.raises(RecipeError, match="inputCols is empty"):
        describe(schema, [], None, F)
    with pytest.raises(RecipeError, match=r"decoders name \['c'\]"):
        describe(schema, ["x"], None, F, {"c": Raw((1,))})
    with pytest.raises(DataError, match="'x' is int64, a decoder reads binary columns only"):
        describe(schema, ["x"], None, F, {"x": Raw((1,))})
    with pytest.raises(RecipeError, match=r"'floaty'.*not a NumPy dtype"):
        Raw((1,), "floaty")


# ---- shares ---------------------------------------------------------------------------------------------------------------

TWO = Columns((Column("a", F, 1), Column("b", I)), Column("y", F))
ROWED = Columns(TWO.inputs, TWO.label, row="n")


def rows(*numbers: int, row: bool = False) -> pa.RecordBatch:
    columns = {
        "b": pa.array(numbers, pa.int64()), "y": pa.array([n / 2 for n in numbers], pa.float64()),
        "a": pa.array([[n, n + 0.5] for n in numbers], pa.list_(pa.float32())),
    }  # fmt: skip
    return batch(**columns, **({"n": pa.array(numbers, pa.int64())} if row else {}))


def test_a_share_is_all_rows_in_order_inputs_as_named_and_the_label_last() -> None:
    found = share([rows(1, 2), rows(), rows(3)], TWO, 0)
    assert found.rows == 3 and found.inputs[0].tolist() == [[1, 1.5], [2, 2.5], [3, 3.5]]
    assert found.inputs[1].tolist() == [1, 2, 3] and found.target.tolist() == [0.5, 1.0, 1.5]


def test_a_share_without_a_label_has_no_target() -> None:
    assert share([rows(1)], Columns(TWO.inputs), 0).target is None


@pytest.mark.parametrize("batches", [[], [rows()], [rows(), rows()]], ids=["none", "one empty", "two empty"])
def test_a_share_without_rows_is_none(batches: list[pa.RecordBatch]) -> None:
    assert share(batches, TWO, 0) is None and shapes(None) is None


def test_a_share_owns_its_memory() -> None:
    for batches in ([rows(1, 2)], [rows(1), rows(2)]):
        found = share(batches, TWO, 0)
        for x in (*found.inputs, found.target):
            x.zero_()
        assert batches[0].column("b").to_pylist()[0] == 1


def test_a_share_is_put_in_the_order_of_its_row_numbers() -> None:
    expected = share([rows(0, 1, 2, 3, 4)], TWO, 0)
    for order in ([(3, 1), (4, 0, 2)], [(0, 1, 2, 3, 4)], [(4, 3, 2, 1, 0)]):
        batches = [rows(*numbers, row=True) for numbers in order]
        found = share(batches, ROWED, 0)
        pairs = zip((*found.inputs, found.target), (*expected.inputs, expected.target), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_a_shape_that_changes_between_record_batches_is_refused() -> None:
    short = batch(a=pa.array([[1.0]], pa.list_(pa.float32())), b=pa.array([1]), y=pa.array([1.0]))
    with pytest.raises(DataError, match=r"'a' holds rows of shape \[2\] and \[1\] \(partition 7\)"):
        share([rows(1), short], TWO, 7)


def test_an_error_names_the_row_of_the_share_and_not_of_the_record_batch() -> None:
    bad = batch(a=pa.array([[1.0, 2.0]], pa.list_(pa.float32())), b=pa.array([None], pa.int64()), y=pa.array([1.0]))
    with pytest.raises(DataError, match=r"'b' has 1 null\(s\), the first in row 2 of partition 7"):
        share([rows(1, 2), bad], TWO, 7)


def test_shares_agree_on_the_shapes_that_those_with_rows_tell() -> None:
    told = shapes(share([rows(1)], TWO, 0))
    assert told == [[2], [], []] and agree([None, told, None, told], TWO) == told


def test_shares_that_differ_are_refused_by_column_and_both_partitions() -> None:
    with pytest.raises(DataError, match=r"'a' holds rows of shape \[2\] \(partition 1\) and \[3\] \(partition 3\)"):
        agree([None, [[2], [], []], None, [[3], [], []]], TWO)


def test_no_rows_anywhere_are_refused() -> None:
    with pytest.raises(DataError, match="the DataFrame has no rows"):
        agree([None, None], TWO)


def test_a_share_of_nothing_has_the_shapes_and_dtypes_of_the_others() -> None:
    full = share([rows(1)], TWO, 0)
    empty = nothing(TWO, shapes(full))
    assert empty.rows == 0 and shapes(empty) == shapes(full)
    pairs = zip((*empty.inputs, empty.target), (*full.inputs, full.target), strict=True)
    assert all(a.dtype == b.dtype for a, b in pairs)
    assert nothing(Columns(TWO.inputs), shapes(full)[:2]).target is None
