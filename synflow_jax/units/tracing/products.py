"""Follows units through matrix products and convolutions, where a kernel reads and writes units.

A product sums over some axes of its two factors. If one factor is a kernel, the kernel reads the
units along its summed axes and writes the units along its other axes.
"""

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
    fields_along,
    leaf_axes,
    move_axes,
    output_shape,
    parameters_of,
    with_flags,
)


class _Factor(NamedTuple):
    """Describes one factor of a product.

    Attributes:
      value: the factor.
      summed: the axes that the product sums over. The i-th one meets the i-th of the other factor.
      places: maps each of its other axes to an axis of the result. The axes along which the kernel
        of a convolution slides are missing here, and are not summed either.
    """

    value: Value
    summed: Sequence[int]
    places: Mapping[int, int]


@rule("dot_general")
def _dot_general(records: Records, eqn: Any, operands: list[Value]) -> list[Value]:
    (a_summed, b_summed), (a_batch, b_batch) = eqn.params["dimension_numbers"]
    a, b = operands
    # The result has the batch axes first, then the free axes of a, then those of b.
    a_order = [*a_batch, *_axes_but(a, a_summed, a_batch)]
    a_places = {axis: place for place, axis in enumerate(a_order)}
    b_places = {axis: place for place, axis in enumerate(b_batch)}
    first_of_b = len(a_order)
    for place, axis in enumerate(_axes_but(b, b_summed, b_batch), first_of_b):
        b_places[axis] = place
    a_factor = _Factor(a, a_summed, a_places)
    b_factor = _Factor(b, b_summed, b_places)
    shape = output_shape(eqn)
    result = _multiply(records, a_factor, b_factor, shape)
    return [result]


def _axes_but(value: Value, summed: Sequence[int], batch: Sequence[int]) -> list[int]:
    """Returns the free axes of a factor: neither summed nor batch axes."""
    excluded = {*summed, *batch}
    return [axis for axis in range(value.ndim) if axis not in excluded]


@rule("conv_general_dilated")
def _convolve(records: Records, eqn: Any, operands: list[Value]) -> list[Value] | None:
    x, kernel = operands
    params = eqn.params
    # Batch groups appear in the gradients of grouped convolutions, not in networks.
    if kernel.kind != Kind.PARAMETERS or params["batch_group_count"] != 1:
        return None
    if params["feature_group_count"] != 1:
        return _convolve_depthwise(records, eqn, x, kernel)

    numbers = params["dimension_numbers"]
    x_batch, x_feature, *_ = numbers.lhs_spec
    kernel_out, kernel_in, *_ = numbers.rhs_spec
    out_batch, out_feature, *_ = numbers.out_spec
    x_factor = _Factor(x, [x_feature], {x_batch: out_batch})
    kernel_factor = _Factor(kernel, [kernel_in], {kernel_out: out_feature})

    # With padding, or with holes in a dilated input, a part of the kernel is multiplied by zeros.
    is_padded = any(tuple(widths) != (0, 0) for widths in params["padding"])
    has_holes = any(dilation > 1 for dilation in params["lhs_dilation"])
    whole = not is_padded and not has_holes
    shape = output_shape(eqn)
    result = _multiply(records, x_factor, kernel_factor, shape, whole)
    return [result]


def _convolve_depthwise(records: Records, eqn: Any, x: Value, kernel: Value) -> list[Value] | None:
    """Follows a depthwise convolution, in which each output channel has one input channel.

    Its kernel scales the units. Returns None for convolutions in larger groups: they write units
    that depend on a part of the units they read, which no statement in `Records` describes.
    """
    numbers = eqn.params["dimension_numbers"]
    x_batch, x_feature, *_ = numbers.lhs_spec
    kernel_out, *_ = numbers.rhs_spec
    _, out_feature, *_ = numbers.out_spec
    num_channels = x.shape[x_feature]
    if eqn.params["feature_group_count"] != num_channels:
        return None
    channels = fields_along(x, {x_feature})
    written = fields_along(kernel, {kernel_out})
    if len(channels) != 1 or len(written) != 1:
        return None
    (channel,) = channels
    (scale,) = written
    # Where the kernel is not 0 although its parameter is, it does not scale the units.
    if not scale.zero:
        return None

    slid_over = []
    for field in excluding(x.fields, channels):
        if not field.lies_within([x_batch]):
            slid_over.append(field)
    records.lose(slid_over, Cause.SPATIAL)

    # With a channel multiplier m, the m outputs of an input channel follow each other.
    shape = output_shape(eqn)
    multiplier = shape[out_feature] // num_channels
    row = np.repeat(channel.nodes.ravel(), multiplier)
    records.unify(row, scale.nodes.ravel())
    records.scales.update(leaf_axes(written))
    nodes = along(row, out_feature, len(shape))
    support = frozenset([out_feature])
    result = channel._replace(nodes=nodes, support=support)
    return [Value([result], Kind.ACTIVATIONS, shape)]


