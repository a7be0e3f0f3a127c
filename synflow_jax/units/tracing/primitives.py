"""Which primitives are alike, and which of them leave 0 where it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from synflow_jax.jaxprs import CALLS
from synflow_jax.units.tracing.values import CONSTANT, Value


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


KEEP_ZERO = _names(
    "neg abs sign tanh sin tan asin atan sinh asinh expm1 log1p sqrt cbrt square integer_pow floor ceil round erf "
    "convert_element_type real imag copy copy_p stop_gradient reduce_precision erf_inv optimization_barrier "
    "sharding_constraint pbroadcast pvary mul div rem"
)
SUMS = _names("add sub add_any max min select_n clamp")
ELEMENTWISE = (
    KEEP_ZERO
    | SUMS
    | _names(
        "exp exp2 log cos acos acosh atanh cosh logistic rsqrt pow atan2 erfc lgamma digamma nextafter "
        "eq ne lt le gt ge and or not xor shift_left shift_right_logical shift_right_arithmetic is_finite"
    )
)
REDUCTIONS = _names(
    "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or argmax argmin"
)
BROADCASTS = _names("broadcast_in_dim reshape squeeze")
WINDOWS = _names("reduce_window reduce_window_max reduce_window_min reduce_window_sum")
PLATFORM = "platform"  # the number of the platform that a program is lowered for
CUMULATIVE = _names("cumsum cumprod cummax cummin")


def neutral(name: str, values: list[Value]) -> bool:
    """Whether a sum, a maximum or a choice of values that are 0 is 0: are the constants in it 0, or out of its way?"""
    if name == "select_n":
        values = values[1:]
    for value in values:
        if value.kind != CONSTANT:
            continue
        number = value.number
        harmless = (
            number is not None
            and number != PLATFORM
            and (
                number == 0
                or (name == "max" and number < 0)
                or (name == "min" and number > 0)
                or (
                    name == "clamp"
                    and ((value is values[0] and number < 0) or (value is values[2] and number > 0))
                )
            )
        )
        if not harmless:
            return False
    return True


def is_gate(eqn: Any) -> bool:
    """Whether a function is 0 with derivative 0 at 0, as `jax.nn.relu` is."""
    aval = eqn.invars[0].aval
    if not jnp.issubdtype(aval.dtype, jnp.floating):
        return False
    function = lambda x: eqn.primitive.bind(x, **eqn.primitive.get_bind_params(eqn.params))
    closed = jax.make_jaxpr(lambda x: jax.jvp(function, (x,), (jnp.ones_like(x),)))(
        jax.ShapeDtypeStruct(aval.shape, aval.dtype)
    )
    with jax.ensure_compile_time_eval():  # this may be inside of the traced evaluation
        results = _on_scalars(closed.jaxpr, closed.consts, [np.zeros((), aval.dtype)])
        return results is not None and not any(np.any(r) for r in jax.tree.leaves(results))


def _on_scalars(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any] | None:
    """The outputs of an elementwise jaxpr for arrays of one value each; None if it is more than elementwise."""
    found = dict(zip(jaxpr.constvars, consts, strict=True)) | dict(
        zip(jaxpr.invars, args, strict=True)
    )
    read = lambda atom: atom.val if isinstance(atom, core.Literal) else found[atom]
    for eqn in jaxpr.eqns:
        name, values = eqn.primitive.name, [read(atom) for atom in eqn.invars]
        if any(np.ndim(value) for value in values):
            return None
        if name in CALLS and CALLS[name] in eqn.params:
            inner = eqn.params[CALLS[name]]
            results = _on_scalars(
                getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), values
            )
        elif name in BROADCASTS:
            results = values
        elif name in ELEMENTWISE and len(eqn.outvars) == 1:
            results = [eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))]
        else:
            return None
        if results is None:
            return None
        found |= dict(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]
