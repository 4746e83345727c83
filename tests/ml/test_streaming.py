"""transform on a stream is transform on its rows."""

from __future__ import annotations

import pytest
from pyspark.ml import Pipeline
from pyspark.ml.feature import VectorAssembler
from pyspark.sql import functions as F

from bigdl_lite import TorchClassifier
from bigdl_lite.errors import DataError
from tests.conftest import frame, mlp, problem

X, Y = problem(60)
COMMON = {"engine": "local", "numWorkers": 1, "progress": "none", "batchSize": 30}


@pytest.fixture(scope="module")
def folder(spark, tmp_path_factory):
    """Two files, so that a stream of one file at a time has two batches."""
    path = str(tmp_path_factory.mktemp("rows") / "table")
    df = frame(spark, X, Y, [35, 25]).withColumn("id", F.monotonically_increasing_id())
    df.write.parquet(path)
    return path


@pytest.fixture(scope="module")
def table(spark, folder):
    return spark.read.parquet(folder)


@pytest.fixture(scope="module")
def model(table):
    return TorchClassifier(module=mlp, **COMMON).fit(table)


def stream(spark, folder, schema):
    return spark.readStream.schema(schema).option("maxFilesPerTrigger", 1).parquet(folder)


def by_id(rows):
    return {row.id: (row.prediction, pytest.approx(row.probability.toArray().tolist(), rel=1e-5)) for row in rows}


def same(rows, expected):
    found = {row.id: (row.prediction, row.probability.toArray().tolist()) for row in rows}
    return len(rows) == len(found) and found == by_id(expected)


def test_a_stream_into_memory_has_the_scores_of_the_table(spark, folder, table, model):
    scored = model.transform(stream(spark, folder, table.schema))
    assert scored.isStreaming
    query = scored.writeStream.format("memory").queryName("scored").trigger(availableNow=True).start()
    try:
        assert query.awaitTermination(90) and len([p for p in query.recentProgress if p["numInputRows"]]) == 2
    finally:
        query.stop()
    assert same(spark.table("scored").collect(), model.transform(table).collect())


def test_a_pipeline_scores_every_batch_of_a_stream(spark, folder, table):
    def spread(df):
        return df.select("id", "label", *(F.element_at("features", i + 1).alias(f"x{i}") for i in range(5)))

    names = [f"x{i}" for i in range(5)]
    stages = [VectorAssembler(inputCols=names, outputCol="features"), TorchClassifier(module=mlp, **COMMON)]
    pipeline, batches, sizes = Pipeline(stages=stages).fit(spread(table)), [], []

    def take(batch, number):
        rows = batch.collect()
        batches.extend(rows)
        sizes.append(len(rows))

    scored = pipeline.transform(spread(stream(spark, folder, table.schema)))
    query = scored.writeStream.foreachBatch(take).trigger(availableNow=True).start()
    try:
        assert query.awaitTermination(90)
    finally:
        query.stop()
    assert sorted(sizes) == [25, 35] and same(batches, pipeline.transform(spread(table)).collect())


def test_a_column_that_a_stream_lacks_is_named_before_it_starts(spark, folder, table, model):
    with pytest.raises(DataError, match="no column 'features'"):
        model.transform(stream(spark, folder, table.schema).drop("features"))


def test_a_stream_cannot_be_evaluated_as_a_whole(spark, folder, table, model):
    with pytest.raises(DataError, match="foreachBatch"):
        model.evaluate(stream(spark, folder, table.schema), ["accuracy"])
