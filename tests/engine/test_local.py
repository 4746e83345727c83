"""The local engine is the reference that the others must equal; so it must equal twenty lines of plain torch."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam

from bigdl_lite.algorithms import method
from bigdl_lite.algorithms.parts import TorchOptimizer
from bigdl_lite.batch import mix, order, quotas
from bigdl_lite.data.columns import describe
from bigdl_lite.engine.local import LocalEngine
from bigdl_lite.engine.recipe import Outcome, Recipe, Start
from bigdl_lite.errors import DataError, DivergedError, RecipeError, UserError
from bigdl_lite.model.batchnorm import synchronised
from bigdl_lite.model.layout import blueprint

pytestmark = pytest.mark.timeout(60)

ROWS, FEATURES, CLASSES = 37, 6, 3
OPTIMIZERS = {"sgd momentum": partial(SGD, lr=0.05, momentum=0.9), "adam": partial(Adam, lr=0.02)}


def data(n: int = ROWS) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n, FEATURES)).astype("f4")
    return x, (x @ rng.standard_normal((FEATURES, CLASSES))).argmax(1)


def net(*middle: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, 40), *(middle or [nn.Tanh()]), nn.Linear(40, CLASSES))


def shares(x: np.ndarray, y: np.ndarray, counts: Sequence[int], size: int = 4) -> list[list[pa.RecordBatch]]:
    """The record batches of each share, a few rows each; counts of 0 are shares without any."""
    assert sum(counts) == len(x)
    schema, found, at = pa.schema([("x", pa.list_(pa.float32())), ("y", pa.int64())]), [], 0
    for count in counts:
        edges = [*range(at, at + count, size), at + count]
        rows = [{"x": x[a:b].tolist(), "y": y[a:b].tolist()} for a, b in pairwise(edges)]
        found.append([pa.RecordBatch.from_pydict(columns, schema=schema) for columns in rows])
        at += count
    return found


def recipe(module: nn.Module, workers: int, optimizer: Any, **settings: Any) -> tuple[Recipe, Start]:
    made, weights, buffers, constants = blueprint(module)
    columns = describe(pa.schema([("x", pa.list_(pa.float32())), ("y", pa.int64())]), ["x"], "y", torch.float32)
    advance = settings.pop("advance", {})
    settings = {"batch_size": 1000, "epochs": 1, "deadline": 20.0, "loss": nn.CrossEntropyLoss(), **settings}
    how = method("sync-sgd", TorchOptimizer(optimizer, **advance))
    made = Recipe(blueprint=made, round=how, columns=columns, num_workers=workers, **settings)
    return made, Start(weights, buffers, constants)


def fit(module: nn.Module, counts: Sequence[int], optimizer: Any, observer: Any = None, **settings: Any) -> Outcome:
    x, y = data(sum(counts))
    made, start = recipe(module, len(counts), optimizer, **settings)
    return LocalEngine().fit(shares(x, y, counts), made, start, *([observer] if observer else []))


def alone(module: nn.Module, make: Callable[..., Any], steps: Sequence[Tensor], clip: float | None = None) -> Tensor:
    """Plain torch: steps are the rows of each batch."""
    x, y = map(torch.from_numpy, data())
    optimizer, loss = make(module.parameters()), nn.CrossEntropyLoss()
    for rows in steps:
        optimizer.zero_grad()
        loss(module(x[rows]), y[rows]).backward()
        if clip:
            nn.utils.clip_grad_norm_(module.parameters(), clip)
        optimizer.step()
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()])


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


FULL = [torch.arange(ROWS)] * 20
COUNTS = [[37], [20, 17], [0, 37], [30, 0, 7], [10, 0, 26, 1]]
every_optimizer = pytest.mark.parametrize("optimizer", OPTIMIZERS)


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@every_optimizer
def test_workers_on_parts_equal_plain_torch_on_the_whole(optimizer: str, counts: list[int]) -> None:
    make = OPTIMIZERS[optimizer]
    close(fit(net(), counts, make, epochs=20).weights, alone(net(), make, FULL))


def test_a_difference_would_be_seen() -> None:
    """Negative control: one row less."""
    make = OPTIMIZERS["sgd momentum"]
    assert (fit(net(), [20, 17], make, epochs=20).weights - alone(net(), make, [torch.arange(36)] * 20)).abs().max() > 1e-4


@pytest.mark.parametrize("counts", [[37], [20, 17], [10, 0, 26, 1]], ids=str)
def test_clipping_sees_the_gradient_of_the_whole(counts: list[int]) -> None:
    make = OPTIMIZERS["sgd momentum"]
    found = fit(net(), counts, make, epochs=20, advance={"clip_norm": 0.1})
    close(found.weights, alone(net(), make, FULL, clip=0.1))


@pytest.mark.parametrize("rule", [{"weight": torch.tensor([1.0, 10.0, 0.1])}, {"ignore_index": 1}], ids=["weight", "ignore"])
def test_a_weighted_mean_over_classes_does_not_depend_on_the_partitions(rule: dict[str, Any]) -> None:
    make, loss = OPTIMIZERS["sgd momentum"], nn.CrossEntropyLoss(**rule)
    one, two = (fit(net(), counts, make, epochs=20, loss=loss) for counts in ([37], [20, 17]))
    close(one.weights, two.weights)


@every_optimizer
@pytest.mark.parametrize("batch_size", [1, 10, 37])
def test_minibatches_of_one_worker_are_those_that_the_order_says(optimizer: str, batch_size: int) -> None:
    make, epochs, seed = OPTIMIZERS[optimizer], 2, 7
    steps = []
    for epoch in range(epochs):
        steps += order(ROWS, seed, epoch, 0).split(quotas([ROWS], batch_size)[:, 0].tolist())
    found = fit(net(), [ROWS], make, epochs=epochs, batch_size=batch_size, seed=seed)
    close(found.weights, alone(net(), make, steps))


def test_minibatches_of_several_workers_are_those_that_their_orders_and_quotas_say() -> None:
    make, counts, seed = OPTIMIZERS["sgd momentum"], [20, 0, 17], 7
    starts, steps = np.cumsum([0, *counts]), []
    for epoch in range(2):
        deals = [order(n, seed, epoch, r) + int(starts[r]) for r, n in enumerate(counts)]
        for quota, dealt in zip(plan := quotas(counts, 10), np.cumsum(plan, 0) - plan, strict=True):
            steps.append(torch.cat([deals[r][dealt[r] : dealt[r] + quota[r]] for r in range(3)]))
    close(fit(net(), counts, make, epochs=2, batch_size=10, seed=seed).weights, alone(net(), make, steps))


@pytest.mark.parametrize("counts", [[37], [20, 0, 17]], ids=str)
def test_a_run_repeats_to_the_bit_even_with_dropout_and_batch_norm(counts: list[int]) -> None:
    seen: list[int] = []

    def run(seed: int) -> Outcome:
        torch.rand(len(seen))  # what came before must not matter
        seen.append(seed)
        module = net(nn.Dropout(0.5), nn.BatchNorm1d(40), nn.ReLU())
        return fit(module, counts, OPTIMIZERS["adam"], epochs=3, batch_size=10, seed=seed)

    first, second, other = run(1), run(1), run(2)
    assert torch.equal(first.weights, second.weights) and torch.equal(first.buffers, second.buffers)
    losses = [[line["loss"] for line in outcome.history] for outcome in (first, second)]
    assert losses[0] == losses[1] and not torch.equal(first.weights, other.weights)


def test_dropout_is_drawn_from_the_seed_the_step_and_the_rank() -> None:
    module, x = net(nn.Dropout(0.5)), torch.from_numpy(data()[0])
    seen: list[tuple[int, Tensor]] = []
    module[1].register_forward_hook(lambda m, given, out: seen.append((len(given[0]), (out != 0).clone())))
    fit(module, [20, 17], partial(SGD, lr=0.0), epochs=1, seed=5)
    for rank, (b, kept) in enumerate(sorted(seen, key=lambda pair: -pair[0])):
        torch.manual_seed(mix(5, 2, 0, rank))
        expected = nn.functional.dropout(torch.ones(b, 40)) != 0
        assert torch.equal(kept, expected)
    assert len(seen) == 2 and len(x) == ROWS


@pytest.mark.parametrize("counts", [[37], [20, 17], [30, 0, 7]], ids=str)
def test_synchronised_batch_norm_equals_plain_torch_on_the_whole(counts: list[int]) -> None:
    make = OPTIMIZERS["sgd momentum"]
    module = net(nn.BatchNorm1d(40), nn.ReLU()).double()
    x, y = data()
    whole, optimizer = net(nn.BatchNorm1d(40), nn.ReLU()).double(), None
    optimizer = make(whole.parameters())
    for _ in range(20):
        optimizer.zero_grad()
        nn.CrossEntropyLoss()(whole(torch.from_numpy(x).double()), torch.from_numpy(y)).backward()
        optimizer.step()
    made, start = recipe(synchronised(module), len(counts), make, epochs=20)
    schema = pa.schema([("x", pa.list_(pa.float32())), ("y", pa.int64())])
    object.__setattr__(made, "columns", describe(schema, ["x"], "y", torch.float64))
    found = LocalEngine().fit(shares(x, y, counts), made, start)
    close(found.weights, torch.cat([p.detach().reshape(-1) for p in whole.parameters()]))
    close(found.buffers, torch.cat([b.double().reshape(-1) for b in whole.buffers()]))


# ---- what comes back ------------------------------------------------------------------------------------------------------


def test_the_history_has_a_line_for_each_step_and_epoch_and_the_observer_hears_them() -> None:
    heard: list[Any] = []
    found = fit(net(), [20, 0, 17], OPTIMIZERS["adam"], heard.append, epochs=2, batch_size=10)
    steps, epochs = [x for x in found.history if "step" in x], [x for x in found.history if "step" not in x]
    assert [x["step"] for x in steps] == list(range(8)) and [x["rows"] for x in steps] == [10, 10, 10, 7] * 2
    assert [(x["epoch"], x["rows"], x["steps"]) for x in epochs] == [(0, 37, 4), (1, 37, 4)]
    for epoch in epochs:
        mine = [x for x in steps if x["epoch"] == epoch["epoch"]]
        assert epoch["loss"] == pytest.approx(sum(x["loss"] * x["rows"] for x in mine) / 37)
    assert heard[0] == {"start": {"steps": 8, "epochs": 2, "rows": 37}} and heard[1:] == found.history
    assert all(x["bytes_sent"] == 0 and x["lr"] == 0.02 for x in steps)
    assert found.engine == "local" and found.shapes == [[FEATURES], []]


def test_the_history_keeps_every_kth_step_and_the_observer_hears_all() -> None:
    heard: list[Any] = []
    found = fit(net(), [37], OPTIMIZERS["adam"], heard.append, epochs=1, batch_size=5, log_interval=3)
    assert [x["step"] for x in found.history if "step" in x] == [0, 3, 6]
    assert [x["step"] for x in heard if "step" in x] == list(range(8))


def test_the_start_is_not_written_to_and_the_outcome_is_ones_own() -> None:
    x, y = data()
    made, start = recipe(net(nn.BatchNorm1d(40)), 2, OPTIMIZERS["adam"], epochs=2)
    weights, buffers = start.weights.clone(), start.buffers.clone()
    first = LocalEngine().fit(shares(x, y, [20, 17]), made, start)
    kept = first.weights.clone()
    second = LocalEngine().fit(shares(x, y, [20, 17]), made, start)
    assert torch.equal(start.weights, weights) and torch.equal(start.buffers, buffers)
    assert torch.equal(first.weights, kept) and torch.equal(first.weights, second.weights)


def test_a_fit_leaves_nothing_behind_in_the_process() -> None:
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    torch.set_num_threads(2)
    threads = threading.active_count()
    try:
        made, start = recipe(net(nn.Dropout()), 2, OPTIMIZERS["adam"], epochs=2)
        torch.set_rng_state(states[0])
        LocalEngine().fit(shares(*data(), [20, 17]), made, start)
        assert torch.get_num_threads() == 2 and threading.active_count() == threads
        assert torch.equal(torch.get_rng_state(), states[0])
        assert random.getstate() == states[1] and np.random.get_state()[1].tolist() == states[2]
    finally:
        torch.set_num_threads(1)


# ---- what goes wrong ------------------------------------------------------------------------------------------------------


class Broken(nn.Module):
    """Raises in the second step of the worker that has more than 18 rows."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(FEATURES, CLASSES), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 2 and len(x) > 18:
            raise KeyError("tower")  # the user's line
        return self.linear(x)


