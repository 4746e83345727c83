"""Callbacks hear what happens, may end a fit, and can break nothing."""

from __future__ import annotations

import logging
import sys
import threading

import pytest

from bigdl_lite.errors import RecipeError
from bigdl_lite.observe import events
from bigdl_lite.observe.events import STOP, Callback, Callbacks, EpochEnded, FitStarted, StepEnded, Stop, Validated, event_of
from tests.engine.test_local import fit, net
from tests.observe.made import epoch, history, start, step, validation


class Notes(Callback):
    """Writes down each event; answers what it is told to, at the kind of event it is told to."""

    def __init__(self, at: type | None = None, answer: object = None) -> None:
        self.heard, self.runs, self.at, self.answer = [], [], at, answer

    def before_fit(self, run):
        self.runs.append(run)

    def _note(self, event):
        self.heard.append(event)
        if type(event) is self.at:
            if isinstance(self.answer, BaseException):
                raise self.answer
            return self.answer

    on_fit_started = on_step = on_epoch = on_validation = on_fit_ended = on_fit_failed = _note

    @property
    def kinds(self):
        return [type(event).__name__ for event in self.heard]


def test_lines_become_typed_events():
    assert event_of(start(steps=6, epochs=2, rows=30)) == FitStarted(6, 2, 30)
    made = event_of(step(4, accepted=[0, 2]))
    assert isinstance(made, StepEnded) and made.step == 4 and made.more["accepted"] == [0, 2] and "step" not in made.more
    made = event_of(epoch(1, 3, val_loss=0.5))
    assert isinstance(made, EpochEnded) and (made.epoch, made.steps, made.more["val_loss"]) == (1, 3, 0.5)
    assert event_of(validation(6, val_loss=0.5)) == Validated(6, 0, {"val_loss": 0.5}, 0.02)
    assert event_of({"something": "new"}) is None


def test_an_engine_tells_the_whole_story_in_order_with_the_facts_of_the_fit():
    notes = Notes()
    with Callbacks([notes], run="run-7", engine="local", workers=2, params={"epochs": 2}) as told:
        outcome = fit(net(), [20, 17], _sgd, observer=told, epochs=2, batch_size=20)
        told.ended(outcome.history, "the model")
    assert notes.runs == ["run-7"]
    assert notes.kinds == ["FitStarted", "StepEnded", "StepEnded", "EpochEnded", "StepEnded", "StepEnded", "EpochEnded", "FitEnded"]
    first, last = notes.heard[0], notes.heard[-1]
    assert first == FitStarted(4, 2, 37, "local", 2, {"epochs": 2}, "run-7")
    assert last.history == outcome.history and last.model == "the model" and last.seconds > 0
    assert {event.run for event in notes.heard} == {"run-7"}


def _sgd(parameters):
    import torch

    return torch.optim.SGD(parameters, lr=0.1)


def test_a_validation_is_told_with_its_epoch():
    notes = Notes()
    told = Callbacks([notes])
    for line in history(epochs=2, steps=3, validated=True):
        told(line)
    assert [(e.step, e.epoch) for e in notes.heard if isinstance(e, Validated)] == [(3, 0), (6, 1)]


def test_the_epoch_of_a_validation_is_known_where_steps_are_thinned_away():
    notes = Notes()
    told = Callbacks([notes])
    for line in history(epochs=3, steps=2, validated=True):
        if "step" not in line:
            told(line)
    assert [e.epoch for e in notes.heard if isinstance(e, Validated)] == [0, 1, 2]


@pytest.mark.parametrize("before", [0, 30])
def test_an_epoch_is_told_with_the_steps_done_by_then(before):
    notes = Notes()
    told = Callbacks([notes], done=before)
    ends = [line for line in history(epochs=3, steps=5) if "step" not in line]
    for line in [*ends[:2], start(), *ends[1:]]:  # the second is told twice, as after the loss of a rank
        told(line)
    assert [e.done - before for e in notes.heard if isinstance(e, EpochEnded)] == [5, 10, 10, 15]


def test_a_fit_that_begins_again_after_a_loss_is_one_fit():
    notes = Notes()
    told = Callbacks([notes])
    for line in (start(), step(0), step(1), start(), step(1)):
        told(line)
    assert notes.kinds == ["FitStarted", "StepEnded", "StepEnded", "StepEnded"]


@pytest.mark.parametrize("at", [FitStarted, StepEnded, EpochEnded, Validated])
def test_stop_ends_the_fit_and_the_first_reason_is_kept(at):
    told = Callbacks([Notes(), Notes(at, Stop("it is good enough")), Notes(at, Stop("me too"))])
    for line in [start(), *history(epochs=1, steps=2, validated=True)]:
        told(line)
    assert told.stop and told.why == "it is good enough"


