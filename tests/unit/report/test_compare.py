"""Runs side by side, and what keeps them from being comparable."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from report_data import example_report, latency
from rich.console import Console

from lightning_prune.errors import ConfigurationError
from lightning_prune.report.compare import (
    compare,
    compare_files,
    print_comparison,
    render_comparison,
    run_names,
)
from lightning_prune.report.render import write_report


def other_run():
    """The same run, but its int8 file is twice as fast and half as large."""
    report = example_report()
    last = replace(report.variants[-1], bytes=306_000, latency_ms=latency(0.175, 1.4))
    return replace(report, variants=(*report.variants[:-1], last))


def test_variants_are_compared_to_the_same_variant_of_the_first_run():
    comparison = compare({"a": example_report(), "b": other_run()})
    assert [section.title for section in comparison.sections] == ["dense", "pruned", "pruned.int8"]
    text = render_comparison(comparison)
    assert "| Latency p50 | 0.350 ms | 0.175 ms (2.00x faster) |" in text
    assert "| File size | 612 kB | 306 kB (2.00x smaller) |" in text
    assert "| Latency p50 | 1.40 ms | 1.40 ms (same) |" in text
    assert comparison.remarks == ()


def test_one_variant_can_be_chosen_and_a_wrong_name_is_met_with_near_ones():
    reports = {"a": example_report(), "b": other_run()}
    assert [s.title for s in compare(reports, "pruned").sections] == ["pruned"]
    with pytest.raises(ConfigurationError, match=r"Did you mean 'pruned.int8'"):
        compare(reports, "pruned.int9")


def test_runs_may_lack_variants():
    short = replace(example_report(), variants=example_report().variants[:1])
    sections = {s.title: s for s in compare({"a": short, "b": other_run()}).sections}
    assert [v.name for v in sections["dense"].variants] == ["a", "b"]
    assert [v.name for v in sections["pruned"].variants] == ["b"]


def test_different_conditions_and_noise_are_said():
    a = example_report()
    b = replace(
        a, environment={**a.environment, "cpu": "Another"}, profile={**a.profile, "threads": 4, "noisy": True}
    )
    said = compare({"a": a, "b": b}).remarks
    assert said == (
        "Latencies do not compare, the processor differs (a: A processor; b: Another).",
        "Latencies do not compare, the number of threads differs (a: 1; b: 4).",
        "Measured on a noisy machine: b.",
    )


def test_one_report_is_not_a_comparison():
    with pytest.raises(ConfigurationError, match="at least two"):
        compare({"a": example_report()})


def test_runs_are_named_by_what_tells_them_apart():
    assert run_names(["x/a", "x/b"]) == ["a", "b"]
    assert run_names(["x/edge/report.json", "y/edge"]) == ["x/edge", "y/edge"]
    assert run_names(["x", "x"]) == ["1: x", "2: x"]


def test_files_are_read_and_printed(tmp_path):
    for name, report in (("one", example_report()), ("two", other_run())):
        (tmp_path / name / "edge").mkdir(parents=True)
        write_report(report, tmp_path / name / "edge")
    out = io.StringIO()
    paths = [tmp_path / "one" / "edge", tmp_path / "two" / "edge" / "report.json"]
    print_comparison(compare_files(paths, "pruned.int8"), Console(file=out, width=80))
    assert "one/edge" in out.getvalue()
    assert "2.00x faster" in out.getvalue()
    with pytest.raises(ConfigurationError, match="readable report"):
        compare_files([tmp_path / "one" / "edge", tmp_path / "none"])
