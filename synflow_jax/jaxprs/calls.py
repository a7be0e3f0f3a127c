"""What the programs that JAX traces have in common in several of its versions."""

from __future__ import annotations

from typing import Any

# Primitives that call another jaxpr, and the parameter that holds it.
CALLS = {
    "jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "core_call": "call_jaxpr", "checkpoint": "jaxpr",
    "remat2": "jaxpr", "custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr",
}  # fmt: skip


def scan_counts(eqn: Any, inner: Any) -> tuple[int, int]:
    """The numbers of constants and of carried values of a scan, by shapes: what is scanned has an axis more outside.

    (The parameters that say so have other names in every second version of JAX.)
    """
    same = lambda outside, inside: sum(
        a.aval.shape == b.aval.shape for a, b in zip(outside, inside, strict=True)
    )
    num_carry = same(eqn.outvars, inner.outvars)
    return same(eqn.invars, inner.invars) - num_carry, num_carry
