"""Layers that lose inputs are fitted to give what they gave, against least squares by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_prune.structure.reconstruction import fits, rewritten
from lightning_prune.structure.surgery import Change, apply

KEPT = torch.tensor([0, 2, 3])


def cut(layer: nn.Module, x: Tensor, rows: Tensor | None = None) -> tuple[nn.Module, dict[str, Tensor]]:
    """Let a layer lose the inputs 1 and 4 of 5; return it, and what it is fitted to."""
    net = nn.Sequential(layer)
    slices = ((1, KEPT),) if rows is None else ((0, rows), (1, KEPT))
    kept = {"0.weight": slices}
    if rows is not None and layer.bias is not None:
        kept["0.bias"] = ((0, rows),)
    change = Change(kept)
    found = fits(net, change, [lambda net: net(x)])
    return layer, rewritten(layer, change, "0", found["0"])


def mixed(*shape: int) -> Tensor:
    """Make channels of which the second and the last follow from the others."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x[:, 1] = 0.5 * x[:, 0] - 2 * x[:, 2] + 1
    x[:, 4] = 3 * x[:, 3] - 1
    return x


CONVOLUTIONS = {
    "linear": (lambda: nn.Linear(5, 4), (4096, 5), torch.nn.functional.linear),
    "conv1d": (lambda: nn.Conv1d(5, 4, 3), (512, 5, 12), torch.nn.functional.conv1d),
    "conv2d": (lambda: nn.Conv2d(5, 4, 3, stride=2), (512, 5, 9, 7), torch.nn.functional.conv2d),
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_what_follows_from_the_rest_can_go_without_a_loss(kind: str) -> None:
    make, shape, run = CONVOLUTIONS[kind]
    x = mixed(*shape)
    layer, made = cut(make(), x)
    stride = {"stride": 2} if kind == "conv2d" else {}
    before, plain = layer(x), run(x[:, KEPT], layer.weight[:, KEPT], layer.bias, **stride)
    after = run(x[:, KEPT], made["weight"], made["bias"], **stride)
    assert float((after - before).detach().pow(2).mean()) < 1e-3 * float(
        (plain - before).detach().pow(2).mean()
    )


@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_least_squares_solution(bias: bool) -> None:
    x = torch.randn(200, 5) + torch.tensor([0.0, 1, 2, 3, 4])
    layer, made = cut(nn.Linear(5, 3, bias=bias), x)
    known = torch.cat([x[:, KEPT], torch.ones(200, 1)], 1) if bias else x[:, KEPT]
    solution = torch.linalg.lstsq(known, layer(x).detach()).solution
    wanted = (known @ solution - layer(x)).pow(2).mean()
    given = x[:, KEPT] @ made["weight"].T + (made["bias"] if bias else 0)
    # A little more, for the noise that what stays is taken to have.
    assert wanted <= (given - layer(x)).pow(2).mean() <= 1.02 * wanted


def test_outputs_that_go_too_are_left_out() -> None:
    x, rows = mixed(64, 5), torch.tensor([1, 3])
    layer = nn.Linear(5, 4)
    whole = cut(layer, x)[1]
    _, made = cut(layer, x, rows)
    for name in ("weight", "bias"):
        torch.testing.assert_close(made[name], whole[name][rows])


def test_padding_and_dilation_are_those_of_the_layer() -> None:
    x = mixed(8, 5, 10, 10)
    for options in (
        {"padding": "same", "dilation": 2},
        {"padding": 1, "padding_mode": "reflect"},
        {"padding": 1},
    ):
        layer = nn.Conv2d(5, 4, 3, **options)
        _, made = cut(layer, x)
        smaller = nn.Conv2d(3, 4, 3, **options)
        plain = nn.Conv2d(3, 4, 3, **options)
        smaller.load_state_dict(made)
        plain.load_state_dict({"weight": layer.weight[:, KEPT], "bias": layer.bias})
        errors = [float((net(x[:, KEPT]) - layer(x)).detach().pow(2).mean()) for net in (smaller, plain)]
        # Where zeros are padded, what goes does not follow from what stays: it has an offset.
        assert errors[0] < 0.1 * errors[1]


def test_with_few_samples_it_is_no_worse_than_the_weights_as_they_are() -> None:
    torch.manual_seed(0)
    layer, seen = nn.Linear(5, 3), torch.randn(2, 5)
    _, made = cut(layer, seen)
    assert made["weight"].abs().max() < 2 * layer.weight.abs().max()


def test_what_cannot_be_fitted_is_not_named() -> None:
    shared = nn.Linear(5, 5)
    net = nn.ModuleDict(
        {
            "grouped": nn.Conv2d(6, 6, 1, groups=2),
            "transposed": nn.ConvTranspose2d(5, 5, 1),
            "one": shared,
            "other": shared,
            "computed": nn.utils.parametrizations.weight_norm(nn.Linear(5, 5)),
            "wide": nn.Linear(8193, 1),
            "unused": nn.Linear(5, 5),
            "norm": nn.BatchNorm1d(5),
        }
    )
    kept = {f"{name}.weight": ((1, KEPT),) for name in net if name != "computed"}
    kept["computed.parametrizations.weight.original1"] = ((1, KEPT),)
    change = Change({**kept, "norm.weight": ((0, KEPT),)})
    assert fits(net, change, [lambda net: None]) == {}
    alone = fits(net, change, [lambda net: net["unused"](torch.randn(8, 5))])
    assert list(alone) == ["unused"]


def test_the_network_stays_as_it_is_until_it_is_cut() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Dropout(), nn.Linear(5, 2))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    change = Change({"3.weight": ((1, KEPT),)}, {"3": {"in_features": 3}})
    fits(net, change, [lambda net: net(torch.randn(16, 3))])
    assert net.training
    assert net[1].training
    assert not net[3]._forward_pre_hooks
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])
    apply(net, change)
    assert net[3].in_features == 3
