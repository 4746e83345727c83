"""A few peers in one process, for trying an exchange: side by side as threads, or played again from what they were answered."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from bigdl_lite.algorithms.algorithm import State
from bigdl_lite.algorithms.exchange import NOTHING, Exchange, Exchanger, Stateless, Turn
from bigdl_lite.batch import mix
from bigdl_lite.comm.comm import Comm
from bigdl_lite.comm.room import Room, Table
from bigdl_lite.data.manifest import from_json, to_json
from bigdl_lite.model.layout import Blueprint, blueprint

T = TypeVar("T")


class Net(nn.Module):
    """Embedding tables tables.0.weight, tables.1.weight ..., then parameters others.0, others.1 ..."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], tables: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.tables = nn.ModuleList([nn.Embedding(*shape) for shape in tables])
        self.others = nn.ParameterList([torch.zeros(shape) for shape in shapes])


def plan(*shapes: tuple[int, ...], tables: Sequence[tuple[int, int]] = ()) -> Blueprint:
    return blueprint(Net(shapes, tables))[0]


def together(p: int, work: Callable[[Room], T]) -> list[T]:
    """work() of p members, each in a thread; what they return, in order. Raises what the first of them raised by itself."""
    table, results, errors = Table(p), [None] * p, {}  # type: ignore[var-annotated]

    def run(rank: int) -> None:
        room = Room(table, rank, deadline=60.0)
        try:
            results[rank] = work(room)
        except BaseException as error:
            errors[rank] = error
            room.close()

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(p)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[table.failed[0]]
    return results  # type: ignore[return-value]


def turn(step: int, share: float, seed: int = 0) -> Turn:
    return Turn(step, mix(seed, step), share)


class Given(NamedTuple):
    """What p peers bring to some steps: xs[step][rank] [n], already divided; shares[rank]."""

    xs: list[list[Tensor]]
    shares: list[float]

    @property
    def p(self) -> int:
        return len(self.shares)


def given(p: int, n: int, steps: int, make: Callable[[int, int, torch.Generator], Tensor] | None = None, size: float = 1.0) -> Given:
    """Gradients of peers whose shares differ; make(step, rank, generator) is the mean gradient of one peer's rows."""
    generator = torch.Generator().manual_seed(p * 1000 + n)
    shares = torch.arange(1, p + 1, dtype=torch.float64)
    shares /= shares.sum()
    make = make or (lambda step, rank, generator: torch.randn(n, generator=generator))
    xs = [[make(s, r, generator).mul_(size * float(shares[r])) for r in range(p)] for s in range(steps)]
    return Given(xs, shares.tolist())


class Ran(NamedTuple):
    """results[step][rank] [n]; sent: bytes of all together, per step; exchangers of the peers."""

    results: list[list[Tensor]]
    sent: list[int]
    exchangers: list[Exchanger]


def run(exchange: Exchange, where: Blueprint, what: Given, first: int = 0, begin: Callable[[int, Exchanger], Any] | None = None,
        wrap: Callable[[Comm], Any] = lambda comm: comm) -> Ran:  # fmt: skip
    """The peers side by side, from step `first` on; begin(rank, exchanger) comes before."""

    def member(room: Room) -> tuple[list[Tensor], list[int], Exchanger]:
        comm = wrap(room)
        exchanger, got, sent = exchange.start(where, comm), [], []
        if begin:
            begin(room.rank, exchanger)
        for step, xs in enumerate(what.xs[first:], first):
            before = room.bytes_sent
            got.append(exchanger(xs[room.rank].clone(), comm, turn(step, what.shares[room.rank])).clone())
            sent.append(room.bytes_sent - before)
        return got, sent, exchanger

    made = together(what.p, member)
    results = [list(step) for step in zip(*(got for got, _, _ in made), strict=True)]
    return Ran(results, [sum(step) for step in zip(*(sent for _, sent, _ in made), strict=True)], [e for _, _, e in made])


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.view(torch.int32), b.view(torch.int32))


def agree(ran: Ran) -> bool:
    """Whether all peers had the same bits after every step."""
    return all(same_bits(step[0], other) for step in ran.results for other in step[1:])


def saved(state: State) -> State:
    """As it comes back from a checkpoint."""
    facts = from_json(to_json(state.facts, "facts"))
    assert all(name.startswith("exchange/") for name in state.tensors)
    return State({name: x.clone() for name, x in state.tensors.items()}, facts)


def resumes(exchange: Exchange, where: Blueprint, what: Given, at: int) -> bool:
    """Whether a run that is saved before step `at`, and gone on with by new exchangers, is the one that nobody disturbed."""
    whole = run(exchange, where, what)
    kept = [(saved(e.shared()), saved(e.own())) for e in run(exchange, where, Given(what.xs[:at], what.shares)).exchangers]
    assert all(shared.tensors.keys() == kept[0][0].tensors.keys() for shared, _ in kept)
    assert all(same_bits(x, kept[0][0].tensors[name]) for shared, _ in kept for name, x in shared.tensors.items())
    rest = run(exchange, where, what, at, lambda rank, exchanger: exchanger.restore(*kept[rank]))
    pairs = zip(whole.results[at:], rest.results, strict=True)
    return agree(rest) and all(same_bits(a[0], b[0]) for a, b in pairs)


