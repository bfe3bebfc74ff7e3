"""Every exception lightning-prune raises on purpose.

::

    LightningPruneError
    ├── ConfigurationError (ValueError)   an argument is wrong
    │   ├── SelectionError                a name or glob matches nothing
    │   ├── ScheduleError                 a schedule does not fit the training
    │   └── BudgetError                   a budget cannot be reached
    ├── TracingError                      a module cannot be traced, or there is no example input
    ├── StrategyError                     the training strategy cannot be supported
    ├── CheckpointError                   a manifest is missing, foreign or corrupted
    ├── ExportError                       an export did not complete; earlier files are untouched
    │   ├── ParityError                   PyTorch and ONNX disagree
    │   ├── QuantizationError             a file could not be quantized
    │   ├── EvaluationError               the artifact could not be evaluated
    │   ├── ProfileError                  the latency profile did not complete
    │   └── OutputError (OSError)         a file or directory cannot be written
    ├── CompatibilityError                another library's internals are not as expected
    └── MissingDependencyError (ImportError)   an optional package is not installed

All of them say what was expected, what came, and what to do about it.

Example:
    >>> print(ConfigurationError.of("MagnitudePruning", "sparsity", "a fraction, 0 to 1", 80, "write 0.8"))
    MagnitudePruning: `sparsity` must be a fraction, 0 to 1, got 80; write 0.8.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from typing_extensions import Self


class LightningPruneError(Exception):
    """Base class of every error raised by this package."""


class ConfigurationError(LightningPruneError, ValueError):
    """An argument is wrong."""

    @classmethod
    def of(cls, owner: str, argument: str, expected: str, got: object, remedy: str = "") -> Self:
        """Build the message in the one form that all configuration errors share.

        Args:
            owner: The class or function that has the argument.
            argument: The argument's name.
            expected: What it must be.
            got: What it is.
            remedy: What to write instead, without the full stop.

        Returns:
            The exception, ready to be raised.

        Example:
            >>> str(ScheduleError.of("Schedule", "end", "at least `begin`", 0.1))
            'Schedule: `end` must be at least `begin`, got 0.1.'
        """
        tail = f"; {remedy.rstrip('.')}" if remedy else ""
        end = "" if tail.endswith("?") else "."
        return cls(f"{owner}: `{argument}` must be {expected}, got {got!r}{tail}{end}")


class SelectionError(ConfigurationError):
    """A name or glob matches nothing."""


class ScheduleError(ConfigurationError):
    """A schedule does not fit the training."""


class BudgetError(ConfigurationError):
    """A budget cannot be reached."""


class TracingError(LightningPruneError):
    """A module cannot be traced, or there is no example input to trace it with."""


class StrategyError(LightningPruneError):
    """The training strategy cannot be supported."""


class CheckpointError(LightningPruneError):
    """A checkpoint's manifest is missing, foreign or corrupted; nothing was loaded."""


class ExportError(LightningPruneError):
    """An export did not complete; the trained module and earlier files are untouched."""


class ParityError(ExportError):
    """PyTorch and ONNX Runtime disagree beyond the stated tolerance."""


class QuantizationError(ExportError):
    """A file could not be quantized."""


class EvaluationError(ExportError):
    """The exported file could not be evaluated by the validation loop."""


class ProfileError(ExportError):
    """The latency profile did not complete."""


class OutputError(ExportError, OSError):
    """A file or directory cannot be written."""


class CompatibilityError(LightningPruneError):
    """Another library's internals are not as this package expects them."""


class MissingDependencyError(LightningPruneError, ImportError):
    """An optional package is not installed."""

    @classmethod
    def of(cls, package: str, purpose: str, install: str) -> Self:
        """Build the message that names the package, what it is for, and how to install it.

        Example:
            >>> str(MissingDependencyError.of("matplotlib", "Schedule.plot()", "lightning-prune[plot]"))
            "Schedule.plot() needs matplotlib: pip install 'lightning-prune[plot]'."
        """
        return cls(f"{purpose} needs {package}: pip install '{install}'.")


def near_matches(name: str, known: Iterable[str], limit: int = 3) -> str:
    """Say which known names come nearest to a wrong one.

    Args:
        name: What the user wrote.
        known: What exists.
        limit: The most names to list.

    Returns:
        A sentence to append to a message.

    Example:
        >>> near_matches("backbon.*", ["backbone.0", "head"])
        "Did you mean 'backbone.0'?"
        >>> near_matches("zzz", ["backbone.0", "head"])
        'There are: backbone.0, head.'
        >>> near_matches("zzz", [])
        'There are none.'
    """
    names = list(known)
    close = get_close_matches(name, names, n=limit, cutoff=0.5)
    if close:
        return "Did you mean " + " or ".join(repr(c) for c in close) + "?"
    if not names:
        return "There are none."
    shown = ", ".join(names[:8])
    return f"There are: {shown}{', ...' if len(names) > 8 else ''}."
