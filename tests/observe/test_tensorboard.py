"""What TensorBoard would show, read back from the event files."""

from __future__ import annotations

import sys

import pytest

from bigdl_lite.errors import RecipeError
from bigdl_lite.observe.events import Callbacks
from bigdl_lite.observe.tensorboard import TensorBoard
from tests.observe.made import history, start

accumulator = pytest.importorskip(
    "tensorboard.backend.event_processing.event_accumulator", reason="needs tensorboard: pip install 'bigdl_lite[tensorboard]'"
)


def told(callback, lines, run="run-1", error=None):
    """A fit of these lines, which ends well, or with the error."""
    try:
        with Callbacks([callback], run=run, engine="local", workers=2, params={"batchSize": 10}) as fit:
            for line in lines:
                fit(line)
            if error:
                raise error
            fit.ended([line for line in lines if "start" not in line])
    except type(error or ()) as raised:
        assert raised is error


def read(folder):
    """{tag: {step: value}}."""
    events = accumulator.EventAccumulator(str(folder)).Reload()
    return events, {tag: {e.step: pytest.approx(e.value) for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def test_losses_metrics_and_settings_are_written(tmp_path):
    lines = history(2, 5, validated=True)
    told(TensorBoard(tmp_path), [start(10, 2), *lines])
    events, found = read(tmp_path / "run-1")
    assert found["loss"] == {line["step"] + 1: line["loss"] for line in lines if "step" in line}
    assert found["learning_rate"] == {line["step"] + 1: line["lr"] for line in lines if "step" in line}
    assert found["epoch/loss"] == {5: lines[6]["loss"], 10: lines[13]["loss"]}
    assert found["validation/accuracy"] == {5: lines[5]["val_accuracy"], 10: lines[12]["val_accuracy"]}
    assert found["validation/loss"].keys() == {5, 10}
    assert found["rows_per_second"][3] == 1000 and found["sync"][3] == 0.3
    (settings,) = events.Tensors("settings/text_summary")
    assert b"| batchSize | 10 |" in settings.tensor_proto.string_val[0]


def test_steps_can_be_thinned_and_the_rest_is_not(tmp_path):
    told(TensorBoard(tmp_path, every=4), [start(10, 2), *history(2, 5, validated=True)])
    _, found = read(tmp_path / "run-1")
    assert list(found["loss"]) == [1, 5, 9] and list(found["epoch/loss"]) == [5, 10]


def test_two_fits_do_not_mix_even_where_they_run_side_by_side(tmp_path):
    shared = TensorBoard(tmp_path)
    with Callbacks([shared], run="a") as a, Callbacks([shared], run="b") as b:
        for first, second in zip(history(1, 3), history(1, 3, noise=0.5), strict=True):
            a(first)
            b(second)
        a.ended([])
        b.ended([])
    assert read(tmp_path / "a")[1]["loss"] == {line["step"] + 1: line["loss"] for line in history(1, 3)[:-1]}
    assert read(tmp_path / "a")[1]["loss"] != read(tmp_path / "b")[1]["loss"]


def test_a_fit_that_fails_keeps_what_was_written(tmp_path):
    callback = TensorBoard(tmp_path)
    told(callback, [start(), *history(1, 3)[:2]], error=RuntimeError("lost"))
    assert list(read(tmp_path / "run-1")[1]["loss"]) == [1, 2] and not callback._writers


def test_a_setting_that_cannot_work_is_refused(tmp_path):
    with pytest.raises(RecipeError, match="every is 0"):
        TensorBoard(tmp_path, every=0)


def test_without_the_package_the_way_out_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ImportError, match=r"pip install 'bigdl_lite\[tensorboard\]'"):
        TensorBoard(tmp_path)
