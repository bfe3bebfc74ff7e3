"""Following channels through one forward pass, operator by operator.

Every position of every dimension of every parameter and buffer gets a label of its own. As the network runs,
each tensor carries labels along with its values: what a view, a concatenation or a channel shuffle does to
the values it does to the labels; where an operator combines two labelled tensors, their labels become one
class; a product with a weight ends the labels it reads and begins the weight's own. What lives in one class
can only be removed together. An operator that is not known pins the labels it meets: they stay.

Labels are kept as *factors*: a tensor's factor is an int64 tensor of its rank, of size 1 along every
dimension on which its labels do not depend. Label 0 is none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from lightning_prune.cost import without_numbers

_WIDE = 2**31  # two labels in one integer: sorting pairs of them as rows takes a hundred times longer

WILD, PARAMETER, DATA = 0, 1, 2
"""What a tensor's values come from: constants made on the way, parameters alone, or the network's inputs."""


@dataclass
class Labels:
    """What is known of one tensor.

    Attributes:
        factors: Its labels; several where independent dimensions have their own.
        source: `WILD`, `PARAMETER` or `DATA`.
        view: Whether it shares memory with another tensor.
        event: What it took to make it.
        kept: Whether it outlives the pass: a parameter or a buffer.
        part: If it is a part of another tensor: that one, and which of its dimensions each of these is.
    """

    factors: list[Tensor] = field(default_factory=list)
    source: int = WILD
    view: bool = False
    event: Event | None = None
    kept: bool = False
    part: tuple[Tensor, tuple[int, ...]] | None = None


@dataclass(frozen=True, eq=False)
class Event:
    """One operator: what was found out in it, and what was done before.

    Attributes:
        found: Where in each list of the record it begins and ends.
        before: The events of the tensors that it read.
    """

    found: tuple[tuple[int, int], ...]
    before: tuple[Event, ...]


@dataclass(frozen=True)
class Owner:
    """The labels of one dimension of a parameter, buffer or bare layer: `start` to `start + size`."""

    name: str
    dim: int
    start: int
    size: int


@dataclass
class Record:
    """What a pass found out, in terms of labels.

    Attributes:
        owners: Whose labels are whose.
        pairs: Labels that are of one class, each of shape (n,): the first times `2**31`, plus the second.
        ties: As `pairs`, of one tensor: its labels are mixed.
        pins: `(labels that must stay, why)`.
        read: Labels of weights that read channels.
        made: Labels of weights that make channels.
        balanced: `(labels in order, runs)`: every run must keep equally many.
        demands: Numbers that must come out right after a cut, as `structure.sizes.Demand`s.
        grids: Labels that a view has laid out over several dimensions: what stays must be a grid too.
        broadcasts: Labels that met others which depend on more dimensions, such as a weight for each channel
            of a head: if the heads go whole, it stays.
        guesses: Labels of what is no layer's: a view that lays them over others' drops them.
        events: The operators that found something out.
        modes: `(False,)` if the network runs alike in eval mode and as in training, or only so.
        results: The events that the network's outputs, and whatever outlives a pass, came from.
    """

    owners: list[Owner] = field(default_factory=list)
    pairs: list[Tensor] = field(default_factory=list)
    ties: list[Tensor] = field(default_factory=list)
    pins: list[tuple[Tensor, str]] = field(default_factory=list)
    read: list[Tensor] = field(default_factory=list)
    made: list[Tensor] = field(default_factory=list)
    balanced: list[tuple[Tensor, int]] = field(default_factory=list)
    demands: list[Any] = field(default_factory=list)
    grids: list[Tensor] = field(default_factory=list)
    broadcasts: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    guesses: set[int] = field(default_factory=set)
    events: list[Event] = field(default_factory=list)
    results: list[Event] = field(default_factory=list)
    modes: tuple[bool, ...] = (False, True)
    count: int = 1

    def mark(self) -> tuple[int, ...]:
        """Say how much was found out so far."""
        return tuple(len(found) for found in self._found())

    def rewind(self, since: tuple[int, ...]) -> None:
        """Forget what was found out since a mark."""
        for found, length in zip(self._found(), since, strict=True):
            del found[length:]
        self.events = [e for e in self.events if all(e.found[at][1] <= n for at, n in enumerate(since))]

    def _found(self) -> tuple[list[Any], ...]:
        return (
            self.pairs,
            self.ties,
            self.pins,
            self.read,
            self.made,
            self.balanced,
            self.demands,
            self.grids,
            self.broadcasts,
        )

    def event(self, since: tuple[int, ...], before: Iterable[Event | None]) -> Event | None:
        """Put together what was found out since a mark and what was done before."""
        earlier = tuple(dict.fromkeys(event for event in before if event is not None))
        found = tuple(zip(since, self.mark(), strict=True))
        if all(start == stop for start, stop in found) and len(earlier) < 2:
            return earlier[0] if earlier else None
        event = Event(found, earlier)
        self.events.append(event)
        return event

    def forget_what_is_not_used(self) -> None:
        """Drop what ties and pins on ways that lead to none of the results: those only have to run."""
        alive: set[int] = set()
        waiting = list(self.results)
        while waiting:
            event = waiting.pop()
            if id(event) not in alive:
                alive.add(id(event))
                waiting += event.before
        dead = [event for event in self.events if id(event) not in alive]
        for place, found in enumerate(self._found()):
            if found is self.pins or found is self.ties:
                gone = {at for event in dead for at in range(*event.found[place])}
                found[:] = [item for at, item in enumerate(found) if at not in gone]
        self.events, self.results = [], []


class Follower(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Carries labels along with every operator that runs.

    Args:
        record: Where findings go.
        rules: `{operator: rule}`; a rule takes the follower, the operator, its arguments and its outputs.
        fallback: The rule of operators that are not listed.
    """

    def __init__(
        self, record: Record, rules: Mapping[str, Callable[..., None]], fallback: Callable[..., None]
    ):
        super().__init__()  # type: ignore[no-untyped-call]
        self.record = record
        self.rules = rules
        self.fallback = fallback
        self.known: Any = WeakIdKeyDictionary()
        self.aside = 0
        self.order: list[str] = []

    # What rules work with.

    def of(self, tensor: Any) -> Labels:
        """Return what is known of a tensor."""
        found: Labels = self.known.get(tensor) or Labels()
        return found

    def give(self, tensor: Tensor, factors: Iterable[Tensor], source: int, *, view: bool = False) -> None:
        """Say what a tensor carries; labels that have become one for all of it are pinned."""
        kept = []
        for factor in factors:
            small = compress(factor, tuple(tensor.shape))
            if any(size > 1 for size in small.shape):
                kept.append(small)
            else:
                self.pin([small], "single channels of it are taken apart")
        self.known[tensor] = Labels(self._certain(kept), source, view, kept=self.of(tensor).kept)

    def _guessed(self, factor: Tensor) -> bool:
        return bool(self.record.guesses) and int(factor.max()) in self.record.guesses

    def _certain(self, factors: list[Tensor]) -> list[Tensor]:
        """Drop labels that may be no channels, where a view has laid them over others."""
        if len(factors) < 2 or not self.record.guesses:
            return factors
        guessed = [self._guessed(factor) for factor in factors]
        return [
            factor
            for at, factor in enumerate(factors)
            if not guessed[at] or not any(_overlap(factor, x) for x in factors if x is not factor)
        ]

    def write(self, tensor: Tensor, factors: list[Tensor], source: int) -> None:
        """Say what was written into a part of another tensor: that one learns of it, or it is pinned."""
        known = self.of(tensor)
        whole, dims = known.part or (tensor, ())
        if not dims or any(
            whole.shape[dims[d]] != tensor.shape[d] for factor in factors for d in varying(factor)
        ):
            self.pin(factors, "it is written into a part of another tensor")
            return
        shaped = []
        for factor in factors:
            shape = [1] * whole.dim()
            for dim in varying(factor):
                shape[dims[dim]] = factor.shape[dim]
            order = sorted(range(factor.dim()), key=lambda dim: dims[dim])
            shaped.append(factor.permute(order).reshape(shape))
        theirs = self.of(whole)
        self.give(whole, self.merge([theirs.factors, shaped], whole.dim()), max(theirs.source, source))
        self.known[whole].event = theirs.event

    def pin(self, factors: Iterable[Tensor], reason: str) -> None:
        """Make labels stay."""
        self.record.pins += [(factor.flatten(), reason) for factor in factors if factor.numel()]

    def unite(self, left: Tensor, right: Tensor) -> None:
        """Make labels one class, position by position, where both are labelled."""
        self.record.pairs += _paired(left, right)

    def tie(self, factor: Tensor, dims: Sequence[int]) -> Tensor:
        """Make labels along some dimensions one class; what is left depends on the others only."""
        for dim in dims:
            if factor.shape[dim] > 1:
                best = factor.amax(dim, keepdim=True)
                self.record.ties += _paired(factor, best)
                factor = best
        return factor

    def merge(self, lists: Iterable[list[Tensor]], rank: int) -> list[Tensor]:
        """Bring together the factors of tensors that are combined position by position."""
        merged: list[Tensor] = []
        for factors in lists:
            for factor in factors:
                factor = factor.reshape((1,) * (rank - factor.dim()) + tuple(factor.shape))
                for other in [other for other in merged if _overlap(other, factor)]:
                    merged = [m for m in merged if m is not other]
                    small, large = sorted((other, factor), key=lambda x: len(varying(x)))
                    if set(varying(small)) < set(varying(large)):
                        self.record.broadcasts.append((small, large))
                        factor = large
                        continue
                    self.unite(other, factor)
                    first, second = (factor, other) if self._guessed(other) else (other, factor)
                    factor = torch.where(first > 0, first, second)
                merged.append(factor)
        return merged

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operator, then its rule."""
        kwargs = dict(kwargs or {})
        name = func.overloadpacket.__name__
        out = without_numbers(func, args) or func(*args, **kwargs)
        if "dropout" not in name:  # it keeps everything here
            self.order.append(name)
        rule = self.rules.get(name) or self.rules.get(name.rstrip("_")) or self.fallback
        inputs = [self.of(tensor).event for tensor in tensors_in((args, kwargs))]
        since = self.record.mark()
        try:
            rule(self, func, args, kwargs, out)
        except Exception:  # noqa: BLE001 - a call that a rule does not foresee is one without a rule
            for tensor in tensors_in((args, kwargs)):
                self.pin(self.of(tensor).factors, f"it goes through {name}")
            for tensor in tensors_in(out):
                self.known[tensor] = Labels([], DATA)
        self._happened(func, args, kwargs, out, self.record.event(since, inputs))
        return out

    def _happened(
        self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any, event: Event | None
    ) -> None:
        outs = tensors_in(out)
        for tensor in outs:
            if (labels := self.known.get(tensor)) is not None:
                labels.event = event
        if event is None:
            return
        if func._schema.is_mutable:
            for place, argument in enumerate(func._schema.arguments):
                written = args[place] if place < len(args) else kwargs.get(argument.name)
                if argument.is_write and isinstance(written, Tensor):
                    labels = self.of(written)
                    labels.event = event
                    self.known[written] = labels
                    if (
                        labels.view or labels.kept
                    ):  # what it is a part of, or outlives the pass, depends on it
                        self.record.results.append(event)
        elif not outs and not self.aside:  # a number, of which anything may be made
            self.record.results.append(event)

    def found(self, tensors: Sequence[Tensor], since: tuple[int, ...]) -> None:
        """Say that these tensors take what was found out since a mark."""
        event = self.record.event(since, [self.of(tensor).event for tensor in tensors])
        for tensor in tensors:
            labels = self.of(tensor)
            labels.event = event
            self.known[tensor] = labels


def _paired(left: Tensor, right: Tensor) -> list[Tensor]:
    left, right = torch.broadcast_tensors(left, right)  # type: ignore[no-untyped-call]
    both = (left > 0) & (right > 0) & (left != right)
    return [left[both] * _WIDE + right[both]] if bool(both.any()) else []


def _overlap(left: Tensor, right: Tensor) -> bool:
    return any(a > 1 and b > 1 for a, b in zip(left.shape, right.shape, strict=True))


def tensors_in(values: Any) -> list[Tensor]:
    """List the tensors in nested arguments.

    Example:
        >>> len(tensors_in(([torch.zeros(1), 2], {"x": torch.zeros(1)})))
        2
    """
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def compress(factor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Reduce a factor to size 1 along every dimension on which its labels do not depend.

    Example:
        >>> compress(torch.tensor([[1, 2], [1, 2]]), (2, 2))
        tensor([[1, 2]])
    """
    for dim in range(factor.dim()):
        if factor.shape[dim] > 1 and (
            factor.stride(dim) == 0 or bool((factor == factor.narrow(dim, 0, 1)).all())
        ):
            factor = factor.narrow(dim, 0, 1)
    return factor.contiguous()


