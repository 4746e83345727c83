"""What was saved, by an older version or by another program, loads and scores the same numbers.

saved/format<n>/<name>/     model, as the first version of that format wrote it, and expected.json, the rows and what they scored then
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from bigdl_lite import TorchClassifier, TorchModel
from bigdl_lite.data.columns import Column
from bigdl_lite.errors import WireError
from bigdl_lite.features import Image
from bigdl_lite.ml.model import TorchClassificationModel, TorchRegressionModel
from bigdl_lite.ml.persist import _FORMAT, column_to_json, columns_from_json
from tests.conftest import frame, problem
from tests.ml.saved.modules import Linear3  # what a saved model names must have been imported

SAVED = Path(__file__).parent / "saved"
ROOT = Path(__file__).resolve().parents[2]
FORMATS = sorted(int(path.name.removeprefix("format")) for path in SAVED.glob("format*"))


def recorded(format: int, name: str) -> tuple[str, dict]:
    folder = SAVED / f"format{format}" / name
    return str(folder / "model"), json.loads((folder / "expected.json").read_text())


def rows(spark, told: dict, names: list[str], schema: str):
    made = list(zip(*(told[name] for name in names), strict=True))
    return spark.createDataFrame(made, schema).coalesce(1)


def test_there_is_a_saved_model_of_every_format():
    assert list(range(1, _FORMAT + 1)) == FORMATS


@pytest.mark.parametrize("format", FORMATS)
def test_a_saved_classifier_still_scores_what_it_scored(spark, format):
    path, told = recorded(format, "classifier")
    model = TorchModel.load(path)
    assert isinstance(model, TorchClassificationModel) and model.numClasses == 3 and model.history[-1]["epoch"] == 0
    scored = model.transform(rows(spark, told, ["features", "label"], "features array<float>, label long")).collect()
    assert [row.prediction for row in scored] == told["prediction"]
    for name in ("rawPrediction", "probability"):
        found = torch.tensor([row[name].toArray().tolist() for row in scored])
        torch.testing.assert_close(found, torch.tensor(told[name]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("format", FORMATS)
def test_a_saved_regressor_still_scores_what_it_scored(spark, format):
    path, told = recorded(format, "regressor")
    model = TorchModel.load(path)
    assert isinstance(model, TorchRegressionModel) and model.getPredictBatchSize() == 5
    told["image"] = [bytearray.fromhex(text) for text in told["image"]]
    df = rows(spark, told, ["a", "b", "image", "label"], "a double, b long, image binary, label double")
    assert [row.guess for row in model.transform(df).collect()] == pytest.approx(told["guess"], rel=1e-5)
    found = model.evaluate(df, loss=nn.MSELoss())["loss"]  # it was saved without its label
    expected = sum((g - y) ** 2 for g, y in zip(told["guess"], told["label"], strict=True)) / len(told["guess"])
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_model_of_a_later_format_is_refused_by_number(spark, tmp_path):
    shutil.copytree(SAVED / "format1" / "classifier" / "model", tmp_path / "model")
    told = json.loads((tmp_path / "model" / "model.json").read_text())
    (tmp_path / "model" / "model.json").write_text(json.dumps(told | {"format": _FORMAT + 1}))
    with pytest.raises(WireError, match=f"has format {_FORMAT + 1}, this version reads format {_FORMAT}"):
        TorchModel.load(str(tmp_path / "model"))


@pytest.mark.slow
def test_another_program_loads_it_and_scores_the_same(spark, tmp_path):
    """A fresh process with a session of its own, which imports the module but not what trained the model."""
    x, y = problem(30, 3)
    df = frame(spark, x, y, [30])
    model = TorchClassifier(module=Linear3, engine="local", numWorkers=1, progress="none", probabilityCol="p").fit(df)
    model.save(str(tmp_path / "model"))
    df.coalesce(1).write.parquet(str(tmp_path / "rows"))
    code = (
        "import json, sys\n"
        "import tests.ml.saved.modules\n"
        "from bigdl_lite import TorchModel, local_session\n"
        "spark = local_session(cores=1, conf={'spark.ui.enabled': 'false'})\n"
        "scored = TorchModel.load('model').transform(spark.read.parquet('rows')).collect()\n"
        "assert 'tests.ml.test_saved' not in sys.modules\n"
        "open('scored.json', 'w').write(json.dumps([[row.p.toArray().tolist(), row.prediction] for row in scored]))\n"
        "spark.stop()\n"
    )
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=110,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "scored.json").read_text())
    expected = model.transform(spark.read.parquet(str(tmp_path / "rows")).coalesce(1)).collect()
    assert found == [[row.p.toArray().tolist(), row.prediction] for row in expected]


def test_a_decoder_of_the_package_is_saved_by_its_settings():
    """It is an object, not a function with a name; and a file cannot name another class in its place."""
    column = Column("image", torch.float32, 0, Image((8, 8), mean=(0.5, 0.5, 0.5), std=0.25))
    told = json.loads(json.dumps(column_to_json(column)))
    assert columns_from_json([told]).inputs == (column,)
    told["decoder"]["class"] = "subprocess:Popen"
    with pytest.raises(WireError, match=r"subprocess:Popen.*none of this package"):
        columns_from_json([told])
