"""Which layers can become products of smaller ones, and what a wish for less comes to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_prune.cost import copied, count_macs, count_parameters, skeleton
from lightning_prune.errors import ConfigurationError, TracingError
from lightning_prune.selection import match_names
from lightning_prune.structure import ranks as rank_choice
from lightning_prune.structure.costs import Example
from lightning_prune.structure.factoring import not_replaceable
from lightning_prune.structure.low_rank import energies
from lightning_prune.structure.modes import running
from lightning_prune.structure.ranks import Factorable, Ranks, Wish
from lightning_prune.structure.replaced import replaced
from lightning_prune.structure.verify import repeatable

OWNER = "LowRank"
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_KINDS = (nn.Linear, nn.modules.conv._ConvNd)
_SHAPELESS = "it has no shape yet"
_USED = "the network uses its weight other than by calling it"


@dataclass(frozen=True)
class Row:
    """What becomes of one layer.

    Attributes:
        name: Its qualified name.
        macs: Of one sample, before.
        ranks: `(output rank, input rank)`, or None if it stays as it is.
        macs_after: Of one sample, after.
        lost: Fraction of the weight's sum of squares that is lost; for a kernel at most so much.
        reason: Why it stays as it is, or empty.
    """

    name: str
    macs: int
    ranks: Ranks | None
    macs_after: int
    lost: float
    reason: str = ""


@dataclass(frozen=True)
class Prospect:
    """What was decided for all layers, and what the whole network costs.

    Attributes:
        rows: One for each layer that was looked at.
        before: `{"macs" or "params": amount}` as it is.
        after: The same, with the products in place.
    """

    rows: tuple[Row, ...]
    before: Mapping[str, float]
    after: Mapping[str, float]

    @property
    def ranks(self) -> dict[str, Ranks]:
        """The layers that become products."""
        return {row.name: row.ranks for row in self.rows if row.ranks is not None}


def survey(
    module: nn.Module, example: Example, choose: Callable[[Iterable[str]], Iterable[str]]
) -> list[Factorable]:
    """Find the layers that could become products, and say of the others why they cannot.

    Args:
        module: The network; nothing in it changes.
        example: Its inputs.
        choose: Picks layers from the names of all convolutions and linear layers.

    Returns:
        The chosen layers.

    Raises:
        ConfigurationError: It has no convolution or linear layer.
    """
    factors = tuple(f"{name}." for name, _ in replaced(module))
    layers: dict[str, Any] = {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, _KINDS) and name and not name.startswith(factors or ("\0",))
    }
    if not layers:
        if factors:
            return []  # all that there was are products already
        raise ConfigurationError(
            f"{OWNER}: {type(module).__name__} has no convolution or linear layer inside it to factor."
        )
    layers = {name: layers[name] for name in choose(list(layers))}
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    reasons = {name: _in_the_way(layer, names) for name, layer in layers.items()}
    free = [name for name, reason in reasons.items() if not reason]
    calls = _calls(module, example, free)
    found = []
    for name, layer in layers.items():
        shape = () if reasons[name] == _SHAPELESS else tuple(layer.weight.shape)
        laid, places = calls.get(name, (0, 0))
        reason = reasons[name] or ("" if laid else "it does not run")
        found.append(Factorable(name, shape, laid, places, None, reason))
    wrong = not_replaceable(module, example, [layer.name for layer in found if not layer.reason])
    return [replace(layer, reason=_USED) if layer.name in wrong else layer for layer in found]


def _in_the_way(layer: Any, names: Mapping[int, Sequence[str]]) -> str:
    if isinstance(getattr(layer, "weight", None), nn.parameter.UninitializedParameter):
        return _SHAPELESS
    if "weight" not in layer._parameters or nn.utils.parametrize.is_parametrized(layer):
        return "its weight is computed from other parameters"
    if type(layer) not in (nn.Linear, *_CONVOLUTIONS):
        return f"{type(layer).__name__} is not a kind of layer that can be factored"
    if getattr(layer, "groups", 1) > 1:
        return "it is grouped"
    if len(names[id(layer.weight)]) > 1:
        return f"its weight is shared: {', '.join(names[id(layer.weight)])}"
    return ""


def _calls(module: nn.Module, example: Example, names: Sequence[str]) -> dict[str, tuple[int, int]]:
    """How often each layer's kernel is laid, and how many positions its inputs have, for one sample."""
    try:
        args, kwargs = tree_map_only(Tensor, lambda t: t.detach().to("meta"), example.single)
        return _count(skeleton(module), args, kwargs, names)
    except Exception:  # noqa: BLE001 - user code may refuse meta tensors in any way; the real run decides
        pass
    try:
        return _count(copied(module), *example.single, names)
    except Exception as error:
        raise TracingError(
            f"{OWNER}: {type(module).__name__} cannot be run on its example input: {error}. Pass "
            "`example_input`, or set the module's `example_input_array`, to what its `forward` takes."
        ) from error


