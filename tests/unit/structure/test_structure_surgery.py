"""Cuts keep every Parameter the object it is, and everything that hangs on it."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from structure_networks import Residual, Tied
from torch import nn

from lightning_prune.structure.groups import Group, Member
from lightning_prune.structure.surgery import Change, apply, change_for, from_plain, plain, resize, take


def halved() -> tuple[nn.Sequential, Change]:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    kept = torch.tensor([0, 2])
    cuts = {"0.weight": ((0, kept),), "0.bias": ((0, kept),), "2.weight": ((1, kept),)}
    return net, Change(cuts, {"0": {"out_features": 2}, "2": {"in_features": 2}})


def test_parameters_stay_the_objects_they_are_with_flags_hooks_and_gradients():
    net, change = halved()
    net[0].bias.requires_grad_(False)
    seen = []
    net[0].weight.register_hook(lambda grad: seen.append(grad.shape))
    net(torch.ones(1, 3)).sum().backward()
    gradient = net[2].weight.grad.clone()
    objects = [id(p) for p in net.parameters()]
    apply(net, change)
    assert [id(p) for p in net.parameters()] == objects
    assert not net[0].bias.requires_grad
    assert net[0].weight.requires_grad
    assert torch.equal(net[2].weight.grad, gradient[:, [0, 2]])
    net(torch.ones(1, 3)).sum().backward()
    assert seen == [(4, 3), (2, 3)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_graph_held_alive_across_a_cut_does_not_break_the_next_backward(dtype):
    """Autograd keeps the old shape for as long as some loss of before the cut is referenced."""
    net, change = halved()
    net.to(dtype)
    x = torch.ones(1, 3, dtype=dtype)
    held = net(x).sum()
    held.backward(retain_graph=True)
    apply(net, change)
    net.zero_grad()
    net(x).sum().backward()
    assert net[0].weight.grad.shape == (2, 3)
    assert net[0].weight.dtype == dtype
    assert held.grad_fn is not None


def test_ties_stay_tied():
    net = Tied()
    kept = torch.arange(0, 24, 2)
    names = ("encoder.weight", "decoder.weight")
    apply(net, Change(dict.fromkeys(names, ((1, kept),)), {}))
    assert net.encoder.weight is net.decoder.weight
    assert net.encoder.weight.shape == (16, 12)


def test_channels_last_is_kept():
    net = Residual().to(memory_format=torch.channels_last)
    apply(net, Change({"a.0.weight": ((0, torch.arange(5)),)}, {}))
    weight = net.a[0].weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()


@given(
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_narrowing_equals_numpy_indexing(shape, data):
    tensor = torch.arange(torch.Size(shape).numel()).view(shape)
    dims = data.draw(st.lists(st.integers(0, len(shape) - 1), unique=True))
    cuts = []
    expected = tensor.numpy()
    for dim in dims:
        kept = data.draw(st.lists(st.integers(0, shape[dim] - 1), unique=True, min_size=1).map(sorted))
        cuts.append((dim, torch.tensor(kept)))
        expected = expected.take(kept, axis=dim)
    assert take(tensor, cuts).tolist() == expected.tolist()
    change = Change({"w": tuple(cuts)} if cuts else {}, {})
    assert change.narrow("w", tensor).tolist() == expected.tolist()
    assert change.narrow("another", tensor) is tensor
    assert bool(change) == bool(cuts)
    again = from_plain(plain(change))
    assert again.narrow("w", tensor).tolist() == expected.tolist()


def test_members_of_several_groups_of_one_layer_are_cut_together():
    """A concatenation: two producers, one consumer that loses channels of both."""
    net = nn.Sequential(nn.Linear(2, 4), nn.Linear(2, 3), nn.Linear(7, 1))
    four, three = torch.arange(4), torch.arange(3)
    zeros = torch.zeros(4, dtype=torch.int64)
    read = Member("2.weight", 1, four, four, reads=True)
    first = Group(
        "0", 4, (Member("0.weight", 0, four, four), Member("0.bias", 0, four, four), read), four, zeros
    )
    read = Member("2.weight", 1, three, three + 4, reads=True)
    members = (Member("1.weight", 0, three, three), Member("1.bias", 0, three, three), read)
    second = Group("1", 3, members, three, zeros[:3])
    before = copy.deepcopy(net)
    kept = {"0": torch.tensor([1, 3]), "1": torch.tensor([0])}
    change = change_for(net, [first, second], kept)
    apply(net, change)
    assert torch.equal(net[2].weight, before[2].weight[:, [1, 3, 4]])
    assert torch.equal(net[0].weight, before[0].weight[[1, 3]])
    assert torch.equal(net[1].bias, before[1].bias[[0]])
    assert [net[0].out_features, net[1].out_features, net[2].in_features] == [2, 1, 3]


def test_resize_refuses_silence_when_a_shape_does_not_change(monkeypatch):
    buffer = torch.zeros(4)
    resize(buffer, torch.ones(2))
    assert buffer.tolist() == [1, 1]
