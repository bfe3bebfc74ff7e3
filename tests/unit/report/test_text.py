"""Numbers for people keep their value."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_prune.report import text

SCALES = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


@given(st.floats(1e-6, 1e12))
def test_digits_keep_three_significant_ones_and_never_an_exponent(value):
    shown = text.digits(value)
    assert "e" not in shown
    assert float(shown) == pytest.approx(value, rel=0.0051)
    assert len(shown.replace(".", "").strip("0")) <= max(3, len(str(int(value))))


@given(st.integers(0, 10**14))
def test_sizes_and_counts_keep_their_value(value):
    for show in (text.size, text.count):
        number, _, unit = show(value).partition(" ")
        assert float(number) * SCALES.get(unit, 1) == pytest.approx(value, rel=0.0051)
        assert float(number) < 1000 or unit.startswith("T")


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), (0.99951, "1.00"), (9.996, "10.0"), (99.95, "100"), (999.6, "1000"), (5e-8, "5.00e-08")],
)
def test_rounding_at_the_edges(value, shown):
    assert text.digits(value) == shown


@pytest.mark.parametrize(
    ("base", "value", "words"),
    [(2, 1, "2.00x faster"), (1, 2, "2.00x slower"), (1, 1.004, "same"), (0, 1, ""), (1, 0, ""), (-1, 1, "")],
)
def test_ratio_in_words(base, value, words):
    assert text.ratio(base, value, "faster", "slower") == words


@pytest.mark.parametrize(
    ("value", "words"), [(0.1, "+0.1000"), (-0.00001, "±0"), (-250.0, "-250.0"), (0.0, "±0")]
)
def test_difference_has_its_sign(value, words):
    assert text.difference(value) == words
