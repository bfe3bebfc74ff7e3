"""What a network does to its activations, function by function, as it is called.

Every call of a torch function is known by a key: the dotted name of the module that makes it, the function,
and how many calls of that function by that module came before. The key is the same in training, in evaluation
and while exporting, whatever else happens in between.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

ENDLESS = 1e9
"""Values beyond this are masks, not activations."""

_BINARY = ("add", "mul", "sub", "truediv", "matmul")
_SAME_AS = {"concat": "cat", "concatenate": "cat", "clip": "clamp", "multiply": "mul"}
IDENTITIES = (
    "dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout", "alpha_dropout", "contiguous",
    "to", "float", "type", "type_as", "requires_grad", "cpu", "cuda",
)  # fmt: skip
"""Functions that may return what they were given."""


def function_name(func: Callable[..., Any]) -> tuple[str, bool]:
    """Return the plain name of a torch function, method or operator, and whether it works in place.

    Example:
        >>> import torch
        >>> function_name(torch.Tensor.__iadd__), function_name(torch.relu_), function_name(torch.concat)
        (('add', True), ('relu', True), ('cat', False))
    """
    name = getattr(func, "__name__", "")
    if name == "__get__":  # an attribute such as `x.T`
        return getattr(getattr(func, "__self__", None), "__name__", name), False
    if name.startswith("__") and name.endswith("__"):
        core = name[2:-2]
        if core[1:] in _BINARY and core[0] in "ir":
            return core[1:], core[0] == "i"
        return core, core == "setitem"
    in_place = name.endswith("_") and not name.startswith("_")
    name = name[:-1] if in_place else name
    return _SAME_AS.get(name, name), in_place


def argument(
    args: tuple[Any, ...], kwargs: dict[str, Any], position: int, name: str, default: Any = None
) -> Any:
    """Return an argument of a call, however it was given."""
    return args[position] if len(args) > position else kwargs.get(name, default)


@dataclass
class Node:
    """One call of a function on tensors.

    Attributes:
        key: What tells it from all others.
        path: The dotted name of the module that made it.
        name: The function's plain name.
        inputs: The values it read, by number; the first is what it works on.
        outputs: The values it gave.
        endless: Whether a value it read is beyond `ENDLESS`.
        call: Its arguments.
    """

    key: str
    path: str
    name: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    endless: bool
    call: tuple[tuple[Any, ...], dict[str, Any]] = field(repr=False)


@dataclass
class Trace:
    """Everything that one call of a network did.

    Attributes:
        nodes: Its calls, in order.
        inputs: The values that came in: `{position among all tensors of the arguments: value}`.
        outputs: The values that went out.
    """

    nodes: list[Node] = field(default_factory=list)
    inputs: dict[int, int] = field(default_factory=dict)
    outputs: tuple[int, ...] = ()

    def needed(self) -> set[str]:
        """Return the keys of the nodes that the outputs depend on, as far as that can be followed."""
        values, keys = set(self.outputs), set()
        for node in reversed(self.nodes):
            if values & set(node.outputs):
                values.update(node.inputs)
                keys.add(node.key)
        return keys


class Calls(TorchFunctionMode):
    """Watches torch functions, and knows each call by its key.

    Args:
        where: Tells the dotted name of the module that runs.
    """

    def __init__(self, where: Callable[[], str]) -> None:
        super().__init__()
        self.where = where
        self._counts: Counter[tuple[str, str]] = Counter()

    def key(self, name: str) -> str:
        """Return the key of the call of a function that comes now, and count it."""
        place = (self.where(), name)
        number = self._counts[place]
        self._counts[place] += 1
        return f"{place[0]}/{name}/{number}"


class Recorder(Calls):
    """Writes down every call.

    Args:
        where: Tells the dotted name of the module that runs.
        inputs: The tensors that come in, in order.
    """

    def __init__(self, where: Callable[[], str], inputs: Iterable[Tensor]) -> None:
        super().__init__(where)
        self.trace = Trace()
        # The tensors are kept, so that no two have the same id.
        self._known: dict[int, tuple[Tensor, int]] = {}
        self._count = 0
        for position, tensor in enumerate(inputs):
            self.trace.inputs[position] = self._value(tensor)

    def finish(self, result: Any) -> Trace:
        """Say what went out, and return everything."""
        self.trace.outputs = tuple(self._value(t) for t in tree_leaves(result) if isinstance(t, Tensor))
        return self.trace

    def _value(self, tensor: Tensor, new: bool = False) -> int:
        if new or id(tensor) not in self._known:
            self._known[id(tensor)] = (tensor, self._count)
            self._count += 1
        return self._known[id(tensor)][1]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function and note what it read and gave."""
        kwargs = kwargs or {}
        name, in_place = function_name(func)
        key = self.key(name)
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        inputs = tuple(self._value(t) for t in given)
        endless = name in ("add", "mul", "matmul", "bmm", "cat") and any(map(_endless, given))
        result = func(*args, **kwargs)
        if name == "setitem":
            self._value(args[0], new=True)  # nobody made it: it cannot be followed any further
            return result
        same = any(result is tensor for tensor in given)
        if same and not in_place and name in IDENTITIES:
            return result
        if same:
            # The caller gets another object, so that who goes on with the old one is found out.
            old, result = result, result.view_as(result)
            self._value(old, new=True)
        found = tree_leaves(result)
        outputs = tuple(self._value(t, new=True) for t in found if isinstance(t, Tensor))
        if outputs and inputs:
            node = Node(key, self.where(), name, inputs, outputs, endless, (args, kwargs))
            self.trace.nodes.append(node)
        return result


def _endless(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel():
        return False
    return not bool(tensor.detach().abs().amax() <= ENDLESS)
