"""When events fall, in every way to say how long a training is."""

from __future__ import annotations

import pytest
from magnitude_cases import LIGHTNING_WARNINGS, Net, TwoOptimizers, data, trainer, zeros
from torch.utils.data import DataLoader, IterableDataset

from lightning_prune.callbacks.magnitude_pruning import MagnitudePruning
from lightning_prune.errors import ScheduleError
from lightning_prune.schedules import Schedule

pytestmark = LIGHTNING_WARNINGS


class Stream(IterableDataset):
    """The same batches without a length."""

    def __iter__(self):
        yield from data().dataset


def stream() -> DataLoader:
    return DataLoader(Stream(), batch_size=8)


BY_EPOCH = Schedule("linear", 0, 0.5)
BY_STEP = Schedule("linear", 0, 0.5, interval="step")


# An epoch has 8 batches.
@pytest.mark.parametrize(
    ("schedule", "options", "loader", "events"),
    [
        (BY_EPOCH, {"max_epochs": 4}, data, [(1, 8), (2, 16)]),
        (BY_EPOCH, {"max_steps": 32, "max_epochs": -1}, data, [(1, 8), (2, 16)]),
        (BY_EPOCH, {"max_steps": 30, "max_epochs": 9}, data, [(1, 8), (2, 16)]),
        (BY_EPOCH, {"max_epochs": 4, "accumulate_grad_batches": 3}, data, [(1, 3), (2, 6)]),
        (BY_EPOCH, {"max_epochs": 4, "limit_train_batches": 2}, data, [(1, 2), (2, 4)]),
        (BY_EPOCH, {"max_epochs": 4}, stream, [(1, 8), (2, 16)]),
        (BY_STEP, {"max_epochs": 2, "limit_train_batches": 2}, data, [(0, 1), (1, 2)]),
        (BY_STEP, {"max_epochs": 2, "accumulate_grad_batches": 4}, data, [(0, 1), (1, 2)]),
        (BY_STEP, {"max_steps": 4}, data, [(0, 1), (0, 2)]),
        (BY_STEP, {"max_steps": 4}, stream, [(0, 1), (0, 2)]),
        (Schedule("linear", 1, 2, "epoch", "step", 4), {"max_epochs": 4}, data, [(1, 12), (2, 16)]),
        (Schedule("linear", 9, 17, "step", "epoch"), {"max_epochs": 4}, data, [(2, 16)]),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_events_fall_where_the_schedule_says(tmp_path, schedule, options, loader, events):
    pruning = MagnitudePruning(0.8, schedule=schedule)
    net = Net()
    trainer(tmp_path, pruning, **options).fit(net, loader())
    assert [(e["epoch"], e["step"]) for e in pruning.pruning_summary()["history"]] == events
    assert zeros(net) == 768


def test_max_steps_of_manual_optimization_counts_all_optimizers(tmp_path):
    class Both(TwoOptimizers):
        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(self.loss(batch))
                optimizer.step()

    pruning, net = MagnitudePruning(0.8, schedule=BY_STEP), Both()
    run = trainer(tmp_path, pruning, max_steps=8, max_epochs=-1)
    run.fit(net, data())
    assert run.global_step == 8
    # Four batches of two steps each: the window covers batches 0 to 2.
    assert [e["step"] for e in pruning.pruning_summary()["history"]] == [2, 4]
    assert zeros(net) == 768


def test_steps_of_a_stream_of_unknown_length_are_refused(tmp_path):
    with pytest.raises(ScheduleError, match="max_steps"):
        trainer(tmp_path, MagnitudePruning(0.8, schedule=BY_STEP), max_epochs=3).fit(Net(), stream())
