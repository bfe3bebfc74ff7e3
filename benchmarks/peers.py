"""What one would use instead, for comparison. Not a benchmark itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from lightning_prune.cost import count_macs, count_parameters


class PeerError(Exception):
    """What is compared with cannot do it, which is a result too."""


@contextmanager
def of_the_peer() -> Iterator[None]:
    """Tell what a peer raises from faults of ours."""
    try:
        yield
    except Exception as error:
        raise PeerError(f"{type(error).__name__}: {error}") from error


def torch_pruning(
    network: nn.Module, example: Tensor, ends: Sequence[nn.Module], target: float, *,
    alike: bool = False, round_to: int | None = None,
) -> nn.Module:  # fmt: skip
    """Cut with Torch-Pruning alone, in small steps, until the MACs are at most `target` of them.

    Args:
        network: It is changed.
        example: One input.
        ends: Layers whose outputs stay.
        target: Fraction of the MACs that may remain.
        alike: Every layer loses the same share; otherwise those whose channels matter least lose most.
        round_to: Widths are multiples of it; None, its default, leaves them as they come out.

    Raises:
        PeerError: It fails, or stops before that.
    """
    import torch_pruning as tp

    dense = count_macs(network, (example,))
    counted = count_parameters(network)
    with of_the_peer():
        pruner = tp.pruner.BasePruner(
            network, example, tp.importance.GroupMagnitudeImportance(), global_pruning=not alike,
            pruning_ratio=1.0, max_pruning_ratio=0.9, iterative_steps=400, ignored_layers=list(ends),
            round_to=round_to,
            in_channel_groups={}, out_channel_groups={}, num_heads={}, channel_groups={},
        )  # fmt: skip
    for _ in range(400):
        with of_the_peer():
            pruner.step()
        # With coarse widths most steps change nothing, and counting MACs takes longer than a step.
        before, counted = counted, count_parameters(network)
        if counted != before and count_macs(network, (example,)) <= target * dense:
            # It leaves the network in eval mode, in which Lightning would train it.
            return network.train()
    raise PeerError("it did not reach the budget")
