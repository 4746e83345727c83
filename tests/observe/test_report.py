"""The report says what was measured, and each rule speaks where it should and nowhere else."""

from __future__ import annotations

import pytest

from bigdl_lite.observe.report import RULES, advice, report
from bigdl_lite.observe.summary import Summary
from tests.observe.made import history

# a fit of which nothing is to be said: steps of 100 ms, nearly all of it compute
WELL = {"compute_s": 0.090, "sync_s": 0.008, "data_s": 0.002, "bytes_sent": 0}


def summary(engine="barrier", seconds=3.5, shares=(), validated=False, **phases):
    """30 steps of 10 rows, 3 s where phases are WELL."""
    return Summary(history(epochs=3, steps=10, validated=validated, **WELL | phases), engine, 4, seconds, shares)


CASES = {  # rule -> (a fit where it speaks, the nearest one where it is silent, words that it must have)
    "launch": (summary(seconds=9.0), summary(seconds=5.0), ["67% of the fit (6 s)", "local_session"]),
    "small steps": (
        summary(compute_s=0.001, sync_s=0.004), summary(compute_s=0.006, sync_s=0.024),
        ["computes for 1 ms of its 7 ms", "80 in place of 10 rows"],
    ),
    "rounds of shuffle": (
        summary("shuffle", compute_s=0.01, sync_s=0.03), summary("shuffle", compute_s=0.03, sync_s=0.01),
        ["71% of a step", "'barrier'"],
    ),
    "bytes": (
        summary(sync_s=0.2, bytes_sent=4_000_000), summary(sync_s=0.05, bytes_sent=4_000_000), ["sends 4 MB", "'bf16'"],
    ),
    "waiting": (summary(sync_s=0.2), summary(sync_s=0.2, bytes_sent=4_000_000), ["68% of a step", "workers (4)"]),
    "input": (summary(data_s=0.05), summary(data_s=0.02), ["34% of a step", "Raw"]),
    "skewed shares": (summary(shares=[100, 10, 10, 10]), summary(shares=[100, 90, 80, 90]), ["3.1 times", "repartition"]),
    "validation": (
        summary(validated=True, seconds=0.135, compute_s=0.002, sync_s=0.0005, data_s=0), summary(validated=True), ["44% of the fit"],
    ),
}  # fmt: skip


def test_every_rule_has_its_case():
    assert [rule.name for rule in RULES] == list(CASES)


@pytest.mark.parametrize("name", CASES)
def test_a_rule_speaks_with_its_numbers(name):
    said = advice(CASES[name][0])
    assert name in said
    assert all(words in said[name] for words in CASES[name][2]), said[name]


@pytest.mark.parametrize("name", CASES)
def test_a_rule_is_silent_where_it_has_nothing_to_say(name):
    assert name not in advice(CASES[name][1])


def test_of_a_good_fit_nothing_is_said_but_numbers():
    assert advice(summary()) == {}
    assert report(summary()) == (
        "barrier with 4 workers: 300 rows in 3.5 s, 100 rows/s in steps\n"
        "time: launch 14%, input wait 2%, compute 77%, sync 7%\n"
        "- a step computes for 90% of its time; nothing else stands out"
    )


def test_a_report_is_never_long():
    everything = summary("shuffle", 9.0, [100, 1, 1, 1], True, compute_s=0.001, sync_s=0.02, data_s=0.009)
    assert len(advice(everything)) > 3
    assert len(report(everything).splitlines()) == 5


def test_a_fit_without_a_step_has_a_report_too():
    said = report(Summary([], "local", 1, 2.0)).splitlines()
    assert said == ["local with 1 worker: 0 rows in 2 s, 0 rows/s in steps", "time: launch 100%", "no step was made"]


def test_a_wall_clock_that_nobody_gave_is_no_launch():
    assert "launch" not in report(summary(seconds=0.0))
