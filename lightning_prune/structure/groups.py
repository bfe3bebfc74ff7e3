"""Channel groups as plain data: which positions of which tensors live and die together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Member:
    """One dimension of one tensor that holds channels of a group.

    Attributes:
        tensor: The parameter's or buffer's qualified name; `"layer#"` for a normalisation layer that has
            neither, and knows its width as a number only; `"module@attribute"` or `"module@attribute[2]"`
            for a number in a module of the user's, as a dimension of that many positions.
        dim: The dimension.
        channel: The group's channels, shape (k,): `channel[i]` sits at `position[i]`. Channels of an atom are
            all named by its first.
        position: Where, shape (k,).
        reads: Whether this is a weight that reads the channels.
    """

    tensor: str
    dim: int
    channel: Tensor
    position: Tensor
    reads: bool = False

    @property
    def module(self) -> str:
        """The layer's qualified name; for a parameter of the network itself, the parameter's.

        Example:
            >>> none = torch.arange(0)
            >>> [Member(name, 0, none, none).module for name in ("stem.0.weight", "norm#", "scale")]
            ['stem.0', 'norm', 'scale']
        """
        if self.tensor.endswith("#"):
            return self.tensor[:-1]
        if "@" in self.tensor:
            return attribute_of(self.tensor)[0]
        return self.tensor.rpartition(".")[0] or self.tensor


def attribute_of(name: str) -> tuple[str, str, int | None]:
    """Take apart the name of a number in a module: the module, its attribute, and where in a list it is.

    Example:
        >>> attribute_of("blocks.0@num_heads"), attribute_of("@sizes[1]")
        (('blocks.0', 'num_heads', None), ('', 'sizes', 1))
    """
    module, _, rest = name.partition("@")
    attribute, _, place = rest.rstrip("]").partition("[")
    return module, attribute, int(place) if place else None


@dataclass(frozen=True)
class Group:
    """Channels that can be removed, and every place a removal touches.

    Attributes:
        name: The first layer that makes the channels.
        channels: How many there are.
        members: Where they are.
        atom: Shape (channels,): channels of the same atom go together.
        block: Shape (atoms,): every block must keep equally many atoms.
        reason: Why none may go, or empty.
        makers: Every layer that makes them.
        unit: How many channels of the first layer the smallest step takes, where that is not `step`.
        modes: Whether the network has to be looked at in eval mode only, or as in training too.
    """

    name: str
    channels: int
    members: tuple[Member, ...]
    atom: Tensor
    block: Tensor
    reason: str = ""
    makers: tuple[str, ...] = ()
    unit: int = 0
    modes: tuple[bool, ...] = (False, True)

    @property
    def atoms(self) -> int:
        """How many atoms there are."""
        return self.block.numel()

    @property
    def blocks(self) -> int:
        """How many blocks there are."""
        return int(self.block.max()) + 1

    @property
    def step(self) -> int:
        """The smallest number of channels that can go at once."""
        return self.channels // self.atoms * self.blocks

    def channels_of(self, atoms: Tensor) -> Tensor:
        """List the channels of some atoms, ascending.

        Example:
            >>> group = Group("conv", 4, (), torch.tensor([0, 1, 0, 1]), torch.zeros(2, dtype=torch.int64))
            >>> group.channels_of(torch.tensor([1])), group.step
            (tensor([1, 3]), 2)
        """
        return torch.isin(self.atom, atoms).nonzero().flatten()
