"""Whether synaptic saliency is conserved in a model, and where it is not (Theorems 1 and 2).

The flow of a value v of the network is <dR/dv, v>. A function that is homogeneous of degree one (a convolution, ReLU,
pooling, adding) puts out the flow that it takes in, and so the flow through every cut of the network is the same; a
parameter that is multiplied takes the flow of the product as its score, and one that is added is a source of new flow.
All of this is read off the program of the model: every operand of every step is multiplied by a 1 of its own, and the
derivative of R with respect to that 1 is the operand's flow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from synflow_jax import trees
from synflow_jax.jaxprs import scaling
from synflow_jax.scores import ApplyFn
from synflow_jax.trees import Mask, Params

if TYPE_CHECKING:
    from synflow_jax.units import Group


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
    units: per group of hidden units, but those that the network sums up, chooses from or rearranges among themselves:
      their flow leaves by other ways than parameters.
    cuts: one for each parameter that is multiplied, in the order of the network (Theorem 2); for a scan one, before it.
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
        return max(
            [c.residual for c in self.cuts] + [u.residual for u in self.units.values()], default=0.0
        )

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
        lines.append(
            f"units: {sum(u.incoming.size for u in self.units.values())}, largest residual {worst:.1e}"
        )
        for primitive, residual in self.broken.items():
            lines.append(f"not homogeneous of degree one: {primitive} (residual {residual:.1e})")
        if self.exponent:
            lines.append(f"all flows times 2^{self.exponent}")
        if not self.total and not any(self.layers.values()):
            lines.append("nothing flows: the outputs do not depend on the parameters here")
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
        raise ValueError(
            "conservation takes either input_shape, for SynFlow, or inputs and loss, for a training loss."
        )
    params = params if mask is None else trees.apply_mask(params, mask)
    if inputs is None or loss is None:
        params = jax.tree.map(jnp.abs, params)
        inputs = jnp.ones((1, *input_shape), jnp.result_type(*jax.tree.leaves(params)))  # type: ignore[misc]
        loss, evaluate = _total, scaling.evaluate
    else:
        evaluate = lambda f, *args: scaling.Scaled(f(*args), jnp.int32(0))
    program = _Program(apply_fn, params, inputs)
    # It runs once: the compiler's effort would take longer than what it saves.
    quick = {"xla_backend_optimization_level": 1} if jax.default_backend() == "cpu" else None
    audited = jax.jit(
        lambda p, x, eps: jax.grad(
            lambda p, eps: _both(evaluate(_run(program, loss), p, x, eps)),
            argnums=(0, 1),
            has_aux=True,
        )(p, eps),
        compiler_options=quick,
    )
    dtype = jnp.result_type(*jax.tree.leaves(params))
    eps = [jnp.ones(edge.lengths, dtype) for edge in program.edges]
    (gradient, flows), log2_unit = audited(params, inputs, eps)
    exponent = (
        int(log2_unit) if abs(int(log2_unit)) > _IN_FLOAT64 else 0
    )  # beyond it, a float holds no flow
    unit = 1.0 if exponent else 2.0 ** int(log2_unit)
    found = jax.tree.map(
        lambda g, w: unit * np.asarray(g, np.float64) * np.asarray(w, np.float64), gradient, params
    )
    layers = {
        n: float(s.sum()) for n, s in zip(trees.names(found), jax.tree.leaves(found), strict=True)
    }
    by_edge = [unit * np.asarray(flow, np.float64) for flow in flows]
    if not (
        np.isfinite(list(layers.values())).all()
        and all(np.isfinite(flow).all() for flow in by_edge)
    ):
        plain = ", ".join(scaling.unscaled(apply_fn, params, inputs)) or "none"
        raise ValueError(
            "the flow is not finite: the model's outputs or derivatives overflow. Steps that are evaluated at plain "
            f"values, which may overflow: {plain}."
        )
    total = sum(
        float(f) for f, edge in zip(by_edge, program.edges, strict=True) if _is_output(edge)
    )
    scale = max(
        [
            abs(total),
            float(np.finfo(np.float32).tiny),
            *[np.abs(flow).max(initial=0) for flow in by_edge],
        ]
    )
    cuts = _cuts(program, by_edge, total, scale)
    broken = _broken(program, by_edge, scale)
    from synflow_jax import units  # `import synflow_jax` does without it

    by_unit = _by_unit(units.groups(apply_fn, params, inputs.shape[1:], inputs.dtype), found)
    return Conservation(float(total), exponent, layers, by_unit, cuts, broken)


_BEGIN = -1  # what makes the inputs
_END = 2**31  # the step that takes in the outputs
_TOLERANCE = 1e-4
_IN_FLOAT64 = 900
_BESIDE_A_CONSTANT = (
    "with an array that has no such units"  # why `units` holds units that meet batch statistics
)
# Steps whose result is a sum, or a choice, of entries of their operands: what is not data in them is a source of flow.
_ADDITIVE = frozenset(
    (
        "add",
        "sub",
        "add_any",
        "max",
        "min",
        "clamp",
        "concatenate",
        "select_n",
        "pad",
        "dynamic_update_slice",
    )
)
_CUSTOM = frozenset(("custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"))


class _Edge(NamedTuple):
    """An operand of a step whose flow is taken.

    step: that it enters; _END for the outputs. producer: the step that made it; _BEGIN for the inputs. Within a scan
    both stand for the ends of one iteration. lengths: of the scans around it; it has a flow for each iteration.
    """

    step: int
    producer: int
    is_data: bool
    is_parameter: bool
    lengths: tuple[int, ...] = ()


class _Step(NamedTuple):
    """A step of the program. multiplies: the parameter that the data are multiplied by; "" for none.

    scan: the step of the outermost scan that it lies in; -1 for none. is_scan: its own steps are looked at instead.
    """

    name: str
    multiplies: str
    scan: int
    is_scan: bool = False


class _Value(NamedTuple):
    """A value while the program runs.

    producer: None where it does not depend on the inputs. leaves: the parameters that it depends on, where it does not
    depend on the inputs.
    """

    array: Any
    producer: int | None
    leaves: tuple[str, ...] = ()


_One = Callable[[_Edge], Any]  # the 1 that the edge's value is multiplied by


def _constant(array: Any) -> _Value:
    return _Value(array, None)


def _total(outputs: Any) -> jax.Array:
    return jax.tree.reduce(jnp.add, jax.tree.map(jnp.sum, outputs))


def _both(scaled: scaling.Scaled) -> tuple[jax.Array, jax.Array]:
    return scaled.value, scaled.exponent


class _Program:
    """The jaxpr of a model, with the edges whose flow is taken and the steps that they enter."""

    def __init__(self, apply_fn: ApplyFn, params: Params, inputs: jax.Array) -> None:
        self.closed, self.shape = jax.make_jaxpr(apply_fn, return_shape=True)(params, inputs)
        self.names = trees.names(params)
        self.steps: list[_Step] = []
        self.scan = -1
        self.edges = _recorded(lambda one: self.run([*jax.tree.leaves(params), inputs], one))
        self.recorded = tuple(self.steps)

    def run(self, leaves: Sequence[Any], one: _One) -> Any:
        """The outputs, where every edge is multiplied by its own 1: `one` is called edge by edge, in one order."""
        values = [_Value(x, None, (name,)) for x, name in zip(leaves[:-1], self.names, strict=True)]
        values.append(_Value(leaves[-1], _BEGIN))
        outputs = self.follow(self.closed.jaxpr, self.closed.consts, values, one)
        return jax.tree.unflatten(jax.tree.structure(self.shape), self.ended(outputs, one))

    def ended(self, outputs: Sequence[_Value], one: _One) -> list[Any]:
        return [
            _taken(_END, value, one) if _is_float(value.array) else value.array for value in outputs
        ]

    def follow(
        self, jaxpr: Any, consts: Sequence[Any], args: Sequence[_Value], one: _One
    ) -> list[_Value]:
        found = dict(
            zip([*jaxpr.constvars, *jaxpr.invars], [*map(_constant, consts), *args], strict=True)
        )
        read = lambda atom: _constant(atom.val) if isinstance(atom, core.Literal) else found[atom]
        for eqn in jaxpr.eqns:
            operands = [read(atom) for atom in eqn.invars]
            name = eqn.primitive.name
            if name in scaling.CALLS and name not in _CUSTOM:
                inner = eqn.params[scaling.CALLS[name]]
                outs = self.follow(
                    getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), operands, one
                )
            elif name == "scan" and any(operand.producer is not None for operand in operands):
                outs = self.follow_scan(eqn, operands, one)
            else:
                outs = self.step(eqn, operands, one)
            found |= dict(zip(eqn.outvars, outs, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def step(self, eqn: Any, operands: list[_Value], one: _One) -> list[_Value]:
        name, arrays = eqn.primitive.name, [operand.array for operand in operands]
        leaves = tuple(dict.fromkeys(leaf for operand in operands for leaf in operand.leaves))
        from_data = any(_is_data(operand) for operand in operands)
        # Integer inputs have no flow of their own: what they look up in a parameter does.
        from_indices = not from_data and any(operand.producer is not None for operand in operands)
        results_are_data = from_data or (from_indices and bool(leaves))
        number = len(self.steps)
        if results_are_data:
            additive = name in _ADDITIVE or from_indices
            for i, operand in enumerate(operands):
                if _is_float(operand.array) and (additive or operand.producer is not None):
                    arrays[i] = _taken(number, operand, one)
            factors = [
                leaf for operand in operands if operand.producer is None for leaf in operand.leaves
            ]
            multiplies = factors[0] if factors and (from_indices or not additive) else ""
            self.steps.append(_Step(_name(eqn), multiplies, self.scan))
        results = eqn.primitive.bind(*arrays, **eqn.primitive.get_bind_params(eqn.params))
        results = results if eqn.primitive.multiple_results else [results]
        if from_indices and not leaves:  # still an input, such as a one-hot vector
            return [_Value(x, _BEGIN) for x in results]
        # What is computed of data but is no float (an index, a comparison) has no flow.
        return [
            _Value(x, number) if results_are_data and _is_float(x) else _Value(x, None, leaves)
            for x in results
        ]

    def follow_scan(self, eqn: Any, operands: list[_Value], one: _One) -> list[_Value]:
        """A scan whose edges have a 1, and so a flow, for every iteration."""
        closed, length = eqn.params["jaxpr"], eqn.params["length"]
        num_consts, num_carry = scaling.scan_counts(eqn, closed.jaxpr)
        number, outside = len(self.steps), self.scan
        scan = number if outside < 0 else outside
        arrays = [_taken(number, x, one) if _is_data(x) else x.array for x in operands]
        from_inputs = [operand.producer is not None for operand in operands]
        outs: list[_Value] = []

        def body(one: _One, carry: Sequence[Any], xs: Sequence[Any]) -> tuple[list[Any], list[Any]]:
            values = [
                _Value(x, _BEGIN) if within else _Value(x, None, operand.leaves)
                for x, within, operand in zip(
                    [*arrays[:num_consts], *carry, *xs], from_inputs, operands, strict=True
                )
            ]
            self.steps = [*self.steps[:number], _Step("scan", "", outside, is_scan=True)]
            self.scan = scan
            outs[:] = self.follow(closed.jaxpr, closed.consts, values, one)
            self.scan = outside
            ends = self.ended(outs, one)
            return ends[:num_carry], ends[num_carry:]

        carry, xs = arrays[num_consts : num_consts + num_carry], arrays[num_consts + num_carry :]
        while True:
            edges = _recorded(lambda one: body(one, carry, jax.tree.map(lambda x: x[0], xs)))
            before = from_inputs[num_consts : num_consts + num_carry]
            carried = [
                a or out.producer is not None
                for a, out in zip(before, outs[:num_carry], strict=True)
            ]
            if carried == before:
                break
            from_inputs[num_consts : num_consts + num_carry] = (
                carried  # from the second iteration on
            )
        for i in range(num_carry):
            operand = operands[num_consts + i]
            if (
                from_inputs[num_consts + i]
                and operand.producer is None
                and _is_float(operand.array)
            ):
                carry[i] = _taken(number, operand, one)  # a first state that is learned: a source
        multiplied = next((step.multiplies for step in self.steps[number:] if step.multiplies), "")
        inside = self.steps[number + 1 :]
        ones = [one(edge._replace(lengths=(length, *edge.lengths))) for edge in edges]
        carry, ys = jax.lax.scan(
            lambda carry, xs: body(_in_turn(xs[1]), carry, xs[0]), [jnp.asarray(x) for x in carry], (xs, ones),
            length=length, reverse=eqn.params["reverse"], unroll=eqn.params["unroll"],
        )  # fmt: skip
        self.steps = [
            *self.steps[:number],
            _Step("scan", multiplied, outside, is_scan=True),
            *inside,
        ]
        leaves = tuple(dict.fromkeys(leaf for operand in operands for leaf in operand.leaves))
        return [
            _Value(x, number if _is_float(x) else _BEGIN)
            if out.producer is not None
            else _Value(x, None, leaves)
            for x, out in zip([*carry, *ys], outs, strict=True)
        ]


def _recorded(run: Callable[[_One], Any]) -> list[_Edge]:
    """The edges of a program, in the order in which it asks for their ones."""
    edges: list[_Edge] = []

    def one(edge: _Edge) -> jax.Array:
        edges.append(edge)
        return jnp.ones(edge.lengths)

    jax.eval_shape(lambda: run(one))
    return edges


def _in_turn(ones: Sequence[jax.Array]) -> _One:
    left = iter(ones)
    return lambda edge: next(left)


def _taken(step: int, value: _Value, one: _One) -> Any:
    if value.producer is None and _is_neutral(value.array):
        return value.array
    producer = _BEGIN if value.producer is None else value.producer
    edge = _Edge(step, producer, value.producer is not None, bool(value.leaves))
    return _tapped(jnp.asarray(value.array), one(edge).astype(value.array.dtype))


@jax.custom_vjp
def _tapped(array: jax.Array, one: jax.Array) -> jax.Array:
    """The array times `one`. What has no derivative has no flow, even an infinity, as paddings and masks hold."""
    return array * one


_tapped.defvjp(
    lambda array, one: (array * one, array),
    lambda array, g: (g, jnp.sum(jnp.where(g == 0, 0, g * array))),
)


def _is_float(array: Any) -> bool:
    return bool(jnp.issubdtype(jnp.result_type(array), jnp.floating))


def _is_neutral(array: Any) -> bool:
    """Whether a literal adds no flow, as a zero or an infinity: left as it is, it also needs no alignment."""
    return (
        not isinstance(array, jax.core.Tracer)
        and np.ndim(array) == 0
        and bool(array == 0 or np.isinf(array))
    )


def _is_data(value: _Value) -> bool:
    return value.producer is not None and _is_float(value.array)


def _is_output(edge: _Edge) -> bool:
    return edge.step == _END and not edge.lengths


def _name(eqn: Any) -> str:
    """Of a function with a derivative of its own, its own name."""
    if eqn.primitive.name not in _CUSTOM:
        return str(eqn.primitive.name)
    info = getattr(getattr(eqn.params.get("call_jaxpr"), "jaxpr", None), "debug_info", None)
    return str(getattr(info, "func_name", eqn.primitive.name))


def _run(program: _Program, loss: Callable[[Any], jax.Array]) -> Callable[..., jax.Array]:
    def run(params: Params, inputs: jax.Array, eps: list[jax.Array]) -> jax.Array:
        return loss(program.run([*jax.tree.leaves(params), inputs], _in_turn(eps)))

    return run


def _cuts(
    program: _Program, flows: Sequence[np.ndarray], total: float, scale: float
) -> tuple[Cut, ...]:
    num_steps = len(program.recorded)
    sources = np.zeros(num_steps)
    passing = np.zeros(
        num_steps + 2
    )  # differences: an edge passes every cut after its producer, up to its step
    for flow, edge in zip(flows, program.edges, strict=True):
        if edge.is_data and not edge.lengths:
            passing[edge.producer + 1] += flow
            passing[min(edge.step, num_steps) + 1] -= flow
        elif not edge.is_data and edge.step != _END:
            scan = program.recorded[edge.step].scan
            sources[edge.step if scan < 0 else scan] += flow.sum()
    found = (
        np.cumsum(passing)[: num_steps + 1] + np.cumsum([0, *sources[::-1]])[::-1]
    )  # what passes, what is yet added
    return tuple(
        Cut(step.multiplies, float(found[i]), float(abs(found[i] - total) / scale))
        for i, step in enumerate(program.recorded)
        if step.multiplies and step.scan < 0
    )


def _broken(program: _Program, flows: Sequence[np.ndarray], scale: float) -> dict[str, float]:
    missing: list[Any] = [0.0] * len(program.recorded)  # out - in
    constants: list[Any] = [0.0] * len(program.recorded)
    for flow, edge in zip(flows, program.edges, strict=True):
        if edge.is_data and edge.producer != _BEGIN:
            missing[edge.producer] = missing[edge.producer] + flow
        if edge.step != _END:
            missing[edge.step] = missing[edge.step] - flow
            if not (edge.is_data or edge.is_parameter):
                constants[edge.step] = constants[edge.step] + flow
    broken: dict[str, float] = {}
    for step, *wrong in zip(program.recorded, missing, constants, strict=True):
        residual = max(float(np.abs(w).max()) for w in wrong) / scale
        if residual > _TOLERANCE and not step.is_scan:
            broken[step.name] = max(broken.get(step.name, 0.0), float(residual))
    return broken


def _by_unit(groups: Sequence[Group], found: trees.Scores) -> dict[str, UnitResidual]:
    hidden = [group for group in groups if not group.is_input]
    reasons = [
        [r for r in group.fixed.split(", ") if r and not r.endswith(_BESIDE_A_CONSTANT)]
        for group in hidden
    ]
    if not any(reasons):  # else what a unit is added to may be the mixture of others
        apart = hidden
    else:
        apart = [group for group in hidden if not group.fixed]
    residuals = {}
    from synflow_jax import units

    for name, (incoming, outgoing) in units.unit_scores(
        [g for g in apart if not g.is_output], found
    ).items():
        largest = max(np.abs(incoming).max(initial=0), np.abs(outgoing).max(initial=0))
        difference = np.abs(incoming - outgoing).max(initial=0)
        residuals[name] = UnitResidual(
            incoming, outgoing, float(difference / largest) if largest > 0 else 0.0
        )
    return residuals
