"""Scores: how much each weight matters. Pure functions; the weights with the lowest scores go first.

Every criterion is a function of an `Evidence` and returns scores shaped like the weight. What it needs beyond
the weight it says with `@needs`. To add one's own, write such a function and pass its import path
(`"my_package.my_module:my_criterion"`) or the function itself::

    @needs("gradient")
    def squared_taylor(evidence):
        return (evidence.weight * evidence.gradient) ** 2
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TypeVar

import torch
from torch import Tensor

from lightning_prune.errors import ConfigurationError, near_matches

KINDS = ("gradient", "movement", "saliency", "activation")


@dataclass(frozen=True)
class Evidence:
    """What a criterion may look at. Everything but the weight is None unless asked for with `@needs`.

    Attributes:
        name: The weight's name.
        weight: The weight, any shape; not to be changed.
        gradient: Mean gradient over the optimizer steps since the last event; shaped like the weight.
        movement: Sum of `-weight * gradient` over the optimizer steps of the training; shaped like the
            weight.
        saliency: `|weight * gradient|` at the first optimizer step of the training; shaped like it.
        activation: L2 norm of the input features since the last event; broadcasts to the weight.
        seed: The same on all ranks and after a resume; for random criteria.
    """

    name: str
    weight: Tensor
    gradient: Tensor | None = None
    movement: Tensor | None = None
    saliency: Tensor | None = None
    activation: Tensor | None = None
    seed: int = 0


Criterion = Callable[[Evidence], Tensor]
_Function = TypeVar("_Function", bound=Criterion)


def needs(*kinds: str, elementwise: bool = False) -> Callable[[_Function], _Function]:
    """Declare what a criterion needs beyond the weight.

    Args:
        *kinds: Of `KINDS`; collected while training, and complete when the criterion is called.
        elementwise: Whether each score depends on its own element only. Such a criterion may be called with a
            weight piece by piece, so that scores never need memory that grows with the weights.

    Returns:
        A decorator.

    Example:
        >>> needs_of(taylor)
        ('gradient',)
    """

    def mark(function: _Function) -> _Function:
        function.needs, function.elementwise = kinds, elementwise  # type: ignore[attr-defined]
        return function

    return mark


def needs_of(criterion: Criterion) -> tuple[str, ...]:
    """Tell what a criterion needs beyond the weight."""
    return getattr(criterion, "needs", ())


def is_elementwise(criterion: Criterion) -> bool:
    """Tell whether a criterion may be called piece by piece."""
    return getattr(criterion, "elementwise", False)


@needs(elementwise=True)
def magnitude(evidence: Evidence) -> Tensor:
    """Score by absolute value, `|w|` (Han et al. 2015, "Learning both Weights and Connections", section 3).

    Units of a pattern (a block, a row) score the mean of theirs, that is their L1 norm by size.

    Args:
        evidence: The weight.

    Returns:
        Scores of the weight's shape, 0 or more.

    Example:
        >>> magnitude(Evidence("w", torch.tensor([1.0, -2.0])))
        tensor([1., 2.])
    """
    return evidence.weight.abs()


@needs(elementwise=True)
def squared(evidence: Evidence) -> Tensor:
    """Score by square, `w^2`: single weights as `magnitude`, units of a pattern by their L2 norm.

    Args:
        evidence: The weight.

    Returns:
        Scores of the weight's shape, 0 or more.

    Example:
        >>> squared(Evidence("w", torch.tensor([1.0, -2.0])))
        tensor([1., 4.])
    """
    # In float32 at least, where squares of small weights do not vanish.
    return evidence.weight.to(torch.promote_types(evidence.weight.dtype, torch.float32)).square()


def random(evidence: Evidence) -> Tensor:
    """Score by chance: uniform in 0 to 1, the same on every rank, every call and after every resume.

    Args:
        evidence: The weight's name and shape, and the seed.

    Returns:
        Scores of the weight's shape, in float32.

    Example:
        >>> a, b = (random(Evidence("w", torch.zeros(3))) for _ in range(2))
        >>> bool((a == b).all())
        True
    """
    generator = torch.Generator().manual_seed(evidence.seed ^ zlib.crc32(evidence.name.encode()))
    # Drawn on the CPU, because generators of different devices give different numbers.
    return torch.rand(evidence.weight.shape, generator=generator).to(evidence.weight.device)


@needs("gradient", elementwise=True)
def taylor(evidence: Evidence) -> Tensor:
    """Score by the first-order change of the loss when the weight goes, `|w * dL/dw|`.

    Molchanov et al. 2019, "Importance Estimation for Neural Network Pruning", for single weights,
    with the gradient averaged over the steps since the last event.

    Args:
        evidence: Weight and gradient.

    Returns:
        Scores of the weight's shape, 0 or more.

    Example:
        >>> taylor(Evidence("w", torch.tensor([1.0, -2.0]), gradient=torch.tensor([0.5, 0.1])))
        tensor([0.5000, 0.2000])
    """
    assert evidence.gradient is not None
    return (evidence.weight * evidence.gradient).abs()


@needs("saliency", elementwise=True)
def snip(evidence: Evidence) -> Tensor:
    """Score by connection sensitivity at the start of training, `|w * dL/dw|` of the first optimizer step.

    Lee et al. 2019, "SNIP: Single-shot Network Pruning based on Connection Sensitivity", without the
    normalization, which changes no order. Meant for `Schedule("one_shot")`: it then prunes before the first
    update, with the gradient of the first (accumulated) batch.

    Args:
        evidence: The saliency.

    Returns:
        Scores of the weight's shape, 0 or more.

    Example:
        >>> snip(Evidence("w", torch.ones(2), saliency=torch.tensor([0.5, 0.1])))
        tensor([0.5000, 0.1000])
    """
    assert evidence.saliency is not None
    return evidence.saliency


@needs("movement", elementwise=True)
def movement(evidence: Evidence) -> Tensor:
    """Score by movement away from zero while training, `-sum(w * dL/dw)`.

    Sanh et al. 2020, "Movement Pruning: Adaptive Sparsity by Fine-Tuning", in the hard form, up to the
    learning rate: weights that shrink go, however large they are. What is pruned stays pruned.

    Args:
        evidence: The movement.

    Returns:
        Scores of the weight's shape, of either sign.

    Example:
        >>> movement(Evidence("w", torch.ones(2), movement=torch.tensor([0.5, -0.1])))
        tensor([ 0.5000, -0.1000])
    """
    assert evidence.movement is not None
    return evidence.movement


@needs("activation")
def wanda(evidence: Evidence) -> Tensor:
    """Score by weight times the norm of its input, `|w_ij| * ||x_j||_2`.

    Sun et al. 2023, "A Simple and Effective Pruning Approach for Large Language Models", equation 1. The
    paper compares the weights of one output with each other: that is `scope="output"`. For a convolution,
    `x_j` is an input channel.

    Args:
        evidence: Weight and activation.

    Returns:
        Scores of the weight's shape, 0 or more.

    Example:
        >>> wanda(Evidence("w", torch.tensor([[1.0, -2.0]]), activation=torch.tensor([[3.0, 1.0]])))
        tensor([[3., 2.]])
    """
    assert evidence.activation is not None
    return evidence.weight.abs() * evidence.activation


CRITERIA: dict[str, Criterion] = {
    "magnitude": magnitude,
    "l1": magnitude,
    "l2": squared,
    "random": random,
    "taylor": taylor,
    "snip": snip,
    "movement": movement,
    "wanda": wanda,
}


def resolve(criterion: str | Criterion, owner: str) -> Criterion:
    """Find a criterion by its name or import path.

    Args:
        criterion: A name of `CRITERIA`, `"package.module:function"`, or the function itself.
        owner: Who asks, for the error message.

    Returns:
        The function.

    Raises:
        ConfigurationError: If there is no such criterion.

    Example:
        >>> resolve("magnitude", "MagnitudePruning") is magnitude
        True
    """
    found: object = CRITERIA.get(criterion) if isinstance(criterion, str) else criterion
    path, _, attribute = criterion.partition(":") if isinstance(criterion, str) else ("", "", "")
    if attribute:
        try:
            found = getattr(import_module(path), attribute)
        except (ImportError, AttributeError) as error:
            hint = f"the import said: {error}"
            raise ConfigurationError.of(owner, "criterion", "importable", criterion, hint) from error
    if not callable(found):
        expected = f"one of {', '.join(map(repr, CRITERIA))}, or 'package.module:function'"
        hint = near_matches(str(criterion), CRITERIA).rstrip(".")
        raise ConfigurationError.of(owner, "criterion", expected, criterion, hint)
    unknown = [kind for kind in needs_of(found) if kind not in KINDS]
    if unknown:
        expected = "one that needs only " + ", ".join(map(repr, KINDS))
        raise ConfigurationError.of(owner, "criterion", expected, unknown[0])
    return found
