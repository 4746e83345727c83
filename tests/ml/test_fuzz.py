"""Fuzzing: whatever the DataFrame, its rows, the settings and the user's own code, a correct fit or an error of ours.

Each case says beforehand what must come of it, in plain Python and plain torch, without a line of the package:

    correct     the weights of a loop over all rows in one process, and a prediction for every row
    at fault    an error of LEGAL whose message names the column or the parameter

Cases are drawn with fixed seeds, so that a run repeats another.
"""

from __future__ import annotations

import datetime
import decimal
import functools
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pyspark.ml.linalg import Vectors, VectorUDT
from pyspark.sql import functions as F
from pyspark.sql import types as T
from torch import Tensor, nn

import bigdl_lite
from bigdl_lite import BarrierEngine, Raw, TorchClassifier, TorchEstimator, TorchRegressor
from bigdl_lite.errors import BigDLError, DataError, DivergedError, RecipeError, UserError
from tests.conftest import flat

# TypeError is what pyspark.ml itself raises for a Param that fit(df, {param: value}) gives a value of the wrong type, and
# Python for a parameter that does not exist
LEGAL = (BigDLError, TypeError)
FUZZ = settings(derandomize=True, database=None, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
_OURS = os.path.dirname(os.path.abspath(bigdl_lite.__file__)) + os.sep
# a user's error may show the line of ours that called the user's code, where it never came as far as that
_BORDER = re.compile(r"line \d+, in \w+\n +[\w ,=]*(call|loss|self\.module|decoder|factory|scheduler)\(")


@dataclass(frozen=True)
class Fault:
    """An error that may come: its class, and what its message must hold."""

    kind: type[Exception]
    words: str


def judge(fit: Callable[[], Any], faults: Sequence[Fault] = (), weights: Tensor | None = None) -> tuple[str, Any]:
    """Runs a fit, which must end in one of the faults, or without any in a model of these weights [n].

    returns  the name of the error and None, or "fit" and the model
    """
    try:
        model = fit()
    except LEGAL as error:
        said = str(error)
        due = " or ".join(f"{f.kind.__name__} ({f.words})" for f in faults) or "a model"
        assert any(type(error) is f.kind and f.words in said for f in faults), f"{type(error).__name__}: {said}\nwhere {due} was due"
        frames = said.split(_OURS)
        ours = type(error) is UserError and len(frames) > 1 and not _BORDER.search(frames[-1])
        assert not ours, f"an error of the user's with frames of ours:\n{said}"
        return type(error).__name__, None
    assert not faults, f"a model where {faults} were due"
    found = flat(model.module)
    assert bool(torch.isfinite(found).all()), f"weights are not finite: {found}"
    if weights is not None:
        torch.testing.assert_close(found, weights, rtol=1e-4, atol=1e-5)
    return "fit", model


class Net(nn.Module):
    """One matrix on all inputs side by side, squashed so that no finite number is too large for it."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, width * outputs).reshape(width, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, *inputs: Tensor) -> Tensor:
        return squashed(torch.cat([wide(x) for x in inputs], 1)) @ self.weight + self.bias


def squashed(x: Tensor) -> Tensor:
    return x / (1 + x.abs())


def wide(x: Tensor) -> Tensor:
    """[B, ...] of any dtype as [B, width] float32."""
    return (x[:, None] if x.ndim == 1 else x.flatten(1)).float()


def gap(output: Tensor, target: Tensor) -> Tensor:
    """A loss for labels of any shape and magnitude."""
    return (output - squashed(wide(target))).square().mean(1).mean()


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def alone(
    net: nn.Module, loss: Any, x: Sequence[Tensor], y: Tensor, steps: int, value: float | None = None, norm: float | None = None
) -> Tensor:  # fmt: skip
    """The weights after a loop over all rows at once, in one process."""
    optimizer = sgd(net.parameters())
    for _ in range(steps):
        optimizer.zero_grad()
        loss(net(*x), y).backward()
        if value is not None:
            nn.utils.clip_grad_value_(net.parameters(), value)
        if norm is not None:
            nn.utils.clip_grad_norm_(net.parameters(), norm)
        optimizer.step()
    return flat(net)


# ---- columns ----------------------------------------------------------------------------------------------------------

BITS = {"tinyint": 8, "smallint": 16, "int": 32, "bigint": 64}
NUMBERS: dict[str, st.SearchStrategy[Any]] = {
    **{kind: st.integers(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) for kind, bits in BITS.items()},
    "float": st.floats(width=32, allow_nan=False, allow_infinity=False),
    "double": st.floats(-3e38, 3e38),
    "boolean": st.booleans(),
    "decimal(10,2)": st.decimals(-(10**7), 10**7, places=2),
    "decimal(38,18)": st.decimals(-(10**19), 10**19, places=18),
}
SMALL = {"tinyint": int, "smallint": int, "int": int, "bigint": int, "float": float, "double": float, "decimal(10,2)": decimal.Decimal}
OTHERS: dict[str, st.SearchStrategy[Any]] = {
    "string": st.text("ab1. ", max_size=3),
    "date": st.dates(datetime.date(1970, 1, 2), datetime.date(2100, 1, 1)),
    "timestamp": st.datetimes(datetime.datetime(1971, 1, 1), datetime.datetime(2100, 1, 1)),
    "timestamp_ntz": st.datetimes(datetime.datetime(1971, 1, 1), datetime.datetime(2100, 1, 1)),
    "interval day to second": st.timedeltas(datetime.timedelta(-9), datetime.timedelta(9)),
    "binary": st.binary(max_size=4).map(bytearray),
    "void": st.none(),
    "struct<a:int>": st.tuples(st.integers(0, 9)),
    "map<string,int>": st.dictionaries(st.sampled_from("ab"), st.integers(0, 9), max_size=1),
    "array<string>": st.lists(st.sampled_from("ab"), max_size=2),
    "array<struct<a:int>>": st.lists(st.tuples(st.integers(0, 9)), max_size=2),
    "array<vector>": st.lists(st.just(Vectors.dense([1.0])), max_size=1),
}
SCALARS = sorted(NUMBERS)
FLAWS = ["null", "nan", "infinity", "huge", "ragged", "null inside"]


@dataclass
class Cells:
    """A column: its type, its values, and the tensor [rows, ...] that they must become; None where they cannot."""

    kind: str
    values: list[Any]
    name: str = ""

    @property
    def type(self) -> T.DataType:
        if self.kind == "vector":
            return VectorUDT()
        return T.ArrayType(VectorUDT()) if self.kind == "array<vector>" else T._parse_datatype_string(self.kind)

    @functools.cached_property
    def tensor(self) -> Tensor | None:
        base, depth = re.sub(r"array<|>", "", self.kind), self.kind.count("array<")
        if self.kind == "vector":
            base, depth = "double", 1
        elif base not in NUMBERS:
            return None
        values = [v.toArray().tolist() if self.kind == "vector" and v is not None else v for v in self.values]
        shapes = {shape(v, depth) for v in values}
        leaves = [leaf for v in values for leaf in leaves_of(v)]
        if len(shapes) > 1 or None in shapes or None in leaves:
            return None
        if base in BITS:
            made = torch.tensor(leaves, dtype=torch.int64)
        else:
            made = torch.tensor([float(x) for x in leaves], dtype=torch.float64).float()
        whole = made.reshape(len(values), *(shapes or {()}).pop())
        return whole if bool(torch.isfinite(whole).all()) else None


def shape(value: Any, depth: int) -> tuple[int, ...] | None:
    """Of nested lists; None where they hold a null or differ in length."""
    if not depth or value is None:
        return None if value is None else ()
    inner = {shape(x, depth - 1) for x in value} or {(0,) * (depth - 1)}
    return None if len(inner) > 1 or None in inner else (len(value), *inner.pop())


def leaves_of(value: Any) -> list[Any]:
    return [leaf for x in value for leaf in leaves_of(x)] if isinstance(value, list) else [value]


@st.composite
def cells(draw: Any, rows: int, kinds: Sequence[str], flaws: Sequence[str] = FLAWS) -> Cells:
    kind = draw(st.sampled_from(kinds))
    if kind in OTHERS:
        return Cells(kind, draw(st.lists(OTHERS[kind], min_size=rows, max_size=rows)))
    depth = kind.count("array<")
    cell = NUMBERS["double" if kind == "vector" else re.sub(r"array<|>", "", kind)]
    for _ in range(depth or kind == "vector"):
        width = draw(st.integers(0, 3))
        cell = st.lists(cell, min_size=width, max_size=width)
    if kind == "vector":
        cell = st.builds(vector, cell, st.booleans())
    values = draw(st.lists(cell, min_size=rows, max_size=rows))
    if rows and flaws and draw(st.integers(0, 2)) == 0:
        at = draw(st.integers(0, rows - 1))
        values[at] = spoilt(values[at], kind, draw(st.sampled_from(flaws)))
    return Cells(kind, values)


def vector(values: list[float], sparse: bool) -> Any:
    return Vectors.sparse(len(values), range(len(values)), values) if sparse else Vectors.dense(values)


def spoilt(value: Any, kind: str, flaw: str) -> Any:
    """The value with a flaw in it, where its type has room for that."""
    if flaw == "null":
        return None
    bad = {"nan": float("nan"), "infinity": float("-inf"), "huge": 1e300, "null inside": None}.get(flaw)
    if kind in ("float", "double"):
        return value if flaw in ("ragged", "null inside") or (kind, flaw) == ("float", "huge") else bad
    if kind == "vector":
        return Vectors.dense([*value.toArray(), 1.0] if bad is None else [bad] * max(1, value.size))
    if kind.startswith("array<array"):
        return [*value, []] if flaw == "ragged" else [*value[1:], None] if flaw == "null inside" else value
    if kind.startswith("array"):
        if flaw == "ragged":
            return [*value, *value[:1]] if value else value
        if flaw == "null inside" or kind == "array<double>":
            return [*value[1:], bad]
    return value


ARRAYS = [f"array<{kind}>" for kind in SCALARS] + ["array<array<double>>", "array<array<int>>", "array<array<decimal(10,2)>>"]
TENSORS = [*SCALARS, *ARRAYS, "vector", "vector"]
ANY = [*TENSORS, *OTHERS]
NAMES = st.sampled_from([
    "x", "a b", "a.b", "a.b.c", "a`b", "`a`", "``", ".", "*", "a.*", "é", "列", " ", "", "1", "select", "'", '"', "\\", "\n", "\0",
    "${x}", "%s", "{0}", "x" * 300, "__bigdl_lite_row", "__bigdl_lite_part", "__bigdl_lite_score", "__bigdl_lite_file",
]) | st.text(st.characters(exclude_categories=["Cs"]), max_size=3)  # fmt: skip


# ---- DataFrames -------------------------------------------------------------------------------------------------------

ESTIMATORS: dict[str, type[TorchEstimator]] = {"any shape": TorchEstimator, "classes": TorchClassifier, "number": TorchRegressor}


@dataclass
class Case:
    """A DataFrame, what is asked of it, and what must come of that."""

    columns: list[Cells]
    parts: int
    asked: list[Any]
    label: str
    task: str
    workers: int
    epochs: int
    seed: int
    scored: bool
    faults: list[Fault] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    target: Tensor | None = None

    def frame(self, spark: Any) -> Any:
        schema = T.StructType([T.StructField(c.name, c.type) for c in self.columns])
        rows = list(zip(*(c.values for c in self.columns), strict=True))
        return spark.createDataFrame(spark.sparkContext.parallelize(rows, self.parts), schema)

    def estimator(self, engine: str) -> TorchEstimator:
        return ESTIMATORS[self.task](
            module=self.net, optimizer=sgd, inputCols=self.asked, labelCol=self.label, batchSize=100, epochs=self.epochs,
            numWorkers=self.workers, seed=self.seed, engine=engine, progress="none", deadline=30.0,
            **({"loss": gap} if self.task == "any shape" else {}),
        )  # fmt: skip

    @property
    def net(self) -> Callable[[], nn.Module]:
        width = sum(wide(x).shape[1] for x in self.inputs)
        outputs = {"classes": 3, "number": 1}.get(self.task) or (1 if self.target is None else wide(self.target).shape[1])
        return functools.partial(Net, width, outputs)

    def weights(self) -> Tensor:
        """What training must end in."""
        assert self.target is not None
        y, loss = self.target, gap
        if self.task == "classes":
            y, loss = y.long(), nn.CrossEntropyLoss()
            if bool((y == -100).all()):
                return flat(self.net())
        if self.task == "number":
            y, loss = y.float()[:, None], nn.MSELoss()
        return alone(self.net(), loss, self.inputs, y, self.epochs)


@st.composite
def cases(draw: Any, tasks: Sequence[str] = tuple(ESTIMATORS)) -> Case:
    sound = draw(st.sampled_from([False, True, True]))
    rows = draw(st.integers(1, 20) | st.sampled_from([1, 20] if sound else [0, 1, 20]))
    any_kind, flaws = (TENSORS if sound else ANY), ([] if sound else FLAWS)
    task = draw(st.sampled_from(tasks))
    names = draw(st.lists(NAMES, min_size=6, max_size=6, unique_by=str.casefold))
    fresh = iter(names)
    inputs: list[Any] = []  # Cells, or lists of them
    for _ in range(draw(st.integers(1, 2))):
        if draw(st.integers(0, 3)):
            inputs.append(draw(cells(rows, SCALARS if draw(st.booleans()) else any_kind, flaws)))
        else:
            kinds = SCALARS if sound or draw(st.integers(0, 4)) else ANY
            inputs.append([draw(cells(rows, kinds, flaws)) for _ in range(draw(st.integers(1, 2)))])
    asked = [c for item in inputs for c in (item if isinstance(item, list) else [item])]
    label = draw(labels(rows, task, sound)) if task != "any shape" or draw(st.integers(0, 4)) else asked[0]
    asked += [] if label is asked[0] else [label]  # a column may be an input and the label
    for c in asked:
        c.name = next(fresh)
    parts = draw(st.integers(1, 4))
    workers = draw(st.integers(1, 4) | st.just(parts))
    case = Case(
        [], parts, [[c.name for c in i] if isinstance(i, list) else i.name for i in inputs], label.name, task,
        workers, draw(st.integers(1, 2)), draw(st.integers(-(2**63), 2**63 - 1)), draw(st.integers(0, 7)) == 0,
    )  # fmt: skip
    case.faults += [] if rows else [Fault(DataError, "no rows")]
    for item in inputs:
        case.inputs += [x] if (x := expected(item, rows, case.faults)) is not None else []
    case.target = label.tensor
    case.faults += [Fault(DataError, repr(label.name))] if label.tensor is None else wrong_labels(label, task)
    if case.target is not None and not wide(case.target).shape[1]:
        case.faults.append(Fault(DivergedError, "the loss is nan"))  # a mean over no values
    extra = draw(others(rows, asked, case, sound))
    case.columns = draw(st.permutations([*asked, *extra]))
    return case


def expected(item: Any, rows: int, faults: list[Fault]) -> Tensor | None:
    """What an input must become; its faults are noted."""
    members = item if isinstance(item, list) else [item]
    wrong = [c for c in members if c.tensor is None or (isinstance(item, list) and c.kind not in NUMBERS)]
    faults += [Fault(DataError, repr(c.name)) for c in wrong]
    if wrong:
        return None
    made = [c.tensor for c in members]
    return torch.stack([x.double() for x in made], 1) if isinstance(item, list) else made[0]


@st.composite
def labels(draw: Any, rows: int, task: str, sound: bool) -> Cells:
    if task == "any shape":
        return draw(cells(rows, TENSORS, [])) if sound else draw(cells(rows, ANY))
    if not sound and not draw(st.integers(0, 5)):
        return draw(cells(rows, list(OTHERS)))
    kind = draw(st.sampled_from(sorted(SMALL)))
    bound = (0, 2) if task == "classes" else (-99, 99)
    values = draw(st.lists(st.integers(*bound).map(SMALL[kind]), min_size=rows, max_size=rows))
    if rows and not sound and draw(st.booleans()):
        bad = [SMALL[kind](x) for x in (-1, 3, 99, -100)] + [None] + [1.5, float("nan"), float("inf"), 1e30] * (SMALL[kind] is float)
        values[draw(st.integers(0, rows - 1))] = draw(st.sampled_from(bad))
    return Cells(kind, values)


def wrong_labels(label: Cells, task: str) -> list[Fault]:
    y = label.tensor
    if task == "number" and y is not None and bool((y.abs() > 1e15).any()):
        return [Fault(DivergedError, "loss is inf")]  # its square is more than a float32 holds
    if task != "classes" or y is None:
        return []
    if bool((y.double() != y.double().round()).any()) or bool((y.double().abs() > 2**62).any()):
        return [Fault(DataError, repr(label.name))]
    return [Fault(DataError, "label")] if bool((((y < 0) & (y != -100)) | (y > 2)).any()) else []


@st.composite
def others(draw: Any, rows: int, asked: list[Cells], case: Case, sound: bool) -> list[Cells]:
    """Columns that nobody asked for, some of which make a name of those that were asked for ambiguous."""
    what = draw(st.sampled_from([None, "bystanders"] if sound else [None, None, "twin", "case", "missing", "asked in another case"]))
    one = draw(st.sampled_from(asked))
    swapped = one.name.swapcase()
    cased = swapped != one.name and swapped.lower() == one.name.lower() and swapped.upper() == one.name.upper()
    if what == "twin" or (what == "case" and cased):
        case.faults.append(Fault(DataError, repr(one.name)))
        return [Cells("int", [1] * rows, one.name if what == "twin" else swapped)]
    if what == "missing":
        wrong = one.name + "?"
        rename(case, one.name, wrong)
    elif what == "asked in another case" and cased:
        rename(case, one.name, swapped)
    elif what == "bystanders":
        kinds = [draw(st.sampled_from(ANY)) for _ in range(2)]
        return [Cells(kind, draw(cells(rows, [kind])).values, "by. `stander") for kind in kinds]
    return []


def rename(case: Case, old: str, new: str) -> None:
    case.asked = [new if x == old else [new if y == old else y for y in x] if isinstance(x, list) else x for x in case.asked]
    case.label = new if case.label == old else case.label
    case.faults.append(Fault(DataError, repr(new)))


def run(case: Case, spark: Any, engine: str = "local") -> str:
    df = case.frame(spark)
    done, model = judge(lambda: case.estimator(engine).fit(df), case.faults, None if case.faults else case.weights())
    if model is not None and case.scored:
        rows = model.transform(df).collect()
        with torch.inference_mode():
            output = model.module(*case.inputs)
        assert len(rows) == len(output)
        at = -3 if case.task == "classes" else -1  # the raw prediction stands before probability and prediction
        found = [x.toArray() if case.task == "classes" else x for x in (row[at] for row in rows)]
        np.testing.assert_allclose(np.array(found, "f8").reshape(output.shape), output.numpy(), rtol=1e-4, atol=1e-5)
    return done


def fuzz(cases: st.SearchStrategy[Any], count: int, run: Callable[[Any], str], part: str = "all") -> Counter[str]:
    """Runs so many cases, or a fourth of them; returns how they ended, which must not always be the same."""
    seen: Counter[str] = Counter()
    count = count if part == "all" else -(-count // 4)

    @settings(FUZZ, max_examples=count)
    @given(case=cases)
    def one(case: Any) -> None:
        seen[run(case)] += 1

    one()
    assert seen.total() >= count and len(seen) > 1, seen
    return seen


# all cases take a minute and a half; the default run takes a fourth of each kind
some_or_all = pytest.mark.parametrize("part", ["fourth", pytest.param("all", marks=pytest.mark.slow)])


@some_or_all
@pytest.mark.parametrize("task", ESTIMATORS)
def test_any_schema_and_any_rows(spark, task, part):
    seen = fuzz(cases([task]), 40, lambda case: run(case, spark), part)
    assert part == "fourth" or 8 <= seen["fit"] <= 38, seen


@pytest.mark.slow  # many Spark jobs each; the local engine takes the same cases in the default run
@pytest.mark.parametrize("engine", ["barrier", "shuffle"])
def test_any_schema_and_any_rows_on_executors(spark, engine):
    seen = fuzz(cases(), 15, lambda case: run(case, spark, engine))
    assert 2 <= seen["fit"] <= 14, seen  # which cases are drawn depends on the version of hypothesis


# ---- settings ---------------------------------------------------------------------------------------------------------

ROWS = 24
X = torch.linspace(-2, 2, ROWS * 3).reshape(ROWS, 3)
Y = torch.arange(ROWS) % 3


@pytest.fixture(scope="module")
def df(spark):
    rows = [(X[i].tolist(), i, i / 2, i % 2 == 0, int(Y[i]), bytearray([i] * 4), "s") for i in range(ROWS)]
    schema = "features array<float>, a int, b double, c boolean, label long, image binary, text string"
    return spark.createDataFrame(spark.sparkContext.parallelize(rows, 3), schema)


GOOD = st.fixed_dictionaries({}, optional={
    "batchSize": st.integers(1, 40) | st.sampled_from([24, 10**12, 2**70, 7.0]),
    "epochs": st.integers(1, 3),
    "numWorkers": st.integers(1, 5),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "logInterval": st.integers(1, 9) | st.just(2**65),
    "deadline": st.floats(20, 1e6) | st.just(3600),
    "clipNorm": st.floats(1e-3, 1e3) | st.sampled_from([float("inf"), 1e-30, 2]),
    "clipValue": st.floats(1e-3, 1e3) | st.just(float("inf")),
    "schedulerInterval": st.sampled_from(["step", "epoch"]),
    "predictBatchSize": st.integers(1, 5000),
    "progress": st.sampled_from(["auto", "log", "none"]),
    "syncBatchNorm": st.booleans(),
})  # fmt: skip
NO_WHOLE = [3.5, "8", True, [8], float("nan"), float("inf"), 10**400, b"8", {}]
NO_FLOAT = ["8", True, [8.0], 10**400]
NO_TEXT = [3, 2.5, [], True]
COUNTS = ["batchSize", "epochs", "logInterval", "predictBatchSize"]
WRONG: dict[str, Sequence[Any]] = {  # of the wrong type, as pyspark.ml sees it
    **dict.fromkeys([*COUNTS, "numWorkers", "seed"], NO_WHOLE),
    **dict.fromkeys(["deadline", "clipNorm", "clipValue"], NO_FLOAT),
    **dict.fromkeys(["schedulerInterval", "progress", "labelCol", "predictionCol"], NO_TEXT),
    "syncBatchNorm": [0, 1, "yes"],
    "inputCols": ["features", 3, b"ab", {"features"}, [3], [None], [b"features"], [["a", 3]], [[["a"]]], [{"a": 1}]],
}
BAD: dict[str, Sequence[Any]] = {  # of the right type, or of any
    **dict.fromkeys(COUNTS, (0, -1, -(2**70))),
    "numWorkers": [0, -3, 10**9, 2**40, 2**70],
    "seed": [2**63, -(2**63) - 1, 2**80],
    **dict.fromkeys(["clipNorm", "clipValue"], (0.0, -1.0, float("nan"), float("-inf"))),
    "deadline": [0.0, -1.0, float("nan"), float("inf"), 1e18],
    "schedulerInterval": ["day", "", "Epoch"],
    "progress": ["loud", ""],
    "engine": ["warp", "", 3, [], object(), BarrierEngine],
    "algorithm": ["magic", "", 3, ["sync-sgd"], lambda advance: 3],
    "decoders": [3, ["features"], {"features": 3}, {3: Raw((1,))}, {None: Raw(())}, {"nothing": Raw((1,))}, {"a": None}],
    **dict.fromkeys(["module", "loss", "optimizer", "scheduler"], (3, "x", [], {})),
    "inputCols": [[], [[]], [[], "a"]],
}
UNFIT: list[tuple[str, Any, str]] = [  # names that the DataFrame, or a tensor, has no room for
    ("inputCols", ["nothing"], "'nothing'"), ("inputCols", ["FEATURES"], "'FEATURES'"), ("inputCols", [["a", "nothing"]], "'nothing'"),
    ("inputCols", ["text"], "'text'"), ("inputCols", [["a", "text"]], "'text'"), ("inputCols", [["a", "features"]], "'features'"),
    ("inputCols", ["image"], "'image'"), ("labelCol", "nothing", "'nothing'"), ("labelCol", "", "''"), ("labelCol", "text", "'text'"),
    ("decoders", {"features": Raw((3,))}, "'features'"), ("labelCol", "b", "'b'"), ("labelCol", "a", "label"),
]  # fmt: skip


@dataclass
class Setting:
    given: dict[str, Any]
    later: bool  # by fit(df, {param: value})
    faults: list[Fault]


@st.composite
def setting(draw: Any) -> Setting:
    given, later = draw(GOOD), draw(st.booleans())
    what = draw(st.integers(0, 4))
    if what == 0:
        name = draw(st.sampled_from(sorted(WRONG)))
        return Setting(given | {name: draw(st.sampled_from(WRONG[name]))}, later, [Fault(TypeError if later else RecipeError, name)])
    if what == 1:
        name = draw(st.sampled_from(sorted(BAD)))
        return Setting(given | {name: draw(st.sampled_from(BAD[name]))}, later, [Fault(RecipeError, name)])
    if what == 2:
        name, value, words = draw(st.sampled_from(UNFIT))
        return Setting(given | {name: value}, later, [Fault(DataError, words)])
    if what == 3 and later:
        name = draw(st.sampled_from([*COUNTS, "seed", "deadline", "engine", "inputCols", "labelCol", "optimizer", "decoders"]))
        return Setting(given | {name: None}, later, [Fault(RecipeError, name)])
    return Setting(given, later, [])


def run_setting(setting: Setting, df: Any) -> str:
    common = {"module": functools.partial(Net, 3, 3), "optimizer": sgd, "engine": "local", "numWorkers": 2, "progress": "none"}
    given = common | setting.given
    epochs, batch, n = given.get("epochs", 1), given.get("batchSize", 256), ROWS
    weights = None
    if not setting.faults and batch >= n:
        clip = given.get("clipValue"), given.get("clipNorm")
        weights = alone(Net(3, 3), nn.CrossEntropyLoss(), [X], Y, epochs, *clip)

    def fit() -> Any:
        if not setting.later:
            return TorchClassifier(**given).fit(df)
        estimator = TorchClassifier(**common)
        return estimator.fit(df, {estimator.getParam(name): value for name, value in setting.given.items()})

    done, model = judge(fit, setting.faults, weights)
    if model is not None:
        steps = [line for line in model.history if "step" in line]
        each = [line for line in model.history if "step" not in line]
        total = epochs * -(-n // int(batch))
        assert [line["step"] for line in steps] == list(range(0, total, given.get("logInterval", 1)))
        assert [line["rows"] for line in each] == [n] * epochs
    return done


@some_or_all
def test_any_settings(df, part):
    seen = fuzz(setting(), 150, lambda setting: run_setting(setting, df), part)
    enough = seen["fit"] >= 20 and seen["RecipeError"] >= 30 and seen["TypeError"] >= 4 and seen["DataError"] >= 5
    assert part == "fourth" or enough, seen


@pytest.mark.parametrize("name", ["nothing", "batch_size", "__class__", "params", "uid", "fit", ""])
def test_a_parameter_that_does_not_exist_is_a_type_error(name):
    with pytest.raises(TypeError, match=re.escape(f"no parameter {name!r}")):
        TorchClassifier(**{name: 1})


# ---- code of the user's -----------------------------------------------------------------------------------------------


class Odd(nn.Module):
    """What `change` makes of the module itself, its output and its input."""

    def __init__(self, change: Callable[[nn.Module, Tensor, Tensor], Any], prepare: Callable[[nn.Module], Any] | None = None) -> None:
        super().__init__()
        self.linear, self.change = nn.Linear(3, 3), change
        if prepare is not None:
            prepare(self)

    def forward(self, x: Tensor) -> Any:
        return self.change(self, self.linear(x), x)


class Stepping(torch.optim.SGD):
    def __init__(self, parameters: Any, do: Callable[[Any], Any]) -> None:
        super().__init__(parameters, lr=0.1)
        self.do = do

    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        self.do(self)


class Scheduler:
    def __init__(self, error: type[Exception] | None) -> None:
        self.error = error

    def step(self) -> None:
        if self.error is not None:
            raise self.error("of the scheduler")


def throw(error: type[BaseException]) -> Any:
    raise error("of the user's")


def plain(module: nn.Module, output: Tensor, x: Tensor) -> Tensor:
    return output


def odd(change: Callable[..., Any] = plain, prepare: Callable[[nn.Module], Any] | None = None) -> dict[str, Any]:
    return {"module": lambda: Odd(change, prepare)}


def loss(change: Callable[[Tensor, Tensor], Any]) -> dict[str, Any]:
    return {"loss": lambda output, target: change(nn.functional.cross_entropy(output, target), output)}


def optimizer(change: Callable[[Any], Any]) -> dict[str, Any]:
    return {"optimizer": change}


def fill(value: float) -> Callable[[nn.Module], Any]:
    return lambda module: nn.init.constant_(module.linear.weight, value)


class Uncopied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.scaled = self.linear.weight * 2  # not a leaf: copy.deepcopy refuses it

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


NAN = float("nan")
CODE: dict[str, tuple[dict[str, Any], type[Exception] | None, str]] = {
    "nothing odd": (odd(), None, ""),
    **{f"forward raises {e.__name__}": (odd(lambda m, o, x, e=e: throw(e)), UserError, e.__name__)
       for e in (KeyError, IndexError, AttributeError, AssertionError, StopIteration, RuntimeError, MemoryError, SystemExit)},
    "a row is missing": (odd(lambda m, o, x: o[:-1]), DataError, "first dimension must be the rows"),
    "rows twice": (odd(lambda m, o, x: torch.cat([o, o])), DataError, "first dimension must be the rows"),
    "one number": (odd(lambda m, o, x: o.sum()), DataError, "shape []"),
    "a tuple": (odd(lambda m, o, x: (o, x)), UserError, "TypeError"),
    "None": (odd(lambda m, o, x: None), UserError, "Error"),
    "a string": (odd(lambda m, o, x: "text"), UserError, "Error"),
    "detached": (odd(lambda m, o, x: o.detach()), RecipeError, "does not depend on any trainable parameter"),
    "whole numbers": (odd(lambda m, o, x: o.long()), UserError, "Error"),
    "NaN": (odd(lambda m, o, x: o * NAN), DivergedError, "the loss is nan"),
    "infinity": (odd(lambda m, o, x: o * float("inf")), DivergedError, "the loss is"),
    "too few classes": (odd(lambda m, o, x: o[:, :2]), DataError, "label"),
    "three dimensions": (odd(lambda m, o, x: o[:, :, None]), UserError, "Error"),
    "two arguments": ({"module": lambda: nn.Bilinear(3, 3, 3)}, UserError, "TypeError"),
    "wrong in_features": ({"module": lambda: nn.Linear(7, 3)}, UserError, "RuntimeError"),
    "no rows in evaluation mode": (odd(lambda m, o, x: o if m.training else o.sum()), None, "one tensor, a row for each row"),
    "a tuple in evaluation mode": (odd(lambda m, o, x: o if m.training else (o, o)), None, ""),
    "weights of NaN": (odd(plain, fill(NAN)), RecipeError, "'linear.weight'"),
    "weights of infinity": (odd(plain, fill(float("-inf"))), RecipeError, "'linear.weight'"),
    "a buffer of infinity": (odd(plain, lambda m: m.register_buffer("mask", torch.full((2,), float("-inf")))), None, ""),
    "no parameters": ({"module": nn.Flatten}, RecipeError, "no trainable parameter"),
    "all frozen": (odd(plain, lambda m: m.requires_grad_(False)), RecipeError, "no trainable parameter"),
    "half frozen": (odd(plain, lambda m: m.linear.bias.requires_grad_(False)), None, ""),
    "an empty parameter": (odd(plain, lambda m: m.register_parameter("none", nn.Parameter(torch.empty(0)))), None, ""),
    "only an empty parameter": (
        odd(lambda m, o, x: o.detach() + m.none.sum(),
            lambda m: m.requires_grad_(False).register_parameter("none", nn.Parameter(torch.empty(0)))), None, "",
    ),
    "complex": (odd(plain, lambda m: m.to(torch.complex64)), RecipeError, "'linear.weight'"),
    "double": (odd(plain, lambda m: m.double()), None, ""),
    "bfloat16": (odd(plain, lambda m: m.to(torch.bfloat16)), None, ""),
    "mixed": (odd(plain, lambda m: m.register_parameter("d", nn.Parameter(torch.ones(1).double()))), RecipeError, "float64"),
    "lazy": ({"module": lambda: nn.LazyLinear(3)}, RecipeError, "not initialised"),
    "without memory": ({"module": lambda: nn.Linear(3, 3, device="meta")}, RecipeError, "'weight'"),
    "a loss of one argument": ({"loss": lambda output: output.sum()}, UserError, "TypeError"),
    "not to be copied": ({"module": Uncopied()}, UserError, "deepcopy"),
    "not to be copied when made": ({"module": Uncopied}, UserError, "deepcopy"),
    "a class with arguments": ({"module": nn.Linear}, UserError, "TypeError"),
    "a maker that raises": ({"module": lambda: throw(OSError)}, UserError, "OSError"),
    "a maker of None": ({"module": lambda: None}, RecipeError, "module() returned NoneType"),
    "a maker of a class": ({"module": lambda: nn.Linear}, RecipeError, "module() returned type"),
    "a loss that raises": (loss(lambda x, o: throw(KeyError)), UserError, "KeyError"),
    "a loss for each row": (loss(lambda x, o: o.mean(1).repeat(2)), RecipeError, "must return one number"),
    "a loss of [1]": (loss(lambda x, o: x[None]), None, ""),
    "a loss of None": (loss(lambda x, o: None), RecipeError, "NoneType"),
    "a loss of 3": (loss(lambda x, o: 3), RecipeError, "int"),
    "a loss of float": (loss(lambda x, o: float(x)), RecipeError, "float"),
    "a loss of whole number": (loss(lambda x, o: torch.tensor(3)), RecipeError, "does not depend"),
    "a loss of NaN": (loss(lambda x, o: x * NAN), DivergedError, "the loss is nan"),
    "a loss of infinity": (loss(lambda x, o: x * float("inf")), DivergedError, "the loss is inf"),
    "a complex loss": (loss(lambda x, o: x * 1j), UserError, "RuntimeError"),
    "a sum": ({"loss": nn.CrossEntropyLoss(reduction="sum")}, RecipeError, "sums over the rows"),
    "a loss for each row by its reduction": ({"loss": nn.CrossEntropyLoss(reduction="none")}, RecipeError, "the loss returned"),
    "weights for other classes": ({"loss": nn.CrossEntropyLoss(weight=torch.ones(7))}, UserError, "weight"),
    "an optimizer that raises": (optimizer(lambda p: throw(ValueError)), UserError, "ValueError"),
    "an optimizer of None": (optimizer(lambda p: None), RecipeError, "optimizer factory returned NoneType"),
    "an optimizer class": (optimizer(lambda p: torch.optim.SGD), RecipeError, "optimizer factory returned type"),
    "LBFGS": (optimizer(lambda p: torch.optim.LBFGS(p)), RecipeError, "LBFGS"),
    "another's parameters": (optimizer(lambda p: sgd([nn.Parameter(torch.ones(5))])), RecipeError, "not one of the module's"),
    "no parameters to optimise": (optimizer(lambda p: sgd([])), UserError, "ValueError"),
    "a learning rate of -1": (optimizer(lambda p: torch.optim.SGD(p, lr=-1.0)), UserError, "ValueError"),
    "a learning rate of NaN": (optimizer(lambda p: torch.optim.SGD(p, lr=NAN)), DivergedError, ""),
    "a learning rate of 1e38": (optimizer(lambda p: torch.optim.SGD(p, lr=1e38, weight_decay=1e30)), DivergedError, ""),
    "a learning rate of 0": (optimizer(lambda p: torch.optim.SGD(p, lr=0.0)), None, ""),
    "a step that raises": (optimizer(lambda p: Stepping(p, lambda self: throw(ZeroDivisionError))), UserError, "ZeroDivisionError"),
    "a step to NaN": (
        optimizer(lambda p: Stepping(p, lambda self: [x.data.fill_(NAN) for g in self.param_groups for x in g["params"]])),
        DivergedError, "",
    ),
    "a scheduler that raises when made": ({"scheduler": lambda optimizer: throw(KeyError)}, UserError, "KeyError"),
    "a scheduler that raises": ({"scheduler": lambda optimizer: Scheduler(KeyError)}, UserError, "KeyError"),
    "a scheduler of one's own": ({"scheduler": lambda optimizer: Scheduler(None)}, None, ""),
    "an algorithm that raises": ({"algorithm": lambda advance: throw(KeyError)}, UserError, "KeyError"),
}  # fmt: skip


@pytest.mark.parametrize("what", CODE)
def test_any_code_of_the_users(df, what):
    given, kind, words = CODE[what]
    rand = random.Random(what)
    more = {"batchSize": rand.choice([2, 7, 24, 40]), "numWorkers": rand.randint(1, 3), "epochs": rand.randint(1, 2), "engine": "local"}
    given = {"module": functools.partial(Net, 3, 3), "loss": nn.CrossEntropyLoss(), "optimizer": sgd, "progress": "none"} | more | given
    _, model = judge(lambda: TorchEstimator(**given).fit(df), [Fault(kind, words)] if kind else [])
    if model is not None and words:
        with pytest.raises(RecipeError, match=words):
            model.transform(df)
    elif model is not None:
        assert "prediction" in model.transform(df).columns


# ---- bytes ------------------------------------------------------------------------------------------------------------

RAWS = ["bool", "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64"]
NO_RAW = [
    *(((2,), dtype) for dtype in ("text", "U5", "object", "complex64", ">f4", "datetime64[s]", None, "f4,i4")),
    *((shape, "uint8") for shape in ((-1,), (1.5,), 3, "ab", None, (None,))),
]
FUNCTIONS: dict[str, tuple[Callable[[bytes], Any], bool | type[Exception]]] = {  # whether it can be used, or what it raises
    "length": (len, True),
    "array": (lambda data: np.frombuffer(data[:2], "u1"), True),
    "big endian": (lambda data: np.frombuffer(data[:4], ">u2"), True),
    "tensor": (lambda data: torch.tensor([float(data[0]), 2.0]), True),
    "list": (lambda data: [1, 2.5, True], True),
    "nested": (lambda data: [[1, 2], [3, 4]], True),
    "nothing": (lambda data: [], True),
    "ragged": (lambda data: [[1], [2, 3]], False),
    "None": (lambda data: None, False),
    "text": (lambda data: "text", False),
    "complex": (lambda data: np.ones(2, "c8"), False),
    "objects": (lambda data: np.array([object()]), False),
    "dates": (lambda data: np.array(["2026-01-01"], "M8[D]"), False),
    "gradient": (lambda data: torch.ones(2, requires_grad=True), False),
    "NaN": (lambda data: np.array([NAN]), False),
    "too large": (lambda data: np.array([1e300]), False),
    "changing": (lambda data: np.ones(data[0] % 2 + 1), False),
    "raises": (lambda data: throw(IndexError), IndexError),
}


@dataclass
class Bytes:
    values: list[bytearray]
    decoder: Any  # Raw's arguments, or the name of a function
    role: str
    faults: list[Fault]

    def tensor(self) -> Tensor:
        if isinstance(self.decoder, tuple):
            rows = [np.frombuffer(v, self.decoder[1]).reshape(self.decoder[0]) for v in self.values]
        else:
            rows = [np.asarray(FUNCTIONS[self.decoder][0](bytes(v))).astype("f8") for v in self.values]
        return torch.from_numpy(np.stack(rows)).float()


@st.composite
def binary(draw: Any) -> Bytes:
    n, role = draw(st.integers(1, 12)), draw(st.sampled_from(["image", "label"]))
    what = draw(st.integers(0, 4))
    if what == 0:
        return Bytes([bytearray(2)], draw(st.sampled_from(NO_RAW)), role, [Fault(RecipeError, "Raw(")])
    if what == 1:
        name = draw(st.sampled_from(sorted(FUNCTIONS)))
        values = [bytearray([i, *range(i, i + 3)]) for i in range(n + 1)]
        fine = FUNCTIONS[name][1]
        if fine is True:
            return Bytes(values, name, role, [])
        return Bytes(values, name, role, [Fault(UserError, fine.__name__) if isinstance(fine, type) else Fault(DataError, repr(role))])
    shape, dtype = draw(st.sampled_from([(), (0,), (3,), (2, 2), (1, 2, 1)])), draw(st.sampled_from(RAWS))
    bound = {"float16": 6e4, "float32": 3e38, "float64": 3e38}.get(dtype)
    info = None if bound or dtype == "bool" else np.iinfo(dtype)
    cell = st.booleans() if dtype == "bool" else st.integers(int(info.min), int(info.max)) if info else st.floats(-bound, bound)
    width = int(np.prod(shape))
    rows = draw(st.lists(st.lists(cell, min_size=width, max_size=width), min_size=n, max_size=n))
    values: list[Any] = [bytearray(np.array(row, dtype).tobytes()) for row in rows]
    faults = []
    if draw(st.integers(0, 2)) == 0:
        bad = draw(st.sampled_from([None, values[0] + b"?", bytearray(b"\xff" * 100), *([values[0][1:]] if width else [])]))
        values[draw(st.integers(0, n - 1))] = bad
        faults = [Fault(DataError, repr(role))]
    return Bytes(values, (shape, dtype), role, faults)


def run_bytes(case: Bytes, spark: Any) -> str:
    other = "label" if case.role == "image" else "image"
    rows = [(v, float(i)) for i, v in enumerate(case.values)]
    df = spark.createDataFrame(spark.sparkContext.parallelize(rows, 2), f"{case.role} binary, {other} double")
    weights, width, outputs = None, 1, 1
    if not case.faults:
        x, y = case.tensor(), torch.arange(len(rows)).float()
        x, y = (x, y) if case.role == "image" else (y, x)
        width, outputs = wide(x).shape[1], wide(y).shape[1]
        weights = alone(Net(width, outputs), gap, [x], y, 1) if outputs else None

    def fit() -> Any:
        decoder = Raw(*case.decoder) if isinstance(case.decoder, tuple) else FUNCTIONS[case.decoder][0]
        return TorchEstimator(
            module=functools.partial(Net, width, max(1, outputs)), loss=gap, optimizer=sgd, inputCols=["image"],
            decoders={case.role: decoder}, numWorkers=2, engine="local", progress="none",
        ).fit(df)  # fmt: skip

    if not outputs:
        case.faults.append(Fault(DivergedError, "the loss is nan"))  # a mean over no values
    return judge(fit, case.faults, weights)[0]


@some_or_all
def test_any_bytes_and_any_decoder(spark, part):
    seen = fuzz(binary(), 50, lambda case: run_bytes(case, spark), part)
    assert part == "fourth" or (seen["fit"] >= 12 and seen["DataError"] >= 5 and seen["RecipeError"] >= 5), seen


# ---- rows that are computed -------------------------------------------------------------------------------------------

ARRAYS_OF_RDD: list[Any] = [
    1, 2.5, True, np.int8(3), np.float32(0.5), np.ones(3, "f4"), np.ones((2, 2)), np.arange(3), np.ones(3, "u1"), [1.0, 2.0], 300,
    2**62, 10**30, None, "text", [[1], [2, 3]], np.ones(2, "c8"), np.array([object()]), np.ones(3, ">f4"), NAN, np.float64(1e300),
]  # fmt: skip
SOUND = 12  # the first of them


@st.composite
def rdds(draw: Any) -> tuple[list[Any], list[Fault]]:
    sound = draw(st.booleans())
    kind = st.sampled_from(range(SOUND if sound else len(ARRAYS_OF_RDD)))
    first = (draw(kind), draw(kind))
    rows = [first] * draw(st.integers(1 if sound else 0, 4))
    if rows and not sound and draw(st.booleans()):
        rows[-1] = (draw(kind), first[1]) if draw(st.booleans()) else (first[0], draw(kind))
    made: list[Any] = [((ARRAYS_OF_RDD[i],), ARRAYS_OF_RDD[j]) for i, j in rows]
    if rows and not sound and not draw(st.integers(0, 3)):
        made[-1] = draw(st.sampled_from([3, None, "text", (), (1,), (1, 2, 3), ((), 1), {"a": 1}]))
    return made, [] if fits(made) else [Fault(DataError, words) for words in ("RDD", "a row", "'input0'", "'label'")]


def fits(rows: list[Any]) -> bool:
    """Whether the rows are pairs of arrays of real numbers, of the shapes and within the dtypes of the first."""
    if not rows or not all(isinstance(row, tuple) and len(row) == 2 and isinstance(row[0], tuple) and len(row[0]) == 1 for row in rows):
        return False
    for column in ([row[0][0] for row in rows], [row[1] for row in rows]):
        try:
            arrays = [np.asarray(x) for x in column]
        except ValueError:
            return False
        first = arrays[0]
        for x in arrays:
            if x.dtype.kind not in "biuf" or x.dtype == ">f4" or x.shape != first.shape:
                return False
            if not np.all(np.isfinite(x.astype("f4"))) or (first.dtype.kind != "f" and not np.array_equal(x.astype(first.dtype), x)):
                return False
    return True


def run_rdd(case: tuple[list[Any], list[Fault]], spark: Any) -> str:
    rows, faults = case
    weights, width, outputs = None, 1, 1
    if not faults:
        x = torch.from_numpy(np.stack([np.asarray(row[0][0]) for row in rows]).astype("f4"))
        y = torch.from_numpy(np.stack([np.asarray(row[1]) for row in rows]).astype("f4"))
        width, outputs = wide(x).shape[1], wide(y).shape[1]
        weights = alone(Net(width, outputs), gap, [x], y, 1)
    estimator = TorchEstimator(
        module=functools.partial(Net, width, outputs), loss=gap, optimizer=sgd, numWorkers=2, engine="local", progress="none"
    )
    return judge(lambda: estimator.fit(spark.sparkContext.parallelize(rows, 2)), faults, weights)[0]


@some_or_all
def test_any_rdd(spark, part):
    seen = fuzz(rdds(), 25, lambda case: run_rdd(case, spark), part)
    assert part == "fourth" or (seen["fit"] >= 5 and seen["DataError"] >= 3), seen


COMPUTED = {
    "a udf": (lambda df: df.withColumn("features", F.udf(lambda x: throw(KeyError), "array<float>")("features")), "KeyError: "),
    "an error of SQL": (lambda df: df.withColumn("features", F.expr("array(float(raise_error('by hand')))")), "by hand"),
    "an array's end": (lambda df: df.withColumn("features", F.array(F.expr("float(element_at(features, a * 9))"))), "INDEX"),
}


@pytest.mark.parametrize("engine", ["local", "barrier", "shuffle"])
@pytest.mark.parametrize("what", COMPUTED)
def test_rows_that_cannot_be_computed(df, what, engine):
    change, words = COMPUTED[what]
    estimator = TorchClassifier(module=functools.partial(Net, 3, 3), numWorkers=2, engine=engine, progress="none")
    assert judge(lambda: estimator.fit(change(df)), [Fault(DataError, words)])[0] == "DataError"


@pytest.mark.parametrize("dataset", [None, 3, "x", [1], {}, np.ones(3), TorchEstimator], ids=lambda x: type(x).__name__)
def test_what_is_no_dataframe(dataset, df):
    model = TorchClassifier(module=functools.partial(Net, 3, 3), engine="local", numWorkers=1, progress="none").fit(df)
    for act in (TorchClassifier(module=functools.partial(Net, 3, 3)).fit, model.transform):
        assert judge(lambda act=act: act(dataset), [Fault(DataError, "no DataFrame")])[0] == "DataError"


def test_a_stream_cannot_be_trained_on(spark):
    stream = spark.readStream.format("rate").load().selectExpr("array(float(value)) features", "value label")
    assert judge(lambda: TorchClassifier(module=nn.Linear(1, 2)).fit(stream), [Fault(DataError, "stream")])[0] == "DataError"


# ---- transform --------------------------------------------------------------------------------------------------------


@dataclass
class Scoring:
    name: str
    column: Cells
    given: dict[str, Any]
    faults: list[Fault]
    late: bool = False


@st.composite
def scorings(draw: Any) -> Scoring:
    rows, name = draw(st.integers(0, 12)), draw(NAMES)
    what = draw(st.sampled_from(["right", "right", "right", "type", "rows", "Param"]))
    cell = st.lists(st.floats(-9, 9, width=32), min_size=3, max_size=3)
    column = Cells("array<float>", draw(st.lists(cell, min_size=rows, max_size=rows)), name)
    given: dict[str, Any] = {"inputCols": [name], "predictBatchSize": draw(st.integers(1, 20)), "predictionCol": draw(NAMES)}
    if given["predictionCol"].lower() == name.lower():
        given["predictionCol"] += "2"
    if what == "type":
        kind = draw(st.sampled_from(sorted(OTHERS)))
        return Scoring(name, Cells(kind, draw(cells(rows, [kind])).values, name), given, [Fault(DataError, repr(name))])
    if what == "rows" and rows:
        flaw = draw(st.sampled_from([None, [NAN, 1.0, 1.0], [1.0, None, 1.0]]))
        column.values[draw(st.integers(0, rows - 1))] = flaw
        return Scoring(name, column, given | {"predictionCol": "late"}, [Fault(DataError, repr(name))], late=True)
    if what == "Param":
        bad = draw(st.sampled_from([("predictBatchSize", 0), ("predictBatchSize", -5), ("inputCols", [name] * 2), ("inputCols", [[]])]))
        return Scoring(name, column, given | dict([bad]), [Fault(RecipeError, bad[0])])
    return Scoring(name, column, given, [])


def run_scoring(case: Scoring, model: Any, spark: Any) -> str:
    schema = T.StructType([T.StructField("id", T.IntegerType()), T.StructField(case.name, case.column.type)])
    rows = list(enumerate(case.column.values))
    df = spark.createDataFrame(spark.sparkContext.parallelize(rows, 3), schema)
    copy = model.copy({model.getParam(name): value for name, value in case.given.items()})
    if case.late:  # lazily: the error is Spark's own when an action comes, and holds what we said
        with pytest.raises(Exception, match=re.escape(f"column {case.name!r}")):
            copy.transform(df).collect()
        return "late"
    try:
        scored = copy.transform(df)
    except LEGAL as error:
        assert any(type(error) is f.kind and f.words in str(error) for f in case.faults), repr(error)
        return type(error).__name__
    assert not case.faults
    assert scored.columns == ["id", case.name] + [case.given["predictionCol"]] * bool(case.given["predictionCol"])
    found = sorted((row[0], row[-1]) for row in scored.collect())
    assert [i for i, _ in found] == list(range(len(rows)))
    if rows and case.given["predictionCol"]:
        with torch.inference_mode():
            output = model.module(torch.tensor(case.column.values))
        np.testing.assert_allclose([x for _, x in found], output.numpy(), rtol=1e-5, atol=1e-5)
    return "scored"


@some_or_all
def test_any_frame_is_scored(spark, df, part):
    estimator = TorchEstimator(module=functools.partial(Net, 3, 3), loss=nn.CrossEntropyLoss(), engine="local", progress="none")
    model = estimator.fit(df)
    seen = fuzz(scorings(), 30, lambda case: run_scoring(case, model, spark), part)
    assert part == "fourth" or (5 <= seen["scored"] <= 25 and seen["late"] and seen["DataError"] and seen["RecipeError"]), seen


# ---- the judge itself -------------------------------------------------------------------------------------------------


def failing(error: BaseException) -> Callable[[], Any]:
    def fit() -> Any:
        raise error

    return fit


@pytest.mark.parametrize("error", [KeyError("x"), IndexError("x"), AttributeError("x"), ValueError("x"), AssertionError("x")], ids=repr)
def test_an_error_that_is_not_legal_is_not_let_through(error):
    with pytest.raises(type(error)):
        judge(failing(error), [Fault(type(error), "x")])


@pytest.mark.parametrize("error", [DataError(""), DataError("column 'y'"), RecipeError("column 'x'"), TypeError("'x'")], ids=repr)
def test_an_error_that_names_nothing_or_is_of_another_class_is_not_let_through(error):
    with pytest.raises(AssertionError, match="was due"):
        judge(failing(error), [Fault(DataError, "'x'")])
    assert judge(failing(DataError("column 'x'")), [Fault(DataError, "'x'")]) == ("DataError", None)


def test_an_error_of_our_own_code_does_not_pass_for_one_of_the_users():
    fault = [Fault(UserError, "KeyError")]
    with pytest.raises(AssertionError, match="frames of ours"):
        judge(failing(UserError(f'Traceback\n  File "{_OURS}data/arrow.py", line 1\nKeyError')), fault)
    assert judge(failing(UserError("Traceback\nKeyError")), fault)[0] == "UserError"


def test_a_wrong_model_is_not_let_through():
    class Model:
        def __init__(self, weights: Tensor) -> None:
            self.module = nn.Linear(1, 1, bias=False)
            self.module.weight.data[:] = weights

    right = torch.ones(1)
    assert judge(lambda: Model(right), (), right)[0] == "fit"
    for wrong, faults in ((right * 1.001, ()), (right * NAN, ()), (right, [Fault(DataError, "x")])):
        with pytest.raises(AssertionError):
            judge(lambda wrong=wrong: Model(wrong), faults, right)


def test_names_that_spark_would_misread_need_the_names_they_travel_under(spark, monkeypatch):
    """The control for the names: under their own, they do not arrive."""
    case = Case([Cells("double", [1.0, 2.0], "a.b"), Cells("double", [1.0, 2.0], "y")], 1, ["a.b"], "y", "any shape", 1, 1, 0, False)
    case.inputs, case.target = [torch.tensor([1.0, 2.0])], torch.tensor([1.0, 2.0])
    assert run(case, spark) == "fit"
    for module in ("engine.spark", "data.columns", "data.arrow"):
        monkeypatch.setattr(f"bigdl_lite.{module}.field", lambda name: name)
    with pytest.raises(Exception, match=r"`a`.`b` cannot be resolved"):
        run(case, spark)
