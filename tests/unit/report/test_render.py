"""The same data in a terminal, in Markdown and in HTML: complete, escaped, and alone in its file."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from hypothesis import HealthCheck, given, settings
from report_data import example_report, reports
from rich.console import Console

from lightning_prune.errors import OutputError
from lightning_prune.report.html import headlines, render_html
from lightning_prune.report.layers import layer_table
from lightning_prune.report.markdown import render_markdown, table
from lightning_prune.report.measures import column_rows, missing, rows
from lightning_prune.report.render import write_report
from lightning_prune.report.results import Measurement, Operator, Report, Variant
from lightning_prune.report.table import print_table

HOSTILE = "<script>alert('x')</script>\"><img src=x onerror=y>|`*_&amp;{{ 7 * 7 }}"
VOID = {"meta", "br", "wbr"}


class Page(HTMLParser):
    """Collects elements and text, and checks that elements are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open, tag
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


def printed(report: Report, width: int = 80) -> str:
    out = io.StringIO()
    print_table(report, Console(file=out, width=width))
    return out.getvalue()


def hostile_report() -> Report:
    report = example_report()
    names = {v.name: f"{v.name}{HOSTILE}" for v in report.variants[1:]}
    variants = tuple(
        replace(
            v,
            name=names.get(v.name, v.name),
            metrics={HOSTILE: 0.5},
            operators=(Operator(HOSTILE, 1.0, 1.0, 1),),
            missing={"energy_mj": HOSTILE},
        )
        for v in report.variants
    )
    history = [{"epoch": 1, "step": 1, "target": 0.5, "achieved": 0.5}]
    layers = [{"name": HOSTILE, "parameters": 2, "nonzero": 1, "channels_before": 4, "channels_after": 2}]
    return replace(
        report,
        variants=variants,
        pruning={"callbacks": [{"callback": HOSTILE, "history": history, "layers": layers}]},
        training={"curves": {HOSTILE: [[0, 1], [1, 2]]}},
        warnings=(HOSTILE,),
        environment={HOSTILE: HOSTILE, "packages": {"lightning-prune": HOSTILE}},
        measurements=(Measurement(HOSTILE, reason=HOSTILE),),
        title=HOSTILE,
        created=HOSTILE,
    )


def test_html_shows_every_value_and_comparison():
    report = example_report()
    text = Page(render_html(report)).text.replace("×", "x").replace("−", "-")
    for row in rows(report):
        assert row.measure.title in text
        for cell in row.cells:
            assert cell.value in text
            assert cell.compared in text
    for word in ("DigitsNet", "two convolutions stayed in float", "openvino", "A processor", "net.conv3"):
        assert word in text, word
    assert "No energy per run: no sensor." in text


def test_html_is_one_file_that_asks_for_nothing_and_runs_nothing():
    page = Page(render_html(hostile_report()))
    tags = {tag for tag, _ in page.elements}
    assert (
        tags & {"script", "link", "img", "iframe", "object", "embed", "base", "form", "use", "image"} == set()
    )
    for tag, attributes in page.elements:
        assert not {"src", "href", "xlink:href", "action", "srcset"} & set(attributes), tag
        assert not [name for name in attributes if name.startswith("on")], tag
    text = render_html(example_report())
    assert "url(" not in text
    assert "@import" not in text
    assert "default-src 'none'" in text


def test_hostile_strings_are_shown_as_text():
    page = Page(render_html(hostile_report()))
    assert page.text.count("<script>alert('x')</script>") >= 10
    assert "{{ 7 * 7 }}" in page.text  # no template is evaluated in data
    markdown = render_markdown(hostile_report())
    assert not re.search(r"(?<!\\)<", markdown)
    assert "\\<script\\>" in markdown


def test_html_follows_the_readers_colour_scheme_phone_and_printer():
    text = render_html(example_report())
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text
    assert 'name="viewport"' in text


def test_every_drawing_has_words_for_those_who_cannot_see_it():
    page = Page(render_html(example_report()))
    drawings = [attributes for tag, attributes in page.elements if tag == "svg"]
    assert drawings
    spoken = [a for a in drawings if a.get("role") == "img" and a.get("aria-label")]
    # The only others are axis labels, which are hidden from a screen reader.
    assert len(drawings) - len(spoken) == 1
    headings = [tag for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert headings[0] == "h1"
    assert headings.count("h1") == 1


@given(reports)
@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow], deadline=None)
def test_any_report_can_be_rendered(report):
    Page(render_html(report))
    assert render_markdown(report).endswith("\n")
    printed(report)


def test_markdown_tables_have_as_many_cells_in_every_line():
    for text in (render_markdown(example_report()), render_markdown(hostile_report())):
        width = None
        for line in text.splitlines():
            if not line.startswith("|"):
                width = None
                continue
            cells = len(re.findall(r"(?<!\\)\|", line))
            assert width in (None, cells), line
            width = cells


def test_markdown_shows_every_value():
    report = example_report()
    text = render_markdown(report).replace("\\", "")
    for row in rows(report):
        for cell in row.cells:
            assert cell.value in text
            assert cell.compared in text
    assert "> **Note:** two convolutions stayed in float" in text
    assert "| net.conv3 | 20 of 32 | 57.0 % |" in text


