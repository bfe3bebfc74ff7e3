"""Structural pruning as plain PyTorch: find channel groups, choose what goes, cut it, restore it."""
