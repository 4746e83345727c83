"""Pictures: decoded as Pillow shows them, changed in training only, and found in their folders with their classes."""

from __future__ import annotations

import io
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from torch import nn

from bigdl_lite import TorchClassifier
from bigdl_lite.errors import DataError, RecipeError
from bigdl_lite.features import Crop, Erase, Flip, Image, Jitter, augmented, classes_of, read_images

pytestmark = pytest.mark.timeout(120)


def encoded(x: Any, kind: str = "png", **how: Any) -> bytes:
    out = io.BytesIO()
    picture = x if isinstance(x, PIL.Image.Image) else PIL.Image.fromarray(x)
    picture.save(out, kind, **how)
    return out.getvalue()


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)


def test_a_png_of_the_right_size_is_its_pixels(pixels: np.ndarray) -> None:
    x = Image((6, 8))(encoded(pixels))
    assert x.dtype == np.float32 and x.shape == (3, 6, 8) and x.flags["C_CONTIGUOUS"]
    np.testing.assert_array_equal(x, pixels.transpose(2, 0, 1) * np.float32(1 / 255))


def test_mean_and_std_are_taken_of_each_channel(pixels: np.ndarray) -> None:
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    x = Image((6, 8), mean=mean, std=std)(encoded(pixels))
    expected = (pixels / 255 - np.array(mean)) / np.array(std)
    np.testing.assert_allclose(x, expected.transpose(2, 0, 1), atol=1e-5)
    raw = Image((6, 8), scale=1.0, mean=128.0)(encoded(pixels))
    np.testing.assert_array_equal(raw, pixels.transpose(2, 0, 1) - np.float32(128))


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "CMYK"])
def test_pictures_of_all_kinds_get_the_channels_asked_for(pixels: np.ndarray, channels: int, mode: str) -> None:
    data = encoded(PIL.Image.fromarray(pixels).convert(mode), "tiff" if mode == "CMYK" else "png")
    assert Image((4, 5), channels=channels)(data).shape == (channels, 4, 5)


def test_a_jpeg_is_close_to_what_it_shows() -> None:
    x = Image((16, 16))(encoded(np.full((40, 30, 3), (200, 100, 50), np.uint8), "jpeg"))
    np.testing.assert_allclose(x.mean((1, 2)) * 255, [200, 100, 50], atol=3)


def test_the_centre_is_cut_out_and_otherwise_sides_are_stretched() -> None:
    wide = np.zeros((10, 30), np.uint8)
    wide[:, 10:20] = 255  # a white square in the middle
    assert Image((5, 5), channels=1, crop="center")(encoded(wide)).min() > 0.8  # bilinear: the edge sees a little of the black
    stretched = Image((5, 5), channels=1)(encoded(wide))
    assert stretched.min() == 0 and 0.25 < stretched.mean() < 0.42


def test_the_way_a_camera_was_held_is_obeyed(pixels: np.ndarray) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    x = Image((8, 6))(encoded(pixels, exif=exif))
    np.testing.assert_array_equal(x, np.rot90(pixels, -1).transpose(2, 0, 1) * np.float32(1 / 255))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "0 bytes that begin with nothing cannot be decoded as a picture"),
        (b"not a picture", "13 bytes that begin with 6e 6f 74"),
        (encoded(np.ones((40, 40, 3), np.uint8))[:60], "60 bytes that begin with 89 50 4e 47"),  # cut off
        (encoded(np.ones((4, 4), np.uint16) * 1000), "more than 8 bits"),
    ],
)
def test_what_is_no_picture_is_told_by_its_bytes(data: bytes, said: str) -> None:
    with pytest.raises(DataError, match=said):
        Image((4, 4))(data)


@pytest.mark.parametrize(
    "given",
    [
        {"size": 4}, {"size": (4,)}, {"size": (0, 4)}, {"channels": 2}, {"crop": "left"}, {"mean": (0.1, 0.2)}, {"std": 0.0},
        {"std": (1.0, 1.0, -1.0)},
    ],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=next(iter(given))):
        Image(**{"size": (4, 4), **given})


def test_a_decoder_is_a_value(pixels: np.ndarray) -> None:
    decoder = Image([6, 8], mean=[0.1, 0.2, 0.3])  # type: ignore[arg-type]
    assert pickle.loads(pickle.dumps(decoder)) == decoder == Image((6, 8), mean=(0.1, 0.2, 0.3)) and hash(decoder)


def test_without_pillow_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ImportError, match=r"pip install 'bigdl_lite\[images\]'"):
        Image((4, 4))(b"")


# ---- changes in training ---------------------------------------------------------------------------------------------

CHANGES = [Flip(), Crop(2), Erase(4), Jitter(0.5, 0.5)]


def pictures(b: int = 32) -> torch.Tensor:
    return torch.rand(b, 3, 8, 10, generator=torch.Generator().manual_seed(0)) + 0.1


@pytest.mark.parametrize("change", CHANGES, ids=repr)
def test_a_change_happens_in_training_only_and_depends_on_the_seed_alone(change: nn.Module) -> None:
    x, made = pictures(), []
    before = x.clone()
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        made.append(change.train()(x))
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])
    assert made[0].shape == x.shape and made[0].dtype == x.dtype and torch.equal(x, before)
    assert change.eval()(x) is x
    change.train()


