"""What a module takes and gives, so that a file can stand in for it."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.deploy.tree import Tree, flatten
from lightning_prune.errors import EvaluationError, TracingError


@dataclass(frozen=True)
class Interface:
    """The arguments and results of a module's forward, as flat named lists of tensors.

    Attributes:
        signature: That of the module's forward.
        inputs: The structure of the arguments, by parameter name, defaults filled in.
        outputs: The structure of the result.
        kept: Which input tensors the file reads (an exporter drops those that the network ignores).
        batched: Whether the first axis of the inputs is a batch of any size.

    Example:
        >>> net = nn.Linear(2, 3)
        >>> face = Interface.of(net, (torch.ones(4, 2),))
        >>> face.inputs.names, face.outputs.names
        (('input',), ('output',))
    """

    signature: inspect.Signature
    inputs: Tree
    outputs: Tree
    kept: tuple[int, ...] = ()
    batched: bool = True

    @classmethod
    def of(cls, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Interface:
        """Run a module once and describe the call.

        Args:
            module: The module, in the mode it is meant to run in.
            args: Positional arguments.
            kwargs: Keyword arguments.

        Returns:
            The interface, all inputs kept.

        Raises:
            TracingError: The module fails on these arguments, takes no tensor, or returns none.
        """
        signature = inspect.signature(module.forward)
        try:
            with torch.no_grad():
                result = module(*args, **(kwargs or {}))
        except Exception as error:
            raise TracingError(
                f"{type(module).__name__} fails on its example input: {type(error).__name__}: {error}"
            ) from error
        tensors, inputs = _bound(signature, args, kwargs or {})
        outputs = flatten(result)[1]
        for what, names in (("takes", inputs.names), ("returns", outputs.names)):
            if not names:
                raise TracingError(
                    f"{type(module).__name__}.forward {what} no tensor: it cannot be exported."
                )
        return cls(signature, inputs, outputs, tuple(range(len(tensors))))

    def keeping(self, names: list[str]) -> Interface:
        """Return the interface of a file that has only these of the inputs."""
        return replace(self, kept=tuple(i for i, name in enumerate(self.inputs.names) if name in names))

    def tensors(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """Return all input tensors of a call, in order.

        Raises:
            EvaluationError: The call has another structure than the one that was described.
        """
        tensors, tree = _bound(self.signature, args, kwargs)
        if tree.names != self.inputs.names or not _same(tree.constants, self.inputs.constants):
            raise EvaluationError(
                "The exported module is called with other arguments than it was exported with: "
                f"exported ({_describe(self.inputs)}), called ({_describe(tree)}); "
                "export a submodule that is always called alike, with module='...'."
            )
        return tensors

    def batch(self, tensors: list[Tensor]) -> int | None:
        """Return the batch's size in a call with these tensors; None if there is no batch."""
        return batch_size(tensors) if self.batched else None

    def arguments(self, tensors: list[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the positional and keyword arguments that hold these tensors."""
        bound = self.signature.bind_partial()
        bound.arguments.update(self.inputs.build(tensors))
        return bound.args, bound.kwargs


def batch_size(tensors: list[Tensor]) -> int | None:
    """Return the first axis of the first tensor that has one."""
    return next((t.shape[0] for t in tensors if t.dim()), None)


def has_batch(tensor: Tensor, size: int) -> bool:
    """Tell whether a tensor's first axis is the batch."""
    return tensor.dim() > 0 and tensor.shape[0] == size


def _bound(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[Tensor], Tree]:
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise EvaluationError(f"The exported module is called wrongly: {error}.") from error
    bound.apply_defaults()
    return flatten(dict(bound.arguments), "input")


def _same(left: Any, right: Any) -> bool:
    try:
        return bool(left == right)
    except (RuntimeError, ValueError):  # arrays compare element by element
        return False


def _describe(tree: Tree) -> str:
    return ", ".join([*tree.names, *(f"{k}={v!r}" for k, v in tree.constants.items())])
