"""Finding the channel groups of a network: the only user of torch-pruning.

torch-pruning follows the autograd graph of one forward pass from layer to layer. Here its findings become
plain data, with its defects kept out: it never touches a parameter, nothing of the module changes by tracing,
a search that runs away is cut short, layers whose channels are the network's output are protected, and what
this package cannot cut correctly is named with its reason.
"""

from __future__ import annotations

import contextlib
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_prune.cost import eager, eval_mode
from lightning_prune.errors import CompatibilityError, TracingError
from lightning_prune.structure.groups import Group, Member
from lightning_prune.structure.layers import Runs, is_depthwise, layer_of

_ROOTS = (nn.modules.conv._ConvNd, nn.Linear)
_SCREEN = 20  # a group with more than this many members for each layer is a search that runs away


class _RunawayError(Exception):
    """A group keeps growing."""


@dataclass(frozen=True)
class _Found:
    """What the library found for one root, before we judge it."""

    name: str
    channels: int
    members: tuple[Member, ...]
    reason: str


def trace(
    module: nn.Module, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
) -> list[Group]:
    """Find the channel groups of a network from one forward pass.

    Args:
        module: The network; its parameters, buffers, modes, flags and the random state stay as they are.
        args: Positional example inputs.
        kwargs: Keyword example inputs.

    Returns:
        The groups in the order of their layers, protected ones with their reason.

    Raises:
        TracingError: The forward pass fails, or no output depends on a parameter.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3))
        >>> [(group.name, group.channels, group.reason) for group in trace(net, (torch.zeros(1, 1, 8, 8),))]
        [('0', 8, ''), ('2', 2, 'its channels are an output of the network')]
    """
    if not any(isinstance(layer, _ROOTS) for layer in module.modules()):
        return []
    with _untouched(module), eager():
        graph = _build(module, args, dict(kwargs or {}))
        found = list(_search(module, graph))
    groups = [_judge(module, one) for one in found]
    return _check_ties(module, groups)


def _build(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    from torch_pruning.dependency import DependencyGraph

    def detached(tensor: Tensor) -> Tensor:
        return tensor.detach().clone()

    args, kwargs = tree_map_only(Tensor, detached, (args, kwargs))

    def outputs(out: Any) -> list[Tensor]:
        tensors = [leaf for leaf in leaves_of(out) if isinstance(leaf, Tensor) and leaf.grad_fn is not None]
        if not tensors:
            raise TracingError(
                f"{type(module).__name__} cannot be traced: no output of its forward depends on a parameter; "
                "return the network's output from `forward`, without `no_grad` or `detach`."
            )
        return tensors

    graph = DependencyGraph()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the library prints advice on arguments users do not have
            return graph.build_dependency(
                module,
                example_inputs=(args, kwargs),
                forward_fn=lambda model, inputs: model(*inputs[0], **inputs[1]),
                output_transform=outputs,
                verbose=False,
            )
    except TracingError:
        raise
    except Exception as error:
        shapes = [tuple(leaf.shape) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        raise TracingError(
            f"{type(module).__name__} cannot be traced with inputs of shape {shapes}: "
            f"{type(error).__name__}: {error}. Pass `example_input`, or set the module's "
            "`example_input_array`, to what its `forward` takes."
        ) from error


def leaves_of(out: Any) -> list[Any]:
    """List everything in a network's output, inside dataclasses and model-output objects too.

    Example:
        >>> leaves_of({"a": 1, "b": [2, None, 3]})
        [1, 2, None, 3]
    """
    if is_dataclass(out):  # a leaf to pytree, but its fields are what we are after
        out = dict(vars(out))
    return [
        inner for leaf in tree_leaves(out) for inner in (leaves_of(leaf) if is_dataclass(leaf) else [leaf])
    ]


@contextlib.contextmanager
def _untouched(module: nn.Module) -> Iterator[None]:
    """Let the network be traced, and give back its modes, flags and the random state as they were."""
    flags = {parameter: parameter.requires_grad for parameter in module.parameters()}
    devices = {parameter.device.type for parameter in flags} or {"cpu"}
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=range(torch.cuda.device_count())))
        stack.enter_context(eval_mode(module))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for device in devices:
            stack.enter_context(torch.autocast(device, enabled=False))
        try:
            for parameter in flags:  # a frozen layer leaves no trace in the autograd graph
                if parameter.is_floating_point():
                    parameter.requires_grad_(True)
            yield
        finally:
            for parameter, flag in flags.items():
                parameter.requires_grad_(flag)
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)


