"""Estimating the statistics of batch normalisation anew, after channels are gone.

A cut changes what layers get to see, and running statistics follow only slowly. As in PyTorch's `swa_utils`,
they become the plain mean over some batches; but nothing else of the network is in training mode meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.cost import copied, eval_mode

_Norm = nn.modules.batchnorm._BatchNorm


def running_norms(module: nn.Module) -> dict[str, Any]:
    """List the batch normalisations that keep running statistics and are in training mode.

    Those that the user froze by `eval()` have statistics of their own choice.

    Example:
        >>> list(running_norms(nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2).eval())))
        ['0']
    """
    norms = {n: m for n, m in module.named_modules() if isinstance(m, _Norm) and m.training}
    return {name: norm for name, norm in norms.items() if norm.running_mean is not None}


@torch.no_grad()
def recalibrate(
    module: nn.Module,
    runs: Iterable[Callable[[nn.Module], object]],
    mean: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> int:
    """Estimate the running mean and variance of batch normalisation from some batches.

    The network runs on a copy, in eval mode but for these layers. They become the mean of the batches' means
    and unbiased variances; nothing else of the network changes.

    Args:
        module: The network, in the modes it trains in.
        runs: One for each batch: runs the network it is given on it.
        mean: Averages a tensor over ranks.

    Returns:
        With how many batches; 0 if there is none, or nothing to estimate.

    Example:
        >>> norm, x = nn.BatchNorm1d(1), torch.tensor([[1.0], [3.0]])
        >>> recalibrate(norm, [lambda net: net(x)])
        1
        >>> norm.running_mean, norm.running_var
        (tensor([2.]), tensor([2.]))
    """
    originals = running_norms(module)
    if not originals:
        return 0
    twin = copied(module)
    norms = {name: _fresh(twin.get_submodule(name)) for name in originals}
    batches = 0
    with eval_mode(twin):
        for norm in norms.values():
            norm.training = True
        for run in runs:
            run(twin)
            batches += 1
    for name, original in originals.items():
        ran = bool(norms[name].num_batches_tracked)
        for statistic in ("running_mean", "running_var"):
            estimate = getattr(norms[name] if ran else original, statistic)
            getattr(original, statistic).copy_(mean(estimate))
    return batches


def _fresh(norm: Any) -> Any:
    norm.reset_running_stats()
    norm.momentum = None  # the plain mean over all batches
    if isinstance(norm, nn.SyncBatchNorm):
        # Every rank looks at its own batches; what they find is averaged at the end.
        vars(norm)["forward"] = partial(_Norm.forward, norm)
    return norm
