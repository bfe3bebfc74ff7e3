"""Profiles of real files in real child processes."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from jsonargparse import ArgumentParser
from onnx_files import conv_file, embedding_file, text_file

from lightning_prune.deploy import _profile_child
from lightning_prune.deploy._profile_protocol import baseline_of, trust_warnings
from lightning_prune.deploy._profile_run import ChildError, Job, run_child
from lightning_prune.deploy.profile import Profile, profile_files
from lightning_prune.errors import ConfigurationError, ProfileError

QUICK = Profile(rounds=30, max_seconds=4, operators=False, roofline=False)


@pytest.fixture
def files(tmp_path):
    return {
        "pruned": conv_file(tmp_path / "pruned.onnx", channels=4, size=16),
        "dense": conv_file(tmp_path / "dense.onnx", channels=64, size=16),
    }


def children() -> list[int]:
    """Return the processes that this one started and that still run."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == os.getpid() and fields[0] != "Z":
                found.append(int(entry.name))
    return found


def test_profile_measures_files_side_by_side(files):
    stages = []
    result = profile_files(
        files, Profile(rounds=1000, max_seconds=40), progress=lambda *event: stages.append(event)
    )
    dense, pruned = result.files["dense"], result.files["pruned"]
    assert list(result.files) == ["pruned", "dense"]
    for name, file in result.files.items():
        latency = file.latency_ms
        assert latency["runs"] >= 1000, name
        assert 0 < latency["min"] <= latency["p50"] <= latency["p90"] <= latency["p99"], name
        assert file.peak_memory_bytes > 0, name
        assert sum(row["share"] for row in file.operators) == pytest.approx(1), name
        assert {row["op"]: row["count"] for row in file.operators}["Conv"] == 2, name
        assert (file.energy_mj is None) == ("energy_mj" in file.missing), name
    assert "speedup" not in dense.latency_ms
    speedup = pruned.latency_ms["speedup"]
    assert 1 < speedup["low"] <= speedup["value"] <= speedup["high"]  # 16 to 256 times fewer multiplications
    assert pruned.latency_ms["speedup_min"] > 1
    assert result.protocol["baseline"] == "dense"
    assert result.protocol["again"]["low"] < result.protocol["again"]["high"]
    assert result.protocol["rounds"] == dense.latency_ms["runs"]
    assert result.protocol["openings"] == 5
    for warm in result.protocol["warm_up"].values():
        assert warm["seconds"] >= 0.5
        assert warm["runs"] >= 10
    assert {stage for stage, _ in stages} == {"warm-up", "latency", "memory and operators"}
    assert all(0 <= fraction <= 1 for _, fraction in stages)
    peak = result.protocol["peak_gmacs"]
    assert (peak["float32"] is None) == (peak["reason"] is not None)
    assert children() == []


def test_files_are_opened_anew_in_other_orders_while_they_are_timed(monkeypatch, tmp_path):
    opened, entries = [], [(name, f"{name}.onnx") for name in "abcd"]

    def open_ready(path, job, given, trace=None):
        opened.append(path[0])
        return (lambda feeds: time.sleep(1e-4)), {}, None

    monkeypatch.setattr(_profile_child, "open_ready", open_ready)
    ready = {name: open_ready(path, None, None)[:2] for name, path in entries}
    job = {"entries": entries, "rounds": 20}
    timed = _profile_child.time_rounds(ready, job, {}, time.perf_counter() + 20, cost=0.01)
    orders = ["".join(opened[first : first + 4]) for first in range(0, len(opened), 4)]
    assert timed["openings"] == len(orders) == 5
    assert all(sorted(order) == list("abcd") for order in orders)
    assert len(set(orders)) > 1
    assert {len(times) for times in timed["times_ns"].values()} == {200}
    assert list(timed["times_ns"]) == list("abcd")


def test_files_that_take_long_to_open_are_opened_less_often(monkeypatch):
    monkeypatch.setattr(_profile_child, "open_again", lambda *_: None)
    ready = {"a": ((lambda feeds: time.sleep(1e-4)), {})}
    job = {"entries": [("a", "a.onnx")], "rounds": 20}
    openings = {
        cost: _profile_child.time_rounds(ready, job, {}, time.perf_counter() + 20, cost)["openings"]
        for cost in (50.0, 2.0, 1e-3)
    }
    assert openings == {50.0: 1, 2.0: 3, 1e-3: 5}


def test_few_rounds_give_no_percentile_and_say_so(files):
    file = profile_files(
        {"dense": files["dense"]}, Profile(rounds=5, max_seconds=2, operators=False, roofline=False)
    ).files["dense"]
    assert file.latency_ms["runs"] == 50
    assert file.latency_ms["p90"] is None
    assert file.latency_ms["p99"] is None
    assert file.missing["latency_ms.p90"] == "50 runs, and it takes 100"
    assert file.missing["operators"] == "not asked for"


