"""Following channels through one forward pass, operator by operator.

Every position of every dimension of every parameter and buffer gets a label of its own. As the network runs,
each tensor carries labels along with its values: what a view, a concatenation or a channel shuffle does to
the values it does to the labels; where an operator combines two labelled tensors, their labels become one
class; a product with a weight ends the labels it reads and begins the weight's own. What lives in one class
can only be removed together. An operator that is not known pins the labels it meets: they stay.

Labels are kept as *factors*: a tensor's factor is an int64 tensor of its rank, of size 1 along every
dimension on which its labels do not depend. Label 0 is none.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from lightning_prune.cost import without_numbers
from lightning_prune.structure.record import (
    DATA,
    PARAMETER,
    Event,
    Labels,
    Record,
    compress,
    new_labels,
    paired,
    shape_at,
    varying,
)


class Follower(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Carries labels along with every operator that runs.

    Args:
        record: Where findings go.
        rules: `{operator: rule}`; a rule takes the follower, the operator, its arguments and its outputs.
        fallback: The rule of operators that are not listed.
    """

    def __init__(
        self, record: Record, rules: Mapping[str, Callable[..., None]], fallback: Callable[..., None]
    ):
        super().__init__()  # type: ignore[no-untyped-call]
        self.record = record
        self.rules = rules
        self.fallback = fallback
        self.known: Any = WeakIdKeyDictionary()
        self.aside = 0
        self.order: list[str] = []

    # What rules work with.

    def of(self, tensor: Any) -> Labels:
        """Return what is known of a tensor."""
        found: Labels = self.known.get(tensor) or Labels()
        return found

    def give(self, tensor: Tensor, factors: Iterable[Tensor], source: int, *, view: bool = False) -> None:
        """Say what a tensor carries; labels that have become one for all of it are pinned."""
        kept = []
        for factor in factors:
            small = compress(factor, tuple(tensor.shape))
            if any(size > 1 for size in small.shape):
                kept.append(small)
            else:
                self.pin([small], "single channels of it are taken apart")
        self.known[tensor] = Labels(self._certain(kept), source, view, kept=self.of(tensor).kept)

    def _guessed(self, factor: Tensor) -> bool:
        return bool(self.record.guesses) and int(factor.max()) in self.record.guesses

    def _certain(self, factors: list[Tensor]) -> list[Tensor]:
        """Drop labels that may be no channels, where a view has laid them over others."""
        if len(factors) < 2 or not self.record.guesses:
            return factors
        guessed = [self._guessed(factor) for factor in factors]
        return [
            factor
            for at, factor in enumerate(factors)
            if not guessed[at] or not any(_overlap(factor, x) for x in factors if x is not factor)
        ]

    def write(self, tensor: Tensor, factors: list[Tensor], source: int) -> None:
        """Say what was written into a part of another tensor: that one learns of it, or it is pinned."""
        known = self.of(tensor)
        whole, dims = known.part or (tensor, ())
        if not dims or any(
            whole.shape[dims[d]] != tensor.shape[d] for factor in factors for d in varying(factor)
        ):
            self.pin(factors, "it is written into a part of another tensor")
            return
        shaped = []
        for factor in factors:
            shape = [1] * whole.dim()
            for dim in varying(factor):
                shape[dims[dim]] = factor.shape[dim]
            order = sorted(range(factor.dim()), key=lambda dim: dims[dim])
            shaped.append(factor.permute(order).reshape(shape))
        theirs = self.of(whole)
        self.give(whole, self.merge([theirs.factors, shaped], whole.dim()), max(theirs.source, source))
        self.known[whole].event = theirs.event

    def pin(self, factors: Iterable[Tensor], reason: str) -> None:
        """Make labels stay."""
        self.record.pins += [(factor.flatten(), reason) for factor in factors if factor.numel()]

    def unite(self, left: Tensor, right: Tensor) -> None:
        """Make labels one class, position by position, where both are labelled."""
        self.record.pairs += paired(left, right)

    def tie(self, factor: Tensor, dims: Sequence[int]) -> Tensor:
        """Make labels along some dimensions one class; what is left depends on the others only."""
        for dim in dims:
            if factor.shape[dim] > 1:
                best = factor.amax(dim, keepdim=True)
                self.record.ties += paired(factor, best)
                factor = best
        return factor

    def merge(self, lists: Iterable[list[Tensor]], rank: int) -> list[Tensor]:
        """Bring together the factors of tensors that are combined position by position."""
        merged: list[Tensor] = []
        for factors in lists:
            for factor in factors:
                factor = factor.reshape((1,) * (rank - factor.dim()) + tuple(factor.shape))
                for other in [other for other in merged if _overlap(other, factor)]:
                    merged = [m for m in merged if m is not other]
                    small, large = sorted((other, factor), key=lambda x: len(varying(x)))
                    if set(varying(small)) < set(varying(large)):
                        self.record.broadcasts.append((small, large))
                        factor = large
                        continue
                    self.unite(other, factor)
                    first, second = (factor, other) if self._guessed(other) else (other, factor)
                    factor = torch.where(first > 0, first, second)
                merged.append(factor)
        return merged

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operator, then its rule."""
        kwargs = dict(kwargs or {})
        name = func.overloadpacket.__name__
        out = without_numbers(func, args) or func(*args, **kwargs)
        if "dropout" not in name:  # it keeps everything here
            self.order.append(name)
        rule = self.rules.get(name) or self.rules.get(name.rstrip("_")) or self.fallback
        inputs = [self.of(tensor).event for tensor in tensors_in((args, kwargs))]
        since = self.record.mark()
        try:
            rule(self, func, args, kwargs, out)
        except Exception:  # noqa: BLE001 - a call that a rule does not foresee is one without a rule
            for tensor in tensors_in((args, kwargs)):
                self.pin(self.of(tensor).factors, f"it goes through {name}")
            for tensor in tensors_in(out):
                self.known[tensor] = Labels([], DATA)
        self._happened(func, args, kwargs, out, self.record.event(since, inputs))
        return out

    def _happened(
        self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any, event: Event | None
    ) -> None:
        outs = tensors_in(out)
        for tensor in outs:
            if (labels := self.known.get(tensor)) is not None:
                labels.event = event
        if event is None:
            return
        if func._schema.is_mutable:
            for place, argument in enumerate(func._schema.arguments):
                written = args[place] if place < len(args) else kwargs.get(argument.name)
                if argument.is_write and isinstance(written, Tensor):
                    labels = self.of(written)
                    labels.event = event
                    self.known[written] = labels
                    if (
                        labels.view or labels.kept
                    ):  # what it is a part of, or outlives the pass, depends on it
                        self.record.results.append(event)
        elif not outs and not self.aside:  # a number, of which anything may be made
            self.record.results.append(event)

    def found(self, tensors: Sequence[Tensor], since: tuple[int, ...]) -> None:
        """Say that these tensors take what was found out since a mark."""
        event = self.record.event(since, [self.of(tensor).event for tensor in tensors])
        for tensor in tensors:
            labels = self.of(tensor)
            labels.event = event
            self.known[tensor] = labels


def _overlap(left: Tensor, right: Tensor) -> bool:
    return any(a > 1 and b > 1 for a, b in zip(left.shape, right.shape, strict=True))


def tensors_in(values: Any) -> list[Tensor]:
    """List the tensors in nested arguments.

    Example:
        >>> len(tensors_in(([torch.zeros(1), 2], {"x": torch.zeros(1)})))
        2
    """
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def label(follower: Follower, name: str, tensor: Tensor, *, certain: bool = True) -> None:
    """Give a parameter or buffer labels of its own, for every dimension that could shrink.

    Args:
        follower: What carries them.
        name: The tensor's qualified name.
        tensor: The tensor.
        certain: Whether it is a layer's, and its dimensions are channels. Others may be tokens or places,
            which do not shrink but by what they meet.
    """
    factors = []
    for dim, size in enumerate(tensor.shape):
        if size > 1:
            labels = new_labels(follower.record, name, dim, size)
            factors.append(labels.view(shape_at(dim, tensor.dim(), size)))
            if not certain:
                follower.record.guesses |= set(labels.tolist())
    follower.give(tensor, factors, PARAMETER)
    follower.of(tensor).kept = True


def align_recurrent(module: nn.Module, follower: Follower, state: Mapping[str, Tensor]) -> None:
    """All layers and directions of a recurrent stack have one width: unit `j` goes in all of them."""
    for name, layer in module.named_modules():
        if not isinstance(layer, nn.RNNBase):
            continue
        for stem, dim in (("weight_hh", 1), ("weight_hr", 1)):
            leaves = [leaf for leaf, _ in layer.named_parameters(recurse=False) if leaf.startswith(stem)]
            factors = [follower.of(state[f"{name}.{leaf}" if name else leaf]).factors for leaf in leaves]
            labels = [next(x for x in one if x.shape[dim] > 1).flatten() for one in factors]
            for other in labels[1:]:
                follower.unite(labels[0], other)


@contextlib.contextmanager
def hooks_aside(module: nn.Module, follower: Follower) -> Iterator[None]:
    """Tell the follower when a forward hook runs: numbers that one takes are for its own use.

    Tensors that a hook computes count only if the forward goes on with them, as any do.
    """

    def begin(layer: nn.Module, inputs: Any, output: Any) -> None:
        follower.aside += 1

    def end(layer: nn.Module, inputs: Any, output: Any) -> None:
        follower.aside -= 1

    # Hooks of all modules run before a module's own, and those registered last run last.
    handles = [nn.modules.module.register_module_forward_hook(begin)]
    handles += [child.register_forward_hook(end) for child in module.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def hook_bare_norms(module: nn.Module, follower: Follower) -> list[Any]:
    """Let normalisation layers without parameters own labels too: they know their width as a number."""
    handles = []
    norms = (
        nn.LayerNorm,
        nn.GroupNorm,
        nn.modules.instancenorm._InstanceNorm,
        nn.modules.batchnorm._BatchNorm,
    )
    for name, layer in module.named_modules():
        if isinstance(layer, norms) and not any(True for _ in (*layer.parameters(), *layer.buffers())):
            handles.append(layer.register_forward_pre_hook(_own(follower, name)))
    return handles


def _own(follower: Follower, name: str) -> Callable[..., None]:
    labels: dict[int, Tensor] = {}

    def hook(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        x = inputs[0]
        dim = x.dim() - 1 if isinstance(layer, nn.LayerNorm) else min(1, x.dim() - 1)
        size = x.shape[dim]
        if size not in labels:
            labels[size] = new_labels(follower.record, f"{name}#", 0, size)
        for factor in follower.of(x).factors:
            if dim in varying(factor):
                rest = [d for d in varying(factor) if d != dim]
                follower.unite(follower.tie(factor, rest).flatten(), labels[size])

    return hook