def _count(twin: nn.Module, args: Any, kwargs: Any, names: Sequence[str]) -> dict[str, tuple[int, int]]:
    found: dict[str, tuple[int, int]] = {}

    def observe(name: str, layer: Any, args: Any, kwargs: Any, out: Tensor) -> None:
        x = args[0] if args else kwargs["input"]
        outputs, inputs = layer.weight.shape[:2]
        laid, places = found.get(name, (0, 0))
        found[name] = (laid + out.numel() // outputs, places + x.numel() // inputs)

    for name in names:
        twin.get_submodule(name).register_forward_hook(partial(observe, name), with_kwargs=True)
    with repeatable(), running(twin, training=False):
        twin(*args, **kwargs)
    return found


def propose(
    module: nn.Module,
    layers: Sequence[Factorable],
    wish: Wish,
    example: Example,
    dense: Mapping[str, float] | None = None,
) -> Prospect:
    """Choose ranks for the layers as they are now.

    Args:
        module: The network; nothing in it changes.
        layers: What `survey` found.
        wish: What is asked.
        example: Inputs.
        dense: What a budget is a fraction of; by default what the network costs as it is.

    Returns:
        What becomes of each layer.

    Raises:
        BudgetError: A budget cannot be reached.
    """
    weights = dict(module.named_parameters())
    known = [
        layer if layer.reason else replace(layer, energies=energies(weights[f"{layer.name}.weight"]))
        for layer in layers
    ]
    before = costs(module, example)
    if wish.budget is not None:
        kind = wish.budget.kind
        chosen = rank_choice.allocate(known, wish, before[kind], (dense or before)[kind])
    else:
        chosen = {layer.name: rank_choice.ranks_for(layer, wish) for layer in known if not layer.reason}
    rows = tuple(_row(layer, chosen.get(layer.name), wish) for layer in known)
    kept = {row.name: row.ranks for row in rows}
    saved = {
        kind: sum(layer.cost(kind) - layer.cost(kind, kept[layer.name]) for layer in known)
        for kind in rank_choice.KINDS
    }
    return Prospect(rows, before, {kind: before[kind] - saved[kind] for kind in rank_choice.KINDS})


def costs(module: nn.Module, example: Example) -> dict[str, float]:
    """Count the MACs of one sample, and the parameters."""
    return {
        "macs": float(count_macs(module, *example.single)),
        "params": float(count_parameters(module)),
    }


def _row(layer: Factorable, ranks: Ranks | None, wish: Wish) -> Row:
    macs, reason = layer.cost("macs"), layer.reason
    if ranks is not None and not rank_choice.pays(layer, ranks):
        shown = ranks[0] if layer.matrix else f"{ranks[0]} x {ranks[1]}"
        reason = f"rank {shown} would take {layer.cost('macs', ranks):,} MACs"
    elif ranks is None and not reason:
        reason = "the budget is met without it"
        if not rank_choice.options(layer, wish.round_to):
            reason = "no rank would pay"
    if reason:
        return Row(layer.name, macs, None, macs, 0.0, reason)
    return Row(layer.name, macs, ranks, layer.cost("macs", ranks), layer.lost(ranks))


def chooser(include: Sequence[str], exclude: Sequence[str]) -> Callable[[Iterable[str]], list[str]]:
    """Make the function that picks layers by globs."""
    return lambda names: match_names(names, include, exclude, OWNER)
