"""Batches that ONNX Runtime calibrates with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from lightning_prune.deploy.runtime import Feed
from lightning_prune.errors import QuantizationError


class Reader:
    """Hands calibration batches to ONNX Runtime one at a time, so that one at a time is in memory."""

    def __init__(self, feeds: Sequence[Feed], batches: int, on_batch: Callable[[int], None] | None) -> None:
        self.feeds = feeds
        self.count = min(len(feeds), batches)
        if self.count == 0:
            raise QuantizationError(
                "There is nothing to calibrate with: the loader gave no batch on which the exported module "
                "is called. Give a loader, or use Quantize(mode='dynamic')."
            )
        self.position, self.end = 0, self.count
        self.on_batch = on_batch

    def __len__(self) -> int:
        return self.count

    def set_range(self, start_index: int, end_index: int) -> None:
        """Go to a batch, and stop before another."""
        self.position, self.end = start_index, min(end_index, self.count)

    def __iter__(self) -> Iterator[Feed]:
        return iter(self.get_next, None)

    def __next__(self) -> Feed:
        feed = self.get_next()
        if feed is None:
            raise StopIteration
        return feed

    def get_next(self) -> Feed | None:
        """Return the next batch, None at the end; refuse values that are not finite."""
        if self.position >= self.end:
            return None
        feed = self.feeds[self.position]
        for name, array in feed.items():
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise QuantizationError(
                    f"Calibration batch {self.position} has values in input {name!r} that are not finite."
                )
        self.position += 1
        if self.on_batch is not None:
            self.on_batch(self.position)
        return feed
