"""Running a network as in training, but repeatably: its own branches on, dropout and batch statistics off."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

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
        >>> import torch
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
