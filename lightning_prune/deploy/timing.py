"""Timing ONNX files where latency counts: in a process apart, here or on a machine that `ssh` reaches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lightning_prune.deploy.layer_files import Layer, layer_file
from lightning_prune.deploy.remote import Unpacked, check_host, run_archive
from lightning_prune.deploy.runtime import require_onnxruntime
from lightning_prune.errors import ConfigurationError, ProfileError

ANCHOR = "anchor.onnx"
"""The file that runs beside all others, the same at all times: it tells how fast the machine is just now."""
_ANCHOR = Layer("anchor", "Conv", (64, 64, 3, 3), ((1, 64, 14, 14),), 1, {"pads": (1, 1, 1, 1)})
_TIMEOUT = 1800.0  # seconds for a slow device
_CHILD = Path(__file__).with_name("_latency_child.py")


@dataclass(frozen=True)
class Target:
    """Where latency counts: this machine, or another one that `ssh` reaches.

    The other machine needs `sh`, `tar`, Python, numpy and onnxruntime.

    Args:
        host: `user@host`, or a name from `~/.ssh/config`; None is this machine.
        threads: Threads of the runtime.
        python: The other machine's Python.
        ssh_options: Further options of `ssh`, such as `["-p", "2222"]`.

    Raises:
        ConfigurationError: A value is wrong.

    Example:
        >>> Target("pi@kitchen", threads=4).threads
        4
    """

    host: str | None = None
    threads: int = 1
    python: str = "python3"
    ssh_options: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Check the values."""
        if self.host is not None:
            check_host(self.host, "Target")
        if isinstance(self.threads, bool) or not isinstance(self.threads, int) or self.threads < 1:
            raise ConfigurationError.of("Target", "threads", "a whole number from 1", self.threads)


HERE = Target()


def time_files(
    folder: str | Path, cycles: Sequence[Sequence[str]], target: Target = HERE
) -> tuple[dict[str, float], str]:
    """Time ONNX files with ONNX Runtime, in a process of its own.

    Args:
        folder: Where they are, each with its inputs as an `.npz` beside it, or with shapes to make some up.
        cycles: Names of those that are run in turn, together, and with the anchor.
        target: Where they are run. On one thread, computing time counts.

    Returns:
        Milliseconds by name, those of `ANCHOR` among them, all at the pace that the anchor had at its
        fastest; and the target as text.

    Raises:
        ProfileError: The process fails, or the other machine cannot be reached.
    """
    Path(folder, ANCHOR).write_bytes(layer_file(_ANCHOR, 64, 64, _ANCHOR.inputs[0], 1).SerializeToString())
    job = {"threads": target.threads, "anchor": ANCHOR, "cycles": [list(names) for names in cycles]}
    (Path(folder) / "job.json").write_text(json.dumps(job), encoding="utf-8")
    done = _run_here(folder, target) if target.host is None else _run_there(folder, target.host, target)
    try:
        result = json.loads(done.stdout.splitlines()[-1])
        return result["ms"], result["target"]
    except (ValueError, IndexError, KeyError, TypeError) as error:
        where = f" on {target.host}" if target.host else ""
        reason = " ".join(done.stderr.split())[-400:] or f"exit status {done.returncode}"
        raise ProfileError(f"Timing layers{where} failed: {reason}.") from error


def _run_here(folder: str | Path, target: Target) -> subprocess.CompletedProcess[str]:
    require_onnxruntime("measuring latency")
    # Isolated, so that modules of this package cannot be taken for those of the standard library.
    command = [sys.executable, "-I", str(_CHILD), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(target.threads)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def _run_there(folder: str | Path, host: str, target: Target) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as scratch:
        archive = Path(scratch) / "layers.tar.gz"
        with tarfile.open(archive, "w:gz", compresslevel=1) as packed:
            packed.add(folder, "layers")
            packed.add(_CHILD, _CHILD.name)
        command = [target.python, Unpacked(_CHILD.name), Unpacked("layers")]
        return run_archive(archive, host, command, ssh_options=target.ssh_options, timeout=_TIMEOUT)
