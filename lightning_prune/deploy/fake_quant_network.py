"""Runs a network as its quantized file will run, while its parameters and modules stay what they are.

Hooks on the modules watch which of them runs; while one does, the torch functions it calls are watched, and
what the plan says is rounded. Nothing is replaced, so checkpoints, optimizers and averages see no difference.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from lightning_prune.deploy.calls import untouched_rng
from lightning_prune.deploy.fake_quant import Grid, fake_quantize, fake_quantize_weight
from lightning_prune.deploy.fake_quant_plan import Plan, plan
from lightning_prune.deploy.fake_quant_ranges import Ranges
from lightning_prune.deploy.fake_quant_trace import Calls, Recorder, Trace, argument, function_name
from lightning_prune.selection import matches


class FakeQuantized:
    """A network in which weights and activations are rounded.

    Args:
        grid: The integers.
        ranges: Those of the activations; they are observed when the network is in training.
        root: Dotted name of the network within the module it is attached in; "" is that module itself.
        include: Globs of the layers to quantize.
        exclude: Globs of layers to leave in float.

    Attributes:
        plan: What is rounded where; None until the network has run once.
    """

    def __init__(
        self,
        grid: Grid,
        ranges: Ranges,
        root: str = "",
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = (),
    ) -> None:
        self.grid = grid
        self.ranges = ranges
        self.root = root
        self.include, self.exclude = list(include), list(exclude)
        self.plan: Plan | None = None
        self._handles: list[Any] = []
        self._patched: tuple[nn.Module, Any] | None = None
        self._stack: list[str] = []
        self._mode: Calls | None = None
        self._alone = False
        self._when: Callable[[], bool] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy goes with a copy of the network, whose hooks call it; it is not running."""
        return {**self.__dict__, "_handles": [], "_patched": None, "_stack": [], "_mode": None}

    def chosen(self, name: str) -> bool:
        """Tell whether a layer is to be quantized."""
        return any(matches(name, glob) for glob in self.include) and not any(
            matches(name, glob) for glob in self.exclude
        )

    # ------------------------------------------------------------------ hooks

    def attach(self, module: nn.Module, when: Callable[[], bool] | None = None) -> None:
        """Round from now on; the network is looked at anew when it runs next.

        Args:
            module: The module that holds the network.
            when: Whether a call that comes now is to be rounded; None rounds all.
        """
        self.detach()
        self._when = when
        self.plan = None
        for name, part in module.named_modules():
            inside = not self.root or name.startswith(f"{self.root}.")
            if name == self.root:
                # No hook: Lightning sends steps through the module's `__call__` under DDP, and a user may
                # call `self.forward(x)`.
                own = vars(part).get("forward")
                forward = partial(self._forward, part, own)
                forward.__signature__ = inspect.signature(part.forward)  # type: ignore[attr-defined]
                vars(part)["forward"] = forward
                self._patched = part, own
            elif inside and not isinstance(part, torch.jit.ScriptModule):
                enter, leave = partial(self._enter, name), partial(self._leave, name)
                self._handles.append(part.register_forward_pre_hook(enter, prepend=True))
                self._handles.append(part.register_forward_hook(leave, always_call=True))

    def detach(self) -> None:
        """Leave no hook behind."""
        for handle in self._handles:
            handle.remove()
        if self._patched is not None:
            part, own = self._patched
            vars(part).pop("forward", None)
            if own is not None:
                vars(part)["forward"] = own
        self._handles, self._stack, self._patched = [], [], None
        self._stop()

    @property
    def attached(self) -> bool:
        """Whether a network is rounded now."""
        return self._patched is not None

    def _forward(self, network: nn.Module, own: Any, *args: Any, **kwargs: Any) -> Any:
        call = partial(type(network).forward, network) if own is None else own
        if self._mode is not None or not self._due():  # it is being looked at, or calls itself
            return call(*args, **kwargs)
        if self.plan is None:
            self.record(network, args, kwargs)
        assert self.plan is not None
        mode = self._rounding(self.plan, network)
        args, kwargs = at_positions((args, kwargs), self.plan.inputs, mode.round)
        self._start(mode, self.root)
        try:
            return call(*args, **kwargs)
        finally:
            self._stop()

    def _due(self) -> bool:
        return self._when is None or self._when()

    def _start(self, mode: Calls, name: str) -> None:
        self._mode, self._stack = mode, [name]
        mode.__enter__()  # type: ignore[no-untyped-call]

    def _stop(self) -> None:
        if self._mode is not None:
            self._mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
            self._mode = None

    def _enter(self, name: str, module: nn.Module, args: Any) -> None:
        if self._mode is None and self.plan is not None and self._due():
            # Called alone: by a step, or again by activation checkpointing.
            self._start(self._rounding(self.plan, module), name)
            self._alone = True
        elif self._mode is not None:
            self._stack.append(name)

    def _leave(self, name: str, module: nn.Module, args: Any, result: Any) -> None:
        if self._stack:
            self._stack.pop()
        if not self._stack and self._alone:
            self._alone = False
            self._stop()

    # ------------------------------------------------------------------ looking

    def record(self, module: nn.Module, args: Any, kwargs: Any) -> Trace:
        """Run the network once in evaluation, leaving everything as it is, and plan where it is rounded."""
        self.ranges.to(next((p.device for p in module.parameters()), torch.device("cpu")))
        args, kwargs = tree_map_only(Tensor, lambda tensor: tensor.detach().clone(), (args, dict(kwargs)))
        inputs = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        recorder = Recorder(lambda: self._stack[-1], inputs)
        with _as_it_was(module), torch.no_grad(), untouched_rng():
            self._start(recorder, self.root)
            try:
                result = module(*args, **kwargs)
            finally:
                self._stop()
        trace = recorder.finish(result)
        self.plan = plan(trace, self.chosen)
        self.ranges.ceilings = self.plan.ceilings
        return trace

    # ------------------------------------------------------------------ rounding

    def _rounding(self, plan: Plan, module: nn.Module) -> Rounding:
        look = self._observe if module.training else self._round
        return Rounding(lambda: self._stack[-1], plan, look, self.grid)

    def _round(self, point: str, x: Tensor) -> Tensor:
        steps = self.ranges.steps(point)
        return x if steps is None else fake_quantize(x, *steps, self.grid)

    def _observe(self, point: str, x: Tensor) -> Tensor:
        self.ranges.observe(point, x)
        return self._round(point, x)


