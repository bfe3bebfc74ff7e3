"""What each operator does to the labels that `provenance` carries along."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from lightning_prune.structure.provenance import (
    DATA,
    PARAMETER,
    WILD,
    Follower,
    Labels,
    compress,
    shape_at,
    tensors_in,
    varying,
)

_SAME = ("detach", "alias", "clone", "contiguous", "lift_fresh", "_to_copy", "native_dropout", "dropout")
_MOVES = (
    "view", "_unsafe_view", "reshape", "_reshape_alias", "permute", "transpose", "t", "slice", "select",
    "unsqueeze", "squeeze", "expand", "split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes",
    "chunk", "unsafe_chunk", "unbind", "narrow", "flip", "roll", "repeat", "pixel_shuffle", "pixel_unshuffle",
    "channel_shuffle", "native_channel_shuffle", "diagonal", "movedim", "unfold", "constant_pad_nd", "index",
    "index_select", "gather", "tile", "repeat_interleave", "rot90", "swapaxes", "triu", "tril",
)  # fmt: skip
_VIEWS = (
    "view", "permute", "transpose", "t", "slice", "select", "unsqueeze", "squeeze", "expand", "split",
    "split_with_sizes", "unbind", "narrow", "diagonal", "alias", "detach", "unfold", "_reshape_alias",
)  # fmt: skip
_POINTWISE = (
    "prelu", "_prelu_kernel", "where", "copy", "fill", "zero", "bernoulli", "hardswish", "hardsigmoid",
    "hardtanh", "relu6", "rrelu_with_noise", "glu_jvp", "masked_fill", "lerp",
)  # fmt: skip
_REDUCTIONS = (
    "mean", "sum", "amax", "amin", "var", "std", "var_mean", "std_mean", "prod", "norm", "logsumexp", "max",
    "linalg_vector_norm", "min", "median", "any", "all", "argmax", "argmin", "nansum", "count_nonzero",
)  # fmt: skip
_ALONG = (
    "_softmax", "_log_softmax", "softmax", "log_softmax", "cumsum", "cumprod", "logcumsumexp", "sort",
    "topk", "renorm", "_safe_softmax",
)  # fmt: skip
_SPATIAL = re.compile(
    r"(pool|upsample|interpolate|pad|grid_sampl|im2col|col2im|affine_grid|roi_align|_upsample).*?(\d)d|im2col"
)


def same(f: Follower, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """The output carries what the input does."""
    known = f.of(args[0])
    for tensor in tensors_in(out):
        fits = tensor.shape == args[0].shape
        f.give(
            tensor, known.factors if fits else [], known.source, view=func.overloadpacket.__name__ in _VIEWS
        )


def move(f: Follower, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Views and copies that rearrange: the labels are rearranged alike."""
    known = f.of(args[0])
    outs = tensors_in(out)
    moved: list[list[Tensor]] = [[] for _ in outs]
    for factor in known.factors:
        try:
            results = tensors_in(_rearranged(func, factor.expand(args[0].shape), args[1:], kwargs))
        except RuntimeError:
            f.pin([factor], f"it goes through {func.overloadpacket.__name__}")
            continue
        for place, result in enumerate(results):
            moved[place].append(result)
    view = func.overloadpacket.__name__ in _VIEWS
    for tensor, factors in zip(outs, moved, strict=True):
        f.give(tensor, factors, known.source, view=view or known.view)