class Recorded:
    """A comm that writes down what its member says and what it is answered, step after step."""

    def __init__(self, comm: Comm) -> None:
        self.comm, self.rank, self.size, self.calls = comm, comm.rank, comm.size, []  # type: ignore[var-annotated]

    def _noted(self, name: str, x: Tensor, *args: Any) -> Tensor:
        said = x.clone()
        answer = getattr(self.comm, name)(x, *args)
        self.calls.append((name, said, answer.clone()))
        return answer

    def all_reduce(self, x: Tensor) -> Tensor:
        return self._noted("all_reduce", x)

    def union(self, bits: Tensor) -> Tensor:
        return self._noted("union", bits)

    def broadcast(self, x: Tensor, root: int = 0) -> Tensor:
        return self._noted("broadcast", x, root)


class Unknown(Exception):
    """The first call whose answer is not known."""


class Known:
    """A comm that knows the answers of the first calls, and stops at the next one. The driver's answers broadcasts by itself."""

    def __init__(self, rank: int, size: int, answers: Sequence[Tensor], driver: bool = False) -> None:
        self.rank, self.size, self.bytes_sent, self.driver = rank, size, 0, driver
        self.answers, self.said, self.asked = list(answers), [], ""  # type: ignore[var-annotated]

    def _answer(self, x: Tensor, asked: str) -> Tensor:
        self.asked = asked
        self.said.append(x.clone())
        if len(self.said) > len(self.answers):
            raise Unknown
        return self.answers[len(self.said) - 1].clone()

    def all_reduce(self, x: Tensor) -> Tensor:
        return self._answer(x, "all_reduce")

    def union(self, bits: Tensor) -> Tensor:
        return self._answer(bits, "union")

    def broadcast(self, x: Tensor, root: int = 0) -> Tensor:
        told = self._answer(x, "broadcast")
        assert not self.driver or same_bits(told, x)
        return told


def replays(exchange: Exchange, where: Blueprint, what: Given) -> bool:
    """Whether tasks that know only shared() say what living peers say, and a driver that has no x of its own gets the result."""
    comms: dict[int, Recorded] = {}

    def wrap(comm: Comm) -> Recorded:
        comms[comm.rank] = Recorded(comm)
        return comms[comm.rank]

    ran = run(exchange, where, what, wrap=wrap)
    driver, place = exchange.start(where, Known(0, what.p, [])), 0
    for step, xs in enumerate(what.xs):
        calls = 0
        for rank, x in enumerate(xs):
            calls = 0
            while True:  # one task for every answer more
                notes = comms[rank].calls[place:]
                task, comm = exchange.start(where, Known(rank, what.p, [])), Known(rank, what.p, [a for _, _, a in notes[:calls]])
                task.restore(saved(driver.shared()), NOTHING)
                try:
                    task(x.clone(), comm, turn(step, what.shares[rank]))
                    break
                except Unknown:
                    name, said, _ = notes[calls]
                    assert name == "broadcast" or torch.equal(comm.said[calls], said)
                    calls += 1
        answers = [a for _, _, a in comms[0].calls[place : place + calls]]
        got = driver(torch.zeros_like(xs[0]), Known(0, what.p, answers, driver=True), turn(step, 0.0))
        if not same_bits(got, ran.results[step][0]):
            return False
        place += calls
    return True


class Lockstep:
    """p peers in one thread, each played again up to the next call: for long runs, as many threads wait long for one another.

    For exchanges without codecs, which change their state only after the last call of a step.
    """

    def __init__(self, exchange: Exchange, where: Blueprint, p: int) -> None:
        self.exchangers = [exchange.start(where, Known(rank, p, [])) for rank in range(p)]

    def __call__(self, xs: Sequence[Tensor], step: int, shares: Sequence[float] | None = None) -> Tensor:
        p, answers = len(xs), []  # type: ignore[var-annotated]
        while True:
            comms = [Known(rank, p, answers) for rank in range(p)]
            for comm, exchanger, x in zip(comms, self.exchangers, xs, strict=True):
                with contextlib.suppress(Unknown):
                    share = shares[comm.rank] if shares else 1 / p
                    result = exchanger(x.clone(), comm, turn(step, share))
                    if isinstance(exchanger, Stateless):
                        return result
            said = [comm.said[-1] for comm in comms if len(comm.said) > len(answers)]
            if not said:
                return result
            answers.append(_ANSWER[comms[0].asked](said))


_ANSWER: dict[str, Callable[[list[Tensor]], Tensor]] = {
    "all_reduce": lambda said: sum(said[1:], start=said[0]),
    "union": lambda said: functools.reduce(torch.bitwise_or, said),
    "broadcast": lambda said: said[0],
}
