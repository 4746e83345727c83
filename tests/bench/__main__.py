"""All benchmarks, one after the other, each in a process (and a Spark session) of its own.

    python -m tests.bench [names...] [--repeat 5] [--quick] [--out FOLDER] [--data FOLDER]

Prints the claims and the rows; writes bench.json, bench.md and the pictures to --out. Systems that are compared are
always measured within one benchmark, in turn. A benchmark that fails is reported and the others go on.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.bench.gpu import why_not as no_gpu
from tests.bench.hosts import why_not
from tests.bench.report import Claim, Context, Row, claims_table, decode, encode, table, write

ROOT = Path(__file__).resolve().parents[2]
# need hosts with slow links: left out where there can be none
ON_HOSTS = ("network", "s2", "gradiveq", "overlap", "pipe", "neighbours", "scale")
NAMES = (
    "training", "memory", "meeting", "growth", "fits", "start", "ingest", "transform", "large", "overhead", "distributor", "soak",
    "codecs", "skew", "stragglers", "search", *ON_HOSTS, "gpu",
)  # fmt: skip
MODULES = {"s2": "embedding"}  # where a module's name is another


def inside(name: str, context: Context, out: Path) -> None:
    """One benchmark, in this process."""
    import torch

    torch.set_num_threads(1)
    module = importlib.import_module(f"tests.bench.{MODULES.get(name, name)}")
    try:
        rows, claims = module.run(context)
    finally:
        context.close()
    out.write_text(encode(rows, claims))


def outside(name: str, asked: argparse.Namespace, out: Path) -> tuple[list[Row], list[Claim]]:
    """One benchmark, in a process of its own. Raises CalledProcessError where it fails."""
    settings = ["--inside", str(out), "--repeat", str(asked.repeat), "--data", str(asked.data), *(["--quick"] if asked.quick else [])]
    # workers find both packages, and the modules that pickle refers to by name
    path = os.pathsep.join(x for x in (str(ROOT), os.environ.get("PYTHONPATH", "")) if x)
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "tests.bench", name, *settings], check=True, cwd=ROOT, env=environment)
    return decode(out.read_text())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(NAMES)}; none: all")
    parser.add_argument("--repeat", type=int, default=5, help="how often each system is measured")
    parser.add_argument("--quick", action="store_true", help="small sizes: does everything run?")
    parser.add_argument("--out", type=Path, default=Path("build/bench"), help="where results go")
    parser.add_argument("--data", type=Path, default=Path(tempfile.gettempdir(), "bigdl_lite-bench"), help="where data sets are kept")
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if unknown := set(asked.names) - set(NAMES):
        parser.error(f"no benchmark {sorted(unknown)[0]!r}: {', '.join(NAMES)}")
    asked.data = asked.data.resolve()
    asked.data.mkdir(parents=True, exist_ok=True)
    if asked.inside:
        inside(asked.names[0], Context(None, asked.repeat, asked.data, asked.quick), asked.inside)
        return 0
    rows: list[Row] = []
    claims: list[Claim] = []
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        for name in asked.names or NAMES:
            if reason := why_not() if name in ON_HOSTS else no_gpu() if name == "gpu" else "":
                print(f"{name} left out: {reason}", file=sys.stderr, flush=True)
                continue
            began = time.perf_counter()
            try:
                more, found = outside(name, asked, Path(folder, f"{name}.json"))
            except subprocess.CalledProcessError as error:
                print(f"{name} failed: {error}", file=sys.stderr, flush=True)
                failed.append(name)
                continue
            rows += more
            claims += found
            write(asked.out, rows, claims)  # what is measured is kept, whatever comes next
            print(f"\n{name}: {time.perf_counter() - began:.0f} s\n\n{claims_table(found)}\n\n{table(more)}\n", flush=True)
    print(f"\nresults: {asked.out}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
