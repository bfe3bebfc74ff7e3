"""Checkpoints and structures that do not match at first sight, for channels and for blocks alike."""

from __future__ import annotations

import pytest
import torch
from layer_cases import Net
from magnitude_cases import LIGHTNING_WARNINGS, data, trainer
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from structural_cases import assert_equal_state, macs
from torch import nn

from lightning_prune import Budget, LayerPruning, Schedule, StructuralPruning, load_pruned
from lightning_prune.errors import CheckpointError

pytestmark = [
    *LIGHTNING_WARNINGS,
    # Some trainers here have no ModelCheckpoint, as users' may not.
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    # What strict=False is for.
    pytest.mark.filterwarnings(
        "ignore:Found keys that are not in the model state dict but in the checkpoint"
    ),
    pytest.mark.filterwarnings(
        "ignore:Found keys that are in the model state dict but not in the checkpoint"
    ),
    # Dynamo looks at what it traces; where warnings are errors that would end the trace.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]

NOW = Schedule("one_shot", 2, unit="epoch")
KINDS = {
    "channels": lambda: StructuralPruning(Budget(macs=0.5), schedule=NOW, round_to=1),
    # One becomes a convolution, one an identity.
    "blocks": lambda: LayerPruning(2, schedule=NOW, include=["two.0", "two.2"]),
}
AVERAGES = {
    "ema": lambda: EMAWeightAveraging(decay=0.8),
    "swa": lambda: StochasticWeightAveraging(0.01, 1),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
DENSE = macs(Net())


class Quiet(Net):
    """Logs nothing in training: the compiler warns of what it finds in Lightning's `log`."""

    def training_step(self, batch, batch_idx):
        return self.loss(batch)


def keep(folder, **arguments) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{epoch}", **{"save_top_k": -1, "save_last": True, **arguments})


@every_kind
def test_the_best_is_tested_in_the_middle_of_a_fit_s_life_wider_than_the_network_is(tmp_path, kind):
    """The best epoch is dense; it is tested, and then the fit goes on from the last checkpoint."""

    class Scored(Net):
        def on_validation_epoch_end(self):
            self.log("score", float(-self.trainer.current_epoch))

    best = keep(tmp_path, monitor="score", mode="max", save_top_k=1, save_last=False)
    net = Scored()
    fit = trainer(tmp_path, KINDS[kind](), best, keep(tmp_path), enable_checkpointing=True, max_epochs=4)
    fit.fit(net, data(), data())
    small, state = macs(net), {k: v.clone() for k, v in net.state_dict().items()}
    assert small < DENSE
    fit.test(net, data(), ckpt_path=best.best_model_path, verbose=False, weights_only=True)
    assert macs(net) == DENSE
    fit.test(net, data(), ckpt_path=tmp_path / "last.ckpt", verbose=False, weights_only=True)
    assert macs(net) == small
    assert_equal_state(dict(net.state_dict()), state)
    again = trainer(tmp_path, KINDS[kind](), keep(tmp_path), enable_checkpointing=True, max_epochs=5)
    again.fit(net, data(), data(), ckpt_path=tmp_path / "last.ckpt")
    assert macs(net) == small
    assert again.current_epoch == 5


@every_kind
def test_a_fit_from_the_dense_best_goes_on_dense_and_prunes_again(tmp_path, kind):
    net = Net()
    fit = trainer(tmp_path, KINDS[kind](), keep(tmp_path), enable_checkpointing=True, max_epochs=4)
    fit.fit(net, data(), data())
    small = macs(net)
    seen = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            held = [p for group in trainer.optimizers[0].param_groups for p in group["params"]]
            assert {id(p) for p in held} == {id(p) for p in pl_module.parameters()}
            seen.append(macs(pl_module))

    again = trainer(tmp_path, KINDS[kind](), keep(tmp_path), Watch(), enable_checkpointing=True, max_epochs=4)
    again.fit(net, data(), data(), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert seen[0] == DENSE
    assert seen[-1] == small


@every_kind
@pytest.mark.parametrize("weights_only", [False, True], ids=["whole", "weights only"])
def test_a_fresh_dense_module_is_validated_from_a_pruned_checkpoint(tmp_path, kind, weights_only):
    net = Net()
    saved = keep(tmp_path, save_weights_only=weights_only)
    trainer(tmp_path, KINDS[kind](), saved, enable_checkpointing=True).fit(net, data(), data())
    wanted = trainer(tmp_path).validate(net, data(), verbose=False)
    for fresh in (Net(seed=8), net):
        found = trainer(tmp_path, KINDS[kind]()).validate(
            fresh, data(), ckpt_path=tmp_path / "last.ckpt", verbose=False, weights_only=True
        )
        assert found == wanted
        assert macs(fresh) == macs(net)


@every_kind
@pytest.mark.parametrize("average", AVERAGES.values(), ids=AVERAGES)
def test_averages_of_pruned_structure_resume(tmp_path, kind, average):
    class Stop(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = trainer.current_epoch == 2

    def run(folder, *extra, ckpt_path=None):
        net = Net("adamw", seed=3 if ckpt_path else 0)
        fit = trainer(
            folder, KINDS[kind](), average(), keep(folder), *extra, enable_checkpointing=True, max_epochs=5
        )
        fit.fit(net, data(), ckpt_path=ckpt_path)
        return net

    whole = run(tmp_path / "whole")
    run(tmp_path / "stopped", Stop())
    resumed = run(tmp_path / "stopped", ckpt_path=tmp_path / "stopped" / "last.ckpt")
    assert macs(resumed) == macs(whole) < DENSE
    assert str(resumed) == str(whole)
    if average().__class__ is EMAWeightAveraging:
        assert_equal_state(dict(resumed.state_dict()), dict(whole.state_dict()))


@every_kind
def test_extra_layers_load_with_strict_false(tmp_path, kind):
    class Larger(Net):
        def __init__(self, **arguments):
            super().__init__(**arguments)
            self.extra = nn.Linear(2, 2)
            self.strict_loading = False

    net = Net()
    trainer(tmp_path, KINDS[kind](), keep(tmp_path), enable_checkpointing=True).fit(net, data())
    loaded = load_pruned(Larger, tmp_path / "last.ckpt", strict=False)
    larger = Larger(seed=4)
    trainer(tmp_path, KINDS[kind]()).validate(
        larger, data(), ckpt_path=tmp_path / "last.ckpt", verbose=False, weights_only=True
    )
    for module in (loaded, larger):
        known = {k: v for k, v in module.state_dict().items() if not k.startswith("extra")}
        assert_equal_state(known, dict(net.state_dict()))


@every_kind
def test_layers_that_are_not_there_are_an_error_unless_strict_is_false(tmp_path, kind):
    class Backbone(Net):
        """Without the stage that comes last, which is where blocks go, and with another head."""

        def __init__(self, **arguments):
            super().__init__(**arguments)
            self.other_head = nn.Linear(4, 5)
            del self.head, self.two

        def forward(self, x):
            return self.other_head(self.one(self.stem(x)).mean((2, 3)))

    net = Net()
    trainer(tmp_path, KINDS[kind](), keep(tmp_path), enable_checkpointing=True).fit(net, data())
    with pytest.raises(CheckpointError, match="has no "):
        load_pruned(Backbone, tmp_path / "last.ckpt")
    backbone = load_pruned(Backbone, tmp_path / "last.ckpt", strict=False)
    known = {k: v for k, v in net.state_dict().items() if k.startswith(("stem", "one"))}
    found = {k: v for k, v in backbone.state_dict().items() if not k.startswith("other")}
    assert_equal_state(found, known)
    assert backbone.other_head.out_features == 5


@every_kind
def test_a_compiled_module_resumes_from_what_it_saved_and_loads_as_a_plain_one(tmp_path, kind):
    first = trainer(tmp_path, KINDS[kind](), keep(tmp_path), enable_checkpointing=True, max_epochs=3)
    net = Quiet()
    first.fit(torch.compile(net, backend="eager"), data())
    loaded = load_pruned(Quiet, tmp_path / "last.ckpt")
    assert_equal_state(dict(loaded.state_dict()), dict(net.state_dict()))
    resumed = Quiet(seed=6)
    again = trainer(tmp_path, KINDS[kind](), keep(tmp_path), enable_checkpointing=True, max_epochs=4)
    again.fit(torch.compile(resumed, backend="eager"), data(), ckpt_path=tmp_path / "last.ckpt")
    assert macs(resumed) == macs(net) < DENSE
    assert str(resumed) == str(net)


@every_kind
def test_a_submodule_compiled_in_place_is_pruned_too(tmp_path, kind):
    net = Quiet()
    net.two.compile(backend="eager")
    trainer(tmp_path, KINDS[kind](), max_epochs=3).fit(net, data())
    assert macs(net) < DENSE
    plain = Quiet()
    trainer(tmp_path, KINDS[kind](), max_epochs=3).fit(plain, data())
    assert str(net) == str(plain)
    for a, b in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
