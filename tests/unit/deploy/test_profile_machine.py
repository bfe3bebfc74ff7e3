"""Choosing cores, and what is said where the system does not let us."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_prune.deploy import _profile_machine as machine

needs_affinity = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no sched_setaffinity")


@pytest.fixture
def affinity():
    """Give this process back the cores that a test took from it."""
    before = os.sched_getaffinity(0)
    yield before
    os.sched_setaffinity(0, before)


def busy(monkeypatch, load: dict[int, int]) -> None:
    """Let the clock ticks of each core grow as if it were that many percent busy."""
    ticks = iter((dict.fromkeys(load, (0, 0)), {core: (part, 100) for core, part in load.items()}))
    monkeypatch.setattr(machine, "core_times", lambda: next(ticks))


@needs_affinity
def test_least_busy_core_is_chosen(monkeypatch, affinity):
    monkeypatch.setattr(machine, "capacity", lambda core: 0)
    cores = sorted(affinity)
    for quiet in cores:
        os.sched_setaffinity(0, affinity)
        busy(monkeypatch, {core: 5 if core == quiet else 80 for core in cores})
        assert machine.pin(1, sample_seconds=0) == {"cores": [quiet], "busy_before": 0.05, "reason": None}
        assert os.sched_getaffinity(0) == {quiet}


@needs_affinity
def test_busy_sibling_makes_a_core_busy(monkeypatch, affinity):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    chosen = []
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cores: chosen.append(sorted(cores)))
    monkeypatch.setattr(machine, "siblings", lambda core: [core % 2, core % 2 + 2])
    monkeypatch.setattr(machine, "capacity", lambda core: 0)
    load = {0: 0, 1: 10, 2: 90, 3: 10}
    busy(monkeypatch, load)
    machine.pin(1, sample_seconds=0)  # core 0 is idle itself, but shares its physical core with core 2
    busy(monkeypatch, load)
    machine.pin(2, sample_seconds=0)  # one on each physical core
    busy(monkeypatch, load)
    assert machine.pin(8, sample_seconds=0)["reason"] == "only 4 cores are allowed"
    assert chosen == [[3], [2, 3], [0, 1, 2, 3]]


@needs_affinity
def test_little_cores_are_left_alone_unless_too_few_are_big(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    chosen = []
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cores: chosen.append(sorted(cores)))
    monkeypatch.setattr(machine, "siblings", lambda core: [core])
    monkeypatch.setattr(machine, "capacity", {0: 1024, 1: 1000, 2: 430, 3: 430}.get)
    load = {0: 50, 1: 20, 2: 0, 3: 10}
    for count in (1, 2, 3):
        busy(monkeypatch, load)
        machine.pin(count, sample_seconds=0)
    assert chosen == [[1], [0, 1], [1, 2, 3]]


def test_system_without_affinity_is_said(monkeypatch):
    monkeypatch.delattr(os, "sched_setaffinity", raising=False)
    pinned = machine.pin(1)
    assert pinned["cores"] is None
    assert "cannot bind a process to a core" in pinned["reason"]


@needs_affinity
def test_system_without_proc_is_said(monkeypatch, affinity):
    def missing():
        raise FileNotFoundError("/proc/stat")

    monkeypatch.setattr(machine, "core_times", missing)
    assert "could not bind to a core" in machine.pin(1)["reason"]
    assert os.sched_getaffinity(0) == affinity


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="no /proc/stat")
def test_core_times_grow_for_every_core():
    before, after = machine.core_times(), machine.core_times()
    assert len(before) == os.cpu_count()
    assert all(
        after[core][1] >= before[core][1] > 0 and before[core][0] <= before[core][1] for core in before
    )


MEASURE = """
import json, runpy, sys
from pathlib import Path
peak_memory = runpy.run_path(sys.argv[1])["peak_memory"]
before = peak_memory()
taken = b"x" * (200 << 20)
after = peak_memory()
Path.read_text = lambda self: open("/no/such/file")
print(json.dumps([before, after, peak_memory()]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
def test_peak_memory_is_that_of_the_process_and_unknown_without_proc():
    command = [sys.executable, "-c", MEASURE, str(machine.__file__)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    before, after, without_proc = json.loads(done.stdout)
    assert 0 < before < 100 << 20  # not what this process, which started it, has taken
    assert after - before == pytest.approx(200 << 20, rel=0.02)
    assert without_proc is None or sys.platform == "darwin"


def test_load_average_is_missing_where_the_system_has_none(monkeypatch):
    assert len(machine.load_average()) == 3
    monkeypatch.delattr(os, "getloadavg")
    assert machine.load_average() is None
