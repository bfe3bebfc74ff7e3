"""Where the numbers come from, line by line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_prune.report import text
from lightning_prune.report.results import Report

_TITLES = {
    "cpu": "Processor",
    "arch": "Architecture",
    "cores": "Cores",
    "allowed_cores": "Cores allowed",
    "cpu_quota": "CPU quota (cores)",
    "instruction_sets": "Instruction sets",
    "virtual_machine": "Virtual machine",
    "governor": "Frequency governor",
    "mhz": "MHz now",
    "memory_bytes": "Memory",
    "load_average": "Load average",
    "os": "Operating system",
    "python": "Python",
    "packages": "Packages",
}
# What is told of a further device; its whole description is in report.json.
_OF_A_DEVICE = ("cpu", "arch", "os", "python")


def environment_rows(report: Report) -> list[list[str]]:
    """Return title and value of all that is known of the machine and of the profile."""
    lines = []
    for key, value in report.environment.items():
        if value is not None:
            shown = text.size(value) if key == "memory_bytes" and isinstance(value, int) else said(value)
            lines.append([_TITLES.get(key, key.replace("_", " ")), shown])
    profile = report.profile
    if profile.get("load_average"):
        lines.append(["Load before and after timing", said(profile["load_average"])])
    if profile.get("cpu_share") is not None:
        lines.append(["Processor time of the timing", text.percent(profile["cpu_share"])])
    for name, warm in (profile.get("warm_up") or {}).items():
        if isinstance(warm, Mapping):
            runs, seconds = warm.get("runs"), warm.get("seconds")
            end = "settled" if warm.get("settled") else "not settled"
            lines.append([f"Warm-up of {name}", f"{runs} runs in {seconds} s, {end}"])
    for column in report.measurements:
        known = [
            said(column.environment[key]) for key in _OF_A_DEVICE if column.environment.get(key) is not None
        ]
        if known:
            lines.append([f"On {column.label}", ", ".join(known)])
    return lines


def said(value: Any) -> str:
    """Return plain data in words.

    Example:
        >>> said({"torch": "2.13", "numpy": "2"}), said([1, 2]), said(None), said(True)
        ('torch 2.13, numpy 2', '1, 2', 'unknown', 'yes')
    """
    if value is None:
        return "unknown"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {said(inner)}" for key, inner in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        nested = any(isinstance(inner, Sequence) and not isinstance(inner, str) for inner in value)
        return ("; " if nested else ", ").join(said(inner) for inner in value)
    return f"{value:g}" if isinstance(value, float) else str(value)
