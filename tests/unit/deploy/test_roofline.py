"""The machine's peak is a peak, or is missing with the reason."""

from __future__ import annotations

import pytest

from lightning_prune.deploy import roofline
from lightning_prune.deploy._profile_run import ChildError, Job
from lightning_prune.deploy.roofline import MACS, measure_peak

JOB = Job("onnxruntime", 1, 1, {}, 100, None)


def timing(monkeypatch, *results):
    """Let the measuring process answer so, one result a call."""
    answers = iter(results)

    def run_child(job, task, entries, seconds):
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(roofline, "run_child", run_child)


def times(float32: list[int], int8: list[int]) -> dict:
    return {"times_ns": {"float32": float32, "int8": int8}, "failed": {}}


def test_peak_is_measured_on_this_machine():
    peak = measure_peak(JOB)
    # Between a slow board and a core that is faster than any there is: 2 x 16 lanes x 2 units x 6 GHz.
    assert peak["reason"] is None or "too busy" in peak["reason"]
    assert peak["float32"] is None or 0.05 < peak["float32"] < 400
    assert peak["int8"] is None or peak["int8"] > 0.05


def test_fastest_run_counts(monkeypatch):
    timing(monkeypatch, times([MACS // 50] * 60 + [MACS // 100], [MACS // 400] * 61))
    assert measure_peak(JOB) == {
        "float32": pytest.approx(100, rel=1e-4),
        "int8": pytest.approx(400, rel=1e-4),
        "reason": None,
    }


def test_too_few_runs_are_tried_again_and_then_missing_with_the_reason(monkeypatch):
    few, enough = times([MACS] * 3, [MACS] * 3), times([MACS] * 60, [MACS] * 60)
    timing(monkeypatch, few, enough)
    assert measure_peak(JOB)["float32"] == pytest.approx(1)
    timing(monkeypatch, few, few)
    peak = measure_peak(JOB)
    assert (peak["float32"], peak["int8"]) == (None, None)
    assert "too busy, only 3 runs fitted" in peak["reason"]


def test_crash_and_unsupported_kind_are_reasons(monkeypatch):
    timing(monkeypatch, ChildError("killed by SIGKILL", None))
    assert "killed by SIGKILL" in measure_peak(JOB)["reason"]
    timing(monkeypatch, {"times_ns": {"float32": [MACS] * 60}, "failed": {"int8": "no kernel"}})
    peak = measure_peak(JOB)
    assert peak["float32"] == pytest.approx(1)
    assert (peak["int8"], peak["reason"]) == (None, "int8: no kernel")
