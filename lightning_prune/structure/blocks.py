"""Finding the blocks of a network that can go as a whole, and what can stand in their place.

A block is a residual module: without what it adds, its input passes on as it is, so an `nn.Identity` can
stand for it. Blocks of the same class whose shapes change (a stage's first, with a stride) can become a
convolution of kernel size 1, or a linear layer for tokens. Every exchange is tried on a copy first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.cost import copied
from lightning_prune.structure.costs import Example
from lightning_prune.structure.graph import leaves_of
from lightning_prune.structure.modes import running
from lightning_prune.structure.replaced import Bypass, build, put, replaced, spec_of
from lightning_prune.structure.residual import Call, first_tensor, repeatable, watch

REPLACEMENTS = ("auto", "identity", "cheaper")
_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_NONE_LEFT = "without it nothing would be left to train"


@dataclass(frozen=True)
class Block:
    """A module that can be exchanged as a whole.

    Attributes:
        name: Its qualified name.
        spec: What can stand in its place, see `structure.replaced`; empty if nothing can.
        reason: Why it stays, or empty.
        cheaper: The multiply-accumulates of one forward pass of what can stand in its place.
    """

    name: str
    spec: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""
    cheaper: int = 0

    @property
    def layer(self) -> Mapping[str, Any]:
        """What its first argument would go through, without a `Bypass` around it."""
        inner: Mapping[str, Any] = self.spec["children"][0] if "children" in self.spec else self.spec
        return inner

    @property
    def becomes(self) -> str:
        """What can stand in its place, in words.

        Example:
            >>> Block("a", spec_of(nn.Conv2d(4, 8, 1, stride=2))).becomes
            '1x1 convolution 4 -> 8, stride 2x2'
            >>> Block("a", spec_of(nn.Identity())).becomes
            'identity'
        """
        if self.reason:
            return "stays"
        kind, given = self.layer["kind"], self.layer["arguments"]
        if kind == "Identity":
            return "identity"
        if kind == "Linear":
            return f"linear {given['in_features']} -> {given['out_features']}"
        ones, stride = ("x".join(map(str, given[name])) for name in ("kernel_size", "stride"))
        moved = f", stride {stride}" if set(given["stride"]) != {1} else ""
        return f"{ones} convolution {given['in_channels']} -> {given['out_channels']}{moved}"


def find_blocks(
    module: nn.Module,
    example: Example,
    *,
    replacement: str = "auto",
    named: Sequence[str] = (),
    choose: Callable[[Iterable[str]], Iterable[str]] = lambda names: names,
) -> list[Block]:
    """Find the blocks of a network, and try each exchange on a copy.

    Args:
        module: The network; nothing in it changes.
        example: Its inputs.
        replacement: `"auto"`: an identity for residual blocks that keep their input's shape, else a layer
            that is fitted; `"identity"`: an identity or nothing; `"cheaper"`: a fitted layer for all.
        named: Modules that are blocks whatever they compute, unless they hold blocks.
        choose: Picks those that may go from the names of all blocks.

    Returns:
        The blocks in the order in which they run, those that stay with their reason.

    Example:
        >>> class Block(nn.Module):
        ...     def __init__(self, width):
        ...         super().__init__()
        ...         self.f = nn.Linear(width, width)
        ...     def forward(self, x):
        ...         return x + self.f(x).relu()
        >>> net, x = nn.Sequential(nn.Linear(2, 4), Block(4), Block(4), nn.Linear(4, 1)), torch.zeros(1, 2)
        >>> blocks = find_blocks(net, Example((x,), {}, ((x,), {})))
        >>> [(block.name, block.becomes) for block in blocks]
        [('1', 'identity'), ('2', 'identity')]
    """
    twin = copied(module)
    calls = watch(twin, *example.single)
    names = candidates(twin, calls, named)
    chosen = set(choose(names)) if names else set()
    left_out = "it is not selected"
    blocks = [
        describe(twin, name, calls, replacement) if name in chosen else Block(name, reason=left_out)
        for name in names
    ]
    return _prove(twin, blocks, example)


def candidates(module: nn.Module, calls: Sequence[Call], named: Sequence[str] = ()) -> list[str]:
    """List the modules that are blocks, none inside another.

    A residual module is a block unless the modules in it do all the adding (it is a mere row of them), or it
    holds several blocks. So is every other module of a block's class, and what is named.

    Args:
        module: The network.
        calls: What ran in it.
        named: Modules that are blocks whatever they compute, unless they hold blocks.

    Returns:
        Their names, in the order in which they run.
    """
    residual = {call.name: call for call in calls if call.residual and call.name}
    own = [
        name
        for name, call in residual.items()
        if any(not _under(place, residual, name) for place in call.sums) and _learns(module, name)
    ]
    units = {unit for name in own if not _inside(name, own) for unit in _units(name, own)}
    classes = {type(module.get_submodule(name)) for name in units} - {nn.Sequential, nn.ModuleList}
    order = dict.fromkeys(call.name for call in calls)
    known = dict(module.named_modules())
    alike = [name for name in order if name and type(known[name]) in classes]
    found: list[str] = []
    for name in (*(n for n in order if n in units), *alike):
        if name not in found and not _overlaps(name, found):
            found.append(name)
    # A name of what holds blocks means these; one of what is in a block means it instead of the block.
    asked: list[str] = []
    for name in named:
        if name and name in known and not any(_inside(other, [name]) for other in (*found, *asked)):
            asked = [other for other in asked if not _inside(name, [other])] + [name]
    found = [name for name in found if name not in asked and not _overlaps(name, asked)] + asked
    places = {name: place for place, name in enumerate(order)}
    return sorted(dict.fromkeys(found), key=lambda name: places.get(name, len(places)))


def _units(name: str, own: Sequence[str]) -> list[str]:
    """The block itself, or those in it if they are several."""
    inner = [other for other in own if _inside(other, [name])]
    units = [u for other in inner if not _inside(other, inner) for u in _units(other, inner)]
    return units if len(units) > 1 else [name]


def _overlaps(name: str, others: Sequence[str]) -> bool:
    return _inside(name, others) or any(_inside(other, [name]) for other in others)


def _inside(name: str, others: Iterable[str]) -> bool:
    return any(name.startswith(f"{other}.") for other in others)


def _under(place: str, residual: Mapping[str, Call], name: str) -> bool:
    """Whether a place is in a residual module that is inside the named one."""
    return any(_inside(other, [name]) and (place == other or _inside(place, [other])) for other in residual)


def _learns(module: nn.Module, name: str) -> bool:
    return next(module.get_submodule(name).parameters(), None) is not None


def describe(module: nn.Module, name: str, calls: Sequence[Call], replacement: str) -> Block:
    """Say what can stand in a module's place, or why nothing can.

    Args:
        module: The network.
        name: The module.
        calls: What ran in the network.
        replacement: See `find_blocks`.

    Returns:
        The block.
    """
    mine = [call for call in calls if call.name == name]
    if len(mine) != 1:
        return Block(name, reason=f"it runs {len(mine)} times in one forward pass")
    call, block = mine[0], module.get_submodule(name)
    out = first_tensor(call.out)
    if reason := _reason(module, name, block, call, out):
        return Block(name, reason=reason)
    assert call.x is not None
    assert out is not None
    same = out.shape == call.x.shape
    layer: nn.Module | None
    if same and (replacement == "identity" or (replacement == "auto" and call.residual)):
        layer, macs = nn.Identity(), 0
    elif replacement == "identity":
        return Block(name, reason="its output has another shape than its input")
    else:
        layer = _projection(call.x, out, block)
        if layer is None:
            return Block(name, reason="no 1x1 convolution or linear layer gives its output's shape")
        macs = out.numel() * next(layer.parameters()).shape[1]
    if call.arguments > 1 or call.keyword or not isinstance(call.out, Tensor):
        layer = Bypass(layer, 0 if isinstance(call.out, Tensor) else len(call.out))
    return Block(name, spec_of(layer), cheaper=macs)


def _reason(module: nn.Module, name: str, block: nn.Module, call: Call, out: Tensor | None) -> str:
    if call.x is None:
        return "its first argument is no tensor"
    if out is None:
        return f"it returns a {type(call.out).__name__}"
    if not isinstance(call.out, Tensor) and any(other is not None for other in call.out[1:]):
        return "it returns more than one tensor"
    if out.dtype != call.x.dtype:
        return "its output has another type than its input"
    if any(True for _ in replaced(block)):
        return "something in it was exchanged before"
    names = [n for n, child in module.named_modules(remove_duplicate=False) if child is block]
    if len(names) > 1:
        return f"it is {names[1 - names.index(name)]} too"
    mine = {id(p) for p in block.parameters()}
    for other, parameter in module.named_parameters(remove_duplicate=False):
        if id(parameter) in mine and not _inside(other, [name]):
            return f"it shares a weight with {other}"
    return ""


def _projection(x: Tensor, out: Tensor, block: nn.Module) -> nn.Module | None:
    """The cheapest layer that turns one shape into the other; a block without biases needs none."""
    bias = any(parameter.dim() == 1 for parameter in block.parameters())
    if x.dim() != out.dim() or x.dim() < 2:
        return None
    convolution: Any = _CONVOLUTIONS.get(x.dim() - 2)
    convolutions = [c for c in block.modules() if convolution is not None and isinstance(c, convolution)]
    if any(c.in_channels == x.shape[1] for c in convolutions):
        # The smallest stride that leaves so many positions; there is none where they get more.
        strides = [
            next((s for s in range(1, a + 1) if (a - 1) // s + 1 == b), 0)
            for a, b in zip(x.shape[2:], out.shape[2:], strict=True)
        ]
        if x.shape[0] != out.shape[0] or not all(strides):
            return None
        made: nn.Module = convolution(x.shape[1], out.shape[1], 1, tuple(strides), bias=bias, device="meta")
        return made
    if x.shape[:-1] != out.shape[:-1]:
        return None
    return nn.Linear(x.shape[-1], out.shape[-1], bias=bias, device="meta")


def _prove(module: nn.Module, blocks: list[Block], example: Example) -> list[Block]:
    """Protect the blocks whose exchange does something else than it should."""
    free = [block for block in blocks if not block.reason]
    with repeatable(), torch.enable_grad():
        reasons: dict[str, str] = {}
        passed = free
        if free and _trial(module, free, example):
            reasons = {block.name: reason for block in free if (reason := _trial(module, [block], example))}
            passed = []
            for block in (b for b in free if b.name not in reasons):
                if reason := _trial(module, [*passed, block], example):
                    reasons[block.name] = reason
                else:
                    passed.append(block)
    return [replace(block, reason=reasons.get(block.name, block.reason)) for block in blocks]


def _trial(module: nn.Module, blocks: Sequence[Block], example: Example) -> str:
    """Say what is wrong with exchanging these blocks; empty if nothing is.

    The network with the layers in place must compute what it computes when only the blocks' outputs are
    overruled by what those layers make of their inputs.
    """
    overruled, smaller = copied(module), copied(module)
    for block in blocks:
        layer = stand_in(overruled, block)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.fill_(1 / parameter[0].numel())
        overruled.get_submodule(block.name).register_forward_hook(overrule(layer), with_kwargs=True)
        put(smaller, block.name, copied(layer))
    try:
        wanted = _outputs(overruled, example)
        found = _outputs(smaller, example)
        if _runs(module, example):
            _outputs(smaller, example, training=True)
    except Exception as error:  # noqa: BLE001 - whatever a network raises, it does not run
        return f"the network does not run without it ({type(error).__name__}: {str(error)[:80]})"
    if not any(leaf.requires_grad for leaf in found) and any(p.requires_grad for p in module.parameters()):
        return _NONE_LEFT
    same = len(wanted) == len(found) and all(map(_close, wanted, found))
    return "" if same else "the network uses more of it than its output"


def _close(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.numel() == 0 or not a.is_floating_point():
        return torch.equal(a, b)
    scale = float(a.detach().abs().nan_to_num(posinf=0.0).max())
    return torch.allclose(a, b, rtol=1e-5, atol=1e-6 * (scale + 1), equal_nan=True)


def stand_in(module: nn.Module, block: Block) -> nn.Module:
    """Make what can stand in a block's place, of its type and on its device; its weights are not set.

    Args:
        module: The network.
        block: The block.

    Returns:
        The layer.
    """
    like = next(p for p in module.get_submodule(block.name).parameters() if p.is_floating_point())
    return build(block.spec).to(device=like.device, dtype=like.dtype)


def overrule(layer: nn.Module) -> Callable[..., Any]:
    """Make a forward hook that lets a layer speak for a block."""

    def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        return layer(*args, **kwargs)

    return hook


def _outputs(module: nn.Module, example: Example, training: bool = False) -> list[Tensor]:
    with running(module, training=training):
        out = module(*example.args, **example.kwargs)
    return [leaf for leaf in leaves_of(out) if isinstance(leaf, Tensor)]


def _runs(module: nn.Module, example: Example) -> bool:
    """Whether a network runs in training with its inputs alone; a detector needs targets."""
    try:
        return bool(_outputs(module, example, training=True))
    except Exception:  # noqa: BLE001 - it may refuse in any way
        return False
