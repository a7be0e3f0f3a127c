"""Pruned means smaller: which units a mask leaves without use, and trees of arrays without them.

Two kinds of units can go, and the function stays exactly what it was:

- No kept weight leads from the unit to an output, over units that stay. Nothing that it does is seen, and its gradient
  is 0: it goes from any network, in evaluation and in training.
- No kept weight leads to it from an input, and it puts out 0: all that is added to it (biases, running means) is 0,
  and what follows keeps 0 at 0. It goes from training too where what follows has derivative 0 at 0, as `jax.nn.relu`
  has, so that its bias stays 0. Any other unit without inputs puts out a constant and stays, masked; for inference
  alone (`fold`) the constant can become part of the next layer's bias, where that is exact, or errs by less than the
  caller accepts.

Units are those of `units.groups`: a channel of a residual stream is one unit in all of its layers, and stays if one
branch needs it. Inputs, outputs and units of groups that are `fixed` stay. A group of which nothing is left keeps one
unit, dead and masked, so that its layers remain.

What is exact: the forward pass and every gradient, up to the rounding of shorter sums, batch normalisation by the
statistics of a batch included, since a channel's statistics are its own. What is not the same: random numbers drawn in
the shape of the activations (dropout), and an optimizer whose momentum moves a bias of 0 that has no gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from synflow_jax import trees, units
from synflow_jax.trees import Mask, Tree
from synflow_jax.units import tracing
from synflow_jax.units.grouping import Group
from synflow_jax.units.tracing import NONE, Read


class Plan(NamedTuple):
    """The map between a network and the smaller one.

    Attributes:
      kept: per name of a group, the units that stay, int ascending.
      sizes: per name of a group, how many units it had.
      positions: per name of a leaf, and for each of its axes, the positions that stay; None for all of them.
      shapes: per name of a leaf, its shape in the full network.
      structures: the structures of the variables, and of their collections, with the names of their leaves.
    """

    kept: dict[str, np.ndarray]
    sizes: dict[str, int]
    positions: dict[str, tuple[np.ndarray | None, ...]]
    shapes: dict[str, tuple[int, ...]]
    structures: dict[Any, tuple[str, ...]]


class Compacted(NamedTuple):
    """Smaller variables, the mask of what is pruned in them still, and the map back.

    bounds: per name of a kernel that is padded and has taken up constants all the same (`tolerance`), the most that it
      changes what the layer puts out, before its activation, at the borders of the map.
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
    """The variables of any network without the units that a mask has left without use.

    Its owner builds the smaller network: the new sizes are those of the arrays, or `{name: len(kept)}` of the plan's
    groups. `models.compact` does that for the networks of this package.

    Args:
      apply_fn: `apply_fn(variables, x)`, in evaluation mode.
      variables: all that belongs to units: parameters, and batch statistics beside them.
      mask: bool arrays beside the prunable parameters and holes elsewhere, of `variables` or of its first collections:
        `{"params": mask}` beside `{"params": ..., "batch_stats": ...}`.
      input_shape: of one example.
      fold: for inference alone. A unit that puts out a constant goes too if all that read it are dense layers or
        convolutions without padding that have a bias, or a norm with a running mean: these take the constant up. (On
        padding a constant other than 0 would be missing at the borders of the map: such a unit stays.) Units that put
        out 0 now go even where training would change it. Biases are others then: such a network is not to be expanded.
      tolerance: with `fold`, padded convolutions take up constants too, as long as that changes no output of the layer,
        at the borders of its map and before its activation, by more than this; inside of the map it is exact. The bound
        of each layer is returned. What follows may make more or less of it.
      dtype: of the inputs.

    Raises:
      ValueError: no kept weight leads from the inputs to the outputs, or the mask does not fit; a tolerance that is
        negative, or one without `fold`. (A weight that only ever lies on padding counts as one that leads on.)

    >>> def apply_fn(params, x):
    ...     for layer in params[:-1]:
    ...         x = jax.nn.relu(x @ layer["w"] + layer["b"][None])
    ...     return x @ params[-1]["w"]
    >>> widths = [(4, 100), (100, 50), (50, 3)]
    >>> params = [{"w": jnp.ones(shape), "b": jnp.zeros(shape[1])} for shape in widths]
    >>> mask = [{"w": jnp.ones(shape, bool), "b": None} for shape in widths]
    >>> mask[0]["w"] = mask[0]["w"].at[:, 10:].set(False)  # nothing leads to 90 units of the first layer
    >>> mask[2]["w"] = mask[2]["w"].at[:30].set(False)  # and nothing away from 30 of the second
    >>> small = compact_tree(apply_fn, params, mask, (4,))
    >>> [layer["w"].shape for layer in small.variables]
    [(4, 10), (10, 20), (20, 3)]
    >>> x = jnp.ones((1, 4))
    >>> bool(jnp.all(apply_fn(small.variables, x) == apply_fn(trees.apply_mask(params, mask), x)))
    True
    """
    if not 0 <= tolerance < np.inf or (tolerance and not fold):
        raise ValueError(
            f"tolerance={tolerance!r} must be a finite number of at least 0, and goes with fold=True: it is the error "
            "that constants on the borders of padded maps may make."
        )
    found = units.groups(apply_fn, variables, input_shape, dtype)
    bounds: dict[str, float] = {}
    if fold:
        masked = _masked(variables, mask)
        reads = tracing.trace(apply_fn, masked, input_shape, dtype, evaluate=True).reads
        plan, variables, bounds = _folded(found, variables, mask, reads, tolerance)
    else:
        plan = make_plan(found, variables, mask)
    return Compacted(shrink_tree(plan, variables), shrink_tree(plan, mask), plan, bounds)


