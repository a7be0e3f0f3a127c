"""Finds the prunable leaves of a parameter tree, names them, and applies masks to them.

A `Mask` has the structure of the parameters. It holds a bool array where a leaf is prunable
(True = kept) and `None`, a hole, where it is not. `Scores` hold floats in the same places. JAX
treats `None` as an empty subtree, so `jax.tree.map` over masks or scores visits the prunable leaves
and skips the rest.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NewType

import jax
import jax.numpy as jnp

Tree = Any
# The user's own tree: a dict of Linen, a State of NNX, a Module of Equinox. So any type is welcome.
Params = Any
# What this package makes of it. They index like dicts, and a type checker tells the two apart.
Mask = NewType("Mask", dict[str, Any])
Scores = NewType("Scores", dict[str, Any])

_KERNELS = ("kernel", "w", "weight")  # Linen and NNX, Haiku, Equinox
_BIASES = ("bias", "b", "offset")
_SCALES = ("scale", "gamma")


def _is_hole(leaf: Any) -> bool:
    return leaf is None


# Names and kinds of leaves -----------------------------------------------------------------------


def path_name(path: tuple) -> str:
    """Joins the path of a leaf by "/", without the `value` at the end of NNX paths."""
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return re.sub(r"/\.?value$", "", name)


def names(tree: Tree) -> list[str]:
    """Returns the names of the leaves that are not holes, in the order of `jax.tree.leaves`."""
    return [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def by_name(tree: Tree) -> dict[str, Any]:
    """Returns the leaves that are not holes by their names, in the order of `names`.

    >>> by_name({"fc": {"kernel": 3, "bias": None}, "scale": 4})
    {'fc/kernel': 3, 'scale': 4}

    Raises:
      ValueError: two leaves have the same name, so that one of them would be lost.
    """
    found: dict[str, Any] = {}
    paths: dict[str, str] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = path_name(path)
        place = jax.tree_util.keystr(path)
        if name in found:
            raise ValueError(
                f"two leaves have the name {name!r}: {paths[name]} and {place}. Rename one of "
                "them: a file or a table by name would lose the other."
            )
        found[name] = leaf
        paths[name] = place
    return found


def sizes(tree: Tree) -> list[int]:
    """Returns the number of elements of each leaf that is not a hole, in the order of `names`."""
    return [int(leaf.size) for leaf in jax.tree.leaves(tree)]


def leaf_kinds(params: Params) -> dict[str, str]:
    """Tells kernels, biases and norms apart by the names that Linen, NNX, Haiku and Equinox use.

    Returns:
      Per leaf name, "kernel", "bias", "norm scale", "norm bias" or "other"; see `prunable`.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    num_axes = {path_name(path): jnp.ndim(leaf) for path, leaf in leaves}

    def is_scale(name: str) -> bool:
        last = name.rpartition("/")[2]
        # Equinox calls the scale of a norm `weight`, like a kernel, but it has a single axis.
        return last in _SCALES or (last in _KERNELS and num_axes[name] == 1)

    norms = {name.rpartition("/")[0] for name in num_axes if is_scale(name)}

    def kind(name: str) -> str:
        parent, _, last = name.rpartition("/")
        if is_scale(name):
            return "norm scale"
        if last in _BIASES:
            return "norm bias" if parent in norms else "bias"
        return "kernel" if last in _KERNELS and num_axes[name] >= 2 else "other"

    return {name: kind(name) for name in num_axes}


# Masks -------------------------------------------------------------------------------------------


def prunable(
    params: Params,
    *,
    kernels: bool = True,
    biases: bool = False,
    norms: bool = False,
    exclude: str | None = None,
) -> Mask:
    """Builds the full mask over the parameters that may be pruned.

    Leaves are told apart by name, as Linen, NNX, Haiku and Equinox name them. A kernel is called
    `kernel`, `w` or `weight` and has two axes or more. A normalisation has a `scale` (or `gamma`,
    or a `weight` with one axis) and the bias next to it. Any other `bias`, `b` or `offset` is a
    bias.

    Args:
      params: tree of arrays.
      kernels, biases, norms: which kinds may be pruned. The paper prunes kernels alone.
      exclude: a regular expression. Leaves whose name ("block/conv1/kernel") it matches anywhere
        become holes.

    Returns:
      A tree like `params`, with an all-True array for each leaf that may be pruned and None for
      every other leaf.

    Raises:
      ValueError: `exclude` is not a regular expression, or nothing is left to prune.

    >>> params = {"conv": {"kernel": jnp.ones((3, 3, 1, 8)), "bias": jnp.zeros(8)},
    ...           "head": {"kernel": jnp.ones((8, 2))}}
    >>> sizes(prunable(params)), sizes(prunable(params, biases=True, exclude="head"))
    ([72, 16], [8, 72])
    """
    try:
        excluded = re.compile(exclude) if exclude else None
    except re.error as error:
        raise ValueError(
            f"exclude={exclude!r} is not a regular expression: {error}. "
            "Name leaves by a pattern such as 'head'."
        ) from error
    # Everything that is not a kernel, a bias or a norm (running statistics, position embeddings) is
    # never pruned.
    kinds = leaf_kinds(params)
    wanted = {
        "kernel": kernels,
        "bias": biases,
        "norm scale": norms,
        "norm bias": norms,
        "other": False,
    }

    def leaf_mask(path: tuple, leaf: jax.Array) -> jax.Array | None:
        name = path_name(path)
        is_excluded = excluded is not None and excluded.search(name)
        if not wanted[kinds[name]] or is_excluded:
            return None
        return jnp.ones(jnp.shape(leaf), bool)

    mask: Mask = jax.tree_util.tree_map_with_path(leaf_mask, params)
    if not jax.tree.leaves(mask):
        raise ValueError(
            f"no parameter is prunable with kernels={kernels}, biases={biases}, norms={norms}, "
            f"exclude={exclude!r}. The leaves are {list(kinds)}. Choose other kinds or another "
            "pattern, or build the mask yourself: True arrays at the leaves to prune, and None "
            "elsewhere."
        )
    return mask


