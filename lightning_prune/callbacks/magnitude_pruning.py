"""Zero weights while training: when, state and logging. The algorithm is in `lightning_prune.sparsity`."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune._lightning import NAMESPACES, Callback, LightningModule, Trainer
from lightning_prune.callbacks import _clock
from lightning_prune.callbacks._events import emit
from lightning_prune.errors import CheckpointError, ConfigurationError, StrategyError, near_matches
from lightning_prune.schedules import Schedule, Timeline
from lightning_prune.selection import Weight, assign, select_weights
from lightning_prune.sparsity import criteria, masks, scopes

_OWNER = "MagnitudePruning"
# These keep parameters where a mask by name cannot find them.
_REFUSED_STRATEGIES = ("FSDPStrategy", "DeepSpeedStrategy")
_DEFAULT_SCHEDULE = Schedule()


class MagnitudePruning(Callback):
    """Zero the least important weights on a schedule, and keep them zero.

    The level is absolute: `sparsity` is the final fraction of zeros over the selected weights, and at any
    time the fraction in force is `sparsity` times the level of the schedule, exact to one weight, at every
    optimizer step, validation and checkpoint. When channels are removed, it is a fraction of what is left.

    Masks live beside the weights: parameters keep their names, and every optimizer re-applies the masks right
    after its step. The masks are in the callback's state, one bit a weight, so that a resumed run goes on
    exactly. A second `fit` with the same module keeps them; with another module it starts anew.

    Masks alone make a file compress better; dense kernels run no faster for them.

    Args:
        sparsity: Final fraction of zeros, 0 to 1, or fractions by glob (`{"stem.*": 0.3, "*": 0.85}`; the
            first that matches a weight counts, and each weight gets its own fraction).
        schedule: When, and how fast.
        scope: `"global"`: the lowest scores anywhere; `"layer"`: the same fraction of each weight; `"erk"`:
            Erdős–Rényi-kernel, wide layers sparser (Evci et al. 2020); `"lamp"`: global with layer-adaptive
            scores (Lee et al. 2021).
        criterion: `"magnitude"`, `"random"`, or one's own, see `lightning_prune.sparsity.criteria`.
        pattern: None: any weight may go.
        threshold: Weights that score below it go, instead of a fixed fraction; the schedule scales it.
        include: Globs of the weights to prune; see `lightning_prune.selection`. The default means the
            weights of all convolution, linear, embedding, recurrent and attention layers.
        exclude: Globs of weights to leave alone.

    Raises:
        ConfigurationError: If an argument is wrong; what depends on the module, before training starts.

    Example:
        >>> pruning = MagnitudePruning(0.9, schedule=Schedule("cubic", end=0.7), exclude=["head"])
        >>> pruning.pruning_summary()["config"]["sparsity"]
        0.9
    """

    def __init__(
        self,
        sparsity: float | dict[str, float] = 0.8,
        *,
        schedule: Schedule = _DEFAULT_SCHEDULE,
        scope: str = "global",
        criterion: str | criteria.Criterion = "magnitude",
        pattern: str | None = None,
        threshold: float | None = None,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.sparsity = dict(sparsity) if isinstance(sparsity, Mapping) else sparsity
        self.schedule = schedule
        self.scope = scope
        self.criterion = criterion
        self.pattern = pattern
        self.threshold = threshold
        self.include = [include] if isinstance(include, str) else list(include)
        self.exclude = [exclude] if isinstance(exclude, str) else list(exclude)
        _check(self)
        self._score = criteria.resolve(criterion, _OWNER)
        self._reset()

    # ------------------------------------------------------------------ state

    def _reset(self) -> None:
        self._level = 0.0
        self._history: list[dict[str, Any]] = []
        self._masks: dict[str, Tensor] = {}
        self._packed: dict[str, Tensor] = {}
        self._weights: dict[str, Weight] = {}
        self._fractions: dict[str, float] | None = None
        self._timeline: Timeline | None = None
        self._handles: list[Any] = []
        self._stepped: dict[int, tuple[int, list[Tensor], list[Tensor]]] = {}
        self._module: weakref.ref[nn.Module] | None = None
        self._announced = False
        self._log_due = True

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to a running fit, so that the callback can be copied and pickled."""
        state = dict(self.__dict__)
        state["_packed"] = {**self._packed, **{name: masks.pack(mask) for name, mask in self._masks.items()}}
        state.update(_masks={}, _weights={}, _handles=[], _stepped={}, _module=None)
        return state

    @property
    def state_key(self) -> str:
        """What tells two instances apart in a checkpoint: the weights they select."""
        globs = sorted(self.sparsity) if isinstance(self.sparsity, dict) else []
        return self._generate_state_key(include=self.include, exclude=self.exclude, sparsity=globs)

    def state_dict(self) -> dict[str, Any]:
        """Return masks (packed, one bit a weight), level and history; plain data and tensors only."""
        packed = {name: masks.pack(mask) for name, mask in self._masks.items()} or dict(self._packed)
        return {"level": self._level, "history": [dict(e) for e in self._history], "masks": packed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take masks, level and history from a checkpoint; `on_train_start` lays them on the weights."""
        self._level = float(state_dict["level"])
        self._history = [dict(entry) for entry in state_dict["history"]]
        self._packed = dict(state_dict["masks"])
        self._masks = {}
        self._stepped = {}

    @property
    def masks(self) -> Mapping[str, Tensor]:
        """The masks in force by parameter name: 1 where the weight stays, 0 where it is pruned."""
        return dict(self._masks)

    def pruning_summary(self) -> dict[str, Any]:
        """Say what was done so far, as plain data for the report.

        Returns:
            `callback`, `config`, `history` (one entry for each change) and `layers` (parameters and non-zeros
            of each selected weight).
        """
        layers = [
            {
                "name": name,
                "parameters": weight.parameter.numel(),
                "nonzero": int(torch.count_nonzero(weight.parameter.detach())),
            }
            for name, weight in self._weights.items()
        ]
        return {
            "callback": type(self).__name__,
            "config": _config(self),
            "history": [dict(entry) for entry in self._history],
            "layers": layers,
        }

    # ------------------------------------------------------------------ hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work, and find the weights where they already exist."""
        if stage != "fit":
            return
        if type(trainer.strategy).__name__ in _REFUSED_STRATEGIES:
            raise StrategyError(
                f"{_OWNER}: {type(trainer.strategy).__name__} keeps parameters flattened or partitioned, "
                "where masks cannot follow; use DDPStrategy or ModelParallelStrategy."
            )
        if self._module is None or self._module() is not pl_module:
            self._reset()
        if not _builds_late(pl_module):
            self._select(pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find weights made in `configure_model`, plan the schedule, and follow every optimizer."""
        self._module = weakref.ref(pl_module)
        self._select(pl_module)
        self._refuse_overlap(trainer)
        self._timeline = _clock.plan(trainer, pl_module, self.schedule)
        self._attach(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lay restored masks on the weights; by now every strategy has restored them."""
        self._attach(trainer)
        parameters = dict(pl_module.named_parameters(remove_duplicate=False))
        for name, packed in self._packed.items():
            if name in self._weights:
                self._masks[name] = _unpack(name, packed, parameters[name])
        self._packed = {}
        self._masks = {name: _like(mask, parameters[name]) for name, mask in self._masks.items()}
        self._apply(trainer)
        self._log_due = True

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune if an event falls on this epoch, and log for those who monitor."""
        self._advance(trainer, pl_module)
        achieved, target = self._achieved(), self._target()
        pl_module.log(self._log_name(trainer), achieved, on_step=False, on_epoch=True)
        pl_module.log(self._log_name(trainer, "_target"), target, on_step=False, on_epoch=True)
        self._log_due = True

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Prune if an event falls on this optimizer step, and show the sparsity in the progress bar."""
        self._advance(trainer, pl_module)
        if self._log_due:
            self._log_due = False
            name = self._log_name(trainer)
            pl_module.log(name, self._achieved(), on_step=True, on_epoch=False, prog_bar=True)
            name = self._log_name(trainer, "_target")
            pl_module.log(name, self._target(), on_step=True, on_epoch=False, prog_bar=True)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give zeros one sign before ModelCheckpoint, which runs after this, writes them."""
        masks.clear_signs([weight.parameter for name, weight in self._weights.items() if name in self._masks])

    def on_structure_change(self, trainer: Trainer, pl_module: LightningModule, change: Any) -> None:
        """Follow the removal of channels: cut the masks alike, then make the level exact again."""
        parameters = dict(pl_module.named_parameters(remove_duplicate=False))
        self._weights = {
            name: replace(weight, parameter=parameters[name])
            for name, weight in self._weights.items()
            if name in parameters
        }
        self._masks = {
            name: _like(change.narrow(name, mask), parameters[name])
            for name, mask in self._masks.items()
            if name in self._weights
        }
        self._packed = {}
        if self._masks:
            self._prune(trainer, pl_module, grow=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave exact, positive zeros."""
        self._apply(trainer)
        masks.clear_signs([weight.parameter for name, weight in self._weights.items() if name in self._masks])

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave no hook behind."""
        self._detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hook behind; Lightning calls no teardown after an exception."""
        self._detach()

    # ------------------------------------------------------------------ pruning

    def _select(self, pl_module: LightningModule) -> None:
        weights = select_weights(pl_module, self.include, self.exclude, _OWNER)
        if isinstance(self.sparsity, dict):
            self._fractions = assign(weights, self.sparsity, _OWNER)
            weights = {name: weights[name] for name in self._fractions}
        for name, weight in weights.items():
            if isinstance(weight.parameter, nn.parameter.UninitializedParameter):
                raise ConfigurationError(
                    f"{_OWNER}: {name!r} has no shape yet; run one batch through the lazy layers before fit."
                )
        self._weights = weights

    def _refuse_overlap(self, trainer: Trainer) -> None:
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if other is self or not isinstance(other, MagnitudePruning):
                continue
            shared = [name for name in self._weights if name in other._weights]
            if shared:
                raise ConfigurationError(
                    f"{_OWNER}: two callbacks prune {shared[0]!r}; give them disjoint `include` or `exclude`."
                )

    def _advance(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._timeline is None:
            return
        time = _clock.now(trainer, pl_module, self._timeline.interval)
        level = self._timeline.level_at(time)
        # What was reached stays reached: a second fit of the same module starts from a sparse network.
        if level > self._level:
            self._level = level
            self._prune(trainer, pl_module)

    def _prune(self, trainer: Trainer, pl_module: LightningModule, grow: bool = True) -> None:
        """Bring the masks to the level in force, and the weights to the masks."""
        pools = self._pools(floors=grow)
        if not any(pool.count for pool in pools) and not self._masks:
            return
        if not self._announced:
            self._announced = True
            emit(trainer, "on_before_pruning", pl_module)
        tensors = {name: weight.parameter.detach() for name, weight in self._weights.items()}
        transform = scopes.lamp if self.scope == "lamp" else None
        masks.update_masks(tensors, self._masks, pools, self._score, transform=transform)
        self._stepped = {}
        self._apply(trainer)
        entry: dict[str, Any] = {"epoch": trainer.current_epoch, "step": trainer.global_step}
        entry.update(level=self._level, target=self._target(), achieved=self._achieved())
        self._history.append(entry)
        self._log_due = True

    def _pools(self, floors: bool) -> list[scopes.Pool]:
        shapes = {name: tuple(weight.parameter.shape) for name, weight in self._weights.items()}
        if self.threshold is not None:
            tensors = {name: weight.parameter.detach() for name, weight in self._weights.items()}
            counts = masks.count_below(tensors, self._masks, self._score, self.threshold * self._level)
            return [scopes.Pool((name,), count) for name, count in counts.items()]
        target = self.sparsity if self._fractions is None else self._fractions
        masked = masks.count_masked(self._masks) if floors else None
        return scopes.pools(self.scope, shapes, target, self._level, masked)

    def _target(self) -> float:
        """Give the fraction of zeros that the schedule wants now."""
        if self.threshold is not None:
            return self._achieved()
        if self._fractions is None:
            assert not isinstance(self.sparsity, dict)
            return self.sparsity * self._level
        sizes = {name: weight.parameter.numel() for name, weight in self._weights.items()}
        wanted = sum(self._fractions[name] * size for name, size in sizes.items())
        return wanted * self._level / max(1, sum(sizes.values()))

    def _achieved(self) -> float:
        """Count the fraction of weights that are zero."""
        total = sum(weight.parameter.numel() for weight in self._weights.values())
        nonzero = sum(int(torch.count_nonzero(w.parameter.detach())) for w in self._weights.values())
        return (total - nonzero) / max(1, total)

    # ------------------------------------------------------------------ masks on weights

    def _attach(self, trainer: Trainer) -> None:
        self._detach()
        for optimizer in trainer.optimizers:
            self._handles.append(optimizer.register_step_post_hook(self._after_step))

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._stepped = {}

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Zero again what this optimizer has just moved; a hook that returned anything would break torch."""
        if not self._masks:
            return
        held = sum(len(group["params"]) for group in optimizer.param_groups)
        known = self._stepped.get(id(optimizer))
        # A finetuning callback may add parameters to an optimizer at any time.
        if known is None or known[0] != held:
            mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
            pairs = [
                (w.parameter, self._masks[n]) for n, w in self._weights.items() if id(w.parameter) in mine
            ]
            known = (held, [p for p, _ in pairs], [m for _, m in pairs])
            self._stepped[id(optimizer)] = known
        masks.apply_masks(known[1], known[2])

    def _apply(self, trainer: Trainer) -> None:
        """Zero what is masked, in the module and in the models that other callbacks average from it."""
        names = [name for name in self._weights if name in self._masks]
        masks.apply_masks([self._weights[n].parameter for n in names], [self._masks[n] for n in names])
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            # WeightAveraging and StochasticWeightAveraging offer no public access to their model.
            average = getattr(callback, "_average_model", None)
            if isinstance(average, nn.Module):
                model = getattr(average, "module", average)
                copies = dict(model.named_parameters(remove_duplicate=False))
                for name in names:
                    if name in copies and copies[name].shape == self._masks[name].shape:
                        masks.apply_masks([copies[name]], [_like(self._masks[name], copies[name])])

    # ------------------------------------------------------------------ logging

    def _log_name(self, trainer: Trainer, suffix: str = "") -> str:
        """Name the logged value: `sparsity`, and with several of these callbacks what each selects, too."""
        peers = [c for c in trainer.callbacks if isinstance(c, MagnitudePruning)]  # type: ignore[attr-defined]
        if len(peers) < 2:
            return f"sparsity{suffix}"
        globs = list(self.sparsity) if isinstance(self.sparsity, dict) else self.include
        return f"sparsity{suffix}/{','.join(globs)}"


def _builds_late(pl_module: LightningModule) -> bool:
    """Tell whether the user's module makes layers in `configure_model`, which runs after every `setup`."""
    return not type(pl_module).configure_model.__module__.startswith(NAMESPACES)


def _like(mask: Tensor, weight: Tensor) -> Tensor:
    """Give a mask its weight's dtype, device and memory format, so that applying it is one fused call."""
    if mask.dtype == weight.dtype and mask.device == weight.device and mask.stride() == weight.stride():
        return mask
    out = torch.empty_like(weight, requires_grad=False)
    return out.copy_(mask)


def _unpack(name: str, packed: Tensor, weight: Tensor) -> Tensor:
    try:
        return masks.unpack(packed, weight)
    except ValueError as error:
        raise CheckpointError(
            f"{_OWNER}: the checkpoint's mask of {name!r} does not fit the module: {error}."
        ) from error


def _check(callback: MagnitudePruning) -> None:
    """Refuse wrong arguments that can be seen without a module."""
    sparsity = callback.sparsity
    levels = list(sparsity.items()) if isinstance(sparsity, dict) else [("", sparsity)]
    if not levels:
        raise ConfigurationError.of(_OWNER, "sparsity", "a fraction, or fractions by glob", sparsity)
    for glob, level in levels:
        if isinstance(level, bool) or not isinstance(level, (int, float)) or not 0 <= level <= 1:
            percent = isinstance(level, (int, float)) and 1 < level <= 100
            remedy = f"write {level / 100:g}" if percent else ""
            name = f"sparsity[{glob!r}]" if glob else "sparsity"
            raise ConfigurationError.of(_OWNER, name, "a fraction from 0 to 1", level, remedy)
    if not isinstance(callback.schedule, Schedule):
        remedy = "write Schedule('cubic', end=0.5)"
        raise ConfigurationError.of(_OWNER, "schedule", "a Schedule", callback.schedule, remedy)
    if callback.scope not in scopes.SCOPES:
        hint = near_matches(str(callback.scope), scopes.SCOPES).rstrip(".")
        expected = "one of " + ", ".join(map(repr, scopes.SCOPES))
        raise ConfigurationError.of(_OWNER, "scope", expected, callback.scope, hint)
    if isinstance(sparsity, dict) and callback.scope in ("erk", "lamp"):
        remedy = "give one fraction, or another scope"
        expected = "'global' or 'layer' when `sparsity` is given by glob"
        raise ConfigurationError.of(_OWNER, "scope", expected, callback.scope, remedy)
    if callback.pattern is not None:
        raise ConfigurationError.of(_OWNER, "pattern", "None", callback.pattern)
    threshold = callback.threshold
    if threshold is not None and (isinstance(threshold, bool) or not threshold > 0):
        raise ConfigurationError.of(_OWNER, "threshold", "above 0", threshold)
    if threshold is not None and isinstance(sparsity, dict):
        raise ConfigurationError.of(_OWNER, "threshold", "None when `sparsity` is given by glob", threshold)


def _config(callback: MagnitudePruning) -> dict[str, Any]:
    criterion = callback.criterion
    schedule = callback.schedule
    return {
        "sparsity": callback.sparsity,
        "schedule": {name: getattr(schedule, name) for name in schedule.__dataclass_fields__},
        "scope": callback.scope,
        "criterion": criterion if isinstance(criterion, str) else criterion.__name__,
        "pattern": callback.pattern,
        "threshold": callback.threshold,
        "include": list(callback.include),
        "exclude": list(callback.exclude),
    }
