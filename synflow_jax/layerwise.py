"""Floor 2. How many weights each layer keeps where its shape alone decides: Erdos-Renyi-Kernel.

The other layerwise rules need nothing of their own: "uniform" is random within each leaf (`scope="local"`), and random
at another rule's densities is that rule's mask, shuffled (`masking.shuffle`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from synflow_jax import schedules


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
    num_kept = total - int(schedules.prune_counts([total], compression, 1)[0, 0])
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
