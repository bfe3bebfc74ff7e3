"""Blocks and layers that were replaced have their tables in every form of the report."""

from __future__ import annotations

from dataclasses import replace

from report_data import example_report

from lightning_prune.report.html import render_html
from lightning_prune.report.layers import layer_table
from lightning_prune.report.markdown import render_markdown
from lightning_prune.report.replaced import replaced

BLOCKS = [
    {"name": "body.0", "score": 0.5, "macs": 4e6, "params": 9e3, "became": "", "reason": ""},
    {"name": "body.1", "score": 0.02, "macs": 4e6, "params": 9e3, "became": "identity", "reason": ""},
    {"name": "stem", "score": None, "macs": None, "params": None, "became": "", "reason": "excluded"},
]
FACTORED = [{"name": "fc", "macs": 4096, "ranks": [16, 16], "macs_after": 2048, "lost": 0.12, "reason": ""}]


def report():
    base = example_report()
    callbacks = [
        *base.pruning["callbacks"],
        {"callback": "LayerPruning", "config": {}, "history": [], "layers": [], "blocks": BLOCKS},
        {"callback": "LowRank", "config": {}, "history": [], "layers": FACTORED},
    ]
    return replace(base, pruning={"callbacks": callbacks})


def test_each_callback_that_replaces_has_a_table():
    blocks, layers = replaced(report())
    assert blocks.title == "LayerPruning: 1 of 3 blocks replaced"
    assert [line[1] for line in blocks.lines] == ["as it was", "identity", "as it was (excluded)"]
    assert layers.title == "LowRank: 1 layer factored"
    assert layers.lines == (("fc", "16", "4.10 k", "2.05 k", "12.0 %"),)
    assert replaced(example_report()) == ()


def test_factored_layers_are_no_empty_lines_among_the_channels():
    assert "fc" not in [layer.name for layer in layer_table(report())]


def test_both_written_reports_show_them():
    for shown in (render_html(report()), render_markdown(report()).replace("\\", "")):
        for part in (
            "1 of 3 blocks replaced",
            "identity",
            "as it was (excluded)",
            "1 layer factored",
            "2.05 k",
        ):
            assert part in shown


def test_how_far_a_file_is_off_pytorch_is_a_row():
    base = example_report()
    parity = {"max_rel": 3e-7, "rows": {"matched": 99, "of": 100}}
    variants = (replace(base.variants[0], parity=parity), *base.variants[1:])
    shown = render_markdown(replace(base, variants=variants))
    line = next(line for line in shown.splitlines() if "Off PyTorch by" in line)
    assert "3.0e-07 (99 of 100 detections)" in line.replace("\\", "")
    assert "Off PyTorch" not in render_markdown(base)