def test_markdown_shows_intervals():
    report = example_report()
    classes = {"names": ["a"], "support": [100], "recall": [0.9]}
    report = replace(report, variants=(*report.variants[:2], replace(report.variants[2], classes=classes)))
    text = render_markdown(report)
    assert "| pruned |  | 1.94 to 2.08 |  |" in text
    assert "| pruned.int8 |  | 3.88 to 4.16 | 82.6 % to 94.5 % |" in text


def test_markdown_escapes_what_would_end_a_cell():
    assert table(["a"], [["x|y\nz"]]).splitlines()[-1] == "| x\\|y z |"


def test_table_fits_80_columns_and_shows_ratios_and_warnings():
    text = printed(example_report())
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "…" not in text
    assert "4.00x faster" in text
    assert "7.84x smaller" in text
    assert "! two convolutions stayed in float" in text
    assert "No energy per run: no sensor." in text
    assert "Energy per run " not in text  # a row of dashes is not worth a line


def test_many_files_go_one_a_line():
    report = example_report()
    extra = tuple(replace(report.variants[1], name=f"copy{i}", metrics={}) for i in range(3))
    text = printed(replace(report, variants=(*report.variants, *extra)), width=100)
    lines = [line for line in text.splitlines() if line.strip().startswith("copy")]
    assert len(lines) == 3
    assert all("0.700 ms" in line and "2.00x faster" in line for line in lines)


def test_markup_of_rich_in_names_is_not_interpreted():
    report = replace(example_report(), warnings=("[red]not red[/red] [/]",), title="[bold]Net[/bold]")
    text = printed(report)
    assert "[red]not red[/red] [/]" in text
    assert "[bold]Net[/bold]" in text


def test_headline_tells_losses_as_losses():
    report = example_report()
    worse = replace(
        report.variants[0], name="pruned", bytes=9_600_000, metrics={"val_loss": 0.2, "val_acc": 0.9}
    )
    found = {h.word: h for h in headlines(replace(report, variants=(report.variants[0], worse)))}
    assert (found["larger"].figure, found["larger"].good) == ("2.00x", False)
    assert (found["not faster"].figure, found["not faster"].good) == ("1.00x", None)
    assert found["val_acc"].figure == "-0.0860"  # the metric before the loss
    assert headlines(replace(report, variants=report.variants[:1])) == ()


def test_layer_and_its_weight_are_one_line():
    layers = layer_table(example_report())
    assert [layer.name for layer in layers] == [f"net.conv{i}" for i in range(4)]
    assert layers[3].channels == (32, 20)
    assert layers[3].zeros == pytest.approx(0.57)


def test_throughput_stands_beside_the_peak_of_the_same_kind_of_number():
    report = example_report()

    def row(float32: float):
        peak = {"float32": float32, "int8": 400.0, "reason": None}
        return rows(replace(report, profile={**report.profile, "batch": 2, "peak_gmacs": peak}))[-1]

    # 82 M x 2 / 1.4 ms = 117 G/s of 200; 41 M x 2 / 0.35 ms = 234 G/s of 400
    assert row(200.0).measure.title == "Of peak MACs/s"
    assert [(c.value, c.compared) for c in row(200.0).cells] == [
        ("59 %", "117 G/s"),
        ("59 %", "117 G/s"),
        ("59 %", "234 G/s"),
    ]
    # A peak below what a file reaches was disturbed, and is no peak.
    assert [(c.value, c.compared) for c in row(20.0).cells] == [
        ("117 G/s", ""),
        ("117 G/s", ""),
        ("59 %", "234 G/s"),
    ]
    assert rows(report)[-1].measure.title == "MACs/s"
    assert [cell.value for cell in rows(report)[-1].cells] == ["58.6 G/s", "58.6 G/s", "117 G/s"]


def test_further_engines_are_compared_on_themselves():
    report = example_report()
    latency_row, *others = column_rows(report)
    assert latency_row.measure.title == "p50, openvino"
    assert [(c.value, c.compared) for c in latency_row.cells] == [
        ("1.30 ms", ""),
        ("0.600 ms", "2.17x faster"),
        ("–", ""),
    ]
    assert others == []
    assert "No p50, openvino of pruned.int8: not measured there." in missing(report)
    for text in (printed(report), render_markdown(report), Page(render_html(report)).text.replace("×", "x")):
        assert "2.17x faster" in text
    device = Measurement("pi", reason="the outputs differ", noisy=True, environment={"cpu": "Cortex-A76"})
    text = Page(render_html(replace(report, measurements=(device,)))).text
    assert "p50, pi (noisy)" in text
    assert "the outputs differ" in text
    assert "Cortex-A76" in text


def test_reasons_name_the_variants_they_hold_for():
    one = Variant("a", bytes=1, macs=5)
    two = Variant("b", bytes=1, missing={"macs": "not counted"})
    assert missing(Report((one, two))) == ("No MACs of b: not counted.",)


def test_write_report_writes_the_three_forms(tmp_path):
    report = example_report()
    paths = write_report(report, tmp_path)
    assert {form: path.name for form, path in paths.items()} == {
        "html": "report.html", "md": "report.md", "json": "report.json",
    }  # fmt: skip
    assert Report.load(tmp_path) == report
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "report.json", "report.md"]


def test_write_report_into_nothing_is_a_clear_error(tmp_path):
    with pytest.raises(OutputError, match="cannot write"):
        write_report(example_report(), tmp_path / "absent")
