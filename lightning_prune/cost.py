"""What a network costs: parameters, non-zeros, and multiply-accumulates (MACs).

MACs are counted by PyTorch's own `FlopCounterMode` (two FLOPs to a MAC) over the operators that really run,
so functional calls, attention and recurrent layers are counted, and layers that do not run are not.
"""

from __future__ import annotations

import contextlib
import copy
import sys
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode


def count_parameters(module: nn.Module) -> int:
    """Count the parameters of a module, tied ones once.

    Args:
        module: Any module.

    Returns:
        The number of scalar parameters.

    Example:
        >>> count_parameters(nn.Linear(4, 2))
        10
    """
    return sum(parameter.numel() for parameter in module.parameters())


def count_nonzero(module: nn.Module) -> int:
    """Count the parameters of a module that are not zero, tied ones once.

    Args:
        module: Any module.

    Returns:
        The number of scalar parameters whose value is not 0 (`-0.0` counts as 0).

    Example:
        >>> layer = nn.Linear(4, 2, bias=False)
        >>> _ = layer.weight.data.fill_(1)[0, 0].zero_()
        >>> count_nonzero(layer)
        7
    """
    return sum(int(torch.count_nonzero(parameter)) for parameter in module.parameters())


def count_macs(module: nn.Module, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> int:
    """Count the multiply-accumulates of one forward pass in eval mode.

    Args:
        module: Any module; nothing in it changes.
        args: Positional inputs of its forward. Their batch size counts.
        kwargs: Keyword inputs of its forward.

    Returns:
        The MACs of that pass.

    Example:
        >>> count_macs(nn.Conv2d(3, 8, 3, padding=1), (torch.zeros(1, 3, 10, 10),))
        21600
    """
    return macs_by_module(module, args, kwargs)[""]


def macs_by_module(
    module: nn.Module, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
) -> dict[str, int]:
    """Count the multiply-accumulates of one forward pass in eval mode, for each submodule that runs.

    Args:
        module: Any module; nothing in it changes.
        args: Positional inputs of its forward. Their batch size counts.
        kwargs: Keyword inputs of its forward.

    Returns:
        `{qualified name: MACs}`; a module's count includes its children's, and `""` is the whole.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> macs_by_module(net, (torch.zeros(1, 4),))
        {'': 48, '0': 32, '2': 16}
    """
    counts, _ = _count(module, args, dict(kwargs or {}))
    root = type(module).__name__
    total = sum(counts.pop("Global", {}).values()) // 2
    named = {
        name.removeprefix(root).removeprefix("."): sum(ops.values()) // 2
        for name, ops in counts.items()
        if name != root
    }
    return {"": total, **{name: count for name, count in sorted(named.items()) if count}}


def macs_by_weight(
    module: nn.Module, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
) -> dict[str, int]:
    """Count the multiply-accumulates of one forward pass in eval mode, for each parameter they multiply by.

    Args:
        module: Any module; nothing in it changes.
        args: Positional inputs of its forward. Their batch size counts.
        kwargs: Keyword inputs of its forward.

    Returns:
        `{parameter: MACs}`; `""` is the whole, with products of activations, such as attention's.

    Example:
        >>> macs_by_weight(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), (torch.zeros(1, 4),))
        {'': 48, '0.weight': 32, '1.weight': 16}
    """
    return _count(module, args, dict(kwargs or {}))[1]


class _ByWeight(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the FLOPs of the operators that run, by the weight they multiply with."""

    def __init__(self, state: Mapping[str, torch.Tensor], formulas: Mapping[Any, Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.formulas = formulas
        # Views of a weight, such as its transpose, share its storage.
        self.names = {t.untyped_storage(): name for name, t in state.items() if t.dim() > 1}
        self.flops: dict[str, int] = {"": 0}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = without_numbers(func, args) or func(*args, **(kwargs or {}))
        formula = self.formulas.get(getattr(func, "overloadpacket", None))
        if formula is not None:
            flops = formula(*args, **(kwargs or {}), out_val=out)
            factors = [t for t in tree_leaves(args) if isinstance(t, torch.Tensor) and t.dim() > 1]
            weights = {self.names.get(t.untyped_storage(), "") for t in factors} - {""}
            self.flops[""] += flops
            if len(weights) == 1:
                name = weights.pop()
                self.flops[name] = self.flops.get(name, 0) + flops
        return out


def without_numbers(func: Any, args: tuple[Any, ...]) -> Any:
    """Run batch normalisation on meta tensors, of which PyTorch's own way takes a hundred times longer.

    Args:
        func: The operator.
        args: Its arguments.

    Returns:
        Its outputs; None if it is another operator, or changes its statistics.

    Example:
        >>> without_numbers(torch.ops.aten.relu.default, (torch.empty(1, device="meta"),)) is None
        True
    """
    name = getattr(getattr(func, "overloadpacket", None), "__name__", "")
    statistics = name in ("native_batch_norm", "cudnn_batch_norm", "_native_batch_norm_legit_no_training")
    if not statistics or not args[0].is_meta or (len(args) > 7 and args[5]):
        return None
    return torch.empty_like(args[0]), args[0].new_empty(0), args[0].new_empty(0)


_Counts = tuple[dict[str, dict[Any, int]], dict[str, int]]


def _count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Counts:
    # On copies, because modules may keep tensors that they make in a forward, such as anchors.
    try:
        return _counted(
            skeleton(module), *tree_map_only(torch.Tensor, lambda x: x.detach().to("meta"), (args, kwargs))
        )
    except Exception:  # noqa: BLE001 - user code may refuse meta tensors in any way; the real run decides
        return _counted(copied(module), args, kwargs)


def _counted(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Counts:
    # The counter wants a gradient function of every input, which a view of a parameter does not have here.
    module.requires_grad_(False)
    state = dict(module.named_parameters())
    counter = FlopCounterMode(display=False)
    with (
        eval_mode(module),
        torch.no_grad(),
        countable(real=not all(tensor.is_meta for tensor in state.values())),
        _ByWeight(state, counter.flop_registry) as spent,  # outside: it sees what the counter decomposed
        counter,
    ):
        module(*args, **kwargs)
    by_module = {name: dict(ops) for name, ops in counter.get_flop_counts().items()}
    return by_module, {name: flops // 2 for name, flops in spent.flops.items()}


def copied(module: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """Copy a module deeply; of one that was compiled, as the plain module.

    Args:
        module: Any module; nothing in it changes.
        memo: As for `copy.deepcopy`.

    Returns:
        The copy.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> copied(layer).weight is layer.weight
        False
    """
    memo = {} if memo is None else memo
    for child in module.modules():
        # What a layer has computed and keeps, as the old weight norm does, cannot be copied with its graph.
        kept = [
            value for value in vars(child).values() if isinstance(value, torch.Tensor) and not value.is_leaf
        ]
        memo.update({id(value): value.detach().clone() for value in kept})
    twin = copy.deepcopy(module, memo)
    for child in twin.modules():
        if "_orig_mod" in child._modules:
            continue  # what torch.compile put around a module: it made its methods anew for the copy
        # A method that was compiled on the instance is a closure over the original: the copy would run that.
        for name in [n for n, value in vars(child).items() if hasattr(value, "_torchdynamo_orig_callable")]:
            del child.__dict__[name]
        child.__dict__.pop("_compiled_call_impl", None)
    return twin


def skeleton(module: nn.Module) -> nn.Module:
    """Copy a module without its numbers: every tensor is on the meta device, ties are kept.

    Args:
        module: Any module; nothing in it changes.

    Returns:
        The copy, which takes no memory for its tensors.

    Example:
        >>> skeleton(nn.Linear(4, 2)).weight.device
        device(type='meta')
    """
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        meta = parameter.detach().to("meta")
        memo[id(parameter)] = nn.Parameter(meta, requires_grad=parameter.requires_grad)
    for buffer in module.buffers():
        memo[id(buffer)] = buffer.detach().to("meta")
    return copied(module, memo)


@contextlib.contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Put a module in eval mode and give every submodule its own mode back afterwards.

    Args:
        module: Any module.

    Example:
        >>> net = nn.Dropout()
        >>> with eval_mode(net):
        ...     net.training
        False
        >>> net.training
        True
    """
    modes = {child: child.training for child in module.modules()}
    for child in modes:
        child.training = False
    try:
        yield
    finally:
        for child, mode in modes.items():
            child.training = mode


@contextlib.contextmanager
def eager() -> Iterator[None]:
    """Run modules that were compiled with `torch.compile` as the plain modules they wrap.

    Example:
        >>> with eager():
        ...     tuple(nn.Linear(2, 1)(torch.zeros(1, 2)).shape)
        (1, 1)
    """
    # Importing the compiler takes seconds, and where it was never imported nothing is compiled.
    if "torch._dynamo" not in sys.modules:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextlib.contextmanager
def countable(*, real: bool) -> Iterator[None]:
    """Let attention and recurrent layers run as the plain operators they are made of.

    Args:
        real: Whether real tensors will run, not only meta tensors.
    """
    # Fused kernels hide their inner products from the counter: attention's fast path, and oneDNN's LSTM,
    # which exists on real tensors only.
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(eager())
            if real:
                stack.enter_context(warnings.catch_warnings())
                # Reading oneDNN's flags warns of a missing Intel GPU, which says nothing about this run.
                warnings.filterwarnings("ignore", message="TF32 acceleration on top of oneDNN")
                stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
