"""How well each class is found, variant beside variant."""

from __future__ import annotations

from dataclasses import dataclass

from lightning_prune.report import text
from lightning_prune.report.results import Report


@dataclass(frozen=True)
class ClassRow:
    """One class.

    Attributes:
        name: The class.
        support: How many samples it has.
        recalls: The fraction of them that each variant of the table finds, as text.
    """

    name: str
    support: str
    recalls: tuple[str, ...]


def class_table(report: Report) -> tuple[tuple[str, ...], tuple[ClassRow, ...]]:
    """Return the recall of each class.

    Args:
        report: The report.

    Returns:
        The names of the variants that have one, and a row for each class; both empty if there are none.

    Example:
        >>> from lightning_prune.report.results import Variant
        >>> counts = {"names": ["cat"], "support": [4], "recall": [0.75]}
        >>> class_table(Report((Variant("dense", classes=counts),)))[1]
        (ClassRow(name='cat', support='4', recalls=('75.0 %',)),)
    """
    known = [v for v in report.variants if v.classes]
    first = known[0].classes if known else None
    if not first:
        return (), ()
    alike = [v for v in known if v.classes and v.classes["names"] == first["names"]]
    rows = []
    for index, name in enumerate(first["names"]):
        recalls = [v.classes["recall"][index] if v.classes else None for v in alike]
        shown = tuple("–" if recall is None else text.percent(recall) for recall in recalls)
        rows.append(ClassRow(str(name), f"{first['support'][index]:,}", shown))
    return tuple(v.name for v in alike), tuple(rows)
