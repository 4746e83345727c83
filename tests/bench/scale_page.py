"""Tables and pictures of the guide's page on scale, out of measured points: nothing is measured here.

    python -m tests.bench.scale_page       from examples/guide/scale.json: the tables of scale.md, and its pictures

What is predicted here is predicted for hosts that have processors of their own, as fast as those that were measured on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.bench import costs
from tests.bench.costs import ENGINES, Model, Point
from tests.bench.report import number
from tests.bench.scale import checked, load, split

GUIDE = Path(__file__).resolve().parents[2] / "examples" / "guide"
POINTS = GUIDE / "scale.json"
FIGURES = ("scale_check.png", "scale_weak.png", "scale_strong.png", "scale_parts.png", "scale_bigdl.png")
EXECUTORS = (16, 32, 64, 128, 256, 512, 1024)
SIZES = {"0.06 M (LeNet)": 6.2e4, "7 M (Inception v1)": 7e6, "25 M (ResNet-50)": 2.5e7, "100 M": 1e8}
NETWORKS = {"1 GbE, 0.5 ms": (1.25e8, 5e-4), "10 GbE, 0.2 ms": (1.25e9, 2e-4), "25 GbE, 0.1 ms": (3.125e9, 1e-4)}
USUAL = "10 GbE, 0.2 ms"
WEAK_COMPUTE, STRONG_COMPUTE = 1.0, 256.0  # seconds of a step: of each executor; of all together
BIGDL = (16, 96, 5.3)  # from so many nodes to so many: how many times the throughput
BIGDL_SYNC, BIGDL_NODES = 0.07, 32
_COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52")
_PARTS = {
    "compute": "#b8c4d6", "base": "#8c8c8c", "tasks": "#c44e52", "driver's bytes": "#8172b2", "messages": "#dd8452",
    "executors' bytes": "#ccb974", "wire": "#4c72b0", "latency": "#55a868",
}  # fmt: skip


def models(points: Sequence[Point]) -> dict[str, Model]:
    """Fitted on all points: what was held out to check the model is not held back from what it foretells."""
    return {engine: costs.fit([x for x in points if x.engine == engine]) for engine in ENGINES}


def weak(model: Model, p: int, n: float, rate: float, delay: float) -> float:
    """Throughput in units of one executor that has nobody to wait for: the batch grows with p."""
    return p * WEAK_COMPUTE / model.seconds(p, n, WEAK_COMPUTE, rate, delay)


def strong(model: Model, p: int, n: float, rate: float, delay: float) -> float:
    """Likewise, where all executors share one batch."""
    return STRONG_COMPUTE / model.seconds(p, n, STRONG_COMPUTE / p, rate, delay)


def least_compute(model: Model, few: int, many: int, times: float, n: float, rate: float, delay: float) -> float:
    """Seconds of compute a step, of each executor, from which on `many` have `times` the throughput of `few`; by bisection.

    0 where that is so without any compute.  Raises ValueError where no compute is enough.
    """
    if times >= many / few:
        raise ValueError(f"from {few} to {many} executors the throughput grows {many / few:g} times at most, not {times:g}")

    def reached(compute: float) -> bool:
        return many / few * model.seconds(few, n, compute, rate, delay) / model.seconds(many, n, compute, rate, delay) >= times

    low, high = 0.0, 1e6
    if reached(low):
        return 0.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if reached(middle) else (middle, high)
    return high


def overhead(model: Model, p: int, n: float, rate: float, delay: float) -> float:
    """Seconds of a step beside its compute."""
    return model.seconds(p, n, 0.0, rate, delay)


def dominant(model: Model, p: int, n: float, rate: float, delay: float) -> str:
    parts = model.parts(p, n, 0.0, rate, delay)
    return max(parts, key=lambda name: parts[name])


# ---- tables -----------------------------------------------------------------------------------------------------------


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))


def tables(points: Sequence[Point]) -> dict[str, str]:
    fitted = models(points)
    return {
        "measured": _measured(points), "errors": _errors(points), "coefficients": _coefficients(fitted),
        "overheads": _overheads(fitted), "bigdl": _bigdl(fitted),
    }  # fmt: skip


def _measured(points: Sequence[Point]) -> str:
    """Each cell: seconds measured, and as a model of split()'s points foretells them."""
    ranks = sorted({x.p for x in points})
    lines = []
    for engine in ENGINES:
        mine = [x for x in points if x.engine == engine]
        model = costs.fit(split(mine)["fitted"])
        for n, link in dict.fromkeys((x.n, x.link) for x in sorted(mine, key=lambda x: x.n)):
            cells = []
            for p in ranks:
                here = [x for x in mine if (x.n, x.link, x.p) == (n, link, p)]
                cells.append(" , ".join(f"{_s(x.median)} ({_s(model.at(x))})" for x in here))
            lines.append([engine, f"{n / 1e6:.2g} M", link, *cells])
    return _table(["engine", "values", "link", *(f"{p} ranks" for p in ranks)], lines)


