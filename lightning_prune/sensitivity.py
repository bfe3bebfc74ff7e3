"""Which layers bear what: a metric against zeros, against width, and in 8 bits, one layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune._lightning import LightningModule
from lightning_prune._pipeline import Progress
from lightning_prune._task import Data
from lightning_prune.callbacks import _network
from lightning_prune.cost import copied
from lightning_prune.deploy.evaluate import cpu_trainer, quiet_lightning, ready
from lightning_prune.errors import ConfigurationError, near_matches
from lightning_prune.exporting import find_data
from lightning_prune.report.pareto import falls
from lightning_prune.selection import match_names, select_weights
from lightning_prune.structure.costs import Example
from lightning_prune.structure.groups import Group
from lightning_prune.structure.importance import magnitude
from lightning_prune.structure.plan import survey
from lightning_prune.structure.surgery import apply, change_for

KINDS = ("sparsity", "width", "int8")
_OWNER = "sensitivity"
_LEVELS = (0.25, 0.5, 0.75, 0.9)
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Trial:
    """What one change to one layer does.

    Attributes:
        kind: `"sparsity"`, `"width"` or `"int8"`.
        name: The weight (`conv.weight`), the group of channels, or the layer.
        level: Fraction of it that is zero or gone; 1 for int8.
        value: The metric then.
        harm: How much worse that is than before, in the metric's own unit; negative if better.
    """

    kind: str
    name: str
    level: float
    value: float
    harm: float


@dataclass(frozen=True)
class Sensitivity:
    """A metric before any change, and after each.

    Attributes:
        metric: Its name.
        value: What it is before.
        trials: One for each layer and level.
    """

    metric: str
    value: float
    trials: tuple[Trial, ...]

    def bearable(self, max_drop: float, kind: str = "sparsity") -> dict[str, float]:
        """Say how far each layer can go alone before the metric gets worse than allowed.

        Args:
            max_drop: How much worse it may get, in the metric's own unit.
            kind: `"sparsity"` or `"width"`.

        Returns:
            `{weight or group: the highest level up to which no trial was worse}`, 0 where none was bearable.
        """
        found: dict[str, float] = {}
        done: set[str] = set()
        for trial in sorted((t for t in self.trials if t.kind == kind), key=lambda t: t.level):
            found.setdefault(trial.name, 0.0)
            if trial.harm > max_drop:
                done.add(trial.name)
            elif trial.name not in done:
                found[trial.name] = trial.level
        return {trial.name: found[trial.name] for trial in self.trials if trial.kind == kind}

    def hurt_by_int8(self, max_drop: float) -> list[str]:
        """Name the layers that 8 bits alone make worse than allowed, the worst first."""
        hurt = [t for t in self.trials if t.kind == "int8" and t.harm > max_drop]
        return [t.name for t in sorted(hurt, key=lambda t: -t.harm)]


def sensitivity(
    module: LightningModule,
    *,
    datamodule: Any = None,
    dataloaders: Any = None,
    metric: str | None = None,
    kinds: Sequence[str] = KINDS,
    levels: Sequence[float] = _LEVELS,
    batches: int = 8,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    example_input: Any = None,
    progress: Progress | None = None,
) -> Sensitivity:
    """Change one layer at a time, and run the user's own validation loop on a few batches each time.

    `"sparsity"` zeroes the smallest weights of a layer, as `MagnitudePruning` with `scope="layer"` would;
    `"width"` really cuts the least important channels of a group, as `StructuralPruning` would; `"int8"`
    rounds a layer's weights (by output channel) and inputs to 8 bits, as `Quantize` would.

    Args:
        module: The LightningModule; it stays untouched.
        datamodule: Gives validation loaders.
        dataloaders: The validation loaders; without both this and `datamodule` the module's own are used.
        metric: What the validation loop logs; by default the first that is a loss, else the first of all.
        kinds: Of `KINDS`.
        levels: Fractions that become zero, or go.
        batches: Validation batches of each run.
        include: Globs of layers, as for `MagnitudePruning`.
        exclude: Globs of layers that are left out.
        example_input: What the network is traced with for widths; see `StructuralPruning`.
        progress: Called with what is tried, and the fraction that is done.

    Returns:
        The metric before and after each change.

    Raises:
        ConfigurationError: An argument is wrong, or there is no validation data or no such metric.
    """
    _check(kinds, levels, batches)
    data = find_data(module, datamodule, dataloaders)
    if data.val is None:
        remedy = "give a datamodule or dataloaders that validate"
        raise ConfigurationError.of(_OWNER, "dataloaders", "validation data", None, remedy)
    module = copied(module).cpu().float()  # type: ignore[assignment]
    before = _metrics(copied(module), data, batches)
    name = _named(before, metric)
    found: list[Trial] = []
    plans = list(_changes(module, data, kinds, levels, include, exclude, example_input))
    for done, (kind, layer, level, change) in enumerate(plans):
        if progress is not None:
            progress(f"{kind} of {layer}", done / len(plans))
        changed: Any = copied(module)
        change(changed)
        value = _metrics(changed, data, batches)[name]
        harm = (value - before[name]) * (1 if falls(name) else -1)
        found.append(Trial(kind, layer, level, value, harm))
    if progress is not None:
        progress("done", 1.0)
    return Sensitivity(name, before[name], tuple(found))


def _check(kinds: Sequence[str], levels: Sequence[float], batches: int) -> None:
    for kind in kinds:
        if kind not in KINDS:
            raise ConfigurationError.of(_OWNER, "kinds", f"of {list(KINDS)}", kind, near_matches(kind, KINDS))
    if not levels or not all(isinstance(v, (int, float)) and 0 < v < 1 for v in levels):
        raise ConfigurationError.of(_OWNER, "levels", "fractions between 0 and 1", list(levels))
    if not isinstance(batches, int) or batches < 1:
        raise ConfigurationError.of(_OWNER, "batches", "a whole number of at least 1", batches)


def _named(metrics: Mapping[str, float], metric: str | None) -> str:
    if metric is None and metrics:
        return next((name for name in metrics if falls(name)), next(iter(metrics)))
    if metric is None or metric not in metrics:
        expected = "what the validation loop logs"
        raise ConfigurationError.of(_OWNER, "metric", expected, metric, near_matches(metric or "", metrics))
    return metric


def _metrics(module: Any, data: Data, batches: int) -> dict[str, float]:
    # Lightning's `log` remembers its metrics by the identity of the original's, and has no way to forget.
    module._metric_attributes = None
    given: dict[str, Any] = {"dataloaders": data.val}
    if data.datamodule is not None:
        given = {"datamodule": ready(data.datamodule, data.val)}
    with quiet_lightning(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # loops may draw; every run draws the same
        trainer = cpu_trainer(module, limit_val_batches=batches)
        trainer.validate(module, verbose=False, **given)
    return {name: float(value) for name, value in trainer.callback_metrics.items() if value.numel() == 1}


Change = tuple[str, str, float, Callable[[Any], None]]


def _changes(
    module: Any,
    data: Data,
    kinds: Sequence[str],
    levels: Sequence[float],
    include: Sequence[str],
    exclude: Sequence[str],
    example_input: Any,
) -> Iterator[Change]:
    """What to try: kind, layer, level, and what does it to a copy of the module."""
    if "sparsity" in kinds:
        for name in select_weights(module, include, exclude, _OWNER):
            for level in levels:
                yield "sparsity", name, level, _zeroing(name, level)
    if "width" in kinds:
        yield from _narrowings(module, data, levels, include, exclude, example_input)
    if "int8" in kinds:
        known = [name for name, layer in module.named_modules() if isinstance(layer, _LAYERS)]
        for name in match_names(known, include, exclude, _OWNER) if known else []:
            yield "int8", name, 1.0, _rounding(name)


def _zeroing(name: str, level: float) -> Callable[[Any], None]:
    def zero(module: nn.Module) -> None:
        weight = dict(module.named_parameters())[name].data.view(-1)
        weight[weight.abs().topk(round(level * weight.numel()), largest=False).indices] = 0.0

    return zero


def traced_with(module: Any, data: Data, example_input: Any, owner: str) -> tuple[Any, Example]:
    """Find out what to trace and with which inputs, where no Trainer runs; see `callbacks._network.find`."""
    with quiet_lightning():
        trainer = cpu_trainer(module)
        trainer.datamodule = _Loaders(data)
        return _network.find(trainer, module, example_input, owner)


class _Loaders:
    """The loaders at hand, as a datamodule has them."""

    def __init__(self, data: Data) -> None:
        self.val_dataloader, self.train_dataloader = lambda: data.val, lambda: data.train


def _narrowings(
    module: Any,
    data: Data,
    levels: Sequence[float],
    include: Sequence[str],
    exclude: Sequence[str],
    example_input: Any,
) -> Iterator[Change]:
    calls, example = traced_with(module, data, example_input, _OWNER)
    network = _network.traced(module, calls)
    groups = survey(network, example, lambda names: match_names(names, include, exclude, _OWNER))
    for group in groups:
        if group.reason:
            continue
        scores = magnitude(network, group)
        for level in levels:
            kept = _best(group, scores, level)
            if len(kept) < group.channels:
                yield "width", group.name, level, _narrowing(calls, groups, group.name, kept)


def _best(group: Group, scores: Tensor, level: float) -> Tensor:
    """The channels that stay: at most a fraction of the least important goes, every block alike."""
    atoms = torch.zeros(group.atoms).index_add_(0, group.atom, scores.float())
    stay = []
    for block in range(group.blocks):
        mine = (group.block == block).nonzero().flatten()
        count = max(1, len(mine) - int(level * len(mine)))
        stay.append(mine[atoms[mine].argsort(descending=True, stable=True)[:count]])
    return group.channels_of(torch.cat(stay))


def _narrowing(calls: Any, groups: Sequence[Group], name: str, kept: Tensor) -> Callable[[Any], None]:
    def narrow(module: nn.Module) -> None:
        network = _network.traced(module, calls)
        apply(network, change_for(network, groups, {name: kept}))

    return narrow


def _rounding(name: str) -> Callable[[Any], None]:
    def round_to_int8(module: nn.Module) -> None:
        layer: Any = module.get_submodule(name)
        weight = layer.weight.data
        step = weight.flatten(1).abs().amax(1).clamp_min(1e-12) / 127
        step = step.view(-1, *(1,) * (weight.dim() - 1))
        layer.weight.data = (weight / step).round() * step
        layer.register_forward_pre_hook(_rounded_inputs)

    return round_to_int8


def _rounded_inputs(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Round what comes in to 256 steps over its own range, which always holds zero."""
    if not args or not args[0].is_floating_point():
        return args
    low, high = args[0].amin().clamp(max=0), args[0].amax().clamp(min=0)
    step = ((high - low) / 255).clamp_min(1e-12)
    zero = (-low / step).round()
    return ((((args[0] / step).round() + zero).clamp(0, 255) - zero) * step, *args[1:])


def write(found: Sensitivity, dirpath: str | Path, max_drop: float) -> list[Path]:
    """Write what was found as JSON, as a picture, and as levels for a config.

    Args:
        found: What `sensitivity` returned.
        dirpath: The directory; made if it is not there.
        max_drop: How much worse the metric may get by one layer alone, for the levels.

    Returns:
        The paths of `sensitivity.json`, `sensitivity.svg` and `sensitivity.yaml`.

    Raises:
        OutputError: A file cannot be written.
    """
    from lightning_prune import _sensitivity_files as files

    return files.write(found, Path(dirpath), max_drop)