@pytest.mark.parametrize("counts", [[20, 17], [17, 20], [17, 0, 20]], ids=str)
def test_an_error_in_forward_arrives_with_the_users_traceback_and_none_of_our_frames(counts: list[int]) -> None:
    before = torch.get_rng_state()
    module = Broken()
    torch.set_rng_state(before)
    with pytest.raises(UserError) as info:
        fit(module, counts, OPTIMIZERS["adam"], epochs=3)
    message = str(info.value)
    assert message.startswith("Traceback (most recent call last)") and "# the user's line" in message
    assert "KeyError: 'tower'" in message and f"raised on rank {counts.index(20)}" in message
    assert "bigdl_lite/" not in message.replace("tests/", "")
    assert isinstance(info.value.__cause__, KeyError)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("part", ["loss", "optimizer", "scheduler"])
def test_an_error_in_any_other_part_of_the_users_arrives_too(part: str) -> None:
    def bad(*args: Any) -> Any:
        raise ZeroDivisionError("the user's part")

    settings: dict[str, Any] = {"loss": {"loss": bad}, "scheduler": {"advance": {"scheduler": bad}}}.get(part, {})
    with pytest.raises(UserError, match="ZeroDivisionError: the user's part"):
        fit(net(), [20, 17], bad if part == "optimizer" else OPTIMIZERS["adam"], **settings)


