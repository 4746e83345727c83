"""Several rounds in a job: workers keep their slots, and whatever goes wrong meanwhile, the weights are those of one round a job."""

from __future__ import annotations

import json
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import bigdl_lite.ml.watching as watching
from bigdl_lite import ShuffleEngine, TorchEstimator, local_sgd
from bigdl_lite.algorithms import Side, Update
from bigdl_lite.comm.window import Window
from bigdl_lite.engine import cluster, looker, memory, shuffle, tasks
from bigdl_lite.engine.order import Order, dumps, loads
from bigdl_lite.errors import UserError
from tests.conftest import flat, frame, mlp, problem, uneven
from tests.engine.test_faults import result, run  # noqa: F401  (a fixture)

X, Y = problem()
FOUND = SimpleNamespace(n=5, m=2, dtype=torch.float32)


def fit(spark, engine="shuffle", make=mlp, parts=2, **more):
    """Twelve rounds an epoch."""
    torch.manual_seed(5)
    settings = {"batchSize": 5, "epochs": 2, "numWorkers": parts, "progress": "none", "loss": nn.CrossEntropyLoss(), "deadline": 60.0}
    adam = partial(torch.optim.Adam, lr=0.01)
    return TorchEstimator(module=make(), optimizer=adam, engine=engine, **(settings | more)).fit(frame(spark, X, Y, uneven(60, parts)))


@pytest.fixture
def sizes(monkeypatch):
    """The rounds of every job that is submitted. However slow the machine, a job may have as many as twice the one before."""
    found, before = [], memory.MemoryRoute._submit

    def submit(self, orders):
        found.append(len(orders))
        return before(self, orders)

    monkeypatch.setattr(memory, "SECONDS", 1e9)
    monkeypatch.setattr(memory.MemoryRoute, "_submit", submit)
    return found


def none_is_active(spark) -> bool:
    until = time.monotonic() + 20
    while left := spark.sparkContext.statusTracker().getActiveJobsIds():
        assert time.monotonic() < until, left
        time.sleep(0.02)
    return True


PER_STEP = {"scheduler": lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9), "schedulerInterval": "step"}


@pytest.mark.parametrize(
    "more",
    [{}, PER_STEP, {"algorithm": local_sgd(2), **PER_STEP}, {"checkpointInterval": 5, "checkpointUnit": "step"}],
    ids=["plain", "a rate a step", "rates on the workers", "checkpoints"],
)
def test_rounds_of_one_job_are_those_of_a_job_each(spark, sizes, monkeypatch, tmp_path, more) -> None:
    here = {"checkpointDir": str(tmp_path / "one")} if "checkpointInterval" in more else {}
    several = fit(spark, **more, **here)
    rounds = [line["loss"] for line in several.history if "step" in line]
    assert sum(sizes) == len(rounds) and max(sizes) >= 4 and len(sizes) < len(rounds) / 2
    with monkeypatch.context() as patch:
        patch.setattr(shuffle, "in_order", lambda sc: False)
        sizes.clear()
        here = {"checkpointDir": str(tmp_path / "two")} if here else {}
        each = fit(spark, **more, **here)
    assert sizes == [1] * len(rounds), "the control"
    assert torch.equal(flat(several.module), flat(each.module))
    assert rounds == [line["loss"] for line in each.history if "step" in line]


def test_a_job_takes_about_a_second_and_never_crosses_the_end_of_an_epoch(spark, sizes, monkeypatch) -> None:
    monkeypatch.setattr(memory, "SECONDS", 1e-9)
    fit(spark, epochs=1)
    assert sizes == [1] * 12, "no round is that short"
    sizes.clear()
    monkeypatch.setattr(memory, "SECONDS", 1e9)
    fit(spark, epochs=3)
    assert sizes == [1, 2, 4, 5, 12, 12]
    sizes.clear()
    monkeypatch.setattr(memory, "MOST", 6)
    fit(spark, epochs=1)
    assert sizes == [1, 2, 3, 3, 3]


