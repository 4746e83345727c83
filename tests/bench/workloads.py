"""The four pieces of work that every system is timed on: the same module, rows, batch and optimizer for all of them.

    W1   LeNet            20,000 images 1x28x28, raw bytes     batch   256   SGD, momentum   many small steps
    W2   NCF           1,000,000 pairs (user, item)            batch 8,192   Adam            1.27 M values, mostly embeddings
    W3   MLP               8,000 rows of 64 numbers            batch   128   Adam            25 M values: the exchange is the work
    W4   wide table      500,000 rows of 200 float columns     batch 4,096   Adam            reading is the work

All rows are made from a seed and written once as Parquet; what a plain torch program would hold in memory is read from
the same files. Labels follow from the inputs, so that a loss that falls means that rows reached the module whole.

    B  rows of a batch
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from bigdl_lite import Raw

FILES, GROUPS = 4, 4  # files of one data set, row groups of one file
USERS, ITEMS = 6_040, 3_706
FEATURES, WIDE = 64, 200

Table = dict[str, pa.Array]


@dataclass(frozen=True)
class Workload:
    """Rows, module and settings. inputs and decoders are what TorchEstimator takes; make(): always the same first weights.

    loss       () -> the loss (output, target) -> mean over rows
    optimizer  parameters -> optimizer, written as users write it
    table      (generator, rows) -> columns
    """

    name: str
    title: str
    rows: int
    batch: int
    make: Callable[[], nn.Module]
    loss: Callable[[], Callable[[Any, Tensor], Tensor]]
    optimizer: Callable[[Any], torch.optim.Optimizer]
    inputs: list[Any]
    label: str
    table: Callable[[np.random.Generator, int], Table]
    decoders: dict[str, Any] = field(default_factory=dict)

    def count(self, quick: bool) -> int:
        return max(self.rows // 20, 2 * self.batch) if quick else self.rows

    def write(self, folder: Path, quick: bool = False, rows: int | None = None) -> Path:
        """The folder of Parquet files that holds the rows; written if it is not there yet.

        rows  how many; None: all of the workload, a twentieth where quick
        """
        rows = rows or self.count(quick)
        path = Path(folder, f"{self.name}-{rows}")
        if path.exists():
            return path
        table = pa.table(self.table(np.random.default_rng(0), rows))
        begun = path.with_suffix(".part")
        shutil.rmtree(begun, ignore_errors=True)
        begun.mkdir(parents=True)
        step = -(-rows // FILES)
        for i in range(FILES):
            part = table.slice(i * step, step)
            pq.write_table(part, begun / f"part-{i}.parquet", row_group_size=max(1, -(-len(part) // GROUPS)))
        begun.rename(path)  # a program that was stopped leaves no half of a data set
        return path

    def tensors(self, path: Path) -> tuple[list[Tensor], Tensor]:
        """The rows of `path` (see write) as a program without Spark would hold them: the inputs, and the label [rows]."""
        table = pq.read_table(path).combine_chunks()
        inputs = []
        for name in self.inputs:
            if isinstance(name, list):
                inputs.append(torch.from_numpy(np.stack([table[part].to_numpy() for part in name], 1)))
            else:
                inputs.append(self._tensor(table, name))
        return inputs, self._tensor(table, self.label)

    def _tensor(self, table: pa.Table, name: str) -> Tensor:
        (column,) = table[name].chunks
        if raw := self.decoders.get(name):
            values = np.frombuffer(b"".join(column.to_pylist()), raw.dtype).reshape(-1, *raw.shape)
            return torch.from_numpy(values.copy())
        if pa.types.is_list(column.type):
            return torch.from_numpy(column.flatten().to_numpy().reshape(len(column), -1).copy())
        return torch.from_numpy(column.to_numpy(zero_copy_only=False).copy())

    def estimator(self, engine: str, **more: Any) -> Any:
        """A TorchEstimator for this work on two workers."""
        from bigdl_lite import TorchEstimator

        settings: Mapping[str, Any] = {
            "module": self.make, "loss": self.loss(), "optimizer": self.optimizer, "inputCols": self.inputs, "labelCol": self.label,
            "decoders": self.decoders, "batchSize": self.batch, "epochs": 1, "numWorkers": 2, "engine": engine, "progress": "none",
        }  # fmt: skip
        return TorchEstimator(**{**settings, **more})


# ---- W1 ---------------------------------------------------------------------------------------------------------------


class LeNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
        )  # fmt: skip

    def forward(self, image: Tensor) -> Tensor:  # uint8 [B, 1, 28, 28]
        return self.layers(image.float() / 255)  # [B, 10]


def _images(rng: np.random.Generator, rows: int) -> Table:
    """The brightest of ten bands of an image is its class."""
    label = rng.integers(0, 10, rows)
    pixels = rng.integers(0, 128, (rows, 28, 28), dtype=np.uint8)
    for band in range(10):
        pixels[label == band, 2 * band + 4 : 2 * band + 6] += 100
    return {"image": pa.array([image.tobytes() for image in pixels], pa.binary()), "label": pa.array(label)}


def _sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


# ---- W2 ---------------------------------------------------------------------------------------------------------------


class NCF(nn.Module):
    """Neural collaborative filtering: a product of embeddings and an MLP over others, joined by one layer.

    Source: He et al., "Neural Collaborative Filtering", WWW 2017.
    """

    def __init__(self, users: int = USERS, items: int = ITEMS, dim: int = 64) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(users, dim), nn.Embedding(items, dim)
        self.users_deep, self.items_deep = nn.Embedding(users, dim), nn.Embedding(items, dim)
        self.deep = nn.Sequential(nn.Linear(2 * dim, 2 * dim), nn.ReLU(), nn.Linear(2 * dim, dim), nn.ReLU())
        self.last = nn.Linear(2 * dim, 1)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:  # [B], [B]
        product = self.users(user) * self.items(item)
        deep = self.deep(torch.cat([self.users_deep(user), self.items_deep(item)], 1))
        return self.last(torch.cat([product, deep], 1)).squeeze(1)  # [B]


def _pairs(rng: np.random.Generator, rows: int) -> Table:
    user, item = rng.integers(0, USERS, rows), rng.integers(0, ITEMS, rows)
    taste, genre = rng.standard_normal((USERS, 4)), rng.standard_normal((ITEMS, 4))
    liked = (taste[user] * genre[item]).sum(1) > 0
    return {"user": pa.array(user), "item": pa.array(item), "liked": pa.array(liked.astype("f4"))}


# ---- W3 and W4 --------------------------------------------------------------------------------------------------------


def net(millions: float) -> nn.Module:
    """An MLP of about that many million parameters: 64 -> h -> h -> h/2 -> a number.  [B, 64] -> [B]"""
    h = int((millions * 1e6 / 1.5) ** 0.5)
    return nn.Sequential(
        nn.Linear(FEATURES, h), nn.ReLU(), nn.Linear(h, h), nn.ReLU(), nn.Linear(h, h // 2), nn.ReLU(), nn.Linear(h // 2, 1),
        nn.Flatten(0),
    )  # fmt: skip


def _vectors(rng: np.random.Generator, rows: int) -> Table:
    x = rng.standard_normal((rows, FEATURES)).astype("f4")
    offsets = np.arange(0, x.size + 1, FEATURES, dtype="i4")
    return {"features": pa.ListArray.from_arrays(offsets, x.ravel()), "label": pa.array(x[:, :8].sum(1))}


def _wide(rng: np.random.Generator, rows: int) -> Table:
    x = rng.standard_normal((WIDE, rows)).astype("f4")
    return {f"f{i}": pa.array(x[i]) for i in range(WIDE)} | {"label": pa.array(x[:8].sum(0))}


def _tabular() -> nn.Module:
    return nn.Sequential(
        nn.Linear(WIDE, 256), nn.ReLU(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 1), nn.Flatten(0)
    )


def adam(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-3)


def _slow_adam(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=1e-4)


@dataclass(frozen=True)
class Seeded:
    """A function that makes the same module with the same first weights each time, and leaves the global generator as it was."""

    make: Callable[..., nn.Module]
    arguments: tuple[Any, ...] = ()

    def __call__(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.make(*self.arguments)


def mlp(millions: float, rows: int, batch: int) -> Workload:
    """W3 of any size."""
    return Workload(
        "W3", f"MLP of {millions:g} M parameters", rows, batch, Seeded(net, (millions,)), nn.MSELoss, _slow_adam, ["features"], "label",
        _vectors,
    )  # fmt: skip


W1 = Workload(
    "W1", "LeNet", 20_000, 256, Seeded(LeNet), nn.CrossEntropyLoss, _sgd, ["image"], "label", _images,
    {"image": Raw((1, 28, 28), "uint8")},
)  # fmt: skip
W2 = Workload("W2", "NCF", 1_000_000, 8_192, Seeded(NCF), nn.BCEWithLogitsLoss, adam, ["user", "item"], "liked", _pairs)
W3 = mlp(25, 8_000, 128)
W4 = Workload(
    "W4", "table of 200 columns", 500_000, 4_096, Seeded(_tabular), nn.MSELoss, adam, [[f"f{i}" for i in range(WIDE)]], "label", _wide
)
WORKLOADS = {work.name: work for work in (W1, W2, W3, W4)}
