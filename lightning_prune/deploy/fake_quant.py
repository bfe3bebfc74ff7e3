"""Rounding to an integer grid in float, so that training feels what the quantized file does.

The formulas are those of ONNX: `QuantizeLinear` is `clip(round(x / scale) + zero, low, high)` with ties to
even, `DequantizeLinear` is `(q - zero) * scale`. Everything is computed in float32 at least, whatever the
precision of the training.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

_TINY = 1e-30


@dataclass(frozen=True)
class Grid:
    """The integers that a target computes with.

    Attributes:
        low: The least integer of an activation.
        high: The greatest.
        symmetric: Whether zero is always the integer 0.
        weight: The greatest magnitude of a weight.
        per_channel: Whether each output channel of a weight has a step of its own.

    Example:
        >>> grid_of("x86-vnni")
        Grid(low=0, high=255, symmetric=False, weight=127, per_channel=True)
    """

    low: int = 0
    high: int = 255
    symmetric: bool = False
    weight: int = 127
    per_channel: bool = True


_GRIDS = {
    # Without VNNI two products of 8 bits are added in 16: 2 * 255 * 64 is the most that fits.
    "x86-avx2": Grid(weight=64),
    "npu-s8s8": Grid(low=-128, high=127, symmetric=True),
}


def grid_of(target: str, per_channel: bool = True) -> Grid:
    """Return the grid of a preset of `Quantize`.

    Example:
        >>> grid_of("x86-avx2").weight, grid_of("arm64").weight
        (64, 127)
    """
    return replace(_GRIDS.get(target, Grid()), per_channel=per_channel)


def steps_of(low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Turn a range into a scale and a zero point; the range is widened so that zero lies on the grid.

    Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference", section 3.1.

    Args:
        low: The least value.
        high: The greatest value.
        grid: The integers.

    Returns:
        The scale, and the integer that means zero (as a float tensor).

    Example:
        >>> scale, zero = steps_of(torch.tensor(-1.0), torch.tensor(1.55), Grid())
        >>> round(float(scale), 6), float(zero)
        (0.01, 100.0)
    """
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    if grid.symmetric:
        scale = (torch.maximum(-low, high) / grid.high).clamp(min=_TINY)
        return scale, torch.zeros_like(scale)
    scale = ((high - low) / (grid.high - grid.low)).clamp(min=_TINY)
    return scale, (grid.low - torch.round(low / scale)).clamp(grid.low, grid.high)


def fake_quantize(x: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
    """Round to the grid and back, with gradients.

    Inside the range the gradient passes as it is (the straight-through estimator of Bengio et al. 2013),
    outside it is zero. `scale` gets the gradient of Esser et al. 2020, "Learned Step Size Quantization",
    equation 3, times their gradient scale `1 / sqrt(elements * high)`, if it asks for one.

    Args:
        x: Activations of any floating type.
        scale: The step, a float32 scalar.
        zero: The integer that means zero, a float32 scalar.
        grid: The integers.

    Returns:
        A tensor of the shape and type of `x`.

    Example:
        >>> fake_quantize(torch.tensor([0.26, -3.0]), torch.tensor(0.1), torch.tensor(10.0), Grid())
        tensor([ 0.3000, -1.0000])
    """
    result: Tensor = _Round.apply(x, scale, zero, grid)  # type: ignore[no-untyped-call]
    return result


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: Tensor, grid: Grid) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        scale, zero = scale.to(wide), zero.to(wide)
        steps = wide / scale
        whole = (torch.round(steps) + zero).clamp(grid.low, grid.high) - zero
        inside = (steps >= grid.low - zero) & (steps <= grid.high - zero)
        error = None
        if ctx.needs_input_grad[1]:
            error = torch.where(inside, whole - steps, whole)
            ctx.strength = (max(x.numel(), 1) * grid.high) ** -0.5
        ctx.save_for_backward(inside, error)
        return (whole * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        inside, error = ctx.saved_tensors
        passed = gradient * inside
        if error is None:
            return passed, None, None, None
        return passed, (gradient.to(error) * error).sum().float() * ctx.strength, None, None


def weight_scales(weight: Tensor, limit: int, factors: Tensor | None = None) -> Tensor:
    """Return the step of each output channel: its largest magnitude divided by `limit`.

    Symmetric and per output channel, so that a zero stays a zero, and so that folding a batch norm into the
    weight, which multiplies whole output channels, changes no integer but perhaps the sign of all integers of
    a channel.

    Args:
        weight: Of shape (outputs, ...).
        limit: The greatest integer.
        factors: What each output channel will be multiplied by, of shape (outputs,) or (). If given, all
            channels have one step after that, and so the channels of the plain weight have different ones.

    Returns:
        Shape (outputs,); 1 where a channel is all zeros.

    Example:
        >>> weight_scales(torch.tensor([[1.27, 0.5], [0.0, 0.0]]), 127)
        tensor([0.0100, 1.0000])
        >>> weight_scales(torch.tensor([[1.27, 0.5], [0.2, 0.1]]), 127, torch.tensor([1.0, 2.0]))
        tensor([0.0100, 0.0050])
    """
    wide = weight if weight.dtype == torch.float64 else weight.float()
    peaks = wide.detach().flatten(1).abs().amax(1) / limit
    if factors is not None:
        factors = factors.abs().to(peaks).expand_as(peaks)
        # A channel that comes to nothing may keep the step that it has.
        peaks = torch.where(factors > 0, (peaks * factors).amax() / factors, peaks)
    return torch.where(peaks > 0, peaks.clamp(min=_TINY), torch.ones_like(peaks))


def whole_weight(weight: Tensor, limit: int, factors: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return a weight as integers (in a float tensor), and the step of each output channel."""
    scales = weight_scales(weight, limit, factors)
    columns = scales.view(-1, *[1] * (weight.dim() - 1))
    return torch.round(weight.detach().to(scales.dtype) / columns).clamp(-limit, limit), scales


def fake_quantize_weight(weight: Tensor, limit: int, factors: Tensor | None = None) -> Tensor:
    """Round a weight as `weight_scales` says; its gradient passes as it is, because nothing is clipped.

    Example:
        >>> fake_quantize_weight(torch.tensor([[1.27, 0.504]]), 127)
        tensor([[1.2700, 0.5000]])
    """
    result: Tensor = _RoundWeight.apply(weight, limit, factors)  # type: ignore[no-untyped-call]
    return result


class _RoundWeight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, limit: int, factors: Tensor | None) -> Tensor:
        whole, scales = whole_weight(weight, limit, factors)
        return (whole * scales.view(-1, *[1] * (weight.dim() - 1))).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient, None, None
