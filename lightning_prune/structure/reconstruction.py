"""Fitting the layers that read what goes, so that they give about what they gave.

What a channel said can be told in part from the channels that stay. By least squares over some batches, the
weights on the channels that stay take over what they can (He et al. 2017, "Channel Pruning for Accelerating
Very Deep Neural Networks", arXiv:1707.06168, equation 1, with the channels chosen before).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune.cost import copied, eval_mode
from lightning_prune.structure.surgery import Change

# A matrix of as many rows and columns takes a quarter of a gigabyte.
_MOST_INPUTS = 8192
# How many inputs of a layer's are looked at in a batch.
_MOST_ROWS = 8192
# By how much of their mean square the inputs that stay are taken to be noisy, at least.
_NOISE = 1e-3


@dataclass(frozen=True)
class Fit:
    """How the inputs of a layer that go are told from those that stay.

    Attributes:
        told: Shape (inputs, inputs that stay), of a weight made flat from its second dimension: what there
            was is about `told` times what stays. On the CPU, of double precision.
        offset: Shape (inputs,): what is to be added, for layers with a bias.
    """

    told: Tensor
    offset: Tensor


class _Inputs:
    """Adds up the inputs of one layer, and their products with each other."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        weight = layer.get_parameter("weight")
        width = weight[0].numel()
        self.count = torch.zeros((), device=weight.device)
        self.total = torch.zeros(width, device=weight.device)
        self.products = torch.zeros(width, width, device=weight.device)

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        # Autocast would lose what the products differ by.
        with torch.autocast(self.total.device.type, enabled=False):
            rows = _rows(layer, inputs[0].detach().float())
            self.products += rows.T @ rows
        self.total += rows.sum(0)
        self.count += len(rows)


def fits(
    module: nn.Module,
    change: Change,
    runs: Iterable[Callable[[nn.Module], object]],
    mean: Callable[[Tensor], Tensor] = lambda tensor: tensor,
) -> dict[str, Fit]:
    """Learn, before a cut, how to tell what goes from what stays.

    The network runs on a copy, in eval mode; nothing of it changes.

    Args:
        module: The network as it is before the cut.
        change: The cut.
        runs: One for each batch: runs the network it is given on it.
        mean: Averages a tensor over ranks.

    Returns:
        `{layer: how}`, of the convolutions and linear layers that lose inputs. Convolutions with groups and
        transposed ones, and layers with over 8,192 inputs or with weights that are shared or computed, are
        not named.

    Example:
        >>> net = nn.Sequential(nn.Identity(), nn.Linear(2, 1, bias=False))
        >>> change = Change({"1.weight": ((1, torch.tensor([0])),)})
        >>> x = torch.tensor([[1.0, 2.0], [2.0, 4.0]]).repeat(99, 1)
        >>> fits(net, change, [lambda net: net(x)])["1"].told.float().round(decimals=1)
        tensor([[1.],
                [2.]])
    """
    names = _readers(module, change)
    if not names:
        return {}
    twin = copied(module)
    seen = {name: _Inputs(twin.get_submodule(name)) for name in names}
    for name, inputs in seen.items():
        twin.get_submodule(name).register_forward_pre_hook(inputs)
    with torch.no_grad(), eval_mode(twin):
        for run in runs:
            run(twin)
        # All are averaged, also those that no batch of this rank came by: the other ranks wait for it.
        found = {name: _solved(inputs, names[name], mean) for name, inputs in seen.items()}
    return {name: fit for name, fit in found.items() if fit is not None}


@torch.no_grad()
def rewritten(layer: nn.Module, change: Change, name: str, fit: Fit) -> dict[str, Tensor]:
    """Work out a layer's weight and bias after a cut, on the CPU.

    Args:
        layer: The layer before the cut.
        change: The cut.
        name: The layer's qualified name.
        fit: How what goes is told from what stays.

    Returns:
        `{"weight": tensor}`, and the bias if it has one, in their shapes after the cut.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> layer.weight.data = torch.tensor([[1.0, 1.0]])
        >>> change = Change({"fc.weight": ((1, torch.tensor([0])),)})
        >>> fit = Fit(torch.tensor([[1.0], [2.0]]).double(), torch.zeros(2).double())
        >>> rewritten(layer, change, "fc", fit)
        {'weight': tensor([[3.]])}
    """
    weight, bias = layer.get_parameter("weight"), getattr(layer, "bias", None)
    flat = weight.detach().cpu().double().flatten(1)
    rows = [kept for dim, kept in change.kept[f"{name}.weight"] if dim == 0]
    narrow = change.narrow(f"{name}.weight", weight.detach())
    outputs = flat @ fit.told
    for kept in rows:
        outputs = outputs[kept.cpu()]
    found = {"weight": outputs.to(weight.dtype).view(narrow.shape)}
    if bias is not None:
        moved = bias.detach().cpu().double() + flat @ fit.offset
        found["bias"] = change.narrow(f"{name}.bias", moved.to(bias.dtype))
    return found


