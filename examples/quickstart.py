"""Handwritten digits, from a table to a trained and saved model, in one Spark program.

    load_digits -> DataFrame -> scale in SQL -> split -> TorchClassifier.fit -> evaluate -> save -> load -> score again

    python examples/quickstart.py                       # the engine that fits this session
    python examples/quickstart.py --engine shuffle      # or: barrier, local

Everything is seeded. No download: the 1,797 images of 8 x 8 pixels come with scikit-learn.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from functools import partial

import torch
from pyspark.ml.evaluation import MulticlassClassificationEvaluator
from pyspark.sql import DataFrame, SparkSession
from sklearn.datasets import load_digits
from torch import nn

from bigdl_lite import TorchClassifier, TorchModel, local_session


def make_net() -> nn.Module:
    """A small conv net; [B, 64] pixels -> [B, 10] class scores.

    A function at the top level of a module, so that a saved model finds it again by its name.
    """
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(),  # [B, 16, 8, 8]
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),  # [B, 32, 4, 4]
        nn.Flatten(), nn.Dropout(0.3), nn.Linear(32 * 4 * 4, 10),
    )  # fmt: skip


def digits(spark: SparkSession) -> tuple[DataFrame, DataFrame]:
    """(train, test), each with the columns id long, features array<float> [64] in 0..1, label long."""
    images = load_digits()
    rows = zip(range(len(images.data)), images.data.tolist(), images.target.tolist(), strict=True)
    table = spark.createDataFrame(list(rows), "id long, pixels array<float>, label long")
    scaled = table.selectExpr("id", "transform(pixels, p -> float(p / 16)) AS features", "label")
    # a hash of the id, not rand(): the split stays the same however many partitions the table has
    held_out = "pmod(xxhash64(id, 7), 5) = 0"
    return scaled.where(f"NOT ({held_out})"), scaled.where(held_out)


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Runs the example; returns what it prints."""
    options = argparse.ArgumentParser(description="Train a conv net on handwritten digits with Spark.")
    options.add_argument("--engine", choices=["auto", "barrier", "shuffle", "local"], default="auto")
    options.add_argument("--epochs", type=int, default=12)
    given = options.parse_args(arguments)

    mine = SparkSession.getActiveSession() is None  # a session that was here before us is not ours to stop
    submitted = "PYSPARK_GATEWAY_PORT" in os.environ  # by spark-submit, with a master that must stay
    spark = SparkSession.builder.getOrCreate() if submitted else local_session(app_name="quickstart")
    try:
        train, test = digits(spark)
        classifier = TorchClassifier(
            module=make_net,
            optimizer=partial(torch.optim.Adam, lr=5e-3),
            batchSize=128,  # rows of one step over all workers, so one worker or forty learn alike
            epochs=given.epochs,
            engine=given.engine,
            seed=0,
            progress="bar",
        )
        began = time.perf_counter()
        model = classifier.fit(train)
        seconds = time.perf_counter() - began

        scored = model.transform(test).orderBy("id")
        accuracy = MulticlassClassificationEvaluator(metricName="accuracy").evaluate(scored)

        with tempfile.TemporaryDirectory() as folder:
            model.save(f"{folder}/digits")
            again = TorchModel.load(f"{folder}/digits").transform(test).orderBy("id")
            assert again.select("id", "prediction").collect() == scored.select("id", "prediction").collect()

        epochs = [line for line in model.history if "steps" in line]  # the other lines are single steps
        stepping = sum(line["seconds"] for line in epochs)
        figures = {
            "accuracy": accuracy,
            "rows_per_s": sum(line["rows"] for line in epochs) / stepping,
            "sync_share": sum(line["sync_s"] for line in epochs) / stepping,
        }
        print(f"engine          {model.engine}, {sum(line['steps'] for line in epochs)} steps, fit took {seconds:.1f} s")
        print(f"test accuracy   {accuracy:.4f}, and the same predictions from the saved model")
        print(f"rows/s          {figures['rows_per_s']:,.0f}")
        print(f"time in sync    {figures['sync_share']:.0%}")
        return figures
    finally:
        if mine:
            spark.stop()


if __name__ == "__main__":
    main()
