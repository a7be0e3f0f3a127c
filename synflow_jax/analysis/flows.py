"""Takes the flow of every operand in the program of a model.

The flow of a value v is <dR/dv, v>. To take it, v is multiplied by a 1 that belongs to this operand
alone: the derivative of R with respect to that 1 is the flow. `Program` interprets the jaxpr of a
model twice. The first pass records which operands carry flow, as a list of `Edge`s, and the steps
that they enter. `Program.run` then computes the model with one 1 per edge.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn

from synflow_jax import trees
from synflow_jax.jaxprs.interpreter import Scan, Table, bind, fixed_point, walk
from synflow_jax.scores import ApplyFn
from synflow_jax.trees import Params

BEGIN = -1  # the step that makes the inputs
END = 2**31  # the step that takes the outputs
NO_SCAN = -1

# Steps whose result is a sum, or a choice, of entries of their operands. An operand of theirs that
# does not depend on the inputs is a source of flow.
_ADDITIVE = (
    "add", "sub", "add_any", "max", "min", "clamp", "concatenate", "select_n", "pad",
    "dynamic_update_slice",
)  # fmt: skip
# Functions with a derivative of their own count as one step: their program is not differentiated.
_CUSTOM = ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")


class Edge(NamedTuple):
    """Describes an operand whose flow is taken.

    Attributes:
      step: the number of the step that it enters; `END` for an output.
      producer: the number of the step that made it; `BEGIN` for an input. In the body of a scan
        both constants stand for the ends of one iteration.
      is_data: whether it depends on the inputs. If not, it is a source of flow.
      is_parameter: whether it is a source that depends on parameters.
      lengths: of the scans around it. It has one flow per iteration.
    """

    step: int
    producer: int
    is_data: bool
    is_parameter: bool
    lengths: tuple[int, ...] = ()

    @property
    def is_output(self) -> bool:
        """Returns whether it is an output of the whole program."""
        return self.step == END and not self.lengths


class Step(NamedTuple):
    """Describes a step of the program.

    Attributes:
      name: of the primitive, or of a function with a derivative of its own.
      multiplies: the name of the parameter that the data are multiplied by; "" for none.
      scan: the number of the outermost scan around it, or `NO_SCAN`.
      is_scan: whether it is a scan. The steps of its body follow it.
    """

    name: str
    multiplies: str
    scan: int
    is_scan: bool = False


class Program:
    """Holds the program of a model, its steps, and the edges whose flow is taken."""

    def __init__(self, apply_fn: ApplyFn, params: Params, inputs: jax.Array) -> None:
        make = jax.make_jaxpr(apply_fn, return_shape=True)
        self._closed, shapes = make(params, inputs)
        self._output_structure = jax.tree.structure(shapes)
        self._names = trees.names(params)
        steps: list[Step] = []
        record = lambda one: self._outputs(_Pass(one, steps), params, inputs)
        self.edges = _recorded(record)
        self.steps = tuple(steps)

    def run(self, params: Params, inputs: jax.Array, ones: Sequence[jax.Array]) -> Any:
        """Computes the outputs, with each edge multiplied by its own 1.

        Args:
          params, inputs: as the model takes them.
          ones: an array of ones per edge, of the shape `edge.lengths`.
        """
        state = _Pass(_in_turn(ones), [])
        outputs = self._outputs(state, params, inputs)
        return jax.tree.unflatten(self._output_structure, outputs)

    def _outputs(self, state: _Pass, params: Params, inputs: jax.Array) -> list[Any]:
        """Interprets the program. Returns the leaves of the outputs."""
        leaves = zip(jax.tree.leaves(params), self._names, strict=True)
        values = [_Value(leaf, None, (name,)) for leaf, name in leaves]
        values.append(_Value(inputs, BEGIN))
        outputs = walk(_TABLE, state, self._closed, values)
        return state.end(outputs)


# ----------------------------------------------------------------------------------------- Passes


class _Value(NamedTuple):
    """Holds a value while the program is interpreted.

    producer: the step that made it; None if it does not depend on the inputs.
    leaves: the parameters that it depends on, if it does not depend on the inputs.
    """

    array: Any
    producer: int | None
    leaves: tuple[str, ...] = ()

    @property
    def is_float(self) -> bool:
        return _is_float(self.array)

    @property
    def is_data(self) -> bool:
        """Returns whether it carries flow from the inputs."""
        return self.producer is not None and self.is_float


_Values = list[_Value]
_One = Callable[[Edge], Any]  # returns the 1 that the edge's value is multiplied by


class _Pass(NamedTuple):
    """Holds what a pass through the program needs.

    one: gives the ones, edge by edge.
    steps: the steps so far. The bodies of scans add to the same list.
    scan: the number of the outermost scan around the present step, or `NO_SCAN`.
    """

    one: _One
    steps: list[Step]
    scan: int = NO_SCAN

    def take(self, step: int, value: _Value) -> Any:
        """Multiplies an operand by its 1, so that its flow is taken. Returns the array."""
        is_data = value.producer is not None
        if not is_data and _is_neutral(value.array):
            return value.array
        producer = BEGIN if value.producer is None else value.producer
        edge = Edge(step, producer, is_data, is_parameter=bool(value.leaves))
        array = jnp.asarray(value.array)
        one = self.one(edge).astype(array.dtype)
        return _tapped(array, one)

    def end(self, outputs: Sequence[_Value]) -> list[Any]:
        """Takes the flow of outputs. Returns their arrays."""
        return [self.take(END, x) if x.is_float else x.array for x in outputs]


def _recorded(run: Callable[[_One], Any]) -> list[Edge]:
    """Returns the edges of a program, in the order in which it asks for their ones.

    run: interprets the program with these ones. Nothing is computed.
    """
    edges: list[Edge] = []

    def one(edge: Edge) -> jax.Array:
        edges.append(edge)
        return jnp.ones(edge.lengths)

    jax.eval_shape(lambda: run(one))
    return edges


def _in_turn(ones: Sequence[jax.Array]) -> _One:
    """Returns one array after another: edges ask for their ones in one order in every pass."""
    left = iter(ones)
    return lambda edge: next(left)


@jax.custom_vjp
def _tapped(array: jax.Array, one: jax.Array) -> jax.Array:
    """Multiplies the array by `one`.

    An entry without derivative has no flow, even if it is infinite as in paddings and masks.
    """
    return array * one


def _tapped_forward(array: jax.Array, one: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Computes the product, and keeps the array for the derivative."""
    return array * one, array


