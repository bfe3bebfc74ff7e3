"""Layers that stand at the place of other layers: described as plain data, put in, and taken out again.

A layer that was put in is marked, and carries the layer that was there, without the numbers of its
parameters, so that copies and running averages of the network know how to become what they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.cost import copied
from lightning_prune.errors import CheckpointError

Spec = Mapping[str, Any]

_WAS = "_lightning_prune_was"
_CONVOLUTION = (
    "in_channels",
    "out_channels",
    "kernel_size",
    "stride",
    "padding",
    "dilation",
    "groups",
    "padding_mode",
)
_WIDTHS = ("in_features", "out_features", "in_channels", "out_channels", "groups")
# Kinds of layers that may be put in, and the attributes they are made from. `bias` is whether there is one.
_KINDS: Mapping[str, tuple[type[nn.Module], tuple[str, ...]]] = {
    "Identity": (nn.Identity, ()),
    "Linear": (nn.Linear, ("in_features", "out_features")),
    "Conv1d": (nn.Conv1d, _CONVOLUTION),
    "Conv2d": (nn.Conv2d, _CONVOLUTION),
    "Conv3d": (nn.Conv3d, _CONVOLUTION),
}


class Bypass(nn.Module):
    """Stands for a block that is called with several arguments, or returns a tuple.

    Args:
        layer: What its first argument goes through; the others have no effect.
        tuple_of: How long a tuple it returns, of which all but the first are None; 0: one tensor.

    Raises:
        ValueError: `tuple_of` is no length.

    Example:
        >>> Bypass(nn.Identity(), tuple_of=2)(torch.ones(1), mask=None)
        (tensor([1.]), None)
    """

    def __init__(self, layer: nn.Module, tuple_of: int = 0) -> None:
        super().__init__()
        if type(tuple_of) is not int or not 0 <= tuple_of <= 100:
            raise ValueError(f"tuple_of={tuple_of!r}")
        self.layer = layer
        self.tuple_of = tuple_of

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Pass the first argument on."""
        out = self.layer(args[0] if args else next(v for v in kwargs.values() if isinstance(v, Tensor)))
        return (out, *[None] * (self.tuple_of - 1)) if self.tuple_of else out


def spec_of(layer: nn.Module) -> dict[str, Any]:
    """Describe a layer as plain data.

    Args:
        layer: An `nn.Identity`, `nn.Linear`, `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d`, an `nn.Sequential` of
            such, or a `Bypass` around one.

    Returns:
        `{"kind": ..., "arguments": {...}}`, or `{"kind": "Sequential" or "Bypass", "children": [...]}`:
        strings, numbers, booleans and lists only.

    Raises:
        TypeError: It is another kind of layer.

    Example:
        >>> spec_of(nn.Linear(4, 2))
        {'kind': 'Linear', 'arguments': {'in_features': 4, 'out_features': 2, 'bias': True}}
    """
    if type(layer) is nn.Sequential:
        return {"kind": "Sequential", "children": [spec_of(child) for child in layer]}
    if type(layer) is Bypass:
        return {"kind": "Bypass", "children": [spec_of(layer.layer)], "tuple_of": layer.tuple_of}
    kind = type(layer).__name__
    known, names = _KINDS.get(kind, (None, ()))
    if type(layer) is not known:
        raise TypeError(f"{kind} is not a kind of layer that can be put in the place of another.")
    values = {name: getattr(layer, name) for name in names}
    arguments = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    return {"kind": kind, "arguments": {**arguments, **({"bias": layer.bias is not None} if names else {})}}


def build(spec: Spec) -> nn.Module:
    """Make the layer that a description is of; its numbers are to be loaded next.

    Args:
        spec: What `spec_of` returned.

    Returns:
        A new layer, on the CPU; no random number is drawn.

    Raises:
        CheckpointError: The description is malformed.

    Example:
        >>> build(spec_of(nn.Sequential(nn.Linear(4, 2, bias=False), nn.Identity())))
        Sequential(
          (0): Linear(in_features=4, out_features=2, bias=False)
          (1): Identity()
        )
    """
    try:
        if spec["kind"] == "Sequential":
            return nn.Sequential(*map(build, spec["children"]))
        if spec["kind"] == "Bypass":
            (child,) = spec["children"]
            return Bypass(build(child), spec["tuple_of"])
        kind, names = _KINDS[spec["kind"]]
        given = spec["arguments"]
        if set(given) != ({*names, "bias"} if names else set()):
            raise KeyError(*sorted(given))
        arguments = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
        return kind(**arguments, device="meta").to_empty(device="cpu") if names else kind()
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"A replaced layer in the checkpoint is malformed: {error!r}.") from error


