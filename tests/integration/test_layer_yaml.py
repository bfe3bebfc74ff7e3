"""LayerPruning from YAML, with both namespaces of LightningCLI and with the command, each in a process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from processes import run_python

MODULE = """
import torch
from torch import nn
{imports}
torch.set_num_threads(1)

class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
    def forward(self, x):
        return x + self.inner(x)

class Net(L.LightningModule):
    def __init__(self, width: int = 8):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, width), *(Block(width) for _ in range(4)))
        self.head = nn.Linear(width, 2)
    def forward(self, x):
        return self.head(self.layers(x))
    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])
    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))
    def train_dataloader(self):
        data = torch.utils.data.TensorDataset(torch.randn(16, 6), torch.randint(2, (16,)))
        return torch.utils.data.DataLoader(data, batch_size=8)
    val_dataloader = train_dataloader
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)
"""

CONFIG = """
trainer:
  accelerator: cpu
  max_epochs: 2
  logger: false
  enable_progress_bar: {bar}
  enable_model_summary: false
  default_root_dir: .
  callbacks:
    - class_path: lightning_prune.LayerPruning
      init_args:
        budget: {budget}
        schedule: {{curve: one_shot, begin: 1, unit: epoch}}
        score: loss
        exclude: [layers.1]
"""

CLI = """
import os, sys
sys.path.insert(0, os.getcwd())
import lightning_prune
from net import Net
from {namespace}.cli import LightningCLI
def cli(*words):
    return LightningCLI(Net, args=list(words), save_config_callback=None)
done = cli("fit", "--config", "config.yaml")
kinds = [type(layer).__name__ for layer in done.model.layers]
assert kinds.count("Identity") == 2 and kinds[1] == "Block", kinds
path = next(__import__("pathlib").Path(".").rglob("*.ckpt"))
for command in ("validate", "fit"):
    again = cli(command, "--config", "config.yaml", "--ckpt_path", str(path))
    assert str(again.model) == str(done.model)
module = lightning_prune.load_pruned(Net, path)
assert type(module.layers[1]).__name__ == "Block"
print("all of it held")
"""


def write(folder, imports, budget, bar="false"):
    (folder / "net.py").write_text(MODULE.format(imports=imports))
    (folder / "config.yaml").write_text(CONFIG.format(budget=budget, bar=bar))


def command(folder, *words):
    done = run_python("-m", "lightning_prune", *words, cwd=folder, env={"COLUMNS": "120"})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def run(folder, *line):
    env = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    done = subprocess.run([sys.executable, *line], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize(
    ("namespace", "imports", "budget"),
    [
        ("pytorch_lightning", "import pytorch_lightning as L", "2"),
        ("lightning.pytorch", "import lightning.pytorch as L", "{params: 0.6}"),
    ],
)
def test_a_config_trains_validates_and_resumes(tmp_path, namespace, imports, budget):
    write(tmp_path, imports, budget)
    assert "all of it held" in run(tmp_path, "-W", "ignore", "-c", CLI.format(namespace=namespace))


def test_inspect_lists_the_blocks_and_the_fit_ends_with_what_became_of_them(tmp_path):
    write(tmp_path, "import pytorch_lightning as L", "{macs: 0.5}", bar="true")
    config = (tmp_path / "config.yaml").read_text() + "model: net.Net\n"
    (tmp_path / "config.yaml").write_text(config)
    shown = command(tmp_path, "inspect", "--config", "config.yaml")
    for words in ("Blocks", "layers.1", "it is not selected", "identity", "Layer pruning, before training"):
        assert words in shown
    ended = command(tmp_path, "fit", "--config", "config.yaml")
    for words in ("smallest possible", "1 of 4 blocks stay intact", "stays (it is not selected)", "of dense"):
        assert words in ended


def test_the_command_writes_a_state_dict_that_plain_torch_loads(tmp_path):
    write(tmp_path, "import pytorch_lightning as L", "2")
    with (tmp_path / "config.yaml").open("a") as config:
        config.write("model: net.Net\n")
    command(tmp_path, "fit", "--config", "config.yaml")
    (path,) = (str(found) for found in tmp_path.rglob("*.ckpt"))
    words = ("export", "--config", "config.yaml", "--ckpt_path", path, "--state_dict", "small.pt")
    assert "small.pt" in command(tmp_path, *words)
    program = (
        "import torch; from net import Net; from small import load\n"
        f"there = torch.load({path!r}, weights_only=True)['state_dict']\n"
        "here = load(Net()).state_dict()\n"
        "assert there.keys() == here.keys() and all(torch.equal(there[k], here[k]) for k in there)\n"
    )
    run(tmp_path, "-c", program)
