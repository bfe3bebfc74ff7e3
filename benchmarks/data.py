"""Real data sets, read from a folder that the user names; nothing is downloaded.

`--data-root`, or the environment variable `LIGHTNING_PRUNE_DATA`, names a folder with these files:

    cifar10/{train_25k,train_25k_rest,test}.npz       CIFAR-10, www.cs.toronto.edu/~kriz/cifar.html
    speech/speech_commands_v2_test.npz                Speech Commands v0.02 test set, arXiv:1804.03209
    speech/fsdd.npz                                   github.com/Jakobovski/free-spoken-digit-dataset
    har/motionsense.npz                               github.com/mmalekzadeh/motion-sense
    detection/bccd.npz                                github.com/Shenggan/BCCD_Dataset
    weights/*.npz                                     github.com/akamaster/pytorch_resnet_cifar10,
                                                      github.com/mlcommons/tiny

Not a benchmark itself. Scripts in this folder import it as `data`.
"""

from __future__ import annotations

import argparse
import io
import os
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, Sampler

from networks import CIFAR_MEAN

Split = tuple[Tensor, Tensor]
Scale = Callable[[Tensor], Tensor]
Augment = Callable[[Tensor, Tensor, torch.Generator], Split]


def add_data_root(parser: argparse.ArgumentParser) -> None:
    """Give a script the argument `--data-root`."""
    parser.add_argument(
        "--data-root",
        type=Path,
        default=os.environ.get("LIGHTNING_PRUNE_DATA"),
        help="the folder with the data (see benchmarks/data.py), default $LIGHTNING_PRUNE_DATA",
    )


def file_of(root: Path | str | None, name: str) -> Path:
    """Find one file of the data, or say what to do."""
    if root is None:
        raise SystemExit(
            "where is the data? give --data-root or set LIGHTNING_PRUNE_DATA; see benchmarks/data.py"
        )
    path = Path(root) / name
    if not path.is_file():
        raise SystemExit(f"{path} does not exist; benchmarks/data.py says where the public original is")
    return path


def load_weights(model: nn.Module, root: Path | str | None, name: str) -> nn.Module:
    """Load `weights/<name>.npz` strictly."""
    with np.load(file_of(root, f"weights/{name}.npz")) as arrays:
        model.load_state_dict({key: torch.from_numpy(arrays[key]) for key in arrays.files})
    return model


# ------------------------------------------------------------------ pictures


def cifar10(root: Path | str | None, part: str) -> Split:
    """Read CIFAR-10.

    Args:
        root: The data's folder.
        part: `"train"` (50,000) or `"test"` (10,000).

    Returns:
        Pictures (n, 3, 32, 32) as uint8, and labels.
    """
    from PIL import Image

    names = {"train": ("train_25k", "train_25k_rest"), "test": ("test",)}[part]
    pictures, labels, order = [], [], []
    for name in names:
        with np.load(file_of(root, f"cifar10/{name}.npz")) as z:
            offset, raw = z["offset"], z["webp"].tobytes()
            tiles = [np.asarray(Image.open(io.BytesIO(raw[i:j]))) for i, j in pairwise(offset)]
            grid = np.stack(tiles).reshape(-1, 10, 32, 10, 32, 3).transpose(0, 1, 3, 5, 2, 4)
            pictures.append(grid.reshape(-1, 3, 32, 32))
            labels.append(z["label"])
            order.append(z["index"])
    rank = np.argsort(np.concatenate(order), kind="stable")
    return (
        torch.from_numpy(np.concatenate(pictures)[rank]),
        torch.from_numpy(np.concatenate(labels)[rank]).long(),
    )


