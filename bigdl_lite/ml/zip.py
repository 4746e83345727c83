"""This package as one file, for executors that do not have it: spark-submit --py-files bigdl_lite.zip program.py

    python -m bigdl_lite.ml.zip                    writes bigdl_lite.zip
    python -m bigdl_lite.ml.zip path/of/some.zip

Pure Python, so one file serves every machine; torch, numpy, pyarrow and safetensors must be installed on the executors, as Spark is.
Without spark.python.daemon.module: the daemon starts before Spark brings the file.
"""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]


def build(path: str | Path = "bigdl_lite.zip") -> Path:
    """Writes the package to `path`; the same sources make the same bytes. Raises FileNotFoundError where it runs from such a file."""
    if not PACKAGE.is_dir():
        raise FileNotFoundError(f"{PACKAGE} is no folder: bigdl_lite was imported from a zip file already; send that one along")
    path = Path(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for source in sorted(PACKAGE.rglob("*")):
            if source.is_file() and "__pycache__" not in source.parts:
                entry = zipfile.ZipInfo(str(source.relative_to(PACKAGE.parent)))  # of 1980, whenever it was written
                entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
                file.writestr(entry, source.read_bytes())
    return path


def main(arguments: Sequence[str]) -> int:
    if len(arguments) > 1 or any(argument.startswith("-") for argument in arguments):
        print(__doc__, file=sys.stderr)
        return 2
    path = build(*arguments)
    print(f"{path}: {path.stat().st_size / 1024:.0f} KiB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
