"""Decides how many weights are pruned after each iteration (Algorithm 1 and appendix 12).

A schedule is a function. `schedule(shapes, compression, num_iterations)` returns counts, an int64
array with one row per iteration: how many weights are pruned once that iteration is done. With one
column all weights are ranked together. With one column per layer each layer is ranked by itself,
so layer quotas are schedules too. Any function of this form can be passed to `pruning.prune`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import numpy as np

from synflow_jax import arguments
from synflow_jax.trees import Mask

Shape = Sequence[int]
Schedule = Callable[[Sequence[Shape], float, int], np.ndarray]


# One ranking of all weights ----------------------------------------------------------------------


def exponential(shapes: Sequence[Shape], compression: float, num_iterations: int) -> np.ndarray:
    """Prunes the same fraction of the remaining weights in each iteration: the paper's schedule.

    After iteration k of n the density is compression^(-k / n).

    Args:
      shapes: of the prunable leaves.
      compression: total / kept at the end, at least 1.
      num_iterations: n.

    Returns:
      int64 [num_iterations, 1]: how many weights are pruned after each iteration.

    Raises:
      ValueError: an argument is out of its range.

    >>> exponential([(10, 100)], compression=100, num_iterations=2).tolist()
    [[900], [990]]
    """
    check_request(compression, num_iterations)
    final_density = 1 / float(compression)
    steps = range(1, num_iterations + 1)
    densities = [final_density ** (step / num_iterations) for step in steps]
    return counts_of([_num_weights(shapes)], densities)


def linear(shapes: Sequence[Shape], compression: float, num_iterations: int) -> np.ndarray:
    """Prunes the same number of weights in each iteration. Arguments as `exponential`.

    >>> linear([(10, 100)], compression=100, num_iterations=2).tolist()
    [[495], [990]]
    """
    check_request(compression, num_iterations)
    final_sparsity = 1 - 1 / float(compression)
    steps = range(1, num_iterations + 1)
    densities = [1 - final_sparsity * (step / num_iterations) for step in steps]
    return counts_of([_num_weights(shapes)], densities)


def counts_of(sizes: Sequence[int], densities: Sequence[float]) -> np.ndarray:
    """Turns densities into counts: k = int((1 - density) N), as the published runs do.

    In float64 on the host: float32 misplaces the counts of networks of 15 million weights.

    Args:
      sizes: one number of weights per column.
      densities: kept / total after each iteration.

    Returns:
      int64 [len(densities), len(sizes)].
    """
    # Truncated, not rounded, and 1 - density first: the published counts depend on both.
    rows = [[int((1 - density) * size) for size in sizes] for density in densities]
    return np.array(rows, np.int64).reshape(len(densities), len(sizes))


# Each layer by itself ----------------------------------------------------------------------------


def per_layer(schedule: Schedule) -> Schedule:
    """Applies a schedule to each layer by itself: every layer reaches the same compression.

    >>> per_layer(exponential)([(10,), (4, 5)], 10, 1).tolist()
    [[9, 18]]
    """
    check_schedule(schedule)

    def counts(shapes: Sequence[Shape], compression: float, num_iterations: int) -> np.ndarray:
        # A network of one layer has one ranking, of its own weights.
        columns = [schedule([shape], compression, num_iterations) for shape in shapes]
        return np.concatenate(columns, axis=1)

    return counts


def quotas_of(mask: Mask) -> Schedule:
    """Prunes each layer to the number of weights that another mask keeps there.

    The mask alone decides how many weights are left. Each layer's density falls exponentially.

    >>> mask = {"a": np.array([True, False, False, False]), "b": np.array([True, True])}
    >>> quotas_of(mask)([(4,), (2,)], 2.0, 2).tolist()
    [[2, 0], [3, 0]]
    """
    leaves = jax.tree.leaves(mask)
    if not leaves or any(getattr(leaf, "dtype", None) != np.bool_ for leaf in leaves):
        raise ValueError(
            f"mask={arguments.describe(mask)} must hold bool arrays. Take a mask that was made by "
            "prune or trees.prunable."
        )
    kept = [int(np.count_nonzero(leaf)) for leaf in leaves]

    def counts(shapes: Sequence[Shape], compression: float, num_iterations: int) -> np.ndarray:
        check_request(compression, num_iterations)
        return _toward(kept, shapes, num_iterations)

    return counts


def erdos_renyi_kernel(
    shapes: Sequence[Shape], compression: float, num_iterations: int
) -> np.ndarray:
    """Prunes each layer to its share under Erdos-Renyi-Kernel; see `erdos_renyi_kernel_quotas`."""
    check_request(compression, num_iterations)
    kept = erdos_renyi_kernel_quotas(shapes, compression)
    return _toward(kept.tolist(), shapes, num_iterations)


def erdos_renyi_kernel_quotas(shapes: Sequence[Shape], compression: float) -> np.ndarray:
    """Computes how many weights each layer keeps under Erdos-Renyi-Kernel (Evci et al. 2020).

    A layer's density is proportional to (height + width + inputs + outputs) divided by
    (height * width * inputs * outputs), and at most 1. So a layer keeps weights in proportion to
    the sum of its shape. Weights that do not divide evenly go to the largest remainders, the first
    layer first. The arithmetic is in whole numbers: the total is N - int((1 - 1 / compression) N).

    Args:
      shapes: of the prunable leaves.
      compression: total / kept, at least 1.

    Returns:
      int64 [num_layers], the kept weights of each layer.

    Raises:
      ValueError: compression is out of its range.

    >>> shapes = [(3, 3, 1, 8), (3, 3, 8, 8), (128, 10)]  # sums 15, 22, 138
    >>> erdos_renyi_kernel_quotas(shapes, compression=10).tolist()
    [17, 24, 152]
    >>> erdos_renyi_kernel_quotas(shapes, compression=2).tolist()  # the first layer is full
    [72, 123, 769]
    """
    sizes = [math.prod(shape) for shape in shapes]
    sums = [sum(shape) for shape in shapes]
    num_pruned = int(exponential(shapes, compression, 1)[0, 0])
    num_kept = sum(sizes) - num_pruned

    # A layer whose share is above its size is full, and the others divide what it leaves. They get
    # more than before, so a full layer stays full, and the loop ends.
    sparse = list(range(len(sizes)))
    while True:
        in_full_layers = sum(sizes[i] for i in range(len(sizes)) if i not in sparse)
        left = num_kept - in_full_layers
        parts = sum(sums[i] for i in sparse)
        full = [i for i in sparse if left * sums[i] >= sizes[i] * parts]
        if not full:
            break
        sparse = [i for i in sparse if i not in full]

    kept = list(sizes)
    for i in sparse:
        kept[i] = left * sums[i] // parts
    rest = left - sum(kept[i] for i in sparse)
    by_remainder = sorted(sparse, key=lambda i: -(left * sums[i] % parts))
    for i in by_remainder[:rest]:
        kept[i] += 1
    return np.array(kept, np.int64)


def _toward(kept: Sequence[int], shapes: Sequence[Shape], num_iterations: int) -> np.ndarray:
    """Lets the density of each layer fall exponentially to a given number of weights."""
    sizes = [math.prod(shape) for shape in shapes]
    if len(sizes) != len(kept):
        raise ValueError(
            f"the quotas are for {len(kept)} layers, and the network has {len(sizes)} prunable "
            "ones. Take the quotas from a mask of the same network."
        )
    for layer, (num_kept, size) in enumerate(zip(kept, sizes, strict=True)):
        if num_kept > size:
            raise ValueError(
                f"the quota of layer {layer} is {num_kept} weights, and the layer has {size}. "
                "Take the quotas from a mask of the same network."
            )
    columns = []
    for num_kept, size in zip(kept, sizes, strict=True):
        density = num_kept / max(size, 1)  # a layer may be empty
        steps = range(1, num_iterations + 1)
        densities = [density ** (step / num_iterations) for step in steps]
        column = counts_of([size], densities)
        column[-1] = size - num_kept  # exactly, whatever float64 makes of the fraction
        columns.append(column)
    return np.concatenate(columns, axis=1)


# Checks ------------------------------------------------------------------------------------------


def check_request(compression: float, num_iterations: int) -> None:
    """Raises ValueError, naming the argument, for a request that no schedule can meet."""
    arguments.check_num_iterations(num_iterations)
    check_compression(compression)


def check_compression(compression: float) -> None:
    """Raises ValueError unless `compression` is a finite number of at least 1."""
    number = arguments.check_number("compression", compression, "100")
    if not math.isfinite(number) or number < 1:
        raise ValueError(
            f"compression={arguments.short(compression)} must be a finite number of at least 1. "
            "It is total / kept: 1 keeps every weight, and 100 keeps one in a hundred."
        )


def check_schedule(schedule: Schedule) -> None:
    """Raises ValueError unless `schedule` is a function of the three arguments of a schedule."""
    arguments.check_function(
        "schedule", schedule, ("shapes", "compression", "num_iterations"), "schedules.linear"
    )


def check_counts(
    counts: np.ndarray, sizes: Sequence[int], num_iterations: int, *, nested: bool
) -> np.ndarray:
    """Checks the counts that a schedule returned, and returns them as an array.

    Args:
      counts: what the schedule returned.
      sizes: the number of weights of each prunable layer.
      num_iterations: the number of rows that it was asked for.
      nested: whether pruned weights stay pruned. Otherwise counts may fall.

    Raises:
      ValueError: they are not whole numbers of a fitting shape, or out of their range.
    """
    counts = np.asarray(counts)
    num_layers = len(sizes)
    has_columns = counts.ndim == 2 and counts.shape[1] in (1, num_layers)
    has_rows = counts.ndim == 2 and len(counts) == num_iterations
    if not has_columns or not has_rows or counts.dtype.kind not in "iu":
        raise ValueError(
            f"schedule returned {counts.dtype}{list(counts.shape)}. It must return whole numbers, "
            f"int[{num_iterations}, 1] for one ranking of all weights or "
            f"int[{num_iterations}, {num_layers}] for one of each layer."
        )
    limits = np.array([sum(sizes)] if counts.shape[1] == 1 else sizes)
    if (counts < 0).any() or (counts > limits).any():
        raise ValueError(
            f"schedule returned {counts.tolist()}. Counts must be between 0 and the number of "
            f"weights, {limits.tolist()}."
        )
    if nested and (np.diff(counts, axis=0) < 0).any():
        raise ValueError(
            f"schedule returned {counts.tolist()}. Counts must not fall from one iteration to the "
            "next: they include the weights that were pruned before."
        )
    return counts


def _num_weights(shapes: Sequence[Shape]) -> int:
    return sum(math.prod(shape) for shape in shapes)
