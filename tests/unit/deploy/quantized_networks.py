"""Small networks of many kinds, each with what of it runs in float when it was trained in 8 bits."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


def block(inputs, outputs, kernel=3, stride=1, groups=1, activation=nn.ReLU):
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), activation())


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = block(3, 16), block(16, 8, stride=2)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.b(F.max_pool2d(self.a(x), 2)).mean((2, 3)))


class Residual(nn.Module):
    """Everything in place, as torchvision writes it."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.drop, self.head = nn.Dropout(0.2), nn.Linear(8, 4)

    def forward(self, x):
        x = self.stem(x)
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        y += x
        return self.head(self.drop(F.relu(y, inplace=True).mean((2, 3))))


class Squeeze(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.pool, self.down, self.up = (
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, 8, 1),
            nn.Conv2d(8, channels, 1),
        )

    def forward(self, x):
        return x * F.hardsigmoid(self.up(F.relu(self.down(self.pool(x)))))


class Mobile(nn.Module):
    """Depthwise, hard swish, ReLU6, squeeze and excitation, a shortcut."""

    def __init__(self):
        super().__init__()
        self.stem = block(3, 16, activation=nn.Hardswish)
        self.depthwise, self.squeeze = block(16, 16, groups=16, activation=nn.ReLU6), Squeeze(16)
        self.pointwise = nn.Sequential(nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16))
        self.last = block(16, 32, 1, activation=nn.Hardswish)
        self.head = nn.Sequential(nn.Linear(32, 16), nn.Hardswish(), nn.Dropout(0.2), nn.Linear(16, 5))

    def forward(self, x):
        x = self.stem(x)
        x = x + self.pointwise(self.squeeze(self.depthwise(x)))
        return self.head(F.adaptive_avg_pool2d(self.last(x), 1).flatten(1))


class Dense(nn.Module):
    """Batch norms in front of convolutions, concatenations, average pooling; ends with a convolution."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm, self.conv, self.last = (
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 8, 3, padding=1),
            nn.Conv2d(16, 4, 1),
        )

    def forward(self, x):
        x = self.stem(x)
        x = torch.cat([x, self.conv(F.relu(self.norm(x)))], 1)
        return F.avg_pool2d(self.last(F.avg_pool2d(x, 2)), 2)


class Shuffle(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.depthwise, self.pointwise = block(3, 16), block(8, 8, groups=8), block(8, 8, 1)
        self.head = nn.Conv2d(16, 4, 1)

    def forward(self, x):
        left, right = self.stem(x).chunk(2, 1)
        x = torch.cat([left, self.pointwise(self.depthwise(right))], 1)
        n, c, h, w = x.shape
        return self.head(x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b, self.c = (
            nn.Linear(20, 32),
            nn.BatchNorm1d(32),
            nn.Linear(32, 32),
            nn.Linear(32, 4),
        )

    def forward(self, x):
        x = F.relu(self.norm(self.a(x)))
        return self.c(F.gelu(self.b(x)) + x)


class Mixer(nn.Module):
    """Linear layers on three axes, attention by a function, a positional parameter."""

    def __init__(self, width=16):
        super().__init__()
        self.embed, self.position = nn.Linear(10, width), nn.Parameter(torch.randn(1, 7, width))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 32), nn.Linear(32, width)
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        x = self.embed(x) + self.position
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, 4, d // 4).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, d))
        return self.head((x + self.down(F.relu(self.up(self.norm2(x))))).mean(1))


class Masked(nn.Module):
    """Attention by matrix products with a causal mask of minus infinity."""

    def __init__(self, width=16):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.up, self.down, self.head = nn.Linear(width, 32), nn.Linear(32, width), nn.Linear(width, 3)
        self.register_buffer("mask", torch.triu(torch.full((7, 7), float("-inf")), 1))

    def forward(self, x):
        scores = self.q(x) @ self.k(x).transpose(1, 2) / 4 + self.mask
        x = x + torch.softmax(scores, -1) @ self.v(x)
        return self.head((x + self.down(torch.relu(self.up(x))))[:, 0])


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.layer(x).mean(1))


class Signal(nn.Module):
    """One-dimensional, with a clamp for a ReLU."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = (
            nn.Conv1d(9, 16, 5, 2),
            nn.BatchNorm1d(16),
            nn.Conv1d(16, 8, 3, padding="same"),
        )
        self.head = nn.Linear(8, 6)

    def forward(self, x):
        x = F.max_pool1d(F.relu(self.norm(self.a(x))), 2)
        return self.head(self.b(x).clamp(min=0).mean(-1))


class Shared(nn.Module):
    """One convolution, used twice, with a batch norm of its own for each use."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.norms, self.head = nn.ModuleList([nn.BatchNorm2d(8), nn.BatchNorm2d(8)]), nn.Linear(8, 3)

    def forward(self, x):
        x = self.stem(x)
        for norm in self.norms:
            x = F.relu(norm(self.conv(x)))
        return self.head(x.amax((2, 3)))


class Twins(nn.Module):
    """Layers of the same weight: one is tied with a bias of its own, two were made all zeros."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 3, 1)
        self.one, self.tied, self.zero, self.void = (nn.Conv2d(8, 8, 3, padding=1) for _ in range(4))
        self.tied.weight = self.one.weight
        for layer in (self.zero, self.void):
            nn.init.zeros_(layer.weight).requires_grad_(False)

    def forward(self, x):
        x = F.relu(self.stem(x))
        x = F.relu(self.tied(F.relu(self.one(x))) + self.zero(x) * self.void(x))
        return self.head(F.avg_pool2d(x, 3, 2, ceil_mode=True))


class Segment(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = block(3, 8), block(8, 16, stride=2), block(32, 8)
        self.up, self.out = nn.ConvTranspose2d(16, 8, 2, 2), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        fine = self.a(x)
        coarse = self.b(fine)
        parts = [fine, self.up(coarse), F.interpolate(coarse, scale_factor=2)]
        return self.out(self.c(torch.cat(parts, 1)))


class Memory(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.lstm, self.head = (
            nn.Linear(9, 16),
            nn.LSTM(16, 16, batch_first=True),
            nn.Linear(16, 4),
        )

    def forward(self, x):
        return self.head(self.lstm(self.embed(x))[0][:, -1])


PICTURE, ROWS = (8, 3, 16, 16), (8, 7, 16)
# network, shape of its input, layers in integers, layers or functions in float
NETWORKS = {
    "plain": (Plain, PICTURE, 3, set()),
    "residual": (Residual, PICTURE, 4, set()),
    "mobile": (Mobile, PICTURE, 8, set()),
    "dense": (Dense, PICTURE, 3, set()),
    "shuffle": (Shuffle, PICTURE, 4, set()),
    "mlp": (Mlp, (64, 20), 3, set()),
    "mixer": (Mixer, (8, 7, 10), 6, {"scaled_dot_product_attention"}),
    "shared": (Shared, PICTURE, 4, set()),
    "signal": (Signal, (8, 9, 40), 3, set()),
    "twins": (Twins, PICTURE, 6, set()),
}
MORE = {
    "masked": (Masked, ROWS, 7, set()),
    "encoder": (Encoder, ROWS, 3, {"layer.self_attn"}),
    "segment": (Segment, PICTURE, 4, {"up"}),
    "memory": (Memory, (8, 7, 9), 2, {"lstm"}),
}