def test_larger_file_takes_more_memory(tmp_path):
    small, large = conv_file(tmp_path / "s.onnx", 8, 8), conv_file(tmp_path / "l.onnx", 1024, 8)
    result = profile_files({"small": small, "large": large}, QUICK)
    weights = large.stat().st_size - small.stat().st_size
    grown = result.files["large"].peak_memory_bytes - result.files["small"].peak_memory_bytes
    assert weights * 0.9 < grown < weights * 6


def test_memory_of_many_real_inputs_is_not_the_files(tmp_path):
    path = conv_file(tmp_path / "c.onnx", 64, 8)
    few, many = (np.ones((count, 3, 8, 8), "f4") for count in (1, 100_000))  # 77 MB
    small, large = (
        profile_files({"c": path}, QUICK, {"x": array}).files["c"].peak_memory_bytes for array in (few, many)
    )
    assert abs(large - small) < 4_000_000


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="pinning needs sched_setaffinity")
def test_child_is_pinned_to_allowed_cores(files):
    result = profile_files({"dense": files["dense"]}, QUICK)
    cores = result.protocol["pinned"]["cores"]
    assert len(cores) == 1
    assert set(cores) <= os.sched_getaffinity(0)
    assert result.protocol["pinned"]["reason"] is None


def test_more_threads_than_cores_are_said(files):
    count = (os.cpu_count() or 1) + 1
    result = profile_files(
        {"dense": files["dense"]},
        Profile(threads=count, rounds=5, max_seconds=2, operators=False, roofline=False),
    )
    assert result.protocol["threads"] == count
    assert any("cores are allowed" in warning for warning in result.warnings)


def test_time_is_bounded_and_the_shortfall_said(tmp_path):
    heavy = conv_file(tmp_path / "heavy.onnx", channels=256, size=96)
    began = time.monotonic()
    result = profile_files({"heavy": heavy}, Profile(rounds=100_000, max_seconds=3))
    assert time.monotonic() - began < 25
    assert result.files["heavy"].latency_ms["runs"] < 100
    assert any("raise Profile(max_seconds=...)" in warning for warning in result.warnings)


def test_what_no_time_is_left_for_is_missing_and_says_so(files):
    result = profile_files(files, Profile(rounds=1000, max_seconds=1))
    for file in result.files.values():
        assert "raise Profile(max_seconds=...)" in file.missing["operators"]
        assert file.peak_memory_bytes > 0
    assert "raise Profile(max_seconds=...)" in result.protocol["peak_gmacs"]["reason"]


def test_real_inputs_are_used_and_cut_to_the_batch(tmp_path):
    path = embedding_file(tmp_path / "e.onnx")
    inputs = {"tokens": np.array([[0, 2], [1, 1], [2, 2]]), "mask": np.ones((3, 2), "f4")}
    result = profile_files({"e": path}, QUICK, inputs)
    assert result.protocol["inputs"] == "real"
    # A token outside the table fails only if it is really fed, and the batch of one is the first row.
    bad = {**inputs, "tokens": np.array([[0, 2], [99, 99], [99, 99]])}
    assert profile_files({"e": path}, QUICK, bad).files["e"].latency_ms is not None
    with pytest.raises(ProfileError, match="indices element out of data bounds"):
        profile_files({"e": path}, QUICK, {**inputs, "tokens": np.array([[99, 2]])})


def test_strings_and_awkward_names_can_be_inputs(tmp_path):
    path = text_file(tmp_path / "t.onnx")
    for inputs in (None, {"file": np.array([["a word"]], dtype=object)}):
        assert profile_files({"t": path}, QUICK, inputs).files["t"].latency_ms["runs"] > 0


def test_open_dimension_needs_a_size(tmp_path):
    path = embedding_file(tmp_path / "e.onnx")
    with pytest.raises(ProfileError, match=r"'time' at axis 1; .*dims="):
        profile_files({"e": path}, QUICK)
    sized = Profile(rounds=5, max_seconds=2, operators=False, roofline=False, dims={"time": 7})
    assert profile_files({"e": path}, sized).files["e"].latency_ms["runs"] > 0


def test_file_that_cannot_run_is_missing_with_the_reason_and_the_rest_is_measured(files, tmp_path):
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not a model")
    result = profile_files({**files, "broken": broken}, QUICK)
    assert result.files["broken"].latency_ms is None
    assert "broken.onnx" in result.files["broken"].missing["latency_ms"]
    assert result.files["pruned"].latency_ms["speedup"]["value"] > 1
    assert any(warning.startswith("broken could not be profiled") for warning in result.warnings)


def test_broken_baseline_leaves_the_others_without_ratios(files, tmp_path):
    files["dense"].write_bytes(b"not a model")
    result = profile_files(files, QUICK)
    assert result.files["pruned"].latency_ms["p50"] > 0
    assert "speedup" not in result.files["pruned"].latency_ms
    assert result.files["dense"].latency_ms is None


