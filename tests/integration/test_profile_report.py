"""From ONNX files to a report: what `lightning-prune profile` runs."""

from __future__ import annotations

import io

import pytest
from onnx_files import conv_file
from rich.console import Console

from lightning_prune.deploy.profile import Profile
from lightning_prune.errors import ConfigurationError
from lightning_prune.report.profiled import profile_report, variant_names
from lightning_prune.report.render import print_table, write_report
from lightning_prune.report.results import Report


def test_files_become_a_report_in_all_its_forms(tmp_path):
    dense = conv_file(tmp_path / "dense.onnx", channels=64, size=16)
    pruned = conv_file(tmp_path / "pruned.onnx", channels=16, size=16)
    config = Profile(rounds=200, max_seconds=40)
    report = profile_report([dense, pruned], config, also=[Profile(threads=2, rounds=20, max_seconds=2)])
    first, second = report.variants
    assert first.macs == 16 * 16 * 9 * 64 * (3 + 64)
    assert first.parameters == 9 * 64 * (3 + 64)
    assert first.bytes == dense.stat().st_size
    assert 0 < first.compressed_bytes < first.bytes + 100
    assert second.latency_ms.speedup.value > 1
    assert first.operators[0].op == "Conv"
    assert report.measurements[0].label == "onnxruntime, 2 threads"
    assert set(report.measurements[0].latency_ms) == {"dense", "pruned"}
    write_report(report, tmp_path)
    assert Report.load(tmp_path) == report
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Where the time goes" in page
    assert "onnxruntime, 2 threads" in page
    out = io.StringIO()
    print_table(report, Console(file=out, width=100))
    assert "faster" in out.getvalue()
    assert "MACs/s" in out.getvalue()


def test_broken_file_is_reported_beside_the_others(tmp_path):
    dense = conv_file(tmp_path / "dense.onnx")
    (tmp_path / "broken.onnx").write_bytes(b"not a model")
    config = Profile(rounds=10, max_seconds=2, operators=False, roofline=False)
    report = profile_report([dense, tmp_path / "broken.onnx"], config)
    broken = report.variant("broken")
    assert broken.latency_ms is None
    assert set(broken.missing) >= {"macs", "parameters", "latency_ms"}
    assert report.variant("dense").latency_ms is not None
    write_report(report, tmp_path)


def test_the_same_file_twice_is_refused():
    with pytest.raises(ConfigurationError, match="distinct files"):
        variant_names(["a.onnx", "a.onnx"])
