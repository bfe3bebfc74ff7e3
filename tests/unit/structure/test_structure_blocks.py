"""Blocks are found by what they compute; what takes their place does what bypassing them does."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lightning_prune.structure.blocks import find_blocks, stand_in
from lightning_prune.structure.costs import Example
from lightning_prune.structure.replaced import put


class Add(nn.Module):
    """`x + f(x)` around any function."""

    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x):
        return x + self.f(x)


def mlp(width=4):
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 8), nn.GELU(), nn.Linear(8, width))


class Gated(nn.Module):
    """In place, with a learned scale, dropout and a squeeze-and-excitation gate inside."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.gate = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.full((1,), 0.1))

    def forward(self, x):
        y = self.norm(self.conv(x))
        y = y * self.gate(y.mean((2, 3))).sigmoid()[..., None, None]
        y = F.dropout(y, 0.1, self.training) * self.scale
        y += x
        return F.relu_(y)


class PostNorm(nn.Module):
    """A transformer layer as BERT has it: the sums are made by helpers that are no blocks themselves."""

    class Output(nn.Module):
        def __init__(self):
            super().__init__()
            self.dense, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)

        def forward(self, hidden, x):
            return self.norm(self.dense(hidden) + x)

    def __init__(self):
        super().__init__()
        self.query, self.first, self.second = nn.Linear(4, 4), self.Output(), self.Output()

    def forward(self, x, mask=None):
        weights = (self.query(x) @ x.transpose(1, 2)).softmax(-1)
        y = self.first(weights @ x, x)
        return (self.second(y.relu(), y), None)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(PostNorm() for _ in range(3))
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x, mask=None)[0]
        return self.head(x)


