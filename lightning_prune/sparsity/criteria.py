"""Scores: how much each weight matters. Pure functions; the weights with the lowest scores go first.

Every criterion is a function of an `Evidence` and returns scores shaped like the weight. To add one's own,
write such a function and pass its import path (`"my_package.my_module:my_criterion"`) or the function itself.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import Tensor

from lightning_prune.errors import ConfigurationError, near_matches


@dataclass(frozen=True)
class Evidence:
    """What a criterion may look at.

    Attributes:
        name: The weight's name.
        weight: The weight, any shape; not to be changed.
        seed: The same on all ranks and after a resume; for random criteria.
    """

    name: str
    weight: Tensor
    seed: int = 0


Criterion = Callable[[Evidence], Tensor]


def magnitude(evidence: Evidence) -> Tensor:
    """Score by absolute value, `|w|` (Han et al. 2015, "Learning both Weights and Connections", section 3).

    Args:
        evidence: The weight.

    Returns:
        Scores of the weight's shape, 0 or more.

    Example:
        >>> magnitude(Evidence("w", torch.tensor([1.0, -2.0])))
        tensor([1., 2.])
    """
    return evidence.weight.abs()


def random(evidence: Evidence) -> Tensor:
    """Score by chance: uniform in 0 to 1, the same on every rank, every call and after every resume.

    Args:
        evidence: The weight's name and shape, and the seed.

    Returns:
        Scores of the weight's shape, in float32.

    Example:
        >>> a, b = (random(Evidence("w", torch.zeros(3))) for _ in range(2))
        >>> bool((a == b).all())
        True
    """
    generator = torch.Generator().manual_seed(evidence.seed ^ zlib.crc32(evidence.name.encode()))
    # Drawn on the CPU, because generators of different devices give different numbers.
    return torch.rand(evidence.weight.shape, generator=generator).to(evidence.weight.device)


CRITERIA: dict[str, Criterion] = {"magnitude": magnitude, "random": random}

# Criteria that score each element by itself, and so may be given a weight piece by piece.
ELEMENTWISE: frozenset[Criterion] = frozenset({magnitude})


def resolve(criterion: str | Criterion, owner: str) -> Criterion:
    """Find a criterion by its name or import path.

    Args:
        criterion: A name of this module, `"package.module:function"`, or the function itself.
        owner: Who asks, for the error message.

    Returns:
        The function.

    Raises:
        ConfigurationError: If there is no such criterion.

    Example:
        >>> resolve("magnitude", "MagnitudePruning") is magnitude
        True
    """
    if callable(criterion):
        return criterion
    if criterion in CRITERIA:
        return CRITERIA[criterion]
    path, _, attribute = criterion.partition(":")
    if attribute:
        try:
            found = getattr(import_module(path), attribute)
        except (ImportError, AttributeError) as error:
            raise ConfigurationError.of(
                owner, "criterion", "importable", criterion, f"the import said: {error}"
            ) from error
        if callable(found):
            return found  # type: ignore[no-any-return]
    expected = f"one of {', '.join(map(repr, CRITERIA))}, or 'package.module:function'"
    hint = near_matches(criterion, CRITERIA).rstrip(".")
    raise ConfigurationError.of(owner, "criterion", expected, criterion, hint)