def held_out(count: int, fraction: float) -> Tensor:
    """Mark the same part of the training samples for every choice that has to be made."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(20261121))
    mask = torch.zeros(count, dtype=torch.bool)
    mask[order[: int(count * fraction)]] = True
    return mask


class Batches(Dataset):
    """Whole batches made from tensors at once: item `(epoch, i)` is the i-th batch of an epoch.

    Order and augmentation follow from seed, epoch and i alone, so a killed run goes on with the same batches.

    Args:
        x: Samples.
        y: Labels.
        size: Samples in a batch.
        seed: Of the order and the augmentation; None keeps the order and leaves the samples alone.
        augment: Changes samples and labels of a batch for training, with the generator it is given.
        scale: Turns samples into what the network expects, after that.
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        size: int,
        *,
        seed: int | None = None,
        scale: Scale | None = None,
        augment: Augment | None = None,
    ) -> None:
        self.x, self.y, self.size, self.seed = x, y, size, seed
        self.scale, self.augment = scale, augment

    def __len__(self) -> int:
        full, rest = divmod(len(self.x), self.size)
        return full + (rest > 0 and self.seed is None)

    def __getitem__(self, key: tuple[int, int]) -> Split:
        epoch, i = key
        index: Tensor | slice = slice(i * self.size, (i + 1) * self.size)
        random = torch.Generator()
        if self.seed is not None:
            index = torch.randperm(len(self.x), generator=random.manual_seed(self.seed + 1000 * epoch))[index]
        x, y = self.x[index], self.y[index]
        if self.seed is not None and self.augment is not None:
            x, y = self.augment(x, y, random.manual_seed((self.seed + 1000 * epoch) * 100_003 + i))
        return (x if self.scale is None else self.scale(x)), y


class Epochs(Sampler[tuple[int, int]]):
    """Names the batches of the epoch that the trainer says it is in.

    Args:
        count: Batches in an epoch.
    """

    def __init__(self, count: int) -> None:
        self.count, self.epoch = count, 0

    def set_epoch(self, epoch: int) -> None:  # Lightning calls this
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((self.epoch, i) for i in range(self.count))

    def __len__(self) -> int:
        return self.count


def pictures(most: int, edges: str = "black", paste: float = 0.0) -> Augment:
    """Move each picture by up to `most` pixels, and mirror every second one.

    Args:
        most: Pixels, in each direction.
        edges: What comes in: `"black"`, `"gray"` (the mean colour) or `"replicate"` (what was at the edge).
        paste: Part of the pictures that get a box of the next one, of any share of the picture (CutMix, Yun
            et al. 2019). Labels stay those of the first.
    """
    if edges not in ("black", "gray", "replicate"):
        raise SystemExit(f"edges must be black, gray or replicate, got {edges}")

    def augment(x: Tensor, y: Tensor, random: torch.Generator) -> Split:
        n, channels, height, width = x.shape
        rows = torch.arange(height).view(1, 1, -1, 1)
        rows = rows + torch.randint(-most, most + 1, (n, 1, 1, 1), generator=random)
        columns = torch.arange(width).view(1, 1, 1, -1).expand(n, 1, 1, -1)
        mirrored = torch.rand(n, 1, 1, 1, generator=random) < 0.5
        columns = torch.where(mirrored, width - 1 - columns, columns)
        columns = columns + torch.randint(-most, most + 1, (n, 1, 1, 1), generator=random)
        inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
        flat = rows.clamp(0, height - 1) * width + columns.clamp(0, width - 1)
        flat = flat.expand(n, channels, height, width).flatten(2)
        moved = x.flatten(2).gather(2, flat).view_as(x)
        if edges != "replicate":
            color = torch.tensor(CIFAR_MEAN).mul(255).round() if edges == "gray" else torch.zeros(3)
            moved = torch.where(inside, moved, color.to(x.dtype).view(1, 3, 1, 1))
        if paste:
            moved = torch.where(boxes(n, height, width, paste, random), moved.roll(1, 0), moved)
        return moved, y

    return augment


def boxes(n: int, height: int, width: int, part: float, random: torch.Generator) -> Tensor:
    """Mark a box in a `part` of n pictures, (n, 1, height, width); its share of the picture is uniform."""
    side = torch.rand(n, 1, 1, 1, generator=random).sqrt()
    side = torch.where(torch.rand(n, 1, 1, 1, generator=random) < part, side, 0.0)

    def inside(length: int, shape: tuple[int, ...]) -> Tensor:
        center = torch.rand(n, 1, 1, 1, generator=random) * length
        away = (torch.arange(length).view(shape) + 0.5 - center).abs()
        return away < side * length / 2

    return inside(height, (1, 1, -1, 1)) & inside(width, (1, 1, 1, -1))


