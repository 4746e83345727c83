"""A model on disk. Loading reads tensors and JSON; it never unpickles and never runs code from the file.

    <path>/metadata/               as every pyspark.ml stage writes it
    <path>/model.json              which module, its layout, its columns, what its output means
    <path>/weights.safetensors     weights, buffers and frozen parameters under the names of state_dict()

The module is found by the name of the function or class that made it, which the running program must have imported (or define).
Where it has not, the model loads all the same, and wants setModule() before it can score.
"""

from __future__ import annotations

import importlib
import inspect
import json
import sys
from dataclasses import asdict, is_dataclass, replace
from typing import Any

import torch
from pyspark.ml.util import DefaultParamsReader
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import nn

from bigdl_lite.data import files
from bigdl_lite.data.columns import Column, Columns, Raw
from bigdl_lite.engine.recipe import Start
from bigdl_lite.engine.stage import StageReader, StageWriter
from bigdl_lite.errors import RecipeError, WireError
from bigdl_lite.ml.head import Head, Heads
from bigdl_lite.ml.model import TorchModel
from bigdl_lite.model.layout import Blueprint, Span

_FORMAT = 1  # what has come since may be absent: "label", "shapes", and several outputs in "head"
_IMAGE = "bigdl_lite.features.images:Image"
_PLAIN = (str, int, float, bool, type(None), list)


class Writer(StageWriter):
    def __init__(self, model: TorchModel) -> None:
        super().__init__()
        self.model = model

    def saveImpl(self, path: str) -> None:
        model = self.model
        _ = model.module  # a model without its module cannot describe itself
        plan, start = model._plan, model._start
        params = {p.name: value for p, value in model._paramMap.items() if isinstance(value, _PLAIN) or p.name == "outputCols"}
        self.metadata(model, path, params)
        tensors = {s.name: s.view(start.weights) for s in plan.layout.parameters}
        tensors |= {f"buffer:{s.name}": s.view(start.buffers) for s in plan.layout.buffers}
        tensors |= {f"constant:{name}": x for name, x in start.constants.items()}
        files.write(f"{path}/weights.safetensors", save_tensors({name: x.contiguous() for name, x in tensors.items()}))
        files.write(f"{path}/model.json", json.dumps(_describe(model), indent=1).encode())


class Reader(StageReader):
    def __init__(self, cls: type[TorchModel], trust: bool = False) -> None:
        super().__init__()
        self.cls, self.trust = cls, trust

    def load(self, path: str) -> TorchModel:
        metadata = self.metadata(path)
        try:
            told = json.loads(files.read(f"{path}/model.json"))
            tensors = load_tensors(files.read(f"{path}/weights.safetensors"))
        except FileNotFoundError as error:
            raise WireError(f"{path} is not a saved TorchModel: {error}") from error
        except ValueError as error:
            raise WireError(f"{path}: model.json is damaged: {error}") from error
        if told.get("format") != _FORMAT:
            raise WireError(f"{path} has format {told.get('format')}, this version reads format {_FORMAT}")
        cls = _class(metadata["class"], self.cls)
        start = _start(told, tensors, path)
        columns = columns_from_json(told["columns"], self.trust)
        if told.get("label"):
            columns = replace(columns, label=columns_from_json([told["label"]], self.trust).inputs[0])
        model = cls(columns, _head(told["head"]), None, start, told["history"], told["engine"], shapes=told.get("shapes"))
        model._resetUid(metadata["uid"])
        DefaultParamsReader.getAndSetParams(model, metadata)
        model._saved = told
        maker = find(told["module"], self.trust)
        if maker is not None:
            model.setModule(maker)
        return model


def _class(name: str, asked: type[TorchModel]) -> type[TorchModel]:
    """The class named in the metadata, which must be one of ours: a file does not choose what is imported."""
    kinds = {f"{kind.__module__}.{kind.__name__}": kind for kind in (TorchModel, *TorchModel.__subclasses__())}
    if name not in kinds or not issubclass(kinds[name], asked):
        raise WireError(f"this is a saved {name}, not a {asked.__name__}")
    return kinds[name]


def _head(told: dict[str, Any] | None) -> Head | Heads | None:
    if told is None:
        return None
    if "names" in told:
        return Heads(tuple(told["names"]), tuple(Head(told["kind"], tuple(shape)) for shape in told["shapes"]))
    return Head(told["kind"], tuple(told["shape"]))


def _head_to_json(head: Head | Heads | None) -> dict[str, Any] | None:
    if isinstance(head, Heads):
        return {"kind": head.kind, "names": list(head.names), "shapes": [list(one.shape) for one in head.heads]}
    return head and {"kind": head.kind, "shape": list(head.shape)}


def _label_to_json(c: Column | None) -> dict[str, Any] | None:
    """None also for a label whose decoder has no name: scoring does not need it."""
    nameless = c is not None and c.decoder is not None and not isinstance(c.decoder, Raw) and name_of(c.decoder) is None
    return None if c is None or nameless else column_to_json(c)


def _describe(model: TorchModel) -> dict[str, Any]:
    columns, head, found = model._columns, model._head, model._plan.layout
    return {
        "format": _FORMAT,
        "module": name_of(model._made_by),
        "parameters": [[s.name, list(s.shape), str(s.dtype)] for s in found.parameters],
        "buffers": [[s.name, list(s.shape), str(s.dtype)] for s in found.buffers],
        "columns": [column_to_json(c) for c in columns.inputs],
        "label": _label_to_json(columns.label),
        "shapes": model._shapes and [list(shape) for shape in model._shapes],
        "head": _head_to_json(head),
        "history": model.history,
        "engine": model.engine,
        "torch": torch.__version__,
    }


