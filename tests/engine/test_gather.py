"""What ranks say to all before they meet: through the driver where all can reach it, through Spark where one cannot."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from bigdl_lite.comm.link import MOST
from bigdl_lite.engine.gather import Gathering
from bigdl_lite.engine.live import Listener, Speaker
from bigdl_lite.engine.recipe import silent
from bigdl_lite.errors import MeetingTimeout, PeerLost, WireError

pytestmark = pytest.mark.timeout(30)

HOST, TOKEN, SOON, NEVER = "127.0.0.1", "a 5ecret of this run", 0.05, 1000.0


def nothing() -> None:
    pass


def saying(gathering: Gathering, words: dict[int, Any], wait: Callable[[], None] = nothing) -> dict[int, Future[Any]]:
    """Every rank in a thread, as the listener has it."""
    pool = ThreadPoolExecutor(len(words))
    for rank in words:
        gathering.here(rank)
    told = {rank: pool.submit(gathering.say, rank, word, SOON, wait) for rank, word in words.items()}
    pool.shutdown(wait=False)
    return told


def test_all_hear_what_all_say_in_the_order_of_ranks() -> None:
    gathering = Gathering(3, patience=NEVER)
    told = saying(gathering, {2: "c", 0: "a", 1: {"rows": 7}})
    assert [told[rank].result() for rank in range(3)] == [["a", {"rows": 7}, "c"]] * 3


def test_who_decodes_for_long_is_waited_for_and_those_who_wait_show_it() -> None:
    gathering, waited = Gathering(2, patience=SOON), threading.Semaphore(0)
    gathering.here(1)
    told = saying(gathering, {0: "early"}, waited.release)
    for _ in range(3):
        assert waited.acquire(timeout=10)
    assert not told[0].done(), "both have a connection, so nobody is sent to Spark however long it takes"
    assert gathering.say(1, "late", SOON, nothing) == told[0].result() == ["early", "late"]


def test_one_without_a_connection_sends_all_to_spark() -> None:
    gathering = Gathering(3, patience=SOON)
    told = saying(gathering, {0: "a", 1: "b"})
    assert told[0].result() is None and told[1].result() is None
    assert gathering.say(2, "c", SOON, nothing) is None, "it has found its way after all, and the others are there already"


@pytest.mark.parametrize("word", [None, "x" * MOST], ids=["cannot be sent", "too long for all"])
def test_what_no_message_carries_goes_through_spark(word: Any) -> None:
    told = saying(Gathering(2, patience=NEVER), {0: "short", 1: word})
    assert told[0].result() is None and told[1].result() is None


def test_nobody_waits_for_a_stage_that_has_ended() -> None:
    gathering = Gathering(2, patience=NEVER)
    told = saying(gathering, {0: "a"})
    gathering.end()
    with pytest.raises(PeerLost, match="the stage has ended"):
        told[0].result()


def test_a_stage_that_spark_runs_anew_is_not_mixed_with_the_one_before() -> None:
    gathering = Gathering(2, patience=NEVER)
    told = saying(gathering, {0: "a"})
    with pytest.raises(PeerLost, match="rank 0 begins a second time"):
        gathering.say(0, "a again", SOON, nothing)
    gathering.say(1, "b", SOON, nothing)
    with pytest.raises(PeerLost, match="rank 1 begins a second time"):
        gathering.say(1, "b", SOON, nothing)
    assert told[0].result() == ["a", "b"]
    with pytest.raises(WireError, match="rank 2 speaks in a stage of 2 ranks"):
        gathering.say(2, "c", SOON, nothing)


# ---- over the connections that ranks have to the driver ----------------------------------------------------------------


def gather(speakers: Sequence[Speaker], words: Sequence[Any]) -> list[Future[Any]]:
    pool = ThreadPoolExecutor(len(speakers))
    told = [pool.submit(speaker.gather, word) for speaker, word in zip(speakers, words, strict=True)]
    pool.shutdown(wait=False)
    return told


def test_ranks_gather_through_the_driver() -> None:
    with Listener(HOST, TOKEN, silent, ranks=3) as listener:
        speakers = [Speaker(listener.address, rank) for rank in range(3)]
        assert [told.result() for told in gather(speakers, ["a", ["b"], "x" * MOST])] == [None] * 3
    with Listener(HOST, TOKEN, silent, ranks=3) as listener:
        speakers = [Speaker(listener.address, rank) for rank in range(3)]
        assert [told.result() for told in gather(speakers, ["a", ["b"], {}])] == [["a", ["b"], {}]] * 3
        for speaker in speakers:
            speaker.close()


def test_without_a_connection_a_rank_asks_spark_at_once_and_the_others_after_it() -> None:
    with Listener(HOST, TOKEN, silent, ranks=2) as listener:
        speakers = [Speaker(listener.address, 0), Speaker(None, 1)]
        assert speakers[1].gather("b") is None
        assert gather(speakers[:1], ["a"])[0].result() is None
        speakers[0].close()


def test_a_rank_that_is_lost_meanwhile_ends_the_stage_of_the_others() -> None:
    losses = threading.Event()
    with Listener(HOST, TOKEN, silent, lost=lambda why: losses.set(), ranks=2) as listener:
        speakers = [Speaker(listener.address, rank) for rank in range(2)]
        (told,) = gather(speakers[:1], ["a"])
        assert speakers[1]._link is not None
        speakers[1]._link.close()  # as a process that is killed does
        assert losses.wait(10)
    with pytest.raises((PeerLost, MeetingTimeout)):  # the engine cancels the stage, and hangs up
        told.result()
