"""Whether synaptic saliency is conserved in a model, and where it is not (Theorems 1 and 2).

The flow of a value v of the network is <dR/dv, v>. A function that is homogeneous of degree one (a convolution, ReLU,
pooling, adding) puts out the flow that it takes in, and so the flow through every cut of the network is the same; a
parameter that is multiplied takes the flow of the product as its score, and one that is added is a source of new flow.
All of this is read off the program of the model: every operand of every step is multiplied by a 1 of its own, and the
derivative of R with respect to that 1 is the operand's flow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from synflow_jax import scaling, trees, units
from synflow_jax.scores import ApplyFn
from synflow_jax.trees import Mask, Params


class Cut(NamedTuple):
    """The flow through the whole network just before the step that takes in a parameter.

    name: of that parameter. flow: what passes there, and what is added after it. residual: |flow - total| / scale.
    """

    name: str
    flow: float
    residual: float


class UnitResidual(NamedTuple):
    """Theorem 1 for the units of one layer, or of one residual stream.

    incoming, outgoing: float64 [size], the scores of what each unit receives (biases included) and of what it feeds.
    residual: the largest |incoming - outgoing| / the largest of either in the layer.
    """

    incoming: np.ndarray
    outgoing: np.ndarray
    residual: float


class Conservation(NamedTuple):
    """The audit of a model.

    total: <dR/dy, y> of the outputs y; for SynFlow that is R.
    exponent: 0, unless flows are beyond what float64 holds: then all of them are to be multiplied by 2^exponent.
    layers: per leaf of the parameters, the sum of its scores.
    units: per group of hidden units.
    cuts: one for each parameter that is multiplied, in the order of the network (Theorem 2).
    broken: the steps that are not homogeneous of degree one, as {primitive: the largest |flow out - flow in| / scale}.
    """

    total: float
    exponent: int
    layers: dict[str, float]
    units: dict[str, UnitResidual]
    cuts: tuple[Cut, ...]
    broken: dict[str, float]

    @property
    def residual(self) -> float:
        """The largest residual of all cuts and units."""
        return max([c.residual for c in self.cuts] + [u.residual for u in self.units.values()], default=0.0)

    @property
    def conserved(self) -> bool:
        """Whether every residual is within rounding, 1e-4."""
        return self.residual < 1e-4 and not self.broken

    def __str__(self) -> str:
        """A table for the terminal."""
        lines = [f"{'parameter':<40} {'score':>12} {'cut':>12} {'residual':>10}"]
        cuts = {cut.name: cut for cut in self.cuts}
        for name, score in self.layers.items():
            cut = cuts.get(name)
            found = f" {cut.flow:12.5g} {cut.residual:10.1e}" if cut else ""
            lines.append(f"{name:<40} {score:12.5g}{found}")
        worst = max((u.residual for u in self.units.values()), default=0.0)
        lines.append(f"units: {sum(u.incoming.size for u in self.units.values())}, largest residual {worst:.1e}")
        for primitive, residual in self.broken.items():
            lines.append(f"not homogeneous of degree one: {primitive} (residual {residual:.1e})")
        if self.exponent:
            lines.append(f"all flows times 2^{self.exponent}")
        return "\n".join(lines)


def conservation(
    apply_fn: ApplyFn,
    params: Params,
    input_shape: Sequence[int] | None = None,
    *,
    inputs: jax.Array | None = None,
    loss: Callable[[Any], jax.Array] | None = None,
    mask: Mask | None = None,
) -> Conservation:
    """Audits a model of any library: is its saliency conserved by units and by cuts, and if not, which step breaks it?

    Args:
      apply_fn: `apply_fn(params, x)`, in evaluation mode; its output is an array or a tree of arrays.
      params: tree of float arrays. All of them are scored, whatever can be pruned.
      input_shape: of one example. With it alone R is SynFlow's: the sum of the outputs for an input of ones under
        |params|, evaluated so that it cannot overflow.
      inputs, loss: given both, R = loss(apply_fn(params, inputs)), a scalar: the audit of a training loss.
      mask: applied to the parameters first.

    Raises:
      ValueError: neither an input shape nor inputs and loss are given; or R is not finite.

    >>> params = {"fc": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}, "head": {"kernel": jnp.ones((3, 1))}}
    >>> def apply_fn(p, x, activation=jax.nn.relu):
    ...     return activation(x @ p["fc"]["kernel"] + p["fc"]["bias"][None]) @ p["head"]["kernel"]
    >>> audit = conservation(apply_fn, params, (2,))
    >>> print(audit)
    parameter                                       score          cut   residual
    fc/bias                                             3
    fc/kernel                                           6            9    0.0e+00
    head/kernel                                         9            9    0.0e+00
    units: 3, largest residual 0.0e+00
    >>> audit = conservation(lambda p, x: apply_fn(p, x, jnp.tanh), params, (2,))
    >>> audit.conserved, list(audit.broken)
    (False, ['tanh'])
    """
    if (inputs is None) != (loss is None) or (inputs is None) == (input_shape is None):
        raise ValueError("conservation takes either input_shape, for SynFlow, or inputs and loss, for a training loss.")
    params = params if mask is None else trees.apply_mask(params, mask)
    if inputs is None or loss is None:
        params = jax.tree.map(jnp.abs, params)
        inputs = jnp.ones((1, *input_shape), jnp.result_type(*jax.tree.leaves(params)))  # type: ignore[misc]
        loss, evaluate = _total, scaling.evaluate
    else:
        evaluate = lambda f, *args: scaling.Scaled(f(*args), jnp.int32(0))
    program = _Program(apply_fn, params, inputs)
    audited = jax.jit(lambda p, x, eps: jax.grad(lambda p, eps: _both(evaluate(_run(program, loss), p, x, eps)),
                                                 argnums=(0, 1), has_aux=True)(p, eps))  # fmt: skip
    one = jnp.ones((), jnp.result_type(*jax.tree.leaves(params)))
    (gradient, flows), log2_unit = audited(params, inputs, [one] * len(program.edges))
    exponent = int(log2_unit) if abs(int(log2_unit)) > _IN_FLOAT64 else 0  # beyond it, a float holds no flow
    unit = 1.0 if exponent else 2.0 ** int(log2_unit)
    found = jax.tree.map(lambda g, w: unit * np.asarray(g, np.float64) * np.asarray(w, np.float64), gradient, params)
    layers = {n: float(s.sum()) for n, s in zip(trees.names(found), jax.tree.leaves(found), strict=True)}
    by_edge = unit * np.array([float(flow) for flow in flows])
    if not np.isfinite(by_edge).all() or not np.isfinite(list(layers.values())).all():
        plain = ", ".join(scaling.unscaled(apply_fn, params, inputs)) or "none"
        raise ValueError(
            "the flow is not finite: the model's outputs or derivatives overflow. Steps that are evaluated at plain "
            f"values, which may overflow: {plain}."
        )
    total = sum(flow for flow, edge in zip(by_edge, program.edges, strict=True) if edge.step == _END)
    scale = max(abs(total), np.abs(by_edge).max(), float(np.finfo(np.float32).tiny))
    cuts, broken = _cuts(program, by_edge, total, scale)
    by_unit = _by_unit(units.groups(apply_fn, params, inputs.shape[1:]), found)
    return Conservation(float(total), exponent, layers, by_unit, cuts, broken)


_END = 2**31  # the step that takes in the outputs
_TOLERANCE = 1e-4
_IN_FLOAT64 = 900
# Steps whose result is a sum, or a choice, of entries of their operands: what is not data in them is a source of flow.
_ADDITIVE = frozenset(
    ("add", "sub", "add_any", "max", "min", "clamp", "concatenate", "select_n", "pad", "dynamic_update_slice")
)
_CUSTOM = frozenset(("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"))


class _Edge(NamedTuple):
    """An operand of a step whose flow is taken. producer: the step that made it; -1 for the inputs."""

    step: int
    producer: int
    is_data: bool
    is_parameter: bool


class _Step(NamedTuple):
    name: str
    multiplies: str  # the parameter that the data are multiplied by; "" for none


class _Value(NamedTuple):
    """A value while the program runs. producer: None where it does not depend on the inputs."""

    array: Any
    producer: int | None
    leaves: tuple[str, ...]  # the parameters that it depends on, where it does not depend on the inputs


def _total(outputs: Any) -> jax.Array:
    return jax.tree.reduce(jnp.add, jax.tree.map(jnp.sum, outputs))


def _both(scaled: scaling.Scaled) -> tuple[jax.Array, jax.Array]:
    return scaled.value, scaled.exponent


class _Program:
    """The jaxpr of a model, with the edges whose flow is taken and the steps that they enter."""

    def __init__(self, apply_fn: ApplyFn, params: Params, inputs: jax.Array) -> None:
        self.closed, self.shape = jax.make_jaxpr(apply_fn, return_shape=True)(params, inputs)
        self.names = trees.names(params)
        self.edges: list[_Edge] = []
        self.steps: list[_Step] = []
        leaves = [*jax.tree.leaves(params), inputs]

        def record(edge: _Edge, array: Any) -> Any:
            self.edges.append(edge)
            return array

        jax.eval_shape(lambda leaves: self.run(leaves, record), leaves)

    def run(self, leaves: Sequence[Any], on_edge: Callable[[_Edge, Any], Any]) -> Any:
        """The outputs. `on_edge(edge, array)` is called edge by edge, and returns the array to go on with."""
        self.steps = []
        values = [_Value(x, None, (name,)) for x, name in zip(leaves[:-1], self.names, strict=True)]
        values.append(_Value(leaves[-1], -1, ()))
        consts = [_Value(x, None, ()) for x in self.closed.consts]
        outputs = self._follow(self.closed.jaxpr, consts, values, on_edge)
        ends = [self._taken(_END, value, on_edge) if _is_float(value.array) else value.array for value in outputs]
        return jax.tree.unflatten(jax.tree.structure(self.shape), ends)

    def _taken(self, step: int, value: _Value, on_edge: Callable[[_Edge, Any], Any]) -> Any:
        if value.producer is None and not _is_finite_source(value.array):
            return value.array
        producer = -1 if value.producer is None else value.producer
        edge = _Edge(step, producer, value.producer is not None, bool(value.leaves))
        return on_edge(edge, value.array)

    def _follow(
        self, jaxpr: Any, consts: Sequence[_Value], args: Sequence[_Value], on_edge: Callable[[_Edge, Any], Any]
    ) -> list[_Value]:
        found = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))

        def read(atom: Any) -> _Value:
            return _Value(atom.val, None, ()) if isinstance(atom, core.Literal) else found[atom]

        for eqn in jaxpr.eqns:
            operands = [read(atom) for atom in eqn.invars]
            name = eqn.primitive.name
            if name in scaling.CALLS and name not in _CUSTOM:
                inner = eqn.params[scaling.CALLS[name]]
                inner_consts = [_Value(x, None, ()) for x in getattr(inner, "consts", ())]
                outs = self._follow(getattr(inner, "jaxpr", inner), inner_consts, operands, on_edge)
            else:
                outs = self._step(eqn, operands, on_edge)
            found |= dict(zip(eqn.outvars, outs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _step(self, eqn: Any, operands: list[_Value], on_edge: Callable[[_Edge, Any], Any]) -> list[_Value]:
        arrays = [operand.array for operand in operands]
        is_data = any(operand.producer is not None and _is_float(operand.array) for operand in operands)
        if is_data:
            number, additive = len(self.steps), eqn.primitive.name in _ADDITIVE
            for i, operand in enumerate(operands):
                if _is_float(operand.array) and (additive or operand.producer is not None):
                    arrays[i] = self._taken(number, operand, on_edge)
            factors = [leaf for operand in operands if operand.producer is None for leaf in operand.leaves]
            self.steps.append(_Step(_name(eqn), "" if additive or not factors else factors[0]))
        results = eqn.primitive.bind(*arrays, **eqn.primitive.get_bind_params(eqn.params))
        results = results if eqn.primitive.multiple_results else [results]
        leaves = tuple(dict.fromkeys(leaf for operand in operands for leaf in operand.leaves))
        # What is computed of data but is no float (an index, a comparison) has no flow.
        return [_Value(x, number, ()) if is_data and _is_float(x) else _Value(x, None, leaves) for x in results]


def _is_float(array: Any) -> bool:
    return bool(jnp.issubdtype(jnp.result_type(array), jnp.floating))


def _is_finite_source(array: Any) -> bool:
    """Whether a value that does not depend on the inputs adds flow; zeros and infinities (of a padding) do not."""
    return isinstance(array, jax.core.Tracer) or bool(np.all(np.isfinite(array)) and np.any(np.asarray(array) != 0))


def _name(eqn: Any) -> str:
    """Of a function with a derivative of its own, its own name."""
    if eqn.primitive.name not in _CUSTOM:
        return str(eqn.primitive.name)
    info = getattr(getattr(eqn.params.get("call_jaxpr"), "jaxpr", None), "debug_info", None)
    return str(getattr(info, "func_name", eqn.primitive.name))


def _run(program: _Program, loss: Callable[[Any], jax.Array]) -> Callable[..., jax.Array]:
    def run(params: Params, inputs: jax.Array, eps: list[jax.Array]) -> jax.Array:
        ones = iter(eps)
        return loss(program.run([*jax.tree.leaves(params), inputs], lambda edge, x: x * next(ones).astype(x.dtype)))

    return run


def _cuts(program: _Program, flows: np.ndarray, total: float, scale: float) -> tuple[tuple[Cut, ...], dict[str, float]]:
    num_steps = len(program.steps)
    into, out_of = np.zeros(num_steps), np.zeros(num_steps)
    sources, constants = np.zeros(num_steps), np.zeros(num_steps)
    passing = np.zeros(num_steps + 2)  # differences: an edge passes every cut after its producer, up to its step
    for flow, edge in zip(flows, program.edges, strict=True):
        if edge.is_data:
            if edge.producer >= 0:
                out_of[edge.producer] += flow
            if edge.step != _END:
                into[edge.step] += flow
            passing[edge.producer + 1] += flow
            passing[min(edge.step, num_steps) + 1] -= flow
        elif edge.step != _END:
            sources[edge.step] += flow
            constants[edge.step] += 0 if edge.is_parameter else flow
    broken: dict[str, float] = {}
    for i, step in enumerate(program.steps):
        missing = abs(out_of[i] - into[i] - sources[i]) / scale
        missing = max(missing, abs(constants[i]) / scale)
        if missing > _TOLERANCE:
            broken[step.name] = max(broken.get(step.name, 0.0), float(missing))
    passing = np.cumsum(passing)
    later = np.cumsum(sources[::-1])[::-1]
    cuts = [
        Cut(step.multiplies, float(passing[i] + later[i]), float(abs(passing[i] + later[i] - total) / scale))
        for i, step in enumerate(program.steps)
        if step.multiplies
    ]
    return tuple(cuts), broken


def _by_unit(groups: Sequence[units.Group], found: trees.Scores) -> dict[str, UnitResidual]:
    hidden = [group for group in groups if not (group.is_input or group.is_output)]
    residuals = {}
    for name, (incoming, outgoing) in units.unit_scores(hidden, found).items():
        largest = max(np.abs(incoming).max(initial=0), np.abs(outgoing).max(initial=0))
        difference = np.abs(incoming - outgoing).max(initial=0)
        residuals[name] = UnitResidual(incoming, outgoing, float(difference / largest) if largest > 0 else 0.0)
    return residuals
