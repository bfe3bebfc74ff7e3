"""Energy from a sensor, or none at all and the reason; standard library only.

The sensor is Linux's powercap interface (RAPL on Intel and AMD machines). Its counters wrap around, are
often readable by root only, and on virtual machines are absent or stand still. A counter that does not grow
under load is not a sensor. Nothing is estimated from a model of the hardware.

The profile runs this file in its own process, so it imports nothing from the package.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")
SAMPLE_SECONDS = 0.02


@dataclass(frozen=True)
class Energy:
    """What a sensor said.

    Attributes:
        value: Millijoules of one run, all of the domain included, idle power too; None without a sensor.
        source: The interface that was read.
        domain: The part of the machine it covers.
        reason: Why there is no value.
        runs: How many runs the value is the mean of.
    """

    value: float | None
    source: str | None = None
    domain: str | None = None
    reason: str | None = None
    runs: int = 0

    def to_dict(self) -> dict[str, object]:
        """Return the fields as plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Counter:
    """One energy counter.

    Attributes:
        path: Its file, which holds microjoules.
        name: The domain, such as `"package-0"`.
        span: Where it wraps around to zero, in microjoules; None if the system does not say.
    """

    path: Path
    name: str
    span: int | None

    def read(self) -> int:
        """Return the counter in microjoules."""
        return int(self.path.read_text())

    def grown(self, before: int, after: int) -> int:
        """Return the microjoules between two readings less than one wrap-around apart.

        Raises:
            ValueError: The counter went back and does not say where it wraps around.

        Example:
            >>> Counter(Path("energy_uj"), "package-0", span=1000).grown(990, 15)
            25
        """
        if after >= before:
            return after - before
        if self.span is None:
            raise ValueError(f"{self.name} went back from {before} to {after} uJ with no known range")
        return after - before + self.span


def find_counters(root: Path = POWERCAP) -> tuple[list[Counter], str]:
    """Find the counters of whole processor packages.

    Args:
        root: The powercap directory.

    Returns:
        The readable counters, and why there are none.
    """
    if not root.is_dir():
        return [], f"no energy sensor: {root} does not exist, as is usual on virtual machines"
    counters, reasons = [], []
    for zone in sorted(root.iterdir()):
        path = zone / "energy_uj"
        # "intel-rapl:0" is a package; "intel-rapl:0:1" is a part of it and would be counted twice.
        if zone.name.count(":") != 1 or not path.exists():
            continue
        try:
            name = (zone / "name").read_text().strip()
            span_file = zone / "max_energy_range_uj"
            counter = Counter(path, name, int(span_file.read_text()) if span_file.exists() else None)
            counter.read()
        except (OSError, ValueError) as error:
            reasons.append(f"{path}: {getattr(error, 'strerror', None) or error}")
            continue
        if name.startswith("package"):
            counters.append(counter)
    reason = "; ".join(reasons) or f"no energy sensor: no processor package below {root}"
    return counters, reason


def measure(work: Callable[[], object], seconds: float = 1.0, root: Path = POWERCAP) -> Energy:
    """Repeat `work` for some time and return the millijoules of one repetition.

    Args:
        work: One run.
        seconds: How long to repeat it.
        root: The powercap directory.

    Returns:
        The energy, or None with the reason: no sensor, no permission, a counter that stands still.

    Example:
        >>> measure(lambda: None, seconds=0.01, root=Path("no-such-directory")).reason
        'no energy sensor: no-such-directory does not exist, as is usual on virtual machines'
    """
    counters, reason = find_counters(root)
    if not counters:
        return Energy(None, reason=reason)
    domain = "+".join(counter.name for counter in counters)
    try:
        return _measure(work, seconds, counters, domain)
    except (OSError, ValueError) as error:
        return Energy(None, "powercap", domain, f"the energy counter could not be read: {error}")


def _measure(work: Callable[[], object], seconds: float, counters: list[Counter], domain: str) -> Energy:
    last = [counter.read() for counter in counters]
    total, runs, steps = [0] * len(counters), 0, [0] * len(counters)
    start = sampled = time.perf_counter()
    while True:
        work()
        runs += 1
        now = time.perf_counter()
        if now - sampled < SAMPLE_SECONDS and now - start < seconds:
            continue
        sampled = now
        for index, counter in enumerate(counters):
            value = counter.read()
            grown = counter.grown(last[index], value)
            total[index] += grown
            steps[index] += grown > 0
            last[index] = value
        if now - start >= seconds:
            break
    still = [counter.name for counter, count in zip(counters, steps, strict=True) if count < 2]
    if still:
        reason = f"the counter of {', '.join(still)} does not grow under load: it is not a sensor"
        return Energy(None, "powercap", domain, reason, runs)
    return Energy(sum(total) / runs / 1000, "powercap", domain, None, runs)
