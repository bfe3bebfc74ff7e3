"""Statistics of interleaved timings: percentiles, and ratios with paired bootstrap intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

RUNS_FOR_P90, RUNS_FOR_P99, RUNS_FOR_INTERVAL = 100, 1000, 10
NOISE = 0.05


def summarize(times_ns: Sequence[int]) -> dict[str, Any]:
    """Describe the times of one file.

    Args:
        times_ns: Nanoseconds of each run.

    Returns:
        `p50`, `p90`, `p99`, `mean`, `min` in milliseconds, `runs`, and `p50_interval`. What too few runs
        support (100 for p90, 1,000 for p99, 10 for the interval) is None.

    Example:
        >>> summary = summarize([1_000_000] * 100)
        >>> summary["p50"], summary["p90"], summary["p99"], summary["runs"]
        (1.0, 1.0, None, 100)
    """
    times = np.asarray(times_ns, dtype=np.float64) / 1e6
    return {
        "p50": float(np.median(times)),
        "p90": float(np.percentile(times, 90)) if len(times) >= RUNS_FOR_P90 else None,
        "p99": float(np.percentile(times, 99)) if len(times) >= RUNS_FOR_P99 else None,
        "mean": float(times.mean()),
        "runs": len(times),
        "min": float(times.min()),
        "p50_interval": median_interval(times),
    }


def median_interval(times: NDArray[np.float64]) -> dict[str, float] | None:
    """Return the median with a 95 % interval that assumes nothing of how the times are distributed.

    It lies between order statistics: how many of n values are below the true median is binomial, about
    n/2 +- 1.96 sqrt(n)/2 (Conover 1999, section 3.2).

    Args:
        times: The times of each run.

    Returns:
        `value`, `low`, `high`; None below 10 runs.

    Example:
        >>> median_interval(np.arange(1.0, 101.0))
        {'value': 50.5, 'low': 40.0, 'high': 61.0}
    """
    count = len(times)
    if count < RUNS_FOR_INTERVAL:
        return None
    ordered = np.sort(times)
    below = max(int(np.floor(count / 2 - 0.98 * np.sqrt(count))), 1)
    return {
        "value": float(np.median(ordered)),
        "low": float(ordered[below - 1]),
        "high": float(ordered[count - below]),
    }


def speedup(
    baseline_ns: Sequence[int], times_ns: Sequence[int], resamples: int = 1000
) -> dict[str, float] | None:
    """Return how many times faster the median run is than the baseline's, with a 95 % interval.

    The two were timed in the same rounds, so rounds are resampled as pairs: what slowed one round down
    slowed both (Efron & Tibshirani 1993, chapter 13, percentile intervals).

    Args:
        baseline_ns: Nanoseconds of the baseline in each round.
        times_ns: Nanoseconds of the file in the same rounds.
        resamples: Bootstrap resamples.

    Returns:
        `value`, `low`, `high`; above 1 is faster than the baseline. None below 10 rounds.

    Example:
        >>> speedup([200] * 50, [100] * 50)
        {'value': 2.0, 'low': 2.0, 'high': 2.0}
    """
    pairs = np.asarray([baseline_ns, times_ns], dtype=np.float64)
    rounds = pairs.shape[1]
    if rounds < RUNS_FOR_INTERVAL:
        return None
    generator = np.random.default_rng(0)
    ratios: list[NDArray[np.float64]] = []
    chunk = max(1, 500_000 // rounds)  # keeps the resampled table within a few megabytes
    for start in range(0, resamples, chunk):
        picked = generator.integers(0, rounds, size=(min(chunk, resamples - start), rounds))
        medians = np.median(pairs[:, picked], axis=2)
        ratios.append(medians[0] / medians[1])
    low, high = np.percentile(np.concatenate(ratios), [2.5, 97.5])
    value = float(np.median(pairs[0]) / np.median(pairs[1]))
    return {"value": value, "low": float(low), "high": float(high)}


def is_noisy(again: dict[str, float] | None) -> bool:
    """Tell whether the baseline timed against itself shows that the machine is too noisy to trust.

    Args:
        again: `speedup` of the baseline against a second copy of itself.

    Returns:
        True if its interval is not within 1 +- 5 %, or if there is none.

    Example:
        >>> is_noisy({"value": 1.0, "low": 0.99, "high": 1.02})
        False
        >>> is_noisy({"value": 1.0, "low": 0.9, "high": 1.1})
        True
    """
    return again is None or again["low"] < 1 - NOISE or again["high"] > 1 + NOISE