def make_plan(groups: Sequence[Group], variables: Tree, mask: Mask) -> Plan:
    """Which units stay, in training too. Arguments and errors as `compact_tree`; groups: `units.groups` of it."""
    graph = _Graph(groups, *_by_name(variables, mask))
    return _plan(graph, graph.silent(train=True), variables)


def plan_of(groups: Sequence[Group], variables: Tree, kept: Mapping[str, np.ndarray]) -> Plan:
    """The plan that keeps these units: `Plan.kept` of another one, from a file for example.

    Args:
      groups: `units.groups` of the network.
      variables: arrays, or their shapes.
      kept: per name of a group, the units that stay.

    Raises:
      ValueError: the groups are others.
    """
    if set(kept) != {group.name for group in groups}:
        raise ValueError(
            f"kept has the groups {sorted(kept)}; they must be {sorted(g.name for g in groups)}."
        )
    shapes = {
        n: jnp.shape(leaf)
        for n, leaf in zip(trees.names(variables), jax.tree.leaves(variables), strict=True)
    }
    stay = {name: [np.ones(size, bool) for size in shape] for name, shape in shapes.items()}
    for group in groups:
        gone = np.ones(group.size, bool)
        gone[kept[group.name]] = False
        for axes in (group.writers, group.sources, group.scales, group.readers):
            for name, axis, of_unit in axes:
                stay[name][axis] &= (of_unit < 0) | ~gone[of_unit]
    positions = {
        name: tuple(None if rows.all() else np.flatnonzero(rows) for rows in axes_rows)
        for name, axes_rows in stay.items()
    }
    sizes = {group.name: group.size for group in groups}
    return Plan(
        {name: np.asarray(units) for name, units in kept.items()},
        sizes,
        positions,
        shapes,
        _structures(variables),
    )


def _by_name(variables: Tree, mask: Mask) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    leaves = dict(
        zip(trees.names(variables), map(np.asarray, jax.tree.leaves(variables)), strict=True)
    )
    masks = dict(zip(trees.names(mask), map(np.asarray, jax.tree.leaves(mask)), strict=True))
    for name, leaf in masks.items():
        if name not in leaves or leaf.shape != leaves[name].shape or leaf.dtype != bool:
            raise ValueError(
                f"mask has a leaf {name!r} of {leaf.dtype}{list(leaf.shape)}; it must be a bool array beside one of "
                f"the variables, which are {list(leaves)}. Where they are collections, so is the mask: "
                '{"params": mask}.'
            )
    return leaves, masks


def _plan(graph: _Graph, needless: np.ndarray, variables: Tree) -> Plan:
    """needless: bool [units], those that can go whatever they lead to."""
    stays = graph.useful(needless) | graph.fixed
    kept = {}
    for group, first in zip(graph.groups, graph.firsts, strict=True):
        units_here = np.flatnonzero(stays[first : first + group.size])
        kept[group.name] = units_here if len(units_here) else np.arange(min(1, group.size))
    return plan_of(graph.groups, variables, kept)