@pytest.mark.parametrize(("few", "inside"), [(memory._FEW, 1), (0, 2)], ids=["small", "large"])
def test_threads_of_torch_leave_the_cores_to_the_workers_where_the_model_is_small(spark, monkeypatch, few, inside) -> None:
    found = set()

    class Watch(watching.Callbacks):
        def __call__(self, event) -> None:
            if "step" in event:
                found.add(torch.get_num_threads())

    monkeypatch.setattr(watching, "Callbacks", Watch)
    monkeypatch.setattr(memory, "_FEW", few)
    torch.set_num_threads(2)
    fit(spark, epochs=1)
    assert found == {inside} and torch.get_num_threads() == 2, "what the user had is put back"


def test_with_fewer_slots_than_workers_no_task_waits_for_another(spark, sizes) -> None:
    by_memory = fit(spark, parts=5, epochs=1)
    assert sizes == [1] * 12
    assert torch.equal(flat(by_memory.module), flat(fit(spark, ShuffleEngine(share_memory=False), parts=5, epochs=1).module))


def test_slots_that_others_hold_cost_seconds_and_no_more(spark, sizes, monkeypatch) -> None:
    """The driver believes that five tasks fit into four slots, as it would where another job holds one."""
    quiet = fit(spark, parts=5, epochs=1)
    monkeypatch.setattr(cluster, "slots_of", lambda spark, profile: 5)
    sizes.clear()
    hurt = fit(spark, parts=5, epochs=1)
    assert sizes[:4] == [1, 2, 4, 1], "the job of two rounds was given up in its second, and what was submitted behind it"
    assert sizes.count(1) > 3, "and then it is tried less and less often"
    assert torch.equal(flat(hurt.module), flat(quiet.module))


def test_an_error_in_the_third_round_of_a_job_comes_back_and_ends_all_tasks(spark, sizes, tmp_path) -> None:
    calls = str(tmp_path / "calls")  # of all processes

    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, x):
            if self.training:
                with open(calls, "ab") as file:
                    file.write(b"x")
                    made = file.tell()
            if self.training and made == 6:
                raise ValueError("the sixth call")
            return self.net(x)

    with pytest.raises(UserError, match=r"(?s)Traceback.*in forward.*the sixth call.*raised on worker"):
        fit(spark, make=Fails)
    assert sizes == [1, 2, 4], "and so in the third of four"
    assert none_is_active(spark)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, UserError])
def test_what_interrupts_the_driver_between_rounds_leaves_no_task(spark, sizes, monkeypatch, kind) -> None:
    active = []

    class Watch(watching.Callbacks):
        def __call__(self, event) -> None:
            if event.get("step") == 4:
                active.extend(spark.sparkContext.statusTracker().getActiveJobsIds())
                raise kind("enough")

    monkeypatch.setattr(watching, "Callbacks", Watch)
    with pytest.raises(kind):
        fit(spark)
    assert sizes == [1, 2, 4] and active, "it was in the middle of a job"
    assert none_is_active(spark)


def test_a_job_that_the_user_cancels_is_an_error(spark, sizes, monkeypatch) -> None:
    class Watch(watching.Callbacks):
        def __call__(self, event) -> None:
            if event.get("step") == 4:
                spark.sparkContext.cancelAllJobs()

    monkeypatch.setattr(watching, "Callbacks", Watch)
    with pytest.raises(Exception, match="cancelled"):
        fit(spark)
    assert sizes[:3] == [1, 2, 4] and sum(sizes) < 24 and none_is_active(spark)


def test_memory_that_went_with_its_process_costs_a_repeated_round(spark, sizes, monkeypatch) -> None:
    quiet = fit(spark)
    sizes.clear()
    monkeypatch.setattr(memory, "look", lambda address: None if len(sizes) <= 3 else looker.look(address))
    hurt = fit(spark)
    assert sizes[:5] == [1, 1, 1, 1, 2], "three jobs for nothing"
    assert torch.equal(flat(quiet.module), flat(hurt.module))


