"""Which classes a classifier confuses, seen from outside of the user's loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_prune.deploy.tree import flatten

MOST_CLASSES = 50
"""Beyond this the matrix is left out, and the recalls stay."""


class Confusion:
    """Counts predictions by true class while batches go by, as long as it is clear which is which.

    It is clear when the network was called once for a batch, one of its outputs is a matrix of scores
    (samples, classes), and the batch holds one vector of whole numbers that can be their classes.

    Args:
        names: The names of the classes; their numbers by default.

    Example:
        >>> counter = Confusion(["cat", "dog"])
        >>> counter.add([torch.tensor([[2.0, 1.0], [0.5, 0.1]])], (torch.zeros(2), torch.tensor([0, 1])))
        >>> counter.result()["recall"]
        [1.0, 0.0]
    """

    def __init__(self, names: Sequence[str] = ()) -> None:
        self.names = list(names)
        self.counts: Tensor | None = None
        self.clear = True

    def add(self, outputs: Any, batch: Any) -> None:
        """Count one batch.

        Args:
            outputs: The results of the network's calls during the batch, a list.
            batch: The batch as the loop got it.
        """
        if not self.clear:
            return
        scores = [t for t in flatten(list(outputs))[0] if t.dim() == 2 and t.is_floating_point()]
        scores = [t for t in scores if t.shape[1] > 1]
        pairs = []
        if len(outputs) == 1 and len(scores) == 1:
            size, classes = scores[0].shape
            pairs = [
                t
                for t in flatten(batch)[0]
                if t.shape == (size,) and not t.is_floating_point() and t.dtype is not torch.bool
            ]
            pairs = [t for t in pairs if size and int(t.min()) >= 0 and int(t.max()) < classes]
        if len(pairs) != 1 or (self.counts is not None and len(self.counts) != classes):
            self.clear, self.counts = False, None
            return
        flat = pairs[0].cpu().long() * classes + scores[0].cpu().argmax(1)
        counts = torch.bincount(flat, minlength=classes * classes).reshape(classes, classes)
        self.counts = counts if self.counts is None else self.counts + counts

    def result(self) -> dict[str, Any] | None:
        """Return `names`, `support` and `recall` by class, and `confusion`, true classes down.

        Returns:
            Plain data; None if it was not clear what is counted. The recall of a class that never came is
            None.
        """
        if self.counts is None or not self.clear:
            return None
        support = self.counts.sum(1)
        right = self.counts.diagonal()
        recalls = [int(r) / int(n) if n else None for r, n in zip(right, support, strict=True)]
        classes = len(self.counts)
        names = self.names if len(self.names) == classes else [str(i) for i in range(classes)]
        result: dict[str, Any] = {"names": names, "support": support.tolist(), "recall": recalls}
        if classes <= MOST_CLASSES:
            result["confusion"] = self.counts.tolist()
        return result
