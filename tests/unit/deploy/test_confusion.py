from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import confusion_matrix, recall_score

from lightning_prune.deploy.confusion import MOST_CLASSES, Confusion


@given(st.integers(2, 6), st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 1000))
def test_it_counts_as_scikit_learn_does(classes, sizes, seed):
    g = torch.Generator().manual_seed(seed)
    counter, true, predicted = Confusion(), [], []
    for size in sizes:
        scores = torch.randn(size, classes, generator=g)
        labels = torch.randint(0, classes, (size,), generator=g)
        counter.add(
            [{"logits": scores, "features": scores.mean(1)}], {"x": torch.randn(size, 3), "y": labels}
        )
        true += labels.tolist()
        predicted += scores.argmax(1).tolist()
    result = counter.result()
    names = list(range(classes))
    assert np.array_equal(result["confusion"], confusion_matrix(true, predicted, labels=names))
    expected = recall_score(true, predicted, labels=names, average=None, zero_division=np.nan)
    for got, want in zip(result["recall"], expected, strict=True):
        assert got is None if np.isnan(want) else got == pytest.approx(want)
    assert sum(result["support"]) == len(true)


SCORES, LABELS = torch.eye(3), torch.arange(3)


@pytest.mark.parametrize(
    ("outputs", "batch"),
    [
        ([SCORES, SCORES], [LABELS]),
        ([], [LABELS]),
        ([(SCORES, SCORES)], [LABELS]),
        ([torch.ones(3, 1)], [LABELS]),
        ([torch.ones(3, 3, 3)], [LABELS]),
        ([SCORES], [LABELS, LABELS]),
        ([SCORES], [LABELS.float()]),
        ([SCORES], [LABELS + 1]),
        ([SCORES], [LABELS - 1]),
        ([SCORES], [LABELS[:2]]),
        ([SCORES], [LABELS > 1]),
        ([SCORES], []),
    ],
    ids=["two calls", "no call", "two matrices", "one score", "image", "two labels", "float", "too large",
         "negative", "too short", "bool", "none"],
)  # fmt: skip
def test_what_is_not_clearly_a_classifier_is_not_counted(outputs, batch):
    counter = Confusion()
    counter.add([SCORES], [LABELS])
    counter.add(outputs, batch)
    counter.add([SCORES], [LABELS])
    assert counter.result() is None


def test_names_are_taken_if_there_is_one_for_each_class():
    for names, expected in ((["a", "b", "c"], ["a", "b", "c"]), (["a"], ["0", "1", "2"])):
        counter = Confusion(names)
        counter.add([SCORES], [LABELS])
        assert counter.result()["names"] == expected


def test_a_matrix_of_many_classes_is_left_out():
    size = MOST_CLASSES + 1
    counter = Confusion()
    counter.add([torch.eye(size)], [torch.arange(size)])
    assert "confusion" not in counter.result()
    assert counter.result()["recall"] == [1.0] * size
