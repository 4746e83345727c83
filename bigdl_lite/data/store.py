"""A decoded share on local disk: written once, mapped by every Python worker that needs it.

    <folder>/<key>/meta.json      {"columns": [[dtype, shape], ...], "inputs": k, "target": whether, "weight": whether}
    <folder>/<key>/<i>.raw        column i, C order

A share is complete or absent: it is written aside and renamed.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch

from bigdl_lite.batch import Batch


def save(folder: Path, key: str, share: Batch) -> None:
    """Writes the share. Another writer of the same key may win: both wrote the same."""
    folder.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{key}-", dir=folder))
    try:
        columns = [*share.inputs, *(x for x in (share.target, share.weight) if x is not None)]
        for i, x in enumerate(columns):
            # as bytes: NumPy has no bfloat16
            x.reshape(-1).view(torch.uint8).numpy().tofile(aside / f"{i}.raw")
        meta = {"columns": [[str(x.dtype).removeprefix("torch."), list(x.shape)] for x in columns], "inputs": len(share.inputs)}
        meta |= {"target": share.target is not None, "weight": share.weight is not None}
        (aside / "meta.json").write_text(json.dumps(meta))
        os.rename(aside, folder / key)
    except OSError:
        shutil.rmtree(aside, ignore_errors=True)
        if not (folder / key).exists():
            raise


def load(folder: Path, key: str) -> Batch | None:
    """The share, memory-mapped; None where this disk does not have it.  Cost: no copy; pages are shared."""
    path = folder / key
    try:
        meta = json.loads((path / "meta.json").read_text())
    except FileNotFoundError:
        return None
    columns = []
    for i, (name, shape) in enumerate(meta["columns"]):
        dtype = getattr(torch, name)
        nbytes = math.prod(shape) * dtype.itemsize
        if not nbytes:  # an empty file cannot be mapped
            columns.append(torch.empty(shape, dtype=dtype))
            continue
        # mode "c": private pages, so that torch may treat the memory as writable
        array = np.memmap(path / f"{i}.raw", np.uint8, "c", shape=(nbytes,))
        columns.append(torch.from_numpy(np.asarray(array)).view(dtype).view(shape))
    rest = iter(columns[meta["inputs"] :])
    target, weight = (next(rest) if meta[name] else None for name in ("target", "weight"))
    return Batch(tuple(columns[: meta["inputs"]]), target, weight)
