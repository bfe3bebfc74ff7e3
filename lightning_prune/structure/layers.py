"""How each kind of layer shrinks: which tensors hold its channels, along which dimension.

A layer has sides: `"in"` and `"out"`, or `"both"` where one channel goes in and comes out (normalisation,
depthwise convolutions). Positions along a side are what the dependency graph talks about; this module turns
the positions that stay into slices of tensors and new values of the layer's integer attributes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Slice(NamedTuple):
    """The positions of one dimension of one tensor that stay."""

    tensor: str
    dim: int
    kept: Tensor


@dataclass(frozen=True)
class Runs:
    """How a layer ties the positions of a side together.

    The side falls into `count` equal runs. `"balanced"`: every run keeps equally many. `"tied"`: every run
    keeps the same places. `"whole"`: a run goes or stays as one.
    """

    kind: str
    count: int


@dataclass(frozen=True)
class Layer:
    """What structural pruning knows of one kind of layer.

    Attributes:
        sides: The sides it has.
        width: Positions on a side.
        slices: The slices that keep some positions of a side.
        attributes: The integer attributes after so many positions of a side stay.
        runs: How the side's positions are tied, or None.
    """

    sides: tuple[str, ...]
    width: Callable[[Any, str], int]
    slices: Callable[[Any, str, Tensor], list[Slice]]
    attributes: Callable[[Any, str, int], dict[str, int | tuple[int, ...]]]
    runs: Callable[[Any, str], Runs | None] = lambda module, side: None


def _present(module: nn.Module, dim: int, kept: Tensor, *names: str) -> list[Slice]:
    return [Slice(name, dim, kept) for name in names if getattr(module, name, None) is not None]


def _conv_slices(conv: Any, side: str, kept: Tensor) -> list[Slice]:
    out_dim, in_dim = (1, 0) if conv.transposed else (0, 1)
    if side == "out":
        return [Slice("weight", out_dim, kept), *_present(conv, 0, kept, "bias")]
    if conv.groups > 1:  # the weight holds one run of input channels for all of them
        kept = torch.unique(kept % (conv.in_channels // conv.groups))
    return [Slice("weight", in_dim, kept)]


_CONVOLUTION = Layer(
    sides=("in", "out"),
    width=lambda conv, side: conv.in_channels if side == "in" else conv.out_channels,
    slices=_conv_slices,
    attributes=lambda conv, side, count: {"in_channels" if side == "in" else "out_channels": count},
    runs=lambda conv, side: (
        None if conv.groups == 1 else Runs("tied" if side == "in" else "balanced", conv.groups)
    ),
)

_DEPTHWISE = Layer(
    sides=("both",),
    width=lambda conv, side: conv.out_channels,
    slices=lambda conv, side, kept: [Slice("weight", 0, kept), *_present(conv, 0, kept, "bias")],
    attributes=lambda conv, side, count: {"in_channels": count, "out_channels": count, "groups": count},
)

_LINEAR = Layer(
    sides=("in", "out"),
    width=lambda linear, side: linear.in_features if side == "in" else linear.out_features,
    slices=lambda linear, side, kept: (
        [Slice("weight", 1, kept)]
        if side == "in"
        else [Slice("weight", 0, kept), *_present(linear, 0, kept, "bias")]
    ),
    attributes=lambda linear, side, count: {"in_features" if side == "in" else "out_features": count},
)

_CHANNEL_NORM = Layer(
    sides=("both",),
    width=lambda norm, side: norm.num_features,
    slices=lambda norm, side, kept: _present(norm, 0, kept, "weight", "bias", "running_mean", "running_var"),
    attributes=lambda norm, side, count: {"num_features": count},
)

_LAYER_NORM = Layer(
    sides=("both",),
    width=lambda norm, side: norm.normalized_shape[-1],
    slices=lambda norm, side, kept: _present(norm, len(norm.normalized_shape) - 1, kept, "weight", "bias"),
    attributes=lambda norm, side, count: {"normalized_shape": (*norm.normalized_shape[:-1], count)},
)

_GROUP_NORM = Layer(
    sides=("both",),
    width=lambda norm, side: norm.num_channels,
    slices=lambda norm, side, kept: _present(norm, 0, kept, "weight", "bias"),
    # A normalisation group goes whole, so that the statistics of the others stay what they were.
    attributes=lambda norm, side, count: {
        "num_channels": count,
        "num_groups": norm.num_groups * count // norm.num_channels if norm.num_groups > 1 else 1,
    },
    runs=lambda norm, side: Runs("whole", norm.num_groups) if norm.num_groups > 1 else None,
)

_PRELU = Layer(
    sides=("both",),
    width=lambda prelu, side: prelu.num_parameters,
    slices=lambda prelu, side, kept: [Slice("weight", 0, kept)] if prelu.num_parameters > 1 else [],
    attributes=lambda prelu, side, count: {"num_parameters": count} if prelu.num_parameters > 1 else {},
)

_EMBEDDING = Layer(
    sides=("both",),
    width=lambda embedding, side: embedding.embedding_dim,
    slices=lambda embedding, side, kept: [Slice("weight", 1, kept)],
    attributes=lambda embedding, side, count: {"embedding_dim": count},
)

_KINDS: tuple[tuple[type | tuple[type, ...], Layer], ...] = (
    (nn.modules.conv._ConvNd, _CONVOLUTION),
    (nn.Linear, _LINEAR),
    ((nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm), _CHANNEL_NORM),
    (nn.LayerNorm, _LAYER_NORM),
    (nn.GroupNorm, _GROUP_NORM),
    (nn.PReLU, _PRELU),
    (nn.Embedding, _EMBEDDING),
)

_ATTRIBUTES = (
    "in_channels",
    "out_channels",
    "groups",
    "in_features",
    "out_features",
    "num_features",
    "normalized_shape",
    "num_channels",
    "num_groups",
    "num_parameters",
    "embedding_dim",
)


def is_depthwise(module: nn.Module) -> bool:
    """Tell whether a convolution maps every channel to itself alone.

    Example:
        >>> is_depthwise(nn.Conv2d(8, 8, 3, groups=8)), is_depthwise(nn.Conv2d(8, 16, 3, groups=8))
        (True, False)
    """
    return (
        isinstance(module, nn.modules.conv._ConvNd)
        and 1 < module.groups == module.in_channels == module.out_channels
    )


def layer_of(module: nn.Module) -> Layer | None:
    """Return what is known of a module's kind, or None where structural pruning cannot cut it.

    Args:
        module: Any module.

    Returns:
        Its `Layer`, or None for an unknown kind, for a convolution whose transposed groups or channel
        multiplier have no slices of their own, and for parametrized layers.

    Example:
        >>> layer_of(nn.Linear(4, 2)).width(nn.Linear(4, 2), "in")
        4
        >>> layer_of(nn.ReLU()) is None
        True
    """
    if torch.nn.utils.parametrize.is_parametrized(module):
        return None
    if is_depthwise(module):
        return _DEPTHWISE
    if isinstance(module, nn.modules.conv._ConvNd) and module.groups > 1:
        multiplier = module.groups in (module.in_channels, module.out_channels)
        if module.transposed or multiplier:
            return None
    return next((layer for kinds, layer in _KINDS if isinstance(module, kinds)), None)


def attributes_of(module: nn.Module) -> dict[str, int | tuple[int, ...]]:
    """Read the attributes of a layer that follow its channels.

    Args:
        module: Any module.

    Returns:
        `{attribute: value}`, empty for kinds of layers that have none.

    Example:
        >>> attributes_of(nn.Linear(4, 2))
        {'in_features': 4, 'out_features': 2}
        >>> attributes_of(nn.ReLU())
        {}
    """
    if not any(isinstance(module, kinds) for kinds, _ in _KINDS):
        return {}
    values = {name: getattr(module, name) for name in _ATTRIBUTES if hasattr(module, name)}
    return {name: value if isinstance(value, int) else tuple(value) for name, value in values.items()}
