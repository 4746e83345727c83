"""The parts that synchronous SGD is made of, and that most other methods share.

    k  length of one slice
"""

from __future__ import annotations

import copy
import warnings
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bigdl_lite.algorithms.algorithm import State, Update, Work
from bigdl_lite.algorithms.state import Holding, Piece, check, join, restore, take, warn_of_settings
from bigdl_lite.batch import Batch
from bigdl_lite.errors import RecipeError
from bigdl_lite.model.layout import Span
from bigdl_lite.model.replica import Replica
from bigdl_lite.vector import Cut, aligned, overlap, slices, snap


@dataclass(frozen=True)
class Gradient:
    """The gradient of one batch, summed over its rows."""

    moves: ClassVar[bool] = False

    def batches(self, epoch: int) -> int:
        return 1

    def __call__(self, replica: Replica, batches: Sequence[Batch], work: Work) -> tuple[Update, float]:
        (batch,) = batches
        loss = replica.backward(batch, work.seed)
        return Update(replica.gradient, replica.weight(batch)), loss


@dataclass(frozen=True)
class Sum:
    """The sum of the updates and of their weights, in rank order.  Cost: p - 1 additions of k values, in place."""

    linear: bool = True

    def __call__(self, updates: Sequence[Update]) -> Update:
        total = updates[0].vector
        for update in updates[1:]:
            total.add_(update.vector)
        return Update(total, sum(update.weight for update in updates))


class Parameters(list[nn.Parameter]):
    """What an optimizer factory is called with: the trainable parameters in order, and by name in `named`.

        optimizer=lambda p: torch.optim.SGD([{"params": [p.named["head.weight"]], "lr": 0.1}, ...])
    """

    def __init__(self, named: dict[str, nn.Parameter]) -> None:
        super().__init__(named.values())
        self.named = named


OptimizerFactory = Callable[[Parameters], torch.optim.Optimizer]
SchedulerFactory = Callable[[torch.optim.Optimizer], Any]

# rules that treat every value alike, so that a slice may cut through a tensor; all others get whole tensors
_ELEMENTWISE = tuple(
    getattr(torch.optim, name)
    for name in ("SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adagrad", "Adadelta", "RMSprop", "Rprop", "ASGD")
)
_FUSED = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad)


@dataclass(frozen=True)
class TorchOptimizer:
    """Any torch optimizer, each owner advancing its slice: its state exists once in the cluster, not once a worker.

    Element-wise rules see their groups as a few long pieces of the flat vector, whatever the number of tensors. Rules
    that need whole tensors (LARS, Muon, Adafactor, a class of your own without `elementwise = True`) get them: cuts then fall
    between tensors.

    clip_norm    the global norm of the mean gradient, as torch.nn.utils.clip_grad_norm_
    clip_value   the largest magnitude of one value of it, as clip_grad_value_
    scheduler    made on each owner; stepped after every "step" or every "epoch"

    Source: the slice-wise optimizer is BigDL's (Dai et al., SoCC 2019, Alg. 2); today called ZeRO-1.
    """

    factory: OptimizerFactory
    scheduler: SchedulerFactory | None = None
    per: str = "epoch"
    clip_norm: float | None = None
    clip_value: float | None = None

    def __post_init__(self) -> None:
        if self.per not in ("step", "epoch"):
            raise RecipeError(f"schedulerInterval is {self.per!r}, must be 'step' or 'epoch'")
        for name, value in (("clipNorm", self.clip_norm), ("clipValue", self.clip_value)):
            if value is not None and not value > 0:
                raise RecipeError(f"{name} is {value}, must be above 0")

    @property
    def measures(self) -> bool:
        return self.clip_norm is not None

    def cuts(self, replica: Replica, p: int) -> list[Cut]:
        even, optimizer = slices(replica.layout.n, p), self._optimizer(replica)
        if not _elementwise(optimizer):
            return snap(even, [0, *(span.stop for span in replica.layout.parameters)])
        whole = (0, replica.layout.n)
        runs = [run for mine in _places(optimizer, _spans(replica)) for run, _ in _runs(mine, whole, False)]
        return _aligned(even, {start for start, _ in runs})

    def start(self, replica: Replica, cut: Cut) -> _Slice:
        return _Slice(self, self._optimizer(replica), replica, cut)

    def _optimizer(self, replica: Replica) -> torch.optim.Optimizer:
        named = {name: p for name, p in replica.module.named_parameters() if p.requires_grad}
        made = self.factory(Parameters(named))
        if not isinstance(made, torch.optim.Optimizer):
            raise RecipeError(f"the optimizer factory returned {type(made).__name__}, not a torch.optim.Optimizer")
        if isinstance(made, torch.optim.LBFGS | torch.optim.SparseAdam):
            raise RecipeError(f"{type(made).__name__} is not supported: it needs a closure or sparse gradients; take Adam or SGD")
        return made

    def check(self, replica: Replica) -> None:
        """Makes the optimizer and scheduler once, on the driver, so that a faulty factory is known before any job."""
        self.start(replica, (0, replica.layout.n))

    def check_state(self, replica: Replica, saved: State | None = None) -> None:
        """Raises CheckpointError where no checkpoint can hold the optimizer or scheduler, or where `saved` is of others."""
        held = self.start(replica, (0, replica.layout.n)).held
        take(held)
        if saved is not None:
            check(held, saved)
            warn_of_settings(held, saved)

    def join(self, states: Iterable[State]) -> State:
        return join(states)


