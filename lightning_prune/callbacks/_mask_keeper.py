"""The weights that a callback prunes, their masks, and the hooks that keep the masked ones zero."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_prune.errors import CheckpointError
from lightning_prune.selection import Weight
from lightning_prune.sparsity import masks, sharding
from lightning_prune.sparsity.criteria import Evidence


class MaskKeeper:
    """Masks by weight. Parameters are looked up anew where they may have been replaced."""

    def __init__(self) -> None:
        self.weights: dict[str, Weight] = {}
        self.masks: dict[str, Tensor] = {}
        self.packed: dict[str, Tensor] = {}
        self._dead: set[str] = set()
        self._handles: list[Any] = []
        self._stepped: dict[int, tuple[int, list[Tensor], list[Tensor]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to a running fit, so that a callback can be copied and pickled."""
        clean = MaskKeeper()
        clean.packed = self.pack()
        return clean.__dict__

    # ------------------------------------------------------------------ state

    def pack(self) -> dict[str, Tensor]:
        """Return the masks, one bit a weight."""
        if not self.masks:
            return dict(self.packed)
        return {name: masks.pack(sharding.whole(mask)) for name, mask in self.masks.items()}

    def load(self, packed: Mapping[str, Tensor]) -> None:
        """Take packed masks; `restore` lays them on the weights."""
        self.packed = dict(packed)
        self.masks = {}
        self._stepped = {}

    def restore(self, owner: str) -> None:
        """Unpack masks, and bring all masks to the dtype and device of their weights."""
        for name, packed in self.packed.items():
            if name in self.weights:
                weight = self.weights[name].parameter.detach()
                try:
                    mask = masks.unpack(packed, torch.empty(weight.shape))
                except ValueError as error:
                    problem = f"the checkpoint's mask of {name!r} does not fit the module: {error}"
                    raise CheckpointError(f"{owner}: {problem}.") from error
                self.masks[name] = sharding.like(mask, weight)
        self.packed = {}
        self.masks = {
            name: sharding.like(mask, self.weights[name].parameter.detach())
            for name, mask in self.masks.items()
            if name in self.weights
        }
        self._stepped = {}

    def narrow(self, change: Any, parameters: Mapping[str, nn.Parameter]) -> None:
        """Follow a structural change: cut the masks as the weights were cut."""
        self.weights = {
            name: replace(weight, parameter=parameters[name])
            for name, weight in self.weights.items()
            if name in parameters
        }
        self.masks = {
            name: sharding.like(change.narrow(name, mask), parameters[name].detach())
            for name, mask in self.masks.items()
            if name in self.weights
        }
        self.packed = {}
        self._stepped = {}

    def forget(self, names: Iterable[str]) -> None:
        """Drop the masks of weights that are gone."""
        for name in names:
            self.masks.pop(name, None)

    # ------------------------------------------------------------------ what there is

    def tensors(self) -> Mapping[str, Tensor]:
        """Return the weights, whole."""
        return sharding.WholeTensors({n: w.parameter for n, w in self.weights.items()})

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each weight."""
        return {name: tuple(weight.parameter.shape) for name, weight in self.weights.items()}

    def sizes(self) -> dict[str, int]:
        """Return the number of elements of each weight."""
        return {name: weight.parameter.numel() for name, weight in self.weights.items()}

    def zeros(self) -> dict[str, int]:
        """Count the elements of each weight that are zero."""
        return {n: sharding.count_zeros(w.parameter.detach()) for n, w in self.weights.items()}

    def masked(self) -> dict[str, int]:
        """Count the elements of each weight that are masked."""
        return {name: sharding.count_zeros(mask) for name, mask in self.masks.items()}

    def newly_dead(self) -> list[str]:
        """List the weights that have lost their last element since this was last asked."""
        sizes = self.sizes()
        dead = {name for name, count in self.masked().items() if count == sizes[name]}
        new = sorted(dead - self._dead)
        self._dead |= dead
        return new

    # ------------------------------------------------------------------ masks on weights

    def update(self, pools: Sequence[Any], rule: masks.Rule, look: masks.Look) -> None:
        """Bring the masks to exact counts; see `masks.update_masks`."""
        if not any(sharding.is_sharded(weight.parameter) for weight in self.weights.values()):
            masks.update_masks(self.tensors(), self.masks, pools, rule, look)
        else:
            found = {name: sharding.whole(mask) for name, mask in self.masks.items()}

            def look_whole(name: str, weight: Tensor) -> Evidence:
                return sharding.whole_fields(look(name, weight))

            masks.update_masks(self.tensors(), found, pools, rule, look_whole)
            for name, mask in found.items():
                self.masks[name] = sharding.like(mask, self.weights[name].parameter.detach())
        self._stepped = {}

    def set(self, name: str, mask: Tensor) -> None:
        """Replace one mask."""
        self.masks[name] = sharding.like(mask, self.weights[name].parameter.detach())
        self._stepped = {}

    def apply(self, averages: Iterable[nn.Module] = ()) -> None:
        """Zero what is masked, in the module and in averaged copies of it."""
        names = [name for name in self.weights if name in self.masks]
        masks.apply_masks([self.weights[n].parameter for n in names], [self.masks[n] for n in names])
        for average in averages:
            copies = dict(average.named_parameters(remove_duplicate=False))
            for name in names:
                if name in copies and copies[name].shape == self.masks[name].shape:
                    mask = sharding.like(self.masks[name], copies[name].detach())
                    masks.apply_masks([copies[name]], [mask])

    def clear_signs(self) -> None:
        """Turn -0.0 into 0.0 in the weights, before they are written."""
        masks.clear_signs([weight.parameter for name, weight in self.weights.items() if name in self.masks])

    def mask_gradients(self, names: Iterable[str]) -> None:
        """Zero the gradients of masked weights."""
        pairs = [
            (gradient, self.masks[name])
            for name in names
            if name in self.masks and (gradient := self.weights[name].parameter.grad) is not None
        ]
        masks.apply_masks([gradient for gradient, _ in pairs], [mask for _, mask in pairs])

    # ------------------------------------------------------------------ optimizers

    def follow(self, optimizers: Iterable[Optimizer]) -> None:
        """Zero masked weights again after every step of these optimizers."""
        self.release()
        for optimizer in optimizers:
            self._handles.append(optimizer.register_step_post_hook(self._after_step))

    def release(self) -> None:
        """Leave no hook behind."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._stepped = {}

    def names_in(self, optimizer: Optimizer) -> list[str]:
        """List the weights that an optimizer moves."""
        mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return [name for name, weight in self.weights.items() if id(weight.parameter) in mine]

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Zero what this optimizer has just moved; a hook that returned anything would break torch."""
        if not self.masks:
            return
        held = sum(len(group["params"]) for group in optimizer.param_groups)
        known = self._stepped.get(id(optimizer))
        # A finetuning callback may add parameters to an optimizer at any time.
        if known is None or known[0] != held:
            names = [name for name in self.names_in(optimizer) if name in self.masks]
            parameters: list[Tensor] = [self.weights[name].parameter for name in names]
            known = (held, parameters, [self.masks[name] for name in names])
            self._stepped[id(optimizer)] = known
        masks.apply_masks(known[1], known[2])
