"""Transfer: what a net learned from many pictures of five digits helps with the other five, of which there are three each.

    digits 0-4, 1,800 pictures --> fit --> save --> load --> convolutions, frozen --.
                                                                                    +-- a new head --> fit --> accuracy
    digits 5-9, 15 pictures -------------------------------------------------------'
                                `--> the same net from its first weights, the control

    python examples/transfer_learning.py

The pictures are those of scikit-learn, 8 x 8 pixels, each at a place drawn by lot in a black field of 16 x 16. That a digit
is the same wherever it stands can be learned from any digits, and not from three.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from pyspark.sql import DataFrame, SparkSession, Window
from pyspark.sql import functions as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from bigdl_lite import Raw, TorchClassifier, TorchModel, local_session

SIDE, WIDTH, EACH = 16, 128, 3


class Net(nn.Module):
    """[B, 1, SIDE, SIDE] uint8 -> [B, 5]: convolutions that say what is there, wherever it is, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),  # [B, 16, 8, 8]
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(),
            nn.Conv2d(32, WIDTH, 3, padding=1), nn.ReLU(), nn.AdaptiveMaxPool2d(1),  # [B, WIDTH, 1, 1]
            nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Sequential(nn.Dropout(0.3), nn.Linear(WIDTH, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x / 16))


def placed(spark: SparkSession, copies: int, seed: int) -> DataFrame:
    """(id long, picture binary, digit long), `copies` of each digit, at as many places; a byte a pixel, 0 .. 16."""
    digits, rng = load_digits(), np.random.default_rng(seed)
    rows = []
    for i, (image, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        for _ in range(copies):
            picture = np.zeros((SIDE, SIDE), np.uint8)
            down, right = rng.integers(SIDE - 7, size=2)
            picture[down : down + 8, right : right + 8] = image
            rows.append((i, picture.tobytes(), int(digit)))
    return spark.createDataFrame(rows, "id long, picture binary, digit long")


def fit(train: DataFrame, module: nn.Module | Callable[[], nn.Module], epochs: int, lr: float) -> TorchModel:
    return TorchClassifier(
        module=module,
        optimizer=partial(torch.optim.Adam, lr=lr),
        inputCols=["picture"],
        decoders={"picture": Raw((1, SIDE, SIDE), "uint8")},
        batchSize=64,
        epochs=epochs,
        seed=0,
    ).fit(train)


def main(spark: SparkSession) -> dict[str, float]:
    """Runs the example; returns what it prints."""
    known = placed(spark, 2, seed=0).where("digit < 5").withColumnRenamed("digit", "label")
    new = placed(spark, 1, seed=1).where("digit >= 5").selectExpr("id", "picture", "digit - 5 AS label").cache()
    place = F.row_number().over(Window.partitionBy("label").orderBy("id"))
    few = new.withColumn("place", place).where(F.col("place") <= EACH).drop("place").cache()
    test = new.join(few, "id", "left_anti").cache()

    with tempfile.TemporaryDirectory() as folder:
        fit(known, Net, epochs=8, lr=3e-3).write().overwrite().save(f"{folder}/known")
        net = TorchModel.load(f"{folder}/known").module
    net.body.requires_grad_(False)  # what is frozen is neither trained nor sent
    net.head = Net().head
    transferred = fit(few, net, epochs=60, lr=2e-2)
    scratch = fit(few, Net, epochs=60, lr=3e-3)

    models = {"transfer": transferred, "scratch": scratch}
    figures = {name: model.evaluate(test, ["accuracy"])["accuracy"] for name, model in models.items()}
    print(f"rows                 {known.count():,} of digits 0-4; {few.count()} of digits 5-9; tested on {test.count():,}")
    print(f"head alone           {figures['transfer']:.3f}, on convolutions that know digits 0-4")
    print(f"from scratch         {figures['scratch']:.3f}")
    for frame in (new, few, test):
        frame.unpersist()
    return figures


if __name__ == "__main__":
    main(local_session(app_name="transfer_learning"))
