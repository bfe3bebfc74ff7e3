"""A run that is killed and resumed ends exactly where the run that was never interrupted ends."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from magnitude_cases import LIGHTNING_WARNINGS, Net, data, selected, trainer, zeros
from processes import run_python
from pytorch_lightning.callbacks import ModelCheckpoint

from lightning_prune.callbacks.magnitude_pruning import MagnitudePruning
from lightning_prune.errors import CheckpointError
from lightning_prune.schedules import Schedule

pytestmark = LIGHTNING_WARNINGS

SCRIPT = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import torch
torch.set_num_threads(1)
from magnitude_cases import Net, data, trainer
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import ModelCheckpoint
from lightning_prune.callbacks.magnitude_pruning import MagnitudePruning
from lightning_prune.schedules import Schedule

class Kill(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch == 2 and batch_idx == 3:
            os.kill(os.getpid(), signal.SIGKILL)

out, optimizer, scope, end = sys.argv[2:6]
pruning = MagnitudePruning(0.8, schedule=Schedule("cubic", 0, int(end), unit="epoch"), scope=scope)
keep = ModelCheckpoint(out, save_last=True)
run = trainer(out, pruning, keep, Kill(), max_epochs=6, enable_checkpointing=True)
run.fit(Net(optimizer), data(), data())
"""


# Killed in epoch 2, while the level still rises and when nothing but the stored masks can keep the zeros.
@pytest.mark.parametrize(("scope", "end"), [("global", 4), ("layer", 1)], ids=["rising", "finished"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_resume_after_kill_gives_the_same_weights(tmp_path, optimizer, scope, end):
    def run(folder: Path, ckpt_path: str | None = None):
        pruning = MagnitudePruning(0.8, schedule=Schedule("cubic", 0, end, unit="epoch"), scope=scope)
        keep = ModelCheckpoint(folder, save_last=True)
        # A resumed run starts from another initialization: all that counts is in the checkpoint.
        net = Net(optimizer, seed=1 if ckpt_path else 0)
        fit = trainer(folder, pruning, keep, max_epochs=6, enable_checkpointing=True)
        fit.fit(net, data(), data(), ckpt_path=ckpt_path)
        return net, fit.optimizers[0].state_dict(), pruning

    arguments = [str(Path(__file__).parent), str(tmp_path / "killed"), optimizer, scope, str(end)]
    killed = run_python("-c", SCRIPT, *arguments)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    last = tmp_path / "killed" / "last.ckpt"
    assert torch.load(last, weights_only=True)["epoch"] == 1

    whole, whole_optimizer, whole_pruning = run(tmp_path / "whole")
    resumed, resumed_optimizer, resumed_pruning = run(tmp_path / "killed", str(last))

    for (name, a), (_, b) in zip(whole.state_dict().items(), resumed.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    flat_a, spec_a = torch.utils._pytree.tree_flatten(whole_optimizer)
    flat_b, spec_b = torch.utils._pytree.tree_flatten(resumed_optimizer)
    assert spec_a == spec_b
    for a, b in zip(flat_a, flat_b, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    assert whole_pruning.masks.keys() == resumed_pruning.masks.keys()
    assert all(torch.equal(whole_pruning.masks[n], resumed_pruning.masks[n]) for n in whole_pruning.masks)
    assert whole_pruning.pruning_summary() == resumed_pruning.pruning_summary()
    assert zeros(resumed) == 768


def resume(tmp_path, net, pruning):
    keep = ModelCheckpoint(tmp_path, save_last=True)
    run = trainer(tmp_path, pruning, keep, max_epochs=2, enable_checkpointing=True)
    run.fit(net, data(), ckpt_path=tmp_path / "edited.ckpt")


def test_callback_state_survives_a_checkpoint_that_refuses_pickles(tmp_path):
    pruning = MagnitudePruning(0.8, schedule=Schedule("one_shot"))
    net = Net()
    trainer(tmp_path, pruning).fit(net, data())
    torch.save(pruning.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    # One bit a weight: 72, 864 and 24 weights.
    assert [packed.numel() for packed in state["masks"].values()] == [9, 108, 3]
    fresh = MagnitudePruning(0.8, schedule=Schedule("one_shot"))
    fresh.load_state_dict(state)
    again = fresh.state_dict()
    assert again["level"] == state["level"] == 1.0
    assert again["history"] == state["history"]
    assert all(torch.equal(again["masks"][name], state["masks"][name]) for name in state["masks"])


def test_masks_are_not_derived_from_zeros(tmp_path):
    """A weight that is zero by chance and not masked must be free to learn after a resume."""
    pruning = MagnitudePruning(0.5, schedule=Schedule("one_shot"), exclude=["head"])
    keep = ModelCheckpoint(tmp_path, save_last=True)
    trainer(tmp_path, pruning, keep, max_epochs=1, enable_checkpointing=True).fit(Net(), data())
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    key = next(k for k in saved["callbacks"] if k.startswith("MagnitudePruning"))
    packed = saved["callbacks"][key]["masks"]["stem.0.weight"]
    from lightning_prune.sparsity.masks import unpack

    mask = unpack(packed, torch.zeros(8, 1, 3, 3))
    free = mask.flatten().nonzero()[0, 0]
    saved["state_dict"]["stem.0.weight"].view(-1)[free] = 0.0
    torch.save(saved, tmp_path / "edited.ckpt")
    net = Net(seed=5)
    pruning = MagnitudePruning(0.5, schedule=Schedule("one_shot"), exclude=["head"])
    resume(tmp_path, net, pruning)
    assert float(net.stem[0].weight.detach().flatten()[free]) != 0.0
    assert int((net.stem[0].weight == 0).sum() + (net.body[0].weight == 0).sum()) == 468


def test_a_mask_of_another_shape_is_refused(tmp_path):
    pruning = MagnitudePruning(0.5, schedule=Schedule("one_shot"))
    keep = ModelCheckpoint(tmp_path, save_last=True)
    trainer(tmp_path, pruning, keep, max_epochs=1, enable_checkpointing=True).fit(Net(), data())
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    key = next(k for k in saved["callbacks"] if k.startswith("MagnitudePruning"))
    saved["callbacks"][key]["masks"]["stem.0.weight"] = torch.zeros(3, dtype=torch.uint8)
    torch.save(saved, tmp_path / "edited.ckpt")
    with pytest.raises(CheckpointError, match=r"stem\.0\.weight"):
        resume(tmp_path, Net(), MagnitudePruning(0.5, schedule=Schedule("one_shot")))


def test_weights_of_any_checkpoint_load_into_the_plain_module(tmp_path):
    keep = ModelCheckpoint(tmp_path, save_last=True)
    net = Net()
    trainer(tmp_path, MagnitudePruning(0.8), keep, enable_checkpointing=True).fit(net, data())
    plain = Net.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    pairs = zip(selected(net).values(), selected(plain).values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert zeros(plain) == 768
