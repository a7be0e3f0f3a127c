"""Follows single steps: elementwise functions, products, layouts, reductions.

A primitive that is not named here is refused where its operands depend on the input.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn

from synflow_jax.analysis.dependence.values import (
    CHANNELS,
    TABLE,
    Analysis,
    Degree,
    Degrees,
    NotLean,
    Origin,
    Part,
    Value,
    Values,
    both_of,
    choose,
    exact,
    filled,
    flow,
    joined,
    nonzero,
    over_all,
    present,
    rule,
    shape_of,
    total,
    value_of,
)
from synflow_jax.jaxprs.interpreter import bind

# ------------------------------------------------------------------------------------- Elementwise


@rule(
    "abs acos acosh add add_any asin asinh atan atan2 atanh bessel_i0e bessel_i1e "
    "bitcast_convert_type cbrt ceil clamp clz complex conj convert_element_type copy copy_p cos "
    "cosh digamma eq eq_to erf erf_inv erfc exp exp2 expm1 floor ge gt igamma igammac imag "
    "integer_pow is_finite layout_constraint le le_to lgamma log log1p logistic lt lt_to max min "
    "name ne neg nextafter not or polygamma population_count pow pvary real reduce_precision "
    "regularized_incomplete_beta rem reshard round rsqrt sharding_constraint shift_left "
    "shift_right_arithmetic shift_right_logical sign sin sinh sqrt square stop_gradient sub tan "
    "tanh xor zeta"
)
def _elementwise(analysis: Analysis, eqn: JaxprEqn, operands: Values) -> Values:
    """Follows a function of elements in the same place, any of which is enough."""
    [array] = bind(eqn, [x.array for x in operands])
    shape = shape_of(eqn.outvars[0])
    channels = [joined(analysis, present(operands, channel), shape) for channel in CHANNELS]
    return [value_of(array, channels)]


@rule("optimization_barrier device_put")
def _identity(analysis: Analysis, eqn: JaxprEqn, operands: Values) -> Values:
    """Returns the operands as they are."""
    return operands


@rule("debug_callback debug_print")
def _nothing(analysis: Analysis, eqn: JaxprEqn, operands: Values) -> Values:
    """Leaves out a step that computes nothing. There is nothing to print, either."""
    return []


@rule("select_n")
def _select(analysis: Analysis, eqn: JaxprEqn, operands: Values) -> Values:
    """Follows a choice, element by element."""
    index, *cases = operands
    return [choose(analysis, eqn.primitive.name, index, cases)]


# ---------------------------------------------------------------------------------------- Products


def _channels_of_product(
    analysis: Analysis,
    a: Value,
    b: Value,
    multiply: Callable[[Degree, Degree], Degree],
    shape: Sequence[int],
) -> list[Degree | None]:
    """Follows a product: it depends on one factor as far as the other is not 0."""
    channels: list[Degree | None] = []
    varies = a.varies is not None or b.varies is not None
    for channel in CHANNELS:
        if channel == "moves" and varies and analysis.is_lean:
            channels.append(None)
            continue
        of_a, of_b = getattr(a, channel), getattr(b, channel)
        terms = []
        if of_a is not None:
            terms.append(multiply(of_a, nonzero(analysis, b)))
        if of_b is not None:
            terms.append(multiply(nonzero(analysis, a), of_b))
        channels.append(joined(analysis, terms, shape))
    return channels


def _is_nonzero_number(x: Value) -> bool:
    """Returns whether a value is a constant that is known before the program runs, and not 0."""
    is_known = x.is_constant and not isinstance(x.array, jax.core.Tracer)
    return is_known and bool(np.all(x.array != 0))


@rule("mul and")
def _multiply(analysis: Analysis, eqn: JaxprEqn, operands: Values) -> Values:
    """Follows a product of elements in the same place."""
    if any(_is_nonzero_number(x) for x in operands):
        return _elementwise(analysis, eqn, operands)
    arrays = bind(eqn, [x.array for x in operands])
    product = _product(analysis, eqn, *operands)
    return [product._replace(array=arrays[0])]


@rule("div")
def _divide(analysis: Analysis, eqn: JaxprEqn, operands: Values) -> Values:
    """Follows a quotient: the inverse of the divisor is a factor that is never 0."""
    a, b = operands
    arrays = bind(eqn, [a.array, b.array])
    inverse = b._replace(array=jnp.ones_like(b.array))
    product = _product(analysis, eqn, a, inverse)
    return [product._replace(array=arrays[0])]


def _product(analysis: Analysis, eqn: JaxprEqn, a: Value, b: Value) -> Value:
    """Returns the dependences of an elementwise product of two values, without its array."""
    shape = shape_of(eqn.outvars[0])
    both = both_of(analysis, eqn.primitive.name, [a], [b])

    def multiply(of_a: Degree, of_b: Degree) -> Degree:
        return both(jnp.broadcast_to(of_a, shape), jnp.broadcast_to(of_b, shape))

    channels = _channels_of_product(analysis, a, b, multiply, shape)
    return value_of(None, channels)


@rule("dot_general conv_general_dilated")
def _contract(analysis: Analysis, eqn: JaxprEqn, operands: Values) -> Values:
    """Follows a sum of products."""
    a, b = operands
    arrays = bind(eqn, [exact(analysis, a), exact(analysis, b)])
    both = both_of(analysis, eqn.primitive.name, [a], [b])
    # Indicators are exact in every precision, so the program's own settings do not matter.
    options = {**eqn.params, "preferred_element_type": None, "precision": None}

    def product(of_a: Degree, of_b: Degree) -> Degree:
        return eqn.primitive.bind(of_a, of_b, **options)

    multiply = functools.partial(analysis.semiring.contract, product, both)
    shape = shape_of(eqn.outvars[0])
    channels = _channels_of_product(analysis, a, b, multiply, shape)
    return [value_of(arrays[0], channels)]


# ----------------------------------------------------------------------------------------- Layouts


@rule(
    "broadcast_in_dim broadcast_to concatenate expand_dims pad reshape rev split squeeze "
    "stack tile transpose unstack"
)
def _move(analysis: Analysis, eqn: JaxprEqn, operands: Values) -> Values:
    """Moves dependences as the elements are moved."""
    arrays = bind(eqn, [x.array for x in operands])
    return flow(analysis, operands, arrays, functools.partial(bind, eqn))


@rule("slice")
def _slice(analysis: Analysis, eqn: JaxprEqn, operands: Values) -> Values:
    """Moves dependences, and notes which rows of a parameter are taken, as of stacked layers."""
    [x] = operands
    [result] = _move(analysis, eqn, operands)
    if not x.origin.is_parameter or not jnp.ndim(x.array):
        return [result]
    start, stop = eqn.params["start_indices"][0], eqn.params["limit_indices"][0]
    parts = frozenset(Part(part.name, start, stop) for part in x.origin.leaves)
    return [result._replace(origin=Origin(parts, x.origin.depth))]


# Joins what an index could find in its operands, per element of the result or as one number.
_AnywhereFn = Callable[[Degrees], Degree]


def _shifted(
    analysis: Analysis,
    eqn: JaxprEqn,
    outputs: Values,
    data: Values,
    indices: Values,
    anywhere: _AnywhereFn | None = None,
) -> Values:
    """Adds that an index may depend on something: then every output does, on all data.

    An index into zeros finds 0 anywhere, as in a table of embeddings without weights.
    """
    turn = over_all(analysis, indices, CHANNELS)
    if turn is None:
        return outputs
    if analysis.is_lean:
        raise NotLean
    semiring = analysis.semiring
    if anywhere is None:

        def anywhere(degrees: Degrees) -> Degree:
            totals = [total(semiring, degree) for degree in degrees]
            return functools.reduce(semiring.join, totals)

    both = both_of(analysis, eqn.primitive.name, data, indices)
    can_differ = anywhere([nonzero(analysis, x) for x in data])
    results = []
    for x in outputs:
        channels = []
        for channel in CHANNELS:
            degrees = present([x], channel)
            of_index = over_all(analysis, indices, [channel])
            if of_index is not None:
                degrees.append(both(of_index, can_differ))
            if present(data, channel):
                of_data = anywhere([filled(analysis, y, channel) for y in data])
                degrees.append(both(of_data, turn))
            channels.append(joined(analysis, degrees, jnp.shape(x.array)))
        results.append(value_of(x.array, channels))
    return results


def _along(analysis: Analysis, degree: Degree, axes: Sequence[int]) -> Degree:
    """Joins along axes, and keeps the shape."""
    joined_axes = analysis.semiring.reduce(degree, axes)
    return jnp.broadcast_to(jnp.expand_dims(joined_axes, tuple(axes)), degree.shape)


@rule("gather")
def _gather(analysis: Analysis, eqn: JaxprEqn, operands: Values) -> Values:
    """Moves dependences to where the indices say. What lies outside of the operand has none."""
    data, indices = operands
    arrays = bind(eqn, [data.array, indices.array])
    options = {**eqn.params, "fill_value": analysis.semiring.never}

    def follow(degrees: Degrees) -> Degrees:
        return [eqn.primitive.bind(degrees[0], indices.array, **options)]

    def anywhere(degrees: Degrees) -> Degree:
        [degree] = degrees
        sizes = eqn.params["slice_sizes"]
        # An index cannot move along an axis that is taken as a whole.
        moved = eqn.params["dimension_numbers"].start_index_map
        axes = [axis for axis in moved if sizes[axis] < degree.shape[axis]]
        in_bounds = {**options, "mode": jax.lax.GatherScatterMode.CLIP, "fill_value": None}
        return eqn.primitive.bind(_along(analysis, degree, axes), indices.array, **in_bounds)

    outputs = flow(analysis, [data], arrays, follow)
    return _shifted(analysis, eqn, outputs, [data], [indices], anywhere)


@rule("dynamic_slice")
def _dynamic_slice(analysis: Analysis, eqn: JaxprEqn, operands: Values) -> Values:
    """Moves dependences as `_gather` does."""
    return _at_indices(analysis, eqn, operands, num_data=1)


@rule("dynamic_update_slice")
def _dynamic_update_slice(analysis: Analysis, eqn: JaxprEqn, operands: Values) -> Values:
    """Puts the dependences of a part into those of the whole."""
    return _at_indices(analysis, eqn, operands, num_data=2)


def _at_indices(analysis: Analysis, eqn: JaxprEqn, operands: Values, num_data: int) -> Values:
    """Moves the dependences of the first operands to where the other operands say."""
    data, indices = operands[:num_data], operands[num_data:]
    arrays = bind(eqn, [x.array for x in operands])
    places = [x.array for x in indices]

    def follow(degrees: Degrees) -> Degrees:
        return bind(eqn, [*degrees, *places])

    def anywhere(degrees: Degrees) -> Degree:
        whole, part = shape_of(eqn.invars[0]), shape_of(eqn.invars[num_data - 1])
        if num_data == 1:
            part = shape_of(eqn.outvars[0])
        # An index cannot move along an axis that is taken, or replaced, as a whole.
        axes = [axis for axis, size in enumerate(whole) if part[axis] < size]
        spread = [_along(analysis, degree, axes) for degree in degrees]
        if num_data == 1:
            [found] = follow(spread)
            return found
        kept, update = spread
        replaced = jnp.broadcast_to(_first(update, axes), kept.shape)
        return analysis.semiring.join(kept, replaced)

    outputs = flow(analysis, data, arrays, follow)
    return _shifted(analysis, eqn, outputs, data, indices, anywhere)


def _first(degree: Degree, axes: Sequence[int]) -> Degree:
    """Takes the first element along axes, and keeps their number."""
    for axis in axes:
        degree = jax.lax.slice_in_dim(degree, 0, 1, axis=axis)
    return degree


@rule("scatter scatter-add scatter-sub scatter-min scatter-max scatter_add scatter_sub")
def _scatter(analysis: Analysis, eqn: JaxprEqn, operands: Values) -> Values:
    """Puts the dependences of the updates in the place of, or beside, those that were there."""
    data, indices, updates = operands
    arrays = bind(eqn, [x.array for x in operands])
    names = ("dimension_numbers", "indices_are_sorted", "unique_indices", "mode")
    options = {name: eqn.params[name] for name in names}
    replaces = eqn.primitive.name == "scatter"
    scatter = jax.lax.scatter if replaces else analysis.semiring.scatter

    def follow(degrees: Degrees) -> Degrees:
        of_data, of_updates = degrees
        return [scatter(of_data, indices.array, of_updates, **options)]

    both = [data, updates]
    outputs = flow(analysis, both, arrays, follow)
    return _shifted(analysis, eqn, outputs, both, [indices])


# -------------------------------------------------------------------------------------- Reductions


def _axes_of_reduction(eqn: JaxprEqn) -> Sequence[int]:
    """Returns the axes that a reduction removes."""
    return eqn.params["axes"] if "axes" in eqn.params else eqn.params["dimensions"]


@rule("reduce_sum reduce_max reduce_min reduce_and reduce_or reduce_xor argmax argmin reduce")
def _reduce(analysis: Analysis, eqn: JaxprEqn, operands: Values) -> Values:
    """Joins along the axes of a reduction."""
    arrays = bind(eqn, [exact(analysis, x) for x in operands])
    axes = _axes_of_reduction(eqn)

    def follow(degrees: Degrees) -> Degrees:
        # A general reduction takes arrays and as many first values, which are scalars.
        reduced = [
            analysis.semiring.reduce(degree, axes) if degree.ndim else degree for degree in degrees
        ]
        total = joined(analysis, reduced, shape_of(eqn.outvars[0]))
        assert total is not None
        return [total] * len(arrays)

    return flow(analysis, operands, arrays, follow)


@rule("reduce_prod")
def _reduce_product(analysis: Analysis, eqn: JaxprEqn, operands: Values) -> Values:
    """Follows a product along axes, one factor after the other."""
    [x] = operands
    arrays = bind(eqn, [x.array])
    axes = _axes_of_reduction(eqn)
    shape = shape_of(eqn.outvars[0])
    slices = [x]
    for axis in sorted(axes, reverse=True):
        slices = [part for whole in slices for part in _slices(whole, axis)]

    def times(a: Value, b: Value) -> Value:
        product = _product(analysis, eqn, a, b)
        return product._replace(array=a.array * b.array)

    one = Value(jnp.ones(shape, jnp.result_type(x.array)))
    product = functools.reduce(times, slices, one)
    return [product._replace(array=arrays[0])]


def _slices(x: Value, axis: int) -> Values:
    """Returns the slices of a value along an axis."""

    def part(array: Any, i: int) -> Any:
        return None if array is None else jax.lax.index_in_dim(array, i, axis, keepdims=False)

    size = jnp.shape(x.array)[axis]
    leaves = Origin(x.origin.leaves, x.origin.depth)
    return [
        Value(part(x.array, i), part(x.varies, i), part(x.moves, i), leaves) for i in range(size)
    ]


@rule("reduce_window_sum reduce_window_max reduce_window_min reduce_window")
def _window(analysis: Analysis, eqn: JaxprEqn, operands: Values) -> Values:
    """Joins over windows, as pooling does."""
    arrays = bind(eqn, [exact(analysis, x) for x in operands])
    names = (
        "window_dimensions",
        "window_strides",
        "padding",
        "base_dilation",
        "window_dilation",
    )
    window = {name: eqn.params[name] for name in names}

    def follow(degrees: Degrees) -> Degrees:
        wholes = degrees[: len(arrays)]
        pooled = [analysis.semiring.window(degree, **window) for degree in wholes]
        total = joined(analysis, pooled, shape_of(eqn.outvars[0]))
        assert total is not None
        return [total] * len(arrays)

    return flow(analysis, operands, arrays, follow)


@rule("cumsum cummax cummin cumlogsumexp")
def _cumulate(analysis: Analysis, eqn: JaxprEqn, operands: Values) -> Values:
    """Joins all elements up to each."""
    arrays = bind(eqn, [exact(analysis, x) for x in operands])
    axis, reverse = eqn.params["axis"], eqn.params["reverse"]
    return flow(
        analysis,
        operands,
        arrays,
        lambda degrees: [analysis.semiring.cumulate(degrees[0], axis, reverse)],
    )


# ------------------------------------------------------------------------------------------ Mixing


def _mix(
    analysis: Analysis,
    eqn: JaxprEqn,
    operands: Values,
    axes: Callable[[int], Sequence[int]],
) -> Values:
    """Lets every output depend on all elements along these axes of all operands.

    axes: returns the axes, from the number of axes of an operand.
    """
    arrays = bind(eqn, [x.array for x in operands])
    semiring = analysis.semiring

    def follow(degrees: Degrees) -> Degrees:
        mixed = []
        for degree in degrees:
            along = tuple(axes(degree.ndim))
            total = semiring.reduce(degree, along)
            mixed.append(jnp.expand_dims(total, along))
        total = functools.reduce(semiring.join, mixed)
        return [jnp.broadcast_to(total, shape_of(variable)) for variable in eqn.outvars]

    return flow(analysis, operands, arrays, follow)


@rule("sort")
def _sort(analysis: Analysis, eqn: JaxprEqn, operands: Values) -> Values:
    """Mixes the axis that is sorted."""
    axis = eqn.params["dimension"]
    return _mix(analysis, eqn, operands, lambda num_axes: [axis])


@rule("top_k approx_top_k")
def _top(analysis: Analysis, eqn: JaxprEqn, operands: Values) -> Values:
    """Mixes the axis that is searched."""
    axis = eqn.params.get("axis", eqn.params.get("reduction_dimension", -1))
    return _mix(analysis, eqn, operands, lambda num_axes: [axis % num_axes])


@rule("fft")
def _fft(analysis: Analysis, eqn: JaxprEqn, operands: Values) -> Values:
    """Mixes the last axes."""
    num_mixed = len(eqn.params["fft_lengths"])
    return _mix(analysis, eqn, operands, lambda num_axes: range(num_axes - num_mixed, num_axes))


@rule(
    "cholesky custom_linear_solve eig eigh geqrf householder_product lu schur svd "
    "triangular_solve tridiagonal_solve qr"
)
def _solve(analysis: Analysis, eqn: JaxprEqn, operands: Values) -> Values:
    """Lets every output of a decomposition or of a linear system depend on all operands."""
    arrays = bind(eqn, [x.array for x in operands])

    def follow(degrees: Degrees) -> Degrees:
        totals = [analysis.semiring.reduce(degree, range(degree.ndim)) for degree in degrees]
        total = functools.reduce(analysis.semiring.join, totals)
        return [jnp.broadcast_to(total, shape_of(variable)) for variable in eqn.outvars]

    return flow(analysis, operands, arrays, follow)


__all__ = ["TABLE"]
