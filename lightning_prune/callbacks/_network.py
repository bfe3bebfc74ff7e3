"""What structural pruning traces: the LightningModule, or the networks that its steps call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from lightning_prune._lightning import NAMESPACES, LightningModule, Trainer
from lightning_prune.callbacks._inputs import example_inputs, observed_call
from lightning_prune.cost import copied
from lightning_prune.errors import TracingError
from lightning_prune.structure.costs import Example
from lightning_prune.structure.modes import running

MAKERS = (nn.modules.conv._ConvNd, nn.Linear)
"""The kinds of layers that make channels."""


class Networks(nn.Module):
    """Some children of a module under their own names, run side by side on their own inputs.

    Args:
        module: Their parent.
        names: Which children.
    """

    def __init__(self, module: nn.Module, names: Mapping[str, Any]) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, module.get_submodule(name))

    def forward(self, calls: Mapping[str, Any]) -> dict[str, Any]:
        """Run every child on its own arguments."""
        return {name: self.get_submodule(name)(*args, **kwargs) for name, (args, kwargs) in calls.items()}


def traced(module: nn.Module, calls: Mapping[str, Any] | None) -> nn.Module:
    """Return what is traced: the module itself, or those of its children that are called."""
    return module if calls is None else Networks(module, calls)


def find(
    trainer: Trainer, pl_module: LightningModule, explicit: Any, owner: str
) -> tuple[dict[str, Any] | None, Example]:
    """Find out what to trace, and with which inputs.

    Args:
        trainer: The running trainer.
        pl_module: The LightningModule.
        explicit: The user's own example input, or None.
        owner: Who asks, for the error message.

    Returns:
        The calls of the module's children where it has no `forward` of its own, else None; and the inputs.

    Raises:
        TracingError: There are no inputs to be found.
    """
    if explicit is not None or has_forward(pl_module):
        return None, _that_runs(pl_module, *example_inputs(trainer, pl_module, None, explicit))
    calls: dict[str, Any] = {}
    for name, child in pl_module.named_children():
        if any(isinstance(layer, MAKERS) for layer in child.modules()):
            call = observed_call(trainer, pl_module, name)
            if call is not None:
                calls[name] = call
    if not calls:
        raise TracingError(
            f"{owner}: {type(pl_module).__name__} has no `forward`, and its steps call none of its networks; "
            "define `forward`, or pass `example_input`."
        )
    return calls, _that_runs(traced(pl_module, calls), (calls,), {})


def _that_runs(network: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Example:
    """One and two samples of a batch; all of it if the network wants as many, such as nodes of one graph."""
    few = example(args, kwargs)
    whole = Example(args, kwargs, (args, kwargs))
    fits = all(_runs(network, *call) for call in ((few.args, few.kwargs), few.single))
    return few if fits or not _runs(network, args, kwargs) else whole


def _runs(network: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    copy = copied(network, {id(parameter): parameter for parameter in network.parameters()})
    devices = range(torch.cuda.device_count())
    try:
        with torch.no_grad(), torch.random.fork_rng(devices), running(copy, training=False):
            copy(*args, **kwargs)
    except Exception:  # noqa: BLE001 - that is what is asked; what tracing says of it is clearer
        return False
    return True


def has_forward(pl_module: LightningModule) -> bool:
    """Tell whether a LightningModule, or a class between it and Lightning's, defines `forward`."""
    maker = next(base for base in type(pl_module).__mro__ if "forward" in vars(base))
    return not maker.__module__.startswith(NAMESPACES)


def example(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Example:
    """Cut a batch of inputs to two samples, and to one.

    Example:
        >>> import torch
        >>> inputs = example((torch.zeros(8, 3),), {})
        >>> inputs.args[0].shape, inputs.single[0][0].shape
        (torch.Size([2, 3]), torch.Size([1, 3]))
        >>> pictures = [torch.zeros(3, 8, 6), torch.zeros(3, 5, 9), torch.zeros(3, 4, 4)]
        >>> [tuple(x.shape) for x in example((pictures,), {}).args[0]]
        [(3, 8, 6), (3, 5, 9)]
    """
    leaves = tree_leaves((args, dict(kwargs)), is_leaf=_pictures)
    lists = {len(leaf) for leaf in leaves if _pictures(leaf)}
    sizes = lists or {leaf.shape[0] for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()}
    if len(sizes) != 1:  # the batch dimension cannot be told
        return Example(args, kwargs, (args, kwargs))
    size = lists.pop() if lists else None
    two, one = ((_first(args, n, size), _first(dict(kwargs), n, size)) for n in (2, 1))
    return Example(*two, one)


def _pictures(value: Any) -> bool:
    """Whether this is a batch as detectors take it: pictures (channels, height, width) of any sizes."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(x, Tensor) and x.dim() == 3 and x.shape[0] in (1, 3, 4) for x in value)
    )


def _first(inputs: Any, count: int, pictures: int | None) -> Any:
    if pictures is None:
        return tree_map_only(
            Tensor, lambda tensor: tensor[:count].clone() if tensor.dim() else tensor, inputs
        )

    def listed(value: Any) -> bool:  # the pictures, or what there is one of for each, such as targets
        return isinstance(value, list) and len(value) == pictures

    return tree_map(lambda value: value[:count] if listed(value) else value, inputs, is_leaf=listed)
