"""A metric of torchmetrics as sums over rows.

    sums(batch) = state after update(batch) - state before any       flattened, all states one after the other

That is what torchmetrics itself adds up over processes, where it reduces a state by sum. Metrics with any other state
(lists of all rows, maxima, means) are refused, since no sum of theirs is that of all rows.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bigdl_lite.errors import DataError, RecipeError
from bigdl_lite.model.loss import squeeze
from bigdl_lite.model.sums import KINDS, kept, require_tensor

# what changes as a metric is used; all else says which metric it is
_RUNNING = {
    "update", "compute", "_update_signature", "_computed", "_forward_cache", "_update_count", "_update_called", "_cache",
    "_is_synced", "training",
}  # fmt: skip


def is_torchmetric(x: Any) -> bool:
    """Whether x is a torchmetrics.Metric; imports nothing, since whoever has one has torchmetrics."""
    library = sys.modules.get("torchmetrics")
    return library is not None and isinstance(x, library.Metric)


@dataclass(frozen=True, eq=False)
class TorchMetric:
    """A torchmetrics.Metric whose states are tensors that are summed.

    metric   it is copied and reset; its compute() must give one number
    name     not given: that of its class, "MulticlassF1Score" as "multiclass_f1_score"
    higher   whether more is better; None: what the metric says (higher_is_better)
    kind     what the output means: update() sees probabilities for all kinds of classifiers, because torchmetrics guesses
             from the values of a batch whether they are logits, and the value must not depend on batches. "plain": as it is

    Rows weigh 0 or 1, since torchmetrics does not weigh them. Compares by the metric's class and settings.
    Raises  RecipeError for other states, with their names; ImportError where torchmetrics is not installed.
    """

    metric: Any
    name: str = ""
    higher: bool | None = None
    kind: str = "plain"

    def __post_init__(self) -> None:
        _torchmetrics()
        if not is_torchmetric(self.metric):
            raise RecipeError(f"TorchMetric takes a torchmetrics.Metric, got {type(self.metric).__name__}")
        if self.kind not in KINDS:
            raise RecipeError(f"kind {self.kind!r} is not one of {KINDS}")
        _require_sums(self.metric)
        metric = self.metric.clone()
        metric.reset()
        # compute() would wait for the other processes of a torch.distributed group
        metric.sync_on_compute = metric._to_sync = False
        higher = metric.higher_is_better if self.higher is None else self.higher
        if higher is None:
            raise RecipeError(f"{_title(metric)} does not say whether more is better: TorchMetric(metric, higher=True) or False")
        for name, value in (("metric", metric), ("name", self.name or _snake(_title(metric))), ("higher", bool(higher))):
            object.__setattr__(self, name, value)  # frozen, and made complete here

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TorchMetric):
            return NotImplemented
        mine, its = ((x.name, x.higher, x.kind) for x in (self, other))
        return mine == its and _same(self.metric, other.metric)

    def __hash__(self) -> int:
        return hash((self.name, self.higher, self.kind, type(self.metric)))

    def sums(self, output: Any, target: Tensor, weight: Tensor) -> Tensor:
        """[k] float64, k the values of all states. Cost: a copy of the metric."""
        partial = weight[(weight != 0) & (weight != 1)]
        if len(partial):
            raise RecipeError(
                f"{_title(self.metric)} cannot weigh rows, and a row weighs {float(partial[0]):g}: take a metric of bigdl_lite, "
                "or leave out the column of weights"
            )
        output, target, weight = kept(squeeze(require_tensor(self.name, output), target), target, weight)
        metric = self._fresh(output.device)
        before = {name: state.clone() for name, state in _states(metric).items()}  # update() may add in place
        if not len(weight):
            return torch.zeros(sum(x.numel() for x in before.values()), dtype=torch.float64, device=output.device)
        metric.update(*self._seen(output, target))
        after = _states(metric)
        for name, state in before.items():
            now = after[name]
            if not isinstance(now, Tensor) or now.shape != state.shape:
                got = list(now.shape) if isinstance(now, Tensor) else type(now).__name__
                raise RecipeError(
                    f"{_title(metric)}: its state {name!r} has the shape {list(state.shape)} at first and {got} after "
                    "update, and a worker without rows cannot know that: give it its number of outputs or classes"
                )
        if not _same(metric, self.metric, without=set(before) | {"_device"}):
            raise RecipeError(f"{_title(metric)} keeps in update() what is not among its states {list(before)}, and would be lost")
        return torch.cat([(after[name].double() - before[name].double()).reshape(-1) for name in before])

    def value(self, sums: Tensor) -> float:
        metric = self._fresh(torch.device("cpu"))
        parts = sums.cpu().double().split([x.numel() for x in _states(metric).values()])
        for (name, state), part in zip(_states(metric).items(), parts, strict=True):
            total = state.double() + part.reshape(state.shape)
            setattr(metric, name, total if state.is_floating_point() else total.round().to(state.dtype))
        metric._update_count = 1  # or compute() warns that nothing came
        found = metric.compute()
        if isinstance(found, Tensor) and found.numel() == 1 and not found.is_complex():
            return float(found)
        if isinstance(found, int | float):
            return float(found)
        got = f"a tensor of shape {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise RecipeError(f"{_title(metric)} computes {got}, a metric must be one number (average='macro'?)")

    def _fresh(self, device: torch.device) -> Any:
        """A copy that sums in float64 where its states are floats; the counts stay integers."""
        metric = self.metric.clone().to(device)
        for name, state in _states(metric).items():
            if state.is_floating_point():
                setattr(metric, name, state.double())
        return metric

    def _seen(self, output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """What update() gets: probabilities and int64 labels, where it is a classifier's."""
        if self.kind == "plain":
            return output, target
        index = target.long()
        if bool((index != target).any()):
            wrong = target[index != target].reshape(-1)[0].item()
            raise DataError(f"metric {self.name!r}: the label {wrong:g} is not a class")
        as_probability = {
            "logits": lambda x: x.softmax(1), "log-probabilities": lambda x: x.exp(), "logit": lambda x: x.sigmoid(),
            "probability": lambda x: x,
        }  # fmt: skip
        return as_probability[self.kind](output), index


