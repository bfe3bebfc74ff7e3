"""Statistics of timings, against the standard library and against known truths."""

from __future__ import annotations

import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_prune.deploy.latency import is_noisy, median_interval, speedup, summarize

times = st.lists(st.integers(1_000, 10**9), min_size=2, max_size=300)


@given(times)
def test_summary_agrees_with_the_standard_library(values):
    summary = summarize(values)
    assert summary["runs"] == len(values)
    assert summary["min"] == pytest.approx(min(values) / 1e6)
    assert summary["mean"] == pytest.approx(statistics.fmean(values) / 1e6)
    assert summary["p50"] == pytest.approx(statistics.median(values) / 1e6)
    if len(values) >= 100:
        assert summary["p90"] == pytest.approx(
            statistics.quantiles(values, n=10, method="inclusive")[-1] / 1e6
        )


@pytest.mark.parametrize(
    ("runs", "p90", "p99"), [(99, False, False), (100, True, False), (999, True, False), (1000, True, True)]
)
def test_percentiles_need_enough_runs(runs, p90, p99):
    summary = summarize(range(1, runs + 1))
    assert (summary["p90"] is not None, summary["p99"] is not None) == (p90, p99)


@given(st.lists(st.integers(1_000, 10**6), min_size=10, max_size=50), st.integers(2, 5))
def test_speedup_is_exact_when_every_round_has_the_same_ratio_however_noisy(base, factor):
    result = speedup([value * factor for value in base], base)
    assert result == pytest.approx({"value": factor, "low": factor, "high": factor})


def test_speedup_interval_covers_the_truth_about_95_times_in_100():
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(200):
        shared = generator.lognormal(0, 0.3, 100)  # a slow round slows both
        pair = [shared * generator.lognormal(0, 0.1, 100) * scale for scale in (2e6, 1e6)]
        result = speedup(pair[0], pair[1], resamples=300)
        assert result is not None
        assert result["low"] <= result["value"] <= result["high"]
        covered += result["low"] <= 2.0 <= result["high"]
    assert 180 <= covered <= 200


def test_speedup_needs_ten_rounds():
    assert speedup([1] * 9, [1] * 9) is None
    assert speedup([1] * 10, [1] * 10) is not None


@pytest.mark.parametrize(
    ("interval", "noisy"),
    [
        ((0.96, 1.04), False),
        ((1.0, 1.0), False),
        ((0.94, 1.0), True),
        ((1.0, 1.06), True),
        ((0.5, 2.0), True),
        ((1.1, 1.2), True),
    ],
)
def test_noise_is_what_leaves_one_by_more_than_five_percent(interval, noisy):
    assert is_noisy({"value": 1.0, "low": interval[0], "high": interval[1]}) is noisy


def test_unknown_noise_counts_as_noise():
    assert is_noisy(None)


def test_median_interval_covers_the_truth_at_least_95_times_in_100():
    generator = np.random.default_rng(2)
    covered = 0
    for _ in range(500):
        found = median_interval(generator.exponential(1.0, 60))
        covered += found["low"] <= np.log(2) <= found["high"]
    assert 465 <= covered < 500


def test_median_interval_needs_ten_runs():
    assert median_interval(np.ones(9)) is None
    assert summarize([2_000_000] * 10)["p50_interval"] == {"value": 2.0, "low": 2.0, "high": 2.0}
