"""Finding the channel groups of a network from one pass of its forward, without changing anything in it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_prune.cost import countable
from lightning_prune.errors import TracingError
from lightning_prune.structure.groups import Group, Member
from lightning_prune.structure.modes import running
from lightning_prune.structure.provenance import (
    DATA,
    Follower,
    Owner,
    Record,
    align_recurrent,
    classes,
    hook_bare_norms,
    label,
)
from lightning_prune.structure.rules import RULES, other

OUTPUT = "its channels are an output of the network"


def trace(
    module: nn.Module, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
) -> list[Group]:
    """Find the channel groups of a network.

    Both its eval and, where it runs with these inputs alone, its training branches are followed.

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
    record = _follow(module, args, dict(kwargs or {}))
    return _groups(record)


def _follow(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Record:
    with _untouched(module), countable(real=True), torch.no_grad():
        try:
            return _pass(module, args, kwargs, torch.device("meta"))
        except Exception:  # noqa: BLE001 - user code may refuse meta tensors in any way; the real run decides
            pass
        try:
            return _pass(module, args, kwargs, None)
        except TracingError:
            raise
        except Exception as error:
            shapes = [tuple(leaf.shape) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            raise TracingError(
                f"{type(module).__name__} cannot be traced with inputs of shape {shapes}: "
                f"{type(error).__name__}: {error}. Pass `example_input`, or set the module's "
                "`example_input_array`, to what its `forward` takes."
            ) from error


def _pass(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device | None
) -> Record:
    def place(tensor: Tensor) -> Tensor:
        return tensor.detach().clone() if device is None else tensor.detach().to(device)

    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    state = {name: place(tensor) for name, tensor in tensors.items()}
    record = Record()
    follower = Follower(record, RULES, other)
    for name, tensor in state.items():
        if tensor.is_floating_point() or tensor.is_complex():
            label(follower, name, tensor)
    align_recurrent(module, follower, state)
    for training in (False, True):
        inputs = tree_map_only(Tensor, place, (args, kwargs))
        for leaf in tree_leaves(inputs):
            if isinstance(leaf, Tensor):
                follower.give(leaf, [], DATA)
        handles = hook_bare_norms(module, follower)
        try:
            with running(module, training), follower:
                out = torch.func.functional_call(module, state, inputs[0], inputs[1])
        except Exception:
            if not training:
                raise
            return record  # it needs more than these inputs in training, such as detection targets
        finally:
            for handle in handles:
                handle.remove()
        _pin_outputs(module, follower, out)
    return record


def _pin_outputs(module: nn.Module, follower: Follower, out: Any) -> None:
    leaves = [leaf for leaf in leaves_of(out) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if follower.record.made and not leaves:
        raise TracingError(
            f"{type(module).__name__} cannot be traced: its forward returns no tensor; return the network's "
            "output from `forward`."
        )
    for leaf in leaves:
        follower.pin(follower.of(leaf).factors, OUTPUT)


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
    """Give back the buffers and the random state as they were."""
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=range(torch.cuda.device_count())))
        stack.enter_context(torch.inference_mode(False))
        for device in {parameter.device.type for parameter in module.parameters()} or {"cpu"}:
            stack.enter_context(torch.autocast(device, enabled=False))
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)


@dataclass
class _Part:
    """One group in the making, in terms of classes of labels."""

    classes: Tensor
    makers: list[Owner]


def _groups(record: Record) -> list[Group]:
    root = classes(record)
    parts = _parts(record, root)
    part_of = torch.full((record.count,), -1)
    for place, part in enumerate(parts):
        part_of[part.classes] = place
    reasons = _reasons(record, root, part_of)
    reads = torch.zeros(record.count, dtype=torch.bool)
    for labels in record.read:
        reads[labels] = True
    members: list[list[tuple[Owner, Tensor]]] = [[] for _ in parts]
    for owner in record.owners:
        mine = part_of[root[owner.start : owner.start + owner.size]]
        for place in torch.unique(mine[mine >= 0]).tolist():
            members[place].append((owner, (mine == place).nonzero().flatten()))
    blocks = _blocks(record, root, part_of, parts, reasons)
    return [
        _group(part, members[place], root, reads, blocks.get(place), reasons.get(place, ""))
        for place, part in enumerate(parts)
    ]


