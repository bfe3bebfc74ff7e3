"""Exact selection of the lowest scores over many tensors, in bounded memory.

A radix select: scores become integers of the same order, and two (float32) or four (float64) histograms over
16 bits at a time find the k-th lowest. Nothing is sorted or concatenated, and scores are looked at piece by
piece, so that the extra memory is a few tens of `CHUNK` elements whatever the number of weights (about 25 MB
measured at 500 million, `benchmarks/results/magnitude_update.md`). Ties are broken by position: the earlier
tensor, then the earlier element, goes first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 1 << 18
_DIGIT = 16

Chunks = Callable[[], Iterable[Tensor]]


@dataclass(frozen=True)
class Cut:
    """Where the lowest scores end: everything below `key` goes, and the first `ties` of those equal to it.

    Attributes:
        key: An integer of the order of the scores, see `order_keys`.
        ties: How many of the scores equal to `key` go, in order of position.
    """

    key: int
    ties: int


def order_keys(scores: Tensor, wide: bool = False) -> Tensor:
    """Map floating-point scores to integers of the same order.

    Args:
        scores: Any shape and floating dtype.
        wide: Keep all bits of float64; otherwise scores count as float32.

    Returns:
        int32 (int64 if `wide`) of the same shape. NaN is above everything: what cannot be judged stays.

    Example:
        >>> order_keys(torch.tensor([-1.0, -0.0, 0.0, 2.0])).argsort(stable=True)
        tensor([0, 1, 2, 3])
    """
    scores = scores.to(torch.float64 if wide else torch.float32)
    # Adding zero turns -0.0 into 0.0, so that both have one key.
    scores = (scores + 0.0).nan_to_num_(nan=float("inf"), posinf=float("inf"), neginf=float("-inf"))
    if wide:
        bits = scores.view(torch.int64)
        return bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF)
    bits = scores.view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def find_cut(chunks: Chunks, count: int) -> Cut | None:
    """Find where the `count` lowest of all keys end.

    Args:
        chunks: Gives the keys (`order_keys`) as integer tensors, in the same order at each call.
        count: How many are wanted, at most as many as there are.

    Returns:
        The cut, or None if `count` is 0.

    Example:
        >>> keys = order_keys(torch.tensor([3.0, 1.0, 2.0, 1.0]))
        >>> find_cut(lambda: [keys], 2).ties
        2
    """
    if count <= 0:
        return None
    bits, done, prefix, remaining = 32, 0, 0, count
    while done < bits:
        histogram = torch.zeros(1 << _DIGIT, dtype=torch.int64)
        for chunk in chunks():
            bits = 64 if chunk.dtype == torch.int64 else 32
            histogram += _digit_counts(chunk, bits, done, prefix)
        cumulative = histogram.cumsum(0)
        digit = int(torch.searchsorted(cumulative, remaining))
        remaining -= int(cumulative[digit - 1]) if digit else 0
        prefix = (prefix << _DIGIT) | digit
        done += _DIGIT
    # Undo the shift that made the first digit unsigned.
    return Cut(key=prefix - (1 << (bits - 1)), ties=remaining)


def _digit_counts(keys: Tensor, bits: int, done: int, prefix: int) -> Tensor:
    """Count the next 16-bit digit of the keys whose first `done` bits are `prefix`."""
    half = 1 << (_DIGIT - 1)
    if done:
        # `prefix` counts from the lowest key; keys are signed, so that prefix lies 2^(done-1) lower.
        keys = keys[(keys >> (bits - done)) == prefix - (1 << (done - 1))]
    digits = (keys >> (bits - done - _DIGIT)) & 0xFFFF
    if not done:
        digits = digits ^ half
    return torch.bincount(digits.reshape(-1), minlength=1 << _DIGIT).cpu()


def keep_masks(chunks: Iterable[Tensor], cut: Cut | None) -> Iterator[Tensor]:
    """Say for each score whether its weight stays.

    Args:
        chunks: The keys that the cut was found in, in the same order.
        cut: From `find_cut`.

    Yields:
        For each chunk a bool tensor of its shape: True where the weight stays.

    Example:
        >>> keys = order_keys(torch.tensor([3.0, 1.0, 2.0, 1.0]))
        >>> list(keep_masks([keys], find_cut(lambda: [keys], 1)))
        [tensor([ True, False,  True,  True])]
    """
    ties = cut.ties if cut else 0
    for keys in chunks:
        if cut is None:
            yield torch.ones_like(keys, dtype=torch.bool)
            continue
        keep = keys > cut.key
        equal = (keys == cut.key).reshape(-1)
        here = int(equal.sum())
        if here > ties:
            keep.view(-1)[equal.nonzero()[ties:, 0]] = True
        ties = max(ties - here, 0)
        yield keep


def pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Walk through tensors of one shape side by side, a bounded number of elements at a time.

    The memory format of the last tensor alone decides how they are divided, so that walks with the same last
    tensor go in step.

    Args:
        *tensors: Of one shape, in any memory format.

    Yields:
        Parts of all the tensors. That of the last is always a view: writing to it writes to its tensor.

    Example:
        >>> [tuple(part.shape for part in parts) for parts in pieces(torch.zeros(2, 3), torch.ones(2, 3))]
        [(torch.Size([6]), torch.Size([6]))]
    """
    last = tensors[-1]
    if last.is_contiguous():
        yield from zip(*(torch.split(tensor.reshape(-1), CHUNK) for tensor in tensors), strict=True)
    elif last.numel():
        rows = max(1, CHUNK // (last.numel() // last.shape[0]))
        yield from zip(*(torch.split(tensor, rows) for tensor in tensors), strict=True)


def largest_remainder(
    shares: Sequence[float], limits: Sequence[int], total: int, floors: Sequence[int] | None = None
) -> list[int]:
    """Round shares to whole counts that add up exactly (Hamilton's method).

    Args:
        shares: What each would get, not rounded.
        limits: The most each can get.
        total: What the counts add up to; from the sum of `floors` to the sum of `limits`.
        floors: The least each can get; 0 by default.

    Returns:
        The counts: each share rounded down or up, and further away only where a bound forces it.

    Example:
        >>> largest_remainder([1.5, 1.5, 2.0], [9, 9, 9], 5)
        [2, 1, 2]
    """
    least = list(floors) if floors is not None else [0] * len(shares)
    counts = [min(max(int(s), low), high) for s, low, high in zip(shares, least, limits, strict=True)]
    order = sorted(range(len(shares)), key=lambda i: (counts[i] - shares[i], i))
    missing = total - sum(counts)
    while missing > 0:
        room = [i for i in order if counts[i] < limits[i]][:missing]
        for i in room:
            counts[i] += 1
        missing -= len(room)
    while missing < 0:
        surplus = [i for i in reversed(order) if counts[i] > least[i]][:-missing]
        for i in surplus:
            counts[i] -= 1
        missing += len(surplus)
    return counts
