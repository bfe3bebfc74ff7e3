from __future__ import annotations

from lightning_prune.report.classes import class_table
from lightning_prune.report.html import render_html
from lightning_prune.report.markdown import render_markdown
from lightning_prune.report.results import Report, Variant


def report():
    def classes(*recalls):
        return {"names": ["cat", "<dog>"], "support": [1200, 0], "recall": list(recalls)}

    return Report(
        (
            Variant("dense", classes=classes(0.5, None)),
            Variant("other", classes={"names": ["0"], "support": [1], "recall": [1.0]}),
            Variant("pruned", classes=classes(0.25, None)),
            Variant("plain"),
        )
    )


def test_variants_of_the_same_classes_stand_side_by_side():
    names, rows = class_table(report())
    assert names == ("dense", "pruned")
    assert [(row.name, row.support) for row in rows] == [("cat", "1,200"), ("<dog>", "0")]
    assert rows[1].recalls == ("–", "–")
    assert class_table(Report((Variant("dense"),))) == ((), ())


def test_the_table_is_in_the_page_and_in_the_text():
    page, words = render_html(report()), render_markdown(report())
    assert "Recall by class" in page
    assert "&lt;dog&gt;" in page
    assert "| cat | 1,200 | 50.0 % | 25.0 % |" in words
    assert "Recall by class" not in render_html(Report((Variant("dense"),)))


def test_it_survives_the_file():
    assert Report.from_json(report().to_json()) == report()
