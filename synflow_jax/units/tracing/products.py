"""Follows units through products that sum: there a kernel reads some units and writes others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from synflow_jax.units.tracing.meeting import is_mixed, match_fields, meet
from synflow_jax.units.tracing.records import Cause, Read, Records
from synflow_jax.units.tracing.rules import rule
from synflow_jax.units.tracing.values import (
    NONE,
    Kind,
    Value,
    along,
    excluding,
    leaf_axes,
    move_axes,
    with_flags,
)


class _Factor(NamedTuple):
    """Describes a factor of a product.

    Attributes:
      value: the factor.
      summed: axes that the product sums over. The i-th one meets the i-th of the other factor.
      places: where its other axes are in the result. Axes of a convolution along which the kernel
        slides are neither summed nor have a place.
    """

    value: Value
    summed: Sequence[int]
    places: Mapping[int, int]


@rule("dot_general")
def _dot_general(records: Records, eqn: Any, operands: list[Value]) -> list[Value]:
    (a_summed, b_summed), (a_batch, b_batch) = eqn.params["dimension_numbers"]
    a, b = operands
    # The result has the batch axes first, then the free axes of a, then those of b.
    a_free = [i for i in range(len(a.shape)) if i not in (*a_summed, *a_batch)]
    b_free = [i for i in range(len(b.shape)) if i not in (*b_summed, *b_batch)]
    a_places = {axis: place for place, axis in enumerate([*a_batch, *a_free])}
    b_places = {axis: place for place, axis in enumerate(b_batch)}
    b_places |= {axis: place for place, axis in enumerate(b_free, len(a_places))}
    factors = _Factor(a, a_summed, a_places), _Factor(b, b_summed, b_places)
    return [_multiply(records, *factors, eqn.outvars[0].aval.shape)]


@rule("conv_general_dilated")
def _convolve(records: Records, eqn: Any, operands: list[Value]) -> list[Value] | None:
    x, kernel = operands
    if kernel.kind != Kind.PARAMETERS or eqn.params["batch_group_count"] != 1:
        return None
    if eqn.params["feature_group_count"] != 1:
        return _convolve_depthwise(records, eqn, x, kernel)
    numbers = eqn.params["dimension_numbers"]
    x_batch, x_feature = numbers.lhs_spec[:2]
    kernel_out, kernel_in = numbers.rhs_spec[:2]
    out_batch, out_feature = numbers.out_spec[:2]
    no_padding = all(tuple(widths) == (0, 0) for widths in eqn.params["padding"])
    no_holes = set(eqn.params["lhs_dilation"]) <= {1}
    return [
        _multiply(
            records,
            _Factor(x, [x_feature], {x_batch: out_batch}),
            _Factor(kernel, [kernel_in], {kernel_out: out_feature}),
            eqn.outvars[0].aval.shape,
            whole=no_padding and no_holes,
        )
    ]


def _convolve_depthwise(records: Records, eqn: Any, x: Value, kernel: Value) -> list[Value] | None:
    """Follows a convolution in which each output channel has one input channel.

    The kernel scales the units. Convolutions in larger groups are not followed (None).
    """
    numbers = eqn.params["dimension_numbers"]
    x_batch, x_feature = numbers.lhs_spec[:2]
    out_feature = numbers.out_spec[1]
    num_groups = eqn.params["feature_group_count"]
    shape = eqn.outvars[0].aval.shape
    channels = [field for field in x.fields if field.support == {x_feature}]
    written = [field for field in kernel.fields if field.support == {numbers.rhs_spec[0]}]
    if num_groups != x.shape[x_feature] or len(channels) != 1 or len(written) != 1:
        return None
    if not written[0].zero:
        return None

    others = excluding(x.fields, channels)
    records.lose([field for field in others if not field.support <= {x_batch}], Cause.SPATIAL)
    nodes = np.repeat(channels[0].nodes.ravel(), shape[out_feature] // num_groups)
    records.unify(nodes, written[0].nodes.ravel())
    records.scales.update(leaf_axes(written))
    field = channels[0]._replace(
        nodes=along(nodes, out_feature, len(shape)), support=frozenset([out_feature])
    )
    return [Value((field,), Kind.ACTIVATIONS, shape)]


def _multiply(
    records: Records, a: _Factor, b: _Factor, shape: tuple[int, ...], whole: bool = True
) -> Value:
    """Follows units through a product that sums over axes of its factors.

    Args:
      records: of the program.
      a, b: the factors.
      shape: of the result.
      whole: see `Read.whole`.
    """
    x, kernel = (a, b) if b.value.kind == Kind.PARAMETERS else (b, a)
    kind = max(x.value.kind, kernel.value.kind)
    for factor in (x, kernel):
        _lose_crossing_fields(records, factor)
    read_by, reading = _summed_part(x), _summed_part(kernel)
    passing, written = _other_part(x, shape), _other_part(kernel, shape)
    read_by, reading = _contract(records, read_by, reading)

    mixed = is_mixed(x.value, kernel.value)
    if mixed:
        _record_kernel(records, read_by, reading, written)
        written = with_flags(written, leaf_axes=frozenset(), ungated=False)
    # Neither of them scales the other one: they are parts of one value, and of one kind.
    parts = [part._replace(kind=kind) for part in (passing, written)]
    result = meet(records, "mul", *parts)
    if not mixed:
        return result

    reads = _reads(records, x, kernel, whole)
    records.reads += reads
    product = len(records.reads) - 1 if len(reads) == 1 else None
    return result._replace(product=product)


def _lose_crossing_fields(records: Records, factor: _Factor) -> None:
    """Records that units along summed and other axes at once cannot be followed."""
    summed = set(factor.summed)
    places = set(factor.places)
    fields = factor.value.fields
    lost = [f for f in fields if not (f.support <= summed or f.support <= places)]
    is_kernel_window = factor.value.kind != Kind.ACTIVATIONS and all(
        field.support.isdisjoint(summed) for field in lost
    )
    # The height and width of a kernel hold no units, and nothing is lost with them.
    if not is_kernel_window:
        records.lose(lost, Cause.SUMMED_WITH_OTHERS)


def _summed_part(factor: _Factor) -> Value:
    """Returns a value of the summed axes of a factor alone."""
    fields = tuple(f for f in factor.value.fields if f.support <= set(factor.summed))
    places = {axis: place for place, axis in enumerate(factor.summed)}
    shape = tuple(factor.value.shape[axis] for axis in factor.summed)
    return move_axes(factor.value._replace(fields=fields), places, shape)


def _other_part(factor: _Factor, shape: tuple[int, ...]) -> Value:
    """Returns a factor without its summed axes, broadcast to the shape of the result."""
    fields = tuple(f for f in factor.value.fields if f.support <= set(factor.places))
    new = set(range(len(shape))).difference(factor.places.values())
    return move_axes(factor.value._replace(fields=fields), factor.places, shape, new)


def _contract(records: Records, x: Value, kernel: Value) -> tuple[Value, Value]:
    """Records that units of two values are multiplied and summed over.

    Args:
      records: of the program.
      x, kernel: the summed axes of the factors. If one depends on parameters alone, it is `kernel`.

    Returns:
      The same values, with the fields that have met.
    """
    fields = (*x.fields, *kernel.fields)
    if not is_mixed(x, kernel):
        has_activations = Kind.ACTIVATIONS in (x.kind, kernel.kind)
        cause = Cause.SUMMED_ALONE if has_activations else Cause.PARAMETER_PRODUCT
        records.fix(fields, cause)
    x, kernel = match_fields(records, x, kernel)
    for field in x.fields:
        met = [own for own in kernel.fields if not own.support.isdisjoint(field.support)]
        for own in met:
            records.unify(field.nodes, own.nodes)
        if not met:
            records.fix([field], Cause.SUMMED_ALONE)
    for value in (x, kernel):
        if value.kind == Kind.ACTIVATIONS:
            records.consume(value.fields)
    return x, kernel


def _record_kernel(records: Records, x: Value, reading: Value, written: Value) -> None:
    """Records which units a kernel reads and which it writes.

    Args:
      records: of the program.
      x: the summed axes of the kernel's input.
      reading: the summed axes of the kernel.
      written: its other axes.
    """
    fields = (*reading.fields, *written.fields)
    # To remove a unit is to set parameters to 0, which must set entries of the kernel to 0.
    if not all(field.zero for field in fields):
        records.fix([*fields, *x.fields], Cause.NONZERO_KERNEL)
    records.readers.update(leaf_axes(reading.fields))
    records.writers.update(leaf_axes(written.fields))


def _reads(records: Records, x: _Factor, kernel: _Factor, whole: bool) -> list[Read]:
    """Describes the product of a kernel with activations, once per parameter in the kernel."""
    leaves = {leaf for field in kernel.value.fields for leaf, _ in field.leaf_axes}
    records.num_uses.update(leaves)
    leaf = kernel.value.leaf
    has_two_axes = len(kernel.summed) == len(kernel.places) == 1
    if leaf is None or not has_two_axes or kernel.value.shape != records.leaf_shapes[leaf]:
        return [Read(leaf, NONE, NONE) for leaf in sorted(leaves)]
    (write,) = kernel.places
    read = Read(leaf, kernel.summed[0], write, whole=whole)
    if x.value.array is not None:
        values, steady = _steady_values(x.value.array, x.summed[0])
        read = read._replace(values=values, steady=steady)
    return [read]


def _steady_values(x: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """Returns the activations at one place, and where they are equal at all places (see `Read`)."""
    rows = jnp.moveaxis(x, axis, -1).reshape(-1, x.shape[axis])
    first = rows[:1]
    steady = jnp.all(jnp.abs(rows - first) <= 1e-6 * jnp.abs(first), axis=0)
    return rows[0], steady
