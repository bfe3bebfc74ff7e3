"""Finding the modules of a network through which their input passes on by itself: its residual blocks.

One forward pass is watched operator by operator. A module's input is marked when the module is called; the
mark stays on what is merely added to, scaled, normalised or rearranged, and is lost in what a convolution, a
matrix product or a pooling makes of it. A module whose output still bears the mark of its input, after
something that also depends on the input was added, computes `x + f(x)`, whatever its class is called.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_prune.cost import countable, eval_mode

_MIXING = (
    "conv",
    "mm",
    "linear",
    "attention",
    "pool",
    "softmax",
    "upsample",
    "embedding",
    "lstm",
    "gru",
    "fft",
)
"""Parts of the names of operators whose output holds nothing of their input as it was."""

_SUMS = ("add", "sub", "rsub", "addcmul", "addcdiv", "lerp")


@dataclass
class Call:
    """One call of a module.

    Attributes:
        name: The module's qualified name.
        x: Its first tensor argument; None if it has none.
        keyword: The keyword under which it came; empty for a positional one.
        arguments: How many arguments it was given in all.
        out: What it returned.
        residual: Whether its input is in what it returned.
        sums: The names of the modules in which something was added to its input.
    """

    name: str
    x: Tensor | None
    keyword: str
    arguments: int
    out: Any = None
    residual: bool = False
    sums: set[str] = field(default_factory=set)


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps two marks on every tensor: whose input it still holds, and on whose input it depends."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.open: list[int] = []
        self.calls: list[Call] = []
        self._held: dict[int, frozenset[int]] = {}
        self._depends: dict[int, frozenset[int]] = {}
        self._alive: list[Any] = []  # a tensor that went would leave its id, and so its marks, to another

    def begin(self, call: Call) -> None:
        self.calls.append(call)
        number = len(self.calls) - 1
        self.open.append(number)
        if call.x is not None:
            self._mark(call.x, self.held(call.x) | {number}, self.depends(call.x) | {number})

    def end(self, out: Any) -> None:
        number = self.open.pop()
        call = self.calls[number]
        call.out = out
        first = first_tensor(out)
        call.residual = bool(call.sums) and first is not None and number in self.held(first)

    def held(self, tensor: Tensor) -> frozenset[int]:
        return self._held.get(id(tensor), frozenset())

    def depends(self, tensor: Tensor) -> frozenset[int]:
        return self._depends.get(id(tensor), frozenset())

    def _mark(self, tensor: Tensor, held: frozenset[int], depends: frozenset[int]) -> None:
        self._alive.append(tensor)
        self._held[id(tensor)], self._depends[id(tensor)] = held, depends

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        name = str(func).split(".")[1].strip("_")  # of `aten.add_.Tensor`
        depends = frozenset().union(*map(self.depends, inputs)) & set(self.open)
        held = frozenset().union(*map(self.held, inputs)) & depends
        if name in _SUMS:
            for number in held:
                if sum(number in self.depends(tensor) for tensor in inputs) > 1:
                    self.calls[number].sums.add(self.calls[self.open[-1]].name)
        elif any(part in name for part in _MIXING):
            held = frozenset()
        sizes = {tensor.numel() for tensor in inputs if self.held(tensor)}
        for tensor in outputs:
            self._mark(tensor, held if tensor.numel() in sizes else frozenset(), depends)
        return out


def watch(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Call]:
    """Run a network once in eval mode and note every call of every submodule.

    Args:
        module: The network; its modes and the random state stay as they are.
        args: Positional inputs.
        kwargs: Keyword inputs.

    Returns:
        The calls in the order in which they began; the first is the network's own, under the name `""`.

    Example:
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.f = nn.Linear(4, 4)
        ...     def forward(self, x):
        ...         return torch.relu(x + self.f(x))
        >>> net = nn.Sequential(Block(), nn.Linear(4, 2))
        >>> [(call.name, call.residual) for call in watch(net, (torch.zeros(1, 4),), {})]
        [('', False), ('0', True), ('0.f', False), ('1', False)]
    """
    watcher = _Watch()
    with repeatable(), eval_mode(module), torch.no_grad(), _hooked(module, watcher), watcher:
        module(*args, **kwargs)
    return watcher.calls


@contextmanager
def repeatable() -> Iterator[None]:
    """Let a network run as plain operators, and give the random state back as it was.

    Example:
        >>> with repeatable():
        ...     _ = torch.rand(1)
    """
    devices = range(torch.cuda.device_count())
    with torch.random.fork_rng(devices=devices), torch.inference_mode(False), countable(real=True):
        yield


@contextmanager
def _hooked(module: nn.Module, watcher: _Watch) -> Iterator[None]:
    names = {child: name for name, child in module.named_modules()}

    def before(child: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x, keyword = first_argument(args, kwargs)
        watcher.begin(Call(names[child], x, keyword, len(args) + len(kwargs)))

    handles: list[Any] = []
    for child in names:
        handles.append(child.register_forward_pre_hook(before, with_kwargs=True, prepend=True))
        handles.append(child.register_forward_hook(lambda child, inputs, out: watcher.end(out)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def first_argument(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor | None, str]:
    """Find what a call passes through: its first argument, if that is a tensor.

    Returns:
        The tensor or None, and the keyword under which it came; empty for a positional one.

    Example:
        >>> first_argument((), {"x": torch.ones(1)})
        (tensor([1.]), 'x')
    """
    if args:
        return (args[0] if isinstance(args[0], Tensor) else None), ""
    return next(((value, key) for key, value in kwargs.items() if isinstance(value, Tensor)), (None, ""))


def first_tensor(out: Any) -> Tensor | None:
    """Find the tensor that a module passes on: what it returns, or the first of a plain tuple of that.

    Example:
        >>> first_tensor((torch.ones(1), None)), first_tensor({"a": torch.ones(1)})
        (tensor([1.]), None)
    """
    if type(out) is tuple and out:
        out = out[0]
    return out if isinstance(out, Tensor) else None
