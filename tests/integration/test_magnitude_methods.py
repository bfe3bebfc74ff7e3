"""Criteria, patterns, regrowth, rewinding and special layers in a real Trainer."""

from __future__ import annotations

import itertools

import pytest
import torch
from magnitude_cases import LIGHTNING_WARNINGS, Net, Probe, TwoOptimizers, data, selected, trainer, zeros
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn
from torch.nn.utils import parametrizations

from lightning_prune.callbacks.magnitude_pruning import MagnitudePruning
from lightning_prune.errors import ConfigurationError, ScheduleError
from lightning_prune.schedules import Schedule
from lightning_prune.sparsity.training import SparseTraining

pytestmark = LIGHTNING_WARNINGS

ONCE = Schedule("one_shot")
LINEAR = Schedule("linear", 0, 2, unit="epoch")

# ------------------------------------------------------------------ criteria that watch the training


@pytest.mark.parametrize("net", [Net, TwoOptimizers], ids=["automatic", "manual"])
@pytest.mark.parametrize("criterion", ["taylor", "snip", "movement", "wanda"])
def test_criteria_that_need_gradients_prune_within_the_first_step_after_an_event(tmp_path, criterion, net):
    probe, module = Probe(), net()
    pruning = MagnitudePruning(0.8, criterion=criterion, schedule=LINEAR)
    trainer(tmp_path, pruning, probe).fit(module, data(), data())
    # Manual optimization: the second optimizer steps every other batch, so its gradients come with the
    # second.
    first = 1 if net is TwoOptimizers and criterion != "wanda" else 0
    by_epoch = {}
    for epoch, _, count in probe.at["batch_end"]:
        by_epoch.setdefault(epoch, []).append(count)
    for epoch, expected in {0: 0, 1: 384, 2: 768, 3: 768}.items():
        assert set(by_epoch[epoch][first:]) == {expected}
    assert next(e["step"] for e in pruning.pruning_summary()["history"]) in (8, 12, 13)
    assert zeros(module) == 768


