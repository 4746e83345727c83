"""Tables of the guide's page on scale, out of measured points: nothing is measured here.

    python -m tests.bench.scale_page && python -m tests.bench.scale_plot      from examples/guide/scale.json to scale.md

What is predicted here is predicted for hosts that have processors of their own, as fast as those that were measured on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tests.bench import costs
from tests.bench.costs import ENGINES, Model, Point
from tests.bench.report import number
from tests.bench.scale import checked, load, split

GUIDE = Path(__file__).resolve().parents[2] / "examples" / "guide"
POINTS = GUIDE / "scale.json"
EXECUTORS = (16, 32, 64, 128, 256, 512, 1024)
SIZES = {"0.06 M (LeNet)": 6.2e4, "7 M (Inception v1)": 7e6, "25 M (ResNet-50)": 2.5e7, "100 M": 1e8}
NETWORKS = {"1 GbE, 0.5 ms": (1.25e8, 5e-4), "10 GbE, 0.2 ms": (1.25e9, 2e-4), "25 GbE, 0.1 ms": (3.125e9, 1e-4)}
USUAL = "10 GbE, 0.2 ms"
WEAK_COMPUTE, STRONG_COMPUTE = 1.0, 256.0  # seconds of a step: of each executor; of all together
BIGDL = (16, 96, 5.3)  # from so many nodes to so many: how many times the throughput
BIGDL_SYNC, BIGDL_NODES = 0.07, 32


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
        "measured": _measured(points), "errors": _errors(points), "coefficients": _coefficients(fitted), "ways": _ways(fitted),
        "counted": _counted(points), "overheads": _overheads(fitted), "breaks": _breaks(fitted), "bigdl": _bigdl(fitted),
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


def _counted(points: Sequence[Point]) -> str:
    """Bytes on the driver's link, as the kernel counts them, over those of the formulas."""
    ranks = sorted({x.p for x in points})
    lines = []
    for n in sorted({x.n for x in points}):
        here = {p: [x for x in points if (x.engine, x.n, x.p) == ("shuffle", n, p)] for p in ranks}
        for way, ratio in (("sent", _sent), ("received", _received)):
            lines.append([f"{n / 1e6:.2g} M, {way}", *(_range([ratio(x) for x in here[p]]) for p in ranks)])
    return _table(["counted / formula", *(f"{p} ranks" for p in ranks)], lines)


def _sent(x: Point) -> float:
    return x.driver_sent / costs.count(x.engine, x.p, x.n).sends


def _received(x: Point) -> float:
    return x.driver_received / costs.count(x.engine, x.p, x.n).receives


def _range(found: Sequence[float]) -> str:
    return f"{min(found):.2f} to {max(found):.2f}" if found else "-"


def _breaks(fitted: Mapping[str, Model]) -> str:
    """From how many executors on half of the work is lost, how many are the most of use, and what is then the largest part."""
    at = [2**k for k in range(1, 11)]
    lines = []
    for engine, model in fitted.items():
        for size, n in SIZES.items():
            where = n, *NETWORKS[USUAL]
            half = next((p for p in at if overhead(model, p, *where) >= WEAK_COMPUTE), None)
            best = max(at, key=lambda p, model=model, where=where: strong(model, p, *where))
            told = f"{half:,}: {dominant(model, half, *where)}" if half else f"not up to {at[-1]:,}"
            gain = f"{best:,}: {number(strong(model, best, *where))} times, then {dominant(model, best, *where)}"
            lines.append([engine, size, told, gain])
    lost = f"half is lost from (weak, {WEAK_COMPUTE:g} s)"
    return _table(["engine", "values", lost, f"the most that helps (strong, {STRONG_COMPUTE:g} s shared)"], lines)


def _ways(fitted: Mapping[str, Model]) -> str:
    """The share of linear throughput of 7 M values on USUAL, with WEAK_COMPUTE a step, and what changes it."""
    n, where = SIZES["7 M (Inception v1)"], NETWORKS[USUAL]

    def share(model: Model, p: int, every: int = 1) -> str:
        compute = every * WEAK_COMPUTE
        return f"{100 * compute / model.seconds(p, n, compute, *where):.0f} %"

    ways: dict[str, Callable[[Model, int], str]] = {
        "as it is, one core an executor": share,
        "`local_sgd(8)`": lambda model, p: share(model, p, every=8),
        "one task of 8 threads instead of 8 tasks": lambda model, p: share(model, p // 8),
        "both": lambda model, p: share(model, p // 8, every=8),
    }
    cores = (128, 1024)
    head = ["share of linear", *(f"{engine}, {p:,} cores" for engine in fitted for p in cores)]
    return _table(head, [[name, *(of(model, p) for model in fitted.values() for p in cores)] for name, of in ways.items()])


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


# ---- the page ---------------------------------------------------------------------------------------------------------


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
    page = GUIDE / "scale.md"
    page.write_text(filled(page.read_text(), tables(load(POINTS))))


if __name__ == "__main__":
    main()