def _multiply(
    records: Records,
    a: _Factor,
    b: _Factor,
    shape: tuple[int, ...],
    whole: bool = True,
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
    # The result has the remaining axes of both factors. They get one kind, or `meet` would record
    # that the kernel scales the activations.
    x_rest = x_rest._replace(kind=kind)
    kernel_rest = kernel_rest._replace(kind=kind)
    result = meet(records, "mul", x_rest, kernel_rest)
    if not mixed:
        return result

    reads = _reads(records, x, kernel, whole)
    records.reads += reads
    if len(reads) != 1:
        return result
    last = len(records.reads) - 1
    return result._replace(product=last)


def _parts(records: Records, factor: _Factor, shape: tuple[int, ...]) -> tuple[Value, Value]:
    """Splits a factor into its summed axes and its others, broadcast to the shape of the result."""
    value = factor.value
    summed = [field for field in value.fields if field.lies_within(factor.summed)]
    rest = [field for field in value.fields if field.lies_within(factor.places)]
    crossing = excluding(value.fields, [*summed, *rest])
    # The height and width of a kernel hold no units, and nothing is lost with them.
    touches_sum = any(field.touches(factor.summed) for field in crossing)
    if value.kind == Kind.ACTIVATIONS or touches_sum:
        records.lose(crossing, Cause.SUMMED_WITH_OTHERS)

    # The summed axes of both factors move to the same places, so that they can be matched.
    summed_part = value._replace(fields=summed)
    summed_places = {axis: place for place, axis in enumerate(factor.summed)}
    summed_shape = tuple(value.shape[axis] for axis in factor.summed)
    summed_part = move_axes(summed_part, summed_places, summed_shape)

    rest_part = value._replace(fields=rest)
    places = factor.places
    new = set(range(len(shape)))
    new.difference_update(places.values())
    rest_part = move_axes(rest_part, places, shape, new)
    return summed_part, rest_part


def _contract(records: Records, x: Value, kernel: Value) -> tuple[Value, Value]:
    """Records that units of two values are multiplied and summed over.

    Args:
      records: of the program.
      x, kernel: the summed axes of the factors. If one depends on parameters alone, it is `kernel`.

    Returns:
      The same values, with one field each along axes where both have fields.
    """
    # No unit may go if both factors are activations (attention) or both are parameters.
    if not is_mixed(x, kernel):
        fields = (*x.fields, *kernel.fields)
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
    # Removing a unit sets parameters to 0. The entries of the kernel must then be 0 too, although
    # the kernel may be computed from the parameter (weight normalization, quantization).
    if not all(field.zero for field in fields):
        records.fix([*fields, *x.fields], Cause.NONZERO_KERNEL)
    records.readers.update(leaf_axes(reading.fields))
    records.writers.update(leaf_axes(writing.fields))


def _reads(records: Records, x: _Factor, kernel: _Factor, whole: bool) -> list[Read]:
    """Describes the product of a kernel with activations, once per parameter in the kernel."""
    leaves = parameters_of(kernel.value)
    records.num_uses.update(leaves)
    # Constants can be folded only through a kernel that is the parameter itself.
    leaf = kernel.value.leaf
    is_leaf = leaf is not None and kernel.value.shape == records.leaf_shapes[leaf]
    has_two_axes = len(kernel.summed) == len(kernel.places) == 1
    if leaf is None or not is_leaf or not has_two_axes:
        return [Read(other, NONE, NONE) for other in sorted(leaves)]

    (read_axis,) = kernel.summed
    (write_axis,) = kernel.places
    read = Read(leaf, read_axis, write_axis, whole=whole)
    array = x.value.array
    if array is None:
        return [read]
    values, steady = _steady_values(array, x.summed[0])
    read = read._replace(values=values, steady=steady)
    return [read]


def _steady_values(x: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """Returns the activations at one place, and where they are equal at all places (see `Read`)."""
    num_features = x.shape[axis]
    last = jnp.moveaxis(x, axis, -1)
    rows = last.reshape(-1, num_features)
    first = rows[:1]
    # Places are summed in different orders, so equal activations may differ by rounding.
    tolerance = 1e-6 * jnp.abs(first)
    is_close = jnp.abs(rows - first) <= tolerance
    return rows[0], jnp.all(is_close, axis=0)
