"""What was measured of accuracy and latency, and which of it the summary shows. Not a benchmark itself."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

# What has to be there of accuracy: tasks, and of some the budgets.
ACCURACY = ("resnet56", "resnet20", "resnet8", "keywords", "motion_cnn", "motion_gru", "speech", "cells")
MACS = {"resnet56": (0.476, 0.389), "resnet20": (0.606,)}
ZEROS = {"resnet56": (0.8, 0.9, 0.95), "resnet20": (0.8, 0.9, 0.95)}

# Whose files are timed beside ours; their kinds end with the number that its widths are multiples of.
PEER = "torch-pruning"


@dataclass(frozen=True)
class Runs:
    """The runs of one configuration of a task, which differ by their seed.

    Attributes:
        task: Its name.
        title: All that the runs depend on.
        seeds: The raw numbers of each.
        dense: The raw numbers of the dense network, of each seed it was trained with.
    """

    task: str
    title: str
    seeds: list[dict[str, Any]]
    dense: list[dict[str, Any]]

    @property
    def method(self) -> str:
        return str(self.seeds[0]["method"])

    @property
    def epochs(self) -> int:
        return int(self.seeds[0]["epochs"])

    @property
    def budget(self) -> tuple[str, ...]:
        """What had to remain."""
        return tuple(part for part in self.title.split(", ") if re.fullmatch(r"(macs|zeros)[\d.]+", part))

    @property
    def rank(self) -> tuple[bool, int]:
        """What the page shows first: the script's own settings, and of those the longest training."""
        return not self.settings, self.epochs

    @property
    def settings(self) -> list[str]:
        """What differs from the script's own settings, but for the number of epochs."""
        known = {self.method, *self.budget}
        parts = [part for part in self.title.split(", ") if part not in known]
        return [part for part in parts if not re.fullmatch(r"\w+epochs", part)]

    @property
    def label(self) -> str:
        """The method and the settings."""
        return f"{self.method} ({', '.join(self.settings)})" if self.settings else self.method

    @property
    def name(self) -> str:
        """The label, what had to remain, and how long it was trained."""
        budget = [re.sub(r"^([a-z]+)", r"\1 ", part) for part in self.budget]
        return ", ".join([self.label, *budget, f"{self.epochs} epochs"])

    @property
    def fewer(self) -> float:
        """How many times fewer MACs than the dense network; the least of the seeds."""
        return float(min(self.dense[0]["float"]["macs"] / run["float"]["macs"] for run in self.seeds))

    def as_small_as(self, other: Runs) -> bool:
        """Whether both have about the same MACs, so that their accuracy can be compared."""
        return about_the_same(self.fewer, other.fewer)

    def scores(self, form: str) -> list[float]:
        """Say how good each seed is, in percent; `form` is `"float"` or `"int8"`."""
        return [100 * run[form]["score"] for run in self.seeds]

    def changes(self, form: str) -> list[float]:
        """Say how each seed changed against the dense network it began with, in float, in points."""
        began = {run["seed"]: run for run in self.dense}
        return [
            score - 100 * began.get(run["seed"], self.dense[0])["float"]["score"]
            for run, score in zip(self.seeds, self.scores(form), strict=True)
        ]

    def gzipped(self, form: str) -> float:
        """Bytes of the file as gzip leaves it, the mean over seeds."""
        return statistics.mean(run[form]["compressed_bytes"] for run in self.seeds)


def runs_of(found: dict[str, dict[str, Any]], task: str) -> list[Runs]:
    """List what was measured of a task's accuracy; nothing without its dense network."""
    raw = found.get(f"accuracy_{task}", {"config": {}, "results": {}})
    runs = raw["results"]
    # What was held out for choices is no test set.
    if "dense" not in runs or raw["config"].get("choose"):
        return []
    return [Runs(task, title, seeds, runs["dense"]) for title, seeds in runs.items()]


def first(everything: list[Runs]) -> list[Runs]:
    """Leave only what stands for its method and budget: see `Runs.rank`.

    Not what came out best: that would be chosen by the test set.
    """
    highest: dict[tuple[str, tuple[str, ...]], tuple[bool, int]] = {}
    for one in everything:
        key = (one.method, one.budget)
        highest[key] = max(highest.get(key, one.rank), one.rank)
    return [one for one in everything if one.rank == highest[one.method, one.budget]]


def as_long(everything: list[Runs], one: Runs) -> list[Runs]:
    """Find the dense network trained on for as long as a method took, else what stands for it."""
    tuned = [other for other in everything if other.method == "tuned"]
    return first([other for other in tuned if other.epochs == one.epochs]) or first(tuned)


def shown(everything: list[Runs]) -> list[Runs]:
    """Leave what stands for its method and budget, and what was trained as long as another method's."""
    standing = first(everything)
    lengths = {(one.budget, one.epochs) for one in standing}
    lengths |= {(other.budget, other.epochs) for one in standing for other in as_long(everything, one)}
    return [one for one in everything if (one.budget, one.epochs) in lengths]


def timed(found: dict[str, dict[str, Any]], engine: str) -> list[dict[str, Any]]:
    """List the networks that were timed with an engine."""
    return list(found.get(f"latency_{engine}", {}).get("results", []))


def by_place(found: dict[str, dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """List the networks that were timed, by engine and processor."""
    places: dict[str, list[dict[str, Any]]] = {}
    for engine in ("onnxruntime", "openvino"):
        for one in timed(found, engine):
            places.setdefault(f"{engine}, {processor(one)}", []).append(one)
    return places


def speedup(one: dict[str, Any], kind: str, base: str) -> float:
    """Say how many times faster a file is than another, by the medians."""
    return float(one["latency_ms"][base]["p50"] / one["latency_ms"][kind]["p50"])


def fewer_macs(one: dict[str, Any], kind: str = "pruned") -> float:
    """Say how many times fewer MACs a file has than the dense one."""
    return float(one["macs"]["dense"] / one["macs"][kind])


def about_the_same(one: float, other: float) -> bool:
    """Whether two ratios of MACs are so close that what was measured at them can be compared."""
    return abs(one / other - 1) < 0.04


def peers_of(one: dict[str, Any]) -> dict[int, str]:
    """List the peer's files that were timed, in float, by what their widths are multiples of."""
    found = (re.fullmatch(rf"{PEER}-(\d+)", kind) for kind in one["latency_ms"])
    return {int(match[1]): match[0] for match in found if match}


def processor(one: dict[str, Any]) -> str:
    """Name the processor, and say if it has a matrix unit for int8, which decides what int8 can bring."""
    about = one.get("environment", {})
    known = about.get("instruction_sets")
    unit = "" if not known else " with AMX" if "amx_int8" in known else " without AMX"
    return f"{about.get('cpu') or 'an unknown processor'}{unit}"


def spread(values: Iterable[float], digits: int = 2, sign: str = "+") -> str:
    """Write the mean with the standard deviation over seeds, and how many there are."""
    values = list(values)
    text = f"{statistics.mean(values):{sign}.{digits}f}"
    if len(values) > 1:
        return f"{text} ± {statistics.stdev(values):.{digits}f} ({len(values)} seeds)"
    return f"{text} (1 seed)"
