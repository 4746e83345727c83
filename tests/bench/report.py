"""What a benchmark finds, and the page that tells it: rows of measured values, and claims that the rows bear or do not.

    Row      one system on one workload: a value for each repetition
    Claim    a ratio of two rows' medians, and the bound that it is to keep
    write    bench.json, bench.md, phases.png (where the time of a round goes), growth.png (time of a round against size),
             network.png (methods against networks), backups.png (seconds to a loss against the number of backup workers)
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

# one colour for a phase in every picture
_COLOURS = {
    "data": "#8c8c8c", "compute": "#4c72b0", "compute + all-reduce": "#8172b2", "all-reduce": "#c44e52", "sync": "#c44e52",
    "optimizer": "#dd8452", "sync + optimizer": "#c44e52", "rest": "#ccb974",
}  # fmt: skip
_OTHERS = ("#55a868", "#64b5cd", "#937860", "#da8bc3", "#b3a25a", "#3d6e70", "#a1c9f4", "#5f3c6f")


@dataclass(frozen=True)
class Row:
    """phases: seconds by name, those of one round or run (a median); note: what the number does not say by itself."""

    benchmark: str
    workload: str
    system: str
    unit: str
    values: tuple[float, ...]
    phases: Mapping[str, float] = field(default_factory=dict)
    note: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def worst(self) -> float:
        return min(self.values) if self.unit.endswith(("/s", "@10", "% right")) else max(self.values)


@dataclass(frozen=True)
class Claim:
    """kind: '>=' or '<='."""

    benchmark: str
    text: str
    ratio: float
    bound: float
    kind: str = ">="

    def __post_init__(self) -> None:
        if self.kind not in (">=", "<="):
            raise ValueError(f"kind is {self.kind!r}, must be '>=' or '<='")

    @property
    def holds(self) -> bool:
        return bool(self.ratio >= self.bound if self.kind == ">=" else self.ratio <= self.bound)


@dataclass
class Context:
    """What a benchmark module is run with.

    repeat   how often each system is measured, in turn with the others
    folder   where data sets are written once
    quick    small sizes: only to see that everything runs
    """

    spark: Any
    repeat: int
    folder: Path
    quick: bool = False

    def session(self, cores: int = 2, conf: Mapping[str, Any] | None = None) -> Any:
        """The one Spark session of this process, made at the first call."""
        if self.spark is None:
            from bigdl_lite import local_session

            self.spark = local_session(cores=cores, conf={"spark.driver.memory": "4g", **(conf or {})})
            self.spark.sparkContext.setLogLevel("ERROR")
        return self.spark

    def close(self) -> None:
        if self.spark is not None:
            self.spark.stop()
            self.spark = None


def number(x: float) -> str:
    """Three figures, thousands with commas."""
    if abs(x) >= 100:
        return f"{x:,.0f}"
    return f"{x:.3g}"


def table(rows: Sequence[Row]) -> str:
    lines = [
        "| benchmark | workload | system | median | worst | unit | seconds by phase | note |", "|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in rows:
        phases = ", ".join(f"{name} {number(seconds)}" for name, seconds in row.phases.items())
        lines.append(
            f"| {row.benchmark} | {row.workload} | {row.system} | {number(row.median)} | {number(row.worst)} | {row.unit} "
            f"| {phases} | {row.note} |"
        )
    return "\n".join(lines)


def claims_table(claims: Sequence[Claim]) -> str:
    lines = ["| benchmark | claim | measured | bound | holds |", "|---|---|---|---|---|"]
    for claim in claims:
        bound = f"{'≥' if claim.kind == '>=' else '≤'} {number(claim.bound)}"
        lines.append(f"| {claim.benchmark} | {claim.text} | {number(claim.ratio)} | {bound} | {'yes' if claim.holds else '**no**'} |")
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    from importlib.metadata import PackageNotFoundError, version

    def of(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "-"

    found = {"machine": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
    if hasattr(os, "sysconf"):
        found["memory_gb"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    return {**found, **{name: of(name) for name in ("torch", "pyspark", "numpy", "pyarrow")}}


def write(folder: Path, rows: Sequence[Row], claims: Sequence[Claim]) -> None:
    """Writes the page, its numbers, and the pictures that the rows allow."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench.json").write_text(encode(rows, claims))
    here = ", ".join(f"{name} {value}" for name, value in machine().items())
    (folder / "bench.md").write_text(f"{here}\n\n{claims_table(claims)}\n\n{table(rows)}\n", encoding="utf-8")
    shown = [row for row in rows if row.phases and row.benchmark != "growth"]
    if shown:
        _draw_phases(folder / "phases.png", shown)
    grown = [row for row in rows if row.benchmark == "growth"]
    if grown:
        _draw_growth(folder / "growth.png", grown)
    linked = [row for row in rows if row.benchmark == "network"]
    if linked:
        _draw_networks(folder / "network.png", linked)
    backed = [row for row in rows if row.benchmark == "stragglers"]
    if backed:
        _draw_backups(folder / "backups.png", backed)


