"""Pictures in folders, a folder for each class: read, decoded where they lie, changed at random in training, told apart.

    train/3/17.png --> read_images --> path, image (bytes), label --> Image((8, 8)) --> Crop, Erase --> conv net
                       Spark lists     a row for each file            once a fit        each time       the accuracy on test/

    python examples/image_classification.py

The pictures are handwritten digits of scikit-learn, written to a temporary folder as PNG files. The rival is the nearest
mean: a picture belongs to the class whose mean picture is the most like it.
"""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from pyspark.sql import SparkSession
from sklearn.datasets import load_digits
from torch import nn

from bigdl_lite import TorchClassifier, local_session
from bigdl_lite.features import Crop, Erase, Image, augmented, classes_of, read_images

PICTURES, TRAINING = 1_200, 900


def make_net() -> nn.Module:
    """[B, 1, 8, 8] -> [B, 10]. In training, and only there, each picture is moved by a pixel and loses a square of two."""
    net = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(),  # [B, 16, 8, 8]
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),  # [B, 32, 4, 4]
        nn.Flatten(), nn.Linear(32 * 4 * 4, 10),
    )  # fmt: skip
    return augmented(net, Crop(1), Erase(2))


def write_pictures(folder: str) -> None:
    """folder/train/<digit>/<number>.png, and folder/test/... of those after the first TRAINING."""
    digits = load_digits()
    for i in range(PICTURES):
        place = Path(folder, "train" if i < TRAINING else "test", str(digits.target[i]), f"{i}.png")
        place.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray((digits.images[i] * 255 / 16).astype(np.uint8)).save(place)


def nearest_mean() -> float:
    """The accuracy of the rival, on the same pictures."""
    digits = load_digits()
    train, label = digits.data[:TRAINING], digits.target[:TRAINING]
    test, truth = digits.data[TRAINING:PICTURES], digits.target[TRAINING:PICTURES]
    means = np.stack([train[label == digit].mean(0) for digit in range(10)])
    said = np.linalg.norm(test[:, None] - means, axis=2).argmin(1)  # of distances [test, 10]
    return float((said == truth).mean())


def main(spark: SparkSession) -> dict[str, float]:
    """Runs the example; returns what it prints."""
    with tempfile.TemporaryDirectory() as folder:  # on a cluster: a folder that all executors reach
        write_pictures(folder)
        train = read_images(spark, f"{folder}/train")
        test = read_images(spark, f"{folder}/test", classes=classes_of(train))  # the same numbers for the same names
        classifier = TorchClassifier(
            module=make_net,
            optimizer=partial(torch.optim.Adam, lr=5e-3),
            inputCols=["image"],
            decoders={"image": Image((8, 8), channels=1)},
            batchSize=64,
            epochs=15,
            validationFraction=0.1,
            metrics=["accuracy"],
            seed=0,
        )
        model = classifier.fit(train)
        accuracy = model.evaluate(test, ["accuracy"])["accuracy"]

    rival = nearest_mean()
    step, best = model.summary.best
    print(f"classes         {', '.join(classes_of(train))}")
    print(f"validation      {model.summary.validationHistory[-1]['val_accuracy']:.3f}, lowest loss {best:.3f} after step {step}")
    print(f"test accuracy   {accuracy:.3f}")
    print(f"nearest mean    {rival:.3f}")
    return {"accuracy": accuracy, "rival": rival}


if __name__ == "__main__":
    main(local_session(app_name="image_classification"))
