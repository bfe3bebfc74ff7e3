"""Unstructured sparsity: scores, scopes, exact selection and masks; plain PyTorch, no Lightning."""
