"""Holds the values of an analysis of dependence, its table, and what its rules have in common."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn

from synflow_jax.analysis.dependence.semirings import Degree, Semiring
from synflow_jax.jaxprs.interpreter import Table, bind

Degrees = list[Degree]


class Part(NamedTuple):
    """Names a parameter, or the rows of its first axis from start to stop; None for all."""

    name: str
    start: int = 0
    stop: int | None = None

    def overlaps(self, other: Part) -> bool:
        """Returns whether two parts have weights in common."""
        if self.name != other.name or self.stop is None or other.stop is None:
            return self.name == other.name
        return self.start < other.stop and other.start < self.stop


class Origin(NamedTuple):
    """Says where a value comes from, as far as that is known before the program runs.

    Attributes:
      leaves: the prunable parameters that it is computed from, if it does not depend on the input.
      is_parameter: whether it is a parameter itself.
      depth: the number of loops around the place where it is computed.
    """

    leaves: frozenset[Part] = frozenset()
    depth: int = 0
    is_parameter: bool = False


class Value(NamedTuple):
    """Holds a value of the program and its dependences.

    Attributes:
      array: the value. It is exact where nothing varies, and means nothing elsewhere.
      varies: how each element depends on the input. None if no element can.
      moves: how each element depends on the weights that are followed. None if no element can.
      origin: see `Origin`.
    """

    array: Any
    varies: Degree | None = None
    moves: Degree | None = None
    origin: Origin = Origin()

    @property
    def is_constant(self) -> bool:
        """Returns whether the value depends neither on the input nor on weights."""
        return self.varies is None and self.moves is None


Values = list[Value]
CHANNELS = ("varies", "moves")


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Notes:
    """Says how a program uses the weights that are followed.

    Attributes:
      reused: names of the parameters that a path may pass more than once.
      products: names of the steps that multiply two values which both depend on the input.
    """

    reused: tuple[str, ...] = ()
    products: tuple[str, ...] = ()


class NotLean(Exception):
    """Ends a lean analysis of a program that needs the full one."""


@dataclasses.dataclass
class Analysis:
    """Holds the state of an analysis.

    Attributes:
      semiring: how dependences combine.
      is_lean: whether to leave out how values that depend on the input depend on weights besides.
        Most networks do not need it, and it takes more than half of the time to compile. Where it
        is needed, `NotLean` is raised.
      depth: the number of loops around the present step.
      num_uses: how often each parameter meets a value that depends on the input.
      products: see `Notes`.
    """

    semiring: Semiring
    is_lean: bool = False
    depth: int = 0
    num_uses: dict[Part, int] = dataclasses.field(default_factory=dict)
    products: list[str] = dataclasses.field(default_factory=list)

    @contextmanager
    def in_loop(self) -> Iterator[None]:
        """Marks the steps of a loop's body, which are computed several times."""
        self.depth += 1
        yield
        self.depth -= 1

    def note_use(self, x: Value) -> None:
        """Records that a value made of parameters alone meets one that depends on the input."""
        # The same array is used in every iteration of the loops that it comes from outside of.
        times = 2 if x.origin.depth < self.depth else 1
        for leaf in x.origin.leaves:
            self.num_uses[leaf] = self.num_uses.get(leaf, 0) + times

    def notes(self) -> Notes:
        """Returns the notes of the whole program."""
        reused = [part.name for part, times in self.num_uses.items() if times > 1]
        for a, b in itertools.combinations(self.num_uses, 2):
            if a.overlaps(b):
                reused.append(a.name)
        return Notes(tuple(dict.fromkeys(reused)), tuple(dict.fromkeys(self.products)))


# ------------------------------------------------------------------------------- Helpers for rules


def nonzero(analysis: Analysis, x: Value) -> Degree:
    """Returns by what each element can differ from 0.

    Where nothing is needed it is `always`: the array differs from 0 as it is.
    """
    semiring = analysis.semiring
    # A NaN is 0 / 0, as of a kernel that is divided by its norm and has no weights left.
    is_set = (x.array != 0) & (x.array == x.array)
    degree = jnp.where(is_set, jnp.float32(semiring.always), jnp.float32(semiring.never))
    if analysis.is_lean and x.varies is not None:
        raise NotLean
    for channel in (x.varies, x.moves):
        if channel is not None:
            degree = semiring.join(degree, channel)
    return degree


