"""Heads that go in training: checkpoints, resume and loading follow the numbers in the user's modules."""

from __future__ import annotations

import pytest
import torch
from magnitude_cases import data, trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from structural_cases import Net, assert_equal_state
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_prune.callbacks.structural_pruning import StructuralPruning
from lightning_prune.loading import load_pruned
from lightning_prune.schedules import Schedule
from lightning_prune.structure.budget import Budget


class Attending(Net):
    """A transformer of two blocks over the rows of an image, by hand and by PyTorch."""

    def __init__(self, optimizer: str = "adamw", seed: int = 0) -> None:
        super().__init__(optimizer, seed)
        for name in ("stem", "a", "b"):
            delattr(self, name)
        self.heads, self.width = 4, 4
        self.embed, self.head = nn.Linear(6, 16), nn.Linear(16, 2)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.squeeze(1))
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, self.width).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, -1)
        return self.head(self.layer(x + self.out(mixed)).mean(1))


def fit(folder, epochs: int, ckpt_path=None, seed: int = 0):
    callbacks = [
        StructuralPruning(Budget(params=0.5), schedule=Schedule("linear", 1, 3, unit="epoch"), round_to=1),
        ModelCheckpoint(folder, save_top_k=-1, filename="{epoch}"),
    ]
    net = Attending(seed=seed)
    run = trainer(folder, *callbacks, max_epochs=epochs, enable_checkpointing=True)
    run.fit(net, data(), data(), ckpt_path=ckpt_path)
    return net


def test_heads_go_in_training_and_a_checkpoint_brings_them_back(tmp_path):
    net = fit(tmp_path / "a", 5)
    parameters = sum(p.numel() for p in net.parameters())
    assert parameters <= 0.5 * sum(p.numel() for p in Attending().parameters())
    assert net.heads < 4 or net.layer.self_attn.num_heads < 4
    assert net.qkv.out_features == 3 * net.heads * net.width
    x = torch.rand(3, 1, 6, 6)
    loaded = load_pruned(Attending, tmp_path / "a" / "epoch=4.ckpt", seed=1)
    assert loaded.heads == net.heads
    torch.testing.assert_close(loaded.eval()(x), net.eval()(x), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning")
def test_resume_is_exact(tmp_path):
    whole = fit(tmp_path / "a", 5)
    resumed = fit(tmp_path / "a", 5, ckpt_path=tmp_path / "a" / "epoch=1.ckpt", seed=1)
    assert_equal_state(whole.state_dict(), resumed.state_dict())
