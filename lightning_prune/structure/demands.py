"""Which parts of a network must shrink in step, so that the numbers in its forward come out right.

Each demand says that two numbers are equal. A number is an extent, an attribute of a module, or computed from
such. Where each channel counts alike on both sides, or an attribute can follow, nothing is asked; else the
parts involved are bundled: all of them keep the same fraction. A bundle is laid out in *blocks* of equally
many atoms, of which every block keeps equally many.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from math import gcd

import torch
from torch import Tensor

from lightning_prune.structure.record import Record
from lightning_prune.structure.sizes import Attribute, Demand, Expression, Extent, Formula

_TIED = "its channels are tied to others that cannot shrink in step"
_FIXED = "its width must equal that of {}, which stays"
_NUMBER = "its forward computes with its width in a way that no cut fits"


@dataclass
class Settled:
    """What demands ask for.

    Attributes:
        bundles: Parts that must shrink in step, by their places; every part is in one.
        blocks: `{bundle: the block of each of its classes, in ascending order of classes}`.
        attributes: `{attribute: the class that each of its positions goes with, or 0}`.
    """

    bundles: list[list[int]] = field(default_factory=list)
    blocks: dict[int, Tensor] = field(default_factory=dict)
    attributes: dict[str, Tensor] = field(default_factory=dict)


def settle(
    record: Record, root: Tensor, parts: Sequence[Tensor], names: Sequence[str], reasons: dict[int, str]
) -> Settled:
    """Bundle parts so that every demand can be met.

    Args:
        record: What a pass found out.
        root: The class of each label.
        parts: The classes of each part, ascending.
        names: What to call each part.
        reasons: `{part: why it must stay}`; parts for which no cut fits are added.

    Returns:
        The bundles, their blocks, and the attributes that follow.
    """
    demands = [*record.demands, *_of_runs(record)]
    while True:
        before = len(reasons)
        settled = _Solver(root, parts, names, reasons).solve(demands)
        if len(reasons) == before:
            return settled


def _of_runs(record: Record) -> list[Demand]:
    """Runs of labels that must keep equally many, such as the groups of a convolution."""
    demands = []
    for labels, runs in record.balanced:
        first, *others = (Extent(run[:, None]) for run in labels.view(runs, -1))
        demands += [Demand(first, other) for other in others]
    return demands


class _Solver:
    def __init__(
        self, root: Tensor, parts: Sequence[Tensor], names: Sequence[str], reasons: dict[int, str]
    ) -> None:
        self.root, self.parts, self.names, self.reasons = root, parts, names, reasons
        self.part_of = torch.full((len(root),), -1)
        for place, part in enumerate(parts):
            if place not in reasons:
                self.part_of[part] = place
        self.leader = list(range(len(parts)))
        self.marks: dict[int, list[Tensor]] = {place: [] for place in range(len(parts))}
        self.rows: dict[str, Tensor] = {}  # of attributes
        self.scaled: dict[str, tuple[int, int]] = {}  # attributes that follow a bundle: its leader, value

    def solve(self, demands: Sequence[Demand]) -> Settled:
        self._define(demands)
        formulas = []
        for demand in demands:
            if isinstance(demand.left, Formula) or isinstance(demand.right, Formula):
                formulas.append(demand)
            else:
                self._equate(demand)
        for demand in formulas:
            self._couple(demand)
        for demand in formulas:
            self._check(demand)
        return self._lay_out()

    # What numbers are.

    def _define(self, demands: Sequence[Demand]) -> None:
        """An attribute is what it is used as, where it is used as it stands."""
        for demand in demands:
            for one, other in ((demand.left, demand.right), (demand.right, demand.left)):
                if isinstance(one, Attribute):
                    rows = self._rows(other)
                    known = self.rows.get(one.name)
                    if rows is not None and (known is None or not bool(known.any())):
                        self.rows[one.name] = rows

    def _rows(self, expression: Expression) -> Tensor | None:
        """The class that each position goes with, or 0 where it stays."""
        if isinstance(expression, Attribute):
            return self.rows.get(expression.name)
        if not isinstance(expression, Extent):
            return None
        classes = self.root[expression.labels]
        first = classes[:, 0]
        alone = (classes == first[:, None]).all(1) & (self.part_of[first] >= 0)
        return torch.where(alone, first, 0)

    def _tally(self, expression: Expression) -> tuple[dict[int, Tensor], int]:
        """How many positions go with each class of each part, and how many stay."""
        rows = self._rows(expression)
        if rows is None:
            return {}, _plain(expression)
        counts = {}
        places = self.part_of[rows]
        for place in torch.unique(places[rows > 0]).tolist():
            part = self.parts[place]
            at = torch.searchsorted(part, rows[(places == place) & (rows > 0)])
            counts[place] = torch.bincount(at, minlength=len(part))
        return counts, int((rows == 0).sum())

    def _value(self, expression: Expression, kept: Mapping[int, Fraction]) -> Fraction:
        if isinstance(expression, Formula):
            left, right = self._value(expression.left, kept), self._value(expression.right, kept)
            return Fraction(expression.operation(left, right)) if right or left else Fraction(0)
        if isinstance(expression, Attribute) and expression.name in self.scaled:
            leader, value = self.scaled[expression.name]
            return value * kept.get(leader, Fraction(1))
        counts, stay = self._tally(expression)
        one = Fraction(1)
        return stay + sum((int(c.sum()) * kept.get(p, one) for p, c in counts.items()), Fraction(0))

    def _parts_in(self, expression: Expression) -> set[int]:
        if isinstance(expression, Formula):
            return self._parts_in(expression.left) | self._parts_in(expression.right)
        return set(self._tally(expression)[0])

    # What must go together.

    def _find(self, place: int) -> int:
        while self.leader[place] != place:
            place = self.leader[place]
        return place

    def _join(self, places: Sequence[int]) -> None:
        for place in places[1:]:
            self.leader[self._find(place)] = self._find(places[0])

    def _equate(self, demand: Demand) -> None:
        (left, stays), (right, stay) = self._tally(demand.left), self._tally(demand.right)
        if (
            stays == stay
            and left.keys() == right.keys()
            and all(torch.equal(left[p], right[p]) for p in left)
        ):
            return
        zero = torch.zeros(1, dtype=torch.int64)
        marks = {p: left.get(p, zero) - right.get(p, zero) for p in sorted({*left, *right})}
        marks = {p: mark for p, mark in marks.items() if bool(mark.any())}
        if stays != stay:
            self._refuse(list(marks), _FIXED.format("another"))
        elif marks:
            self._join(list(marks))
            for place, mark in marks.items():
                self.marks[place].append(mark)

    def _refuse(self, places: Sequence[int], reason: str) -> None:
        for place in places:
            self.reasons.setdefault(place, reason)

    def _holds(self, demand: Demand, kept: Mapping[int, Fraction]) -> bool:
        try:
            return self._value(demand.left, kept) == self._value(demand.right, kept)
        except ZeroDivisionError:
            return False

    def _couple(self, demand: Demand) -> None:
        """Join the parts of a formula that does not hold when one of them shrinks alone."""
        places = sorted(self._parts_in(demand.left) | self._parts_in(demand.right))
        for place in places:
            count = len(self.parts[place])
            for left in {count - 1, count // 2} - {0}:
                if not self._holds(demand, {place: Fraction(left, count)}):
                    self._join(places)
                    for extent in (*_extents(demand.left), *_extents(demand.right)):
                        for part, mark in self._tally(extent)[0].items():
                            self.marks[part].append(mark)
                    return

    def _check(self, demand: Demand) -> None:
        """See that a formula holds when its parts shrink in step, maybe with an attribute of it."""
        places = sorted(self._parts_in(demand.left) | self._parts_in(demand.right))
        leaders = {self._find(place) for place in places}
        loose = [
            a for a in (*_attributes(demand.left), *_attributes(demand.right)) if a.name not in self.rows
        ]
        for leader in leaders:
            members = [p for p in range(len(self.parts)) if self._find(p) == leader]
            unit = self._unit(members)
            fractions = [Fraction(k, unit) for k in {1, unit // 2, unit - 1} - {0}]

            def fits(members: list[int] = members, fractions: list[Fraction] = fractions) -> bool:
                return all(self._holds(demand, dict.fromkeys(members, part)) for part in fractions)

            if fits():
                continue
            for attribute in loose:
                if attribute.value % unit == 0 and attribute.name not in self.scaled:
                    self.scaled[attribute.name] = (leader, attribute.value)
                    if fits():
                        break
                    del self.scaled[attribute.name]
            else:
                self._refuse(members, _NUMBER)

    # What comes of it.

    def _levels(self, place: int) -> Tensor:
        """Which classes of a part count alike everywhere, shape (classes,)."""
        count = len(self.parts[place])
        if not self.marks[place]:
            return torch.zeros(count, dtype=torch.int64)
        marks = torch.stack([mark.expand(count) for mark in self.marks[place]], 1)
        levels: Tensor = torch.unique(marks, dim=0, return_inverse=True)[1]
        return levels

    def _unit(self, members: Sequence[int]) -> int:
        return gcd(*(int(n) for place in members for n in torch.bincount(self._levels(place)).tolist()))

    def _lay_out(self) -> Settled:
        members: dict[int, list[int]] = {}
        for place in range(len(self.parts)):
            members.setdefault(self._find(place), []).append(place)
        settled = Settled(list(members.values()))
        layouts: dict[int, tuple[Tensor, Tensor]] = {}
        for number, places in enumerate(settled.bundles):
            if len(places) > 1 or self.marks[places[0]]:
                unit = self._unit(places)
                if unit < 2:
                    self._refuse(places, _TIED)
                    continue
                classes, blocks = self._blocks(places, unit)
                settled.blocks[number] = blocks
                layouts[self._find(places[0])] = classes, blocks
        settled.attributes = {name: rows for name, rows in self.rows.items() if bool(rows.any())}
        for name, (leader, value) in self.scaled.items():
            classes, blocks = layouts.get(leader, (self.parts[leader], torch.zeros(len(self.parts[leader]))))
            first = classes[blocks == 0]
            settled.attributes[name] = first.repeat_interleave(value // len(first))
        return settled

    def _blocks(self, places: Sequence[int], unit: int) -> tuple[Tensor, Tensor]:
        classes, blocks, count = [], [], 0
        for place in places:
            levels = self._levels(place)
            block = torch.empty_like(levels)
            for level in range(int(levels.max()) + 1):
                here = (levels == level).nonzero().flatten()
                several = len(here) // unit
                block[here] = count + torch.arange(len(here)) % several
                count += several
            classes.append(self.parts[place])
            blocks.append(block)
        order = torch.cat(classes).argsort()
        return torch.cat(classes)[order], torch.cat(blocks)[order]


def _plain(expression: Expression) -> int:
    assert isinstance(expression, (int, Attribute))
    return expression if isinstance(expression, int) else expression.value


def _extents(expression: Expression) -> list[Extent]:
    if isinstance(expression, Formula):
        return [*_extents(expression.left), *_extents(expression.right)]
    return [expression] if isinstance(expression, Extent) else []


def _attributes(expression: Expression) -> list[Attribute]:
    if isinstance(expression, Formula):
        return [*_attributes(expression.left), *_attributes(expression.right)]
    return [expression] if isinstance(expression, Attribute) else []
