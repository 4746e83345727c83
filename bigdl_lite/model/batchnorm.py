"""Batch normalisation over the rows of all workers, as if they stood in one batch.

    mean = S1 / N     var = S2 / N - mean^2        S1, S2, N  sums of x and x^2 per channel, and their count, over all ranks

torch's own SyncBatchNorm needs GPUs and a default process group; this one takes any function that sums a small tensor
over the ranks, in forward and again in backward. Sums are kept in float64.

Source: Ioffe and Szegedy, "Batch Normalization", ICML 2015; gradient of the synchronised form as in torch.nn.SyncBatchNorm.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

AllReduce = Callable[[Tensor], Tensor]


class SyncBatchNorm(_BatchNorm):
    """A BatchNorm of any dimension whose statistics are of the whole batch. `all_reduce` is set by the engine, per rank."""

    all_reduce: AllReduce | None = None

    def _check_input_dim(self, input: Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"batch normalisation takes [rows, channels, ...], got {list(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        if not (self.training or self.running_mean is None):
            return super().forward(input)
        dims = [d for d in range(input.ndim) if d != 1]
        count = torch.tensor([input.numel() / max(1, input.shape[1])], dtype=torch.float64)
        x = input.double()
        sums = torch.cat([x.sum(dims), (x * x).sum(dims), count.to(x.device)])
        total = _Sum.apply(sums, self.all_reduce)
        c = input.shape[1]
        n = total[-1].clamp(min=1)
        mean, var = total[:c] / n, total[c : 2 * c] / n - (total[:c] / n) ** 2
        if self.training and self.running_mean is not None:
            with torch.no_grad():
                self.num_batches_tracked.add_(1)
                a = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), a)
                self.running_var.lerp_((var * n / (n - 1).clamp(min=1)).to(self.running_var.dtype), a)
        shape = [1, c] + [1] * (input.ndim - 2)
        out = (x - mean.view(shape)) * (var + self.eps).rsqrt().view(shape)
        out = out.to(input.dtype)
        return out if self.weight is None else out * self.weight.view(shape) + self.bias.view(shape)


class _Sum(torch.autograd.Function):
    """y = the sum of x over ranks; so dL/dx = the sum of dL/dy over ranks, L being the sum of the ranks' losses."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, all_reduce: AllReduce | None) -> Tensor:
        ctx.all_reduce = all_reduce
        return all_reduce(x) if all_reduce else x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return (ctx.all_reduce(grad.contiguous()) if ctx.all_reduce else grad), None


def synchronised(module: nn.Module, made: dict[nn.Module, nn.Module] | None = None) -> nn.Module:
    """The module with every BatchNorm1d, 2d and 3d replaced by a SyncBatchNorm that shares its parameters and buffers.

    In place, unless the module is a BatchNorm itself. made holds what has been replaced: one layer may stand in two places.
    """
    made = {} if made is None else made
    if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):  # a subclass may do something else
        if module not in made:
            new = SyncBatchNorm(module.num_features, module.eps, module.momentum, module.affine, module.track_running_stats)
            new.weight, new.bias = module.weight, module.bias
            new.running_mean, new.running_var = module.running_mean, module.running_var
            new.num_batches_tracked = module.num_batches_tracked
            new.training = module.training
            made[module] = new
        return made[module]
    for name, child in list(module._modules.items()):
        if child is not None:
            setattr(module, name, synchronised(child, made))
    return module


def connect(module: nn.Module, all_reduce: AllReduce) -> None:
    """Gives every SyncBatchNorm of a replica the function that sums over its ranks."""
    for m in module.modules():
        if isinstance(m, SyncBatchNorm):
            m.all_reduce = all_reduce
