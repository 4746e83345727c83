"""The picture of a fit: is it learning, and where does the time go.

    +----------------------------+---------------------+
    | loss: steps, epochs,       | metrics             |      metrics only where a validation has some beside the loss
    |       validation           +---------------------+
    |                            | ====== whole fit == |      a strip: the parts of all the time
    +----------------------------+ time by phase       |      of each epoch; of each step, where there is one epoch
    | learning rate              |                     |
    +----------------------------+---------------------+

Colours are those of Okabe and Ito, which colour-blind readers can tell apart. No backend of matplotlib is chosen or changed.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bigdl_lite.observe.summary import PHASES, Line, Summary, duration, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = {"launch": "#999999", "data": "#E69F00", "compute": "#0072B2", "sync": "#D55E00", "validation": "#CC79A7"}
_STEP, _MEAN, _EPOCH, _VALID = "#8CC8EC", "#0072B2", "#222222", "#D55E00"
_METRICS = ("#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_BARS = 40  # more epochs or steps than this become an area
_AREA = 120  # points of that area at most
_POINTS = 2000  # of the thin line of steps; above, each is a mean of several
_SMOOTH = 200  # from so many steps on, in few epochs, a running mean is drawn


def plot(summary: Summary, path: Any = None) -> Any:
    """See Summary.plot."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise ImportError("a plot needs matplotlib: pip install 'bigdl_lite[plot]'") from error
    if not summary.history:
        raise ValueError("the history is empty: there is nothing to plot")

    class Picture(Figure):
        """A Figure that a notebook shows although pyplot knows nothing of it."""

        def _repr_png_(self) -> bytes:
            buffer = io.BytesIO()
            self.savefig(buffer, format="png", dpi=self.dpi)
            return buffer.getvalue()

    figure = Picture(figsize=(11, 5.6), dpi=110, layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06, wspace=0.04))
    FigureCanvasAgg(figure)
    names = list(dict.fromkeys(key for line in summary.validationHistory for key in line if key not in ("step", "val_loss")))
    grid = figure.add_gridspec(1, 2, width_ratios=[1.1, 1])
    left = grid[0].subgridspec(2, 1, height_ratios=[4, 1])
    right = grid[1].subgridspec(3, 1, height_ratios=[3.2, 0.35, 3.2] if names else [0.001, 0.35, 7])
    losses = figure.add_subplot(left[0])
    _losses(losses, summary)
    _rates(figure.add_subplot(left[1], sharex=losses), summary)
    losses.tick_params(labelbottom=False)
    if summary.totalIterations == 1:
        losses.set_xlim(0, 2)
        losses.set_xticks([1])
    if names:
        _metrics(figure.add_subplot(right[0], sharex=losses), summary, names)
    strip = figure.add_subplot(right[1])
    _strip(strip, summary)
    _phases(figure.add_subplot(right[2]), summary)
    figure.suptitle(_title(summary), x=0.012, ha="left", fontsize=10)
    for axes in figure.axes:
        _plain(axes)
    strip.set_axis_off()
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def _title(summary: Summary) -> str:
    workers = f", {summary.workers} worker{'s' if summary.workers > 1 else ''}" if summary.workers else ""
    epochs, steps = summary.epochs, summary.totalIterations
    return (
        f"{summary.engine or 'fit'}{workers}:  {epochs:,} epoch{'s' * (epochs != 1)}, {steps:,} step{'s' * (steps != 1)}, "
        f"{summary.rows:,} rows in {duration(sum(summary.phases.values()))}  ({summary.rows_per_second:,.0f} rows/s in steps)"
    )


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9)


