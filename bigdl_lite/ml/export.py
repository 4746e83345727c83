"""model.export: the trained module as one file that runs without bigdl_lite, and without the code of the module.

    format        made by                            loaded by                       extra
    onnx          torch.onnx.export                  onnxruntime and many others     bigdl_lite[onnx]
    torchscript   torch.jit.trace                    torch.jit.load, libtorch        none
    pt2           torch.export.export                torch.export.load               none

What is exported is forward in evaluation mode: of a classifier the class scores, not yet the probabilities. Its arguments are tensors
[rows, ...] as transform makes them, any number of rows. A module that returns several tensors by name gives them as a tuple, in the
order of the names, which are those of the outputs in ONNX.

A program follows the path that forward took for a few rows. So each is run once more, on other numbers of rows, and compared with
the module before it is written: what depends on the number of rows, or on their values, is refused instead of being wrong later.
Driver side only.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import io
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bigdl_lite.data import files
from bigdl_lite.data.columns import Column, Raw
from bigdl_lite.errors import RecipeError, UserError, report
from bigdl_lite.ml.head import Heads, named

_ROWS = 3  # of the example that a program is made from; 1 would be taken for a constant
_OTHERS = (1, 2, 5)  # the numbers of rows on which it is compared with the module
_CLOSE = 1e-5  # of the largest output


class _Flat(nn.Module):
    """A module that returns several tensors by name, as one that returns a tuple of them."""

    def __init__(self, module: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.module, self.names = module, tuple(names)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        found = named(self.module(*inputs))
        assert found is not None
        return tuple(found[name] for name in self.names)


def export(model: Any, path: str, format: str = "onnx", shapes: Mapping[str, Sequence[int]] | None = None) -> None:
    """Writes one file, complete or absent, at `path` (local, or what pyarrow.fs opens).

    Raises RecipeError for a format that is not known, for a module that the format cannot hold or holds wrongly, and where the shape
    of a row is not known; ImportError, which says what to install, for "onnx" without its libraries.
    """
    if format not in FORMATS:
        raise RecipeError(f"format is {format!r}, must be one of {', '.join(map(repr, FORMATS))}")
    module, head, columns = model.module, model._head, model._columns.inputs
    if head is None:
        raise RecipeError("export needs a module that returns one tensor, or several by name, with a row for each row")
    outputs = list(head.names) if isinstance(head, Heads) else ["output"]
    program = _Flat(module, outputs).eval() if isinstance(head, Heads) else module
    rows = _row_shapes(model, columns, shapes or {})
    make, run = FORMATS[format]
    example = _inputs(columns, rows, _ROWS)
    with _blamed(format), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporters, about each other's age
        data = make(program, example, _names(columns), outputs)
        loaded = run(data)
        for k in _OTHERS:
            _require_equal(loaded, program, _inputs(columns, rows, k), format, k)
    files.write(path, data)


@contextlib.contextmanager
def _blamed(format: str) -> Iterator[None]:
    try:
        yield
    except (RecipeError, ImportError):
        raise
    except Exception as error:
        raise UserError(report(error, f"the driver, in the export to {format!r}")["message"]) from error


def _row_shapes(model: Any, columns: Sequence[Column], given: Mapping[str, Sequence[int]]) -> list[tuple[int, ...]]:
    """The shape of one row of each input: given, known from training, or plain from its column."""
    unknown = [name for name in given if name not in [c.name for c in columns]]
    if unknown:
        raise RecipeError(f"shapes name {unknown[0]!r}, the inputs are {', '.join(repr(c.name) for c in columns)}")
    known = model._shapes or (model._saved or {}).get("shapes") or []
    made = []
    for i, c in enumerate(columns):
        if c.name in given:
            made.append(tuple(given[c.name]))
        elif i < len(known):
            made.append(tuple(known[i]))
        elif c.members:
            made.append((len(c.members),))
        elif isinstance(c.decoder, Raw):
            made.append(c.decoder.shape)
        elif not c.depth and c.decoder is None:
            made.append(())
        else:
            raise RecipeError(f"the model was saved without the shape of a row of {c.name!r}: give it, shapes={{{c.name!r}: (28, 28)}}")
    return made


def _inputs(columns: Sequence[Column], shapes: Sequence[tuple[int, ...]], rows: int) -> tuple[Tensor, ...]:
    """Numbers to try a program with: whole ones are 0, which every table of embeddings has."""
    random, made = torch.Generator().manual_seed(rows), []
    for c, shape in zip(columns, shapes, strict=True):
        x = torch.randn([rows, *shape], generator=random) if c.dtype.is_floating_point else torch.zeros([rows, *shape])
        made.append(x.to(c.dtype))
    return tuple(made)


def _names(columns: Sequence[Column]) -> list[str]:
    """What the arguments are called in ONNX: as the columns, where a column is one and its name is plain."""
    plain = [c.name if c.name.isidentifier() and not c.members else f"input{i}" for i, c in enumerate(columns)]
    return plain if len(set(plain)) == len(plain) else [f"input{i}" for i in range(len(columns))]


def _tuple(output: Any) -> tuple[Tensor, ...]:
    return tuple(output) if isinstance(output, tuple | list) else (output,)


def _require_equal(loaded: Callable[..., Any] | None, module: nn.Module, inputs: tuple[Tensor, ...], format: str, k: int) -> None:
    if loaded is None:
        return
    wanted = _tuple(module(*inputs))
    try:
        found = _tuple(loaded(*inputs))
    except Exception as error:
        raise RecipeError(
            f"the module as {format!r} runs on {_ROWS} rows but not on {k}: its forward depends on the number of rows"
        ) from error
    for a, b in zip(found, wanted, strict=True):
        b = b.to(a.dtype)
        if a.shape != b.shape or not torch.allclose(a, b, _CLOSE, _CLOSE * max(1.0, float(b.abs().max())), equal_nan=True):
            raise RecipeError(
                f"the module as {format!r} does not give what the module gives for {k} rows: its forward depends on the number of "
                "rows, or on their values; take another format, or write forward without such branches"
            )


# ---- the formats: (module, example, names of inputs, names of outputs) -> bytes, and bytes -> what runs them ---------------------


def _torchscript(module: nn.Module, example: tuple[Tensor, ...], inputs: Sequence[str], outputs: Sequence[str]) -> bytes:
    data = io.BytesIO()
    torch.jit.save(torch.jit.trace(module, example, check_trace=False), data)
    return data.getvalue()


def _run_torchscript(data: bytes) -> Callable[..., Any]:
    return torch.jit.load(io.BytesIO(data))


def _pt2(module: nn.Module, example: tuple[Tensor, ...], inputs: Sequence[str], outputs: Sequence[str]) -> bytes:
    data = io.BytesIO()
    torch.export.save(torch.export.export(module, example, dynamic_shapes=_dynamic(module, len(example))), data)
    return data.getvalue()


def _run_pt2(data: bytes) -> Callable[..., Any]:
    return torch.export.load(io.BytesIO(data)).module()


def _dynamic(module: nn.Module, k: int) -> Any:
    """The first dimension of each of k arguments is the number of rows."""
    rows = torch.export.Dim("rows")
    by_argument = tuple({0: rows} for _ in range(k))
    variadic = any(p.kind is p.VAR_POSITIONAL for p in inspect.signature(module.forward).parameters.values())
    return (by_argument,) if variadic else by_argument


def _onnx(module: nn.Module, example: tuple[Tensor, ...], inputs: Sequence[str], outputs: Sequence[str]) -> bytes:
    for library in ("onnx", "onnxscript"):
        if importlib.util.find_spec(library) is None:
            raise ImportError(f"format='onnx' needs {library}, which is not installed: pip install 'bigdl_lite[onnx]'")
    names: dict[str, Any] = {"input_names": list(inputs), "output_names": list(outputs)}
    if "dynamic_shapes" in inspect.signature(torch.onnx.export).parameters:  # torch 2.4 has the exporter, but for one number of rows
        made = torch.onnx.export(module, example, dynamo=True, dynamic_shapes=_dynamic(module, len(example)), verbose=False, **names)
        return made.model_proto.SerializeToString()
    data = io.BytesIO()
    torch.onnx.export(module, example, data, dynamic_axes={name: {0: "rows"} for name in (*inputs, *outputs)}, **names)
    return data.getvalue()


def _run_onnx(data: bytes) -> Callable[..., Any] | None:
    """None where onnxruntime is not installed: the program is then written untried."""
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        given = {i.name: np.ascontiguousarray(x.numpy()) for i, x in zip(session.get_inputs(), inputs, strict=True)}
        return tuple(torch.from_numpy(x) for x in session.run(None, given))

    return run


FORMATS: dict[str, tuple[Callable[..., bytes], Callable[[bytes], Any]]] = {
    "onnx": (_onnx, _run_onnx),
    "torchscript": (_torchscript, _run_torchscript),
    "pt2": (_pt2, _run_pt2),
}
