"""What all tests share."""

import contextlib
import copy
import functools

import torch
from hypothesis import settings

torch.set_num_threads(1)
# Shared machines stall: how long an example takes says nothing about the code.
settings.register_profile("shared", deadline=None)
settings.load_profile("shared")


def read_operators_once() -> None:
    """Read the sources of the exporter's operators once, not for each of the hundreds of exports."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    read = functools.cache(ONNXRegistry.from_torchlib)

    def copied(*arguments, **options):
        registry = copy.copy(read(*arguments, **options))
        registry.functions = {name: list(found) for name, found in registry.functions.items()}
        return registry

    ONNXRegistry.from_torchlib = staticmethod(copied)


# Where this torch keeps them elsewhere, the tests only take longer.
with contextlib.suppress(ImportError, AttributeError):
    read_operators_once()
