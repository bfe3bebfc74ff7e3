import lightning_prune

EXPECTED = {
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
    "save_state",
    "low_rank",
}


def test_public_names_are_exactly_these():
    assert set(lightning_prune.__all__) == EXPECTED
    assert all(hasattr(lightning_prune, name) for name in EXPECTED)


def test_public_classes_and_functions_say_what_they_do():
    undocumented = [n for n in EXPECTED - {"__version__"} if not getattr(lightning_prune, n).__doc__]
    assert undocumented == []
