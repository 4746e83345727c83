"""Tables of mixed columns: ids and numbers as pandas finds them, in any partitions, behind and before stages of pyspark.ml."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from pyspark.ml import Pipeline, PipelineModel
from pyspark.ml.feature import StringIndexer, VectorAssembler
from pyspark.sql import functions as F
from torch import nn

from bigdl_lite import TorchRegressor
from bigdl_lite.errors import DataError, RecipeError, WireError
from bigdl_lite.features import FittedTable, Hashed, Index, Table, TableEncoder, TableEncoderModel, TableNet

pytestmark = pytest.mark.timeout(120)

SCHEMA = "row int, city string, shop long, open boolean, code double, price double, tags array<float>, y float"
TABLE = Table(
    dense=["price", "tags", "open"],
    categorical={"city": Index(), "shop": Hashed(7), "code": Index(size=2), "open": Index(min_count=30)},
)


def data() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    n = 60
    names = rng.choice(["Rome", "Oslo", "Ürümqi", "a", "b", "?"], n, p=[0.4, 0.3, 0.1, 0.05, 0.05, 0.1])
    city = [str(name) if name != "?" else None for name in names]
    price = rng.standard_normal(n) * 3 + 10
    frame = pd.DataFrame({
        "row": range(n), "city": city, "shop": rng.integers(0, 100, n), "open": rng.random(n) < 0.6,
        "code": rng.integers(0, 4, n).astype(float), "price": price, "tags": rng.random((n, 2)).astype("f4").tolist(),
    })  # fmt: skip
    frame["y"] = (frame.city == "Rome") * 2.0 - 1 + 0.1 * price
    return frame


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return data()


@pytest.fixture(scope="module")
def df(spark: Any, table: pd.DataFrame) -> Any:
    rows = [tuple(None if x is None else x for x in row) for row in table.itertuples(index=False)]
    return spark.createDataFrame(rows, SCHEMA).repartition(4, "row").cache()


@pytest.fixture(scope="module")
def fitted(df: Any) -> FittedTable:
    return TABLE.fit(df)


def by_count(values: pd.Series) -> list[Any]:
    counts = values.dropna().value_counts()
    return sorted(counts.index, key=lambda v: (-counts[v], v))


def test_what_is_fitted_is_what_pandas_counts(fitted: FittedTable, table: pd.DataFrame) -> None:
    assert fitted.words["city"] == tuple(by_count(table.city))
    assert fitted.words["code"] == tuple(str(int(c)) for c in by_count(table.code)[:2])
    assert fitted.words["open"] == tuple(str(o).lower() for o in (True, False) if (table.open == o).sum() >= 30)
    assert fitted.sizes == (len(fitted.words["city"]) + 1, 8, 3, len(fitted.words["open"]) + 1)
    dense = np.column_stack([table.price, np.array(table.tags.tolist()), table.open])
    assert fitted.widths == (1, 2, 1) and fitted.width == 4
    np.testing.assert_allclose(fitted.mean, dense.mean(0))
    np.testing.assert_allclose(fitted.std, dense.std(0))


def test_what_is_fitted_does_not_depend_on_the_partitions(df: Any, fitted: FittedTable) -> None:
    again = TABLE.fit(df.coalesce(1))
    assert again.words == fitted.words
    np.testing.assert_allclose([*again.mean, *again.std], [*fitted.mean, *fitted.std], rtol=1e-12)


def test_ids_and_numbers_are_those_of_pandas(df: Any, fitted: FittedTable, table: pd.DataFrame) -> None:
    made = fitted.transform(df)
    assert dict(made.dtypes)["ids"] == "array<bigint>" and dict(made.dtypes)["dense"] == "array<float>"
    rows = sorted(made.collect())
    assert rows == sorted(fitted.transform(df.coalesce(1)).collect()) and len(rows) == len(table)
    dense = np.column_stack([table.price, np.array(table.tags.tolist()), table.open])
    np.testing.assert_allclose([row.dense for row in rows], (dense - dense.mean(0)) / dense.std(0), atol=1e-5)

    def place(name: str, text: Any) -> int:
        return fitted.words[name].index(text) + 1 if text in fitted.words[name] else 0

    for row, city, code, open_ in zip(rows, table.city, table.code, table.open, strict=True):
        found = place("city", city), place("code", str(int(code))), place("open", str(open_).lower())
        assert (row.ids[0], row.ids[2], row.ids[3]) == found and 1 <= row.ids[1] <= 7
    assert {row.ids[0] for row in rows if row.city is None} == {0} and {row.ids[2] for row in rows} == {0, 1, 2}


def test_values_that_were_not_there_are_0_and_a_hash_is_the_same_for_ever(spark: Any, df: Any, fitted: FittedTable) -> None:
    new = spark.createDataFrame([("Paris", 3, None, 9.0, 1.0, [0.0, 0.0]), (None, None, True, None, 1.0, [0.0, 0.0])],
                                "city string, shop long, open boolean, code double, price double, tags array<float>")  # fmt: skip
    made = fitted.transform(new.withColumn("open", F.coalesce("open", F.lit(False)))).coalesce(1).collect()
    assert [row.ids[0] for row in made] == [0, 0] and [row.ids[2] for row in made] == [0, 0]
    assert made[1].ids[1] == 0  # null
    hashed = FittedTable(Table(categorical={"x": Hashed(10**6)}), {}, (), (), ())
    same = [spark.createDataFrame([(x,)], f"x {kind}") for x, kind in ((3, "int"), (3.0, "double"), ("3", "string"))]
    assert {hashed.transform(frame).first().ids[0] for frame in same} == {1 + xxhash64(ord("3")) % 10**6}


def xxhash64(byte: int) -> int:
    """xxHash64 of one byte, as its specification has it, with Spark's seed 42; signed."""
    p1, p2, p3, p5 = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0x27D4EB2F165667C5
    keep = 2**64 - 1
    h = (42 + p5 + 1) & keep ^ (byte * p5 & keep)
    h = ((h << 11 | h >> 53) & keep) * p1 & keep
    h = (h ^ h >> 33) * p2 & keep
    h = (h ^ h >> 29) * p3 & keep
    h ^= h >> 32
    return h - 2**64 if h >> 63 else h