def _readers(module: nn.Module, change: Change) -> dict[str, Tensor]:
    """List the layers that lose inputs and can be fitted: `{layer: positions of the inputs that stay}`."""
    tensors = dict(module.named_parameters(remove_duplicate=False))
    uses = Counter(map(id, tensors.values()))
    found = {}
    for tensor, slices in change.kept.items():
        name, _, last = tensor.rpartition(".")
        inputs = [kept for dim, kept in slices if dim == 1]
        if last != "weight" or not inputs or uses[id(tensors.get(tensor))] != 1:
            continue
        layer = module.get_submodule(name)
        if type(layer) not in (nn.Linear, nn.Conv1d, nn.Conv2d) or getattr(layer, "groups", 1) != 1:
            continue
        if tensors[tensor][0].numel() <= _MOST_INPUTS:
            found[name] = inputs[0]
    return found


def _rows(layer: nn.Module, x: Tensor) -> Tensor:
    """Lay out what a layer's weights are multiplied with: shape (places, inputs)."""
    if isinstance(layer, nn.Linear):
        rows = x.reshape(-1, x.shape[-1])
        return rows[:: -(-len(rows) // _MOST_ROWS) or 1]
    assert isinstance(layer, (nn.Conv1d, nn.Conv2d))
    kernel, stride, dilation = layer.kernel_size, layer.stride, layer.dilation
    if x.dim() == len(kernel) + 1:
        x = x[None]
    x = F.pad(x, _padding(layer), mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)
    if len(kernel) == 1:
        x, kernel, stride, dilation = x[:, :, None], (1, *kernel), (1, *stride), (1, *dilation)
    places = [
        (size - d * (k - 1) - 1) // s + 1
        for size, k, s, d in zip(x.shape[2:], kernel, stride, dilation, strict=True)
    ]
    apart = 1
    while len(x) * _number(places, apart) > _MOST_ROWS and apart < max(places):
        apart += 1
    stride = tuple(s * min(apart, n) for s, n in zip(stride, places, strict=True))
    return F.unfold(x, kernel, dilation, 0, stride).transpose(1, 2).flatten(0, 1)


def _number(places: list[int], apart: int) -> int:
    """Count the places that are left if only every so-many-th of each dimension is looked at."""
    rows, columns = (-(-n // apart) for n in places)
    return rows * columns


def _padding(layer: nn.Conv1d | nn.Conv2d) -> list[int]:
    """Say how a convolution pads its input, as `F.pad` wants it: the last dimension first."""
    amounts: list[int] = []
    for i in reversed(range(len(layer.kernel_size))):
        if isinstance(layer.padding, str):
            total = layer.dilation[i] * (layer.kernel_size[i] - 1) if layer.padding == "same" else 0
            amounts += [total // 2, total - total // 2]
        else:
            amounts += [layer.padding[i]] * 2
    return amounts


def _solved(inputs: _Inputs, channels: Tensor, mean: Callable[[Tensor], Tensor]) -> Fit | None:
    count, total, products = (
        mean(sums).cpu().double() for sums in (inputs.count, inputs.total, inputs.products)
    )
    if not count:
        return None
    average, products = total / count, products / count
    layer = inputs.layer
    biased = getattr(layer, "bias", None) is not None
    if biased:
        products = products - torch.outer(average, average)
    width = len(average) // layer.get_parameter("weight").shape[1]
    kept = (channels.cpu()[:, None] * width + torch.arange(width)).flatten()
    stays = torch.zeros(len(average), dtype=torch.bool)
    stays[kept] = True
    known = products[kept][:, kept]
    # What is told from few samples is no more than a guess.
    noise = (_NOISE + len(kept) / count) * known.diagonal().mean().clamp_min(1e-12)
    known = known + noise * torch.eye(len(kept), dtype=known.dtype)
    told = torch.zeros(len(average), len(kept), dtype=products.dtype)
    told[kept, torch.arange(len(kept))] = 1.0
    told[~stays] = torch.linalg.solve(known, products[kept][:, ~stays]).T
    offset = average - told @ average[kept] if biased else torch.zeros_like(average)
    return Fit(told, offset)
