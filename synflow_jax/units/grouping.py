"""Finds which axes of which parameters belong to the same units, for any model.

A unit is a neuron or a channel. The model is given as a function `apply_fn(params, x)`, whose jaxpr
`tracing` follows. It records statements about nodes, which are positions along axes of parameters.
`groups` joins the nodes to units, and the units to one group per layer or per residual stream. A
group lists the axes that write to its units, read from them, scale them and add to them.
`unit_scores` sums scores over these axes, into each unit and out of it.

Where tracing cannot follow units, it errs on the safe side. Two units may be taken for one, or a
unit may have to stay that could be removed, but never the other way round.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from synflow_jax import trees
from synflow_jax.trees import Params, Scores
from synflow_jax.units import tracing
from synflow_jax.units.tracing import NONE, Cause, LeafAxis, Reason, Records


class Axis(NamedTuple):
    """Says which unit each position along an axis of a parameter is.

    Attributes:
      name: the name of the parameter, as in `trees.names`.
      axis: the index of the axis.
      units: int [size of the axis], the unit of each position: from 0 to the size of the group - 1,
        or -1 where a position is no unit of the group. Units repeat where [height, width, channels]
        were flattened. They cover a part of the axis where channels were concatenated.
    """

    name: str
    axis: int
    units: np.ndarray


class Group(NamedTuple):
    """Describes the units of one layer, of one residual stream, or of the inputs.

    Attributes:
      name: the name of the first kernel that writes to the units, without "/kernel"; "input" for
        the inputs. If several groups share a name, ":" and the index of the axis are added to it.
      size: the number of units.
      writers: output axes of kernels, through which the units receive.
      sources: axes of parameters that are added to the units: biases, running means.
      scales: axes of parameters that multiply the units: the scale and the running variance of a
        norm, depthwise kernels.
      readers: input axes of kernels, through which the units are read.
      is_input: whether the units are inputs of the network.
      is_output: whether the units are outputs of the network.
      fixed: the reasons why no unit may be removed. Empty if units may be removed.
      zero: whether a unit that receives nothing, and whose sources are 0, is 0 wherever it is read.
        True for ReLU, False for a sigmoid.
      zero_stays: whether such a unit also stays 0 in training, because the gradient of its sources
        is 0. Each path from a source to a reader then passes a function whose derivative at 0 is 0,
        such as `jax.nn.relu`.
    """

    name: str
    size: int
    writers: tuple[Axis, ...]
    sources: tuple[Axis, ...]
    scales: tuple[Axis, ...]
    readers: tuple[Axis, ...]
    is_input: bool
    is_output: bool
    fixed: tuple[Reason, ...]
    zero: bool
    zero_stays: bool

    @property
    def axes(self) -> tuple[Axis, ...]:
        """Returns all axes of the units."""
        return self.writers + self.sources + self.scales + self.readers


class UnitScores(NamedTuple):
    """Holds sums of scores for each unit of a group, float64 [units].

    Attributes:
      incoming: the sum over its writers and sources.
      outgoing: the sum over its readers.
    """

    incoming: np.ndarray
    outgoing: np.ndarray


def groups(
    apply_fn: Callable[[Params, jax.Array], Any],
    params: Params,
    input_shape: Sequence[int],
    dtype: Any = jnp.float32,
) -> tuple[Group, ...]:
    """Finds the groups of units of a network, in the order in which it computes them.

    Args:
      apply_fn: `apply_fn(params, x)`, in evaluation mode. Its output may be any tree.
      params: a tree of arrays or of their shapes. Batch statistics belong to units only if they
        are leaves of it: `{"params": ..., "batch_stats": ...}`.
      input_shape: of one example, without the batch axis.
      dtype: of the inputs.

    >>> params = {
    ...     "fc1": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)},
    ...     "head": {"kernel": jnp.ones((3, 2))},
    ... }
    >>> def apply_fn(params, x):
    ...     hidden = x @ params["fc1"]["kernel"] + params["fc1"]["bias"][None]
    ...     return jax.nn.relu(hidden) @ params["head"]["kernel"]
    >>> for group in groups(apply_fn, params, (4,)):
    ...     print(group.name, group.size, [(axis.name, axis.axis) for axis in group.axes])
    input 4 [('fc1/kernel', 0)]
    fc1 3 [('fc1/kernel', 1), ('fc1/bias', 0), ('head/kernel', 0)]
    head 2 [('head/kernel', 1)]
    """
    records = tracing.trace(apply_fn, params, input_shape, dtype)
    return _assemble(records, list(trees.by_name(params)))


def unit_scores(groups: Sequence[Group], scores: Scores) -> dict[str, UnitScores]:
    """Adds up the scores of the weights into and out of each unit, by the name of its group.

    For SynFlow both sums are equal for every hidden unit (Theorem 1). In a residual stream they are
    equal too if every source is scored or is 0.

    Args:
      groups: of the network.
      scores: floats for the parameters that are scored and holes elsewhere, in a tree of the same
        structure as the parameters that the groups were made from.
    """
    leaves = trees.by_name(scores)

    def total(axes: Sequence[Axis], size: int) -> np.ndarray:
        sums = np.zeros(size)
        for name, axis, units in axes:
            if name not in leaves:
                continue
            leaf = np.asarray(leaves[name], np.float64)
            rows = np.moveaxis(leaf, axis, 0).reshape(len(units), -1)
            by_position = rows.sum(axis=1)
            # Positions that are the same unit are added up.
            is_unit = units >= 0
            sums += np.bincount(units[is_unit], by_position[is_unit], size)
        return sums

    found = {}
    for group in groups:
        incoming = total(group.writers + group.sources, group.size)
        outgoing = total(group.readers, group.size)
        found[group.name] = UnitScores(incoming, outgoing)
    return found


# ------------------------------------------------------------------------- From records to groups


class _Numbering(NamedTuple):
    """Numbers the units of a network by group, and by place in the group.

    A unit is a set of nodes that were unified, and is represented by the smallest of them.

    Attributes:
      unit_of: int [nodes], the unit of each node.
      group_of: int [nodes], the group of each unit, `NONE` for units in no group.
      place_of: int [nodes], the place of each unit in its group, `NONE` for units in no group.
      sizes: the number of units of each group.
    """

    unit_of: np.ndarray
    group_of: np.ndarray
    place_of: np.ndarray
    sizes: list[int]

    def groups_of(self, arrays: Iterable[np.ndarray]) -> np.ndarray:
        """Returns which groups have a unit among these nodes, bool [groups]."""
        found = np.zeros(len(self.sizes), bool)
        units = _units_among(self.unit_of, arrays)
        groups = self.group_of[units]
        is_group = groups >= 0
        found[groups[is_group]] = True
        return found


def _assemble(records: Records, leaf_names: Sequence[str]) -> tuple[Group, ...]:
    """Puts together the groups from the statements about nodes."""
    numbering = _number(records)
    writers = _axes_by_group(numbering, records, records.writers, leaf_names)
    sources = _axes_by_group(numbering, records, records.sources, leaf_names)
    scales = _axes_by_group(numbering, records, records.scales, leaf_names)
    readers = _axes_by_group(numbering, records, records.readers, leaf_names)
    is_input = numbering.groups_of(records.inputs)
    is_output = numbering.groups_of(records.outputs)
    zero = ~numbering.groups_of(records.nonzero)
    zero_stays = zero & ~numbering.groups_of(records.ungated)
    reasons = _reasons_by_group(numbering, records)
    names = _names_of_groups(is_input, writers, readers)
    groups = []
    for i, size in enumerate(numbering.sizes):
        group = Group(
            name=names[i],
            size=size,
            writers=writers[i],
            sources=sources[i],
            scales=scales[i],
            readers=readers[i],
            is_input=bool(is_input[i]),
            is_output=bool(is_output[i]),
            fixed=reasons[i],
            zero=bool(zero[i]),
            zero_stays=bool(zero_stays[i]),
        )
        groups.append(group)
    return tuple(groups)


def _number(records: Records) -> _Numbering:
    """Joins nodes to units, and units to groups."""
    unit_of = _components(records.num_nodes, records.same)
    layers = _layers(records, unit_of)
    # The units of a layer are one group, together with all layers that share a unit with it. It is
    # enough to connect each unit of a layer with the next one.
    neighbours = [(row[:-1], row[1:]) for row in layers]
    group_of_unit = _components(records.num_nodes, neighbours)
    # Dictionaries serve as ordered sets: places follow the order of the first layer of a group.
    members: dict[int, dict[int, None]] = {}
    for row in layers:
        if len(row) == 0:
            continue
        component = int(group_of_unit[row[0]])
        group = members.setdefault(component, {})
        group.update(dict.fromkeys(row.tolist()))

    group_of = np.full(records.num_nodes, NONE)
    place_of = np.full(records.num_nodes, NONE)
    sizes = []
    for number, group in enumerate(members.values()):
        units = list(group)
        group_of[units] = number
        place_of[units] = np.arange(len(units))
        sizes.append(len(units))
    return _Numbering(unit_of, group_of, place_of, sizes)


def _layers(records: Records, unit_of: np.ndarray) -> list[np.ndarray]:
    """Returns the units of each layer, in their order along an axis.

    The inputs that kernels read are a layer, and so is each axis that a kernel writes.
    """
    read_rows = [records.rows[axis] for axis in records.readers]
    read = _units_among(unit_of, read_rows)
    layers = []
    for nodes in records.inputs:
        row = unit_of[nodes]
        # The height and width of an image are axes of the input too, but no kernel reads them.
        if np.isin(row, read).any():
            layers.append(row)
    for axis in records.writers:
        row = unit_of[records.rows[axis]]
        layers.append(row)
    return layers


def _units_among(unit_of: np.ndarray, arrays: Iterable[np.ndarray]) -> np.ndarray:
    """Returns the units that some of these nodes belong to, int [units]."""
    found = np.zeros(len(unit_of), bool)
    for nodes in arrays:
        is_node = nodes >= 0
        units = unit_of[nodes[is_node]]
        found[units] = True
    return np.flatnonzero(found)


def _axes_by_group(
    numbering: _Numbering,
    records: Records,
    role: Iterable[LeafAxis],
    leaf_names: Sequence[str],
) -> list[tuple[Axis, ...]]:
    """Returns the axes of one role, for each group that has units along them."""
    found: list[tuple[Axis, ...]] = [()] * len(numbering.sizes)
    for leaf, axis in role:
        units = numbering.unit_of[records.rows[leaf, axis]]
        all_places = numbering.place_of[units]
        groups = numbering.group_of[units]
        is_group = groups >= 0
        # An axis has units of several groups where their layers were concatenated.
        for group in np.unique(groups[is_group]):
            places = np.where(groups == group, all_places, NONE)
            found[group] += (Axis(leaf_names[leaf], axis, places),)
    return found


def _reasons_by_group(numbering: _Numbering, records: Records) -> list[tuple[Reason, ...]]:
    """Returns why the units of each group must stay."""
    # Collected by reason first: a deep network has many statements, but few reasons.
    nodes_of: dict[Reason, list[np.ndarray]] = {}
    for nodes, reason in records.fixed:
        nodes_of.setdefault(reason, []).append(nodes)
    # A parameter without a role acts on its units in a way that tracing does not understand.
    other = Reason(Cause.OTHER_PARAMETER)
    roles = (records.writers, records.readers, records.sources, records.scales)
    for leaf_axis, nodes in records.rows.items():
        has_role = any(leaf_axis in role for role in roles)
        if not has_role:
            nodes_of.setdefault(other, []).append(nodes)

    num_groups = len(numbering.sizes)
    reasons: list[tuple[Reason, ...]] = [()] * num_groups
    for reason, arrays in nodes_of.items():
        is_fixed = numbering.groups_of(arrays)
        for group in np.flatnonzero(is_fixed):
            reasons[group] += (reason,)
    return reasons


def _names_of_groups(
    is_input: np.ndarray,
    writers: Sequence[tuple[Axis, ...]],
    readers: Sequence[tuple[Axis, ...]],
) -> list[str]:
    """Returns a name for each group, as `Group.name` says."""
    names = []
    for group, axes in enumerate(writers):
        name = "input" if is_input[group] else axes[0].name
        name = name.removesuffix("/kernel")
        names.append(name)
    counts = collections.Counter(names)
    for group, name in enumerate(names):
        # A kernel [in, heads, head dimension] writes to several groups.
        if counts[name] > 1:
            first, *_ = (*writers[group], *readers[group])
            names[group] = f"{name}:{first.axis}"
    return names


def _components(num_nodes: int, edges: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Finds the connected components of an undirected graph.

    Args:
      num_nodes: the number of nodes.
      edges: pairs of arrays; nodes at the same position are connected.

    Returns:
      The smallest node of the component of each node, int [num_nodes].
    """
    label = np.arange(num_nodes)
    if not edges:
        return label
    a = np.concatenate([nodes.ravel() for nodes, _ in edges])
    b = np.concatenate([nodes.ravel() for _, nodes in edges])
    # Vectorized over edges: a loop over the nodes of a deep network would take seconds.
    while (label[a] != label[b]).any():
        smaller = np.minimum(label[a], label[b])
        # Labels are nodes. Lowering the label of a label lowers that of all nodes that have it.
        np.minimum.at(label, label[a], smaller)
        np.minimum.at(label, label[b], smaller)
        while (label[label] != label).any():
            label = label[label]
    return label
