"""The size bound against counting and against a real compressor."""

from __future__ import annotations

import lzma
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_prune.entropy import least_bytes


@given(st.integers(0, 300), st.data(), st.sampled_from([8, 16, 32]))
def test_the_bound_counts_positions_and_values(elements, data, bits):
    nonzero = data.draw(st.integers(0, elements))
    expected = (math.log2(math.comb(elements, nonzero)) + nonzero * bits) / 8
    assert least_bytes([(elements, nonzero)], bits) == pytest.approx(expected, abs=1e-6)


def test_the_bounds_of_weights_add_up():
    assert least_bytes([(10, 5), (20, 5)], 8) == least_bytes([(10, 5)], 8) + least_bytes([(20, 5)], 8)


@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.95])
def test_no_compressor_goes_below_the_bound_on_random_values(sparsity):
    rng = np.random.default_rng(0)
    weights = rng.integers(1, 256, 50_000).astype(np.uint8)
    weights[rng.permutation(50_000)[: int(sparsity * 50_000)]] = 0
    bound = least_bytes([(50_000, int((weights != 0).sum()))], 8)
    packed = len(lzma.compress(weights.tobytes(), preset=9))
    assert bound * 0.99 < packed < 2 * bound
