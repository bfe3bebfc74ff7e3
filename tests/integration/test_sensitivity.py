"""Sensitivity against changes made by hand, and what it leaves: a config that trains, a picture, numbers."""

from __future__ import annotations

import copy
import json
import xml.etree.ElementTree as ElementTree

import pytest
import torch
import yaml
from command_cases import CONFIG, command
from magnitude_cases import LIGHTNING_WARNINGS, data, trainer
from structural_cases import Net, assert_equal_state, macs
from torch import nn
from torch.nn import functional as F

from lightning_prune.callbacks.magnitude_pruning import MagnitudePruning
from lightning_prune.errors import ConfigurationError, SelectionError
from lightning_prune.schedules import Schedule
from lightning_prune.sensitivity import Sensitivity, Trial, sensitivity, write
from lightning_prune.structure.graph import trace
from lightning_prune.structure.importance import magnitude

pytestmark = LIGHTNING_WARNINGS


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    net = Net()
    trainer(tmp_path_factory.mktemp("fit"), max_epochs=3).fit(net, data(), data())
    return net


def loss(net):
    with torch.no_grad():
        return float(sum(net.eval().loss(batch) for batch in data()) / 8)


def by_name(found, kind):
    return {(trial.name, trial.level): trial for trial in found.trials if trial.kind == kind}


def test_zeros_are_those_of_magnitude_pruning_layer_by_layer(trained, tmp_path):
    found = sensitivity(trained, dataloaders=data(), kinds=["sparsity"], levels=[0.5, 0.9])
    assert found.metric == "val_loss"
    assert found.value == pytest.approx(loss(copy.deepcopy(trained)), rel=1e-5)
    trials = by_name(found, "sparsity")
    assert {name for name, _ in trials} == {"stem.0.weight", "a.0.weight", "b.0.weight", "head.weight"}
    for (name, level), trial in trials.items():
        twin = copy.deepcopy(trained)
        weight = dict(twin.named_parameters())[name]
        nn.utils.prune.l1_unstructured(twin.get_submodule(name.rpartition(".")[0]), "weight", amount=level)
        assert trial.value == pytest.approx(loss(twin), rel=1e-5), weight.shape
        assert trial.harm == pytest.approx(trial.value - found.value)


