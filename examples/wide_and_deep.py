"""Which advertisement is clicked: a table of mixed columns, a wide and deep net, and what a linear model cannot know.

    segment, category, site --> TableEncoder --> ids [3], dense [3] --> TableNet ---------------> AUC
    hour, price, age         `-> one-hot vectors ----------------> logistic regression of pyspark.ml, for comparison

    python examples/wide_and_deep.py

The log is made up, from a seed. The law: the log-odds of a click are

    -1.4 + 1.5 taste[segment, category] + 0.5 popular[site] + 0.5 sin(2 pi hour / 24) - 0.3 price      taste, popular from N(0, 1)

so that what matters most is the pair of segment and category, which no weight of a single column can hold. Sites are drawn by
Zipf's law: a few have half of the rows, most have a handful.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import pandas as pd
import torch
from pyspark.ml import Pipeline, PipelineModel
from pyspark.ml.classification import LogisticRegression
from pyspark.ml.evaluation import BinaryClassificationEvaluator
from pyspark.ml.feature import RFormula
from pyspark.sql import DataFrame, SparkSession
from torch import nn

from bigdl_lite import TorchClassifier, local_session
from bigdl_lite.features import Hashed, Index, Table, TableEncoder, TableNet

ROWS, SEGMENTS, CATEGORIES, SITES = 20_000, 8, 10, 2_000


def click_log(spark: SparkSession, seed: int = 0) -> DataFrame:
    """(segment string, category string, site string, age long, hour double, price double, click double, chance double)."""
    rng = np.random.default_rng(seed)
    taste, popular = rng.standard_normal((SEGMENTS, CATEGORIES)), rng.standard_normal(SITES)
    segment, category = rng.integers(SEGMENTS, size=ROWS), rng.integers(CATEGORIES, size=ROWS)
    site = np.minimum(rng.zipf(1.4, ROWS), SITES) - 1
    hour, price = rng.uniform(0, 24, ROWS), rng.standard_normal(ROWS)
    odds = -1.4 + 1.5 * taste[segment, category] + 0.5 * popular[site] + 0.5 * np.sin(hour * np.pi / 12) - 0.3 * price
    chance = 1 / (1 + np.exp(-odds))
    columns = {
        "segment": [f"segment {i}" for i in segment], "category": [f"category {i}" for i in category],
        "site": [f"site {i}" for i in site],
        "age": rng.integers(18, 80, ROWS),  # says nothing: some columns do not
        "hour": hour, "price": price, "click": (rng.uniform(size=ROWS) < chance).astype(float), "chance": chance,
    }  # fmt: skip
    return spark.createDataFrame(pd.DataFrame(columns))


def wide_and_deep(train: DataFrame) -> PipelineModel:
    """The columns become ids and numbers, these a click."""
    table = Table(
        dense=["hour", "price", "age"],
        categorical={"segment": Index(), "category": Index(), "site": Hashed(500)},  # any site, known or not, is one of 500
    )
    encoder = TableEncoder(table).fit(train)
    classifier = TorchClassifier(
        module=partial(TableNet, encoder.fitted, hidden=[32]),
        loss=nn.BCEWithLogitsLoss(),
        optimizer=partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.01),
        inputCols=encoder.inputCols,
        labelCol="click",
        batchSize=512,
        epochs=8,
        seed=0,
    )
    return PipelineModel(stages=[encoder, classifier.fit(encoder.transform(train))])


def linear(train: DataFrame) -> PipelineModel:
    """Logistic regression, with a weight for each value of each column."""
    formula = RFormula(formula="click ~ segment + category + site + hour + price + age", labelCol="label", handleInvalid="keep")
    return Pipeline(stages=[formula, LogisticRegression(regParam=0.001, maxIter=10)]).fit(train)


def main(spark: SparkSession) -> dict[str, float]:
    """Runs the example; returns what it prints."""
    log = click_log(spark).cache()
    held_out = "pmod(xxhash64(hour, price), 4) = 0"
    train, test = log.where(f"NOT ({held_out})"), log.where(held_out)
    auc = BinaryClassificationEvaluator(labelCol="click", metricName="areaUnderROC")
    figures = {
        "auc": auc.evaluate(wide_and_deep(train).transform(test)),
        "linear": auc.evaluate(linear(train).transform(test)),
        "law": auc.setRawPredictionCol("chance").evaluate(test),
    }
    print(f"AUC   wide and deep         {figures['auc']:.3f}")
    print(f"      logistic regression   {figures['linear']:.3f}")
    print(f"      the law itself        {figures['law']:.3f}, which nothing can pass but by luck")
    log.unpersist()
    return figures


if __name__ == "__main__":
    main(local_session(app_name="wide_and_deep"))
