"""Executors with a Python of their own, that came as an archive: spark-submit --archives env.tar.gz#environment.

The environment here is a real venv with the package in it. Its other libraries are named in a .pth file and not copied, because torch
alone would be a gigabyte to pack.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.standalone import TRAINS, Cluster
from tests.conftest import ROOT

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(600)]  # three minutes on two busy cores

SAYS = """
import os, sys
def here(i):
    import bigdl_lite
    yield sys.prefix, os.path.abspath(bigdl_lite.__file__)
where = sorted(spark.sparkContext.parallelize(range(2), 2).mapPartitions(here).collect())
losses = {engine: [line["loss"] for line in fit(engine).history if "steps" in line] for engine in ("barrier", "shuffle")}
print(json.dumps({"losses": losses, "where": where, "driver": bigdl_lite.__file__}))
"""


def packed(folder: Path, libraries: Path) -> tuple[Path, Path]:
    """(an environment with the package, its archive), made as the guide says."""
    environment, archive = folder / "env", folder / "env.tar.gz"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True, timeout=60)
    (site,) = environment.glob("lib/python*/site-packages")
    shutil.copytree(ROOT / "bigdl_lite", site / "bigdl_lite", ignore=shutil.ignore_patterns("__pycache__"))
    (site / "libraries.pth").write_text(f"{libraries}\n")
    subprocess.run(["tar", "-C", environment, "-czf", archive, "."], check=True, timeout=60)
    return environment, archive


def test_executors_run_the_python_of_the_archive_and_train(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path / "cluster")
    environment, archive = packed(tmp_path, cluster.libraries)
    cluster.environment.pop("PYTHONPATH")  # executors have what the archive brings, and nothing else
    cluster.environment |= {"PYSPARK_PYTHON": "./environment/bin/python", "PYSPARK_DRIVER_PYTHON": str(environment / "bin" / "python")}
    program = tmp_path / "program.py"
    program.write_text(TRAINS + SAYS)
    try:
        cluster.begin()
        done = cluster.submit(program, "--archives", f"{archive}#environment")
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        told = json.loads(done.stdout.strip().splitlines()[-1])
        assert len(told["where"]) == 2
        for prefix, package in told["where"]:
            assert prefix.startswith(str(cluster.folder / "work")) and prefix.endswith("/environment"), told
            assert package.startswith(prefix), told
        assert told["driver"].startswith(str(environment))
        assert told["losses"]["barrier"] == pytest.approx(told["losses"]["shuffle"], abs=1e-6)

        # the control: without the archive there is no such Python
        done = cluster.submit(program, "--conf", "spark.task.maxFailures=1")
        assert done.returncode != 0 and 'Cannot run program "./environment/bin/python"' in done.stdout
    finally:
        left = cluster.close()
    assert not left
