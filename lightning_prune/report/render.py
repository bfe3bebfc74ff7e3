"""A report in all its forms: files, and a table in the terminal."""

from __future__ import annotations

from pathlib import Path

from lightning_prune.deploy.files import write_whole
from lightning_prune.report.html import render_html
from lightning_prune.report.markdown import render_markdown
from lightning_prune.report.results import Report
from lightning_prune.report.table import print_table

__all__ = ["print_table", "write_report"]


def write_report(report: Report, dirpath: str | Path) -> dict[str, Path]:
    """Write `report.json`, `report.md` and `report.html`.

    All three are rendered before the first is written, and each appears whole or not at all; `report.json`
    comes last, because programs read it.

    Args:
        report: What to write.
        dirpath: An existing directory.

    Returns:
        The paths, by form: `"html"`, `"md"`, `"json"`.

    Raises:
        OutputError: A file cannot be written; an earlier file of that name is untouched.
    """
    forms = {"html": render_html(report), "md": render_markdown(report), "json": report.to_json()}
    return {
        form: write_whole(Path(dirpath) / f"report.{form}", content.encode("utf-8"))
        for form, content in forms.items()
    }
