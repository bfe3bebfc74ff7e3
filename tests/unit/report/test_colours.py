"""Text stands out from its ground as WCAG 2.2 AA asks, in light, dark and print."""

from __future__ import annotations

import re
from importlib.resources import files

import pytest

CSS = files("lightning_prune.report").joinpath("templates/report.css").read_text(encoding="utf-8")
LARGEST_HEAT = 0.66


def variables(block: str) -> dict[str, str]:
    return dict(re.findall(r"--([\w-]+):\s*([^;]+);", block))


def schemes() -> dict[str, dict[str, str]]:
    light = variables(CSS[: CSS.index("@media")])
    dark = variables(re.search(r"prefers-color-scheme: dark\) \{(.*?)\n\}", CSS, re.DOTALL)[1])
    printed = variables(re.search(r"@media print \{(.*?)\n\}", CSS, re.DOTALL)[1])
    return {"light": light, "dark": {**light, **dark}, "print": {**light, **printed}}


def rgb(color: str) -> tuple[float, ...]:
    if color.startswith("#"):
        digits = color[1:] if len(color) == 7 else "".join(2 * c for c in color[1:])
        return tuple(int(digits[i : i + 2], 16) for i in (0, 2, 4))
    return tuple(float(part) for part in color.split())


def luminance(color: tuple[float, ...]) -> float:
    parts = [c / 255 for c in color]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    light, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("name", ["light", "dark", "print"])
def test_text_can_be_read(name):
    scheme = schemes()[name]
    pairs = [(ink, ground) for ink in ("ink", "soft", "faint") for ground in ("card", "page")]
    pairs += [(ink, "card") for ink in ("accent", "good", "bad")] + [("warn-ink", "warn-page")]
    for ink, ground in pairs:
        assert contrast(rgb(scheme[ink]), rgb(scheme[ground])) >= 4.5, (ink, ground)


@pytest.mark.parametrize("name", ["light", "dark", "print"])
def test_numbers_in_the_heat_map_can_be_read(name):
    scheme = schemes()[name]
    card, accent = rgb(scheme["card"]), rgb(scheme["accent-rgb"])
    hottest = tuple(LARGEST_HEAT * a + (1 - LARGEST_HEAT) * c for a, c in zip(accent, card, strict=True))
    assert contrast(rgb(scheme["ink"]), hottest) >= 4.5


@pytest.mark.parametrize("name", ["light", "dark", "print"])
def test_marks_can_be_told_from_their_ground_and_from_each_other(name):
    scheme = schemes()[name]
    colors = [rgb(scheme[f"c{i}"]) for i in range(7)]
    for color in colors:
        assert contrast(color, rgb(scheme["card"])) >= 2  # marks have their labels and their order as well
    for i, a in enumerate(colors):
        for b in colors[:i]:
            assert sum((x - y) ** 2 for x, y in zip(a, b, strict=True)) ** 0.5 > 40