class Diverging(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(FEATURES, CLASSES), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(x) * (float("nan") if self.calls == 3 and len(x) > 18 else 1.0)


@pytest.mark.parametrize("counts", [[20, 17], [17, 20]], ids=str)
def test_a_loss_that_is_not_finite_names_step_and_rank(counts: list[int]) -> None:
    with pytest.raises(DivergedError, match=rf"loss is nan in step 2 on rank {counts.index(20)}"):
        fit(Diverging(), counts, OPTIMIZERS["adam"], epochs=5)


def test_our_own_errors_keep_their_kind() -> None:
    with pytest.raises(DataError, match="the module has 2 outputs"):
        fit(nn.Linear(FEATURES, 2), [20, 17], OPTIMIZERS["adam"])
    with pytest.raises(RecipeError, match="2 shares for 3 workers"):
        made, start = recipe(net(), 3, OPTIMIZERS["adam"])
        LocalEngine().fit(shares(*data(), [20, 17]), made, start)
    with pytest.raises(DataError, match="the DataFrame has no rows"):
        made, start = recipe(net(), 2, OPTIMIZERS["adam"])
        LocalEngine().fit([[], []], made, start)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"batch_size": 0}, "batchSize is 0"), ({"epochs": 0}, "epochs is 0"), ({"log_interval": 0}, "logInterval is 0"),
        ({"deadline": 0.0}, r"deadline is 0\.0 s"),
    ],
)  # fmt: skip
def test_a_recipe_that_cannot_work_is_refused_when_it_is_made(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        recipe(net(), 2, OPTIMIZERS["adam"], **settings)
    with pytest.raises(RecipeError, match="numWorkers is 0"):
        recipe(net(), 0, OPTIMIZERS["adam"])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_modules_of_other_dtypes_train_in_their_own(dtype: torch.dtype) -> None:
    x, y = data()
    made, start = recipe(net().to(dtype), 2, OPTIMIZERS["sgd momentum"], epochs=10)
    schema = pa.schema([("x", pa.list_(pa.float32())), ("y", pa.int64())])
    object.__setattr__(made, "columns", describe(schema, ["x"], "y", dtype))
    found = LocalEngine().fit(shares(x, y, [20, 17]), made, start)
    whole = net().to(dtype)
    optimizer = OPTIMIZERS["sgd momentum"](whole.parameters())
    for _ in range(10):
        optimizer.zero_grad()
        nn.CrossEntropyLoss()(whole(torch.from_numpy(x).to(dtype)), torch.from_numpy(y)).backward()
        optimizer.step()
    expected = torch.cat([p.detach().reshape(-1) for p in whole.parameters()])
    assert found.weights.dtype == dtype
    torch.testing.assert_close(found.weights, expected, rtol=0, atol=1e-12 if dtype == torch.float64 else 0.1)


def test_a_step_in_which_every_label_is_ignored_moves_nothing() -> None:
    loss, labels = nn.CrossEntropyLoss(ignore_index=99), torch.full((8,), 99)
    module = nn.Linear(3, 2)
    plan, weights, buffers, constants = blueprint(module)
    batch = pa.RecordBatch.from_pydict({"x": pa.array([[0.0, 1.0, 2.0]] * 8, pa.list_(pa.float32())), "y": labels.tolist()})
    columns = describe(batch.schema, ["x"], "y", torch.float32)
    rule = method("sync-sgd", TorchOptimizer(lambda p: SGD(p, lr=0.1), clip_norm=1.0))
    made = Recipe(plan, loss, rule, columns, 2, 4, 2)
    out = LocalEngine().fit([[batch.slice(0, 5)], [batch.slice(5)]], made, Start(weights, buffers, constants))
    assert torch.equal(out.weights, weights) and out.history[-1]["loss"] == 0.0
