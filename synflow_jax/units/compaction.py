"""Removes the units that a mask has left without use, so that a pruned network becomes smaller.

Two kinds of units can be removed without any change to the function of the network:

- Units from which no kept weight leads to an output over units that stay. The output does not
  depend on them, and their gradient is 0. They can be removed from any network, in evaluation and
  training.
- Units that are 0, and to which no kept weight leads from an input. Everything that is added to
  them (biases, running means) is 0, and the functions after them map 0 to 0. For training, these
  functions must also have derivative 0 at 0, as `jax.nn.relu` has, so that the bias stays 0.

Any other unit that receives nothing is a constant. It stays, masked. For inference alone (`fold`),
the constant can become part of the next layer's bias; see `folding`.

Units are those of `units.groups`. A channel of a residual stream is one unit in all of its layers,
and stays if one branch needs it. Inputs, outputs and units of groups that are `fixed` stay. If a
group would be left empty, one dead, masked unit of it stays, so that its layers still exist.

The forward pass and every gradient are exact, up to the rounding of shorter sums. That includes
batch normalization by the statistics of a batch, since each channel has its own. Two things differ:
random numbers that are drawn in the shape of the activations (dropout), and an optimizer whose
momentum moves a bias of 0 that has no gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from synflow_jax import trees
from synflow_jax.trees import Mask, Tree
from synflow_jax.units import folding, grouping, tracing
from synflow_jax.units.connections import Connections, MaskedLeaves, connect
from synflow_jax.units.grouping import Group


class Plan(NamedTuple):
    """Maps a network to the smaller one.

    Attributes:
      kept: the units that stay, int ascending, by the name of their group.
      sizes: the number of units of each group in the full network, by its name.
      positions: the positions that stay along each axis of a leaf, by the name of the leaf. None
        for an axis of which all positions stay.
      shapes: the shape of each leaf in the full network, by its name.
      structures: the tree structure of the variables, and of each of their collections, with the
        names of their leaves.
    """

    kept: dict[str, np.ndarray]
    sizes: dict[str, int]
    positions: dict[str, tuple[np.ndarray | None, ...]]
    shapes: dict[str, tuple[int, ...]]
    structures: dict[Any, tuple[str, ...]]


class Compacted(NamedTuple):
    """Holds a smaller network.

    Attributes:
      variables: the variables without the removed units.
      mask: the mask of these variables.
      plan: maps the full network to this one.
      bounds: the error of folding (see `tolerance` of `compact_tree`), by the name of each padded
        kernel that read a folded unit. It is the most that an output of the layer changes, before
        its activation, at the borders of its map.
    """

    variables: Tree
    mask: Mask
    plan: Plan
    bounds: Mapping[str, float]


def compact_tree(
    apply_fn: Callable[[Tree, jax.Array], Any],
    variables: Tree,
    mask: Mask,
    input_shape: Sequence[int],
    *,
    fold: bool = False,
    tolerance: float = 0.0,
    dtype: Any = jnp.float32,
) -> Compacted:
    """Removes the units that a mask has left without use from the variables of any network.

    The caller builds the smaller network: its sizes are those of the new arrays, and also the
    lengths of `plan.kept`. `models.compact` does both for the networks of this package.

    Args:
      apply_fn: `apply_fn(variables, x)`, in evaluation mode.
      variables: everything that has units: the parameters, and any batch statistics.
      mask: bool arrays for the prunable parameters and holes elsewhere, in a tree like `variables`
        or like its first collections: `{"params": mask}` for `{"params": ..., "batch_stats": ...}`.
      input_shape: of one example.
      fold: for inference alone. Removes a constant unit too, if all that read it are dense layers
        or convolutions without padding that are followed by a bias or by a norm with a running
        mean. Units that are 0 now are removed even if training would change them. The new biases
        are not those of the full network, so that the result cannot be expanded.
      tolerance: with `fold`, lets padded convolutions take up constants as long as no output of the
        layer changes by more than this, before its activation. Only outputs at the borders of the
        map change. `Compacted.bounds` has the changes. Later layers may amplify them.
      dtype: of the inputs.

    Raises:
      ValueError: no kept weight leads from the inputs to the outputs, the mask does not fit, or
        the tolerance is negative, or given without `fold`. (A weight that is only ever applied to
        padding counts as one that leads on.)

    >>> def apply_fn(params, x):
    ...     for layer in params[:-1]:
    ...         x = jax.nn.relu(x @ layer["w"] + layer["b"][None])
    ...     return x @ params[-1]["w"]
    >>> shapes = [(4, 100), (100, 50), (50, 3)]
    >>> params = [{"w": jnp.ones(shape), "b": jnp.zeros(shape[1])} for shape in shapes]
    >>> mask = [{"w": jnp.ones(shape, bool), "b": None} for shape in shapes]

    Nothing leads to 90 units of the first layer, and nothing away from 30 units of the second:

    >>> mask[0]["w"] = mask[0]["w"].at[:, 10:].set(False)
    >>> mask[2]["w"] = mask[2]["w"].at[:30].set(False)
    >>> small = compact_tree(apply_fn, params, mask, (4,))
    >>> [layer["w"].shape for layer in small.variables]
    [(4, 10), (10, 20), (20, 3)]
    >>> x = jnp.ones((1, 4))
    >>> bool(jnp.all(apply_fn(small.variables, x) == apply_fn(trees.apply_mask(params, mask), x)))
    True
    """
    if not 0 <= tolerance < np.inf or (tolerance and not fold):
        raise ValueError(
            f"tolerance={tolerance!r}: it must be a finite number of at least 0, and it requires "
            "fold=True. It limits the error that folded constants make at the borders of padded "
            "convolutions."
        )
    groups = grouping.groups(apply_fn, variables, input_shape, dtype)
    if not fold:
        plan = make_plan(groups, variables, mask)
        small = shrink_tree(plan, variables)
        small_mask = shrink_tree(plan, mask)
        return Compacted(small, small_mask, plan, bounds={})

    network = MaskedLeaves.of(variables, mask)
    connections = connect(groups, network)
    structure = jax.tree.structure(variables)
    masked_leaves = [network.masked(name) for name in network.names]
    masked = jax.tree.unflatten(structure, masked_leaves)
    # Constants are evaluated for inputs of 0, on which they do not depend.
    records = tracing.trace(apply_fn, masked, input_shape, dtype, evaluate=True)
    folded = folding.foldable(connections, records.reads, tolerance)
    needless = connections.silent(train=False) | folded
    plan = _plan_without(connections, needless, variables)
    # Folded after the plan is made: a unit that stays must not be added to the bias as well.
    leaves, bounds = folding.fold(connections, records.reads, folded, plan.positions)
    new_leaves = [jnp.asarray(leaf) for leaf in leaves.values()]
    variables = jax.tree.unflatten(structure, new_leaves)
    small = shrink_tree(plan, variables)
    small_mask = shrink_tree(plan, mask)
    return Compacted(small, small_mask, plan, bounds)


# ------------------------------------------------------------------------------------------ Plans


def make_plan(groups: Sequence[Group], variables: Tree, mask: Mask) -> Plan:
    """Plans which units stay, so that the smaller network trains like the full one.

    Args:
      groups: `units.groups` of the network.
      variables: see `compact_tree`.
      mask: see `compact_tree`.

    Raises:
      ValueError: as `compact_tree`.
    """
    network = MaskedLeaves.of(variables, mask)
    connections = connect(groups, network)
    needless = connections.silent(train=True)
    return _plan_without(connections, needless, variables)


def plan_of(groups: Sequence[Group], variables: Tree, kept: Mapping[str, np.ndarray]) -> Plan:
    """Makes the plan that keeps given units, such as `Plan.kept` that was read from a file.

    Args:
      groups: `units.groups` of the network.
      variables: arrays, or their shapes.
      kept: the units that stay, by the name of their group.

    Raises:
      ValueError: `kept` is not about these groups.
    """
    if set(kept) != {group.name for group in groups}:
        names = sorted(group.name for group in groups)
        raise ValueError(f"kept has the groups {sorted(kept)}. They must be {names}.")
    leaves = trees.by_name(variables)
    shapes = {name: jnp.shape(leaf) for name, leaf in leaves.items()}
    return Plan(
        kept={name: np.asarray(units) for name, units in kept.items()},
        sizes={group.name: group.size for group in groups},
        positions=_positions(groups, shapes, kept),
        shapes=shapes,
        structures=_structures(variables),
    )


def _positions(
    groups: Sequence[Group],
    shapes: Mapping[str, tuple[int, ...]],
    kept: Mapping[str, np.ndarray],
) -> dict[str, tuple[np.ndarray | None, ...]]:
    """Returns `Plan.positions` for units that stay."""
    stay = {}
    for name, shape in shapes.items():
        stay[name] = [np.ones(size, bool) for size in shape]
    # A position goes with its unit, in every parameter. Positions that are no unit stay.
    for group in groups:
        gone = np.ones(group.size, bool)
        gone[kept[group.name]] = False
        for name, axis, units in group.axes:
            is_no_unit = units < 0
            stay[name][axis] &= is_no_unit | ~gone[units]

    positions = {}
    for name, axes in stay.items():
        rows = [None if stays.all() else np.flatnonzero(stays) for stays in axes]
        positions[name] = tuple(rows)
    return positions


def _plan_without(connections: Connections, needless: np.ndarray, variables: Tree) -> Plan:
    """Plans to remove needless units, and those that lead to no output over others.

    Args:
      connections: of the units.
      needless: bool [units].
      variables: of the network.
    """
    stays = connections.useful(needless) | connections.must_stay
    kept = {}
    for group, first in zip(connections.groups, connections.firsts, strict=True):
        stays_here = stays[first : first + group.size]
        # An empty group keeps its first unit, so that its layers still exist.
        if not stays_here.any():
            stays_here[:1] = True
        kept[group.name] = np.flatnonzero(stays_here)
    return plan_of(connections.groups, variables, kept)


# ------------------------------------------------------------------------------------------ Trees


def shrink_tree(plan: Plan, tree: Tree) -> Tree:
    """Removes units from variables, gradients, masks, scores or optimizer states.

    Each part of the tree with the structure of the variables, or of one of their collections, is
    made smaller. Holes stay holes. Everything outside of such parts, such as the step count of an
    optimizer, stays as it is.

    Raises:
      ValueError: no part of the tree has such a structure, or its shapes are not those of the full
        network.
    """
    take = functools.partial(_take, plan)
    return _map_parts(plan, functools.partial(_map_named, take), tree)


def _take(plan: Plan, name: str, leaf: Any) -> Any:
    """Takes the positions of a leaf that stay."""
    # On the host: a device would compile a program for every new shape.
    array: Any = leaf if isinstance(leaf, jax.core.Tracer) else np.asarray(leaf)
    for axis, rows in enumerate(plan.positions[name]):
        if rows is not None:
            array = array.take(rows, axis=axis)
    # NumPy arrays stay NumPy arrays. Everything else is JAX's.
    return array if isinstance(leaf, np.ndarray) else jnp.asarray(array)


def expand_tree(plan: Plan, small: Tree, full: Tree) -> Tree:
    """Puts the values of a small tree into the full one.

    Args:
      plan: maps the full network to the small one.
      small: variables, gradients, or an optimizer state of the small network.
      full: the same of the full network, from which the entries of removed units are taken.
        Everything outside of the variables, such as a step count, is taken from `small`. With the
        state of the full network from before, training can continue in the full network.

    Raises:
      ValueError: the trees do not fit; see `shrink_tree`.
    """
    put = functools.partial(_put, plan)
    return _map_parts(plan, functools.partial(_map_named, put), full, small)


def _put(plan: Plan, name: str, leaf: Any, new: Any) -> Any:
    """Puts a small leaf into the positions of a full one that stay."""
    places = []
    for size, rows in zip(leaf.shape, plan.positions[name], strict=True):
        places.append(np.arange(size) if rows is None else rows)
    expected = [len(rows) for rows in places]
    shape = list(jnp.shape(new))
    if shape != expected:
        raise ValueError(
            f"small has shape {shape} at {name!r}. In the smaller network of this "
            f"plan it must be {expected}."
        )
    index = np.ix_(*places)
    # A tracer cannot be written to in place.
    if isinstance(leaf, jax.core.Tracer) or isinstance(new, jax.core.Tracer):
        return jnp.asarray(leaf).at[index].set(new)
    array = np.array(leaf)
    array[index] = new
    return array if isinstance(new, np.ndarray) else jnp.asarray(array)


def _is_hole(leaf: Any) -> bool:
    return leaf is None


def _structure(tree: Tree) -> Any:
    """Returns the structure of a tree, in which holes count as leaves."""
    return jax.tree.structure(tree, is_leaf=_is_hole)


def _structures(variables: Tree) -> dict[Any, tuple[str, ...]]:
    """Returns `Plan.structures` of variables."""
    names = tuple(trees.names(variables))
    found = {_structure(variables): names}
    # Gradients and optimizer states are usually those of one collection, the parameters.
    start = 0
    collections = jax.tree.leaves(variables, is_leaf=lambda node: node is not variables)
    for collection in collections:
        num_leaves = len(jax.tree.leaves(collection))
        stop = start + num_leaves
        # Every leaf of any tree has the structure of a single array, so none counts.
        if not jax.tree_util.all_leaves([collection]):
            structure = _structure(collection)
            found.setdefault(structure, names[start:stop])
        start = stop
    return found


def _map_named(
    function: Callable[..., Any],
    names: Sequence[str],
    part: Tree,
    *others: Tree,
) -> Tree:
    """Applies `function(name, leaf, *others)` to all leaves of trees that are not holes."""
    leaves, structure = jax.tree.flatten(part, is_leaf=_is_hole)
    other_leaves = [jax.tree.leaves(other, is_leaf=_is_hole) for other in others]
    results = []
    for name, leaf, *rest in zip(names, leaves, *other_leaves, strict=True):
        result = None
        if leaf is not None:
            result = function(name, leaf, *rest)
        results.append(result)
    return jax.tree.unflatten(structure, results)


def _map_parts(plan: Plan, function: Callable[..., Tree], tree: Tree, *others: Tree) -> Tree:
    """Applies `function(names, part, *others)` to the parts of a tree that are variables.

    Everything outside of them is taken from the first of the other trees, if there is one.
    """
    found = []

    def change(part: Tree, *rest: Tree) -> Tree:
        names = _names_of_part(plan, part)
        if names is None:
            return rest[0] if rest else part
        found.append(names)
        return function(names, part, *rest)

    def is_part(node: Tree) -> bool:
        return _names_of_part(plan, node) is not None

    result = jax.tree.map(change, tree, *others, is_leaf=is_part)
    # Without this check, a tree of another network would come back unchanged.
    if not found:
        raise ValueError(
            "no part of the tree has the structure of the variables that the plan was made for, or "
            "of one of their collections. Pass parameters, gradients, masks or scores of that "
            "network, or an optimizer state."
        )
    return result


def _names_of_part(plan: Plan, part: Tree) -> tuple[str, ...] | None:
    """Returns the names of the leaves of a part that is variables, and None for any other.

    Raises:
      ValueError: the part has the structure of variables, but other shapes.
    """
    structure = _structure(part)
    names = plan.structures.get(structure)
    if names is None:
        return None
    leaves = jax.tree.leaves(part, is_leaf=_is_hole)
    for name, leaf in zip(names, leaves, strict=True):
        expected = plan.shapes[name]
        if leaf is None or jnp.shape(leaf) == expected:
            continue
        # If the variables are a single array, any other array has their structure too.
        if len(leaves) == 1:
            return None
        shape = list(jnp.shape(leaf))
        raise ValueError(
            f"the tree has shape {shape} at {name!r}. In the full network it must be "
            f"{list(expected)}."
        )
    return names
