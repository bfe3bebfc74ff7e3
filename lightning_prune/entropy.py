"""How few bytes sparse weights could take: the bound that a compressed file is held against."""

from __future__ import annotations

import math
from collections.abc import Iterable


def least_bytes(weights: Iterable[tuple[int, int]], bits: int) -> float:
    """Give the bytes that no code can stay below when it knows only how many weights are zero.

    For each weight the positions of its non-zeros take `log2(elements choose nonzero)` bits, and their values
    `bits` each: the entropy of positions that are equally likely, and of values that are not compressible.
    A file can stay below it only by what is predictable in the values.

    Args:
        weights: Elements and non-zeros of each weight.
        bits: The precision of a value, such as 32 or 8.

    Returns:
        The bound, in bytes.

    Example:
        >>> round(least_bytes([(1000, 100)], 8))
        158
    """
    found = 0.0
    for elements, nonzero in weights:
        zeros = elements - nonzero
        choices = math.lgamma(elements + 1) - math.lgamma(nonzero + 1) - math.lgamma(zeros + 1)
        found += choices / math.log(2) + nonzero * bits
    return found / 8
