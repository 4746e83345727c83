"""A module that returns several tensors gives several columns."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from pyspark.sql import functions as F
from torch import Tensor, nn

from bigdl_lite import TorchClassifier, TorchEstimator, TorchModel
from bigdl_lite.errors import DataError, RecipeError
from bigdl_lite.ml.head import Head, Heads, cut, head_from_rows, named
from tests.conftest import frame, mlp, problem

X, Y = problem(90)


class Answer(NamedTuple):
    scores: Tensor
    size: Tensor


class Several(nn.Module):
    """Scores [b, 3], one number [b, 1], and a list of what has no rows, in one of three forms."""

    form = "dict"

    def __init__(self) -> None:
        super().__init__()
        self.scores, self.size = nn.Linear(5, 3), nn.Linear(5, 1)

    def forward(self, x: Tensor):
        scores, size = self.scores(x), self.size(x)
        if self.form == "dict":
            return {"scores": scores, "the size": size, "penalty": [scores.square().mean()]}
        return Answer(scores, size) if self.form == "named" else (scores, size)


class Named(Several):
    form = "named"


class Plain(Several):
    form = "tuple"


def both(output, target: Tensor) -> Tensor:
    """A loss of all outputs, in whatever form they come."""
    scores, size, *rest = output.values() if isinstance(output, dict) else output
    return nn.functional.cross_entropy(scores, target) + size.square().mean() + sum(x[0] for x in rest)


FIELDS = {Several: ["scores", "the size"], Named: ["scores", "size"], Plain: ["output0", "output1"]}


@pytest.fixture(scope="module")
def df(spark):
    return frame(spark, X, Y, [50, 0, 40]).withColumn("id", F.monotonically_increasing_id()).cache()


def fitted(df, module=Several, **more):
    settings = {"module": module, "loss": both, "batchSize": 30, "engine": "local", "numWorkers": 2, "progress": "none"}
    return TorchEstimator(**(settings | more)).fit(df)


def scored(model, df, *columns):
    return model.transform(df).orderBy("id").select(*columns).collect()


@pytest.mark.parametrize("module", FIELDS, ids=lambda m: m.form)
def test_predictions_are_a_struct_with_a_field_for_each_output(df, module, tmp_path):
    model = fitted(df, module)
    scores, first = FIELDS[module]
    assert dict(model.transform(df).dtypes)["prediction"] == f"struct<{scores}:array<float>,{first}:double>"
    rows = scored(model, df, "prediction")
    with torch.inference_mode():
        output = model.module(torch.from_numpy(X))
    expected = list(output.values()) if isinstance(output, dict) else list(output)
    torch.testing.assert_close(torch.tensor([row[0][scores] for row in rows]), expected[0])
    torch.testing.assert_close(torch.tensor([row[0][first] for row in rows]), expected[1][:, 0])
    model.save(str(tmp_path / "model"))
    again = TorchModel.load(str(tmp_path / "model"), module=module)
    assert again._head == model._head and scored(again, df, "prediction") == rows


def test_output_cols_make_a_column_for_each_under_the_names_given(df, tmp_path):
    model = fitted(df)
    whole = scored(model, df, "prediction")
    model._set(outputCols={"the size": "how.big", "scores": "scores"})
    assert model.transform(df).columns == ["features", "label", "id", "how.big", "scores"]
    rows = scored(model, df, "`how.big`", "scores")
    assert [tuple(row) for row in rows] == [(row[0]["the size"], row[0]["scores"]) for row in whole]
    model.save(str(tmp_path / "model"))
    assert scored(TorchModel.load(str(tmp_path / "model"), module=Several), df, "`how.big`", "scores") == rows


def test_a_list_of_outputs_keeps_their_names_and_leaves_the_others_out(df):
    model = fitted(df)
    chosen = model.copy({model.outputCols: ["scores"]})
    assert chosen.transform(df).columns == ["features", "label", "id", "scores"]
    assert model.transform(df).columns[-1] == "prediction"


@pytest.mark.parametrize(
    ("module", "outputs", "said"),
    [
        (Several, ["size"], "no output 'size', it returns 'scores', 'the size'"),
        (Several, {"scores": "x", "the size": "X"}, "differ"),
        (Several, [], "at least one output"),
        (mlp, ["scores"], "returns one tensor"),
    ],
)
def test_output_cols_that_cannot_be_are_refused_before_any_job(df, module, outputs, said):
    loss = both if module is Several else nn.CrossEntropyLoss()
    model = fitted(df, module, loss=loss)
    with pytest.raises(RecipeError, match=said):
        model.copy({model.outputCols: outputs}).transform(df)


def test_a_list_of_what_is_no_name_is_refused_when_it_is_set(df):
    model = fitted(df)
    with pytest.raises(TypeError, match="must be a dict"):
        model._set(outputCols=[1])


@pytest.mark.parametrize("engine", ["barrier", "shuffle"])
def test_a_loss_sees_all_outputs_in_every_engine(df, engine):
    local, other = fitted(df), fitted(df, engine=engine)
    for a, b in zip(local.module.parameters(), other.module.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert local.history[-1]["loss"] == pytest.approx(other.history[-1]["loss"])


def test_a_classifier_of_several_outputs_trains_but_nobody_knows_its_scores(df):
    settings = {"loss": both, "batchSize": 30, "engine": "local", "numWorkers": 1, "progress": "none"}
    model = TorchClassifier(module=Several, **settings).fit(df)
    with pytest.raises(RecipeError, match=r"score with model\.module"):
        model.transform(df)


def test_a_module_without_a_row_for_each_row_still_has_no_columns():
    assert head_from_rows("plain", torch.zeros(()), torch.zeros(())) is None
    assert head_from_rows("plain", (torch.zeros(2), ), torch.zeros(3)) is None
    assert head_from_rows("plain", torch.zeros(2, 2), torch.zeros(3, 3)) is None
    assert head_from_rows("plain", "text", "text") is None


def test_a_table_of_two_entries_is_not_taken_for_two_rows():
    table = torch.zeros(2, 7)
    found = head_from_rows("plain", (torch.zeros(2, 4), table), (torch.zeros(3, 4), table))
    assert found == Heads(("output0",), (Head("plain", (4,)),))


def test_outputs_keep_their_form_when_their_padding_is_cut_off():
    x = torch.arange(16)
    answer = cut(Answer(x, x), 3, 16)
    assert isinstance(answer, Answer) and answer.size.tolist() == [0, 1, 2]
    assert cut({"a": [x, None]}, 2, 16)["a"][0].tolist() == [0, 1]
    assert named(x) is None and list(named([x, x])) == ["output0", "output1"]


def test_an_output_that_is_gone_is_named():
    heads = Heads(("a", "b"), (Head("plain", ()), Head("plain", (2,))))
    with pytest.raises(DataError, match="there was an output 'b'"):
        heads.to_arrow({"a": torch.zeros(3)})
    with pytest.raises(DataError, match="in training it was a tensor"):
        Head("plain", ()).to_arrow({"a": torch.zeros(3)})
    assert len(heads.to_arrow(heads.empty())) == 0
