"""Factor layers while training: when, state, logging. The algorithm is in `lightning_prune.structure`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from lightning_prune._lightning import LightningModule, Trainer
from lightning_prune.callbacks import _clock, _network
from lightning_prune.callbacks._events import decided, emit
from lightning_prune.callbacks._follow import follow_exchange
from lightning_prune.callbacks._logged import Logged
from lightning_prune.callbacks._low_rank_table import show
from lightning_prune.callbacks._structure_callback import StructureCallback
from lightning_prune.deploy.calls import explicit_call
from lightning_prune.errors import ConfigurationError
from lightning_prune.schedules import Schedule
from lightning_prune.structure.budget import Budget
from lightning_prune.structure.factoring import factors_of, put_factors
from lightning_prune.structure.low_rank_plan import OWNER, Prospect, Row, chooser, costs, propose, survey
from lightning_prune.structure.ranks import Wish

_DEFAULT_SCHEDULE = Schedule("one_shot", begin=0.3)


class LowRank(StructureCallback):
    """Put products of smaller layers in the place of layers, once, and let training go on with them.

    A linear layer and a 1x1 convolution become two (truncated SVD), a convolution becomes three (Tucker-2: a
    1x1 convolution, a core, a 1x1 convolution), at the old layer's place and with its bias. They are plain
    layers of torch, so that whatever comes after, structural and magnitude pruning, quantization and export,
    treats them like any other. Optimizers (momenta and second moments are carried over), running averages,
    DDP, the compiler and checkpoints follow. A layer that would not take fewer multiply-accumulates and fewer
    weights stays as it is, as do layers that are grouped, shared, parametrized or not merely called; a table
    says so.

    Exactly one of `budget`, `ratio` and `energy` says how small; none of them means `Budget(macs=0.5)`.

    Args:
        budget: How much of the dense network may remain, in `macs` or `params`; ranks are spread over the
            layers so that the least is lost.
        ratio: Ranks as a fraction of the largest possible, the same for every layer.
        energy: The fraction of the sum of squares of its weight that each layer keeps.
        schedule: When; its curve must be `"one_shot"`.
        include: Globs of the layers that may be factored.
        exclude: Globs of layers that stay as they are.
        round_to: Ranks are multiples of this. `"auto"`: of 16, 8 or 4, the largest that leaves a choice.
        example_input: What the network is run with to see what layers cost: a shape (`[1, 3, 32, 32]`) or
            tensors; by default the module's `example_input_array`, or what its own step passes to it.

    Raises:
        ConfigurationError: An argument is wrong; what depends on the module, before training starts.

    Example:
        >>> LowRank(ratio=0.25, exclude=["stem"]).wish.ratio
        0.25
    """

    divisible = False
    """Whether there are levels between 0 and 1; what `AccuracyGuard` asks."""

    def __init__(
        self,
        budget: Budget | None = None,
        *,
        ratio: float | None = None,
        energy: float | None = None,
        schedule: Schedule = _DEFAULT_SCHEDULE,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        round_to: int | str = "auto",
        example_input: Any = None,
    ) -> None:
        super().__init__()
        if not isinstance(schedule, Schedule) or schedule.curve != "one_shot":
            expected = "a Schedule whose curve is 'one_shot'"
            remedy = "write Schedule('one_shot', begin=0.3)"
            raise ConfigurationError.of(OWNER, "schedule", expected, schedule, remedy)
        self.budget = budget
        self.ratio = ratio
        self.energy = energy
        self.schedule = schedule
        self.include = [include] if isinstance(include, str) else list(include)
        self.exclude = [exclude] if isinstance(exclude, str) else list(exclude)
        self.round_to = round_to
        self.example_input = example_input
        _ = self.wish
        self._reset()

    @property
    def wish(self) -> Wish:
        """What is asked, without the schedule."""
        return _wish(self.budget, self.ratio, self.energy, self.round_to)

    # ------------------------------------------------------------------ state

    def _reset(self) -> None:
        super()._reset()
        self._finished = False
        self._dense: dict[str, float] | None = None
        self._rows: list[Row] = []
        self._history: list[dict[str, Any]] = []
        self._left = Logged("low_rank_macs")

    @property
    def level(self) -> float:
        """How far it is: 1 when the layers have been factored, 0 before."""
        return float(self._finished)

    @property
    def pruning_finished(self) -> bool:
        """Whether the layers have been factored; what `AfterPruning` waits for."""
        return self._finished

    def state_dict(self) -> dict[str, Any]:
        """Return whether it is done, what became of each layer, and the dense network's costs; plain data."""
        return {
            "finished": self._finished,
            "dense": None if self._dense is None else dict(self._dense),
            "left": dict(self._left.values),
            "rows": [_plain(row) for row in self._rows],
            "history": [dict(entry) for entry in self._history],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up where a checkpoint left off; the layers themselves come with the module's own hooks."""
        self._finished = bool(state_dict["finished"])
        self._dense = None if state_dict["dense"] is None else dict(state_dict["dense"])
        self._left.values = dict(state_dict["left"])
        self._rows = [_row(entry) for entry in state_dict["rows"]]
        self._history = [dict(entry) for entry in state_dict["history"]]

    def pruning_summary(self) -> dict[str, Any]:
        """Say what was done so far, as plain data for the report.

        Returns:
            `callback`, `config`, `history` (one entry when it is done), `layers` (ranks and MACs of each
            factored layer), `skipped` (`{layer: why it was left intact}`) and `dense` (costs before).
        """
        wish = asdict(self.wish)
        wish["budget"] = (
            None if self.wish.budget is None else {self.wish.budget.kind: self.wish.budget.fraction}
        )
        lists = {"include": list(self.include), "exclude": list(self.exclude)}
        done = [row for row in self._rows if self._finished]
        return {
            "callback": type(self).__name__,
            "config": {**wish, "schedule": asdict(self.schedule), **lists},
            "history": [dict(entry) for entry in self._history],
            "layers": [_plain(row) for row in done if row.ranks is not None],
            "skipped": {row.name: row.reason for row in done if row.reason},
            "dense": dict(self._dense or {}),
        }

    # ------------------------------------------------------------------ hooks

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See which layers can be factored and whether that is enough, and show what it will come to."""
        self._timeline = _clock.plan(trainer, pl_module, self.schedule)
        self._calls, self._example = _network.find(trainer, pl_module, self.example_input, OWNER)
        if self._finished:
            return
        self._refuse_late(trainer, pl_module)
        network = _network.traced(pl_module, self._calls)
        layers = survey(network, self._example, chooser(self.include, self.exclude))
        if self._dense is None:
            self._dense = costs(network, self._example)
        prospect = propose(network, layers, self.wish, self._example, self._dense)
        if not prospect.ranks:
            why = "; ".join(f"{row.name} ({row.reason})" for row in prospect.rows[:6])
            remedy = "nothing would be factored; ask for smaller ranks, or leave the callback out"
            raise ConfigurationError.of(OWNER, *_asked(self.wish), f"{self.wish}: {why}", remedy)
        if trainer.is_global_zero and trainer.progress_bar_callback is not None:
            show(prospect)

    def on_rollback(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on from the earlier state that a guard has put back; `load_state_dict` has told which."""
        self._left.due = True

    # ------------------------------------------------------------------ factoring

    def _refuse_late(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse to factor weights that another callback has zeroed or wants back."""
        for place, callback in enumerate(trainer.callbacks):  # type: ignore[attr-defined]
            if not hasattr(callback, "masks"):
                continue
            # Of two with an event at the same time, the one that is listed first has it first.
            later = place > trainer.callbacks.index(self)  # type: ignore[attr-defined]
            if callback.masks or self._level_then(trainer, pl_module, callback.schedule, later) > 0:
                problem = f"{type(callback).__name__} zeroes weights before {OWNER} would factor them"
                raise ConfigurationError(
                    f"{OWNER}: {problem}, and a product has no zeros. Begin LowRank's schedule earlier, or "
                    f"{type(callback).__name__}'s later."
                )
            if getattr(callback.training, "rewind_to", None) is not None:
                raise ConfigurationError(
                    f"{OWNER}: {type(callback).__name__} rewinds to weights of layers that will be gone. "
                    "Leave out `rewind_to`, or LowRank."
                )

    def _level_then(
        self, trainer: Trainer, pl_module: LightningModule, schedule: Schedule, later: bool
    ) -> float:
        """Which level another schedule has when it is this one's turn."""
        assert self._timeline is not None
        other = _clock.plan(trainer, pl_module, schedule)
        epochs, steps = _clock.training_length(trainer, pl_module)
        lengths = {"epoch": epochs or 1, "step": steps or 1}
        time = self._timeline.begin * lengths[other.interval] // lengths[self._timeline.interval]
        return other.level_at(time - 1 if later else time)

    def _advance(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._timeline is None or self._finished:
            return
        if _clock.level(trainer, pl_module, self._timeline, self) < 1.0 or self._finished:
            return  # asking may have taken the training back, or forward, to another state
        assert self._example is not None
        assert self._dense is not None
        rows, factors = self._decide(trainer, pl_module)
        self._rows = [_row(entry) for entry in rows]
        emit(trainer, "on_before_pruning", pl_module)
        self._finished = True  # before the others are told, who may ask
        with torch.no_grad():
            follow_exchange(trainer, pl_module, lambda m: put_factors(m, factors, again=m is not pl_module))
        network = _network.traced(pl_module, self._calls)
        after = costs(network, self._example)
        left = {kind: after[kind] / max(1.0, self._dense[kind]) for kind in after}
        self._left.values = {f"low_rank_{kind}": fraction for kind, fraction in left.items()}
        self._left.due = True
        kind = self.wish.budget.kind if self.wish.budget is not None else "macs"
        target = None if self.wish.budget is None else self.wish.budget.fraction
        when = {"epoch": trainer.current_epoch, "step": trainer.global_step}
        self._history.append({**when, "level": 1.0, "target": target, "achieved": left[kind]})

    def _decide(self, trainer: Trainer, pl_module: LightningModule) -> Any:
        """Choose ranks and factor on rank 0, so that all ranks go on with the same."""
        example = self._example
        assert example is not None

        def make() -> Any:
            network = _network.traced(pl_module, self._calls)
            # The layers may have become narrower since the fit began.
            layers = survey(network, example, chooser(self.include, self.exclude))
            prospect = propose(network, layers, self.wish, example, self._dense)
            factors = factors_of(network, prospect.ranks)
            cpu = {name: [f.cpu() for f in given] for name, given in factors.items()}
            return [_plain(row) for row in prospect.rows], cpu

        return decided(trainer, make)


def low_rank(
    module: nn.Module,
    example_input: Any,
    budget: Budget | None = None,
    *,
    ratio: float | None = None,
    energy: float | None = None,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    round_to: int | str = "auto",
) -> Prospect:
    """Put products of smaller layers in the place of a network's layers, in place, without a Trainer.

    Args:
        module: Any network.
        example_input: A shape (`[1, 3, 32, 32]`), a tensor, a tuple of tensors, or keyword arguments in a
            dict.
        budget: See `LowRank`.
        ratio: See `LowRank`.
        energy: See `LowRank`.
        include: See `LowRank`.
        exclude: See `LowRank`.
        round_to: See `LowRank`.

    Returns:
        What became of each layer, and the costs before and after.

    Raises:
        ConfigurationError: An argument is wrong, or the budget cannot be reached.

    Example:
        >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        >>> low_rank(net, [1, 64], ratio=0.25, exclude=["2"]).ranks
        {'0': (16, 16)}
        >>> net[0]
        Sequential(
          (0): Linear(in_features=64, out_features=16, bias=False)
          (1): Linear(in_features=16, out_features=64, bias=True)
        )
    """
    wish = _wish(budget, ratio, energy, round_to, "low_rank")
    like = next(iter(module.parameters()), torch.empty(0))
    example = _network.example(*explicit_call(example_input, like.device, like.dtype))
    layers = survey(module, example, chooser(include, exclude))
    prospect = propose(module, layers, wish, example)
    with torch.no_grad():
        put_factors(module, factors_of(module, prospect.ranks))
    return prospect


def _wish(
    budget: Budget | None, ratio: float | None, energy: float | None, round_to: int | str, owner: str = OWNER
) -> Wish:
    # Not a default argument: LightningCLI would merge it with the budget in a configuration file.
    nothing = budget is None and ratio is None and energy is None
    wish = Wish(Budget(macs=0.5) if nothing else budget, ratio, energy, round_to)
    wish.check(owner)
    return wish


def _asked(wish: Wish) -> tuple[str, str]:
    name = next(n for n in ("budget", "ratio", "energy") if getattr(wish, n) is not None)
    return name, "such that a layer becomes cheaper"


def _plain(row: Row) -> dict[str, Any]:
    return {**asdict(row), "ranks": None if row.ranks is None else list(row.ranks)}


def _row(entry: Mapping[str, Any]) -> Row:
    ranks = None if entry["ranks"] is None else (int(entry["ranks"][0]), int(entry["ranks"][1]))
    return Row(**{**entry, "ranks": ranks})
