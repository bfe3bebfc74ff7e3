from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning import LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune.callbacks._inputs import example_inputs, first_batch
from lightning_prune.deploy.calls import explicit_call, submodule, untouched_rng
from lightning_prune.deploy.capture import Rehearsal, inputs_from_batch
from lightning_prune.errors import SelectionError, TracingError

pytestmark = [
    # Lightning 2.6 still uses a name that torch's pytree is giving up.
    pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)`:FutureWarning"),
    # Tiny data on two cores: loaders without workers, and fewer batches than the logging interval.
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*log_every_n_steps"),
]


class Net(LightningModule):
    """Its steps call `self.model` on a scaled input, never the module itself."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
        self.unused = nn.Linear(2, 2)
        self.calls = 0

    def forward(self, x):
        return self.model(x * 2)

    def validation_step(self, batch, batch_idx):
        self.calls += 1
        x, _ = batch
        self.log("seen", 1.0)
        return self.model(x + 1).sum()

    training_step = validation_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def batch():
    return [torch.ones(2, 4), torch.zeros(2)]


def test_the_call_is_the_one_the_step_makes():
    args, kwargs = inputs_from_batch(Net(), batch(), "model")
    assert torch.equal(args[0], torch.full((2, 4), 2.0))
    assert kwargs == {}


def test_a_step_that_calls_forward_by_name_is_captured_too():
    class Direct(Net):
        def validation_step(self, batch, batch_idx):
            return self.forward(batch[0] * 5)

    args, _ = inputs_from_batch(Direct(), batch())
    assert torch.equal(args[0], torch.full((2, 4), 5.0))


def test_keyword_arguments_are_captured():
    class Keywords(Net):
        def validation_step(self, batch):
            return self.model(input=batch["x"])

    args, kwargs = inputs_from_batch(Keywords(), {"x": torch.ones(2, 4)}, "model")
    assert args == ()
    assert torch.equal(kwargs["input"], torch.ones(2, 4))


def test_without_a_call_the_first_tensor_is_taken():
    args, _ = inputs_from_batch(Net(), [{"x": torch.full((1, 2), 7.0)}], "unused")
    assert torch.equal(args[0], torch.full((1, 2), 7.0))


def test_without_anything_the_error_names_the_remedies():
    with pytest.raises(TracingError, match=r"example_input=.*example_input_array.*module="):
        inputs_from_batch(Net(), ["text"], "unused")


def test_an_unknown_module_is_an_error_with_near_matches():
    with pytest.raises(SelectionError, match=r"modle.*Did you mean 'model'"):
        submodule(Net(), "modle")


def test_the_module_and_the_random_state_stay_untouched():
    net = Net()
    net.model.train()
    before = copy.deepcopy(net.state_dict())
    states = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy())
    inputs_from_batch(net, batch(), "model")
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert net.model.training
    assert net.calls == 0
    assert "forward" not in vars(net.model)
    assert not net.model._forward_pre_hooks
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])


@pytest.mark.parametrize(
    ("explicit", "shapes"),
    [
        ([2, 4], [(2, 4)]),
        ([[2, 4], [1, 3]], [(2, 4), (1, 3)]),
        (torch.ones(5), [(5,)]),
        ((torch.ones(5), torch.ones(2, dtype=torch.long)), [(5,), (2,)]),
    ],
)
def test_explicit_examples(explicit, shapes):
    args, kwargs = explicit_call(explicit, torch.device("cpu"), torch.float64)
    assert [tuple(a.shape) for a in args] == shapes
    assert kwargs == {}
    assert all(a.dtype is torch.float64 for a in args if a.is_floating_point())


@pytest.mark.parametrize("wrong", ["1,3,32,32", [], [1.5], 7])
def test_a_wrong_explicit_example_is_an_error(wrong):
    with pytest.raises(TracingError, match="example_input"):
        explicit_call(wrong, torch.device("cpu"), torch.float32)


def test_untouched_rng_restores_also_after_an_error():
    state = torch.get_rng_state()

    def fail():
        with untouched_rng():
            torch.rand(1)
            raise RuntimeError("x")

    with pytest.raises(RuntimeError, match="x"):
        fail()
    assert torch.equal(torch.get_rng_state(), state)


def test_a_shuffling_loader_gives_the_same_batches_after_a_peek():
    def order(peek):
        generator = torch.Generator().manual_seed(1)
        loader = DataLoader(TensorDataset(torch.arange(8.0)), batch_size=2, shuffle=True, generator=generator)
        if peek:
            first_batch(loader)
        return [b[0].tolist() for b in loader]

    assert order(True) == order(False)


def test_the_transfer_hooks_of_the_module_apply():
    class Hooked(Net):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return [batch[0] + 10, batch[1]]

    args, _ = inputs_from_batch(Hooked(), batch(), "model")
    assert torch.equal(args[0], torch.full((2, 4), 12.0))


def test_a_rehearsed_step_cannot_reach_loggers_or_optimizers():
    class Curious(Net):
        def validation_step(self, batch, batch_idx):
            assert self.trainer.loggers == ()
            assert self.trainer.optimizers == ()
            return self.model(batch[0])

    net = Curious()
    trainer = pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    call = Rehearsal(net, "model", trainer=trainer).call(batch())
    assert call is not None


@pytest.mark.parametrize("module", [None, "model"])
def test_example_inputs_in_a_running_fit_change_nothing_of_it(module, tmp_path):
    data = TensorDataset(torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.zeros(8))
    found = []

    class Probe(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            found.append(example_inputs(trainer, pl_module, module))

    def fit(callbacks):
        pl.seed_everything(0)
        net = Net()
        trainer = pl.Trainer(
            max_epochs=2,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=callbacks,
        )
        trainer.fit(net, DataLoader(data, 4, shuffle=True), DataLoader(data, 4))
        return net.state_dict()

    plain, probed = fit([]), fit([Probe()])
    assert all(torch.equal(plain[k], probed[k]) for k in plain)
    assert len(found) == 2
    assert found[0][0][0].shape == (4, 4)
