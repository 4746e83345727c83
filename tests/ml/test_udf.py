"""model.udf() is transform as a function: in expressions and in SQL."""

from __future__ import annotations

import pyarrow as pa
import pytest
import torch
from pyspark.ml.functions import array_to_vector
from pyspark.ml.linalg import Vectors
from pyspark.sql import functions as F
from torch import Tensor, nn

from bigdl_lite import TorchClassifier, TorchEstimator, TorchRegressor
from bigdl_lite.data.columns import Column, Raw
from bigdl_lite.errors import DataError
from bigdl_lite.ml.arguments import arguments
from tests.conftest import frame, mlp, problem

X, Y = problem(60)
COMMON = {"engine": "local", "numWorkers": 1, "progress": "none", "batchSize": 30}


class Two(nn.Module):
    """A group of two columns and an image of four bytes to one number."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(2, 1), nn.Linear(4, 1)

    def forward(self, pair: Tensor, image: Tensor) -> Tensor:
        return self.left(pair) + self.right(image.flatten(1).float())


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"a": self.net(x), "b": x.sum(1)}


@pytest.fixture(scope="module")
def df(spark):
    return frame(spark, X, Y, [35, 25]).withColumn("id", F.monotonically_increasing_id()).cache()


@pytest.fixture(scope="module")
def classifier(df):
    return TorchClassifier(module=mlp, **COMMON).fit(df)


@pytest.fixture(scope="module")
def rows_of_two(spark):
    rows = [(float(x[0]), int(x[1] * 3), bytearray([i, 1, 2, 3]), float(i)) for i, x in enumerate(X)]
    return spark.createDataFrame(rows, "a double, b long, image binary, label double").cache()


@pytest.fixture(scope="module")
def regressor(rows_of_two):
    names = {"inputCols": [["a", "b"], "image"], "decoders": {"image": Raw((2, 2), "uint8")}}
    return TorchRegressor(module=Two, **names, **COMMON).fit(rows_of_two)


def of_a(output: dict[str, Tensor], target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output["a"], target)


def values(frame, *columns):
    return [tuple(row) for row in frame.orderBy("id").select(*columns).collect()]


@pytest.fixture(params=["arrow", "pandas"])
def way(request, monkeypatch):
    """Spark before 4.1 has no functions of Arrow columns."""
    if request.param == "pandas":
        monkeypatch.delattr(F, "arrow_udf", raising=False)
    return request.param


def test_a_function_of_columns_gives_what_transform_gives(df, classifier, way):
    expected = classifier.transform(df).orderBy("id").collect()
    found = values(df, classifier.udf()("features").alias("p"))
    for (p,), row in zip(found, expected, strict=True):
        # sorted before one and after the other: the last digits of a row depend on its place in the batch
        assert p.raw == pytest.approx(row.rawPrediction.toArray().tolist(), rel=1e-5, abs=1e-6)
        assert p.probability == pytest.approx(row.probability.toArray().tolist(), rel=1e-5)
        assert p.prediction == row.prediction


def test_sql_calls_it_by_name(spark, df, classifier):
    spark.udf.register("classify", classifier.udf())
    df.createOrReplaceTempView("some_rows")
    counts = spark.sql("SELECT classify(features).prediction AS p, count(*) AS n FROM some_rows GROUP BY 1").collect()
    expected = classifier.transform(df).groupBy("prediction").count().collect()
    assert {row.p: row.n for row in counts} == {row.prediction: row["count"] for row in expected}


@pytest.mark.parametrize("kind", ["dense", "sparse", "mixed"])
def test_vectors_may_be_passed_as_they_are(spark, df, classifier, kind, way):
    rows = X[:10].copy()
    if kind != "dense":
        rows[:, 1:4] = 0
    made = []
    for i, x in enumerate(rows.tolist()):
        sparse = kind == "sparse" or (kind == "mixed" and i % 2)
        made.append((i, Vectors.sparse(5, {j: v for j, v in enumerate(x) if v}) if sparse else Vectors.dense(x)))
    vectors = spark.createDataFrame(made, ["id", "features"])
    found = values(vectors, classifier.udf()("features").probability)
    expected = values(classifier.transform(vectors), "probability")
    assert [p for (p,) in found] == [pytest.approx(p.toArray().tolist(), rel=1e-5) for (p,) in expected]


def test_a_null_vector_is_an_error_that_names_the_column(df, classifier):
    broken = df.select("id", F.when(F.col("id") != 0, array_to_vector("features")).alias("features"))
    with pytest.raises(Exception, match=r"column 'features' has 1 null\(s\)"):
        broken.select(classifier.udf()("features")).collect()


@pytest.mark.parametrize("call", ["score(array(a, b), image)", "score(a, b, image)", "score(cast(a AS decimal(20, 17)), b, image)"])
def test_a_group_is_one_array_or_its_columns(spark, rows_of_two, regressor, call):
    spark.udf.register("score", regressor.udf())
    rows_of_two.createOrReplaceTempView("pairs")
    found = [row[0] for row in spark.sql(f"SELECT {call} FROM pairs ORDER BY label").collect()]
    expected = [row[0] for row in regressor.transform(rows_of_two).orderBy("label").select("prediction").collect()]
    assert found == pytest.approx(expected, rel=1e-6) and len(set(found)) > 50


def test_named_outputs_are_fields_and_output_cols_choose_and_name_them(df, way):
    model = TorchEstimator(module=Both, loss=of_a, **COMMON).fit(df.withColumn("label", F.col("label") % 2))
    for (p,), (q,) in zip(values(df, model.udf()("features")), values(model.transform(df), "prediction"), strict=True):
        assert p.a == pytest.approx(q.a, rel=1e-5, abs=1e-6) and p.b == pytest.approx(q.b, rel=1e-5, abs=1e-6)
    chosen = model.copy({model.outputCols: {"b": "the.sum"}})
    assert df.select(chosen.udf()("features").alias("p")).dtypes == [("p", "struct<the.sum:double>")]
    found = values(df, chosen.udf()("features")["the.sum"])
    torch.testing.assert_close(torch.tensor(found)[:, 0], torch.from_numpy(X).sum(1))


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        ("score('text', b, image)", "argument for 'a' is string, which no tensor can hold"),
        ("score(a, b)", "argument for 'image' is int64, its decoder reads binary"),
        ("score(a)", "takes 2 arguments, one for each input of the module, or 3 \\(a, b, image\\); it got 1"),
    ],
)
def test_what_cannot_be_an_argument_is_named(spark, rows_of_two, regressor, expression, said):
    spark.udf.register("score", regressor.udf())
    rows_of_two.createOrReplaceTempView("pairs")
    with pytest.raises(Exception, match=said):
        spark.sql(f"SELECT {expression} FROM pairs").collect()


def test_arguments_are_looked_at_without_spark():
    column, pair = Column("x", torch.float32), Column("p", torch.float32, 1, members=("a", "b"))
    numbers, nulls = pa.array([1, 2]), pa.array([1.5, None])
    made = arguments([numbers, nulls, numbers], [pair, column])
    assert made[0].to_pylist() == [[1.0, 1.5], [2.0, None]] and made[1] is numbers
    with pytest.raises(DataError, match="it got 4"):
        arguments([numbers] * 4, [pair, column])
    with pytest.raises(DataError, match="no tensor can hold"):
        arguments([pa.array([{"a": 1}])], [column])


def test_sizes_of_vectors_that_pandas_made_floats_are_sizes():
    """So Spark 3.5 hands over dense and sparse vectors of one column."""
    mixed = pa.array(
        [
            {"type": 1, "size": None, "indices": None, "values": [1.0, 2.0, 3.0]},
            {"type": 0, "size": 3.0, "indices": [1], "values": [5.0]},
        ],
        pa.struct({"type": pa.int8(), "size": pa.float64(), "indices": pa.list_(pa.int32()), "values": pa.list_(pa.float64())}),
    )
    assert arguments([mixed], [Column("x", torch.float32, 1)])[0].to_pylist() == [[1.0, 2.0, 3.0], [0.0, 5.0, 0.0]]
