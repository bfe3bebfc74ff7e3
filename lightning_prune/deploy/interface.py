"""What a module takes and gives, so that a file can stand in for it."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.deploy.calls import Call
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
        single: Whether the module takes a list of pictures and the file one of them.

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
    single: bool = False

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
        tree = _of_one(tree) if self.single else tree
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

    def calls(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Call]:
        """Return the calls that the file is run for: one, or one for each picture."""
        return one_by_one(args, kwargs) if self.single else [(args, kwargs)]

    def arguments(self, tensors: list[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the positional and keyword arguments that hold these tensors."""
        bound = self.signature.bind_partial()
        bound.arguments.update(self.inputs.build(tensors))
        return bound.args, bound.kwargs


def one_by_one(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Call]:
    """Return one call for each picture, if the only tensors of a call are a list of pictures.

    Returns:
        The calls; none if there is no such list.

    Example:
        >>> import torch
        >>> [len(call[0][0]) for call in one_by_one(([torch.ones(3, 8, 8), torch.ones(3, 9, 9)],), {})]
        [1, 1]
    """
    values = [*args, *kwargs.values()]
    lists = [v for v in values if isinstance(v, (list, tuple)) and flatten(v)[0]]
    if len(lists) != 1 or any(isinstance(v, Tensor) for v in values):
        return []
    pictures = lists[0]
    if not all(isinstance(item, Tensor) and item.dim() == 3 for item in pictures):
        return []

    def only(value: Any, item: Tensor) -> Any:
        return [item] if value is pictures else value

    return [
        (tuple(only(v, item) for v in args), {k: only(v, item) for k, v in kwargs.items()})
        for item in pictures
    ]


def of_one_picture(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Interface | None:
    """Return the interface of a module for one of the pictures it is called with.

    Returns:
        The interface; None if the module does not take a list of pictures, one result for each.
    """
    calls = one_by_one(args, kwargs)
    if not calls:
        return None
    try:
        with torch.no_grad():
            many, one = (len(module(*a, **k)) for a, k in ((args, kwargs), calls[0]))
    except Exception:  # noqa: BLE001 (a module that wants something else, or whose result has no length)
        return None
    if (many, one) != (len(calls), 1):
        return None
    face = Interface.of(module, *calls[0])
    return replace(
        face, inputs=_of_one(face.inputs), outputs=_of_one(face.outputs), batched=False, single=True
    )


def _of_one(tree: Tree) -> Tree:
    """Leave out of names that they are of the first element of a list, when there is only one."""
    names = (name.removeprefix("output_0_").removesuffix("_0") for name in tree.names)
    return replace(tree, names=tuple(names))


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
