"""Sends buckets of the gradient while backward still computes the others.

    backward   from the last layer to the first; each parameter tells when its gradient is complete
    buckets    of the flat gradient, from its end to its beginning; they leave strictly in that order, from one thread
    exchanged  waits for the last one

All ranks send the same buckets in the same order, whatever is ready first. A parameter that backward does not reach is
complete when backward ends.

Source: Li et al., "PyTorch Distributed", VLDB 2020, section 3.2; BAGUA's execution optimizer (Gan et al., VLDB 2022).
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

from torch import Tensor, nn

from bigdl_lite.model.replica import Replica
from bigdl_lite.vector import Cut

Send = Callable[[int, Tensor], Tensor]  # number of the bucket and its values -> their sum over peers


class Overlap:
    """buckets  cuts of the flat gradient that tile it, in the order in which they leave"""

    def __init__(self, replica: Replica, buckets: list[Cut]) -> None:
        self.replica, self.buckets = replica, buckets
        self._left: list[int] = []  # parameters of each bucket that are not complete
        self._next = len(buckets)
        self._queue: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        spans = replica.layout.parameters
        self._of: dict[int, list[int]] = {}
        for p, span in zip(replica.parameters, spans, strict=True):
            self._of[id(p)] = [i for i, (a, b) in enumerate(buckets) if max(a, span.start) < min(b, span.stop)]
            p.register_post_accumulate_grad_hook(self._complete)
        self._counts = [sum(i in mine for mine in self._of.values()) for i in range(len(buckets))]

    def begin(self, send: Send) -> None:
        """Before backward: from now on complete buckets go to send, which returns what is put in their place."""
        self._left, self._next, self._error = list(self._counts), 0, None
        self._thread = threading.Thread(target=self._run, args=(send,), name="bigdl_lite-overlap", daemon=True)
        self._thread.start()

    def end(self) -> None:
        """After backward: sends the rest, and returns when all sums are in the gradient. Raises what send raised."""
        assert self._thread is not None
        for i in range(self._next, len(self.buckets)):
            self._queue.put(i)
        self._next = len(self.buckets)
        self._queue.put(None)
        self._thread.join()  # comm has a deadline for everything that it waits for
        self._thread = None
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Lets the thread of a backward that was broken off end."""
        self._queue.put(None)

    def _complete(self, p: nn.Parameter) -> None:
        if self._thread is None:
            return
        for i in self._of[id(p)]:
            self._left[i] -= 1
        while self._next < len(self.buckets) and not self._left[self._next]:
            self._queue.put(self._next)
            self._next += 1

    def _run(self, send: Send) -> None:
        try:
            while (i := self._queue.get()) is not None:
                a, b = self.buckets[i]
                x = self.replica.gradient[a:b]
                x.copy_(send(i, x))
        except BaseException as error:
            self._error = error
            while self._queue.get() is not None:
                pass
