"""The oracle for structural cuts: the dense network with the removed channels masked at their consumers.

It knows nothing of groups or graphs: all it reads is which positions of which tensors a `Change` kept.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune.structure.surgery import Change

# A weight under weight_norm, and under parametrizations of one tensor.
COMPUTED = ("parametrizations.weight.original1", "parametrizations.weight.original")


def gone(change: Change, name: str, dim: int, width: int) -> Tensor | None:
    for d, kept in change.kept.get(name, ()):
        if d == dim:
            mask = torch.ones(width, dtype=torch.bool)
            mask[kept] = False
            return mask
    return None


def masked(dense: nn.Module, change: Change) -> nn.Module:
    """Copy a network, zero the weights that read removed channels, and keep those out of norms."""
    net = copy.deepcopy(dense).eval()  # in training mode, reading a spectrally normed weight changes it
    names = dict(net.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for name, layer in net.named_modules():
            prefix = f"{name}." if name else ""
            if isinstance(layer, (nn.modules.conv._ConvNd, nn.Linear)):
                dim = 0 if getattr(layer, "transposed", False) else 1
                label = next(n for n in ("weight", "weight_v", *COMPUTED) if f"{prefix}{n}" in names)
                read = gone(change, f"{prefix}{label}", dim, layer.weight.shape[dim])
                if read is not None and label == "weight":
                    layer.weight.index_fill_(dim, read.nonzero().flatten(), 0.0)
                elif read is not None:  # a weight that is computed cannot be written: its input is masked
                    layer.register_forward_pre_hook(_input_without(read, isinstance(layer, nn.Linear)))
            elif isinstance(layer, (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)):
                for label, weight in layer.named_parameters(recurse=False):
                    read = (
                        gone(change, f"{prefix}{label}", 1, weight.shape[-1]) if weight.dim() == 2 else None
                    )
                    if read is not None:
                        weight.index_fill_(1, read.nonzero().flatten(), 0.0)
            elif isinstance(layer, (nn.LayerNorm, nn.RMSNorm)) or (
                isinstance(layer, nn.GroupNorm) and layer.num_groups == 1
            ):
                lost = gone(change, f"{prefix}weight", 0, layer.weight.numel())
                if lost is not None:
                    layer.forward = _norm_without(layer, ~lost)
    return net


def _input_without(read: Tensor, last: bool):
    def hook(layer, inputs):
        return inputs[0].index_fill(-1 if last else 1, read.nonzero().flatten(), 0.0)

    return hook


def _norm_without(layer: nn.Module, stay: Tensor):
    kinds = (nn.LayerNorm.forward, nn.RMSNorm.forward)
    own = type(layer).forward not in kinds

    def forward(x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        # A user's own LayerNorm normalises the second dimension only if the last is not as wide.
        first = isinstance(layer, nn.GroupNorm) or (own and x.shape[-1] != len(stay))
        if first:
            rows = x[:, stay]
            if isinstance(layer, nn.GroupNorm):
                y = F.group_norm(rows, 1, layer.weight[stay], layer.bias[stay], layer.eps)
            else:
                y = rows.movedim(1, -1)
                y = F.layer_norm(y, y.shape[-1:], layer.weight[stay], layer.bias[stay], layer.eps)
                y = y.movedim(-1, 1)
            return out.index_copy(1, stay.nonzero().flatten(), y)
        rows = x[..., stay]
        if isinstance(layer, nn.RMSNorm):
            return out.index_copy(
                -1, stay.nonzero().flatten(), F.rms_norm(rows, rows.shape[-1:], layer.weight[stay], layer.eps)
            )
        y = F.layer_norm(rows, rows.shape[-1:], layer.weight[stay], layer.bias[stay], layer.eps)
        return out.index_copy(-1, stay.nonzero().flatten(), y)

    return forward


def leaves(out) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(out) if isinstance(leaf, Tensor)]


def distance(left, right) -> float:
    worst = 0.0
    for a, b in zip(leaves(left), leaves(right), strict=True):
        a, b = a.detach(), b.detach()
        assert a.shape == b.shape
        worst = max(worst, float((a - b).abs().max() / a.abs().max().clamp_min(1e-12)))
    return worst


def assert_the_same(dense: nn.Module, cut: nn.Module, change: Change, x: Tensor) -> None:
    """Outputs in eval and train mode, gradients and running statistics agree, in float64."""
    x = x.double() if x.is_floating_point() else x
    reference = masked(dense, change)
    for training in (False, True):
        reference.train(training)
        cut.train(training)
        expected, actual = reference(x), cut(x)
        assert distance(expected, actual) < 1e-9, "train" if training else "eval"
    for net, out in ((reference, expected), (cut, actual)):
        net.zero_grad()
        sum((leaf.square().sum() for leaf in leaves(out)), torch.zeros(())).backward()
    wanted = dict(reference.named_parameters())
    for name, parameter in cut.named_parameters():
        if wanted[name].grad is None:
            assert parameter.grad is None or not parameter.grad.any()
            continue
        if name.endswith(("original0", "original1")):
            continue  # of a shorter direction, other changes are changes of length
        grad = change.narrow(name, wanted[name].grad)
        assert parameter.grad is not None, name
        assert distance(grad + 1e-6, parameter.grad + 1e-6) < 1e-6, name
    buffers = dict(reference.named_buffers())
    for name, buffer in cut.named_buffers():
        if buffer.is_floating_point():
            assert distance(change.narrow(name, buffers[name]), buffer) < 1e-9, name