def test_snip_prunes_before_the_first_update_by_the_gradient_of_the_first_batch(tmp_path):
    module, reference = Net(), Net()
    reference.loss(next(iter(data()))).backward()
    weights = {n: p for n, p in reference.named_parameters() if n in selected(reference)}
    scores = torch.cat([(w * w.grad).abs().flatten() for w in weights.values()])
    expected = torch.ones_like(scores)
    expected[scores.argsort(stable=True)[:768]] = 0

    class First(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 1:
                self.masks = torch.cat([mask.flatten() for mask in pruning.masks.values()])

    first = First()
    pruning = MagnitudePruning(0.8, criterion="snip", schedule=ONCE)
    trainer(tmp_path, pruning, first).fit(module, data())
    assert torch.equal(first.masks, expected)
    assert torch.equal(torch.cat([m.flatten() for m in pruning.masks.values()]), expected)


def test_wanda_follows_the_inputs_that_the_layer_has_seen(tmp_path):
    module, seen = Net("adamw"), []

    class Watch(Callback):
        def on_train_start(self, trainer, pl_module):
            def record(layer, args):
                if layer.training:
                    seen.append(args[0].detach().square().sum(0))

            pl_module.head.register_forward_pre_hook(record)

        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            if trainer.global_step == 4:
                norm = torch.stack(seen).sum(0).sqrt()
                self.score = pl_module.head.weight.detach().abs() * norm

    watch = Watch()
    schedule = Schedule("one_shot", 4, unit="step", interval="step")
    pruning = MagnitudePruning(0.5, criterion="wanda", scope="output", schedule=schedule, include=["head"])
    trainer(tmp_path, watch, pruning, max_epochs=1).fit(module, data())
    assert len(seen) == 8
    mask = pruning.masks["head.weight"]
    assert mask.sum(1).tolist() == [6, 6]
    for row in range(2):
        lowest = set(watch.score[row].argsort(stable=True)[:6].tolist())
        assert set((mask[row] == 0).nonzero().flatten().tolist()) == lowest


@pytest.mark.parametrize("criterion", ["taylor", "movement"])
def test_resume_with_statistics_gives_the_same_weights(tmp_path, criterion):
    def run(epochs, ckpt_path=None):
        keep = ModelCheckpoint(tmp_path, save_last=True)
        pruning = MagnitudePruning(0.8, criterion=criterion, schedule=Schedule("linear", 0, 4, "epoch"))
        module = Net(seed=1 if ckpt_path else 0)
        fit = trainer(tmp_path, pruning, keep, max_epochs=epochs, enable_checkpointing=True)
        fit.fit(module, data(), ckpt_path=ckpt_path)
        return module, pruning

    class Stop(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = trainer.current_epoch == 2

    whole, whole_pruning = run(6)
    keep = ModelCheckpoint(tmp_path / "half", save_last=True)
    half = MagnitudePruning(0.8, criterion=criterion, schedule=Schedule("linear", 0, 4, "epoch"))
    trainer(tmp_path, half, keep, Stop(), max_epochs=6, enable_checkpointing=True).fit(Net(), data())
    resumed = Net(seed=7)
    other = MagnitudePruning(0.8, criterion=criterion, schedule=Schedule("linear", 0, 4, "epoch"))
    again = ModelCheckpoint(tmp_path / "half", save_last=True)
    fit = trainer(tmp_path, other, again, max_epochs=6, enable_checkpointing=True)
    fit.fit(resumed, data(), ckpt_path=tmp_path / "half" / "last.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert all(torch.equal(whole_pruning.masks[n], other.masks[n]) for n in other.masks)


@pytest.mark.parametrize(
    ("criterion", "spoil", "message"),
    [
        (
            "wanda",
            lambda net: setattr(net, "extra", nn.GRUCell(2, 2)),
            "its inputs cannot be observed (GRUCell)",
        ),
        ("taylor", lambda net: net.head.weight.requires_grad_(False), "it is frozen and has no gradient"),
    ],
    ids=["wanda", "taylor"],
)
def test_weights_that_a_criterion_cannot_judge_are_refused_before_training(
    tmp_path, criterion, spoil, message
):
    net, probe = Net(), Probe()
    spoil(net)
    with pytest.raises(ConfigurationError) as caught:
        trainer(tmp_path, MagnitudePruning(criterion=criterion), probe).fit(net, data(), data())
    assert message in str(caught.value)
    assert probe.at == {}


def test_forward_hooks_are_removed(tmp_path):
    net = Net()
    trainer(tmp_path, MagnitudePruning(criterion="wanda"), max_epochs=2).fit(net, data())
    assert not any(layer._forward_pre_hooks for layer in net.modules())


# ------------------------------------------------------------------ patterns


class Wide(Net):
    def __init__(self, optimizer="sgd", seed=0):
        super().__init__(optimizer, seed)
        self.body = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.head = nn.Linear(16, 2)


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_two_of_four_holds_everywhere_at_the_end_and_grows_with_the_schedule(tmp_path, scope):
    net, probe = Wide(), Probe()
    pruning = MagnitudePruning(0.5, pattern="2:4", scope=scope, schedule=LINEAR, exclude=["stem"])
    trainer(tmp_path, pruning, probe).fit(net, data(), data())
    for name in ("body.0.weight", "head.weight"):
        weight = net.get_parameter(name).detach()
        groups = (weight != 0).movedim(1, -1).reshape(-1, 4)
        assert bool((groups.sum(1) == 2).all())
    total = 16 * 8 * 9 + 32
    assert {e: c for e, _, c in probe.at["batch_end"]} == {0: 0, 1: total // 4, 2: total // 2, 3: total // 2}
    history = pruning.pruning_summary()["history"]
    assert [e["target"] for e in history] == [0.25, 0.5]
    assert [e["achieved"] for e in history] == [0.25, 0.5]


def test_a_pattern_bounds_the_sparsity(tmp_path):
    net = Wide()
    pruning = MagnitudePruning(0.8, pattern="2:4", schedule=ONCE, include=["head", "body"])
    trainer(tmp_path, pruning).fit(net, data())
    assert pruning.pruning_summary()["history"][-1]["target"] == 0.5
    assert pruning.pruning_summary()["history"][-1]["achieved"] == 0.5


@pytest.mark.parametrize("pattern", ["block:2x2", "row", "column"])
def test_blocks_and_rows_go_as_a_whole(tmp_path, pattern):
    net = Wide()
    pruning = MagnitudePruning(0.5, pattern=pattern, scope="layer", schedule=ONCE, include=["head", "body"])
    trainer(tmp_path, pruning).fit(net, data())
    weight = net.body[0].weight.detach()
    dead = {
        "block:2x2": (weight.reshape(8, 2, 4, 2, 9) == 0).all(3).all(1).sum() * 4,
        "row": (weight.flatten(1) == 0).all(1).sum() * 72,
        "column": (weight.transpose(0, 1).flatten(1) == 0).all(1).sum() * 144,
    }[pattern]
    assert int(dead) == int((weight == 0).sum()) == 576


# ------------------------------------------------------------------ regrowth


@pytest.mark.parametrize("method", ["rigl", "set"])
@pytest.mark.parametrize("net", [Net, TwoOptimizers], ids=["automatic", "manual"])
def test_regrowth_moves_masks_at_constant_sparsity(tmp_path, method, net):
    counts, moved = [], []

    class Watch(Callback):
        before = None

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            masks = {name: mask.clone() for name, mask in pruning.masks.items()}
            counts.append({name: int((mask == 0).sum()) for name, mask in masks.items()})
            # Every masked weight is zero, every step.
            for name, weight in selected(pl_module).items():
                assert bool((weight[masks[name] == 0] == 0).all())
            if self.before is not None:
                moved.append(sum(int((masks[n] != self.before[n]).sum()) for n in masks))
            self.before = masks

    training = SparseTraining(method, fraction=0.3, every=4, end=0.5)
    pruning = MagnitudePruning(0.8, scope="erk", schedule=ONCE, training=training)
    trainer(tmp_path, pruning, Watch()).fit(net(), data())
    assert all(count == counts[0] for count in counts)
    assert sum(counts[0].values()) == 768
    # 32 steps: exchanged at 4, 8 and 12, not at 16 = end.
    assert [i + 1 for i, n in enumerate(moved) if n] == [4, 8, 12]


def test_rigl_brings_back_the_largest_gradients_from_zero(tmp_path):
    class Watch(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            if trainer.global_step == 4:
                self.gradient = pl_module.body[0].weight.grad.clone()
                self.weight = pl_module.body[0].weight.detach().clone()
                self.mask = pruning.masks["body.0.weight"].clone()

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 5:
                self.after = pruning.masks["body.0.weight"].clone()
                self.moved = pl_module.body[0].weight.detach().clone()

    watch = Watch()
    training = SparseTraining("rigl", fraction=0.5, every=4, end=1.0)
    pruning = MagnitudePruning(0.5, scope="layer", schedule=ONCE, training=training)
    net = Net()
    net.configure_optimizers = lambda: torch.optim.SGD(net.parameters(), lr=0.1)
    trainer(tmp_path, watch, pruning).fit(net, data())
    used, after = watch.mask != 0, watch.after != 0
    count = int(training.exchanged(4, 32) * int(used.sum()))
    gone = watch.weight.abs().masked_fill(~used, 9).flatten().argsort(stable=True)[:count]
    kept = used.flatten().clone()
    kept[gone] = False
    wanted = (
        watch.gradient.abs().flatten().masked_fill(kept, -1).argsort(descending=True, stable=True)[:count]
    )
    expected = kept.clone()
    expected[wanted] = True
    assert torch.equal(after.flatten(), expected)
    # Plain SGD from zero: what came back is minus the learning rate times its gradient.
    assert torch.allclose(watch.moved.flatten()[wanted], -0.1 * watch.gradient.flatten()[wanted])


def test_regrowth_in_an_endless_training_is_refused(tmp_path):
    schedule = Schedule("one_shot", 0, unit="epoch")
    pruning = MagnitudePruning(0.5, schedule=schedule, training=SparseTraining("rigl"))
    with pytest.raises(ScheduleError, match="without end"):
        trainer(tmp_path, pruning, max_epochs=-1).fit(Net(), data())


# ------------------------------------------------------------------ rewinding


def test_rewinding_goes_back_to_a_real_copy_of_an_epoch(tmp_path):
    class Watch(Callback):
        def __init__(self):
            self.at = {}

        def on_train_epoch_start(self, trainer, pl_module):
            self.at[trainer.current_epoch] = {n: t.clone() for n, t in pl_module.state_dict().items()}

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.current_epoch == 3 and batch_idx == 0:
                self.rewound = {n: t.clone() for n, t in pl_module.state_dict().items()}
                self.state = dict(trainer.optimizers[0].state)

    watch, net = Watch(), Net()
    schedule = Schedule("one_shot", 3, unit="epoch")
    pruning = MagnitudePruning(0.8, schedule=schedule, training=SparseTraining(rewind_to=1))
    trainer(tmp_path, watch, pruning, max_epochs=5).fit(net, data())
    masks = pruning.masks
    magnitudes = torch.cat([watch.at[3][name].abs().flatten() for name in masks])
    flat = torch.cat([masks[name].flatten() for name in masks])
    # Chosen by what the weights had become, set back to what they had been.
    assert float(magnitudes[flat == 0].max()) <= float(magnitudes[flat == 1].min())
    for name, tensor in watch.rewound.items():
        expected = watch.at[1][name] * masks[name] if name in masks else watch.at[1][name]
        assert torch.equal(tensor, expected), name
    assert watch.state == {}
    assert zeros(net) == 768
    assert any(not torch.equal(watch.at[1][name], tensor) for name, tensor in net.state_dict().items())


def test_resume_with_a_copy_to_rewind_to(tmp_path):
    def pruning():
        schedule = Schedule("one_shot", 3, unit="epoch")
        return MagnitudePruning(0.8, schedule=schedule, training=SparseTraining(rewind_to=1))

    class Stop(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = trainer.current_epoch == 1

    whole = Net()
    keep = ModelCheckpoint(tmp_path / "whole", save_last=True)
    trainer(tmp_path, pruning(), keep, max_epochs=5, enable_checkpointing=True).fit(whole, data())
    half = ModelCheckpoint(tmp_path / "half", save_last=True)
    trainer(tmp_path, pruning(), half, Stop(), max_epochs=5, enable_checkpointing=True).fit(Net(), data())
    resumed, again = Net(seed=5), ModelCheckpoint(tmp_path / "half", save_last=True)
    fit = trainer(tmp_path, pruning(), again, max_epochs=5, enable_checkpointing=True)
    fit.fit(resumed, data(), ckpt_path=tmp_path / "half" / "last.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_rewinding_to_after_the_first_pruning_is_refused(tmp_path):
    pruning = MagnitudePruning(0.8, schedule=LINEAR, training=SparseTraining(rewind_to=3))
    with pytest.raises(ScheduleError, match="`rewind_to` must be at or before"):
        trainer(tmp_path, pruning).fit(Net(), data())


# ------------------------------------------------------------------ clipping and gradients


def test_masked_gradients_do_not_count_in_the_clipped_norm(tmp_path):
    norms = {}

    class Watch(Callback):
        def __init__(self, name):
            self.name = name

        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            if trainer.global_step == 3:
                weight = pl_module.body[0].weight
                mask = pruning.masks["body.0.weight"]
                norms[self.name] = (
                    float(weight.grad[mask == 0].abs().sum()) if weight.grad is not None else None
                )

    for mask_gradients in (False, True):
        training = SparseTraining(mask_gradients=mask_gradients)
        pruning = MagnitudePruning(0.9, schedule=ONCE, training=training)
        trainer(tmp_path, Watch(mask_gradients), pruning, gradient_clip_val=0.1).fit(Net(), data())
    assert norms[False] > 0
    assert norms[True] == 0


# ------------------------------------------------------------------ layers


class Zoo(Net):
    """Recurrent, attention, embedding, tied and parametrized weights."""

    def __init__(self):
        super().__init__("adamw")
        self.stem = nn.LSTM(6, 8, num_layers=2, bidirectional=True, batch_first=True)
        self.body = nn.MultiheadAttention(16, 2, batch_first=True)
        self.embedding = nn.Embedding(2, 16)
        self.out = nn.Linear(16, 2, bias=False)
        self.out.weight = self.embedding.weight
        self.head = nn.Sequential(
            parametrizations.weight_norm(nn.Linear(16, 16)), parametrizations.spectral_norm(nn.Linear(16, 16))
        )

    def forward(self, x):
        x, _ = self.stem(x[:, 0])
        x, _ = self.body(x, x, x)
        return self.out(self.head(x.mean(1)))


def test_recurrent_attention_tied_and_parametrized_weights_are_pruned_once_and_stay_zero(tmp_path):
    net = Zoo()
    pruning = MagnitudePruning(0.6, scope="layer", schedule=LINEAR)
    trainer(tmp_path, pruning).fit(net, data())
    names = set(pruning.masks)
    recurrent = {f"stem.weight_{k}h_l{n}{r}" for k in "ih" for n in "01" for r in ("", "_reverse")}
    attention = {"body.in_proj_weight", "body.out_proj.weight"}
    heads = {"head.0.parametrizations.weight.original1", "head.1.parametrizations.weight.original"}
    assert names == recurrent | attention | heads | {"embedding.weight"}
    for name, mask in pruning.masks.items():
        weight = net.get_parameter(name)
        assert int((mask == 0).sum()) == int((weight == 0).sum()) == pytest.approx(0.6 * mask.numel(), abs=1)
    # The parametrization keeps the zeros: the weight that the layer computes with has them.
    for layer, name in zip(net.head, sorted(heads), strict=True):
        assert bool((layer.weight[pruning.masks[name] == 0] == 0).all())
    assert net.out.weight is net.embedding.weight


def test_the_biases_that_are_named_are_pruned(tmp_path):
    net = Net()
    pruning = MagnitudePruning(0.5, schedule=ONCE, include=["*.bias"])
    trainer(tmp_path, pruning).fit(net, data())
    assert set(pruning.masks) == {"stem.0.bias", "stem.1.bias", "body.0.bias", "body.1.bias", "head.bias"}
    assert sum(int((m == 0).sum()) for m in pruning.masks.values()) == 21


@pytest.mark.parametrize("layer", [nn.Conv1d, nn.Conv3d, nn.ConvTranspose2d, nn.Bilinear, nn.EmbeddingBag])
def test_every_kind_of_layer_has_its_weight_pruned(tmp_path, layer):
    class Other(Net):
        def __init__(self):
            super().__init__()
            self.extra = {
                nn.Conv1d: lambda: nn.Conv1d(2, 4, 3),
                nn.Conv3d: lambda: nn.Conv3d(2, 4, 3),
                nn.ConvTranspose2d: lambda: nn.ConvTranspose2d(2, 4, 3),
                nn.Bilinear: lambda: nn.Bilinear(3, 4, 5),
                nn.EmbeddingBag: lambda: nn.EmbeddingBag(6, 4),
            }[layer]()

    net = Other()
    pruning = MagnitudePruning(0.5, schedule=ONCE, include=[f"type:{layer.__name__}"])
    trainer(tmp_path, pruning, max_epochs=1).fit(net, data())
    assert set(pruning.masks) == {"extra.weight"}
    assert int((net.extra.weight == 0).sum()) == net.extra.weight.numel() // 2


def test_channels_last_weights_are_pruned_alike(tmp_path):
    found = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        net = Net().to(memory_format=memory_format)
        pruning = MagnitudePruning(0.8, schedule=ONCE)
        trainer(tmp_path, pruning, max_epochs=1).fit(net, data())
        found.append(pruning.masks)
        assert all(m.stride() == net.get_parameter(n).stride() for n, m in pruning.masks.items())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_combinations_of_scope_and_pattern_all_run(tmp_path):
    for scope, pattern in itertools.product(
        ("global", "layer", "output", "erk", "lamp"), (None, "2:4", "block:2x2", "row", "column")
    ):
        pruning = MagnitudePruning(0.5, scope=scope, pattern=pattern, schedule=ONCE)
        trainer(tmp_path, pruning, max_epochs=1, limit_train_batches=2).fit(Net(), data())
        achieved = pruning.pruning_summary()["history"][-1]["achieved"]
        assert 0.2 < achieved <= 0.5
