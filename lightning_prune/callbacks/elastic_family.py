"""Keep networks of several sizes along the way of one fit, for `EdgeExport` to write."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from torch import nn

from lightning_prune._lightning import Callback, LightningModule, Trainer
from lightning_prune.callbacks import _clock, _network
from lightning_prune.cost import count_macs
from lightning_prune.errors import ConfigurationError, near_matches
from lightning_prune.exporting import dense_of, take_baseline
from lightning_prune.structure import manifest
from lightning_prune.structure.costs import Example

_OWNER = "ElasticFamily"
_COSTS = ("macs", "latency")


class ElasticFamily(Callback):
    """Keep the network at several sizes while pruning makes it smaller, and let `EdgeExport` write them all.

    For each level, the first network with at most that fraction of the dense network's cost is kept just
    before it is made smaller still, so after all the training it got at that size: give the pruning
    callback's schedule a `frequency` of some epochs. `EdgeExport` then exports, quantizes, evaluates and
    times the dense network, each of these (as `elastic-70`, ...) and the last one, draws the Pareto front,
    and leaves `elastic.json` and `elastic.py`, with which `lightning_prune.runtime.ElasticSession` switches
    between them on the device. What is kept travels in checkpoints.

    Args:
        levels: Fractions of what the dense network costs, between 0 and 1.
        cost: In what: `"macs"`, multiply-accumulates; or `"latency"`, as the `StructuralPruning` beside it
            knows it, whose budget must be one of latency then.
        example_input: What the network is run with to count MACs; see `StructuralPruning`.

    Raises:
        ConfigurationError: A level is out of range, or nothing beside it knows latencies.

    Example:
        >>> ElasticFamily([0.7, 0.5]).levels
        [0.7, 0.5]
    """

    def __init__(
        self, levels: Sequence[float] = (0.7, 0.5), *, cost: str = "macs", example_input: Any = None
    ) -> None:
        super().__init__()
        fine = isinstance(levels, (list, tuple)) and levels
        if not fine or not all(isinstance(v, float) and 0 < v < 1 for v in levels):
            expected = "a list of fractions between 0 and 1"
            raise ConfigurationError.of(_OWNER, "levels", expected, levels, "write [0.7, 0.5]")
        if cost not in _COSTS:
            raise ConfigurationError.of(
                _OWNER, "cost", f"of {list(_COSTS)}", cost, near_matches(cost, _COSTS)
            )
        self.levels = sorted(set(levels), reverse=True)
        self.cost = cost
        self.example_input = example_input
        self._reset()

    def _reset(self) -> None:
        self._members: dict[str, dict[str, Any]] = {}
        self._dense: float | None = None
        self._calls: dict[str, Any] | None = None
        self._example: Example | None = None
        self._module: weakref.ref[nn.Module] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to a running fit, so that the callback can be copied and pickled."""
        return {**self.__dict__, "_module": None, "_example": None, "_calls": None}

    def networks(self, module: Any) -> dict[str, Any]:
        """Make the networks that were kept, but for one that has become the last.

        Args:
            module: The module as it is now; it stays as it is.

        Returns:
            Copies of it by name, the largest first.
        """
        return {
            name: dense_of(module, kept)
            for name, kept in self._members.items()
            if manifest.differs(module, kept["structure"])
        }

    def state_dict(self) -> dict[str, Any]:
        """Return the dense cost and the networks that were kept, as tensors and plain values."""
        return {"dense": self._dense, "members": dict(self._members)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self._dense = state_dict["dense"]
        self._members = dict(state_dict["members"])

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start anew with another module, and refuse levels of latency that nobody knows."""
        if self._module is None or self._module() is not pl_module:
            self._reset()
            self._module = weakref.ref(pl_module)
        if stage == "fit" and self.cost == "latency" and self._timed(trainer) is None:
            expected = "'macs' unless a StructuralPruning beside it has a budget of latency"
            remedy = "give that one Budget(latency=...), a little below the smallest level"
            raise ConfigurationError.of(_OWNER, "cost", expected, self.cost, remedy)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count what the dense network costs."""
        if self.cost == "latency":
            return
        _clock.training_length(trainer, pl_module)  # which loads the data, of which a batch is looked at
        self._calls, self._example = _network.find(trainer, pl_module, self.example_input, _OWNER)
        if self._dense is None:
            self._dense = self._macs(pl_module)

    def on_before_pruning(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the network if it is the first of one of the levels."""
        fraction = self._fraction(trainer, pl_module)
        met = [level for level in self.levels if fraction <= level]
        if not met or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        name = f"elastic-{100 * met[-1]:02.0f}"
        if name not in self._members:
            kept = take_baseline(pl_module, trainer.current_epoch, trainer.global_step)
            self._members[name] = {**kept, self.cost: fraction}

    def _fraction(self, trainer: Trainer, pl_module: LightningModule) -> float:
        if self.cost == "latency":
            return float(self._timed(trainer).latency_left)
        assert self._dense is not None
        return self._macs(pl_module) / self._dense

    def _timed(self, trainer: Trainer) -> Any:
        """The callback that knows how long the network takes, or None."""
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if getattr(callback, "latency_left", None) is not None:
                return callback
        return None

    def _macs(self, pl_module: LightningModule) -> float:
        assert self._example is not None
        return float(count_macs(_network.traced(pl_module, self._calls), *self._example.single))
