"""Tells JAX that constants differ between the devices of a `shard_map`, where they meet arrays.

With `check_vma=True` a type says over which axes of the mesh an array varies. The carry of a loop
needs one type before and after, and all branches of a `cond` must agree. A constant varies over no
axis, so that a loop that begins with one is refused unless it is cast.
"""

from __future__ import annotations

from typing import Any

import jax


def vary_like(tree: Any, *like: Any) -> Any:
    """Casts the arrays of a tree to vary over every axis over which one in `like` varies.

    Outside of a `shard_map`, and in one with `check_vma=False`, nothing varies and nothing changes.

    Args:
      tree: of arrays.
      like: trees of arrays. Other leaves are skipped.
    """
    axes = frozenset().union(*map(_axes, jax.tree.leaves(like)))
    if not axes:
        return tree

    def cast(leaf: Any) -> Any:
        missing = axes - _axes(leaf)
        return jax.lax.pcast(leaf, tuple(missing), to="varying") if missing else leaf

    return jax.tree.map(cast, tree)


def _axes(leaf: Any) -> frozenset[str]:
    """Returns the axes of the mesh over which an array varies."""
    if isinstance(leaf, jax.Array):
        leaf = jax.typeof(leaf)
    manual = getattr(leaf, "manual_axis_type", None)
    # Its name up to JAX 0.9.
    varying = getattr(leaf, "vma", None) if manual is None else manual.varying
    return frozenset(varying or ())
