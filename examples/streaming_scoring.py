"""A model that was trained on a table scores a stream: Structured Streaming, and the same numbers as in a batch.

    train --> Pipeline: VectorAssembler, StandardScaler, TorchClassifier --> PipelineModel
                                                                               |
    files that come into a folder --> readStream --> PipelineModel.transform --+--> writeStream --> parquet

    python examples/streaming_scoring.py

The rows are scikit-learn's table of breast cancers: 569 rows, 30 measurements, malignant or benign. With the trigger
availableNow the stream takes what is there, two files at a time, and ends; started again, it takes only what is new.
"""

from __future__ import annotations

import tempfile
from functools import partial

import torch
from pyspark.ml import Pipeline, PipelineModel
from pyspark.ml.feature import StandardScaler, VectorAssembler
from pyspark.sql import DataFrame, SparkSession
from sklearn.datasets import load_breast_cancer
from torch import nn

from bigdl_lite import TorchClassifier, local_session


def make_net() -> nn.Module:
    """[B, 30] -> [B, 2]"""
    return nn.Sequential(nn.Linear(30, 16), nn.ReLU(), nn.Linear(16, 2))


def table(spark: SparkSession) -> tuple[DataFrame, list[str]]:
    """(id long, 30 columns of doubles, label long), and the names of the 30."""
    data = load_breast_cancer(as_frame=True)
    names = [name.replace(" ", "_") for name in data.feature_names]
    frame = data.data.set_axis(names, axis=1).assign(id=range(len(data.data)), label=data.target.astype("int64"))
    return spark.createDataFrame(frame), names


def pipeline(names: list[str]) -> Pipeline:
    classifier = TorchClassifier(
        module=make_net, optimizer=partial(torch.optim.Adam, lr=1e-2), inputCols=["scaled"], batchSize=64, epochs=10, seed=0
    )
    scaler = StandardScaler(inputCol="measured", outputCol="scaled", withMean=True)
    return Pipeline(stages=[VectorAssembler(inputCols=names, outputCol="measured"), scaler, classifier])


def run_stream(spark: SparkSession, model: PipelineModel, schema: object, folder: str) -> int:
    """Scores what is in folder/incoming and was not scored yet, into folder/scored; returns how many micro-batches that took."""
    stream = spark.readStream.schema(schema).option("maxFilesPerTrigger", 2).parquet(f"{folder}/incoming")
    scored = model.transform(stream).select("id", "prediction", "label")
    query = (
        scored.writeStream.format("parquet")
        .option("checkpointLocation", f"{folder}/checkpoint")
        .trigger(availableNow=True)
        .start(f"{folder}/scored")
    )
    query.awaitTermination()
    return sum(batch["numInputRows"] > 0 for batch in query.recentProgress)


def main(spark: SparkSession) -> dict[str, float]:
    """Runs the example; returns what it prints."""
    frame, names = table(spark)
    train, later = frame.where("id % 3 > 0"), frame.where("id % 3 = 0")
    model = pipeline(names).fit(train)

    with tempfile.TemporaryDirectory() as folder:
        later.where("id < 450").repartition(4, "id").write.parquet(f"{folder}/incoming")
        batches = run_stream(spark, model, later.schema, folder)
        later.where("id >= 450").coalesce(1).write.mode("append").parquet(f"{folder}/incoming")
        more = run_stream(spark, model, later.schema, folder)

        streamed = spark.read.parquet(f"{folder}/scored").orderBy("id").collect()
    at_once = model.transform(later).select("id", "prediction", "label").orderBy("id").collect()
    accuracy = sum(row.prediction == row.label for row in streamed) / len(streamed)
    figures = {
        "accuracy": accuracy, "rows": len(streamed), "batches": batches, "more": more,
        "differences": sum(a != b for a, b in zip(streamed, at_once, strict=True)),
    }  # fmt: skip
    print(f"stream          {len(streamed)} rows in {batches} micro-batches, and {more} when more had come")
    print(f"test accuracy   {accuracy:.3f}")
    print(f"differences     {figures['differences']} between the stream's predictions and a batch's")
    return figures


if __name__ == "__main__":
    main(local_session(app_name="streaming_scoring"))
