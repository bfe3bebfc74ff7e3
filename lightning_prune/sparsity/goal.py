"""What is wanted: which fraction of zeros, divided how, in which pattern."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lightning_prune.sparsity import scopes
from lightning_prune.sparsity.patterns import Pattern


@dataclass(frozen=True)
class Goal:
    """The zeros that a schedule works towards.

    Attributes:
        sparsity: The final fraction of zeros, 0 to 1, of all weights or of each.
        scope: Of `scopes.SCOPES`.
        pattern: What goes together; it may allow less than `sparsity`.

    Example:
        >>> Goal(0.8, "global", Pattern("n:m", 2, 4)).fraction({"w": 100}, 1.0)
        0.5
    """

    sparsity: float | Mapping[str, float]
    scope: str = "global"
    pattern: Pattern | None = None

    @property
    def reachable(self) -> float | dict[str, float]:
        """The final fraction of zeros that the pattern allows, of all weights or of each."""
        limit = self.pattern.limit if self.pattern else 1.0
        if isinstance(self.sparsity, Mapping):
            return {name: min(fraction, limit) for name, fraction in self.sparsity.items()}
        return min(self.sparsity, limit)

    def fraction(self, sizes: Mapping[str, int], level: float) -> float:
        """Give the fraction of zeros wanted at a level, over all weights.

        Args:
            sizes: Number of elements of each weight.
            level: The part of the way to go, 0 to 1.

        Returns:
            The fraction, 0 to 1.
        """
        target = self.reachable
        if not isinstance(target, dict):
            return target * level
        return sum(target[name] * size for name, size in sizes.items()) * level / max(1, sum(sizes.values()))

    def pools(
        self, shapes: Mapping[str, tuple[int, ...]], level: float, floors: Mapping[str, int] | None = None
    ) -> list[scopes.Pool]:
        """Divide what is wanted at a level; see `scopes.pools`."""
        return scopes.pools(self.scope, shapes, self.reachable, level, floors)
