"""Small networks, one for each way in which real architectures connect their channels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import attention_networks as attentions
import indexed_networks as indexed
import torch
from torch import Tensor, nn
from torch.nn import functional as F


def conv_bn(i: int, o: int, k: int = 3, groups: int = 1, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(i, o, k, stride, padding=k // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(o), nn.ReLU())


class Pooled(nn.Module):
    """A classifier over whatever features a subclass makes."""

    def __init__(self, width: int, classes: int = 3) -> None:
        super().__init__()
        self.head = nn.Linear(width, classes)

    def features(self, x: Tensor) -> Tensor:
        raise AssertionError

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


class Residual(Pooled):
    def __init__(self) -> None:
        super().__init__(24)
        self.stem = conv_bn(3, 16)
        self.a, self.b = conv_bn(16, 24), nn.Conv2d(24, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.down, self.c = nn.Conv2d(16, 24, 1, 2), conv_bn(16, 24, stride=2)

    def features(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(x + self.norm(self.b(self.a(x))))
        return F.relu(self.down(x) + self.c(x))


class Bottleneck(Pooled):
    def __init__(self) -> None:
        super().__init__(32)
        self.stem = conv_bn(3, 32, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(conv_bn(32, 8, 1), conv_bn(8, 8), nn.Conv2d(8, 32, 1), nn.BatchNorm2d(32))
            for _ in range(2)
        )

    def features(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = F.relu(x + block(x))
        return x


class InvertedResidual(Pooled):
    def __init__(self) -> None:
        super().__init__(16)
        self.stem = conv_bn(3, 16)
        self.block = nn.Sequential(
            conv_bn(16, 32, 1), conv_bn(32, 32, groups=32), nn.Conv2d(32, 16, 1), nn.BatchNorm2d(16)
        )

    def features(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return x + self.block(x)


class SqueezeExcite(Pooled):
    def __init__(self) -> None:
        super().__init__(16)
        self.stem = conv_bn(3, 16)
        self.down, self.up = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)
        self.out = conv_bn(16, 16)

    def features(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        gate = torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))
        return self.out(x * gate)


class Dense(Pooled):
    def __init__(self) -> None:
        super().__init__(32)
        self.stem = conv_bn(3, 8)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(i), nn.ReLU(), nn.Conv2d(i, 8, 3, padding=1)) for i in (8, 16, 24)
        )

    def features(self, x: Tensor) -> Tensor:
        parts = [self.stem(x)]
        for layer in self.layers:
            parts.append(layer(torch.cat(parts, 1)))
        return torch.cat(parts, 1)


class Grouped(Pooled):
    def __init__(self) -> None:
        super().__init__(24)
        self.stem = conv_bn(3, 16)
        self.grouped = conv_bn(16, 32, groups=4)
        self.out = conv_bn(32, 24)

    def features(self, x: Tensor) -> Tensor:
        return self.out(self.grouped(self.stem(x)))


class GroupNormed(Pooled):
    def __init__(self) -> None:
        super().__init__(16)
        self.a, self.norm = nn.Conv2d(3, 24, 3, padding=1), nn.GroupNorm(6, 24)
        self.b, self.whole = nn.Conv2d(24, 16, 3, padding=1), nn.GroupNorm(1, 16)

    def features(self, x: Tensor) -> Tensor:
        return F.relu(self.whole(self.b(F.relu(self.norm(self.a(x))))))


class InstanceNormed(Pooled):
    def __init__(self) -> None:
        super().__init__(16)
        self.a = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.InstanceNorm2d(16, affine=True, track_running_stats=True)
        self.b = nn.Conv2d(16, 16, 3, padding=1)

    def features(self, x: Tensor) -> Tensor:
        return F.relu(self.b(F.relu(self.norm(self.a(x)))))


class NormFirst(nn.LayerNorm):
    """LayerNorm over the channels of (batch, channel, height, width), as ConvNeXt's."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps)
        return y.permute(0, 3, 1, 2)


