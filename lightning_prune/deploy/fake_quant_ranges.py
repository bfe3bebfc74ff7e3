"""The ranges of activations: observed while training, or learned from there on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_prune.deploy.fake_quant import Grid, steps_of

Reduce = Callable[[Tensor], Tensor]
"""Averages a tensor over all processes."""

_MEMORY = 0.99
_WARM_UP = 10
_RATE, _BETA1, _BETA2, _EPSILON = 1e-3, 0.9, 0.999, 1e-12


class Ranges:
    """Least and greatest value at each point of a network, by the point's name.

    Observed: the mean over the first batches and then a moving average of each batch's extremes (Jacob et al.
    2018, section 3.1). A batch is quantized with the ranges from before it, so that all processes agree.

    Learned: after ten batches the step goes on by gradient (Esser et al. 2020), the zero point stays.
    The step is not among the user's optimizer's parameters, whose groups LR schedulers, other callbacks and
    checkpoints count on. It follows its own Adam (Kingma & Ba 2015) on the step's logarithm, as Jain et al.
    2020, "Trained Quantization Thresholds", section 5.2, recommend: its updates are relative to the step,
    whatever the scale of the gradients.

    Args:
        grid: The integers.
        learned: Whether steps are learned.

    Example:
        >>> ranges = Ranges(Grid())
        >>> ranges.observe("input/0", torch.tensor([-1.0, 1.55]))
        >>> ranges.commit(["input/0"], lambda tensor: tensor)
        >>> [round(float(value), 6) for value in ranges.steps("input/0")]
        [0.01, 100.0]
    """

    def __init__(self, grid: Grid, learned: bool = False) -> None:
        self.grid = grid
        self.learned = learned
        self.ceilings: Mapping[str, float] = {}
        self.extremes: dict[str, Tensor] = {}
        self.batches: dict[str, int] = {}
        self.steps_taken: dict[str, int] = {}
        self.logs: dict[str, Tensor] = {}
        self.zeros: dict[str, Tensor] = {}
        self.moments: dict[str, Tensor] = {}
        self._pending: dict[str, list[Tensor]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave the gradients' graph behind: a copy is a copy of the values."""
        logs = {name: log.detach().clone().requires_grad_() for name, log in self.logs.items()}
        return {**self.__dict__, "logs": logs, "_pending": {}}

    def __contains__(self, point: object) -> bool:
        return point in self.extremes

    # ------------------------------------------------------------------ use

    def observe(self, point: str, x: Tensor) -> None:
        """Note the extremes of a batch."""
        if x.numel():
            low, high = torch.aminmax(x.detach())
            self._pending.setdefault(point, []).append(torch.stack([low, high]).float())

    def steps(self, point: str) -> tuple[Tensor, Tensor] | None:
        """Return a point's scale and zero point, `None` if nothing is known about it yet."""
        if point in self.logs:
            scale, zero = self.logs[point].exp(), self.zeros[point]
            ceiling = self.ceilings.get(point)
            if ceiling is not None:
                scale = torch.minimum(scale, ceiling / (self.grid.high - zero))
            return scale, zero
        found = self.extremes.get(point)
        if found is None:
            pending = self._pending.get(point)
            if not pending:
                return None
            found = pending[0]
        return steps_of(found[0], found[1], self.grid)

    def limits(self, point: str) -> tuple[float, float]:
        """Return the least and greatest value that a point's grid can express."""
        steps = self.steps(point)
        assert steps is not None
        scale, zero = (float(value.detach()) for value in steps)
        return (self.grid.low - zero) * scale, (self.grid.high - zero) * scale

    def to(self, device: torch.device) -> None:
        """Move everything to where the network is."""
        for table in (self.extremes, self.zeros, self.moments):
            table.update({name: tensor.to(device) for name, tensor in table.items()})
        self.logs = {name: log.detach().to(device).requires_grad_() for name, log in self.logs.items()}

    # ------------------------------------------------------------------ following the training

    def commit(self, points: Iterable[str], reduce: Reduce) -> None:
        """Let what was observed since the last time count, but for batches with infinities.

        Args:
            points: All points, the same on all processes; one that was not passed on each of them does not
                count this time.
            reduce: Averages over processes.
        """
        names = sorted(points)
        some = next(iter(self._pending.values()), [None])[0]
        if not names or some is None:
            return
        none = [torch.full_like(some, torch.nan)]
        news = reduce(torch.stack([torch.stack(self._pending.get(n, none)).mean(0) for n in names]))
        self._pending = {}
        for name, new, finite in zip(names, news.unbind(), news.isfinite().all(1).tolist(), strict=True):
            if not finite:
                continue
            count = self.batches.get(name, 0)
            old = self.extremes.get(name, new)
            share = max(1.0 / (count + 1), 1.0 - _MEMORY)
            self.extremes[name] = old + (new - old) * share
            self.batches[name] = count + 1
            if self.learned and name not in self.logs and self.batches[name] >= _WARM_UP:
                low, high = self.extremes[name].unbind()
                scale, zero = steps_of(low, high, self.grid)
                self.logs[name] = scale.log().requires_grad_()
                self.zeros[name] = zero
                self.moments[name] = torch.zeros(2, device=scale.device)
                self.steps_taken[name] = 0

    @torch.no_grad()
    def learn(self, reduce: Reduce, loss_scale: float = 1.0) -> None:
        """Take one step with the gradients that have come together, and clear them.

        Args:
            reduce: Averages over processes.
            loss_scale: What the loss was multiplied with (mixed precision in 16 bits).
        """
        names = sorted(self.logs)
        if not names:
            return
        logs = [self.logs[name] for name in names]
        found = [torch.zeros_like(log) if log.grad is None else log.grad for log in logs]
        gradients = reduce(torch.stack(found))
        for name, log, gradient in zip(names, logs, (gradients / loss_scale).unbind(), strict=True):
            log.grad = None
            if not torch.isfinite(gradient):
                continue
            self.steps_taken[name] = count = self.steps_taken[name] + 1
            first, second = self.moments[name].unbind()
            first = _BETA1 * first + (1 - _BETA1) * gradient
            second = _BETA2 * second + (1 - _BETA2) * gradient**2
            self.moments[name] = torch.stack([first, second])
            step = first / (1 - _BETA1**count) / ((second / (1 - _BETA2**count)).sqrt() + _EPSILON)
            log.sub_(_RATE * step)

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Return everything as tensors on the CPU and plain values."""
        tables = {"extremes": self.extremes, "zeros": self.zeros, "moments": self.moments, "logs": self.logs}
        state: dict[str, Any] = {
            key: {name: tensor.detach().cpu().clone() for name, tensor in table.items()}
            for key, table in tables.items()
        }
        return {**state, "batches": dict(self.batches), "steps_taken": dict(self.steps_taken)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned."""
        self.extremes, self.zeros, self.moments = (
            dict(state[key]) for key in ("extremes", "zeros", "moments")
        )
        self.logs = {name: log.clone().requires_grad_() for name, log in state["logs"].items()}
        self.batches, self.steps_taken = dict(state["batches"]), dict(state["steps_taken"])
        self._pending = {}
