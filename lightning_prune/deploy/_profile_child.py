"""The process in which files are measured: standard library, numpy and one runtime, nothing else.

`_profile_run.py` copies this file and the three it imports into an empty directory and runs them there on
`job.json`: no crash, memory peak or thread pool of the parent reaches the numbers, torch is not imported,
and the same files run on a device. Events go to stdout, one JSON object a line; the result goes to
`result.json`.
"""

from __future__ import annotations

import contextlib
import gc
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from lightning_prune.deploy._profile_machine import load_average, peak_memory, pin
from lightning_prune.deploy.bundle_runner import OPENINGS, exact_session, timed_run
from lightning_prune.deploy.energy import measure

Feeds = dict[str, Any]
Run = Callable[[Feeds], object]
WARMUP_SECONDS, WARMUP_RUNS, WARMUP_LIMIT, WARMUP_TOLERANCE = 0.5, 10, 10.0, 0.02
# A thousand rounds of a small file pass within one burst of another program's load: time for longer.
LEAST_SECONDS, MOST_ROUNDS = 2.0, 10
# Where a file comes to lie in memory makes it up to a fifth slower or faster for as long as it is open, and
# those opened first tend to be slow. Opening all anew takes at most this share of the time.
OPENING_SHARE, RUNS_AFTER_OPENING = 0.25, 5


def emit(**event: object) -> None:
    """Tell the parent something, at once: after a crash these lines are all it has."""
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


# -- the runtimes -----------------------------------------------------------------------------------------


def open_onnxruntime(path: str, job: dict[str, Any], trace: str | None = None) -> tuple[Run, list[Any], Any]:
    """Open a file with ONNX Runtime; return how to run it, its inputs (name, shape, type), the session."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = job["threads"]
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    options.log_severity_level = 3
    if trace:
        options.enable_profiling = True
        options.profile_file_prefix = trace
    # Accuracy is measured so, and so is time.
    session = exact_session(path, options)
    inputs = [(item.name, item.shape, item.type) for item in session.get_inputs()]
    return (lambda feeds: session.run(None, feeds)), inputs, session


def open_openvino(path: str, job: dict[str, Any], trace: str | None = None) -> tuple[Run, list[Any], Any]:
    """Open a file with OpenVINO, in true float32 where the file is float, with the job's threads."""
    openvino = import_module("openvino")
    core = openvino.Core()
    model = core.read_model(path)
    names = {"f32": "float", "f16": "float16", "f64": "double", "i64": "int64", "i32": "int32"}
    inputs = []
    for port in model.inputs:
        shape = [dim.get_length() if dim.is_static else None for dim in port.get_partial_shape()]
        kind = port.get_element_type().get_type_name()
        inputs.append((port.get_any_name(), shape, f"tensor({names.get(kind, kind)})"))
    config = {
        # On AMX machines "fp32" is silently run in bfloat16 unless told otherwise.
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": job["threads"],
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,
    }
    compiled = core.compile_model(model, "CPU", config)
    request = compiled.create_infer_request()
    return (lambda feeds: request.infer(feeds)), inputs, compiled


def open_model(path: str, job: dict[str, Any], trace: str | None = None) -> tuple[Run, list[Any], Any]:
    """Open a file with the job's engine."""
    return (open_openvino if job["engine"] == "openvino" else open_onnxruntime)(path, job, trace)


# -- the inputs -------------------------------------------------------------------------------------------


def size_of(dim: object, axis: int, name: str, shape: list[object], job: dict[str, Any]) -> int:
    """Return the size to use for one dimension of an input."""
    if isinstance(dim, int) and dim > 0:
        return dim
    if isinstance(dim, str) and dim in job["dims"]:
        return int(job["dims"][dim])
    if axis == 0 or (dim is not None and dim == shape[0]) or dim in ("batch", "batch_size", "N"):
        return int(job["batch"])
    remedy = f"give real inputs, or its size in Profile(dims={{{str(dim)!r}: ...}})"
    raise ValueError(f"input {name!r} has the open dimension {dim!r} at axis {axis}; {remedy}")


def feeds_for(inputs: list[Any], given: dict[str, Any], job: dict[str, Any]) -> Feeds:
    """Return one input per name: the given arrays cut to the batch, random values for what is not given."""
    import numpy as np

    generator = np.random.default_rng(0)
    feeds: Feeds = {}
    for name, shape, kind in inputs:
        if name in given:
            array = np.asarray(given[name])
            if shape and not isinstance(shape[0], int) and len(array):
                array = array[np.arange(job["batch"]) % len(array)]
            feeds[name] = np.ascontiguousarray(array)
            continue
        sizes = [size_of(dim, axis, name, shape, job) for axis, dim in enumerate(shape)]
        element = kind[len("tensor(") : -1]
        dtype = {"float": "float32", "double": "float64", "string": "object"}.get(element, element)
        if dtype in ("float32", "float64", "float16"):
            feeds[name] = generator.standard_normal(sizes).astype(dtype)
        elif dtype == "object":
            feeds[name] = np.full(sizes, "", dtype=object)
        else:  # zeros are valid as an index, a length and a mask
            feeds[name] = np.zeros(sizes, dtype=dtype)
    return feeds


