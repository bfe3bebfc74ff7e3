"""How long ONNX files take, measured so that a busy machine cannot fool the reader.

All files are timed in one child process, pinned, warmed up, interleaved in an order shuffled each round,
each after runs of its own that bring its weights back into the caches. All are opened anew some times, for
where a file lies in memory counts too. The baseline is timed against a second copy of itself, which shows
how far to trust the rest. Peak memory, time by operator and energy come from further fresh processes, so
that they disturb nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_prune.deploy._profile_protocol import AGAIN, baseline_of, describe_protocol, trust_warnings
from lightning_prune.deploy._profile_run import ChildError, Entries, Job, run_child
from lightning_prune.deploy.energy import find_counters
from lightning_prune.deploy.environment import environment
from lightning_prune.deploy.latency import RUNS_FOR_P90, RUNS_FOR_P99, speedup, summarize
from lightning_prune.deploy.roofline import measure_peak
from lightning_prune.errors import ConfigurationError, MissingDependencyError, ProfileError

ENGINES = ("onnxruntime", "openvino")
Progress = Callable[[str, float], None]
# What one further process costs besides its own work: starting Python, importing, loading.
_START_SECONDS = 1.0
_NO_TIME = "no time was left; raise Profile(max_seconds=...)"


@dataclass(frozen=True)
class Profile:
    """How to measure the files.

    Attributes:
        threads: Threads of the runtime; the process is pinned to as many cores.
        batch: Samples in one run.
        rounds: Rounds to time, if the time allows: 100 give a p90, 1,000 a p99. Small files are timed in up
            to ten times as many, to fill two seconds. In up to five parts, each with all files opened anew.
        max_seconds: About how long the whole profile may take. What does not fit is left out and says so:
            first the peak, then the time by operator.
        operators: Whether to add up the time by operator, in a run of its own.
        engine: `"onnxruntime"`, or `"openvino"` (extra `[openvino]`; no times by operator).
        dims: Sizes of open dimensions other than the batch, for random inputs: `{"time": 100}`.
        roofline: Whether to measure the machine's peak multiply-accumulates a second too, to compare with.

    Raises:
        ConfigurationError: A value is out of range.
        MissingDependencyError: The engine is not installed.

    Example:
        >>> Profile(threads=2).rounds
        1000
    """

    threads: int = 1
    batch: int = 1
    rounds: int = 1000
    max_seconds: float = 25.0
    operators: bool = True
    engine: str = "onnxruntime"
    dims: dict[str, int] = field(default_factory=dict)
    roofline: bool = True

    def __post_init__(self) -> None:
        """Refuse values that cannot be measured with."""
        for name in ("threads", "batch", "rounds"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigurationError.of("Profile", name, "a whole number of at least 1", value)
        if isinstance(self.max_seconds, bool) or not 1 <= self.max_seconds < float("inf"):
            raise ConfigurationError.of("Profile", "max_seconds", "at least 1 second", self.max_seconds)
        if self.engine not in ENGINES:
            raise ConfigurationError.of("Profile", "engine", f"one of {', '.join(ENGINES)}", self.engine)
        if self.engine != "onnxruntime" and find_spec(self.engine) is None:
            raise MissingDependencyError.of(
                self.engine, f"Profile(engine={self.engine!r})", f"lightning-prune[{self.engine}]"
            )
        for key, size in self.dims.items():
            if not isinstance(size, int) or size < 1:
                raise ConfigurationError.of("Profile", f"dims[{key!r}]", "a whole number of at least 1", size)


@dataclass(frozen=True)
class FileProfile:
    """What was measured on one file, as plain data.

    Attributes:
        latency_ms: The fields of `report.results.Latency`, or None.
        peak_memory_bytes: Peak resident memory beyond the imports, or None.
        operators: `{"op", "ms", "share", "count"}` by operator type, the slowest first.
        energy_mj: Millijoules of one run, or None.
        missing: Why a value is None, by its name.
    """

    latency_ms: dict[str, Any] | None = None
    peak_memory_bytes: int | None = None
    operators: tuple[dict[str, Any], ...] = ()
    energy_mj: float | None = None
    missing: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ProfileResult:
    """What `profile_files` measured.

    Attributes:
        files: The measurements by variant name, in the order given.
        protocol: How they were made: threads, cores, rounds, warm-up, load, the baseline against itself.
        noisy: Whether the baseline against itself was off by more than 5 %.
        environment: Where, see `deploy.environment`.
        warnings: Sentences that the reader must see.
    """

    files: dict[str, FileProfile]
    protocol: dict[str, Any]
    noisy: bool
    environment: dict[str, Any]
    warnings: tuple[str, ...] = ()


def profile_files(
    files: Mapping[str, str | Path],
    config: Profile | None = None,
    inputs: Mapping[str, NDArray[Any]] | None = None,
    progress: Progress | None = None,
) -> ProfileResult:
    """Measure ONNX files side by side.

    Args:
        files: Path by variant name. `"dense"`, else the first, is the baseline.
        config: How to measure; `Profile()` by default.
        inputs: Real inputs by input name, shape (samples, ...); random values of the right shape otherwise.
        progress: Called with the stage's name and the fraction done, 0 to 1.

    Returns:
        Latency, peak memory, time by operator and energy of each file. A part that could not be measured
        is None and says why.

    Raises:
        ConfigurationError: A file does not exist, or there is none.
        ProfileError: No file could be timed.
    """
    config = config or Profile()
    paths = _existing(files)
    job = Job(config.engine, config.threads, config.batch, dict(config.dims), config.rounds, _arrays(inputs))
    tell = progress or (lambda stage, fraction: None)
    started = time.monotonic()
    apart = _START_SECONDS * (len(paths) * (2 if config.operators else 1) + 2 * config.roofline)
    seconds = max(config.max_seconds - apart, config.max_seconds * 0.5)
    timed, failed = _time_all(job, paths, seconds, tell)
    measured = {}
    for number, (name, path) in enumerate(paths.items()):
        tell("memory and operators", number / len(paths))
        left = started + config.max_seconds - time.monotonic()
        share = left / (len(paths) - number)  # what is left is shared among the files still to come
        measured[name] = {} if name in failed else _measure_apart(job, str(path), config.operators, share)
    tell("memory and operators", 1.0)
    protocol = describe_protocol(config, timed, list(paths), job.inputs is not None)
    if config.roofline:
        in_time = time.monotonic() < started + config.max_seconds - _START_SECONDS
        protocol["peak_gmacs"] = measure_peak(job) if in_time else {"reason": _NO_TIME}
    protocol["total_seconds"] = round(time.monotonic() - started, 2)
    return ProfileResult(
        files={name: _file_profile(name, timed, failed, measured[name], protocol) for name in paths},
        protocol=protocol,
        noisy=protocol["noisy"],
        environment=environment(),
        warnings=trust_warnings(config, protocol, failed),
    )


def _existing(files: Mapping[str, str | Path]) -> dict[str, Path]:
    paths = {name: Path(path) for name, path in files.items()}
    if not paths:
        raise ConfigurationError.of("profile_files", "files", "at least one ONNX file", {})
    for name, path in paths.items():
        if not path.is_file():
            raise ConfigurationError.of(
                "profile_files", f"files[{name!r}]", "an ONNX file that exists", str(path)
            )
    return paths


def _arrays(inputs: Mapping[str, NDArray[Any]] | None) -> dict[str, NDArray[Any]] | None:
    return None if inputs is None else {name: np.asarray(array) for name, array in inputs.items()}


def _time_all(
    job: Job, paths: dict[str, Path], seconds: float, tell: Progress
) -> tuple[dict[str, Any], dict[str, str]]:
    """Time the files; leave one that crashes the process out and start again with the others.

    Returns:
        The child's result, and the reason for each file that could not be timed.
    """
    failed: dict[str, str] = {}
    while True:
        names = [name for name in paths if name not in failed]
        if not names:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
            raise ProfileError(f"profile_files: no file could be timed. {reasons}.")
        entries = [(name, str(paths[name])) for name in names]
        try:
            timed = run_child(
                job, "latency", [*entries, (AGAIN, str(paths[baseline_of(names)]))], seconds, tell
            )
        except ChildError as error:
            culprit = baseline_of(names) if error.key == AGAIN else error.key
            if culprit not in names:
                raise
            failed[culprit] = f"the profiling process ended early: {error.reason}"
            continue
        failed.update({name: reason for name, reason in timed["failed"].items() if name != AGAIN})
        if timed["times_ns"]:
            return timed, failed


def _measure_apart(job: Job, path: str, operators: bool, seconds: float) -> dict[str, Any]:
    """Measure what needs a process of its own: peak memory, time by operator, energy."""
    entries = [("file", path)]
    found: dict[str, Any] = {"missing": {}}
    try:
        found["peak_memory_bytes"] = run_child(job, "memory", entries, 0.0)["bytes"]
        if found["peak_memory_bytes"] is None:
            found["missing"]["peak_memory_bytes"] = "the system does not tell the peak memory of a process"
    except ChildError as error:
        found["missing"]["peak_memory_bytes"] = error.reason
    if not operators:
        found["missing"]["operators"] = "not asked for"
    elif job.engine != "onnxruntime":
        found["missing"]["operators"] = "only ONNX Runtime is profiled by operator"
    elif seconds < _START_SECONDS:
        found["missing"]["operators"] = _NO_TIME
    else:
        try:
            span = min(1.0, max(0.1, seconds - 2 * _START_SECONDS))
            found["operators"] = tuple(run_child(job, "operators", entries, span)["operators"])
        except ChildError as error:
            found["missing"]["operators"] = error.reason
    found["energy_mj"], reason = _energy(job, entries)
    if reason:
        found["missing"]["energy_mj"] = reason
    return found


def _energy(job: Job, entries: Entries) -> tuple[float | None, str | None]:
    counters, reason = find_counters()
    if not counters:
        return None, reason
    try:
        result = run_child(job, "energy", entries, 1.0)
    except ChildError as error:
        return None, error.reason
    return result["value"], result["reason"]


def _file_profile(
    name: str, timed: dict[str, Any], failed: dict[str, str], apart: dict[str, Any], protocol: dict[str, Any]
) -> FileProfile:
    if name in failed:
        parts = ("latency_ms", "peak_memory_bytes", "operators", "energy_mj")
        return FileProfile(missing=dict.fromkeys(parts, failed[name]))
    times = timed["times_ns"]
    latency = summarize(times[name])
    base = times.get(protocol["baseline"])
    if base is not None and name != protocol["baseline"]:
        latency["speedup"] = speedup(base, times[name])
        latency["speedup_min"] = min(base) / min(times[name])
    missing = dict(apart["missing"])
    for key, needed in (("p90", RUNS_FOR_P90), ("p99", RUNS_FOR_P99)):
        if latency[key] is None:
            missing[f"latency_ms.{key}"] = f"{latency['runs']} runs, and it takes {needed:,}"
    return FileProfile(
        latency_ms=latency,
        peak_memory_bytes=apart.get("peak_memory_bytes"),
        operators=apart.get("operators", ()),
        energy_mj=apart.get("energy_mj"),
        missing=missing,
    )