def _tapped_backward(array: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Passes the gradient on. The derivative with respect to the 1 is the flow."""
    flows = jnp.where(gradient == 0, 0, gradient * array)
    return gradient, jnp.sum(flows)


_tapped.defvjp(_tapped_forward, _tapped_backward)


def _is_float(array: Any) -> bool:
    return bool(jnp.issubdtype(jnp.result_type(array), jnp.floating))


def _is_neutral(array: Any) -> bool:
    """Returns whether this is the number 0 or infinity, which adds no flow.

    Left as it is, it also needs no alignment in scaled evaluation.
    """
    if isinstance(array, jax.core.Tracer) or np.ndim(array) > 0:
        return False
    return bool(array == 0 or np.isinf(array))


def _leaves(operands: Sequence[_Value]) -> tuple[str, ...]:
    """Returns the parameters that operands depend on, each once."""
    names: dict[str, None] = {}
    for x in operands:
        names.update(dict.fromkeys(x.leaves))
    return tuple(names)


# ------------------------------------------------------------------------------------------ Rules


def _step(state: _Pass, eqn: JaxprEqn, operands: _Values) -> _Values:
    """Computes an equation as one step, and takes the flow of its operands if there is any."""
    leaves = _leaves(operands)
    from_data = any(x.is_data for x in operands)
    from_inputs = any(x.producer is not None for x in operands)
    # Integer inputs have no flow of their own: what they look up in a parameter has.
    if from_data or (from_inputs and leaves):
        return _flow_step(state, eqn, operands, looks_up=not from_data)
    # What is computed from integer inputs alone, such as a one-hot vector, is still an input.
    producer = BEGIN if from_inputs else None
    arrays = bind(eqn, [x.array for x in operands])
    return [_Value(array, producer, leaves) for array in arrays]


def _flow_step(
    state: _Pass,
    eqn: JaxprEqn,
    operands: _Values,
    looks_up: bool,
) -> _Values:
    """Computes an equation, and takes the flow of its operands.

    looks_up: whether the data are integers that look up entries of a parameter.
    """
    number = len(state.steps)
    is_sum = eqn.primitive.name in _ADDITIVE
    # Every operand of a sum brings flow. In a product the flow of the data is that of the result.
    all_bring_flow = is_sum or looks_up
    arrays = []
    for x in operands:
        has_flow = x.is_float and (all_bring_flow or x.producer is not None)
        array = state.take(number, x) if has_flow else x.array
        arrays.append(array)

    # The cut before a product has the name of its parameter. What is added cuts nothing.
    constants = [x for x in operands if x.producer is None]
    factors = _leaves(constants) if looks_up or not is_sum else ()
    multiplies = factors[0] if factors else ""
    state.steps.append(Step(_name(eqn), multiplies, state.scan))

    results = []
    for array in bind(eqn, arrays):
        # What is computed from data but is no float (an index, a comparison) has no flow.
        constant = _Value(array, None, _leaves(operands))
        result = _Value(array, number) if _is_float(array) else constant
        results.append(result)
    return results


def _name(eqn: JaxprEqn) -> str:
    """Returns the name of the primitive, or of a function that has a derivative of its own."""
    if eqn.primitive.name not in _CUSTOM:
        return str(eqn.primitive.name)
    jaxpr = getattr(eqn.params.get("call_jaxpr"), "jaxpr", None)
    info = getattr(jaxpr, "debug_info", None)
    return str(getattr(info, "func_name", eqn.primitive.name))


_TABLE = Table(
    constant=lambda array: _Value(array, None),
    default=_step,
    rules=dict.fromkeys(_CUSTOM, _step),
)


@_TABLE.rule("scan")
def _scan(state: _Pass, eqn: JaxprEqn, operands: _Values) -> _Values | None:
    """Computes a scan whose edges have a 1, and so a flow, for every iteration."""
    if all(x.producer is None for x in operands):
        return None
    loop = _Loop(state, eqn, operands)
    # What enters the scan has its flow taken once, before the first iteration.
    arrays = [state.take(loop.number, x) if x.is_data else x.array for x in operands]
    edges = loop.record(arrays)
    arrays = loop.take_first_state(arrays)
    ones = []
    for edge in edges:
        lengths = (loop.scan.length, *edge.lengths)
        outer = edge._replace(lengths=lengths)
        ones.append(state.one(outer))
    outputs = loop.compute(arrays, ones)
    return loop.results(outputs)


class _Loop:
    """Interprets a scan. Its body is a program with inputs and outputs of its own.

    Attributes:
      number: of the scan among the steps.
      carry: where the carried values stand among the inputs.
      is_data: for each input, whether it depends on the inputs of the model.
      output_is_data: for each output, the same. Known after the first call of `iteration`.
    """

    def __init__(self, state: _Pass, eqn: JaxprEqn, operands: _Values) -> None:
        self.state = state
        self.operands = operands
        self.scan = Scan.of(eqn, operands)
        self.number = len(state.steps)
        self.step = Step("scan", "", state.scan, is_scan=True)
        num_consts, num_carry = len(self.scan.consts), len(self.scan.carry)
        self.carry = slice(num_consts, num_consts + num_carry)
        self.is_data = [x.producer is not None for x in operands]
        self.output_is_data: list[bool] = []

    def iteration(self, one: _One, inputs: Sequence[Any]) -> list[Any]:
        """Computes the body once. Returns the arrays of its outputs."""
        values = []
        for array, is_data, x in zip(inputs, self.is_data, self.operands, strict=True):
            value = _Value(array, BEGIN) if is_data else _Value(array, None, x.leaves)
            values.append(value)
        # Every pass through the body records its steps anew.
        self.state.steps[self.number :] = [self.step]
        outermost = self.number if self.state.scan == NO_SCAN else self.state.scan
        inner = _Pass(one, self.state.steps, outermost)
        outputs = walk(_TABLE, inner, self.scan.body, values)
        self.output_is_data = [x.producer is not None for x in outputs]
        return inner.end(outputs)

    def record(self, arrays: list[Any]) -> list[Edge]:
        """Finds which carried values depend on the inputs, and returns the edges of the body.

        A carried value may depend on the inputs only from the second iteration on.
        """
        before = arrays[: self.carry.stop]
        xs = arrays[self.carry.stop :]
        num_carry = len(self.scan.carry)

        def first(one: _One) -> list[Any]:
            slices = [x[0] for x in xs]
            return self.iteration(one, [*before, *slices])

        def body(carry_is_data: list[Any]) -> list[Any]:
            self.is_data[self.carry] = carry_is_data
            edges = _recorded(first)
            return [*self.output_is_data[:num_carry], edges]

        start = self.is_data[self.carry]
        _, (edges,) = fixed_point(body, start, join=operator.or_, same=operator.eq)
        return edges

    def take_first_state(self, arrays: list[Any]) -> list[Any]:
        """Takes the flow of carried values that do not depend on the inputs before the scan.

        Such a value, for example a first state that is learned, is a source.
        """
        taken = list(arrays)
        for i in range(self.carry.start, self.carry.stop):
            x = self.operands[i]
            if self.is_data[i] and x.producer is None and x.is_float:
                taken[i] = self.state.take(self.number, x)
        return taken

    def compute(self, arrays: list[Any], ones: list[jax.Array]) -> list[Any]:
        """Computes the scan. Returns the arrays of its outputs."""
        consts = arrays[: self.carry.start]
        xs = arrays[self.carry.stop :]
        start = [jnp.asarray(array) for array in arrays[self.carry]]

        def body(carry: list[Any], slices: Any) -> tuple[list[Any], list[Any]]:
            x_slices, one_slices = slices
            inputs = [*consts, *carry, *x_slices]
            outputs = self.iteration(_in_turn(one_slices), inputs)
            return outputs[: len(carry)], outputs[len(carry) :]

        carry, ys = self.scan.run(body, start, (xs, ones))
        return [*carry, *ys]

    def results(self, arrays: list[Any]) -> _Values:
        """Returns the scan's outputs as values, and completes its step."""
        for step in self.state.steps[self.number :]:
            if step.multiplies:
                # The cut before a scan has the name of the first parameter in its body.
                self.state.steps[self.number] = self.step._replace(multiplies=step.multiplies)
                break
        leaves = _leaves(self.operands)
        results = []
        for array, is_data in zip(arrays, self.output_is_data, strict=True):
            producer = self.number if _is_float(array) else BEGIN
            result = _Value(array, producer) if is_data else _Value(array, None, leaves)
            results.append(result)
        return results