class _Slice:
    """The optimizer of one slice: the user's own, its groups replaced by the pieces of them that fall into the cut."""

    def __init__(self, how: TorchOptimizer, optimizer: torch.optim.Optimizer, replica: Replica, cut: Cut) -> None:
        self.how, self.optimizer = how, optimizer
        whole = not _elementwise(optimizer)
        spans = _spans(replica)
        self.pieces: list[Piece] = []
        old = {key: value for key, value in optimizer.state.items() if isinstance(key, Tensor)}
        for p in old:
            del optimizer.state[p]
        own: dict[int, Any] = {}  # hyperparameters that are tensors: the factory may give the same ones to every owner
        for number, (group, mine) in enumerate(zip(optimizer.param_groups, _places(optimizer, spans), strict=True)):
            group.update({key: copy.deepcopy(value, own) for key, value in group.items() if isinstance(value, Tensor)})
            found = []
            for (start, stop), members in _runs(mine, cut, whole):
                if stop == start:
                    continue
                flat = replica.weights[start:stop]
                piece = nn.Parameter(members[0].data if whole else flat)
                _carry_state(optimizer, old, members, piece, start, stop, spans, whole)
                name = spans[id(members[0])].name if whole else str(start)
                self.pieces.append(Piece(piece, start, stop, number, name))
                found.append(piece)
            group["params"] = found
            if type(optimizer) in _FUSED and group.get("fused") is None and not group.get("foreach") and found:
                group["fused"] = _can_fuse(optimizer, group)
        self.scheduler = how.scheduler(optimizer) if how.scheduler else None
        if how.per == "step" and isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            raise RecipeError("ReduceLROnPlateau needs an epoch's loss: use schedulerInterval='epoch'")
        self.held = Holding(optimizer, self.scheduler, how.per, self.pieces, whole, cut, replica.layout)

    def measure(self, update: Update) -> float:
        if self.how.clip_norm is None:
            return 0.0
        mean = torch.linalg.vector_norm(update.vector, dtype=torch.float64) / (update.weight or 1.0)
        return float(mean) ** 2

    def step(self, update: Update, measured: float) -> None:
        vector = update.vector
        vector.div_(update.weight or 1.0)  # no row of the step counts (ignore_index): the gradient is zeros
        if self.how.clip_value is not None:
            vector.clamp_(-self.how.clip_value, self.how.clip_value)
        if self.how.clip_norm is not None:
            scale = self.how.clip_norm / (measured**0.5 + 1e-6)  # the 1e-6 is torch's
            if scale < 1.0:
                vector.mul_(scale)
        first = self.held.cut[0]
        for p, start, stop, *_ in self.pieces:
            p.grad = vector[start - first : stop - first].view(p.shape)
        if self.pieces:
            self.optimizer.step()
        self.end_step()

    def end_step(self) -> None:
        if self.scheduler is not None and self.how.per == "step":
            self._schedule(None)

    def end_epoch(self, loss: float) -> None:
        if self.scheduler is not None and self.how.per == "epoch":
            self._schedule(loss)

    def _schedule(self, loss: float | None) -> None:
        if isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            self.scheduler.step(loss)
            return
        with warnings.catch_warnings():
            # an owner of an empty slice never steps its optimizer, which the scheduler takes for a mistake
            warnings.filterwarnings("ignore", message="Detected call of .lr_scheduler.step")
            self.scheduler.step()

    def rates(self) -> list[float]:
        return [float(group.get("lr", float("nan"))) for group in self.optimizer.param_groups]

    def state(self) -> State:
        return take(self.held)

    def restore(self, state: State) -> None:
        restore(self.held, state)


