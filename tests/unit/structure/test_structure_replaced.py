"""Layers that stand at the place of others: in and out again, in copies, and through checkpoints."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from lightning_prune.errors import CheckpointError
from lightning_prune.structure import manifest, replaced
from lightning_prune.structure.surgery import resize


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, stride=2)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x):
        return self.norm(self.conv(x))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Block()
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.block(x).mean((2, 3)))


def split():
    first = nn.Conv2d(3, 2, 1, bias=False)
    core = nn.Conv2d(2, 4, 3, padding=1, stride=2, bias=False)
    return nn.Sequential(first, core, nn.Conv2d(4, 8, 1))


SPLIT = replaced.spec_of(split())


def test_a_network_takes_on_replaced_layers_from_a_description_and_gives_them_back():
    there, here = Net(), Net()
    dense = manifest.describe(there)
    replaced.put(there, "block.conv", split())
    description = manifest.describe(there)
    manifest.reshape(here, description)
    here.load_state_dict(there.state_dict())
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(here.eval()(x), there.eval()(x))
    manifest.reshape(here, dense)
    assert manifest.describe(here) == dense
    assert str(here) == str(Net())
    here.load_state_dict(Net().state_dict())


@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["copy", "pickle"]
)
def test_copies_know_what_was_there(way):
    net = Net()
    dense = manifest.describe(net)
    replaced.put(net, "block.conv", split())
    twin = way(net)
    assert manifest.describe(twin) == manifest.describe(net)
    manifest.reshape(twin, dense)
    assert type(twin.block.conv) is nn.Conv2d
    assert type(net.block.conv) is nn.Sequential


def test_a_whole_block_of_the_users_own_comes_back_with_its_buffers():
    net = Net()
    net.block.register_buffer("scale", torch.tensor([3.0]), persistent=False)
    dense = manifest.describe(net)
    replaced.put(net, "block.conv", split())
    replaced.put(net, "block", nn.Identity())
    assert list(replaced.specs(net)) == ["block"]
    manifest.reshape(net, dense)
    assert type(net.block) is Block
    assert type(net.block.conv) is nn.Conv2d
    assert net.block.scale.item() == 3.0


def test_other_widths_leave_the_parameters_the_objects_they_are():
    net, narrower = Net(), Net()
    replaced.put(net, "block.conv", split())
    layers = nn.Sequential(nn.Conv2d(3, 1, 1, bias=False), *split()[1:])
    layers[1].in_channels = 1
    resize(layers[1].weight, torch.empty(4, 1, 3, 3))
    replaced.put(narrower, "block.conv", layers)
    before = list(net.parameters())
    manifest.reshape(net, manifest.describe(narrower))
    assert all(a is b for a, b in zip(before, net.parameters(), strict=True))
    assert net.block.conv[0].out_channels == 1
    assert net.block.conv[0].weight.shape == (1, 3, 1, 1)


def test_hooks_stay_with_the_place_and_their_handles_still_remove_them():
    net, seen = Net(), []
    handle = net.block.conv.register_forward_hook(lambda layer, args, out: seen.append(out.shape))
    replaced.put(net, "block.conv", split())
    net(torch.zeros(2, 3, 8, 8))
    handle.remove()
    net(torch.zeros(2, 3, 8, 8))
    assert seen == [(2, 8, 4, 4)]


def test_a_layer_takes_on_the_mode_of_what_was_there():
    net = Net().eval()
    replaced.put(net, "head", nn.Identity())
    assert not net.head.training


def test_building_draws_no_random_number():
    net, state = Net(), torch.get_rng_state()
    replaced.bring_in_line(net, {"block.conv": SPLIT})
    replaced.bring_in_line(net, {})
    assert torch.equal(torch.get_rng_state(), state)


def test_descriptions_load_without_unpickling():
    net = Net()
    replaced.put(net, "block.conv", split())
    file = io.BytesIO()
    torch.save(manifest.to_checkpoint(net), file)
    file.seek(0)
    entry = torch.load(file, weights_only=True)
    assert entry == manifest.to_checkpoint(net)
    assert entry["version"] == 2
    assert manifest.to_checkpoint(Net())["version"] == 1


def test_two_structures_of_the_same_shapes_differ():
    net = nn.Sequential(nn.ReLU(), nn.Linear(2, 2))
    dense = manifest.describe(net)
    replaced.put(net, "0", nn.Identity())
    assert manifest.differs(net, dense)
    assert manifest.differs(nn.Sequential(nn.ReLU(), nn.Linear(2, 2)), manifest.describe(net))


@pytest.mark.parametrize(
    "modules",
    [
        {"block.conv": {"kind": "os.system", "arguments": {}}},
        {"block.conv": {"kind": "Linear", "arguments": {"in_features": 4}}},
        {
            "block.conv": {
                "kind": "Linear",
                "arguments": {"in_features": -4, "out_features": 1, "bias": False},
            }
        },
        {"block.conv": {"kind": "Sequential", "children": 3}},
        {"block.conv": {}},
        {"nowhere": {"kind": "Identity", "arguments": {}}},
        {"": {"kind": "Identity", "arguments": {}}},
        {"block.conv": None},
        ["block.conv"],
    ],
    ids=[
        "unknown kind",
        "arguments missing",
        "negative",
        "no children",
        "empty",
        "no place",
        "itself",
        "None",
        "list",
    ],
)
def test_malformed_descriptions_change_nothing(modules):
    net = Net()
    before = manifest.describe(net)
    with pytest.raises(CheckpointError):
        manifest.reshape(net, {**before, "modules": modules})
    assert manifest.describe(net) == before


def test_a_description_whose_tensors_do_not_fit_changes_no_layer():
    net = Net()
    before = manifest.describe(net)
    with pytest.raises(CheckpointError):
        manifest.reshape(net, {**before, "modules": {"block.conv": replaced.spec_of(split())}})
    assert type(net.block.conv) is nn.Conv2d


def test_only_layers_that_can_be_described_are_put_in():
    with pytest.raises(TypeError, match="Block"):
        replaced.put(Net(), "block", Block())
