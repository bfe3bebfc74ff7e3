"""Python processes for tests, forked off one that has imported Lightning already, which takes seconds.

Not for what tests imports themselves.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

_server: list[subprocess.Popen[str]] = []


def run_python(
    *words: object, cwd: Path | str = ".", env: dict[str, str] | None = None, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run `python WORDS`, where the words begin with `-m`, `-c` or a script, on one thread.

    Args:
        words: As on a command line.
        cwd: The folder it runs in.
        env: What its environment has besides this process's.
        timeout: Seconds.

    Raises:
        subprocess.TimeoutExpired: It took longer, and was killed.
    """
    server = _server[0] if _server else _started()
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        variables = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
        job = {
            "words": [str(word) for word in words], "cwd": str(Path(cwd).resolve()), "env": variables,
            "out": str(out), "err": str(err), "timeout": timeout,
        }  # fmt: skip
        print(json.dumps(job), file=server.stdin, flush=True)
        status, late = json.loads(server.stdout.readline())
        if late:
            raise subprocess.TimeoutExpired(job["words"], timeout, out.read_text(), err.read_text())
        return subprocess.CompletedProcess(job["words"], status, out.read_text(), err.read_text())


def killed_run(script: str | Path, *arguments: object) -> None:
    """Run a script that kills its own process."""
    finished = run_python(script, *arguments)
    assert finished.returncode == -signal.SIGKILL, finished.stderr


def _started() -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    _server.append(subprocess.Popen([sys.executable, __file__], **pipes))
    _server[0].wait()
    atexit.register(_server[0].stdin.close)
    return _server[0]


def _serve() -> None:
    import pytorch_lightning  # noqa: F401

    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            _become(job)
            return
        late: list[int] = []

        def kill(number: int, frame: object, child: int = child, late: list[int] = late) -> None:
            late.append(number)
            os.kill(child, signal.SIGKILL)

        signal.signal(signal.SIGALRM, kill)
        signal.alarm(int(job["timeout"]))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        signal.alarm(0)
        sys.stdout.write(json.dumps([status, bool(late)]) + "\n")
        sys.stdout.flush()


def _become(job: dict) -> None:
    import runpy

    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["env"])
    for number, path in ((1, job["out"]), (2, job["err"])):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    with Path(os.devnull).open() as nothing:
        os.dup2(nothing.fileno(), 0)
    sys.path[:0] = [job["cwd"], *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    kind, *words = job["words"]
    if kind == "-m":
        sys.argv = words
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = ["-c", *words[1:]]
        main = sys.modules["__main__"] = ModuleType("__main__")
        exec(compile(words[0], "<string>", "exec"), vars(main))
    else:
        sys.argv = [kind, *words]
        sys.path[0] = str(Path(kind).parent)
        runpy.run_path(kind, run_name="__main__")


if __name__ == "__main__":
    # Not a child of the tests', some of which look at what they started.
    if os.fork() == 0:
        _serve()
