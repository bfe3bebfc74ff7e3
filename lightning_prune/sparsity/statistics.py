"""What criteria need beyond the weights, gathered while training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.sparsity.criteria import Evidence
from lightning_prune.sparsity.sharding import like, whole

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class Statistics:
    """Gradients, movements, saliencies and activations of weights, by name.

    Gradients and activations start anew at the first observation after `restart`, so that the old ones remain
    readable until there are new ones.

    Args:
        kinds: Of `criteria.KINDS`; only these are gathered.

    Example:
        >>> statistics = Statistics(["gradient"])
        >>> statistics.observe_gradient("w", torch.tensor([2.0]), torch.tensor([0.5]))
        >>> statistics.observe_gradient("w", torch.tensor([2.0]), torch.tensor([1.5]))
        >>> statistics.evidence("w", torch.tensor([2.0])).gradient
        tensor([1.])
    """

    def __init__(self, kinds: Sequence[str]) -> None:
        self.kinds = tuple(kinds)
        self._sums: dict[str, dict[str, Tensor]] = {kind: {} for kind in self.kinds}
        self._counts: dict[str, dict[str, int]] = {kind: {} for kind in self.kinds}
        self._stale: set[tuple[str, str]] = set()

    @torch.no_grad()
    def observe_gradient(self, name: str, weight: Tensor, gradient: Tensor) -> None:
        """Take in the gradient of one optimizer step.

        Args:
            name: The weight's name.
            weight: The weight the gradient was computed at.
            gradient: The gradient, unscaled.
        """
        if "gradient" in self.kinds:
            self._add("gradient", name, gradient)
        if "movement" in self.kinds:
            self._add("movement", name, -(weight * gradient))
        if "saliency" in self.kinds and name not in self._sums["saliency"]:
            self._add("saliency", name, (weight * gradient).abs())

    @torch.no_grad()
    def observe_input(self, name: str, squares: Tensor) -> None:
        """Take in the input of one forward.

        Args:
            name: The weight's name.
            squares: Sum of squares of each input feature, from `input_squares`.
        """
        self._add("activation", name, squares)

    def _add(self, kind: str, name: str, value: Tensor) -> None:
        sums, counts = self._sums[kind], self._counts[kind]
        if name not in sums or (kind, name) in self._stale:
            self._stale.discard((kind, name))
            sums[name], counts[name] = value.detach().clone(), 1
        else:
            sums[name] += value
            counts[name] += 1

    def restart(self) -> None:
        """Let gradients and activations be gathered anew: an event has used them."""
        self._stale |= {(k, name) for k in ("gradient", "activation") for name in self._sums.get(k, ())}

    def complete(self, names: Iterable[str]) -> bool:
        """Tell whether everything is there, and fresh, for these weights.

        Args:
            names: Names of weights.

        Returns:
            Whether a criterion can be called.
        """
        return all(
            name in self._sums[kind] and (kind, name) not in self._stale
            for name in names
            for kind in self.kinds
        )

    def known(self, names: Iterable[str]) -> bool:
        """Tell whether everything is there for these weights, fresh or not."""
        return all(name in self._sums[kind] for name in names for kind in self.kinds)

    def evidence(self, name: str, weight: Tensor, seed: int = 0) -> Evidence:
        """Put together what a criterion looks at.

        Args:
            name: The weight's name.
            weight: The weight.
            seed: For random criteria.

        Returns:
            The evidence, with what `kinds` asks for.
        """
        found: dict[str, Tensor] = {}
        for kind in self.kinds:
            value = self._sums[kind][name]
            if kind == "gradient":
                value = value / self._counts[kind][name]
            elif kind == "activation":
                value = value.sqrt()
            found[kind] = value
        return Evidence(name, weight, seed=seed, **found)

    def narrow(self, cut: Callable[[str, Tensor], Tensor], names: Iterable[str]) -> None:
        """Follow the removal of channels.

        Args:
            cut: Cuts a tensor shaped like the named weight was.
            names: The weights that are left; activations are forgotten, as they are not shaped like weights.
        """
        left = set(names)
        for kind, sums in self._sums.items():
            self._sums[kind] = {
                name: cut(name, value)
                for name, value in sums.items()
                if name in left and kind != "activation"
            }

    def merge(self, reduce: Callable[[Tensor], Tensor]) -> None:
        """Add up activations over ranks, each of which has seen its own part of the data.

        Args:
            reduce: Sums a tensor over ranks.
        """
        for name, value in self._sums.get("activation", {}).items():
            self._sums["activation"][name] = reduce(value)

    def state_dict(self) -> dict[str, Any]:
        """Return everything as tensors and plain values."""
        return {
            "sums": {
                kind: {name: whole(value) for name, value in sums.items()}
                for kind, sums in self._sums.items()
            },
            "counts": {kind: dict(counts) for kind, counts in self._counts.items()},
            "stale": sorted(list(pair) for pair in self._stale),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take everything from `state_dict`."""
        for kind in self.kinds:
            self._sums[kind] = dict(state["sums"].get(kind, {}))
            self._counts[kind] = dict(state["counts"].get(kind, {}))
        self._stale = {(kind, name) for kind, name in state["stale"]}

    def to(self, weights: Mapping[str, Tensor]) -> None:
        """Move everything to where its weights are.

        Args:
            weights: The weights by name.
        """
        for sums in self._sums.values():
            for name, value in sums.items():
                if name in weights and value.shape == weights[name].shape:
                    sums[name] = like(value, weights[name])
                elif name in weights:
                    sums[name] = value.to(weights[name].device)


def has_input_features(layer: nn.Module) -> bool:
    """Tell whether the inputs of a layer's weight can be observed: a linear layer or a convolution.

    Example:
        >>> has_input_features(nn.Linear(1, 1)), has_input_features(nn.LSTM(1, 1))
        (True, False)
    """
    # An attention's output projection is a Linear whose forward is never called.
    called = not isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear)
    return called and isinstance(layer, (nn.Linear, *_CONVOLUTIONS, *_TRANSPOSED))


@torch.no_grad()
def input_squares(layer: nn.Module, x: Tensor) -> Tensor:
    """Sum the squares of each input feature of a linear layer or convolution.

    Args:
        layer: A layer for which `has_input_features` holds.
        x: Its input, `(..., in)` or `([batch,] in, *space)`.

    Returns:
        float32, shaped so that it broadcasts to the layer's weight.

    Example:
        >>> input_squares(nn.Linear(2, 3), torch.tensor([[1.0, 2.0], [3.0, 0.0]]))
        tensor([[10.,  4.]])
    """
    x = x.detach().float()
    if isinstance(layer, nn.Linear):
        return x.square().reshape(-1, x.shape[-1]).sum(0)[None]
    assert isinstance(layer, (*_CONVOLUTIONS, *_TRANSPOSED))
    space = layer.weight.dim() - 2
    channels = x.square().transpose(0, -1 - space).flatten(1).sum(1)
    ones = [1] * space
    if isinstance(layer, _TRANSPOSED):
        return channels.reshape(-1, 1, *ones)
    # Output `o` of a grouped convolution sees only the input channels of its group.
    by_group = channels.reshape(layer.groups, -1)
    return by_group.repeat_interleave(layer.out_channels // layer.groups, 0).reshape(
        layer.out_channels, -1, *ones
    )
