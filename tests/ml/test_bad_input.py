"""What bad input gets: an error of ours that names the column, partition or rank, and the way out."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
import torch
from pyspark.errors import PySparkException
from pyspark.ml.linalg import Vectors, VectorUDT
from pyspark.sql import functions as F
from pyspark.sql.types import LongType, StructField, StructType
from torch import nn

from bigdl_lite import TorchClassifier, TorchEstimator, TorchRegressor
from bigdl_lite.errors import DataError, DivergedError, RecipeError, UserError
from bigdl_lite.ml.rows import computed
from tests.conftest import flat, frame, mlp, problem

X, Y = problem(40)
ENGINES = ["local", "barrier", "shuffle"]


def fit(df, engine="local", **more):
    settings = {"module": mlp, "batchSize": 16, "engine": engine, "numWorkers": 2, "progress": "none", "deadline": 20.0}
    return TorchClassifier(**(settings | more)).fit(df)


@pytest.fixture(scope="module")
def df(spark):
    return frame(spark, X, Y, [20, 20])


@pytest.fixture
def no_jobs(spark):
    """Fails the test where the block started a Spark job."""
    tracker = spark.sparkContext.statusTracker()
    before = set(tracker.getJobIdsForGroup(None))
    yield
    assert set(tracker.getJobIdsForGroup(None)) == before, "a job ran before the error"


@pytest.mark.parametrize(
    "settings, kind, words",
    [
        ({"inputCols": ["nothing"]}, DataError, "no column 'nothing'; the DataFrame has 'features', 'label'"),
        ({"labelCol": "target"}, DataError, "no column 'target'"),
        ({"inputCols": []}, RecipeError, "inputCols is empty"),
        ({"batchSize": 0}, RecipeError, "batchSize is 0, must be at least 1"),
        ({"epochs": 0}, RecipeError, "epochs is 0"),
        ({"numWorkers": 0}, RecipeError, "numWorkers is 0"),
        ({"batchSize": "many"}, RecipeError, "batchSize='many'"),
        ({"engine": "warp"}, RecipeError, "engine='warp' is not one of 'auto', 'barrier', 'shuffle', 'local'"),
        ({"algorithm": "magic"}, RecipeError, "algorithm='magic' is not known; the catalogue has async-average, async-sgd,"),
        ({"engine": "barrier", "numWorkers": 9}, RecipeError, "numWorkers=9 needs 9 tasks .* has 4 slots"),
        ({"clipNorm": -1.0}, RecipeError, "clipNorm is -1.0, must be above 0"),
        ({"schedulerInterval": "day"}, RecipeError, "schedulerInterval is 'day'"),
        ({"module": 3}, RecipeError, "module is 3, must be callable"),
        ({"module": lambda: 3}, RecipeError, r"module\(\) returned int, not an nn.Module"),
        ({"module": nn.Flatten}, RecipeError, "no trainable parameter"),
        ({"optimizer": lambda p: torch.optim.LBFGS(p)}, RecipeError, "LBFGS is not supported"),
        ({"optimizer": lambda p: 1 / 0}, UserError, "ZeroDivisionError"),
        ({"syncBatchNorm": True, "engine": "shuffle", "module": lambda: nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3))},
         RecipeError, "take engine='barrier' or 'local'"),
    ],
)  # fmt: skip
def test_faulty_settings_are_refused_before_any_job(df, no_jobs, settings, kind, words):
    with pytest.raises(kind, match=words):
        fit(df, **settings)


@pytest.mark.parametrize("kind", ["string", "date", "map<string,int>", "struct<a:int>", "array<string>"])
def test_a_column_that_no_tensor_can_hold_is_refused_before_any_job(spark, no_jobs, kind):
    with pytest.raises(DataError, match=r"column 'features' is of type .* which no tensor can hold"):
        fit(spark.createDataFrame([], f"features {kind}, label long"))


def test_binary_without_a_decoder_says_how(spark, no_jobs):
    with pytest.raises(DataError, match=r"decoders=\{'features': Raw\(shape, dtype\)\}"):
        fit(spark.createDataFrame([], "features binary, label long"))


class Locked(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 3)
        self.lock = [threading.Lock()]

    def __deepcopy__(self, memo):
        return self

    def forward(self, x):
        return self.linear(x)


def test_a_module_that_cannot_travel_is_refused_before_any_job(df, no_jobs):
    lock = threading.Lock()
    with pytest.raises(RecipeError, match=r"loss cannot be sent to the executors: TypeError.*lock"):
        fit(df, loss=lambda output, target: (lock, nn.functional.cross_entropy(output, target))[1])
    with pytest.raises(RecipeError, match=r"module cannot be sent to the executors: TypeError.*lock"):
        fit(df, module=Locked)


def rows(spark, values, kind="array<double>", parts=2):
    split = [list(part) for part in np.array_split(np.array([*values, None], dtype=object)[:-1], parts)]
    rdd = spark.sparkContext.parallelize([[(v, 0) for v in part] for part in split], parts).flatMap(lambda x: x)
    return spark.createDataFrame(rdd, f"features {kind}, label long")


GOOD = [1.0, 2.0, 3.0, 4.0, 5.0]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "bad, words",
    [
        (None, r"column 'features' has 1 null\(s\), the first in row 1 of partition 1"),
        ([1.0, None, 3.0, 4.0, 5.0], r"column 'features' has 1 null\(s\) inside its arrays \(partition 1\)"),
        ([1.0, float("nan"), 3.0, 4.0, 5.0], r"NaN or infinity in 1 row\(s\), the first in row 1 of partition 1"),
        ([1.0, 2.0], r"arrays of 2 and 5 values \(partition 1\); all rows need one length"),
    ],
    ids=["null", "null inside", "nan", "ragged"],
)
def test_bad_rows_name_column_and_partition(spark, engine, bad, words):
    with pytest.raises(DataError, match=words):
        fit(rows(spark, [GOOD, GOOD, GOOD, bad]), engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_partitions_of_different_widths_are_named(spark, engine):
    with pytest.raises(DataError, match=r"rows of shape \[5\] \(partition 0\) and \[2\] \(partition 1\)"):
        fit(rows(spark, [GOOD, GOOD, [1.0, 2.0], [1.0, 2.0]]), engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_empty_frame_is_refused(spark, engine):
    with pytest.raises(DataError, match="the DataFrame has no rows"):
        fit(spark.createDataFrame([], "features array<double>, label long"), engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_labels_out_of_range_are_named(spark, engine):
    with pytest.raises(DataError, match=r"the label column has the value 7, the module has 3 outputs: labels must be 0 .. 2"):
        fit(frame(spark, X, np.where(Y == 2, 7, Y), [20, 20]), engine)


def test_labels_that_are_no_whole_numbers_are_named(spark):
    df = spark.createDataFrame([(GOOD, 0.5)], "features array<double>, label double")
    with pytest.raises(DataError, match="column 'label' must hold whole numbers"):
        fit(df)


@pytest.mark.parametrize("engine", ENGINES)
def test_outputs_that_do_not_match_the_label_are_refused(spark, engine):
    df = frame(spark, X, Y, [20, 20])
    with pytest.raises(DataError, match=r"forward returns \[8, 1\] but the label is \[8\], and MSELoss needs one shape"):
        TorchEstimator(
            module=lambda: mlp(classes=1), loss=nn.MSELoss(), batchSize=16, engine=engine, numWorkers=2, progress="none"
        ).fit(df.withColumn("label", df.label.cast("float")))


class Faulty(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 3)

    def forward(self, x):
        if (x[:, 0] > 1e6).any():
            raise KeyError("the row that my forward cannot bear")
        return self.linear(x)


@pytest.mark.parametrize("engine", ENGINES)
def test_an_error_in_forward_on_one_worker_comes_back_as_the_users_own(spark, engine):
    x = X.copy()
    x[-1, 0] = 1e7
    began = time.monotonic()
    with pytest.raises(UserError) as caught:
        fit(frame(spark, x, Y, [20, 20]), engine, module=Faulty, deadline=60.0)
    message = str(caught.value)
    assert message.startswith("Traceback") and "raise KeyError(" in message and "the row that my forward cannot bear" in message
    assert "partition 1" in message or (engine == "local" and "rank 1" in message)
    assert "bigdl_lite/engine" not in message
    # not a figure of speed: the other rank would otherwise wait for its whole deadline
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("engine", ENGINES)
def test_a_loss_that_is_not_finite_names_step_and_rank(spark, engine):
    with pytest.raises(DivergedError, match=r"the loss is (nan|inf) in step \d+ on rank \d"):
        TorchRegressor(
            module=lambda: nn.Linear(5, 1), optimizer=lambda p: torch.optim.SGD(p, lr=1e18), batchSize=16, epochs=20,
            engine=engine, numWorkers=2, progress="none",
        ).fit(frame(spark, X, Y, [20, 20]))  # fmt: skip


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "parts, workers, batch",
    [([1], 1, 5), ([1, 0], 2, 5), ([2, 0, 1], 3, 1), ([37, 3], 2, 7), ([40], 3, 7)],
    ids=["one row", "fewer rows than workers", "batch of one", "skewed", "fewer partitions than workers"],
)
def test_any_shape_of_data_is_legal_and_equal_to_the_local_engine(spark, engine, parts, workers, batch):
    n = sum(parts)
    df = frame(spark, X[:n], Y[:n], parts)
    model = fit(df, engine, numWorkers=workers, batchSize=batch)
    alone = fit(df, "local", numWorkers=workers, batchSize=batch)
    torch.testing.assert_close(flat(model.module), flat(alone.module), rtol=0, atol=1e-6)
    assert sum(line["rows"] for line in model.history if "step" in line) == n


# ---- what fuzzing found (test_fuzz.py), each a story of its own -------------------------------------------------------------


def test_a_name_that_stands_for_two_columns_is_refused_by_name(spark, no_jobs):
    df = spark.createDataFrame([], "features array<double>, Features int, label long, x int, x int")
    with pytest.raises(DataError, match="column 'features' is ambiguous: the DataFrame has 'features', 'Features'; rename one"):
        fit(df)
    with pytest.raises(DataError, match="column 'x' is ambiguous: the DataFrame has 'x', 'x'"):
        fit(df, inputCols=["label"], labelCol="x")


def test_names_that_differ_in_case_are_two_where_the_user_told_spark_so(spark):
    df = rows(spark, [GOOD] * 4).selectExpr("features", "label as Label", "7 as label")
    spark.conf.set("spark.sql.caseSensitive", "true")
    try:
        assert fit(df, labelCol="Label").engine == "local"
    finally:
        spark.conf.unset("spark.sql.caseSensitive")
    with pytest.raises(DataError, match="column 'Label' is ambiguous"):  # the control
        fit(df, labelCol="Label")


@pytest.mark.parametrize("name", ["a.b", "a`b", "*", "${x}", "", "__bigdl_lite_row"])
def test_any_name_trains_and_scores(spark, name):
    df = rows(spark, [GOOD] * 4).withColumnsRenamed({"features": name, "label": "b.c"})
    columns = df.withColumn("one", F.lit(1.0)).withColumnsRenamed({"one": f"{name}1"})
    model = fit(columns, numWorkers=1, inputCols=[name], labelCol="b.c", predictionCol="p.q")  # one worker: rows are dealt anew
    assert model.transform(columns).columns[-1] == "p.q" and model.transform(columns).count() == 4
    side = TorchRegressor(
        module=lambda: nn.Linear(2, 1), inputCols=[[f"{name}1", f"{name}1"]], labelCol="b.c", engine="local", progress="none"
    )
    assert side.fit(columns).transform(columns).count() == 4


@pytest.mark.parametrize("engine", ENGINES)
def test_a_null_among_vectors_names_column_and_partition(spark, engine):
    made = [(Vectors.dense(GOOD), 0), (Vectors.sparse(5, {1: 2.0}), 1), (None, 2)]
    schema = StructType([StructField("features", VectorUDT()), StructField("label", LongType())])
    with pytest.raises(DataError, match=r"column 'features' has 1 null\(s\), the first in row 1 of partition 1"):
        fit(spark.createDataFrame(spark.sparkContext.parallelize(made, 2), schema), engine)
    sound = spark.createDataFrame(spark.sparkContext.parallelize(made[:2], 2), schema)
    assert fit(sound, engine).transform(sound).count() == 2


def test_decimals_in_arrays_of_arrays_are_numbers(spark):
    df = spark.sql("select array(array(1.25, 2.5), array(3.75, 4.0)) features, 1L label")
    model = fit(df, module=lambda: nn.Sequential(nn.Flatten(), nn.Linear(4, 3)))
    assert model.transform(df).count() == 1


def test_a_type_that_arrow_cannot_carry_names_its_column(spark, no_jobs):
    with pytest.raises(DataError, match="column 'features' is of type interval year, which Arrow cannot carry"):
        fit(spark.sql("select interval '1' year features, 1L label"))


@pytest.mark.parametrize(
    "kind, loss", [(TorchRegressor, nn.HuberLoss()), (TorchClassifier, nn.BCEWithLogitsLoss()), (TorchEstimator, nn.MSELoss())]
)
def test_a_label_of_whole_numbers_may_be_compared_with_an_output(spark, kind, loss):
    """torch's losses of this kind do not all take them: HuberLoss and BCEWithLogitsLoss raise in the backward pass."""
    df = frame(spark, X, (Y > 0).astype("i8"), [20, 20])
    make = lambda: nn.Sequential(nn.Linear(5, 1), nn.Flatten(0))  # noqa: E731
    settings = {"module": make, "loss": loss, "engine": "local", "numWorkers": 2, "progress": "none"}
    whole, floats = (kind(**settings).fit(x) for x in (df, df.withColumn("label", df.label.cast("double"))))
    assert torch.equal(flat(whole.module), flat(floats.module))


