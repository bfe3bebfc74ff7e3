"""When pruning happens and how far it has come: pure functions of time, with no hidden state.

A `Schedule` says *when* in words that fit any training (a window, a curve). `Schedule.plan` resolves it
against one training and gives a `Timeline`, which answers in epochs or optimizer steps. Both return a level
from 0 to 1, the part of the target that is to be reached; the callback multiplies it with its target. A level
is absolute: asking twice, resuming, or sanity checking changes nothing.

This module knows neither torch nor Lightning.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from lightning_prune.errors import MissingDependencyError, ScheduleError, near_matches

Curve = Literal["one_shot", "linear", "cubic", "cosine", "exponential", "one_cycle"]
Unit = Literal["fraction", "epoch", "step"]
Interval = Literal["epoch", "step"]


def one_shot(progress: float) -> float:
    """Do everything at once: `f(x) = 1`.

    Args:
        progress: The part of the window that has passed, 0 to 1.

    Returns:
        The part of the target to reach, 0 to 1.

    Example:
        >>> one_shot(0.0)
        1.0
    """
    return 1.0


def linear(progress: float) -> float:
    """Advance evenly: `f(x) = x` (TFMOT `PolynomialDecay` with `power=1`).

    Args:
        progress: The part of the window that has passed, 0 to 1.

    Returns:
        The part of the target to reach, 0 to 1.

    Example:
        >>> linear(0.25)
        0.25
    """
    return progress


def cubic(progress: float) -> float:
    """Prune much while there is much to spare, then ever less: `f(x) = 1 - (1 - x)^3`.

    Zhu & Gupta 2017, "To prune, or not to prune", equation 1; NNI calls it AGP, TFMOT `PolynomialDecay`.

    Args:
        progress: The part of the window that has passed, 0 to 1.

    Returns:
        The part of the target to reach, 0 to 1.

    Example:
        >>> cubic(0.5)
        0.875
    """
    return 1.0 - (1.0 - progress) ** 3


def cosine(progress: float) -> float:
    """Start and finish gently: `f(x) = (1 - cos(pi x)) / 2`.

    Loshchilov & Hutter 2017, "SGDR", equation 5, turned upside down.

    Args:
        progress: The part of the window that has passed, 0 to 1.

    Returns:
        The part of the target to reach, 0 to 1.

    Example:
        >>> cosine(1.0)
        1.0
    """
    return 0.5 * (1.0 - math.cos(math.pi * progress))


def exponential(progress: float) -> float:
    """Remove the same share of what is left each time: `f(x) = (1 - 10^-x) / (1 - 10^-1)`.

    The density decays geometrically, as in iterative magnitude pruning (Frankle & Carbin 2019) and SynFlow
    (Tanaka et al. 2020, algorithm 1, `rho^(k/n)`). For a target of 0.9 the density after a part `x` of the
    window is exactly `0.1^x`; other targets follow the same curve, scaled.

    Args:
        progress: The part of the window that has passed, 0 to 1.

    Returns:
        The part of the target to reach, 0 to 1.

    Example:
        >>> round(1 - 0.9 * exponential(0.5), 6) == round(0.1 ** 0.5, 6)
        True
    """
    return (1.0 - math.pow(10.0, -progress)) / 0.9


def one_cycle(progress: float) -> float:
    """Leave the network alone at first, prune in mid-course, then let it settle.

    `f(x) = (1 + e^(-a + b)) / (1 + e^(-a x + b))` with `a = 14` and `b = 6`: Hubens et al. 2021, "One-Cycle
    Pruning", with the defaults of its first author's library, fasterai. That curve is 0.0025 at 0; a window
    starts from nothing, so here `f(0) = 0`.

    Args:
        progress: The part of the window that has passed, 0 to 1.

    Returns:
        The part of the target to reach, 0 to 1.

    Example:
        >>> one_cycle(0.0), one_cycle(1.0)
        (0.0, 1.0)
    """
    if progress == 0.0:
        return 0.0
    return (1.0 + math.exp(-14.0 + 6.0)) / (1.0 + math.exp(-14.0 * progress + 6.0))


CURVES: dict[str, Callable[[float], float]] = {
    f.__name__: f for f in (one_shot, linear, cubic, cosine, exponential, one_cycle)
}


@dataclass(frozen=True)
class Schedule:
    """When pruning happens, and how fast it advances through its window.

    Events fall at the start of the epochs (or optimizer steps) from `begin` to `end`, both included. The last
    event is always at `end` and always reaches level 1, whatever the frequency. `one_shot` does everything at
    `begin` and ignores `end`.

    Attributes:
        curve: `"one_shot"`, `"linear"`, `"cubic"`, `"cosine"`, `"exponential"` or `"one_cycle"`; each is a
            function of this module, with its paper.
        begin: Start of the window, in `unit`.
        end: End of the window, in `unit`.
        unit: `"fraction"` of the training (0 to 1), `"epoch"` (from 0) or `"step"` (optimizer steps, from 0).
        interval: Whether the level moves at the start of an `"epoch"` or of an optimizer `"step"`.
        frequency: The level moves at every `frequency`-th epoch or step of the window.
        initial: The level at `begin`, 0 to 1.

    Raises:
        ScheduleError: If a value is unknown or out of its range.

    Example:
        >>> schedule = Schedule("cubic", begin=0.0, end=0.5)
        >>> schedule.level(0.5)
        0.875
        >>> timeline = schedule.plan(epochs=10, steps=None)
        >>> timeline.events
        (0, 1, 2, 3, 4, 5)
        >>> [round(timeline.level_at(epoch), 3) for epoch in range(7)]
        [0.0, 0.488, 0.784, 0.936, 0.992, 1.0, 1.0]
    """

    curve: Curve = "cubic"
    begin: float = 0.0
    end: float = 0.5
    unit: Unit = "fraction"
    interval: Interval = "epoch"
    frequency: int = 1
    initial: float = 0.0

    def __post_init__(self) -> None:
        self._check_choice("curve", tuple(CURVES))
        self._check_choice("unit", ("fraction", "epoch", "step"))
        self._check_choice("interval", ("epoch", "step"))
        for name in ("begin", "end", "initial"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ScheduleError.of("Schedule", name, "a finite number", value)
        if isinstance(self.frequency, bool) or not isinstance(self.frequency, int) or self.frequency < 1:
            raise ScheduleError.of("Schedule", "frequency", "a whole number from 1", self.frequency)
        if not 0.0 <= self.initial <= 1.0:
            raise ScheduleError.of("Schedule", "initial", "a level from 0 to 1", self.initial)
        self._check_window()

    def _check_choice(self, name: str, choices: tuple[str, ...]) -> None:
        value = getattr(self, name)
        if value not in choices:
            expected = "one of " + ", ".join(repr(c) for c in choices)
            remedy = near_matches(str(value), choices).rstrip(".")
            raise ScheduleError.of("Schedule", name, expected, value, remedy)

    def _check_window(self) -> None:
        bounds = ("begin",) if self.curve == "one_shot" else ("begin", "end")
        for name in bounds:
            value = getattr(self, name)
            if value < 0:
                raise ScheduleError.of("Schedule", name, "at least 0", value)
            if self.unit == "fraction" and value > 1:
                remedy = f"write unit='epoch' if {value:g} is an epoch, or unit='step'"
                raise ScheduleError.of("Schedule", name, "a fraction from 0 to 1", value, remedy)
            if value != int(value) and (self.unit == "step" or self.unit == self.interval):
                raise ScheduleError.of("Schedule", name, f"a whole {self.unit}", value)
        if len(bounds) == 2 and self.end < self.begin:
            raise ScheduleError.of("Schedule", "end", f"at least `begin` ({self.begin:g})", self.end)

    def level(self, progress: float) -> float:
        """Say how far pruning is after a part of the window has passed.

        `initial + (1 - initial) * curve(progress)`, as Zhu & Gupta 2017, equation 1, for a target of 1.

        Args:
            progress: The part of the window that has passed; values outside 0 to 1 are taken as 0 or 1.

        Returns:
            The part of the target to reach, 0 to 1.

        Example:
            >>> Schedule("linear", initial=0.5).level(0.5)
            0.75
        """
        x = min(max(float(progress), 0.0), 1.0)
        part = 1.0 if x == 1.0 else CURVES[self.curve](x)
        return min(self.initial + (1.0 - self.initial) * part, 1.0)

    def plan(self, *, epochs: int | None, steps: int | None, clamp: bool = False) -> Timeline:
        """Resolve the window against one training.

        A fraction `f` is the epoch (step) `floor(f * total)`, and at most the last one. A window in epochs
        with `interval="step"`, or the reverse, is converted with the average number of steps in an epoch; a
        step becomes the epoch that holds it.

        Args:
            epochs: How many epochs the training has, or None if that is not known.
            steps: How many optimizer steps the training has, or None if that is not known.
            clamp: Move a window that ends after the training into it instead of raising (for `fast_dev_run`).

        Returns:
            The timeline, in epochs or optimizer steps as `interval` says.

        Raises:
            ScheduleError: If the window ends after the training, or depends on a length that is not known.

        Example:
            >>> Schedule("linear", begin=1, end=3, unit="epoch").plan(epochs=4, steps=400).events
            (1, 2, 3)
            >>> Schedule("linear", 1, 3, "epoch", "step", frequency=80).plan(epochs=4, steps=400).events
            (100, 180, 260, 300)
        """
        total = epochs if self.interval == "epoch" else steps
        begin = self._resolve("begin", epochs, steps)
        end = begin if self.curve == "one_shot" else self._resolve("end", epochs, steps)
        if total is not None:
            last = max(total - 1, 0)
            if self.unit == "fraction" or clamp:
                begin, end = min(begin, last), min(end, last)
            elif end > last:
                self._refuse_late(last, total)
        return Timeline(schedule=self, interval=self.interval, begin=begin, end=end, frequency=self.frequency)

    def _resolve(self, name: str, epochs: int | None, steps: int | None) -> int:
        value: float = getattr(self, name)
        if self.unit == self.interval:
            return int(value)
        total = epochs if self.interval == "epoch" else steps
        other = steps if self.interval == "epoch" else epochs
        if total is None or (self.unit != "fraction" and not other):
            need = "max_epochs" if self.interval == "epoch" else "max_epochs or max_steps"
            remedy = f"set the Trainer's {need}, or give the window with unit='{self.interval}'"
            expected = f"in {self.interval}s when the length of the training is not known"
            raise ScheduleError.of("Schedule", "unit", expected, self.unit, remedy)
        ratio = total if self.unit == "fraction" else total / (other or 1)
        # A product such as 0.29 * 100 is 28.999999999999996; it means 29.
        return math.floor(value * ratio + 1e-9)

    def _refuse_late(self, last: int, total: int) -> None:
        name = "begin" if self.curve == "one_shot" else "end"
        plural = f"{self.interval}{'' if total == 1 else 's'}"
        expected = f"inside the training, which has {total} {plural} (the last is {self.interval} {last})"
        remedy = "end the window earlier, train longer, or use unit='fraction'"
        raise ScheduleError.of("Schedule", name, expected, getattr(self, name), remedy)

    def plot(self, ax: Any = None) -> Any:
        """Draw the level over the window.

        Args:
            ax: The matplotlib axes to draw on; by default a new figure's.

        Returns:
            The axes.

        Raises:
            MissingDependencyError: If matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            extra = "lightning-prune[plot]"
            raise MissingDependencyError.of("matplotlib", "Schedule.plot()", extra) from error
        axes = Figure(figsize=(5, 3), layout="constrained").subplots() if ax is None else ax
        span = 1.0 if self.curve == "one_shot" else self.end - self.begin
        points = [i / 200 for i in range(201)]
        axes.plot([self.begin + x * span for x in points], [self.level(x) for x in points], label=self.curve)
        axes.set_xlabel({"fraction": "fraction of the training"}.get(self.unit, self.unit))
        axes.set_ylabel("level (fraction of the target)")
        axes.set_ylim(-0.02, 1.02)
        return axes


