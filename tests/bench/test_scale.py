"""The cost model of scale.py: what it counts, what it finds again, and what the recorded points of the guide say."""

from __future__ import annotations

import math
import time
from pathlib import Path

import numpy as np
import pytest

from tests.bench import costs
from tests.bench.costs import ENGINES, TERMS, Model, Point, count, errors, torrent, typical
from tests.bench.counters import Count, counted
from tests.bench.scale import LINKS, checked, load, save, split
from tests.bench.scale_page import filled, least_compute, tables
from tests.bench.scale_plot import FIGURES, draw

TRUE = {
    "barrier": Model("barrier", (0.0,) * 4, (1e-3, 3e-5, 2e-9), (1e-3, 1.0, 1.05, 3.0)),
    "shuffle": Model("shuffle", (0.02, 0.004, 3e-9, 1e-9), (0.05, 1e-3, 4e-9), (0.03, 0.9, 1.1, 14.0)),
}
RATES = {str(LINKS["fast"]): (5e7, 0.0), str(LINKS["slow"]): (1.25e7, 0.005), str(LINKS["middle"]): (2.5e7, 0.002)}


def made(engine: str, noise: float = 0.0, links: dict[str, tuple[float, float]] = RATES) -> list[Point]:
    """Points as a machine of two cores would give them, if the model were the truth."""
    rng, truth, found = np.random.default_rng(0), TRUE[engine], []

    def off(x: float) -> float:
        return x * (1 + noise * rng.standard_normal())

    for name, (rate, delay) in links.items():
        for n in (60_000, 1_000_000, 4_000_000):
            for p in (2, 4, 8):
                c, compute = count(engine, p, n), n * 1e-8
                driver = float(np.dot(truth.driver, (1.0, c.tasks, 4 * n + c.receives, c.sends)))
                worker = compute + float(np.dot(truth.worker, (1.0, c.messages, c.nbytes)))
                seconds = truth.seconds(p, n, compute, rate, delay, cores=2)
                found.append(Point(engine, p, n, rate, delay, 2, (off(seconds),), compute, off(driver), off(worker), 0.0, 0, 0, name))
    return found


BOTH = made("barrier") + made("shuffle")


# ---- what is counted ---------------------------------------------------------------------------------------------------


def test_a_broadcast_of_one_block_leaves_the_driver_once_for_each_executor() -> None:
    assert torrent(1, 3e6) == 3e6 and torrent(64, 3e6) == 64 * 3e6


@pytest.mark.parametrize("p", [1, 2, 8, 96, 1024])
@pytest.mark.parametrize("nbytes", [4e3, 4e6, 3e7, 4e8])
def test_a_broadcast_leaves_the_driver_at_least_once_and_at_most_once_for_each(p: int, nbytes: float) -> None:
    assert nbytes <= torrent(p, nbytes) * (1 + 1e-9) and torrent(p, nbytes) <= p * nbytes * (1 + 1e-9)
    assert torrent(p, nbytes) <= torrent(p + 1, nbytes) * (1 + 1e-9)


def test_nobody_but_the_driver_is_on_the_wire_of_a_rank_alone() -> None:
    assert count("barrier", 1, 1e6).wire == 0 and count("shuffle", 1, 1e6).wire == 2 * 4e6


def test_an_engine_that_is_not_known_is_refused() -> None:
    with pytest.raises(ValueError, match="'local' must be one of"):
        count("local", 2, 10)


def test_counters_see_what_this_process_does() -> None:
    before, *_ = counted()
    until = time.process_time() + 0.1
    while time.process_time() < until:
        pass
    after, *_ = counted()
    assert (after - before).cpu >= 0.05
    assert (Count(2.0, 4, 6) - Count(1.0, 2, 2)) / 2 == Count(0.5, 1, 2)