def test_numbers_are_left_as_they_are_where_nothing_else_is_asked(df: Any, table: pd.DataFrame) -> None:
    made = Table(dense=["price"], standardise=False).fit(df).transform(df, dense="x").orderBy("row").select("x").collect()
    np.testing.assert_allclose([row.x[0] for row in made], table.price, rtol=1e-6)


def test_a_constant_column_is_0_and_not_nan(spark: Any) -> None:
    frame = spark.createDataFrame([(5.0,), (5.0,)], "x double")
    fitted = Table(dense=["x"]).fit(frame)
    assert fitted.std == (1.0,) and [row.dense for row in fitted.transform(frame).collect()] == [[0.0], [0.0]]


def test_a_table_is_plain_json_and_comes_back_the_same(fitted: FittedTable, tmp_path: Path) -> None:
    fitted.save(str(tmp_path / "table.json"))
    assert FittedTable.load(str(tmp_path / "table.json")) == fitted
    assert json.loads((tmp_path / "table.json").read_text())["words"]["city"] == list(fitted.words["city"])
    for text in ("", "[]", "{}", '{"format": 9}', '{"format": 1, "table": {}}', "\x80\x04N."):
        with pytest.raises(WireError):
            FittedTable.from_json(text)


def test_what_cannot_be_fitted_is_told(spark: Any, df: Any, fitted: FittedTable) -> None:
    ragged = spark.createDataFrame([([1.0],), ([1.0, 2.0],)], "x array<double>")
    holes = spark.createDataFrame([(1.0,), (None,), (float("nan"),)], "x double")
    for broken, said in (
        (lambda: Table(), "at least one column"),
        (lambda: Table(dense="price"), "must be a list"),
        (lambda: Table(categorical={"a": 5}), r"Index\(\) or Hashed"),
        (lambda: Index(size=0), "at least 1"),
        (lambda: Hashed(0), "at least 1"),
        (lambda: Table(dense=["nothing"]).fit(df), "no column 'nothing'"),
        (lambda: Table(dense=["city"]).fit(df), "'city' is of type string, which holds no numbers"),
        (lambda: Table(categorical={"tags": Index()}).fit(df), "which is no category"),
        (lambda: Table(dense=["x"]).fit(ragged), "different lengths, up to 2"),
        (lambda: Table(dense=["x"]).fit(holes), r"'x' has 2 null\(s\) or NaN"),
        (lambda: Table(dense=["price"]).fit(df.where("false")), "no rows"),
        (lambda: fitted.transform(df, ids="city"), "has a column 'city' already"),
    ):
        with pytest.raises((RecipeError, DataError), match=said):
            broken()


