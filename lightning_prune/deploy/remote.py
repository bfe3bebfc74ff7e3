"""Running a bundle on another machine, over ssh.

One connection carries it all: the bundle goes in as an archive on standard input, is unpacked into a
temporary directory, run, and removed; the result comes back as JSON. The device needs `sh`, `tar`, Python,
numpy and onnxruntime. Only the system's own `ssh` handles keys and passwords.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_prune.deploy.bundle import RUNNER, archive_bundle
from lightning_prune.errors import ConfigurationError, MissingDependencyError, ProfileError

_DROPPED = 255  # what ssh exits with when the connection is at fault
_LIMIT = 1 << 22  # characters; a result has a few thousand


def run_over_ssh(
    dirpath: str | Path,
    host: str,
    *,
    python: str = "python3",
    rounds: int = 200,
    seconds: float = 15.0,
    threads: int = 1,
    ssh_options: Sequence[str] = (),
    timeout: float = 600.0,
) -> dict[str, Any]:
    """Push a bundle to a machine, run it there, and return what it measured.

    Args:
        dirpath: The bundle; it is verified first.
        host: `user@host`, or a name from `~/.ssh/config`.
        python: The device's Python.
        rounds: Rounds to time; 0 only verifies and compares.
        seconds: About how long to time.
        threads: Threads of the runtime.
        ssh_options: Further options of `ssh`, such as `["-p", "2222"]`.
        timeout: Seconds after which the device is given up.

    Returns:
        The runner's result, see `run.py`.

    Raises:
        ConfigurationError: The host is malformed.
        ProfileError: The connection fails or drops, the device lacks something, or it refuses the bundle.
        ExportError: The bundle was changed.
        MissingDependencyError: There is no `ssh`.
    """
    check_host(host, "run_over_ssh")
    name = Path(dirpath).resolve().name
    arguments = ["--rounds", str(rounds), "--seconds", str(seconds), "--threads", str(threads)]
    command = [python, Unpacked(f"{name}/{RUNNER}"), *arguments]
    with tempfile.TemporaryDirectory() as scratch:
        archive = archive_bundle(dirpath, Path(scratch) / "bundle.tar.gz")
        done = run_archive(archive, host, command, ssh_options=ssh_options, timeout=timeout)
    return parse_result(done.stdout, done.returncode, done.stderr, host)


class Unpacked(str):
    """A path inside what was sent."""

    __slots__ = ()


def check_host(host: object, owner: str) -> None:
    """Refuse what `ssh` would not take for a host.

    Raises:
        ConfigurationError: The host is malformed.
    """
    if not isinstance(host, str) or not host or host.startswith("-") or any(c.isspace() for c in host):
        raise ConfigurationError.of(owner, "host", "`user@host`", host)


def run_archive(
    archive: Path, host: str, command: Sequence[str], *, ssh_options: Sequence[str], timeout: float
) -> subprocess.CompletedProcess[str]:
    """Send an archive to a machine, unpack it there into a temporary directory, and run a command.

    Args:
        archive: A gzipped tar file.
        host: `user@host`, or a name from `~/.ssh/config`.
        command: The words of the command; those that are `Unpacked` become paths.
        ssh_options: Further options of `ssh`.
        timeout: Seconds after which the device is given up.

    Returns:
        The finished command.

    Raises:
        ProfileError: It did not answer in time.
        MissingDependencyError: There is no `ssh`.
    """
    if shutil.which("ssh") is None:
        raise MissingDependencyError.of("ssh", "measuring on a device", "an OpenSSH client")
    # The directory is a variable of the remote shell, and must not be quoted away from it.
    words = " ".join(f'"$d"/{shlex.quote(w)}' if isinstance(w, Unpacked) else shlex.quote(w) for w in command)
    script = (
        'set -e; d=$(mktemp -d); trap "rm -rf \\"$d\\"" EXIT HUP TERM; '
        f'tar -xzf - -C "$d"; set +e; {words}; s=$?; exit $s'
    )
    options = ["-o", "BatchMode=yes", "-o", "ConnectTimeout=15"]
    options += ["-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3", *ssh_options]
    try:
        with archive.open("rb") as packed:
            return subprocess.run(
                ["ssh", *options, host, script],
                stdin=packed, capture_output=True, text=True, timeout=timeout, check=False,
            )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise ProfileError(f"{host} did not answer within {timeout:g} s.") from error


def parse_result(output: str, status: int, errors: str, host: str) -> dict[str, Any]:
    """Read what the runner printed.

    Args:
        output: Its standard output.
        status: Its exit status.
        errors: Its standard error.
        host: Where it ran, for the message.

    Returns:
        The result; outputs that differ from those expected are in it, as `ok: False`.

    Raises:
        ProfileError: There is no result.
    """
    tail = " ".join(errors.split())[-400:]
    if status == _DROPPED:
        raise ProfileError(f"The connection to {host} failed or dropped: {tail or 'no reason given'}.")
    if len(output) > _LIMIT:
        raise ProfileError(f"{host} gave {len(output)} characters, which is no result of run.py.")
    try:
        result = json.loads(output.strip().splitlines()[-1])
    except (ValueError, IndexError, RecursionError) as error:
        missing = "; install numpy and onnxruntime there" if "ModuleNotFoundError" in errors else ""
        raise ProfileError(
            f"{host} gave no result (exit status {status}): {tail or 'it printed nothing'}{missing}."
        ) from error
    if not isinstance(result, dict) or result.get("schema") != 1:
        raise ProfileError(f"{host} gave a result of another version: {output[:200]!r}.")
    if "refused" in result:
        raise ProfileError(f"{host} refused the bundle: {result['refused']}.")
    return result