def test_widths_are_real_cuts_of_one_group_at_a_time(trained):
    found = sensitivity(trained, dataloaders=data(), kinds=["width"], levels=[0.5])
    trials = by_name(found, "width")
    assert set(trials) == {("stem.0", 0.5), ("a.0", 0.5)}
    for name, reader in (("a.0", "b.0"), ("stem.0", "a.0")):
        group = next(g for g in trace(trained, (next(iter(data()))[0],)) if g.name == name)
        gone = magnitude(trained, group).argsort()[: group.channels // 2]
        twin = copy.deepcopy(trained)
        twin.get_submodule(reader).weight.data[:, gone] = 0.0
        if name == "stem.0":  # the block adds to them, and the head reads them
            twin.head.weight.data[:, gone] = 0.0
        assert trials[name, 0.5].value == pytest.approx(loss(twin), rel=1e-4)
    assert macs(trained) == macs(Net())


def test_int8_rounds_weights_and_inputs_of_one_layer(trained):
    found = sensitivity(trained, dataloaders=data(), kinds=["int8"])
    trials = by_name(found, "int8")
    assert {name for name, _ in trials} == {"stem.0", "a.0", "b.0", "head"}
    twin = copy.deepcopy(trained).eval()
    weight = twin.head.weight.data
    scale = weight.abs().amax(1) / 127
    twin.head.weight.data = torch.fake_quantize_per_channel_affine(
        weight, scale, torch.zeros(2, dtype=torch.int32), 0, -128, 127
    )

    def head(x):
        low, high = min(0.0, float(x.min())), max(0.0, float(x.max()))
        step = (high - low) / 255
        x = torch.fake_quantize_per_tensor_affine(x, step, round(-low / step), 0, 255)
        return F.linear(x, twin.head.weight, twin.head.bias)

    twin.head.forward = head
    assert trials["head", 1.0].value == pytest.approx(loss(twin), rel=1e-4)


def test_a_layer_that_8_bits_hurt_is_found(trained):
    net = copy.deepcopy(trained)
    with torch.no_grad():  # one huge input channel leaves the others no steps
        net.a[0].weight[:, 0] *= 1e-4
        net.stem[1].weight[0] *= 1e4
        net.stem[1].bias[0] *= 1e4
    found = sensitivity(net, dataloaders=data(), kinds=["int8"])
    assert found.hurt_by_int8(0.0)[0] in ("a.0", "head", "b.0")


def test_the_module_stays_as_it_is_and_again_gives_the_same(trained):
    before, hooks = copy.deepcopy(trained.state_dict()), len(trained.head._forward_pre_hooks)
    state = torch.get_rng_state()
    first = sensitivity(trained, dataloaders=data(), levels=[0.5], batches=2)
    again = sensitivity(trained, dataloaders=data(), levels=[0.5], batches=2)
    assert first == again
    assert_equal_state(dict(trained.state_dict()), dict(before))
    assert len(trained.head._forward_pre_hooks) == hooks
    assert torch.equal(torch.get_rng_state(), state)


def test_progress_reaches_the_end(trained):
    seen = []
    sensitivity(
        trained, dataloaders=data(), kinds=["sparsity"], levels=[0.5], batches=1, include=["head"],
        progress=lambda stage, fraction: seen.append((stage, fraction)),
    )  # fmt: skip
    assert seen == [("sparsity of head.weight", 0.0), ("done", 1.0)]


def trials(*rows):
    return Sensitivity("val_acc", 0.9, tuple(Trial("sparsity", *row) for row in rows))


def test_what_is_bearable_ends_before_the_first_that_is_not():
    found = trials(
        ("a", 0.25, 0.9, 0.0), ("a", 0.5, 0.8, 0.1), ("a", 0.75, 0.9, 0.0), ("b", 0.25, 0.8, 0.1),
        ("b", 0.5, 0.9, 0.0), ("c", 0.5, 0.905, -0.005),
    )  # fmt: skip
    assert found.bearable(0.01) == {"a": 0.25, "b": 0.0, "c": 0.5}


def test_the_levels_go_into_a_config_and_train_to_exactly_that(trained, tmp_path):
    found = sensitivity(trained, dataloaders=data(), levels=[0.3, 0.6], batches=2)
    paths = write(found, tmp_path / "out", max_drop=0.05)
    assert [path.name for path in paths] == ["sensitivity.json", "sensitivity.svg", "sensitivity.yaml"]
    levels = yaml.safe_load(paths[2].read_text())
    assert set(levels) == {"sparsity", "width", "exclude_int8"}
    assert any(levels["sparsity"].values())
    pruning = MagnitudePruning(levels["sparsity"], schedule=Schedule("one_shot", 0, unit="epoch"))
    net = Net()
    trainer(tmp_path, pruning, max_epochs=1).fit(net, data(), data())
    for name, level in levels["sparsity"].items():
        weight = dict(net.named_parameters())[name]
        assert int((weight == 0).sum()) == round(level * weight.numel())


def test_the_files_hold_everything_and_are_well_formed(trained, tmp_path):
    found = sensitivity(trained, dataloaders=data(), levels=[0.3, 0.6], batches=1)
    paths = write(found, tmp_path, max_drop=0.05)
    raw = json.loads(paths[0].read_text())
    assert len(raw["trials"]) == len(found.trials)
    root = ElementTree.fromstring(paths[1].read_text())
    tag = "{http://www.w3.org/2000/svg}"
    assert len(root.findall(f"{tag}rect")) == len(found.trials)
    words = [element.text for element in root.iter(f"{tag}text")]
    assert {trial.name for trial in found.trials} <= set(words)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"kinds": ["sparsty"]}, ConfigurationError, "Did you mean 'sparsity'"),
        ({"levels": []}, ConfigurationError, "`levels`"),
        ({"levels": [50]}, ConfigurationError, "`levels`"),
        ({"batches": 0}, ConfigurationError, "`batches`"),
        ({"metric": "val_los"}, ConfigurationError, "Did you mean 'val_loss'"),
        ({"include": ["nothing"]}, SelectionError, "nothing"),
    ],
    ids=["kind", "no level", "percent", "batches", "metric", "include"],
)
def test_wrong_input_is_refused(trained, arguments, error, match):
    with pytest.raises(error, match=match):
        sensitivity(trained, dataloaders=data(), **arguments)


def test_without_validation_data_it_says_so(trained):
    with pytest.raises(ConfigurationError, match="validation data"):
        sensitivity(trained)


def test_the_command_writes_the_files(tmp_path):
    (tmp_path / "config.yaml").write_text(CONFIG)
    out = command(tmp_path, "sensitivity --config config.yaml --batches 1 --levels [0.5] --dirpath out")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["sensitivity.json", "sensitivity.svg", "sensitivity.yaml"]
    assert "sparsity:" in out
