"""What a block does to its input, observed on real batches: how little it changes, and what comes near it.

For a block with inputs `x` and outputs `y`, a position (pixel, token) a row, the layer that takes its place
is `x W + b` with the least squared error, `W = (X^T X)^+ X^T Y` (He et al. 2017, "Channel Pruning", equation
1, for the features of one layer; Shopkhoev et al. 2025, "ReplaceMe", for blocks). The score of a block is the
part of its output that what takes its place gets wrong, `|y - x W - b|^2 / |y|^2`; with an identity,
`|y - x|^2 / |y|^2`. Where `x` and `y` are equally long that is twice the Block Influence `1 - cos(x, y)` of
ShortGPT (Men et al. 2024, equation 1), and unlike it, it notices a change of length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.structure.blocks import Block
from lightning_prune.structure.residual import first_argument, first_tensor


class Observed:
    """Sums over everything that went through a block.

    Args:
        block: The block.

    Example:
        >>> from lightning_prune.structure.replaced import spec_of
        >>> seen = Observed(Block("a", spec_of(nn.Identity())))
        >>> seen.add(torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 0.0]]))
        >>> round(seen.score(), 4)
        1.7778
    """

    def __init__(self, block: Block) -> None:
        self.block = block
        self.fitted = block.layer["kind"] != "Identity"
        given = block.layer["arguments"]
        self.bias = bool(given.get("bias"))
        self.stride: Sequence[int] | None = given.get("stride")
        if self.fitted:
            inputs, outputs = (given[k] for k in _sizes(given))
            rows = inputs + self.bias
            self.sums = [torch.zeros(1), torch.zeros(rows, rows), torch.zeros(rows, outputs)]
        else:
            self.sums = [torch.zeros(1), torch.zeros(1)]
        self.sums = [total.double() for total in self.sums]

    @torch.no_grad()
    def add(self, x: Tensor, y: Tensor) -> None:
        """Take in one call's input and output."""
        x, y = x.detach().double(), y.detach().double()
        if not self.fitted:
            found = [y.square().sum()[None], (y - x).square().sum()[None]]
        else:
            if self.stride is not None:
                for dim, step in enumerate(self.stride, start=2):
                    x = x.index_select(dim, torch.arange(0, x.shape[dim], step, device=x.device))
                x, y = x.movedim(1, -1), y.movedim(1, -1)
            x, y = x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1])
            if self.bias:
                x = torch.cat([x, x.new_ones(len(x), 1)], 1)
            found = [y.square().sum()[None], x.T @ x, x.T @ y]
        self.sums = [total.to(new.device) + new for total, new in zip(self.sums, found, strict=True)]

    def merge(self, total: Callable[[Tensor], Tensor]) -> None:
        """Add up what all ranks have seen.

        Args:
            total: Sums a tensor over ranks.
        """
        self.sums = [total(mine) for mine in self.sums]

    @property
    def seen(self) -> bool:
        """Whether anything but zeros came out of the block."""
        return bool(self.sums[0] > 0)

    def fit(self) -> tuple[Tensor, Tensor]:
        """Find the weights of the layer that comes nearest, and their squared error.

        Returns:
            Shape (inputs, outputs), with a last row of biases if it has any; and a scalar.
        """
        length, gram, cross = self.sums
        weights = torch.linalg.pinv(gram, hermitian=True) @ cross
        error = length - 2 * (weights * cross).sum() + (weights * (gram @ weights)).sum()
        return weights, error.clamp_min(0)

    def score(self) -> float:
        """The part of the block's output that what takes its place gets wrong."""
        error = self.fit()[1] if self.fitted else self.sums[1]
        return float(error / self.sums[0].clamp_min(1e-30))


def _sizes(given: Mapping[str, Any]) -> tuple[str, str]:
    return ("in_features", "out_features") if "in_features" in given else ("in_channels", "out_channels")


@torch.no_grad()
def set_weights(layer: nn.Module, weights: Tensor) -> None:
    """Give a linear layer or convolution of kernel size 1, or one in a `Bypass`, weights that were fitted.

    Args:
        layer: The layer.
        weights: Shape (inputs, outputs), with a last row of biases if it has any.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> set_weights(layer, torch.tensor([[1.0], [2.0], [3.0]]))
        >>> layer(torch.tensor([[1.0, 1.0]])).item()
        6.0
    """
    named = dict(layer.named_parameters())
    weight = next(p for name, p in named.items() if name.endswith("weight"))
    bias = next((p for name, p in named.items() if name.endswith("bias")), None)
    rows = weights.T[:, : weights.shape[0] - (bias is not None)]
    weight.copy_(rows.reshape(weight.shape))
    if bias is not None:
        bias.copy_(weights[-1])


def observe(module: nn.Module, seen: Mapping[str, Observed]) -> list[Any]:
    """Watch blocks from now on.

    Args:
        module: The network.
        seen: What is known of each block by name; it is added to.

    Returns:
        Handles, to stop watching.
    """

    def watch(observed: Observed) -> Any:
        def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            x, y = first_argument(args, kwargs)[0], first_tensor(out)
            if x is not None and y is not None:
                observed.add(x, y)

        return hook

    return [
        module.get_submodule(name).register_forward_hook(watch(observed), with_kwargs=True)
        for name, observed in seen.items()
    ]