def column_to_json(c: Column) -> dict[str, Any]:
    decoder: Any = name_of(c.decoder)
    if isinstance(c.decoder, Raw):
        decoder = {"shape": list(c.decoder.shape), "dtype": c.decoder.dtype}
    elif is_dataclass(c.decoder) and f"{type(c.decoder).__module__}:{type(c.decoder).__qualname__}" == _IMAGE:
        decoder = {"class": _IMAGE, "fields": asdict(c.decoder)}
    elif c.decoder is not None and decoder is None:
        raise RecipeError(
            f"the decoder of column {c.name!r} cannot be found by name, so this model cannot be saved: "
            "define it as a function at the top level of a module"
        )
    return {"name": c.name, "dtype": str(c.dtype), "depth": c.depth, "decoder": decoder, "members": list(c.members), "unit": c.unit}


def columns_from_json(told: list[dict[str, Any]], trust: bool = False) -> Columns:
    made = []
    for c in told:
        decoder = c["decoder"]
        if isinstance(decoder, dict) and "class" in decoder:
            if decoder["class"] != _IMAGE:  # no file chooses what is imported
                raise WireError(f"column {c['name']!r} has the decoder {decoder['class']!r}, which is none of this package")
            place, name = _IMAGE.split(":")
            decoder = getattr(importlib.import_module(place), name)(**decoder["fields"])
        elif isinstance(decoder, dict):
            decoder = Raw(tuple(decoder["shape"]), decoder["dtype"])
        elif decoder is not None:
            decoder = find(decoder, trust)
        members, unit = tuple(c.get("members", ())), c.get("unit", False)
        made.append(Column(c["name"], dtype_named(c["dtype"]), c["depth"], decoder, members=members, unit=unit))
    return Columns(tuple(made))


def dtype_named(name: str) -> torch.dtype:
    found = getattr(torch, name.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise WireError(f"{name!r} is not a torch dtype")
    return found


def _start(told: dict[str, Any], tensors: dict[str, torch.Tensor], path: str) -> Start:
    def flat(prefix: str, listed: list[Any], dtype: torch.dtype) -> torch.Tensor:
        parts = []
        for name, shape, _ in listed:
            x = tensors.get(prefix + name)
            if x is None or list(x.shape) != shape:
                raise WireError(f"{path}: weights.safetensors lacks {name!r} of shape {shape}")
            parts.append(x.reshape(-1).to(dtype))
        return torch.cat(parts) if parts else torch.empty(0, dtype=dtype)

    weights = flat("", told["parameters"], dtype_named(told["parameters"][0][2]))
    constants = {name.removeprefix("constant:"): x for name, x in tensors.items() if name.startswith("constant:")}
    return Start(weights, flat("buffer:", told["buffers"], torch.float64), constants)


def fit_into(plan: Blueprint, start: Start, told: dict[str, Any] | None) -> Blueprint:
    """The blueprint, when it has the parameters and buffers that were saved; frozen ones are recognised by name."""

    def listed(spans: tuple[Span, ...]) -> list[Any]:
        return [[s.name, list(s.shape), str(s.dtype)] for s in spans]

    frozen = {name for name, p in plan.skeleton.named_parameters() if not p.requires_grad}
    if told is not None and (missing := set(start.constants) - frozen):
        # the module was frozen after it was made; a fresh one is not, so freeze the same parameters
        for name, p in plan.skeleton.named_parameters():
            if name in missing:
                p.requires_grad_(False)
        spans, at = [], 0
        for s in plan.layout.parameters:
            if s.name not in missing:
                spans.append(Span(s.name, at, s.shape, s.dtype))
                at = spans[-1].stop
        plan = Blueprint(plan.skeleton, type(plan.layout)(tuple(spans), plan.layout.buffers))
    if told is not None and (listed(plan.layout.parameters), listed(plan.layout.buffers)) != (told["parameters"], told["buffers"]):
        a, b = listed(plan.layout.parameters) + listed(plan.layout.buffers), told["parameters"] + told["buffers"]
        first = next((pair for pair in zip(a, b, strict=False) if pair[0] != pair[1]), (f"{len(a)} tensors", f"{len(b)} tensors"))
        raise RecipeError(f"this module is not the one that was saved: it has {first[0]} where the file has {first[1]}")
    return plan


def name_of(maker: Any) -> str | None:
    """ "module:qualname" of a function or class that find will find again; None for everything else."""
    if not (inspect.isfunction(maker) or inspect.isclass(maker)):
        return None
    name = f"{maker.__module__}:{maker.__qualname__}"
    return name if "<" not in name and find(name) is maker else None


def find(name: str | None, trust: bool = False) -> Any:
    """The Python function, or subclass of nn.Module, of that name; None where this program has none.

    A file must not be able to call whatever it likes: built-in functions and the standard library are out, and so is what this
    program has not imported, unless trust is given.
    """
    if not isinstance(name, str) or name.count(":") != 1:
        return None
    place, path = name.split(":")
    if place.split(".")[0] in sys.stdlib_module_names and place != "__main__":
        return None
    try:
        found: Any = importlib.import_module(place) if trust else sys.modules[place]
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, KeyError, AttributeError):
        return None
    ours = inspect.isclass(found) and issubclass(found, nn.Module)
    return found if ours or (inspect.isfunction(found) and found.__module__ == place) else None
