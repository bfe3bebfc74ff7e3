"""The dependencies between channels, against another program's: torch-pruning, where it is right."""

import warnings

import pytest
import torch
import torch_pruning
from structure_networks import Bottleneck, Dense, InvertedResidual, Residual, SqueezeExcite
from torch import nn

from lightning_prune.structure.graph import trace

NETWORKS = [Residual, Bottleneck, InvertedResidual, SqueezeExcite, Dense]


def ours(group, channel):
    """Where one channel of a group sits: {(weight, dimension): positions}."""
    places = {}
    for member in group.members:
        if member.tensor.endswith(".weight"):
            here = set(member.position[member.channel == channel].tolist())
            if here:
                places.setdefault((member.tensor, member.dim), set()).update(here)
    return places


def theirs(graph, network, group, channel):
    names = {layer: name for name, layer in network.named_modules()}
    root = network.get_submodule(group.name)
    pruner = graph.get_pruner_of_module(root)
    places = {}
    for dependency, positions in graph.get_pruning_group(root, pruner.prune_out_channels, [channel]):
        layer = dependency.target.module
        if layer not in names:
            continue
        both = isinstance(layer, nn.BatchNorm2d) or getattr(layer, "groups", 1) > 1
        makes = both or graph.is_out_channel_pruning_fn(dependency.handler)
        places.setdefault((f"{names[layer]}.weight", 0 if makes else 1), set()).update(positions)
    return places


@pytest.mark.parametrize("build", NETWORKS, ids=lambda build: build.__name__)
def test_channels_depend_on_each_other_as_torch_pruning_finds(build):
    torch.manual_seed(0)
    network, x = build().eval(), torch.randn(2, 3, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it prints advice on arguments that do not matter here
        graph = torch_pruning.DependencyGraph().build_dependency(network, example_inputs=x, verbose=False)
    groups = [group for group in trace(network, (x,)) if not group.reason]
    assert groups
    for group in groups:
        for channel in (0, group.channels // 2, group.channels - 1):
            assert ours(group, channel) == theirs(graph, network, group, channel), (group.name, channel)


def test_every_layer_but_the_head_may_lose_channels():
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 5))
    groups = trace(network, (torch.zeros(1, 3, 8, 8),))
    assert {group.name: bool(group.reason) for group in groups} == {"0": False, "2": False, "4": True}
