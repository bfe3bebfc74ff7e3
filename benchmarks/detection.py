"""A small RetinaNet (Lin et al. 2017) for pictures of 240x320, trained and measured on its raw outputs.

Not a benchmark itself. Scripts in this folder import it as `detection`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from learning import Learner, Recipe, Teacher
from networks import ResidualBlock

STRIDES = (8, 16, 32)
SIZES = (16.0, 32.0, 64.0)  # of the anchors at each stride; three scales of each
SCALES = (1.0, 1.26, 1.59)


def scaled(x: Tensor) -> Tensor:
    """Turn uint8 RGB into -1 to 1."""
    return x.float() / 127.5 - 1


class Retina(nn.Module):
    """A ResNet of four stages, a feature pyramid over the last three, and two shared towers.

    Returns scores before the sigmoid (n, anchors, classes) and offsets of boxes (n, anchors, 4).

    Args:
        width: Channels of the first stage.
        classes: How many kinds of object.
    """

    def __init__(self, width: int = 32, classes: int = 3) -> None:
        super().__init__()
        self.classes = classes
        self.stem = nn.Sequential(nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        self.stages = nn.ModuleList(
            ResidualBlock(widths[i], widths[i + 1], 1 if i == 0 else 2, False) for i in range(4)
        )
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.lateral = nn.ModuleList(nn.Conv2d(w, 2 * width, 1) for w in widths[2:])
        self.smooth = nn.ModuleList(nn.Conv2d(2 * width, 2 * width, 3, 1, 1) for _ in range(3))
        self.score_tower, self.box_tower = self._tower(2 * width), self._tower(2 * width)
        self.scores = nn.Conv2d(2 * width, len(SCALES) * classes, 3, 1, 1)
        self.boxes = nn.Conv2d(2 * width, len(SCALES) * 4, 3, 1, 1)
        nn.init.constant_(self.scores.bias, -4.6)  # at first, an object is 1 % likely

    @staticmethod
    def _tower(width: int) -> nn.Sequential:
        layers: list[nn.Module] = []
        for _ in range(2):
            layers += [nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.GroupNorm(8, width), nn.ReLU()]
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.pool(self.stem(x))
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        levels = [lateral(f) for lateral, f in zip(self.lateral, features[1:], strict=True)]
        for i in (1, 0):
            levels[i] = levels[i] + F.interpolate(levels[i + 1], size=levels[i].shape[2:], mode="nearest")
        levels = [smooth(level) for smooth, level in zip(self.smooth, levels, strict=True)]
        scores = [self._flat(self.scores(self.score_tower(level)), self.classes) for level in levels]
        boxes = [self._flat(self.boxes(self.box_tower(level)), 4) for level in levels]
        return {"scores": torch.cat(scores, 1), "boxes": torch.cat(boxes, 1)}

    @staticmethod
    def _flat(x: Tensor, last: int) -> Tensor:
        return x.permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, last))


def anchors(height: int, width: int) -> Tensor:
    """List all anchors as x1, y1, x2, y2, in the order of the network's outputs."""
    found = []
    for stride, size in zip(STRIDES, SIZES, strict=True):
        y = (torch.arange(-(-height // stride)) + 0.5) * stride
        x = (torch.arange(-(-width // stride)) + 0.5) * stride
        center = torch.stack(torch.meshgrid(y, x, indexing="ij")[::-1], -1)[:, :, None]
        half = torch.tensor(SCALES)[:, None] * size / 2
        found.append(torch.cat([center - half, center + half], -1).flatten(0, 2))
    return torch.cat(found)


def overlaps(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of all pairs: (a, b)."""
    low = torch.maximum(a[:, None, :2], b[None, :, :2])
    high = torch.minimum(a[:, None, 2:], b[None, :, 2:])
    shared = (high - low).clamp_min(0).prod(-1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(-1) for boxes in (a, b)]
    return shared / (areas[0][:, None] + areas[1][None] - shared)


def encode(boxes: Tensor, at: Tensor) -> Tensor:
    """Say boxes relative to anchors: center by size, logarithm of the size."""
    size, mine = at[:, 2:] - at[:, :2], boxes[:, 2:] - boxes[:, :2]
    center = (boxes[:, :2] + boxes[:, 2:] - at[:, :2] - at[:, 2:]) / 2
    return torch.cat([center / size * 10, (mine / size).log() * 5], 1)


def decode(offsets: Tensor, at: Tensor) -> Tensor:
    """Turn what `encode` gives back into boxes."""
    size = at[:, 2:] - at[:, :2]
    center = (at[:, :2] + at[:, 2:]) / 2 + offsets[:, :2] / 10 * size
    half = (offsets[:, 2:] / 5).clamp(max=4).exp() * size / 2
    return torch.cat([center - half, center + half], 1)


def suppress(boxes: Tensor, scores: Tensor, limit: float = 0.5) -> Tensor:
    """Non-maximum suppression: indices of the boxes that no better one covers by more than `limit`."""
    order = scores.argsort(descending=True)
    kept = []
    while len(order):
        kept.append(order[0])
        rest = order[1:]
        order = rest[overlaps(boxes[order[:1]], boxes[rest])[0] <= limit]
    return torch.stack(kept) if kept else order


class Detector(Learner):
    """Finds objects: focal loss for classes, smooth L1 for boxes, mean average precision by torchmetrics.

    The last number needs the packages torchvision and pycocotools, which torchmetrics asks for.
    """

    def __init__(self, network: nn.Module, classes: int, recipe: Recipe, teacher: Teacher | None) -> None:
        from torchmetrics.detection.mean_ap import MeanAveragePrecision

        super().__init__(network, classes, recipe, teacher)
        self.precision_of = MeanAveragePrecision()
        self.at: Tensor | None = None

    def _anchors(self, x: Tensor) -> Tensor:
        if self.at is None:
            self.at = anchors(*x.shape[2:])
        return self.at.to(x.device)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        out, at = self.network(batch[0]), self._anchors(batch[0])
        loss = torch.stack([self._loss(out, i, batch[1][i], at) for i in range(len(batch[0]))]).mean()
        self.log("train_loss", loss)
        return loss

    def _loss(self, out: dict[str, Tensor], i: int, truth: Tensor, at: Tensor) -> Tensor:
        truth = truth[truth[:, 4] >= 0]
        best, which = overlaps(at, truth[:, :4]).max(1)
        found = best >= 0.5
        wanted = torch.zeros_like(out["scores"][i])
        wanted[found, truth[which[found], 4].long()] = 1
        scores = out["scores"][i]
        likely = torch.where(wanted == 1, scores.sigmoid(), 1 - scores.sigmoid())
        weight = torch.where(wanted == 1, 0.25, 0.75) * (1 - likely) ** 2
        sure = (found | (best < 0.4))[:, None]
        focal = weight * F.binary_cross_entropy_with_logits(scores, wanted, reduction="none")
        offsets = encode(truth[which[found], :4], at[found])
        boxes = F.smooth_l1_loss(out["boxes"][i][found], offsets, reduction="sum", beta=1.0)
        return ((focal * sure).sum() + 0.5 * boxes) / max(1, int(found.sum()))

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        out, at = self.network(batch[0]), self._anchors(batch[0])
        found = [self._objects(out["scores"][i], out["boxes"][i], at) for i in range(len(batch[0]))]
        truth = [
            {"boxes": boxes[boxes[:, 4] >= 0, :4], "labels": boxes[boxes[:, 4] >= 0, 4].long()}
            for boxes in batch[1]
        ]
        self.precision_of.update(found, truth)

    def _objects(self, scores: Tensor, offsets: Tensor, at: Tensor) -> dict[str, Any]:
        likely, label = scores.sigmoid().max(1)
        top = likely.topk(400).indices
        top = top[likely[top] > 0.05]
        boxes, likely, label = decode(offsets[top], at[top]), likely[top], label[top]
        # Boxes of different classes are moved far apart, so that they cannot suppress each other.
        kept = suppress(boxes + 10_000.0 * label[:, None], likely)[:100]
        return {"boxes": boxes[kept], "scores": likely[kept], "labels": label[kept]}

    def on_validation_epoch_end(self) -> None:
        found = self.precision_of.compute()
        self.precision_of.reset()
        self.log("val_map", found["map"], prog_bar=True)
        self.log("val_map50", found["map_50"])
