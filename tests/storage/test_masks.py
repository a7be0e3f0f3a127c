"""Checks how masks are packed: one bit per weight, in C order, without loss."""

from __future__ import annotations

import hypothesis.extra.numpy as hnp
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from synflow_jax.storage import masks


@settings(max_examples=100, deadline=None)
@given(mask=hnp.arrays(bool, hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=9)))
def test_unpack_is_the_inverse_of_pack(mask: np.ndarray) -> None:
    packed = masks.pack(mask)
    assert packed.dtype == np.uint8 and packed.shape == (-(-mask.size // 8),)
    np.testing.assert_array_equal(masks.unpack(packed, mask.shape), mask, strict=True)
    # Bits are in row-major order, the highest bit first, with zeros after the last.
    bits = [int(byte) >> place & 1 for byte in packed for place in range(7, -1, -1)]
    assert bits == mask.reshape(-1).astype(int).tolist() + [0] * (8 * packed.size - mask.size)


def test_the_first_bit_is_the_highest() -> None:
    assert masks.pack(jnp.array([True, False, False])).tolist() == [0b1000_0000]
    assert masks.pack(np.arange(9) == 8).tolist() == [0, 0b1000_0000]
    assert masks.pack(np.array([[True, False], [False, True]])).tolist() == [0b1001_0000]


@pytest.mark.parametrize(
    "packed_shape, shape", [((1,), (9,)), ((3,), (16,)), ((0,), ()), ((1, 1), (8,)), ((1,), (0,))]
)
def test_packed_bytes_that_do_not_fit(
    packed_shape: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=r"packed has shape .*, but a mask of shape .* takes"):
        masks.unpack(np.zeros(packed_shape, np.uint8), shape)
