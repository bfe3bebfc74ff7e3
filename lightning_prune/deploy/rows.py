"""Comparing lists of detections, whose order and number hang on comparisons of nearly equal numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SHARE = 0.9
"""How many of the rows must be alike, where the others may be decided the other way by a rounding error."""


@dataclass
class Rows:
    """How many rows of two lists of detections are alike.

    Attributes:
        matched: Rows of the one that have their like in the other.
        total: Rows of the longer one.
    """

    matched: int = 0
    total: int = 0

    def alike(self) -> bool:
        """Tell whether enough rows are alike; one may always differ, all never."""
        return self.matched >= min(SHARE * self.total, max(self.total - 1, 1), self.total)

    def pairs(
        self, expected: Sequence[Tensor], actual: Sequence[Tensor], allowed: Sequence[float]
    ) -> tuple[list[int], list[int]]:
        """Count the rows of two lists that are alike, whatever their order.

        Args:
            expected: The columns of the one: boxes, scores, labels; the first axis is the detections.
            actual: Those of the other.
            allowed: How far each column may differ.

        Returns:
            The places of the rows in the one that have their like in the other, and of their likes.

        Example:
            >>> rows, scores = Rows(), torch.tensor([0.9, 0.5])
            >>> rows.pairs([scores], [scores.flip(0)], [1e-3])
            ([0, 1], [1, 0])
            >>> rows
            Rows(matched=2, total=2)
        """
        left, right = (_table(columns, allowed) for columns in (expected, actual))
        free = torch.ones(len(right), dtype=torch.bool)
        here: list[int] = []
        there: list[int] = []
        for place, row in enumerate(left if len(right) else ()):
            distance = (right - row).abs().amax(1).masked_fill(~free, torch.inf)
            nearest = int(distance.argmin())
            if distance[nearest] <= 1:
                free[nearest] = False
                here.append(place)
                there.append(nearest)
        self.matched += len(here)
        self.total += max(len(left), len(right))
        return here, there


def are_rows(tensors: Sequence[Tensor]) -> bool:
    """Tell whether tensors can be the columns of one list: all have the same first axis."""
    return bool(tensors) and all(t.dim() for t in tensors) and len({t.shape[0] for t in tensors}) == 1


def _table(columns: Sequence[Tensor], allowed: Sequence[float]) -> Tensor:
    flat = [t.detach().double().flatten(1) if t.dim() > 1 else t.detach().double()[:, None] for t in columns]
    return torch.cat([t / scale for t, scale in zip(flat, allowed, strict=True)], 1).nan_to_num(nan=1e30)
