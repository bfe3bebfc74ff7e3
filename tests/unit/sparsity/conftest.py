"""Timings of single examples say nothing on a machine that does other work as well."""

from hypothesis import settings

settings.register_profile("sparsity", deadline=None)
settings.load_profile("sparsity")