def varying(factor: Tensor) -> list[int]:
    """List the dimensions on which a factor's labels depend.

    Example:
        >>> varying(torch.zeros(1, 3, 1))
        [1]
    """
    return [dim for dim, size in enumerate(factor.shape) if size > 1]


def label(follower: Follower, name: str, tensor: Tensor, *, certain: bool = True) -> None:
    """Give a parameter or buffer labels of its own, for every dimension that could shrink.

    Args:
        follower: What carries them.
        name: The tensor's qualified name.
        tensor: The tensor.
        certain: Whether it is a layer's, and its dimensions are channels. Others may be tokens or places,
            which do not shrink but by what they meet.
    """
    factors = []
    for dim, size in enumerate(tensor.shape):
        if size > 1:
            labels = new_labels(follower.record, name, dim, size)
            factors.append(labels.view(shape_at(dim, tensor.dim(), size)))
            if not certain:
                follower.record.guesses |= set(labels.tolist())
    follower.give(tensor, factors, PARAMETER)
    follower.of(tensor).kept = True


def align_recurrent(module: nn.Module, follower: Follower, state: Mapping[str, Tensor]) -> None:
    """All layers and directions of a recurrent stack have one width: unit `j` goes in all of them."""
    for name, layer in module.named_modules():
        if not isinstance(layer, nn.RNNBase):
            continue
        for stem, dim in (("weight_hh", 1), ("weight_hr", 1)):
            leaves = [leaf for leaf, _ in layer.named_parameters(recurse=False) if leaf.startswith(stem)]
            factors = [follower.of(state[f"{name}.{leaf}" if name else leaf]).factors for leaf in leaves]
            labels = [next(x for x in one if x.shape[dim] > 1).flatten() for one in factors]
            for other in labels[1:]:
                follower.unite(labels[0], other)


