"""Running the measuring process: its job in, its result or the reason for its end out."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_prune.errors import ProfileError

Entries = list[tuple[str, str]]
PROGRAM = ("_profile_child.py", "_profile_machine.py", "bundle_runner.py", "energy.py")


@dataclass(frozen=True)
class Job:
    """What all processes of one profile share; the attributes are those of `Profile`."""

    engine: str
    threads: int
    batch: int
    dims: dict[str, int]
    rounds: int
    inputs: Mapping[str, NDArray[Any]] | None


class ChildError(ProfileError):
    """The measuring process ended without a result.

    Attributes:
        reason: Why, in a few words.
        key: The entry it was working on, if known.
    """

    def __init__(self, reason: str, key: str | None) -> None:
        self.reason, self.key = reason, key
        super().__init__(f"The profiling process ended early: {reason}.")


def run_child(
    job: Job,
    task: str,
    entries: Entries,
    seconds: float,
    progress: Callable[[str, float], None] | None = None,
    grace: float = 60.0,
) -> dict[str, Any]:
    """Run one task in a fresh process.

    Args:
        job: The settings.
        task: `"latency"`, `"memory"`, `"operators"` or `"energy"`.
        entries: Key and path of each file.
        seconds: How long the task should measure.
        progress: Called with a stage and the fraction done.
        grace: Seconds beyond `seconds` after which the process is taken for hung and killed.

    Returns:
        The task's result.

    Raises:
        ChildError: The process crashed, hung, or could not be started.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="lightning-prune-") as name:
            return _run(Path(name), job, task, entries, seconds, progress, seconds + grace)
    except OSError as error:
        raise ChildError(f"it could not be set up: {error}", None) from error


def _run(
    folder: Path,
    job: Job,
    task: str,
    entries: Entries,
    seconds: float,
    progress: Callable[[str, float], None] | None,
    limit: float,
) -> dict[str, Any]:
    _write_job(folder, job, task, entries, seconds)
    if not sys.executable:
        raise ChildError("this Python does not know its own executable", None)
    search = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": search}
    with (folder / "stderr").open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "lightning_prune.deploy._profile_child"],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env=environment,
            text=True,
        )
    hung = threading.Event()

    def give_up() -> None:
        hung.set()
        process.kill()

    watchdog = threading.Timer(limit, give_up)
    watchdog.daemon = True
    watchdog.start()
    try:
        key = _listen(process, progress)
        code = process.wait()
    finally:
        watchdog.cancel()
        process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()
    result = folder / "result.json"
    if code == 0 and result.exists():
        outcome: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return outcome
    reason = f"no answer for {limit:.0f} s" if hung.is_set() else _why(code, folder / "stderr")
    raise ChildError(reason, key)


def _write_job(folder: Path, job: Job, task: str, entries: Entries, seconds: float) -> None:
    package = folder / "lightning_prune" / "deploy"
    package.mkdir(parents=True)
    for source in PROGRAM:
        text = package_files("lightning_prune.deploy").joinpath(source).read_text(encoding="utf-8")
        (package / source).write_text(text, encoding="utf-8")
    # Empty, so that the process does not import all of lightning-prune, and torch with it.
    for marker in (package.parent / "__init__.py", package / "__init__.py"):
        marker.touch()
    if job.inputs is not None:
        # By position: a name may be "file", an argument of savez. Strings as strings: objects are pickled.
        arrays = [a.astype(str) if a.dtype == object else a for a in job.inputs.values()]
        np.savez(folder / "inputs.npz", *arrays)
    settings = {key: value for key, value in vars(job).items() if key != "inputs"}
    absolute = [(key, os.path.abspath(path)) for key, path in entries]  # noqa: PTH100 - keeps symbolic links
    content = {
        **settings,
        "task": task,
        "entries": absolute,
        "seconds": seconds,
        "inputs": None if job.inputs is None else list(job.inputs),
    }
    (folder / "job.json").write_text(json.dumps(content), encoding="utf-8")


def _listen(process: subprocess.Popen[str], progress: Callable[[str, float], None] | None) -> str | None:
    """Pass progress on until the process closes its output; return the entry it named last."""
    key = None
    for line in process.stdout or ():
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a runtime may print there too
            event = json.loads(line)
            if event["event"] == "start":
                key = event["key"]
            elif event["event"] == "progress" and progress is not None:
                progress(event["stage"], event["fraction"])
    return key


def _why(code: int, stderr: Path) -> str:
    """Say in a few words why a process ended."""
    lines = stderr.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    last = f": {lines[-1][:300]}" if lines else ""
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(-code).name}{last}"
    return f"exit status {code}{last}"