def _parts(record: Record, root: Tensor) -> list[_Part]:
    """Bring makers that share a class together."""
    made = torch.zeros(record.count, dtype=torch.bool)
    for labels in record.made:
        made[labels] = True
    part_of: dict[int, int] = {}
    parts: dict[int, _Part] = {}
    for owner in record.owners:
        here = slice(owner.start, owner.start + owner.size)
        if not bool(made[here].any()):
            continue
        mine = torch.unique(root[here])
        touched = sorted({part_of[c] for c in mine.tolist() if c in part_of})
        target = touched[0] if touched else len(part_of) + len(parts)
        part = parts.setdefault(target, _Part(mine, []))
        for loose in touched[1:]:
            gone = parts.pop(loose)
            part.makers += gone.makers
            part.classes = torch.cat([part.classes, gone.classes])
            part_of.update(dict.fromkeys(gone.classes.tolist(), target))
        part.classes = torch.unique(torch.cat([part.classes, mine]))
        part.makers.append(owner)
        part_of.update(dict.fromkeys(mine.tolist(), target))
    for part in parts.values():
        part.makers.sort(key=lambda owner: owner.start)
    return sorted(parts.values(), key=lambda part: part.makers[0].start)


def _reasons(record: Record, root: Tensor, part_of: Tensor) -> dict[int, str]:
    reasons: dict[int, str] = {}
    # That it is an output says more than what else may be in the way.
    for labels, reason in sorted(record.pins, key=lambda pin: pin[1] != OUTPUT):
        for place in torch.unique(part_of[root[labels]]).tolist():
            if place >= 0:
                reasons.setdefault(place, reason)
    return reasons


def _blocks(
    record: Record, root: Tensor, part_of: Tensor, parts: list[_Part], reasons: dict[int, str]
) -> dict[int, Tensor]:
    """Which run each class of a part is in, where runs must keep equally many."""
    blocks: dict[int, Tensor] = {}
    for labels, runs in record.balanced:
        mine = root[labels]
        places = torch.unique(part_of[mine]).tolist()
        if places == [-1]:
            continue
        run = torch.arange(mine.numel()) * runs // mine.numel()
        place = places[0]
        fits = len(places) == 1 and torch.unique(mine).numel() == parts[place].classes.numel()
        if fits:
            at = torch.searchsorted(parts[place].classes, mine)
            block = torch.zeros(parts[place].classes.numel(), dtype=torch.int64).scatter_(0, at, run)
            fits = torch.equal(block[at], run) and torch.equal(blocks.setdefault(place, block), block)
        if not fits:
            for place in places:
                if place >= 0:
                    reasons.setdefault(place, "its channels do not match the groups of a convolution")
    return blocks


def _group(
    part: _Part,
    places: list[tuple[Owner, Tensor]],
    root: Tensor,
    reads: Tensor,
    block: Tensor | None,
    reason: str,
) -> Group:
    count = part.classes.numel()
    spans = [(owner, root[owner.start : owner.start + owner.size]) for owner in part.makers]
    whole = next((span for _, span in spans if torch.unique(span).numel() == count), None)
    atom = torch.arange(count) if whole is None else torch.searchsorted(part.classes, whole)
    sizes = torch.bincount(atom, minlength=count)
    first = torch.zeros(count, dtype=torch.int64)
    first[atom.flip(0)] = torch.arange(atom.numel()).flip(0)
    members = []
    for owner, position in places:
        labels = torch.arange(owner.start, owner.start + owner.size)[position]
        channel = first[torch.searchsorted(part.classes, root[labels])]
        members.append(Member(owner.name, owner.dim, channel, position, bool(reads[labels].any())))
    names = [_layer(owner.name) for owner in part.makers]
    if not reason and count < 2:
        reason = "all its channels must stay together"
    if not reason and int(sizes.min()) != int(sizes.max()):
        reason = "its channels are tied together unevenly"
    if not reason and block is not None:
        held = torch.bincount(block)
        if int(held.min()) != int(held.max()):
            reason = "its channels are tied across groups that must keep equally many"
        elif int(held.max()) < 2:
            reason = "every group has but one channel to keep"
    if block is None or reason:
        block = torch.zeros(count, dtype=torch.int64)
    return Group(names[0], atom.numel(), tuple(members), atom, block, reason, tuple(dict.fromkeys(names)))


def _layer(tensor: str) -> str:
    return tensor.removesuffix(".weight")
