"""Computes the flow of every operand in the program of a model.

The flow of a value v is <dR/dv, v>. To get it, v is multiplied by a 1 that belongs to this operand
alone: the flow is the derivative of R with respect to that 1. `Program` interprets the jaxpr of a
model twice. The first pass records the operands that carry flow, as a list of `Edge`s, and the
steps that they enter. The second pass, `Program.run`, computes the model with one 1 per edge.

In the names below, *data* are values that depend on the inputs of the model. Values that depend on
parameters alone are on the *side*: a kernel that is normalized before it is used, for example.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, JaxprEqn

from synflow_jax import trees
from synflow_jax.jaxprs.interpreter import Cond, Scan, Table, bind, fixed_point, walk
from synflow_jax.scores import ApplyFn
from synflow_jax.trees import Params

BEGIN = -1  # the step that makes the inputs
END = 2**31  # the step that takes the outputs, after every other step
NO_SCAN = -1  # in place of the index of a scan or cond

# Steps whose result is a sum, or a choice, of entries of their operands. An operand that does not
# depend on the inputs is a source of flow there.
_ADDITIVE = (
    "add", "sub", "add_any", "max", "min", "clamp", "concatenate", "select_n", "pad",
    "dynamic_update_slice",
)  # fmt: skip
# Products, whose flow is that of each factor.
_BILINEAR = ("mul", "dot_general", "conv_general_dilated", "ragged_dot_general")
# Linear maps of one operand, which pass its flow on. On the side they are no steps of their own.
_LINEAR = (
    "broadcast_in_dim", "reshape", "transpose", "squeeze", "expand_dims", "rev", "neg", "abs",
    "copy", "reduce_sum", "cumsum", "convert_element_type", "reduce_precision",
)  # fmt: skip
# Functions with a custom derivative count as one step, because JAX does not differentiate their
# programs.
_CUSTOM = ("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr")


class Edge(NamedTuple):
    """Describes an operand whose flow is computed.

    Attributes:
      step: the index of the step that the operand enters; `END` for an output.
      producer: the index of the step that made it; `BEGIN` for an input. In the body of a scan,
        `BEGIN` and `END` are the begin and the end of one iteration.
      is_data: whether it depends on the inputs. If not, it is a source of flow.
      is_parameter: whether it depends on parameters alone.
      is_factor: whether the flow of the step's result has to be equal to its flow alone. Other
        operands of a step bring that flow together.
      is_side: whether the step is on the side.
      lengths: the lengths of the scans around it; 1 for a cond. It has one flow per iteration.
    """

    step: int
    producer: int
    is_data: bool
    is_parameter: bool
    is_factor: bool = False
    is_side: bool = False
    lengths: tuple[int, ...] = ()

    @property
    def is_output(self) -> bool:
        """Returns whether it is an output of the whole program."""
        return self.step == END and not self.lengths


class Step(NamedTuple):
    """Describes a step of the program.

    Attributes:
      name: the name of the primitive, or of a function with a custom derivative.
      multiplies: the name of the parameter that the data are multiplied by; "" for none.
      scan: the index of the outermost scan or cond around it, or `NO_SCAN`.
      is_scan: whether it is a scan or a cond. The steps of its body or branches follow it.
      side: the names of the parameters that it depends on, if it is on the side.
    """

    name: str
    multiplies: str
    scan: int
    is_scan: bool = False
    side: tuple[str, ...] = ()


class Program:
    """Holds the program of a model, its steps, and the edges whose flow is taken."""

    def __init__(self, apply_fn: ApplyFn, params: Params, inputs: jax.Array) -> None:
        make = jax.make_jaxpr(apply_fn, return_shape=True)
        self._closed, shapes = make(params, inputs)
        self._output_structure = jax.tree.structure(shapes)
        self._names = trees.names(params)
        steps: list[Step] = []

        def record(one: _One) -> list[Any]:
            first_pass = _Pass(one, steps)
            return self._outputs(first_pass, params, inputs)

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
        values = []
        for leaf, name in zip(jax.tree.leaves(params), self._names, strict=True):
            parameter = _Value(leaf, None, (name,))
            values.append(parameter)
        values.append(_Value(inputs, BEGIN))
        outputs = walk(_TABLE, state, self._closed, values)
        return state.end(outputs)


# ----------------------------------------------------------------------------------------- Passes


class _Value(NamedTuple):
    """Holds an array while the program is interpreted, and what it depends on.

    producer: the step that made it; None if it does not depend on the inputs.
    leaves: the names of the parameters that it depends on, if it does not depend on the inputs.
    side: the step on the side that made it; `BEGIN` for a parameter.
    """

    array: Any
    producer: int | None
    leaves: tuple[str, ...] = ()
    side: int = BEGIN

    @property
    def is_float(self) -> bool:
        """Returns whether the array holds floats or complex numbers. No other array has a flow."""
        return _is_float(self.array)

    @property
    def is_data(self) -> bool:
        """Returns whether it carries flow from the inputs."""
        return self.producer is not None and self.is_float


_Values = list[_Value]
_One = Callable[[Edge], Any]  # returns the 1 that the edge's value is multiplied by


class _Pass(NamedTuple):
    """Holds the state of a pass through the program.

    one: returns the 1 of each edge.
    steps: the steps so far. The bodies of scans add to the same list.
    scan: the index of the outermost scan around the current step, or `NO_SCAN`.
    """

    one: _One
    steps: list[Step]
    scan: int = NO_SCAN

    def take(
        self,
        step: int,
        value: _Value,
        *,
        is_factor: bool = False,
        is_side: bool = False,
    ) -> Any:
        """Multiplies an operand by its 1, whose derivative is the flow. Returns the array."""
        is_data = value.producer is not None
        if not is_data and _is_neutral(value.array):
            return value.array
        producer = value.side if value.producer is None else value.producer
        is_parameter = bool(value.leaves)
        edge = Edge(step, producer, is_data, is_parameter, is_factor, is_side)
        array = jnp.asarray(value.array)
        one = self.one(edge).astype(array.dtype)
        return _tapped(array, one)

    def end(self, outputs: Sequence[_Value]) -> list[Any]:
        """Takes the flow of outputs. Returns their arrays."""
        arrays = []
        for x in outputs:
            array = self.take(END, x) if x.is_float else x.array
            arrays.append(array)
        return arrays


def _recorded(run: Callable[[_One], Any]) -> list[Edge]:
    """Returns the edges of a program, in the order in which it asks for their ones.

    run: interprets the program with these ones. Nothing is computed.
    """
    edges: list[Edge] = []

    def one(edge: Edge) -> jax.Array:
        edges.append(edge)
        return jnp.ones(edge.lengths)

    # A new lambda every time: JAX caches traces by function, and a cached trace records no edge.
    jax.eval_shape(lambda: run(one))
    return edges


def _in_turn(ones: Sequence[jax.Array]) -> _One:
    """Returns one array after another: every pass asks for the ones in the same order."""
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
    # 0 * inf would be NaN, and make the flow of the whole operand NaN.
    flows = jnp.where(gradient == 0, 0, gradient * array)
    # R is real, so of a complex value only the real part of the sum counts.
    return gradient, jnp.sum(flows).real.astype(array.dtype)


_tapped.defvjp(_tapped_forward, _tapped_backward)


def _is_float(array: Any) -> bool:
    dtype = jnp.result_type(array)
    return bool(jnp.issubdtype(dtype, jnp.inexact))


def _is_neutral(array: Any) -> bool:
    """Returns whether this is the number 0 or infinity, which adds no flow.

    As a number it also needs no alignment in scaled evaluation, which an array would.
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
    # Integer inputs have no flow. The entries of a parameter that they look up have one.
    if from_data or (from_inputs and leaves):
        return _flow_step(state, eqn, operands, looks_up=not from_data)
    if leaves and not from_inputs:
        return _side_step(state, eqn, operands)
    # A value that is computed from integer inputs alone, e.g. one-hot vectors, is still an input.
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
        array = x.array
        is_data = x.producer is not None
        if x.is_float and (all_bring_flow or is_data):
            array = state.take(number, x)
        elif _is_factor(eqn, x):
            array = state.take(number, x, is_factor=True)
        arrays.append(array)

    # The cut before a product has the name of its parameter. A parameter that is added has no cut.
    multiplies = ""
    if looks_up or not is_sum:
        constants = [x for x in operands if x.producer is None]
        multiplies = next(iter(_leaves(constants)), "")
    step = Step(_name(eqn), multiplies, state.scan)
    state.steps.append(step)

    leaves = _leaves(operands)
    results = []
    for array in bind(eqn, arrays):
        # An index or a comparison has no flow, although it is computed from data.
        result = _Value(array, None, leaves)
        if _is_float(array):
            result = _Value(array, number)
        results.append(result)
    return results