def test_a_driver_that_is_busy_elsewhere_finds_the_tasks_gone_and_starts_others(spark, sizes, monkeypatch) -> None:
    quiet = fit(spark, epochs=1)
    sizes.clear()

    class Slow(watching.Callbacks):
        def __call__(self, event) -> None:
            if event.get("step") == 4:
                assert none_is_active(spark), "tasks end by themselves"

    monkeypatch.setattr(watching, "Callbacks", Slow)
    late = fit(spark, epochs=1)
    assert sum(sizes) > 12 and sizes[:3] == [1, 2, 4]
    assert torch.equal(flat(quiet.module), flat(late.module))


# ---- without Spark ----------------------------------------------------------------------------------------------------


def board(stamp: int = 0) -> Window:
    made = Window(looker.board_nbytes(1, 2))
    made.mark(stamp)
    return made


@pytest.mark.parametrize(
    ("stamp", "at", "number"), [(3, 3, 3), (5, 3, 5), (6, 3, 6), (7, 3, None), (looker.CLOSED, 3, None), (5, 6, None)]
)
def test_a_task_joins_in_the_round_on_the_board_if_that_is_its_jobs(monkeypatch, stamp, at, number) -> None:
    """Of job 3, rounds 3 to 6: a task that came late, or again, does what the others do; a zombie does nothing."""
    monkeypatch.setattr(looker, "_WAIT", 0.01)
    shown = board(stamp)
    seat = looker.seat_in(shown, 1, 1)
    assert looker._turn(shown, seat, "3 where", at, 6) == number
    assert looker.seated(seat) == (None if stamp > 6 else (3, "where")), "a zombie takes no seat"
    assert looker.seated(looker.seat_in(shown, 1, 0)) is None


def test_a_seat_is_left_by_the_job_that_has_it_and_half_a_text_is_none() -> None:
    seat = looker.seat_in(board(), 1, 0)
    assert looker.seated(seat) is None
    looker.take(seat, "4 here")
    looker.leave(seat, 3)
    assert looker.seated(seat) == (4, "here")
    looker.leave(seat, 4)
    assert looker.seated(seat) == (4, "")
    looker.take(seat, "4 there")  # another that does the same task
    assert looker.seated(seat) == (4, "there")
    seat[-1] = 1
    seat[8] ^= 1
    assert looker.seated(seat) is None
    looker.take(seat, "4 there")
    assert looker.seated(seat) == (4, "there")


def test_a_part_is_what_was_put_and_of_its_own_round_only() -> None:
    """A worker that Spark had given up writes later into its memory: its stamp tells the round that it is of."""
    window, other = Window(looker.part_nbytes(FOUND)), Window(looker.part_nbytes(FOUND))
    side = Side(1, 7, 3.5, 0.25, 0.1, 0.2, torch.tensor([1.0, 2.0], dtype=torch.float64))
    looker.put_part(window, FOUND, Update(torch.arange(5.0), 3.5), tasks._side(side, 4))
    window.mark(4)
    frame_, update = looker.part_in(window, FOUND)
    back = tasks.side_of(frame_)
    assert (back.rank, back.rows, back.weight, back.loss, back.buffers.tolist()) == (1, 7, 3.5, 0.25, [1.0, 2.0])
    assert update.weight == 3.5 and update.vector.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    looker.put_part(other, FOUND, None, tasks._side(side, 4))
    assert looker.part_in(other, FOUND)[1] is None

    shown = board()
    place = looker.seat_in(shown, 1, 0)
    seat = memory._Seat(place)
    assert seat.part(4) is None
    looker.take(place, f"3 {window.address}")
    assert seat.part(5) is None and seat.part(4).stamp == 4
    looker.take(place, f"3 {other.address}")  # the same task in another process, which is not so far
    other.mark(-1)
    assert seat.part(4).stamp == 4 and seat.part(-1).stamp == -1
    seat.forget()
    assert seat.part(4) is None and not seat.left(3)
    looker.leave(place, 3)
    assert seat.left(3) and not seat.left(4)


