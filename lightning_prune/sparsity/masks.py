"""Masks: which weights are zero. Made from scores, applied to weights, packed for checkpoints.

A mask is a tensor like its weight (dtype, device and memory format, so that applying it is one fused
multiplication) that holds 1 where the weight stays and 0 where it goes.

Two properties of the multiplication: a negative masked weight becomes -0.0, which equals zero but not its bit
pattern (`clear_signs` mends it before files are written), and a masked weight that is infinite or NaN becomes
NaN, so that a run that diverged is seen to have diverged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_prune.sparsity import patterns
from lightning_prune.sparsity.criteria import Criterion, Evidence, is_elementwise
from lightning_prune.sparsity.scopes import Pool
from lightning_prune.sparsity.select import find_cut, keep_masks, order_keys, pieces

Look = Callable[[str, Tensor], Evidence]


@dataclass(frozen=True)
class Rule:
    """How weights are judged.

    Attributes:
        criterion: Scores a weight.
        transform: Changes the scores of one weight, `(outputs, kernel positions, inputs)`, before they are
            compared with others; see `scopes.TRANSFORMS`.
        pattern: What goes together; None for single weights.
        transposed: Names of weights whose inputs come before their outputs.
    """

    criterion: Criterion
    transform: Callable[[Tensor], Tensor] | None = None
    pattern: patterns.Pattern | None = None
    transposed: frozenset[str] = frozenset()


@torch.no_grad()
def update_masks(
    weights: Mapping[str, Tensor],
    masks: MutableMapping[str, Tensor],
    pools: Sequence[Pool],
    rule: Rule,
    look: Look = Evidence,
) -> None:
    """Bring masks to the counts of their pools: in each pool the lowest scores go.

    What is masked already goes first, so that masks only ever grow with the count. Single weights are counted
    exactly; for patterns see `lightning_prune.sparsity.patterns`. Elementwise criteria for single weights
    need no memory that grows with the weights; otherwise the scores of a pool are held.

    Args:
        weights: The weights by name.
        masks: The masks so far; changed in place, and filled in where one is missing.
        pools: Which weights compete, and how many elements go.
        rule: How they are judged.
        look: Gives the evidence for a name and weight.

    Example:
        >>> from lightning_prune.sparsity.criteria import magnitude
        >>> masks = {}
        >>> update_masks({"w": torch.tensor([3.0, 1.0, 2.0])}, masks, [Pool(("w",), 1)], Rule(magnitude))
        >>> masks["w"]
        tensor([1., 0., 1.])
    """
    for name, weight in weights.items():
        if name not in masks:
            masks[name] = torch.ones_like(weight, requires_grad=False)
    for pool in pools:
        if rule.pattern is not None:
            _update_units(weights, masks, pool, rule, look)
        else:
            _update_elements(weights, masks, pool, rule, look)


def _update_elements(
    weights: Mapping[str, Tensor], masks: Mapping[str, Tensor], pool: Pool, rule: Rule, look: Look
) -> None:
    wide = any(weights[name].dtype == torch.float64 for name in pool.names)
    held: dict[str, Tensor] = {}
    if rule.transform is not None or not is_elementwise(rule.criterion):
        held = {name: _scores(name, weights[name], masks[name], rule, look) for name in pool.names}

    def keyed() -> Iterator[Tensor]:
        for name in pool.names:
            if held:
                parts: Iterator[tuple[Tensor, ...]] = pieces(held[name], masks[name])
            else:
                parts = _scored_pieces(name, weights, masks, rule, look)
            for scores, mask in parts:
                keys = order_keys(scores, wide)
                yield keys.masked_fill_(mask == 0, torch.iinfo(keys.dtype).min)

    cut = find_cut(keyed, pool.count)
    targets = (target for name in pool.names for (target,) in pieces(masks[name]))
    for target, keep in zip(targets, keep_masks(keyed(), cut), strict=True):
        target.copy_(keep)


def _scored_pieces(
    name: str, weights: Mapping[str, Tensor], masks: Mapping[str, Tensor], rule: Rule, look: Look
) -> Iterator[tuple[Tensor, Tensor]]:
    """Score a weight piece by piece: all evidence is cut alike."""
    whole = look(name, weights[name])
    given = [f.name for f in fields(whole) if isinstance(getattr(whole, f.name), Tensor)]
    for *parts, mask in pieces(*(getattr(whole, field) for field in given), masks[name]):
        part: dict[str, Any] = dict(zip(given, parts, strict=True))
        yield rule.criterion(replace(whole, **part)), mask


def _scores(name: str, weight: Tensor, mask: Tensor, rule: Rule, look: Look) -> Tensor:
    """Score a weight as a whole; what is masked scores below everything."""
    scores = rule.criterion(look(name, weight))
    if not scores.is_floating_point():
        scores = scores.float()
    scores = scores.masked_fill(mask == 0, -torch.inf)
    if rule.transform is None:
        return scores
    turned = name in rule.transposed
    return patterns.uncanonical(rule.transform(patterns.canonical(scores, turned)), scores.shape, turned)


def _update_units(
    weights: Mapping[str, Tensor], masks: Mapping[str, Tensor], pool: Pool, rule: Rule, look: Look
) -> None:
    assert rule.pattern is not None
    scores = {
        name: patterns.canonical(
            _scores(name, weights[name], masks[name], rule, look), name in rule.transposed
        )
        for name in pool.names
    }
    found = [patterns.units(scores[name], rule.pattern) for name in pool.names]
    order = torch.cat([mean.double() for mean, _ in found]).argsort(stable=True)
    sizes = torch.cat([size for _, size in found])
    # The longest run of lowest units whose elements do not exceed the count.
    chosen = order[: int((sizes[order].cumsum(0) <= pool.count).sum())]
    gone = torch.zeros(len(sizes), dtype=torch.bool, device=sizes.device)
    gone[chosen] = True
    parts = gone.split([len(mean) for mean, _ in found])  # type: ignore[no-untyped-call]
    for name, part in zip(pool.names, parts, strict=True):
        keep = patterns.keep_outside(part, scores[name], rule.pattern)
        masks[name].copy_(patterns.uncanonical(keep, masks[name].shape, name in rule.transposed))


@torch.no_grad()
def count_below(
    weights: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    criterion: Criterion,
    threshold: float,
    look: Look = Evidence,
) -> dict[str, int]:
    """Count the elements that score below a threshold or are masked already.

    Args:
        weights: The weights by name.
        masks: The masks so far; a missing one masks nothing.
        criterion: Scores a weight.
        threshold: Scores below it count.
        look: Gives the evidence for a name and weight.

    Returns:
        The count of each weight.

    Example:
        >>> from lightning_prune.sparsity.criteria import magnitude
        >>> count_below({"w": torch.tensor([0.1, -0.2, 3.0])}, {}, magnitude, 0.15)
        {'w': 1}
    """
    counts: dict[str, int] = {}
    for name, weight in weights.items():
        below = criterion(look(name, weight)) < threshold
        if name in masks:
            below |= masks[name] == 0
        counts[name] = int(below.sum())
    return counts


@torch.no_grad()
def apply_masks(weights: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """Zero what is masked, in place, with one fused multiplication.

    Args:
        weights: The weights.
        masks: Their masks, in the same order.
    """
    if weights:
        torch._foreach_mul_(list(weights), list(masks))


@torch.no_grad()
def clear_signs(weights: Sequence[Tensor]) -> None:
    """Turn -0.0 into 0.0, in place: equal in value, but only the latter compresses to nothing.

    Args:
        weights: The weights.
    """
    if weights:
        torch._foreach_add_(list(weights), 0.0)


def count_masked(masks: Mapping[str, Tensor]) -> dict[str, int]:
    """Count the zeros of each mask.

    Args:
        masks: The masks by name.

    Returns:
        The number of zeros by name.

    Example:
        >>> count_masked({"w": torch.tensor([1.0, 0.0])})
        {'w': 1}
    """
    return {name: mask.numel() - int(mask.count_nonzero()) for name, mask in masks.items()}


def pack(mask: Tensor) -> Tensor:
    """Store a mask in one bit an element.

    Args:
        mask: Zeros and ones, of any shape and dtype.

    Returns:
        uint8, flat, on the CPU.

    Example:
        >>> pack(torch.tensor([1.0, 0.0, 1.0]))
        tensor([160], dtype=torch.uint8)
    """
    bits = mask.detach().ne(0).reshape(-1).cpu().numpy()
    return torch.from_numpy(np.packbits(bits))


def unpack(packed: Tensor, like: Tensor) -> Tensor:
    """Read a packed mask.

    Args:
        packed: From `pack`.
        like: The weight; gives shape, dtype, device and memory format.

    Returns:
        The mask.

    Raises:
        ValueError: If the mask was packed from another number of elements.

    Example:
        >>> unpack(pack(torch.tensor([1.0, 0.0, 1.0])), torch.zeros(3))
        tensor([1., 0., 1.])
    """
    if packed.numel() != (like.numel() + 7) // 8:
        raise ValueError(f"{packed.numel()} bytes do not hold a mask of {tuple(like.shape)}")
    bits = torch.from_numpy(np.unpackbits(packed.cpu().numpy(), count=like.numel()))
    mask = torch.empty_like(like, requires_grad=False)
    mask.copy_(bits.reshape(like.shape))
    return mask
