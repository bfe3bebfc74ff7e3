"""Networks whose layers became products: what is counted, computed, kept and refused."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from lightning_prune.callbacks.low_rank import low_rank
from lightning_prune.cost import count_macs, count_parameters
from lightning_prune.errors import BudgetError, ConfigurationError, SelectionError
from lightning_prune.structure.budget import Budget
from lightning_prune.structure.low_rank import compose

CASES = {
    "linear": (nn.Linear(32, 48), (2, 5, 32)),
    "without bias": (nn.Linear(32, 48, bias=False), (2, 32)),
    "3x3": (nn.Conv2d(32, 48, 3, padding=1), (2, 32, 7, 9)),
    "strided": (nn.Conv2d(32, 48, 3, stride=2), (2, 32, 9, 8)),
    "dilated": (nn.Conv2d(32, 48, 3, dilation=2, padding="same"), (2, 32, 9, 8)),
    "reflecting": (nn.Conv2d(32, 48, 3, padding=1, padding_mode="reflect"), (2, 32, 7, 7)),
    "5x1": (nn.Conv2d(32, 48, (5, 1), padding=(2, 0)), (2, 32, 9, 3)),
    "1x1": (nn.Conv2d(32, 48, 1), (2, 32, 5, 5)),
    "1x1 strided": (nn.Conv2d(32, 48, 1, stride=2), (2, 32, 7, 5)),
    "1x1 padded": (nn.Conv2d(32, 48, 1, padding=1), (2, 32, 5, 5)),
    "1-D": (nn.Conv1d(32, 48, 7, padding=3), (2, 32, 20)),
    "3-D": (nn.Conv3d(32, 48, 3, padding=1), (1, 32, 4, 4, 4)),
}


@pytest.mark.parametrize("name", CASES)
def test_the_product_computes_what_its_product_as_one_weight_does_at_the_predicted_cost(name):
    layer, shape = CASES[name]
    net = nn.Sequential(layer)
    whole = nn.Sequential(type(layer)(**_arguments(layer)))
    x = torch.randn(shape)
    prospect = low_rank(net, x, ratio=0.25)
    assert prospect.ranks["0"][0] in (8, 16)
    whole[0].weight.data = compose([child.weight for child in net[0]]).detach()
    whole[0].bias = layer.bias
    assert net[0][-1].bias is layer.bias
    assert torch.allclose(net(x), whole(x), atol=1e-5)
    assert count_macs(net, (x[:1],)) == prospect.after["macs"] < prospect.before["macs"]
    assert count_parameters(net) == prospect.after["params"] < prospect.before["params"]


def _arguments(layer):
    if isinstance(layer, nn.Linear):
        return {"in_features": 32, "out_features": 48, "bias": False}
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "padding_mode")
    return {name: getattr(layer, name) for name in names} | {"bias": False}


class Uses(nn.Module):
    """Networks that do more with a layer than call it."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)
        if how == "tied":
            self.b.weight = self.a.weight
        if how == "parametrized":
            weight_norm(self.b)
        if how == "subclass":
            self.b = type("Mine", (nn.Linear,), {})(64, 64)
        if how == "alias":
            self.b = self.a

    def forward(self, x):
        x = F.relu(self.a(x))
        if self.how == "functional":
            return F.linear(x, self.b.weight)
        if self.how == "idle":
            return x
        if self.how == "attribute":
            return self.b(x) * self.b.weight.norm()
        if self.how == "in training only" and self.training:
            return self.b(x) + self.b.weight.sum()
        return self.b(x)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("tied", "shared: a.weight, b.weight"),
        ("alias", "shared: a.weight, b.weight"),
        ("parametrized", "computed from other parameters"),
        ("subclass", "Mine is not a kind"),
        ("functional", "does not run"),
        ("attribute", "other than by calling"),
        ("in training only", "other than by calling"),
        ("idle", "does not run"),
    ],
)
def test_a_layer_that_cannot_be_replaced_stays_and_says_why(how, reason):
    net = Uses(how)
    prospect = low_rank(net, [2, 64], ratio=0.25)
    reasons = {row.name: row.reason for row in prospect.rows}
    if how in ("tied", "alias"):
        assert not prospect.ranks
        assert reason in reasons["a"]
    else:
        assert list(prospect.ranks) == ["a"]
        assert reason in reasons["b"]
    net(torch.randn(2, 64))