def _folded(
    groups: Sequence[Group], variables: Tree, mask: Mask, reads: Sequence[Read], tolerance: float
) -> tuple[Plan, Tree, dict[str, float]]:
    """The plan without the units whose constants the biases after them take up, the variables with these biases, and
    the largest error of each padded kernel.
    """
    names = trees.names(variables)
    graph = _Graph(groups, *_by_name(variables, mask))
    silent = graph.silent(train=False)
    constant = graph.constant() & ~silent
    steady = constant.copy()
    for group, first in zip(groups, graph.firsts, strict=True):
        for name, axis, of_unit in group.readers:
            uses = [r for r in reads if names[r.leaf] == name and r.read in (axis, NONE)]
            here = np.append(constant, False)[np.where(of_unit < 0, -1, first + of_unit)]
            able = [_can_take_up(graph, r, names, here, tolerance) for r in uses] or [
                np.zeros(len(of_unit), bool)
            ]
            steady[first + of_unit[(of_unit >= 0) & ~np.logical_and.reduce(able)]] = False
    plan = _plan(graph, silent | steady, variables)
    leaves = dict(zip(names, map(np.array, jax.tree.leaves(variables)), strict=True))
    bounds: dict[str, float] = {}
    for read in reads:
        name = names[read.leaf]
        stay = plan.positions[name][read.read]
        if read.bias is None or read.values is None or stay is None:
            continue
        gone = np.append(steady, False)[graph.units[name][read.read]]
        gone[stay] = False
        constants = np.where(gone, read.values, 0)
        leaves[names[read.bias]] += read.sign * (
            constants @ _by_position(graph, read, name).sum(-1)
        )
        if not read.whole and constants.any():
            error = float(np.max(abs(constants) @ abs(_by_position(graph, read, name)).sum(-1)))
            bounds[name] = max(error, bounds.get(name, 0.0))
    order = jax.tree.structure(variables)
    return plan, jax.tree.unflatten(order, [jnp.asarray(leaves[name]) for name in names]), bounds


def _by_position(graph: _Graph, read: Read, name: str) -> np.ndarray:
    """The masked kernel of a read, [input, output, places of the kernel]."""
    kernel = np.moveaxis(graph.effective(name), (read.read, read.write), (0, 1))
    return kernel.reshape(*kernel.shape[:2], -1)


def _can_take_up(
    graph: _Graph, read: Read, names: Sequence[str], constant: np.ndarray, tolerance: float
) -> np.ndarray:
    """bool [size]: whether the bias after a kernel can take up what enters at each position of its input axis.

    constant: bool [size], the positions at which nothing that varies enters.
    """
    if read.bias is None or read.values is None or graph.leaves[names[read.bias]].ndim != 1:
        return np.zeros(len(constant), bool)
    kept = graph.kept(names[read.leaf])
    pruned = ~graph.kept(names[read.bias])
    able = np.asarray(read.steady) & ~(
        _any_along(kept, (read.read, read.write)) & pruned[None]
    ).any(axis=1)
    if read.whole:
        return able
    # On padding a part of the kernel is missing: the smallest errors first, as many as the tolerance affords.
    able &= constant
    errors = abs(np.asarray(read.values)) * abs(_by_position(graph, read, names[read.leaf])).sum(
        -1
    ).max(-1, initial=0)
    order = np.argsort(np.where(able, errors, np.inf), kind="stable")
    affordable = np.zeros(len(able), bool)
    affordable[order] = np.cumsum(np.where(able, errors, np.inf)[order]) <= tolerance
    return able & affordable


def _masked(variables: Tree, mask: Mask) -> Tree:
    leaves, masks = _by_name(variables, mask)
    new = [
        np.where(masks[name], leaf, 0).astype(leaf.dtype) if name in masks else leaf
        for name, leaf in leaves.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(variables), new)


def shrink_tree(plan: Plan, tree: Tree) -> Tree:
    """A tree without the units that go: variables, gradients, masks, scores, optimizer states.

    Each part of the tree that has the structure of the variables, or of one of their collections, is made smaller;
    holes stay holes. What lies outside of such parts (the count of an optimizer's steps) stays as it is.

    Raises:
      ValueError: no part of the tree has such a structure, or its shapes are not those of the full network.
    """

    def shrink(names: Sequence[str], part: Tree) -> Tree:
        def take(name: str, leaf: Any) -> Any:
            # On the host: a device would compile a program for every new shape.
            array: Any = leaf if isinstance(leaf, jax.core.Tracer) else np.asarray(leaf)
            for axis, rows in enumerate(plan.positions[name]):
                if rows is not None:
                    array = array.take(rows, axis=axis)
            return array if isinstance(leaf, np.ndarray) else jnp.asarray(array)

        return _map_named(take, names, part)

    return _map_parts(plan, shrink, tree)


