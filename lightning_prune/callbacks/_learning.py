"""What structural pruning does in optimizer steps: learn which channels matter, press on the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_prune._lightning import LightningModule, Trainer
from lightning_prune.structure.activations import ACTIVATION_IMPORTANCES, Activity
from lightning_prune.structure.groups import Group
from lightning_prune.structure.importance import GRADIENT_IMPORTANCES, Evidence
from lightning_prune.structure.penalty import Penalty, penalties, press


class Learning:
    """The evidence since the last cut, and the pressure until the next.

    Args:
        importance: The name of the importance.
        regularization: The penalty's weight in the loss; 0 is none.
    """

    def __init__(self, importance: str, regularization: float) -> None:
        self.importance = importance
        self.regularization = regularization
        self.evidence = Evidence()
        self._groups: list[Group] = []
        self._penalties: list[Penalty] = []
        self._activity: Activity | None = None

    @property
    def gathers(self) -> bool:
        """Whether training steps decide the importance, and not the weights alone."""
        return self.importance in GRADIENT_IMPORTANCES or self.importance in ACTIVATION_IMPORTANCES

    def attend(self, network: nn.Module, groups: Sequence[Group]) -> None:
        """Look at the groups of a network from now on."""
        self.stop()
        self._groups = [group for group in groups if not group.reason]
        if self.regularization:
            self._penalties = penalties(network, groups, self.importance)
        if self.importance in ACTIVATION_IMPORTANCES:
            self._activity = Activity(network, self._groups, self.importance)

    def stop(self) -> None:
        """Leave no hook behind."""
        if self._activity is not None:
            self._activity.stop()
        self._groups, self._penalties, self._activity = [], [], None

    def learn(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Take in what the step that is about to be made says; the same on every rank."""
        if optimizer is not trainer.optimizers[0]:
            return
        if self.importance in GRADIENT_IMPORTANCES:  # of gradients that DDP has averaged
            score = GRADIENT_IMPORTANCES[self.importance]
            self.evidence.add({group.name: score(pl_module, group) for group in self._groups})
        elif self._activity is not None:
            self.evidence.add(_over_ranks(trainer, self._activity.take()))

    def press(self, strength: float, optimizer: Any) -> None:
        """Add the penalty to the gradients that an optimizer is about to use."""
        mine = [p for group in optimizer.param_groups for p in group["params"]]
        press(self._penalties, self.regularization * strength, mine)


def _over_ranks(trainer: Trainer, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    strategy = trainer.strategy
    device = strategy.root_device
    return {name: strategy.reduce(score.to(device), reduce_op="mean").cpu() for name, score in scores.items()}
