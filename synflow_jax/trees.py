"""Finds the prunable leaves of a parameter tree, names them, and applies masks to them.

A `Mask` has the structure of the parameters. It holds a bool array where a leaf is prunable
(True = kept) and `None`, a hole, where it is not. `Scores` hold floats in the same places. JAX
treats `None` as an empty subtree, so `jax.tree.map` over masks or scores visits the prunable leaves
and skips the rest.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NewType

import jax
import jax.numpy as jnp
import numpy as np

from synflow_jax import arguments

Tree = Any
# The user's own tree: a dict of Linen, a State of NNX, a Module of Equinox. So any type is welcome.
Params = Any
# What this package makes of it. They index like dicts, and a type checker tells the two apart.
Mask = NewType("Mask", dict[str, Any])
Scores = NewType("Scores", dict[str, Any])

# Linen and NNX, Haiku, Equinox; then the recurrent cells of Equinox, PyTorch and Haiku, PyTorch's
# attention and NNX's LoRA.
_KERNEL = re.compile(
    r"kernel|w|weight|weight_[ih]h(_l\d+)?(_reverse)?|w_[ih]|in_proj_weight|lora_[ab]"
)
_BIAS = re.compile(r"(.*_)?bias|b|offset|bias_n|bias_[ih]h(_l\d+)?(_reverse)?")
_SCALE = re.compile(r"scale|gamma")
# A mean is a running mean if its partner is beside it. Haiku has a module for each of the two.
_STATISTICS = (("mean", "var"), ("mean", "std"), ("running_mean", "running_var"))
_HAIKU_STATISTICS = ("mean_ema", "var_ema")
# Tables that are read or added, but are no factor of a product with the input.
_TABLE = re.compile(r"embed|token|(^|[/_])(cls|pos)([/_]|$)|position", re.IGNORECASE)


class UnprunedLeaves(UserWarning):
    """Warns that leaves which may be weights are not pruned, because their names are unknown."""


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
    """Tells kernels, biases, norms and statistics apart by the names that libraries use.

    Returns:
      Per leaf name, "kernel", "bias", "norm scale", "norm bias", "running mean",
      "running variance" or "other"; see `prunable`.

    >>> leaf_kinds({"norm": {"scale": jnp.ones(2), "mean": jnp.ones(2), "var": jnp.ones(2)}})
    {'norm/mean': 'running mean', 'norm/scale': 'norm scale', 'norm/var': 'running variance'}
    """
    return dict(zip(names(params), _kinds(params), strict=True))


def _kinds(params: Params) -> list[str]:
    """Returns the kind of each leaf, in the order of `jax.tree.leaves`."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    shapes = [(path_name(path), _shape(leaf)) for path, leaf in leaves]
    all_shapes = dict(shapes)

    def is_scale(name: str, shape: tuple[int, ...]) -> bool:
        parent, _, last = name.rpartition("/")
        if _SCALE.fullmatch(last):
            return True
        # Equinox calls the scale of a norm `weight`, like a kernel. But it has a single axis, or as
        # many as the bias next to it.
        is_like_bias = last == "weight" and all_shapes.get(_join(parent, "bias")) == shape
        return bool(_KERNEL.fullmatch(last)) and (len(shape) == 1 or is_like_bias)

    norms = {name.rpartition("/")[0] for name, shape in shapes if is_scale(name, shape)}

    def kind(name: str, shape: tuple[int, ...]) -> str:
        parent, _, last = name.rpartition("/")
        statistic = _statistic(name, all_shapes)
        if statistic is not None:
            return statistic
        if is_scale(name, shape):
            return "norm scale"
        if _BIAS.fullmatch(last):
            return "norm bias" if parent in norms else "bias"
        return "kernel" if _KERNEL.fullmatch(last) and len(shape) >= 2 else "other"

    return [kind(name, shape) for name, shape in shapes]


def _join(parent: str, last: str) -> str:
    return f"{parent}/{last}" if parent else last


