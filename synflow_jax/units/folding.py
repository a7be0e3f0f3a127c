"""Folds units that are constant into the biases after them, for inference.

A unit that nothing reaches, and that is not 0, is a constant: sigmoid(0) = 0.5, or the ReLU of a
positive bias. If every kernel that reads it is followed by a bias, the kernel's product with the
constant can be added to the bias, and the unit removed. That is exact where the kernel sees the
constant at all places. A padded convolution does not: at the borders of its map part of the kernel
lies on zeros. The error there is bounded, and a tolerance decides whether it is accepted.
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
    names = connections.network.names
    constant = connections.constant() & ~connections.silent(train=False)
    result = constant.copy()
    for group, first in zip(connections.groups, connections.firsts, strict=True):
        for name, axis, units in group.readers:
            is_unit = units >= 0
            is_constant = np.zeros(len(units), bool)
            is_constant[is_unit] = constant[first + units[is_unit]]
            products = [read for read in reads if names[read.leaf] == name]
            products = [read for read in products if read.read in (axis, NONE)]
            # The bias after each product of the kernel has to be able to take up the constant.
            able = np.full(len(units), len(products) > 0)
            for product in products:
                able &= _can_fold(connections, product, is_constant, tolerance)
            result[first + units[is_unit & ~able]] = False
    return result


def _can_fold(
    connections: Connections, read: Read, constant: np.ndarray, tolerance: float
) -> np.ndarray:
    """Returns which positions of a kernel's input axis the bias after it can take up.

    Args:
      connections: of the units.
      read: the product.
      constant: bool [input positions], whether the unit is constant.
      tolerance: see `foldable`.
    """
    network = connections.network
    if read.bias is None or read.values is None:
        return np.zeros(len(constant), bool)
    bias = network.names[read.bias]
    if network.leaves[bias].ndim != 1:
        return np.zeros(len(constant), bool)
    # An entry of the bias that is pruned has to stay 0.
    kept = network.kept(network.names[read.leaf])
    writes = any_along(kept, (read.read, read.write))
    writes_pruned = (writes & ~network.kept(bias)[None]).any(axis=1)
    able = np.asarray(read.steady) & ~writes_pruned
    if read.whole:
        return able
    # The most that an output changes if all of the kernel lies on padding.
    sums = abs(_kernel_matrix(connections, read)).sum(axis=2)
    errors = abs(np.asarray(read.values)) * sums.max(axis=1, initial=0)
    # The smallest errors are taken first, as many of them as the tolerance affords together.
    able &= constant
    errors = np.where(able, errors, np.inf)
    order = np.argsort(errors, kind="stable")
    affordable = np.zeros(len(able), bool)
    affordable[order] = np.cumsum(errors[order]) <= tolerance
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
      The leaves by name, and for each padded kernel that had a share in this the largest error
      that it makes.
    """
    names = connections.network.names
    leaves = {name: leaf.copy() for name, leaf in connections.network.leaves.items()}
    bounds: dict[str, float] = {}
    # The last entry is that of positions that are no unit, number -1.
    folded = np.append(folded, False)
    for read in reads:
        if read.bias is None or read.values is None:
            continue
        name = names[read.leaf]
        stay = positions[name][read.read]
        if stay is None:
            continue
        gone = folded[connections.units[name][read.read]]
        gone[stay] = False
        constants = np.where(gone, read.values, 0)
        kernel = _kernel_matrix(connections, read)
        added = constants @ kernel.sum(axis=2)
        leaves[names[read.bias]] += read.sign * added
        if not read.whole and constants.any():
            errors = abs(constants) @ abs(kernel).sum(axis=2)
            bounds[name] = max(float(np.max(errors)), bounds.get(name, 0.0))
    return leaves, bounds


def _kernel_matrix(connections: Connections, read: Read) -> np.ndarray:
    """Returns the masked kernel of a product, [inputs, outputs, places of the kernel]."""
    kernel = connections.network.masked(connections.network.names[read.leaf])
    kernel = np.moveaxis(kernel, (read.read, read.write), (0, 1))
    return kernel.reshape(*kernel.shape[:2], -1)