def _rearranged(func: Any, labels: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name = func.overloadpacket.__name__
    args = tree_map_only(Tensor, lambda tensor: tensor.to(labels.device), args)
    if name in ("view", "_unsafe_view", "reshape", "_reshape_alias"):
        return labels.reshape(args[0])
    if name == "constant_pad_nd":
        return func(labels, args[0], 0)
    return func(labels, *args, **kwargs)


def restride(f: Follower, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """`as_strided`: another memory format, or anything at all."""
    x = args[0]
    if tuple(args[1]) == tuple(x.shape):
        same(f, func, args, kwargs, out)
    else:
        other(f, func, args, kwargs, out)


def pointwise(f: Follower, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """What is combined position by position is one class."""
    inputs = tensors_in((args, kwargs))
    known = [f.of(tensor) for tensor in inputs]
    source = max((k.source for k in known), default=WILD)
    outs = tensors_in(out)
    if not outs:
        return
    rank = outs[0].dim()
    factors = f.merge((k.factors for k in known), rank)
    factors = [factor for factor in factors if any(size > 1 for size in factor.shape)]
    first = args[0] if args and isinstance(args[0], Tensor) else None
    into_view = first is not None and any(tensor is first for tensor in outs) and f.of(first).view
    if into_view and not _equal(f.of(first).factors, factors):
        # The tensor that this is a view of would have to learn of it.
        f.pin(factors, "it is written into a part of another tensor")
        return
    for tensor in outs:
        fits = [x for x in factors if x.dim() == tensor.dim()]
        f.give(tensor, fits, source, view=f.of(tensor).view)


def _equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(
        a.shape == b.shape and torch.equal(a, b) for a, b in zip(left, right, strict=True)
    )


def concatenate(f: Follower, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """Labels follow each other along the dimension, and are one class along the others."""
    parts = [t for t in args[0] if t.dim() == out.dim()]
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.dim()
    source = max(f.of(part).source for part in parts)
    along: list[Tensor] = []
    across: list[list[Tensor]] = []
    for part in parts:
        factors = f.of(part).factors
        mine = [x for x in factors if dim in varying(x)]
        across.append([x for x in factors if dim not in varying(x)])
        size = part.shape[dim]
        label = torch.zeros(shape_at(dim, out.dim(), size), dtype=torch.int64)
        for factor in f.merge([mine], out.dim()):
            label = factor
        along.append(label)
    shape = [max(x.shape[d] for x in along) for d in range(out.dim())]
    whole = torch.cat([x.expand(*shape[:dim], x.shape[dim], *shape[dim + 1 :]) for x in along], dim)
    f.give(out, [*([whole] if bool(whole.any()) else []), *f.merge(across, out.dim())], source)


def stack(f: Follower, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """As `concatenate`, along a new dimension."""
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.dim()
    source = max(f.of(part).source for part in args[0])
    ranked = [[x.unsqueeze(dim) for x in f.of(part).factors] for part in args[0]]
    if any(len(factors) > 1 for factors in ranked):
        f.give(out, f.merge(ranked, out.dim()), source)
        return
    labels = [
        factors[0] if factors else torch.zeros((1,) * out.dim(), dtype=torch.int64) for factors in ranked
    ]
    shape = [max(x.shape[d] for x in labels) for d in range(out.dim())]
    shape[dim] = 1
    whole = torch.cat([x.expand(shape) for x in labels], dim)
    f.give(out, [whole] if bool(whole.any()) else [], source)


def reduce(f: Follower, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """What is summed over must stay together."""
    x = args[0]
    dims = _dims(func, args, kwargs, x.dim())
    known = f.of(x)
    outs = tensors_in(out)
    left = []
    for factor in known.factors:
        factor = compress(f.tie(factor, dims), tuple(x.shape))
        if any(size > 1 for size in factor.shape):
            left.append(factor)
        else:
            f.pin([factor], f"{func.overloadpacket.__name__} mixes its channels")
    for tensor in outs:
        if tensor.dim() != x.dim():
            kept = [d for d in range(x.dim()) if d not in dims]
            shaped = [
                factor.permute(*kept, *dims).reshape([factor.shape[d] for d in kept]) for factor in left
            ]
        else:
            shaped = left
        f.give(tensor, [s for s in shaped if s.dim() == tensor.dim()], known.source)


def along(f: Follower, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """What is normalised, summed up or sorted along a dimension must stay together; the shape stays."""
    x, known = args[0], f.of(args[0])
    dims = _dims(func, args, kwargs, x.dim())
    for factor in known.factors:
        f.tie(factor, dims)
    for tensor in tensors_in(out):
        f.give(tensor, known.factors if tensor.shape == x.shape else [], known.source)


def gated(f: Follower, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """`glu`: the second half of a dimension gates the first."""
    x, known = args[0], f.of(args[0])
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", -1)) % x.dim()
    factors = []
    for factor in known.factors:
        if dim in varying(factor):
            first, second = factor.chunk(2, dim)
            f.unite(first, second)
            factor = first
        factors.append(factor)
    f.give(out, factors, known.source)


def _dims(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], rank: int) -> list[int]:
    value = kwargs.get("dim")
    for place, argument in enumerate(func._schema.arguments):
        if argument.name == "dim":
            value = args[place] if place < len(args) else kwargs.get("dim")
    if value is None or (isinstance(value, (list, tuple)) and not len(value)):
        return list(range(rank))
    return [d % max(1, rank) for d in (value if isinstance(value, (list, tuple)) else [value])]


def spatial(f: Follower, x: Tensor, out: Any, rank: int) -> None:
    """Pooling and resizing: the last `rank` dimensions are mixed, the others stay."""
    known = f.of(x)
    dims = list(range(x.dim() - rank, x.dim()))
    factors = [f.tie(factor, dims) for factor in known.factors]
    for tensor in tensors_in(out):
        f.give(tensor, [x for x in factors if x.dim() == tensor.dim()], known.source)


def vector(f: Follower, tensor: Tensor, dim: int) -> Tensor | None:
    """The labels along one dimension, shape (size,), with the other dimensions tied; None without any."""
    found = [x for x in f.of(tensor).factors if dim in varying(x)]
    if not found:
        return None
    first = f.tie(found[0], [d for d in varying(found[0]) if d != dim]).flatten()
    for other in found[1:]:
        f.unite(first, f.tie(other, [d for d in varying(other) if d != dim]).flatten())
    return first


def consume(f: Follower, x: Tensor, x_labels: Tensor | None, weight_labels: Tensor | None) -> None:
    """A product reads channels with a weight: the positions of both are one class."""
    if weight_labels is not None:
        f.record.read.append(weight_labels)
        if x_labels is None:
            if f.of(x).source != WILD:
                f.pin([weight_labels], "it reads an input of fixed width")
        else:
            f.unite(x_labels, weight_labels)
            loose = x_labels == 0
            if bool(loose.any()) and f.of(x).source != WILD:
                f.pin([weight_labels[loose]], "it reads an input of fixed width")
    elif x_labels is not None:
        f.pin([x_labels], "a matrix of fixed width reads its channels")


def contract(f: Follower, left: Tensor, right: Tensor, out: Tensor, spec: str) -> None:
    """Products of matrices, written as for `einsum`, such as `"bnk,bkm->bnm"`."""
    inputs, result = spec.split("->")
    letters = inputs.split(",")
    summed = next(letter for letter in letters[0] if letter in letters[1] and letter not in result)
    tensors = (left, right)
    sources = [f.of(t).source for t in tensors]
    weighty = PARAMETER in sources
    kept: list[list[Tensor]] = []
    if weighty:
        at = 1 if sources[1] == PARAMETER else 0
        read = vector(f, tensors[at], letters[at].index(summed))
        consume(f, tensors[1 - at], vector(f, tensors[1 - at], letters[1 - at].index(summed)), read)
    for tensor, names in zip(tensors, letters, strict=True):
        mine = []
        for factor in f.of(tensor).factors:
            if summed in [names[d] for d in varying(factor)]:
                if weighty:
                    rest = [d for d in varying(factor) if names[d] != summed]
                    if not rest:
                        continue
                factor = f.tie(factor, [names.index(summed)])
                if not varying(factor):
                    f.pin([factor], "a product of activations mixes its channels")
                    continue
            mine.append(_relabel(factor, names, result))
        kept.append(mine)
    if weighty:
        made = [x for x in kept[at] if varying(x)]
        f.record.made += [x.flatten() for x in made]
    f.give(out, f.merge(kept, len(result)), max(sources))


def _relabel(factor: Tensor, names: str, result: str) -> Tensor:
    shape = [factor.shape[names.index(letter)] if letter in names else 1 for letter in result]
    order = [names.index(letter) for letter in result if letter in names]
    rest = [d for d in range(factor.dim()) if d not in order]
    return factor.permute(*order, *rest).reshape(shape)


def mm(f: Follower, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """`mm`, `bmm` and `mv`."""
    name = func.overloadpacket.__name__
    spec = {"mm": "nk,km->nm", "bmm": "bnk,bkm->bnm", "mv": "nk,k->n", "dot": "k,k->"}[name]
    contract(f, args[0], args[1], out, spec)


def addmm(f: Follower, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """`addmm` and `baddbmm`: a product and a bias."""
    spec = "bnk,bkm->bnm" if func.overloadpacket.__name__ == "baddbmm" else "nk,km->nm"
    contract(f, args[1], args[2], out, spec)
    known = f.of(out)
    f.give(out, f.merge([known.factors, f.of(args[0]).factors], out.dim()), known.source)


def convolution(f: Follower, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """Every kind of convolution: plain, grouped, depthwise, with a channel multiplier, transposed."""
    x, weight, bias = args[0], args[1], args[2]
    transposed, groups = args[6], args[8]
    batched = x.dim() == weight.dim()
    channel = 1 if batched else 0
    dims = (0, 1) if not transposed else (1, 0)
    ins, outs = vector(f, x, channel), vector(f, weight, dims[0])
    reads = vector(f, weight, dims[1])
    per_group_in = x.shape[channel] // groups
    if groups == 1:
        consume(f, x, ins, reads)
        made = outs
    elif per_group_in == 1:
        made = _depthwise(f, weight, ins, outs, reads, groups, transposed)
    else:
        made = _grouped(f, x, ins, outs, reads, groups, transposed)
    if made is not None:
        f.record.made.append(made)
        if bias is not None and (labels := vector(f, bias, 0)) is not None:
            f.unite(made, labels)
    factors = [] if made is None else [made.view(shape_at(channel, out.dim(), out.shape[channel]))]
    f.give(out, factors, max(f.of(x).source, f.of(weight).source))


def _depthwise(
    f: Follower,
    weight: Tensor,
    ins: Tensor | None,
    outs: Tensor | None,
    reads: Tensor | None,
    groups: int,
    transposed: bool,
) -> Tensor | None:
    """One input channel a group: whole groups go, with every channel they make."""
    if transposed:
        if outs is not None:  # the channels a group makes are one dimension of the weight for all groups
            f.pin([outs], "its groups share it")
        group = reads
        made = None if group is None else group.repeat_interleave(weight.shape[1])
    else:
        made = outs
        group = None
        if outs is not None:
            runs = outs.view(groups, -1)
            group = f.tie(runs, [1]).flatten()
    if group is not None:
        if ins is None:
            f.pin([group], "it reads an input of fixed width")
        else:
            f.unite(ins, group)
            if bool((ins == 0).any()):
                f.pin([group[ins == 0]], "it reads an input of fixed width")
    return made


def _grouped(
    f: Follower,
    x: Tensor,
    ins: Tensor | None,
    outs: Tensor | None,
    reads: Tensor | None,
    groups: int,
    transposed: bool,
) -> Tensor | None:
    """Several input channels a group."""
    if transposed:  # the weight is (in, out of one group): ins are balanced, outs go alike in all groups
        consume(f, x, ins, reads)
        if reads is not None:
            f.record.balanced.append((reads, groups))
        return None if outs is None else outs.repeat(groups)
    consume(f, x, ins, None if reads is None else reads.repeat(groups))
    if outs is not None:
        f.record.balanced.append((outs, groups))
    return outs


def normalize(f: Follower, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Batch normalisation: each channel with its own statistics and scale."""
    x = args[0]
    dim = min(1, x.dim() - 1)
    channels = vector(f, x, dim)
    known = f.of(x)
    for tensor in [t for t in tensors_in((args[1:], kwargs)) if t.dim() == 1]:
        mine = vector(f, tensor, 0)
        if mine is None:
            continue
        if channels is None:
            if known.source != WILD:
                f.pin([mine], "it reads an input of fixed width")
            channels = mine
        f.unite(channels, mine)
    outs = tensors_in(out)
    f.give(outs[0], known.factors, known.source)


def layer_norm(f: Follower, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Normalisation over the last dimensions; over one, channels may go and the rest is normalised anew."""
    x, shape = args[0], args[1]
    known = f.of(x)
    affine = [t for t in args[2:4] if isinstance(t, Tensor)]
    last = list(range(x.dim() - len(shape), x.dim()))
    if len(shape) > 1:
        for factor in known.factors:
            if set(varying(factor)) & set(last):
                f.pin([factor], "it is normalised over several dimensions at once")
    factors = f.merge([known.factors, *(f.of(t).factors for t in affine)], x.dim())
    for tensor in affine:
        for factor in f.of(tensor).factors:
            if known.source == DATA and not any(set(varying(k)) & set(last) for k in known.factors):
                f.pin([factor], "it reads an input of fixed width")
    f.give(tensors_in(out)[0], factors, known.source)


def group_norm(f: Follower, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """A normalisation group goes whole; with one group, the rest is normalised anew."""
    x = args[0]
    groups = args[6]
    channels = vector(f, x, 1)
    known = f.of(x)
    for tensor in [t for t in args[1:3] if isinstance(t, Tensor)]:
        mine = vector(f, tensor, 0)
        if mine is not None and channels is not None:
            f.unite(channels, mine)
        elif mine is not None and known.source != WILD:
            f.pin([mine], "it reads an input of fixed width")
    if channels is not None and groups > 1:
        f.tie(channels.view(groups, -1), [1])
    f.give(tensors_in(out)[0], known.factors, known.source)


def embedding(f: Follower, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """A table: its rows are fixed, its columns are channels."""
    rows, columns = vector(f, args[0], 0), vector(f, args[0], 1)
    if rows is not None:
        f.pin([rows], "it is looked up by number")
    factors = [] if columns is None else [columns.view(shape_at(out.dim() - 1, out.dim(), columns.numel()))]
    f.give(out, factors, DATA)


def attention(f: Follower, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Fused attention, as its two products."""
    query, key, value = args[:3]
    scores = query.new_empty((*query.shape[:-1], key.shape[-2]))
    result = tensors_in(out)[0]
    names = "abcd"[: query.dim() - 2]
    contract(f, query, key, scores, f"{names}nk,{names}mk->{names}nm")
    contract(f, scores, value, result, f"{names}nm,{names}md->{names}nd")


def other(f: Follower, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Operators without a rule of their own."""
    name = func.overloadpacket.__name__
    inputs = tensors_in((args, kwargs))
    if not inputs or name.startswith(("new_", "zeros", "ones", "empty", "full", "rand")):
        return  # constants, which take on the width of what they meet
    if torch.Tag.pointwise in func.tags:
        pointwise(f, func, args, kwargs, out)
        return
    match = _SPATIAL.search(name)
    if match and match.group(2):
        spatial(f, inputs[0], out, int(match.group(2)))
        return
    source = max(f.of(tensor).source for tensor in inputs)
    for tensor in inputs:
        f.pin(f.of(tensor).factors, f"it goes through {name}")
    for tensor in tensors_in(out):
        f.known[tensor] = Labels([], source)


def _table(*pairs: tuple[Sequence[str], Callable[..., None]]) -> dict[str, Callable[..., None]]:
    return {name: rule for names, rule in pairs for name in names}


RULES = _table(
    (_MOVES, move),
    (_SAME, same),
    (_POINTWISE, pointwise),
    (_REDUCTIONS, reduce),
    (_ALONG, along),
    (("cat", "concat"), concatenate),
    (("stack",), stack),
    (("as_strided",), restride),
    (("glu",), gated),
    (("mm", "bmm", "mv", "dot"), mm),
    (("addmm", "baddbmm"), addmm),
    (("convolution", "_convolution"), convolution),
    (
        ("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training",
         "cudnn_batch_norm", "miopen_batch_norm", "batch_norm_inference", "_batch_norm_no_update"),
        normalize,
    ),
    (("native_layer_norm",), layer_norm),
    (("native_group_norm",), group_norm),
    (("embedding",), embedding),
    (
        ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
         "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
         "_scaled_dot_product_fused_attention_overrideable", "_scaled_dot_product_attention_math"),
        attention,
    ),
)  # fmt: skip
