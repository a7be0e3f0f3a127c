"""What the rules write down while a program is followed; the only state, passed to each of them."""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from synflow_jax.units.tracing.records import LeafAxis, Read
from synflow_jax.units.tracing.values import ACTIVATIONS, PARAMETERS, Field, Value, along


class Notes:
    """The nodes, which of them are the same unit, and what has been seen to happen to them (see `Records`)."""

    def __init__(self, leaf_shapes: Sequence[tuple[int, ...]], evaluating: bool) -> None:
        self.leaf_shapes = leaf_shapes
        self.evaluating = evaluating
        self.num_nodes = 0
        self.rows = {
            (i, axis): self.nodes(size)
            for i, shape in enumerate(leaf_shapes)
            for axis, size in enumerate(shape)
        }
        # See `Records`.
        self.inputs: list[np.ndarray] = []
        self.same: list[tuple[np.ndarray, np.ndarray]] = []
        self.fixed: list[tuple[np.ndarray, str]] = []
        self.nonzero: list[np.ndarray] = []
        self.open: list[np.ndarray] = []
        self.reads: list[Read] = []
        self.writers: dict[LeafAxis, None] = {}
        self.readers: dict[LeafAxis, None] = {}
        self.sources: dict[LeafAxis, None] = {}
        self.scales: dict[LeafAxis, None] = {}
        self.met = collections.Counter[int]()  # how often a parameter meets activations
        self.lists: list[list] = [self.same, self.fixed, self.nonzero, self.open, self.reads]
        self.roles = (self.writers, self.readers, self.sources, self.scales)
        self.composites: dict[tuple[bytes, ...], np.ndarray] = {}

    def nodes(self, num: int) -> np.ndarray:
        """New ones."""
        self.num_nodes += num
        return np.arange(self.num_nodes - num, self.num_nodes)

    def parameter(self, leaf: int) -> Value:
        """A parameter: nodes of its own along each of its axes."""
        shape = self.leaf_shapes[leaf]
        fields = [
            Field(
                along(self.rows[leaf, axis], axis, len(shape)),
                frozenset([axis]),
                frozenset([(leaf, axis)]),
            )
            for axis in range(len(shape))
        ]
        return Value(tuple(fields), PARAMETERS, shape, leaf=leaf)

    def network_input(self, shape: tuple[int, ...]) -> Value:
        """Each axis but the batch's has nodes of its own: which of them are features, their readers decide."""
        fields = []
        for axis, size in enumerate(shape[1:], 1):
            self.inputs.append(self.nodes(size))
            fields.append(
                Field(along(self.inputs[-1], axis, len(shape)), frozenset([axis]), zero=False)
            )
        return Value(tuple(fields), ACTIVATIONS, shape)

    def unify(self, a: np.ndarray, b: np.ndarray) -> None:
        """Nodes that lie on each other are one unit."""
        a, b = np.broadcast_arrays(a, b)
        units = (a >= 0) & (b >= 0) & (a != b)
        if units.any():
            self.same.append((a[units], b[units]))

    def fix(self, fields: Sequence[Field], reason: str) -> None:
        """The units of these fields must stay."""
        self.fixed += [(f.ids[f.ids >= 0], reason) for f in fields]

    def leave(self, fields: Sequence[Field]) -> None:
        """Units that are read from here on: are they 0 if nothing reaches them, and do they stay so?"""
        self.nonzero += [f.ids for f in fields if not f.zero]
        self.open += [f.ids for f in fields if f.open]

    def composite(self, fields: Sequence[Field], axes: Sequence[int]) -> Field:
        """One field in place of several along `axes` of a value: its units are the combinations of theirs."""
        known = np.concatenate(self.inputs) if self.inputs else np.zeros(0, int)
        # Inputs stay in any case: what lies along the axis beside them is what counts.
        hidden = [f for f in fields if not np.isin(f.ids, known).all()]
        fields = hidden or fields
        if len(fields) == 1:
            return fields[0]
        arrays = np.broadcast_arrays(*[f.ids for f in fields])
        support = frozenset(axes)
        key = (str(arrays[0].shape).encode(), *(a.tobytes() for a in arrays))
        if key not in self.composites:
            _, inverse = np.unique(
                np.stack([a.ravel() for a in arrays]), axis=1, return_inverse=True
            )
            inverse = np.reshape(inverse, -1)
            ids = self.nodes(int(inverse.max(initial=-1)) + 1)[inverse]
            self.composites[key] = ids.reshape(arrays[0].shape)
            if not hidden:
                self.inputs.append(np.unique(ids))
            else:
                self.fix([*fields, Field(ids, support)], "combined with other units in one axis")
        return Field(
            self.composites[key], support, frozenset().union(*[f.axes for f in fields]),
            all(f.zero for f in fields), any(f.open for f in fields),
        )  # fmt: skip

    def snapshot(self) -> tuple[list[int], list[dict], collections.Counter]:
        """How much has been noted, for `forget`."""
        return [len(r) for r in self.lists], [dict(r) for r in self.roles], self.met.copy()

    def forget(self, since: tuple[list[int], list[dict], collections.Counter]) -> None:
        """Takes back what was noted since a snapshot."""
        self.met = since[2]
        for record, length in zip(self.lists, since[0], strict=True):
            del record[length:]
        for role, before in zip(self.roles, since[1], strict=True):
            role.clear()
            role.update(before)


# What a primitive does to the units of its operands: (notes, equation, operands) -> results; None if it cannot say.
Rule = Callable[[Notes, Any, list[Value]], list[Value] | None]
