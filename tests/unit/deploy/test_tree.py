from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_prune.deploy.tree import flatten


@dataclass
class Data:
    a: Any
    b: Any = None


class Named(NamedTuple):
    x: Any
    y: Any


leaves = st.one_of(
    st.integers(0, 3).map(lambda n: torch.arange(n + 1.0)), st.none(), st.integers(), st.text(max_size=3)
)
nests = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.dictionaries(st.text("abc", min_size=1, max_size=2), inner, max_size=3),
        st.builds(Data, inner, inner),
        st.builds(Named, inner, inner),
    ),
    max_leaves=8,
)


def same(left, right):
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if type(left) is not type(right):
        return False
    if isinstance(left, Data):
        return same(left.a, right.a) and same(left.b, right.b)
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[k], right[k]) for k in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


@given(nests)
def test_what_was_taken_apart_is_put_together_again(nest):
    tensors, tree = flatten(nest)
    assert same(tree.build(tensors), nest)
    assert len(tree.names) == len(set(tree.names)) == len(tensors)


def test_names_come_from_keys_fields_and_positions():
    nest = OrderedDict(box=[torch.ones(1), torch.ones(1)], aux=Data(torch.ones(1), "text"))
    _, tree = flatten(nest)
    assert tree.names == ("box_0", "box_1", "aux_a")
    assert tree.constants == {"aux_b": "text"}
    assert flatten((torch.ones(1), torch.ones(1)))[1].names == ("output_0", "output_1")
    assert flatten(torch.ones(1))[1].names == ("output",)