@contextlib.contextmanager
def _screened(members: int, width: int) -> Iterator[None]:
    # The search has no bound of its own (it loops on cyclic index mappings, and multiplies indices at every
    # reshape), and `Group.add_dep` is the only place every step of it passes through.
    from torch_pruning.dependency.group import Group as LibraryGroup

    original = getattr(LibraryGroup, "add_dep", None)
    if original is None:
        raise CompatibilityError("torch-pruning has no `Group.add_dep`; install torch-pruning 1.6.1.")

    def add_dep(self: Any, dep: Any, idxs: Any) -> None:
        if len(self) > members or len(idxs) > width:
            raise _RunawayError
        original(self, dep, idxs)

    LibraryGroup.add_dep = add_dep
    try:
        yield
    finally:
        LibraryGroup.add_dep = original


def _search(module: nn.Module, graph: Any) -> Iterator[_Found]:
    names = {layer: name for name, layer in module.named_modules()}
    covered: set[nn.Module] = set()
    limit = max(200, _SCREEN * len(graph.module2node))
    widest = max(size for parameter in module.parameters() for size in (*parameter.shape, 1))
    for name, root in module.named_modules():
        if not isinstance(root, _ROOTS) or root in covered or root not in graph.module2node:
            continue
        kind = layer_of(root)
        if kind is None:
            yield _Found(name, 1, (), f"{_describe(root)} is a kind of layer that cannot be cut")
            continue
        channels = kind.width(root, "both" if kind.sides == ("both",) else "out")
        pruner = graph.get_pruner_of_module(root)
        try:
            with _screened(limit, widest):
                group = graph.get_pruning_group(root, pruner.prune_out_channels, list(range(channels)))
        except _RunawayError:
            yield _Found(name, channels, (), "its dependencies could not be followed to an end")
            continue
        except Exception as error:  # noqa: BLE001 - whatever the library stumbles over, this part stays intact
            yield _Found(name, channels, (), f"its dependencies cannot be followed: {_short(error)}")
            continue
        members, reason = _members(graph, group, names, module)
        for member in members:
            if member.side in ("out", "both") and member.position.numel():
                covered.add(module.get_submodule(member.module))
        yield _Found(name, channels, members, reason)


def _members(
    graph: Any, group: Any, names: Mapping[nn.Module, str], module: nn.Module
) -> tuple[tuple[Member, ...], str]:
    members: list[Member] = []
    for item in group.items:
        node, handler = item.dep.target, item.dep.handler
        target = node.module
        outgoing = graph.is_out_channel_pruning_fn(handler)
        if not node.outputs and outgoing:
            return tuple(members), "its channels are an output of the network"
        if isinstance(target, nn.Parameter):
            dim = node.pruning_dim % target.dim()
            side, label, width = f"dim {dim}", graph._param_to_name[target], target.shape[dim]
        elif isinstance(target, nn.PReLU) and target.num_parameters == 1:
            continue  # one slope for all channels
        elif target in names:
            kind, label = layer_of(target), names[target]
            if kind is None:
                return tuple(members), f"it reaches {label} ({_describe(target)}), which cannot be cut"
            side = "both" if kind.sides == ("both",) else ("out" if outgoing else "in")
            width = kind.width(target, side)
        else:
            continue  # an operation without parameters
        roots = item.root_idxs
        if roots is None or len(roots) != len(item.idxs) or any(index is None for index in roots):
            return tuple(members), f"its channels cannot be told apart at {label}"
        position, channel = torch.tensor(item.idxs), torch.tensor(roots)
        if position.numel() and not 0 <= int(position.min()) <= int(position.max()) < width:
            return tuple(members), f"its channels do not fit {label}"
        members.append(Member(label, side, channel.long(), position.long()))
    return tuple(members), ""


