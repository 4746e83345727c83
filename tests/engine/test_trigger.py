"""Triggers say yes and no where their tables say so, and are plain values."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigdl_lite.engine import trigger as triggers
from bigdl_lite.engine.trigger import (
    Moment,
    Trigger,
    every_epoch,
    max_epoch,
    max_loss,
    max_step,
    min_metric,
    several_steps,
)
from bigdl_lite.errors import RecipeError

pytestmark = pytest.mark.timeout(60)


def at(step: int = 1, epoch: int = 0, end: bool = False, loss: float = 1.0, **metrics: float) -> Moment:
    return Moment(step, epoch, end, loss, metrics)


# two epochs of three steps: (steps done, epochs done, whether an epoch has just ended)
FIT = [(1, 0, False), (2, 0, False), (3, 1, True), (4, 1, False), (5, 1, False), (6, 2, True)]
BY_COUNT: list[tuple[Trigger, str]] = [  # what is said after each of the six steps
    (every_epoch(), "..y..y"),
    (every_epoch(2), ".....y"),
    (every_epoch(3), "......"),
    (several_steps(1), "yyyyyy"),
    (several_steps(2), ".y.y.y"),
    (several_steps(4), "...y.."),
    (max_epoch(1), "..yyyy"),
    (max_epoch(2), ".....y"),
    (max_step(4), "...yyy"),
    (max_step(7), "......"),
    (every_epoch() & ~max_epoch(2), "..y..."),
    (every_epoch() | several_steps(4), "..yy.y"),
    (~several_steps(2), "y.y.y."),
    (several_steps(2) & max_step(3) | every_epoch(), "..yy.y"),
]


@pytest.mark.parametrize(("trigger", "said"), BY_COUNT, ids=lambda x: repr(x) if isinstance(x, Trigger) else None)
def test_what_counts_steps_and_epochs_says_yes_where_the_table_does(trigger: Trigger, said: str) -> None:
    assert "".join("y" if trigger(at(*moment)) else "." for moment in FIT) == said


def test_nothing_that_comes_again_is_due_before_the_first_step() -> None:
    assert not any(x(at(0)) for x in (every_epoch(), several_steps(1), max_step(1), max_epoch(1)))


@pytest.mark.parametrize(("loss", "said"), [(0.2, False), (0.1, True), (0.05, True), (math.nan, False), (math.inf, False)])
def test_max_loss_is_true_where_the_loss_is_at_most_that(loss: float, said: bool) -> None:
    assert max_loss(0.1)(at(loss=loss)) is said


@pytest.mark.parametrize(
    ("metrics", "said"),
    [
        ({"val_accuracy": 0.9}, True), ({"val_accuracy": 0.95}, True), ({"val_accuracy": 0.89}, False),
        ({"val_accuracy": math.nan}, False), ({}, False), ({"val_auc": 1.0}, False),
    ],
)  # fmt: skip
def test_min_metric_is_true_where_the_last_validation_is_at_least_that(metrics: dict[str, float], said: bool) -> None:
    assert min_metric("val_accuracy", 0.9)(at(**metrics)) is said


@pytest.mark.parametrize(("a", "b"), list(product((True, False), repeat=2)))
def test_put_together_they_are_the_tables_of_logic(a: bool, b: bool) -> None:
    x, y = max_loss(1.0), min_metric("m", 1.0)
    now = at(loss=1.0 if a else 2.0, m=1.0 if b else 0.0)
    assert (x(now), y(now)) == (a, b)
    assert ((x & y)(now), (x | y)(now), (~x)(now)) == (a and b, a or b, not a)
    assert (~(x & y))(now) == (~x | ~y)(now) and (~(x | y))(now) == (~x & ~y)(now)


def test_and_or_and_not_of_python_are_refused() -> None:
    """Python takes `a and b` for b: half of the condition would be lost in silence."""
    for wrong in (lambda: every_epoch() and max_loss(0.1), lambda: every_epoch() or max_loss(0.1), lambda: not every_epoch()):
        with pytest.raises(RecipeError, match=r"every_epoch\(\) is neither true nor false .* with &, \| and ~"):
            wrong()
    for other in (True, "every_epoch", lambda now: True):
        with pytest.raises(TypeError, match="unsupported operand"):
            every_epoch() & other
        with pytest.raises(TypeError, match="unsupported operand"):
            every_epoch() | other


def test_they_are_written_as_they_were_made() -> None:
    assert repr(every_epoch() & max_loss(0.1)) == "every_epoch() & max_loss(0.1)"
    assert repr(~(max_step(10) | min_metric("val_auc", 1))) == "~(max_step(10) | min_metric('val_auc', 1.0))"
    assert repr((every_epoch(2) | max_epoch(3)) & several_steps(5)) == "(every_epoch(2) | max_epoch(3)) & several_steps(5)"


SOME = [every_epoch(), every_epoch(2), several_steps(3), max_epoch(2), max_step(4), max_loss(0.5), min_metric("m", 0.25)]
ANY = st.recursive(
    st.sampled_from(SOME),
    lambda x: st.builds(lambda a, b: a & b, x, x) | st.builds(lambda a, b: a | b, x, x) | st.builds(lambda a: ~a, x),
)
MOMENTS = st.builds(
    Moment, st.integers(0, 9), st.integers(0, 4), st.booleans(), st.sampled_from([0.4, 0.5, 0.6]),
    st.sampled_from([{}, {"m": 0.2}, {"m": 0.3}]),
)  # fmt: skip


@given(ANY, MOMENTS)
def test_any_of_them_can_be_read_again_copied_and_sent(trigger: Trigger, now: Moment) -> None:
    read = eval(repr(trigger), vars(triggers))
    for same in (read, copy.deepcopy(trigger), pickle.loads(pickle.dumps(trigger))):
        assert same == trigger and hash(same) == hash(trigger) and same(now) is trigger(now)
    assert trigger(now) is trigger(now)  # it remembers nothing
    assert trigger != ~trigger and trigger(now) is not (~trigger)(now)


def test_they_are_small_when_they_are_sent() -> None:
    assert len(pickle.dumps(every_epoch() & max_loss(0.1) | min_metric("val_accuracy", 0.9))) < 400


def test_a_metric_that_the_fit_does_not_compute_is_refused_on_the_driver() -> None:
    both = every_epoch() & ~(max_loss(0.1) | min_metric("val_accuracy", 0.9))
    assert both.asks == {"val_accuracy"} and every_epoch().asks == set()
    both.check(["val_loss", "val_accuracy"])
    every_epoch().check([])
    with pytest.raises(RecipeError, match=r"looks at 'val_accuracy', and this fit has val_auc, val_loss: name one of these"):
        both.check(["val_loss", "val_auc"])
    with pytest.raises(RecipeError, match="this fit has no metric, because it does not validate"):
        both.check([])


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: every_epoch(0), r"every_epoch\(0\): must be a whole number, at least 1"),
        (lambda: several_steps(-1), r"several_steps\(-1\)"),
        (lambda: several_steps(2.5), r"several_steps\(2.5\): must be a whole number"),
        (lambda: max_epoch(True), r"max_epoch\(True\)"),
        (lambda: max_step("10"), r"max_step\('10'\)"),
        (lambda: max_loss(math.nan), r"max_loss\(nan\): must be a number"),
        (lambda: max_loss("0.1"), r"max_loss\('0.1'\)"),
        (lambda: min_metric(0.9, 0.9), "the name of a metric comes first"),
        (lambda: min_metric("", 0.9), "the name of a metric comes first"),
        (lambda: min_metric("val_accuracy", None), r"min_metric\('val_accuracy', None\): must be a number"),
    ],
)
def test_what_cannot_work_is_refused_when_it_is_made(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        make()


def test_one_of_ones_own_goes_with_the_others() -> None:
    class Falling(Trigger):
        def __call__(self, now: Moment) -> bool:
            return now.metrics.get("slope", 0.0) < 0

    both = Falling() & every_epoch()
    assert both(at(3, 1, True, slope=-1.0)) and not both(at(3, 1, True, slope=1.0)) and not both(at(2, 0, False, slope=-1.0))
