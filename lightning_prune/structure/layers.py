"""The integer attributes by which layers know their own width, and what they become when channels go."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

Shapes = Mapping[str, tuple[int, ...]]
Attributes = dict[str, int | tuple[int, ...]]


def _convolution(conv: Any, shapes: Shapes) -> Attributes:
    first, second = shapes["weight"][:2]
    if conv.groups > 1 and conv.groups == conv.in_channels:  # whole groups went
        multiplier = conv.out_channels // conv.groups
        groups = first if conv.transposed else first // multiplier
        return {"in_channels": groups, "out_channels": groups * multiplier, "groups": groups}
    if conv.transposed:
        return {"in_channels": first, "out_channels": second * conv.groups}
    return {"in_channels": second * conv.groups, "out_channels": first}


def _linear(linear: Any, shapes: Shapes) -> Attributes:
    out_features, in_features = shapes["weight"]
    return {"in_features": in_features, "out_features": out_features}


def _width(*names: str) -> Callable[[Shapes], int]:
    return lambda shapes: next(shapes[name][-1] for name in names if name in shapes)


_NORM_WIDTH = _width("weight", "running_mean", "#")


def _group_norm(norm: Any, shapes: Shapes) -> Attributes:
    channels = _NORM_WIDTH(shapes)
    # A normalisation group goes whole, so that the statistics of the others stay what they were.
    groups = norm.num_groups * channels // norm.num_channels if norm.num_groups > 1 else 1
    return {"num_channels": channels, "num_groups": groups}


def _recurrent(rnn: Any, shapes: Shapes) -> Attributes:
    hidden = shapes["weight_hh_l0"][1]
    sizes: Attributes = {"input_size": shapes["weight_ih_l0"][1], "hidden_size": hidden}
    if getattr(rnn, "proj_size", 0):
        sizes.update(hidden_size=shapes["weight_hr_l0"][1], proj_size=hidden)
    return sizes


def _attention(attention: Any, shapes: Shapes) -> Attributes:
    packed = "in_proj_weight" in shapes
    rows, embed = shapes["in_proj_weight" if packed else "q_proj_weight"]
    heads = (rows // 3 if packed else rows) // attention.head_dim
    others = (embed, embed) if packed else (shapes["k_proj_weight"][1], shapes["v_proj_weight"][1])
    return {"embed_dim": embed, "kdim": others[0], "vdim": others[1], "num_heads": heads}


def _bilinear(bilinear: Any, shapes: Shapes) -> Attributes:
    out, first, second = shapes["weight"]
    return {"in1_features": first, "in2_features": second, "out_features": out}


def _recurrent_cell(cell: Any, shapes: Shapes) -> Attributes:
    return {"input_size": shapes["weight_ih"][1], "hidden_size": shapes["weight_hh"][1]}


_KINDS: tuple[tuple[Any, tuple[str, ...], Callable[[Any, Shapes], Attributes]], ...] = (
    (nn.modules.conv._ConvNd, ("in_channels", "out_channels", "groups"), _convolution),
    (nn.Linear, ("in_features", "out_features"), _linear),
    (
        (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm),
        ("num_features",),
        lambda norm, shapes: {"num_features": _NORM_WIDTH(shapes)},
    ),
    (
        (nn.LayerNorm, nn.RMSNorm),
        ("normalized_shape",),
        lambda norm, shapes: {"normalized_shape": (*norm.normalized_shape[:-1], _NORM_WIDTH(shapes))},
    ),
    (nn.GroupNorm, ("num_channels", "num_groups"), _group_norm),
    (nn.PReLU, ("num_parameters",), lambda prelu, shapes: {"num_parameters": shapes["weight"][0]}),
    (
        (nn.Embedding, nn.EmbeddingBag),
        ("num_embeddings", "embedding_dim"),
        lambda table, shapes: {"num_embeddings": shapes["weight"][0], "embedding_dim": shapes["weight"][1]},
    ),
    (nn.Bilinear, ("in1_features", "in2_features", "out_features"), _bilinear),
    (nn.RNNBase, ("input_size", "hidden_size", "proj_size"), _recurrent),
    (nn.MultiheadAttention, ("embed_dim", "kdim", "vdim", "num_heads"), _attention),
    (nn.RNNCellBase, ("input_size", "hidden_size"), _recurrent_cell),
)


def attributes_of(module: nn.Module) -> Attributes:
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
    names = next((names for kinds, names, _ in _KINDS if isinstance(module, kinds)), ())
    values = {
        name: getattr(module, name) for name in (*names, *dense_widths(module)) if hasattr(module, name)
    }
    return {name: value if isinstance(value, int) else tuple(value) for name, value in values.items()}


def own_widths(module: nn.Module) -> dict[str, int | list[int] | tuple[int, ...]]:
    """List the attributes of a user's module that may hold widths: whole numbers, and lists of them.

    Args:
        module: Any module; most of PyTorch's own have none but those that `attributes_of` knows.

    Returns:
        `{attribute: value}`, as they stand in the module.

    Example:
        >>> attention = type("Attention", (nn.Module,), {"__module__": "mine"})()
        >>> attention.num_heads, attention.scale = 4, 0.5
        >>> own_widths(attention)
        {'num_heads': 4}
    """
    theirs = type(module).__module__.startswith(("torch.", "lightning_prune."))
    if theirs and not isinstance(module, (nn.Transformer, nn.Unflatten)):
        return {}
    known = next((names for kinds, names, _ in _KINDS if isinstance(module, kinds)), ())
    return {n: v for n, v in vars(module).items() if n not in known and n != _DENSE and _is_width(v)}


def _is_width(value: Any) -> bool:
    if type(value) in (list, tuple):
        return 0 < len(value) <= 64 and all(type(item) is int for item in value)
    return type(value) is int


_DENSE = "_dense_widths"


def dense_widths(module: nn.Module) -> Attributes:
    """Return the dense values of the user's own attributes that cuts have changed in a module.

    Example:
        >>> dense_widths(nn.Linear(1, 1))
        {}
    """
    remembered: Attributes = vars(module).get(_DENSE, {})
    return remembered


def may_hold(module: nn.Module, attribute: str) -> bool:
    """Tell whether an attribute of a module is one that a cut could have changed.

    Example:
        >>> may_hold(nn.Linear(4, 2), "in_features"), may_hold(nn.Linear(4, 2), "bias")
        (True, False)
    """
    return attribute in attributes_of(module) or attribute in own_widths(module)


def write(module: nn.Module, values: Mapping[str, int | tuple[int, ...]]) -> None:
    """Set attributes of a layer; of the user's own, remember the dense value.

    Args:
        module: The layer.
        values: `{attribute: value}`; a list stays a list.

    Example:
        >>> layer = nn.Linear(4, 2)
        >>> write(layer, {"in_features": 3})
        >>> layer
        Linear(in_features=3, out_features=2, bias=True)
    """
    own = own_widths(module)
    for name, value in values.items():
        if name in own:
            now = own[name]
            dense = dict(dense_widths(module))
            dense.setdefault(name, now if isinstance(now, int) else tuple(now))
            vars(module)[_DENSE] = dense
            value = value if isinstance(now, int) else type(now)(value)  # type: ignore[arg-type,assignment]
        setattr(module, name, value)


def attributes_after(module: nn.Module, shapes: Shapes) -> Attributes:
    """Work out the attributes of a layer from the shapes its tensors will have.

    Args:
        module: The layer as it is now.
        shapes: `{parameter or buffer of the layer: shape}`; `"#"` is the width of a layer without any.

    Returns:
        The attributes that change; empty for kinds of layers that have none.

    Example:
        >>> attributes_after(nn.Conv2d(8, 16, 3, groups=8), {"weight": (10, 1, 3, 3)})
        {'in_channels': 5, 'out_channels': 10, 'groups': 5}
    """
    for kinds, _, after in _KINDS:
        if isinstance(module, kinds):
            now = attributes_of(module)
            return {name: value for name, value in after(module, shapes).items() if now.get(name) != value}
    return {}


def is_layer(module: nn.Module) -> bool:
    """Tell whether a module is one of PyTorch's layers, or a kind of one.

    Example:
        >>> is_layer(nn.Linear(1, 1)), is_layer(type("Block", (nn.Module,), {})())
        (True, False)
    """
    return type(module).__module__.startswith("torch.nn.") or any(isinstance(module, k) for k, *_ in _KINDS)


def is_masked_norm(module: nn.Module) -> bool:
    """Tell whether a layer normalises over its channels, so that the rest is normalised anew when some go.

    Example:
        >>> [is_masked_norm(norm) for norm in (nn.LayerNorm(4), nn.GroupNorm(2, 4), nn.GroupNorm(1, 4))]
        [True, False, True]
    """
    whole = isinstance(module, nn.GroupNorm) and module.num_groups == 1
    return whole or isinstance(module, (nn.LayerNorm, nn.RMSNorm))


def is_parametrized(module: nn.Module) -> bool:
    """Tell whether some weight of a layer is computed from other parameters at every use."""
    return bool(torch.nn.utils.parametrize.is_parametrized(module))
