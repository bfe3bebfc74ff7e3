"""Masks: which weights are zero. Made from scores, applied to weights, packed for checkpoints.

A mask is a tensor like its weight (dtype, device and memory format, so that applying it is one fused
multiplication) that holds 1 where the weight stays and 0 where it goes.

Two properties of the multiplication: a negative masked weight becomes -0.0, which equals zero but not its bit
pattern (`clear_signs` mends it before files are written), and a masked weight that is infinite or NaN becomes
NaN, so that a run that diverged is seen to have diverged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_prune.sparsity.criteria import ELEMENTWISE, Criterion, Evidence
from lightning_prune.sparsity.scopes import Pool
from lightning_prune.sparsity.select import find_cut, keep_masks, order_keys, pieces

Transform = Callable[[Tensor], Tensor]


@torch.no_grad()
def update_masks(
    weights: Mapping[str, Tensor],
    masks: dict[str, Tensor],
    pools: Sequence[Pool],
    criterion: Criterion,
    *,
    transform: Transform | None = None,
    seed: int = 0,
) -> None:
    """Bring masks to exact counts: in each pool the lowest scores go.

    What is masked already goes first, so that masks only ever grow with the count. Criteria of
    `criteria.ELEMENTWISE` need no memory that grows with the weights; for others a pool's scores are held.

    Args:
        weights: The weights by name.
        masks: The masks so far; changed in place, and filled in where one is missing.
        pools: Which weights compete, and how many elements go.
        criterion: Scores a weight.
        transform: Applied to the scores of each weight as a whole, such as `scopes.lamp`.
        seed: Handed to the criterion.

    Example:
        >>> from lightning_prune.sparsity.criteria import magnitude
        >>> masks = {}
        >>> update_masks({"w": torch.tensor([3.0, 1.0, 2.0])}, masks, [Pool(("w",), 1)], magnitude)
        >>> masks["w"]
        tensor([1., 0., 1.])
    """
    for name, weight in weights.items():
        if name not in masks:
            masks[name] = torch.ones_like(weight, requires_grad=False)
    for pool in pools:
        wide = any(weights[name].dtype == torch.float64 for name in pool.names)
        held: dict[str, Tensor] = {}
        if transform is not None or criterion not in ELEMENTWISE:
            for name in pool.names:
                scores = criterion(Evidence(name, weights[name], seed))
                held[name] = scores if transform is None else transform(scores)

        def keyed(
            pool: Pool = pool, held: Mapping[str, Tensor] = held, wide: bool = wide
        ) -> Iterator[Tensor]:
            for name in pool.names:
                source = held.get(name, weights[name])
                for part, mask in pieces(source, masks[name]):
                    scores = part if held else criterion(Evidence(name, part, seed))
                    keys = order_keys(scores, wide)
                    yield keys.masked_fill_(mask == 0, torch.iinfo(keys.dtype).min)

        cut = find_cut(keyed, pool.count)
        targets = (
            mask for name in pool.names for _, mask in pieces(held.get(name, weights[name]), masks[name])
        )
        for target, keep in zip(targets, keep_masks(keyed(), cut), strict=True):
            target.copy_(keep)


@torch.no_grad()
def count_below(
    weights: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    criterion: Criterion,
    threshold: float,
    *,
    seed: int = 0,
) -> dict[str, int]:
    """Count the elements that score below a threshold or are masked already.

    Args:
        weights: The weights by name.
        masks: The masks so far; a missing one masks nothing.
        criterion: Scores a weight.
        threshold: Scores below it count.
        seed: Handed to the criterion.

    Returns:
        The count of each weight.

    Example:
        >>> from lightning_prune.sparsity.criteria import magnitude
        >>> count_below({"w": torch.tensor([0.1, -0.2, 3.0])}, {}, magnitude, 0.15)
        {'w': 1}
    """
    counts: dict[str, int] = {}
    for name, weight in weights.items():
        below = criterion(Evidence(name, weight, seed)) < threshold
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