def new_labels(record: Record, name: str, dim: int, size: int) -> Tensor:
    """Make labels for one dimension of something that is owned."""
    record.owners.append(Owner(name, dim, record.count, size))
    labels = torch.arange(record.count, record.count + size)
    record.count += size
    return labels


def shape_at(dim: int, rank: int, size: int) -> tuple[int, ...]:
    """The shape of a factor that depends on one dimension.

    Example:
        >>> shape_at(1, 3, 8)
        (1, 8, 1)
    """
    return tuple(size if d == dim else 1 for d in range(rank))


def classes(record: Record) -> Tensor:
    """Give every label the smallest label of its class, shape (labels,)."""
    pairs = torch.unique(torch.cat([torch.zeros(1, dtype=torch.int64), *record.pairs, *record.ties]))
    root = connected(record.count, pairs // _WIDE, pairs % _WIDE)
    while True:
        before = root
        for small, large in record.broadcasts:
            root = _met(root, small, large)
        for grid in record.grids:
            root = _laid_out(root, grid)
        if root is before:
            return root


def _met(root: Tensor, small: Tensor, large: Tensor) -> Tensor:
    """Join labels with those that they met, unless classes there depend on other dimensions only."""
    places = compress(root[large], tuple(large.shape))
    if not set(varying(places)) & set(varying(small)):
        return root
    left, right = torch.broadcast_tensors(root[small], places)  # type: ignore[no-untyped-call]
    both = (left > 0) & (right > 0) & (left != right)
    if not bool(both.any()):
        return root
    return connected(len(root), left[both], right[both])[root]


def _laid_out(root: Tensor, grid: Tensor) -> Tensor:
    """Make classes one until those of a grid depend on one dimension only: the one that leaves the most."""
    places = compress(root[grid], tuple(grid.shape))
    if len(varying(places)) < 2:
        return root
    best = root
    for dim in varying(places):
        first = places
        for other in varying(places):
            first = first.narrow(other, 0, 1) if other != dim else first
        left, right = torch.broadcast_tensors(places, first)  # type: ignore[no-untyped-call]
        both = (left > 0) & (right > 0)
        joined = connected(len(root), left[both], right[both])[root]
        if best is root or len(torch.unique(joined[grid])) > len(torch.unique(best[grid])):
            best = joined
    return best


def connected(count: int, left: Tensor, right: Tensor) -> Tensor:
    """Give every one of `count` items the smallest that it is connected with, shape (count,).

    Args:
        count: How many items there are.
        left: One end of each connection, shape (n,).
        right: The other end.

    Returns:
        The smallest item of each one's component.

    Example:
        >>> connected(5, torch.tensor([4, 2]), torch.tensor([2, 1]))
        tensor([0, 1, 1, 3, 1])
    """
    parent = torch.arange(count)
    while True:
        # Each takes the smallest of its neighbours', then its parent's: logarithmically many rounds.
        smallest = torch.minimum(parent[left], parent[right])
        new = parent.scatter_reduce(0, left, smallest, "amin").scatter_reduce(0, right, smallest, "amin")
        new = new.scatter_reduce(0, parent[left], smallest, "amin").scatter_reduce(
            0, parent[right], smallest, "amin"
        )
        new = new[new]
        if torch.equal(new, parent):
            return parent
        parent = new


@contextlib.contextmanager
def hooks_aside(module: nn.Module, follower: Follower) -> Iterator[None]:
    """Tell the follower when a forward hook runs: numbers that one takes are for its own use.

    Tensors that a hook computes count only if the forward goes on with them, as any do.
    """

    def begin(layer: nn.Module, inputs: Any, output: Any) -> None:
        follower.aside += 1

    def end(layer: nn.Module, inputs: Any, output: Any) -> None:
        follower.aside -= 1

    # Hooks of all modules run before a module's own, and those registered last run last.
    handles = [nn.modules.module.register_module_forward_hook(begin)]
    handles += [child.register_forward_hook(end) for child in module.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def hook_bare_norms(module: nn.Module, follower: Follower) -> list[Any]:
    """Let normalisation layers without parameters own labels too: they know their width as a number."""
    handles = []
    norms = (
        nn.LayerNorm,
        nn.GroupNorm,
        nn.modules.instancenorm._InstanceNorm,
        nn.modules.batchnorm._BatchNorm,
    )
    for name, layer in module.named_modules():
        if isinstance(layer, norms) and not any(True for _ in (*layer.parameters(), *layer.buffers())):
            handles.append(layer.register_forward_pre_hook(_own(follower, name)))
    return handles


def _own(follower: Follower, name: str) -> Callable[..., None]:
    labels: dict[int, Tensor] = {}

    def hook(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        x = inputs[0]
        dim = x.dim() - 1 if isinstance(layer, nn.LayerNorm) else min(1, x.dim() - 1)
        size = x.shape[dim]
        if size not in labels:
            labels[size] = new_labels(follower.record, f"{name}#", 0, size)
        for factor in follower.of(x).factors:
            if dim in varying(factor):
                rest = [d for d in varying(factor) if d != dim]
                follower.unite(follower.tie(factor, rest).flatten(), labels[size])

    return hook
