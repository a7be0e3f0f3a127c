"""Values of a program as they are followed, and what moving their axes does to the units that lie along them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from synflow_jax.units.tracing.records import NONE, LeafAxis

CONSTANT, PARAMETERS, ACTIVATIONS = range(3)  # what a value depends on; the larger number wins


class Field(NamedTuple):
    """Units along some axes of a value.

    ids: int, the node of each position; one axis for each of the value's, of size 1 outside of `support`.
    support: the axes along which the units lie.
    axes: the (leaf, axis) of parameters that they come from, in values that depend on parameters alone.
    zero: a unit that receives nothing, and whose sources are 0, is 0 here.
    open: something was added to the unit since the last function whose derivative at 0 is 0.
    """

    ids: np.ndarray
    support: frozenset[int]
    axes: frozenset[tuple[int, int]] = frozenset()
    zero: bool = True
    open: bool = False


class Value(NamedTuple):
    """What is known of a value.

    uniform: axes along which it was broadcast. number: of a scalar that is known. leaf: the parameter that it is, with
    axes of size 1 more or less. product: the read that it is the result of, from `Records.reads`. array: itself, where
    the program is evaluated.
    """

    fields: tuple[Field, ...]
    kind: int
    shape: tuple[int, ...]
    uniform: frozenset[int] = frozenset()
    number: Any = None
    leaf: int | None = None
    product: int | None = None
    array: Any = None


def constant(value: Any) -> Value:
    """An array or a number that is known."""
    shape = np.shape(value)
    is_number = not shape and jnp.issubdtype(jnp.result_type(value), jnp.number)
    return Value(
        (), CONSTANT, shape, singles(shape), float(value) if is_number else None, array=value
    )


def singles(shape: tuple[int, ...]) -> frozenset[int]:
    """The axes of size 1."""
    return frozenset(i for i, n in enumerate(shape) if n == 1)


def along(row: np.ndarray, axis: int, ndim: int) -> np.ndarray:
    """A row of nodes along one axis of several."""
    return row.reshape([-1 if i == axis else 1 for i in range(ndim)])


def moved(
    value: Value,
    places: Sequence[int | None],
    shape: tuple[int, ...],
    new: frozenset[int] = frozenset(),
) -> Value:
    """The value with its axis i at places[i] (None: it is gone and held no units); `new` axes are uniform."""
    fields = []
    for f in value.fields:
        kept = [i for i in range(len(places)) if i in f.support]
        order = sorted(kept, key=lambda i: places[i])  # type: ignore[arg-type, return-value]
        ids = f.ids.transpose([*order, *[i for i in range(f.ids.ndim) if i not in f.support]])
        sizes = [1] * len(shape)
        for i in kept:
            sizes[places[i]] = f.ids.shape[i]  # type: ignore[index]
        fields.append(
            f._replace(ids=ids.reshape(sizes), support=frozenset(places[i] for i in kept))
        )  # type: ignore[misc]
    uniform = {places[i] for i in value.uniform if i < len(places) and places[i] is not None}
    return Value(tuple(fields), value.kind, shape, frozenset(uniform | new), value.number)  # type: ignore[arg-type]


def indexed(value: Value, index: list[slice], shape: tuple[int, ...]) -> Value:
    """A slice along each axis."""
    cut = lambda f: f.ids[tuple(s if i in f.support else slice(None) for i, s in enumerate(index))]
    fields = tuple(f._replace(ids=cut(f)) for f in value.fields)
    return Value(fields, value.kind, shape, value.uniform, value.number)


def divided(value: Value, axis: int, sizes: Sequence[int]) -> list[Value]:
    """The value cut along an axis into parts of these sizes."""
    parts, stop = [], 0
    for size in sizes:
        start, stop = stop, stop + size
        index = [slice(start, stop) if i == axis else slice(None) for i in range(len(value.shape))]
        parts.append(indexed(value, index, (*value.shape[:axis], size, *value.shape[axis + 1 :])))
    return parts


def padded(ids: np.ndarray, axis: int, config: Sequence[int]) -> np.ndarray:
    """Nodes with places that hold none before, after and between them, as `lax.pad` has it along one axis."""
    low, high, interior = config
    row = np.moveaxis(ids, axis, 0)
    wide = np.full((max(0, len(row) * (interior + 1) - interior), *row.shape[1:]), NONE)
    wide[:: interior + 1] = row
    wide = wide[max(0, -low) : len(wide) - max(0, -high)]
    ends = [(max(0, low), max(0, high))] + [(0, 0)] * (wide.ndim - 1)
    return np.moveaxis(np.pad(wide, ends, constant_values=NONE), 0, axis)


def same_elements(
    before: tuple[int, ...], after: tuple[int, ...]
) -> list[tuple[list[int], list[int]]]:
    """The runs of axes of a reshape that hold the same elements: [2, 4, 4, 3] -> [2, 48] is (0)(0) and (1, 2, 3)(1)."""
    if 0 in before:
        return [(list(range(len(before))), list(range(len(after))))]
    blocks, i, j = [], 0, 0
    while i < len(before) or j < len(after):
        ours, theirs = [i] if i < len(before) else [], [j] if j < len(after) else []
        i, j = i + len(ours), j + len(theirs)
        size = lambda shape, axes: math.prod(shape[axis] for axis in axes)
        while size(before, ours) != size(after, theirs):
            if size(before, ours) < size(after, theirs):
                ours, i = [*ours, i], i + 1
            else:
                theirs, j = [*theirs, j], j + 1
        blocks.append((ours, theirs))
    return blocks


def reshaped(field: Field, before: tuple[int, ...], after: tuple[int, ...], blocks: list) -> Field:
    """A field after a reshape of its value; without support where its units lie along no axis any more."""
    touched = [(ours, theirs) for ours, theirs in blocks if field.support & set(ours)]
    inside = {i for ours, _ in touched for i in ours}
    ids = np.broadcast_to(field.ids, [n if i in inside else 1 for i, n in enumerate(before)])
    places = {j for _, theirs in touched for j in theirs}
    ids = ids.reshape([n if j in places else 1 for j, n in enumerate(after)])
    support = set(places)
    for j in sorted(places):
        first = ids.take([0], axis=j)
        if after[j] > 1 and (ids == first).all() and len(support) > 1:
            ids, support = first, support - {j}
    single = [j for j in support if after[j] == 1]
    varies = bool((ids != ids.flat[0]).any()) if ids.size else True
    if (
        single and not varies
    ):  # any of these axes could be that of a single unit: in most layouts it is the last one
        support = {max(single)}
    return field._replace(ids=ids, support=frozenset(support - (set(single) if varies else set())))


def all_axes(fields: Iterable[Field]) -> dict[LeafAxis, None]:
    """The axes of parameters that the fields come from, in order."""
    return dict.fromkeys(sorted({axis for f in fields for axis in f.axes}))


def flagged(value: Value, **flags: Any) -> Value:
    """The value with the flags of all of its fields replaced."""
    return value._replace(fields=tuple(f._replace(**flags) for f in value.fields))


def same_pattern(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays of nodes tell the same positions apart."""
    pairs = np.stack([x.ravel() for x in np.broadcast_arrays(a, b)])
    num = np.unique(pairs, axis=1).shape[1]
    return num == len(np.unique(pairs[0])) == len(np.unique(pairs[1]))
