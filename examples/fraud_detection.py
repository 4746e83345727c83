"""Fraud: one row of seventy is what one looks for, and accuracy says nothing.

    transactions --> TorchClassifier(classWeights="balanced", metrics=["aucpr"], patience=...) --> probability
                                                                                                   |
                     the limit above which one acts: the lowest at which half of the alarms are right, on rows held out

    python examples/fraud_detection.py

The transactions are made up, from a seed. About 1.5 % are fraud; of these, most are dear for their customer AND abroad OR at
night, and some look like all others. The control is the same fit without weights, judged where a classifier says "fraud".
"""

from __future__ import annotations

from functools import partial

import numpy as np
import pandas as pd
import torch
from pyspark.ml.functions import vector_to_array
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from torch import nn

from bigdl_lite import TorchClassifier, TorchModel, local_session

ROWS = 20_000
COLUMNS = ["amount", "usual", "distance", "night", "recent"]


def make_net() -> nn.Module:
    """[B, 5] -> [B, 2]"""
    return nn.Sequential(nn.Linear(len(COLUMNS), 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 2))


def transactions(spark: SparkSession, seed: int = 0) -> DataFrame:
    """(id long, COLUMNS double, label long); amounts as logarithms, distance from home likewise, recent: how many that day."""
    rng = np.random.default_rng(seed)
    fraud = rng.uniform(size=ROWS) < 0.015
    plain = fraud & (rng.uniform(size=ROWS) < 0.2)  # these look like all others
    odd = fraud & ~plain
    usual = rng.normal(3.5, 0.7, ROWS)
    amount = usual + rng.normal(0, 0.6, ROWS) + odd * rng.normal(1.6, 0.5, ROWS)
    abroad = odd & (rng.uniform(size=ROWS) < 0.6)
    distance = rng.exponential(1.0, ROWS) + abroad * rng.normal(2.5, 0.5, ROWS)
    night = (rng.uniform(size=ROWS) < np.where(odd & ~abroad, 0.9, 0.1)).astype(float)
    recent = rng.poisson(1 + odd * 1.0).astype(float)
    columns = {"id": np.arange(ROWS), "amount": amount, "usual": usual, "distance": distance, "night": night, "recent": recent}
    return spark.createDataFrame(pd.DataFrame({**columns, "label": fraud.astype(int)}))


def fit(train: DataFrame, weighted: bool) -> TorchModel:
    return TorchClassifier(
        module=make_net,
        optimizer=partial(torch.optim.Adam, lr=1e-2),
        inputCols=[COLUMNS],
        batchSize=512,
        epochs=30,
        validationFraction=0.2,
        metrics=["aucpr"],
        monitor="val_aucpr",
        patience=2,  # and the weights are those of the best validation
        classWeights="balanced" if weighted else None,  # the fewer rows a class has, the more each of them counts
        seed=0,
    ).fit(train)


def with_chance(model: TorchModel, frame: DataFrame) -> DataFrame:
    return model.transform(frame).withColumn("chance", vector_to_array("probability")[1])


def quality(scored: DataFrame, limit: float) -> tuple[float, float]:
    """(precision, recall) of the alarms above a limit."""
    alarm, fraud = f"chance > {limit}", "label = 1"
    right, alarms, frauds = scored.selectExpr(f"count_if({alarm} AND {fraud})", f"count_if({alarm})", f"count_if({fraud})").first()
    return right / max(1, alarms), right / frauds


def limit_for(scored: DataFrame, precision: float) -> float:
    """The lowest limit above which at least `precision` of the alarms are right; 1 where there is none."""
    table = scored.select("chance", "label").toPandas().sort_values("chance", ascending=False)
    right = table["label"].cumsum() / np.arange(1, len(table) + 1)
    enough = table["chance"][right >= precision]
    return float(np.nextafter(enough.min(), 0)) if len(enough) else 1.0


def main(spark: SparkSession) -> dict[str, float]:
    """Runs the example; returns what it prints."""
    part = F.pmod(F.xxhash64("id"), F.lit(4))  # and not by lot: the same rows, however many partitions there are
    rows = transactions(spark).withColumn("part", part).cache()
    train, tune, test = rows.where("part < 2"), rows.where("part = 2"), rows.where("part = 3")
    weighted, plain = fit(train, weighted=True), fit(train, weighted=False)
    scored = with_chance(weighted, test).cache()
    limit = limit_for(with_chance(weighted, tune), precision=0.5)
    aucpr = weighted.evaluate(test, ["aucpr"])["aucpr"]
    base, tested = test.agg(F.avg("label"), F.count("*")).first()
    figures = {"aucpr": aucpr, "base": base, "limit": limit}
    figures["precision"], figures["recall"] = quality(scored, limit)
    _, figures["weighted_recall"] = quality(scored, 0.5)
    _, figures["plain_recall"] = quality(with_chance(plain, test), 0.5)
    print(f"fraud             {base:.1%} of {tested:,} rows; fit ended after {weighted.summary.epochs} of 30 epochs")
    print(f"AUC of P and R    {aucpr:.3f}; drawing lots has {base:.3f}")
    print(f"limit {limit:.3f}       precision {figures['precision']:.2f}, recall {figures['recall']:.2f}")
    print(f"limit 0.5         recall {figures['weighted_recall']:.2f}; trained without weights {figures['plain_recall']:.2f}")
    scored.unpersist()
    rows.unpersist()
    return figures


if __name__ == "__main__":
    main(local_session(app_name="fraud_detection"))
