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
    output_shape,
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
    a_free = _axes_but(a, [*a_summed, *a_batch])
    b_free = _axes_but(b, [*b_summed, *b_batch])
    order = range(len(a_batch) + len(a_free) + len(b_free))
    a_places = dict(zip([*a_batch, *a_free], order, strict=False))
    b_places = dict(zip(b_batch, order, strict=False))
    b_places.update(zip(b_free, order[len(a_places) :], strict=True))
    a_factor = _Factor(a, a_summed, a_places)
    b_factor = _Factor(b, b_summed, b_places)
    return [_multiply(records, a_factor, b_factor, output_shape(eqn))]


def _axes_but(value: Value, excluded: Sequence[int]) -> list[int]:
    return [axis for axis in range(value.ndim) if axis not in excluded]


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
    padding = [tuple(widths) for widths in eqn.params["padding"]]
    holes = [dilation > 1 for dilation in eqn.params["lhs_dilation"]]
    result = _multiply(
        records,
        _Factor(x, [x_feature], {x_batch: out_batch}),
        _Factor(kernel, [kernel_in], {kernel_out: out_feature}),
        output_shape(eqn),
        whole=set(padding) <= {(0, 0)} and not any(holes),
    )
    return [result]


def _convolve_depthwise(records: Records, eqn: Any, x: Value, kernel: Value) -> list[Value] | None:
    """Follows a convolution in which each output channel has one input channel.

    The kernel scales the units. Convolutions in larger groups are not followed (None).
    """
    numbers = eqn.params["dimension_numbers"]
    x_batch, x_feature = numbers.lhs_spec[:2]
    kernel_out = numbers.rhs_spec[0]
    out_feature = numbers.out_spec[1]
    num_channels = x.shape[x_feature]
    if eqn.params["feature_group_count"] != num_channels:
        return None
    channels = [field for field in x.fields if field.support == {x_feature}]
    written = [field for field in kernel.fields if field.support == {kernel_out}]
    if len(channels) != 1 or len(written) != 1 or not written[0].zero:
        return None

    slid_over = [f for f in excluding(x.fields, channels) if not f.lies_within([x_batch])]
    records.lose(slid_over, Cause.SPATIAL)
    # Each channel has as many outputs in a row.
    shape = output_shape(eqn)
    num_outputs = shape[out_feature] // num_channels
    nodes = np.repeat(channels[0].nodes.ravel(), num_outputs)
    records.unify(nodes, written[0].nodes.ravel())
    records.scales.update(leaf_axes(written))
    nodes = along(nodes, out_feature, len(shape))
    field = channels[0]._replace(nodes=nodes, support=frozenset([out_feature]))
    return [Value([field], Kind.ACTIVATIONS, shape)]


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
    x, kernel = a, b
    if b.value.kind != Kind.PARAMETERS:
        x, kernel = b, a
    x_summed, x_rest = _parts(records, x, shape)
    kernel_summed, kernel_rest = _parts(records, kernel, shape)
    x_summed, kernel_summed = _contract(records, x_summed, kernel_summed)

    kind = max(x.value.kind, kernel.value.kind)
    mixed = is_mixed(x.value, kernel.value)
    if mixed:
        _record_kernel(records, x_summed, kernel_summed, kernel_rest)
        kernel_rest = with_flags(kernel_rest, leaf_axes=frozenset(), ungated=False)
    # Neither of them scales the other one: they are parts of one value, and of one kind.
    x_rest = x_rest._replace(kind=kind)
    kernel_rest = kernel_rest._replace(kind=kind)
    result = meet(records, "mul", x_rest, kernel_rest)
    if not mixed:
        return result

    reads = _reads(records, x, kernel, whole)
    records.reads += reads
    product = len(records.reads) - 1 if len(reads) == 1 else None
    return result._replace(product=product)


def _parts(records: Records, factor: _Factor, shape: tuple[int, ...]) -> tuple[Value, Value]:
    """Returns the summed axes of a factor, and the others broadcast to the shape of the result."""
    value = factor.value
    summed = [field for field in value.fields if field.lies_within(factor.summed)]
    rest = [field for field in value.fields if field.lies_within(factor.places)]
    crossing = excluding(value.fields, [*summed, *rest])
    # The height and width of a kernel hold no units, and nothing is lost with them.
    if value.kind == Kind.ACTIVATIONS or any(f.touches(factor.summed) for f in crossing):
        records.lose(crossing, Cause.SUMMED_WITH_OTHERS)

    summed_places = {axis: place for place, axis in enumerate(factor.summed)}
    summed_shape = tuple(value.shape[axis] for axis in factor.summed)
    new = set(range(len(shape))).difference(factor.places.values())
    return (
        move_axes(value._replace(fields=summed), summed_places, summed_shape),
        move_axes(value._replace(fields=rest), factor.places, shape, new),
    )


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
        met = [own for own in kernel.fields if own.touches(field.support)]
        for own in met:
            records.unify(field.nodes, own.nodes)
        if not met:
            records.fix([field], Cause.SUMMED_ALONE)
    for value in (x, kernel):
        if value.kind == Kind.ACTIVATIONS:
            records.consume(value.fields)
    return x, kernel


def _record_kernel(records: Records, x: Value, reading: Value, writing: Value) -> None:
    """Records which units a kernel reads and which it writes.

    Args:
      records: of the program.
      x: the summed axes of the kernel's input.
      reading: the summed axes of the kernel.
      writing: its other axes.
    """
    fields = (*reading.fields, *writing.fields)
    # To remove a unit is to set parameters to 0, which must set entries of the kernel to 0.
    if not all(field.zero for field in fields):
        records.fix([*fields, *x.fields], Cause.NONZERO_KERNEL)
    records.readers.update(leaf_axes(reading.fields))
    records.writers.update(leaf_axes(writing.fields))


def _reads(records: Records, x: _Factor, kernel: _Factor, whole: bool) -> list[Read]:
    """Describes the product of a kernel with activations, once per parameter in the kernel."""
    leaves = {leaf for field in kernel.value.fields for leaf, _ in field.leaf_axes}
    records.num_uses.update(leaves)
    # Constants can be folded only through a kernel that is the parameter itself.
    leaf = kernel.value.leaf
    has_two_axes = len(kernel.summed) == len(kernel.places) == 1
    is_leaf = leaf is not None and kernel.value.shape == records.leaf_shapes[leaf]
    if leaf is None or not is_leaf or not has_two_axes:
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
    is_close = jnp.abs(rows - first) <= 1e-6 * jnp.abs(first)
    return rows[0], jnp.all(is_close, axis=0)
