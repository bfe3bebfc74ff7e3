"""The networks of the benchmarks, laid out like the published weights they load.

Not a benchmark itself. Scripts in this folder import it as `networks`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CIFAR_MEAN = (0.485, 0.456, 0.406)
CIFAR_DEVIATION = (0.229, 0.224, 0.225)


class CifarBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut without weights (option A of He et al. 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.missing = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.missing:
            half = self.missing // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, self.missing - half))
        return F.relu(y + x)


class CifarResNet(nn.Module):
    """ResNet-20 or ResNet-56 for 32x32 pictures.

    Args:
        depth: 6 n + 2.
        width: Channels of the first stage; the later ones have two and four times as many.
    """

    def __init__(self, depth: int, width: int = 16) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = self._stage(width, width, blocks, 1)
        self.layer2 = self._stage(width, 2 * width, blocks, 2)
        self.layer3 = self._stage(2 * width, 4 * width, blocks, 2)
        self.linear = nn.Linear(4 * width, 10)

    @staticmethod
    def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
        later = (CifarBlock(outputs, outputs, 1) for _ in range(blocks - 1))
        return nn.Sequential(CifarBlock(inputs, outputs, stride), *later)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


class TinyBlock(nn.Module):
    """A block of MLPerf Tiny's ResNet-8; TensorFlow pads one pixel at the right and bottom at stride 2."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 0 if stride > 1 else 1)
        self.bn1 = nn.BatchNorm2d(outputs, eps=1e-3)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1)
        self.bn2 = nn.BatchNorm2d(outputs, eps=1e-3)
        if stride > 1:
            self.short = nn.Conv2d(inputs, outputs, 1, stride)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        y = F.pad(x, (0, 1, 0, 1)) if self.stride > 1 else x
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(y)))))
        return F.relu(y + (self.short(x) if self.stride > 1 else x))


class TinyResNet8(nn.Module):
    """The picture classifier of MLPerf Tiny; its input is RGB from 0 to 255."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, 1, 1)
        self.bn = nn.BatchNorm2d(width, eps=1e-3)
        self.stage1 = TinyBlock(width, width, 1)
        self.stage2 = TinyBlock(width, 2 * width, 2)
        self.stage3 = TinyBlock(2 * width, 4 * width, 2)
        self.fc = nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x)))
        return self.fc(self.stage3(self.stage2(self.stage1(x))).mean((2, 3)))


class DepthwiseBlock(nn.Module):
    """A depthwise 3x3 and a 1x1 convolution, each with its normalisation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dw = nn.Conv2d(channels, channels, 3, 1, 1, groups=channels)
        self.bn1 = nn.BatchNorm2d(channels, eps=1e-3)
        self.pw = nn.Conv2d(channels, channels, 1)
        self.bn2 = nn.BatchNorm2d(channels, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.dw(x)))
        return F.relu(self.bn2(self.pw(x)))


class TinyKeywords(nn.Module):
    """The keyword spotter of MLPerf Tiny, a DS-CNN over 49 frames of 10 MFCCs."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, width, (10, 4), 2)
        self.bn = nn.BatchNorm2d(width, eps=1e-3)
        self.blocks = nn.Sequential(*(DepthwiseBlock(width) for _ in range(4)))
        self.fc = nn.Linear(width, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(F.pad(x, (1, 1, 4, 5)))))
        x = self.blocks(x)[:, :, :24]
        return self.fc(x.mean((2, 3)))


class MotionCnn(nn.Module):
    """Three 1-D convolutions over a window of a phone's motion."""

    def __init__(self, width: int = 64, classes: int = 6) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs, kernel in ((9, width, 9), (width, 2 * width, 5), (2 * width, 2 * width, 5)):
            layers += [
                nn.Conv1d(inputs, outputs, kernel, 1, kernel // 2, bias=False),
                nn.BatchNorm1d(outputs),
            ]
            layers += [nn.ReLU(), nn.MaxPool1d(2)]
        self.features = nn.Sequential(*layers)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(2 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(self.features(x).mean(2)))


class MotionGru(nn.Module):
    """A convolution that halves the rate, and a GRU over what comes out of it."""

    def __init__(self, width: int = 64, classes: int = 6) -> None:
        super().__init__()
        self.conv = nn.Conv1d(9, width, 5, 2, 2, bias=False)
        self.norm = nn.BatchNorm1d(width)
        hidden = 3 * width // 2
        self.gru = nn.GRU(width, hidden, batch_first=True)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x))).transpose(1, 2)
        return self.head(self.dropout(self.gru(x)[0].mean(1)))


