"""Exchange whole blocks while training: when, state, logging. The algorithm is in `structure`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from torch import nn

from lightning_prune._lightning import LightningModule, Trainer
from lightning_prune.callbacks import _block_table, _clock, _network
from lightning_prune.callbacks._block_scores import Weights, judge
from lightning_prune.callbacks._events import emit
from lightning_prune.callbacks._follow import follow_exchange
from lightning_prune.callbacks._logged import Logged
from lightning_prune.callbacks._preflight import show
from lightning_prune.callbacks._recalibrate import recalibrate_norms
from lightning_prune.callbacks._structure_callback import StructureCallback
from lightning_prune.errors import BudgetError, ConfigurationError
from lightning_prune.schedules import Schedule
from lightning_prune.selection import match_names
from lightning_prune.structure.blocks import REPLACEMENTS, Block, find_blocks, stand_in
from lightning_prune.structure.budget import Budget
from lightning_prune.structure.depth import (
    SCORES,
    Sizes,
    allowed_at,
    foresee_blocks,
    least_useful,
    magnitude,
    measure_blocks,
    unreachable,
    worthwhile,
)
from lightning_prune.structure.distil import set_weights
from lightning_prune.structure.optimizers import Swap
from lightning_prune.structure.plan import Outlook
from lightning_prune.structure.replaced import put

_OWNER = "LayerPruning"
_DEFAULT_SCHEDULE = Schedule("one_shot")
_KINDS = ("params", "macs")


class LayerPruning(StructureCallback):
    """Take out the least useful blocks of a network on a schedule, and let training follow.

    Blocks are found by what they compute: residual modules, through which their input passes on by itself
    (ResNet and inverted residual blocks, transformer layers, your own), and other modules of the same class.
    An `nn.Identity` takes the place of a residual block; where shapes change a convolution of kernel size 1
    does, or a linear layer, fitted to what the block does on calibration batches. Blocks do not overlap; one
    that cannot go (it runs twice, shares weights, returns several tensors, is read by the network) stays and
    is named with its reason. Every exchange is tried on a copy first.

    Depth is what devices pay for most: a block that is gone takes its kernels, memory traffic and
    launches with it, at any width. Optimizers, running averages, DDP, the compiler and checkpoints follow,
    and a resumed run goes on exactly.

    Args:
        budget: How much of the dense network may remain, as `Budget(macs=...)` or `Budget(params=...)`; or a
            whole number: how many blocks go. None is `Budget(macs=0.75)`.
        schedule: When, and how fast. The level is absolute, as in `StructuralPruning`.
        score: Which blocks go first. `"output"`: those whose output what takes their place gets least wrong
            on calibration batches, relatively (see `lightning_prune.structure.distil`); `"magnitude"`: the
            smallest mean absolute weight; `"loss"`: those without which the loss of the module's own
            validation (else training) step rises least.
        replace: `"auto"`: an identity for residual blocks that keep their input's shape, a fitted layer for
            others; `"identity"`: only blocks for which an identity can stand; `"cheaper"`: a fitted layer for
            all.
        include: Globs of the blocks that may go. A module that is named in full, and holds no blocks, is one
            whatever it computes.
        exclude: Globs of blocks that stay.
        calibration_batches: On how many batches of the training data blocks are scored and layers fitted.
        recalibrate: With how many training batches the running statistics of batch normalisation are
            estimated anew after an exchange; 0: they follow training only.
        example_input: As in `StructuralPruning`.

    Raises:
        ConfigurationError: An argument is wrong; what depends on the module, before training starts.

    Example:
        >>> LayerPruning(Budget(params=0.6), score="loss", exclude=["layer1.*"]).score
        'loss'
    """

    def __init__(
        self,
        budget: Budget | int | None = None,
        *,
        schedule: Schedule = _DEFAULT_SCHEDULE,
        score: str = "output",
        replace: str = "auto",
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
        calibration_batches: int = 4,
        recalibrate: int = 0,
        example_input: Any = None,
    ) -> None:
        super().__init__()
        self.budget = _checked_budget(Budget(macs=0.75) if budget is None else budget)
        if not isinstance(schedule, Schedule):
            raise ConfigurationError.of(_OWNER, "schedule", "a Schedule", schedule, "write Schedule(end=0.5)")
        for name, value, known in (("score", score, SCORES), ("replace", replace, REPLACEMENTS)):
            if value not in known:
                raise ConfigurationError.of(_OWNER, name, f"one of {list(known)}", value)
        batches = (("calibration_batches", calibration_batches, 1), ("recalibrate", recalibrate, 0))
        for name, count, least in batches:
            if type(count) is not int or count < least:
                raise ConfigurationError.of(_OWNER, name, f"a whole number of at least {least}", count)
        self.schedule = schedule
        self.score = score
        self.replace = replace
        self.include = [include] if isinstance(include, str) else list(include)
        self.exclude = [exclude] if isinstance(exclude, str) else list(exclude)
        self.calibration_batches = calibration_batches
        self.recalibrate = recalibrate
        self.example_input = example_input
        self._reset()

    # ------------------------------------------------------------------ state

    def _reset(self) -> None:
        super()._reset()
        self._level = 0.0
        self._dense: dict[str, float] = {}
        self._history: list[dict[str, Any]] = []
        self._table: dict[str, dict[str, Any]] = {}
        self._left = Logged("blocks")

    @property
    def level(self) -> float:
        """The level in force, 0 to 1: the part of the way to the budget."""
        return self._level

    @property
    def pruning_finished(self) -> bool:
        """Whether the final level is in force; what `AfterPruning` waits for."""
        return self._level >= 1.0

    def state_dict(self) -> dict[str, Any]:
        """Return level, history, the dense network's costs and what became of each block; plain data only."""
        return {
            "level": self._level,
            "history": [dict(entry) for entry in self._history],
            "dense": dict(self._dense),
            "blocks": {name: dict(entry) for name, entry in self._table.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up where a checkpoint left off; the structure itself comes with the module's own hooks."""
        self._level = float(state_dict["level"])
        self._history = [dict(entry) for entry in state_dict["history"]]
        self._dense = dict(state_dict["dense"])
        self._table = {name: dict(entry) for name, entry in state_dict["blocks"].items()}

    def pruning_summary(self) -> dict[str, Any]:
        """Say what was done so far, as plain data for the report.

        Returns:
            `callback`, `config`, `history` (one entry for each change), `blocks` (for each its parameters and
            MACs before, its score when it was last judged, and what it became), `skipped`
            (`{block: why it stays}`) and `dense` (costs before any change).
        """
        entries = {name: dict(entry) for name, entry in self._table.items()}
        return {
            "callback": type(self).__name__,
            "config": self._config(),
            "history": [dict(entry) for entry in self._history],
            "layers": [],
            "blocks": [{"name": name, **entry} for name, entry in entries.items()],
            "skipped": {name: entry["reason"] for name, entry in entries.items() if entry["reason"]},
            "dense": dict(self._dense),
        }

    def _config(self) -> dict[str, Any]:
        budget = self.budget
        amount = {"blocks": budget} if isinstance(budget, int) else {budget.kind: budget.fraction}
        names = ("score", "replace", "include", "exclude", "calibration_batches", "recalibrate")
        return {
            "budget": amount,
            "schedule": asdict(self.schedule),
            **{name: getattr(self, name) for name in names},
        }

    # ------------------------------------------------------------------ hooks

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the blocks, see whether the budget can be met, and show what it will come to."""
        self._timeline = _clock.plan(trainer, pl_module, self.schedule)
        blocks, sizes = self.look(trainer, pl_module)
        if self.score == "loss" and self._level < 1.0:
            # Refuses steps that tell no loss now, not when the first block is due.
            judge(trainer, pl_module, [], "loss", 1, self._run)
        outlook = self.foresee(pl_module, blocks, sizes)
        if trainer.is_global_zero and trainer.progress_bar_callback is not None:
            show(outlook, blocks, title="Layer pruning", parts="blocks")

    def on_structure_change(self, trainer: Trainer, pl_module: LightningModule, change: Any) -> None:
        """Count anew what remains."""
        if self._example is not None:
            self.survey(pl_module)

    def on_rollback(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take up the structure of an earlier time, as after a resume."""
        self.survey(pl_module)
        self._left.due = True

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show what became of each block, to those who see a progress bar."""
        if trainer.is_global_zero and trainer.progress_bar_callback is not None and self._table:
            _block_table.show(self.pruning_summary(), self._left.values)

    # ------------------------------------------------------------------ blocks

    def look(self, trainer: Trainer, pl_module: LightningModule) -> tuple[list[Block], Sizes]:
        """Find out what the network is run with, then its blocks, and what each would save."""
        self._calls, self._example = _network.find(trainer, pl_module, self.example_input, _OWNER)
        return self.survey(pl_module)

    def foresee(self, pl_module: LightningModule, blocks: Sequence[Block], sizes: Sizes) -> Outlook:
        """Work out what the budget will come to, going by magnitude.

        Raises:
            BudgetError: It cannot be reached.
        """
        scores = {block.name: magnitude(pl_module, block.name) for block in blocks if not block.reason}
        return foresee_blocks(scores, blocks, sizes, self.budget, self._dense)

    def survey(self, pl_module: LightningModule) -> tuple[list[Block], Sizes]:
        """Find the blocks that are left, and what each would save; note what the network is now."""
        assert self._example is not None
        network = _network.traced(pl_module, self._calls)
        named = [pattern for pattern in self.include if pattern in dict(network.named_modules())]
        blocks = find_blocks(
            network, self._example, replacement=self.replace, named=named, choose=self._choose
        )
        gone = [name for name, entry in self._table.items() if entry["became"]]
        if not blocks and not gone:
            raise _no_blocks(pl_module)
        # Whatever else would be taken for a block now that some are gone was none in the dense network.
        blocks = [b for b in blocks if not self._table or (b.name in self._table and b.name not in gone)]
        sizes = measure_blocks(network, blocks, self._example)
        kind = allowed_at(self.budget, dict.fromkeys(("blocks", *_KINDS), 1.0), 1.0)[0]
        blocks = worthwhile(blocks, sizes, kind)
        if not self._dense:
            self._dense = dict(sizes.total)
        for block in blocks:
            entry = self._table.setdefault(block.name, {"score": None, "became": ""})
            entry.update(reason=block.reason, macs=sizes.saved["macs"].get(block.name, 0.0))
            entry.update(params=sizes.saved["params"].get(block.name, 0.0))
        fractions = {k: sizes.total[k] / max(1.0, self._dense[k]) for k in ("blocks", *_KINDS)}
        self._left.values = {"blocks": fractions["blocks"], **{f"blocks_{k}": fractions[k] for k in _KINDS}}
        return blocks, sizes

    def _choose(self, names: Iterable[str]) -> list[str]:
        known = [*names, *(name for name, entry in self._table.items() if entry["became"])]
        return match_names(dict.fromkeys(known), self.include, self.exclude, _OWNER)

    def _run(self, copy: nn.Module) -> Any:
        assert self._example is not None
        return _network.traced(copy, self._calls)(*self._example.args, **self._example.kwargs)

    def _advance(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._timeline is None:
            return
        level = _clock.level(trainer, pl_module, self._timeline, self)
        # What was reached stays reached: a second fit of the same module starts from a small network.
        if level > self._level:
            self._exchange(trainer, pl_module, level)

    def _exchange(self, trainer: Trainer, pl_module: LightningModule, level: float) -> None:
        """Judge on all ranks, decide on rank 0, and exchange the same on all."""
        blocks, sizes = self.survey(pl_module)
        kind, allowed = allowed_at(self.budget, self._dense, level)
        if sizes.total[kind] > allowed:
            scores, weights = judge(
                trainer, pl_module, blocks, self.score, self.calibration_batches, self._run
            )
            names, reached = least_useful(scores, sizes, kind, allowed)
            if reached > allowed:
                raise BudgetError(unreachable(blocks, self.budget, self._dense, kind, reached))
            decision = scores, names, {name: weights[name].cpu() for name in names if name in weights}
            scores, names, weights = trainer.strategy.broadcast(decision)
            for name, value in scores.items():
                self._table[name]["score"] = value
            chosen = [block for block in blocks if block.name in names]
            emit(trainer, "on_before_pruning", pl_module)
            for block in chosen:
                self._table[block.name]["became"] = block.becomes
            follow_exchange(trainer, pl_module, lambda module: _put(module, chosen, weights))
            if self.recalibrate:
                network = _network.traced(pl_module, self._calls)
                recalibrate_norms(trainer, pl_module, network, self._calls, self.recalibrate)
        self._level = level
        when = {"epoch": trainer.current_epoch, "step": trainer.global_step}
        achieved = self._left.values["blocks" if kind == "blocks" else f"blocks_{kind}"]
        target = allowed / max(1.0, self._dense[kind])
        self._history.append({**when, "level": level, "target": target, "achieved": achieved})
        self._left.due = True


def _put(module: nn.Module, blocks: Sequence[Block], weights: Weights) -> Iterator[Swap]:
    for block in blocks:
        layer = stand_in(module, block)
        if block.name in weights:
            set_weights(layer, weights[block.name])
        old = put(module, block.name, layer)
        yield Swap(list(old.parameters()), dict(layer.named_parameters(prefix=block.name)))


def _checked_budget(budget: Any) -> Budget | int:
    if type(budget) is int:
        if budget < 1:
            raise BudgetError.of(_OWNER, "budget", "at least one block to go", budget)
        return budget
    if not isinstance(budget, Budget) or budget.kind not in _KINDS:
        expected = "a Budget in macs or params, or a whole number of blocks"
        raise ConfigurationError.of(_OWNER, "budget", expected, budget, "write Budget(macs=0.75)")
    return budget


def _no_blocks(pl_module: LightningModule) -> ConfigurationError:
    holders = [name for name, child in pl_module.named_modules() if name and len(list(child.children())) > 1]
    return ConfigurationError.of(
        _OWNER,
        "include",
        "the names of modules, for a network without residual blocks",
        "*",
        f"it has {', '.join(holders[:6]) or 'no modules with layers in them'}",
    )
