"""All arguments of MagnitudePruning from YAML, and back."""

from __future__ import annotations

import sys

import pytest
import yaml
from magnitude_cases import LIGHTNING_WARNINGS, Net
from pytorch_lightning.cli import LightningCLI

from lightning_prune.callbacks.after_pruning import AfterPruning
from lightning_prune.callbacks.magnitude_pruning import MagnitudePruning
from lightning_prune.schedules import Schedule
from lightning_prune.sparsity import criteria
from lightning_prune.sparsity.training import SparseTraining

pytestmark = [
    *LIGHTNING_WARNINGS,
    # Lightning 2.6 uses methods of jsonargparse that are deprecated there.
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
]

CONFIG = """
seed_everything: 1
trainer:
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  enable_model_summary: false
  enable_progress_bar: false
  callbacks:
    - class_path: lightning_prune.callbacks.magnitude_pruning.MagnitudePruning
      init_args:
        sparsity: {"stem.*": 0.3, "*": 0.85}
        schedule: {curve: linear, begin: 1, end: 3, unit: epoch, frequency: 2}
        criterion: lightning_prune.sparsity.criteria:taylor
        pattern: "2:4"
        exclude: [head]
        training: {mask_gradients: true, rewind_to: 1}
    - class_path: lightning_prune.callbacks.magnitude_pruning.MagnitudePruning
      init_args: {sparsity: 0.5, include: [head], threshold: 0.01, scope: layer}
    - lightning_prune.callbacks.after_pruning.AfterPruning
"""


def read(path) -> LightningCLI:
    return LightningCLI(Net, run=False, args=["--config", str(path)], save_config_callback=None)


@pytest.fixture(autouse=True)
def _no_arguments(monkeypatch):
    # LightningCLI warns when pytest's own command line is there as well.
    monkeypatch.setattr(sys, "argv", ["test"])


@pytest.mark.parametrize("again", [False, True], ids=["written", "printed"])
def test_every_argument_can_be_given_in_yaml(tmp_path, again):
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    if again:
        cli = read(path)
        path.write_text(cli.parser.dump(cli.config, skip_none=False))
        assert yaml.safe_load(path.read_text())["trainer"]["callbacks"][0]["init_args"]["pattern"] == "2:4"
    found = [c for c in read(path).trainer.callbacks if isinstance(c, (MagnitudePruning, AfterPruning))]
    first, second, third = found
    assert first.sparsity == {"stem.*": 0.3, "*": 0.85}
    assert list(first.sparsity) == ["stem.*", "*"]
    assert first.schedule == Schedule("linear", 1, 3, "epoch", frequency=2)
    assert criteria.resolve(first.criterion, "Test") is criteria.taylor
    assert (first.pattern, first.include, first.exclude) == ("2:4", ["*"], ["head"])
    assert first.training == SparseTraining(mask_gradients=True, rewind_to=1)
    assert (second.sparsity, second.include, second.threshold, second.scope) == (0.5, ["head"], 0.01, "layer")
    assert third.callbacks == ["EarlyStopping", "ModelCheckpoint"]
