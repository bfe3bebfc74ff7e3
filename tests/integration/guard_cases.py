"""A network whose accuracy falls off a cliff, and guarded runs of it, for the tests of AccuracyGuard.

Run as a script it trains in a process of its own, which kills itself (`FOLDER KINDS EPOCH`), or on two ranks,
each of which writes what it ended with (`FOLDER KINDS`).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from magnitude_cases import data, trainer
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import ModelCheckpoint
from structural_cases import Kill, Net
from structural_ddp import digest

from lightning_prune import AccuracyGuard, Budget, MagnitudePruning, Schedule, StructuralPruning


def kept(net: torch.nn.Module) -> float:
    """The part of the dense network's parameters that is there, and not zero."""
    return sum(int((p != 0).sum()) for p in net.parameters()) / sum(p.numel() for p in Net().parameters())


class Cliff(Net):
    """Is right in 9 of 10 cases as long as enough of it is left, else in 5."""

    def __init__(self, need: float = 0.5, optimizer: str = "adamw", seed: int = 0) -> None:
        super().__init__(optimizer, seed)
        self.need = need

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.log("val_acc", self.accuracy())

    def accuracy(self) -> float:
        return 0.9 if kept(self) >= self.need else 0.5


class RanksDisagree(Cliff):
    """Only the first rank notices what is missing."""

    def accuracy(self) -> float:
        return super().accuracy() if self.global_rank == 0 else 0.9


def callbacks(kinds: str, end: int = 5, **guard: Any) -> dict[str, Callback]:
    """Make callbacks in the order of `kinds`: `g` for the guard, `s` and `m` for both kinds of pruning."""
    schedule = Schedule("linear", 0, end, unit="epoch")
    made: dict[str, Callback] = {
        "g": AccuracyGuard(**{"patience": 1, "min_step": 0.05, **guard}),
        "s": StructuralPruning(Budget(params=0.3), schedule=schedule, round_to=1),
        "m": MagnitudePruning(0.8, schedule=schedule),
    }
    return {kind: made[kind] for kind in kinds}


def guarded(folder: Path, kinds: str, ckpt_path: str | None = None, *extra: Callback):
    """Train for ten epochs with a checkpoint after each; a resumed run starts from other weights."""
    made = callbacks(kinds)
    keep = ModelCheckpoint(folder, save_last=True, save_top_k=-1, filename="{epoch}")
    net = Cliff(seed=1 if ckpt_path else 0)
    fit = trainer(folder, *made.values(), keep, *extra, max_epochs=10, enable_checkpointing=True)
    fit.fit(net, data(), data(), ckpt_path=ckpt_path)
    return net, fit, made


def on_two_ranks(folder: Path, kinds: str) -> None:
    made = callbacks(kinds)
    net = RanksDisagree()
    fit = trainer(folder, *made.values(), max_epochs=7, devices=2, strategy="ddp")
    fit.fit(net, data(), data())
    found = {"weights": digest(net), "summary": made["g"].pruning_summary(), "kept": kept(net)}
    (folder / f"rank{fit.global_rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    where, which, *killed = sys.argv[1:]
    if killed:
        guarded(Path(where), which, None, Kill(int(killed[0])))
    else:
        on_two_ranks(Path(where), which)
