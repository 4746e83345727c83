"""Values with functions in them, as bytes. The one place where this package pickles.

What is packed here travels inside Spark's own closures and broadcasts only, as every PySpark function does, and never
touches a file or a socket of ours. It is the user's own code on the way to the user's own executors.
"""

from __future__ import annotations

from typing import Any

from pyspark import cloudpickle

from bigdl_lite.errors import RecipeError, report


def pack(value: Any) -> bytes:
    """value as bytes; functions and classes of a notebook or of __main__ included."""
    return cloudpickle.dumps(value)


def unpack(data: bytes) -> Any:
    return cloudpickle.loads(data)


def foreign(error: Exception) -> dict[str, str]:
    """What to tell the driver when unpack() failed on an executor."""
    return report(
        RecipeError(
            f"an executor cannot load the module, loss or optimizer: {type(error).__name__}: {error}; "
            "send their source along (spark-submit --py-files, or spark.addArtifact), or define them in the program itself"
        ),
        "an executor",
    )


def check(**parts: Any) -> None:
    """Raises RecipeError that names the part of a recipe which cannot travel to an executor."""
    for name, part in parts.items():
        try:
            pack(part)
        except Exception as error:
            raise RecipeError(
                f"{name} cannot be sent to the executors: {type(error).__name__}: {error}; "
                "give a function that makes it there, and keep locks, files, sessions and sockets out of it"
            ) from error
