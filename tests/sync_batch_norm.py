"""torch's own SyncBatchNorm on CPU tensors: the values it sends, their
order and their dtype can be tested without a GPU. Only the operators that torch has on GPUs alone
are replaced here by their formulas (Ioffe and Szegedy, arXiv 1502.03167, Algorithm 1).
"""

from __future__ import annotations

from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def _moments(x: Tensor) -> Tensor:
    """[C, values per channel] in float32 at least, as on a GPU."""
    x = x.transpose(0, 1).flatten(1)
    return x if x.dtype == torch.float64 else x.float()


def _per_channel(v: Tensor, x: Tensor) -> Tensor:
    return v.view(1, -1, *[1] * (x.dim() - 2))


def batch_norm_stats(x: Tensor, eps: float):
    values = _moments(x)
    return values.mean(1), (values.var(1, correction=0) + eps).rsqrt()


def batch_norm_gather_stats_with_counts(
    x: Tensor, mean, invstd, running_mean, running_var, momentum: float, eps: float, counts
):
    """From each rank's mean, invstd [R, C] and counts [R]. R = 0 gives a mean of 0 and decaying
    running statistics, one value in all a running variance of NaN, both as on a GPU."""
    n = counts.sum()
    share = counts[:, None] / n
    total = (share * mean).sum(0)
    var = (share * (invstd**-2 - eps + (mean - total) ** 2)).sum(0)
    if running_mean is not None:
        running_mean.lerp_(total.to(running_mean.dtype), momentum)
        running_var.lerp_((var * n / (n - 1)).to(running_var.dtype), momentum)
    return total, (var + eps).rsqrt()


def batch_norm_elemt(x: Tensor, weight, bias, mean, invstd, eps: float):
    y = (x - _per_channel(mean, x)) * _per_channel(invstd * weight, x) + _per_channel(bias, x)
    return y.to(x.dtype)


def batch_norm_backward_reduce(dy: Tensor, x: Tensor, mean, invstd, weight, *wanted: bool):
    g, centred = _moments(dy), _moments(x) - mean[:, None]
    sum_dy, sum_dy_xmu = g.sum(1), (g * centred).sum(1)
    return sum_dy, sum_dy_xmu, sum_dy_xmu * invstd, sum_dy


def batch_norm_backward_elemt(
    dy: Tensor, x: Tensor, mean, invstd, weight, sum_dy, sum_dy_xmu, counts
):
    n = counts.sum()
    centred = x - _per_channel(mean, x)
    projection = centred * _per_channel(invstd**2 * sum_dy_xmu / n, x)
    dx = (dy - _per_channel(sum_dy / n, x) - projection) * _per_channel(invstd * weight, x)
    return dx.to(x.dtype)


def serve_on_cpu() -> torch.library.Library:
    """Lets torch.nn.SyncBatchNorm run on CPU tensors in this process, also inside
    DistributedDataParallel, as long as the result lives."""
    library = torch.library.Library("aten", "IMPL", "CPU")
    for kernel in (
        batch_norm_stats,
        batch_norm_gather_stats_with_counts,
        batch_norm_elemt,
        batch_norm_backward_reduce,
        batch_norm_backward_elemt,
    ):
        library.impl(kernel.__name__, kernel)
    forward = nn.SyncBatchNorm.forward

    def forward_on_cpu(self, x: Tensor) -> Tensor:
        # The check of the device lets CUDA, XPU and the device of an extension pass, by its name.
        with mock.patch("torch._C._get_privateuse1_backend_name", return_value="cpu"):
            return forward(self, x)

    nn.SyncBatchNorm.forward = forward_on_cpu
    DistributedDataParallel._passing_sync_batchnorm_handle = lambda self, module: None
    return library