def _is_factor(eqn: JaxprEqn, x: _Value) -> bool:
    """Returns whether a parameter enters a product such that its flow has to be taken."""
    if not (x.is_float and x.leaves):
        return False
    # In a bilinear product the flow of a parameter is that of the result without being taken.
    is_plain = x.side == BEGIN and eqn.primitive.name in _BILINEAR
    return not is_plain


def _side_step(state: _Pass, eqn: JaxprEqn, operands: _Values) -> _Values:
    """Computes an equation on the side, and takes the flow of its operands."""
    leaves = _leaves(operands)
    if _passes_on(eqn, operands):
        (parameter,) = _parameters(operands)
        arrays = bind(eqn, [x.array for x in operands])
        return [_Value(array, None, leaves, parameter.side) for array in arrays]

    number = len(state.steps)
    is_sum = eqn.primitive.name in _ADDITIVE
    is_product = not is_sum and _are_different(operands)
    arrays = []
    for x in operands:
        array = x.array
        # A constant brings flow to a sum alone.
        if x.is_float and (is_sum or x.leaves):
            array = state.take(number, x, is_factor=is_product, is_side=True)
        arrays.append(array)
    step = Step(_name(eqn), "", state.scan, side=leaves)
    state.steps.append(step)
    return [_Value(array, None, leaves, number) for array in bind(eqn, arrays)]


