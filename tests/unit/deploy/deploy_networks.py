"""Tiny networks and data that the deploy tests share."""

from __future__ import annotations

import torch
from torch import nn


class TwoInputs(nn.Module):
    """A residual convolution, a second input, and a nested dict for a result."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.body = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 4)
        self.extra = nn.Linear(2, 4)

    def forward(self, image, meta=None, *, scale: float = 1.0):
        x = torch.relu(self.norm(self.stem(image)))
        x = torch.relu(x + self.body(x)).mean((2, 3))
        logits = self.head(x)
        if meta is not None:
            logits = logits + self.extra(meta)
        return {"logits": logits * scale, "aux": (x, logits.argmax(1))}


def seeded(module: type[nn.Module], *args, **kwargs) -> nn.Module:
    """Build a module of known weights, with BatchNorm statistics that are not the identity."""
    torch.manual_seed(0)
    result = module(*args, **kwargs)
    for layer in result.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.normal_()
            layer.running_var.uniform_(0.5, 2)
    return result.eval()


def chain() -> nn.Module:
    """Convolutions one behind the other, plain, with BatchNorm, and depthwise; then linear layers."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Hardswish(),
        nn.Flatten(),
        nn.Linear(32, 16),
        nn.ReLU6(),
        nn.Linear(16, 4),
    )
