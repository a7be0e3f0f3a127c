"""Pruning neural networks at initialization in JAX: SynFlow (arXiv 2006.05467) and the rules beside it.

The names here need nothing but JAX, NumPy and chex. `synflow_jax.models` has the paper's networks in Flax, and
`synflow_jax.storage` reads and writes masks.
"""

from synflow_jax.analysis import (
    collapsed,
    conservation,
    critical_compression,
    effective_mask,
    log10_path_norm,
    max_compression,
    multiply_adds,
    shortest_path,
)
from synflow_jax.compaction import compact_tree, expand_tree, shrink_tree
from synflow_jax.masking import count_kept, global_mask, kth_smallest, local_mask
from synflow_jax.pruning import PruneInfo, check_finite, prune, prune_loop, python_loop
from synflow_jax.schedules import prune_counts
from synflow_jax.scores import cross_entropy, grasp, magnitude, path_norm, random, saliency, snip, synflow
from synflow_jax.trees import apply_mask, names, prunable, sizes
from synflow_jax.units import unit_scores

__version__ = "0.1.0"

__all__ = [
    "PruneInfo",
    "apply_mask",
    "check_finite",
    "collapsed",
    "compact_tree",
    "conservation",
    "count_kept",
    "critical_compression",
    "cross_entropy",
    "effective_mask",
    "expand_tree",
    "global_mask",
    "grasp",
    "kth_smallest",
    "local_mask",
    "log10_path_norm",
    "magnitude",
    "max_compression",
    "multiply_adds",
    "names",
    "path_norm",
    "prunable",
    "prune",
    "prune_counts",
    "prune_loop",
    "python_loop",
    "random",
    "saliency",
    "shortest_path",
    "shrink_tree",
    "sizes",
    "snip",
    "synflow",
    "unit_scores",
]
