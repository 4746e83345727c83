"""Errors keep their kind across a process border; what came out of the user's code arrives with its own frames."""

from __future__ import annotations

import ast
import re
import traceback

import pytest

import bigdl_lite.errors as errors
from bigdl_lite.batch import quotas
from bigdl_lite.errors import KINDS, BigDLError, DataError, UserError, report, revive

BUILT_IN = {
    "RecipeError": ValueError, "DataError": ValueError, "UserError": RuntimeError, "DivergedError": RuntimeError,
    "WireError": ValueError, "CheckpointError": RuntimeError, "MeetingTimeout": TimeoutError, "PeerLost": RuntimeError,
}  # fmt: skip


def caught(act: object) -> BaseException:
    with pytest.raises(BaseException) as info:
        act()
    return info.value


@pytest.mark.parametrize("name", KINDS)
def test_every_error_can_be_caught_as_a_built_in(name: str) -> None:
    assert issubclass(KINDS[name], BigDLError) and issubclass(KINDS[name], BUILT_IN[name])


def test_the_tree_in_the_docstring_is_the_tree_in_the_code() -> None:
    drawn = dict(re.findall(r"[|`]-- (\w+) +\((\w+)\)", errors.__doc__))
    assert drawn == {name: kind.__name__ for name, kind in BUILT_IN.items()}
    assert set(drawn) == set(KINDS)


@pytest.mark.parametrize("name", KINDS)
def test_our_own_error_comes_back_as_it_left(name: str) -> None:
    back = revive(report(KINDS[name]("column 'x' has 3 nulls"), "rank 1"))
    assert type(back) is KINDS[name] and str(back) == "column 'x' has 3 nulls"


def test_a_report_is_plain_text() -> None:
    told = report(caught(lambda: 1 / 0), "rank 0")
    assert all(isinstance(k, str) and isinstance(v, str) for k, v in told.items())


def test_the_users_error_arrives_with_its_traceback_and_place() -> None:
    def forward() -> None:
        raise KeyError("no such layer")  # the user's line

    back = revive(report(caught(forward), "rank 2 (partition 2)"))
    assert type(back) is UserError
    assert str(back).startswith("Traceback (most recent call last)") and str(back).endswith("raised on rank 2 (partition 2)")
    assert "# the user's line" in str(back) and "KeyError: 'no such layer'" in str(back)


def test_our_frames_above_the_users_are_left_out() -> None:
    class Rows(list):
        def __iter__(self):
            raise OSError("user code below ours")

    error = caught(lambda: quotas(Rows([1]), 1))
    assert any("bigdl_lite/batch.py" in frame.filename for frame in traceback.extract_tb(error.__traceback__))
    # as on an executor, where the outermost frames are ours
    inner = error.__traceback__
    while "bigdl_lite/batch.py" not in inner.tb_frame.f_code.co_filename:
        inner = inner.tb_next
    message = report(error.with_traceback(inner), "rank 0")["message"]
    assert "bigdl_lite/batch.py" not in message and "user code below ours" in message and "test_errors.py" in message


def test_an_error_that_is_wholly_ours_keeps_its_frames() -> None:
    error = caught(lambda: quotas([1], 0))
    inner = error.__traceback__
    while inner.tb_next is not None:
        inner = inner.tb_next
    assert "bigdl_lite/batch.py" in report(error.with_traceback(inner), "rank 0")["message"]


def test_an_error_without_a_traceback_can_be_reported() -> None:
    assert "RuntimeError: bare" in report(RuntimeError("bare"), "rank 0")["message"]


@pytest.mark.parametrize("told", [{}, {"kind": "SystemExit", "message": "m"}, {"kind": "BigDLError", "message": "m"}])
def test_an_unknown_kind_is_revived_as_a_user_error(told: dict[str, str]) -> None:
    assert type(revive(told)) is UserError


def test_a_data_error_is_a_value_error_to_those_who_do_not_know_us() -> None:
    with pytest.raises(ValueError, match="nulls"):
        raise revive(report(DataError("3 nulls"), "rank 0"))


def test_the_module_needs_nothing_of_ours() -> None:
    tree = ast.parse(open(errors.__file__, encoding="utf-8").read())
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and "bigdl_lite" in (node.module or "")]
