"""The process that times ONNX files: standard library, numpy and ONNX Runtime, nothing else.

`python _latency_child.py FOLDER` reads `job.json` there, `{"threads": 1, "anchor": file, "cycles": [[file,
...], ...]}`, and prints one JSON object. The files of a cycle are loaded together and run in turn, again and
again, so that each finds the processor's caches as it would amid the others. The anchor runs in every turn of
every cycle: when the machine gets slower it does too, and times are told as if it had not. A file may be in
several cycles. Its inputs are in the `.npz` beside it; without one they are made up.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

_WARM, _LEAST, _MOST, _SECONDS = 2, 10, 60, 0.5


def feeds_of(session: Any, path: Path) -> dict[str, Any]:
    """Read the inputs of a file, or make random ones."""
    import numpy as np

    stored = path.with_suffix(".npz")
    if stored.exists():
        with np.load(stored) as arrays:
            return {name: arrays[name] for name in arrays.files}
    generator = np.random.default_rng(0)
    return {i.name: generator.standard_normal(i.shape).astype(np.float32) for i in session.get_inputs()}


def load(path: Path, threads: int) -> Any:
    """Return a function that runs a file once."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feeds = feeds_of(session, path)
    return lambda: session.run(None, feeds)


def time_cycle(folder: Path, names: list[str], threads: int) -> dict[str, float]:
    """Time the files of a cycle; of each the fastest run counts, which other programs disturb least.

    On one thread it is computing time: while it waits for other programs it does not run.
    """
    clock = time.thread_time_ns if threads == 1 else time.perf_counter_ns
    runs = [(name, load(folder / name, threads)) for name in names]
    best = dict.fromkeys(names, float("inf"))
    end, turn = time.perf_counter() + _SECONDS, 0
    while turn < _LEAST or (turn < _MOST and time.perf_counter() < end):
        for name, run in runs:
            start = clock()
            run()
            spent = (clock() - start) / 1e6
            if turn >= _WARM:
                best[name] = min(best[name], spent)
        turn += 1
    return best


def at_one_pace(cycles: list[dict[str, float]], anchor: str) -> dict[str, float]:
    """Bring the times of all cycles to the pace of the one in which the anchor ran fastest.

    Of a file that was in several its fastest counts, held against the anchor's fastest in these: where in
    memory a file is loaded can make it, or the anchor, a fifth slower each time it is loaded.
    """
    found = {anchor: min((cycle[anchor] for cycle in cycles), default=0.0)}
    for name in dict.fromkeys(name for cycle in cycles for name in cycle if name != anchor):
        with_it = [cycle for cycle in cycles if name in cycle]
        fastest = min(cycle[name] for cycle in with_it)
        found[name] = fastest * found[anchor] / min(cycle[anchor] for cycle in with_it)
    return found


def processor() -> str:
    """Name the processor."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith(("model name", "Model")):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def main(folder: Path) -> None:
    """Time every cycle, and say on what."""
    import onnxruntime as ort

    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    anchor, threads = job["anchor"], job["threads"]
    cycles = [time_cycle(folder, [anchor, *names], threads) for names in job["cycles"]]
    target = f"{processor()} ({platform.machine()}), onnxruntime {ort.__version__}, threads {threads}"
    sys.stdout.write(json.dumps({"ms": at_one_pace(cycles, anchor), "target": target}) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
