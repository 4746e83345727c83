"""The pictures of the guide's page on scale: what scale_page.py knows, drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.bench import costs, scale_page
from tests.bench.costs import ENGINES, Model, Point
from tests.bench.report import number
from tests.bench.scale import split
from tests.bench.scale_page import BIGDL, EXECUTORS, NETWORKS, SIZES, STRONG_COMPUTE, USUAL, WEAK_COMPUTE

FIGURES = ("scale_check.png", "scale_weak.png", "scale_strong.png", "scale_parts.png", "scale_bigdl.png")
_COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52")
_PARTS = {
    "compute": "#b8c4d6", "base": "#8c8c8c", "tasks": "#c44e52", "driver's bytes": "#8172b2", "messages": "#dd8452",
    "executors' bytes": "#ccb974", "wire": "#4c72b0", "latency": "#55a868",
}  # fmt: skip


def draw(points: Sequence[Point], folder: Path) -> None:
    fitted = scale_page.models(points)
    _draw_check(points, folder / "scale_check.png")
    _draw_growth(
        fitted, scale_page.weak, f"weak scaling, {WEAK_COMPUTE:g} s of compute a step on each executor", folder / "scale_weak.png"
    )
    _draw_growth(
        fitted, scale_page.strong, f"strong scaling, {STRONG_COMPUTE:g} s of compute a step, shared", folder / "scale_strong.png"
    )
    _draw_parts(fitted, folder / "scale_parts.png")
    _draw_bigdl(fitted, folder / "scale_bigdl.png")


def _plot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _ticks(ax: Any, at: Sequence[float]) -> None:
    ax.set_xticks(at, [f"{x:,g}" for x in at])
    ax.minorticks_off()


def _draw_check(points: Sequence[Point], path: Path) -> None:
    """Predicted against measured seconds, both engines; what was fitted is hollow."""
    plt = _plot()
    figure, axes = plt.subplots(1, 2, figsize=(11, 5), layout="constrained")
    for ax, engine in zip(axes, ENGINES, strict=True):
        mine = [x for x in points if x.engine == engine]
        groups = split(mine)
        model = costs.fit(groups["fitted"])
        both = [y for x in mine for y in (x.median, model.at(x))]
        ends = [0.7 * min(both), 1.4 * max(both)]
        ax.plot(ends, ends, color="black", linewidth=1)
        ax.fill_between(ends, [0.75 * x for x in ends], [1.25 * x for x in ends], color="#999999", alpha=0.2, label="within 25 %")
        for (name, group), colour in zip(groups.items(), ("#8c8c8c", *_COLOURS), strict=False):
            face = "none" if name == "fitted" else colour
            label = f"{name} (2 and 4 ranks)" if name == "fitted" else name
            ax.scatter(
                [x.median for x in group], [model.at(x) for x in group], s=36, edgecolor=colour, facecolor=face, label=label, zorder=3
            )
        ax.set_xscale("log")
        ax.set_yscale("log")
        ax.set_xlim(ends)
        ax.set_ylim(ends)
        ax.set_xlabel("seconds a step, measured")
        ax.set_title(engine, fontsize=11)
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("seconds a step, predicted")
    axes[1].legend(fontsize=9, frameon=False, loc="lower right")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_growth(fitted: Mapping[str, Model], of: Callable[..., float], title: str, path: Path) -> None:
    plt = _plot()
    figure, axes = plt.subplots(2, 3, figsize=(12, 7.4), layout="constrained", sharex=True, sharey=True)
    for line, (engine, model) in zip(axes, fitted.items(), strict=True):
        for ax, (network, where) in zip(line, NETWORKS.items(), strict=True):
            ax.plot(EXECUTORS, EXECUTORS, color="black", linestyle=":", linewidth=1, label="linear")
            for (size, n), colour in zip(SIZES.items(), _COLOURS, strict=True):
                ax.plot(
                    EXECUTORS, [of(model, p, n, *where) for p in EXECUTORS], "o-", markersize=3, linewidth=1.6, color=colour, label=size
                )
            ax.set_xscale("log")
            ax.set_yscale("log")
            _ticks(ax, EXECUTORS[::2])
            ax.set_title(f"{engine}, {network}", fontsize=10)
            ax.grid(alpha=0.3)
    for ax in axes[1]:
        ax.set_xlabel("executors")
    for ax in axes[:, 0]:
        ax.set_ylabel("throughput, in executors")
        at = [y for y in (0.1, 1, 10, 100, 1000) if ax.get_ylim()[0] <= y <= ax.get_ylim()[1]]
        ax.set_yticks(at, [f"{y:,g}" for y in at])
    axes[0, 0].legend(fontsize=8, frameon=False, loc="upper left")
    figure.suptitle(f"Predicted: {title}", fontsize=11)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_parts(fitted: Mapping[str, Model], path: Path) -> None:
    """What a step's seconds beside compute are made of, for a small and a middle model."""
    plt = _plot()
    sizes = ("0.06 M (LeNet)", "7 M (Inception v1)")
    figure, axes = plt.subplots(2, 2, figsize=(11, 7.4), layout="constrained", sharex=True)
    for line, size in zip(axes, sizes, strict=True):
        for ax, (engine, model) in zip(line, fitted.items(), strict=True):
            found = [model.parts(p, SIZES[size], 0.0, *NETWORKS[USUAL]) for p in EXECUTORS]
            floor = [0.0] * len(EXECUTORS)
            for name in list(_PARTS)[1:]:
                heights = [parts[name] for parts in found]
                ax.bar(range(len(EXECUTORS)), heights, bottom=floor, color=_PARTS[name], label=name, width=0.75)
                floor = [a + b for a, b in zip(floor, heights, strict=True)]
            for at, total in enumerate(floor):
                ax.text(at, total, f"{number(total)} s", ha="center", va="bottom", fontsize=8)
            ax.set_xticks(range(len(EXECUTORS)), [f"{p:,}" for p in EXECUTORS])
            ax.set_ylim(0, 1.12 * max(floor))
            ax.set_title(f"{engine}, {size}, {USUAL}", fontsize=10)
            ax.spines[["top", "right"]].set_visible(False)
    for ax in axes[1]:
        ax.set_xlabel("executors")
    for ax in axes[:, 0]:
        ax.set_ylabel("seconds a step beside compute")
    axes[0, 1].legend(*axes[0, 0].get_legend_handles_labels(), fontsize=8, frameon=False, loc="upper left")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_bigdl(fitted: Mapping[str, Model], path: Path) -> None:
    plt = _plot()
    few, many, times = BIGDL
    at = (16, 24, 32, 48, 64, 96, 128, 192, 256)
    figure, ax = plt.subplots(figsize=(8, 5.2), layout="constrained")
    ax.plot(at, [p / few for p in at], color="black", linestyle=":", linewidth=1, label="linear")
    styles = {1.0: "--", 4.0: "-"}
    for (engine, model), colour in zip(fitted.items(), _COLOURS, strict=False):
        for compute, style in styles.items():
            seconds = {p: model.seconds(p, SIZES["7 M (Inception v1)"], compute, *NETWORKS[USUAL]) for p in at}
            ax.plot(at, [p / few * seconds[few] / seconds[p] for p in at], style, color=colour,
                    label=f"{engine}, {compute:g} s of compute a step (predicted)")  # fmt: skip
    ax.plot([few, many], [1, times], "D", color="#c44e52", markersize=8, label="BigDL (published)", zorder=4)
    ax.annotate(f"{times}", (many, times), textcoords="offset points", xytext=(8, -12), fontsize=9, color="#c44e52")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    _ticks(ax, at[::2])
    ax.set_yticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
    ax.set_xlabel("nodes")
    ax.set_ylabel(f"throughput, relative to {few} nodes")
    ax.set_title(f"7 M values, {USUAL}, weak scaling", fontsize=10)
    ax.grid(alpha=0.3)
    ax.legend(fontsize=9, frameon=False, loc="upper left")
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    draw(scale_page.load(scale_page.POINTS), scale_page.GUIDE)
