"""Prunes neural networks at initialization: SynFlow (arXiv 2006.05467) and its baselines.

Everything here runs on NumPy, JAX and chex alone. The wings are imported by name, for instance
`from synflow_jax import models` for the networks of the paper in Flax.
"""

from synflow_jax.analysis import collapsed, conservation, max_compression
from synflow_jax.pruning import PruneInfo, prune, prune_loop, python_loop
from synflow_jax.scores import (
    cross_entropy,
    grasp,
    magnitude,
    path_norm,
    random,
    saliency,
    snip,
    synflow,
)
from synflow_jax.trees import apply_mask, prunable

__version__ = "0.1.0"

__all__ = [
    "PruneInfo",
    "apply_mask",
    "collapsed",
    "conservation",
    "cross_entropy",
    "grasp",
    "magnitude",
    "max_compression",
    "path_norm",
    "prunable",
    "prune",
    "prune_loop",
    "python_loop",
    "random",
    "saliency",
    "snip",
    "synflow",
]