@pytest.mark.parametrize("loss", [nn.BCEWithLogitsLoss(), nn.BCELoss()], ids=repr)
def test_a_label_that_is_neither_0_nor_1_is_refused_by_losses_of_one_output(spark, loss):
    """BCEWithLogitsLoss itself says nothing, and trains nonsense."""
    make = lambda: nn.Sequential(nn.Linear(5, 1), nn.Sigmoid())  # noqa: E731
    with pytest.raises(DataError, match=r"column 'label' has values outside 0 .. 1, .* the first in row \d+ of partition 0"):
        fit(frame(spark, X, Y, [20, 20]), module=make, loss=loss)
    assert fit(frame(spark, X, Y > 0, [20, 20]), module=make, loss=loss).numClasses == 2


@pytest.mark.parametrize("engine", ENGINES)
def test_weights_that_the_last_step_made_infinite_are_no_model(spark, engine):
    """The loss of the last step is finite: it was taken before the step."""
    with pytest.raises(DivergedError, match="the weights are not finite after the last step"):
        fit(frame(spark, X, Y, [20, 20]), engine, batchSize=40, optimizer=lambda p: torch.optim.SGD(p, lr=float("inf")))


def test_an_rdd_whose_rows_do_not_fit_the_first_is_refused_and_nothing_is_cut_off(spark):
    def train(*labels):
        pairs = spark.sparkContext.parallelize([(np.ones(5, "f4"), y) for y in labels], 1)
        return TorchRegressor(module=lambda: nn.Linear(5, 1), engine="local", numWorkers=1, progress="none").fit(pairs)

    with pytest.raises(DataError, match="an array of float64, the first row one of int64, which cannot hold it"):
        train(1, 2.5)
    with pytest.raises(DataError, match=r"arrays of shapes \[\(5,\), \(2,\)\], the first \[\(5,\), \(\)\]"):
        train(1, [2, 3])
    with pytest.raises(DataError, match="label of the RDD's first row has dtype <U4"):
        train("text")
    assert train(1.0, 2).engine == "local"


