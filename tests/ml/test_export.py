"""An exported program gives what the model gives, on any number of rows, without bigdl_lite."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bigdl_lite import Raw, TorchClassifier, TorchEstimator, TorchModel, TorchRegressor
from bigdl_lite.errors import RecipeError, UserError
from bigdl_lite.ml import export as exporting
from tests.conftest import frame, problem

X, Y = problem(40)
COMMON = {"engine": "local", "numWorkers": 1, "progress": "none", "batchSize": 20}
ROWS = (1, 2, 3, 17, 64)

onnx = pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="needs bigdl_lite[onnx]")
FORMATS = [pytest.param("onnx", marks=onnx), "torchscript", "pt2"]


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))


class Two(nn.Module):
    """An index, a group of columns, and an image of bytes, to one number."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.pair, self.image = nn.Embedding(9, 4), nn.Linear(2, 4), nn.Conv2d(1, 4, 2)

    def forward(self, index: Tensor, pair: Tensor, image: Tensor) -> Tensor:
        seen = self.image(image.float().unsqueeze(1) / 255).flatten(1)
        return (self.table(index) + torch.tanh(self.pair(pair)) + seen).sum(1)


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"scores": self.net(x), "length": x.square().sum(1).sqrt()}


def of_scores(output, target):
    return nn.functional.cross_entropy(output["scores"], target)


class Counts(nn.Linear):
    """Its answer depends on how many rows there are, and whether Python sees so: what no export can follow."""

    def forward(self, x: Tensor) -> Tensor:
        found = super().forward(x)
        return found * 2 if len(x) == 3 else found


@pytest.fixture(scope="module")
def df(spark):
    return frame(spark, X, Y, [25, 15]).cache()


@pytest.fixture(scope="module")
def model(df):
    return TorchClassifier(module=net, **COMMON).fit(df)


def program(path, format):
    """What runs a file: a function of tensors to a tuple of tensors."""
    if format == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        names = [i.name for i in session.get_inputs()]
        return lambda *x: tuple(map(torch.from_numpy, session.run(None, dict(zip(names, (a.numpy() for a in x), strict=True)))))
    found = torch.jit.load(str(path)) if format == "torchscript" else torch.export.load(str(path)).module()

    def run(*x):
        made = found(*x)
        return made if isinstance(made, tuple) else (made,)

    return run


@pytest.mark.parametrize("format", FORMATS)
def test_a_program_gives_the_models_outputs_on_any_number_of_rows(model, tmp_path, format):
    path = tmp_path / "new" / "program"
    model.export(str(path), format)
    assert sorted(p.name for p in path.parent.iterdir()) == ["program"]
    run = program(path, format)
    for k in ROWS:
        x = torch.randn(k, 5)
        with torch.inference_mode():
            expected = model.module(x)
        torch.testing.assert_close(run(x)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("format", FORMATS)
def test_several_inputs_of_all_kinds(spark, tmp_path, format):
    rows = [(i % 9, float(x[0]), float(x[1]), bytearray([i, 2, 3, 4]), float(y)) for i, (x, y) in enumerate(zip(X, Y, strict=True))]
    df = spark.createDataFrame(rows, "i long, a double, b double, image binary, label double")
    names = {"inputCols": ["i", ["a", "b"], "image"], "decoders": {"image": Raw((2, 2), "uint8")}}
    model = TorchRegressor(module=Two, **names, **COMMON).fit(df)
    model.export(str(tmp_path / "program"), format)
    run = program(tmp_path / "program", format)
    for k in ROWS:
        inputs = torch.randint(0, 9, (k,)), torch.randn(k, 2), torch.randint(0, 255, (k, 2, 2), dtype=torch.uint8)
        with torch.inference_mode():
            expected = model.module(*inputs)
        torch.testing.assert_close(run(*inputs)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("format", FORMATS)
def test_named_outputs_come_in_their_order(df, tmp_path, format):
    model = TorchEstimator(module=Both, loss=of_scores, **COMMON).fit(df)
    model.export(str(tmp_path / "program"), format)
    x = torch.randn(11, 5)
    scores, length = program(tmp_path / "program", format)(x)
    with torch.inference_mode():
        expected = model.module(x)
    torch.testing.assert_close(scores, expected["scores"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(length, expected["length"], rtol=1e-5, atol=1e-5)


@onnx
def test_onnx_has_the_names_of_columns_and_outputs(df, tmp_path):
    import onnxruntime

    TorchEstimator(module=Both, loss=of_scores, **COMMON).fit(df).export(str(tmp_path / "program"))
    session = onnxruntime.InferenceSession(str(tmp_path / "program"))
    assert [i.name for i in session.get_inputs()] == ["features"]
    assert [o.name for o in session.get_outputs()] == ["scores", "length"]
    assert not isinstance(session.get_inputs()[0].shape[0], int) and session.get_inputs()[0].shape[1] == 5


@pytest.mark.parametrize("format", ["torchscript", "pt2"])
def test_a_program_runs_where_bigdl_lite_is_not_imported(model, tmp_path, format):
    model.export(str(tmp_path / "program"), format)
    np.save(tmp_path / "x.npy", X)
    how = "torch.jit.load('program')" if format == "torchscript" else "torch.export.load('program').module()"
    code = (
        "import sys, numpy as np, torch\n"
        f"out = {how}(torch.from_numpy(np.load('x.npy')))\n"
        "assert 'bigdl_lite' not in sys.modules\n"
        "np.save('out.npy', out.detach().numpy())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    with torch.inference_mode():
        np.testing.assert_allclose(np.load(tmp_path / "out.npy"), model.module(torch.from_numpy(X)), rtol=1e-5, atol=1e-5)


def test_a_saved_model_knows_the_shapes_of_its_rows_and_an_older_one_is_told(model, tmp_path):
    model.save(str(tmp_path / "model"))
    again = TorchModel.load(str(tmp_path / "model"), module=net)
    again.export(str(tmp_path / "a"), "torchscript")
    again._shapes = again._saved["shapes"] = None
    with pytest.raises(RecipeError, match="shape of a row of 'features': give it"):
        again.export(str(tmp_path / "b"), "torchscript")
    again.export(str(tmp_path / "b"), "torchscript", shapes={"features": (5,)})
    x = torch.randn(4, 5)
    assert torch.equal(program(tmp_path / "a", "torchscript")(x)[0], program(tmp_path / "b", "torchscript")(x)[0])


@pytest.mark.parametrize("format", FORMATS)
def test_a_forward_that_counts_its_rows_is_refused_and_nothing_is_written(df, tmp_path, format):
    model = TorchClassifier(module=lambda: Counts(5, 3), **COMMON).fit(df)
    with pytest.raises((RecipeError, UserError), match=r"number of rows|rows|specializ"):
        model.export(str(tmp_path / "program"), format)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_exported_says_why(model, tmp_path, monkeypatch):
    with pytest.raises(RecipeError, match="must be one of 'onnx', 'torchscript', 'pt2'"):
        model.export(str(tmp_path / "x"), "keras")
    with pytest.raises(RecipeError, match="shapes name 'no'"):
        model.export(str(tmp_path / "x"), "pt2", shapes={"no": (5,)})
    monkeypatch.setattr(exporting.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'bigdl_lite\[onnx\]'"):
        model.export(str(tmp_path / "x"), "onnx")
    assert list(tmp_path.iterdir()) == []