def signals(most: int, noise: float, axis: int = -1) -> Augment:
    """Move each sample by up to `most` steps in time, its ends repeated, and add noise of this deviation."""

    def augment(x: Tensor, y: Tensor, random: torch.Generator) -> Split:
        shape = [1] * x.ndim
        shape[0] = len(x)
        offset = torch.randint(-most, most + 1, shape, generator=random)
        shape[0], shape[axis] = 1, x.shape[axis]
        steps = torch.arange(x.shape[axis]).view(shape)
        x = x.gather(axis, (steps + offset).clamp(0, x.shape[axis] - 1).expand_as(x))
        return x + noise * torch.randn(x.shape, generator=random), y

    return augment


def mirrored_boxes(x: Tensor, y: Tensor, random: torch.Generator) -> Split:
    """Mirror every second picture, left to right and top to bottom, with its boxes (n, boxes, 4 + class)."""
    x, y = x.clone(), y.clone()
    for axis, low in ((3, 0), (2, 1)):
        turned = torch.rand(len(x), generator=random) < 0.5
        x[turned] = x[turned].flip(axis)
        ends = y[turned][..., [low + 2, low]]
        y[
            turned.nonzero()[:, 0, None, None],
            torch.arange(y.shape[1])[:, None],
            torch.tensor([low, low + 2]),
        ] = x.shape[axis] - ends
    return x, y


# ------------------------------------------------------------------ sound and motion


def by_person(people: np.ndarray, fractions: dict[str, float], seed: int = 0) -> dict[str, np.ndarray]:
    """Split people, not samples: nobody is in two parts.

    Args:
        people: Who each sample is from.
        fractions: The parts' names and sizes.
        seed: Of the people's order.

    Returns:
        For each part a mask over the samples.
    """
    who = np.unique(people)
    who = who[np.random.default_rng(seed).permutation(len(who))]
    bounds = np.round(np.cumsum([0.0, *fractions.values()]) * len(who)).astype(int)
    cuts = zip(fractions, pairwise(bounds), strict=True)
    return {name: np.isin(people, who[a:b]) for name, (a, b) in cuts}


def keywords(root: Path | str | None) -> dict[str, Split]:
    """Read Speech Commands, as 10 MFCCs x 49 frames, split by speaker 60/15/25 into train, val and test.

    Silence has no speaker; its clips are split at random.
    """
    with np.load(file_of(root, "speech/speech_commands_v2_test.npz")) as z:
        logmel = (z["logmel"] * z["scale"] + z["offset"]).astype(np.float32)
        label, speaker = z["label"].astype(np.int64), z["speaker"].astype(np.int64)
    k = np.arange(40)
    cosine = 2 * np.cos(np.pi * (2 * k[:, None] + 1) * k[:10] / 80) / 80**0.5
    x = torch.from_numpy((logmel @ cosine.astype(np.float32))[:, None])
    silent = speaker < 0
    speaker[silent] = -1 - np.arange(silent.sum())
    parts = by_person(speaker, {"train": 0.6, "val": 0.15, "test": 0.25})
    y = torch.from_numpy(label)
    return {name: (x[torch.from_numpy(mask)], y[torch.from_numpy(mask)]) for name, mask in parts.items()}


def motion(root: Path | str | None) -> dict[str, Split]:
    """Read MotionSense windows (9, 128): people 1-15 train, 16-19 choose, 20-24 are the last number."""
    with np.load(file_of(root, "har/motionsense.npz")) as z:
        x = torch.from_numpy((z["x"] * z["scale"][:, None]).astype(np.float32))
        y, who = (
            torch.from_numpy(z["label"].astype(np.int64)),
            torch.from_numpy(z["subject"].astype(np.int64)),
        )
    parts = {"train": who < 16, "val": (who >= 16) & (who < 20), "test": who >= 20}
    mean, deviation = (f(x[parts["train"]]) for f in (_channel_mean, _channel_deviation))
    return {name: ((x[mask] - mean) / deviation, y[mask]) for name, mask in parts.items()}


