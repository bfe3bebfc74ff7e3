"""Trainings from which blocks go: which ones, how the budget is met, and what follows."""

from __future__ import annotations

import copy

import pytest
import torch
from layer_cases import BLOCKS, Net, Residual
from magnitude_cases import LIGHTNING_WARNINGS, data, size, trainer, zeros
from pytorch_lightning import Callback, LightningModule
from pytorch_lightning.callbacks import StochasticWeightAveraging, WeightAveraging
from structural_cases import macs
from torch import nn
from torch.utils.data import DataLoader

from lightning_prune.callbacks.accuracy_guard import AccuracyGuard
from lightning_prune.callbacks.after_pruning import AfterPruning
from lightning_prune.callbacks.layer_pruning import LayerPruning
from lightning_prune.callbacks.magnitude_pruning import MagnitudePruning
from lightning_prune.callbacks.structural_pruning import StructuralPruning
from lightning_prune.errors import BudgetError, ConfigurationError, SelectionError
from lightning_prune.schedules import Schedule
from lightning_prune.sparsity.training import SparseTraining
from lightning_prune.structure.budget import Budget
from lightning_prune.structure.replaced import put

pytestmark = LIGHTNING_WARNINGS

NOW = Schedule("one_shot", 1, unit="epoch")


def left(net: nn.Module) -> list[str]:
    return [name for name in BLOCKS if isinstance(net.get_submodule(name), Residual)]


def fit(tmp_path, *callbacks: Callback, net: LightningModule | None = None, **arguments):
    net = net or Net()
    run = trainer(tmp_path, *callbacks, **arguments)
    run.fit(net, data(), data())
    return net, run


@pytest.mark.parametrize("score", ["output", "magnitude", "loss"])
@pytest.mark.parametrize("kind", ["macs", "params"])
def test_the_budget_is_met_and_one_block_less_gone_would_be_over_it(tmp_path, score, kind):
    count = macs if kind == "macs" else lambda net: sum(p.numel() for p in net.parameters())
    pruning = LayerPruning(Budget(**{kind: 0.6}), schedule=NOW, score=score)
    net, _ = fit(tmp_path, pruning)
    allowed = 0.6 * count(Net())
    assert count(net) <= allowed
    gone = [name for name in BLOCKS if name not in left(net)]
    assert gone
    for name in gone:
        back = copy.deepcopy(net)
        back.get_submodule(name.split(".")[0])[int(name[-1])] = Net().get_submodule(name)
        assert count(back) > allowed
    entry = pruning.pruning_summary()["history"][-1]
    assert entry["achieved"] == pytest.approx(count(net) / count(Net()))
    assert (entry["epoch"], entry["target"]) == (1, 0.6)


def test_the_blocks_that_do_nothing_go_first(tmp_path):
    class Lazy(Net):
        """Two of the blocks hardly add anything."""

        def __init__(self):
            super().__init__(width=8)
            for name in ("one.1", "two.2"):
                nn.init.constant_(self.get_submodule(name).norm2.weight, 1e-3)

    net, _ = fit(tmp_path, LayerPruning(2, schedule=Schedule("one_shot", 0)), net=Lazy(), max_epochs=1)
    assert left(net) == ["one.0", "two.0", "two.1"]


def bypassed(net: Net, name: str | None, x: torch.Tensor) -> torch.Tensor:
    """The network written out once more, without one block."""
    x = net.stem(x)
    for other in BLOCKS:
        x = x if other == name else net.get_submodule(other)(x)
    return net.head(x.mean((2, 3)))