# ---- stages and net --------------------------------------------------------------------------------------------------


def test_an_encoder_stands_between_stages_and_is_saved_with_them(spark: Any, df: Any, tmp_path: Path) -> None:
    known = df.where("city is not null")
    stages = [
        StringIndexer(inputCol="city", outputCol="number"),
        VectorAssembler(inputCols=["price", "shop"], outputCol="vector"),
        TableEncoder(Table(dense=["vector"], categorical={"number": Index(), "city": Index()}), idsCol="places"),
    ]
    pipeline = Pipeline(stages=stages)
    pipeline.write().overwrite().save(str(tmp_path / "pipeline"))
    again = Pipeline.load(str(tmp_path / "pipeline"))
    assert again.getStages()[2].getTable() == stages[2].getTable() and again.getStages()[2].getIdsCol() == "places"

    model = pipeline.fit(known)
    encoder = model.stages[2]
    rows = model.transform(known).orderBy("row").collect()
    # an index of StringIndexer is the place in the same order, so both columns get the same ids
    assert encoder.inputCols == ["places", "dense"] and all(row.places[0] == row.places[1] == row.number + 1 for row in rows)
    model.write().overwrite().save(str(tmp_path / "model"))
    loaded = PipelineModel.load(str(tmp_path / "model"))
    assert loaded.transform(known).orderBy("row").collect() == rows
    assert loaded.stages[2].fitted == encoder.fitted and loaded.stages[2].uid == encoder.uid
    (damaged,) = (tmp_path / "model").glob("stages/2_*/table.json")
    damaged.write_text("{}")
    with pytest.raises(WireError, match="no saved table"):
        TableEncoderModel.load(str(damaged.parent))


def test_an_encoder_without_a_table_says_so(df: Any) -> None:
    with pytest.raises(RecipeError, match="table is not set"):
        TableEncoder().fit(df)
    with pytest.raises(RecipeError, match="takes a Table, got a dict"):
        TableEncoder({"price": 1})  # type: ignore[arg-type]


def spec(dense: int, sizes: list[int]) -> FittedTable:
    categorical = {f"c{i}": Hashed(size - 1) for i, size in enumerate(sizes)}
    names = [f"d{i}" for i in range(dense)]
    return FittedTable(Table(names, categorical), {}, (1,) * dense, (0.0,) * dense, (1.0,) * dense)


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("hidden", [[], [6, 4]])
@pytest.mark.parametrize("out", [1, 3])
@pytest.mark.parametrize(("dense", "sizes"), [(2, [4, 9]), (2, []), (0, [4, 9])])
def test_a_net_takes_what_its_table_has(dense: int, sizes: list[int], out: int, hidden: list[int], wide: bool) -> None:
    net = TableNet(spec(dense, sizes), hidden, out, wide, dropout=0.1)
    ids = torch.stack([torch.arange(5) % size for size in sizes], 1) if sizes else None
    inputs = [x for x in (ids, torch.randn(5, dense) if dense else None) if x is not None]
    y = net(*inputs)
    assert y.shape == ((5,) if out == 1 else (5, out))
    y.sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_the_wide_part_is_a_weight_for_each_category_of_each_column() -> None:
    net = TableNet(spec(1, [2, 3]), hidden=[])
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
        net.wide_ids.weight.copy_(torch.tensor([[0.0], [1.0], [0.0], [10.0], [20.0]]))
        net.wide_dense.weight.fill_(100.0)
    assert net(torch.tensor([[1, 2], [0, 1]]), torch.tensor([[1.0], [0.0]])).tolist() == [121.0, 10.0]


def test_a_net_with_its_embeddings_learns_what_one_without_cannot(df: Any, fitted: FittedTable) -> None:
    """The label is the city and the price; without the city's ids (the control) its spread is left."""
    loss = {}
    for name, categorical in (("with", {"city": Index()}), ("without", {"shop": Hashed(1)})):
        table = Table(["price"], categorical).fit(df)
        est = TorchRegressor(
            module=partial(TableNet, table, hidden=[8]), inputCols=["ids", "dense"], labelCol="y",
            optimizer=lambda p: torch.optim.Adam(p, lr=0.05), batchSize=60, epochs=60, engine="local", numWorkers=1, progress="none",
        )  # fmt: skip
        model = est.fit(table.transform(df))
        loss[name] = model.history[-1]["loss"]
        assert isinstance(model.module, nn.Module)
    assert loss["with"] < 0.1 < 0.5 < loss["without"]