@pytest.mark.parametrize(
    "said, kind",
    [
        ("[DIVIDE_BY_ZERO] Division by zero. SQLSTATE: 22012", DataError),
        ("Traceback (most recent call last):\n  File \"mine.py\", line 1, in f\nKeyError: 'x'\n", DataError),
        ("[SPARK_JOB_CANCELLED] Job 3 cancelled as part of cancellation of all jobs", PySparkException),
        ("[INTERNAL_ERROR] The planner failed", PySparkException),
        ("Job aborted due to stage failure: ExecutorLostFailure (executor 1 exited)", PySparkException),
        ("Traceback (most recent call last):\n  File \"bigdl_lite/engine/tasks.py\", line 1, in f\nKeyError: 'x'\n", PySparkException),
    ],
)
def test_only_what_rows_are_to_blame_for_is_an_error_of_the_data(said, kind):
    with pytest.raises(kind) as caught, computed():
        raise PySparkException(said)
    assert said.strip().splitlines()[-1].split(" SQLSTATE")[0] in str(caught.value)


def test_output_columns_of_one_name_are_refused(df):
    model = fit(df)
    with pytest.raises(RecipeError, match="rawPredictionCol, probabilityCol and predictionCol must differ"):
        model.copy({model.predictionCol: "Probability"}).transform(df)


def test_a_column_of_another_type_is_refused_by_transform_before_any_job(spark, df):
    model = fit(df)
    for kind, words in (("string", "of type string, which no tensor can hold"), ("binary", "binary: say how to read it")):
        with pytest.raises(DataError, match=f"column 'features' is {words}"):
            model.transform(spark.createDataFrame([], f"features {kind}"))
