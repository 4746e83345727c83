"""Every error that bigdl_lite raises on purpose.

    BigDLError
    |-- RecipeError       (ValueError)    the settings cannot work; raised on the driver before any job
    |-- DataError         (ValueError)    a column, row or partition cannot be used
    |-- UserError         (RuntimeError)  the user's module, loss, optimizer or decoder raised; its traceback comes first
    |-- DivergedError     (RuntimeError)  loss is no longer a finite number
    |-- WireError         (ValueError)    bytes that are not what they claim to be
    |-- CheckpointError   (RuntimeError)  a checkpoint that cannot be saved, or must not be loaded
    |-- MeetingTimeout    (TimeoutError)  a rank waited longer than the deadline for another
    `-- PeerLost          (RuntimeError)  another rank stopped; its own error is the one to read

Each subclasses a built-in too, so nobody must import from here to catch one.
"""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Iterator

_PACKAGE = os.path.dirname(os.path.abspath(__file__)) + os.sep


class BigDLError(Exception):
    """The root: catches all that this package raises on purpose."""


class RecipeError(BigDLError, ValueError):
    """The settings cannot work."""


class DataError(BigDLError, ValueError):
    """A column, a row or a partition cannot be used."""


class UserError(BigDLError, RuntimeError):
    """Code given by the user raised. The message begins with the user's own traceback."""


class DivergedError(BigDLError, RuntimeError):
    """The loss is not a finite number."""


class WireError(BigDLError, ValueError):
    """Bytes that are not what they claim to be."""


class CheckpointError(BigDLError, RuntimeError):
    """A checkpoint cannot be saved, or is not one to go on from."""


class MeetingTimeout(BigDLError, TimeoutError):
    """A rank waited too long for another."""


class PeerLost(BigDLError, RuntimeError):
    """Another rank stopped."""


KINDS: dict[str, type[BigDLError]] = {
    kind.__name__: kind
    for kind in (RecipeError, DataError, UserError, DivergedError, WireError, CheckpointError, MeetingTimeout, PeerLost)
}


def report(error: BaseException, where: str) -> dict[str, str]:
    """An error as plain text that can cross a process border: kind and message.

    Our own errors keep their kind. Anything else came out of the user's code, and becomes a UserError whose message
    starts with the frames of that code (ours above them say nothing to the user and are left out).
    """
    if isinstance(error, BigDLError):
        return {"kind": type(error).__name__, "message": str(error)}
    frames = traceback.extract_tb(error.__traceback__)
    first = next((i for i, f in enumerate(frames) if not os.path.abspath(f.filename).startswith(_PACKAGE)), 0)
    kept = traceback.StackSummary.from_list(frames[first:]).format()
    lines = ["Traceback (most recent call last):\n", *kept, *traceback.format_exception_only(type(error), error)]
    return {"kind": "UserError", "message": f"{''.join(lines).rstrip()}\n\nraised on {where}"}


@contextlib.contextmanager
def blamed(where: str) -> Iterator[None]:
    """Errors of the user's code inside become a UserError, as report() makes it; our own stay what they are."""
    try:
        yield
    except BigDLError:
        raise
    except Exception as error:
        raise UserError(report(error, where)["message"]) from error


def revive(told: dict[str, str]) -> BigDLError:
    """The error that report() described, ready to raise on the driver."""
    return KINDS.get(told.get("kind", ""), UserError)(told.get("message", "an executor failed without a message"))
