"""Rows as tensors, and the order in which an epoch deals them out.

    B  rows of one global batch      N  rows of all shares      p  workers      S  steps of an epoch, ceil(N / B)

Every worker holds one share of the rows. An epoch deals each row exactly once; every step takes B rows in all (the last
one what is left), and each share gives its part in proportion to what it still has, so that skewed shares end together.
Both functions below are pure: any worker, and any retry of it, computes the same answer from the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """inputs: tensors [b, ...], one per input column; target: [b, ...], or None where there is no label column.

    weight: how much each row counts, [b]; None: each counts as one.
    """

    inputs: tuple[Tensor, ...]
    target: Tensor | None
    weight: Tensor | None = None

    @property
    def rows(self) -> int:
        return len(self.inputs[0])

    def take(self, index: Tensor, device: torch.device | None = None) -> Batch:
        """The rows at index [k] int64, copied; to `device` where it is given, on the way through page-locked memory to a GPU."""
        if device is None or device.type != "cuda":
            return self._each(lambda x: x.index_select(0, index))
        return self._each(lambda x: _locked(x, index).to(device, non_blocking=True))

    def part(self, start: int, stop: int) -> Batch:
        """Rows [start, stop), not copied."""
        return self._each(lambda x: x[start:stop])

    def to(self, device: torch.device) -> Batch:
        if device.type == "cpu":
            return self
        return self._each(lambda x: x.to(device, non_blocking=True))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        target, weight = (None if x is None else change(x) for x in (self.target, self.weight))
        return Batch(tuple(map(change, self.inputs)), target, weight)


def _locked(x: Tensor, index: Tensor) -> Tensor:
    """Rows in page-locked memory, which a GPU reads while the CPU goes on; torch keeps it until the copy is done."""
    into = torch.empty([len(index), *x.shape[1:]], dtype=x.dtype, pin_memory=True)
    return torch.index_select(x, 0, index, out=into)


def quotas(counts: Sequence[int], batch_size: int) -> np.ndarray:
    """How many rows each share gives to each step of an epoch.

    counts   rows of each share, p numbers
    returns  [S, p] int64; row s sums to min(B, rows left), column r sums to counts[r]

    Each step is divided by largest remainder over what is left: never more than a share has.  Cost O(S p).
    """
    left = np.asarray(counts, dtype=np.int64).copy()
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, must be at least 1")
    total = int(left.sum())
    steps = -(-total // batch_size)
    out = np.zeros((steps, len(left)), dtype=np.int64)
    for s in range(steps):
        want = min(batch_size, total)
        # exact integers: a float quotient would round differently for large counts
        floor, remainder = np.divmod(left * want, total) if total < 2**31 else _divmod_big(left, want, total)
        missing = want - int(floor.sum())
        floor[np.argsort(-remainder, kind="stable")[:missing]] += 1
        out[s] = floor
        left -= floor
        total -= want
    return out


def rounds(steps: int, batches: int) -> list[tuple[int, int]]:
    """The batches of an epoch, `steps` of them, in rounds of `batches`: pairs (first, after the last); the last may be shorter."""
    return [(at, min(at + batches, steps)) for at in range(0, steps, batches)]


def _divmod_big(left: np.ndarray, want: int, total: int) -> tuple[np.ndarray, np.ndarray]:
    pairs = [divmod(int(x) * want, total) for x in left]
    return np.array([q for q, _ in pairs]), np.array([r for _, r in pairs], dtype=object)


def order(n: int, seed: int, epoch: int, rank: int) -> Tensor:
    """The order in which one share deals its n rows in one epoch: a permutation [n] int64 that depends on all four."""
    generator = torch.Generator().manual_seed(mix(seed, 1, epoch, rank))
    return torch.randperm(n, generator=generator)


def mix(*numbers: int) -> int:
    """One 63-bit seed out of several numbers, the same on every machine and in every process."""
    words = np.random.SeedSequence([abs(int(x)) for x in numbers]).generate_state(2, np.uint32)
    return (int(words[0]) << 31) ^ int(words[1])
