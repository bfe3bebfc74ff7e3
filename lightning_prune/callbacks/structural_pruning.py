"""Remove channels while training: when, state, logging. The algorithm is in `lightning_prune.structure`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from torch import nn

from lightning_prune._lightning import LightningModule, Trainer
from lightning_prune.callbacks import _clock, _network
from lightning_prune.callbacks._events import decided, emit
from lightning_prune.callbacks._follow import follow
from lightning_prune.callbacks._latency import Stopwatch
from lightning_prune.callbacks._learning import Learning
from lightning_prune.callbacks._logged import Logged
from lightning_prune.callbacks._preflight import show
from lightning_prune.callbacks._recalibrate import recalibrate_norms, reconstruction
from lightning_prune.callbacks._structure_callback import StructureCallback
from lightning_prune.deploy.timing import Target
from lightning_prune.errors import ConfigurationError
from lightning_prune.schedules import Schedule
from lightning_prune.selection import match_names
from lightning_prune.structure.budget import Budget, check_search_arguments
from lightning_prune.structure.groups import Group
from lightning_prune.structure.importance import Evidence, check_importance
from lightning_prune.structure.latency import LatencyTable
from lightning_prune.structure.plan import Dense, Recipe, foresee, measure, plan, survey
from lightning_prune.structure.surgery import Change, from_plain, plain

_OWNER = "StructuralPruning"
_DEFAULT_SCHEDULE = Schedule()


class StructuralPruning(StructureCallback):
    """Remove channels on a schedule until the network fits its budget, and let training follow.

    Channels are really removed, at the start of an epoch (or of an optimizer step, if the schedule's
    interval is `"step"`), so training gets cheaper. Layers that depend on each other are cut together; layers
    that make the network's outputs are protected by themselves; whatever cannot be cut correctly is left
    intact and named. Every cut is tried on a copy first. Optimizers, running averages, DDP, the compiler and
    checkpoints follow, and Parameters stay the objects they are. A resumed run goes on exactly.

    Args:
        budget: How much of the dense network may remain; None is `Budget(macs=0.5)`.
        schedule: When, and how fast. The level is absolute: at level `l` of the schedule
            `1 - l * (1 - budget)` may remain.
        importance: Which channels go first: `"magnitude"` (L2 over every layer a channel touches), `"l1"`,
            `"bn_scale"`, `"fpgm"`, `"lamp"`, `"random"`; or, gathered in all optimizer steps since the last
            cut: from gradients `"taylor"` or `"hessian"`, from activations `"activation"` (their mean size)
            or `"apoz"` (how few are zero). See `lightning_prune.structure.importance` and `.activations`.
        scope: `"global"`: the least important channels anywhere; `"layer"`: every layer shrinks alike;
            `"isomorphic"`: ranked among layers of the same kind, and all kinds shrink alike.
        round_to: Widths become multiples of this. `"auto"`: of 16, 8 or 4, the largest that leaves a layer a
            choice, because one channel more or less can make a layer several times slower. Where that would
            take over 3 % more than a budget asks, a few layers get the multiples of 8 or 4 in between.
        max_ratio: The largest fraction of a layer's channels that may go.
        target: Where a budget of latency counts; None is this machine, on one thread.
        latency_table: Where the times are kept that a budget of latency is planned with, as a JSON file. They
            are measured once, before the first training, each layer at a few widths; a file of another
            network, machine or runtime is refused. Without it they are in the checkpoints only.
        include: Globs of the layers that may lose channels.
        exclude: Globs of layers that keep theirs.
        example_input: What the network is traced with: a shape (`[1, 3, 32, 32]`) or tensors; by default the
            module's `example_input_array`, or what its own step passes to it for a real batch.
        regularization: Weight in the loss of a penalty that presses on the channels that matter least, from
            the start, growing until the last cut, and none after it: the group norm of DepGraph, or with
            `importance="bn_scale"` the L1 norm of the scales. It costs one multiply-add a weight and step.
        recalibrate: With how many training batches the running statistics of batch normalisation are
            estimated anew after each cut; 0 leaves them to training. Nothing else changes.
        reconstruct: With how many training batches the layers that read what goes are fitted in each cut, by
            least squares, so that they give about what they gave (He et al. 2017, arXiv:1707.06168, equation
            1); 0 takes their weights as they are. It helps where little training follows. Convolutions with
            groups, transposed ones and layers with over 8,192 inputs stay as they are.

    Raises:
        ConfigurationError: An argument is wrong; what depends on the module, before training starts.

    Example:
        >>> StructuralPruning(Budget(macs=0.4), schedule=Schedule(end=0.6), exclude=["stem"]).budget.kind
        'macs'
    """

    def __init__(
        self,
        budget: Budget | None = None,
        *,
        schedule: Schedule = _DEFAULT_SCHEDULE,
        importance: str = "magnitude",
        scope: str = "global",
        round_to: int | str = "auto",
        max_ratio: float = 0.9,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        example_input: Any = None,
        regularization: float = 0.0,
        recalibrate: int = 0,
        reconstruct: int = 0,
        target: Target | None = None,
        latency_table: str | None = None,
    ) -> None:
        super().__init__()
        # Not a default argument: LightningCLI would merge it with the budget in a configuration file.
        budget = Budget(macs=0.5) if budget is None else budget
        if not isinstance(budget, Budget):
            raise ConfigurationError.of(_OWNER, "budget", "a Budget", budget, "write Budget(macs=0.5)")
        if not isinstance(schedule, Schedule):
            raise ConfigurationError.of(_OWNER, "schedule", "a Schedule", schedule, "write Schedule(end=0.5)")
        check_search_arguments(scope, round_to, max_ratio)
        check_importance(importance, _OWNER)
        if budget.kind == "latency" and isinstance(round_to, int) and round_to % 4:
            expected = "'auto', or a multiple of 4, with a budget of latency: runtimes are slow at others"
            raise ConfigurationError.of(_OWNER, "round_to", expected, round_to)
        self.budget = budget
        self.schedule = schedule
        self.importance = importance
        self.scope = scope
        self.round_to = round_to
        self.max_ratio = max_ratio
        self.include = [include] if isinstance(include, str) else list(include)
        self.exclude = [exclude] if isinstance(exclude, str) else list(exclude)
        self.example_input = example_input
        self.regularization = _fraction_of_loss(regularization)
        self.recalibrate = _number_of_batches("recalibrate", recalibrate)
        self.reconstruct = _number_of_batches("reconstruct", reconstruct)
        if target is not None and not isinstance(target, Target):
            raise ConfigurationError.of(_OWNER, "target", "a Target", target, "write Target('pi@kitchen')")
        self.target = target
        self.latency_table = latency_table
        self._reset()

    # ------------------------------------------------------------------ state

    def _reset(self) -> None:
        super()._reset()
        self._level = 0.0
        self._dense: Dense | None = None
        self._watch = Stopwatch(self.target or Target(), self.latency_table)
        self._history: list[dict[str, Any]] = []
        self._skipped: dict[str, str] = {}
        self._left = Logged(self.budget.kind)
        self._widths: dict[str, int] = {}
        self._groups: list[Group] = []
        self._cutting = False
        self._learning = Learning(self.importance, self.regularization)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to a running fit, so that the callback can be copied and pickled."""
        learning = Learning(self.importance, self.regularization)
        learning.evidence = self._learning.evidence
        return {**super().__getstate__(), "_groups": [], "_learning": learning}

    @property
    def level(self) -> float:
        """The level in force, 0 to 1: the part of the way to the budget."""
        return self._level

    @property
    def pruning_finished(self) -> bool:
        """Whether the final level is in force; what `AfterPruning` waits for."""
        return self._level >= 1.0

    @property
    def latency_left(self) -> float | None:
        """The fraction of the dense network's latency that is left; None where the budget is another one."""
        return self._left.values.get("latency", 1.0) if self.budget.kind == "latency" else None

    @property
    def recipe(self) -> Recipe:
        """What is asked, without the schedule; milliseconds as a fraction once the dense network is known."""
        dense = self._dense.costs.get("latency") if self._dense is not None else None
        budget = self.budget if dense is None else self.budget.relative_to(dense)
        return Recipe(budget, self.importance, self.scope, self.round_to, self.max_ratio)

    def state_dict(self) -> dict[str, Any]:
        """Return level, history and the dense network's widths and costs; plain data only."""
        dense, evidence = self._dense, self._learning.evidence
        return {
            "level": self._level,
            "history": [dict(entry) for entry in self._history],
            "dense": None if dense is None else {"widths": dict(dense.widths), "costs": dict(dense.costs)},
            "times": None if self._watch.table is None else self._watch.table.plain(),
            "widths": dict(self._widths),
            "skipped": dict(self._skipped),
            "evidence": {"totals": dict(evidence.totals), "steps": evidence.steps},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up where a checkpoint left off; the structure itself comes with the module's own hooks."""
        self._level = float(state_dict["level"])
        self._history = [dict(entry) for entry in state_dict["history"]]
        dense = state_dict["dense"]
        self._dense = None if dense is None else Dense(dict(dense["widths"]), dict(dense["costs"]))
        times = state_dict.get("times")
        self._watch.table = None if times is None else LatencyTable.from_plain(times)
        self._widths = dict(state_dict["widths"])
        self._skipped = dict(state_dict["skipped"])
        self._learning.evidence = Evidence(**state_dict["evidence"])

    def pruning_summary(self) -> dict[str, Any]:
        """Say what was done so far, as plain data for the report.

        Returns:
            `callback`, `config`, `history` (one entry for each cut), `layers` (channels of each group before
            and after), `skipped` (`{layer: why it was left intact}`) and `dense` (costs before any cut).
        """
        dense = self._dense
        before = {} if dense is None else dict(dense.widths)
        return {
            "callback": type(self).__name__,
            "config": self._config(),
            "history": [dict(entry) for entry in self._history],
            "layers": [
                {"name": name, "channels_before": width, "channels_after": self._widths.get(name, width)}
                for name, width in before.items()
            ],
            "skipped": dict(self._skipped),
            "dense": {} if dense is None else dict(dense.costs),
        }

    def _config(self) -> dict[str, Any]:
        recipe = {**asdict(self.recipe), "budget": self.recipe.budget.given}
        lists = {"include": list(self.include), "exclude": list(self.exclude)}
        others = {
            "schedule": asdict(self.schedule),
            "regularization": self.regularization,
            "recalibrate": self.recalibrate,
            "reconstruct": self.reconstruct,
            "target": None if self.target is None else asdict(self.target),
            "latency_table": self.latency_table,
        }
        return {**recipe, **others, **lists}

    # ------------------------------------------------------------------ hooks

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make the module's checkpoints carry its structure, and refuse what cannot work."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            makers = [name for name, layer in pl_module.named_modules() if isinstance(layer, _network.MAKERS)]
            if makers:
                match_names(makers, self.include, self.exclude, _OWNER)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Trace the network, see whether the budget can be met, and show what it will come to."""
        self._timeline = _clock.plan(trainer, pl_module, self.schedule)
        if self._learning.gathers and self._timeline.level_at(0) > self._level:
            expected = "one that needs no training steps when the first cut is before the first step"
            remedy = "begin the schedule later"
            raise ConfigurationError.of(_OWNER, "importance", expected, self.importance, remedy)
        self._calls, self._example = _network.find(trainer, pl_module, self.example_input, _OWNER)
        network = _network.traced(pl_module, self._calls)
        groups = survey(network, self._example, self._choose)
        if self._dense is None:
            self._dense = measure(network, groups, self._example)
            if self.budget.kind == "latency":
                self._watch.prepare(trainer, network, groups, self.recipe, self._example)
                self._dense = measure(network, groups, self._example, self._watch.meters)
        elif self._watch.table is not None:
            self._watch.recall(trainer)
        self._take_stock(network, groups)
        meter = self._watch.meters[self.budget.kind]
        outlook = foresee(network, groups, self.recipe, self._dense, self._example, meter)
        if trainer.is_global_zero and trainer.progress_bar_callback is not None:
            show(outlook, groups)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Learn which channels matter, and press on those that do not."""
        if self._timeline is None or self._level >= 1.0:
            return
        self._learning.learn(trainer, pl_module, optimizer)
        if self.regularization:
            time = _clock.now(trainer, pl_module, self._timeline.interval)
            self._learning.press(min(1.0, (time + 1) / (self._timeline.end + 1)), optimizer)

    def on_structure_change(self, trainer: Trainer, pl_module: LightningModule, change: Change) -> None:
        """See the network anew when another callback has changed its layers."""
        if self._cutting or self._example is None:
            return
        self._learning.evidence = Evidence()
        if not change.removed:
            self._look_again(pl_module)
        else:
            if self._watch.table is not None:  # it has no times of the new layers
                network = _network.traced(pl_module, self._calls)
                groups = survey(network, self._example, self._choose)
                self._watch.prepare(trainer, network, groups, self.recipe, self._example)
            self.on_rollback(trainer, pl_module)

    def on_rollback(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take up the structure as it is now, such as that of an earlier time."""
        assert self._example is not None
        network = _network.traced(pl_module, self._calls)
        self._take_stock(network, survey(network, self._example, self._choose))
        self._left.due = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop watching the network."""
        self._learning.stop()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Stop watching the network, and leave no hook behind on a module that is as it was."""
        self._learning.stop()
        super().teardown(trainer, pl_module, stage)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hook behind; Lightning calls no teardown after an exception."""
        self._learning.stop()
        super().on_exception(trainer, pl_module, exception)

    # ------------------------------------------------------------------ cutting

    def _choose(self, names: Iterable[str]) -> list[str]:
        return match_names(names, self.include, self.exclude, _OWNER)

    def _advance(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._timeline is None:
            return
        level = _clock.level(trainer, pl_module, self._timeline, self)
        # What was reached stays reached: a second fit of the same module starts from a small network.
        if level > self._level:
            self._cut(trainer, pl_module, level)

    def _cut(self, trainer: Trainer, pl_module: LightningModule, level: float) -> None:
        """Plan on rank 0, and cut the same on all ranks."""
        change = self._plan(trainer, pl_module, level)
        self._level = level
        self._learning.evidence = Evidence()
        assert self._example is not None
        network = _network.traced(pl_module, self._calls)
        if change:
            emit(trainer, "on_before_pruning", pl_module)
            self._cutting = True
            put = reconstruction(trainer, pl_module, network, self._calls, self.reconstruct, change)
            follow(trainer, pl_module, change, put)
            self._cutting = False
            if self.recalibrate:
                recalibrate_norms(trainer, pl_module, network, self._calls, self.recalibrate)
        self._look_again(pl_module)
        achieved, target = self._left.values[self.budget.kind], self.recipe.budget.fraction_at(level)
        entry: dict[str, Any] = {"epoch": trainer.current_epoch, "step": trainer.global_step}
        entry |= {"level": level, "target": target, "achieved": achieved}
        if self._watch.table is not None:
            entry |= self._watch.outcome(trainer, pl_module, network, self._example)
        self._history.append(entry)

    def _look_again(self, pl_module: LightningModule) -> None:
        """Take up the same network, some of its layers narrower: what was proven of it holds."""
        assert self._example is not None
        network = _network.traced(pl_module, self._calls)
        proven = {group.name: group.reason for group in self._groups}
        self._take_stock(network, survey(network, self._example, self._choose, proven))
        self._left.due = True

    def _plan(self, trainer: Trainer, pl_module: LightningModule, level: float) -> Change:
        assert self._dense is not None
        assert self._example is not None
        network = _network.traced(pl_module, self._calls)
        asked = (network, self._groups, self.recipe, self._dense, level, self._example)
        gathered = self._learning.evidence.scores()
        if self._watch.table is not None:
            return self._watch.on_all_ranks(trainer, lambda: self._watch.plan(*asked, gathered))
        return from_plain(decided(trainer, lambda: plain(plan(*asked, gathered))))

    def _take_stock(self, network: nn.Module, groups: Sequence[Group]) -> None:
        """Note what remains of the dense network, and what was left intact."""
        assert self._dense is not None
        assert self._example is not None
        for kind in dict.fromkeys((self.budget.kind, "macs", "params")):
            cost = self._watch.meters[kind](network, groups, self._example)({})
            self._left.values[kind] = cost / (self._dense.costs[kind] or 1.0)
        self._widths = {group.name: group.channels for group in groups}
        self._skipped = {group.name: group.reason for group in groups if group.reason}
        self._groups = list(groups)
        if self._level < 1.0:
            self._learning.attend(network, groups)
        else:
            self._learning.stop()


def _fraction_of_loss(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise ConfigurationError.of(_OWNER, "regularization", "a number from 0", value, "write 1e-4")
    return float(value)


def _number_of_batches(argument: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ConfigurationError.of(_OWNER, argument, "a number of batches from 0", value, "write 32")
    return value