def given_inputs(job: dict[str, Any]) -> dict[str, Any]:
    """Load the real inputs that the parent put beside the job, if any."""
    import numpy as np

    if not job["inputs"]:
        return {}
    with np.load("inputs.npz", allow_pickle=False) as arrays:
        return {name: arrays[f"arr_{number}"] for number, name in enumerate(job["inputs"])}


def open_ready(
    path: str, job: dict[str, Any], given: dict[str, Any], trace: str | None = None
) -> tuple[Run, Feeds, Any]:
    """Open a file and run it once, so that a file that cannot run fails here."""
    run, inputs, session = open_model(path, job, trace)
    feeds = feeds_for(inputs, given, job)
    run(feeds)
    return run, feeds, session


# -- the tasks --------------------------------------------------------------------------------------------


def warm_up(run: Run, feeds: Feeds, limit: float) -> dict[str, Any]:
    """Run until two successive windows' medians differ by less than 2 %, within `limit` seconds."""
    start = time.perf_counter()
    window: list[float] = []
    previous, runs, change = 0.0, 0, float("inf")
    while True:
        began = time.perf_counter()
        run(feeds)
        ended = time.perf_counter()
        window.append(ended - began)
        runs += 1
        if len(window) >= 5 and sum(window) >= 0.1:
            median = statistics.median(window)
            change, previous, window = abs(median - previous) / median, median, []
        elapsed = ended - start
        settled = elapsed >= WARMUP_SECONDS and runs >= WARMUP_RUNS and change < WARMUP_TOLERANCE
        if settled or elapsed >= limit:
            return {"runs": runs, "seconds": round(elapsed, 3), "settled": settled}


def open_again(
    ready: dict[str, tuple[Run, Feeds]], job: dict[str, Any], given: dict[str, Any], order: list[str]
) -> None:
    """Open all files anew in this order, so that each comes to lie elsewhere in memory."""
    paths = dict(job["entries"])
    ready.clear()
    gc.collect()
    for key in order:
        emit(event="start", key=key)
        run, feeds, _session = open_ready(paths[key], job, given)
        ready[key] = (run, feeds)
        for _ in range(RUNS_AFTER_OPENING):
            run(feeds)
    emit(event="start", key=None)


def time_one(entry: tuple[Run, Feeds], before: list[int]) -> int:
    """Time one run, see `timed_run`; nothing keeps the file open for longer."""
    run, feeds = entry
    return timed_run(partial(run, feeds), before)


def time_rounds(
    ready: dict[str, tuple[Run, Feeds]], job: dict[str, Any], given: dict[str, Any], end: float, cost: float
) -> dict[str, Any]:
    """Time every entry once a round, in an order shuffled each round, with its own weights in the caches.

    It ends after the job's rounds and two seconds, or ten times the rounds, or when the time is up. In equal
    parts of it all files are opened anew, as often as the seconds that this takes, `cost`, allow.
    """
    order, shuffler = list(ready), random.Random(0)
    times: dict[str, list[int]] = {key: [] for key, _ in job["entries"] if key in ready}
    left = end - time.perf_counter()
    openings = max(1, min(OPENINGS, job["rounds"], 1 + int(OPENING_SHARE * left / cost)))
    rounds, cpu, wall, told = 0, 0.0, 0.0, 0.0
    for part in range(1, openings + 1):
        if part > 1:
            shuffler.shuffle(order)
            open_again(ready, job, given, order)
        busy, start = time.process_time(), time.perf_counter()
        until = start + (end - start - cost * (openings - part)) / (openings - part + 1)
        gc.disable()
        while rounds < job["rounds"] * MOST_ROUNDS * part / openings:
            shuffler.shuffle(order)
            for key in order:
                times[key].append(time_one(ready[key], times[key]))
            rounds += 1
            now = time.perf_counter()
            spent = wall + now - start
            enough = rounds >= job["rounds"] * part / openings and spent >= LEAST_SECONDS * part / openings
            if now >= until or enough:
                break
            if now - told > 0.25:
                gc.collect(0)
                done = min(rounds / job["rounds"], spent / LEAST_SECONDS)
                done = max(done, 1 - (end - now) / left)
                emit(event="progress", stage="latency", fraction=min(max(done, 0.0), 1.0))
                told = now
        gc.enable()
        wall += time.perf_counter() - start
        cpu += time.process_time() - busy
    return {"times_ns": times, "seconds": wall, "cpu_seconds": cpu, "openings": openings}


