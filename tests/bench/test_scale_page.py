"""The guide's page on scale says what the recorded points say, and they bear the claims."""

from __future__ import annotations

from tests.bench.costs import Point, count
from tests.bench.scale import claims, load, rows
from tests.bench.scale_page import GUIDE, POINTS, filled, tables


def test_the_recorded_points_bear_the_claims() -> None:
    assert [claim for claim in claims(load(POINTS)) if not claim.holds] == []
    assert len(rows(load(POINTS))) == len(load(POINTS))


def test_points_that_the_model_does_not_explain_are_seen() -> None:
    """Negative control: seconds dealt to other points than theirs."""
    points = load(POINTS)
    seconds = [x.seconds for x in points]
    wrong = [Point.load(x.dump() | {"seconds": seconds[(7 * i + 3) % len(points)]}) for i, x in enumerate(points)]
    assert not all(claim.holds for claim in claims(wrong))


def test_the_driver_sent_and_received_what_the_formulas_say() -> None:
    """By the kernel's count of its link, with headers and what Spark says beside; few blocks are broadcast more often."""
    for x in load(POINTS):
        c = count(x.engine, x.p, x.n)
        if x.engine == "shuffle" and x.n > 500_000:
            assert 0.6 < x.driver_sent / c.sends < 2.0 and 0.9 < x.driver_received / c.receives < 1.4, x


def test_the_tables_of_the_page_are_those_of_the_points() -> None:
    page = (GUIDE / "scale.md").read_text()
    assert filled(page, tables(load(POINTS))) == page, "another table: python -m tests.bench.scale_page"
