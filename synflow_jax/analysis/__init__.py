"""Analyses masks and models: the paths that are left, and the conservation of saliency."""

from synflow_jax.analysis.conservation import Conservation, conservation
from synflow_jax.analysis.paths import (
    collapsed,
    critical_compression,
    effective_mask,
    log10_path_norm,
    max_compression,
    multiply_adds,
    shortest_path,
)

__all__ = [
    "Conservation",
    "collapsed",
    "conservation",
    "critical_compression",
    "effective_mask",
    "log10_path_norm",
    "max_compression",
    "multiply_adds",
    "shortest_path",
]
