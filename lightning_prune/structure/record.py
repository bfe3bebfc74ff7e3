"""What a pass through a network found out, in terms of labels, and which labels are one class in the end."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

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


def new_labels(record: Record, name: str, dim: int, size: int) -> Tensor:
    """Make labels for one dimension of something that is owned."""
    record.owners.append(Owner(name, dim, record.count, size))
    labels = torch.arange(record.count, record.count + size)
    record.count += size
    return labels


def paired(left: Tensor, right: Tensor) -> list[Tensor]:
    """Pair labels position by position, where both are and they differ, as `Record.pairs` has them.

    Example:
        >>> paired(torch.tensor([1, 0, 2]), torch.tensor([3, 4, 2]))[0] == 1 * 2**31 + 3
        tensor([True])
    """
    left, right = torch.broadcast_tensors(left, right)  # type: ignore[no-untyped-call]
    both = (left > 0) & (right > 0) & (left != right)
    return [left[both] * _WIDE + right[both]] if bool(both.any()) else []


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


def shape_at(dim: int, rank: int, size: int) -> tuple[int, ...]:
    """The shape of a factor that depends on one dimension.

    Example:
        >>> shape_at(1, 3, 8)
        (1, 8, 1)
    """
    return tuple(size if d == dim else 1 for d in range(rank))
