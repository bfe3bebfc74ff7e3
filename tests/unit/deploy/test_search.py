from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_prune.deploy.fusion import layers_of
from lightning_prune.deploy.quantize import Quantize, quantize_file
from lightning_prune.deploy.search import Sensitivity, check_max_drop, lost, sensitivity, within_drop
from lightning_prune.errors import ConfigurationError, QuantizationError


def ranked(n):
    return [Sensitivity(f"node{i}", f"layer{i}", float(n - i)) for i in range(n)]


def search(needed, n, allowed=0.1):
    """The metric holds once the `needed` most sensitive layers are in float."""
    tried = []

    def attempt(nodes):
        tried.append(nodes)
        assert list(nodes) == [f"node{i}" for i in range(len(nodes))]
        return {"acc": 0.9 if len(nodes) >= needed else 0.5, "kept": len(nodes)}

    first = attempt(())
    found, table = within_drop(first, attempt, lambda m: m, {"acc": 0.95}, {"acc": allowed}, ranked(n))
    return found, table, tried


@given(st.integers(1, 40).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_as_few_layers_as_needed_stay_in_float_and_the_last_file_is_that_one(case):
    needed, n = case
    found, table, tried = search(needed, n)
    assert found["kept"] == needed
    assert len(tried[-1]) == needed
    assert len(tried) <= 2 * np.log2(n + 1) + 4
    assert all(row["holds"] == (len(row["kept"]) >= needed) for row in table)
    assert all(row["lost"]["acc"] == pytest.approx(0.95 - row["metrics"]["acc"]) for row in table)


def test_if_nothing_is_enough_it_says_how_much_is_lost():
    with pytest.raises(QuantizationError, match=r"every layer in float.*acc 0\.45, and acc 0\.1 is allowed"):
        search(needed=9, n=4)
    with pytest.raises(QuantizationError, match="no layer to keep in float"):
        search(needed=1, n=0)


def test_a_metric_that_is_not_logged_names_near_ones():
    with pytest.raises(QuantizationError, match=r"'val_ac'.*Did you mean 'val_acc'"):
        within_drop({}, lambda nodes: {}, lambda m: m, {"val_acc": 1.0}, {"val_ac": 0.1}, ranked(2))


@pytest.mark.parametrize(
    ("name", "before", "after", "expected"),
    [
        ("val_acc", 0.9, 0.8, 0.1),
        ("val_loss", 0.5, 0.7, 0.2),
        ("val/loss_epoch", 0.5, 0.4, -0.1),
        ("test-WER", 0.1, 0.3, 0.2),
        ("glossary_f1", 0.5, 0.4, 0.1),
        ("ferret", 1.0, 2.0, -1.0),
    ],
)
def test_losses_and_errors_are_better_when_lower(name, before, after, expected):
    assert lost(name, before, after) == pytest.approx(expected)


@pytest.mark.parametrize("drop", [-0.1, float("nan"), float("inf"), True, "0.1"])
def test_a_limit_that_is_no_positive_number_is_refused(drop):
    with pytest.raises(ConfigurationError, match=r"`max_drop\['acc'\]`"):
        check_max_drop({"acc": drop})


def writer(exported, feeds):
    def write(path, exclude):
        quantize_file(exported.path, path, Quantize(), feeds, exclude_nodes=exclude)

    return write


def test_sensitivity_is_what_quantizing_a_layer_alone_does(sparse_chain, tmp_path):
    _, exported, feeds = sparse_chain
    found = sensitivity(exported.path, tmp_path, layers_of(exported.path), writer(exported, feeds), feeds)
    assert sorted(item.layer for item in found) == ["0", "10", "2", "5", "8"]
    assert [item.error for item in found] == sorted((item.error for item in found), reverse=True)
    assert list(tmp_path.iterdir()) == []
    # The same number, by hand, for the most sensitive layer.
    top = found[0]
    others = [item.node for item in found if item is not top]
    quantize_file(exported.path, tmp_path / "one.onnx", Quantize(), feeds, exclude_nodes=others)

    def outputs(path):
        session = onnxruntime.InferenceSession(str(path))
        return np.concatenate([session.run(None, feed)[0] for feed in feeds]).astype(np.float64)

    expected, got = outputs(exported.path), outputs(tmp_path / "one.onnx")
    assert top.error == pytest.approx(np.square(expected - got).sum() / np.square(expected).sum(), rel=1e-6)
