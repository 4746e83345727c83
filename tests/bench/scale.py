"""How a step grows with executors, model and network: measured with 2, 4 and 8 ranks, fitted, and predicted up to 1,024.

    measure   8 hosts (network namespaces) with limited links, the driver's among them; both engines as on several machines,
              so nobody looks at another's memory; an MLP on 4 rows a rank, Adam
    fit       costs.py, on 2 and 4 ranks and the links of FITTED
    check     8 ranks, and the link of HELD_OUT, are predicted and compared; a model without a term must do clearly worse

All hosts share the cores of one machine: what is emulated is links, not processors. Therefore compute is small here, and what
each host's processes do is counted by the kernel (counters.py) and taken p / cores times; where hosts have their own, once.

    python -m tests.bench scale --out FOLDER              all links; points.json lies in the folder of --data
    python -m tests.bench.scale points.json LINK ...      adds the points of some links to a file, a few minutes each
    python -m tests.bench.scale_page                      the guide's tables, and with scale_plot its pictures, out of scale.json
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from bigdl_lite import BarrierEngine, ShuffleEngine, TorchEstimator
from tests.bench import costs
from tests.bench.costs import ENGINES, TERMS, Point, count, errors, typical
from tests.bench.counters import counted
from tests.bench.hosts import Hosts, Network, Program, Told
from tests.bench.report import Claim, Context, Row
from tests.bench.workloads import FEATURES, Seeded, adam, net

WORKERS = 8  # what hosts.py waits for
SETTINGS = {"spark.python.unix.domain.socket.enabled": "true", "spark.executorEnv.OMP_NUM_THREADS": "1"}
RANKS, FITTED_RANKS, MILLIONS, ROWS, WARM = (2, 4, 8), (2, 4), (0.06, 1.0, 4.0), 4, 2
LINKS = {"fast": Network("400mbit", "none"), "slow": Network("100mbit", "5ms"), "middle": Network("200mbit", "2ms")}
HELD_OUT = "middle"
MOST = 0.25  # the error that is allowed
# how many times larger it must be without terms; busy and wire both grow with bytes, so each takes part of the other's place
WORSE = {("busy",): 1.0, ("wire",): 1.0, ("busy", "wire"): 2.0}
TOLD = 1.0  # seconds between two looks at the counters


def engine_of(name: str) -> Any:
    return (BarrierEngine if name == "barrier" else ShuffleEngine)(share_memory=False)


# ---- measuring --------------------------------------------------------------------------------------------------------


def fit(spark: Any, told: Told) -> Told:
    """told: engine, ranks, millions, steps. What a step took, and what was counted in one."""
    from pyspark.sql import functions as F

    ranks, steps = told["ranks"], told["steps"] + WARM
    row = F.col("id").cast("float")
    vector = F.array(*(F.sin(row * (i + 1)).cast("float") for i in range(FEATURES)))
    frame = spark.range(0, ROWS * ranks * steps, 1, ranks).select(vector.alias("x"), F.sin(row).cast("float").alias("y"))
    seen: list[tuple[int, float, Any]] = []
    last = 0.0

    def look(event: Any) -> None:
        """Between two rounds of shuffle; of barrier, soon after."""
        nonlocal last
        step, now = getattr(event, "step", -1), time.monotonic()
        if hasattr(event, "done"):  # the one epoch is over: all its lines come, while those of steps are thinned
            seen.append((steps - 1, now, counted()))
        elif hasattr(event, "sync_s") and step >= WARM - 1 and now - last > TOLD:
            last = now
            seen.append((step, now, counted()))

    estimator = TorchEstimator(
        module=Seeded(net, (told["millions"],)), loss=nn.MSELoss(), optimizer=adam, inputCols=["x"], labelCol="y",
        batchSize=ROWS * ranks, numWorkers=ranks, engine=engine_of(told["engine"]), progress="none", callbacks=[look],
    )  # fmt: skip
    history = [line for line in estimator.fit(frame).history if "step" in line][WARM:]
    (first, began, before), (end, ended, after) = seen[0], seen[-1]
    if end <= first:
        raise RuntimeError(f"{told}: the counters were read once only, at step {first}: more steps are needed")
    driver, workers, others = ((b - a) / (end - first) for a, b in zip(before, after, strict=True))
    middle = {key: statistics.median(line[key] for line in history) for key in ("compute_s", "bytes_sent")}
    return {
        "seconds": [round(line["seconds"], 5) for line in history], "compute": middle["compute_s"], "sent": middle["bytes_sent"],
        "driver_cpu": driver.cpu, "worker_cpu": workers.cpu / ranks, "driver_sent": driver.sent, "driver_received": driver.received,
        "others": others * (end - first) / (ended - began),
    }  # fmt: skip


def steps_of(engine: str, ranks: int, n: int, rate: float) -> int:
    """About three seconds of steps, at least three."""
    guess = count(engine, ranks, n).wire / rate + (0.004 * ranks if engine == "barrier" else 0.08 + 0.04 * ranks) + n * ranks * 2e-8
    return max(3, min(800, int(3.5 / guess)))


def measured(program: Program, hosts: Hosts, name: str, quick: bool = False) -> Iterator[Point]:
    """The points of one link, in turn over engines, sizes and ranks."""
    link = LINKS[name]
    print(f"scale: {name}, {hosts.limit(link, driver=True)}", file=sys.stderr, flush=True)
    rate, delay = float(link.rate[:-4]) * 1e6 / 8, 0.0 if link.delay == "none" else float(link.delay[:-2]) / 1e3
    for millions, engine, ranks in itertools.product(MILLIONS[:1] if quick else MILLIONS, ENGINES, RANKS):
        n = sum(p.numel() for p in net(millions).parameters())
        steps, began = steps_of(engine, ranks, n, rate), time.monotonic()
        told = program.ask({"engine": engine, "ranks": ranks, "millions": millions, "steps": steps})
        yield Point(engine, ranks, n, rate, delay, os.cpu_count() or 1, tuple(told.pop("seconds")), link=str(link), **told)
        print(f"scale: {engine}, {n:,} values, {ranks} ranks: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)


def measure(names: Sequence[str], quick: bool = False, keep: Any = None) -> list[Point]:
    """keep(points) after each, so that what is measured stays, whatever comes next."""
    points: list[Point] = []
    with Hosts(WORKERS) as hosts:
        program = hosts.spark("tests.bench.scale")  # which may run as __main__
        for engine in ENGINES:  # what starts with the first fits
            program.ask({"engine": engine, "ranks": WORKERS, "millions": MILLIONS[0], "steps": 40})
        for name in names:
            for point in measured(program, hosts, name, quick):
                points.append(point)
                if keep:
                    keep(points)
    return points


def load(path: Path) -> list[Point]:
    return [Point.load(told) for told in json.loads(path.read_text())] if path.exists() else []


def save(path: Path, points: Sequence[Point]) -> None:
    lines = ",\n".join(json.dumps(point.dump()) for point in points)
    path.write_text(f"[\n{lines}\n]\n")


def alone(points: Sequence[Point]) -> list[Point]:
    """The points with the compute of a rank that has a core to itself: that of the fewest ranks, of the same model."""
    least: dict[int, float] = {}
    for point in points:
        if point.p <= point.cores:
            least[point.n] = min(point.compute, least.get(point.n, point.compute))
    return [Point.load(point.dump() | {"compute": least.get(point.n, point.compute)}) for point in points]


# ---- fit and check ----------------------------------------------------------------------------------------------------


def split(points: Sequence[Point]) -> dict[str, list[Point]]:
    """What is fitted, and what is predicted: more ranks, and another network."""
    out = str(LINKS[HELD_OUT])
    return {
        "fitted": [x for x in points if x.p in FITTED_RANKS and x.link != out],
        "8 ranks": [x for x in points if x.p not in FITTED_RANKS and x.link != out],
        "another link": [x for x in points if x.p in FITTED_RANKS and x.link == out],
        "8 ranks, another link": [x for x in points if x.p not in FITTED_RANKS and x.link == out],
    }


def checked(points: Sequence[Point]) -> dict[str, float]:
    """Typical sizes of errors by group of split(); "without <term>": of all that was not fitted, by a model fitted without it."""
    groups = split(points)
    new = [x for name, group in groups.items() if name != "fitted" for x in group]
    model = costs.fit(groups["fitted"])
    found = {name: typical(errors(model, group)) for name, group in groups.items() if group}
    found["predicted"] = typical(errors(model, new))
    for terms in [*((term,) for term in TERMS[1:]), ("busy", "wire")]:
        found[f"without {', '.join(terms)}"] = typical(errors(costs.fit(groups["fitted"], without=terms), new))
    return found


def claims(points: Sequence[Point]) -> list[Claim]:
    found = []
    for engine in ENGINES:
        mine = [x for x in points if x.engine == engine]
        told = checked(mine)
        text = f"{engine}: error of a step's seconds, with ranks and links that were not fitted"
        found.append(Claim("scale", text, told["predicted"], MOST, "<="))
        for terms, worse in WORSE.items():
            without = f"without {', '.join(terms)}"
            text = f"{engine}: that error of a model {without}, against with all"
            found.append(Claim("scale", text, told[without] / told["predicted"], worse))
    exact = [x for x in points if x.engine == "barrier"]
    off = max(abs(x.sent - x.p * count("barrier", x.p, x.n).wire) for x in exact)
    return [*found, Claim("scale", "barrier: bytes that are counted, minus those of the formula", off, 0.0, "<=")]


def rows(points: Sequence[Point]) -> list[Row]:
    found = []
    for engine in ENGINES:
        mine = [x for x in points if x.engine == engine]
        model = costs.fit(split(mine)["fitted"])
        for x in mine:
            note = f"predicted {model.at(x):.3f} s; processor seconds: driver {x.driver_cpu:.3f}, an executor {x.worker_cpu:.3f}"
            found.append(Row("scale", f"{x.n / 1e6:.2g} M, {x.p} ranks, {x.link}", engine, "s", x.seconds, {}, note))
    return found


def run(context: Context) -> tuple[list[Row], list[Claim]]:
    path = context.folder / "points.json"
    points: list[Point] = []
    for _ in range(1 if context.quick else context.repeat):
        before = list(points)
        points += measure(tuple(LINKS), context.quick, lambda new, before=before: save(path, alone([*before, *new])))
    points = alone(points)
    return rows(points), claims(points)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("points", type=Path)
    parser.add_argument("links", nargs="+", choices=LINKS)
    asked = parser.parse_args()
    before = load(asked.points)
    measure(asked.links, keep=lambda new: save(asked.points, alone([*before, *new])))


if __name__ == "__main__":
    main()