@pytest.mark.parametrize("score", ["output", "loss"])
@pytest.mark.parametrize("workers", [0, 1])
def test_scores_are_those_computed_by_hand(tmp_path, score, workers):
    first = {}

    class Keep(Callback):
        def on_train_start(self, trainer, pl_module):
            first["net"] = copy.deepcopy(pl_module).eval()

    pruning = LayerPruning(
        1, schedule=Schedule("one_shot", 0), score=score, exclude=["two.0"], calibration_batches=3
    )
    loader = DataLoader(data().dataset, batch_size=8, num_workers=workers, persistent_workers=workers > 0)
    run = trainer(tmp_path, Keep(), pruning, max_epochs=1)
    run.fit(Net(), loader, loader)
    net, batches = first["net"], list(data())[:3]
    found = {block["name"]: block["score"] for block in pruning.pruning_summary()["blocks"]}
    assert found.pop("two.0") is None
    with torch.no_grad():
        for name, value in found.items():
            if score == "loss":
                losses = [
                    [nn.functional.cross_entropy(bypassed(net, gone, x), y) for x, y in batches]
                    for gone in (name, None)
                ]
                wanted = sum(losses[0]) / 3 - sum(losses[1]) / 3
            else:
                passed = []
                handle = net.get_submodule(name).register_forward_hook(
                    lambda layer, args, out, passed=passed: passed.append((args[0].clone(), out.clone()))
                )
                net(torch.cat([x for x, _ in batches]))
                handle.remove()
                ((x, y),) = passed
                wanted = (y - x).square().sum() / y.square().sum()
            assert value == pytest.approx(float(wanted), rel=1e-4, abs=1e-6)


def test_blocks_go_by_number_and_on_the_schedule(tmp_path):
    seen = []

    class Watch(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            seen.append((len(left(pl_module)), float(trainer.callback_metrics["blocks"])))

    pruning = LayerPruning(3, schedule=Schedule("linear", 0, 3, unit="epoch"))
    fit(tmp_path, pruning, Watch(), AfterPruning(), max_epochs=5)
    assert seen == [
        (5, 1.0),
        (4, pytest.approx(0.8)),
        (3, pytest.approx(0.6)),
        *[(2, pytest.approx(0.4))] * 2,
    ]
    assert pruning.pruning_finished
    assert pruning.level == 1.0


def test_training_goes_on_as_that_of_a_network_exchanged_by_hand(tmp_path):
    """The other training is written out: its own network, optimizer, learning rates and loop."""
    kept = {}

    class Keep(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            if trainer.current_epoch == 0:
                kept["net"] = copy.deepcopy(pl_module)
                kept["state"] = copy.deepcopy(trainer.optimizers[0].state_dict())

    pruning = LayerPruning(Budget(macs=0.4), schedule=NOW, include=["one.*", "two.1", "two.2"])
    net, run = fit(tmp_path, Keep(), pruning, net=Net("adamw"), max_epochs=3)
    twin = kept["net"]
    names = [name for name, _ in twin.named_parameters()]
    for name in BLOCKS:
        if name not in left(net):
            twin.get_submodule(name.split(".")[0])[int(name[-1])] = nn.Identity()
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-2, weight_decay=1e-1)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)
    optimizer.step()
    scheduler.step()
    states = dict(zip(names, kept["state"]["state"].values(), strict=True))
    optimizer.state.update({p: states[name] for name, p in twin.named_parameters()})
    for _ in range(2):
        for batch in data():
            optimizer.zero_grad()
            twin.train().loss(batch).backward()
            optimizer.step()
        scheduler.step()
    for (name, a), (other, b) in zip(net.named_parameters(), twin.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(a, b)
    assert len(run.optimizers[0].param_groups[0]["params"]) == len(list(net.parameters()))


def test_a_fitted_layer_learns_in_the_group_of_what_it_replaces(tmp_path):
    class Groups(Net):
        def configure_optimizers(self):
            weights = [p for p in self.parameters() if p.dim() > 1]
            rest = [p for p in self.parameters() if p.dim() < 2]
            groups = [{"params": weights, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
            optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)]

    before = {}

    class Watch(Callback):
        def on_train_start(self, trainer, pl_module):
            pl_module.register_forward_pre_hook(lambda module, args: before.update(now=module.two[0]))

    net, run = fit(
        tmp_path, LayerPruning(1, schedule=NOW, include=["two.0"]), Watch(), net=Groups(), max_epochs=3
    )
    layer = net.two[0]
    assert isinstance(layer, nn.Conv2d)
    assert layer.stride == (2, 2)
    first, second = run.optimizers[0].param_groups
    order = [id(p) for p in net.parameters()]
    for group, dims in ((first, (2, 4)), (second, (1,))):
        assert all(p.dim() in dims for p in group["params"])
        assert [id(p) for p in group["params"]] == [i for i in order if i in {id(p) for p in group["params"]}]
    assert sum(len(group["params"]) for group in (first, second)) == len(order)
    assert layer.weight in run.optimizers[0].state
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.1 * 0.5**3)