def check_mask(mask: Mask, params: Params) -> None:
    """Raises ValueError unless `mask` fits `params`: bool leaves of the same shapes, or holes."""
    flat_params, structure = jax.tree_util.tree_flatten_with_path(params)
    # `flatten_up_to` keeps the holes, which `jax.tree.leaves` would drop.
    try:
        flat_mask = structure.flatten_up_to(mask)  # type: ignore[attr-defined]
    except ValueError as error:
        raise ValueError(
            f"mask does not have the structure of the parameters: {str(error).rstrip('.')}. "
            "Make one with prunable(params)."
        ) from error
    if all(leaf is None for leaf in flat_mask):
        raise ValueError("mask has no prunable leaf, only holes. Make one with prunable(params).")
    for (path, leaf), m in zip(flat_params, flat_mask, strict=True):
        if m is not None:
            _check_leaf(path_name(path), m, leaf)


def _check_leaf(name: str, m: Any, leaf: Any) -> None:
    """Raises ValueError unless a mask leaf is a bool array of the shape of its parameter."""
    if not hasattr(m, "shape"):
        raise ValueError(
            f"mask at {name!r} is a {type(m).__name__}; it must be a bool array or None."
        )
    if jnp.shape(m) != jnp.shape(leaf) or jnp.result_type(m) != jnp.bool_:
        raise ValueError(
            f"mask at {name!r} is {jnp.result_type(m)}{list(jnp.shape(m))}; it must be "
            f"bool{list(jnp.shape(leaf))}, like its parameter, or None."
        )


def apply_mask(params: Params, mask: Mask) -> Params:
    """Sets every pruned weight to exactly 0. Parameters that are not prunable stay as they are.

    >>> params = {"w": jnp.array([3.0, 4.0]), "b": 5.0}
    >>> apply_mask(params, {"w": jnp.array([True, False]), "b": None})["w"]
    Array([3., 0.], dtype=float32)
    """
    # Not a product: an infinite weight times 0 would be NaN.
    masked = map_prunable(lambda m, leaf: jnp.where(m, leaf, jnp.zeros_like(leaf)), mask, params)
    return merge(masked, params)


# Maps over the prunable leaves -------------------------------------------------------------------


def map_prunable(function: Callable[..., Any], mask: Mask, *trees: Tree) -> Tree:
    """Maps `function(mask leaf, leaf of each tree, ...)` over the prunable leaves; holes stay."""

    def leaf_function(m: Any, *leaves: Any) -> Any:
        return None if m is None else function(m, *leaves)

    return jax.tree.map(leaf_function, mask, *trees, is_leaf=_is_hole)


def select(params: Params, mask: Mask) -> Params:
    """Returns the prunable parameters, with holes at all others."""
    return map_prunable(lambda _, leaf: leaf, mask, params)


def merge(selected: Params, params: Params) -> Params:
    """Puts the leaves of `selected` into their places in `params`: the inverse of `select`."""

    def leaf_function(new: Any, old: Any) -> Any:
        return old if new is None else new

    return jax.tree.map(leaf_function, selected, params, is_leaf=_is_hole)


def without_biases(params: Params) -> Params:
    """Sets all biases to 0, those of norms included, so that only paths from the input make output.

    >>> without_biases({"fc": {"kernel": jnp.ones((1, 1)), "bias": jnp.ones(1)}})["fc"]["bias"]
    Array([0.], dtype=float32)
    """
    kinds = leaf_kinds(params)

    def leaf_function(path: tuple, leaf: jax.Array) -> jax.Array:
        is_bias = kinds[path_name(path)].endswith("bias")
        return jnp.zeros_like(leaf) if is_bias else leaf

    return jax.tree_util.tree_map_with_path(leaf_function, params)
