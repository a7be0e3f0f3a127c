"""Records what is found out about units while a program is followed.

`Records` is the only state of tracing. It numbers the nodes and collects statements about them:
these two are one unit, this one must stay, this axis writes to these. The rules of each primitive
make the statements; `units.groups` puts them together in the end.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from synflow_jax.units.tracing.values import Field, Kind, LeafAxis, Value, along, merge_fields


class Cause(enum.Enum):
    """Says why a unit may not be removed. The values are sentences about "them", the units."""

    UNKNOWN_STEP = "{primitive} does with them what no rule describes"
    MIXED = "{primitive} mixes them"
    DECIDES = "{primitive} decides by them what is computed"
    AXIS_LOST = "{primitive} leaves no axis for them"
    AXIS_SPLIT = "{primitive} splits them over several axes"
    AXES_DIFFER = "{primitive} joins values in which they lie along different axes"
    FILLS = "{primitive} fills the border with them"
    MEETS_CONSTANT = "{primitive} combines them with an array that has no such units"
    MEETS_OTHER_AXES = "they meet units that lie along other axes"
    COMBINED = "they share an axis with other units and are combined with them"
    ONE_PART = "they fill a whole part that was cut out of a value"
    SPATIAL = "a convolution slides over them"
    SUMMED_WITH_OTHERS = "a product sums over them together with other axes"
    SUMMED_ALONE = "a product sums over them without a parameter"
    PARAMETER_PRODUCT = "a product of parameters sums over them"
    NONZERO_KERNEL = "a kernel that they meet is not 0 where its parameter is 0"
    OTHER_PARAMETER = "a parameter has them that is neither a kernel nor added nor multiplied"


class Reason(NamedTuple):
    """Says why a unit may not be removed, and which primitive is the reason ("" if any could be).

    >>> print(Reason(Cause.MIXED, "reduce_sum"))
    reduce_sum mixes them
    """

    cause: Cause
    primitive: str = ""

    def __str__(self) -> str:
        return self.cause.value.format(primitive=self.primitive)


class Read(NamedTuple):
    """Describes a product of activations with a kernel.

    Attributes:
      leaf: the parameter that is the kernel.
      read, write: the input and the output axis of the kernel. Both are `NONE` where the kernel
        is computed from the parameter, or has not exactly one axis of each kind.
      values: float [size of the input axis], the activations that the kernel is multiplied with.
        None unless the program is evaluated.
      steady: bool [size of the input axis]. True where the activation is the same at all places,
        so that its product with the kernel acts as a bias.
      whole: all of the kernel is used at each place. False for padded convolutions, which use a
        part of it at the borders.
      bias: the parameter that is added to the product and has no other use, or None.
      sign: 1 where the bias is added, -1 where it is subtracted.
    """

    leaf: int
    read: int
    write: int
    values: Any = None
    steady: Any = None
    whole: bool = True
    bias: int | None = None
    sign: int = 1


@dataclasses.dataclass
class Records:
    """Holds everything that has been found out about a program.

    Attributes:
      leaf_shapes: the shapes of the parameters.
      evaluating: values carry their arrays.
      num_nodes: how many nodes there are. They are numbered from 0.
      rows: the nodes of each axis of each parameter.
      inputs: the nodes of each axis of the network's input.
      outputs: nodes of the network's outputs.
      same: pairs of arrays of nodes. Nodes at the same position are one unit.
      fixed: nodes of units that must stay, and the reason.
      nonzero: nodes that are consumed where they may differ from 0 though nothing reaches them and
        nothing but 0 is added to them.
      ungated: nodes that are consumed after something was added to them, and before a function
        whose derivative at 0 is 0.
      writers, readers, sources, scales: axes of parameters, as ordered sets: output axes of
        kernels, input axes of kernels, axes of what is added to units, of what multiplies them.
      reads: the products.
      num_uses: how often each parameter meets activations.
    """

    leaf_shapes: Sequence[tuple[int, ...]]
    evaluating: bool = False
    num_nodes: int = 0
    rows: dict[LeafAxis, np.ndarray] = dataclasses.field(default_factory=dict)
    inputs: list[np.ndarray] = dataclasses.field(default_factory=list)
    outputs: list[np.ndarray] = dataclasses.field(default_factory=list)
    same: list[tuple[np.ndarray, np.ndarray]] = dataclasses.field(default_factory=list)
    fixed: list[tuple[np.ndarray, Reason]] = dataclasses.field(default_factory=list)
    nonzero: list[np.ndarray] = dataclasses.field(default_factory=list)
    ungated: list[np.ndarray] = dataclasses.field(default_factory=list)
    writers: dict[LeafAxis, None] = dataclasses.field(default_factory=dict)
    readers: dict[LeafAxis, None] = dataclasses.field(default_factory=dict)
    sources: dict[LeafAxis, None] = dataclasses.field(default_factory=dict)
    scales: dict[LeafAxis, None] = dataclasses.field(default_factory=dict)
    reads: list[Read] = dataclasses.field(default_factory=list)
    num_uses: collections.Counter[int] = dataclasses.field(default_factory=collections.Counter)
    _combined: dict[tuple[bytes, ...], np.ndarray] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for leaf, shape in enumerate(self.leaf_shapes):
            for axis, size in enumerate(shape):
                self.rows[leaf, axis] = self.new_nodes(size)

    # ------------------------------------------------------------------------------ New values

    def new_nodes(self, num: int) -> np.ndarray:
        """Returns nodes that no other value has, int [num]."""
        first = self.num_nodes
        self.num_nodes += num
        return np.arange(first, self.num_nodes)

    def parameter(self, leaf: int) -> Value:
        """Returns the value of a parameter, with its own nodes along each axis."""
        shape = self.leaf_shapes[leaf]
        fields = []
        for axis in range(len(shape)):
            nodes = along(self.rows[leaf, axis], axis, len(shape))
            fields.append(Field(nodes, frozenset([axis]), frozenset([(leaf, axis)])))
        return Value(fields, Kind.PARAMETERS, shape, leaf=leaf)

    def network_input(self, shape: tuple[int, ...]) -> Value:
        """Returns the value of the network's input, with its own nodes along each axis but the
        first. The kernels that read it decide later which of the axes are features.
        """
        fields = []
        for axis, size in enumerate(shape[1:], 1):
            row = self.new_nodes(size)
            self.inputs.append(row)
            fields.append(Field(along(row, axis, len(shape)), frozenset([axis]), zero=False))
        return Value(fields, Kind.ACTIVATIONS, shape)

    # ------------------------------------------------------------------------------ Statements

    def unify(self, a: np.ndarray, b: np.ndarray) -> None:
        """Records that nodes at the same position of two arrays are one unit."""
        a, b = np.broadcast_arrays(a, b)
        differ = (a >= 0) & (b >= 0) & (a != b)
        if differ.any():
            self.same.append((a[differ], b[differ]))

    def fix(self, fields: Sequence[Field], cause: Cause, primitive: str = "") -> None:
        """Records that the units of these fields must stay."""
        reason = Reason(cause, primitive)
        for field in fields:
            self.fixed.append((field.nodes[field.nodes >= 0], reason))

    def consume(self, fields: Sequence[Field]) -> None:
        """Records that these units are read here, and whether a unit that receives nothing is 0 at
        this point and stays 0 in training.
        """
        self.nonzero += [field.nodes for field in fields if not field.zero]
        self.ungated += [field.nodes for field in fields if field.ungated]

    def lose(self, fields: Sequence[Field], cause: Cause, primitive: str = "") -> None:
        """Records that these units are read and cannot be followed any further, so must stay."""
        self.fix(fields, cause, primitive)
        self.consume(fields)

    def combine(self, fields: Sequence[Field], axes: Sequence[int]) -> Field:
        """Returns one field in place of several along the same axes of a value.

        Each combination of their units becomes a new unit, as where axes [heads, dimension] were
        flattened into one.
        """
        # Units of the inputs stay in any case. Where others share the axis with them, the others
        # are the units that count.
        inputs = np.concatenate([np.zeros(0, int), *self.inputs])
        hidden = [field for field in fields if not np.isin(field.nodes, inputs).all()]
        fields = hidden or fields
        if len(fields) == 1:
            return fields[0]
        support = frozenset(axes)
        arrays = np.broadcast_arrays(*[field.nodes for field in fields])
        shape = arrays[0].shape
        # The same combination, met again, has the same nodes as before.
        key = (str(shape).encode(), *(nodes.tobytes() for nodes in arrays))
        if key not in self._combined:
            stacked = np.stack([nodes.ravel() for nodes in arrays])
            unique, combination = np.unique(stacked, axis=1, return_inverse=True)
            combination = np.reshape(combination, -1)
            new = self.new_nodes(unique.shape[1])
            self._combined[key] = new[combination].reshape(shape)
            if not hidden:
                self.inputs.append(new)
        nodes = self._combined[key]
        if hidden:
            self.fix([*fields, Field(nodes, support)], Cause.COMBINED)
        return merge_fields(fields, nodes, support)

    # -------------------------------------------------------------------------------- Rewinding

    def checkpoint(self) -> Callable[[], None]:
        """Returns a function that takes back every statement made after this call.

        New nodes stay: values that were made in between may hold them.
        """
        lengths = [len(statements) for statements in self._lists()]
        roles = [dict(role) for role in self._roles()]
        num_uses = self.num_uses.copy()
        return functools.partial(self._rewind, lengths, roles, num_uses)

    def _rewind(
        self,
        lengths: Sequence[int],
        roles: Sequence[dict[LeafAxis, None]],
        num_uses: collections.Counter[int],
    ) -> None:
        """Takes back everything beyond these lengths, roles and counts."""
        for statements, length in zip(self._lists(), lengths, strict=True):
            del statements[length:]
        for role, before in zip(self._roles(), roles, strict=True):
            role.clear()
            role.update(before)
        self.num_uses = num_uses

    def _lists(self) -> tuple[list[Any], ...]:
        return (self.same, self.fixed, self.nonzero, self.ungated, self.reads)

    def _roles(self) -> tuple[dict[LeafAxis, None], ...]:
        return (self.writers, self.readers, self.sources, self.scales)
