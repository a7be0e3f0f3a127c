"""Which axes of which parameters belong to the same units, read from the network's own program.

A unit is a neuron or a channel. Of a function `apply_fn(params, x)` nothing is known but its jaxpr, which `tracing`
follows. Where it cannot tell what happens to units, two may be taken for one, and a unit for one that must stay; never
the other way round.

`groups` gives the units of each layer, or of each residual stream, with the axes that write to them, read from them,
scale them and add to them. `unit_scores` sums scores over them: what flows in and what flows out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from synflow_jax import trees
from synflow_jax.trees import Params, Scores
from synflow_jax.units import tracing
from synflow_jax.units.tracing import NONE, LeafAxis, Records


class Axis(NamedTuple):
    """An axis of a parameter, and the unit that each of its positions is.

    name: of the leaf, as `trees.names` has it. axis: from 0. units: int [size of the axis], from 0 to the size of the
    group - 1, or -1 where a position is no unit of the group. After a flattening of [height, width, channels] it
    repeats; in a concatenation it covers a part.
    """

    name: str
    axis: int
    units: np.ndarray


class Group(NamedTuple):
    """The units of one layer, of one residual stream, or the inputs.

    Attributes:
      name: the name of the first kernel that writes to the units, without "/kernel"; "input" for the inputs. Where
        that is the name of several groups, it ends in ":" and the axis.
      size: the number of units.
      writers: output axes of kernels: what flows in.
      sources: axes of parameters that are added to the units: biases, running means.
      scales: axes of parameters that multiply them: a norm's scale and running variance, depthwise kernels.
      readers: input axes of kernels: what flows out.
      is_input, is_output: the units are inputs or outputs of the network.
      fixed: why no unit may be removed from the network; "" where units may be.
      zero: a unit that receives nothing and whose sources are 0 puts out 0 (ReLU, not a sigmoid).
      zero_stays: and then the gradient of its sources is 0 too, so that it stays so in training: each path from a
        source to a reader passes a function whose derivative at 0 is 0, as that of `jax.nn.relu`.
    """

    name: str
    size: int
    writers: tuple[Axis, ...]
    sources: tuple[Axis, ...]
    scales: tuple[Axis, ...]
    readers: tuple[Axis, ...]
    is_input: bool
    is_output: bool
    fixed: str
    zero: bool
    zero_stays: bool


class UnitScores(NamedTuple):
    """Sums of scores, float64 [units]: over the axes that write to a unit and its sources, and over its readers."""

    incoming: np.ndarray
    outgoing: np.ndarray


def groups(
    apply_fn: Callable[[Params, jax.Array], Any],
    params: Params,
    input_shape: Sequence[int],
    dtype: Any = jnp.float32,
) -> tuple[Group, ...]:
    """The groups of units of a network, in the order in which it computes them.

    Args:
      apply_fn: `apply_fn(params, x)`, in evaluation mode. Its output may be any tree.
      params: a tree of arrays or of their shapes. Batch statistics that are to be part of the groups must be leaves of
        it too: `{"params": ..., "batch_stats": ...}`.
      input_shape: of one example, without the batch axis.
      dtype: of the inputs.

    >>> params = {"fc1": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}, "head": {"kernel": jnp.ones((3, 2))}}
    >>> apply_fn = lambda p, x: jax.nn.relu(x @ p["fc1"]["kernel"] + p["fc1"]["bias"][None]) @ p["head"]["kernel"]
    >>> for group in groups(apply_fn, params, (4,)):
    ...     print(group.name, group.size, [(a.name, a.axis) for a in group.writers + group.sources + group.readers])
    input 4 [('fc1/kernel', 0)]
    fc1 3 [('fc1/kernel', 1), ('fc1/bias', 0), ('head/kernel', 0)]
    head 2 [('head/kernel', 1)]
    """
    return _assembled(tracing.trace(apply_fn, params, input_shape, dtype), trees.names(params))


def unit_scores(groups: Sequence[Group], scores: Scores) -> dict[str, UnitScores]:
    """Per group, the sums of scores into and out of each unit.

    For SynFlow both are the same for every hidden unit (Theorem 1), in a residual stream as well, where every source
    is scored too or is 0.

    Args:
      groups: of the network.
      scores: floats beside the parameters that are scored, holes elsewhere; a tree of the structure that the groups
        were made from.
    """
    leaves = dict(zip(trees.names(scores), jax.tree.leaves(scores), strict=True))

    def total(axes: Sequence[Axis], size: int) -> np.ndarray:
        out = np.zeros(size)
        for name, axis, units in axes:
            if name in leaves:
                leaf = np.moveaxis(np.asarray(leaves[name], np.float64), axis, 0)
                of_unit = units >= 0
                out += np.bincount(
                    units[of_unit], leaf.reshape(len(units), -1).sum(1)[of_unit], size
                )
        return out

    return {
        g.name: UnitScores(total(g.writers + g.sources, g.size), total(g.readers, g.size))
        for g in groups
    }


def _assembled(records: Records, leaf_names: list[str]) -> tuple[Group, ...]:
    unit_of = _components(records.num_nodes, records.same)
    rows = {key: unit_of[nodes] for key, nodes in records.rows.items()}

    def touched(arrays: Sequence[np.ndarray]) -> np.ndarray:
        units = np.zeros(records.num_nodes, bool)
        for ids in arrays:
            units[unit_of[ids[ids >= 0]]] = True
        return units

    read = touched([rows[key] for key in records.readers])
    layers = [row for row in (unit_of[ids] for ids in records.inputs) if read[row].any()]
    layers += [rows[key] for key in records.writers]
    # The units of a layer belong together, and with them all that share a unit with it.
    group_of = _components(records.num_nodes, [(row[:-1], row[1:]) for row in layers])
    members: dict[int, dict[int, None]] = {}
    for row in layers:
        if len(row):
            members.setdefault(int(group_of[row[0]]), {}).update(dict.fromkeys(row.tolist()))
    number, place = np.full(records.num_nodes, NONE), np.full(records.num_nodes, NONE)
    for i, units in enumerate(members.values()):
        number[list(units)] = i
        place[list(units)] = np.arange(len(units))

    def axes(keys: dict[LeafAxis, None]) -> list[tuple[Axis, ...]]:
        found: list[tuple[Axis, ...]] = [()] * len(members)
        for leaf, axis in keys:
            row = rows[leaf, axis]
            for i in np.unique(number[row]):
                if i >= 0:
                    found[i] += (
                        Axis(leaf_names[leaf], axis, np.where(number[row] == i, place[row], NONE)),
                    )
        return found

    def any_of(arrays: Sequence[np.ndarray]) -> np.ndarray:
        numbers = number[touched(arrays)]
        return np.bincount(numbers[numbers >= 0], minlength=len(members)) > 0

    reasons: list[list[str]] = [[] for _ in members]
    for reason in dict.fromkeys(reason for _, reason in records.fixed):
        for j in np.flatnonzero(any_of([ids for ids, why in records.fixed if why == reason])):
            reasons[j].append(reason)
    strangers = [
        row
        for key, row in rows.items()
        if not any(
            key in role
            for role in (records.writers, records.readers, records.sources, records.scales)
        )
    ]
    for j in np.unique(number[np.concatenate([np.zeros(0, int), *strangers])]):
        if j >= 0:
            reasons[j].append("a parameter that is neither kernel nor added nor multiplied")
    writers, sources, scales, readers = map(
        axes, (records.writers, records.sources, records.scales, records.readers)
    )
    is_input, is_output = any_of(records.inputs), any_of(records.outputs)
    zero, is_open = ~any_of(records.nonzero), any_of(records.open)
    names = [
        "input" if is_input[i] else writers[i][0].name.removesuffix("/kernel")
        for i in range(len(members))
    ]
    # A kernel can write to several groups: [in, heads, head dimension].
    axis = [(*writers[i], *readers[i])[0].axis for i in range(len(members))]
    names = [f"{name}:{axis[i]}" if names.count(name) > 1 else name for i, name in enumerate(names)]
    stays = zero & ~is_open
    return tuple(
        Group(
            names[i], len(units), writers[i], sources[i], scales[i], readers[i], bool(is_input[i]),
            bool(is_output[i]), ", ".join(reasons[i]), bool(zero[i]), bool(stays[i]),
        )
        for i, units in enumerate(members.values())
    )  # fmt: skip


def _components(num_nodes: int, edges: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """The least node that each node is connected with."""
    label = np.arange(num_nodes)
    a = np.concatenate([np.zeros(0, int), *[np.ravel(x) for x, _ in edges]])
    b = np.concatenate([np.zeros(0, int), *[np.ravel(y) for _, y in edges]])
    while True:
        low = np.minimum(label[a], label[b])
        if (label[a] == label[b]).all():
            return label
        np.minimum.at(label, label[a], low)
        np.minimum.at(label, label[b], low)
        while (label[label] != label).any():
            label = label[label]