def test_file_that_kills_the_process_is_missing_and_the_rest_is_measured(files):
    killed = []

    def kill_once(stage, fraction):
        if stage == "warm-up" and not killed:  # the first entry is being opened
            killed.extend(children())
            for pid in killed:
                os.kill(pid, signal.SIGKILL)

    result = profile_files(files, QUICK, progress=kill_once)
    assert len(killed) == 1
    (lost,) = [file for file in result.files.values() if file.latency_ms is None]
    assert "killed by SIGKILL" in lost.missing["latency_ms"]
    (kept,) = [file for file in result.files.values() if file.latency_ms]
    assert kept.latency_ms["runs"] >= 30


def test_process_killed_while_timing_is_an_error_that_says_so(tmp_path):
    heavy = conv_file(tmp_path / "heavy.onnx", channels=64, size=64)

    def kill(stage, fraction):
        if stage == "latency":
            for pid in children():
                os.kill(pid, signal.SIGKILL)

    with pytest.raises(ProfileError, match="killed by SIGKILL"):
        profile_files({"heavy": heavy}, Profile(rounds=100_000, max_seconds=5), progress=kill)


def test_hung_process_is_killed_and_said(files):
    job = Job("onnxruntime", 1, 1, {}, 10**9, None)
    began = time.monotonic()
    with pytest.raises(ChildError, match="no answer for 3 s"):
        run_child(job, "latency", [("a", str(files["dense"]))], seconds=1e6, grace=3 - 1e6)
    assert time.monotonic() - began < 25
    assert children() == []


def test_interrupt_leaves_no_process_behind(files):
    def interrupt(stage, fraction):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        profile_files(files, QUICK, progress=interrupt)
    assert children() == []


def test_missing_runtime_is_a_clear_error(files, tmp_path, monkeypatch):
    (tmp_path / "hide").mkdir()
    (tmp_path / "hide" / "onnxruntime.py").write_text("raise ImportError('No module named onnxruntime')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "hide"))
    with pytest.raises(ProfileError, match="No module named onnxruntime"):
        profile_files(files, QUICK)


def test_files_that_do_not_exist_are_refused_before_anything_runs(files, tmp_path):
    with pytest.raises(ConfigurationError, match=r"files\['gone'\]"):
        profile_files({**files, "gone": tmp_path / "gone.onnx"})
    with pytest.raises(ConfigurationError, match="at least one ONNX file"):
        profile_files({})


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"threads": 0}, "threads"),
        ({"threads": 1.5}, "threads"),
        ({"threads": True}, "threads"),
        ({"batch": 0}, "batch"),
        ({"rounds": 0}, "rounds"),
        ({"max_seconds": 0}, "max_seconds"),
        ({"max_seconds": float("nan")}, "max_seconds"),
        ({"engine": "tensorrt"}, "engine"),
        ({"dims": {"time": 0}}, "dims"),
    ],
    ids=str,
)
def test_wrong_settings_are_refused_by_name(arguments, name):
    with pytest.raises(ConfigurationError, match=f"Profile: `{name}"):
        Profile(**arguments)


def test_settings_come_from_yaml_and_go_back():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--profile", type=Profile, default=Profile())
    parsed = parser.parse_args(["--profile.threads=2", '--profile.dims={"time": 3}'])
    assert parser.instantiate(parsed).profile == Profile(threads=2, dims={"time": 3})
    assert "max_seconds: 25" in parser.dump(parsed)


def test_baseline_is_dense_wherever_it_stands():
    assert baseline_of(["pruned", "dense"]) == "dense"
    assert baseline_of(["b", "a"]) == "b"


def test_energy_is_a_sensors_or_missing_with_the_reason(files):
    job = Job("onnxruntime", 1, 1, {}, 10, None)
    energy = run_child(job, "energy", [("dense", str(files["dense"]))], seconds=0.5)
    if energy["value"] is None:
        assert energy["reason"]
    else:
        assert energy["value"] > 0
        assert energy["source"] == "powercap"
        assert energy["runs"] > 1


QUIET = {
    "again": {"value": 1.0, "low": 0.99, "high": 1.01}, "noisy": False, "baseline": "dense", "rounds": 1000,
    "openings": 5, "cpu_share": 0.99, "warm_up": {"dense": {"settled": True}}, "pinned": {"reason": None},
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, None),
        (
            {"noisy": True, "again": {"value": 1.1, "low": 1.0, "high": 1.2}},
            "dense against itself came out at 1.10x",
        ),
        ({"again": None, "noisy": True}, "noise of the machine is unknown"),
        ({"cpu_share": 0.5}, "the timing had 50% of its core"),
        ({"rounds": 40}, "Only 40 rounds fitted"),
        ({"openings": 1}, "opened only once"),
        ({"warm_up": {"dense": {"settled": False}}}, "times of dense had not settled"),
        ({"pinned": {"reason": "no such call"}}, "not pinned as asked: no such call"),
    ],
)
def test_what_weakens_the_numbers_is_said(changes, words):
    said = trust_warnings(Profile(), {**QUIET, **changes}, {})
    assert len(said) == (words is not None)
    assert words is None or words in said[0]
