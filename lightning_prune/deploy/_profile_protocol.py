"""How a profile was made, and what a reader must know before trusting its numbers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from lightning_prune.deploy.bundle_runner import SETTLE_RUNS
from lightning_prune.deploy.latency import RUNS_FOR_P90, is_noisy, speedup

if TYPE_CHECKING:
    from lightning_prune.deploy.profile import Profile

AGAIN = "baseline, again"
_LEAST_SHARE = 0.9


def baseline_of(names: Iterable[str]) -> str:
    """Return the name that ratios are taken to: `"dense"` if it is there, else the first.

    Example:
        >>> baseline_of(["pruned", "dense"]), baseline_of(["a", "b"])
        ('dense', 'a')
    """
    known = list(names)
    return "dense" if "dense" in known else known[0]


def describe_protocol(
    config: Profile, timed: dict[str, Any], names: list[str], real_inputs: bool
) -> dict[str, Any]:
    """Say how the times were taken, and how the baseline compared to itself."""
    times, baseline = timed["times_ns"], baseline_of(names)
    # If the baseline itself failed, its place in the dense-against-dense row was taken by the next file.
    twice = baseline if baseline in times else baseline_of(name for name in times if name != AGAIN)
    again = speedup(times[twice], times[AGAIN]) if AGAIN in times else None
    rounds, seconds = len(times[twice]), timed["seconds"]
    return {
        "engine": config.engine,
        "threads": config.threads,
        "batch": config.batch,
        "inputs": "real" if real_inputs else "random",
        "rounds": rounds,
        "seconds": round(seconds, 3),
        "baseline": baseline,
        "again": again,
        "noisy": is_noisy(again),
        "settle_runs": SETTLE_RUNS,
        "openings": timed["openings"],
        "pinned": timed["pinned"],
        "cpu_share": round(timed["cpu_seconds"] / (seconds * config.threads), 3) if seconds else None,
        "load_average": timed["load"],
        "warm_up": {name: warm for name, warm in timed["warmup"].items() if name != AGAIN},
    }


def trust_warnings(config: Profile, protocol: dict[str, Any], failed: dict[str, str]) -> tuple[str, ...]:
    """Say what a reader must know before trusting the numbers."""
    found = [f"{name} could not be profiled: {reason}." for name, reason in failed.items()]
    again = protocol["again"]
    if again is None:
        found.append(f"Only {protocol['rounds']} rounds were timed: the noise of the machine is unknown.")
    elif protocol["noisy"]:
        found.append(
            f"The machine was noisy: {protocol['baseline']} against itself came out at {again['value']:.2f}x "
            f"(95 % interval {again['low']:.2f} to {again['high']:.2f}). "
            "Do not trust speed-ups that are not clearly larger, and measure again on a quiet machine."
        )
    if protocol["openings"] == 1 and config.rounds > 1:
        found.append(
            "The files were opened only once, for lack of time: where each came to lie in memory can change "
            "its time by up to a fifth. Raise Profile(max_seconds=...)."
        )
    if protocol["rounds"] < min(RUNS_FOR_P90, config.rounds):
        found.append(
            f"Only {protocol['rounds']} rounds fitted into {config.max_seconds:g} s, so there is no p90: "
            "raise Profile(max_seconds=...)."
        )
    share = protocol["cpu_share"]
    if config.threads == 1 and share is not None and share < _LEAST_SHARE:
        sentence = f"Other programs were running: the timing had {share:.0%} of its core."
        if not protocol["noisy"]:
            sentence += (
                f" The medians are as good as {protocol['baseline']} against itself; "
                "p90, p99 and mean are not those of a quiet machine."
            )
        found.append(sentence)
    restless = [name for name, warm in protocol["warm_up"].items() if not warm["settled"]]
    if restless:
        found.append(f"The times of {', '.join(restless)} had not settled when the warm-up ended.")
    if protocol["pinned"]["reason"]:
        found.append(f"The profile was not pinned as asked: {protocol['pinned']['reason']}.")
    return tuple(found)