def latency(job: dict[str, Any]) -> dict[str, Any]:
    """Time all files in this one process."""
    began = time.perf_counter()
    pinned = pin(job["threads"])
    given = given_inputs(job)
    with contextlib.suppress(ImportError):  # it is told below, of each file
        import_module(job["engine"])
    ready: dict[str, tuple[Run, Feeds]] = {}
    failed: dict[str, str] = {}
    warm: dict[str, Any] = {}
    limit = min(WARMUP_LIMIT, max(WARMUP_SECONDS, job["seconds"] * 0.4 / len(job["entries"])))
    cost = 0.0
    for number, (key, path) in enumerate(random.Random(0).sample(job["entries"], len(job["entries"]))):
        emit(event="start", key=key)
        emit(event="progress", stage="warm-up", fraction=number / len(job["entries"]))
        start = time.perf_counter()
        try:
            ready[key] = open_ready(path, job, given)[:2]
            cost += time.perf_counter() - start
            warm[key] = warm_up(*ready[key], limit)
        except Exception as error:  # noqa: BLE001 - whatever a runtime raises is the reason to report
            ready.pop(key, None)
            failed[key] = f"{type(error).__name__}: {error}"
    emit(event="start", key=None)
    load = load_average()
    # Opening and warming up large files may have used up the time; some is for measuring in any case.
    end = max(began + job["seconds"], time.perf_counter() + 0.4 * job["seconds"])
    nothing = {"times_ns": {}, "seconds": 0.0, "cpu_seconds": 0.0, "openings": 0}
    timed = time_rounds(ready, job, given, end, cost) if ready else nothing
    return {**timed, "failed": failed, "warmup": warm, "pinned": pinned, "load": [load, load_average()]}


def memory(job: dict[str, Any]) -> dict[str, Any]:
    """Measure the peak memory of loading and running one file, less what the imports had taken."""
    import_module(job["engine"])
    # Before the first reading, and kept: once freed, the inputs would hide as much of the file's own memory.
    given = given_inputs(job)
    before = peak_memory()
    run, feeds, _ = open_ready(job["entries"][0][1], job, given)
    for _ in range(3):
        run(feeds)
    after = peak_memory()
    if before is None or after is None or after <= before:
        return {"bytes": None, "imports_bytes": before}
    return {"bytes": after - before, "imports_bytes": before}


def operators(job: dict[str, Any]) -> dict[str, Any]:
    """Add up the time of each operator type over some profiled runs, in ONNX Runtime."""
    pin(job["threads"])
    run, feeds, session = open_ready(job["entries"][0][1], job, given_inputs(job), trace="trace")
    end = time.perf_counter() + job["seconds"]
    runs = 1
    while runs < 5 or (time.perf_counter() < end and runs < 500):
        run(feeds)
        runs += 1
    events = json.loads(Path(session.end_profiling()).read_text())
    spent: dict[str, dict[str, list[int]]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            nodes = spent.setdefault(event["args"]["op_name"], {})
            nodes.setdefault(event["name"], []).append(event["dur"])
    # The first run allocates, so its share of the time is not the steady one.
    steady = {op: sum(middle_mean(d[1:]) for d in nodes.values()) / 1000 for op, nodes in spent.items()}
    total = sum(steady.values())
    rows = [
        {"op": op, "ms": ms, "share": ms / total if total else 0.0, "count": len(spent[op])}
        for op, ms in steady.items()
    ]
    return {
        "operators": sorted(rows, key=lambda row: (-float(str(row["ms"])), str(row["op"]))),
        "runs": runs - 1,
    }


def middle_mean(values: list[int]) -> float:
    """Return the mean of the middle half: the clock ticks in microseconds, and other programs interrupt."""
    quarter = len(values) // 4
    return statistics.fmean(sorted(values)[quarter : len(values) - quarter])


def energy(job: dict[str, Any]) -> dict[str, Any]:
    """Run one file back to back and read the energy counters before and after."""
    pin(job["threads"])
    run, feeds, _ = open_ready(job["entries"][0][1], job, given_inputs(job))
    return measure(lambda: run(feeds), seconds=job["seconds"]).to_dict()


def main() -> None:
    """Do the job in the current directory."""
    job = json.loads(Path("job.json").read_text(encoding="utf-8"))
    tasks = {"latency": latency, "memory": memory, "operators": operators, "energy": energy}
    result = tasks[job["task"]](job)
    Path("result.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
