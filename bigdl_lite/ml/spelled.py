"""An estimator on disk: its Params as JSON, functions and classes by their names. Nothing in the file is ever executed.

    a value                                       as it is written
    text, numbers, lists and dicts of them        as they are
    a function or class that can be imported      {"named": "module:qualname"}, found as for models (persist.py)
    a frozen dataclass of this package            {"value": "module:Class", "fields": {...}}: EMA(0.99), AUC(bins=1000), TopK(0.01)
    a loss of torch's                             {"loss": "CrossEntropyLoss", "settings": {...}}

Whatever else (a lambda, an nn.Module, a model to begin with) is left out with a warning, and the loaded estimator refuses to fit
until it is set again: it would train something else in silence.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import warnings
from typing import Any

import torch
from torch import nn

from bigdl_lite.engine.stage import StageReader, StageWriter
from bigdl_lite.errors import WireError
from bigdl_lite.ml.persist import find, name_of

_PACKAGE = "bigdl_lite."
_LOST = "bigdl_lite.lost"


class Unspellable(Exception):
    """Why a value cannot be written."""


class EstimatorWriter(StageWriter):
    def __init__(self, estimator: Any) -> None:
        super().__init__()
        self.estimator = estimator

    def saveImpl(self, path: str) -> None:
        told, lost = {}, {}
        for param, value in self.estimator._paramMap.items():
            try:
                told[param.name] = spelled(value)
            except Unspellable as why:
                lost[param.name] = str(why)
        if lost:
            listed = "; ".join(f"{name}: {why}" for name, why in lost.items())
            warnings.warn(f"not saved with the estimator, and to be set again after loading: {listed}", RuntimeWarning, stacklevel=2)
        bare = copy.copy(self.estimator)  # pyspark writes the defaults too, of which nothing is read
        bare._defaultParamMap = {}
        self.metadata(bare, path, told, {_LOST: lost})


class EstimatorReader(StageReader):
    def __init__(self, cls: type, trust: bool = False) -> None:
        super().__init__()
        self.cls, self.trust = cls, trust

    def load(self, path: str) -> Any:
        metadata = self.metadata(path)
        kinds = {f"{kind.__module__}.{kind.__name__}": kind for kind in (self.cls, *_below(self.cls))}
        if metadata["class"] not in kinds:
            raise WireError(f"{path} is a saved {metadata['class']}, not a {self.cls.__name__}")
        made = kinds[metadata["class"]]()
        made._resetUid(metadata["uid"])
        made._lost = dict(metadata.get(_LOST, {}))
        for name, told in metadata["paramMap"].items():
            try:
                made._set(**{name: unspelled(told, self.trust)})
            except Unspellable as why:
                made._lost[name] = str(why)
        return made


def _below(cls: type) -> list[type]:
    return [kind for child in cls.__subclasses__() for kind in (child, *_below(child))]


def spelled(value: Any) -> Any:
    """The value as JSON takes it. Raises Unspellable."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, list | tuple):
        return [spelled(x) for x in value]
    if isinstance(value, dict) and all(isinstance(name, str) for name in value):
        return {"dict": {name: spelled(x) for name, x in value.items()}}
    name = name_of(value)
    if name is not None:
        return {"named": name}
    kind = type(value)
    if dataclasses.is_dataclass(value) and kind.__module__.startswith(_PACKAGE):
        fields = {f.name: spelled(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
        return {"value": f"{kind.__module__}:{kind.__qualname__}", "fields": fields}
    if isinstance(value, nn.modules.loss._Loss) and kind.__module__ == "torch.nn.modules.loss":
        settings = {key: x for key, x in vars(value).items() if not key.startswith("_") and isinstance(x, str | bool | int | float)}
        tensors = {key: x.tolist() for key, x in value.named_buffers()}
        return {"loss": kind.__name__, "settings": settings, "tensors": tensors}
    what = f"the function {value.__qualname__}" if hasattr(value, "__qualname__") else f"a {kind.__name__}"
    raise Unspellable(f"{what} cannot be found by a name; define it at the top level of a module")


def unspelled(told: Any, trust: bool = False) -> Any:
    """The value that was written. Raises Unspellable where this program does not have what it names, WireError for nonsense."""
    if isinstance(told, list):
        return [unspelled(x, trust) for x in told]
    if not isinstance(told, dict):
        return told
    if "dict" in told:
        return {name: unspelled(x, trust) for name, x in told["dict"].items()}
    if "named" in told:
        found = find(told["named"], trust)
        if found is None:
            raise Unspellable(f"this program has not imported {told['named']}; import it, or load with trust=True")
        return found
    if "value" in told:
        place, _, name = str(told["value"]).partition(":")
        kind = getattr(importlib.import_module(place), name, None) if place.startswith(_PACKAGE) else None
        if not (isinstance(kind, type) and dataclasses.is_dataclass(kind) and kind.__module__ == place):
            raise WireError(f"{told['value']!r} is no value of this package")
        fields = {key: unspelled(x, trust) for key, x in told["fields"].items()}
        return kind(**{key: tuple(x) if isinstance(x, list) else x for key, x in fields.items()})
    kind = getattr(nn, str(told.get("loss")), None)
    if not (isinstance(kind, type) and issubclass(kind, nn.modules.loss._Loss)):
        raise WireError(f"{told!r} is no value that an estimator writes")
    made = kind()
    for key, x in told["settings"].items():
        setattr(made, key, x)
    for key, x in told["tensors"].items():
        setattr(made, key, torch.tensor(x))
    return made