class ConvNeXt(Pooled):
    def __init__(self) -> None:
        super().__init__(16)
        self.stem, self.norm = nn.Conv2d(3, 16, 2, 2), NormFirst(16)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.inner = nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.scale = nn.Parameter(torch.full((16, 1, 1), 0.5))

    def features(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        y = self.inner(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.down(F.gelu(self.up(y))).permute(0, 3, 1, 2)
        return x + self.scale * y


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv_bn(3, 16), conv_bn(16, 24, stride=2)
        self.up = nn.ConvTranspose2d(24, 16, 2, 2)
        self.c, self.out = conv_bn(32, 16), nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        return self.out(self.c(torch.cat([self.up(self.b(a)), a], 1)))


class Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv_bn(3, 16), conv_bn(16, 8, stride=2)
        self.c, self.head = nn.Linear(8 * 16, 24), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.c(self.b(self.a(x)).flatten(1))))


class Waves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv1d(4, 16, 3, padding=1), nn.BatchNorm1d(16)
        self.act, self.b = nn.PReLU(16), nn.ConvTranspose1d(16, 12, 2, 2)
        self.out = nn.Conv1d(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.b(self.act(self.norm(self.a(x))))))


class Upscaling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv_bn(3, 16), nn.Conv2d(16, 32, 3, padding=1)
        self.shuffle, self.c = nn.PixelShuffle(2), nn.Conv2d(8, 12, 3, padding=1)
        self.out = nn.Conv2d(12, 3 * 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.shuffle(self.out(F.relu(self.c(self.shuffle(self.b(self.a(x)))))))


class Shuffle(Pooled):
    """ShuffleNet's unit: half of the channels pass by, the halves are interleaved."""

    def __init__(self) -> None:
        super().__init__(16)
        self.stem = conv_bn(3, 16)
        self.branch = nn.Sequential(conv_bn(8, 8, 1), conv_bn(8, 8, groups=8), conv_bn(8, 8, 1))
        self.out = conv_bn(16, 16, 1)

    def features(self, x: Tensor) -> Tensor:
        left, right = self.stem(x).chunk(2, 1)
        x = torch.cat([left, self.branch(right)], 1)
        n, c, h, w = x.shape
        return self.out(x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))


class Split(Pooled):
    def __init__(self) -> None:
        super().__init__(16)
        self.stem = conv_bn(3, 24)
        self.a, self.b = conv_bn(16, 8), conv_bn(8, 8)

    def features(self, x: Tensor) -> Tensor:
        left, right = self.stem(x).split([16, 8], 1)
        return torch.cat([self.a(left), self.b(right)], 1)


class Tied(nn.Module):
    """An auto-encoder whose decoder is its encoder's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(12, 24)
        self.encoder = nn.Linear(24, 16)
        self.decoder = nn.Linear(24, 16)
        self.decoder.weight = self.encoder.weight
        self.other, self.head = nn.Linear(12, 24), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([self.encoder(F.relu(self.inner(x))), self.decoder(self.other(x))], 1))


class Reused(Pooled):
    """One layer that is called three times, on the same channels."""

    def __init__(self) -> None:
        super().__init__(16)
        self.stem, self.again = conv_bn(3, 16), nn.Conv2d(16, 16, 3, padding=1)

    def features(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(3):
            x = F.relu(self.again(x))
        return x


class Frozen(Residual):
    def __init__(self) -> None:
        super().__init__()
        for part in (self.stem, self.a):
            part.requires_grad_(False)


class FrozenBatchNorm2d(nn.Module):
    """BatchNorm whose statistics and affine parameters are constants, as detection backbones use it."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.eps = 1e-5
        for name, value in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1)):
            self.register_buffer(name, value + 0.1 * torch.rand(num_features))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.reshape(1, -1, 1, 1) + shift.reshape(1, -1, 1, 1)


