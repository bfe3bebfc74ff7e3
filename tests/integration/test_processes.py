"""The processes that other tests start are as those that a shell starts."""

import os
import subprocess
import sys

import pytest
from processes import run_python

PROGRAM = """
import os, pickle, sys
class Here: pass
assert type(pickle.loads(pickle.dumps(Here()))) is Here
print(__name__, sys.argv[-2:], os.getcwd(), os.environ["SAID"], sys.stdin.read(), beside.NAME)
print("wrong", file=sys.stderr)
sys.exit(3)
"""


@pytest.mark.parametrize("kind", ["-c", "-m", "script"])
def test_a_warm_process_is_as_a_cold_one(tmp_path, kind):
    (tmp_path / "beside.py").write_text("NAME = 'there'")
    (tmp_path / "program.py").write_text("import beside\n" + PROGRAM)
    told = {"-c": ["-c", "import beside\n" + PROGRAM], "-m": ["-m", "program"], "script": ["program.py"]}
    words = [*told[kind], "a", "b c"]
    said = {"SAID": "hello"}
    warm = run_python(*words, cwd=tmp_path, env=said)
    cold = subprocess.run(
        [sys.executable, *words],
        cwd=tmp_path, env={**os.environ, **said}, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert "['a', 'b c']" in cold.stdout
    assert (warm.returncode, warm.stdout, warm.stderr) == (cold.returncode, cold.stdout, cold.stderr)


def test_an_error_and_a_kill_are_told():
    failed = run_python("-c", "raise ValueError('no')")
    assert failed.returncode == 1
    assert "ValueError: no" in failed.stderr
    assert run_python("-c", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)").returncode == -9
    with pytest.raises(subprocess.TimeoutExpired):
        run_python("-c", "import time; time.sleep(60)", timeout=1)
    assert run_python("-c", "print(1)").stdout == "1\n"