def test_judging_leaves_the_training_as_it_was(tmp_path):
    """Dropout, shuffling, augmentation and BatchNorm: until blocks go, nothing differs."""

    class Noisy(Net):
        def training_step(self, batch, batch_idx):
            batch[0] = nn.functional.dropout(batch[0] + 0.1 * torch.randn_like(batch[0]), 0.2)
            return super().training_step(batch, batch_idx)

    states = []
    for pruning in ([], [LayerPruning(1, schedule=Schedule("one_shot", 2, unit="epoch"), score="loss")]):

        class Watch(Callback):
            def on_train_epoch_start(self, trainer, pl_module):
                if trainer.current_epoch == 2:
                    rng = torch.get_rng_state()
                    states.append([copy.deepcopy(pl_module.state_dict()), rng, pl_module.training])

        torch.manual_seed(3)
        loader = DataLoader(data().dataset, batch_size=8, shuffle=True)
        trainer(tmp_path, Watch(), *pruning, max_epochs=3).fit(Noisy(), loader, data())
        states[-1].append(torch.get_rng_state())
    plain, pruned = states
    assert all(torch.equal(plain[0][key], pruned[0][key]) for key in plain[0])
    assert torch.equal(plain[1], pruned[1])
    assert plain[2] == pruned[2]
    assert torch.equal(plain[3], pruned[3])


@pytest.mark.parametrize("order", ["lm", "ml", "lsm", "msl"])
def test_with_masks_and_channels_the_sparsity_stays_exact(tmp_path, order):
    made = {
        "l": LayerPruning(Budget(macs=0.6), schedule=Schedule("linear", 0, 2, unit="epoch")),
        "m": MagnitudePruning(0.5, schedule=Schedule("linear", 0, 3, unit="epoch")),
        "s": StructuralPruning(Budget(macs=0.3), schedule=Schedule("linear", 1, 3, unit="epoch"), round_to=1),
    }
    seen = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            level = min(1.0, trainer.current_epoch / 3)
            seen.append((zeros(pl_module), round(0.5 * level * size(pl_module))))

    net, _ = fit(tmp_path, *(made[kind] for kind in order), Watch(), max_epochs=5)
    assert [a for a, _ in seen] == [b for _, b in seen]
    assert len(left(net)) < 5
    assert macs(net) <= (0.3 if "s" in order else 0.6) * macs(Net())
    assert set(made["m"].masks) == {
        f"{name}.weight" for name, layer in net.named_modules() if isinstance(layer, (nn.Conv2d, nn.Linear))
    }


@pytest.mark.parametrize("average", [WeightAveraging, lambda: StochasticWeightAveraging(0.01, 1)])
def test_averages_follow(tmp_path, average):
    net, _ = fit(tmp_path, LayerPruning(Budget(macs=0.4), schedule=NOW), average(), max_epochs=4)
    assert len(left(net)) < 5
    assert all(bool(torch.isfinite(p).all()) for p in net.parameters())


