"""Which optimizer: pyspark.ml's CrossValidator over four of them, two folds each.

    ParamGridBuilder: optimizer = Adam or SGD, with learning rates and weight decay  --> CrossValidator --> a table, and the best model

    python examples/hyperparameter_search.py

An optimizer is a function, and so a value of a Param like any other. A partial of a class says which it is when it is printed.
The rows are scikit-learn's table of wines: 178 rows, 13 measurements, three growers.
"""

from __future__ import annotations

from functools import partial

from pyspark.ml.evaluation import MulticlassClassificationEvaluator
from pyspark.ml.feature import StandardScaler
from pyspark.ml.functions import array_to_vector
from pyspark.ml.tuning import CrossValidator, ParamGridBuilder
from pyspark.sql import DataFrame, SparkSession
from sklearn.datasets import load_wine
from torch import nn, optim

from bigdl_lite import TorchClassifier, local_session

OPTIMIZERS = [
    partial(optim.SGD, lr=1e-4),  # too careful: the control
    partial(optim.SGD, lr=1e-1, momentum=0.9),
    partial(optim.AdamW, lr=1e-2, weight_decay=0.01),
    partial(optim.AdamW, lr=1e-2, weight_decay=10.0),
]


def make_net() -> nn.Module:
    """[B, 13] -> [B, 3]"""
    return nn.Sequential(nn.Linear(13, 16), nn.Tanh(), nn.Linear(16, 3))


def wines(spark: SparkSession) -> DataFrame:
    """(id long, raw vector [13], label long)"""
    data = load_wine()
    rows = list(zip(range(len(data.data)), data.data.tolist(), data.target.tolist(), strict=True))
    frame = spark.createDataFrame(rows, "id long, raw array<double>, label long")
    return frame.withColumn("raw", array_to_vector("raw"))


def name_of(optimizer: partial) -> str:
    settings = ", ".join(f"{name}={value:g}" for name, value in optimizer.keywords.items())
    return f"{optimizer.func.__name__}({settings})"


def main(spark: SparkSession) -> dict[str, float]:
    """Runs the example; returns what it prints."""
    rows = wines(spark)
    train, test = rows.where("id % 3 > 0").cache(), rows.where("id % 3 = 0")
    classifier = TorchClassifier(module=make_net, batchSize=32, epochs=10, numWorkers=1, seed=0)
    grid = ParamGridBuilder().addGrid(classifier.optimizer, OPTIMIZERS).build()
    accuracy = MulticlassClassificationEvaluator(metricName="accuracy")
    # the scaler is fitted once, before: what is searched is the optimizer
    scaler = StandardScaler(inputCol="raw", outputCol="features", withMean=True).fit(train)
    search = CrossValidator(
        estimator=classifier, estimatorParamMaps=grid, evaluator=accuracy, numFolds=2, parallelism=2, seed=0
    )  # fmt: skip
    found = search.fit(scaler.transform(train))

    best = max(range(len(grid)), key=found.avgMetrics.__getitem__)
    for i, (setting, value) in enumerate(zip(grid, found.avgMetrics, strict=True)):
        print(f"{'best' if i == best else '':<5} {value:.3f}  {name_of(setting[classifier.optimizer])}")
    figures = {
        "best": best, "careful": float(found.avgMetrics[0]), "found": float(found.avgMetrics[best]),
        "accuracy": accuracy.evaluate(found.bestModel.transform(scaler.transform(test))),
    }  # fmt: skip
    print(f"test accuracy {figures['accuracy']:.3f}, of the best, fitted on all training rows")
    train.unpersist()
    return figures


if __name__ == "__main__":
    main(local_session(app_name="hyperparameter_search"))
