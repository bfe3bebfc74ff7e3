"""A training on two processes; each rank writes what it ended with. Started by `test_structural_ddp`.

`python structural_ddp.py FOLDER VARIANT`, where the second process is started by Lightning itself.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import pytorch_lightning as pl
import torch
from magnitude_cases import data
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.strategies import DDPStrategy
from structural_cases import Net, macs

from lightning_prune.callbacks.low_rank import LowRank
from lightning_prune.callbacks.magnitude_pruning import MagnitudePruning
from lightning_prune.callbacks.structural_pruning import StructuralPruning
from lightning_prune.schedules import Schedule
from lightning_prune.structure.budget import Budget


def digest(net: torch.nn.Module) -> str:
    tensors = [p.detach() for p in net.parameters()]
    tensors += [b for n, b in net.named_buffers() if "running" not in n]  # each rank has its own statistics
    return digest_of(tensors)


def digest_of(tensors: list[torch.Tensor]) -> str:
    text = b"".join(str(tuple(t.shape)).encode() + t.double().numpy().tobytes() for t in tensors)
    return hashlib.sha256(text).hexdigest()


class Record(Callback):
    def __init__(self) -> None:
        self.rows: list[tuple[int, float, str]] = []
        self.statistics: list[str] = []
        self.evidence: list[str] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 0:
            statistics = [b for n, b in pl_module.named_buffers() if "running" in n]
            self.statistics.append(digest_of(statistics))

    def on_train_epoch_end(self, trainer, pl_module):
        self.rows.append((trainer.current_epoch, macs(pl_module), digest(pl_module)))
        pruning = next(c for c in trainer.callbacks if isinstance(c, StructuralPruning))
        self.evidence.append(digest_of(list(pruning._learning.evidence.totals.values())))


class Unbalanced(Net):
    """Every rank sees data of its own."""

    def training_step(self, batch, batch_idx):
        batch[0] = batch[0] + self.global_rank
        return super().training_step(batch, batch_idx)


class Manual(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


STRATEGIES = {
    "plain": {},
    "find_unused": {"find_unused_parameters": True},
    "static_graph": {"static_graph": True},
    "bucket_view": {"gradient_as_bucket_view": True},
    "manual": {},
    "manual_static": {"static_graph": True},
    "joint": {},
    "importance": {},
    "activation": {},
    "recalibrate": {},
    "low_rank": {},
    "unreachable": {},
}


def main(folder: Path, variant: str) -> None:
    torch.set_num_threads(1)
    record = Record()
    fraction = 0.0001 if variant == "unreachable" else 0.5
    # Activations are there after the first epoch.
    begin = 1 if variant == "activation" else 0
    schedule = Schedule("linear", begin, 2, unit="epoch")
    importance = {"importance": "random", "activation": "activation"}.get(variant, "magnitude")
    callbacks = [
        StructuralPruning(
            Budget(macs=fraction),
            schedule=schedule,
            round_to=1,
            importance=importance,
            recalibrate=2 * (variant == "recalibrate"),
            reconstruct=2 * (variant == "recalibrate"),
        )
    ]
    if variant == "joint":
        callbacks.insert(0, MagnitudePruning(0.6, schedule=schedule))
    if variant == "low_rank":
        callbacks.insert(0, LowRank(ratio=0.7, schedule=Schedule("one_shot", 1, unit="epoch"), round_to=1))
    net = Manual() if variant.startswith("manual") else Unbalanced()
    keep = ModelCheckpoint(folder, save_last=True)
    trainer = pl.Trainer(
        max_epochs=4,
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo", **STRATEGIES[variant]),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*callbacks, record, keep],
        default_root_dir=folder,
    )
    rank = trainer.strategy.cluster_environment.global_rank()
    try:
        trainer.fit(net, data(), data())
    except Exception as error:
        (folder / f"rank{rank}.json").write_text(json.dumps({"error": f"{type(error).__name__}: {error}"}))
        raise SystemExit(3) from error
    wrapped = str(type(trainer.strategy.model).__name__)
    found = {"rows": record.rows, "statistics": record.statistics, "evidence": record.evidence}
    found["wrapped"] = wrapped
    (folder / f"rank{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
