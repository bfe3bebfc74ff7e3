"""A pruned network goes to plain PyTorch and back; what is damaged or foreign loads nothing."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn

from lightning_prune import load_state, save_state
from lightning_prune.errors import CheckpointError, ConfigurationError, OutputError
from lightning_prune.structure import manifest, standalone
from lightning_prune.structure.budget import Budget
from lightning_prune.structure.costs import Example
from lightning_prune.structure.plan import Recipe, measure, plan, survey
from lightning_prune.structure.replaced import Bypass, put
from lightning_prune.structure.surgery import apply

NETWORK = '''
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self, inputs, outputs, stride=1):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs)
        self.same = inputs == outputs and stride == 1
    def forward(self, x, scale=1.0):
        y = self.norm(self.conv(x)).relu() * scale
        return x + y if self.same else y

class Net(nn.Module):
    """Residual, tied, with a layer norm, a grouped convolution and an LSTM."""
    def __init__(self, width=8):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.GroupNorm(2, width))
        self.one, self.two, self.three = Block(width, width), Block(width, 12, 2), Block(12, 12)
        self.depthwise = nn.Conv2d(12, 12, 3, groups=12, padding=1)
        self.lstm, self.norm = nn.LSTM(12, 6), nn.LayerNorm(6)
        self.first, self.second = nn.Linear(6, 5, bias=False), nn.Linear(6, 5, bias=False)
        self.second.weight = self.first.weight
    def forward(self, x):
        x = self.depthwise(self.three(self.two(self.one(self.stem(x), scale=0.5))))
        x = self.norm(self.lstm(x.flatten(2).permute(2, 0, 1))[0].mean(0))
        return self.first(x) + self.second(x)
'''
exec(compile(NETWORK, "network", "exec"))
Net = globals()["Net"]


@pytest.fixture(scope="module")
def pruned():
    """Channels are gone, one block is an identity with an argument, and one a convolution."""
    torch.manual_seed(0)
    net, x = Net().eval(), torch.randn(2, 3, 8, 8)
    put(net, "one", Bypass(nn.Identity()))
    put(net, "two", nn.Conv2d(8, 12, 1, stride=2))
    example = Example((x,), {}, ((x[:1],), {}))
    groups = survey(net, example)
    recipe = Recipe(Budget(channels=0.6), round_to=1)
    apply(net, plan(net, groups, recipe, measure(net, groups, example), 1.0, example))
    assert sum(p.numel() for p in net.parameters()) < 0.8 * sum(p.numel() for p in Net().parameters())
    return net, x


@pytest.fixture
def saved(pruned, tmp_path):
    return save_state(pruned[0], tmp_path / "small.pt")


def test_a_dense_network_takes_on_structure_and_weights(pruned, saved):
    small, x = pruned
    net = Net()
    kept = id(net.first.weight)
    assert load_state(net, saved) is net
    assert torch.equal(net.eval()(x), small(x))
    assert str(net) == str(small)
    assert net.first.weight is net.second.weight
    assert id(net.first.weight) == kept
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), small.parameters(), strict=True))


def test_a_pruned_network_grows_back(pruned, saved, tmp_path):
    dense = Net().eval()
    path = save_state(dense, tmp_path / "dense.pt")
    net = load_state(load_state(Net(), saved), path).eval()
    assert str(net) == str(dense)
    assert torch.equal(net(pruned[1]), dense(pruned[1]))


def test_the_state_dict_is_one_that_torch_reads_and_the_manifest_is_json(pruned, saved):
    state = torch.load(saved, weights_only=True)
    assert all(torch.equal(value, pruned[0].state_dict()[name]) for name, value in state.items())
    about = json.loads(saved.with_suffix(".json").read_text())
    assert about["class"] == "Net"
    assert about["needs"] == []
    assert list(about["structure"]["modules"]) == ["one", "two"]


def test_two_lines_load_it_without_this_package(pruned, saved):
    folder = saved.parent
    (folder / "net.py").write_text(NETWORK)
    torch.save((pruned[1], pruned[0](pruned[1]).detach()), folder / "expected.pt")
    program = (
        "import sys, torch; from net import Net; from small import load\n"
        "net = load(Net()).eval()\n"
        "x, y = torch.load('expected.pt')\n"
        "assert torch.equal(net(x), y)\n"
        "foreign = [n for n in sys.modules if n.split('.')[0] in ('lightning_prune', 'pytorch_lightning')]\n"
        "assert not foreign, foreign\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_heads_that_need_this_package_say_so(tmp_path):
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            return self.heads(x, x, x)[0]

    net, x = Attention().eval(), torch.randn(1, 3, 8)
    one_head = manifest.describe(net)
    sizes = {"in_proj_weight": [12, 8], "in_proj_bias": [12], "out_proj.weight": [8, 4]}
    one_head["tensors"].update({f"heads.{name}": size for name, size in sizes.items()})
    one_head["attributes"]["heads"]["num_heads"] = 1
    one_head["attributes"]["heads.out_proj"]["in_features"] = 4
    manifest.reshape(net, one_head)
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    path = save_state(net, tmp_path / "small.pt")
    with pytest.raises(ValueError, match=r"needs lightning_prune\.load_state.*FreeMultiheadAttention"):
        standalone.load(Attention(), path.with_suffix(""))
    assert torch.equal(load_state(Attention(), path).eval()(x), net(x))


def edited(change):
    def edit(path):
        about = json.loads(path.with_suffix(".json").read_text())
        change(about)
        path.with_suffix(".json").write_text(json.dumps(about))

    return edit


def of_another_network(path):
    save_state(nn.Sequential(nn.Linear(3, 3)), path)


def of_a_part(path):
    net = Net()
    del net.norm
    save_state(net, path)


def other_weights(path):
    save_state(Net(), path.with_name("other.pt"))
    shutil.copy(path.with_name("other.pt"), path)


DAMAGE = {
    "no manifest": lambda path: path.with_suffix(".json").unlink(),
    "no weights": lambda path: path.unlink(),
    "half a manifest": lambda path: path.with_suffix(".json").write_text('{"format": "li'),
    "another file": lambda path: path.with_suffix(".json").write_text('{"files": []}'),
    "a list": lambda path: path.with_suffix(".json").write_text("[1]"),
    "half the weights": lambda path: path.write_bytes(path.read_bytes()[:500]),
    "weights of another file": other_weights,
    "later version": edited(lambda about: about.update(version=99)),
    "no structure": edited(lambda about: about.pop("structure")),
    "an unknown layer": edited(lambda about: about["structure"]["modules"]["two"].update(kind="Softmax")),
    "a layer elsewhere": edited(
        lambda about: about["structure"]["modules"].update(four=about["structure"]["modules"].pop("two"))
    ),
    "another width": edited(lambda about: about["structure"]["tensors"].update({"norm.weight": [99]})),
    "a width is a word": edited(lambda about: about["structure"]["tensors"].update({"norm.weight": ["a"]})),
    "another network": of_another_network,
    "a part of it": of_a_part,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_what_is_damaged_or_foreign_is_an_error_and_loads_nothing(saved, damage):
    damage(saved)
    net = Net()
    before, shown = copy.deepcopy(net.state_dict()), str(net)
    objects = [id(p) for p in net.parameters()]
    with pytest.raises(CheckpointError):
        load_state(net, saved)
    with pytest.raises((ValueError, OSError)):
        standalone.load(net, saved.with_suffix(""))
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert str(net) == shown
    assert [id(p) for p in net.parameters()] == objects


def test_widths_of_the_network_as_built_do_not_matter(pruned, saved):
    wider = load_state(Net(width=16), saved).eval()
    assert torch.equal(wider(pruned[1]), pruned[0](pruned[1]))


def test_the_program_reads_the_manifests_that_are_written():
    assert standalone.VERSION == manifest.VERSION


def test_a_path_that_is_none_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match=r"ends in \.pt"):
        save_state(nn.Linear(1, 1), tmp_path / "small.ckpt")
    with pytest.raises(OutputError):
        save_state(nn.Linear(1, 1), tmp_path / "nowhere" / "small.pt")
