"""What a network's latency would be if its channel groups kept less, from times measured beforehand.

Times of single layers at a grid of widths are interpolated and added up; the sum is then brought to that of
whole networks, of which a few were measured: NetAdapt (Yang et al. 2018, section 3.3) with a correction for
what a sum of layers leaves out. Nothing is measured here.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.structure.costs import Example, Kept, Meter, TensorCosts
from lightning_prune.structure.groups import Group


@dataclass(frozen=True)
class LayerTimes:
    """How long one layer takes at a grid of widths.

    Attributes:
        first: Sizes of the weight's first dimension, ascending.
        second: Sizes of its second dimension, ascending.
        ms: Milliseconds, by first and by second size.
    """

    first: Sequence[int]
    second: Sequence[int]
    ms: Sequence[Sequence[float]]

    def __call__(self, shape: tuple[int, ...]) -> float:
        """Return the milliseconds of a weight of this shape, interpolated between the grid's.

        Outside the grid its border counts: a layer narrower than was measured is not thought to be faster.

        Example:
            >>> LayerTimes([16, 32], [8, 16], [[1.0, 2.0], [3.0, 4.0]])((24, 8, 3, 3))
            2.0
        """
        (low, high, part), (left, right, share) = (
            _between(self.first, shape[0]),
            _between(self.second, shape[1]),
        )

        def across(row: Sequence[float]) -> float:
            return row[left] + share * (row[right] - row[left])

        return across(self.ms[low]) + part * (across(self.ms[high]) - across(self.ms[low]))


def _between(grid: Sequence[int], size: int) -> tuple[int, int, float]:
    at = bisect_right(grid, size)
    if at == 0 or at == len(grid):
        edge = min(at, len(grid) - 1)
        return edge, edge, 0.0
    return at - 1, at, (size - grid[at - 1]) / (grid[at] - grid[at - 1])


@dataclass(frozen=True)
class LatencyTable:
    """Measured times of a network on one target.

    Attributes:
        layers: `{weight: its layer's times}`.
        points: `(sum of the layers, the whole network)` in ms, of the networks that were measured whole.
        target: Hardware and runtime that the times are of, as text.
        pace: What the anchor took when they were measured, in ms: later times are told at this pace.
        known: Milliseconds of all networks that were measured, by key.
        network: The key of the network that the layers are of.
    """

    layers: Mapping[str, LayerTimes]
    points: Sequence[tuple[float, float]] = field(default=())
    target: str = ""
    pace: float | None = None
    known: Mapping[str, float] = field(default_factory=dict)
    network: str = ""

    def whole(self, added: float) -> float:
        """Return the milliseconds of a network from the sum of its layers.

        Between the networks that were measured it is interpolated; beyond them it follows the nearest two.

        Example:
            >>> table = LatencyTable({}, [(1.0, 2.0), (3.0, 4.0)])
            >>> table.whole(2.0), table.whole(4.0), LatencyTable({}, [(2.0, 3.0)]).whole(4.0)
            (3.0, 5.0, 6.0)
        """
        if len(self.points) < 2:
            return added * (self.points[0][1] / self.points[0][0] if self.points else 1.0)
        at = min(max(bisect_right([x for x, _ in self.points], added), 1), len(self.points) - 1)
        (x0, y0), (x1, y1) = self.points[at - 1 : at + 1]
        return max(0.0, y0 + (added - x0) * (y1 - y0) / (x1 - x0))

    def with_points(self, points: Sequence[tuple[float, float]]) -> LatencyTable:
        """Return the table with other whole networks, in order and without such that contradict it.

        What takes longer by its layers takes longer as a whole; where noise says otherwise, the longer time
        counts for both.

        Example:
            >>> LatencyTable({}).with_points([(3.0, 4.0), (1.0, 5.0), (1.0, 5.5)]).points
            [(1.0, 5.5), (3.0, 5.5)]
        """
        highest, kept = 0.0, {}
        for added, whole in sorted(points):
            highest = kept[added] = max(highest, whole)
        return replace(self, points=list(kept.items()))

    def plain(self) -> dict[str, Any]:
        """Return it as plain data, for JSON and checkpoints."""
        return asdict(self) | {"points": [list(point) for point in self.points]}

    @classmethod
    def from_plain(cls, data: Mapping[str, Any]) -> LatencyTable:
        """Read what `plain` returned.

        Example:
            >>> table = LatencyTable({"w": LayerTimes([1], [1], [[0.5]])}, [(0.5, 0.6)], "here")
            >>> LatencyTable.from_plain(table.plain()) == table
            True
        """
        layers = {name: LayerTimes(**times) for name, times in data["layers"].items()}
        points = [(added, whole) for added, whole in data["points"]]
        return cls(layers, points, data["target"], data["pace"], dict(data["known"]), data["network"])


class LatencyCosts:
    """The predicted latency of a network, in milliseconds.

    Args:
        module: The network; nothing in it changes.
        groups: Its channel groups.
        table: What was measured.

    Example:
        >>> table = LatencyTable({"weight": LayerTimes([1, 2], [4], [[1.0], [2.0]])}, [(2.0, 3.0)])
        >>> LatencyCosts(nn.Linear(4, 2), [], table)({})
        3.0
    """

    def __init__(self, module: nn.Module, groups: Sequence[Group], table: LatencyTable) -> None:
        named = dict(module.named_parameters(remove_duplicate=False))
        units = {name: times for name, times in table.layers.items() if name in named}
        self.layers = TensorCosts(module, groups, units)
        """The sum of the layers alone."""
        self._table = table

    def __call__(self, kept: Kept) -> float:
        """Return the milliseconds when each group keeps these channels."""
        return self._table.whole(self.layers(kept))

    def within(self, kept: Kept, allowed: float) -> bool:
        """Tell whether that is at most what is allowed."""
        return self(kept) <= allowed

    def confirm(self, kept: Kept) -> bool:
        """Return True: a prediction is all there is."""
        return True


def latency_meter(table: LatencyTable) -> Meter:
    """Make the meter that predicts from a table.

    Args:
        table: What was measured.

    Returns:
        For `plan` and its like.
    """

    def meter(module: nn.Module, groups: Sequence[Group], example: Example) -> LatencyCosts:
        return LatencyCosts(module, groups, table)

    return meter


def per_millisecond(
    module: nn.Module,
    groups: Sequence[Group],
    table: LatencyTable,
    widths: Mapping[str, int],
    score: Callable[[Group], Tensor],
) -> dict[str, Tensor]:
    r"""Weigh importance against the time that it costs: the score of HALP (Shen et al. 2021, equation 7).

    HALP's importances add up, and ours are relative to their group: added up, they would let the slowest
    group go almost whole. So a channel counts once in each of the group's layers, and the more, the fewer
    are left. The least important of :math:`n` channels of :math:`k` layers that were :math:`N` wide, of
    importance :math:`s`, which is one on average, is worth, if it takes :math:`t`,

    .. math:: k\, s\, (N / n)^2 / t

    Args:
        module: The network as it is now.
        groups: Its channel groups.
        table: What was measured.
        widths: `{group: width in the dense network}`.
        score: Gives the importance of each channel of a group.

    Returns:
        `{group: importance of each channel per millisecond that it takes}`, of the groups that may lose some.
    """
    costs = LatencyCosts(module, groups, table).layers
    dense = costs({})
    found = {}
    for group in groups:
        if group.reason:
            continue
        # The slope over half of the width: single channels are beyond what was measured.
        half = torch.arange(group.channels // 2, dtype=torch.int64)
        saved = (dense - costs({group.name: half})) / (group.channels - len(half))
        worth = score(group)
        left = group.channels - torch.empty_like(worth).scatter_(
            0, worth.argsort(stable=True), torch.arange(len(worth), dtype=worth.dtype)
        )
        layers = len({member.tensor for member in group.members if member.tensor in table.layers})
        rarity = (widths.get(group.name, group.channels) / left) ** 2
        found[group.name] = layers * worth * rarity / max(saved, 1e-9)
    return found
