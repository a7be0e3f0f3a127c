"""Pruning at initialization in JAX: SynFlow and its rivals."""
