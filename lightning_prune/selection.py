"""Which weights a pattern means: names, globs and types, and an error with near matches when it means none.

A pattern is a glob over dotted names. It matches a name, or any module the name lies in: `backbone` and
`backbone.*` both mean all of `backbone`. `type:Conv2d` means everything in modules of that class or of a
subclass, and takes globs too (`type:Conv*`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from lightning_prune.errors import SelectionError, near_matches

TYPE_PREFIX = "type:"

# The layers whose weights are pruned unless the user says otherwise. Everything else (normalisation, biases,
# bare parameters such as a positional embedding) is touched only when a pattern means nothing else.
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_DENSE = (nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag)
_COMPOSITE = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
PRUNABLE_TYPES: tuple[type[nn.Module], ...] = (*_CONVOLUTIONS, *_DENSE, *_COMPOSITE)


@dataclass(frozen=True)
class Weight:
    """A parameter that can be pruned, with what it is part of.

    Attributes:
        name: Its first name in `module.named_parameters()`.
        parameter: The parameter itself.
        modules: The layers that hold it, several if it is tied (for a parametrized weight the layer, not the
            parametrization).
        names: All names it can be selected by: those of tied copies, `fc.weight` for a parametrized weight.
        by_default: Whether it is the weight of a convolution, dense, embedding, recurrent or attention layer.
    """

    name: str
    parameter: nn.Parameter
    modules: tuple[nn.Module, ...]
    names: tuple[str, ...]
    by_default: bool

    @property
    def module(self) -> nn.Module:
        """The layer that says what its dimensions mean: the first of a known type, else the first."""
        usual = [module for module in self.modules if isinstance(module, PRUNABLE_TYPES)]
        return (usual or list(self.modules))[0]


def matches(name: str, pattern: str) -> bool:
    """Tell whether a glob matches a dotted name, or a module that the name lies in.

    Args:
        name: A dotted name.
        pattern: A glob.

    Returns:
        Whether it does.

    Example:
        >>> [matches("stem.0.weight", pattern) for pattern in ("stem", "stem.*", "0")]
        [True, True, False]
    """
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:end]), pattern) for end in range(len(parts), 0, -1))


def match_names(
    names: Iterable[str], include: Sequence[str], exclude: Sequence[str], owner: str
) -> list[str]:
    """Pick names by globs; every glob must match something.

    Args:
        names: The names there are.
        include: Globs of what to pick.
        exclude: Globs of what to leave out, even if included.
        owner: Who asks, for the error message.

    Returns:
        The picked names, in the order of `names`.

    Raises:
        SelectionError: If a glob matches no name, or nothing is left.

    Example:
        >>> match_names(["stem.0", "stem.1", "head"], ["*"], ["head"], "StructuralPruning")
        ['stem.0', 'stem.1']
    """
    known = list(names)
    picked = _resolve(include, "include", owner, known, lambda pattern: _matching(known, pattern))
    dropped = _resolve(exclude, "exclude", owner, known, lambda pattern: _matching(known, pattern))
    left = set(picked) - set(dropped)
    if not left:
        raise _nothing_left(include, exclude, owner)
    return [name for name in known if name in left]


def named_weights(module: nn.Module) -> list[Weight]:
    """List every parameter once, with its names and its layer.

    Parameters of torchmetrics metrics (a network inside LPIPS or FID) are left out: they are not the model.

    Args:
        module: The module to look at.

    Returns:
        One entry for each parameter, in the order of `named_parameters()`.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> [(weight.name, weight.by_default) for weight in named_weights(layer)]
        [('weight', True), ('bias', False)]
    """
    found: dict[int, Weight] = {}
    layers = dict(module.named_modules(remove_duplicate=False))
    metrics = tuple(f"{name}." for name, layer in layers.items() if name and _is_metric(layer))
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if metrics and name.startswith(metrics):
            continue
        layer_name, plain, prunable = _locate(name, parameter, layers)
        # A tied weight was seen before, under another name.
        seen = found.get(id(parameter), Weight(name, parameter, (), (), False))
        found[id(parameter)] = Weight(
            name=seen.name,
            parameter=parameter,
            modules=(*seen.modules, layers[layer_name]),
            names=tuple(dict.fromkeys((*seen.names, name, plain))),
            by_default=seen.by_default or prunable,
        )
    return list(found.values())


def select_weights(
    module: nn.Module, include: Sequence[str], exclude: Sequence[str], owner: str
) -> dict[str, Weight]:
    """Pick the weights that globs and types mean.

    A pattern selects the weights of convolution, linear, embedding, recurrent and attention layers that it
    matches. Only a pattern that matches none of those selects what else it matches: so `*` leaves biases and
    normalisation alone, and `*.bias` or `bn1.weight` means them. A tied weight appears once, under its first
    name, and answers to all of them.

    Args:
        module: The module to look at.
        include: Globs, or `type:` patterns, of what to pick.
        exclude: The same, of what to leave out.
        owner: Who asks, for the error message.

    Returns:
        The picked weights by name, in the order of `named_parameters()`.

    Raises:
        SelectionError: If a pattern matches nothing, or nothing is left.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 2))
        >>> list(select_weights(net, ["*"], ["type:Linear"], "MagnitudePruning"))
        ['0.weight']
        >>> list(select_weights(net, ["*", "1.weight"], [], "MagnitudePruning"))
        ['0.weight', '1.weight', '3.weight']
    """
    weights = {weight.name: weight for weight in named_weights(module)}
    known = [name for weight in weights.values() for name in weight.names]

    def meant(pattern: str) -> list[str]:
        hits = [w for w in weights.values() if _weight_matches(w, pattern)]
        usual = [w.name for w in hits if w.by_default]
        return usual or [w.name for w in hits]

    def excluded(pattern: str) -> list[str]:
        return [w.name for w in weights.values() if _weight_matches(w, pattern)]

    types = sorted({cls.__name__ for w in weights.values() for cls in _classes(w)})
    picked = _resolve(include, "include", owner, known, meant, types)
    dropped = _resolve(exclude, "exclude", owner, known, excluded, types)
    left = set(picked) - set(dropped)
    if not left:
        raise _nothing_left(include, exclude, owner)
    return {name: weight for name, weight in weights.items() if name in left}


def assign(weights: Mapping[str, Weight], levels: Mapping[str, float], owner: str) -> dict[str, float]:
    """Give each weight the value of the first pattern that matches it.

    Args:
        weights: The weights to choose from.
        levels: Values by pattern; the first that matches counts.
        owner: Who asks, for the error message.

    Returns:
        The value of each weight that a pattern matches; the others are left out.

    Raises:
        SelectionError: If a pattern matches no weight at all.

    Example:
        >>> weights = select_weights(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), ["*"], [], "Doc")
        >>> assign(weights, {"0.*": 0.3, "*": 0.85}, "Doc")
        {'0.weight': 0.3, '1.weight': 0.85}
    """
    known = [name for weight in weights.values() for name in weight.names]
    types = sorted({cls.__name__ for w in weights.values() for cls in _classes(w)})
    out: dict[str, float] = {}
    for pattern, level in levels.items():
        hits = [name for name, weight in weights.items() if _weight_matches(weight, pattern)]
        if not hits:
            raise _no_match(pattern, "sparsity", owner, known, types)
        for name in hits:
            out.setdefault(name, level)
    return {name: out[name] for name in weights if name in out}


def _weight_matches(weight: Weight, pattern: str) -> bool:
    if pattern.startswith(TYPE_PREFIX):
        wanted = pattern[len(TYPE_PREFIX) :]
        return any(fnmatchcase(cls.__name__, wanted) for cls in _classes(weight))
    return any(matches(name, pattern) for name in weight.names)


def _classes(weight: Weight) -> list[type]:
    found = [cls for module in weight.modules for cls in type(module).__mro__]
    return [cls for cls in found if issubclass(cls, nn.Module) and cls is not nn.Module]


def _is_metric(module: nn.Module) -> bool:
    # By name, because torchmetrics need not be imported for this.
    return any(cls.__module__.startswith("torchmetrics") for cls in type(module).__mro__)


def _locate(name: str, parameter: nn.Parameter, layers: Mapping[str, nn.Module]) -> tuple[str, str, bool]:
    """Find a parameter's layer, its plain name (`fc.weight`) and whether it is pruned by default."""
    path, _, last = name.rpartition(".")
    parts = path.split(".")
    if len(parts) >= 2 and parts[-2] == "parametrizations":
        path, tensor = ".".join(parts[:-2]), parts[-1]
        # Of several originals (weight_norm has a magnitude and a direction) the largest is the weight.
        originals = layers[name.rpartition(".")[0]].parameters(recurse=False)
        whole = parameter.numel() == max(original.numel() for original in originals)
    else:
        tensor, whole = last, True
    layer = layers[path]
    plain = f"{path}.{tensor}" if path else tensor
    usual = isinstance(layer, PRUNABLE_TYPES) and "weight" in tensor and not tensor.endswith("_g")
    return path, plain, usual and whole


