"""The bar, as it stands in a terminal, and the log lines where there is none."""

from __future__ import annotations

import io
import logging
import re
import sys
from types import SimpleNamespace

import pytest

from bigdl_lite.observe.events import Callbacks
from bigdl_lite.observe.progress import Progress
from tests.observe.made import history, start

tqdm = pytest.importorskip("tqdm", reason="a bar needs tqdm: pip install 'bigdl_lite[local]'")

# fit: 100%|██████████████████████████████| 4/4 [00:00<00:00, 43.21step/s, epoch 2/2, loss 0.3077, val_accuracy 0.7692, 1,000 rows/s]
LOOK = re.compile(
    r"fit: +\d+%\|[#█▏▎▍▌▋▊▉\d ]+\| \d+/\d+ \[\d\d:\d\d<(\d\d:\d\d|\?), +[\d.?]+(step/s|s/step), "
    r"epoch \d/\d, loss [\d.e-]+, (val_\w+ [\d.]+, )?[\d,]+ rows/s\]$"
)


def screen(lines, ended=True, width=120):
    """What the terminal shows after each write, the empty bar left out."""
    file = io.StringIO()
    with Callbacks([bar := Progress("bar", file=file, width=width)]) as told:
        bar._tqdm = lambda **settings: tqdm.tqdm(**settings | {"mininterval": 0, "miniters": 1})
        for line in lines:
            told(line)
        if ended:
            told.ended([line for line in lines if "start" not in line])
    return [text.strip() for text in re.split(r"[\r\n]", file.getvalue()) if "epoch" in text]


def test_a_bar_has_epoch_loss_validation_and_speed():
    shown = screen([start(4, 2), *history(2, 2, validated=True)])
    assert all(LOOK.match(text) and len(text) <= 120 for text in shown), shown
    assert "val_" not in shown[0] and "1/4 [" in shown[0] and "epoch 1/2" in shown[0]
    assert "val_accuracy 0.8" in shown[-1] and "4/4 [" in shown[-1] and "epoch 2/2" in shown[-1] and "1,000 rows/s" in shown[-1]


def test_thinned_lines_end_at_the_last_step():
    lines = [start(20, 2), *history(2, 10, every=6)]
    assert "20/20 [" in screen(lines)[-1]
    assert "19/20 [" in screen(lines, ended=False)[-1]  # without the end it is the last line heard


def test_the_last_step_is_shown_though_its_line_came_only_with_the_history():
    lines = history(2, 10)
    heard = [line for line in lines if line.get("step", 0) < 7]
    assert "7/20 [" in screen([start(20, 2), *heard], ended=False)[-1]
    file = io.StringIO()
    with Callbacks([bar := Progress("bar", file=file, width=120)]) as told:
        bar._tqdm = lambda **settings: tqdm.tqdm(**settings | {"mininterval": 0, "miniters": 1})
        for line in [start(20, 2), *heard]:
            told(line)
        told.ended(lines)
    last = file.getvalue().strip().split("\r")[-1]
    assert "20/20 [" in last and f"epoch 2/2, loss {lines[-2]['loss']:.4g}, " in last


def test_a_fit_that_was_stopped_stays_where_it_stopped():
    assert "5/20 [" in screen([start(20, 2), *history(2, 10)[:5]])[-1]


def test_after_the_loss_of_a_rank_the_bar_goes_back():
    lines = history(1, 6)[:-1]
    counts = [re.search(r"(\d+)/6", text).group(1) for text in screen([start(6, 1), *lines[:4], start(6, 1), *lines[2:]], ended=False)]
    assert counts == ["1", "2", "3", "4", "3", "4", "5", "6"]


def test_a_bar_is_closed_where_the_fit_fails():
    file = io.StringIO()
    with pytest.raises(KeyboardInterrupt), Callbacks([bar := Progress("bar", file=file, width=100)]) as told:
        told(start())
        raise KeyboardInterrupt
    assert bar._bar is None and file.getvalue().endswith("\n")


def test_a_log_has_a_line_an_interval_and_one_a_validation(caplog):
    lines = [start(4, 2), *history(2, 2, validated=True)]
    with caplog.at_level(logging.INFO, "bigdl_lite"):
        told = Callbacks([Progress("log", every=0.0)])
        for line in lines:
            told(line)
    assert len(caplog.messages) == 6
    assert re.fullmatch(r"step 1 of 4, epoch 1/2, loss 1, 1,000 rows/s", caplog.messages[0])
    assert re.fullmatch(r"validation after step 2: val_loss 0\.\d+, val_accuracy 0\.\d+", caplog.messages[2])
    caplog.clear()
    with caplog.at_level(logging.INFO, "bigdl_lite"):
        told = Callbacks([Progress("log")])  # ten seconds have not gone by
        for line in lines:
            told(line)
    assert len(caplog.messages) == 2 and all("validation" in message for message in caplog.messages)


def test_none_is_silent(caplog, capsys):
    with caplog.at_level(logging.DEBUG, "bigdl_lite"):
        told = Callbacks([Progress("none")])
        for line in [start(4, 2), *history(2, 2, validated=True)]:
            told(line)
        told.ended([])
    assert not caplog.messages and not any(capsys.readouterr())


def test_auto_is_a_bar_only_where_someone_may_look(monkeypatch):
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    monkeypatch.setitem(sys.modules, "ipykernel", sys)  # as pyspark leaves it in any program, where it is installed
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert Progress()._mode == "log"
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: None))  # imported, and not what runs us
    assert Progress()._mode == "log"
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: SimpleNamespace(kernel=object())))
    assert Progress()._mode == "bar"


def test_without_tqdm_there_is_a_log(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    assert Progress("bar")._mode == "log"
