"""Both of Lightning's namespaces behind one name.

`pytorch_lightning` and `lightning.pytorch` are two copies of one library whose classes are unrelated.
`Callback` here inherits from the `Callback` of each copy in use, so that either Trainer and either
LightningCLI takes ours for its own.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

NAMESPACES = ("pytorch_lightning", "lightning.pytorch")

if TYPE_CHECKING:
    from pytorch_lightning import Callback as _Base
    from pytorch_lightning import LightningModule as LightningModule
    from pytorch_lightning import Trainer as Trainer
else:
    LightningModule = Any
    Trainer = Any

    def _namespaces_in_use() -> list[str]:
        # Importing both copies costs seconds, so one that the user already imported decides.
        loaded = [name for name in NAMESPACES if name in sys.modules]
        return loaded or [name for name in NAMESPACES if find_spec(name.split(".")[0]) is not None]

    def _callback_bases() -> tuple[type, ...]:
        return tuple(import_module(name).Callback for name in _namespaces_in_use())

    class _Base(*_callback_bases()):
        """What a callback of every namespace in use inherits."""


class Callback(_Base):
    """A Lightning callback that belongs to every Lightning namespace in use.

    A namespace imported after this package joins in when the next callback is made.

    Example:
        >>> import pytorch_lightning
        >>> isinstance(Callback(), pytorch_lightning.Callback)
        True
    """

    if not TYPE_CHECKING:

        def __new__(cls, *args, **kwargs):
            """Adopt namespaces that were imported since this module was."""
            bases = _callback_bases()
            if not set(bases) <= set(_Base.__bases__):
                _Base.__bases__ = tuple(dict.fromkeys((*_Base.__bases__, *bases)))
            return super().__new__(cls)


def namespace_of(thing: object) -> str:
    """Name the Lightning namespace that a Trainer, module or callback comes from.

    Args:
        thing: An instance of a Lightning class.

    Returns:
        `"pytorch_lightning"` or `"lightning.pytorch"`.

    Example:
        >>> import pytorch_lightning
        >>> namespace_of(pytorch_lightning.LightningModule())
        'pytorch_lightning'
    """
    modules = [base.__module__ for base in type(thing).__mro__]
    for name in NAMESPACES:
        if any(module == name or module.startswith(name + ".") for module in modules):
            return name
    return next(name for name in NAMESPACES if find_spec(name.split(".")[0]) is not None)


def trainer_class(module: object) -> type[Trainer]:
    """Return the Trainer class of the namespace that a LightningModule comes from.

    Args:
        module: A LightningModule of either namespace.

    Returns:
        That namespace's `Trainer`.

    Example:
        >>> import pytorch_lightning
        >>> trainer_class(pytorch_lightning.LightningModule()) is pytorch_lightning.Trainer
        True
    """
    return import_module(namespace_of(module)).Trainer  # type: ignore[no-any-return]


def say(thing: object, text: str) -> None:
    """Tell the user something, once, in Lightning's own voice.

    Args:
        thing: The Trainer or module that it is about.
        text: What to say.
    """
    import_module(f"{namespace_of(thing)}.utilities.rank_zero").rank_zero_info(text)
