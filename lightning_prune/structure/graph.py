"""Finding the channel groups of a network from one pass of its forward, without changing anything in it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_prune.cost import copied, countable, skeleton
from lightning_prune.errors import TracingError
from lightning_prune.structure.grouping import OUTPUT, groups_of
from lightning_prune.structure.groups import Group
from lightning_prune.structure.layers import is_layer
from lightning_prune.structure.modes import running
from lightning_prune.structure.provenance import (
    Follower,
    align_recurrent,
    hook_bare_norms,
    hooks_aside,
    label,
)
from lightning_prune.structure.record import DATA, Labels, Record
from lightning_prune.structure.rules import RULES, other
from lightning_prune.structure.sizes import Watcher, numbered


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
    record.forget_what_is_not_used()
    return groups_of(record)


def _follow(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Record:
    with _surroundings(module), countable(real=True), torch.no_grad():
        # User code may refuse meta tensors, and numbers that are more than numbers, in any way. It may also
        # keep what it computes, so every try has a copy of its own.
        for copy in (skeleton, copied):
            with contextlib.suppress(Exception):
                return _pass(copy(module), args, kwargs, sized=True)
        try:
            return _pass(copied(module), args, kwargs, sized=False)
        except TracingError:
            raise
        except Exception as error:
            shapes = [tuple(leaf.shape) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            raise TracingError(
                f"{type(module).__name__} cannot be traced with inputs of shape {shapes}: "
                f"{type(error).__name__}: {error}. Pass `example_input`, or set the module's "
                "`example_input_array`, to what its `forward` takes."
            ) from error


def _pass(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, sized: bool) -> Record:
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    meta = any(tensor.is_meta for tensor in state.values())
    record = Record()
    follower = Follower(record, RULES, other)
    for name, tensor in state.items():
        if tensor.is_floating_point() or tensor.is_complex():
            label(follower, name, tensor, certain=is_layer(module.get_submodule(name.rpartition(".")[0])))
        else:
            follower.known[tensor] = Labels(kept=True)
    align_recurrent(module, follower, state)
    orders = []
    for training in (False, True):
        inputs = tree_map_only(
            Tensor, lambda t: t.detach().to("meta") if meta else t.detach().clone(), (args, kwargs)
        )
        for leaf in tree_leaves(inputs):
            if isinstance(leaf, Tensor):
                follower.give(leaf, [], DATA)
        handles = hook_bare_norms(module, follower)
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(running(module, training))
                if sized:
                    stack.enter_context(numbered(module, record))
                    stack.enter_context(Watcher(follower, module))
                stack.enter_context(hooks_aside(module, follower))
                stack.enter_context(follower)
                out = module(*inputs[0], **inputs[1])
        except Exception:
            if not training:
                raise
            record.modes = (False,)  # it needs more than these inputs, such as detection targets
            return record
        finally:
            for handle in handles:
                handle.remove()
        _pin_outputs(module, follower, out)
        orders.append(follower.order)
        follower.order = []
    if orders[0] == orders[1]:
        record.modes = (False,)
    return record


def _pin_outputs(module: nn.Module, follower: Follower, out: Any) -> None:
    leaves = [leaf for leaf in leaves_of(out) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if follower.record.made and not leaves:
        raise TracingError(
            f"{type(module).__name__} cannot be traced: its forward returns no tensor; return the network's "
            "output from `forward`."
        )
    for leaf in leaves_of(out):
        if isinstance(leaf, Tensor):
            labels = follower.of(leaf)
            if leaf.is_floating_point():
                follower.pin(labels.factors, OUTPUT)
            if labels.event is not None:
                follower.record.results.append(labels.event)


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
def _surroundings(module: nn.Module) -> Iterator[None]:
    """Follow a network wherever it was called from, and give back the random state as it was."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=range(torch.cuda.device_count())))
        stack.enter_context(torch.inference_mode(False))
        for device in {parameter.device.type for parameter in module.parameters()} or {"cpu"}:
            stack.enter_context(torch.autocast(device, enabled=False))
        yield
