"""Folds units that are constant into the biases after them, for inference.

A unit that receives nothing, and is not 0, is a constant: sigmoid(0) = 0.5, or the ReLU of a
positive bias. If every kernel that reads it is followed by a bias, the product of the kernel and
the constant can be added to the bias, and the unit can be removed. This is exact if the kernel sees
the constant at all places. A padded convolution does not: at the borders of its map, a part of the
kernel falls on zeros. The error there is bounded, and a tolerance says how large it may be.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from synflow_jax.units.connections import Connections, any_along
from synflow_jax.units.tracing import NONE, Read


def foldable(connections: Connections, reads: Sequence[Read], tolerance: float) -> np.ndarray:
    """Returns which units are constant, not 0, and can be folded into biases, bool [units].

    Args:
      connections: of the units.
      reads: the products of the network, evaluated.
      tolerance: the largest error of an output of a padded convolution.
    """
    # Silent units need no folding: they are removed without it.
    is_silent = connections.silent(train=False)
    constant = connections.constant() & ~is_silent
    result = constant.copy()
    for group, first in zip(connections.groups, connections.firsts, strict=True):
        for name, axis, units in group.readers:
            is_unit = units >= 0
            is_constant = np.zeros(len(units), bool)
            is_constant[is_unit] = constant[first + units[is_unit]]
            products = _products_along(connections, reads, name, axis)
            # The bias after each product of the kernel must be able to take up the constant. An
            # axis without any product is read in a way that has no description.
            able = np.full(len(units), len(products) > 0)
            for product in products:
                able &= _can_fold(connections, product, is_constant, tolerance)
            unable = units[is_unit & ~able]
            result[first + unable] = False
    return result


def _products_along(
    connections: Connections,
    reads: Sequence[Read],
    name: str,
    axis: int,
) -> list[Read]:
    """Returns the products that read units along an axis of a kernel.

    A product with a kernel that was computed from the parameter has no axis, so it may be any.
    """
    names = connections.network.names
    products = []
    for read in reads:
        if names[read.leaf] == name and read.read in (axis, NONE):
            products.append(read)
    return products


def _can_fold(
    connections: Connections,
    read: Read,
    constant: np.ndarray,
    tolerance: float,
) -> np.ndarray:
    """Returns which inputs of a kernel the bias after it can take up, bool [input positions].

    Args:
      connections: of the units.
      read: the product.
      constant: bool [input positions], whether the unit is constant.
      tolerance: see `foldable`.
    """
    network = connections.network
    none = np.zeros(len(constant), bool)
    if read.bias is None or read.values is None:
        return none
    bias = network.names[read.bias]
    if network.leaves[bias].ndim != 1:
        return none
    # An entry of the bias that is pruned must stay 0.
    kept = network.kept(network.names[read.leaf])
    writes = any_along(kept, (read.read, read.write))
    is_pruned = ~network.kept(bias)[None]
    writes_pruned = (writes & is_pruned).any(axis=1)
    able = np.asarray(read.steady) & ~writes_pruned
    if read.whole:
        return able

    # An output changes most if all of the kernel falls on padding.
    able &= constant
    kernel = _kernel_matrix(connections, read)
    sums = abs(kernel).sum(axis=2)
    values = np.asarray(read.values)
    errors = abs(values) * sums.max(axis=1, initial=0)
    errors = np.where(able, errors, np.inf)
    # Inputs with the smallest errors come first, as many as the tolerance allows together.
    order = np.argsort(errors, kind="stable")
    total_errors = np.cumsum(errors[order])
    affordable = np.zeros(len(able), bool)
    affordable[order] = total_errors <= tolerance
    return able & affordable


def fold(
    connections: Connections,
    reads: Sequence[Read],
    folded: np.ndarray,
    positions: Mapping[str, Sequence[np.ndarray | None]],
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Adds the constants of folded units to the biases after them.

    Args:
      connections: of the units.
      reads: the products of the network, evaluated.
      folded: bool [units].
      positions: the positions that stay, for each axis of each leaf (`Plan.positions`).

    Returns:
      The leaves by name, and the largest error of each padded kernel that read a folded unit.
    """
    names = connections.network.names
    leaves = {name: leaf.copy() for name, leaf in connections.network.leaves.items()}
    bounds: dict[str, float] = {}
    # The last entry belongs to positions that are no unit, number -1.
    folded = np.append(folded, False)
    for read in reads:
        if read.bias is None or read.values is None:
            continue
        name = names[read.leaf]
        bias = names[read.bias]
        stay = positions[name][read.read]
        # All inputs of this kernel stay.
        if stay is None:
            continue
        units = connections.units[name][read.read]
        gone = folded[units]
        # The first unit of a group that would be empty stays, folded or not.
        gone[stay] = False
        constants = np.where(gone, read.values, 0)
        kernel = _kernel_matrix(connections, read)
        added = constants @ kernel.sum(axis=2)
        leaves[bias] += read.sign * added
        if not read.whole and constants.any():
            errors = abs(constants) @ abs(kernel).sum(axis=2)
            largest = float(np.max(errors))
            before = bounds.get(name, 0.0)
            bounds[name] = max(largest, before)
    return leaves, bounds


def _kernel_matrix(connections: Connections, read: Read) -> np.ndarray:
    """Returns the masked kernel of a product, [inputs, outputs, places of the kernel]."""
    network = connections.network
    kernel = network.masked(network.names[read.leaf])
    kernel = np.moveaxis(kernel, (read.read, read.write), (0, 1))
    num_inputs, num_outputs, *_ = kernel.shape
    return kernel.reshape(num_inputs, num_outputs, -1)
