"""Either namespace's Trainer and LightningCLI take StructuralPruning, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

MODULE = """
import sys
import torch
from torch import nn
torch.set_num_threads(1)
{imports}

class Net(L.LightningModule):
    def __init__(self, width: int = 16):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU())
        self.head = nn.Linear(width, 2)
    def forward(self, x):
        return self.head(self.layers(x))
    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])
    def train_dataloader(self):
        data = torch.utils.data.TensorDataset(torch.randn(16, 6), torch.randint(2, (16,)))
        return torch.utils.data.DataLoader(data, batch_size=8)
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)

dense = sum(p.numel() for p in Net().parameters())
"""

TRAINER = """
import lightning_prune
schedule = lightning_prune.Schedule("one_shot", 1, unit="epoch")
budget = lightning_prune.Budget(params=0.5)
callback = lightning_prune.StructuralPruning(budget, schedule=schedule, round_to=1)
net = Net()
L.Trainer(max_epochs=2, accelerator="cpu", logger=False, default_root_dir=sys.argv[1],
          enable_progress_bar=False, enable_model_summary=False, callbacks={callbacks}).fit(net)
file = next(__import__("pathlib").Path(sys.argv[1]).rglob("*.ckpt"))
again = lightning_prune.load_pruned(Net, file)
assert type(again) is Net
assert str(again) == str(net)
print(sum(p.numel() for p in again.parameters()) / dense)
"""

CLI = """
import lightning_prune
from {namespace}.cli import LightningCLI
arguments = ["fit", "--config", sys.argv[2]]
if {named_on_command_line}:
    arguments += ["--trainer.callbacks+=StructuralPruning", "--trainer.callbacks.budget.params=0.5",
                  "--trainer.callbacks.round_to=1", "--trainer.callbacks.schedule.curve=one_shot"]
cli = LightningCLI(Net, args=arguments, save_config_callback=None)
print(sum(p.numel() for p in cli.model.parameters()) / dense)
"""

CONFIG = """
trainer:
  max_epochs: 2
  accelerator: cpu
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  enable_checkpointing: false
"""

CALLBACKS = """
  callbacks:
    - class_path: lightning_prune.StructuralPruning
      init_args:
        budget: {params: 0.5}
        schedule: {curve: one_shot, begin: 1, unit: epoch}
        round_to: 1
"""


def left_by(code: str, *arguments: str) -> float:
    """Run a program, and return the fraction of the parameters that it says is left."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return float(done.stdout.splitlines()[-1])


IMPORTS = {
    "pytorch_lightning": "import pytorch_lightning as L",
    "lightning.pytorch": "import lightning.pytorch as L",
    "prune first, then pytorch_lightning": "import lightning_prune, pytorch_lightning as L",
    "prune first, then lightning.pytorch": "import lightning_prune, lightning.pytorch as L",
}


@pytest.mark.parametrize(
    ("imports", "single"),
    [
        pytest.param(IMPORTS["pytorch_lightning"], True, marks=pytest.mark.slow),
        (IMPORTS["lightning.pytorch"], True),
        (IMPORTS["prune first, then pytorch_lightning"], False),
        pytest.param(IMPORTS["prune first, then lightning.pytorch"], True, marks=pytest.mark.slow),
    ],
    ids=IMPORTS,
)
def test_trainer_takes_the_callback(tmp_path, imports, single):
    callbacks = "callback" if single else "[callback]"
    code = MODULE.format(imports=imports) + TRAINER.format(callbacks=callbacks)
    assert 0.3 < left_by(code, str(tmp_path)) <= 0.5


@pytest.mark.parametrize(
    ("namespace", "on_command_line"),
    [
        pytest.param("pytorch_lightning", True, marks=pytest.mark.slow),
        ("pytorch_lightning", False),
        ("lightning.pytorch", True),
        pytest.param("lightning.pytorch", False, marks=pytest.mark.slow),
    ],
)
def test_cli_takes_the_callback_by_name(tmp_path, namespace, on_command_line):
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG + ("" if on_command_line else CALLBACKS))
    code = MODULE.format(imports=f"import {namespace} as L")
    code += CLI.format(namespace=namespace, named_on_command_line=on_command_line)
    assert 0.3 < left_by(code, str(tmp_path), str(config)) <= 0.5