def _elementwise(optimizer: torch.optim.Optimizer) -> bool:
    """Whether slices may cut through tensors: torch's own rules, and classes that say so with `elementwise = True`."""
    return type(optimizer) in _ELEMENTWISE or getattr(type(optimizer), "elementwise", False)


def _spans(replica: Replica) -> dict[int, Span]:
    return {id(p): span for p, span in zip(replica.parameters, replica.layout.parameters, strict=True)}


def _places(optimizer: torch.optim.Optimizer, spans: dict[int, Span]) -> list[list[tuple[int, int, nn.Parameter]]]:
    """Where the parameters of each group lie, in the order of the flat vector."""
    found = []
    for group in optimizer.param_groups:
        foreign = [p for p in group["params"] if id(p) not in spans]
        if foreign:
            raise RecipeError(
                f"the optimizer holds a parameter of shape {list(foreign[0].shape)} that is not one of the module's trainable "
                "parameters; build it from the parameters that the factory is called with"
            )
        places = ((spans[id(p)].start, spans[id(p)].stop, p) for p in group["params"])
        found.append(sorted(places, key=lambda place: place[:2]))  # tensors without values may share a place
    return found


def _aligned(even: list[Cut], starts: set[int]) -> list[Cut]:
    """The cuts, aligned from the start of the run of a group that each border falls into.

    A run is advanced in the same lanes of a kernel, and so to the same bits, however many owners have a part of it.
    """
    marks, edges = sorted({0, *starts}), [0]
    bounds = [*marks, even[-1][1]]
    for x, _ in even[1:]:
        i = bisect_right(marks, x)
        start, stop = bounds[i - 1], bounds[i]
        edges.append(start + aligned([(0, x - start), (x - start, stop - start)])[0][1])
    return list(pairwise([*edges, even[-1][1]]))


def _runs(
    mine: list[tuple[int, int, nn.Parameter]], cut: Cut, whole: bool
) -> list[tuple[Cut, list[nn.Parameter]]]:
    """The parts of one group inside the cut; neighbours in the flat vector are joined unless tensors must stay whole."""
    runs: list[tuple[Cut, list[nn.Parameter]]] = []
    for start, stop, p in mine:
        part = overlap((start, stop), cut)
        if part[0] == part[1]:
            continue
        if runs and not whole and runs[-1][0][1] == part[0]:
            (first, _), members = runs[-1]
            runs[-1] = ((first, part[1]), [*members, p])
        else:
            runs.append((part, [p]))
    return runs


def _carry_state(
    optimizer: torch.optim.Optimizer, old: dict[Any, dict[str, Any]], members: list[nn.Parameter], piece: nn.Parameter,
    start: int, stop: int, spans: dict[int, Any], whole: bool,
) -> None:  # fmt: skip
    """State that the constructor made (Adagrad does), cut in the same way as the parameters."""
    if not any(p in old for p in members):
        return
    state: dict[str, Any] = {}
    for key, value in old[members[0]].items():
        if isinstance(value, Tensor) and key != "step" and value.shape == members[0].shape and not whole:
            parts = []
            for p in members:
                a, b = overlap((spans[id(p)].start, spans[id(p)].stop), (start, stop))
                parts.append(old[p][key].reshape(-1)[a - spans[id(p)].start : b - spans[id(p)].start])
            state[key] = torch.cat(parts)
        else:
            state[key] = copy.deepcopy(value)
    optimizer.state[piece] = state


def _can_fuse(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> bool | None:
    """Whether torch has a one-pass kernel for this rule on this device: found out by trying it on one value."""
    first = group["params"][0]
    if first.device.type == "cpu" and first.dtype not in (torch.float32, torch.float64):
        # torch 2.13 on a CPU: fused SGD in bfloat16 and float16, and fused Adam in float16, compute other numbers
        return group.get("fused")
    try:
        probe = nn.Parameter(torch.zeros(1, dtype=first.dtype, device=first.device))
        trial = type(optimizer)([probe], lr=1e-3, fused=True)
        probe.grad = torch.zeros_like(probe)
        trial.step()
    except (RuntimeError, TypeError, ValueError):
        return group.get("fused")
    return True
