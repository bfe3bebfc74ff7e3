from __future__ import annotations

import io

from rich.console import Console

from lightning_prune.report.html import render_html
from lightning_prune.report.markdown import render_markdown
from lightning_prune.report.results import Report, Variant
from lightning_prune.report.search import TITLE, searches
from lightning_prune.report.table import print_table


def report():
    names = ["net.<stem>", "net.a", "net.b", "net.c", "net.d"]

    def tried(count, accuracy, lost, holds):
        return {"kept": names[:count], "metrics": {"acc": accuracy}, "lost": {"acc": lost}, "holds": holds}

    table = [tried(0, 0.5, 0.4, False), tried(1, 0.9, 0.0, True), tried(5, None, None, False)]
    return Report((Variant("dense"), Variant("dense.int8", quantization={"search": table})))


def test_every_attempt_is_a_line():
    (found,) = searches(report())
    assert found.header == ("Layers in float", "acc", "Holds")
    assert found.lines == (
        ("none", "0.5000 (0.4000 worse)", "no"),
        ("net.<stem>", "0.9000 (as in float)", "yes"),
        ("net.<stem>, net.a, net.b and 2 more", "–", "no"),
    )
    assert searches(Report((Variant("dense"), Variant("dense.int8", quantization={})))) == ()


def test_it_is_in_the_page_in_the_text_and_in_the_terminal():
    page, words, stream = render_html(report()), render_markdown(report()), io.StringIO()
    print_table(report(), Console(file=stream, width=100))
    for shown in (page, words, stream.getvalue()):
        assert TITLE in shown
        assert "0.5000 (0.4000 worse)" in shown
    assert "net.<wbr>&lt;stem&gt;" in page
    assert "| none | 0.5000 (0.4000 worse) | no |" in words
    assert TITLE not in render_html(Report((Variant("dense"),)))