def exact(analysis: Analysis, x: Value) -> Any:
    """Returns the array with zeros where it varies, so that nothing meaningless enters a sum."""
    if x.varies is None:
        return x.array
    is_reached = analysis.semiring.is_reached(x.varies)
    return jnp.where(is_reached, jnp.zeros_like(x.array), x.array)


def filled(analysis: Analysis, x: Value, channel: str) -> Degree:
    """Returns a channel as an array; `never` if the value has no such channel."""
    degree = getattr(x, channel)
    if degree is None:
        degree = jnp.full(jnp.shape(x.array), analysis.semiring.never, jnp.float32)
    return degree


def present(operands: Values, channel: str) -> Degrees:
    """Returns this channel of the operands that have it."""
    degrees = [getattr(x, channel) for x in operands]
    return [degree for degree in degrees if degree is not None]


def joined(analysis: Analysis, degrees: Degrees, shape: Sequence[int]) -> Degree | None:
    """Joins dependences of this shape, or of one element; None if there is none.

    Equal dependences are not joined: a function of one value keeps the dependence of that value, as
    the same object. See `need_the_same`.
    """
    distinct = list({id(degree): degree for degree in degrees}.values())
    wide = []
    for degree in distinct:
        has_shape = degree.shape == tuple(shape)
        wide.append(degree if has_shape else jnp.broadcast_to(degree, tuple(shape)))
    return functools.reduce(analysis.semiring.join, wide) if wide else None


def need_the_same(operands: Values) -> bool:
    """Returns whether all operands are elementwise functions of one value, or constants."""
    dependences = {(id(x.varies), id(x.moves)) for x in operands if not x.is_constant}
    return len(dependences) == 1


def flow(
    analysis: Analysis,
    operands: Values,
    arrays: Sequence[Any],
    follow: Callable[[Degrees], Degrees],
) -> Values:
    """Returns outputs whose dependences follow from those of the operands.

    Args:
      analysis: the state.
      operands: of the equation.
      arrays: its outputs.
      follow: turns one dependence per operand into one per output.
    """
    channels: list[Sequence[Degree | None]] = []
    for channel in CHANNELS:
        if present(operands, channel):
            degrees = [filled(analysis, x, channel) for x in operands]
            channels.append(follow(degrees))
        else:
            channels.append([None] * len(arrays))
    varies, moves = channels
    return [Value(*parts) for parts in zip(arrays, varies, moves, strict=True)]


def value_of(array: Any, channels: Sequence[Degree | None]) -> Value:
    """Returns a value with these channels, in the order of CHANNELS."""
    varies, moves = channels
    return Value(array, varies, moves)


def shape_of(variable: Any) -> tuple[int, ...]:
    """Returns the shape of a variable of a jaxpr."""
    return tuple(variable.aval.shape)


def total(semiring: Semiring, degree: Degree) -> Degree:
    """Joins all elements, []."""
    return semiring.reduce(degree, range(degree.ndim))


def over_all(analysis: Analysis, operands: Values, channels: Sequence[str]) -> Degree | None:
    """Joins these channels of all elements of all operands, []; None if there are none."""
    degrees = []
    for channel in channels:
        degrees += present(operands, channel)
    totals = [total(analysis.semiring, degree) for degree in degrees]
    return joined(analysis, totals, ())


def leaves_of(values: Values) -> frozenset[Part]:
    """Returns the prunable parameters that values without the input are computed from."""
    leaves: frozenset[Part] = frozenset()
    return leaves.union(*[x.origin.leaves for x in values])


def both_of(
    analysis: Analysis,
    step: str,
    a: Values,
    b: Values,
) -> Callable[[Degree, Degree], Degree]:
    """Returns how the dependences of these values combine where they are needed together.

    Args:
      analysis: records the step, if the two may need the same weights.
      step: the name of the primitive.
      a, b: values on either side.
    """
    # Two functions of one value, as in x * sigmoid(x), need the same weights.
    if need_the_same([*a, *b]):
        return analysis.semiring.shared
    pairs = itertools.product(leaves_of(a), leaves_of(b))
    common = [part for part, other in pairs if part.overlaps(other)]
    for part in common:
        analysis.num_uses[part] = 2
    both_vary = present(a, "varies") and present(b, "varies")
    if both_vary:
        analysis.products.append(step)
    return analysis.semiring.uncertain if both_vary or common else analysis.semiring.both


