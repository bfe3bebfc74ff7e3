"""A description gives any other instance of the network its structure; a wrong one changes nothing."""

from __future__ import annotations

import copy
import io
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from structure_networks import CASES, Residual, Tied
from torch import nn

from lightning_prune.errors import CheckpointError
from lightning_prune.structure import manifest
from lightning_prune.structure.budget import Budget
from lightning_prune.structure.graph import trace
from lightning_prune.structure.plan import Example, Recipe, measure, plan, survey
from lightning_prune.structure.surgery import apply, change_for


def pruned(name: str, fraction: float = 0.5):
    torch.manual_seed(1)
    net, x = CASES[name].make(), CASES[name].inputs()
    example = Example((x,), {}, ((x[:1],), {}))
    groups = survey(net, example)
    recipe = Recipe(Budget(channels=fraction), round_to=1)
    apply(net, plan(net, groups, recipe, measure(net, groups, example), 1.0, example))
    return net.eval(), x


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.free])
def test_a_fresh_network_takes_on_the_structure_and_the_weights(name):
    small, x = pruned(name)
    description = json.loads(json.dumps(manifest.describe(small)))
    torch.manual_seed(9)
    fresh = CASES[name].make().eval()
    dense, objects = manifest.describe(fresh), [id(p) for p in fresh.parameters()]
    assert manifest.differs(fresh, description)
    manifest.reshape(fresh, description)
    assert not manifest.differs(fresh, description)
    fresh.load_state_dict(small.state_dict(), strict=True)
    for a, b in zip(leaves(small(x)), leaves(fresh(x)), strict=True):
        assert torch.equal(a, b)
    assert [id(p) for p in fresh.parameters()] == objects
    assert str(fresh) == str(small)
    # And back: a dense checkpoint loads into the small network.
    manifest.reshape(fresh, dense)
    other = CASES[name].make().eval()
    fresh.load_state_dict(other.state_dict(), strict=True)
    for a, b in zip(leaves(other(x)), leaves(fresh(x)), strict=True):
        assert torch.equal(a, b)


def leaves(out):
    return torch.utils._pytree.tree_leaves(out)


def test_ties_survive_a_reshape():
    net = Tied()
    description = manifest.describe(net)
    description["tensors"]["encoder.weight"] = description["tensors"]["decoder.weight"] = [16, 9]
    manifest.reshape(net, description)
    assert net.encoder.weight is net.decoder.weight
    assert net.encoder.weight.shape == (16, 9)


def test_a_description_loads_where_pickles_are_refused():
    small, _ = pruned("residual")
    buffer = io.BytesIO()
    torch.save({manifest.KEY: manifest.to_checkpoint(small)}, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    assert manifest.from_checkpoint(loaded) == manifest.describe(small)


def broken(change):
    def edit(description):
        change(description)
        return description

    return edit


WRONG = {
    "no tensors": broken(lambda d: d.pop("tensors")),
    "no attributes": broken(lambda d: d.pop("attributes")),
    "tensors are a list": broken(lambda d: d.update(tensors=[1])),
    "a shape is a string": broken(lambda d: d["tensors"].update({"head.weight": "3x4"})),
    "a shape is a number": broken(lambda d: d["tensors"].update({"head.weight": 3})),
    "a size is negative": broken(lambda d: d["tensors"].update({"head.weight": [3, -4]})),
    "a size is a fraction": broken(lambda d: d["tensors"].update({"head.weight": [3, 4.5]})),
    "a size is a boolean": broken(lambda d: d["tensors"].update({"head.weight": [3, True]})),
    "too many dimensions": broken(lambda d: d["tensors"].update({"head.weight": [3, 4, 1]})),
    "an unknown tensor": broken(lambda d: d["tensors"].update({"neck.weight": [3, 4]})),
    "an unknown module": broken(lambda d: d["attributes"].update({"neck": {"in_features": 4}})),
    "an unknown attribute": broken(lambda d: d["attributes"].update({"head": {"training": 1}})),
    "an attribute is a list of strings": broken(
        lambda d: d["attributes"].update({"head": {"in_features": ["a"]}})
    ),
    "nothing at all": lambda d: {},
    "another type": lambda d: [1, 2],
}


@pytest.mark.parametrize("edit", WRONG.values(), ids=WRONG)
def test_a_wrong_description_is_an_error_and_changes_nothing(edit):
    net = Residual()
    before, shown = copy.deepcopy(net.state_dict()), str(net)
    description = manifest.describe(net)
    # Something the reshape would get to before it meets the fault.
    description["tensors"]["a.0.weight"] = [9, 16, 3, 3]
    with pytest.raises(CheckpointError):
        manifest.reshape(net, edit(description))
    after = net.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert str(net) == shown


@pytest.mark.parametrize(
    "entry",
    [
        1,
        "x",
        {},
        {"version": "1"},
        {"version": 99, "structure": {}},
        {"version": 1},
        {"version": 1, "structure": 3},
    ],
    ids=str,
)
def test_a_wrong_entry_is_an_error(entry):
    with pytest.raises(CheckpointError, match="manifest"):
        manifest.from_checkpoint({manifest.KEY: entry})


@given(widths=st.lists(st.integers(1, 40), min_size=2, max_size=2))
@settings(max_examples=25, deadline=None)
def test_any_widths_round_trip(widths):
    inner, stem = widths
    net = Residual()
    description = manifest.describe(net)
    sizes = {
        "stem.0.weight": [stem, 3, 3, 3],
        "a.0.weight": [inner, stem, 3, 3],
        "b.weight": [stem, inner, 3, 3],
        "a.1.weight": [inner],
    }
    description["tensors"].update(sizes)
    description["attributes"]["a.0"].update(out_channels=inner, in_channels=stem)
    manifest.reshape(net, description)
    assert manifest.describe(net) == description
    again = Residual()
    manifest.reshape(again, manifest.describe(net))
    assert manifest.describe(again) == description


def test_a_manifest_that_is_not_of_the_weights_beside_it_changes_nothing():
    net = Residual()
    other = manifest.describe(Residual())
    other["tensors"]["a.0.weight"] = [9, 16, 3, 3]
    checkpoint = {"state_dict": net.state_dict(), manifest.KEY: {"version": 1, "structure": other}}
    shown = str(net)
    with pytest.raises(CheckpointError, match=r"a\.0\.weight is \[9, 16, 3, 3\]"):
        manifest.take_on(net, checkpoint)
    assert manifest.describe(net) == manifest.describe(Residual())
    assert str(net) == shown


def test_batch_norms_that_synchronise_are_cut_and_loaded_as_plain_ones():
    """With `sync_batchnorm=True` Lightning converts them after weights are loaded, and back at the end."""
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(Residual())
    plain = Residual()
    plain.load_state_dict(synchronised.state_dict())
    x = torch.randn(2, 3, 8, 8)
    for net in (synchronised, plain):
        groups = [group for group in trace(net, (x,)) if not group.reason]
        kept = {group.name: torch.arange(group.channels // 2) for group in groups}
        apply(net, change_for(net, groups, kept))
    assert isinstance(synchronised.norm, nn.SyncBatchNorm)
    assert synchronised.norm.num_features == 8, "which the plain layer is made of again"
    assert torch.equal(synchronised.eval()(x), plain.eval()(x))
    for fresh in (Residual(), nn.SyncBatchNorm.convert_sync_batchnorm(Residual())):
        manifest.reshape(fresh, manifest.describe(synchronised))
        fresh.load_state_dict(synchronised.state_dict())
        assert torch.equal(fresh.eval()(x), plain(x))