class Rounding(Calls):
    """Rounds the weights of layers and the outputs of functions."""

    def __init__(
        self, where: Callable[[], str], plan: Plan, round: Callable[[str, Tensor], Tensor], grid: Grid
    ) -> None:
        super().__init__(where)
        self.plan = plan
        self.round = round
        self.grid = grid
        self.functions = plan.functions

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function as the plan says."""
        kwargs = kwargs or {}
        name, _ = function_name(func)
        if name not in self.functions:
            return func(*args, **kwargs)
        key = self.key(name)
        if key in self.plan.layers:
            factors = self.plan.factors(key, self.grid.per_channel)
            args, kwargs = with_weight(
                args, kwargs, lambda w: fake_quantize_weight(w, self.grid.weight, factors)
            )
        result = func(*args, **kwargs)
        points = self.plan.points.get(key)
        return result if points is None else at_positions(result, points, self.round)


def with_weight(args: Any, kwargs: Any, change: Callable[[Tensor], Tensor]) -> tuple[Any, Any]:
    """Change the weight among the arguments of a convolution or linear function."""
    weight = change(argument(args, kwargs, 1, "weight"))
    if len(args) > 1:
        return (args[0], weight, *args[2:]), kwargs
    return args, {**kwargs, "weight": weight}


def at_positions(result: Any, points: dict[int, str], round: Callable[[str, Tensor], Tensor]) -> Any:
    """Round some of the tensors that a function gave."""
    leaves, tree = tree_flatten(result)
    position = 0
    for index, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            if position in points:
                leaves[index] = round(points[position], leaf)
            position += 1
    return tree_unflatten(leaves, tree)


@contextmanager
def _as_it_was(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation, and put its modes and buffers back on leaving."""
    modes = [(part, part.training) for part in module.modules()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