def expand_tree(plan: Plan, small: Tree, full: Tree) -> Tree:
    """The full tree with the values of the small one in their places.

    Entries of units that went are those of `full`, what lies outside of the variables is that of `small`: with the
    full network's optimizer state from before, training can go on in the full network.

    Raises:
      ValueError: the trees do not fit; see `shrink_tree`.
    """

    def put(name: str, leaf: Any, new: Any) -> Any:
        stay = plan.positions[name]
        places = [
            np.arange(n) if rows is None else rows for n, rows in zip(leaf.shape, stay, strict=True)
        ]
        shape = [len(rows) for rows in places]
        if shape != list(jnp.shape(new)):
            raise ValueError(
                f"small has {list(jnp.shape(new))} at {name!r}; it must be {shape}, as in this plan's smaller network."
            )
        if isinstance(leaf, jax.core.Tracer) or isinstance(new, jax.core.Tracer):
            return jnp.asarray(leaf).at[np.ix_(*places)].set(new)
        array = np.array(leaf)
        array[np.ix_(*places)] = new
        return array if isinstance(new, np.ndarray) else jnp.asarray(array)

    return _map_parts(plan, functools.partial(_map_named, put), full, small)


# Units as one row of numbers, and the kernels between them


class _Edges(NamedTuple):
    """A kernel between units.

    kept: bool [positions of its input axis, of its output axis]. reads, writes: the unit of each position, or -1.
    """

    kept: np.ndarray
    reads: np.ndarray
    writes: np.ndarray


class _Graph:
    """The units of all groups in a row. Positions that are no unit are number -1, which is always in use."""

    def __init__(
        self, groups: Sequence[Group], leaves: dict[str, np.ndarray], masks: dict[str, np.ndarray]
    ) -> None:
        self.groups = groups
        self.leaves = leaves
        self.masks = masks
        self.firsts = np.cumsum([0, *[group.size for group in groups]])[:-1].tolist()
        self.num_units = sum(group.size for group in groups)
        row = lambda flags: np.repeat(np.array(flags, bool), [group.size for group in groups])
        self.inputs = row([group.is_input for group in groups])
        self.outputs = row([group.is_output for group in groups])
        self.fixed = row(
            [group.is_input or group.is_output or bool(group.fixed) for group in groups]
        )
        self.units = {name: [np.full(n, -1) for n in leaf.shape] for name, leaf in leaves.items()}
        readers: dict[str, set[int]] = {name: set() for name in leaves}
        writers: dict[str, set[int]] = {name: set() for name in leaves}
        for group, first in zip(groups, self.firsts, strict=True):
            for axes in (group.writers, group.readers, group.sources, group.scales):
                for name, axis, of_unit in axes:
                    numbers = self.units[name][axis]
                    numbers[of_unit >= 0] = first + of_unit[of_unit >= 0]
            for name, axis, _ in group.writers:
                writers[name].add(axis)
            for name, axis, _ in group.readers:
                readers[name].add(axis)
        self.edges: list[_Edges] = []
        self.fed = np.zeros(self.num_units, bool)  # by a kernel whose inputs are no units
        self.led = np.zeros(self.num_units, bool)  # to outputs that are no units
        for name in leaves:
            kept = self.kept(name)
            numbers_of = self.units[name]
            for read in sorted(readers[name]):
                for write in sorted(writers[name] - {read}):
                    table = _any_along(kept, (read, write))
                    self.edges.append(_Edges(table, numbers_of[read], numbers_of[write]))
                if not writers[name] - {read}:
                    self.mark(self.led, numbers_of[read][_any_along(kept, (read,))])
            for write in sorted(writers[name]):
                if not readers[name] - {write}:
                    self.mark(self.fed, numbers_of[write][_any_along(kept, (write,))])
        self.check_paths()

    @staticmethod
    def mark(flags: np.ndarray, numbers: np.ndarray) -> None:
        flags[numbers[numbers >= 0]] = True

    def check_paths(self) -> None:
        if self.outputs.any() and not (self.spread(self.inputs | self.fed) & self.outputs).any():
            raise ValueError(
                "no kept weight leads from the inputs to the outputs: the network has collapsed, and nothing of it "
                "would be left. Prune less, or by more iterations."
            )

    def kept(self, name: str) -> np.ndarray:
        return self.masks.get(name, np.ones(self.leaves[name].shape, bool))

    def effective(self, name: str) -> np.ndarray:
        return np.where(self.kept(name), self.leaves[name], 0)

    def constant(self) -> np.ndarray:
        """bool [units]: whether nothing that varies leads to it."""
        return ~self.spread(self.fixed | self.fed)

    def silent(self, train: bool) -> np.ndarray:
        """bool [units]: whether it puts out 0, always."""
        sound = np.repeat(
            [g.zero_stays if train else g.zero for g in self.groups], [g.size for g in self.groups]
        )
        start = self.fixed | self.fed | ~sound.astype(bool)
        for group, first in zip(self.groups, self.firsts, strict=True):
            for name, axis, of_unit in group.sources:
                loud = _any_along(self.effective(name) != 0, (axis,)) & (of_unit >= 0)
                start[first + of_unit[loud]] = True
        return ~self.spread(start)

    def useful(self, silent: np.ndarray) -> np.ndarray:
        """bool [units]: whether a kept weight leads from it to an output, over units that are useful too."""
        return self.spread((self.fixed | self.led) & ~silent, backward=True, allowed=~silent)

    def spread(
        self, start: np.ndarray, backward: bool = False, allowed: np.ndarray | None = None
    ) -> np.ndarray:
        """All units that kept weights lead to from those of `start`, themselves included."""
        reached = np.append(start, True)
        allowed = np.append(np.ones(self.num_units, bool) if allowed is None else allowed, False)
        edges = (
            [(e.kept.T, e.writes, e.reads) for e in reversed(self.edges)]
            if backward
            else self.edges
        )
        grown = True
        while grown:
            grown = False
            for kept, sources, targets in edges:
                hit = targets[kept[reached[sources]].any(axis=0)]
                new = hit[allowed[hit] & ~reached[hit]]
                reached[new] = True
                grown |= len(new) > 0
        return reached[:-1]


