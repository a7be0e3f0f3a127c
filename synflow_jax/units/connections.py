"""Follows kept weights from unit to unit: which units anything reaches, and which lead anywhere.

All units of a network are numbered in a row, group after group. A position along an axis of a
parameter that is no unit has number -1. Whatever it stands for is always in use.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from synflow_jax import trees
from synflow_jax.trees import Mask, Tree
from synflow_jax.units.grouping import Group


class Collapsed(ValueError):
    """Says that no kept weight leads from the inputs to the outputs."""


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
            if name not in leaves or leaf.shape != leaves[name].shape or leaf.dtype != bool:
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
        return np.ones(self.leaves[name].shape, bool)

    def masked(self, name: str) -> np.ndarray:
        """Returns a leaf with zeros where it is pruned."""
        leaf = self.leaves[name]
        if name not in self.masks:
            return leaf
        return np.where(self.masks[name], leaf, 0).astype(leaf.dtype)


def _by_name(tree: Tree) -> dict[str, np.ndarray]:
    arrays = [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    return dict(zip(trees.names(tree), arrays, strict=True))


class _Kernel(NamedTuple):
    """Connects units.

    Attributes:
      kept: bool [input positions, output positions], whether a kept weight connects the two.
      reads: int [input positions], the unit of each position.
      writes: int [output positions], the unit of each position.
    """

    kept: np.ndarray
    reads: np.ndarray
    writes: np.ndarray


class Connections:
    """Knows which units of a masked network are connected by kept weights.

    Attributes:
      network: the leaves and masks.
      groups: the groups of units.
      firsts: the number of the first unit of each group.
      num_units: the number of all units.
      units: the unit of each position of each axis of each leaf, int.
      must_stay: bool [units], inputs, outputs and units of groups that are fixed.
    """

    def __init__(self, groups: Sequence[Group], network: MaskedLeaves) -> None:
        """Connects the units.

        Raises:
          ValueError: no kept weight leads from the inputs to the outputs.
        """
        self.network = network
        self.groups = groups
        sizes = [group.size for group in groups]
        self.firsts = np.cumsum([0, *sizes])[:-1].tolist()
        self.num_units = sum(sizes)
        self.units = self._number_positions()
        self._inputs = self._per_unit([group.is_input for group in groups])
        self._outputs = self._per_unit([group.is_output for group in groups])
        is_fixed = self._per_unit([bool(group.fixed) for group in groups])
        self.must_stay = self._inputs | self._outputs | is_fixed

        self._kernels: list[_Kernel] = []
        # Units that receive from a kernel whose input axis holds no units, and units that lead to
        # a kernel whose output axis holds none.
        self._fed = np.zeros(self.num_units, bool)
        self._led = np.zeros(self.num_units, bool)
        readers: dict[str, set[int]] = {name: set() for name in network.leaves}
        writers: dict[str, set[int]] = {name: set() for name in network.leaves}
        for group in groups:
            for axis in group.readers:
                readers[axis.name].add(axis.axis)
            for axis in group.writers:
                writers[axis.name].add(axis.axis)
        for name in network.leaves:
            self._connect(name, readers[name], writers[name])
        self._check_paths()

    def _number_positions(self) -> dict[str, list[np.ndarray]]:
        """Returns the unit of each position of each axis of each leaf."""
        numbers = {}
        for name, leaf in self.network.leaves.items():
            numbers[name] = [np.full(size, -1) for size in leaf.shape]
        for group, first in zip(self.groups, self.firsts, strict=True):
            for name, axis, units in group.axes:
                is_unit = units >= 0
                numbers[name][axis][is_unit] = first + units[is_unit]
        return numbers

    def _per_unit(self, flags: Sequence[bool]) -> np.ndarray:
        """Repeats a flag of each group for each of its units."""
        return np.repeat(np.array(flags, bool), [group.size for group in self.groups])

    def _connect(self, name: str, readers: set[int], writers: set[int]) -> None:
        """Connects the units along the input axes of a kernel with those along its output axes."""
        kept = self.network.kept(name)
        units = self.units[name]
        # In a recurrent layer one axis can be both.
        pairs = [(read, write) for read in sorted(readers) for write in sorted(writers)]
        for read, write in pairs:
            if read != write:
                table = any_along(kept, (read, write))
                self._kernels.append(_Kernel(table, units[read], units[write]))
        # Where the other side holds no units, its positions count as always in use.
        for read in readers:
            if not writers - {read}:
                used = units[read][any_along(kept, (read,))]
                self._led[used[used >= 0]] = True
        for write in writers:
            if not readers - {write}:
                used = units[write][any_along(kept, (write,))]
                self._fed[used[used >= 0]] = True

    def _check_paths(self) -> None:
        reached = self._spread(self._inputs | self._fed)
        if self._outputs.any() and not (reached & self._outputs).any():
            raise Collapsed(
                "The network has collapsed: no kept weight leads from the inputs to the outputs, "
                "and a compact form would have no units. Prune less, or with more iterations."
            )

    def constant(self) -> np.ndarray:
        """Returns which units nothing that varies leads to, bool [units]."""
        return ~self._spread(self.must_stay | self._fed)

    def silent(self, *, train: bool) -> np.ndarray:
        """Returns which units are always 0, bool [units].

        Args:
          train: they must stay 0 in training too.
        """
        # A unit may differ from 0 if something may enter it, if its layer does not keep 0 at 0, or
        # if anything but 0 is added to it. Kept weights carry that on to all units after it.
        stays_zero = [group.zero_stays if train else group.zero for group in self.groups]
        loud = self.must_stay | self._fed | ~self._per_unit(stays_zero)
        for group, first in zip(self.groups, self.firsts, strict=True):
            for name, axis, units in group.sources:
                nonzero = any_along(self.network.masked(name) != 0, (axis,))
                loud[first + units[nonzero & (units >= 0)]] = True
        return ~self._spread(loud)

    def useful(self, needless: np.ndarray) -> np.ndarray:
        """Returns which units lead to an output over units that are not needless, bool [units]."""
        start = (self.must_stay | self._led) & ~needless
        return self._spread(start, backward=True, allowed=~needless)

    def _spread(
        self, start: np.ndarray, backward: bool = False, allowed: np.ndarray | None = None
    ) -> np.ndarray:
        """Returns the units of `start` and all that kept weights lead to from them.

        Args:
          start: bool [units].
          backward: follows weights from their outputs to their inputs.
          allowed: bool [units], units that may be entered; None for all.
        """
        if allowed is None:
            allowed = np.ones(self.num_units, bool)
        # The last entry is that of positions that are no unit, number -1.
        reached = np.append(start, True)
        allowed = np.append(allowed, False)
        kernels = self._kernels
        if backward:
            kernels = [_Kernel(k.kept.T, k.writes, k.reads) for k in reversed(kernels)]
        # Kernels are in the order of the leaves, not of the network, and there may be loops. So all
        # of them are followed until no unit is new.
        grown = True
        while grown:
            grown = False
            for kernel in kernels:
                is_written = kernel.kept[reached[kernel.reads]].any(axis=0)
                hit = kernel.writes[is_written]
                new = hit[allowed[hit] & ~reached[hit]]
                reached[new] = True
                grown |= len(new) > 0
        return reached[:-1]


def any_along(table: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """Returns whether any entry is true, for each position of `axes`, in their order."""
    others = tuple(axis for axis in range(table.ndim) if axis not in axes)
    reduced = np.asarray(table.any(axis=others))
    # The reduction leaves the axes in ascending order.
    places = np.argsort(np.argsort(axes))
    return reduced.transpose(places)
