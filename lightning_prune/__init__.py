"""Prune, quantize, export and measure a PyTorch Lightning model for edge devices, while it trains."""