def test_a_flip_mirrors_about_half() -> None:
    x = pictures(400)
    made = Flip().train()(x)
    mirrored = [torch.equal(a, b.flip(2)) for a, b in zip(made, x, strict=True)]
    same = [torch.equal(a, b) for a, b in zip(made, x, strict=True)]
    assert all(a != b for a, b in zip(mirrored, same, strict=True)) and 150 < sum(mirrored) < 250


def test_a_crop_is_a_part_of_the_padded_picture_of_every_offset() -> None:
    x = pictures(300)
    made = Crop(1).train()(x)
    wide = nn.functional.pad(x, [1] * 4)
    found = set()
    for picture, source in zip(made, wide, strict=True):
        hits = [(i, j) for i in range(3) for j in range(3) if torch.equal(picture, source[:, i : i + 8, j : j + 10])]
        assert len(hits) == 1
        found |= set(hits)
    assert len(found) == 9
    assert torch.equal(Crop(0).train()(x), x)


def test_what_is_erased_is_one_square() -> None:
    x = pictures(100)
    for picture in Erase(3).train()(x):
        gone = (picture == 0).all(0)
        rows, columns = gone.any(1).nonzero(), gone.any(0).nonzero()
        assert 2 <= len(rows) <= 3 and 2 <= len(columns) <= 3 and int(gone.sum()) == len(rows) * len(columns)


def test_changes_that_cannot_work_are_refused() -> None:
    for make in (lambda: Flip(2), lambda: Crop(-1), lambda: Erase(0), lambda: Jitter(brightness=-1), lambda: augmented(nn.Flatten())):
        with pytest.raises(RecipeError):
            make()
    with pytest.raises(DataError, match=r"Flip\(p=0.5\) takes pictures \[b, C, h, w\], got \[3, 4\]"):
        Flip().train()(torch.ones(3, 4))
    with pytest.raises(DataError, match="floats"):
        Jitter(0.1).train()(torch.ones(1, 1, 2, 2, dtype=torch.uint8))


def test_a_module_sees_changed_pictures_in_training_and_its_other_inputs_as_they_are() -> None:
    class Pair(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x, y

    x, y = pictures(), torch.rand(32, 3, 8, 10)
    net = augmented(Pair(), Flip(1))
    assert torch.equal(net.train()(x, y)[0], x.flip(3)) and net(x, y)[1] is y
    assert net.eval()(x, y)[0] is x


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """dark/ and light %20 ü/, 12 pictures each of two sizes, and files that are none."""
    path = tmp_path_factory.mktemp("pictures")
    for name, light in (("light %20 ü", np.uint8(180)), ("dark", np.uint8(60))):
        (path / "deep" / name).mkdir(parents=True)
        for i in range(12):
            x = light + np.random.default_rng(i).integers(0, 40, (8 + i % 2, 8, 3), dtype=np.uint8)
            (path / "deep" / name / f"{i} a.{'png' if i % 3 else 'JPG'}").write_bytes(encoded(x, "png" if i % 3 else "jpeg"))
    (path / "deep" / "notes.txt").write_text("no picture")
    return str(path)


def test_classes_are_the_folders_in_order_and_stay_with_the_label(spark: Any, folder: str, tmp_path: Path) -> None:
    frame = read_images(spark, folder)
    assert frame.dtypes == [("path", "string"), ("image", "binary"), ("label", "bigint")]
    rows = frame.collect()
    assert len(rows) == 24 and classes_of(frame) == ["dark", "light %20 ü"]
    assert all(("dark" in row.path) == (row.label == 0) for row in rows)
    assert all(Image((4, 4))(row.image).mean() > 0.55 for row in rows if row.label)
    frame.write.parquet(str(tmp_path / "table"))
    assert classes_of(spark.read.parquet(str(tmp_path / "table"))) == classes_of(frame)


def test_classes_that_are_given_hold_and_others_are_an_error(spark: Any, folder: str) -> None:
    frame = read_images(spark, folder, classes=["light %20 ü", "dark", "none"])
    assert sorted({row.label for row in frame.select("label").collect()}) == [0, 1]
    with pytest.raises(Exception, match="is none of the 1 classes"):
        read_images(spark, folder, classes=["dark"]).select("label").collect()
    with pytest.raises(RecipeError, match="each once"):
        read_images(spark, folder, classes=["dark", "dark"])
    with pytest.raises(DataError, match=r"no file under .* is named \*.gif"):
        read_images(spark, folder, names="*.gif")
    with pytest.raises(DataError, match="does not say which classes"):
        classes_of(frame, "path")


def small_net() -> nn.Module:
    return augmented(nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 2)), Flip(), Crop(1))


def test_a_fit_reads_pictures_and_repeats_its_changes(spark: Any, folder: str) -> None:
    frame = read_images(spark, folder).orderBy("path").coalesce(2)
    est = TorchClassifier(
        module=small_net, decoders={"image": Image((4, 4), mean=0.5)}, inputCols=["image"], batchSize=8, epochs=8,
        optimizer=lambda p: torch.optim.Adam(p, lr=0.05), engine="local", numWorkers=2, progress="none",
    )  # fmt: skip
    first, again = est.fit(frame), est.fit(frame)
    assert [line["loss"] for line in first.history] == [line["loss"] for line in again.history]
    rows = first.transform(frame).select("label", "prediction").collect()
    assert len(rows) == 24 and all(row.label == row.prediction for row in rows)
