"""Prune, quantize, export and measure a PyTorch Lightning model for edge devices, while it trains."""

from importlib.metadata import version as _version
from importlib.util import find_spec as _find_spec

if _find_spec("torch") is not None:  # without it, as on a device, there is only `lightning_prune.runtime`
    from lightning_prune.callbacks.accuracy_guard import AccuracyGuard
    from lightning_prune.callbacks.after_pruning import AfterPruning
    from lightning_prune.callbacks.edge_export import EdgeExport
    from lightning_prune.callbacks.elastic_family import ElasticFamily
    from lightning_prune.callbacks.layer_pruning import LayerPruning
    from lightning_prune.callbacks.low_rank import LowRank, low_rank
    from lightning_prune.callbacks.magnitude_pruning import MagnitudePruning
    from lightning_prune.callbacks.quantization_aware_training import QuantizationAwareTraining
    from lightning_prune.callbacks.structural_pruning import StructuralPruning
    from lightning_prune.deploy.onnx import Onnx
    from lightning_prune.deploy.profile import Profile
    from lightning_prune.deploy.quantize import Quantize
    from lightning_prune.deploy.timing import Target
    from lightning_prune.exporting import export
    from lightning_prune.loading import PrunedLoading, load_pruned
    from lightning_prune.portable import load_state, save_state
    from lightning_prune.schedules import Schedule
    from lightning_prune.sparsity.training import SparseTraining
    from lightning_prune.structure.budget import Budget

__version__ = _version("lightning-prune")

__all__ = [
    "AccuracyGuard",
    "AfterPruning",
    "Budget",
    "EdgeExport",
    "ElasticFamily",
    "LayerPruning",
    "LowRank",
    "MagnitudePruning",
    "Onnx",
    "Profile",
    "PrunedLoading",
    "QuantizationAwareTraining",
    "Quantize",
    "Schedule",
    "SparseTraining",
    "StructuralPruning",
    "Target",
    "__version__",
    "export",
    "load_pruned",
    "load_state",
    "low_rank",
    "save_state",
]
