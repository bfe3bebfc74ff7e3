"""Counting and tracing leave a network alone whose layers have several names."""

import pytest
import torch
from torch import nn

from lightning_prune.cost import count_macs
from lightning_prune.structure.graph import trace


class Shared(nn.Module):
    """One layer under two names, one weight in two layers, and a buffer in both."""

    def __init__(self):
        super().__init__()
        self.a, self.c = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b = self.a
        self.c.weight = self.a.weight
        self.norm = self.again = nn.BatchNorm1d(4)

    def forward(self, x):
        return self.again(self.c(self.norm(self.b(self.a(x)))))


@pytest.mark.parametrize("look", [count_macs, trace], ids=["count_macs", "trace"])
def test_layers_with_two_names_are_left_as_they_were(look):
    net = Shared()
    tensors = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    values = {name: tensor.clone() for name, tensor in tensors.items()}
    look(net, (torch.zeros(2, 4),))
    after = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    assert after.keys() == tensors.keys()
    assert all(after[name] is tensor for name, tensor in tensors.items())
    assert all(torch.equal(tensor, values[name]) for name, tensor in tensors.items())
    assert net.a is net.b
    assert net.c.weight is net.a.weight


def test_shared_layers_count_each_time_they_are_called():
    assert count_macs(Shared(), (torch.zeros(1, 4),)) == 3 * 16