def encode(rows: Sequence[Row], claims: Sequence[Claim]) -> str:
    told = {
        "machine": machine(),
        "rows": [asdict(row) | {"median": row.median, "worst": row.worst} for row in rows],
        "claims": [asdict(claim) | {"holds": claim.holds} for claim in claims],
    }
    return json.dumps(told, indent=1, default=float)  # NumPy's numbers too


def decode(text: str) -> tuple[list[Row], list[Claim]]:
    told = json.loads(text)
    rows = [Row(**{k: v for k, v in row.items() if k not in ("median", "worst", "values")}, values=tuple(row["values"]))
            for row in told["rows"]]  # fmt: skip
    return rows, [Claim(**{k: v for k, v in claim.items() if k != "holds"}) for claim in told["claims"]]


# ---- pictures ---------------------------------------------------------------------------------------------------------


def _plot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _draw_phases(path: Path, rows: Sequence[Row]) -> None:
    """One panel for each workload of a benchmark, one bar for each system; each panel has its own scale of seconds."""
    plt = _plot()
    panels: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        panels.setdefault((row.benchmark, row.workload), []).append(row)
    heights = [len(found) + 1.6 for found in panels.values()]
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(10, 0.42 * sum(heights)), squeeze=False, height_ratios=heights, layout="constrained"
    )
    for ax, ((benchmark, workload), found) in zip(axes[:, 0], panels.items(), strict=True):
        colours, spare = {}, iter(_OTHERS * 4)
        for row in found:
            for name in row.phases:
                colours.setdefault(name, _COLOURS.get(name) or next(spare))
        names = [row.system for row in found]
        left = [0.0] * len(found)
        for phase, colour in colours.items():
            widths = [row.phases.get(phase, 0.0) for row in found]
            ax.barh(range(len(found)), widths, left=left, color=colour, label=phase, height=0.7, edgecolor="white", linewidth=0.5)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        for at, total in enumerate(left):
            ax.text(total, at, f" {number(total)} s", va="center", fontsize=8)
        ax.set_yticks(range(len(found)), names, fontsize=8)
        ax.invert_yaxis()
        ax.set_xlim(0, 1.12 * max(left) or 1.0)
        ax.set_title(f"{benchmark}: {workload}, seconds", fontsize=9, loc="left")
        ax.tick_params(axis="x", labelsize=8)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_growth(path: Path, rows: Sequence[Row]) -> None:
    """Seconds a round against parameters: colour for the number of ranks, line style for the engine.

    The workload of such a row is "<millions> M, <ranks> ranks", as growth.py writes it.
    """
    plt = _plot()
    lines: dict[tuple[str, int], list[tuple[float, Row]]] = {}
    for row in rows:
        millions, ranks = row.workload.split(" M, ")
        lines.setdefault((row.system, int(ranks.split()[0])), []).append((float(millions), row))
    all_ranks = sorted({ranks for _, ranks in lines})
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained", sharey=True)
    for ax, title in zip(axes, ("whole round", "sync: exchange and optimizer"), strict=True):
        for (system, ranks), points in sorted(lines.items()):
            points = sorted(points, key=lambda point: point[0])
            seconds = [row.median if ax is axes[0] else row.phases["sync"] for _, row in points]
            ax.plot(
                [x for x, _ in points], seconds, "o-" if system == "barrier" else "s--", markersize=4, linewidth=1.4,
                color=("#4c72b0", "#dd8452", "#55a868", "#c44e52")[all_ranks.index(ranks) % 4], label=f"{system}, {ranks} ranks",
            )  # fmt: skip
        ax.set_xscale("log")
        ax.set_yscale("log")
        ticks = sorted({x for points in lines.values() for x, _ in points})
        ax.set_xticks(ticks, [f"{x:g}" for x in ticks])
        ax.minorticks_off()
        ax.set_xlabel("million parameters")
        ax.set_title(title, fontsize=10)
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("seconds a round")
    axes[1].legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_networks(path: Path, rows: Sequence[Row]) -> None:
    """Methods against networks: how many times sooner than DDP on the same network the loss is reached; above, DDP's own seconds."""
    plt = _plot()
    seconds = {(row.system, row.workload): row.median for row in rows}
    networks = list(dict.fromkeys(row.workload for row in rows))
    systems = [name for name in dict.fromkeys(row.system for row in rows) if name != "DDP"]
    never = float("nan")
    ratios = [[seconds.get(("DDP", net), never) / seconds.get((name, net), never) for net in networks] for name in systems]
    figure, ax = plt.subplots(figsize=(2.6 + 1.35 * len(networks), 1.6 + 0.5 * len(systems)), layout="constrained")
    shades = [[math.log2(x) if 0 < x < math.inf else 0.0 for x in line] for line in ratios]
    most = max(1.0, *(abs(x) for line in shades for x in line))
    ax.imshow(shades, cmap="RdBu", vmin=-1.3 * most, vmax=1.3 * most, aspect="auto")
    for at in range(len(networks)):
        known = [line[at] for line in ratios if math.isfinite(line[at])]
        for i, line in enumerate(ratios):
            x = line[at]
            text = "-" if math.isnan(x) else "not reached" if x == 0 else f"{number(x)}x"
            best = bool(known) and x == max(known)
            dark = abs(shades[i][at]) > 0.9 * most
            ax.text(at, i, text, ha="center", va="center", fontsize=10, weight="bold" if best else "normal",
                    color="white" if dark else "black")  # fmt: skip
    tops = [f"{net.replace(', ', chr(10))}\nDDP {number(seconds.get(('DDP', net), never))} s" for net in networks]
    ax.set_xticks(range(len(networks)), tops, fontsize=9)
    ax.xaxis.tick_top()
    ax.set_yticks(range(len(systems)), systems, fontsize=9)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_xlabel("seconds to the loss, DDP's divided by the method's (bold: the best on this network)", fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_backups(path: Path, rows: Sequence[Row]) -> None:
    """Seconds to the loss against the number of backup workers; as lines across, those of the methods that have none."""
    plt = _plot()
    points = [(int(row.system.split()[0]), row.median) for row in rows if row.system.endswith(" backups")]
    others = [row for row in rows if " backups" not in row.system and math.isfinite(row.median)]
    figure, ax = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    xs, ys = zip(*points, strict=True)
    ax.plot(xs, ys, "o-", color="#4c72b0", linewidth=1.8)
    for x, y in points:
        ax.annotate(number(y), (x, y), textcoords="offset points", xytext=(0, 7), ha="center", fontsize=8)
    for row, colour in zip(others, _OTHERS, strict=False):
        ax.axhline(row.median, color=colour, linestyle="--", linewidth=1.2, label=f"{row.system}: {number(row.median)} s")
    ax.set_xticks(xs)
    ax.set_ylim(0, 1.15 * max(*ys, *(row.median for row in others)))
    ax.set_xlabel(f"backup workers, of {rows[0].workload}")
    ax.set_ylabel("seconds to the loss")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=130)
    plt.close(figure)