def test_orders_travel_without_their_rates() -> None:
    base = Order("run", (5, 0), ((0, 7),), rates=(0.5,))
    orders = [Order("run", (5, 0), ((0, 7),), i, 1, (i, 0), ((2, 3), (0, 0)), (0.1,)) for i in range(3)]
    assert loads(dumps(orders), base) == [Order("run", (5, 0), ((0, 7),), i, 1, (i, 0), ((2, 3), (0, 0)), (0.5,)) for i in range(3)]
    assert len(json.loads(dumps(orders))) == 3


# ---- processes that are killed ----------------------------------------------------------------------------------------


@pytest.mark.slow  # a Spark program
@pytest.mark.timeout(180)
def test_a_worker_that_is_killed_in_the_middle_of_a_job_runs_again_with_its_share_or_without(run) -> None:  # noqa: F811
    program = """
    import shutil, glob
    from bigdl_lite.engine import cache, memory
    memory.SECONDS = 1e9
    spark = local_session(cores=3, conf={"spark.master": "local[3,8]"})  # a task may fail seven times
    spark.sparkContext.setLogLevel("OFF")
    flag = os.path.join(os.getcwd(), "flag")

    class Net(nn.Module):
        def __init__(self, how):
            super().__init__()
            self.net, self.calls, self.how = mlp(), 0, how
        def forward(self, x):
            self.calls += 1
            if self.training and self.how and self.calls == 11 and not os.path.exists(flag):
                open(flag, "w").close()
                if self.how == "share":
                    for run in list(cache._CACHE):
                        shutil.rmtree(cache.folder(run))
                os.kill(os.getpid(), 9)
                time.sleep(5)
            return self.net(x)

    sizes, before = [], memory.MemoryRoute._submit
    def submit(self, orders):
        sizes.append(len(orders))
        return before(self, orders)
    memory.MemoryRoute._submit = submit
    df = frame(spark, X, Y, [50, 30]).cache()
    def fit(how):
        sizes.clear()
        torch.manual_seed(0)
        made = estimator("shuffle", epochs=1)
        made._set(module=lambda: Net(how), batchSize=4)
        model = made.fit(df)
        return flat(model.module), [line["step"] for line in model.history if "step" in line], list(sizes)

    quiet, steps, calm = fit("")
    told = {"steps": len(steps), "calm": calm}
    for how in ("killed", "share"):
        if os.path.exists(flag):
            os.unlink(flag)
        hurt, again, jobs = fit(how)
        told[how] = {"hit": os.path.exists(flag), "equal": torch.equal(quiet, hurt), "steps": again == steps, "jobs": jobs}
    told["left"] = [n for n in os.listdir("/dev/shm") if "bigdl" in n]
    print(json.dumps(told))
    """
    told = result(run(program), 170)
    print(told)
    assert told["steps"] == 20 and told["calm"] == [1, 2, 4, 8, 5] and told["left"] == []
    for how in ("killed", "share"):
        assert told[how]["hit"] and told[how]["equal"] and told[how]["steps"], told


@pytest.mark.parametrize("share_memory", [True, False])
def test_sparks_own_pages_tell_run_epoch_and_step(spark, monkeypatch, share_memory) -> None:
    told = []
    real = type(spark.sparkContext).setJobDescription
    monkeypatch.setattr(type(spark.sparkContext), "setJobDescription", lambda self, text: (told.append(text), real(self, text))[1])
    fit(spark, ShuffleEngine(share_memory=share_memory), epochs=2)
    ours = [text for text in told if text and text.startswith("bigdl_lite TorchEstimator_")]
    assert any("shuffle, epoch 1 of 2, step" in text for text in ours) and any("epoch 2 of 2" in text for text in ours)
    assert told[-1] is None or not told[-1].startswith("bigdl_lite"), "what the user had is put back"
