"""One tiny network of each kind that people deploy."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class Squeeze(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)

    def forward(self, x):
        return x * F.hardsigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))


def mobile():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Hardswish(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8), nn.ReLU6(), Squeeze(8),
        nn.Conv2d(8, 16, 1), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2),
        nn.Linear(16, 4),
    )  # fmt: skip


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(16, 8, 2, 2)
        self.c = nn.Conv2d(16, 2, 3, padding=1)

    def forward(self, x):
        a = F.relu(self.a(x))
        b = F.relu(self.b(a))
        bigger = F.interpolate(b, scale_factor=2, mode="bilinear")[:, :8]
        return self.c(torch.cat([a, self.up(b) + bigger], 1))


class VisionTransformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.position = nn.Parameter(torch.randn(1, 5, 16))
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        tokens = self.patch(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(x.shape[0], -1, -1), tokens], 1) + self.position
        return self.head(self.encoder(tokens)[:, 0])


class Text(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.norm = nn.LayerNorm(16)

    def forward(self, tokens, padding):
        x = self.embedding(tokens)
        out, weights = self.attention(x, x, x, key_padding_mask=padding)
        return {"out": self.norm(x + out), "weights": weights}


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn = kind(8, 16, 2, batch_first=True, bidirectional=True)
        self.out = nn.Linear(32, 4)

    def forward(self, x):
        y, state = self.rnn(x)
        return self.out(y), state


class Shuffle(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(8, 16, 1)

    def forward(self, x):
        left, right = self.a(x).chunk(2, 1)
        x = torch.cat([left, self.b(right)], 1)
        n, c, h, w = x.shape
        x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return F.pixel_shuffle(self.c(x), 2)


class ConvNext(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.depth = nn.Conv2d(3, 8, 2, 2), nn.Conv2d(8, 8, 7, padding=3, groups=8)
        self.norm, self.a, self.b = nn.LayerNorm(8), nn.Linear(8, 32), nn.Linear(32, 8)
        self.group, self.instance = nn.GroupNorm(2, 8), nn.InstanceNorm2d(8)

    def forward(self, x):
        x = self.stem(x)
        y = self.depth(x).permute(0, 2, 3, 1)
        y = self.b(F.gelu(self.a(self.norm(y)))).permute(0, 3, 1, 2)
        return self.instance(self.group(x + y))


class Volumes(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.c = nn.Conv1d(8, 16, 3, padding=1), nn.BatchNorm1d(16), nn.Conv3d(1, 4, 3)

    def forward(self, x):
        flat = F.relu(self.norm(self.a(x))).amax(-1)
        return torch.cat([flat, self.c(x.view(-1, 1, 8, 4, 4)).flatten(1)], 1)


def images(n):
    return (torch.randn(n, 3, 8, 8),)


def sequences(n):
    return (torch.randn(n, 5, 8),)


def texts(n):
    padding = torch.zeros(n, 6, dtype=torch.bool)
    padding[:, 4:] = True  # their scores become minus infinity
    return torch.randint(0, 20, (n, 6)), padding


# The network, its inputs, and how many of its operators static and dynamic quantization bring into integers.
ZOO = {
    "mobile": (mobile, images, 6, 1),
    "unet": (UNet, images, 3, 0),
    "transformer": (VisionTransformer, images, 14, 9),
    "text": (Text, texts, 4, 2),
    "lstm": (lambda: Recurrent(nn.LSTM), sequences, 1, 3),
    "gru": (lambda: Recurrent(nn.GRU), sequences, 1, 1),
    "rnn": (lambda: Recurrent(nn.RNN), sequences, 25, 25),
    "shuffle": (Shuffle, images, 3, 0),
    "convnext": (ConvNext, images, 4, 2),
    "volumes": (Volumes, lambda n: (torch.randn(n, 8, 16),), 2, 0),
}
