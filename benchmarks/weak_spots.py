"""What the numbers do not show, or show against us. Not a benchmark itself."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator
from typing import Any

from goals import goals, verdict
from measured import (
    ACCURACY,
    MACS,
    ZEROS,
    Runs,
    fewer_macs,
    first,
    peers_of,
    processor,
    runs_of,
    shown,
    speedup,
    timed,
)

# What these measure does not depend on what else runs.
WITHOUT_TIMES = ("accuracy_", "export_models", "qat", "structural_grid")


def weak_spots(found: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Say what the numbers do not show, or show against us."""
    for goal in goals(found):
        for name, value, text in goal.found:
            if verdict(goal, value) in ("missed", "below the aim"):
                wanted = goal.aim if goal.least is None else goal.least
                yield f"{goal.what}: {text} where {wanted:g} was wanted ({name})."
    for task in ACCURACY:
        everything = shown(runs_of(found, task))
        pruned = [one for one in everything if one.method != "dense"]
        if lacking := ", ".join(not_measured(found, task)):
            yield f"{task}: not measured: {lacking}."
        single = [one for one in pruned if len(one.seeds) == 1]
        if single:
            apart = [statistics.stdev(one.changes("float")) for one in pruned if len(one.seeds) > 1]
            text = f"{task}: one seed only in {len(single)} of {len(pruned)} rows."
            if apart:
                text += f" In the others, seeds are up to {max(apart):.2f} points apart (standard deviation)."
            yield text
        cut_short = {one.epochs for one in everything if re.search(r"\d+epochs$", one.title)}
        if cut_short:
            epochs = " or ".join(map(str, sorted(cut_short)))
            yield f"{task}: trained for {epochs} epochs, not for the script's own number."
        yield from unequal_peers(everything)
        yield from better_peers(everything)
    yield from slow_files(found)
    for name, raw in found.items():
        load, cores = (raw["environment"].get(key) or 0 for key in ("load", "cores"))
        if load > max(cores, 1) and not name.startswith(WITHOUT_TIMES):
            yield f"{name} was measured on a busy machine (load {load:.1f}, {cores or 'unknown'} cores)."


def slow_files(found: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Say where latency does not follow: a line for each network, with all places it was timed in."""
    lost: dict[str, list[str]] = {}
    for engine in ("onnxruntime", "openvino"):
        for one in timed(found, engine):
            network = f"{one['network']} at {fewer_macs(one):.2f}x fewer MACs"
            where = f"{engine}, {processor(one)}"
            efficiency = speedup(one, "pruned", "dense") / fewer_macs(one)
            slower = speedup(one, "pruned", "pruned.int8")
            if efficiency < 0.8:
                line = f"{network}: of what the MACs promise, only this is gained"
                lost.setdefault(line, []).append(f"{efficiency:.0%} ({where})")
            if slower > 1:
                line = f"{network}: int8 makes the pruned network slower"
                lost.setdefault(line, []).append(f"{slower:.2f}x ({where})")
            for kind in peers_of(one).values():
                if (faster := speedup(one, kind, "pruned")) > 1:
                    line = f"{network}: {kind}, at {fewer_macs(one, kind):.2f}x fewer MACs, is faster"
                    lost.setdefault(line, []).append(f"{faster:.2f}x ({where})")
            if one["noisy"]:
                line = f"{network}: the machine was noisy, the dense file against itself was off by over 5 %"
                lost.setdefault(line, []).append(where)
    for line, places in lost.items():
        yield f"{line}: {'; '.join(places)}."


def not_measured(found: dict[str, dict[str, Any]], task: str) -> Iterator[str]:
    """List the rows that a task should have and has not; none of a task that has no row at all."""
    everything = runs_of(found, task)
    there = {(one.method, *one.budget) for one in everything}
    failed = found.get(f"accuracy_{task}", {}).get("config", {}).get("failed", {})
    there |= {tuple(title.split(", ")[:2]) for title in failed}
    wanted: list[tuple[str, ...]] = [("tuned",)]
    for macs in MACS.get(task, (0.5,)):
        wanted += [(method, f"macs{macs:g}") for method in ("structural", "torch-pruning", "small")]
    for zeros in ZEROS.get(task, ()):
        wanted += [(method, f"zeros{zeros:g}") for method in ("magnitude", "ModelPruning")]
    for row in wanted if everything else ():
        if row not in there:
            yield " at ".join(row)


def unequal_peers(everything: list[Runs]) -> Iterator[str]:
    """Say where what one would use instead was trained for less than ours, or is not as small."""
    ends = first(everything)
    for ours, theirs in (
        ("structural", "torch-pruning"),
        ("structural", "small"),
        ("magnitude", "ModelPruning"),
    ):
        for one in (one for one in ends if one.method == ours):
            for peer in (peer for peer in ends if (peer.method, peer.budget) == (theirs, one.budget)):
                if peer.epochs < one.epochs:
                    yield f"{one.task}: {peer.name} was trained for less long than {one.name}."
                if not peer.as_small_as(one):
                    times = f"{peer.fewer:.2f}x fewer MACs, not {one.fewer:.2f}x"
                    yield f"{one.task}: {peer.name} has {times}, as {one.name} has."


def better_peers(everything: list[Runs]) -> Iterator[str]:
    """Say where another way is better than channels taken by this package, at as few MACs; or no worse than
    its zeros, at as many, trained no longer.
    """
    for ours in everything:
        for peer in everything:
            lead = statistics.mean(peer.scores("float")) - statistics.mean(ours.scores("float"))
            same = ours.budget == peer.budget and peer.epochs <= ours.epochs
            if (ours.method, peer.method) == ("magnitude", "ModelPruning") and same and lead >= 0:
                how = f"better by {lead:.2f} points than" if lead else "as good as"
                yield f"{ours.task}: {peer.name} is {how} {ours.name}."
            if ours.method != "structural" or peer.method not in ("torch-pruning", "small"):
                continue
            if peer.fewer >= 0.98 * ours.fewer and lead > 0:
                yield f"{ours.task}: {peer.name} is better by {lead:.2f} points than {ours.name}."