def _count(axis: Any) -> None:
    """Whole numbers, thousands with commas."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))


def _marked(shape: str, points: int, size: float = 5) -> dict[str, Any]:
    """A marker on each point, where they are few enough to be told apart."""
    return {"marker": shape, "markersize": size} if points <= _BARS else {}


def _ends(summary: Summary) -> list[int]:
    """Steps done at the end of each epoch."""
    done, found = 0, []
    for line in summary.lines("epoch"):
        done += line["steps"]
        found.append(done)
    return found


def _losses(axes: Axes, summary: Summary) -> None:
    steps, ends, means = summary.lines("step"), _ends(summary), summary.objectiveHistory
    seen = [(line["step"], line["val_loss"]) for line in summary.validationHistory if "val_loss" in line]
    x, y = _binned([line["step"] + 1 for line in steps], [line["loss"] for line in steps], _POINTS)
    axes.plot(x, y, color=_STEP, linewidth=0.9, label="step", **_marked("o", len(x), 3))
    if len(steps) >= _SMOOTH and len(ends) < 5:
        label = f"mean of {round(summary.totalIterations / 50):,} steps"
        axes.plot(*_binned(x, y, 50), color=_MEAN, linewidth=1.8, zorder=4, label=label)
    if means:
        axes.stairs(means, [0, *ends], baseline=None, color=_EPOCH, linewidth=1.6, zorder=3, label="mean of an epoch")
    if seen:
        axes.plot(*zip(*seen, strict=True), color=_VALID, linewidth=1.8, zorder=5, label="validation", **_marked("s", len(seen)))
    values = [value for value in [*y, *means, *(value for _, value in seen)] if math.isfinite(value)]
    if values and min(values) > 0 and max(values) > 50 * min(values):
        axes.set_yscale("log")
    axes.set_ylabel("loss")
    axes.legend(frameon=False, fontsize=9)
    axes.margins(x=0.02)


def _rates(axes: Axes, summary: Summary) -> None:
    steps = summary.lines("step")
    x, y = [line["step"] + 1 for line in steps], [line["lr"] for line in steps]
    axes.plot(x, y, color="#555555", linewidth=1.4, drawstyle="steps-mid", **_marked("o" if len(x) == 1 else "", 1, 3))
    if y and min(y) > 0 and max(y) > 50 * min(y):
        axes.set_yscale("log")
    elif y:
        axes.set_ylim(0, 1.25 * max(y) or 1)
        axes.locator_params(axis="y", nbins=3)
    axes.set_ylabel("learning\nrate", fontsize=9)
    axes.set_xlabel("steps done")
    if summary.totalIterations > 1:
        _count(axes.xaxis)


def _metrics(axes: Axes, summary: Summary, names: Sequence[str]) -> None:
    for at, name in enumerate(names):
        pairs = [(line["step"], line[name]) for line in summary.validationHistory if name in line]
        colour, mark = _METRICS[at % len(_METRICS)], "sD^vP"[at % 5]
        marked = _marked(mark, len(pairs))
        axes.plot(*zip(*pairs, strict=True), color=colour, linewidth=1.8, label=name.removeprefix("val_"), **marked)
    axes.set_ylabel("validation" if len(names) > 1 else f"validation {names[0].removeprefix('val_')}")
    axes.set_xlabel("steps done")
    if len(names) > 1:
        axes.legend(frameon=False, fontsize=9)


def _strip(axes: Axes, summary: Summary) -> None:
    """The whole fit as one bar, which is the legend of the panel below as well."""
    begin, bars = 0.0, []
    for name, part in summary.fractions.items():
        bars.append(axes.barh(0, part, left=begin, color=_COLOURS[name], height=1, label=f"{name} {percent(part)}"))
        begin += part
    axes.set_xlim(0, 1)
    axes.set_ylim(-0.5, 0.5)
    if bars:
        axes.legend(
            loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=5 if len(bars) < 5 else 3, frameon=False, fontsize=8.5,
            columnspacing=0.8, handlelength=0.8, handletextpad=0.3, borderaxespad=0.1,
        )  # fmt: skip


def _phases(axes: Axes, summary: Summary) -> None:
    """Seconds by phase of each epoch, or, where there is one at most, of each step."""
    epochs = summary.lines("epoch")
    each = len(epochs) < 2
    lines = summary.lines("step") if each else epochs
    x = [line["step"] + 1 for line in lines] if each else [line["epoch"] + 1 for line in lines]
    parts = {name: [float(line[f"{name}_s"]) for line in lines] for name in ("data", "compute", "sync")}
    if not each:
        parts["validation"] = _validation_seconds(summary)
    parts = {name: parts[name] for name in PHASES if any(parts.get(name, ()))}
    highest = max((sum(column) for column in zip(*parts.values(), strict=True)), default=0.0)
    unit, factor = ("s", 1.0) if highest >= 1 else ("ms", 1000.0)
    if len(x) <= _BARS:
        base = [0.0] * len(x)
        for name, seconds in parts.items():
            axes.bar(x, [factor * s for s in seconds], bottom=base, width=0.75, color=_COLOURS[name])
            base = [b + factor * s for b, s in zip(base, seconds, strict=True)]
        room = max(0.6, 2.5 - len(x))
        axes.set_xlim(min(x, default=1) - room, max(x, default=1) + room)
        width = 1
    else:
        width = -(-len(x) // _AREA)
        middles = _binned(x, x, _AREA)[0]
        areas = [[factor * s for s in _binned(x, seconds, _AREA)[1]] for seconds in parts.values()]
        axes.stackplot(middles, areas, colors=[_COLOURS[name] for name in parts], linewidth=0)
        axes.margins(x=0)
    what = "step" if each else "epoch"
    axes.set_ylabel(f"{unit} per {what}" + (f", mean of {width}" if width > 1 else ""))
    axes.set_xlabel(what)
    if len(x) <= 10:
        axes.set_xticks(x)
    else:
        _count(axes.xaxis)


def _validation_seconds(summary: Summary) -> list[float]:
    """Seconds of the validations within each epoch; one on its end counts as its own."""
    found, begin = [], 0
    for end in _ends(summary):
        inside: list[Line] = [line for line in summary.lines("validation") if begin < line["validation"] <= end]
        found.append(float(sum(line.get("seconds", 0.0) for line in inside)))
        begin = end
    return found


def _binned(x: Sequence[float], y: Sequence[float], most: int) -> tuple[list[float], list[float]]:
    """At most `most` points, each the mean of as many neighbours as the others."""
    width = -(-len(x) // most) if x else 1
    cuts = range(0, len(x), width)
    return [_mean(x[at : at + width]) for at in cuts], [_mean(y[at : at + width]) for at in cuts]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