class Detector(nn.Module):
    """A backbone with frozen norms, two heads that share towers, and outputs in a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, 2, 1, bias=False), FrozenBatchNorm2d(16)
        self.body, self.tower = conv_bn(16, 24), conv_bn(24, 16)
        self.classes, self.boxes = nn.Conv2d(16, 5, 1), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> dict[str, list[Tensor]]:
        x = self.tower(self.body(F.relu(self.norm(self.stem(x)))))
        return {"classes": [self.classes(x)], "boxes": [self.boxes(x)]}


class Auxiliary(Pooled):
    """A second head that exists in training only."""

    def __init__(self) -> None:
        super().__init__(24)
        self.a, self.b = conv_bn(3, 16), conv_bn(16, 24)
        self.aux = nn.Sequential(nn.Conv2d(16, 8, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, 3))

    def forward(self, x: Tensor):
        a = self.a(x)
        out = self.head(self.b(a).mean((2, 3)))
        return (out, self.aux(a)) if self.training else out


class Multiplied(Pooled):
    """A convolution that makes two channels of each it gets."""

    def __init__(self) -> None:
        super().__init__(24)
        self.stem = conv_bn(3, 12)
        self.multiply, self.out = conv_bn(12, 24, groups=12), conv_bn(24, 24)

    def features(self, x: Tensor) -> Tensor:
        return self.out(self.multiply(self.stem(x)))


class QkvAttention(nn.Module):
    """Attention as timm's VisionTransformer writes it: one linear layer for q, k and v."""

    def __init__(self, dim: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, dim // heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(b, n, self.num_heads * self.head_dim))


class QkvBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(12, 32)
        self.norm1, self.attention = nn.LayerNorm(32), QkvAttention()
        self.norm2, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.attention(self.norm1(x))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.head(self.norm(x).mean(1))


class BertBlock(nn.Module):
    """Attention with separate projections, as transformers' BERT; post-norm; an embedding table."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.norm = nn.Embedding(11, 32), nn.LayerNorm(32)
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))
        self.norm1, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)
        self.norm2, self.head = nn.LayerNorm(32), nn.Linear(32, 3)
        self.heads, self.width = 4, 8

    def split(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], self.heads, self.width).transpose(1, 2)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.words(ids))
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        weights = (q @ k.transpose(-1, -2) / self.width**0.5).softmax(-1)
        mixed = (weights @ v).transpose(1, 2).reshape(x.shape[0], x.shape[1], -1)
        x = self.norm1(x + self.o(mixed))
        return self.head(self.norm2(x + self.down(F.gelu(self.up(x))))[:, 0])


class Encoder(nn.Module):
    """PyTorch's own TransformerEncoderLayer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(12, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x)).mean(1))


class Speech(nn.Module):
    """DeepSpeech's shape: convolutions over (time, frequency), a recurrent stack, a linear layer."""

    def __init__(self, kind: str = "LSTM") -> None:
        super().__init__()
        self.a, self.b = conv_bn(1, 8), conv_bn(8, 8)
        rnn = getattr(nn, kind)
        self.rnn = rnn(8 * 6, 16, num_layers=2, batch_first=True, bidirectional=True)
        self.mid, self.out = nn.Linear(32, 24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x)).permute(0, 2, 1, 3).flatten(2)
        return self.out(F.relu(self.mid(self.rnn(x)[0])))


class Plain(nn.Sequential):
    """Linear layers with BatchNorm1d, a PReLU of one parameter and Dropout at rate 0."""

    def __init__(self) -> None:
        super().__init__(
            nn.Linear(12, 32), nn.BatchNorm1d(32), nn.PReLU(), nn.Dropout(0.0), nn.Linear(32, 24), nn.Tanh(),
            nn.Linear(24, 3),
        )  # fmt: skip


class Volume(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv3d(2, 12, 3, padding=1), nn.BatchNorm3d(12), nn.ReLU(), nn.AdaptiveAvgPool3d(1),
            nn.Flatten(), nn.Linear(12, 3),
        )  # fmt: skip


class Gated(Pooled):
    """GLU: half of the channels gate the other half, by the operator and by hand."""

    def __init__(self) -> None:
        super().__init__(16)
        self.a, self.b, self.c = conv_bn(3, 32), nn.Conv2d(16, 32, 3), nn.Conv2d(16, 16, 1)

    def features(self, x: Tensor) -> Tensor:
        left, right = self.b(F.glu(self.a(x), dim=1)).chunk(2, 1)
        return F.relu(self.c(left * torch.sigmoid(right)))