def _matching(names: Iterable[str], pattern: str) -> list[str]:
    return [name for name in names if matches(name, pattern)]


def _resolve(
    patterns: Sequence[str],
    argument: str,
    owner: str,
    known: Sequence[str],
    find: Callable[[str], list[str]],
    types: Sequence[str] = (),
) -> list[str]:
    if isinstance(patterns, str) or not all(isinstance(pattern, str) for pattern in patterns):
        raise SelectionError.of(owner, argument, "a list of globs", patterns, "write ['layer1.*', 'head']")
    found: list[str] = []
    for pattern in patterns:
        hits = find(pattern)
        # On a module without parameters `*` is not misspelt; that nothing is selected is said elsewhere.
        if not hits and (known or pattern != "*"):
            raise _no_match(pattern, argument, owner, known, types)
        found += hits
    return found


def _no_match(
    pattern: str, argument: str, owner: str, known: Sequence[str], types: Sequence[str]
) -> SelectionError:
    if pattern.startswith(TYPE_PREFIX):
        hint = near_matches(pattern[len(TYPE_PREFIX) :], types)
        return SelectionError(f"{owner}: no layer is of the type {pattern!r} in `{argument}`. {hint}")
    modules = [".".join(name.split(".")[:end]) for name in known for end in range(1, name.count(".") + 1)]
    stem = pattern.replace(".*", "").replace("*", "")
    # A glob's fixed part is compared with module names first: that is what a user misspells.
    hint = near_matches(stem, dict.fromkeys(modules))
    if not hint.startswith("Did"):
        hint = near_matches(pattern, dict.fromkeys(known))
    return SelectionError(f"{owner}: `{argument}` has {pattern!r}, which matches nothing. {hint}")


def _nothing_left(include: Sequence[str], exclude: Sequence[str], owner: str) -> SelectionError:
    chosen = f"`include` {list(include)!r} less `exclude` {list(exclude)!r}"
    return SelectionError(f"{owner}: nothing is selected: {chosen} is empty.")
