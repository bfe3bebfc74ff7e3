"""Choosing the ranks of layers that become products: what ranks cost and lose, and what a budget allows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil, prod

import torch
from torch import Tensor

from lightning_prune.errors import BudgetError, ConfigurationError
from lightning_prune.structure.budget import Budget

Ranks = tuple[int, int]
KINDS = ("macs", "params")
_CELLS = 10_000


@dataclass(frozen=True)
class Factorable:
    """A layer that could become a product of smaller ones.

    Attributes:
        name: Its qualified name.
        shape: Its weight's: (out, in, *kernel).
        positions: How often its kernel is laid on the input of one sample, over all calls.
        places: How many positions its input has, over all calls.
        energies: What `low_rank.energies` says of its weight.
        reason: Why it stays as it is, or empty.
    """

    name: str
    shape: tuple[int, ...]
    positions: int = 0
    places: int = 0
    energies: tuple[Tensor, Tensor] | None = None
    reason: str = ""

    @property
    def matrix(self) -> bool:
        """Whether two layers take its place, and not three."""
        return prod(self.shape[2:]) == 1

    def cost(self, kind: str, ranks: Ranks | None = None) -> int:
        """Count MACs of one sample, or weights.

        Args:
            kind: `"macs"` or `"params"`.
            ranks: `(output rank, input rank)`; None: the layer as it is.

        Returns:
            The cost; biases stay what they are and are left out.

        Example:
            >>> conv = Factorable("conv", (64, 32, 3, 3), positions=100, places=100)
            >>> conv.cost("macs"), conv.cost("macs", (16, 8)), conv.cost("params", (16, 8))
            (1843200, 243200, 2432)
        """
        outputs, inputs = self.shape[:2]
        laid, before = (1, 1) if kind == "params" else (self.positions, self.places)
        if ranks is None:
            return laid * prod(self.shape)
        if self.matrix:
            return laid * ranks[0] * (inputs + outputs)
        out_rank, in_rank = ranks
        return before * inputs * in_rank + laid * out_rank * (in_rank * prod(self.shape[2:]) + outputs)

    def lost(self, ranks: Ranks | None) -> float:
        """Say which fraction of the weight's sum of squares is lost: exactly for a matrix, else at most.

        For a kernel this is the bound of De Lathauwer et al. 2000 (SIAM J. Matrix Anal. Appl. 21(4), eq. 24).
        """
        if ranks is None or self.energies is None:
            return 0.0
        held = [float(energy[rank]) for energy, rank in zip(self.energies, ranks, strict=True)]
        return 1 - held[0] if self.matrix else min(1.0, 2 - sum(held))


@dataclass(frozen=True)
class Wish:
    """How small layers are to become; exactly one of `budget`, `ratio` and `energy` is given.

    Attributes:
        budget: MACs or parameters that may remain of the dense network; ranks are spread so that the least
            is lost.
        ratio: Ranks as a fraction of the largest possible, 0 to 1.
        energy: The fraction of each weight's sum of squares that its ranks hold, 0 to 1.
        round_to: Ranks are multiples of this; `"auto"`: of 16, 8 or 4, the largest that leaves two choices.
    """

    budget: Budget | None = None
    ratio: float | None = None
    energy: float | None = None
    round_to: int | str = "auto"

    def check(self, owner: str) -> None:
        """Raise ConfigurationError if something is out of range."""
        given = {n: v for n in ("budget", "ratio", "energy") if (v := getattr(self, n)) is not None}
        if len(given) != 1:
            raise ConfigurationError(
                f"{owner}: exactly one of budget, ratio and energy must be given, got {given or 'none'}; "
                "write for example budget=Budget(macs=0.5)."
            )
        if self.budget is not None:
            if not isinstance(self.budget, Budget):
                raise ConfigurationError.of(
                    owner, "budget", "a Budget", self.budget, "write Budget(macs=0.5)"
                )
            if self.budget.kind not in KINDS:
                remedy = "give Budget(macs=...) here"
                if self.budget.kind == "latency":
                    remedy += ", and StructuralPruning(Budget(latency=...)) after it: that one knows times"
                raise ConfigurationError.of(
                    owner, "budget", f"of one of {list(KINDS)}", self.budget.kind, remedy
                )
        for name, value in given.items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if name != "budget" and not (number and 0 < value < 1):
                raise ConfigurationError.of(owner, name, "a fraction between 0 and 1", value)
        whole = isinstance(self.round_to, int) and not isinstance(self.round_to, bool) and self.round_to >= 1
        if not whole and self.round_to != "auto":
            expected = 'a whole number of at least 1, or "auto"'
            raise ConfigurationError.of(owner, "round_to", expected, self.round_to)


def unit(width: int, round_to: int | str) -> int:
    """Say of what number a rank is a multiple.

    Example:
        >>> [unit(width, "auto") for width in (64, 24, 8, 3)], unit(64, 10)
        ([16, 8, 4, 3], 10)
    """
    wanted = next((m for m in (16, 8) if 2 * m <= width), 4) if round_to == "auto" else int(round_to)
    return min(wanted, width)


def ranks_for(layer: Factorable, wish: Wish) -> Ranks:
    """Give a layer the ranks that a ratio or an energy asks for.

    Args:
        layer: The layer, with its energies.
        wish: What is asked; not a budget.

    Returns:
        `(output rank, input rank)`: aligned, at least one unit, at most the largest possible.

    Example:
        >>> ranks_for(Factorable("conv", (64, 32, 3, 3)), Wish(ratio=0.4))
        (32, 16)
    """
    widths = _widths(layer)
    found = []
    for dim, width in enumerate(widths):
        least = unit(width, wish.round_to)
        if wish.ratio is not None:
            rank = max(1, int(wish.ratio * width / least + 0.5)) * least
        else:
            assert wish.energy is not None
            assert layer.energies is not None
            held = layer.energies[dim]
            # An energy of 0.9 is reached by a sum that is less by no more than rounding.
            rank = ceil(max(1, int((held < wish.energy - 1e-12).sum())) / least) * least
        found.append(min(rank, width))
    return (found[0], found[0]) if layer.matrix else (found[0], found[1])


def options(layer: Factorable, round_to: int | str) -> list[Ranks]:
    """List the ranks that are worth a layer's while, the largest first.

    The two ranks of a kernel go together: the input rank is the smallest that holds as much as the output
    rank does.

    Args:
        layer: The layer, with its energies.
        round_to: See `Wish`.

    Returns:
        Those that take fewer MACs and fewer weights than the layer does; none for a layer with a reason.
    """
    if layer.reason or layer.energies is None:
        return []
    outputs, inputs = _widths(layer)
    steps = [unit(width, round_to) for width in (outputs, inputs)]
    found = []
    for rank in range(outputs // steps[0] * steps[0], 0, -steps[0]):
        held = float(layer.energies[0][rank])
        other = ceil(max(1, int((layer.energies[1] < held - 1e-12).sum())) / steps[1]) * steps[1]
        found.append((rank, rank if layer.matrix else min(other, inputs)))
    return [ranks for ranks in found if pays(layer, ranks)]


def pays(layer: Factorable, ranks: Ranks) -> bool:
    """Tell whether the smaller layers take fewer MACs and fewer weights than the layer does.

    Example:
        >>> layer = Factorable("fc", (8, 8), 1, 1)
        >>> pays(layer, (4, 4)), pays(layer, (3, 3))
        (False, True)
    """
    return all(layer.cost(kind, ranks) < layer.cost(kind) for kind in KINDS)


def allocate(layers: Sequence[Factorable], wish: Wish, now: float, dense: float) -> dict[str, Ranks]:
    """Spread ranks over layers so that a budget is met and the least is lost, summed over layers.

    This is a multiple-choice knapsack, solved by dynamic programming (Kellerer, Pferschy & Pisinger 2004,
    section 11.5) over costs rounded up to a ten-thousandth of what is allowed; what rounding has wasted is
    given back.

    Args:
        layers: The layers, with their energies.
        wish: A budget, and how ranks are aligned.
        now: What the whole network costs as it is.
        dense: What the budget is a fraction of.

    Returns:
        `{layer: ranks}`; layers that are not named stay as they are.

    Raises:
        BudgetError: The budget cannot be reached; the message says what can, and what stands in the way.
    """
    assert wish.budget is not None
    kind, allowed = wish.budget.kind, dense * wish.budget.fraction
    if now <= allowed:
        return {}
    free = [layer for layer in layers if not layer.reason]
    table = [[None, *options(layer, wish.round_to)] for layer in free]
    costs = [[layer.cost(kind, r) for r in choices] for layer, choices in zip(free, table, strict=True)]
    losses = [[layer.lost(r) for r in choices] for layer, choices in zip(free, table, strict=True)]
    room = allowed - (now - sum(choices[0] for choices in costs))
    smallest = sum(map(min, costs))
    if smallest > room:
        raise _unreachable(layers, wish, (allowed - room + smallest) / dense)
    picks = _knapsack(costs, losses, room) or [choices.index(min(choices)) for choices in costs]
    for place, mine in enumerate(picks):
        spare = room - sum(costs[i][pick] for i, pick in enumerate(picks)) + costs[place][mine]
        fitting = [i for i, cost in enumerate(costs[place]) if cost <= spare]
        picks[place] = min(fitting, key=losses[place].__getitem__)
    chosen = zip(free, (table[i][pick] for i, pick in enumerate(picks)), strict=True)
    return {layer.name: ranks for layer, ranks in chosen if ranks is not None}


def _knapsack(
    costs: Sequence[Sequence[float]], losses: Sequence[Sequence[float]], room: float
) -> list[int] | None:
    """Pick one choice for each layer so that costs fit and losses are least; None if rounding leaves none."""
    best, made = torch.zeros(_CELLS + 1, dtype=torch.float64), []
    for prices, lost in zip(costs, losses, strict=True):
        cells = [ceil(price / room * _CELLS - 1e-9) for price in prices]
        sums = torch.full((len(cells), _CELLS + 1), torch.inf, dtype=torch.float64)
        for choice, cell in enumerate(cells):
            if cell <= _CELLS:
                sums[choice, cell:] = best[: _CELLS + 1 - cell] + lost[choice]
        best, choices = sums.min(0)
        made.append((choices, cells))
    if torch.isinf(best[-1]):
        return None
    picks, left = [], _CELLS
    for choices, cells in reversed(made):
        picks.append(int(choices[left]))
        left -= cells[picks[-1]]
    return picks[::-1]


def _widths(layer: Factorable) -> tuple[int, int]:
    outputs, inputs = layer.shape[:2]
    return (min(outputs, inputs), min(outputs, inputs)) if layer.matrix else (outputs, inputs)


def _unreachable(layers: Iterable[Factorable], wish: Wish, smallest: float) -> BudgetError:
    assert wish.budget is not None
    kept = [f"{layer.name} ({layer.reason})" for layer in layers if layer.reason]
    limits = f"round_to={wish.round_to!r}"
    if kept:
        limits += f", and {len(kept)} layers that stay as they are: {'; '.join(kept[:3])}"
    kind = wish.budget.kind
    return BudgetError(
        f"LowRank: `budget` asks for {wish.budget.fraction:g} of the dense {kind}, but the smallest "
        f"reachable is {smallest:.3f}. It is limited by {limits}. Write "
        f"Budget({kind}={min(1.0, int(smallest * 100 + 1) / 100)}), or add StructuralPruning."
    )
