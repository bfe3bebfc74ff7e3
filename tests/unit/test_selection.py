"""What globs and types select."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from lightning_prune.errors import SelectionError
from lightning_prune.selection import assign, match_names, matches, named_weights, select_weights


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
        self.position = nn.Parameter(torch.zeros(1, 4, 4))
        self.backbone = nn.ModuleDict({"a": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})
        self.head = nn.Linear(4, 2)


def chosen(module, include=("*",), exclude=()):
    return list(select_weights(module, list(include), list(exclude), "Owner"))


def test_the_default_is_weights_of_layers_and_nothing_else():
    assert chosen(Net()) == ["stem.0.weight", "backbone.a.weight", "head.weight"]


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (["stem"], [], ["stem.0.weight"]),
        (["stem.*"], [], ["stem.0.weight"]),
        (["head.weight"], [], ["head.weight"]),
        (["*"], ["head"], ["stem.0.weight", "backbone.a.weight"]),
        (["*"], ["type:Conv*"], ["backbone.a.weight", "head.weight"]),
        (["type:Linear"], [], ["backbone.a.weight", "head.weight"]),
        (["type:Linear"], ["backbone"], ["head.weight"]),
        (["position"], [], ["position"]),
        (["head.bias"], [], ["head.bias"]),
        (
            ["*.bias"],
            [],
            ["stem.0.bias", "stem.1.bias", "backbone.a.bias", "backbone.norm.bias", "head.bias"],
        ),
        (["stem.1"], [], ["stem.1.weight", "stem.1.bias"]),
        (["type:BatchNorm2d"], [], ["stem.1.weight", "stem.1.bias"]),
        (["head", "stem.1.weight"], [], ["stem.1.weight", "head.weight"]),
        (["h?ad"], [], ["head.weight"]),
        (["[hs]*"], [], ["stem.0.weight", "head.weight"]),
    ],
    ids=str,
)
def test_patterns_select(include, exclude, expected):
    assert chosen(Net(), include, exclude) == expected


@pytest.mark.parametrize(
    ("include", "exclude", "message"),
    [
        (["backbon.*"], [], "Did you mean 'backbone'"),
        (["*"], ["haed"], "`exclude` has 'haed', which matches nothing. Did you mean 'head'"),
        (["heed.weight"], [], "Did you mean 'head.weight'"),
        (["type:Conv3d"], [], "Did you mean 'Conv2d'"),
        (["zzzzzz"], [], "There are: "),
        (["head"], ["head"], "nothing is selected"),
        ([], [], "nothing is selected"),
        ("head", [], "a list of globs"),
        ([3], [], "a list of globs"),
    ],
    ids=str,
)
def test_patterns_that_match_nothing_name_near_matches(include, exclude, message):
    with pytest.raises(SelectionError) as caught:
        select_weights(Net(), include, exclude, "Owner")
    assert message in str(caught.value)
    assert str(caught.value).startswith("Owner: ")


def test_a_module_without_parameters_has_nothing_to_select():
    with pytest.raises(SelectionError, match="nothing is selected"):
        chosen(nn.ReLU())


def test_tied_weights_appear_once_and_answer_to_every_name():
    net = nn.ModuleDict({"encoder": nn.Embedding(8, 4), "decoder": nn.Linear(4, 8, bias=False)})
    net["decoder"].weight = net["encoder"].weight
    assert chosen(net) == ["encoder.weight"]
    assert chosen(net, ["decoder"]) == ["encoder.weight"]
    assert chosen(net, ["type:Linear"]) == chosen(net, ["type:Embedding"]) == ["encoder.weight"]
    with pytest.raises(SelectionError, match="nothing is selected"):
        chosen(net, ["*"], ["decoder"])


def test_recurrent_and_attention_weights_are_selected():
    net = nn.ModuleDict(
        {
            "lstm": nn.LSTM(3, 4, num_layers=2, bidirectional=True, proj_size=2),
            "gru": nn.GRUCell(3, 4),
            "attention": nn.MultiheadAttention(4, 2, add_bias_kv=True),
            "other": nn.MultiheadAttention(4, 2, kdim=3, vdim=5),
        }
    )
    expected = [n for n, p in net.named_parameters() if p.dim() == 2]
    assert len(expected) == 12 + 2 + 2 + 4
    assert chosen(net) == expected


@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_a_parametrized_weight_is_selected_once_by_its_plain_name(wrap):
    net = nn.Sequential(wrap(nn.Linear(4, 3)), nn.Linear(3, 2))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    (weight,) = select_weights(net, ["0.weight"], [], "Owner").values()
    assert weight.parameter.shape == (3, 4)
    assert weight.module is net[0]
    assert len(chosen(net)) == 2
    # Looking must not run the parametrization: spectral_norm would take a step of its power iteration.
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_networks_inside_metrics_are_not_the_model():
    from torchmetrics import Metric

    class Perceptual(Metric):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(2, 2)

        def update(self): ...

        def compute(self): ...

    net = nn.ModuleDict({"metric": Perceptual(), "head": nn.Linear(2, 2)})
    assert chosen(net) == ["head.weight"]


def test_every_parameter_is_listed_once_in_order():
    net = Net()
    assert [w.name for w in named_weights(net)] == [n for n, _ in net.named_parameters()]


def test_levels_by_glob_take_the_first_match():
    weights = select_weights(Net(), ["*"], [], "Owner")
    assert assign(weights, {"stem.*": 0.3, "*": 0.85}, "Owner") == {
        "stem.0.weight": 0.3,
        "backbone.a.weight": 0.85,
        "head.weight": 0.85,
    }
    assert assign(weights, {"head": 0.5}, "Owner") == {"head.weight": 0.5}
    with pytest.raises(SelectionError, match="Did you mean 'stem'"):
        assign(weights, {"stm.*": 0.3}, "Owner")


def test_names_are_matched_with_their_modules():
    names = ["stem.0", "stem.1", "backbone.a", "head"]
    assert match_names(names, ["stem"], ["stem.1"], "Owner") == ["stem.0"]
    assert match_names(names, ["*"], [], "Owner") == names
    assert matches("backbone.a", "backbone")
    assert not matches("backbone.a", "back")
    with pytest.raises(SelectionError, match="Did you mean 'head'"):
        match_names(names, ["haed"], [], "Owner")
