"""Parameter trees with holes: which leaves can be pruned, their names and sizes.

A `Mask` has the structure of the parameters, with a bool array where a leaf is prunable (True = kept) and
`None`, a hole, where it is not. `Scores` have floats in the same places. JAX sees `None` as an empty
subtree, so every function of JAX maps over the prunable leaves of a mask or of scores and skips the rest.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Tree = Any
Params = Tree  # any pytree of float arrays
Mask = Tree  # bool leaves, None where a parameter is not prunable
Scores = Tree  # float leaves in the same places, larger = keep

_KERNELS = ("kernel", "w", "weight")  # Linen and NNX, Haiku, Equinox
_BIASES = ("bias", "b", "offset")
_SCALES = ("scale", "gamma")


def path_name(path: tuple) -> str:
    """The name of a leaf: its path joined by "/", without the `value` that ends the paths of NNX."""
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return re.sub(r"/\.?value$", "", name)


def names(tree: Tree) -> list[str]:
    """The names of the leaves of `tree` that are not holes, in the order of `jax.tree.leaves`."""
    return [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


def sizes(tree: Tree) -> list[int]:
    """The number of elements of each leaf that is not a hole, in the order of `names`."""
    return [int(leaf.size) for leaf in jax.tree.leaves(tree)]


def prunable(
    params: Params,
    *,
    kernels: bool = True,
    biases: bool = False,
    norms: bool = False,
    exclude: str | None = None,
) -> Mask:
    """The full mask over the parameters that may be pruned: True arrays there, holes elsewhere.

    Leaves are told apart by name, as Linen, NNX, Haiku and Equinox name them: a kernel is called
    `kernel`, `w` or `weight` and has two axes or more; the parameters of a normalisation are a `scale`
    (or `gamma`, or a `weight` of one axis) and the bias beside it; any other `bias`, `b` or `offset` is a bias.

    Args:
      params: a tree of parameters.
      kernels, biases, norms: which kinds may be pruned. The paper prunes kernels alone.
      exclude: a regular expression; a leaf whose name ("block/conv1/kernel") it matches anywhere is a hole.

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
            f"exclude={exclude!r} is not a regular expression: {error}. Name leaves by a pattern such as 'head'."
        ) from error
    wanted = {
        "kernel": kernels,
        "bias": biases,
        "norm scale": norms,
        "norm bias": norms,
        "other": False,
    }
    kinds = leaf_kinds(params)

    def leaf_mask(path: tuple, leaf: jax.Array) -> jax.Array | None:
        name = path_name(path)
        chosen = wanted[kinds[name]] and not (excluded is not None and excluded.search(name))
        return jnp.ones(jnp.shape(leaf), bool) if chosen else None

    mask = jax.tree_util.tree_map_with_path(leaf_mask, params)
    if not jax.tree.leaves(mask):
        raise ValueError(
            f"no parameter is prunable under kernels={kernels}, biases={biases}, norms={norms}, exclude={exclude!r}. "
            f"The leaves are {list(kinds)}: choose other kinds, another pattern, "
            "or build the mask yourself (True arrays at the leaves to prune, None elsewhere)."
        )
    return mask


def leaf_kinds(params: Params) -> dict[str, str]:
    """Each leaf's name and its kind: "kernel", "bias", "norm scale", "norm bias" or "other"; see `prunable`."""
    leaves = {
        path_name(path): jnp.ndim(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }

    def is_scale(name: str) -> bool:
        last = name.rpartition("/")[2]
        return last in _SCALES or (last in _KERNELS and leaves[name] == 1)

    normalised = {name.rpartition("/")[0] for name in leaves if is_scale(name)}

    def kind(name: str) -> str:
        parent, _, last = name.rpartition("/")
        if is_scale(name):
            return "norm scale"
        if last in _BIASES:
            return "norm bias" if parent in normalised else "bias"
        return "kernel" if last in _KERNELS and leaves[name] >= 2 else "other"

    return {name: kind(name) for name in leaves}


def without_biases(params: Params) -> Params:
    """The parameters with all biases, those of norms included, at 0: only paths from the input make output then.

    >>> without_biases({"fc": {"kernel": jnp.ones((1, 1)), "bias": jnp.ones(1)}})["fc"]["bias"]
    Array([0.], dtype=float32)
    """
    kinds = leaf_kinds(params)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            jnp.zeros_like(leaf) if kinds[path_name(path)].endswith("bias") else leaf
        ),
        params,
    )


def map_prunable(function: Callable[..., Any], mask: Mask, *trees: Tree) -> Tree:
    """`function(mask leaf, leaf of each tree, ...)` where the mask has a leaf, a hole where it has none."""
    return jax.tree.map(
        lambda m, *leaves: None if m is None else function(m, *leaves),
        mask,
        *trees,
        is_leaf=lambda leaf: leaf is None,
    )


def select(params: Params, mask: Mask) -> Params:
    """The prunable parameters, and holes."""
    return map_prunable(lambda _, leaf: leaf, mask, params)


def merge(selected: Params, params: Params) -> Params:
    """`params` with the leaves of `selected` in their places: the inverse of `select`."""
    return jax.tree.map(
        lambda new, old: old if new is None else new,
        selected,
        params,
        is_leaf=lambda leaf: leaf is None,
    )


def apply_mask(params: Params, mask: Mask) -> Params:
    """The parameters with every pruned weight at exactly 0; parameters that are not prunable pass unchanged.

    >>> apply_mask({"w": jnp.array([3.0, 4.0]), "b": 5.0}, {"w": jnp.array([True, False]), "b": None})["w"]
    Array([3., 0.], dtype=float32)
    """
    return merge(
        map_prunable(lambda m, leaf: jnp.where(m, leaf, jnp.zeros_like(leaf)), mask, params), params
    )


def check_mask(mask: Mask, params: Params) -> None:
    """Raises ValueError unless `mask` fits `params`: bool leaves of the same shapes, or holes."""
    flat_params, structure = jax.tree_util.tree_flatten_with_path(params)
    try:
        flat_mask = structure.flatten_up_to(mask)  # type: ignore[attr-defined]
    except ValueError as error:
        raise ValueError(
            f"mask does not have the structure of the parameters: {error}. Make one with prunable(params)."
        ) from error
    if all(leaf is None for leaf in flat_mask):
        raise ValueError("mask has no prunable leaf, only holes. Make one with prunable(params).")
    for (path, leaf), m in zip(flat_params, flat_mask, strict=True):
        if m is not None and not hasattr(m, "shape"):
            raise ValueError(
                f"mask at {path_name(path)!r} is a {type(m).__name__}; it must be a bool array or None."
            )
        if m is not None and (jnp.shape(m) != jnp.shape(leaf) or jnp.result_type(m) != jnp.bool_):
            raise ValueError(
                f"mask at {path_name(path)!r} is {jnp.result_type(m)}{list(jnp.shape(m))}; it must be "
                f"bool{list(jnp.shape(leaf))}, as its parameter, or None."
            )