# ---- what is fitted ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_the_fit_finds_the_coefficients_that_made_the_points(engine: str) -> None:
    found, truth = costs.fit(made(engine)), TRUE[engine]
    np.testing.assert_allclose(found.clock, truth.clock, rtol=1e-4)
    np.testing.assert_allclose(found.worker, truth.worker, rtol=1e-4)
    np.testing.assert_allclose(found.driver, truth.driver, rtol=1e-4)


@pytest.mark.parametrize("engine", ENGINES)
def test_from_noisy_points_of_2_and_4_ranks_a_thousand_are_foretold(engine: str) -> None:
    found, truth = costs.fit(split(made(engine, noise=0.03))["fitted"]), TRUE[engine]
    for p in (16, 96, 1024):
        for n in (6e4, 7e6, 25e6):
            where = p, n, 1.0, 1.25e9, 2e-4
            assert found.seconds(*where) == pytest.approx(truth.seconds(*where), rel=0.25)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("term", TERMS[1:])
def test_a_model_that_lacks_a_term_foretells_clearly_worse(engine: str, term: str) -> None:
    """Negative control."""
    told = checked(made(engine, noise=0.02))
    assert told[f"without {term}"] > 1.5 * told["predicted"], told


def test_processors_that_take_turns_are_not_mistaken_for_a_cost_of_a_cluster() -> None:
    """A step on hosts of their own is shorter than on two shared cores, by what waited for a turn."""
    model = costs.fit(made("barrier"))
    shared, own = (model.parts(8, 4e6, 0.04, 1.25e9, 0.0, cores=cores) for cores in (2, math.inf))
    assert shared["compute"] == pytest.approx(4 * own["compute"]) and shared["wire"] == own["wire"]


def test_points_of_two_engines_make_no_model() -> None:
    with pytest.raises(ValueError, match="one engine"):
        costs.fit(made("barrier") + made("shuffle"))


def test_points_are_read_as_they_were_written(tmp_path: Path) -> None:
    save(tmp_path / "points.json", made("shuffle"))
    assert load(tmp_path / "points.json") == made("shuffle")


# ---- tables and pictures ------------------------------------------------------------------------------------------------


def test_a_page_without_a_place_for_a_table_is_seen() -> None:
    """Negative control."""
    with pytest.raises(KeyError, match="'errors'"):
        filled("<!-- measured -->\n<!-- /measured -->", {"measured": "| x |", "errors": "| y |"})


def test_a_page_gets_the_tables_of_its_points_and_no_others() -> None:
    page = "".join(f"# {name}\n<!-- {name} -->\nan old table\n<!-- /{name} -->\n" for name in tables(BOTH))
    found = filled(page, tables(BOTH))
    assert "an old table" not in found and filled(found, tables(BOTH)) == found
    two = TRUE["barrier"].seconds(2, 1e6, 1e-2, *RATES[str(LINKS["fast"])], cores=2)
    assert f"| barrier | 1 M | {LINKS['fast']} | {two:.3f} ({two:.3f}) |" in found


def test_pictures_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw(BOTH, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FIGURES)


def test_the_least_compute_gives_the_speedup_and_less_does_not() -> None:
    model, where = TRUE["shuffle"], (7e6, 1.25e9, 2e-4)
    least = least_compute(model, 16, 96, 5.3, *where)
    assert 0 < least < math.inf

    def speedup(compute: float) -> float:
        return 6 * model.seconds(16, where[0], compute, *where[1:]) / model.seconds(96, where[0], compute, *where[1:])

    assert speedup(1.01 * least) > 5.3 > speedup(0.99 * least)
    assert least_compute(TRUE["barrier"], 16, 96, 1.5, *where) == 0
    with pytest.raises(ValueError, match="6 times at most, not 7"):
        least_compute(model, 16, 96, 7, *where)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_model_has_no_errors_on_points_that_it_made(engine: str) -> None:
    assert typical(errors(TRUE[engine], made(engine))) < 1e-9
