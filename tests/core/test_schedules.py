"""Compares the counts of schedules with exact integer arithmetic.

After step k of n the number of pruned weights is floor((1 - density) N). The density is c^(-k/n)
(exponential) or 1 - (1 - 1/c) k/n (linear). Both are decided below without any float.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from synflow_jax import schedules

VGG19 = 143_652_544  # the prunable weights of VGG-19 on ImageNet
SIZES = (1, 2, 7, 1000, 61_470, 14_761_664, VGG19)


def _exponential(size: int, compression: int, step: int, num_iterations: int) -> tuple[int, bool]:
    """(floor(N - N c^(-k/n)), is N c^(-k/n) whole): m weights may go while (N - m)^n c^k >= N^n."""

    def kept_is_enough(kept: int) -> int:
        return kept**num_iterations * compression**step - size**num_iterations

    low, high = 0, size  # kept = high is enough, low is not (unless the size is 0)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if kept_is_enough(middle) >= 0 else (middle, high)
    return size - high, kept_is_enough(high) == 0


def _linear(size: int, compression: int, step: int, num_iterations: int) -> tuple[int, bool]:
    """(floor(N (1 - 1/c) k/n), is that whole)."""
    pruned, rest = divmod(size * (compression - 1) * step, compression * num_iterations)
    return pruned, rest == 0


EXACT = {"exponential": _exponential, "linear": _linear}
SCHEDULES = {"exponential": schedules.exponential, "linear": schedules.linear}


def _counts(
    sizes: Sequence[int], compression: float, num_iterations: int, name: str = "exponential"
) -> np.ndarray:
    """Returns a column per size, each with a schedule of its own."""
    schedule = schedules.per_layer(SCHEDULES[name])
    return schedule([(size,) for size in sizes], compression, num_iterations)


@pytest.mark.parametrize("schedule", EXACT)
@pytest.mark.parametrize(
    "compression, num_iterations", [(1, 3), (2, 1), (10, 1), (3, 7), (100, 10), (1000, 30)]
)
def test_counts_are_exact(schedule: str, compression: int, num_iterations: int) -> None:
    counts = _counts(SIZES, compression, num_iterations, schedule)
    assert counts.shape == (num_iterations, len(SIZES)) and counts.dtype == np.int64
    for step in range(1, num_iterations + 1):
        for size, count in zip(SIZES, counts[step - 1], strict=True):
            exact, whole = EXACT[schedule](size, compression, step, num_iterations)
            # Where the exact value is whole, float64 may be just below it, and int() truncates.
            assert count == exact or (whole and count == exact - 1), (step, size)


@pytest.mark.parametrize("schedule", EXACT)
def test_counts_of_a_large_network_need_float64(schedule: str) -> None:
    """Counts 143,652,544 weights: float64 is exact in all 100 iterations, float32 in few."""
    steps = range(1, 101)
    exact = np.array([EXACT[schedule](VGG19, 100, step, 100)[0] for step in steps])
    counts = _counts([VGG19], 100, 100, schedule)[:, 0]
    np.testing.assert_array_equal(counts, exact)
    sparsity = {
        "exponential": [1 - 100.0 ** (-step / 100) for step in steps],
        "linear": [0.99 * (step / 100) for step in steps],
    }[schedule]
    in_float32 = (np.array(sparsity, np.float32) * np.float32(VGG19)).astype(np.int64)
    assert np.mean(in_float32 != exact) > 0.5


def test_counts_that_hold_in_every_arithmetic() -> None:
    """Powers of two have no rounding: density 1/2, 1/4, 1/8 and 1 - (7/8) k/n."""
    assert _counts([800, 64], 8, 3, "exponential").tolist() == [
        [400, 32],
        [600, 48],
        [700, 56],
    ]
    assert _counts([800, 64], 8, 2, "linear").tolist() == [[350, 28], [700, 56]]


@settings(deadline=None)
@given(
    compression=st.floats(1, 1e6),
    num_iterations=st.integers(1, 200),
    schedule=st.sampled_from(sorted(SCHEDULES)),
    size=st.integers(1, 2**31 - 1),
)
def test_densities_fall_to_one_in_compression(
    compression: float, num_iterations: int, schedule: str, size: int
) -> None:
    counts = _counts([size], compression, num_iterations, schedule)[:, 0]
    kept = size - counts
    assert (np.diff(counts) >= 0).all()
    assert counts[0] >= 0
    # Within one weight of size (1 - 1/c), which float64 holds to a part in 10^15.
    assert size - 1 - 1e-6 <= counts[-1] + size / compression <= size + 1e-6
    # Equal steps, to within the weights that int() moves: of the logarithm of what is kept for the
    # exponential schedule, of the number itself for the linear one.
    steps = np.arange(1, num_iterations + 1) / num_iterations
    if schedule == "exponential":
        expected = size * np.exp(-steps * np.log(compression))
    else:
        expected = size * (1 - (1 - 1 / compression) * steps)
    np.testing.assert_allclose(kept, expected, rtol=1e-6, atol=1 + 1e-6)


@settings(deadline=None)
@given(num_iterations=st.integers(1, 100), schedule=st.sampled_from(sorted(SCHEDULES)))
def test_compression_1_prunes_nothing(num_iterations: int, schedule: str) -> None:
    assert not _counts([VGG19, 1], 1.0, num_iterations, schedule).any()


def test_something_is_always_kept_of_a_leaf() -> None:
    """density > 0, so that int((1 - density) N) < N as long as compression <= N."""
    sizes = np.array(SIZES)
    for schedule in SCHEDULES:
        for size in sizes:
            assert _counts([size], float(size), 100, schedule)[-1, 0] < size


@pytest.mark.parametrize("compression", [0.5, 0, -3, 0.999999, math.nan, math.inf, -math.inf])
def test_bad_compression(compression: float) -> None:
    with pytest.raises(ValueError, match=r"compression=.* must be a finite number of at least 1"):
        _counts([10], compression, 1)


@pytest.mark.parametrize("num_iterations", [0, -1, 2.5, True, False, math.nan, math.inf])
def test_bad_num_iterations(num_iterations: Any) -> None:
    with pytest.raises(ValueError, match=r"num_iterations=.* must be a whole number of at least 1"):
        _counts([10], 2.0, num_iterations)


def test_one_column_ranks_all_weights_together() -> None:
    counts = schedules.exponential([(3, 3, 2, 4), (8, 2)], 10, 2)
    assert counts.shape == (2, 1) and counts[-1, 0] == int(0.9 * 88)


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(1, 500), min_size=1, max_size=6),
    fraction=st.floats(0, 1),
    num_iterations=st.integers(1, 20),
)
def test_quotas_are_met_exactly_on_a_falling_path(
    sizes: list[int], fraction: float, num_iterations: int
) -> None:
    mask = {f"layer{i}": np.arange(size) < fraction * size for i, size in enumerate(sizes)}
    shapes = [(size,) for size in sizes]
    counts = schedules.quotas_of(mask)(shapes, 2.0, num_iterations)
    kept = [int(leaf.sum()) for leaf in mask.values()]
    assert (np.array(sizes) - counts[-1]).tolist() == kept
    assert (np.diff(counts, axis=0) >= 0).all() and (counts >= 0).all()


def test_quotas_of_another_network() -> None:
    mask = {"a": np.ones(3, bool)}
    with pytest.raises(ValueError, match="quotas are for 1 layers, and the network has 2"):
        schedules.quotas_of(mask)([(3,), (4,)], 2.0, 1)


def test_quotas_of_larger_layers_name_the_layer() -> None:
    mask = {"a": np.ones(3, bool), "b": np.ones(4, bool)}
    with pytest.raises(ValueError, match="quota of layer 1 is 4 weights, and the layer has 2"):
        schedules.quotas_of(mask)([(3,), (2,)], 2.0, 1)


def test_an_empty_layer_has_an_empty_quota() -> None:
    counts = schedules.erdos_renyi_kernel([(0, 3), (4, 5)], 2, 2)
    assert counts.shape == (2, 2) and counts[:, 0].tolist() == [0, 0]


def test_erdos_renyi_kernel_ends_at_its_quotas() -> None:
    shapes = [(3, 3, 1, 8), (3, 3, 8, 8), (128, 10)]
    quotas = schedules.erdos_renyi_kernel_quotas(shapes, 10)
    counts = schedules.erdos_renyi_kernel(shapes, 10, 4)
    assert counts.shape == (4, 3)
    assert ([72, 576, 1280] - counts[-1]).tolist() == quotas.tolist()
    assert (np.diff(counts, axis=0) >= 0).all()
