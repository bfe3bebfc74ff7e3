"""What products do to the labels that `provenance` carries along, and the normalisations beside them.

A product with a weight is where channels are read and made: matrix products, convolutions, embeddings.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_prune.structure.provenance import Follower, tensors_in
from lightning_prune.structure.record import DATA, PARAMETER, WILD, shape_at, varying


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
    if len(args) > 7 and args[5]:  # with the statistics of this very tensor, such as a weight's
        f.pin([x for x in known.factors if set(varying(x)) - {dim}], "it is normalised over its channels")
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


def embedding(f: Follower, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """A table: its rows are fixed, its columns are channels."""
    rows, columns = vector(f, args[0], 0), vector(f, args[0], 1)
    if rows is not None:
        f.pin([rows], "it is looked up by number")
    rank = tensors_in(out)[0].dim()
    factors = [] if columns is None else [columns.view(shape_at(rank - 1, rank, columns.numel()))]
    if columns is not None:
        f.record.made.append(columns)
    f.give(tensors_in(out)[0], factors, DATA)


def bilinear(f: Follower, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
    """`nn.Bilinear`: a weight of (made, read, read)."""
    first, weight, second = args[:3]
    if first.dim() != 2 or second.dim() != 2:
        # As for an operator without a rule: what it meets is pinned.
        raise ValueError("a bilinear layer of anything but rows of vectors")
    consume(f, first, vector(f, first, 1), vector(f, weight, 1))
    consume(f, second, vector(f, second, 1), vector(f, weight, 2))
    made = vector(f, weight, 0)
    if made is not None:
        f.record.made.append(made)
    f.give(out, [] if made is None else [made[None]], max(f.of(t).source for t in args[:3]))


def attention(f: Follower, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
    """Fused attention, as its two products."""
    query = args[0]
    key, value = (_shared(f, tensor, query) for tensor in args[1:3])
    scores = query.new_empty((*query.shape[:-1], key.shape[-2]))
    result = tensors_in(out)[0]
    names = "abcd"[: query.dim() - 2]
    contract(f, query, key, scores, f"{names}nk,{names}mk->{names}nm")
    contract(f, scores, value, result, f"{names}nm,{names}md->{names}nd")


def _shared(f: Follower, tensor: Tensor, query: Tensor) -> Tensor:
    """Keys or values as every head of the queries has them, where several share one."""
    if tensor.dim() < 3 or tensor.shape[-3] == query.shape[-3]:
        return tensor
    repeats = query.shape[-3] // tensor.shape[-3]
    known, dim = f.of(tensor), tensor.dim() - 3
    factors = [x.repeat_interleave(repeats, dim) if dim in varying(x) else x for x in known.factors]
    repeated = tensor.new_empty((*tensor.shape[:-3], query.shape[-3], *tensor.shape[-2:]))
    f.give(repeated, factors, known.source)
    return repeated
