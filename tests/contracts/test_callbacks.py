"""What every callback of this package owes the Trainer that it is given to."""

import copy
import io
import pickle

import pytest
import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Callback as LightningCallback
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_prune
from lightning_prune import (
    AccuracyGuard,
    AfterPruning,
    Budget,
    EdgeExport,
    ElasticFamily,
    LayerPruning,
    LowRank,
    MagnitudePruning,
    QuantizationAwareTraining,
    Schedule,
    StructuralPruning,
)

SOON = Schedule("linear", begin=0.0, end=0.5)
PLAIN = (int, float, bool, str, bytes, type(None), torch.Tensor)


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16 * 4 * 4, 4),
        )

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)


def loader():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 1, 6, 6, generator=generator)
    return DataLoader(TensorDataset(x, torch.arange(32) % 4), batch_size=8)


def make(name, tmp_path):
    return {
        "AccuracyGuard": lambda: AccuracyGuard("val_loss", 0.1, "min"),
        "AfterPruning": AfterPruning,
        "MagnitudePruning": lambda: MagnitudePruning(0.5, schedule=SOON),
        "StructuralPruning": lambda: StructuralPruning(Budget(macs=0.7), schedule=SOON, round_to=1),
        "ElasticFamily": ElasticFamily,
        "LowRank": lambda: LowRank(ratio=0.3, schedule=Schedule("one_shot", begin=0.5), round_to=1),
        "LayerPruning": lambda: LayerPruning(1, schedule=SOON, include=["net.0"]),
        "QuantizationAwareTraining": lambda: QuantizationAwareTraining(0.5),
        "EdgeExport": lambda: EdgeExport(str(tmp_path / "edge"), quantize=None, profile=None),
    }[name]()


def trainer(callbacks, tmp_path, **arguments):
    settings = {"max_epochs": 3, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    settings |= {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": tmp_path}
    return Trainer(callbacks=callbacks, **settings | arguments)


def fit(callbacks, tmp_path, module=None, **arguments):
    module = module or Net()
    running = trainer(callbacks, tmp_path, **arguments)
    running.fit(module, loader(), loader())
    return running, module


def hooks_of(module, optimizers):
    found = [name for name in ("on_load_checkpoint", "on_save_checkpoint") if name in vars(module)]
    for layer in module.modules():
        for table in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks"):
            found += [f"{type(layer).__name__}.{table}"] * len(getattr(layer, table))
    for optimizer in optimizers:
        found += ["optimizer"] * len(optimizer._optimizer_step_post_hooks)
    return found


def same(left, right):
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[k], right[k]) for k in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


CALLBACKS = [
    name
    for name in lightning_prune.__all__
    if isinstance(getattr(lightning_prune, name), type)
    and issubclass(getattr(lightning_prune, name), LightningCallback)
]
every_callback = pytest.mark.parametrize("name", CALLBACKS)


def test_every_callback_is_covered(tmp_path):
    assert CALLBACKS == [
        "AccuracyGuard",
        "AfterPruning",
        "EdgeExport",
        "ElasticFamily",
        "LayerPruning",
        "LowRank",
        "MagnitudePruning",
        "QuantizationAwareTraining",
        "StructuralPruning",
    ]


@every_callback
def test_state_survives_a_weights_only_round_trip(name, tmp_path):
    callback = make(name, tmp_path)
    accompanied = name in ("AccuracyGuard", "EdgeExport")
    others = [MagnitudePruning(0.5, schedule=SOON)] if accompanied else []
    fit([callback, *others], tmp_path)
    file = io.BytesIO()
    torch.save(callback.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    fresh = make(name, tmp_path)
    fresh.load_state_dict(state)
    assert state or name == "AfterPruning"  # which decides from the others' state
    assert same(fresh.state_dict(), callback.state_dict())


@every_callback
def test_one_callback_serves_two_fits_of_different_modules(name, tmp_path):
    callback = make(name, tmp_path)
    fit([callback], tmp_path)
    first = copy.deepcopy(callback.state_dict())
    fit([callback], tmp_path)
    assert callback.state_dict().keys() == first.keys()


@every_callback
def test_fast_dev_run_ends_well(name, tmp_path):
    running, _ = fit([make(name, tmp_path)], tmp_path, fast_dev_run=True)
    assert running.state.finished


@every_callback
def test_sanity_checking_changes_no_weight(name, tmp_path):
    seen = {}

    class Look(LightningCallback):
        def on_sanity_check_start(self, trainer, pl_module):
            seen["before"] = {k: v.clone() for k, v in pl_module.state_dict().items()}

        def on_sanity_check_end(self, trainer, pl_module):
            seen["after"] = {k: v.clone() for k, v in pl_module.state_dict().items()}

    fit([make(name, tmp_path), Look()], tmp_path, max_epochs=1, num_sanity_val_steps=2)
    assert same(seen["before"], seen["after"])


@every_callback
def test_no_hook_is_left_after_a_fit_that_changed_nothing_structural(name, tmp_path):
    callback = make(name, tmp_path)
    if name == "StructuralPruning":
        callback = StructuralPruning(Budget(macs=1.0), schedule=SOON)
    if name == "LayerPruning":
        callback = LayerPruning(Budget(macs=1.0), schedule=SOON, include=["net.0"])
    # LowRank always factors something; here it does not come to that.
    running, module = fit([callback], tmp_path, max_epochs=0 if name == "LowRank" else 3)
    assert hooks_of(module, running.optimizers) == []


@every_callback
def test_no_hook_is_left_after_a_crash(name, tmp_path):
    class Crash(LightningCallback):
        def on_train_batch_end(self, *args):
            raise RuntimeError("the user's own error")

    callback, module = make(name, tmp_path), Net()
    running = trainer([callback, Crash()], tmp_path)
    with pytest.raises(RuntimeError, match="the user's own error"):
        running.fit(module, loader(), loader())
    assert hooks_of(module, running.optimizers) == []


@every_callback
@pytest.mark.parametrize("trained", [False, True], ids=["new", "used"])
def test_it_can_be_pickled_and_copied(name, trained, tmp_path):
    callback = make(name, tmp_path)
    if trained:
        fit([callback], tmp_path)
    for twin in (pickle.loads(pickle.dumps(callback)), copy.deepcopy(callback)):
        assert type(twin) is type(callback)
        assert same(twin.state_dict(), callback.state_dict())


@every_callback
def test_its_state_key_tells_it_from_the_others(name, tmp_path):
    keys = {make(other, tmp_path).state_key for other in CALLBACKS}
    assert len(keys) == len(CALLBACKS)
    assert repr(make(name, tmp_path))


@every_callback
def test_validating_and_testing_alone_change_nothing(name, tmp_path):
    module = Net()
    module.test_step = module.validation_step
    before = {key: value.clone() for key, value in module.state_dict().items()}
    running = trainer([make(name, tmp_path)], tmp_path)
    running.validate(module, loader(), verbose=False)
    running.test(module, loader(), verbose=False)
    assert same(before, dict(module.state_dict()))


@every_callback
def test_arguments_go_through_yaml_and_back(name, tmp_path):
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningCallback, "callback")
    given = {"class_path": f"lightning_prune.{name}"}
    config = parser.parse_object({"callback": given})
    again = parser.parse_string(parser.dump(config))
    built = parser.instantiate(again).callback
    default = getattr(lightning_prune, name)()
    skip = {"_module", "_owner"}
    assert type(built) is type(default)
    public = {k: v for k, v in vars(default).items() if not k.startswith("_") and k not in skip}
    assert {k: vars(built)[k] for k in public} == public
