"""Running a network as in training, but repeatably: its own branches on, dropout and batch statistics off."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from lightning_prune.cost import eval_mode

_DROPOUTS: dict[Callable[..., Any], str] = {
    nn.functional.dropout: "p",
    nn.functional.dropout1d: "p",
    nn.functional.dropout2d: "p",
    nn.functional.dropout3d: "p",
    nn.functional.alpha_dropout: "p",
    nn.functional.feature_alpha_dropout: "p",
    nn.functional.scaled_dot_product_attention: "dropout_p",
}
# A builtin has no signature to read the place of its argument from.
_PLACES = {"p": 1, "dropout_p": 4}


class _NoDropout(TorchFunctionMode):
    """Let functional dropout keep everything."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = _DROPOUTS.get(func)
        if name is not None:
            place = _PLACES[name]
            if len(args) > place:
                args = (*args[:place], 0.0, *args[place + 1 :])
            else:
                kwargs[name] = 0.0
        return func(*args, **kwargs)


@contextlib.contextmanager
def running(module: nn.Module, training: bool) -> Iterator[None]:
    """Put a network in eval mode; with `training`, the modules of the user's own take their training branch.

    PyTorch's own layers stay in eval mode either way, and functional dropout keeps everything, so that two
    runs agree. Every module gets its own mode back.

    Args:
        module: The network.
        training: Whether the user's modules are to see `self.training` true.

    Example:
        >>> net = nn.Sequential(nn.Dropout(0.5))
        >>> with running(net, training=True):
        ...     bool((net(torch.ones(8)) == 1).all())
        True
    """
    with eval_mode(module), contextlib.ExitStack() as stack:
        if training:
            for child in module.modules():
                child.training = not type(child).__module__.startswith("torch.nn.")
            stack.enter_context(_NoDropout())
        yield


def modes(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[bool, ...]:
    """Say in which modes a network has to be looked at: eval, and training if other layers run there.

    Args:
        module: The network.
        args: Positional example inputs.
        kwargs: Keyword example inputs.

    Returns:
        `(False,)`, or `(False, True)`. A network that needs more than its inputs in training, such as
        detection targets, has its eval mode only.

    Example:
        >>> modes(nn.Linear(2, 1), (torch.zeros(1, 2),), {})
        (False,)
    """
    try:
        called = [_called(module, args, kwargs, training) for training in (False, True)]
    except Exception:  # noqa: BLE001 - a network may refuse to run in training mode in any way
        return (False,)
    return (False,) if called[0] == called[1] else (False, True)


def _called(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], training: bool
) -> list[nn.Module]:
    order: list[nn.Module] = []
    handles = [
        child.register_forward_hook(lambda layer, inputs, output: order.append(layer))
        for child in module.modules()
    ]
    try:
        with torch.no_grad(), running(module, training):
            module(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return order