def _statistic(name: str, others: dict[str, Any]) -> str | None:
    """Returns which running statistic a leaf is, or None if it is none."""
    parent, _, last = name.rpartition("/")
    for mean, deviation in _STATISTICS:
        if last == mean and _join(parent, deviation) in others:
            return "running mean"
        if last == deviation and _join(parent, mean) in others:
            return "running variance"
    module, _, ema = parent.rpartition("/")
    mean, deviation = _HAIKU_STATISTICS
    if ema == mean and _join(_join(module, deviation), last) in others:
        return "running mean"
    if ema == deviation and _join(_join(module, mean), last) in others:
        return "running variance"
    return None


def _shape(leaf: Any) -> tuple[int, ...]:
    """Returns the shape of a leaf. What is no array, such as a function, has no axes."""
    return tuple(getattr(leaf, "shape", ()))


def is_float(leaf: Any) -> bool:
    """Returns whether a leaf holds real floats: no integers, bools, keys or complex numbers."""
    dtype = getattr(leaf, "dtype", None)
    if dtype is None:
        return isinstance(leaf, float)
    return bool(jnp.issubdtype(dtype, jnp.floating))


def float_type(params: Params) -> Any:
    """Returns the common dtype of the floats of a tree; float32 if there are none.

    >>> float_type({"count": jnp.int32(1), "w": jnp.ones(2, jnp.bfloat16)})
    dtype(bfloat16)
    """
    floats = [leaf for leaf in jax.tree.leaves(params) if is_float(leaf)]
    if not floats:
        return jnp.dtype(jnp.float32)
    # The mix is the caller's choice, also under jax_numpy_dtype_promotion="strict".
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*floats)


# Masks -------------------------------------------------------------------------------------------


def prunable(
    params: Params,
    *,
    kernels: bool = True,
    biases: bool = False,
    norms: bool = False,
    include: str | None = None,
    exclude: str | None = None,
) -> Mask:
    """Builds the full mask over the parameters that may be pruned.

    Leaves are told apart by name, as Linen, NNX, Haiku and Equinox name them. A kernel is called
    `kernel`, `w` or `weight`, or in recurrent cells `weight_ih`, `weight_hh`, `w_i` or `w_h`, and
    has two axes or more. A normalisation has a `scale` (or `gamma`, or a `weight` with one axis)
    and the bias next to it. Any other `bias`, `b` or `offset` is a bias.

    Args:
      params: tree of arrays.
      kernels, biases, norms: which kinds may be pruned. The paper prunes kernels alone.
      include: a regular expression. Leaves whose name ("block/conv1/kernel") it matches anywhere
        may be pruned too, whatever their kind.
      exclude: a regular expression. Leaves whose name it matches anywhere become holes.

    Returns:
      A tree like `params`, with an all-True array for each leaf that may be pruned and None for
      every other leaf.

    Raises:
      ValueError: a flag is not a bool; `include` or `exclude` is not a regular expression, or
        matches no leaf; nothing is left to prune.

    >>> params = {"conv": {"kernel": jnp.ones((3, 3, 1, 8)), "bias": jnp.zeros(8)},
    ...           "head": {"kernel": jnp.ones((8, 2))}}
    >>> sizes(prunable(params)), sizes(prunable(params, biases=True, exclude="head"))
    ([72, 16], [8, 72])
    >>> names(prunable(params, kernels=False, include="^head"))
    ['head/kernel']
    """
    flags = {"kernels": kernels, "biases": biases, "norms": norms}
    for flag, value in flags.items():
        arguments.check_flag(flag, value)
    # Everything that is not a kernel, a bias or a norm (running statistics, position embeddings) is
    # pruned only if it is named.
    wanted = {"kernel": kernels, "bias": biases, "norm scale": norms, "norm bias": norms}
    leaf_names, kinds = names(params), _kinds(params)
    included = _matches("include", include, leaf_names)
    excluded = _matches("exclude", exclude, leaf_names)

    def leaf_mask(i: int, leaf: Any) -> jax.Array | None:
        is_chosen = wanted.get(kinds[i], False) or included[i]
        if not is_chosen or excluded[i]:
            return None
        # Not `jnp.ones`, which jax_transfer_guard="disallow" refuses.
        return jax.device_put(np.ones(_shape(leaf), bool))

    leaves, structure = jax.tree.flatten(params)
    masks = [leaf_mask(i, leaf) for i, leaf in enumerate(leaves)]
    if all(m is None for m in masks):
        raise ValueError(
            f"no parameter is prunable with kernels={kernels}, biases={biases}, norms={norms}, "
            f"include={include!r}, exclude={exclude!r}. The leaves are {leaf_names}. Choose other "
            "kinds or another pattern, or build the mask yourself: True arrays at the leaves to "
            "prune, and None elsewhere."
        )
    return jax.tree.unflatten(structure, masks)