def _parameters(operands: _Values) -> _Values:
    """Returns the operands that depend on parameters."""
    return [x for x in operands if x.leaves]


def _passes_on(eqn: JaxprEqn, operands: _Values) -> bool:
    """Returns whether an equation is a linear map of one parameter, which passes on its flow."""
    name = eqn.primitive.name
    if len(_parameters(operands)) > 1:
        return False
    # Products with constants are linear, and quotients by them.
    is_quotient = name == "div" and bool(operands[0].leaves)
    return name in _LINEAR or name in _BILINEAR or is_quotient


def _are_different(operands: _Values) -> bool:
    """Returns whether several operands depend on parameters, and no two of them on the same.

    The factors of their product each carry its flow, as two layers do. Those of a product of a
    parameter with itself carry twice as much together.
    """
    parameters = _parameters(operands)
    num_names = sum(len(set(x.leaves)) for x in parameters)
    return len(parameters) > 1 and num_names == len(_leaves(parameters))


def _name(eqn: JaxprEqn) -> str:
    """Returns the name of the primitive, or of a function with a custom derivative."""
    primitive = eqn.primitive.name
    if primitive not in _CUSTOM:
        return str(primitive)
    # Not all versions of JAX store the name of the function.
    program = eqn.params.get("call_jaxpr")
    jaxpr = getattr(program, "jaxpr", None)
    info = getattr(jaxpr, "debug_info", None)
    return str(getattr(info, "func_name", primitive))


_TABLE = Table(
    constant=lambda array: _Value(array, None),
    default=_step,
    rules=dict.fromkeys(_CUSTOM, _step),
)


# ------------------------------------------------------------------------------------------ Scans


@_TABLE.rule("scan")
def _scan(state: _Pass, eqn: JaxprEqn, operands: _Values) -> _Values | None:
    """Computes a scan. Its edges have a 1, and so a flow, for every iteration."""
    if all(x.producer is None for x in operands):
        return None
    loop = _Loop.of(state, eqn, operands)
    arrays = _take_before(state, loop.number, operands)
    body = _record_body(loop, arrays)
    arrays = _take_first_state(loop, body, arrays)
    ones = []
    for edge in body.edges:
        lengths = (loop.scan.length, *edge.lengths)
        outer = edge._replace(lengths=lengths)
        ones.append(state.one(outer))
    outputs = _compute_scan(loop, body, arrays, ones)
    return _scan_results(loop, body, outputs)


def _take_before(state: _Pass, number: int, operands: _Values) -> list[Any]:
    """Takes the flow of operands once, before the first iteration or before the branches."""
    arrays = []
    for x in operands:
        array = x.array
        if x.is_data:
            array = state.take(number, x)
        # Inside, what was made on the side counts as a parameter.
        elif x.is_float and x.side != BEGIN:
            array = state.take(number, x, is_side=True)
        arrays.append(array)
    return arrays


