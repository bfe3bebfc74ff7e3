"""What all tests share."""

import torch
from hypothesis import settings

torch.set_num_threads(1)
# Shared machines stall: how long an example takes says nothing about the code.
settings.register_profile("shared", deadline=None)
settings.load_profile("shared")