class SpeechNet(nn.Module):
    """DeepSpeech-like: convolutions over mel bands and time, a two-layer bidirectional GRU, a classifier."""

    def __init__(self, width: int = 32, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, (11, 11), (2, 2), (5, 5), bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, (11, 5), (2, 1), (5, 2), bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        hidden = 3 * width
        self.rnn = nn.GRU(width * 10, hidden, 2, batch_first=True, bidirectional=True, dropout=0.2)
        self.head = nn.Linear(2 * hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardtanh(self.norm1(self.conv1(x.unsqueeze(1))), 0, 20)
        x = F.hardtanh(self.norm2(self.conv2(x)), 0, 20)
        x = x.flatten(1, 2).transpose(1, 2)
        return self.head(self.rnn(x)[0].mean(1))


def normalized(x: Tensor) -> Tensor:
    """Turn uint8 RGB into what the CIFAR ResNets were trained on."""
    mean, deviation = (torch.tensor(v).view(1, 3, 1, 1) for v in (CIFAR_MEAN, CIFAR_DEVIATION))
    # Channels last: a training step on the CPU takes a tenth less time.
    return ((x.float() / 255 - mean) / deviation).contiguous(memory_format=torch.channels_last)


class ResidualBlock(nn.Module):
    """The block of ResNet-18 (two 3x3 convolutions) or of ResNet-50 (1x1, 3x3, 1x1, four times as wide)."""

    def __init__(self, inputs: int, width: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        outputs = width * 4 if bottleneck else width
        kernels = (1, 3, 1) if bottleneck else (3, 3)
        strides = (1, stride, 1) if bottleneck else (stride, 1)
        widths = (inputs, *(width,) * (len(kernels) - 1), outputs)
        layers: list[nn.Module] = []
        for i, (kernel, step) in enumerate(zip(kernels, strides, strict=True)):
            layers.append(nn.Conv2d(widths[i], widths[i + 1], kernel, step, kernel // 2, bias=False))
            layers += [nn.BatchNorm2d(widths[i + 1]), nn.ReLU()]
        self.body = nn.Sequential(*layers[:-1])
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            convolution = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def resnet(depth: int, classes: int = 1000) -> nn.Sequential:
    """Make ResNet-18 or ResNet-50 for 224x224 pictures."""
    counts, bottleneck = {18: ((2, 2, 2, 2), False), 50: ((3, 4, 6, 3), True)}[depth]
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    layers.append(nn.MaxPool2d(3, 2, 1))
    inputs = 64
    for i, count in enumerate(counts):
        for j in range(count):
            layers.append(ResidualBlock(inputs, 64 << i, 2 if i and not j else 1, bottleneck))
            inputs = (64 << i) * (4 if bottleneck else 1)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


class InvertedResidual(nn.Module):
    """MobileNetV2's block: widen, depthwise, narrow; beside a shortcut where the shapes agree."""

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = inputs * expand
        layers: list[nn.Module] = []
        if expand > 1:
            layers += [nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6()]
        layers.append(nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False))
        layers += [nn.BatchNorm2d(hidden), nn.ReLU6()]
        layers += [nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs)]
        self.body = nn.Sequential(*layers)
        self.same = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.same else self.body(x)


def mobilenet_v2(classes: int = 1000) -> nn.Sequential:
    """Make MobileNetV2 for 224x224 pictures."""
    layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU6()]
    plan = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2))
    inputs = 32
    for expand, outputs, count, stride in (*plan, (6, 320, 1, 1)):
        for j in range(count):
            layers.append(InvertedResidual(inputs, outputs, stride if j == 0 else 1, expand))
            inputs = outputs
    layers += [nn.Conv2d(320, 1280, 1, bias=False), nn.BatchNorm2d(1280), nn.ReLU6()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, classes))