def _any_along(table: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """Whether any entry is true, per position of `axes`, in their order."""
    flat = np.asarray(table.any(axis=tuple(i for i in range(table.ndim) if i not in axes)))
    return flat.transpose(np.argsort(np.argsort(axes)))


# Trees


_is_hole = lambda leaf: leaf is None


def _structure(tree: Tree) -> Any:
    return jax.tree.structure(tree, is_leaf=_is_hole)


def _structures(variables: Tree) -> dict[Any, tuple[str, ...]]:
    """The structure of the variables and of each of their collections, with the names of the leaves."""
    names = tuple(trees.names(variables))
    found = {_structure(variables): names}
    for collection in jax.tree.leaves(variables, is_leaf=lambda node: node is not variables):
        own, names = (
            names[: len(jax.tree.leaves(collection))],
            names[len(jax.tree.leaves(collection)) :],
        )
        if not jax.tree_util.all_leaves([collection]):
            found.setdefault(_structure(collection), own)
    return found


def _map_named(
    function: Callable[..., Any], names: Sequence[str], part: Tree, *others: Tree
) -> Tree:
    leaves, structure = jax.tree.flatten(part, is_leaf=_is_hole)
    rows = [jax.tree.leaves(other, is_leaf=_is_hole) for other in others]
    new = [leaf if leaf is None else function(name, leaf, *rest)
           for name, leaf, *rest in zip(names, leaves, *rows, strict=True)]  # fmt: skip
    return jax.tree.unflatten(structure, new)


def _map_parts(plan: Plan, function: Callable[..., Tree], tree: Tree, *others: Tree) -> Tree:
    """`function(names, part, ...)` of the parts of the tree that have the structure of variables."""
    found = []

    def names_of(part: Tree) -> tuple[str, ...] | None:
        names = plan.structures.get(_structure(part))
        if names is None:
            return None
        leaves = jax.tree.leaves(part, is_leaf=_is_hole)
        wrong = [(name, jnp.shape(leaf)) for name, leaf in zip(names, leaves, strict=True)
                 if leaf is not None and jnp.shape(leaf) != plan.shapes[name]]  # fmt: skip
        if wrong and len(leaves) > 1:
            name, shape = wrong[0]
            raise ValueError(
                f"the tree has {list(shape)} at {name!r}; it must be {list(plan.shapes[name])}."
            )
        return None if wrong else names

    def change(part: Tree, *rest: Tree) -> Tree:
        names = names_of(part)
        if names is None:
            return rest[0] if rest else part
        found.append(names)
        return function(names, part, *rest)

    result = jax.tree.map(change, tree, *others, is_leaf=lambda part: names_of(part) is not None)
    if not found:
        raise ValueError(
            "no part of the tree has the structure of the variables that the plan was made for, or of one of their "
            "collections: give their parameters, gradients, masks, or an optimizer state over them."
        )
    return result
