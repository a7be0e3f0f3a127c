"""How much is left after each iteration of pruning (Algorithm 1 of the paper, and its appendix 12)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np


def exponential(compression: float, step: int, num_iterations: int) -> float:
    """The density after `step` of `num_iterations`: each iteration keeps the same fraction of what it finds."""
    return (1 / compression) ** (step / num_iterations)


def linear(compression: float, step: int, num_iterations: int) -> float:
    """The density after `step` of `num_iterations`: each iteration prunes the same number of weights."""
    return 1 - (1 - 1 / compression) * (step / num_iterations)


# Prunes as much at a time as the scores allow: see `pruning.advance_certified`. It has no densities to be listed here.
CERTIFIED = "certified"
MAX_CERTIFIED = (
    4096  # iterations of a certified run, unless asked for otherwise; uint16 counts them
)
SCHEDULES: dict[str, Callable[[float, int, int], float]] = {
    "exponential": exponential,
    "linear": linear,
}


def prune_counts(
    sizes: Sequence[int], compression: float, num_iterations: int, schedule: str = "exponential"
) -> np.ndarray:
    """How many of `sizes[j]` weights are pruned after each iteration, int64 [num_iterations, len(sizes)].

    k = int((1 - density) N), in float64 on the host: float32 misplaces the counts of networks of 15 M weights.

    >>> prune_counts([1000], compression=100, num_iterations=2).tolist()
    [[900], [990]]

    Raises:
      ValueError: naming the argument that is out of its range.
    """
    if schedule not in SCHEDULES:
        raise ValueError(
            f"schedule={schedule!r} is unknown. Choose one of {sorted([*SCHEDULES, CERTIFIED])}."
        )
    if (
        not isinstance(num_iterations, int | np.integer)
        or isinstance(num_iterations, bool)
        or num_iterations < 1
    ):
        raise ValueError(f"num_iterations={num_iterations!r} must be a whole number of at least 1.")
    if not np.isfinite(compression) or compression < 1:
        raise ValueError(
            f"compression={compression!r} must be a finite number of at least 1: it is total / kept, "
            "so 1 keeps every weight and 100 keeps one in a hundred."
        )
    density = [
        SCHEDULES[schedule](float(compression), k, num_iterations)
        for k in range(1, num_iterations + 1)
    ]
    return np.array([[int((1 - d) * size) for size in sizes] for d in density], np.int64)


def num_kept(size: int, compression: float) -> int:
    """How many of `size` weights the certified schedule leaves: size / compression, rounded up.

    Rounded up but for the rounding of the compression itself, so that size / L leaves L.

    >>> num_kept(10, 3), num_kept(14_761_664, 14_761_664 / 14)
    (4, 14)
    """
    return max(1, math.ceil(size / compression * (1 - 1e-12)))


def erdos_renyi_kernel(shapes: Sequence[Sequence[int]], compression: float) -> np.ndarray:
    """The kept weights of each layer, int64 [num_layers], by Erdos-Renyi-Kernel (Evci et al. 2020).

    A layer's density is in proportion to (height + width + inputs + outputs) / (height * width * inputs * outputs), at
    most 1, so that a layer keeps weights in proportion to the sum of its shape. What does not divide evenly goes to the
    largest remainders, the first ones first. In whole numbers: the total is N - int((1 - 1 / compression) N), exactly.

    Args:
      shapes: of the prunable leaves.
      compression: total / kept, at least 1.

    Raises:
      ValueError: compression is out of its range.

    >>> erdos_renyi_kernel([(3, 3, 1, 8), (3, 3, 8, 8), (128, 10)], compression=10).tolist()  # sums 15, 22, 138
    [17, 24, 152]
    >>> erdos_renyi_kernel([(3, 3, 1, 8), (3, 3, 8, 8), (128, 10)], compression=2).tolist()  # the first is full
    [72, 123, 769]
    """
    sizes, sums = [math.prod(shape) for shape in shapes], [sum(shape) for shape in shapes]
    total = sum(sizes)
    num_kept = total - int(prune_counts([total], compression, 1)[0, 0])
    kept = list(sizes)
    sparse = list(range(len(sizes)))
    while True:
        left = num_kept - sum(sizes[i] for i in range(len(sizes)) if i not in sparse)
        parts = sum(sums[i] for i in sparse)
        full = [i for i in sparse if left * sums[i] >= sizes[i] * parts]
        if not full:
            break
        # Those that are full leave more than their part to the others, so none of them becomes sparse again.
        sparse = [i for i in sparse if i not in full]
    for i in sparse:
        kept[i] = left * sums[i] // parts
    rest = left - sum(kept[i] for i in sparse)
    for i in sorted(sparse, key=lambda i: -(left * sums[i] % parts))[:rest]:
        kept[i] += 1
    return np.array(kept, np.int64)
