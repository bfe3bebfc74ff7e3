"""Hold pruning back where it costs too much accuracy: when, state, logging. `guarding` decides."""

from __future__ import annotations

import weakref
from dataclasses import asdict
from typing import Any

from torch import nn

from lightning_prune._lightning import Callback, LightningModule, Trainer, say
from lightning_prune.callbacks import _clock, _guard_table, _snapshot
from lightning_prune.callbacks._averages import take_over
from lightning_prune.callbacks._follow import check_strategy
from lightning_prune.errors import CheckpointError, ConfigurationError, near_matches
from lightning_prune.guarding import Rules, State, allowed, judge
from lightning_prune.schedules import Timeline

_OWNER = "AccuracyGuard"


class AccuracyGuard(Callback):
    """Prune as far as accuracy allows: pause, let the network recover, step back, end at what holds.

    Stands beside any pruning callbacks. After each validation it looks at a metric. While that is within
    `max_drop` of the reference, pruning follows its schedule, and a copy of the training's state is kept.
    When it falls further, the schedules stand still and the network trains on. If it has not recovered after
    `patience` more validations, everything returns to the last state that held (weights, optimizers, learning
    rate schedulers, channels, masks, running averages), and goes on from there in steps half as large. When
    these would be smaller than `min_step`, the level that holds is the final one. A fit never ends in a state
    that was not seen to hold, if there was one that was.

    Pruning waits for a first validation that gives the reference, so a schedule that begins with the training
    begins one validation later. Time spent waiting delays the schedules.

    The copy is on the CPU and in the checkpoints, which it makes about twice as large: a resumed run decides
    as the one that was killed. On several ranks the mean of their values counts, for all alike.

    Args:
        monitor: The metric: one that the validation loop logs (or, without a validation loop, the training
            step).
        max_drop: How much worse than the reference it may be, in its own unit: 0.01 of an accuracy from 0 to
            1 is one point.
        mode: `"max"` if more of it is better, `"min"` if less is.
        reference: A value; or `"dense"`: the best value before the first pruning; or `"best"`: the best value
            at any time, for networks that are trained from scratch. Where a value is given, pruning waits
            until the network has come within `max_drop` of it.
        patience: How many validations the network gets to recover.
        min_step: The smallest step that is worth trying, as a part of the whole schedule (0 to 1).

    Attributes:
        settled: Whether the final level has been found, and is in force; `AfterPruning` waits for it.

    Raises:
        ConfigurationError: An argument is wrong, or the monitored metric is not logged.

    Example:
        >>> guard = AccuracyGuard("val_acc", max_drop=0.01)
        >>> guard.settled, guard.pruning_summary()["config"]["max_drop"]
        (False, 0.01)
    """

    def __init__(
        self,
        monitor: str = "val_acc",
        max_drop: float = 0.01,
        mode: str = "max",
        *,
        reference: str | float = "dense",
        patience: int = 3,
        min_step: float = 0.02,
    ) -> None:
        super().__init__()
        self.monitor = monitor
        self.max_drop = max_drop
        self.mode = mode
        self.reference = reference
        self.patience = patience
        self.min_step = min_step
        _check(self)
        self._reset()

    # ------------------------------------------------------------------ state

    def _reset(self) -> None:
        self._state = State()
        self._due: str | None = None
        self._kept: _snapshot.Snapshot | None = None
        self._delay = {"epoch": 0, "step": 0}
        self._since: dict[str, int] | None = {"epoch": 0, "step": 0}
        self._history: list[dict[str, Any]] = []
        self._log_due = True
        self._module: weakref.ref[nn.Module] | None = None
        self._trainer: weakref.ref[Trainer] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to a running fit, so that the callback can be copied and pickled."""
        return {**self.__dict__, "_module": None, "_trainer": None}

    @property
    def state_key(self) -> str:
        """What tells two instances apart in a checkpoint: what they monitor."""
        return self._generate_state_key(monitor=self.monitor)

    def state_dict(self) -> dict[str, Any]:
        """Return decisions, delays and the copy of the last state that held; plain data and tensors only."""
        return {
            "state": self._state.plain(),
            "due": self._due,
            "kept": self._kept,
            "delay": dict(self._delay),
            "since": None if self._since is None else dict(self._since),
            "history": [dict(entry) for entry in self._history],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up where a checkpoint left off."""
        self._state = State(**state_dict["state"])
        self._due = state_dict["due"]
        self._kept = state_dict["kept"]
        self._delay = dict(state_dict["delay"])
        self._since = None if state_dict["since"] is None else dict(state_dict["since"])
        self._history = [dict(entry) for entry in state_dict["history"]]

    @property
    def rules(self) -> Rules:
        """What is asked, as the decisions take it."""
        return Rules(self.mode, self.max_drop, self.reference, self.patience, self.min_step)  # type: ignore[arg-type]

    @property
    def settled(self) -> bool:
        """Whether the final level has been found, and is in force."""
        return self._state.phase == "settled" and self._due in (None, "hold")

    def pruning_summary(self) -> dict[str, Any]:
        """Say what was decided, as plain data for the report.

        Returns:
            `callback`, `config`, `history` (one entry for each validation at another level or with another
            outcome: its `value`, the `bound` that it must keep, the `decision`, and as `achieved` the level
            in force), `settled`, `levels` (the last
            that held, by callback) and `kept_bytes` (of the copy in memory).
        """
        return {
            "callback": type(self).__name__,
            "config": {"monitor": self.monitor, **asdict(self.rules)},
            "history": [dict(entry) for entry in self._history],
            "settled": self.settled,
            "levels": dict(self._state.good),
            "kept_bytes": 0 if self._kept is None else _snapshot.size_of(self._kept),
        }

    # ------------------------------------------------------------------ hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work."""
        if stage != "fit":
            return
        if self._module is None or self._module() is not pl_module:
            self._reset()
            self._module = weakref.ref(pl_module)
        if self._trainer is None or self._trainer() is not trainer:  # whose time begins at 0
            self._delay = {"epoch": 0, "step": 0}
            self._since = None if self._since is None else dict(self._delay)
            self._trainer = weakref.ref(trainer)
        check_strategy(trainer.strategy, _OWNER)
        if sum(hasattr(callback, "guarded_level") for callback in trainer.callbacks) > 1:  # type: ignore[attr-defined]
            raise ConfigurationError(f"{_OWNER}: there are two of them, and a training can go only one way.")
        if not self._levels(trainer):
            say(pl_module, f"{_OWNER}: no callback prunes, so there is nothing to guard.")

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do what the last validation calls for, before anything prunes."""
        self._act(trainer, pl_module)
        self._log_due = True

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Do what a validation in the middle of an epoch calls for; show the bound in the progress bar."""
        self._act(trainer, pl_module)
        if self._log_due and self._state.reference is not None:
            self._log_due = False
            bound = self.rules.bound(self._state.reference)
            pl_module.log("guard_bound", bound, on_step=True, on_epoch=False, prog_bar=True, logger=False)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the metric, and decide."""
        if trainer.state.fn != "fit":
            return
        if not trainer.sanity_checking:
            self._look(trainer, pl_module)
        elif trainer.callback_metrics:  # some modules log nothing in the sanity check
            self._metric(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Without a validation loop, look at what the epoch of training has logged."""
        if not trainer.enable_validation:
            self._look(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End in a state that was seen to hold."""
        if self._kept is None or (self._due == "hold" and self._levels(trainer) == self._state.good):
            return
        try:
            _snapshot.restore(trainer, pl_module, self._kept)
        except CheckpointError as error:
            say(pl_module, f"{_OWNER}: the network stays as it is: {error}")
            return
        # A callback that averages weights may have handed its average over before this.
        take_over(trainer, pl_module)
        self._due = None
        self._tell(pl_module, "the fit ended", "back at the last state that held", trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the decisions to those who see a progress bar."""
        if trainer.progress_bar_callback is not None and trainer.is_global_zero and self._history:
            _guard_table.show(self.pruning_summary())

    # ------------------------------------------------------------------ what pruning callbacks ask

    def guarded_level(
        self, trainer: Trainer, pl_module: LightningModule, timeline: Timeline, callback: Any
    ) -> float:
        """Say which level a pruning callback may have in force now; see `_clock.level`.

        Args:
            trainer: The trainer, at the start of an epoch or a batch.
            pl_module: The module.
            timeline: The callback's schedule.
            callback: The pruning callback.

        Returns:
            The level, at least the one that is in force.
        """
        self._act(trainer, pl_module)  # whichever callback the user lists first
        time = _clock.now(trainer, pl_module, timeline.interval) - self._delay[timeline.interval]
        wanted = timeline.level_at(max(0, time))
        return allowed(self._state, callback.state_key, callback.level, wanted)

    # ------------------------------------------------------------------ deciding and acting

    def _levels(self, trainer: Trainer) -> dict[str, float]:
        followers = _snapshot.followers(trainer)
        return {
            callback.state_key: float(callback.level) for callback in followers if hasattr(callback, "level")
        }

    def _metric(self, trainer: Trainer) -> Any:
        """Return the monitored metric of this rank; refuse a name that nobody logs."""
        logged = trainer.callback_metrics
        if self.monitor not in logged:
            loop = "validation loop" if trainer.enable_validation else "training"
            problem = f"the {loop} logs no {self.monitor!r} for a whole epoch (`on_epoch=True`)"
            known = near_matches(self.monitor, sorted(logged))
            raise ConfigurationError(f"{_OWNER}: `monitor`: {problem}. {known}")
        return logged[self.monitor]

    def _look(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The ranks need not have logged with sync_dist; they must decide alike.
        value = float(trainer.strategy.reduce(self._metric(trainer), reduce_op="mean"))
        before, levels = self._state, self._levels(trainer)
        followers = _snapshot.followers(trainer)
        whole = {c.state_key for c in followers if not getattr(c, "divisible", True)}
        self._state, decision = judge(self.rules, before, value, levels, whole)
        self._due = None if decision == "wait" else decision
        self._keep_time(trainer, pl_module)
        assert self._state.reference is not None
        bound = self.rules.bound(self._state.reference)
        achieved = min(levels.values(), default=0.0)
        entry: dict[str, Any] = {"epoch": trainer.current_epoch, "step": trainer.global_step}
        entry |= {"value": value, "reference": self._state.reference, "bound": bound, "achieved": achieved}
        entry |= {"decision": decision, "phase": self._state.phase, "levels": levels}
        changed = decision != "hold" or before.phase != self._state.phase
        if changed or self._history[-1]["levels"] != levels:
            self._history.append(entry)
        if changed:
            self._tell(pl_module, f"{self.monitor} {value:.6g}, bound {bound:.6g}", _SAID[decision], trainer)
        numbers = {"guard_bound": bound, "guard_level": achieved, "guard_held": float(decision == "hold")}
        for logger in trainer.loggers:
            logger.log_metrics(numbers, step=trainer.global_step)

    def _keep_time(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the time in which the schedules stand still."""
        time = {unit: _clock.now(trainer, pl_module, unit) for unit in ("epoch", "step")}
        stands = self._state.phase in ("waiting", "recovering")
        if stands and self._since is None:
            self._since = time
        elif not stands and self._since is not None:
            self._delay = {unit: self._delay[unit] + time[unit] - self._since[unit] for unit in time}
            self._since = None

    def _act(self, trainer: Trainer, pl_module: LightningModule) -> None:
        due, self._due = self._due, None
        if due == "hold" and self._levels(trainer):
            first = self._kept is None
            self._kept = _snapshot.take(trainer, pl_module)
            if first:
                size = _snapshot.size_of(self._kept) / 1e6
                say(pl_module, f"{_OWNER}: keeps the last state that held in memory, {size:,.1f} MB.")
        elif due in ("return", "settle") and self._kept is not None:
            _snapshot.restore(trainer, pl_module, self._kept)

    def _tell(self, pl_module: LightningModule, seen: str, decided: str, trainer: Trainer) -> None:
        level = min(self._levels(trainer).values(), default=0.0)
        say(pl_module, f"{_OWNER}, epoch {trainer.current_epoch}, level {level:.3f}: {seen}: {decided}.")


_SAID = {
    "hold": "holds",
    "wait": "pruning stands still until it recovers",
    "return": "back to the last state that held, and on in smaller steps",
    "settle": "back to the last state that held, which is the final one",
}


def _check(guard: AccuracyGuard) -> None:
    if not isinstance(guard.monitor, str) or not guard.monitor:
        raise ConfigurationError.of(_OWNER, "monitor", "the name of a logged metric", guard.monitor)
    if not _number(guard.max_drop) or not 0 <= guard.max_drop < float("inf"):
        expected = "a number from 0, in the unit of the metric"
        raise ConfigurationError.of(_OWNER, "max_drop", expected, guard.max_drop, "write 0.01")
    if guard.mode not in ("max", "min"):
        raise ConfigurationError.of(_OWNER, "mode", "'max' or 'min'", guard.mode)
    if guard.reference not in ("dense", "best") and not _number(guard.reference):
        remedy = near_matches(str(guard.reference), ("dense", "best"))
        raise ConfigurationError.of(
            _OWNER, "reference", "'dense', 'best' or a number", guard.reference, remedy
        )
    if isinstance(guard.patience, bool) or not isinstance(guard.patience, int) or guard.patience < 0:
        raise ConfigurationError.of(_OWNER, "patience", "a whole number from 0", guard.patience)
    if not _number(guard.min_step) or not 0 < guard.min_step <= 1:
        raise ConfigurationError.of(_OWNER, "min_step", "above 0, up to 1", guard.min_step, "write 0.02")


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value