def test_a_transformer_whose_fast_path_reads_weights_keeps_those():
    net = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(64, 2, 128, batch_first=True), 1, enable_nested_tensor=False
    )
    prospect = low_rank(net, [2, 5, 64], ratio=0.25)
    assert not prospect.ranks
    reasons = {row.name.rpartition(".")[2]: row.reason for row in prospect.rows}
    assert "other than by calling" in reasons["linear1"]
    assert "NonDynamicallyQuantizableLinear" in reasons["out_proj"]
    net.eval()(torch.randn(2, 5, 64))


def test_grouped_and_transposed_convolutions_stay():
    net = nn.Sequential(nn.Conv2d(32, 32, 3, groups=32), nn.ConvTranspose2d(32, 32, 3), nn.Conv2d(32, 32, 3))
    prospect = low_rank(net, [1, 32, 9, 9], ratio=0.25)
    assert list(prospect.ranks) == ["2"]
    assert [row.reason for row in prospect.rows[:2]] == [
        "it is grouped",
        "ConvTranspose2d is not a kind of layer that can be factored",
    ]


def test_what_would_not_pay_stays():
    net = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 4))
    prospect = low_rank(net, [1, 32], ratio=0.6)
    assert [row.reason for row in prospect.rows] == [
        "rank 16 would take 1,024 MACs",
        "rank 4 would take 144 MACs",
    ]
    assert count_parameters(net) == 32 * 33 + 4 * 33


def test_frozen_weights_make_frozen_factors_in_the_mode_and_format_of_the_layer():
    net = nn.Sequential(nn.Conv2d(32, 32, 3)).to(memory_format=torch.channels_last).eval()
    net.requires_grad_(False)
    low_rank(net, [1, 32, 9, 9], ratio=0.25)
    assert not any(p.requires_grad for p in net.parameters())
    assert not net[0].training
    assert net[0][1].weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", ["macs", "params"])
def test_a_budget_is_met_by_what_is_counted(kind):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(16, 48, 3), nn.ReLU(), nn.Conv2d(48, 48, 3), nn.Flatten(), nn.Linear(1200, 64)
    )
    x = torch.zeros(1, 16, 9, 9)
    before = {"macs": count_macs(net, (x,)), "params": count_parameters(net)}
    low_rank(net, x, Budget(**{kind: 0.5}))
    after = {"macs": count_macs(net, (x,)), "params": count_parameters(net)}
    assert after[kind] <= 0.5 * before[kind]
    assert after[kind] >= 0.3 * before[kind]


def test_a_layer_that_is_called_twice_costs_twice():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(64, 64)

        def forward(self, x):
            return self.fc(self.fc(x))

    net = Twice()
    prospect = low_rank(net, [1, 64], ratio=0.25)
    assert prospect.rows[0].macs == 2 * 64 * 64
    assert count_macs(net, (torch.zeros(1, 64),)) == prospect.after["macs"] == 2 * 2 * 64 * 16


def test_a_second_time_finds_only_what_is_left():
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    assert list(low_rank(net, [1, 64], ratio=0.25, include=["0"]).ranks) == ["0"]
    assert list(low_rank(net, [1, 64], ratio=0.25).ranks) == ["2"]
    assert low_rank(net, [1, 64], ratio=0.25).ranks == {}


@pytest.mark.parametrize(
    ("net", "arguments", "error", "match"),
    [
        (nn.Sequential(nn.ReLU()), {"ratio": 0.5}, ConfigurationError, "no convolution or linear layer"),
        (nn.Sequential(nn.Linear(8, 8)), {"ratio": 0.5, "include": ["conv"]}, SelectionError, "conv"),
        (nn.Sequential(nn.Linear(64, 64)), {"budget": Budget(macs=0.01)}, BudgetError, "smallest reachable"),
        (nn.Sequential(nn.Linear(8, 8)), {"ratio": 2}, ConfigurationError, "low_rank: `ratio`"),
    ],
    ids=["no layers", "no match", "out of reach", "above 1"],
)
def test_wrong_input_is_refused_before_anything_changes(net, arguments, error, match):
    shown = str(net)
    with pytest.raises(error, match=match):
        low_rank(net, [1, 64] if "64" in shown else [1, 8], **arguments)
    assert str(net) == shown
