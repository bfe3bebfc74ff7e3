"""Proving on a copy that a cut is right, before the real network is touched.

A channel may go only where nothing but its consumers' weights would notice. So the network with the channels
removed must compute what the network computes with those weights set to zero.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lightning_prune.cost import copied, countable, skeleton
from lightning_prune.structure.graph import leaves_of
from lightning_prune.structure.groups import Group, Member
from lightning_prune.structure.layers import attributes_of, is_masked_norm
from lightning_prune.structure.modes import running
from lightning_prune.structure.surgery import apply, change_for, copied_cut, get_tensor
from lightning_prune.structure.weight_norms import silence, weight_normed

TOLERANCE = 1e-5


def prove(
    module: nn.Module, groups: list[Group], args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None
) -> list[Group]:
    """Protect every group whose removal would change more than it should.

    Args:
        module: The network; nothing in it changes.
        groups: Its channel groups.
        args: Positional example inputs.
        kwargs: Keyword example inputs.

    Returns:
        The same groups, those that failed with a reason.

    Example:
        >>> class Halved(nn.Sequential):
        ...     def forward(self, x):
        ...         left, right = self[0](x).split(2, 1)
        ...         return self[1](left), right.sum((2, 3))
        >>> from lightning_prune.structure.graph import trace
        >>> net, x = Halved(nn.Conv2d(1, 4, 1), nn.Conv2d(2, 2, 1)), torch.rand(1, 1, 3, 3)
        >>> [bool(group.reason) for group in prove(net, trace(net, (x,)), (x,))]
        [True, True]
    """
    free = [group for group in groups if not group.reason]
    if not free:
        return groups
    with repeatable():
        trial = Trial(module, args, dict(kwargs or {}), free[0].modes)

        def right(suspects: list[Group]) -> bool:
            return trial.error(groups, _halves(suspects)) <= TOLERANCE

        failed = set()
        if not right(free):
            # Whether it runs is seen without computing anything, so that comes first.
            failed = _failures(lambda suspects: trial.runs(groups, _halves(suspects)), free)
            failed |= _failures(right, [group for group in free if group.name not in failed])
    reason = "its removal changes what the network computes; something other than a layer uses its channels"
    return [replace(group, reason=reason) if group.name in failed else group for group in groups]


def failing(
    module: nn.Module,
    groups: list[Group],
    kept: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
) -> set[str]:
    """Find the groups because of which a cut would change more than it should.

    Args:
        module: The network; nothing in it changes.
        groups: Its channel groups.
        kept: The cut: `{group name: kept channels}`.
        args: Positional example inputs.
        kwargs: Keyword example inputs.

    Returns:
        Their names; empty if the cut is right.
    """
    with repeatable():
        trial = Trial(module, args, dict(kwargs or {}), groups[0].modes)

        def passes(suspects: list[Group]) -> bool:
            return trial.error(groups, {g.name: kept[g.name] for g in suspects}) <= TOLERANCE

        return _failures(passes, [group for group in groups if group.name in kept])


def _failures(passes: Callable[[list[Group]], bool], suspects: list[Group], tries: int = 80) -> set[str]:
    """Find the groups that do not pass, by halving; after so many tries, all that are still suspected."""
    left = [tries]

    def tried(groups: list[Group]) -> bool:
        left[0] -= 1
        return left[0] >= 0 and passes(groups)

    return _halved(tried, suspects)


def _halved(passes: Callable[[list[Group]], bool], suspects: list[Group]) -> set[str]:
    if not suspects or passes(suspects):
        return set()
    if len(suspects) == 1:
        return {suspects[0].name}
    middle = len(suspects) // 2
    failed = _halved(passes, suspects[:middle]) | _halved(passes, suspects[middle:])
    left = [group for group in suspects if group.name not in failed]
    if failed and passes(left):
        return failed
    kept: list[Group] = []  # each may go, but not all as they please: the earlier ones may
    for group in left:
        if passes([*kept, group]):
            kept.append(group)
        else:
            failed.add(group.name)
    return failed


def _halves(groups: Iterable[Group]) -> dict[str, Tensor]:
    """Keep a part of each group that is neither its first channels nor every second one.

    The parts differ in size, so that groups which must shrink alike are found out.
    """
    kept = {}
    for place, group in enumerate(groups):
        atoms = []
        part = 0.35 + 0.35 * (place * 0.618 % 1)
        for block in range(group.blocks):
            here = (group.block == block).nonzero().flatten()
            order = torch.randperm(len(here), generator=torch.Generator().manual_seed(len(here)))
            atoms.append(here[order[: max(1, int(len(here) * part))]])
        kept[group.name] = group.channels_of(torch.cat(atoms))
    return kept


@contextlib.contextmanager
def repeatable() -> Iterator[None]:
    """Run trials so that two of them agree, and leave no trace of them."""
    # Attention's fused kernel runs in the uncut network only, and differently.
    with torch.random.fork_rng(devices=[]), countable(real=False), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a trial run of a copy complains of is not the user's concern
        torch.manual_seed(0)
        yield


class Trial:
    """A copy of a network, made ready to have cuts tried on it.

    Args:
        module: The network; nothing in it changes.
        args: Positional example inputs.
        kwargs: Keyword example inputs.
        modes: Whether it is to be run in eval mode only, or as in training too.
    """

    def __init__(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        modes: tuple[bool, ...] = (False, True),
    ) -> None:
        self._source = (module, args, kwargs)
        self.modes = modes
        self._prepare(None)

    @functools.cached_property
    def _skeleton(self) -> nn.Module | None:
        """The network without numbers, if it runs like that."""
        network = skeleton(self.reference)
        try:
            self._run_on_meta(network)
        except Exception:  # noqa: BLE001 - user code may refuse meta tensors in any way; only real runs tell then
            return None
        return network

    def _on_meta(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = tree_map_only(Tensor, lambda t: t.to("meta"), (self.args, self.kwargs))
        return args, kwargs

    def _run_on_meta(self, network: nn.Module) -> None:
        args, kwargs = self._on_meta()
        for training in self.modes:
            with running(network, training):
                network(*args, **kwargs)

    def runs(self, groups: list[Group], kept: Mapping[str, Tensor]) -> bool:
        """Tell whether a cut network runs at all, as far as that can be told without computing."""
        if self._skeleton is None:
            return True
        try:
            network = copied(self._skeleton)
            apply(network, change_for(network, groups, kept))
            self._run_on_meta(network)
        except Exception:  # noqa: BLE001 - that is what is asked
            return False
        return True

    def _prepare(self, dtype: torch.dtype | None) -> None:
        module, args, kwargs = self._source
        self.dtype = dtype
        awake = copied(module)
        for parameter in awake.parameters():
            # A zero, such as the scale a residual branch starts with, would hide whatever is behind it.
            if parameter.is_floating_point() and not bool(parameter.all()):
                noise = torch.randn_like(parameter).mul_(0.1)
                parameter.copy_(torch.where(parameter == 0, noise, parameter))
        if dtype is not None:
            awake.to(dtype)

        def prepare(tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point():
                return tensor
            tensor = tensor if tensor.std(correction=0) > 0 else torch.randn_like(tensor)
            return tensor.to(dtype) if dtype is not None else tensor

        self.args, self.kwargs = tree_map_only(Tensor, prepare, (args, kwargs))
        _wake(awake, self.args, self.kwargs)
        # What that run left behind, such as a cache of masks, is not for a network of another width.
        pairs = zip(_state(module), _state(awake), strict=True)
        self.reference = copied(module, {id(theirs): ours for theirs, ours in pairs})

    def error(self, groups: list[Group], kept: Mapping[str, Tensor]) -> float:
        """Measure how far a cut network is from the one whose consumers of the removed channels are zero.

        Args:
            groups: The network's channel groups.
            kept: `{group name: kept channels}`.

        Returns:
            The largest difference of any output relative to its largest value, in float64 if the network's
            own precision leaves doubt; infinite where the cut network does not run.
        """
        error = self._error(groups, kept)
        if TOLERANCE < error < float("inf") and self.dtype is None:
            try:
                self._prepare(torch.float64)
            except Exception:  # noqa: BLE001 - a network may insist on its own dtype; then that one decides
                self._prepare(None)
            error = self._error(groups, kept)
        return error

    def _error(self, groups: list[Group], kept: Mapping[str, Tensor]) -> float:
        worst = 0.0
        try:
            cut = copied_cut(self.reference, change_for(self.reference, groups, kept))
            masked = _silenced(self.reference, groups, kept)
            for training in self.modes:
                try:
                    expected = self._run(masked, training)
                except Exception:
                    if not training:
                        raise
                    break  # it needs more than these inputs in training, such as detection targets
                error = distance(expected, self._run(cut, training))
                if error > TOLERANCE and training and distance(expected, self._run(masked, training)) > 0:
                    break  # no two runs of it agree, as where it draws from other generators
                worst = max(worst, error)
        except Exception:  # noqa: BLE001 - a cut network that does not run is as wrong as can be
            return float("inf")
        return worst

    def _run(self, network: nn.Module, training: bool) -> Any:
        # Every run starts from the same random state: networks may draw numbers in eval mode too.
        torch.manual_seed(0)
        with running(network, training):
            return network(*self.args, **self.kwargs)


def _state(module: nn.Module) -> list[Tensor]:
    """List the parameters and buffers of a network, each once."""
    return [*module.parameters(), *module.buffers()]


def _wake(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Give batch normalisation the statistics of these inputs, or a ReLU behind it may let nothing pass."""

    def calibrate(norm: Any, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].transpose(0, min(1, inputs[0].dim() - 1)).flatten(1)
        norm.running_mean.copy_(x.mean(1) if x.shape[1] > 1 else torch.zeros_like(norm.running_mean))
        norm.running_var.copy_(x.var(1) if x.shape[1] > 1 else x.square().mean(1) + 1)

    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    handles = [n.register_forward_pre_hook(calibrate) for n in norms if n.running_mean is not None]
    if not handles:
        return
    try:
        with running(module, training=False):
            module(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()


def distance(expected: Any, actual: Any) -> float:
    """Return the largest difference between outputs, relative to each output's largest value."""
    worst = 0.0
    pairs = zip(_tensors(expected), _tensors(actual), strict=True)
    for left, right in pairs:
        if left.shape != right.shape:
            return float("inf")
        if not left.numel() or not left.is_floating_point():
            continue
        scale = left.abs().max().clamp_min(torch.finfo(left.dtype).tiny)
        distance = float(((left - right).abs().max() / scale).item())
        worst = max(worst, distance if distance == distance else float("inf"))
    return worst


def _tensors(out: Any) -> list[Tensor]:
    return [leaf for leaf in leaves_of(out) if isinstance(leaf, Tensor)]


def _silenced(module: nn.Module, groups: Iterable[Group], kept: Mapping[str, Tensor]) -> nn.Module:
    """Copy a network, and make the consumers of the removed channels ignore them."""
    stay: dict[str, Tensor] = {}
    silent: list[tuple[Member, Tensor]] = []
    for group in groups:
        for member in group.members if group.name in kept else ():
            gone = member.position[~torch.isin(member.channel, kept[group.name])]
            if not gone.numel() or "@" in member.tensor:
                continue
            if member.reads:
                silent.append((member, gone))
            owner = member.tensor.rstrip("#") if "#" in member.tensor else member.tensor.rpartition(".")[0]
            if is_masked_norm(module.get_submodule(owner)):
                width = _width(module, member)
                stay.setdefault(owner, torch.ones(width, dtype=torch.bool))[gone] = False
    # Parameters that nothing is written into are shared with the copy.
    memo: dict[int, Any] = {id(parameter): parameter for parameter in module.parameters()}
    sizes = {one.direction: one.size for one in weight_normed(module)}
    for member, _ in silent:
        for name in (member.tensor, sizes.get(member.tensor, member.tensor)):
            memo.pop(id(get_tensor(module, name)), None)
    network = copied(module, memo)
    for member, gone in silent:
        weight = get_tensor(network, member.tensor)
        if member.tensor in sizes:
            silence(weight, get_tensor(network, sizes[member.tensor]), member.dim, gone)
        else:
            weight.index_fill_(member.dim, gone, 0.0)
    for name, mask in stay.items():
        network.get_submodule(name).register_forward_hook(_masked_norm(mask))
    return network


def _width(module: nn.Module, member: Member) -> int:
    if not member.tensor.endswith("#"):
        return get_tensor(module, member.tensor).shape[member.dim]
    width = next(iter(attributes_of(module.get_submodule(member.tensor[:-1])).values()))
    return width if isinstance(width, int) else width[-1]


def _masked_norm(mask: Tensor) -> Any:
    """Replace a normalisation over channels (or over all but the batch) by the same over what stays."""

    def hook(layer: Any, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        x = inputs[0]
        for dim in (1,) if isinstance(layer, nn.GroupNorm) else (-1, 1):
            # A kind of layer of the user's may find its channels elsewhere, and do more than normalise.
            if x.shape[dim] == len(mask):
                whole = _normalised(layer, x, torch.ones_like(mask), dim)
                if torch.allclose(whole, output, rtol=1e-3, atol=1e-3):
                    return _normalised(layer, x, mask, dim)
        return output

    return hook


def _normalised(layer: Any, x: Tensor, mask: Tensor, dim: int) -> Tensor:
    x = x.movedim(dim, -1)
    dims = tuple(range(1, x.dim())) if isinstance(layer, nn.GroupNorm) else (-1,)
    rows = x[..., mask]
    eps = torch.finfo(x.dtype).eps if layer.eps is None else layer.eps
    if isinstance(layer, nn.RMSNorm):
        y = x * (rows.square().mean(dims, keepdim=True) + eps).rsqrt()
    else:
        spread = rows.var(dims, unbiased=False, keepdim=True)
        y = (x - rows.mean(dims, keepdim=True)) * (spread + eps).rsqrt()
    y = y if getattr(layer, "weight", None) is None else y * layer.weight
    y = y if getattr(layer, "bias", None) is None else y + layer.bias
    return y.movedim(-1, dim)
