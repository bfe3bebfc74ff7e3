"""Putting products of smaller layers in the place of layers, and trying on copies whether that works."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_prune.cost import copied
from lightning_prune.structure.costs import Example
from lightning_prune.structure.low_rank import compose, factorize, is_matrix, pull_back, refit
from lightning_prune.structure.modes import running
from lightning_prune.structure.optimizers import Swap
from lightning_prune.structure.ranks import Ranks
from lightning_prune.structure.replaced import put
from lightning_prune.structure.surgery import take
from lightning_prune.structure.verify import distance, repeatable

_EXACT, _ROUNDED = 1e-5, 1e-2  # what rounding may change of an output, in float64 and in a network's own type


def factors_of(module: nn.Module, ranks: Mapping[str, Ranks]) -> dict[str, list[Tensor]]:
    """Factor the weights of some layers; see `low_rank.factorize`."""
    weights = dict(module.named_parameters())
    return {name: factorize(weights[f"{name}.weight"], rank) for name, rank in ranks.items()}


def put_factors(
    module: nn.Module, factors: Mapping[str, Sequence[Tensor]], again: bool = False
) -> list[Swap]:
    """Put products in the place of layers.

    Args:
        module: The network, or a running average of it.
        factors: `{layer: the weights of the layers that take its place}`.
        again: Whether the factors are another network's, as for an average: then what is best for this one's
            weights is put between the same spaces.

    Returns:
        Which parameters were swapped, for `optimizers.exchange`.
    """
    swaps = []
    for name, given in factors.items():
        layer: Any = module.get_submodule(name)
        weight = layer.weight
        mine = refit(weight, given) if again else [f.to(weight.device, weight.dtype) for f in given]
        product = as_layers(layer, mine)
        put(module, name, product)
        new = {f"{name}.{i}.weight": child.weight for i, child in enumerate(product)}
        swaps.append(Swap([weight], new, partial(_carried, factors=mine)))  # type: ignore[arg-type]
    return swaps


def _carried(value: Tensor, squared: bool, factors: Sequence[Tensor]) -> list[Tensor]:
    return pull_back(value, factors, squared)


def as_layers(layer: Any, factors: Sequence[Tensor]) -> nn.Sequential:
    """Make the layers that take the place of one; the last has its bias, the very same Parameter.

    Args:
        layer: An `nn.Linear`, `nn.Conv1d`, `nn.Conv2d` or `nn.Conv3d`.
        factors: Their weights, as `low_rank.factorize` returns them.

    Returns:
        Two linear layers, two convolutions of one position, or such a one before and after the core.

    Example:
        >>> conv = nn.Conv2d(32, 64, 3, stride=2, padding=1)
        >>> as_layers(conv, factorize(conv.weight, (16, 8)))
        Sequential(
          (0): Conv2d(32, 8, kernel_size=(1, 1), stride=(1, 1), bias=False)
          (1): Conv2d(8, 16, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1), bias=False)
          (2): Conv2d(16, 64, kernel_size=(1, 1), stride=(1, 1))
        )
    """
    bias, kind = layer.bias is not None, type(layer)
    widths = [factor.shape[:2] for factor in factors]
    last = len(factors) - 1
    made = nn.Sequential()
    for place, (outputs, inputs) in enumerate(widths):
        options: dict[str, Any] = {"bias": bias and place == last, "device": "meta"}
        if kind is not nn.Linear:
            # Two factors: stride and padding in the first, where they save most. Three: in the core.
            own = place == last - 1
            options["kernel_size"] = layer.kernel_size if own else 1
            if own:
                names = ("stride", "padding", "dilation", "padding_mode")
                options |= {name: getattr(layer, name) for name in names}
        made.append(kind(inputs, outputs, **options))
    for child, factor in zip(made, factors, strict=True):
        # The data of the factor, so that it can be used again; in the memory format of the weight.
        data = take(factor.detach().clone(), (), like=layer.weight)
        child.weight = nn.Parameter(data, requires_grad=layer.weight.requires_grad)
    made[last].bias = layer.bias
    return made.train(layer.training)


def not_replaceable(module: nn.Module, example: Example, names: Sequence[str]) -> set[str]:
    """Find the layers for which a product cannot stand in, because the network does not only call them.

    Args:
        module: The network; nothing in it changes.
        example: Its inputs.
        names: Convolutions and linear layers that could be factored.

    Returns:
        The names of those that have to stay.
    """
    if not names:
        return set()
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with repeatable():
        # Which reads the weights of linear layers that it does not call; a trial has to show that.
        torch.backends.mha.set_fastpath_enabled(fast_path)
        if _agree(module, example, names):
            return set()
        wrong = {name for name in names if not _agree(module, example, [name])}
        left = [name for name in names if name not in wrong]
        return wrong if not left or _agree(module, example, left) else set(names)


def _agree(module: nn.Module, example: Example, names: Sequence[str]) -> bool:
    """Tell whether products of rank 1 compute what their product as one weight does."""
    for dtype, tolerance in ((torch.float64, _EXACT), (None, _ROUNDED)):
        whole, product = copied(module), copied(module)
        for name in names:
            layer: Any = whole.get_submodule(name)
            factors = _random_factors(layer.weight)
            layer.weight.data = compose(factors)
            put_factors(product, {name: factors})
        inputs = (example.args, example.kwargs)
        if dtype is not None:
            whole.to(dtype)
            product.to(dtype)
            inputs = tree_map_only(
                Tensor, lambda t: t.to(torch.float64) if t.is_floating_point() else t, inputs
            )
        args, kwargs = inputs
        try:
            expected = _outputs(whole, args, kwargs)
        except Exception:  # noqa: BLE001 - a network may insist on its own dtype; then that one decides
            continue
        try:
            return distance(expected, _outputs(product, args, kwargs, len(expected))) <= tolerance
        except Exception:  # noqa: BLE001 - that is what is asked
            return False
    return True


def _random_factors(weight: Tensor) -> list[Tensor]:
    (outputs, inputs, *kernel), ones = weight.shape, (1,) * (weight.dim() - 2)
    core = [] if is_matrix(weight) else [(1, 1, *kernel)]
    shapes = [(1, inputs, *ones), *core, (outputs, 1, *ones)]
    scale = float(weight.std()) ** 0.5 + 1e-3
    return [torch.randn(shape).mul_(scale).to(weight) for shape in shapes]


def _outputs(network: nn.Module, args: Any, kwargs: Any, wanted: int = 1) -> list[Any]:
    found = []
    for training in (False, True):
        torch.manual_seed(0)
        with running(network, training):
            try:
                found.append(network(*args, **kwargs))
            except Exception:
                if not training or wanted > 1:
                    raise
                # It needs more than these inputs in training, such as detection targets.
    return found