def test_a_compiled_module_goes_on(tmp_path):
    class Quiet(Net):
        def training_step(self, batch, batch_idx):
            return self.loss(batch)

    ends = []
    for compiled in (True, False):
        net = Quiet()
        run = trainer(tmp_path, LayerPruning(Budget(macs=0.4), schedule=NOW), max_epochs=3)
        run.fit(torch.compile(net, backend="eager") if compiled else net, data())
        ends.append(net)
    assert str(ends[0]) == str(ends[1])
    for a, b in zip(ends[0].parameters(), ends[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


class Tokens(LightningModule):
    """A transformer that the steps call by a name, with a mask; manual optimization with two optimizers."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.model = nn.ModuleDict(
            {
                "embed": nn.Linear(6, 8),
                "encoder": nn.TransformerEncoder(
                    nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True), 4
                ),
                "head": nn.Linear(8, 2),
            }
        )

    def forward(self, x):
        mask = torch.zeros(x.shape[0], x.shape[2], dtype=torch.bool)
        hidden = self.model["encoder"](self.model["embed"](x[:, 0]), src_key_padding_mask=mask)
        return self.model["head"](hidden.mean(1))

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        biases = [p for p in self.parameters() if p.dim() < 2]
        weights = [p for p in self.parameters() if p.dim() > 1]
        return torch.optim.AdamW(weights, 1e-2), torch.optim.SGD(biases, 1e-2, momentum=0.9)


# Said by torch's own encoder in evaluation with a padding mask.
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("score", ["output", "loss"])
@pytest.mark.parametrize("replace", ["auto", "cheaper"])
def test_a_transformer_loses_layers(tmp_path, score, replace):
    pruning = LayerPruning(
        2, schedule=Schedule(end=12, unit="step", interval="step"), score=score, replace=replace
    )
    net, run = fit(tmp_path, pruning, net=Tokens(), max_epochs=3)
    kinds = [type(layer).__name__ for layer in net.model["encoder"].layers]
    assert kinds.count("TransformerEncoderLayer") == 2
    assert kinds[0] == "TransformerEncoderLayer"
    held = [id(p) for o in run.optimizers for group in o.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in net.parameters())
    assert "does not run without it" in pruning.pruning_summary()["skipped"]["model.encoder.layers.0"]


def test_a_module_without_forward_and_its_two_networks(tmp_path):
    class Two(LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = True
            self.first, self.second = (nn.Sequential(nn.Conv2d(1, 4, 1), Residual(4, 4)) for _ in range(2))
            self.head = nn.Linear(8, 2)

        def training_step(self, batch, batch_idx):
            x = torch.cat([self.first(batch[0]), self.second(batch[0])], 1).mean((2, 3))
            return nn.functional.cross_entropy(self.head(x), batch[1])

        validation_step = training_step

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    net, _ = fit(tmp_path, LayerPruning(1, schedule=NOW), net=Two(), max_epochs=2)
    assert sum(isinstance(n[1], nn.Identity) for n in (net.first, net.second)) == 1


def test_hooks_on_a_block_s_place_stay(tmp_path):
    net, calls = Net(), []
    handle = net.two[1].register_forward_hook(lambda layer, inputs, out: calls.append(type(layer).__name__))
    fit(tmp_path, LayerPruning(1, schedule=NOW, include=["two.1"]), net=net, max_epochs=2)
    assert calls[0] == "Residual"
    assert calls[-1] == "Identity"
    handle.remove()
    count = len(calls)
    net(torch.zeros(1, 1, 6, 6))
    assert len(calls) == count


def test_a_second_fit_takes_nothing_more(tmp_path):
    pruning = LayerPruning(2, schedule=NOW)
    net, _ = fit(tmp_path, pruning, max_epochs=2)
    names = left(net)
    fit(tmp_path, pruning, net=net, max_epochs=3)
    assert left(net) == names
    assert len(pruning.pruning_summary()["history"]) == 1


def test_two_of_them_share_the_blocks(tmp_path):
    one = LayerPruning(1, schedule=NOW, include=["one.*"])
    two = LayerPruning(Budget(macs=0.6), schedule=Schedule("one_shot", 2, unit="epoch"), include=["two.*"])
    net, _ = fit(tmp_path, one, two, max_epochs=4)
    assert sum(name.startswith("one") for name in left(net)) == 1
    assert macs(net) <= 0.6 * macs(Net())


WRONG = {
    "budget of zero": (lambda: LayerPruning(0), BudgetError, "at least one block"),
    "budget in channels": (lambda: LayerPruning(Budget(channels=0.5)), ConfigurationError, "macs or params"),
    "budget is a fraction": (lambda: LayerPruning(0.5), ConfigurationError, r"Budget\(macs=0.75\)"),
    "score": (lambda: LayerPruning(score="bi"), ConfigurationError, "'output'"),
    "replace": (lambda: LayerPruning(replace="linear"), ConfigurationError, "'cheaper'"),
    "schedule": (lambda: LayerPruning(schedule=0.5), ConfigurationError, "Schedule"),
    "recalibrate": (lambda: LayerPruning(recalibrate=-1), ConfigurationError, "at least 0"),
    "no batches": (lambda: LayerPruning(calibration_batches=0), ConfigurationError, "at least 1"),
}


@pytest.mark.parametrize(("make", "error", "message"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_refused_at_once(make, error, message):
    with pytest.raises(error, match=message):
        make()


class Plain(Net):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 8, 3)


class Silent(Net):
    def training_step(self, batch, batch_idx):
        self.manual_backward(self.loss(batch))

    def validation_step(self, batch, batch_idx):
        self.log("accuracy", 1.0)


LATER = {
    "out of reach": (Net, LayerPruning(Budget(macs=0.01)), BudgetError, "smallest reachable"),
    "too many": (Net, LayerPruning(7), BudgetError, "only 5 of 5"),
    "misspelt": (Net, LayerPruning(1, include=["onee.*"]), SelectionError, "one"),
    "no blocks": (Plain, LayerPruning(1), ConfigurationError, "without residual blocks"),
    "no loss": (Silent, LayerPruning(1, score="loss"), ConfigurationError, "val"),
}


@pytest.mark.parametrize(("make", "pruning", "error", "message"), LATER.values(), ids=LATER)
def test_what_depends_on_the_module_is_refused_before_training(tmp_path, make, pruning, error, message):
    net = make()
    before = copy.deepcopy(net.state_dict())
    net.automatic_optimization = make is not Silent
    with pytest.raises(error, match=message):
        fit(tmp_path, pruning, net=net)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert "on_save_checkpoint" not in vars(net)


def test_what_was_put_by_hand_is_no_block(tmp_path):
    net = Net()
    put(net, "one.0", nn.Identity())
    pruning = LayerPruning(1, schedule=NOW)
    fit(tmp_path, pruning, net=net, max_epochs=2)
    assert [block["name"] for block in pruning.pruning_summary()["blocks"]] == BLOCKS[1:]


def test_statistics_of_normalisation_are_estimated_anew_after_an_exchange(tmp_path):
    found = {}

    class Watch(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            found.setdefault("net", copy.deepcopy(pl_module))

    layers = LayerPruning(1, schedule=Schedule("one_shot", 0), include=["two.1"], recalibrate=8)
    fit(tmp_path, layers, Watch(), max_epochs=1)
    net, means = found["net"], []
    assert isinstance(net.two[1], nn.Identity)
    estimated = net.two[2].norm1.running_mean.clone()
    handle = net.two[2].norm1.register_forward_pre_hook(
        lambda norm, args: means.append(args[0].mean((0, 2, 3)))
    )
    for batch in data():
        net.train()(batch[0])
    handle.remove()
    torch.testing.assert_close(estimated, torch.stack(means).mean(0), rtol=1e-4, atol=1e-5)


def test_a_guard_takes_a_block_too_many_back(tmp_path):
    class Scored(Net):
        def on_validation_epoch_end(self):
            self.log("score", float(len(left(self)) >= 4))

    class Watch(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
            assert held == {id(p) for p in pl_module.parameters()}
            counts.append(len(left(pl_module)))

    counts: list[int] = []
    pruning = LayerPruning(3, schedule=Schedule("linear", 0, 4, unit="epoch"))
    guard = AccuracyGuard("score", 0.1, patience=1, min_step=0.2)
    net, _ = fit(tmp_path, pruning, guard, Watch(), net=Scored("adamw"), max_epochs=8)
    assert min(counts) == 3
    assert counts[-1] == len(left(net)) == 4
    entries = pruning.pruning_summary()["blocks"]
    assert [entry["name"] for entry in entries if not entry["became"]] == left(net)


GATHERING = {
    "gradients": {"criterion": "snip"},
    "activations": {"criterion": "wanda"},
    "regrowth": {"training": SparseTraining("rigl", every=3)},
    "rewinding": {"training": SparseTraining(rewind_to=0)},
}


@pytest.mark.parametrize("arguments", GATHERING.values(), ids=GATHERING)
def test_what_masks_gather_in_training_follows(tmp_path, arguments):
    masks = MagnitudePruning(0.5, schedule=Schedule("linear", 1, 3, unit="epoch"), **arguments)
    layers = LayerPruning(2, schedule=Schedule("linear", 0, 2, unit="epoch"), include=["two.0", "two.2"])
    net, _ = fit(tmp_path, masks, layers, max_epochs=5)
    assert type(net.two[0]) is nn.Conv2d
    assert zeros(net) == round(0.5 * size(net))


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed", "64-true"])
def test_other_precisions(tmp_path, precision):
    layers = LayerPruning(2, schedule=NOW, include=["two.0", "two.2"])
    net, _ = fit(tmp_path, layers, max_epochs=2, precision=precision, accumulate_grad_batches=3)
    wanted = {"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(precision, torch.float32)
    assert {p.dtype for p in net.parameters()} == {wanted}
    assert all(bool(torch.isfinite(p).all()) for p in net.parameters())
