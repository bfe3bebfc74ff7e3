"""Patterns: weights that go together, in shapes that hardware or formats can use.

A weight is looked at as `(outputs, kernel positions, inputs)`: a linear weight `(out, in)` has one kernel
position, a convolution `(out, in / groups, *kernel)` one for each place of its kernel, a transposed
convolution is turned round. Patterns divide it into units, and a unit goes as a whole:

* `"n:m"`: of `m` neighbouring inputs `n` stay. A unit is the `m - n` lowest of such a group, so that a
  schedule makes ever more groups obey the pattern. Inputs at the end that do not fill a group stay dense, and
  the final fraction of zeros is at most `1 - n / m`.
* `"block:RxC"`: `R` outputs by `C` inputs at one kernel position. Blocks at the edges may be smaller.
* `"row"`: all weights of one output. `"column"`: all weights of one input.

A unit scores the mean of its scores. Units go in the order of their scores, ties by position, as long as the
number of zeros does not exceed the target: it is missed by less than one unit.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from lightning_prune.errors import ConfigurationError


@dataclass(frozen=True)
class Pattern:
    """A parsed pattern.

    Attributes:
        kind: `"n:m"`, `"block"`, `"row"` or `"column"`.
        a: `n`, or the rows of a block.
        b: `m`, or the columns of a block.
    """

    kind: Literal["n:m", "block", "row", "column"]
    a: int = 1
    b: int = 1

    @property
    def limit(self) -> float:
        """The largest fraction of zeros the pattern allows, 0 to 1."""
        return 1.0 - self.a / self.b if self.kind == "n:m" else 1.0


def parse(text: str | None, owner: str) -> Pattern | None:
    """Read a pattern.

    Args:
        text: None, `"2:4"`, `"block:4x1"`, `"row"` or `"column"`.
        owner: Who asks, for the error message.

    Returns:
        The pattern, or None for single weights.

    Raises:
        ConfigurationError: If it is none of these.

    Example:
        >>> parse("2:4", "MagnitudePruning")
        Pattern(kind='n:m', a=2, b=4)
    """
    if text is None:
        return None
    written = str(text)
    if written in ("row", "column"):
        return Pattern(written)  # type: ignore[arg-type]
    if found := re.fullmatch(r"(\d+):(\d+)", written):
        n, m = map(int, found.groups())
        if 0 < n < m:
            return Pattern("n:m", n, m)
    if found := re.fullmatch(r"block:(\d+)x(\d+)", written):
        rows, columns = map(int, found.groups())
        if rows and columns:
            return Pattern("block", rows, columns)
    expected = "None, 'n:m' with 0 < n < m (such as '2:4'), 'block:RxC', 'row' or 'column'"
    # YAML 1.1 reads 2:4 without quotes as the number 124, in base 60.
    remedy = "quote it in YAML" if not isinstance(text, str) else ""
    raise ConfigurationError.of(owner, "pattern", expected, text, remedy)


def canonical(tensor: Tensor, transposed: bool = False) -> Tensor:
    """Look at a weight as `(outputs, kernel positions, inputs)`.

    Args:
        tensor: Of any number of dimensions.
        transposed: Whether inputs come before outputs, as in transposed convolutions.

    Returns:
        Three dimensions; a view where that is possible.

    Example:
        >>> canonical(torch.zeros(8, 3, 5, 5)).shape
        torch.Size([8, 25, 3])
    """
    if tensor.dim() < 2:
        return tensor.reshape(1, 1, -1)
    if transposed:
        tensor = tensor.transpose(0, 1)
    return tensor.unsqueeze(2).flatten(2).transpose(1, 2)


def uncanonical(tensor: Tensor, shape: torch.Size, transposed: bool = False) -> Tensor:
    """Undo `canonical`.

    Args:
        tensor: `(outputs, kernel positions, inputs)`.
        shape: The weight's shape.
        transposed: As it was given.

    Returns:
        A tensor of the weight's shape.

    Example:
        >>> uncanonical(canonical(torch.zeros(8, 3, 5, 5)), torch.Size([8, 3, 5, 5])).shape
        torch.Size([8, 3, 5, 5])
    """
    if len(shape) < 2:
        return tensor.reshape(shape)
    turned = torch.Size([shape[1], shape[0], *shape[2:]]) if transposed else shape
    out = tensor.transpose(1, 2).reshape(turned)
    return out.transpose(0, 1) if transposed else out


def units(scores: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """Score the units of a weight.

    Args:
        scores: `(outputs, kernel positions, inputs)`.
        pattern: The pattern.

    Returns:
        Mean score and size (number of elements that go) of each unit, flat, in order of position.

    Example:
        >>> mean, size = units(torch.tensor([[[3.0, 1.0, 2.0, 4.0, 9.0]]]), Pattern("n:m", 2, 4))
        >>> mean, size
        (tensor([1.5000]), tensor([2]))
    """
    if pattern.kind == "n:m":
        gone = pattern.b - pattern.a
        lowest = _groups(scores, pattern).sort(dim=-1, stable=True).values[..., :gone]
        mean = lowest.mean(-1).flatten()
        return mean, torch.full_like(mean, gone, dtype=torch.int64)
    rows, columns, depth = _block_shape(scores, pattern)
    total = _sum_blocks(scores, rows, columns, depth)
    size = _sum_blocks(torch.ones_like(scores), rows, columns, depth)
    return (total / size).flatten(), size.flatten().to(torch.int64)


def keep_outside(gone: Tensor, scores: Tensor, pattern: Pattern) -> Tensor:
    """Say which elements stay when some units go.

    Args:
        gone: For each unit, in the order of `units`, whether it goes.
        scores: As given to `units`.
        pattern: As given to `units`.

    Returns:
        bool of the shape of `scores`: True where the weight stays.

    Example:
        >>> scores = torch.tensor([[[3.0, 1.0, 2.0, 4.0, 9.0]]])
        >>> keep_outside(torch.tensor([True]), scores, Pattern("n:m", 2, 4))
        tensor([[[ True, False, False,  True,  True]]])
    """
    if pattern.kind == "n:m":
        groups = _groups(scores, pattern)
        rank = groups.argsort(dim=-1, stable=True).argsort(dim=-1)
        keep = (rank >= pattern.b - pattern.a) | ~gone.reshape(groups.shape[:-1]).unsqueeze(-1)
        whole = torch.ones_like(scores, dtype=torch.bool)
        filled = keep.flatten(-2)
        whole[..., : filled.shape[-1]] = filled
        return whole
    rows, columns, depth = _block_shape(scores, pattern)
    outputs, kernel, inputs = scores.shape
    grid = (-(-outputs // rows), -(-kernel // depth), -(-inputs // columns))
    keep = ~gone.reshape(grid)
    for dim, repeat in enumerate((rows, depth, columns)):
        keep = keep.repeat_interleave(repeat, dim)
    return keep[:outputs, :kernel, :inputs]


def _groups(scores: Tensor, pattern: Pattern) -> Tensor:
    outputs, kernel, inputs = scores.shape
    full = inputs // pattern.b
    return scores[..., : full * pattern.b].reshape(outputs, kernel, full, pattern.b)


def _block_shape(scores: Tensor, pattern: Pattern) -> tuple[int, int, int]:
    """Give the extent of a unit in outputs, inputs and kernel positions."""
    outputs, kernel, inputs = scores.shape
    if pattern.kind == "row":
        return 1, max(1, inputs), max(1, kernel)
    if pattern.kind == "column":
        return max(1, outputs), 1, max(1, kernel)
    return pattern.a, pattern.b, 1


def _sum_blocks(scores: Tensor, rows: int, columns: int, depth: int) -> Tensor:
    outputs, kernel, inputs = scores.shape
    padding = (0, -inputs % columns, 0, -kernel % depth, 0, -outputs % rows)
    padded = functional.pad(scores, padding)
    grid = padded.unfold(0, rows, rows).unfold(1, depth, depth).unfold(2, columns, columns)
    return grid.sum((3, 4, 5))
