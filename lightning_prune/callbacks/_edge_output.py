"""What an export shows while it goes on, and what it writes to the user's own loggers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from threading import Event, Thread
from time import monotonic
from typing import Any

from lightning_prune._lightning import Trainer
from lightning_prune._pipeline import Progress
from lightning_prune.report.results import Report


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """Show the stages of an export as they go on."""
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    with Bar(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), transient=True) as bar:
        tasks: dict[str, Any] = {}

        def tell(stage: str, fraction: float) -> None:
            if stage not in tasks:
                for other in tasks.values():
                    bar.update(other, completed=1.0)
                tasks[stage] = bar.add_task(stage, total=1.0)
            bar.update(tasks[stage], completed=fraction)

        yield tell


@contextmanager
def still_at_work(tell: Callable[[str], None], what: str, every: float = 10.0) -> Iterator[None]:
    """Say again and again that something is going on, if it takes long.

    Args:
        tell: Says it; called in a thread of its own.
        what: What is going on, with how to do without it.
        every: Seconds until it is said for the first time, and twice as long each time after.
    """
    done, start = Event(), monotonic()

    def watch() -> None:
        wait = every
        while not done.wait(wait):
            tell(f"{what} ({monotonic() - start:.0f} s so far)")
            wait *= 2

    thread = Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def headlines(report: Report) -> dict[str, float]:
    """Return the numbers of a report that belong into a logger, as `edge/<variant>/<what>`."""
    found: dict[str, float] = {}
    for variant in report.variants:
        numbers: Mapping[str, Any] = {
            "bytes": variant.bytes,
            "compressed_bytes": variant.compressed_bytes,
            "parameters": variant.parameters,
            "nonzero": variant.nonzero,
            "macs": variant.macs,
            "p50_ms": variant.latency_ms.p50 if variant.latency_ms else None,
            "peak_memory_bytes": variant.peak_memory_bytes,
            **variant.metrics,
        }
        found.update({f"edge/{variant.name}/{k}": float(v) for k, v in numbers.items() if v is not None})
    return found


def log_headlines(trainer: Trainer, report: Report) -> None:
    """Write the headline numbers to the user's own loggers."""
    numbers = headlines(report)
    for logger in trainer.loggers:
        logger.log_metrics(numbers, step=trainer.global_step)
        logger.save()
