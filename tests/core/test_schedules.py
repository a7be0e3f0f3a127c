"""How many weights are pruned after each iteration, against exact integer arithmetic.

Law: after step k of n the number pruned is floor((1 - density) N), where density is c^(-k/n) (exponential) or
1 - (1 - 1/c) k/n (linear). Both are decided below without any float.
"""

from __future__ import annotations

import math
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


@pytest.mark.parametrize("schedule", EXACT)
@pytest.mark.parametrize(
    "compression, num_iterations", [(1, 3), (2, 1), (10, 1), (3, 7), (100, 10), (1000, 30)]
)
def test_counts_are_exact(schedule: str, compression: int, num_iterations: int) -> None:
    counts = schedules.prune_counts(SIZES, compression, num_iterations, schedule)
    assert counts.shape == (num_iterations, len(SIZES)) and counts.dtype == np.int64
    for step in range(1, num_iterations + 1):
        for size, count in zip(SIZES, counts[step - 1], strict=True):
            exact, whole = EXACT[schedule](size, compression, step, num_iterations)
            # Where the exact value is whole, float64 may land just below it: the published rule is int() of a float.
            assert count == exact or (whole and count == exact - 1), (step, size)


@pytest.mark.parametrize("schedule", EXACT)
def test_counts_of_a_large_network_need_float64(schedule: str) -> None:
    """100 iterations at 143,652,544 weights: float64 is exact in every one of them, float32 in hardly any."""
    steps = range(1, 101)
    exact = np.array([EXACT[schedule](VGG19, 100, step, 100)[0] for step in steps])
    counts = schedules.prune_counts([VGG19], 100, 100, schedule)[:, 0]
    np.testing.assert_array_equal(counts, exact)
    density = np.array(
        [schedules.SCHEDULES[schedule](100.0, step, 100) for step in steps], np.float32
    )
    in_float32 = ((1 - density) * np.float32(VGG19)).astype(np.int64)
    assert np.mean(in_float32 != exact) > 0.5


def test_counts_that_hold_in_every_arithmetic() -> None:
    """Powers of two have no rounding: density 1/2, 1/4, 1/8 and 1 - (7/8) k/n."""
    assert schedules.prune_counts([800, 64], 8, 3, "exponential").tolist() == [
        [400, 32],
        [600, 48],
        [700, 56],
    ]
    assert schedules.prune_counts([800, 64], 8, 2, "linear").tolist() == [[350, 28], [700, 56]]


@settings(deadline=None)
@given(
    compression=st.floats(1, 1e6),
    num_iterations=st.integers(1, 200),
    schedule=st.sampled_from(sorted(schedules.SCHEDULES)),
    size=st.integers(1, 2**31 - 1),
)
def test_densities_fall_to_one_in_compression(
    compression: float, num_iterations: int, schedule: str, size: int
) -> None:
    density = [
        schedules.SCHEDULES[schedule](compression, k, num_iterations)
        for k in range(num_iterations + 1)
    ]
    assert density[0] == 1
    assert density[-1] == pytest.approx(1 / compression, rel=1e-9, abs=0)
    # Equal steps: of the logarithm for the exponential schedule, of the density itself for the linear one.
    path = np.log(density) if schedule == "exponential" else np.array(density)
    np.testing.assert_allclose(
        np.diff(path), (path[-1] - path[0]) / num_iterations, rtol=1e-6, atol=1e-12
    )

    counts = schedules.prune_counts([size], compression, num_iterations, schedule)[:, 0]
    assert (np.diff(counts) >= 0).all()
    assert counts[0] >= 0
    # Within one weight of size (1 - 1/c), which float64 holds to a part in 10^15.
    assert size - 1 - 1e-6 <= counts[-1] + size / compression <= size + 1e-6


@settings(deadline=None)
@given(num_iterations=st.integers(1, 100), schedule=st.sampled_from(sorted(schedules.SCHEDULES)))
def test_compression_1_prunes_nothing(num_iterations: int, schedule: str) -> None:
    assert not schedules.prune_counts([VGG19, 1], 1.0, num_iterations, schedule).any()


def test_something_is_always_kept_of_a_leaf() -> None:
    """density > 0, so that int((1 - density) N) < N as long as compression <= N."""
    sizes = np.array(SIZES)
    for schedule in schedules.SCHEDULES:
        for size in sizes:
            assert schedules.prune_counts([size], float(size), 100, schedule)[-1, 0] < size


@pytest.mark.parametrize("compression", [0.5, 0, -3, 0.999999, math.nan, math.inf, -math.inf])
def test_bad_compression(compression: float) -> None:
    with pytest.raises(ValueError, match=r"compression=.* must be a finite number of at least 1"):
        schedules.prune_counts([10], compression, 1)


@pytest.mark.parametrize("num_iterations", [0, -1, 2.5, True, False, math.nan, math.inf])
def test_bad_num_iterations(num_iterations: Any) -> None:
    with pytest.raises(ValueError, match=r"num_iterations=.* must be a whole number of at least 1"):
        schedules.prune_counts([10], 2.0, num_iterations)


@pytest.mark.parametrize("schedule", ["cosine", "", "Linear", None])
def test_unknown_schedule(schedule: Any) -> None:
    with pytest.raises(
        ValueError,
        match=r"schedule=.* is unknown. Choose one of \['certified', 'exponential', 'linear'\]",
    ):
        schedules.prune_counts([10], 2.0, 1, schedule)
