"""Run-time switching on the device: one session that serves the variant of a network that fits the moment.

This file needs only Python 3.8, numpy and onnxruntime, and stands alone: an elastic export leaves a copy of
it beside the models, as `elastic.py`.

    session = ElasticSession("edge", target_ms=20.0)      # where onnxruntime.InferenceSession was
    outputs = session.run(None, {"x": pictures})
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

FAMILY = "elastic.json"
_ENOUGH = 5  # runs; fewer say nothing yet about a variant that has just come
# An ONNX file of one node: MatMulInteger of `a`, uint8 (4, 64), and `b`, int8 (64, 16), to `y`.
_PRODUCT = bytes.fromhex(
    "08083a5c0a180a01610a0162120179220d4d61744d756c496e74656765721201675a130a0161120e0a0c080212080a02"
    "08040a0208405a130a0162120e0a0c080312080a0208400a02081062130a0179120e0a0c080612080a0208040a020810"
    "42040a00100d"
)


class ElasticError(Exception):
    """No variant can be served, or what was given describes none."""


@dataclass(frozen=True)
class Policy:
    """When to serve which variant. Variants are ordered from the most to the least costly.

    Args:
        target_ms: A run should take at most this; None: only the signal decides.
        up: A more costly variant comes back when it is predicted to take at most this fraction of the target.
        band: How far beyond the border between two variants the signal has to go before it counts.
        dwell_s: The shortest time between two switches, in seconds.
        window: How many of the last runs are looked at.
        quantile: Which of them, from the fastest to the slowest, has to meet the target, 0 to 1.

    Raises:
        ValueError: A value is out of its range.
    """

    target_ms: float | None = None
    up: float = 0.8
    band: float = 0.05
    dwell_s: float = 2.0
    window: int = 20
    quantile: float = 0.9

    def __post_init__(self) -> None:
        in_range = {
            "target_ms": self.target_ms is None or 0 < self.target_ms < math.inf,
            "up": 0 < self.up < 1,
            "band": 0 <= self.band < 0.5,
            "dwell_s": 0 <= self.dwell_s < math.inf,
            "window": isinstance(self.window, int) and self.window >= 1,
            "quantile": 0 <= self.quantile <= 1,
        }
        for name, fine in in_range.items():
            if not fine:
                raise ValueError(f"Policy: `{name}` is out of its range, got {getattr(self, name)!r}.")


@dataclass(frozen=True)
class State:
    """What is served since when, and when a more costly variant may come back.

    Attributes:
        current: The variant's place.
        since: When it came, in seconds.
        rose: Whether it came because there seemed to be room for it.
        up_after: Before this time no more costly variant comes.
        backoff: How many dwell times to wait before rising again; fourfold whenever rising was a mistake.
    """

    current: int
    since: float
    rose: bool = False
    up_after: float = -math.inf
    backoff: int = 1


def choose(
    policy: Policy,
    costs: Sequence[float],
    current: int,
    slowdown: float | None = None,
    pressure: float | None = None,
) -> int:
    """Say which variant fits the moment, time left aside.

    Args:
        policy: The rules.
        costs: What a run of each costs, descending, in any unit.
        current: The one that is served.
        slowdown: How many milliseconds a run takes now for each unit of cost; None: not known.
        pressure: How much to save, 0 (nothing) to 1 (all that is possible); None: nothing is asked.

    Returns:
        The variant's place: the least costly of what the target and the pressure ask for. More slowdown and
        more pressure never give a more costly one.
    """
    fitting, asked = 0, 0
    if policy.target_ms is not None:
        fitting = current
        if slowdown is not None:
            fits = [i for i, cost in enumerate(costs) if cost * slowdown <= policy.target_ms]
            roomy = [i for i, cost in enumerate(costs) if cost * slowdown <= policy.up * policy.target_ms]
            if not fits:
                fitting = len(costs) - 1
            else:
                fitting = max(fits[0], min(current, roomy[0])) if roomy else max(fits[0], current)
    if pressure is not None:
        borders = [place / len(costs) for place in range(1, len(costs))]
        least = sum(border < pressure - policy.band for border in borders)
        most = sum(border < pressure + policy.band for border in borders)
        asked = max(least, min(current, most))
    return max(fitting, asked)


def step(
    policy: Policy,
    costs: Sequence[float],
    state: State,
    now: float,
    slowdown: float | None = None,
    pressure: float | None = None,
) -> State:
    """Say what is to be served from now on: `choose`, with dwell time and patience.

    Args:
        policy: The rules.
        costs: What a run of each variant costs, descending.
        state: What is served.
        now: The time, in seconds.
        slowdown: See `choose`.
        pressure: See `choose`.

    Returns:
        The same state, or another with another variant.
    """
    if now - state.since < policy.dwell_s:
        return state
    wanted = choose(policy, costs, state.current, slowdown, pressure)
    if wanted == state.current or (wanted < state.current and now < state.up_after):
        return state
    if wanted < state.current:
        return State(wanted, now, True, state.up_after, state.backoff)
    hasty = state.rose and now - state.since <= 4 * policy.dwell_s
    backoff = min(64, state.backoff * 4) if hasty else 1
    return State(wanted, now, False, now + backoff * policy.dwell_s, backoff)


@dataclass(frozen=True)
class Variant:
    """One file.

    Attributes:
        name: What it is called in logs.
        path: The ONNX file.
        cost: What a run costs, in any unit that is the same for all: milliseconds, or multiply-accumulates.
        sha256: The sum of the file, or empty: then a changed file is not noticed.
    """

    name: str
    path: Path
    cost: float
    sha256: str = ""


def read_family(source: str | Path) -> list[Variant]:
    """Read which variants an elastic export has.

    Args:
        source: Its directory, or its `elastic.json`.

    Returns:
        The variants, as they are listed there.

    Raises:
        ElasticError: There is no such file, or it is malformed.
    """
    path = Path(source) / FAMILY if Path(source).is_dir() else Path(source)
    try:
        entries = json.loads(path.read_bytes())["variants"]
        found = [
            Variant(str(e["name"]), path.parent / str(e["file"]), float(e["cost"]), str(e.get("sha256", "")))
            for e in entries
        ]
        outside = [v.name for v, e in zip(found, entries) if Path(str(e["file"])).name != e["file"]]  # noqa: B905
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ElasticError(f"{path} describes no variants: {type(error).__name__}: {error}") from error
    if outside:
        raise ElasticError(f"{path}: the files of {', '.join(outside)} are outside of its directory")
    return found


@dataclass
class _Loaded:
    session: Any
    bytes: int
    running: int = 0
    used: float = 0.0


class ElasticSession:
    """Serves the variant that fits, with the call signature of `onnxruntime.InferenceSession.run`.

    Any number of threads may call `run`. Another variant is loaded, checked, and tried on the latest inputs
    in the background, and takes over between two runs; a run that has begun ends with the variant it began
    with.
    A variant that cannot be loaded is left out from then on, and the others go on.

    Args:
        source: The directory of an elastic export, or the variants themselves, most costly first.
        target_ms: A run should take at most this; short for `policy=Policy(target_ms=...)`.
        signal: How much to save, 0 to 1, from a battery or a load: a number, or a function that gives one, or
            None. The attribute `signal` may be set at any time. The function is called by `run`.
        policy: The rules.
        max_loaded: How many variants may be in memory at once, at least 2: one serves while another loads.
        max_bytes: How large their files may be together, at least the two largest.
        providers: ONNX Runtime's execution providers.
        session_options: An `onnxruntime.SessionOptions`; by default one thread, and exact 8-bit sums on
            x86 without VNNI (`session.x64quantprecision`).
        log: A file that gets one JSON object a line for each event, or a function that gets each as a dict.
        clock: Gives seconds.
        open_file: Makes a session of a path; by default ONNX Runtime's.

    Raises:
        ElasticError: There are no variants, or none can be loaded.
    """

    def __init__(
        self,
        source: str | Path | Sequence[Variant],
        *,
        target_ms: float | None = None,
        signal: float | Callable[[], float] | None = None,
        policy: Policy | None = None,
        max_loaded: int = 2,
        max_bytes: float = math.inf,
        providers: Sequence[str] = ("CPUExecutionProvider",),
        session_options: Any = None,
        log: str | Path | Callable[[dict[str, Any]], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        open_file: Callable[[Path], Any] | None = None,
    ) -> None:
        if policy is not None and target_ms is not None:
            raise ElasticError("give `target_ms` or `policy`, not both")
        if max_loaded < 2:
            raise ElasticError(f"`max_loaded` must be at least 2, got {max_loaded}")
        given = read_family(source) if isinstance(source, (str, Path)) else list(source)
        self.variants = sorted(given, key=lambda variant: -variant.cost)
        if not self.variants or not all(0 < variant.cost < math.inf for variant in self.variants):
            raise ElasticError("there must be at least one variant, each with a cost above 0")
        if len({variant.name for variant in self.variants}) < len(self.variants):
            raise ElasticError("two variants have one name")
        sizes = sorted(v.path.stat().st_size if v.path.is_file() else 0 for v in self.variants)
        if sum(sizes[-2:]) > max_bytes:
            raise ElasticError(f"`max_bytes` must be at least {sum(sizes[-2:])}, the two largest files")
        self.policy = policy or Policy(target_ms)
        self.signal = signal
        self.failures: dict[str, str] = {}
        self.counters: dict[tuple[str, str], float] = {}
        self._limits = (max_loaded, max_bytes)
        self._open = open_file or _opener(list(providers), session_options)
        self._clock, self._log = clock, log
        self._change = threading.Condition()
        self._loaded: dict[int, _Loaded] = {}
        self._recent: deque[float] = deque(maxlen=self.policy.window)
        self._feed: Any = None
        self._pressure: float | None = None
        self._loading: threading.Thread | None = None
        self._closed = False
        self._state = State(self._first(), self._clock())
        self._event("start", variant=self.variant)

    # ------------------------------------------------------------------ what InferenceSession has

    def run(self, output_names: Any, input_feed: Any, run_options: Any = None) -> list[Any]:
        """Run the variant that is served; as `onnxruntime.InferenceSession.run`."""
        with self._change:
            if self._closed:
                raise ElasticError("the session is closed")
            place = self._state.current
            loaded = self._loaded[place]
            loaded.running += 1
        begun = self._clock()
        try:
            result: list[Any] = loaded.session.run(output_names, input_feed, run_options)
        except Exception:
            self._count("run_errors_total", self.variants[place].name)
            raise
        finally:
            spent = self._clock() - begun
            with self._change:
                loaded.running -= 1
                self._change.notify_all()
        self._after(place, (output_names, input_feed), spent * 1000)
        return result

    def get_inputs(self) -> Any:
        """Return the inputs, as `onnxruntime.InferenceSession.get_inputs`."""
        return self._serving().get_inputs()

    def get_outputs(self) -> Any:
        """Return the outputs, as `onnxruntime.InferenceSession.get_outputs`."""
        return self._serving().get_outputs()

    def get_modelmeta(self) -> Any:
        """Return the metadata of the variant that is served."""
        return self._serving().get_modelmeta()

    def get_providers(self) -> Any:
        """Return the execution providers of the variant that is served."""
        return self._serving().get_providers()

    def _serving(self) -> Any:
        with self._change:
            return self._loaded[self._state.current].session

    # ------------------------------------------------------------------ what it has beyond

    @property
    def variant(self) -> str:
        """The name of the variant that is served."""
        return self.variants[self._state.current].name

    @property
    def loaded(self) -> list[str]:
        """The names of the variants in memory."""
        with self._change:
            return [self.variants[place].name for place in sorted(self._loaded)]

    def metrics(self) -> dict[str, Any]:
        """Return all counters as plain data, ready for JSON."""
        with self._change:
            found: dict[str, Any] = {"variant": self.variant, "pressure": self._pressure}
            found["loaded_bytes"] = sum(one.bytes for one in self._loaded.values())
            for (what, name), value in sorted(self.counters.items()):
                found.setdefault(what, {})[name] = value
            return {**found, "failures": dict(self.failures)}

    def prometheus(self, prefix: str = "elastic") -> str:
        """Return all counters in the text format of Prometheus."""
        lines = []
        with self._change:
            for what in sorted({key[0] for key in self.counters}):
                lines.append(f"# TYPE {prefix}_{what} counter")
                for (kind, name), value in sorted(self.counters.items()):
                    if kind == what:
                        lines.append(f'{prefix}_{what}{{variant="{_escaped(name)}"}} {value:.9g}')
            lines.append(f"# TYPE {prefix}_serving gauge")
            for place, variant in enumerate(self.variants):
                serves = int(place == self._state.current)
                lines.append(f'{prefix}_serving{{variant="{_escaped(variant.name)}"}} {serves}')
            lines.append(f"# TYPE {prefix}_loaded_bytes gauge")
            lines.append(f"{prefix}_loaded_bytes {sum(one.bytes for one in self._loaded.values())}")
        return "\n".join(lines) + "\n"

    def close(self) -> None:
        """Let all variants go; runs that have begun end."""
        with self._change:
            if self._closed:
                return
            self._closed = True
            self._change.notify_all()
        loading = self._loading
        if loading is not None:
            loading.join()
        self._event("close", **self.metrics())
        with self._change:
            self._loaded.clear()

    def __enter__(self) -> ElasticSession:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # ------------------------------------------------------------------ deciding

    def _after(self, place: int, call: Any, spent_ms: float) -> None:
        """Count a run, and see whether another variant fits better now."""
        settled = self._clock() - self._state.since >= self.policy.dwell_s
        pressure = self._ask() if settled else self._pressure
        missed = self.policy.target_ms is not None and spent_ms > self.policy.target_ms
        name = self.variants[place].name
        with self._change:
            self._count("runs_total", name)
            self._count("run_milliseconds_total", name, spent_ms)
            self._count("deadline_misses_total", name, missed)
            self._feed = call
            if place == self._state.current:
                self._recent.append(spent_ms / self.variants[place].cost)
            if self._closed or self._loading is not None or not settled:
                return
            wanted = self._wanted(pressure)
            if wanted is None:
                return
            self._loading = threading.Thread(target=self._switch, args=(wanted,), daemon=True)
            self._loading.start()

    def _wanted(self, pressure: float | None) -> State | None:
        """The state to go to, among variants that work; None to stay."""
        known = [i for i, variant in enumerate(self.variants) if variant.name not in self.failures]
        costs = [self.variants[i].cost for i in known]
        ranked = sorted(self._recent)
        enough = len(ranked) >= min(_ENOUGH, self.policy.window)
        slowdown = ranked[math.ceil(self.policy.quantile * (len(ranked) - 1))] if enough else None
        state = replace(self._state, current=known.index(self._state.current))
        after = step(self.policy, costs, state, self._clock(), slowdown, pressure)
        return None if after is state else replace(after, current=known[after.current])

    def _ask(self) -> float | None:
        """What the signal says now; the latest known where it says nothing of use."""
        signal = self.signal
        try:
            value = signal() if callable(signal) else signal
            if value is not None and not math.isnan(value):
                value = min(1.0, max(0.0, float(value)))
        except Exception as error:  # noqa: BLE001 - the user's own function must not fail an inference
            self._count("signal_errors_total", "")
            self._event("signal_error", reason=f"{type(error).__name__}: {error}")
            return self._pressure
        if value is None or not math.isnan(value):
            self._pressure = value
        return self._pressure

    # ------------------------------------------------------------------ loading

    def _first(self) -> int:
        """Load the most costly variant that can be loaded."""
        for place, variant in enumerate(self.variants):
            try:
                self._loaded[place] = self._load(variant)
            except Exception as error:  # noqa: BLE001 - whatever is wrong with one file, another may do
                self._failed(variant, error)
                continue
            return place
        raise ElasticError(f"no variant can be loaded: {self.failures}")

    def _load(self, variant: Variant) -> _Loaded:
        size = variant.path.stat().st_size
        if variant.sha256 and _digest(variant.path) != variant.sha256:
            raise ElasticError(f"{variant.path.name} does not match its SHA-256 sum")
        session = self._open(variant.path)
        self._count("loads_total", variant.name)
        return _Loaded(session, size)

    def _switch(self, wanted: State) -> None:
        """Bring a variant in, and serve it from then on; on a thread of its own."""
        variant = self.variants[wanted.current]
        try:
            loaded = self._make_ready(wanted.current, variant)
        except Exception as error:  # noqa: BLE001 - the one that serves goes on
            self._failed(variant, error)
            loaded = None
        with self._change:
            self._loading = None
            self._change.notify_all()
            if loaded is None or self._closed:
                return
            before, now = self.variant, self._clock()
            self._loaded[wanted.current] = loaded
            loaded.used = now
            self._loaded[self._state.current].used = now
            # Time counts from when it serves, however long it took to load.
            late = now - wanted.since
            self._state = replace(wanted, since=now, up_after=wanted.up_after + late)
            self._recent.clear()
            self._count("switches_total", variant.name)
        self._event("switch", variant=variant.name, before=before, pressure=self._pressure)

    def _make_ready(self, place: int, variant: Variant) -> _Loaded | None:
        with self._change:
            found = self._loaded.get(place)
            if found is not None:
                return found
            self._make_room(variant)
            if self._closed:
                return None
            serving, call = self._loaded[self._state.current].session, self._feed
        loaded = self._load(variant)
        if _interface(loaded.session) != _interface(serving):
            raise ElasticError(f"{variant.name} has other inputs or outputs than {self.variant}")
        loaded.session.run(*call)
        return loaded

    def _make_room(self, variant: Variant) -> None:
        """Let go of what has not served for longest, until another fits, and wait for its last runs."""
        count, size = self._limits
        new = variant.path.stat().st_size
        while True:
            spare = [place for place in self._loaded if place != self._state.current]
            held = sum(one.bytes for one in self._loaded.values())
            if not spare or (len(self._loaded) < count and held + new <= size):
                return
            gone = self._loaded.pop(min(spare, key=lambda place: self._loaded[place].used))
            while gone.running and not self._closed:
                self._change.wait()

    def _failed(self, variant: Variant, error: Exception) -> None:
        reason = f"{type(error).__name__}: {error}"
        with self._change:
            self.failures[variant.name] = reason
            self._count("load_failures_total", variant.name)
        self._event("load_failed", variant=variant.name, reason=reason)

    def _event(self, event: str, **facts: Any) -> None:
        if self._log is None:
            return
        entry = {"event": event, "time": time.time(), **facts}
        try:
            if callable(self._log):
                self._log(entry)
            else:
                with Path(self._log).open("a") as file:
                    file.write(json.dumps(entry) + "\n")
        except Exception:  # noqa: BLE001 - a full disk must not fail an inference
            self._count("log_errors_total", "")

    def _count(self, what: str, name: str, amount: float = 1) -> None:
        with self._change:
            self.counters[what, name] = self.counters.get((what, name), 0) + amount


def _interface(session: Any) -> list[Any]:
    return [[(one.name, one.type) for one in ends] for ends in (session.get_inputs(), session.get_outputs())]


def _digest(path: Path) -> str:
    total = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            total.update(block)
    return total.hexdigest()


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


@lru_cache(maxsize=1)
def _sums_overflow() -> bool:
    """Try whether ONNX Runtime adds 8-bit products in 16 bits here, as it does on x86 without VNNI."""
    import numpy
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    largest = {"a": numpy.full((4, 64), 255, numpy.uint8), "b": numpy.full((64, 16), 127, numpy.int8)}
    try:
        session = onnxruntime.InferenceSession(_PRODUCT, options, providers=["CPUExecutionProvider"])
        return bool((session.run(None, largest)[0] != 64 * 255 * 127).any())
    except Exception:  # noqa: BLE001 - its own classes are private
        return True  # a build without this operator: slow is better than wrong


def _opener(providers: list[str], options: Any) -> Callable[[Path], Any]:
    import onnxruntime

    if options is not None:
        return lambda path: onnxruntime.InferenceSession(str(path), options, providers=providers)

    def opened(path: Path, entry: str | None = None) -> Any:
        ours = onnxruntime.SessionOptions()
        ours.intra_op_num_threads = ours.inter_op_num_threads = 1
        ours.log_severity_level = 4  # what is wrong is raised
        if entry:
            ours.add_session_config_entry(entry, "1")
        return onnxruntime.InferenceSession(str(path), ours, providers=providers)

    def exact(path: Path) -> Any:
        if not _sums_overflow():
            return opened(path)
        try:
            return opened(path, "session.x64quantprecision")
        except Exception:  # noqa: BLE001 - its own classes are private
            # ONNX Runtime 1.32 cannot where operators share a weight: then a static file runs in float.
            return opened(path, "session.disable_quant_qdq")

    return exact
