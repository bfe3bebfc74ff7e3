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
        `p50`, `p90`, `p99`, `mean`, `min` in milliseconds, and `runs`. A percentile that too few runs
        support (100 for p90, 1,000 for p99) is None.

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
