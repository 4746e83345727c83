"""A summary agrees with the history it is made of."""

from __future__ import annotations

import re

import pytest

from bigdl_lite.observe.summary import Summary, duration, percent, size
from tests.observe.made import history, step, validation


def test_losses_are_those_of_epochs_and_validations():
    lines = history(epochs=3, steps=4, validated=True)
    made = Summary(lines, "barrier", 2, 10.0)
    assert made.objectiveHistory == [line["loss"] for line in lines if "steps" in line]
    assert [sorted(line) for line in made.validationHistory] == [["step", "val_accuracy", "val_loss"]] * 3
    assert [line["step"] for line in made.validationHistory] == [4, 8, 12]
    assert (made.totalIterations, made.epochs, made.rows, made.bytes_sent) == (12, 3, 120, 1200)


@pytest.mark.parametrize("every", [1, 3, 100])
def test_what_is_summed_does_not_depend_on_the_steps_that_the_history_keeps(every):
    whole, thinned = Summary(history(3, 10), seconds=1.0), Summary(history(3, 10, every=every), seconds=1.0)
    for name in ("totalIterations", "epochs", "rows", "bytes_sent", "phases", "best", "rows_per_second"):
        assert getattr(thinned, name) == getattr(whole, name), name


def test_phases_add_up_to_the_clock_on_the_wall():
    made = Summary(history(3, 10, validated=True), seconds=1.0)
    assert list(made.phases) == ["launch", "data", "compute", "sync", "validation"]
    assert made.phases == pytest.approx({"launch": 0.64, "data": 0.03, "compute": 0.18, "sync": 0.09, "validation": 0.06})
    assert sum(made.phases.values()) == pytest.approx(1.0) and sum(made.fractions.values()) == pytest.approx(1.0)


def test_a_fit_that_went_on_counts_only_its_own_time():
    first, second = history(1, 10), history(2, 10)[11:]
    made = Summary([*first, *second], seconds=0.3, before=len(first))
    assert made.phases["compute"] == pytest.approx(0.06) and made.phases["launch"] == pytest.approx(0.2)
    assert made.totalIterations == 20 and len(made.objectiveHistory) == 2


def test_an_epoch_broken_off_counts_with_the_steps_it_made():
    lines = [*history(1, 10), step(10, epoch=1), step(11, epoch=1)]
    made = Summary(lines)
    assert (made.totalIterations, made.counted, made.epochs, made.rows) == (12, 12, 2, 120)
    assert made.objectiveHistory == Summary(history(1, 10)).objectiveHistory


def test_the_best_is_that_of_the_monitor():
    values = {10: (0.5, 0.7), 20: (0.4, 0.6), 30: (0.6, 0.9)}
    lines = [validation(done, val_loss=loss, val_auc=auc) for done, (loss, auc) in values.items()]
    assert Summary(lines).best == (20, 0.4)
    assert Summary(lines, monitor="val_auc", higher=True).best == (30, 0.9)
    assert Summary([*lines, validation(40, val_loss=float("nan"))]).best == (20, 0.4)


def test_without_validation_the_best_is_an_epoch():
    lines = history(3, 10)
    assert Summary(lines).best == (30, lines[-1]["loss"])
    with pytest.raises(ValueError, match="no validation and no whole epoch"):
        _ = Summary([step(0)]).best


def test_as_text_it_is_a_table():
    said = repr(Summary(history(3, 10, validated=True), "barrier", 4, 1.0))
    first, *rows = said.splitlines()
    assert first == "Summary" and len(rows) == 8
    assert all(re.match(r"  \w+ +\S", row) for row in rows) and len({re.match(r"  \w+ +", row).end() for row in rows}) == 1
    assert re.search(r"trained +3 epochs, 30 steps, 300 rows\n", said)
    assert re.search(r"best +val_loss 0\.\d+ after step 30\n", said)
    assert re.search(r"time +1 s: launch 64%, data 3%, compute 18%, sync 9%, validation 6%", said)


@pytest.mark.parametrize("lines", [[], [step(0)], history(1, 1), [validation(3, val_loss=1.0)]], ids=len)
def test_a_table_is_made_of_whatever_is_there(lines):
    said = repr(Summary(lines))
    assert said.startswith("Summary\n") and "nan" not in said


def test_pandas_has_a_row_for_each_line():
    lines = history(2, 5, validated=True)
    frame = Summary(lines).to_pandas()
    assert len(frame) == len(lines) and list(frame["kind"].value_counts().loc[["step", "epoch", "validation"]]) == [10, 2, 2]
    assert frame.loc[frame["kind"] == "step", "loss"].tolist() == [line["loss"] for line in lines if "step" in line]
    assert frame.loc[frame["kind"] != "step", "step"].tolist() == [5, 5, 10, 10]
    assert list(Summary([]).to_pandas().columns) == ["kind", "step", "epoch", "loss"]


TIMES = [(0, "0 ms"), (0.0843, "84.3 ms"), (0.9999, "1 s"), (12.34, "12.3 s"), (312, "5 min 12 s"), (7503, "2 h 05 min")]
SIZES = [(0, "0 B"), (999, "999 B"), (1210, "1.21 kB"), (999_600, "1 MB"), (5e12, "5 TB"), (5e15, "5e+03 TB")]


@pytest.mark.parametrize(("seconds", "said"), TIMES)
def test_durations_are_written_for_people(seconds, said):
    assert duration(seconds) == said


@pytest.mark.parametrize(("nbytes", "said"), SIZES)
def test_sizes_are_written_for_people(nbytes, said):
    assert size(nbytes) == said


@pytest.mark.parametrize(("part", "said"), [(0, "0%"), (0.004, "<1%"), (0.12, "12%"), (0.999, ">99%"), (1, "100%")])
def test_a_part_that_is_there_is_never_written_as_nothing(part, said):
    assert percent(part) == said
