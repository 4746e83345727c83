"""Label skew: workers whose rows are of few classes, as where each hospital sees its own patients.

    for each class   shares of the workers  ~  Dirichlet(alpha)       alpha -> 0  one worker has the class
                                                                      alpha = inf every worker has its part of it

Classes are dealt in a random order, each only to workers that are below their fair share of rows so far, and all is drawn again
until every worker has at least half of its fair share. More than 10 workers are cut into groups, each of which gets an equal
part of each class: a class would otherwise be missing nearly everywhere. A worker keeps its rows for the whole fit.

    N  rows      C  classes      p  workers      k  workers of one group

Source: Lin et al., "Quasi-Global Momentum", ICML 2021 (groups, half a share); Hsu et al., "Measuring the Effects of
Non-Identical Data Distribution for Federated Visual Classification", 2019 (Dirichlet). They give the last group what is left of
the workers; here all groups are of one size, but for one worker.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from bigdl_lite.batch import mix
from bigdl_lite.errors import DataError, RecipeError

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

_GROUP = 10  # workers at most
_TRIES = 5000  # where one in 300 draws succeeds (10 classes, 10 workers, alpha 0.02), all fail once in 10 million fits
_EVEN = 1e12  # an alpha above it is even to a millionth; NumPy's draw would overflow


def label_skew(labels: Any, alpha: float, workers: int, seed: int = 0) -> np.ndarray:
    """The worker of each row, a function of these four alone.

    labels   [N], of any kind that np.unique can sort: the classes
    alpha    above 0, inf included: the smaller, the fewer classes a worker has
    returns  [N] int64, from 0 to workers - 1; worker r is in group r % groups

    Cost     sorts N labels; then C draws of 20 us a try: for 10 classes a second before it gives up.
    Raises   RecipeError where no draw gave every worker half of its fair share: few rows or classes for this alpha.
    """
    labels = np.asarray(labels)
    if labels.ndim != 1:
        raise RecipeError(f"labels are of shape {list(labels.shape)}, must be one value a row")
    if not alpha > 0:
        raise RecipeError(f"alpha is {alpha}, must be above 0 (inf: even)")
    if not 1 <= workers <= len(labels):
        raise RecipeError(f"{len(labels)} rows for {workers} workers: each must get at least one")
    _, codes = np.unique(labels, return_inverse=True)
    rng = np.random.default_rng(mix(seed, 4))
    mixed = rng.permutation(len(codes))
    dealt = mixed[np.argsort(codes[mixed], kind="stable")]  # class by class, in a random order within each
    groups = -(-workers // _GROUP)
    turn = np.arange(len(codes)) % workers % groups  # the group that takes each row: like a dealer, and so an equal part of each class
    found = np.empty(len(codes), np.int64)
    for group in range(groups):
        mine, members = dealt[turn == group], np.arange(group, workers, groups)
        try:
            found[mine] = members[_drawn(np.bincount(codes[mine]), alpha, len(members), len(codes) / workers / 2, rng)]
        except _Unlucky as error:
            raise RecipeError(
                f"label_skew(alpha={alpha}, workers={workers}): in {_TRIES} draws the smallest worker had at best {error} of "
                f"the {len(codes) / workers:.1f} rows of its fair share, and must have half of them; alpha is too small for "
                f"{len(codes)} rows of {codes.max() + 1} classes: take a larger alpha or fewer workers"
            ) from None
    return found


class _Unlucky(Exception):
    """Every try failed; its text is the best number of rows that the smallest worker had."""


def _drawn(sizes: np.ndarray, alpha: float, k: int, least: float, rng: np.random.Generator) -> np.ndarray:
    """The member (0 .. k - 1) of each row of one group, class by class.

    sizes    [C] rows of each class
    returns  [sum(sizes)] int64
    """
    fair, best = sizes.sum() / k, 0
    for _ in range(_TRIES):
        table = np.zeros((len(sizes), k), np.int64)
        for c in rng.permutation(np.flatnonzero(sizes)):
            below = np.flatnonzero(table.sum(0) < fair)
            # a Dirichlet over some of the workers is one over all of them, with the others struck out
            shares = rng.dirichlet(np.full(len(below), min(alpha, _EVEN)))
            edges = (shares.cumsum() * sizes[c] + rng.random()).astype(np.int64)  # one offset for all, so that rounding favours nobody
            edges[-1] = sizes[c]
            table[c, below] = np.diff(edges, prepend=0)
        smallest = int(table.sum(0).min())
        if smallest >= least:
            return np.repeat(np.tile(np.arange(k), len(sizes)), table.reshape(-1))
        best = max(best, smallest)
    raise _Unlucky(best)


def skew_of(labels: Any, workers: Any) -> np.ndarray:
    """How much of each worker's rows is of each class, to look at.

    labels   [N] the classes; workers [N] the worker of each row
    returns  [p, C] float64, classes in the order of np.unique; a row sums to 1, or is zeros where a worker has none
    """
    classes, codes = np.unique(np.asarray(labels), return_inverse=True)
    owners = np.asarray(workers, dtype=np.int64)
    p = int(owners.max(initial=-1)) + 1
    table = np.bincount(owners * len(classes) + codes, minlength=p * len(classes)).reshape(p, len(classes))
    return table / np.maximum(table.sum(1, keepdims=True), 1)


def skewed(frame: DataFrame, labelCol: str, alpha: float, workers: int, seed: int = 0) -> DataFrame:
    """The same rows in `workers` partitions, one for each worker: label_skew() of the column, ready for fit(numWorkers=workers).

    Rows keep their order within a partition, so that a fit repeats.

    Cost     one job now, which brings the labels, and nothing else, to the driver; they go back to every executor with one
             number a row. All rows pass through Python and one shuffle, when the frame is computed.
    Raises   DataError where a label is null or the column is missing, where a fit could not take the partitions as they are, and,
             when it is computed, where the rows come in another order than before; RecipeError as label_skew().
    """
    from bigdl_lite.data.columns import require
    from bigdl_lite.engine.arrange import arrange
    from bigdl_lite.engine.spark import ROW

    require([labelCol], frame.columns)
    at, rows = frame.columns.index(labelCol), frame.rdd
    parts = rows.mapPartitions(_reader(at)).collect()  # one array a partition, in their order
    labels = np.concatenate([part for part in parts if len(part)] or parts[:1] or [np.empty(0)])
    missing = sum(x is None or x != x for x in labels)
    if missing:
        raise DataError(f"column {labelCol!r} is null or NaN in {missing} of {len(labels)} rows; drop them first")
    owners = label_skew(labels, alpha, workers, seed)
    starts = np.cumsum([0, *map(len, parts)])
    keyed = rows.mapPartitionsWithIndex(_keyer(at, labels, owners, starts))
    placed = keyed.repartitionAndSortWithinPartitions(workers, _owner).values()
    made = frame.sparkSession.createDataFrame(placed, frame.schema, verifySchema=False)
    if ROW in arrange(made, [labelCol], workers).columns:  # it would shuffle them once more
        raise DataError(
            "skewed() cannot promise that partitions stay as they are, because the frame comes from a union or a coalesce: "
            "give it frame.localCheckpoint(), or write it to files and read these"
        )
    return made


def _reader(at: int) -> Callable[[Iterable[Any]], Iterator[np.ndarray]]:
    return lambda rows: iter([np.array([row[at] for row in rows])])


def _keyer(at: int, labels: np.ndarray, owners: np.ndarray, starts: np.ndarray) -> Callable[[int, Iterable[Any]], Iterator[Any]]:
    """Rows with their keys (worker, number), which are in order within a worker."""

    def keyed(partition: int, rows: Iterable[Any]) -> Iterator[Any]:
        number = int(starts[partition])
        for row in rows:
            if number >= starts[partition + 1] or row[at] != labels[number]:
                raise DataError(
                    f"row {number - starts[partition]} of partition {partition} has another label than when skewed() looked: "
                    "make the DataFrame deterministic (no unseeded rand or limit), or cache it"
                )
            yield (int(owners[number]), number), row
            number += 1

    return keyed


def _owner(key: tuple[int, int]) -> int:
    return key[0]
