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
from lightning_prune.callbacks import _clock, _magnitude_config, _magnitude_table
from lightning_prune.callbacks._averages import averaged_modules
from lightning_prune.callbacks._events import emit
from lightning_prune.callbacks._logged import Logged
from lightning_prune.callbacks._magnitude_config import OWNER
from lightning_prune.callbacks._magnitude_training import Dynamics
from lightning_prune.callbacks._mask_keeper import MaskKeeper
from lightning_prune.callbacks._watch_magnitude import Watch
from lightning_prune.errors import ConfigurationError, StrategyError
from lightning_prune.schedules import Schedule, Timeline
from lightning_prune.selection import assign, select_weights
from lightning_prune.sparsity import criteria, patterns, scopes, sharding
from lightning_prune.sparsity.goal import Goal
from lightning_prune.sparsity.masks import Look, Rule, count_below
from lightning_prune.sparsity.training import SparseTraining

# These keep parameters where a mask by name cannot find them.
_REFUSED_STRATEGIES = ("FSDPStrategy", "DeepSpeedStrategy")
_DEFAULT_SCHEDULE = Schedule()
_DEFAULT_TRAINING = SparseTraining()
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class MagnitudePruning(Callback):
    """Zero the least important weights on a schedule, and keep them zero.

    The level is absolute: `sparsity` is the final fraction of zeros over the selected weights, and at any
    time the fraction in force is `sparsity` times the level of the schedule, exact to one weight, at every
    optimizer step, validation and checkpoint. When channels are removed, it is a fraction of what is left.

    Masks live beside the weights: parameters keep their names, and every optimizer re-applies the masks right
    after its step. The masks are in the callback's state, one bit a weight, so that a resumed run goes on
    exactly. A second `fit` with the same module keeps them; with another module it starts anew.

    A criterion that needs gradients or activations prunes within the first optimizer step after an event,
    between backward and update; all others at the start of the epoch (or step).

    Masks alone make a file compress better; dense kernels run no faster for them.

    Args:
        sparsity: Final fraction of zeros, 0 to 1, or fractions by glob (`{"stem.*": 0.3, "*": 0.85}`; the
            first that matches a weight counts, and each weight gets its own fraction).
        schedule: When, and how fast.
        scope: `"global"`: the lowest scores anywhere; `"layer"`: the same fraction of each weight;
            `"output"`: of each output of each weight; `"erk"`: Erdős–Rényi-kernel, wide layers sparser
            (Evci et al. 2020); `"lamp"`: global with layer-adaptive scores (Lee et al. 2021).
        criterion: `"magnitude"`, `"l2"`, `"random"`, `"taylor"`, `"snip"`, `"movement"`, `"wanda"`, or one's
            own; see `lightning_prune.sparsity.criteria`.
        pattern: None: single weights go. `"2:4"` (any `"n:m"`), `"block:RxC"`, `"row"`, `"column"`; see
            `lightning_prune.sparsity.patterns`.
        threshold: Weights that score below it go, instead of a fixed fraction; the schedule scales it.
        include: Globs of the weights to prune; see `lightning_prune.selection`. The default means the
            weights of all convolution, linear, embedding, recurrent and attention layers.
        exclude: Globs of weights to leave alone.
        training: Regrowth, rewinding, masked gradients; none by default.

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
        training: SparseTraining = _DEFAULT_TRAINING,
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
        self.training = training
        _magnitude_config.check(self)
        self._score = criteria.resolve(criterion, OWNER)
        self._reset()

    # ------------------------------------------------------------------ state

    def _reset(self) -> None:
        self._level = 0.0
        self._due = False
        self._history: list[dict[str, Any]] = []
        self._keeper = MaskKeeper()
        self._watch = Watch(criteria.needs_of(self._score))
        self._dynamics = Dynamics(self.training)
        pattern = patterns.parse(self.pattern, OWNER)
        self._goal = Goal(self.sparsity, self.scope, pattern)
        self._timeline: Timeline | None = None
        self._module: weakref.ref[nn.Module] | None = None
        self._logged = Logged()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to a running fit, so that the callback can be copied and pickled."""
        return {**self.__dict__, "_module": None}

    @property
    def state_key(self) -> str:
        """What tells two instances apart in a checkpoint: the weights they select."""
        globs = sorted(self.sparsity) if isinstance(self.sparsity, dict) else []
        return self._generate_state_key(include=self.include, exclude=self.exclude, sparsity=globs)

    def state_dict(self) -> dict[str, Any]:
        """Return masks (packed, one bit a weight), level and history; plain data and tensors only."""
        state = {"level": self._level, "due": self._due, "history": [dict(e) for e in self._history]}
        state["masks"] = self._keeper.pack()
        if self._watch.statistics.kinds:
            state["statistics"] = self._watch.statistics.state_dict()
        if self._dynamics.origin:
            state["origin"] = {n: sharding.whole(t) for n, t in self._dynamics.origin.items()}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take masks, level and history from a checkpoint; `on_train_start` lays them on the weights."""
        self._level = float(state_dict["level"])
        self._due = bool(state_dict["due"])
        self._history = [dict(entry) for entry in state_dict["history"]]
        self._keeper.load(state_dict["masks"])
        if "statistics" in state_dict:
            self._watch.statistics.load_state_dict(state_dict["statistics"])
        self._dynamics.origin = dict(state_dict.get("origin", {}))

    @property
    def masks(self) -> Mapping[str, Tensor]:
        """The masks in force by parameter name: 1 where the weight stays, 0 where it is pruned."""
        return dict(self._keeper.masks)

    @property
    def level(self) -> float:
        """The level in force: the part of `sparsity` that the schedule has asked for so far, 0 to 1."""
        return self._level

    @property
    def pruning_finished(self) -> bool:
        """Whether the final level is in force."""
        return self._level >= 1.0 and not self._due

    def pruning_summary(self) -> dict[str, Any]:
        """Say what was done so far, as plain data for the report.

        Returns:
            `callback`, `config`, `history` (one entry for each change) and `layers` (parameters and non-zeros
            of each selected weight).
        """
        zeros, sizes = self._keeper.zeros(), self._keeper.sizes()
        layers = [{"name": n, "parameters": size, "nonzero": size - zeros[n]} for n, size in sizes.items()]
        return {
            "callback": type(self).__name__,
            "config": _magnitude_config.plain(self),
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
                f"{OWNER}: {type(trainer.strategy).__name__} keeps parameters flattened or partitioned, "
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
        others = [c for c in trainer.callbacks if isinstance(c, MagnitudePruning) and c is not self]  # type: ignore[attr-defined]
        _magnitude_config.refuse_overlap(self._keeper.weights, [c._keeper.weights for c in others])
        self._watch.refuse(self._keeper.weights, OWNER, self.criterion)
        self._timeline = _clock.plan(trainer, pl_module, self.schedule)
        _magnitude_config.refuse_training(self.training, self._timeline)
        steps = _clock.training_length(trainer, pl_module)[1]
        self._dynamics.steps = _magnitude_config.regrowth_steps(self.training, steps)
        self._keeper.follow(trainer.optimizers)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lay restored masks on the weights; by now every strategy has restored them."""
        self._select(pl_module)
        self._keeper.follow(trainer.optimizers)
        self._keeper.restore(OWNER)
        self._watch.follow(self._keeper.weights)
        self._watch.statistics.to({n: w.parameter.detach() for n, w in self._keeper.weights.items()})
        self._keeper.apply(averaged_modules(trainer))
        self._logged.due = True

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune if an event falls on this epoch, and log for those who monitor."""
        self._dynamics.remember(pl_module, trainer.current_epoch)
        self._advance(trainer, pl_module)
        self._logged.values = self._reached(trainer)
        self._logged.on_epoch(pl_module)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Prune if an event falls on this optimizer step, and show the sparsity in the progress bar."""
        self._advance(trainer, pl_module)
        if self._logged.due:
            self._logged.values = self._reached(trainer)
            self._logged.on_batch(pl_module)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Use the gradients: for criteria that need them, for regrowth, and mask them if that is wanted."""
        if not (self._watch.active or self._due or self._dynamics.active):
            return
        names = self._keeper.names_in(optimizer)
        if not self._will_be_skipped(trainer, names):
            self._watch.observe_gradients(self._keeper.weights, names)
            if self._due and self._watch.statistics.complete(self._keeper.weights):
                self._prune(trainer, pl_module)
            elif not self._due:
                step = _clock.now(trainer, pl_module, "step")
                if self._dynamics.exchange(self._keeper, optimizer, names, step):
                    self._keeper.apply(averaged_modules(trainer))
        if self.training.mask_gradients:
            self._keeper.mask_gradients(names)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give zeros one sign before ModelCheckpoint, which runs after this, writes them."""
        self._keeper.clear_signs()

    def on_structure_change(self, trainer: Trainer, pl_module: LightningModule, change: Any) -> None:
        """Follow the removal of channels: cut the masks alike, then make the level exact again."""
        if change.removed:
            self._keeper.forget(change.removed)
            self._select(pl_module)
        self._keeper.narrow(change, dict(pl_module.named_parameters(remove_duplicate=False)))
        self._watch.statistics.narrow(change.narrow, set(self._keeper.weights) - set(change.removed))
        self._watch.follow(self._keeper.weights)
        self._dynamics.narrow(change.narrow, change.removed)
        if self._keeper.masks:
            self._prune(trainer, pl_module, follow=True)

    def on_rollback(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take up the state of an earlier time, as after a resume."""
        self.on_train_start(trainer, pl_module)
        self._watch.active = bool(self._watch.statistics.kinds) and self._level < 1.0
        self._keeper.clear_signs()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave exact, positive zeros."""
        self._keeper.apply(averaged_modules(trainer))
        self._keeper.clear_signs()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show what became of each weight, to those who see a progress bar."""
        if trainer.progress_bar_callback is not None and self._keeper.masks:
            # Every rank takes part: weights may be sharded.
            summary = self.pruning_summary()
            if trainer.is_global_zero:
                _magnitude_table.show(summary)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave no hook behind."""
        self._keeper.release()
        self._watch.release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hook behind; Lightning calls no teardown after an exception."""
        self._keeper.release()
        self._watch.release()

    # ------------------------------------------------------------------ before training

    def _select(self, pl_module: LightningModule) -> None:
        weights = select_weights(pl_module, self.include, self.exclude, OWNER)
        if isinstance(self.sparsity, dict):
            fractions = assign(weights, self.sparsity, OWNER)
            weights = {name: weights[name] for name in fractions}
            self._goal = replace(self._goal, sparsity=fractions)
        for name, weight in weights.items():
            if isinstance(weight.parameter, nn.parameter.UninitializedParameter):
                raise ConfigurationError(
                    f"{OWNER}: {name!r} has no shape yet; run one batch through the lazy layers before fit."
                )
        self._keeper.weights = weights

    # ------------------------------------------------------------------ pruning

    def _advance(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._timeline is None:
            return
        level = _clock.level(trainer, pl_module, self._timeline, self)
        # What was reached stays reached: a second fit of the same module starts from a sparse network.
        if level <= self._level:
            return
        self._level = level
        if self._watch.statistics.kinds:
            self._due = True
        else:
            self._prune(trainer, pl_module)

    def _prune(self, trainer: Trainer, pl_module: LightningModule, follow: bool = False) -> None:
        """Bring the masks to the level in force, and the weights to the masks.

        Args:
            trainer: The trainer.
            pl_module: The module.
            follow: Whether this follows a structural change instead of the schedule.
        """
        pools = self._pools(floors=not follow)
        self._due = self._due and follow
        if not any(pool.count for pool in pools) and not self._keeper.masks:
            return
        if not self._history:
            emit(trainer, "on_before_pruning", pl_module)
        if not follow and trainer.world_size > 1:
            self._watch.statistics.merge(lambda tensor: _sum_over_ranks(trainer, tensor))
        rule, look = self._rule()
        self._keeper.update(pools, rule, look)
        if not follow:
            self._watch.statistics.restart()
            self._watch.active = bool(self._watch.statistics.kinds) and self._level < 1.0
            self._dynamics.rewind(pl_module, trainer.optimizers)
        self._keeper.apply(averaged_modules(trainer))
        entry: dict[str, Any] = {"epoch": trainer.current_epoch, "step": trainer.global_step}
        entry.update(level=self._level, target=self._target(), achieved=self._achieved())
        self._history.append(entry)
        self._logged.due = True
        dead = self._keeper.newly_dead()
        if dead and trainer.is_global_zero:
            _magnitude_table.report_dead(dead, OWNER)

    def _rule(self) -> tuple[Rule, Look]:
        weights = self._keeper.weights
        transposed = frozenset(n for n, w in weights.items() if isinstance(w.module, _TRANSPOSED))
        statistics = self._watch.statistics
        # After a structural change activations are not there until the next forward; magnitudes are.
        known = statistics.known(weights)
        score = self._score if known else criteria.magnitude
        rule = Rule(score, scopes.TRANSFORMS.get(self.scope), self._goal.pattern, transposed)
        return rule, statistics.evidence if known else criteria.Evidence

    def _pools(self, floors: bool) -> list[scopes.Pool]:
        if self.threshold is not None:
            rule, look = self._rule()
            limit = self.threshold * self._level
            masked = sharding.WholeTensors(self._keeper.masks)
            counts = count_below(self._keeper.tensors(), masked, rule.criterion, limit, look)
            return [scopes.Pool((name,), count) for name, count in counts.items()]
        least = self._keeper.masked() if floors else None
        return self._goal.pools(self._keeper.shapes(), self._level, least)

    def _will_be_skipped(self, trainer: Trainer, names: list[str]) -> bool:
        """Tell whether a gradient scaler will skip this step because the gradients have overflowed."""
        if getattr(trainer.precision_plugin, "scaler", None) is None:
            return False
        gradients = [self._keeper.weights[name].parameter.grad for name in names]
        return not all(bool(torch.isfinite(gradient).all()) for gradient in gradients if gradient is not None)

    # ------------------------------------------------------------------ what is reached

    def _target(self) -> float:
        """Give the fraction of zeros that the schedule wants now."""
        if self.threshold is not None:
            return self._achieved()
        return self._goal.fraction(self._keeper.sizes(), self._level)

    def _achieved(self) -> float:
        """Count the fraction of weights that are zero."""
        return sum(self._keeper.zeros().values()) / max(1, sum(self._keeper.sizes().values()))

    def _reached(self, trainer: Trainer) -> dict[str, float]:
        """Name what is logged: `sparsity`, and with several of these callbacks what each selects, too."""
        peers = [c for c in trainer.callbacks if isinstance(c, MagnitudePruning)]  # type: ignore[attr-defined]
        globs = list(self.sparsity) if isinstance(self.sparsity, dict) else self.include
        own = f"/{','.join(globs)}" if len(peers) > 1 else ""
        return {f"sparsity{own}": self._achieved(), f"sparsity_target{own}": self._target()}


def _sum_over_ranks(trainer: Trainer, tensor: Tensor) -> Tensor:
    total: Tensor = trainer.strategy.reduce(tensor, reduce_op="sum")
    return total


def _builds_late(pl_module: LightningModule) -> bool:
    """Tell whether the user's module makes layers in `configure_model`, which runs after every `setup`."""
    return not type(pl_module).configure_model.__module__.startswith(NAMESPACES)
