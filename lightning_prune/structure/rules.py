"""What each operator does to the labels that `provenance` carries along."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from lightning_prune.structure.products import (
    addmm,
    attention,
    bilinear,
    convolution,
    embedding,
    group_norm,
    layer_norm,
    mm,
    normalize,
)
from lightning_prune.structure.provenance import Follower, tensors_in
from lightning_prune.structure.record import DATA, WILD, Labels, compress, shape_at, varying

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
_SPATIAL = re.compile(r"(pool|upsample|interpolate|pad|grid_sampl|affine_grid|roi_align|_upsample).*?(\d)d")


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
    unknown = _looked_up(func, args)
    for factor in known.factors:
        if unknown & set(varying(factor)):  # whichever it is that is looked up, it is of one class
            looked_up, factor = factor, f.tie(factor, sorted(unknown))
            if not varying(factor):
                f.pin([looked_up], f"it goes through {func.overloadpacket.__name__}")
                continue
        try:
            results = tensors_in(_rearranged(func, factor.expand(args[0].shape), args[1:], kwargs))
        except RuntimeError:
            f.pin([factor], f"it goes through {func.overloadpacket.__name__}")
            continue
        for place, result in enumerate(results):
            moved[place].append(result)
    if func.overloadpacket.__name__ == "gather":  # it takes as many as there are indices
        moved = [f.merge([moved[0], f.of(args[2]).factors], outs[0].dim())]
    view = func.overloadpacket.__name__ in _VIEWS
    for tensor, factors in zip(outs, moved, strict=True):
        f.give(tensor, factors, known.source, view=view or known.view)
        f.of(tensor).part = _part(f, func, args, tensor)


def _part(
    f: Follower, func: Any, args: tuple[Any, ...], out: Tensor
) -> tuple[Tensor, tuple[int, ...]] | None:
    """Which tensor this is a part of, and which dimensions of it these are, as far as that is followed."""
    x, name = args[0], func.overloadpacket.__name__
    whole, dims = f.of(x).part or (x, tuple(range(x.dim())))
    if f.of(x).view and f.of(x).part is None:
        return None
    if name == "select":
        gone = (args[1] if len(args) > 1 else 0) % x.dim()
        return whole, dims[:gone] + dims[gone + 1 :]
    return (whole, dims) if name in ("slice", "narrow") else None


def _looked_up(func: Any, args: tuple[Any, ...]) -> set[int]:
    """The dimensions that are indexed by tensors without numbers."""
    name = func.overloadpacket.__name__
    if name == "index":
        return {dim for dim, at in enumerate(args[1]) if at is not None and at.is_meta}
    index = next((a for a in args[1:] if isinstance(a, Tensor)), None)
    return {args[1] % max(1, args[0].dim())} if index is not None and index.is_meta else set()


def _index(tensor: Tensor) -> Tensor:
    # Where labels are the same whatever is looked up, any number will do; none would leave no labels.
    if tensor.is_meta or not tensor.numel():
        return torch.zeros([max(1, size) for size in tensor.shape], dtype=torch.int64)
    return tensor.cpu()


def _rearranged(func: Any, labels: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name = func.overloadpacket.__name__
    args = tree_map_only(Tensor, _index, args)
    if name in ("view", "_unsafe_view", "reshape", "_reshape_alias"):
        return labels.reshape(args[0])
    if name == "constant_pad_nd":
        return func(labels, args[0], 0)
    return func(labels, *args, **kwargs)


def scatter(f: Follower, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """`x[indices] = values`: what is looked up stays, what lies behind it is one class with the values."""
    x, indices, values = args[:3]
    theirs = f.of(values)
    looked = {dim for dim, at in enumerate(indices) if at is not None}
    behind = x.dim() - len(looked)
    leading = looked == set(range(len(looked)))
    kept = []
    for factor in theirs.factors:
        lead = max(0, factor.dim() - behind)
        if not leading or any(dim < lead for dim in varying(factor)):
            f.pin([factor], "it is written where numbers say")
            continue
        shape = tuple(factor.shape[lead:])
        kept.append(factor.reshape((1,) * (x.dim() - len(shape)) + shape))
    _write(f, x, kept, looked, theirs.source, out)


def accumulate(f: Follower, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """`index_add`, `scatter_add` and the like: as `scatter`, along one dimension."""
    x, dim, index, values = args[:4]
    looked = {dim % max(1, x.dim())}
    kept: list[Tensor] = []
    lost: list[Tensor] = []
    for factor in f.of(values).factors:
        # Rows go to one place as a whole if their indices are one, expanded.
        whole = index.dim() < 2 or all(index.stride(d) == 0 for d in varying(factor))
        (kept if whole and not looked & set(varying(factor)) else lost).append(factor)
    f.pin(lost, "it is written where numbers say")
    beside = [factor for factor in f.of(index).factors if not looked & set(varying(factor))]
    _write(f, x, f.merge([kept, beside], x.dim()), looked, f.of(values).source, out)


def _write(f: Follower, x: Tensor, values: list[Tensor], looked: set[int], source: int, out: Tensor) -> None:
    """Write values at places that are looked up along some dimensions; the others are one class."""
    known = f.of(x)
    mine = [factor for factor in known.factors if not looked & set(varying(factor))]
    f.pin([x for x in known.factors if looked & set(varying(x))], "it is written where numbers say")
    factors = f.merge([mine, values], x.dim())
    if known.view and not _equal(known.factors, factors):
        f.pin(factors, "it is written into a part of another tensor")
    else:
        f.give(out, factors, max(known.source, source), view=known.view)


def like(f: Follower, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """`zeros_like` and such: constants, as wide as another tensor."""
    f.give(out, f.of(args[0]).factors, WILD)


def pooled(f: Follower, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """`roi_align`, `roi_pool`: regions of images become images; channels stay."""
    known = f.of(args[0])
    f.give(out, [f.tie(factor, [d for d in varying(factor) if d != 1]) for factor in known.factors], DATA)


def packed(f: Follower, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """`pack_padded_sequence`: steps and batch become one dimension."""
    known, data = f.of(args[0]), tensors_in(out)[0]
    f.pin([x for x in known.factors if {0, 1} & set(varying(x))], "it goes through pack_padded_sequence")
    f.give(data, [x[0] for x in known.factors if not {0, 1} & set(varying(x))], known.source)


def unfolded(f: Follower, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """`unfold`: every channel becomes as many as a patch has places, one after the other."""
    x = args[0]
    factors = [f.tie(factor, [d for d in varying(factor) if d > 1]) for factor in f.of(x).factors]
    places = out.shape[1] // x.shape[1]
    flat = [factor[..., 0].repeat_interleave(places if factor.shape[1] > 1 else 1, 1) for factor in factors]
    f.give(out, flat, f.of(x).source)


def folded(f: Follower, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """`fold`: the other way round."""
    x = args[0]
    factors = []
    for factor in f.of(x).factors:
        factor = f.tie(factor, [2]).expand(-1, x.shape[1], -1) if varying(factor) != [0] else factor
        runs = factor.reshape(factor.shape[0], out.shape[1], -1, 1)
        factors.append(f.tie(runs, [2]))
    f.give(out, factors, f.of(x).source)


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
        assert first is not None
        f.write(first, factors, source)
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
    (("_pack_padded_sequence",), packed),
    (("im2col",), unfolded),
    (("col2im",), folded),
    (("as_strided",), restride),
    (("glu",), gated),
    (("index_put", "_index_put_impl"), scatter),
    (("index_add", "index_copy", "index_reduce", "scatter", "scatter_add", "scatter_reduce"), accumulate),
    (("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like"), like),
    (("roi_align", "roi_pool"), pooled),
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
    (("embedding", "_embedding_bag", "_embedding_bag_forward_only"), embedding),
    (("_trilinear",), bilinear),
    (
        ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
         "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
         "_scaled_dot_product_fused_attention_overrideable", "_scaled_dot_product_attention_math"),
        attention,
    ),
)  # fmt: skip
