"""The fixed form of every benchmark: raw numbers as JSON, a table made from them, and where they come from.

Not a benchmark itself. Scripts in this folder import it as `common`.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

RESULTS = Path(os.environ.get("LIGHTNING_PRUNE_RESULTS", Path(__file__).parent / "results"))
PACKAGES = ("torch", "pytorch-lightning", "onnxruntime", "lightning-prune")


def processor() -> str:
    """Name the CPU as the system does."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def environment(threads: int = 1, packages: Iterable[str] = PACKAGES) -> dict[str, object]:
    """Say where and with what a number was measured."""
    versions = {}
    for name in packages:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return {
        "date": date.today().isoformat(),
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        **versions,
    }


def option(text: str) -> tuple[str, Any]:
    """Read `key=value` from the command line, the value as YAML."""
    key, _, value = text.partition("=")
    return key, yaml.safe_load(value)


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Lay out a Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]


def doubts(timed: Mapping[str, Any]) -> list[str]:
    """Say what speaks against a measurement of latency."""
    protocol = timed.get("protocol", {})
    cold, once = "settle_runs" not in protocol, protocol.get("openings", 1) == 1
    return [*["noisy"] * timed["noisy"], *["cold caches"] * cold, *["opened once"] * once]


def write_json(path: Path, value: object) -> None:
    """Write plain data whole or not at all."""
    replace_text(path, json.dumps(value))


def replace_text(path: Path, content: str) -> None:
    """Write a text whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(content, encoding="utf-8")
    beside.replace(path)


def write(
    name: str,
    config: Mapping[str, object],
    found: object,
    text: Sequence[str],
    *,
    about: Mapping[str, object] | None = None,
    folder: Path = RESULTS,
) -> None:
    """Write `name.json` and `name.md`, whole or not at all, and print the table.

    Args:
        name: What was measured; the title is made from it.
        config: How it was measured.
        found: All raw numbers.
        text: The table and what there is to say about it, line by line.
        about: Where it was measured, default `environment()`.
        folder: Where the files go.
    """
    about = dict(about or environment())
    raw = {"environment": about, "config": dict(config), "results": found}
    lines = [
        f"# {name.replace('_', ' ')}",
        "",
        *text,
        "",
        "How: " + json.dumps(config),
        "",
        json.dumps(about),
        "",
    ]
    write_json(folder / f"{name}.json", raw)
    replace_text(folder / f"{name}.md", "\n".join(lines))
    print("\n".join(lines))