def _matches(argument: str, pattern: Any, leaf_names: Sequence[str]) -> list[bool]:
    """Returns, per leaf, whether a pattern matches its name; without a pattern none is matched."""
    # An empty pattern, as of a flag, is none.
    if pattern is None or pattern == "":
        return [False] * len(leaf_names)
    try:
        compiled = re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(
            f"{argument}={pattern!r} is not a regular expression: {error}. "
            "Name leaves by a pattern such as 'head'."
        ) from error
    found = [bool(compiled.search(name)) for name in leaf_names]
    # A slip of the pen would prune, or spare, what it was meant for.
    if not any(found):
        raise ValueError(
            f"{argument}={pattern!r} matches none of the leaves {list(leaf_names)}: fix the "
            "pattern."
        )
    return found


def default_mask(params: Params) -> Mask:
    """Returns `prunable(params)`, and warns of leaves that may be weights but have unknown names.

    Warns:
      UnprunedLeaves: floats with two axes or more are neither a known kind nor named as an
        embedding or a token.
    """
    mask = prunable(params)
    leaves = jax.tree.leaves(params)
    unknown = []
    for name, kind, leaf in zip(names(params), _kinds(params), leaves, strict=True):
        num_axes = sum(size > 1 for size in _shape(leaf))
        is_weight = kind == "other" and is_float(leaf) and num_axes >= 2
        if is_weight and not _TABLE.search(name):
            unknown.append(name)
    if unknown:
        pattern = "|".join(re.escape(name) for name in unknown)
        message = (
            f"{unknown} are not pruned, because their names are not those of weights. To prune "
            f"them pass mask=prunable(params, include={pattern!r}). To keep them, and for no "
            "warning, pass mask=prunable(params)."
        )
        # The caller of the function that took the default.
        warnings.warn(message, UnprunedLeaves, stacklevel=3)
    return mask


def check_mask(mask: Mask, params: Params) -> None:
    """Raises ValueError unless `mask` fits `params`: bool leaves of the same shapes, or holes."""
    pairs = _pairs(mask, params)
    if all(m is None for _, m, _ in pairs):
        raise ValueError("mask has no prunable leaf, only holes. Make one with prunable(params).")


def _pairs(mask: Mask, params: Params) -> list[tuple[str, Any, Any]]:
    """Returns the name, the mask and the value of each leaf, once the mask is found to fit."""
    flat_params, structure = jax.tree_util.tree_flatten_with_path(params)
    # `flatten_up_to` keeps the holes, which `jax.tree.leaves` would drop.
    try:
        flat_mask = structure.flatten_up_to(mask)  # type: ignore[attr-defined]
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"mask does not have the structure of the parameters: {_difference(mask, params)}. "
            "Make one with prunable(params)."
        ) from error
    pairs = []
    for (path, leaf), m in zip(flat_params, flat_mask, strict=True):
        name = path_name(path)
        if m is not None:
            _check_leaf(name, m, leaf)
        pairs.append((name, m, leaf))
    return pairs


def _difference(mask: Any, params: Params) -> str:
    """Says how the structure of a mask differs from that of the parameters."""
    paths = jax.tree_util.tree_leaves_with_path(mask, is_leaf=_is_hole)
    in_mask = [path_name(path) for path, _ in paths]
    in_params = names(params)
    missing = [name for name in in_params if name not in in_mask]
    unknown = [name for name in in_mask if name not in in_params]
    if unknown == [""]:
        return f"it is {arguments.describe(mask)}, not a tree"
    if not missing and not unknown:
        return f"a {type(mask).__name__} or what it holds is of another type in the parameters"
    parts = []
    if missing:
        parts.append(f"it lacks {arguments.short(missing)}")
    if unknown:
        parts.append(f"it has {arguments.short(unknown)}, which they lack")
    return " and ".join(parts)


