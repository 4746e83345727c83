"""The picture shows what the history has, without touching anybody's matplotlib."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from bigdl_lite.observe.summary import Summary
from tests.conftest import ROOT
from tests.observe.made import history, step

pytest.importorskip("matplotlib", reason="plots need matplotlib: pip install 'bigdl_lite[plot]'")

THREE = Summary(history(3, 10, validated=True), "barrier", 4, 1.0)
SHAPES = {
    "three epochs, validated": THREE,
    "one epoch of 2,000 steps": Summary(history(1, 2000, noise=0.3), "shuffle", 8, 24.0),
    "a single step": Summary(history(1, 1), "local", 1, 2.0),
    "many epochs, thinned": Summary(history(60, 20, validated=True, every=10), "barrier", 16, 30.0),
    "broken off": Summary([step(0), step(1)]),
    "steps not kept": Summary([line for line in history(2, 3) if "step" not in line]),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_picture_is_drawn_of_every_shape_of_fit_and_nothing_overlaps(name, tmp_path, recwarn):
    figure = SHAPES[name].plot(tmp_path / "fit.png")
    assert (tmp_path / "fit.png").read_bytes().startswith(b"\x89PNG")
    assert not [w for w in recwarn.list if "pyparsing" not in w.category.__module__]  # which matplotlib 3.8 calls by its old names
    renderer = figure.canvas.get_renderer()
    whole = figure.get_window_extent(renderer)
    shown = [axes for axes in figure.axes if axes.get_window_extent(renderer).height > 5]
    boxes = [axes.get_tightbbox(renderer) for axes in shown]
    for box in boxes:
        assert whole.x0 <= box.x0 and box.x1 <= whole.x1 + 1 and whole.y0 <= box.y0 and box.y1 <= whole.y1, name
    assert not [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]
    assert all(axes.get_ylabel() for axes in shown if axes.axison)


def test_the_lines_are_those_of_the_history():
    losses, _, metrics, strip, phases = THREE.plot().axes
    (steps, valid), (means,) = losses.get_lines(), [patch for patch in losses.patches if hasattr(patch, "get_data")]
    assert list(steps.get_xdata()) == list(range(1, 31))
    assert list(valid.get_xdata()) == [10, 20, 30] and list(valid.get_ydata()) == [line["val_loss"] for line in THREE.validationHistory]
    assert list(means.get_data().values) == THREE.objectiveHistory and list(means.get_data().edges) == [0, 10, 20, 30]
    assert metrics.get_ylabel() == "validation accuracy"
    assert sum(bar.get_width() for bar in strip.patches) == pytest.approx(1.0)
    assert phases.get_ylabel() == "ms per epoch"
    tops = [bar.get_y() + bar.get_height() for bar in phases.patches]
    assert max(tops) == pytest.approx(1000 * (0.1 + 0.02))  # ten steps of 10 ms and the validation on the end of the epoch


def test_each_phase_has_one_colour_which_is_its_own():
    *_, strip, phases = THREE.plot().axes
    colours = [bar.get_facecolor() for bar in strip.patches]
    assert len(set(colours)) == 5 and {bar.get_facecolor() for bar in phases.patches} == set(colours[1:])  # no launch in an epoch


def test_pyplot_and_its_backend_are_left_alone():
    code = (
        "import sys, json\n"
        "from tests.observe.made import history\n"
        "from bigdl_lite.observe.summary import Summary\n"
        "lazy = 'matplotlib' not in sys.modules and 'pandas' not in sys.modules\n"
        "data = Summary(history()).plot()._repr_png_()\n"
        "print(json.dumps([lazy, 'matplotlib.pyplot' in sys.modules, data[:4].hex()]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [True, False, b"\x89PNG".hex()]


def test_without_matplotlib_the_way_out_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'bigdl_lite\[plot\]'"):
        THREE.plot()


def test_of_nothing_there_is_no_picture():
    with pytest.raises(ValueError, match="the history is empty"):
        Summary([]).plot()
