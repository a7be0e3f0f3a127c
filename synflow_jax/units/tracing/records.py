"""Records statements about units while a program is followed.

`Records` is the only state of tracing. It numbers the nodes (see `values`) and collects statements
about them: two nodes are one unit, a unit must stay, an axis of a parameter writes to units. The
rules of the primitives make the statements. `units.groups` puts them together at the end.
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

    UNKNOWN_STEP = "{primitive} uses them in a way that no rule describes"
    MIXED = "{primitive} mixes them"
    DECIDES = "they control {primitive}"
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
    """Holds all statements about the units of a program.

    Attributes:
      leaf_shapes: the shapes of the parameters.
      evaluating: whether the program is evaluated at the same time, so that values hold arrays.
      num_nodes: the number of nodes so far. They are numbered from 0.
      rows: the nodes of each axis of each parameter.
      inputs: the nodes of each axis of the network's input.
      outputs: nodes of the network's outputs.
      same: pairs of arrays of nodes. Nodes at the same position are one unit.
      fixed: nodes of units that must stay, each with the reason.
      nonzero: nodes that are consumed where they may differ from 0 although no unit reaches them
        and everything added to them is 0.
      ungated: nodes that are consumed after something was added to them, and before a function
        whose derivative at 0 is 0.
      writers: output axes of kernels. Like the next three, an ordered set of axes of parameters.
      readers: input axes of kernels.
      sources: axes of parameters that are added to units.
      scales: axes of parameters that multiply units.
      reads: the products of activations with kernels.
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
    _combined: dict[tuple[Any, ...], np.ndarray] = dataclasses.field(default_factory=dict)

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
        ndim = len(shape)
        fields = []
        for axis in range(ndim):
            nodes = along(self.rows[leaf, axis], axis, ndim)
            origin = frozenset([(leaf, axis)])
            field = Field(nodes, frozenset([axis]), origin)
            fields.append(field)
        return Value(fields, Kind.PARAMETERS, shape, leaf=leaf)

    def network_input(self, shape: tuple[int, ...]) -> Value:
        """Returns the value of the network's input, with nodes along each axis but the batch.

        The kernels that read it decide later which of the axes are features.
        """
        ndim = len(shape)
        fields = []
        for axis in range(1, ndim):
            row = self.new_nodes(shape[axis])
            self.inputs.append(row)
            nodes = along(row, axis, ndim)
            field = Field(nodes, frozenset([axis]), zero=False)
            fields.append(field)
        return Value(fields, Kind.ACTIVATIONS, shape)

    # ------------------------------------------------------------------------------ Statements

    def unify(self, a: np.ndarray, b: np.ndarray) -> None:
        """Records that nodes at the same position of two arrays are one unit."""
        a, b = np.broadcast_arrays(a, b)
        are_nodes = (a >= 0) & (b >= 0)
        differ = are_nodes & (a != b)
        # A node that meets itself, as in x * sigmoid(x), needs no statement.
        if differ.any():
            self.same.append((a[differ], b[differ]))

    def fix(self, fields: Sequence[Field], cause: Cause, primitive: str = "") -> None:
        """Records that the units of these fields must stay."""
        reason = Reason(cause, primitive)
        for field in fields:
            is_node = field.nodes >= 0
            nodes = field.nodes[is_node]
            self.fixed.append((nodes, reason))

    def consume(self, fields: Sequence[Field]) -> None:
        """Records that these units are read here, with the flags `zero` and `ungated` they have.

        A unit that receives nothing may be removed only if it is 0 wherever it is read.
        """
        for field in fields:
            if not field.zero:
                self.nonzero.append(field.nodes)
            if field.ungated:
                self.ungated.append(field.nodes)

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
        no_nodes = np.zeros(0, int)
        inputs = np.concatenate([no_nodes, *self.inputs])
        hidden = []
        for field in fields:
            is_input = np.isin(field.nodes, inputs)
            if not is_input.all():
                hidden.append(field)
        fields = hidden or fields
        if len(fields) == 1:
            return fields[0]

        support = frozenset(axes)
        arrays = np.broadcast_arrays(*[field.nodes for field in fields])
        shape = arrays[0].shape
        # A combination that occurs again must have the same nodes as before: the body of a loop is
        # followed several times, and would never settle.
        contents = [nodes.tobytes() for nodes in arrays]
        key = (shape, *contents)
        if key not in self._combined:
            nodes = self._new_combinations(arrays)
            self._combined[key] = nodes
            if not hidden:
                self.inputs.append(np.unique(nodes))
        nodes = self._combined[key]
        if hidden:
            self.fix([*fields, Field(nodes, support)], Cause.COMBINED)
        return merge_fields(fields, nodes, support)

    def _new_combinations(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        """Returns new nodes of the shape of some arrays, one node per combination of entries."""
        stacked = np.stack([nodes.ravel() for nodes in arrays])
        unique, combination = np.unique(stacked, axis=1, return_inverse=True)
        # Versions of NumPy differ in the shape of the inverse.
        combination = np.reshape(combination, -1)
        num_combinations = unique.shape[1]
        new = self.new_nodes(num_combinations)
        shape = arrays[0].shape
        return new[combination].reshape(shape)

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
        """Restores the statements to these lengths, roles and counts."""
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
