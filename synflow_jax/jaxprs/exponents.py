"""Plans how each primitive acts on powers of two, before any array is computed.

Scaled evaluation holds each array as x * 2^e. The number e is known only when the program runs, but
its composition is known beforehand: it is a sum of numbers that the program has found earlier, the
*atoms*. A product adds the exponents of its operands, a reshape keeps that of its operand, and a
sum needs one exponent for both. `plan` returns the exponents of an equation's outputs, and says
which of its operands must be aligned and whether its outputs must be rescaled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn, Literal

from synflow_jax.jaxprs.interpreter import CALLS, AnyRule, Cond, Program, Table, called, walk

# A sum of atoms, as pairs (atom, count). An atom is the index of an int32 number in the program.
Exponent = frozenset[tuple[int, int]]
PLAIN: Exponent = frozenset()  # the factor is 2^0
ANY = None  # the exponent of zeros and infinities, which every power of two leaves as they are
Exponents = Sequence[Exponent | None]


class Plan(NamedTuple):
    """Says how to compute an equation.

    Attributes:
      exponents: the exponents of the outputs. If there is an alignment, the common exponent
        replaces them.
      align: the indices of the operands to bring to one exponent. Empty if they have one already.
      num_products: the number of products of arrays that the equation computes one after another.
        If it is not 0, the outputs are rescaled.
      plain: whether to compute the equation from the plain values x * 2^e, which may overflow.
    """

    exponents: Exponents
    align: tuple[int, ...] = ()
    num_products: int = 0
    plain: bool = False


PlanRule = Callable[[JaxprEqn, Exponents], Plan | None]
_RULES: dict[str, PlanRule] = {}


def plan(eqn: JaxprEqn, exponents: Exponents) -> Plan | None:
    """Returns the plan of an equation for operands of these exponents.

    The plan is None if the program in the equation must be entered: for every scan, and for a call
    or a `cond` whose programs hold two products in a row or an alignment.
    """
    name = eqn.primitive.name
    rule = _RULES.get(name, _plain)
    if not any(exponents) and rule not in _MAKE_EXPONENTS:
        return _unscaled(eqn, exponents)
    return rule(eqn, exponents)


def add(a: Exponent | None, b: Exponent | None, times: int = 1) -> Exponent:
    """Returns the exponent a + times * b."""
    total = dict(a or PLAIN)
    for atom, count in b or PLAIN:
        before = total.get(atom, 0)
        total[atom] = before + times * count
    # An atom that cancels must vanish, so that equal exponents are equal sets.
    return frozenset((atom, count) for atom, count in total.items() if count)


def of_literal(literal: Literal) -> Exponent | None:
    """Returns the exponent of a literal."""
    value = literal.val
    if not is_float(literal) or np.ndim(value) > 0:
        return PLAIN
    is_neutral = value == 0 or np.isinf(value)
    return ANY if is_neutral else PLAIN


def is_float(variable: Any) -> bool:
    """Returns whether a variable of a jaxpr holds floats. Others have no exponent."""
    return jnp.issubdtype(variable.aval.dtype, jnp.floating)


# ------------------------------------------------------------------------------------------ Rules


def _rule(primitives: str) -> Callable[[AnyRule], AnyRule]:
    """Registers the decorated function as the rule of these primitives."""

    def register(rule: AnyRule) -> AnyRule:
        _RULES.update(dict.fromkeys(primitives.split(), rule))
        return rule

    return register


def _unscaled(eqn: JaxprEqn, exponents: Exponents) -> Plan:
    """Plans an equation none of whose operands has a power of two."""
    name = eqn.primitive.name
    # Zeros and infinities that are only moved, chosen or summed are still the same at any exponent.
    keeps_neutral = _RULES.get(name) in (_keep, _align)
    is_neutral = keeps_neutral and set(exponents) == {ANY}
    outputs = []
    for variable in eqn.outvars:
        outputs.append(ANY if is_neutral and is_float(variable) else PLAIN)
    # A loop of unknown length may overflow whatever enters it, so `unscaled` must name it.
    return Plan(outputs, plain=name == "while")


def _plain(eqn: JaxprEqn, exponents: Exponents) -> Plan:
    """Plans a function that is no sum of products of its operands (exp, tanh, sort ...)."""
    return Plan([PLAIN] * len(eqn.outvars), plain=True)


@_rule(
    "reshape transpose broadcast_in_dim squeeze expand_dims rev slice dynamic_slice gather "
    "reduce_sum reduce_max reduce_min reduce_window_max reduce_window_min reduce_window_sum "
    "cumsum cummax cummin neg abs copy copy_p real reduce_precision convert_element_type "
    "sharding_constraint optimization_barrier stop_gradient pbroadcast pvary"
)
def _keep(eqn: JaxprEqn, exponents: Exponents) -> Plan:
    """Keeps the exponent where entries of one operand are moved, chosen or summed."""
    # An index or a rounded integer has no exponent.
    if not all(is_float(v) for v in eqn.outvars):
        return _plain(eqn, exponents)
    num_outputs = len(eqn.outvars)
    # optimization_barrier returns all of its operands; elsewhere the later ones are indices.
    return Plan(exponents[:num_outputs])


@_rule("add sub add_any max min concatenate clamp select_n pad dynamic_update_slice")
def _align(eqn: JaxprEqn, exponents: Exponents) -> Plan:
    """Aligns operands whose entries are summed, compared or put side by side."""
    meeting = _meeting(eqn, exponents)
    distinct = {exponents[i] for i in meeting}
    if len(distinct) > 1:
        return Plan([PLAIN], align=meeting)
    common = distinct.pop() if distinct else ANY
    return Plan([common])


@_rule("eq ne lt le gt ge")
def _compare(eqn: JaxprEqn, exponents: Exponents) -> Plan:
    """Aligns operands that are compared. The result has no exponent."""
    plan = _align(eqn, exponents)
    return plan._replace(exponents=[PLAIN])


@_rule("sign is_finite argmax argmin")
def _invariant(eqn: JaxprEqn, exponents: Exponents) -> Plan:
    """Drops the exponent where a positive factor changes nothing."""
    return Plan([PLAIN] * len(eqn.outvars))


@_rule("dot_general conv_general_dilated")
def _product(eqn: JaxprEqn, exponents: Exponents) -> Plan:
    """Adds the exponents of arrays whose product is summed: the result may be much larger."""
    a, b = exponents[:2]
    return Plan([add(a, b)], num_products=1)


@_rule("mul")
def _multiply(eqn: JaxprEqn, exponents: Exponents) -> Plan:
    """Adds the exponents. A factor without one is a constant or a parameter, of moderate size."""
    a, b = exponents
    is_product = bool(a) and bool(b)
    return Plan([add(a, b)], num_products=int(is_product))


@_rule("div")
def _divide(eqn: JaxprEqn, exponents: Exponents) -> Plan:
    """Subtracts the exponent of the divisor."""
    a, b = exponents
    has_divisor = bool(b)
    return Plan([add(a, b, -1)], num_products=int(has_divisor))


@_rule("integer_pow square")
def _power(eqn: JaxprEqn, exponents: Exponents) -> Plan:
    """Multiplies the exponent by the power."""
    power = eqn.params.get("y", 2)
    exponent = add(PLAIN, exponents[0], power)
    return Plan([exponent], num_products=1)


@_rule(" ".join(CALLS))
def _call(eqn: JaxprEqn, exponents: Exponents) -> Plan | None:
    """Plans a call as one step if its exponents are known beforehand, as those of a ReLU are."""
    program = called(eqn)
    if program is None:
        return _plain(eqn, exponents)
    return _look_ahead(program, exponents)


@_rule("cond")
def _cond(eqn: JaxprEqn, exponents: Exponents) -> Plan | None:
    """Plans a choice as one step if all branches return the same exponents."""
    cond = Cond.of(eqn, list(exponents))
    plans = []
    for branch in cond.branches:
        found = _look_ahead(branch, cond.operands)
        if found is None:
            return None
        plans.append(found)
    distinct = {tuple(found.exponents) for found in plans}
    if len(distinct) > 1:
        return None
    # Any branch may be chosen. The outputs are rescaled if one of them holds a product.
    return max(plans, key=lambda found: found.num_products)


@_rule("scan")
def _scan(eqn: JaxprEqn, exponents: Exponents) -> None:
    """Returns None: every scan is entered. Its products may need powers that no operand has."""


# These rules may give an exponent to outputs though no operand has one.
_MAKE_EXPONENTS = (_product, _call, _cond, _scan)


def _meeting(eqn: JaxprEqn, exponents: Exponents) -> tuple[int, ...]:
    """Returns which operands must have one exponent: all floats that are not neutral."""
    meeting = []
    for i, variable in enumerate(eqn.invars):
        if is_float(variable) and exponents[i] is not ANY:
            meeting.append(i)
    return tuple(meeting)


# ------------------------------------------------------------------------------------ Looking ahead


class _Foreseen(NamedTuple):
    """Describes a value before it is computed: its exponent, and the products in a row behind it.

    exponent: of the value.
    num_products: the most products that were computed one after another to get it.
    """

    exponent: Exponent | None
    num_products: int = 0


class _MustEnter(Exception):
    """Ends the walk through a program that has no plan as a whole."""


def _look_ahead(program: Program, exponents: Exponents) -> Plan | None:
    """Returns the plan of a whole program, or None if it must be entered."""
    inputs = [_Foreseen(exponent) for exponent in exponents]
    try:
        outputs = walk(_LOOK_AHEAD, None, program, inputs)
    except _MustEnter:
        return None
    found = [output.exponent for output in outputs]
    counts = [output.num_products for output in outputs]
    return Plan(found, num_products=max(counts, default=0))


def _foresee(_: None, eqn: JaxprEqn, operands: list[_Foreseen]) -> list[_Foreseen]:
    """Follows the plan of an equation, or raises `_MustEnter`."""
    exponents = [operand.exponent for operand in operands]
    counts = [operand.num_products for operand in operands]
    step = plan(eqn, exponents)
    # An alignment needs atoms that are made inside of the program. A plain step must be named.
    if step is None or step.align or step.plain:
        raise _MustEnter
    num_products = max(counts, default=0) + step.num_products
    # Two products in a row could overflow before the call returns.
    if num_products > 1:
        raise _MustEnter
    return [_Foreseen(exponent, num_products) for exponent in step.exponents]


_LOOK_AHEAD = Table(
    constant=lambda array: _Foreseen(PLAIN),
    literal=lambda literal: _Foreseen(of_literal(literal)),
    default=_foresee,
    rules=dict.fromkeys(CALLS, _foresee),
)
