"""A call that runs beside the thread that made it, so that a link with a long delay is waited for while something else is done."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Beside(Generic[T]):
    """call(*given) in a thread of its own; inline: at once, in this one, where ranks are threads that take turns."""

    def __init__(self, call: Callable[..., T], *given: Any, inline: bool = False) -> None:
        self._found: list[T] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(call, *given), name="bigdl_lite-beside", daemon=True)
        if inline:
            self._found.append(call(*given))
        else:
            self._thread.start()

    def _run(self, call: Callable[..., T], *given: Any) -> None:
        try:
            self._found.append(call(*given))
        except BaseException as error:
            self._error = error

    @property
    def done(self) -> bool:
        return bool(self._found) or self._error is not None

    def result(self) -> T:
        """What the call returned, or raised. Whatever the call waits for must have a deadline."""
        if self._thread.ident is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error
        return self._found[0]