@dataclass(frozen=True)
class Timeline:
    """A schedule resolved against one training: which level is in force at which epoch or optimizer step.

    Attributes:
        schedule: What it was made from.
        interval: The unit of all times: `"epoch"` or `"step"` (optimizer steps), counted from 0.
        begin: Time of the first event.
        end: Time of the last event, which reaches level 1.
        frequency: Distance of the events between.

    Example:
        >>> schedule = Schedule("linear", 0, 10, unit="step", interval="step", frequency=4)
        >>> timeline = schedule.plan(epochs=1, steps=20)
        >>> timeline.events
        (0, 4, 8, 10)
        >>> timeline.level_at(7), timeline.is_event(7), timeline.level_at(19)
        (0.4, False, 1.0)
    """

    schedule: Schedule
    interval: Interval
    begin: int
    end: int
    frequency: int

    @property
    def events(self) -> tuple[int, ...]:
        """The times of all events, ascending; the last is `end`."""
        return (*range(self.begin, self.end, self.frequency), self.end)

    def is_event(self, time: int) -> bool:
        """Tell whether the level is set at the start of an epoch or step.

        Args:
            time: The epoch or optimizer step, from 0.

        Returns:
            Whether an event falls on it.
        """
        inside = self.begin <= time < self.end
        return time == self.end or (inside and (time - self.begin) % self.frequency == 0)

    def level_at(self, time: int) -> float:
        """Give the level in force at an epoch or step: that of the latest event at or before it.

        Args:
            time: The epoch or optimizer step, from 0.

        Returns:
            The part of the target, 0 to 1: 0 before the first event, 1 from the last event on.
        """
        if time < self.begin:
            return 0.0
        if time >= self.end:
            return 1.0
        latest = (time - self.begin) // self.frequency * self.frequency
        return self.schedule.level(latest / (self.end - self.begin))
