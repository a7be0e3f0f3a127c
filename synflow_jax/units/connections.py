"""Finds which units kept weights reach from the inputs, and from which they lead to the outputs.

`Connections` is a graph: its nodes are the units of a network, and each kernel connects the units
that it reads with those that it writes, wherever a weight is kept. The units of all groups are
numbered consecutively. A position along an axis of a parameter that is no unit has number -1, and
counts as always in use.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from synflow_jax import trees
from synflow_jax.trees import Mask, Tree
from synflow_jax.units.grouping import Axis, Group


class Collapsed(ValueError):
    """Reports that no path of kept weights leads from the inputs to the outputs."""


class MaskedLeaves(NamedTuple):
    """Holds the leaves of the variables and of the mask by name, as NumPy arrays."""

    leaves: dict[str, np.ndarray]
    masks: dict[str, np.ndarray]

    @classmethod
    def of(cls, variables: Tree, mask: Mask) -> MaskedLeaves:
        """Reads the leaves of two trees.

        Raises:
          ValueError: a leaf of the mask has no variable of its name and shape, or is not bool.
        """
        leaves = _by_name(variables)
        masks = _by_name(mask)
        for name, leaf in masks.items():
            is_known = name in leaves and leaf.shape == leaves[name].shape
            if not is_known or leaf.dtype != bool:
                raise ValueError(
                    f"mask has a leaf {name!r} of {leaf.dtype}{list(leaf.shape)}. Each leaf must "
                    f"be a bool array with the name and shape of a variable: {list(leaves)}. If "
                    'the variables are collections, pass {"params": mask}.'
                )
        return cls(leaves, masks)

    @property
    def names(self) -> list[str]:
        """Returns the names of the leaves, in order."""
        return list(self.leaves)

    def kept(self, name: str) -> np.ndarray:
        """Returns the mask of a leaf. Leaves without a mask are kept."""
        if name in self.masks:
            return self.masks[name]
        shape = self.leaves[name].shape
        return np.ones(shape, bool)

    def masked(self, name: str) -> np.ndarray:
        """Returns a leaf with zeros where it is pruned."""
        leaf = self.leaves[name]
        if name not in self.masks:
            return leaf
        masked = np.where(self.masks[name], leaf, 0)
        return masked.astype(leaf.dtype)


def _by_name(tree: Tree) -> dict[str, np.ndarray]:
    """Returns the leaves of a tree by name, as NumPy arrays."""
    leaves = trees.by_name(tree)
    return {name: np.asarray(leaf) for name, leaf in leaves.items()}


class Kernel(NamedTuple):
    """Connects the units that a kernel reads with those that it writes.

    Attributes:
      kept: bool [input positions, output positions], whether a kept weight connects the two.
      reads: int [input positions], the unit of each position.
      writes: int [output positions], the unit of each position.
    """

    kept: np.ndarray
    reads: np.ndarray
    writes: np.ndarray

    def reversed(self) -> Kernel:
        """Returns the kernel with its two sides exchanged."""
        return Kernel(self.kept.T, self.writes, self.reads)


@dataclasses.dataclass(frozen=True)
class Connections:
    """Says which units of a masked network are connected by kept weights. See `connect`.

    Attributes:
      groups: the groups of units.
      network: the leaves and masks.
      firsts: the number of the first unit of each group.
      units: the unit of each position of each axis of each leaf, int.
      kernels: the connections.
      must_stay: bool [units], inputs, outputs and units of groups that are fixed.
      fed: bool [units], units that receive from a kernel whose input axis holds no units.
      led: bool [units], units that are read by a kernel whose output axis holds no units.
    """

    groups: Sequence[Group]
    network: MaskedLeaves
    firsts: Sequence[int]
    units: Mapping[str, Sequence[np.ndarray]]
    kernels: Sequence[Kernel]
    must_stay: np.ndarray
    fed: np.ndarray
    led: np.ndarray

    def constant(self) -> np.ndarray:
        """Returns which units receive nothing that varies with the input, bool [units]."""
        varying = self.must_stay | self.fed
        return ~self.spread(varying)

    def silent(self, *, train: bool) -> np.ndarray:
        """Returns which units are always 0, bool [units].

        Args:
          train: whether they must stay 0 in training too.
        """
        # A unit may differ from 0 if something may enter it, if its layer does not keep 0 at 0, or
        # if anything but 0 is added to it. Kept weights carry that on to all units after it.
        flags = [group.zero_stays if train else group.zero for group in self.groups]
        stays_zero = _per_unit(self.groups, flags)
        loud = self.must_stay | self.fed | ~stays_zero
        for group, first in zip(self.groups, self.firsts, strict=True):
            for name, axis, units in group.sources:
                source = self.network.masked(name)
                is_nonzero = any_along(source != 0, (axis,))
                loud_units = units[is_nonzero & (units >= 0)]
                loud[first + loud_units] = True
        return ~self.spread(loud)

    def useful(self, needless: np.ndarray) -> np.ndarray:
        """Returns which units lead to an output over units that are not needless, bool [units]."""
        allowed = ~needless
        start = (self.must_stay | self.led) & allowed
        return self.spread(start, backward=True, allowed=allowed)

    def spread(
        self,
        start: np.ndarray,
        *,
        backward: bool = False,
        allowed: np.ndarray | None = None,
    ) -> np.ndarray:
        """Returns the units of `start` and all that kept weights lead to from them, bool [units].

        Args:
          start: bool [units].
          backward: whether to follow weights from their outputs to their inputs.
          allowed: bool [units], units that may be entered; None for all.
        """
        if allowed is None:
            allowed = np.ones(len(start), bool)
        # The last entry belongs to positions that are no unit, number -1. They are always in use,
        # and are never new.
        reached = np.append(start, True)
        allowed = np.append(allowed, False)
        kernels = self.kernels
        if backward:
            kernels = [kernel.reversed() for kernel in reversed(kernels)]
        # Kernels are in the order of the leaves, not of the network, and there may be loops. So all
        # of them are followed until no unit is new.
        grown = True
        while grown:
            grown = False
            for kernel in kernels:
                is_active = reached[kernel.reads]
                is_written = kernel.kept[is_active].any(axis=0)
                hit = kernel.writes[is_written]
                is_new = allowed[hit] & ~reached[hit]
                new = hit[is_new]
                reached[new] = True
                grown |= len(new) > 0
        return reached[:-1]


def connect(groups: Sequence[Group], network: MaskedLeaves) -> Connections:
    """Connects the units of a network.

    Args:
      groups: `units.groups` of the network.
      network: its leaves and masks.

    Raises:
      Collapsed: no path of kept weights leads from the inputs to the outputs.
    """
    sizes = [group.size for group in groups]
    starts = np.cumsum([0, *sizes])
    firsts = starts[:-1].tolist()
    units = _number_positions(groups, firsts, network)
    inputs = _per_unit(groups, [group.is_input for group in groups])
    outputs = _per_unit(groups, [group.is_output for group in groups])
    is_fixed = _per_unit(groups, [bool(group.fixed) for group in groups])
    must_stay = inputs | outputs | is_fixed

    input_axes = _axes_by_leaf(network, [group.readers for group in groups])
    output_axes = _axes_by_leaf(network, [group.writers for group in groups])
    kernels: list[Kernel] = []
    fed = np.zeros(len(must_stay), bool)
    led = np.zeros(len(must_stay), bool)
    for name in network.leaves:
        kept = network.kept(name)
        reads, writes = input_axes[name], output_axes[name]
        kernels += _kernels(kept, units[name], reads, writes)
        # If one side holds no units, its positions count as always in use.
        for axis in reads:
            if not writes - {axis}:
                used = _used(kept, units[name], axis)
                led[used] = True
        for axis in writes:
            if not reads - {axis}:
                used = _used(kept, units[name], axis)
                fed[used] = True

    connections = Connections(groups, network, firsts, units, kernels, must_stay, fed, led)
    reached = connections.spread(inputs | fed)
    # A network whose output holds no units (it returns a sum, for example) is not checked.
    if outputs.any() and not (reached & outputs).any():
        raise Collapsed(
            "The network has collapsed: no kept weight leads from the inputs to the outputs, "
            "and a compact form would have no units. Prune less, or with more iterations."
        )
    return connections


def _number_positions(
    groups: Sequence[Group],
    firsts: Sequence[int],
    network: MaskedLeaves,
) -> dict[str, list[np.ndarray]]:
    """Returns the unit of each position of each axis of each leaf."""
    numbers = {}
    for name, leaf in network.leaves.items():
        numbers[name] = [np.full(size, -1) for size in leaf.shape]
    for group, first in zip(groups, firsts, strict=True):
        for name, axis, units in group.axes:
            is_unit = units >= 0
            numbers[name][axis][is_unit] = first + units[is_unit]
    return numbers


def _axes_by_leaf(
    network: MaskedLeaves,
    roles: Sequence[Sequence[Axis]],
) -> dict[str, set[int]]:
    """Returns the axes of one role, of all groups, by the name of the leaf."""
    found: dict[str, set[int]] = {name: set() for name in network.leaves}
    for axes in roles:
        for axis in axes:
            found[axis.name].add(axis.axis)
    return found


def _per_unit(groups: Sequence[Group], flags: Sequence[bool]) -> np.ndarray:
    """Repeats the flag of each group for each of its units."""
    sizes = [group.size for group in groups]
    return np.repeat(np.array(flags, bool), sizes)


def _kernels(
    kept: np.ndarray,
    units: Sequence[np.ndarray],
    input_axes: set[int],
    output_axes: set[int],
) -> Iterator[Kernel]:
    """Connects the units along the input axes of a leaf with those along its output axes.

    Args:
      kept: the mask of the leaf.
      units: the unit of each position of each of its axes.
      input_axes: its axes along which it reads units.
      output_axes: its axes along which it writes units.
    """
    for read in sorted(input_axes):
        for write in sorted(output_axes):
            # In a recurrent layer one axis can be both.
            if read != write:
                table = any_along(kept, (read, write))
                yield Kernel(table, units[read], units[write])


def _used(kept: np.ndarray, units: Sequence[np.ndarray], axis: int) -> np.ndarray:
    """Returns the units along an axis of a leaf that have a kept weight."""
    has_weight = any_along(kept, (axis,))
    used = units[axis][has_weight]
    return used[used >= 0]


def any_along(table: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """Returns whether any entry is true, for each position of `axes`, in their order."""
    others = tuple(axis for axis in range(table.ndim) if axis not in axes)
    reduced = np.asarray(table.any(axis=others))
    # The reduction leaves the axes in ascending order.
    places = np.argsort(np.argsort(axes))
    return reduced.transpose(places)
