"""From what a pass found out to channel groups as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_prune.structure.demands import settle
from lightning_prune.structure.groups import Group, Member
from lightning_prune.structure.record import Owner, Record, classes, connected

OUTPUT = "its channels are an output of the network"


@dataclass(frozen=True)
class _Part:
    """One group in the making: classes of labels, ascending, and who makes them."""

    classes: Tensor
    makers: list[Owner]


def groups_of(record: Record) -> list[Group]:
    """Turn what a pass found out into groups, in the order of their layers.

    Args:
        record: Labels, and what became of them.

    Returns:
        The groups, protected ones with their reason.
    """
    root = classes(record)
    parts = _parts(record, root)
    reasons = _reasons(record, root, _places(record, parts))
    names = [layer_of(part.makers[0].name) for part in parts]
    settled = settle(record, root, [part.classes for part in parts], names, reasons)
    bundles = [_bundled([parts[place] for place in places]) for places in settled.bundles]
    part_of = _places(record, bundles)
    members = _members(record, root, part_of, len(bundles))
    groups = []
    for place, bundle in enumerate(bundles):
        reason = next((reasons[p] for p in settled.bundles[place] if p in reasons), "")
        numbers = {n: rows for n, rows in settled.attributes.items() if bool((part_of[rows] == place).any())}
        groups.append((bundle, members[place], numbers, settled.blocks.get(place), reason))
    groups.sort(key=lambda entry: entry[0].makers[0].start)
    made = [replace(_group(root, *entry), modes=record.modes) for entry in groups]
    return _told_apart(made, [entry[0].makers[0].dim for entry in groups])


def _told_apart(groups: list[Group], dims: list[int]) -> list[Group]:
    """Give groups names of their own: a tied weight makes channels of the stream, and scores of words."""
    taken: set[str] = set()
    names = {}
    for place in sorted(range(len(groups)), key=lambda at: bool(groups[at].reason)):
        name = groups[place].name
        names[place] = f"{name}[{dims[place]}]" if name in taken else name
        taken.add(name)
    return [replace(group, name=names[place]) for place, group in enumerate(groups)]


def _parts(record: Record, root: Tensor) -> list[_Part]:
    """Bring makers that share a class together."""
    made = torch.zeros(record.count, dtype=torch.bool)
    for labels in record.made:
        made[labels] = True
    makers = [o for o in record.owners if bool(made[o.start : o.start + o.size].any())]
    if not makers:
        return []
    mine = [root[owner.start : owner.start + owner.size] for owner in makers]
    joined = connected(record.count, torch.cat([m[:1].expand(len(m)) for m in mine]), torch.cat(mine))
    present = torch.unique(torch.cat(mine))
    by_part: dict[int, list[Owner]] = {}
    for owner, span in zip(makers, mine, strict=True):
        by_part.setdefault(int(joined[span[0]]), []).append(owner)
    where = joined[present]
    parts = [_Part(present[where == part], owners) for part, owners in by_part.items()]
    return sorted(parts, key=lambda part: part.makers[0].start)


def _bundled(parts: list[_Part]) -> _Part:
    if len(parts) == 1:
        return parts[0]
    makers = sorted((owner for part in parts for owner in part.makers), key=lambda owner: owner.start)
    return _Part(torch.cat([part.classes for part in parts]).sort().values, makers)


def _places(record: Record, parts: list[_Part]) -> Tensor:
    """Which part each class is in, or -1, shape (labels,)."""
    part_of = torch.full((record.count,), -1)
    for place, part in enumerate(parts):
        part_of[part.classes] = place
    return part_of


def _reasons(record: Record, root: Tensor, part_of: Tensor) -> dict[int, str]:
    reasons: dict[int, str] = {}
    # That it is an output says more than what else may be in the way.
    for labels, reason in sorted(record.pins, key=lambda pin: pin[1] != OUTPUT):
        for place in torch.unique(part_of[root[labels]]).tolist():
            if place >= 0:
                reasons.setdefault(place, reason)
    return reasons


def _members(record: Record, root: Tensor, part_of: Tensor, count: int) -> list[list[tuple[Member, Tensor]]]:
    """Where each part's channels are; the members' channels are filled in later, from the classes beside."""
    reads = torch.zeros(record.count, dtype=torch.bool)
    for labels in record.read:
        reads[labels] = True
    members: list[list[tuple[Member, Tensor]]] = [[] for _ in range(count)]
    for owner in record.owners:
        if owner.name == "=":  # nobody's: a tensor made on the way
            continue
        span = root[owner.start : owner.start + owner.size]
        mine = part_of[span]
        for place in torch.unique(mine[mine >= 0]).tolist():
            position = (mine == place).nonzero().flatten()
            read = bool(reads[owner.start + position].any())
            members[place].append((Member(owner.name, owner.dim, position, position, read), span[position]))
    return members


def _group(
    root: Tensor,
    part: _Part,
    places: list[tuple[Member, Tensor]],
    numbers: Mapping[str, Tensor],
    block: Tensor | None,
    reason: str,
) -> Group:
    count = part.classes.numel()
    spans = [root[owner.start : owner.start + owner.size] for owner in part.makers]
    whole = [torch.searchsorted(part.classes, s) for s in spans if torch.unique(s).numel() == count]
    even = [span for span in whole[:1] if int((held := torch.bincount(span)).min()) == int(held.max())]
    atom = even[0] if even else torch.arange(count)
    first = torch.zeros(count, dtype=torch.int64)
    first[atom.flip(0)] = torch.arange(atom.numel()).flip(0)

    def member(owner: Member, of: Tensor) -> Member:
        channel = first[torch.searchsorted(part.classes, of)]
        return Member(owner.tensor, owner.dim, channel, owner.position, owner.reads)

    for name, rows in numbers.items():
        position = torch.isin(rows, part.classes).nonzero().flatten()
        places.append((Member(name, 0, position, position), rows[position]))
    names = [layer_of(owner.name) for owner in part.makers]
    if not reason and count < 2:
        reason = "all its channels must stay together"
    if block is None or reason:
        block = torch.zeros(count, dtype=torch.int64)
    blocks = int(block.max()) + 1
    unit = 0 if even else max(1, spans[0].numel() * blocks // count)
    members = tuple(member(owner, of) for owner, of in places)
    return Group(names[0], atom.numel(), members, atom, block, reason, tuple(dict.fromkeys(names)), unit)


def layer_of(tensor: str) -> str:
    """Name the layer of a weight, also of one that is computed from others.

    Example:
        >>> layer_of("stem.0.weight"), layer_of("kernel"), layer_of("0.parametrizations.weight.original1")
        ('stem.0', 'kernel', '0')
    """
    computed = (".parametrizations.weight.original", ".parametrizations.weight.original1", ".weight_v")
    for ending in (".weight", *computed):
        if tensor.endswith(ending):
            return tensor.removesuffix(ending)
    return tensor
