"""Recalibrated statistics are those of the batches; nothing else moves."""

from __future__ import annotations

import copy

import pytest
import torch
from structure_networks import CASES
from torch import nn
from torch.optim.swa_utils import update_bn

from lightning_prune.structure.recalibration import recalibrate

NAMES = ["residual", "inverted residual", "dense concat", "unet", "conv1d", "mlp"]


def batches(name: str) -> list[torch.Tensor]:
    torch.manual_seed(5)
    return [CASES[name].inputs() * (1 + i) for i in range(3)]


def runs(given: list[torch.Tensor]) -> list:
    return [lambda net, x=x: net(x) for x in given]


@pytest.mark.parametrize("name", NAMES)
def test_statistics_are_those_of_torch_where_nothing_is_random(name):
    net, given = CASES[name].make(), batches(name)
    wanted = copy.deepcopy(net)
    update_bn(given, wanted)
    assert recalibrate(net, runs(given)) == 3
    for key, value in wanted.state_dict().items():
        if "running" in key:
            torch.testing.assert_close(net.state_dict()[key], value)


def test_nothing_but_the_statistics_changes():
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.drop = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5)
            self.frozen, self.instance = (
                nn.BatchNorm2d(8).eval(),
                nn.InstanceNorm2d(8, track_running_stats=True),
            )
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return self.instance(self.frozen(self.drop(self.norm(self.a(x)))))

    net, x = Net(), torch.randn(4, 3, 6, 6)
    net(x)
    before, modes = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]
    random = torch.random.get_rng_state()
    assert recalibrate(net, runs([x, 2 * x])) == 2
    differing = {key for key, value in net.state_dict().items() if not torch.equal(value, before[key])}
    assert differing == {"norm.running_mean", "norm.running_var"}
    assert [m.training for m in net.modules()] == modes
    assert net.norm.momentum == 0.1
    assert torch.equal(torch.random.get_rng_state(), random)


def test_layers_that_do_not_run_keep_what_they_have():
    net = CASES["auxiliary head"].make()
    net.spare = nn.BatchNorm2d(4)
    net.spare.running_mean.fill_(3.0)
    recalibrate(net, runs(batches("auxiliary head")))
    assert net.spare.running_mean.tolist() == [3.0] * 4


def test_statistics_are_averaged_over_ranks_and_synchronized_layers_need_no_process_group():
    net = nn.SyncBatchNorm.convert_sync_batchnorm(CASES["residual"].make())
    assert any(isinstance(layer, nn.SyncBatchNorm) for layer in net.modules())
    plain, given, asked = CASES["residual"].make(), batches("residual"), []
    plain.load_state_dict(net.state_dict())

    def halved(value: torch.Tensor) -> torch.Tensor:
        asked.append(value)
        return value / 2

    recalibrate(net, runs(given), halved)
    recalibrate(plain, runs(given))
    for key, value in plain.state_dict().items():
        if "running" in key:
            torch.testing.assert_close(net.state_dict()[key], value / 2)
    assert len(asked) == sum("running" in key for key in net.state_dict())
    assert not any("forward" in vars(layer) for layer in net.modules())


def test_networks_without_statistics_and_no_batches_are_left_alone():
    plain = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False))
    assert recalibrate(plain, runs([torch.zeros(2, 2)])) == 0
    norm = nn.BatchNorm1d(2)
    norm.running_mean.fill_(1.0)
    assert recalibrate(norm, []) == 0
    assert norm.running_mean.tolist() == [1.0, 1.0]