def test_a_bare_stop_names_the_callback():
    told = Callbacks([Notes(StepEnded, STOP)])
    told(step(0))
    assert told.stop and told.why == "callback Notes asked for it"


@pytest.mark.parametrize("answer", [None, True, 0, "stop"])
def test_no_other_answer_stops(answer):
    told = Callbacks([Notes(StepEnded, answer)])
    told(step(0))
    assert not told.stop and told.why == ""


def test_a_function_of_one_event_is_a_callback():
    losses = []

    def watch(event):
        if isinstance(event, StepEnded):
            losses.append(event.loss)
            return STOP if event.step == 1 else None

    told = Callbacks([watch])
    told(start())
    told(step(0, loss=2.0))
    assert not told.stop
    told(step(1, loss=1.0))
    assert told.stop and losses == [2.0, 1.0] and "watch" in told.why


def test_a_callback_that_raises_is_logged_once_with_its_own_traceback_and_costs_nothing_else(caplog):
    broken, sound = Notes(StepEnded, ZeroDivisionError("of the logger")), Notes()
    told = Callbacks([broken, sound])
    with caplog.at_level(logging.WARNING, "bigdl_lite"):
        for line in [start(), step(0), step(1), epoch(0, 2)]:
            told(line)
        told.ended([])
    assert broken.kinds == ["FitStarted", "StepEnded", "FitEnded"]  # the end, so that it can close what it opened
    assert sound.kinds == ["FitStarted", "StepEnded", "StepEnded", "EpochEnded", "FitEnded"]
    (said,) = caplog.messages
    assert "ZeroDivisionError: of the logger" in said and "test_events.py" in said and "observe/events.py" not in said


def test_a_callback_that_raises_at_every_end_is_not_told_of_twice(caplog):
    class Closes(Callback):
        def on_step(self, event):
            raise ValueError("on the way")

        def on_fit_ended(self, event):
            raise OSError("at the end")

    told = Callbacks([Closes()])
    told(step(0))
    told.ended([])
    assert len(caplog.messages) == 2 and "Traceback" in caplog.messages[0]
    assert "Traceback" not in caplog.messages[1] and "OSError: at the end" in caplog.messages[1]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_is_not_swallowed(error):
    told = Callbacks([Notes(StepEnded, error())])
    with pytest.raises(error):
        told(step(0))


def test_an_error_of_the_fit_is_told_and_goes_on_its_way():
    notes = Notes()
    with pytest.raises(KeyboardInterrupt), Callbacks([notes]) as told:
        told(start())
        raise KeyboardInterrupt
    assert notes.kinds == ["FitStarted", "FitFailed"] and isinstance(notes.heard[-1].error, KeyboardInterrupt)


def test_after_the_end_nothing_is_told():
    notes = Notes()
    with pytest.raises(ValueError), Callbacks([notes]) as told:
        told.ended([])
        told(step(9))
        raise ValueError
    assert notes.kinds == ["FitEnded"]


def test_what_cannot_begin_is_raised_before_any_job_and_the_others_may_close():
    class Refuses(Callback):
        def before_fit(self, run):
            raise OSError("no such server")

    notes = Notes()
    with pytest.raises(OSError, match="no such server"), Callbacks([notes, Refuses()]):
        pytest.fail("the fit began")
    assert notes.kinds == ["FitFailed"]


@pytest.mark.parametrize(
    ("wrong", "said"), [(Notes, r"the class Notes; give an object of it: Notes\(...\)"), (3, "has a int, must have Callback")]
)
def test_what_cannot_hear_is_refused(wrong, said):
    with pytest.raises(RecipeError, match=said):
        Callbacks([Notes(), wrong])


def test_lines_of_many_threads_are_told_one_at_a_time():
    inside, most = [], []

    def watch(event):
        inside.append(event)
        most.append(len(inside))
        sum(range(2000))  # long enough for another thread to come in, if it could
        inside.pop()

    def crowd(tell):
        threads = [threading.Thread(target=lambda: [tell(step(i)) for i in range(200)]) for _ in range(4)]
        before = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(before)
        return max(most)

    assert crowd(Callbacks([watch])) == 1 and len(most) == 800
    assert crowd(watch) > 1  # without Callbacks they meet


def test_kinds_of_events_are_values():
    with pytest.raises(AttributeError):
        event_of(step(0)).loss = 3  # type: ignore[misc, union-attr]
    assert events.FitFailed(error := ValueError()) == events.FitFailed(error) and events.FitEnded([], 1.0) == events.FitEnded([], 1.0)
