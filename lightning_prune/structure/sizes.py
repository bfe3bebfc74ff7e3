"""Whole numbers that remember where they come from: a tensor's extent, or an attribute of a module.

A forward pass takes tensors apart with numbers: `x.view(b, n, self.num_heads, c // self.num_heads)`. When
channels go, these numbers must come out right. While a network is followed, the extents of labelled tensors
and the attributes of the user's modules are `Size`s; what they are used for is noted as a `Demand`.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_prune.structure.layers import own_widths
from lightning_prune.structure.products import layer_norm
from lightning_prune.structure.provenance import Follower, tensors_in
from lightning_prune.structure.record import PARAMETER, WILD, Record, new_labels, shape_at, varying
from lightning_prune.structure.weight_norms import weight_normed


@dataclass(frozen=True)
class Attribute:
    """A number in a module: `"module@name"`, or `"module@name[place]"`."""

    name: str
    value: int


@dataclass(frozen=True, eq=False)
class Extent:
    """How many positions a dimension has, by the labels of each, shape (positions, labels of one)."""

    labels: Tensor


@dataclass(frozen=True)
class Formula:
    """A number that was computed from others."""

    operation: Callable[[Any, Any], Any]
    left: Expression
    right: Expression


Expression = Attribute | Extent | Formula | int


@dataclass(frozen=True)
class Demand:
    """Two numbers that are equal, and must be after a cut."""

    left: Expression
    right: Expression


class Size(int):
    """A whole number with its expression.

    Example:
        >>> heads = Size.of(Attribute("attention@num_heads", 4), 4)
        >>> (32 // heads).expression.right.name, type(heads * 0.5)
        ('attention@num_heads', <class 'float'>)
    """

    expression: Expression
    record: Record | None = None

    # What is not hashable is in no cache, such as that of einops: its numbers would be of an earlier call.
    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def of(cls, expression: Expression, value: int, record: Record | None = None) -> Size:
        """Make one."""
        size = cls(value)
        size.expression, size.record = expression, record
        return size

    def __eq__(self, other: object) -> bool:
        """Compare; that two of them are equal is a demand, as in an assertion."""
        if not isinstance(other, int):
            return NotImplemented
        equal = int(self) == other
        if equal and isinstance(other, Size) and self.record is not None:
            self.record.demands.append(Demand(self.expression, other.expression))
        return equal

    def __ne__(self, other: object) -> bool:
        """Compare."""
        return not self == other

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies are plain numbers."""
        return int, (int(self),)

    def __neg__(self) -> int:
        """Negate."""
        return 0 - self


def _operation(name: str, function: Callable[[Any, Any], Any], *, swapped: bool) -> Callable[..., Any]:
    def method(self: Size, other: Any) -> Any:
        if not isinstance(other, int) or isinstance(other, bool):
            return NotImplemented
        a, b = (int(other), int(self)) if swapped else (int(self), int(other))
        theirs: Expression = other.expression if isinstance(other, Size) else int(other)
        left, right = (theirs, self.expression) if swapped else (self.expression, theirs)
        return Size.of(Formula(function, left, right), function(a, b), self.record)

    method.__name__ = name
    return method


for _name in ("add", "sub", "mul", "floordiv", "mod"):
    for _swapped in (False, True):
        _full = f"__{'r' if _swapped else ''}{_name}__"
        setattr(Size, _full, _operation(_full, getattr(operator, _name), swapped=_swapped))


@contextlib.contextmanager
def numbered(module: nn.Module, record: Record) -> Iterator[None]:
    """Let the numbers in a network's own modules be `Size`s.

    Args:
        module: The network; every attribute is what it was afterwards.
        record: Where demands go.
    """
    replaced: list[tuple[dict[str, Any], str, Any, Any]] = []
    for owner, child in module.named_modules():
        if isinstance(child, torch.jit.ScriptModule):
            continue
        for name, value in own_widths(child).items():
            label = f"{owner}@{name}"
            sized: Any
            if isinstance(value, int):
                sized = Size.of(Attribute(label, value), value, record)
            else:
                items = [
                    Size.of(Attribute(f"{label}[{at}]", item), item, record) for at, item in enumerate(value)
                ]
                sized = type(value)(items)
            replaced.append((vars(child), name, value, sized))
    try:
        for attributes, name, _, sized in replaced:
            attributes[name] = sized
        yield
    finally:
        for attributes, name, value, sized in replaced:
            if attributes.get(name) is sized:  # not where the forward has set it
                attributes[name] = value


class Watcher(TorchFunctionMode):
    """Notes what sizes are used for.

    Args:
        follower: What knows the labels of tensors.
        module: The network.
    """

    def __init__(self, follower: Follower, module: nn.Module) -> None:
        super().__init__()
        self.directions = {id(module.get_parameter(one.direction)) for one in weight_normed(module)}
        self.follower = follower
        self.record = follower.record

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the function, then its rule."""
        kwargs = dict(kwargs or {})
        since = self.record.mark()
        out = func(*args, **kwargs)
        if func is torch.nn.functional.rms_norm:
            return self._rms_norm(out, since, *args, **kwargs)
        if func is torch._weight_norm:
            return self._weight_norm(out, since, *args, **kwargs)
        if getattr(func, "__self__", None) is _SHAPE:
            return self._sized(args[0], out)
        name = getattr(func, "__name__", "")
        if name == "size":
            if isinstance(out, int):
                dim = args[1] if len(args) > 1 else kwargs["dim"]
                return self._sized(args[0], args[0].shape)[dim]
            return self._sized(args[0], out)
        rule = _RULES.get(name)
        if rule is not None:
            since = self.record.mark()
            rule(self, args, kwargs, out)
            if self.record.mark() != since:
                self.follower.found(tensors_in(out), since)
        return out

    def _rms_norm(
        self,
        out: Tensor,
        since: tuple[int, ...],
        input: Tensor,
        normalized_shape: Any,
        weight: Tensor | None = None,
        eps: float | None = None,
    ) -> Tensor:
        """By its operators it mixes its channels; as a layer, what stays is normalised anew."""
        self.record.rewind(since)
        layer_norm(self.follower, None, (input, normalized_shape, weight, None), {}, out)
        read = [self.follower.of(t).event for t in (input, weight) if t is not None]
        self.follower.of(out).event = self.record.event(since, read)
        return out

    def _weight_norm(self, out: Tensor, since: tuple[int, ...], v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
        """By its operators it mixes what a weight reads; a cut keeps the rest of the weight what it was."""
        if id(v) in self.directions:
            self.record.rewind(since)
            factors = self.follower.merge([self.follower.of(v).factors, self.follower.of(g).factors], v.dim())
            self.follower.give(out, factors, PARAMETER)
            self.follower.of(out).event = self.record.event(
                since, [self.follower.of(t).event for t in (v, g)]
            )
        return out

    def _sized(self, tensor: Tensor, shape: Any) -> Any:
        factors = self.follower.of(tensor).factors
        if not factors:
            return shape
        dims = {dim for factor in factors for dim in varying(factor)}
        return torch.Size(
            [
                Size.of(self.extent(tensor, dim), size, self.record) if dim in dims else size
                for dim, size in enumerate(shape)
            ]
        )

    def extent(self, tensor: Tensor, dim: int) -> Extent:
        """Return the extent of a tensor along one dimension."""
        dim %= tensor.dim()
        factors = [f for f in self.follower.of(tensor).factors if dim in varying(f)]
        if not factors:
            return Extent(torch.zeros(tensor.shape[dim], 1, dtype=torch.int64))
        return Extent(torch.cat([f.movedim(dim, 0).reshape(f.shape[dim], -1) for f in factors], 1))

    def demand(self, size: Any, extent: Extent | Expression) -> None:
        """Note that a size must be an extent, if it is more than a number."""
        if isinstance(size, Size):
            self.record.demands.append(Demand(size.expression, extent))


_SHAPE = torch.Tensor.shape  # what reads it has no name of its own


def _shaped(watcher: Watcher, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """`view`, `reshape`, `expand`: a number for each dimension of the output."""
    sizes = _sizes(args, kwargs)
    if not isinstance(out, Tensor) or len(sizes) != out.dim():
        return
    _laid_out(watcher, out)
    for dim, size in enumerate(sizes):
        if isinstance(size, Size):
            extent = watcher.extent(out, dim)
            # What was made on the way and has no channels yet takes on those of what it meets.
            if bool(extent.labels.any()) or watcher.follower.of(out).source != WILD:
                watcher.demand(size, extent)


def _sizes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    sizes = args[1:] if len(args) > 1 else tuple(kwargs.values())
    return tuple(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)) else sizes


def _expanded(watcher: Watcher, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """`expand`: what is repeated as often as a number says takes on the channels of what it meets."""
    sizes = _sizes(args, kwargs)
    new = out.dim() - args[0].dim()
    repeated = [size if d < new or args[0].shape[d - new] == 1 else 1 for d, size in enumerate(sizes)]
    known = watcher.follower.of(out)
    _from_nowhere(watcher, repeated, out, known.factors, known.source)
    watcher.follower.of(out).event = known.event
    _shaped(watcher, args, kwargs, out)


def _laid_out(watcher: Watcher, out: Tensor) -> None:
    watcher.record.grids += [f for f in watcher.follower.of(out).factors if len(varying(f)) > 1]


def _unflattened(watcher: Watcher, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
    sizes = kwargs.get("sizes", args[-1])
    if isinstance(dim, int) and isinstance(sizes, (tuple, list)):
        _laid_out(watcher, out)
        start = dim % (out.dim() - len(sizes) + 1)
        for place, size in enumerate(sizes):
            if isinstance(size, Size):
                watcher.demand(size, watcher.extent(out, start + place))


def _split(watcher: Watcher, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """`split`: each part has the size given."""
    sizes = args[1] if len(args) > 1 else next(iter(kwargs.values()))
    dim = _dim(args, kwargs, 2)
    if isinstance(sizes, int):
        sizes = [sizes] * len(out)
    for size, part in zip(sizes, out, strict=False):
        if isinstance(size, Size) and part.shape[dim] == size:
            watcher.demand(size, watcher.extent(part, dim))


def _chunked(watcher: Watcher, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """`chunk`: all parts are of one size."""
    dim = _dim(args, kwargs, 2)
    if len({part.shape[dim] for part in out}) == 1:
        first, *others = (watcher.extent(part, dim) for part in out)
        watcher.record.demands += [Demand(first, part) for part in others]


def _dim(args: tuple[Any, ...], kwargs: dict[str, Any], place: int) -> int:
    return int(args[place] if len(args) > place else kwargs.get("dim", 0))


def _narrowed(watcher: Watcher, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    if len(args) == 4:
        x, dim, start, length = args
        watcher.demand(length, watcher.extent(out, dim))
        _bounded(watcher, x, dim, start)


def _indexed(watcher: Watcher, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """`x[:, :k]`: as many positions as the number says lie before the bound."""
    x, index = args
    index = index if isinstance(index, tuple) else (index,)
    if not all(item is None or item is Ellipsis or isinstance(item, (int, slice)) for item in index):
        return
    used = sum(item is not None and item is not Ellipsis for item in index)
    dim = 0
    for item in index:
        if item is Ellipsis:
            dim += x.dim() - used
        elif item is not None:
            if isinstance(item, slice) and item.step in (None, 1):
                _bounded(watcher, x, dim, item.start)
                _bounded(watcher, x, dim, item.stop)
            dim += 1


def _bounded(watcher: Watcher, x: Tensor, dim: int, bound: Any) -> None:
    if isinstance(bound, Size) and 0 < abs(int(bound)) < x.shape[dim]:
        whole = watcher.extent(x, dim)
        size: Expression = bound.expression
        if int(bound) < 0:
            size = Formula(operator.add, whole, size)
        watcher.record.demands.append(Demand(size, Extent(whole.labels[: int(bound)])))


def _created(watcher: Watcher, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """`zeros` and the like: channels that come from nowhere, as many as a number says."""
    lists = [item for item in (*args, *kwargs.values()) if isinstance(item, (tuple, list))]
    sizes = lists[0] if lists else [item for item in args if isinstance(item, int)]
    if isinstance(out, Tensor) and len(sizes) == out.dim():
        _from_nowhere(watcher, sizes, out)


def _from_nowhere(
    watcher: Watcher, sizes: Any, out: Tensor, known: Sequence[Tensor] = (), source: int = WILD
) -> None:
    factors = []
    for dim, size in enumerate(sizes):
        if isinstance(size, Size) and int(size) > 1:
            labels = new_labels(watcher.record, "=", dim, int(size))
            watcher.record.guesses |= set(labels.tolist())
            watcher.demand(size, Extent(labels[:, None]))
            factors.append(labels.view(shape_at(dim, out.dim(), int(size))))
    if factors:
        watcher.follower.give(out, [*known, *factors], source)


def _normalised(watcher: Watcher, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    shape = args[1] if len(args) > 1 else kwargs["normalized_shape"]
    for place, size in enumerate(reversed(tuple(shape))):
        if isinstance(size, Size):
            watcher.demand(size, watcher.extent(args[0], args[0].dim() - 1 - place))


def _convolved(watcher: Watcher, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """A depthwise convolution has as many groups as channels."""
    groups = args[6] if len(args) > 6 else kwargs.get("groups")
    x = args[0] if args else kwargs["input"]
    if isinstance(groups, Size) and groups == x.shape[-out.dim() + 1]:
        watcher.demand(groups, watcher.extent(x, -out.dim() + 1))


_RULES: dict[str, Callable[..., None]] = {
    **dict.fromkeys(("view", "reshape"), _shaped),
    **dict.fromkeys(("expand", "broadcast_to"), _expanded),
    **dict.fromkeys(("split", "split_with_sizes", "unsafe_split", "tensor_split"), _split),
    **dict.fromkeys(("zeros", "ones", "empty", "rand", "randn", "full"), _created),
    **dict.fromkeys(("new_zeros", "new_ones", "new_empty", "new_full"), _created),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolved),
    "unflatten": _unflattened,
    "chunk": _chunked,
    "narrow": _narrowed,
    "__getitem__": _indexed,
    "layer_norm": _normalised,
}