def _check_leaf(name: str, m: Any, leaf: Any) -> None:
    """Raises ValueError unless a mask leaf is a bool array of the shape of its parameter."""
    if not hasattr(m, "shape"):
        raise ValueError(
            f"mask at {name!r} is a {type(m).__name__}; it must be a bool array or None."
        )
    if m.shape != _shape(leaf) or m.dtype != jnp.bool_:
        raise ValueError(
            f"mask at {name!r} is {m.dtype}{list(m.shape)}; it must be "
            f"bool{list(_shape(leaf))}, like its parameter, or None."
        )


def check_params(params: Params, mask: Mask) -> None:
    """Raises ValueError unless the parameters are arrays, and floats where they are prunable.

    Args:
      params: tree of arrays. Integers, keys and the like are welcome where nothing is pruned.
      mask: that fits them; see `check_mask`.
    """
    for name, m, leaf in _pairs(mask, params):
        is_array = hasattr(leaf, "dtype") and hasattr(leaf, "shape")
        if not is_array and not isinstance(leaf, bool | int | float | complex):
            raise ValueError(
                f"params at {name!r} is a {type(leaf).__name__}, not an array. Take the arrays "
                "alone, for instance eqx.partition(model, eqx.is_inexact_array) in Equinox."
            )
        if m is not None and not is_float(leaf):
            dtype = leaf.dtype if is_array else type(leaf).__name__
            raise ValueError(
                f"params at {name!r} is {dtype}, and only floats can be pruned. Cast it, or leave "
                f"it out: mask=prunable(params, exclude={re.escape(name)!r})."
            )


def apply_mask(params: Params, mask: Mask) -> Params:
    """Sets every pruned weight to exactly 0. Parameters that are not prunable stay as they are.

    Raises:
      ValueError: the mask does not fit the parameters.

    >>> params = {"w": jnp.array([3.0, 4.0]), "b": 5.0}
    >>> apply_mask(params, {"w": jnp.array([True, False]), "b": None})["w"]
    Array([3., 0.], dtype=float32)
    """
    # Here, since a mask of another shape might broadcast.
    _pairs(mask, params)
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
    return _with_zeros(params, ("bias", "norm bias"))


def without_means(params: Params) -> Params:
    """Sets all running means to 0: a mean that is subtracted makes negative flow.

    A running mean is called `mean` and has a `var` or `std` beside it, or `running_mean` and has a
    `running_var`, or is a leaf of Haiku's `mean_ema`.

    >>> without_means({"norm": {"mean": jnp.ones(1), "var": jnp.ones(1)}})["norm"]["mean"]
    Array([0.], dtype=float32)
    """
    return _with_zeros(params, ("running mean",))


def _with_zeros(params: Params, zero_kinds: Sequence[str]) -> Params:
    """Sets the floats of some kinds to 0."""
    leaves, structure = jax.tree.flatten(params)
    kinds = _kinds(params)
    changed = []
    for kind, leaf in zip(kinds, leaves, strict=True):
        is_zero = kind in zero_kinds and is_float(leaf)
        changed.append(jnp.zeros_like(leaf) if is_zero else leaf)
    return jax.tree.unflatten(structure, changed)


def trained(params: Params) -> Params:
    """Returns the floats that are no running statistics, with holes at all other leaves."""
    leaves, structure = jax.tree.flatten(params)
    chosen = []
    for kind, leaf in zip(_kinds(params), leaves, strict=True):
        is_trained = is_float(leaf) and not kind.startswith("running")
        chosen.append(leaf if is_trained else None)
    return jax.tree.unflatten(structure, chosen)


def absolute(params: Params) -> Params:
    """Replaces the floats of a tree by their absolute values. Integers, keys and the like stay."""
    return jax.tree.map(lambda leaf: jnp.abs(leaf) if is_float(leaf) else leaf, params)
