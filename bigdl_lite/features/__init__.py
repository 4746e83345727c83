"""From tables, texts, pictures and events to columns that a module can take: small functions over DataFrames.

    images      files -> binary and label; bytes -> [C, h, w] when a share is read; random changes in training
    text        words -> ids of one length
    sequences   rows in time -> windows
    recommend   (user, item) -> negatives, candidates, histories, a test set
    embed       mixed columns -> category ids and numbers, and a net that takes them
    encoder     the same as stages of a pyspark.ml Pipeline

All of it is Spark SQL, or Arrow where a table of words must be searched; a result depends on the rows alone, never on the
partitions in which they lie. Nothing is imported before one of these names is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_WHERE = {
    "Crop": "images",
    "Erase": "images",
    "FittedTable": "embed",
    "Flip": "images",
    "Hashed": "embed",
    "Image": "images",
    "Index": "embed",
    "Jitter": "images",
    "Table": "embed",
    "TableEncoder": "encoder",
    "TableEncoderModel": "encoder",
    "TableNet": "net",
    "Vocabulary": "text",
    "augmented": "images",
    "candidates": "recommend",
    "classes_of": "images",
    "history": "recommend",
    "leave_one_out": "recommend",
    "negative_samples": "recommend",
    "read_images": "images",
    "split_by_time": "sequences",
    "token_ids": "text",
    "tokens": "text",
    "windows": "sequences",
}

__all__ = [
    "Crop", "Erase", "FittedTable", "Flip", "Hashed", "Image", "Index", "Jitter", "Table", "TableEncoder", "TableEncoderModel",
    "TableNet", "Vocabulary", "augmented", "candidates", "classes_of", "history", "leave_one_out", "negative_samples", "read_images",
    "split_by_time", "token_ids", "tokens", "windows",
]  # fmt: skip

if TYPE_CHECKING:
    from bigdl_lite.features.embed import FittedTable, Hashed, Index, Table
    from bigdl_lite.features.encoder import TableEncoder, TableEncoderModel
    from bigdl_lite.features.images import Crop, Erase, Flip, Image, Jitter, augmented, classes_of, read_images
    from bigdl_lite.features.net import TableNet
    from bigdl_lite.features.recommend import candidates, history, leave_one_out, negative_samples
    from bigdl_lite.features.sequences import split_by_time, windows
    from bigdl_lite.features.text import Vocabulary, token_ids, tokens


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