class Functional(Pooled):
    """A convolution whose weight is the network's own parameter, and a norm without parameters."""

    def __init__(self) -> None:
        super().__init__(8)
        self.kernel, self.shift = nn.Parameter(torch.randn(16, 3, 3, 3)), nn.Parameter(torch.randn(16))
        self.norm, self.c = nn.InstanceNorm2d(16), nn.Conv2d(16, 8, 1)

    def features(self, x: Tensor) -> Tensor:
        return F.relu(self.c(self.norm(F.conv2d(x, self.kernel, self.shift))))


class Focus(nn.Module):
    """YOLO's slicing, pyramid pooling and upsampling."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(12, 16, 3, padding=1), nn.Conv2d(64, 16, 1)
        self.c, self.out = nn.Conv2d(32, 16, 1), nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = [x[..., i::2, j::2] for j in (0, 1) for i in (0, 1)]
        x = F.silu(self.a(torch.cat(parts, 1)))
        y = self.b(torch.cat([x] + [F.max_pool2d(x, k, 1, k // 2) for k in (3, 5, 7)], 1))
        wide = F.interpolate(x, scale_factor=2, mode="bilinear")
        return self.out(self.c(torch.cat([F.interpolate(y, scale_factor=2), wide], 1)))


class NonLocal(Pooled):
    """Self-attention over positions, whose inner product mixes the channels of q and k."""

    def __init__(self) -> None:
        super().__init__(16)
        self.a, self.q, self.k = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 8, 1), nn.Conv2d(16, 8, 1)
        self.v, self.gamma = nn.Conv2d(16, 16, 1), nn.Parameter(torch.zeros(1))

    def features(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        b, _, h, w = x.shape
        q, k, v = (layer(x).view(b, -1, h * w) for layer in (self.q, self.k, self.v))
        weights = torch.softmax(q.transpose(1, 2) @ k, -1)
        return self.gamma * (v @ weights.transpose(1, 2)).view(b, -1, h, w) + x


class Causal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(4, 16, 3, dilation=2), nn.Conv1d(16, 16, 3, groups=16)
        self.c, self.head = nn.Conv1d(16, 16, 1), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.leaky_relu(self.c(F.elu(self.b(self.a(F.pad(x, (4, 0))))))).amax(-1))


class Mixer(nn.Module):
    """MLP-Mixer: linear layers over positions and over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm1, self.norm2 = nn.Conv2d(3, 16, 4, 4), nn.LayerNorm(16), nn.LayerNorm(16)
        self.t1, self.t2 = nn.Linear(4, 8), nn.Linear(8, 4)
        self.c1, self.c2, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = x + self.t2(F.gelu(self.t1(self.norm1(x).transpose(1, 2)))).transpose(1, 2)
        x = x + self.c2(F.gelu(self.c1(self.norm2(x))))
        return self.head(x.mean(1))


class Normed(Pooled):
    """Weight norm and spectral norm: weights that are computed from other parameters."""

    def __init__(self) -> None:
        super().__init__(16)
        wrap = nn.utils.parametrizations
        self.a, self.b = wrap.weight_norm(nn.Conv2d(3, 16, 3)), wrap.spectral_norm(nn.Conv2d(16, 16, 3))
        self.c = nn.Conv2d(16, 16, 3)

    def features(self, x: Tensor) -> Tensor:
        return F.relu(self.c(F.relu(self.b(F.relu(self.a(x))))))


class WeightNormed(nn.Module):
    """A temporal network whose every weight is a size times a direction, depthwise and transposed too."""

    def __init__(self) -> None:
        super().__init__()
        wrap = nn.utils.parametrizations.weight_norm
        self.a, self.b = wrap(nn.Conv1d(4, 16, 3, padding=1)), wrap(nn.Conv1d(16, 16, 3, padding=1))
        self.c, self.d = wrap(nn.Conv1d(16, 16, 3, groups=16)), wrap(nn.Conv1d(16, 12, 1))
        self.up = wrap(nn.ConvTranspose1d(12, 8, 2, 2))
        self.head = wrap(nn.Linear(8, 3), dim=None)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        x = self.c(x + F.relu(self.b(x)))
        return self.head(F.relu(self.up(F.relu(self.d(x)))).mean(2))


