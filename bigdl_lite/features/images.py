"""Pictures: found in folders, decoded where the rows lie, and changed at random in training.

    read_images    folder/class/name.jpg -> path, image (binary), label          Spark
    Image          binary -> [C, h, w] float32, once: a share is cached decoded  decoders={"image": Image((64, 64))}
    augmented      [b, C, h, w] -> [b, C, h, w], another each time               in the module, in training only
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from bigdl_lite.errors import DataError, RecipeError

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_DEEP = ("I", "F", "I;16", "I;16B", "I;16L", "I;16N")  # Pillow would cut these off at 255 without a word
_NAMES = "*.{jpg,jpeg,png,JPG,JPEG,PNG}"


@dataclass(frozen=True)
class Image:
    """A decoder: the bytes of a JPEG, PNG or other picture that Pillow reads -> [channels, h, w] float32.

    size      (h, w) of the result
    channels  1 grey, 3 red green blue, 4 with transparency; pictures of other kinds are converted
    scale     what a value of 0 .. 255 is multiplied by
    mean, std then (x - mean) / std: a number, or one for each channel
    crop      "none": sides are stretched to the size; "center": the largest centred part of the size's proportions

    A camera's note on how it was held (EXIF) is obeyed. Resizing is bilinear, with all pixels weighed in where it shrinks.
    Cost      a few milliseconds for a megapixel, on the executor, once in a fit.
    Raises    RecipeError for settings that cannot work; when called, DataError for bytes that are no picture, ImportError where
              Pillow is missing.

    >>> import io, PIL.Image
    >>> PIL.Image.new("RGB", (40, 30), (255, 0, 51)).save(png := io.BytesIO(), "png")
    >>> x = Image((2, 2))(png.getvalue())
    >>> x.shape, x.dtype, [round(float(value), 3) for value in x[:, 0, 0]]
    ((3, 2, 2), dtype('float32'), [1.0, 0.0, 0.2])
    """

    size: tuple[int, int]
    channels: int = 3
    scale: float = 1 / 255
    mean: float | tuple[float, ...] | None = None
    std: float | tuple[float, ...] | None = None
    crop: str = "none"

    def __post_init__(self) -> None:
        for name in ("size", "mean", "std"):
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        right = isinstance(self.size, tuple) and len(self.size) == 2 and all(isinstance(n, int) and n > 0 for n in self.size)
        if not right:
            raise RecipeError(f"Image(size={self.size!r}): must be (height, width), both at least 1")
        if self.channels not in _MODES:
            raise RecipeError(f"Image(channels={self.channels!r}): must be 1 (grey), 3 (colour) or 4 (with transparency)")
        if self.crop not in ("none", "center"):
            raise RecipeError(f"Image(crop={self.crop!r}): must be 'none' or 'center'")
        for name in ("mean", "std"):
            given = getattr(self, name)
            if isinstance(given, tuple) and len(given) != self.channels:
                raise RecipeError(f"Image({name}={given}): {len(given)} numbers for {self.channels} channels")
        if self.std is not None and not all(x > 0 for x in np.atleast_1d(self.std)):
            raise RecipeError(f"Image(std={self.std}): must be above 0")

    def __call__(self, data: bytes) -> np.ndarray:
        try:
            import PIL.Image
            import PIL.ImageOps
        except ImportError as error:
            raise ImportError("Image decodes with Pillow, which every executor must have: pip install 'bigdl_lite[images]'") from error
        try:
            with PIL.Image.open(io.BytesIO(data)) as opened:
                if opened.mode in _DEEP:
                    raise ValueError(f"it has more than 8 bits a value (mode {opened.mode}): write a decoder of your own for such")
                picture = PIL.ImageOps.exif_transpose(opened).convert(_MODES[self.channels])
        except Exception as error:
            shape = f"{len(data)} bytes that begin with {bytes(data[:8]).hex(' ') or 'nothing'}"
            raise DataError(f"{shape} cannot be decoded as a picture: {error}") from error
        h, w = self.size
        picture = picture.resize((w, h), PIL.Image.Resampling.BILINEAR, self._box(*picture.size))
        x: np.ndarray = np.asarray(picture, np.float32).reshape(h, w, self.channels) * np.float32(self.scale)
        if self.mean is not None:
            x = x - np.asarray(self.mean, np.float32)
        if self.std is not None:
            x = x / np.asarray(self.std, np.float32)
        return np.ascontiguousarray(x.transpose(2, 0, 1))

    def _box(self, width: int, height: int) -> tuple[float, float, float, float]:
        """The part of a picture that is taken: left, top, right, bottom."""
        if self.crop == "none":
            return 0, 0, width, height
        h, w = self.size
        scale = min(width / w, height / h)
        left, top = (width - w * scale) / 2, (height - h * scale) / 2
        return left, top, left + w * scale, top + h * scale


# ---- in training -----------------------------------------------------------------------------------------------------


class _Change(nn.Module):
    """A layer that changes pictures at random in training mode, and passes them on as they are in evaluation mode.

    Random numbers come from torch's own generator, which a fit seeds by (seed, step, worker). Each picture draws its own.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        if x.ndim != 4:
            raise DataError(f"{self} takes pictures [b, C, h, w], got {list(x.shape)}")
        return self.change(x)

    def change(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class Flip(_Change):
    """Mirrors left and right with probability p.

    >>> Flip(p=1)(torch.tensor([[[[1.0, 2.0]]]])).tolist(), Flip(p=1).eval()(torch.tensor([[[[1.0, 2.0]]]])).tolist()
    ([[[[2.0, 1.0]]]], [[[[1.0, 2.0]]]])
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        if not 0 <= p <= 1:
            raise RecipeError(f"Flip(p={p}): must be a probability")
        self.p = p

    def extra_repr(self) -> str:
        return f"p={self.p}"

    def change(self, x: Tensor) -> Tensor:
        mirrored = torch.rand(len(x), 1, 1, 1, device=x.device) < self.p
        return torch.where(mirrored, x.flip(3), x)


class Crop(_Change):
    """Moves the picture by up to `padding` pixels each way; zeros come in from the other side.

    >>> moved = Crop(2)(torch.ones(8, 3, 16, 16))
    >>> moved.shape, 14 * 14 <= moved[0, 0].sum() <= 16 * 16
    (torch.Size([8, 3, 16, 16]), tensor(True))
    """

    def __init__(self, padding: int) -> None:
        super().__init__()
        if padding < 0:
            raise RecipeError(f"Crop(padding={padding}): must be at least 0")
        self.padding = padding

    def extra_repr(self) -> str:
        return f"padding={self.padding}"

    def change(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        wide = functional.pad(x, [self.padding] * 4)
        top, left = torch.randint(2 * self.padding + 1, (2, b, 1), device=x.device)
        rows, columns = top + torch.arange(h, device=x.device), left + torch.arange(w, device=x.device)  # [b, h], [b, w]
        taken = wide[torch.arange(b, device=x.device)[:, None, None], :, rows[:, :, None], columns[:, None, :]]  # [b, h, w, C]
        return taken.permute(0, 3, 1, 2).contiguous()


class Erase(_Change):
    """Blackens a square of `size` pixels at a random place, which may reach over the edge.

    Source: DeVries and Taylor, "Improved Regularization of Convolutional Neural Networks with Cutout", 2017.

    >>> (Erase(4)(torch.ones(1, 1, 8, 8)) == 0).sum() in range(4, 17)
    True
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        if size < 1:
            raise RecipeError(f"Erase(size={size}): must be at least 1")
        self.size = size

    def extra_repr(self) -> str:
        return f"size={self.size}"

    def change(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        inside = []
        for n in (h, w):
            start = torch.randint(n, (b, 1), device=x.device) - self.size // 2
            place = torch.arange(n, device=x.device)
            inside.append((place >= start) & (place < start + self.size))  # [b, n]
        rows, columns = inside
        return x.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0)


class Jitter(_Change):
    """Scales the distance from the mean by 1 +- contrast, then all by 1 +- brightness, for each picture.

    >>> x = torch.rand(2, 3, 4, 4)
    >>> bool((Jitter(contrast=0.5)(x).mean((1, 2, 3)) - x.mean((1, 2, 3))).abs().max() < 1e-6)
    True
    """

    def __init__(self, brightness: float = 0.0, contrast: float = 0.0) -> None:
        super().__init__()
        if not (0 <= brightness <= 1 and 0 <= contrast <= 1):
            raise RecipeError(f"Jitter(brightness={brightness}, contrast={contrast}): both must be from 0 to 1")
        self.brightness, self.contrast = brightness, contrast

    def extra_repr(self) -> str:
        return f"brightness={self.brightness}, contrast={self.contrast}"

    def change(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            raise DataError(f"{self} takes pictures of floats, got {x.dtype}")
        middle = x.mean((1, 2, 3), keepdim=True)
        bright, contrast = torch.rand(2, len(x), 1, 1, 1, device=x.device, dtype=x.dtype) * 2 - 1
        return (middle + (x - middle) * (1 + self.contrast * contrast)) * (1 + self.brightness * bright)


class Augmented(nn.Module):
    """The layers on the first input, then the module on all. Made by augmented()."""

    def __init__(self, module: nn.Module, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.module = module

    def forward(self, x: Tensor, *others: Any) -> Any:
        return self.module(self.layers(x) if self.training else x, *others)


def augmented(module: nn.Module, *layers: nn.Module) -> Augmented:
    """The module behind layers that change its first input, pictures [b, C, h, w], in training mode only.

    A share is decoded once and kept, so what shall differ from epoch to epoch has its place here. In evaluation mode, and so in
    transform, the module gets its inputs as they are. Names in state_dict() begin with "module.".

    >>> net = augmented(nn.Flatten(), Flip(), Crop(padding=4)).eval()
    >>> net(torch.ones(2, 1, 8, 8)).shape
    torch.Size([2, 64])
    """
    if not isinstance(module, nn.Module) or not layers or not all(isinstance(layer, nn.Module) for layer in layers):
        raise RecipeError("augmented(module, *layers) takes an nn.Module and at least one layer, such as Flip()")
    return Augmented(module, layers)


# ---- files -----------------------------------------------------------------------------------------------------------


def read_images(
    spark: SparkSession, path: str, classes: Sequence[str] | None = None, names: str = _NAMES
) -> DataFrame:  # fmt: skip
    """The pictures in folders, a folder for each class: path string, image binary, label long.

    path      a folder that all executors reach; it is searched to any depth, and the folder right above a file is its class
    classes   their names, label 0 first; None: all that are found, sorted. Give those of the training set for a test set
    names     which files, as a glob

    The classes stay with the label (classes_of), also through Parquet.
    Cost      one job now where classes is None, which lists files and reads none of them.
    Raises    DataError where there is no such file; an error of Spark's, when it is computed, for a folder of no known class.

    >>> frame = read_images(spark, folder)                                      # folder/cat/1.png, folder/dog/2.png
    >>> frame.columns, classes_of(frame), sorted(row.label for row in frame.select("label").collect())
    (['path', 'image', 'label'], ['cat', 'dog'], [0, 1])
    """
    from pyspark.sql import functions as F

    reader = spark.read.format("binaryFile").option("recursiveFileLookup", "true").option("pathGlobFilter", names)
    found = reader.load(path)
    folder = F.element_at(F.split("path", "/"), -2)
    if classes is None:
        classes = sorted(row.folder for row in found.select(folder.alias("folder")).distinct().collect())
        if not classes:
            raise DataError(f"no file under {path} is named {names}")
    if isinstance(classes, str) or not classes or len(set(classes)) < len(classes):
        raise RecipeError(f"classes={classes!r}: must be a list of names, each once")
    unknown = F.concat(F.lit("the folder of "), F.col("path"), F.lit(f" is none of the {len(classes)} classes"))
    place = F.call_function("array_position", F.array(*map(F.lit, classes)), folder) - 1
    label = F.when(place < 0, F.raise_error(unknown)).otherwise(place)
    # as StringIndexer marks its output, so that stages of pyspark.ml know the classes too
    marked = label.alias("label", metadata={"ml_attr": {"type": "nominal", "name": "label", "vals": list(classes)}})
    return found.select("path", found["content"].alias("image"), marked)


def classes_of(frame: DataFrame, column: str = "label") -> list[str]:
    """The classes of a label column, label 0 first: of read_images, or of pyspark.ml's StringIndexer.

    >>> from pyspark.ml.feature import StringIndexer
    >>> df = spark.createDataFrame([("b",), ("a",), ("b",)], "kind string")
    >>> classes_of(StringIndexer(inputCol="kind", outputCol="index").fit(df).transform(df), "index")
    ['b', 'a']
    """
    from bigdl_lite.data.columns import require

    require([column], frame.columns)
    named = frame.schema[column].metadata.get("ml_attr", {}).get("vals")
    if not named:
        raise DataError(f"column {column!r} does not say which classes its numbers stand for")
    return list(named)
