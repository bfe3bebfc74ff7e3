"""Lists of detections are compared whatever their order."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_prune.deploy.rows import Rows, are_rows


def detections(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return [
        100 * torch.rand(count, 4, generator=generator),
        torch.rand(count, generator=generator),
        torch.randint(5, (count,), generator=generator),
    ]


@given(count=st.integers(0, 12), seed=st.integers(0, 99), lost=st.integers(0, 3))
def test_rows_find_their_like_in_any_order(count, seed, lost):
    left = detections(count, seed)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[: max(count - lost, 0)]
    rows = Rows()
    here, there = rows.pairs(left, [t[order] for t in left], [1e-3, 1e-5, 1e-5])
    assert order[there].tolist() == here
    assert (rows.matched, rows.total) == (len(order), count)


def test_a_row_stands_for_one_row_only():
    rows = Rows()
    twice = [torch.zeros(2, 4), torch.ones(2)]
    assert rows.pairs(twice, [t[:1] for t in twice], [1e-3, 1e-3]) == ([0], [0])
    assert (rows.matched, rows.total) == (1, 2)


def test_one_row_or_a_tenth_may_differ_but_never_all():
    assert Rows(0, 0).alike()
    assert Rows(1, 2).alike()
    assert Rows(90, 100).alike()
    assert not Rows(0, 1).alike()
    assert not Rows(89, 100).alike()


def test_no_number_is_far_from_every_number():
    rows = Rows()
    rows.pairs([torch.tensor([float("nan")])], [torch.tensor([0.5])], [1e-3])
    assert (rows.matched, rows.total) == (0, 1)


def test_columns_of_one_list_have_one_length():
    assert are_rows([torch.ones(3, 4), torch.ones(3)])
    assert not are_rows([torch.ones(3, 4), torch.ones(2)])
    assert not are_rows([torch.tensor(1.0)])