def _s(x: float) -> str:
    return f"{x:.3f}" if x < 1 else f"{x:.2f}"


def _errors(points: Sequence[Point]) -> str:
    told = {engine: checked([x for x in points if x.engine == engine]) for engine in ENGINES}
    return _table(["typical error of"], []) if not told else _table(
        ["median error of a step's seconds", *ENGINES],
        [[name, *(f"{100 * told[engine][name]:.0f} %" for engine in ENGINES)] for name in told[ENGINES[0]]],
    )  # fmt: skip


def _coefficients(fitted: Mapping[str, Model]) -> str:
    def row(name: str, value: Callable[[Model], str]) -> list[str]:
        return [name, *(value(fitted[engine]) for engine in ENGINES)]

    def ms(x: float) -> str:
        return f"{1e3 * x:.3g} ms"

    def per_mb(x: float) -> str:
        return f"{1e9 * x:.3g} ms a MB"

    lines = [
        row("base", lambda m: ms(m.clock[0])), row("busy", lambda m: f"{m.clock[1]:.2f}"), row("wire", lambda m: f"{m.clock[2]:.2f}"),
        row("late", lambda m: f"{m.clock[3]:.1f} delays"),
        row("driver: a step, a task", lambda m: f"{ms(m.driver[0])}, {ms(m.driver[1])}"),
        row("driver: copied and received, sent", lambda m: f"{per_mb(m.driver[2])}, {per_mb(m.driver[3])}"),
        row("executor: a step, a message", lambda m: f"{ms(m.worker[0])}, {ms(m.worker[1])}"),
        row("executor: bytes", lambda m: per_mb(m.worker[2])),
    ]  # fmt: skip
    return _table(["coefficient", *ENGINES], lines)


def _overheads(fitted: Mapping[str, Model]) -> str:
    """Seconds of a step beside compute, and the part that is the largest."""
    lines = []
    for engine, model in fitted.items():
        for size, n in SIZES.items():
            for network, where in NETWORKS.items():
                cells = [f"{number(overhead(model, p, n, *where))} s, {dominant(model, p, n, *where)}" for p in (16, 128, 1024)]
                lines.append([engine, size, network, *cells])
    return _table(["engine", "values", "network", "16 executors", "128", "1,024"], lines)


def _bigdl(fitted: Mapping[str, Model]) -> str:
    few, many, times = BIGDL
    lines = []
    for engine, model in fitted.items():
        for network, where in NETWORKS.items():
            n = SIZES["7 M (Inception v1)"]
            least, share = least_compute(model, few, many, times, n, *where), overhead(model, BIGDL_NODES, n, *where) / BIGDL_SYNC
            lines.append([engine, network, f"{number(least)} s" if least else "any", f"{number(share)} s"])
    return _table(
        ["engine", "network", f"{times} times from {few} to {many} nodes", f"sync < {BIGDL_SYNC:.0%} at {BIGDL_NODES} nodes"], lines
    )


# ---- pictures ---------------------------------------------------------------------------------------------------------


def draw(points: Sequence[Point], folder: Path) -> None:
    fitted = models(points)
    _draw_check(points, folder / "scale_check.png")
    _draw_growth(fitted, weak, f"weak scaling, {WEAK_COMPUTE:g} s of compute a step on each executor", folder / "scale_weak.png")
    _draw_growth(fitted, strong, f"strong scaling, {STRONG_COMPUTE:g} s of compute a step, shared", folder / "scale_strong.png")
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
        ends = [0.7 * min(x.median for x in mine), 1.4 * max(x.median for x in mine)]
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
    axes[0, 0].legend(fontsize=8, frameon=False, loc="upper left")
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


def filled(page: str, found: Mapping[str, str]) -> str:
    """The page with each table between its two marks, <!-- name --> and <!-- /name -->.  Raises KeyError where one has no place."""
    for name, table in found.items():
        before, mark, rest = page.partition(f"<!-- {name} -->\n")
        _, end, after = rest.partition(f"<!-- /{name} -->")
        if not mark or not end:
            raise KeyError(f"the page has no place for the table {name!r}")
        page = f"{before}{mark}\n{table}\n\n{end}{after}"
    return page


def main() -> None:
    points, page = load(POINTS), GUIDE / "scale.md"
    page.write_text(filled(page.read_text(), tables(points)))
    draw(points, GUIDE)


if __name__ == "__main__":
    main()