class _Loop(NamedTuple):
    """Holds a scan. Its body is a program with its own inputs and outputs.

    state: the pass that has come to the scan.
    scan: the parts of the scan.
    operands: the inputs of the scan.
    carry: the indices of the carried values among the operands.
    number: the index of the scan among the steps.
    """

    state: _Pass
    scan: Scan[_Value]
    operands: _Values
    carry: slice
    number: int

    @classmethod
    def of(cls, state: _Pass, eqn: JaxprEqn, operands: _Values) -> _Loop:
        """Reads the scan of an equation, which becomes the next step."""
        scan = Scan.of(eqn, operands)
        start = len(scan.consts)
        stop = start + len(scan.carry)
        number = len(state.steps)
        return cls(state, scan, operands, slice(start, stop), number)

    @property
    def step(self) -> Step:
        """Returns the step of the scan. `_scan_results` adds the parameter that it multiplies."""
        return Step("scan", "", self.state.scan, is_scan=True)


class _Body(NamedTuple):
    """Describes the body of a scan.

    edges: the edges of one iteration.
    is_data: for each input of the body, whether it depends on the inputs of the model.
    output_is_data: the same for each output.
    """

    edges: list[Edge]
    is_data: list[bool]
    output_is_data: list[bool]


def _iterate(
    loop: _Loop,
    is_data: Sequence[bool],
    one: _One,
    inputs: Sequence[Any],
) -> tuple[list[Any], list[bool]]:
    """Computes the body once.

    Args:
      loop: the scan.
      is_data: for each input, whether it depends on the inputs of the model.
      one: returns the 1 of each edge.
      inputs: the arrays that enter the body.

    Returns:
      The arrays of the outputs, and whether each depends on the inputs of the model.
    """
    values = []
    for array, depends, x in zip(inputs, is_data, loop.operands, strict=True):
        value = _Value(array, BEGIN) if depends else _Value(array, None, x.leaves)
        values.append(value)
    # Every pass through the body records its steps anew, in place of those of the pass before.
    steps = loop.state.steps
    steps[loop.number :] = [loop.step]
    outermost = loop.number if loop.state.scan == NO_SCAN else loop.state.scan
    inner = _Pass(one, steps, outermost)
    outputs = walk(_TABLE, inner, loop.scan.body, values)
    output_is_data = [x.producer is not None for x in outputs]
    return inner.end(outputs), output_is_data


def _record_body(loop: _Loop, arrays: list[Any]) -> _Body:
    """Finds the edges of the body, and which carried values depend on the inputs.

    A carried value may depend on the inputs only from the second iteration on, so the body is
    followed until that no longer changes.
    """
    before = arrays[: loop.carry.stop]
    xs = arrays[loop.carry.stop :]
    num_carry = len(loop.scan.carry)
    at_start = [x.producer is not None for x in loop.operands]

    def body(carry_is_data: list[bool]) -> list[Any]:
        is_data = at_start.copy()
        is_data[loop.carry] = carry_is_data
        output_is_data: list[bool] = []

        def first(one: _One) -> list[Any]:
            slices = [x[0] for x in xs]
            outputs, depend = _iterate(loop, is_data, one, [*before, *slices])
            output_is_data.extend(depend)
            return outputs

        edges = _recorded(first)
        found = _Body(edges, is_data, output_is_data)
        return [*output_is_data[:num_carry], found]

    carry: list[Any] = at_start[loop.carry]
    _, (found,) = fixed_point(body, carry, join=operator.or_, same=operator.eq)
    return found


def _take_first_state(loop: _Loop, body: _Body, arrays: list[Any]) -> list[Any]:
    """Takes the flow of carried values that do not depend on the inputs before the scan.

    Such a value, for example a first state that is learned, is a source.
    """
    taken = list(arrays)
    for i in range(loop.carry.start, loop.carry.stop):
        x = loop.operands[i]
        is_source = x.producer is None and body.is_data[i]
        if is_source and x.is_float:
            taken[i] = loop.state.take(loop.number, x)
    return taken


def _compute_scan(
    loop: _Loop,
    body: _Body,
    arrays: list[Any],
    ones: list[jax.Array],
) -> list[Any]:
    """Computes the scan. Returns the arrays of its outputs."""
    consts = arrays[: loop.carry.start]
    xs = arrays[loop.carry.stop :]
    start = [jnp.asarray(array) for array in arrays[loop.carry]]
    num_carry = len(start)

    def iteration(carry: list[Any], slices: Any) -> tuple[list[Any], list[Any]]:
        x_slices, one_slices = slices
        inputs = [*consts, *carry, *x_slices]
        one = _in_turn(one_slices)
        outputs, _ = _iterate(loop, body.is_data, one, inputs)
        return outputs[:num_carry], outputs[num_carry:]

    carry, ys = loop.scan.run(iteration, start, (xs, ones))
    return [*carry, *ys]