def _torchmetrics() -> Any:
    try:
        import torchmetrics
    except ImportError as error:
        raise ImportError("metrics of torchmetrics need it: pip install 'bigdl_lite[torchmetrics]'") from error
    return torchmetrics


def _title(metric: Any) -> str:
    return type(metric).__name__


def _snake(title: str) -> str:
    """"MulticlassF1Score" as "multiclass_f1_score", "BinaryAUROC" as "binary_auroc"."""
    starts = [i for i in range(1, len(title)) if title[i].isupper() and (title[i - 1].islower() or title[i + 1 : i + 2].islower())]
    return "_".join(title[a:b] for a, b in zip([0, *starts], [*starts, len(title)], strict=True)).lower()


def _states(metric: Any) -> dict[str, Any]:
    return {name: getattr(metric, name) for name in metric._defaults}


def _require_sums(metric: Any) -> None:
    """Raises RecipeError that names the first state which is not a tensor to be summed."""
    from torchmetrics.utilities.data import dim_zero_sum

    title = _title(metric)
    inside = [name for name, x in metric.named_modules() if name and is_torchmetric(x)]
    if inside or not metric._defaults:
        held = f"is made of other metrics ({inside[0]})" if inside else "has no states of its own"
        raise RecipeError(f"{title} {held}, so that there is nothing to sum: give the metrics inside one by one")
    for name, default in metric._defaults.items():
        rule = metric._reductions[name]
        if not isinstance(default, Tensor):
            raise RecipeError(
                f"{title} keeps all rows in its state {name!r}, a list, and workers exchange sums only: some metrics keep counts "
                "instead where they are given thresholds (BinaryAUROC(thresholds=200)); or take AUC() of bigdl_lite"
            )
        if rule is not dim_zero_sum:
            how = getattr(rule, "__name__", str(rule)).removeprefix("dim_zero_")
            raise RecipeError(
                f"{title} reduces its state {name!r} by {how}, and workers exchange sums only: take a metric whose states are sums"
            )
        if default.is_complex():
            raise RecipeError(f"{title}: its state {name!r} is of {default.dtype}, only real numbers are summed")


def _same(a: Any, b: Any, without: frozenset[str] | set[str] = frozenset()) -> bool:
    """Whether two metrics, or two values of their settings, are alike."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.cpu(), b.cpu())
    if isinstance(a, nn.Module):
        mine, its = ({k: v for k, v in x.__dict__.items() if k not in _RUNNING | without} for x in (a, b))
        return _same(mine, its)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)
