"""What a sensitivity analysis leaves behind: raw numbers, a picture, and levels to paste into a config."""

from __future__ import annotations

import json
from dataclasses import asdict
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_prune.deploy.files import check_writable, write_whole
from lightning_prune.report import text

if TYPE_CHECKING:
    from lightning_prune.sensitivity import Sensitivity

_ROW, _CELL, _NAME = 22, 76, 260  # pixels


def write(found: Sensitivity, folder: Path, max_drop: float) -> list[Path]:
    """Write the three files; see `lightning_prune.sensitivity.write`."""
    folder = check_writable(folder)
    content = {
        "sensitivity.json": json.dumps({"schema": 1, **asdict(found)}, indent=2) + "\n",
        "sensitivity.svg": picture(found),
        "sensitivity.yaml": levels(found, max_drop),
    }
    return [write_whole(folder / name, words.encode()) for name, words in content.items()]


def levels(found: Sensitivity, max_drop: float) -> str:
    """Say as YAML how far each layer can go alone.

    The part under `sparsity` goes into the `init_args` of `MagnitudePruning`, `exclude_int8` names layers to
    keep in float, and `width` is there to read.
    """
    lines = [
        f"# Each alone costs at most {max_drop:g} of {found.metric}, which was {text.metric(found.value)};",
        "# together they cost more, and training wins most of it back.",
    ]
    for kind in ("sparsity", "width"):
        bearable = found.bearable(max_drop, kind)
        if bearable:
            lines += [f"{kind}:", *(f"  {json.dumps(name)}: {level:g}" for name, level in bearable.items())]
    if any(trial.kind == "int8" for trial in found.trials):
        hurt = found.hurt_by_int8(max_drop)
        lines += [f"exclude_int8: {json.dumps(hurt)}"]
    return "\n".join(lines) + "\n"


def picture(found: Sensitivity) -> str:
    """Draw the harm of every trial as a table of colours, one row a layer."""
    worst = max((trial.harm for trial in found.trials), default=0.0) or 1.0
    kinds = list(dict.fromkeys(trial.kind for trial in found.trials))
    parts: list[str] = []
    y = 48
    for kind in kinds:
        mine = [trial for trial in found.trials if trial.kind == kind]
        columns = sorted({trial.level for trial in mine})
        parts.append(_text(10, y, kind, "bold"))
        for place, level in enumerate(columns if kind != "int8" else []):
            parts.append(_text(_NAME + (place + 0.5) * _CELL, y, text.percent(level, 0), "mid"))
        for name in dict.fromkeys(trial.name for trial in mine):
            y += _ROW
            parts.append(_text(10, y, name))
            for trial in mine:
                if trial.name == name:
                    x = _NAME + columns.index(trial.level) * _CELL
                    strength = min(1.0, max(0.0, trial.harm / worst))
                    parts.append(
                        f'<rect x="{x}" y="{y - 16}" width="{_CELL - 2}" height="{_ROW - 2}" fill="#c43d63" '
                        f'fill-opacity="{strength:.3f}" stroke="#9aa3b2" stroke-width="0.5"/>'
                    )
                    parts.append(_text(x + _CELL / 2, y, text.metric(trial.value), "mid"))
        y += 2 * _ROW
    count = max((len({t.level for t in found.trials if t.kind == kind}) for kind in kinds), default=1)
    width = _NAME + count * _CELL + 10
    title = f"{found.metric} after a change to one layer; before: {text.metric(found.value)}"
    style = (
        "text{font:12px sans-serif;fill:currentColor}.bold{font-weight:bold}.mid{text-anchor:middle}"
        "svg{color:#1b2333}@media(prefers-color-scheme:dark){svg{color:#e6eaf2;background:#12161f}}"
    )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y}" width="{width}" role="img">',
            f"<style>{style}</style>",
            f"<title>{escape(title)}</title>",
            _text(10, 20, title),
            *parts,
            "</svg>\n",
        ]
    )


def _text(x: float, y: float, words: str, style: str = "") -> str:
    kind = f' class="{style}"' if style else ""
    return f'<text x="{x:g}" y="{y:g}"{kind}>{escape(words)}</text>'