@_TABLE.rule("cond")
def _cond(state: _Pass, eqn: JaxprEqn, operands: _Values) -> _Values | None:
    """Computes a cond. Its branches are programs with their own inputs and outputs."""
    cond = Cond.of(eqn, operands)
    if not any(x.is_data for x in cond.operands):
        return None
    number = len(state.steps)
    arrays = _take_before(state, number, cond.operands)
    state.steps.append(Step("cond", "", state.scan, is_scan=True))
    outermost = number if state.scan == NO_SCAN else state.scan
    branches: list[Callable[..., list[Any]]] = []
    ones: list[list[Any]] = []
    is_data = [False] * len(eqn.outvars)
    for program in cond.branches:
        branch = functools.partial(_compute_branch, cond.operands, program, outermost)
        edges, depend = _record_branch(state.steps, branch, arrays)
        is_data = list(map(operator.or_, is_data, depend))
        taken = []
        for edge in edges:
            outer = edge._replace(lengths=(1, *edge.lengths))
            taken.append(state.one(outer))
        ones.append(taken)
        branches.append(functools.partial(_with_ones, branch, len(branches)))

    arrays = [jnp.asarray(array) for array in arrays]
    outputs = jax.lax.switch(cond.index.array, branches, arrays, ones)
    _name_cut(state.steps, number)
    return _results(cond.operands, outputs, is_data, number)


# branch(steps, one, arrays): computes a branch, whose steps it adds to the list. Returns the arrays
# of the outputs, and whether each depends on the inputs of the model.
_Branch = Callable[[list[Step], _One, Sequence[Any]], tuple[list[Any], list[bool]]]


def _compute_branch(
    operands: _Values,
    program: ClosedJaxpr,
    outermost: int,
    steps: list[Step],
    one: _One,
    arrays: Sequence[Any],
) -> tuple[list[Any], list[bool]]:
    """Computes a branch of a cond with these operands; see `_Branch`."""
    values = []
    for array, x in zip(arrays, operands, strict=True):
        depends = x.producer is not None
        value = _Value(array, BEGIN) if depends else _Value(array, None, x.leaves)
        values.append(value)
    inner = _Pass(one, steps, outermost)
    outputs = walk(_TABLE, inner, program, values)
    is_data = [x.producer is not None for x in outputs]
    return inner.end(outputs), is_data


def _record_branch(
    steps: list[Step], branch: _Branch, arrays: Sequence[Any]
) -> tuple[list[Edge], list[bool]]:
    """Returns the edges of a branch, and which of its outputs depend on the inputs."""
    found: list[bool] = []

    def run(one: _One) -> list[Any]:
        outputs, is_data = branch(steps, one, arrays)
        found.extend(is_data)
        return outputs

    return _recorded(run), found


def _with_ones(
    branch: _Branch, number: int, arrays: Sequence[Any], ones: list[list[jax.Array]]
) -> list[Any]:
    """Computes branch `number` with its own ones. Its steps are recorded already."""
    mine = [one[0] for one in ones[number]]
    outputs, _ = branch([], _in_turn(mine), arrays)
    return outputs


def _scan_results(loop: _Loop, body: _Body, arrays: list[Any]) -> _Values:
    """Returns the scan's outputs as values, and completes its step."""
    _name_cut(loop.state.steps, loop.number)
    return _results(loop.operands, arrays, body.output_is_data, loop.number)


def _name_cut(steps: list[Step], number: int) -> None:
    """Names the cut before a scan or cond by the first parameter of the steps inside."""
    for inner in steps[number:]:
        if inner.multiplies:
            steps[number] = steps[number]._replace(multiplies=inner.multiplies)
            return


def _results(
    operands: _Values, arrays: Sequence[Any], output_is_data: Sequence[bool], number: int
) -> _Values:
    """Returns the outputs of a scan or cond as values. number: of its step."""
    leaves = _leaves(operands)
    results = []
    for array, is_data in zip(arrays, output_is_data, strict=True):
        result = _Value(array, None, leaves)
        if is_data:
            # An output that is no float has no flow, but still depends on the inputs.
            producer = number if _is_float(array) else BEGIN
            result = _Value(array, producer)
        results.append(result)
    return results