def _judge(module: nn.Module, found: _Found) -> Group:
    """Work out which channels must go together, and whether they can."""
    everything = torch.arange(found.channels)
    group = Group(found.name, found.channels, found.members, everything, torch.zeros_like(everything))
    if found.reason:
        return replace(group, reason=found.reason)
    parent = list(range(found.channels))
    balanced = 1

    def root_of(channel: int) -> int:
        while parent[channel] != channel:
            parent[channel] = parent[parent[channel]]
            channel = parent[channel]
        return channel

    for member in found.members:
        if member.side.startswith("dim "):
            continue
        layer = module.get_submodule(member.module)
        kind = layer_of(layer)
        assert kind is not None
        runs = kind.runs(layer, member.side)
        if runs is None:
            continue
        width = kind.width(layer, member.side)
        if runs.kind == "balanced":
            in_order = torch.equal(member.position, torch.arange(width)) and torch.equal(
                member.channel, torch.arange(width)
            )
            if not in_order or (balanced > 1 and balanced != runs.count):
                return replace(group, reason=f"its channels do not match the groups of {member.module}")
            balanced = runs.count
            continue
        for together in _together(member, runs, width):
            if together is None:
                return replace(group, reason=f"the groups of {member.module} mix its channels with others")
            for other in together[1:]:
                parent[root_of(other)] = root_of(together[0])
    return _with_atoms(group, torch.tensor([root_of(c) for c in range(found.channels)]), balanced)


def _with_atoms(group: Group, roots: Tensor, balanced: int) -> Group:
    _, atom, sizes = torch.unique(roots, return_inverse=True, return_counts=True)
    if sizes.numel() < 2:
        return replace(group, reason="all its channels must stay together")
    if int(sizes.min()) != int(sizes.max()):
        return replace(group, reason="its channels are tied together unevenly")
    if balanced == 1:
        return replace(group, atom=atom, block=torch.zeros(sizes.numel(), dtype=torch.int64))
    block_of_channel = torch.arange(group.channels) * balanced // group.channels
    block = torch.zeros(sizes.numel(), dtype=torch.int64).scatter_(0, atom, block_of_channel)
    if not torch.equal(block[atom], block_of_channel):
        return replace(group, reason="its channels are tied across groups that must keep equally many")
    if int(torch.bincount(block).max()) < 2:
        return replace(group, reason="every group has but one channel to keep")
    return replace(group, atom=atom, block=block)


def _together(member: Member, runs: Runs, width: int) -> Iterator[list[int] | None]:
    """List the channels that a run ties together; None where a run reaches beyond this group."""
    size = width // runs.count
    place = member.position // size if runs.kind == "whole" else member.position % size
    expected = size if runs.kind == "whole" else runs.count
    by_place: dict[int, list[int]] = defaultdict(list)
    for where, channel in zip(place.tolist(), member.channel.tolist(), strict=True):
        by_place[where].append(channel)
    for channels in by_place.values():
        yield channels if len(channels) == expected else None


def _check_ties(module: nn.Module, groups: list[Group]) -> list[Group]:
    """Protect groups that would cut one of two names of a tied tensor and not the other."""
    names: dict[int, set[str]] = defaultdict(set)
    for owner, layer in module.named_modules(remove_duplicate=False):
        for _, parameter in layer.named_parameters(recurse=False):
            names[id(parameter)].add(owner)
    tied = {owner: owners for owners in names.values() if len(owners) > 1 for owner in owners}
    if not tied:
        return groups
    checked = []
    for group in groups:
        cuts: dict[str, set[tuple[str, tuple[int, ...]]]] = defaultdict(set)
        for member in group.members:
            cuts[member.module].add((member.side, tuple(sorted(member.position.tolist()))))
        loose = next((o for o in cuts for twin in tied.get(o, ()) if cuts.get(twin) != cuts[o]), None)
        reason = f"{loose} shares a tensor with a layer that keeps its channels" if loose else ""
        checked.append(group if group.reason or not reason else replace(group, reason=reason))
    return checked


def _describe(layer: nn.Module) -> str:
    kind = f"nn.{type(layer).__name__}"
    if torch.nn.utils.parametrize.is_parametrized(layer):
        return f"parametrized {kind}"
    if isinstance(layer, nn.modules.conv._ConvNd) and layer.groups > 1 and not is_depthwise(layer):
        return f"{kind} with groups={layer.groups}, {layer.in_channels} in, {layer.out_channels} out"
    return kind


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
