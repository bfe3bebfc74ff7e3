"""Deadlines under a competing load, with and without switching: `python benchmarks/elastic_load.py`.

Takes about four minutes. One fit on scikit-learn's digits leaves a family of networks (`ElasticFamily`).
Then batches of pictures come at a fixed rate to one core, on which after a while other processes work too,
and stop again. Served are, each in its own pass over the same schedule: the most costly file that is worth
having, the least costly, and `ElasticSession`. A batch that is not done within the deadline of its arrival
has missed it; the accuracy is that of the file that served it.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from common import environment, table, write
from lightning_prune.runtime import ElasticSession, Policy, Variant, read_family

HERE = Path(__file__).parent


def train(folder: Path, epochs: int) -> None:
    """Fit once, and leave a family in a folder."""
    sys.path.insert(0, str(HERE.parent / "examples" / "digits"))
    from digits import Digits, DigitsData
    from pytorch_lightning import Trainer, seed_everything

    from lightning_prune import Budget, EdgeExport, ElasticFamily, Schedule, StructuralPruning

    seed_everything(0)
    schedule = Schedule("linear", begin=0.1, end=0.8, frequency=max(1, epochs // 10))
    callbacks = [
        # Digits are easy: only very small networks have something to lose.
        StructuralPruning(Budget(macs=0.02), schedule=schedule, round_to=4, max_ratio=0.95),
        ElasticFamily([0.6, 0.35, 0.2]),
        EdgeExport(str(folder)),
    ]
    Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=callbacks
    ).fit(Digits(), datamodule=DigitsData())


def burn(core: int, stop: multiprocessing.synchronize.Event) -> None:
    """Work on a core until told to stop."""
    os.sched_setaffinity(0, {core})
    matrix = np.random.default_rng(0).standard_normal((128, 128))
    while not stop.is_set():
        matrix = np.tanh(matrix @ matrix.T)


def serve(
    session: ElasticSession, feed: dict[str, np.ndarray], config: argparse.Namespace
) -> dict[str, object]:
    """Serve batches as they arrive, through a quiet, a loaded and again a quiet time."""
    context, stop = multiprocessing.get_context("spawn"), None
    phases = {"quiet": config.seconds, "loaded": 2 * config.seconds, "quiet again": config.seconds}
    accuracy = {v.name: v.accuracy for v in config.family}
    found: dict[str, object] = {}
    for phase, seconds in phases.items():
        if phase == "loaded":
            stop = context.Event()
            others = [context.Process(target=burn, args=(config.core, stop)) for _ in range(config.others)]
            for other in others:
                other.start()
            time.sleep(2.0)  # they have to import numpy first
        late, right, served = [], [], {}
        begin = time.monotonic()
        for number in range(int(seconds * 1000 / config.period)):
            arrival = begin + number * config.period / 1000
            time.sleep(max(0.0, arrival - time.monotonic()))
            name = session.variant
            session.run(None, feed)
            late.append((time.monotonic() - arrival) * 1000 > config.deadline)
            right.append(accuracy[name])
            served[name] = served.get(name, 0) + 1
        found[phase] = {
            "batches": len(late),
            "missed": float(np.mean(late)),
            "accuracy": float(np.mean(right)),
            "served": served,
        }
        if phase == "loaded":
            stop.set()
            for other in others:
                other.join()
    return {**found, "switches": sum(session.metrics().get("switches_total", {}).values())}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", type=Path, help="where the elastic export is; trained if it is not there")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch", type=int, default=512, help="pictures in a batch")
    parser.add_argument("--seconds", type=float, default=8.0, help="length of the quiet times")
    parser.add_argument("--others", type=int, default=2, help="processes that compete for the core")
    parser.add_argument("--core", type=int, default=min(os.sched_getaffinity(0)))
    parser.add_argument(
        "--slack", type=float, default=2.0, help="the deadline, in quiet runs of the dense file"
    )
    config = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = config.family or Path(scratch)
        if not (folder / "elastic.json").exists():
            train(folder, config.epochs)
        measure(folder, config)


def measure(folder: Path, config: argparse.Namespace) -> None:
    """Serve a family in three ways, and write what came of it."""
    import json

    os.sched_setaffinity(0, {config.core})
    told = json.loads((folder / "elastic.json").read_text())
    values = {entry["name"]: entry["metrics"][told["metric"]] for entry in told["variants"]}
    variants = read_family(folder)
    if len(variants) < 2:
        raise SystemExit("one file beats all others in both accuracy and latency: there is nothing to switch")
    config.family = [argparse.Namespace(name=v.name, accuracy=values[v.name]) for v in variants]
    sample = np.load(folder / "samples.npz")
    name = next(key for key in sample.files if key.startswith("input|"))
    picture = sample[name]
    feed = {name.split("|")[1]: np.resize(picture, (config.batch, *picture.shape[1:]))}
    # What a run costs at this batch: in the report it is that of one picture.
    variants = [replace(v, cost=quiet_ms(v, feed)) for v in variants]
    quiet = max(v.cost for v in variants)
    config.deadline, config.period = config.slack * quiet, 1.25 * config.slack * quiet
    largest, smallest = max(variants, key=_cost), min(variants, key=_cost)
    ways = {f"{largest.name} only": [largest], f"{smallest.name} only": [smallest], "elastic": variants}
    policy = Policy(target_ms=config.deadline, up=0.7, dwell_s=1.0, window=20)
    found = {}
    for way, served in ways.items():
        with ElasticSession(served, policy=policy) as session:
            found[way] = serve(session, feed, config)
    rows = [
        [
            way,
            *(f"{100 * result[phase]['missed']:.1f} %" for phase in ("quiet", "loaded", "quiet again")),
            *(f"{100 * result[phase]['accuracy']:.2f}" for phase in ("quiet", "loaded", "quiet again")),
            int(result["switches"]),
        ]
        for way, result in found.items()
    ]
    head = ["served", "missed, quiet", "missed, loaded", "missed, quiet again"]
    head += [f"{told['metric']}, quiet", "loaded", "quiet again", "switches"]
    settings = {key: getattr(config, key) for key in ("batch", "seconds", "others", "slack", "epochs")}
    settings["quiet_ms"] = {v.name: round(v.cost, 3) for v in variants}
    settings |= {"deadline_ms": round(config.deadline, 3), "period_ms": round(config.period, 3)}
    text = [
        *table(head, rows),
        "",
        f"One core; a batch of {config.batch} pictures every {config.period:.1f} ms, to be done within "
        f"{config.deadline:.1f} ms of its arrival ({config.slack:g} quiet runs of {largest.name}). While "
        f"loaded, {config.others} other processes compute on the same core. {told['metric']} in percent.",
        "",
        "Weak spots: one machine and one network; the competitors have the same priority, and how the kernel "
        "shares a core between them decides most of what is missed.",
    ]
    write("elastic_load", settings, {"family": told, "ways": found}, text, about=environment())


def quiet_ms(variant: Variant, feed: dict[str, np.ndarray]) -> float:
    """Return the median time of a run of one file."""
    times = []
    with ElasticSession([variant]) as session:
        for _ in range(200):
            start = time.monotonic()
            session.run(None, feed)
            times.append((time.monotonic() - start) * 1000)
    return float(np.median(times))


def _cost(variant: Variant) -> float:
    return variant.cost


if __name__ == "__main__":
    main()