def _channel_mean(x: Tensor) -> Tensor:
    return x.mean((0, 2)).view(1, -1, 1)


def _channel_deviation(x: Tensor) -> Tensor:
    return x.std((0, 2)).view(1, -1, 1)


def digits_spoken(root: Path | str | None, frames: int = 96) -> dict[str, Split]:
    """Read Free Spoken Digit as log-mel pictures (40, frames): four speakers train, one chooses, one tests.

    Frames of 256 samples every 128 at 8 kHz (32 and 16 ms), 40 mel bands up to 4 kHz; clips are cut or padded
    at the end.
    """
    with np.load(file_of(root, "speech/fsdd.npz")) as z:
        u = z["hi"].astype(np.uint16) << 8 | z["lo"]
        samples = np.cumsum((u >> 1) ^ -(u & 1), dtype=np.int16)
        clips = np.split(samples, np.cumsum(z["length"])[:-1])
        label, speaker = z["label"].astype(np.int64), z["speaker"].astype(np.int64)
    bank = mel_bank(40, 256, 8000)
    window = torch.hann_window(256)
    pictures = torch.zeros(len(clips), 40, frames)
    for i, clip in enumerate(clips):
        sound = torch.from_numpy(clip.astype(np.float32)) / max(1, int(np.abs(clip).max()))
        sound = F.pad(sound, (0, max(0, 256 - len(sound))))
        power = torch.stft(sound, 256, 128, window=window, center=False, return_complex=True).abs() ** 2
        mel = torch.log(bank @ power + 1e-5)[:, :frames]
        pictures[i, :, : mel.shape[1]] = mel - mel.mean()
    y = torch.from_numpy(label)
    parts = {"train": speaker < 4, "val": speaker == 4, "test": speaker == 5}
    return {name: (pictures[torch.from_numpy(m)], y[torch.from_numpy(m)]) for name, m in parts.items()}


def mel_bank(bands: int, window: int, rate: int) -> Tensor:
    """Make triangular filters, equally spaced in mel (HTK), to half the rate: (bands, window/2+1)."""
    mel = torch.linspace(0, 2595 * float(np.log10(1 + rate / 2 / 700)), bands + 2)
    edges = 700 * (10 ** (mel / 2595) - 1)
    bins = torch.linspace(0, rate / 2, window // 2 + 1)
    up = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    down = (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
    return torch.minimum(up, down).clamp_min(0)


# ------------------------------------------------------------------ cells


def cells(root: Path | str | None) -> dict[str, Split]:
    """Read BCCD: pictures (n, 3, 240, 320) as uint8, and boxes (n, most, 5).

    A box is x1, y1, x2, y2 in pixels and its class, 0 to 2; where a picture has fewer, the class is -1.
    """
    from PIL import Image

    with np.load(file_of(root, "detection/bccd.npz")) as z:
        raw = z["jpeg"].tobytes()
        tiles = [np.asarray(Image.open(io.BytesIO(raw[i:j]))) for i, j in pairwise(z["offset"])]
        boxes, label, image, split = z["boxes"], z["box_label"], z["box_image"], z["split"]
    x = torch.from_numpy(np.stack(tiles).transpose(0, 3, 1, 2).copy())
    y = torch.full((len(x), int(np.bincount(image).max()), 5), -1.0)
    for i in range(len(x)):
        mine = image == i
        found = np.concatenate([boxes[mine], label[mine, None].astype(np.float32) - 1], 1)
        y[i, : len(found)] = torch.from_numpy(found)
    numbers = {"train": split == 0, "val": split == 1, "test": split == 2}
    return {name: (x[torch.from_numpy(mask)], y[torch.from_numpy(mask)]) for name, mask in numbers.items()}