def choose(analysis: Analysis, step: str, index: Value, cases: Values) -> Value:
    """Chooses among cases of one shape, per element or as a whole, as `lax.select_n` does.

    step: the name of the primitive.
    """
    arrays = [case.array for case in cases]
    array = jax.lax.select_n(index.array, *arrays)

    def follow(degrees: Degrees) -> Degrees:
        return [jax.lax.select_n(index.array, *degrees)]

    [chosen] = flow(analysis, cases, [array], follow)
    if index.is_constant:
        return chosen
    both = both_of(analysis, step, [index], cases)
    return _with_choice(analysis, chosen, index, cases, both)


def _with_choice(
    analysis: Analysis,
    chosen: Value,
    index: Value,
    cases: Values,
    both: Callable[[Degree, Degree], Degree],
) -> Value:
    """Adds that the index may depend on something, so that another case may be chosen."""
    if analysis.is_lean:
        raise NotLean
    shape = jnp.shape(chosen.array)
    of_index = [*present([index], "varies"), *present([index], "moves")]
    turn = joined(analysis, of_index, shape)
    differ = _difference(analysis, cases)
    channels = []
    for channel in CHANNELS:
        degrees = present([chosen], channel)
        for degree in present([index], channel):
            # The choice matters as far as there is a difference between the cases.
            degrees.append(both(jnp.broadcast_to(degree, shape), differ))
        of_cases = joined(analysis, present(cases, channel), shape)
        if of_cases is not None and turn is not None:
            degrees.append(both(of_cases, turn))
        channels.append(joined(analysis, degrees, shape))
    return value_of(chosen.array, channels)


def _difference(analysis: Analysis, cases: Values) -> Degree:
    """Returns by what each element can differ between cases."""
    semiring = analysis.semiring
    first, *others = [case.array for case in cases]
    is_other = functools.reduce(operator.or_, [other != first for other in others])
    degree = jnp.where(is_other, jnp.float32(semiring.always), jnp.float32(semiring.never))
    degrees = [*present(cases, "varies"), *present(cases, "moves")]
    return functools.reduce(semiring.join, degrees, degree)


# ------------------------------------------------------------------------------------------- Table


def _default(analysis: Analysis, eqn: JaxprEqn, operands: Values) -> Values:
    """Computes a step that depends on nothing. Refuses any other, since no rule knows it."""
    if all(x.is_constant for x in operands):
        return constants(eqn, operands)
    raise ValueError(
        f"apply_fn has a step {eqn.primitive.name!r}, and it is not known how the result of this "
        "step depends on its operands. So it cannot be said which weights lead from the input to "
        "the output. Pass an apply_fn that computes the same with other functions of JAX."
    )


def constants(eqn: JaxprEqn, operands: Values) -> Values:
    """Computes an equation whose operands depend on nothing."""
    arrays = bind(eqn, [x.array for x in operands])
    return [Value(array) for array in arrays]


TABLE: Table[Value] = Table(constant=Value, default=_default)

RuleFn = Callable[[Analysis, JaxprEqn, Values], Values]


def rule(primitives: str) -> Callable[[RuleFn], RuleFn]:
    """Registers the decorated function as the rule of these primitives.

    It is called only if an operand depends on something.
    """

    def register(function: RuleFn) -> RuleFn:
        @functools.wraps(function)
        def followed(analysis: Analysis, eqn: JaxprEqn, operands: Values) -> Values:
            if all(x.is_constant for x in operands):
                return constants(eqn, operands)
            made_of_weights = [x for x in operands if x.origin.leaves]
            if any(x.varies is not None for x in operands):
                for x in made_of_weights:
                    analysis.note_use(x)
            outputs = function(analysis, eqn, operands)
            return [_finished(analysis, x, made_of_weights) for x in outputs]

        TABLE.rule(primitives)(followed)
        return function

    return register


def _finished(analysis: Analysis, x: Value, made_of_weights: Values) -> Value:
    """Notes the parameters that a value is computed from, unless it depends on the input."""
    if x.varies is not None:
        return x._replace(moves=None) if analysis.is_lean else x
    if not made_of_weights or x.origin.leaves:
        return x
    depth = min(operand.origin.depth for operand in made_of_weights)
    return x._replace(origin=Origin(leaves_of(made_of_weights), depth))
