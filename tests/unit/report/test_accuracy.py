"""Accuracy with its interval, against a brute-force truth."""

from __future__ import annotations

import numpy as np
import pytest
from report_data import example_report

from lightning_prune.report.accuracy import accuracy_dots, accuracy_of, wilson
from lightning_prune.report.html import render_html
from lightning_prune.report.results import Report, Variant


def classifier(name: str, *recall: float, support: int = 50) -> Variant:
    names = [str(index) for index in range(len(recall))]
    return Variant(name, classes={"names": names, "support": [support] * len(recall), "recall": list(recall)})


def test_interval_solves_the_equation_that_defines_it():
    for right, total in ((0, 10), (3, 10), (90, 100), (359, 360), (360, 360)):
        interval = wilson(right, total)
        for end in (interval.low, interval.high):
            if 0 < end < 1:  # where the observed fraction is 1.96 standard errors away
                error = (end * (1 - end) / total) ** 0.5
                assert abs(right / total - end) == pytest.approx(1.959964 * error, rel=1e-6)
        assert interval.low <= interval.value <= interval.high


def test_interval_covers_the_truth_about_95_times_in_100():
    drawn = np.random.default_rng(0).binomial(360, 0.98, 2000)
    covered = sum(wilson(int(right), 360).low <= 0.98 <= wilson(int(right), 360).high for right in drawn)
    assert 1850 <= covered <= 1980


def test_accuracy_is_recall_weighed_by_support():
    variant = Variant("a", classes={"names": ["x", "y"], "support": [30, 10], "recall": [0.9, 0.5]})
    assert accuracy_of(variant) == (32, 40)
    assert accuracy_of(Variant("a")) is None
    assert accuracy_of(Variant("a", classes={"names": ["x"], "support": [0], "recall": [None]})) is None


def test_dots_share_an_axis_and_the_page_shows_them():
    report = Report((classifier("dense", 1.0, 0.98), classifier("pruned", 0.9, 0.9), Variant("plain")))
    dots, ticks, samples = accuracy_dots(report)
    assert samples == 100
    assert [dot.label for dot in dots] == ["dense", "pruned"]
    assert dots[0].value.startswith("99.00 % (94.6 to 99.8)")
    assert all(0 <= at <= 100 for dot in dots for at in (dot.low, dot.at, dot.high))
    assert dots[1].at < dots[0].at
    assert len(ticks) >= 2
    assert "Of 100 validation samples" in render_html(report)
    assert "validation samples run on the file" not in render_html(example_report())


def test_variants_of_other_samples_are_left_out():
    report = Report((classifier("dense", 1.0), classifier("pruned", 1.0, support=40)))
    assert [dot.label for dot in accuracy_dots(report)[0]] == ["dense"]