def image(channels: int = 3, size: int = 8) -> Callable[[], Tensor]:
    return lambda: torch.randn(2, channels, size, size)


@dataclass(frozen=True)
class Case:
    """A network, its input, and what of it must be free to shrink.

    Attributes:
        make: Builds it.
        inputs: Makes its input.
        free: The groups that may lose channels, by the layer that makes them.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    free: tuple[str, ...]


def encoder_parts(path: str, depth: int) -> tuple[str, ...]:
    ends = ("self_attn.in_proj_weight", "linear1")
    return tuple(f"{path.format(place)}.{end}" for place in range(depth) for end in ends)


CASES: dict[str, Case] = {
    "residual": Case(Residual, image(), ("stem.0", "a.0", "down")),
    "bottleneck": Case(
        Bottleneck, image(), ("stem.0", "blocks.0.0.0", "blocks.0.1.0", "blocks.1.0.0", "blocks.1.1.0")
    ),
    "inverted residual": Case(InvertedResidual, image(), ("stem.0", "block.0.0")),
    "squeeze-excite": Case(SqueezeExcite, image(), ("stem.0", "down", "out.0")),
    "dense concat": Case(Dense, image(), ("stem.0", "layers.0.2", "layers.1.2", "layers.2.2")),
    "grouped": Case(Grouped, image(), ("stem.0", "grouped.0", "out.0")),
    "group norm": Case(GroupNormed, image(), ("a", "b")),
    "instance norm": Case(InstanceNormed, image(), ("a", "b")),
    "layer norm first": Case(ConvNeXt, image(), ("stem", "up")),
    "unet": Case(UNet, image(), ("a.0", "b.0", "up", "c.0")),
    "flatten": Case(Flat, image(), ("a.0", "b.0", "c")),
    "conv1d": Case(Waves, lambda: torch.randn(2, 4, 10), ("a", "b")),
    "pixel shuffle": Case(Upscaling, image(), ("a.0", "b", "c")),
    "channel shuffle": Case(Shuffle, image(), ("stem.0", "branch.0.0", "out.0")),
    "channel split": Case(Split, image(), ("a.0", "b.0")),
    "tied": Case(Tied, lambda: torch.randn(2, 12), ("inner", "encoder")),
    "reused": Case(Reused, image(), ("stem.0",)),
    "frozen": Case(Frozen, image(), ("stem.0", "a.0", "down")),
    "frozen batch norm": Case(Detector, image(), ("stem", "body.0", "tower.0")),
    "auxiliary head": Case(Auxiliary, image(), ("a.0", "b.0", "aux.0")),
    "channel multiplier": Case(Multiplied, image(), ("stem.0", "out.0")),
    "qkv attention": Case(QkvBlock, lambda: torch.randn(2, 5, 12), ("embed", "attention.qkv", "up")),
    "bert": Case(BertBlock, lambda: torch.randint(11, (2, 5)), ("words", "q", "up")),
    "transformer encoder": Case(
        Encoder, lambda: torch.randn(2, 5, 12), ("embed", *encoder_parts("encoder.layers.{}", 2))
    ),
    "lstm": Case(Speech, lambda: torch.randn(2, 1, 7, 6), ("a.0", "b.0", "rnn.weight_ih_l0", "mid")),
    "gru": Case(
        lambda: Speech("GRU"), lambda: torch.randn(2, 1, 7, 6), ("a.0", "b.0", "rnn.weight_ih_l0", "mid")
    ),
    "mlp": Case(Plain, lambda: torch.randn(2, 12), ("0", "4")),
    "conv3d": Case(Volume, lambda: torch.randn(2, 2, 4, 4, 4), ("0",)),
    "gated": Case(Gated, image(), ("a.0", "b", "c")),
    "functional": Case(Functional, image(), ("kernel", "c")),
    "focus": Case(Focus, image(size=16), ("a", "b", "c")),
    "non-local": Case(NonLocal, image(), ("a",)),
    "causal": Case(Causal, lambda: torch.randn(2, 4, 20), ("a", "c")),
    "mixer": Case(Mixer, image(), ("embed", "t1", "c1")),
    "weight norm": Case(WeightNormed, lambda: torch.randn(2, 4, 8), ("a", "d", "up")),
    "computed weights": Case(Normed, image(), ("c",)),
}


def tokens() -> Tensor:
    return torch.randn(2, 5, 12)


def tower(attention: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: attentions.Tower(attention)


def parts_of(*ends: str, stream: str = "embed") -> tuple[str, ...]:
    return (stream, *(f"blocks.{place}.{end}" for place in (0, 1) for end in (*ends, "up")))


_TORCH = "attention.inner.in_proj_weight"
ATTENTION: dict[str, Case] = {
    "qkv by the stream's width": Case(tower(attentions.FromShape), tokens, parts_of()),
    "qkv split": Case(tower(attentions.Split), tokens, parts_of()),
    "qkv chunked": Case(tower(attentions.Chunked), tokens, parts_of("attention.to_qkv")),
    "distilbert": Case(tower(attentions.Distil), tokens, parts_of("attention.q_lin")),
    "grouped queries": Case(tower(attentions.Grouped), tokens, parts_of("attention.q")),
    "tied words": Case(attentions.TiedWords, lambda: torch.randint(11, (2, 5)), ("words", "block.up")),
    "windows": Case(tower(attentions.Window), lambda: torch.randn(2, 16, 12), parts_of()),
    "rms norm": Case(
        lambda: attentions.Tower(attentions.Einsum, norm=nn.RMSNorm), tokens, parts_of("attention.q")
    ),
    "attention by einsum": Case(tower(attentions.Einsum), tokens, parts_of("attention.q")),
    "torch attention": Case(tower(attentions.Torch), tokens, parts_of(_TORCH)),
    "torch attention with everything": Case(
        tower(lambda: attentions.Torch(weights=True, batch_first=True, add_bias_kv=True, add_zero_attn=True)),
        tokens,
        parts_of(_TORCH),
    ),
    "torch attention without bias": Case(
        tower(lambda: attentions.Torch(bias=False)), tokens, parts_of(_TORCH)
    ),
    "cross-attention": Case(attentions.Cross, tokens, ("embed", "keys", "values", "attention.q_proj_weight")),
    "cross-attention whose weights are an output": Case(
        lambda: attentions.Cross(weights=True), tokens, ("embed", "keys", "values")
    ),
    "vit": Case(attentions.Vit, image(), parts_of(_TORCH, stream="conv_proj")),
    "vit by the stream's width": Case(
        lambda: attentions.Vit(attentions.FromShape), image(), parts_of(stream="conv_proj")
    ),
    "padded encoder": Case(attentions.Masked, tokens, ("embed", *encoder_parts("encoder.layers.{}", 2))),
    "encoder and decoder": Case(
        attentions.Decoder,
        tokens,
        (
            "source",
            "inner.decoder.layers.0.multihead_attn.in_proj_weight",
            *encoder_parts("inner.encoder.layers.0", 1),
            *encoder_parts("inner.decoder.layers.0", 1),
        ),
    ),
}

INDEXED: dict[str, Case] = {
    "graph": Case(indexed.Graph, lambda: torch.randn(2, 6, 5), ("embed", "other")),
    "experts": Case(
        indexed.Experts, lambda: torch.randn(7, 8), ("embed", *(f"experts.{n}.0" for n in range(4)))
    ),
    "steps": Case(indexed.Steps, lambda: torch.randn(2, 4, 5), ("embed", "cell.weight_ih")),
    "packed": Case(indexed.Packed, lambda: torch.randn(2, 7, 6), ("embed", "rnn.weight_ih_l0")),
    "patches": Case(indexed.Patches, image(), ("stem", "inner", "outer")),
}
CASES |= ATTENTION | INDEXED
