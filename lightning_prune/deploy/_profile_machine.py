"""Binding a process to quiet cores, and its peak memory; standard library only.

The profile runs this file in its own process, so it imports nothing from the package.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any


def core_times() -> dict[int, tuple[int, int]]:
    """Return (busy, total) clock ticks of each core since boot."""
    times = {}
    for line in Path("/proc/stat").read_text().splitlines():
        name, *values = line.split()
        if name.startswith("cpu") and name != "cpu":
            ticks = [int(value) for value in values[:8]]
            times[int(name[3:])] = (sum(ticks) - ticks[3] - ticks[4], sum(ticks))
    return times


def siblings(core: int) -> list[int]:
    """Return the logical cores that share a physical core with this one, itself included."""
    path = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")
    try:
        parts = path.read_text().strip().split(",")
    except OSError:
        return [core]
    ranges = [[int(end) for end in part.split("-")] for part in parts]
    return [number for ends in ranges for number in range(ends[0], ends[-1] + 1)]


def capacity(core: int) -> int:
    """Return how fast a core can be, in the system's own units; 0 if it does not tell."""
    for name in ("cpu_capacity", "cpufreq/cpuinfo_max_freq"):
        try:
            return int(Path(f"/sys/devices/system/cpu/cpu{core}/{name}").read_text())
        except (OSError, ValueError):
            continue
    return 0


def fastest(cores: set[int], count: int) -> set[int]:
    """Return the big cores of a machine with big and little ones, or all where that leaves too few."""
    speeds = {core: capacity(core) for core in cores}
    # Single cores may boost a little higher than their equals; little ones are far below.
    big = {core for core in cores if speeds[core] >= 0.85 * max(speeds.values())}
    return big if len(big) >= count else cores


def pin(count: int, sample_seconds: float = 0.25) -> dict[str, Any]:
    """Bind this process to the `count` least busy fast cores, one on each physical core if possible."""
    if not hasattr(os, "sched_setaffinity"):
        return {"cores": None, "reason": f"{sys.platform} cannot bind a process to a core"}
    try:
        before = core_times()
        time.sleep(sample_seconds)
        after = core_times()
        spent = {core: (after[core][0] - before[core][0], after[core][1] - before[core][1]) for core in after}
        busy = {core: part / max(whole, 1) for core, (part, whole) in spent.items()}
        allowed = fastest(os.sched_getaffinity(0), count)
        # Core 0 usually serves interrupts, so among equals the highest number goes first.
        ranked = sorted(allowed, key=lambda core: (sum(busy.get(s, 0.0) for s in siblings(core)), -core))
        first = [core for i, core in enumerate(ranked) if not set(siblings(core)) & set(ranked[:i])]
        chosen = (first + [core for core in ranked if core not in first])[:count]
        os.sched_setaffinity(0, chosen)
    except (OSError, KeyError, ValueError) as error:
        return {"cores": None, "reason": f"could not bind to a core: {error}"}
    load = max(busy.get(core, 0.0) for core in chosen)
    short = f"only {len(chosen)} cores are allowed" if len(chosen) < count else None
    return {"cores": sorted(chosen), "busy_before": round(load, 3), "reason": short}


def peak_memory() -> int | None:
    """Return the peak resident memory of this process in bytes, or None where the system does not tell."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    if sys.platform != "darwin":
        return None  # elsewhere ru_maxrss starts at the peak of the process that started this one
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def load_average() -> list[float] | None:
    """Return the mean number of waiting processes over 1, 5 and 15 minutes, or None on Windows."""
    return [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None
