"""The report says by itself where a promise was not kept, and is silent where it was."""

from __future__ import annotations

from dataclasses import replace

import pytest
from report_data import example_report, latency

from lightning_prune.report.observations import remarks
from lightning_prune.report.results import Measurement, Report, Variant

DENSE = Variant(
    "dense", bytes=1000, compressed_bytes=900, parameters=100, nonzero=100, macs=1000, latency_ms=latency(1.0)
)


def said(**changes) -> tuple[str, ...]:
    changed = {"name": "pruned", "latency_ms": latency(1.0, 1.0), **changes}
    return remarks(Report((DENSE, replace(DENSE, **changed))))


def test_zeros_without_speed_are_told_with_what_they_bring():
    (sentence,) = said(nonzero=20, compressed_bytes=300)
    assert sentence.startswith("pruned: 80.0 % of the weights are zero, but zeros alone bring no speed")
    assert "compressed file, 900 B to 300 B" in sentence


def test_zeros_are_not_told_where_channels_went_or_speed_came():
    assert said(nonzero=20, macs=400, latency_ms=latency(0.4, 1.0)) == ()
    assert said(nonzero=20, latency_ms=latency(0.5, 1.0)) == ()
    assert said(nonzero=98) == ()


@pytest.mark.parametrize(("p50", "words"), [(0.8, "but only 1.25x faster"), (1.2, "but not faster (0.833x)")])
def test_fewer_macs_without_the_speed_are_told(p50, words):
    (sentence,) = said(macs=300, latency_ms=latency(p50, 1.0))
    assert "3.33x fewer MACs" in sentence
    assert words in sentence


def test_int8_that_is_slower_than_its_float_file_is_told():
    pruned = replace(DENSE, name="pruned", macs=500, latency_ms=latency(0.4, 1.0))
    slow = replace(pruned, name="pruned.int8", latency_ms=latency(0.6, 1.0))
    (sentence,) = remarks(Report((DENSE, pruned, slow)))
    assert sentence.startswith("pruned.int8: slower than pruned in float (0.667x)")


def test_fall_of_accuracy_is_told_and_a_rise_of_loss_or_accuracy_is_not():
    base = replace(DENSE, metrics={"val_acc": 0.95, "val_loss": 0.1})
    lower = replace(base, name="pruned", metrics={"val_acc": 0.92, "val_loss": 0.5})
    assert remarks(Report((base, lower))) == ("pruned: val_acc falls by 3.0 points to 0.9200.",)
    higher = replace(base, name="pruned", metrics={"val_acc": 0.96, "val_loss": 0.5})
    assert remarks(Report((base, higher))) == ()


def test_good_report_has_only_its_own_warnings_each_once():
    report = example_report()
    assert remarks(replace(report, warnings=("a", "b", "a"))) == ("a", "b")


def test_unmeasured_variants_are_not_judged():
    assert remarks(Report((Variant("dense"), Variant("pruned")))) == ()
    assert remarks(Report(())) == ()


def test_8_bit_files_for_vnni_are_told_of_processors_without_it():
    old, new = ({"arch": "x86_64", "instruction_sets": [*sets]} for sets in (("avx2",), ("avx2", "avx_vnni")))
    int8 = Variant("dense.int8", quantization={"target": "x86-vnni"})
    seven = replace(int8, quantization={"target": "x86-avx2"})
    (sentence,) = remarks(Report((DENSE, int8), environment=old))
    assert sentence.startswith("dense.int8: made for x86 with VNNI, which this processor has not.")
    assert "session.x64quantprecision=1" in sentence
    assert "target='x86-avx2'" in sentence
    assert remarks(Report((DENSE, int8), environment=new)) == ()
    assert remarks(Report((DENSE, seven), environment=old)) == ()
    assert remarks(Report((DENSE,), environment=old)) == ()
    device = Measurement("pi@kitchen", latency_ms={}, environment=old)
    (sentence,) = remarks(Report((DENSE, int8), environment=new, measurements=(device,)))
    assert "which pi@kitchen has not" in sentence
