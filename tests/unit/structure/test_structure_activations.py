"""Activity of channels, against sums taken by hand from what the layers got."""

from __future__ import annotations

import pytest
import torch
from structure_networks import CASES
from torch import nn

from lightning_prune.structure.activations import ACTIVATION_IMPORTANCES, Activity
from lightning_prune.structure.graph import trace

DEFINITIONS = {
    "activation": lambda x: x.abs().mean((0, 2, 3)),
    "apoz": lambda x: 1 - (x == 0).float().mean((0, 2, 3)),
}


def test_every_activation_importance_has_a_definition_here():
    assert DEFINITIONS.keys() == ACTIVATION_IMPORTANCES.keys()


@pytest.mark.parametrize("kind", DEFINITIONS)
def test_scores_are_means_over_batches_and_readers(kind):
    torch.manual_seed(0)
    net, x = CASES["residual"].make(), CASES["residual"].inputs()
    groups = {group.name: group for group in trace(net, (x,))}
    seen: dict[str, list[torch.Tensor]] = {"a": [], "b": [], "down": [], "c.0": []}
    for name, layer in net.named_modules():
        if name in seen:
            kept = seen[name]
            layer.register_forward_pre_hook(lambda m, inputs, kept=kept: kept.append(inputs[0].detach()))
    activity = Activity(net, groups.values(), kind)
    for _ in range(3):
        net(torch.randn_like(x))
    found = activity.take()
    define = DEFINITIONS[kind]
    # The channels of "a" are read by "b" alone; those of the stem by "a", "down" and "c".
    torch.testing.assert_close(found["a.0"], torch.stack([define(t) for t in seen["b"]]).mean(0))
    readers = [torch.stack([define(t) for t in seen[n]]).mean(0) for n in ("a", "down", "c.0")]
    torch.testing.assert_close(found["stem.0"], torch.stack(readers).mean(0))
    assert activity.take() == {}, "what was taken is gone"


def test_only_training_forwards_count_and_no_hook_is_left():
    net, x = CASES["residual"].make(), CASES["residual"].inputs()
    activity = Activity(net, trace(net, (x,)), "activation")
    net.eval()(x)
    with torch.no_grad():
        net.train()(x)
    assert activity.take() == {}
    activity.stop()
    assert not any(layer._forward_pre_hooks for layer in net.modules())


def test_flattened_channels_are_averaged_over_their_places():
    torch.manual_seed(0)
    net, x = CASES["flatten"].make(), CASES["flatten"].inputs()
    got = []
    net.c.register_forward_pre_hook(lambda m, inputs: got.append(inputs[0].detach()))
    activity = Activity(net, trace(net, (x,)), "activation")
    net(x)
    wanted = got[-1].abs().mean(0).view(8, -1).mean(1)
    torch.testing.assert_close(activity.take()["b.0"], wanted)


@pytest.mark.parametrize("name", CASES)
def test_every_network_can_be_watched(name):
    torch.manual_seed(0)
    net, x = CASES[name].make(), CASES[name].inputs()
    groups = {group.name: group for group in trace(net, (x,))}
    activity = Activity(net, groups.values(), "activation")
    net.train()(x)
    scores = activity.take()
    activity.stop()
    for group, score in scores.items():
        assert score.shape == (groups[group].channels,)
        assert bool(torch.isfinite(score).all())
        assert bool((score >= 0).all())
    assert isinstance(net, nn.Module)