class Dense(nn.Module):
    """Three inner residual blocks, scaled and added to the input of them all."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(*(Add(nn.Conv2d(4, 4, 3, padding=1)) for _ in range(3)))

    def forward(self, x):
        return x + 0.2 * self.inner(x)


class Denoiser(nn.Module):
    """Skips over the whole network, which has two blocks."""

    def __init__(self):
        super().__init__()
        self.net = Dense()
        self.last = nn.Conv2d(4, 4, 1)

    def forward(self, x):
        return x - self.last(self.net(x))


def image():
    return torch.randn(2, 4, 6, 6)


def tokens():
    return torch.randn(2, 5, 4)


def ends(*blocks):
    return nn.Sequential(nn.Conv2d(4, 4, 1), *blocks, nn.Conv2d(4, 2, 1))


def token_ends(*blocks):
    return nn.Sequential(nn.Linear(4, 4), *blocks, nn.Linear(4, 2))


FOUND = {
    "residual functions": (lambda: token_ends(Add(mlp()), Add(mlp())), tokens, ["1", "2"]),
    "a row in a row": (lambda: token_ends(nn.Sequential(Add(mlp()), Add(mlp()))), tokens, ["1.0", "1.1"]),
    "in place, scaled, gated": (lambda: ends(Gated(), Gated()), image, ["1", "2"]),
    "sums made by helpers": (Encoder, tokens, ["layers.0", "layers.1", "layers.2"]),
    "blocks in blocks": (lambda: ends(Dense()), image, ["1.inner.0", "1.inner.1", "1.inner.2"]),
    "a skip over everything": (lambda: ends(Denoiser()), image, [f"1.net.inner.{i}" for i in range(3)]),
    "nothing is added": (lambda: ends(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())), image, []),
    "a gate is no sum": (lambda: ends(nn.SiLU(), nn.BatchNorm2d(4)), image, []),
    "a norm between": (lambda: token_ends(nn.LayerNorm(4), Add(mlp())), tokens, ["2"]),
}


def blocks_of(net, x, **arguments):
    return find_blocks(net, Example((x,), {}, ((x[:1],), {})), **arguments)


@pytest.mark.parametrize(("make", "inputs", "names"), FOUND.values(), ids=FOUND)
def test_blocks_are_found_by_what_they_compute(make, inputs, names):
    torch.manual_seed(0)
    found = blocks_of(make(), inputs())
    assert [block.name for block in found] == names
    assert all(block.becomes == "identity" for block in found)


def test_an_exchanged_network_computes_what_its_blocks_bypassed_would():
    torch.manual_seed(0)
    net, x = Encoder().eval(), tokens()
    blocks = blocks_of(net, x)
    small = copy.deepcopy(net)
    for block in (blocks[0], blocks[2]):
        put(small, block.name, stand_in(small, block))
    assert torch.equal(small(x), net.head(net.layers[1](x)[0]))


def test_a_torch_encoder_loses_all_layers_but_the_one_it_reads():
    net = nn.Sequential(
        nn.Linear(4, 8), nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 3)
    )
    first, *others = blocks_of(net, tokens())
    assert "does not run without it" in first.reason
    assert [block.becomes for block in others] == ["identity", "identity"]


class Strided(nn.Module):
    def __init__(self, inputs, outputs, stride, bias=True):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=bias)
        self.same = stride == 1 and inputs == outputs

    def forward(self, x):
        return x + self.conv(x) if self.same else self.conv(x)


@pytest.mark.parametrize(
    ("replacement", "became"),
    [
        ("auto", ["identity", "1x1 convolution 4 -> 6, stride 2x2", "identity"]),
        (
            "cheaper",
            ["1x1 convolution 4 -> 4", "1x1 convolution 4 -> 6, stride 2x2", "1x1 convolution 6 -> 6"],
        ),
        ("identity", ["identity", "stays", "identity"]),
    ],
)
def test_blocks_of_a_class_that_change_shapes_become_1x1_convolutions(replacement, became):
    net = ends(Strided(4, 4, 1), Strided(4, 6, 2), Strided(6, 6, 1))
    net[-1] = nn.Conv2d(6, 2, 1)
    for size in (6, 7):
        found = blocks_of(net, torch.randn(2, 4, size, size), replacement=replacement)
        assert [block.becomes for block in found] == became


@pytest.mark.parametrize("bias", [False, True])
def test_what_takes_the_place_has_a_bias_if_the_block_had_any(bias):
    net = ends(Strided(4, 4, 1, bias), Strided(4, 4, 2, bias))
    found = blocks_of(net, image())
    assert found[1].layer["arguments"]["bias"] is bias


def test_token_blocks_become_linear_layers():
    class Widen(Add):
        def forward(self, x):
            return super().forward(x) if self.f[-1].out_features == 4 else self.f(x)

    wide = nn.Sequential(nn.Linear(4, 9), nn.GELU(), nn.Linear(9, 6))
    net = nn.Sequential(Widen(mlp()), Widen(wide), nn.Linear(6, 2))
    assert [b.becomes for b in blocks_of(net, tokens())] == ["identity", "linear 4 -> 6"]


def test_what_is_named_is_a_block_whatever_it_computes():
    net = ends(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()), nn.ReLU())
    (found,) = blocks_of(net, image(), named=["1"])
    assert found.becomes == "1x1 convolution 4 -> 4"
    (found,) = blocks_of(net, image(), named=["1"], replacement="identity")
    assert found.becomes == "identity"


def test_a_name_of_what_holds_blocks_means_these_and_one_inside_a_block_means_it_alone():
    net = token_ends(nn.Sequential(Add(mlp()), Add(mlp())), Add(mlp()))
    assert [block.name for block in blocks_of(net, tokens(), named=["1"])] == ["1.0", "1.1", "2"]
    found = blocks_of(net, tokens(), named=["1.0.f"])
    assert [block.name for block in found] == ["1.0.f", "1.1", "2"]
    assert found[0].becomes == "linear 4 -> 4"


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.block, self.last = nn.Linear(4, 4), Add(mlp()), nn.Linear(4, 2)

    def forward(self, x):
        return self.last(self.block(self.block(self.first(x))))


class Tied(Twice):
    def __init__(self):
        super().__init__()
        self.block.f = nn.Linear(4, 4)
        self.first.weight = self.block.f.weight

    def forward(self, x):
        return self.last(self.block(self.first(x)))


class Reads(Twice):
    def forward(self, x):
        return self.last(self.block(self.first(x))) * self.block.f[1].weight.mean()


class Keeps(Twice):
    """Calls its block through a plain list, where no exchange can reach it."""

    def __init__(self):
        super().__init__()
        self.calls = [self.first, self.block, self.last]

    def forward(self, x):
        for call in self.calls:
            x = call(x)
        return x


class Pair(Add):
    def forward(self, x):
        y = self.f(x)
        return x + y, y


class GivesPair(Twice):
    def __init__(self):
        super().__init__()
        self.block = Pair(mlp())

    def forward(self, x):
        return self.last(self.block(self.first(x))[0])


class Aliased(Tied):
    def __init__(self):
        Twice.__init__(self)
        self.other = self.block


REASONS = {
    "called twice": (Twice, "runs 2 times"),
    "tied to another layer": (Tied, "shares a weight with first.weight"),
    "read by the network": (Reads, "does not run without it"),
    "kept in a list": (Keeps, "uses more of it than its output"),
    "returns two tensors": (GivesPair, "more than one tensor"),
    "registered twice": (Aliased, "it is other too"),
    "not selected": (Twice, "not selected"),
}


@pytest.mark.parametrize(("make", "reason"), REASONS.values(), ids=REASONS)
def test_what_cannot_go_stays_with_its_reason(make, reason):
    choose = (lambda names: []) if reason == "not selected" else (lambda names: names)
    (block,) = blocks_of(make(), tokens(), choose=choose)
    assert reason in block.reason
    assert block.becomes == "stays"


def test_outputs_may_be_nested_empty_whole_numbers_and_flags():
    class Detector(Twice):
        def forward(self, x):
            boxes = self.last(self.block(self.first(x)))
            return [{"boxes": boxes, "none": boxes[:, :0], "labels": boxes.argmax(-1), "keep": boxes > 0}]

    (block,) = blocks_of(Detector(), tokens())
    assert block.becomes == "identity"


def test_the_last_thing_that_learns_stays():
    net = nn.Sequential(Add(mlp()), Add(mlp()))
    first, second = blocks_of(net, tokens())
    assert first.becomes == "identity"
    assert "nothing would be left to train" in second.reason


def test_looking_for_blocks_changes_nothing():
    net, x = ends(Gated(), Gated()), image()
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    modes = [module.training for module in net.modules()]
    assert len(blocks_of(net, x)) == 2
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in net.modules()] == modes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_keyword_arguments_and_frozen_blocks():
    class Keywords(Twice):
        def forward(self, x):
            return self.last(self.block(x=self.first(x)))

    net = Keywords()
    net.block.requires_grad_(False)
    (block,) = blocks_of(net, tokens(), replacement="cheaper")
    assert block.becomes == "linear 4 -> 4"
    layer = stand_in(net, block)
    put(net, "block", layer)
    assert net(tokens()).shape == (2, 5, 2)
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    assert net.first.weight.requires_grad