def put(module: nn.Module, name: str, new: nn.Module) -> nn.Module:
    """Put a layer in the place of another, and mark it.

    Hooks registered on the old layer run with the new one, and handles still remove them. In the place of
    frozen layers stand frozen ones.

    Args:
        module: The network; not the layer itself.
        name: The place.
        new: The layer that comes in. It takes on the old one's mode.

    Returns:
        The layer that was there.

    Raises:
        TypeError: The layer is of a kind that cannot be described.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 4))
        >>> put(net, "0", nn.Identity())
        Linear(in_features=4, out_features=4, bias=True)
        >>> net
        Sequential(
          (0): Identity()
        )
    """
    spec_of(new)
    old = module.get_submodule(name)
    # A tuple, because a module would be registered as a child.
    vars(new)[_WAS] = vars(old)[_WAS] if _WAS in vars(old) else (_hollow(old),)
    if not any(parameter.requires_grad for parameter in (*old.parameters(), *was(new).parameters())):
        new.requires_grad_(False)
    _take_place(module, name, old, new)
    return old


def take_out(module: nn.Module, name: str) -> None:
    """Put back the kind of layer that was at a place before `put`, with numbers to be loaded next.

    Args:
        module: The network.
        name: The place of a layer that `put` put in.
    """
    new = module.get_submodule(name)
    old = was(new)
    device = next((tensor.device for tensor in (*module.parameters(), *module.buffers())), "cpu")
    old = _with_parameters(old, lambda p: torch.empty_like(p, device=device))
    _take_place(module, name, new, old.to(device))


def was(layer: nn.Module) -> nn.Module:
    """Return what stood at a place before `put`, without the numbers of its parameters.

    Args:
        layer: A layer that `put` put in.

    Returns:
        The layer, its parameters on the meta device.
    """
    (old,) = vars(layer)[_WAS]
    assert isinstance(old, nn.Module)
    return old


def replaced(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Go through the layers that were put in, outermost only.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        >>> _ = put(net, "0", nn.Identity())
        >>> list(replaced(net))
        [('0', Identity())]
    """
    inside: tuple[str, ...] = ()
    for name, layer in module.named_modules():
        if _WAS in vars(layer) and not name.startswith(inside or ("\0",)):
            inside = (*inside, f"{name}.")
            yield name, layer


def specs(module: nn.Module) -> dict[str, dict[str, Any]]:
    """Describe all layers that were put in, by place."""
    return {name: spec_of(layer) for name, layer in replaced(module)}


def bring_in_line(module: nn.Module, wanted: Mapping[str, Spec]) -> None:
    """Put in and take out layers until those that are described, and no others, stand at the place of others.

    Everything is checked before anything changes. New layers have the device and dtype of what they replace.

    Args:
        module: The network, of the class and arguments that were described.
        wanted: `{place: description}`, as `specs` returns.

    Raises:
        CheckpointError: A description is malformed, or names a place that the network does not have.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 4))
        >>> bring_in_line(net, {"0": spec_of(nn.Identity())})
        >>> specs(net)
        {'0': {'kind': 'Identity', 'arguments': {}}}
        >>> bring_in_line(net, {})
        >>> net
        Sequential(
          (0): Linear(in_features=4, out_features=4, bias=True)
        )
    """
    now = specs(module)
    new = {name: build(spec) for name, spec in wanted.items()}
    # Of what differs in widths only, the layers and their Parameters stay; giving them other widths is easy.
    new = {name: layer for name, layer in new.items() if _form(now.get(name)) != _form(spec_of(layer))}
    places = dict(module.named_modules())
    for name in new:
        if not name or (name not in places and not name.startswith(tuple(f"{place}." for place in now))):
            raise CheckpointError(
                f"The structure in the checkpoint is of another network: {type(module).__name__} has no "
                f"{name!r}. Build the module with the arguments it was trained with."
            )
    while gone := [name for name, _ in replaced(module) if name not in wanted]:
        for name in gone:
            take_out(module, name)
    for name, layer in new.items():
        old = module.get_submodule(name)
        like = next((p for p in (*old.parameters(), *module.parameters())), torch.empty(0))
        put(module, name, layer.to(device=like.device, dtype=like.dtype))


def _form(spec: Spec | None) -> Any:
    """What a description says but for widths."""
    if spec is None or "children" in spec:
        children = [] if spec is None else [_form(child) for child in spec["children"]]
        return None if spec is None else (spec["kind"], spec.get("tuple_of"), children)
    arguments = {name: value for name, value in spec["arguments"].items() if name not in _WIDTHS}
    return spec["kind"], arguments


def _hollow(layer: nn.Module) -> nn.Module:
    return _with_parameters(layer, lambda parameter: parameter.detach().to("meta"))


def _with_parameters(layer: nn.Module, data: Callable[[nn.Parameter], Tensor]) -> nn.Module:
    """Copy a layer, giving its parameters other data; ties are kept."""
    memo = {id(p): nn.Parameter(data(p), requires_grad=p.requires_grad) for p in layer.parameters()}
    return copied(layer, memo)


def _take_place(module: nn.Module, name: str, old: nn.Module, new: nn.Module) -> None:
    for table in _HOOK_TABLES:
        vars(new)[table] = vars(old)[table]
    new.train(old.training)
    parent, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(parent), leaf, new)


# Private to torch, and the only way to let hooks stay with a place: handles hold these very dictionaries.
_HOOK_TABLES = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
