"""Audits whether a model conserves synaptic saliency, and finds where it does not.

The flow of a value v of the network is <dR/dv, v>. A function that is homogeneous of degree one (a
convolution, ReLU, pooling, a sum) has an output flow equal to its input flow. So the flow through
every cut of the network is the same. The score of a parameter that is multiplied is the flow of the
product. A parameter that is added is a source of new flow. The audit computes these flows in the
program of the model (see `flows`), and compares them by units (Theorem 1) and by cuts (Theorem 2).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from synflow_jax import arguments, trees
from synflow_jax.analysis.flows import BEGIN, END, NO_SCAN, Edge, Program
from synflow_jax.jaxprs import scaling
from synflow_jax.scores import ApplyFn, check_apply_fn, fed_with_ones
from synflow_jax.trees import Mask, Params, Scores

if TYPE_CHECKING:
    from synflow_jax.units import Group

_TOLERANCE = 1e-4  # a smaller residual is rounding
_IN_FLOAT64 = 900  # flows times a power of two beyond 2^900 may exceed float64

Loss = Callable[[Any], jax.Array]


class Cut(NamedTuple):
    """Describes the flow through the whole network just before a step that uses a parameter.

    Attributes:
      name: the name of that parameter.
      flow: the flow that passes there, plus the flow that is added after it.
      residual: |flow - total| / the largest flow of the network.
    """

    name: str
    flow: float
    residual: float


class UnitResidual(NamedTuple):
    """Compares the two sides of Theorem 1 for the units of one layer, or of one residual stream.

    Attributes:
      incoming: float64 [size], the sum of the scores into each unit, biases included.
      outgoing: float64 [size], the sum of the scores out of each unit.
      residual: the largest |incoming - outgoing| / the largest of either in the layer.
    """

    incoming: np.ndarray
    outgoing: np.ndarray
    residual: float


class Conservation(NamedTuple):
    """Holds the audit of a model.

    Attributes:
      total: <dR/dy, y> of the outputs y. For SynFlow that is R.
      exponent: 0, unless flows exceed float64. All flows are then to be multiplied by 2^exponent.
      layers: the sum of the scores of each leaf of the parameters.
      units: the residual of each group of hidden units. Groups that the network sums over, chooses
        from or rearranges are left out, because their flow does not leave through parameters.
      cuts: the cut of each parameter that is multiplied (Theorem 2), in the order of the network.
        A scan has one cut, before it.
      broken: the steps that are not homogeneous of degree one, as {primitive: the largest
        |flow out - flow in| / the largest flow of the network}. Steps between a parameter and the
        product with the data count too: a kernel that is normalized first has scores that add up to
        0.
      unbalanced: the largest |flow out - flow in| / the largest flow of the network that no cut
        shows: of all steps together between a parameter and its product; of single steps in a scan,
        in a cond, or in a network without a cut; and what constants add.
    """

    total: float
    exponent: int
    layers: dict[str, float]
    units: dict[str, UnitResidual]
    cuts: tuple[Cut, ...]
    broken: dict[str, float]
    unbalanced: float = 0.0

    @property
    def residual(self) -> float:
        """Returns the largest residual of all cuts and units."""
        residuals = [cut.residual for cut in self.cuts]
        residuals += [layer.residual for layer in self.units.values()]
        return max(residuals, default=0.0)

    @property
    def conserved(self) -> bool:
        """Returns whether every residual is within rounding, 1e-4.

        Each layer that is a cut, and that the network uses once, then has scores that add up to
        `total`. Broken steps may be among those that conserve flow together: the norm of the units
        of a pool, the root of a sum of squares, is homogeneous although its steps are not.
        """
        return self.residual < _TOLERANCE and self.unbalanced < _TOLERANCE

    def __str__(self) -> str:
        """Returns a table for the terminal."""
        header = f"{'parameter':<40} {'score':>12} {'cut':>12} {'residual':>10}"
        lines = [header]
        cuts = {cut.name: cut for cut in self.cuts}
        for name, score in self.layers.items():
            line = f"{name:<40} {score:12.5g}"
            cut = cuts.get(name)
            # Parameters that are only added have no cut.
            if cut is not None:
                line += f" {cut.flow:12.5g} {cut.residual:10.1e}"
            lines.append(line)

        sizes = [layer.incoming.size for layer in self.units.values()]
        residuals = [layer.residual for layer in self.units.values()]
        worst = max(residuals, default=0.0)
        lines.append(f"units: {sum(sizes)}, largest residual {worst:.1e}")
        for primitive, residual in self.broken.items():
            lines.append(f"not homogeneous of degree one: {primitive} (residual {residual:.1e})")
        if self.exponent:
            lines.append(f"all flows times 2^{self.exponent}")
        # A loss of 0, for example. Every residual is 0 then, which says nothing about the model.
        if not self.total and not any(self.layers.values()):
            lines.append("nothing flows: the outputs do not depend on the parameters here")
        return "\n".join(lines)


def conservation(
    apply_fn: ApplyFn,
    params: Params,
    mask: Mask | None = None,
    input_shape: Sequence[int] | None = None,
    *,
    inputs: jax.Array | None = None,
    loss: Loss | None = None,
) -> Conservation:
    """Audits whether the units and cuts of any model conserve its saliency.

    Args:
      apply_fn: `apply_fn(params, x)`, in evaluation mode. Its output is an array or a tree of
        arrays.
      params: tree of float arrays. All of them are scored, whether or not they can be pruned.
      mask: applied to the parameters first. None for none.
      input_shape: of one example, without the batch axis. With it R is SynFlow's objective: the sum
        of the outputs for an input of ones under |params|, evaluated so that it cannot overflow.
      inputs, loss: given both, R = loss(apply_fn(params, inputs)), a scalar: the audit of a
        training loss.

    Raises:
      ValueError: neither an input shape nor inputs and loss are given, or both are; or R is not
        finite.

    >>> params = {
    ...     "fc": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)},
    ...     "head": {"kernel": jnp.ones((3, 1))},
    ... }
    >>> def apply_fn(p, x, activation=jax.nn.relu):
    ...     hidden = activation(x @ p["fc"]["kernel"] + p["fc"]["bias"][None])
    ...     return hidden @ p["head"]["kernel"]
    >>> audit = conservation(apply_fn, params, input_shape=(2,))
    >>> print(audit)
    parameter                                       score          cut   residual
    fc/bias                                             3
    fc/kernel                                           6            9    0.0e+00
    head/kernel                                         9            9    0.0e+00
    units: 3, largest residual 0.0e+00
    >>> audit = conservation(lambda p, x: apply_fn(p, x, jnp.tanh), params, input_shape=(2,))
    >>> audit.conserved, list(audit.broken)
    (False, ['tanh'])
    """
    of_synflow = input_shape is not None and inputs is None and loss is None
    of_loss = input_shape is None and inputs is not None and loss is not None
    if not (of_synflow or of_loss):
        raise ValueError(
            "conservation needs either input_shape, to audit SynFlow, or both inputs and loss, to "
            "audit a training loss."
        )
    check_apply_fn(apply_fn)
    if mask is not None:
        params = trees.apply_mask(params, mask)
    if input_shape is not None:
        shape = arguments.check_input_shape(input_shape)
        apply_fn = fed_with_ones(apply_fn, shape)
        # As `scores.path_norm` does.
        params = trees.without_means(trees.absolute(params))
        inputs = jnp.ones((1, *shape), trees.float_type(params))
    assert inputs is not None
    # Counts, keys and running statistics are no weights: they become constants of the network.
    everything, params = params, trees.trained(params)
    apply_fn = functools.partial(_with_constants, apply_fn, everything)

    program = Program(apply_fn, params, inputs)
    flows = _flows(program, params, inputs, loss)
    if not flows.are_finite:
        primitives = scaling.unscaled(apply_fn, params, inputs)
        plain = ", ".join(primitives) or "none"
        raise ValueError(
            "the flow is not finite: the outputs or derivatives of the model overflow. Steps that "
            f"are evaluated at plain values, and so may overflow: {plain}."
        )

    from synflow_jax import units  # here, because `import synflow_jax` must not load it

    example_shape = inputs.shape[1:]
    groups = units.groups(apply_fn, params, example_shape, inputs.dtype)
    cuts = _cuts(program, flows)
    surplus = _surplus(program, flows)
    return Conservation(
        total=flows.total,
        exponent=flows.exponent,
        layers=flows.layers,
        units=_by_unit(groups, flows.scores),
        cuts=cuts,
        broken=_broken(program, surplus),
        unbalanced=_unbalanced(program, surplus, has_cuts=bool(cuts)),
    )


def _with_constants(apply_fn: ApplyFn, everything: Params, trained: Params, x: jax.Array) -> Any:
    return apply_fn(trees.merge(trained, everything), x)


# ------------------------------------------------------------------------------------------ Flows


class _Flows(NamedTuple):
    """Holds the scores and flows of a model, all to be multiplied by 2^exponent.

    scores: float64, a tree with the structure of the parameters.
    layers: the sum of the scores of each leaf.
    by_edge: each edge of the program with its flow, float64 of the shape `edge.lengths`.
    """

    scores: Scores
    layers: dict[str, float]
    by_edge: list[tuple[Edge, np.ndarray]]
    exponent: int

    @property
    def are_finite(self) -> bool:
        """Returns whether the flows, and the sum of the scores of each leaf, are finite."""
        for _, flow in self.by_edge:
            if not np.isfinite(flow).all():
                return False
        return all(map(math.isfinite, self.layers.values()))

    @property
    def total(self) -> float:
        """Returns the flow of all outputs."""
        outputs = [float(flow) for edge, flow in self.by_edge if edge.is_output]
        return sum(outputs, 0.0)

    @property
    def scale(self) -> float:
        """Returns the largest flow, by which residuals are divided."""
        largest = [_largest(flow) for _, flow in self.by_edge]
        # If nothing flows, residuals are divided by the smallest float32, and not by 0.
        smallest = float(np.finfo(np.float32).tiny)
        return max([smallest, abs(self.total), *largest])


def _flows(
    program: Program,
    params: Params,
    inputs: jax.Array,
    loss: Loss | None,
) -> _Flows:
    """Differentiates R with respect to the parameters and to the 1 of every edge.

    loss: computes R from the outputs. None for SynFlow, where R is their sum.
    """

    def objective(params: Params, inputs: jax.Array, ones: list[jax.Array]) -> jax.Array:
        outputs = program.run(params, inputs, ones)
        return _sum_of_outputs(outputs) if loss is None else loss(outputs)

    def mantissa(params: Params, ones: list[jax.Array], inputs: jax.Array) -> Any:
        # Only SynFlow's R is a sum of products, which may exceed every float.
        if loss is None:
            scaled = scaling.evaluate(objective, params, inputs, ones)
            return scaled.value, scaled.exponent
        return objective(params, inputs, ones), jnp.int32(0)

    # The program runs only once, so that optimizing it would take longer than it saves.
    options = None
    if jax.default_backend() == "cpu":
        options = {"xla_backend_optimization_level": 1}
    differentiate = jax.grad(mantissa, argnums=(0, 1), has_aux=True)
    differentiate = jax.jit(differentiate, compiler_options=options)
    dtype = trees.float_type(params)
    ones = [jnp.ones(edge.lengths, dtype) for edge in program.edges]
    (gradient, found), log2_unit = differentiate(params, ones, inputs)

    # Flows that float64 does not hold are returned without the power of two.
    exponent = int(log2_unit)
    is_beyond = abs(exponent) > _IN_FLOAT64
    unit = 1.0 if is_beyond else 2.0**exponent

    def score(gradient: jax.Array, weight: jax.Array) -> np.ndarray:
        return unit * _widened(gradient) * _widened(weight)

    scores = jax.tree.map(score, gradient, params)
    flows = [unit * _widened(flow) for flow in found]
    pairs = zip(program.edges, flows, strict=True)
    return _Flows(
        scores=scores,
        layers=_sums(scores),
        by_edge=list(pairs),
        exponent=exponent if is_beyond else 0,
    )


def _sum_of_outputs(outputs: Any) -> jax.Array:
    """Returns the sum of all outputs, which for SynFlow is R."""
    sums = jax.tree.map(jnp.sum, outputs)
    return jax.tree.reduce(jnp.add, sums)


def _sums(scores: Scores) -> dict[str, float]:
    """Returns the sum of the scores of each leaf."""
    leaves = trees.by_name(scores)
    return {name: float(leaf.sum()) for name, leaf in leaves.items()}


def _widened(array: jax.Array) -> np.ndarray:
    """Returns an array as float64 on the host."""
    return np.asarray(array, np.float64)


# ------------------------------------------------------------------------------------------- Laws


def _cuts(program: Program, flows: _Flows) -> tuple[Cut, ...]:
    """Computes the flow just before each step that multiplies by a parameter (Theorem 2)."""
    total, scale = flows.total, flows.scale
    cuts = []
    by_step = _flow_by_step(program, flows)
    for step, flow in zip(program.steps, by_step, strict=True):
        if step.multiplies and step.scan == NO_SCAN:
            residual = abs(flow - total) / scale
            cut = Cut(step.multiplies, flow, residual)
            cuts.append(cut)
    return tuple(cuts)


def _flow_by_step(program: Program, flows: _Flows) -> list[float]:
    """Returns `Cut.flow` of a cut just before each step."""
    num_steps = len(program.steps)
    added = np.zeros(num_steps)
    # Differences between neighbouring cuts: an edge passes every cut after its producer, up to the
    # step that it enters. This takes linear time, while a sum for each cut would be quadratic.
    changes = np.zeros(num_steps + 2)
    for edge, flow in flows.by_edge:
        if edge.is_data and not edge.lengths:
            last = min(edge.step, num_steps)
            changes[edge.producer + 1] += flow
            changes[last + 1] -= flow
        is_added = not (edge.is_data or edge.is_factor or edge.is_side)
        if is_added and edge.step != END:
            # No cut goes through a scan: all flow that the scan adds counts at its beginning.
            scan = program.steps[edge.step].scan
            first = edge.step if scan == NO_SCAN else scan
            added[first] += flow.sum()

    # The flow that passes a cut is smaller than R by the flow that is only added later.
    passing = np.cumsum(changes)[:num_steps]
    added_later = np.cumsum(added[::-1])[::-1]
    by_step = passing + added_later
    return by_step.tolist()


class _Surplus(NamedTuple):
    """Describes how far a step is from conserving flow, divided by the largest flow of the network.

    total: output flow - input flow: a number, or one per iteration of the scans around the step. On
      the side, constants bring no input flow.
    constants: the largest input flow that comes from no parameter.
    largest: the largest of both, and of what a factor lacks.
    """

    total: Any
    constants: float
    largest: float

    @classmethod
    def of(cls, total: Any, constant: Any, lacks: Sequence[Any], scale: float) -> _Surplus:
        """Divides the flows of a step by the largest flow of the network."""
        from_constants = _largest(constant)
        from_factors = max(map(_largest, lacks), default=0.0)
        largest = max(_largest(total), from_constants, from_factors)
        return cls(total / scale, from_constants / scale, largest / scale)


def _surplus(program: Program, flows: _Flows) -> list[_Surplus]:
    """Compares the output flow of each step with its input flow."""
    num_steps = len(program.steps)
    # For each step a number, or an array with one number per iteration of the scans around it.
    incoming: list[Any] = [0.0] * num_steps
    outgoing: list[Any] = [0.0] * num_steps
    constants: list[Any] = [0.0] * num_steps  # input flow that comes from no parameter
    factors: list[list[Any]] = [[] for _ in range(num_steps)]
    for edge, flow in flows.by_edge:
        source, target = edge.producer, edge.step
        if source != BEGIN:
            outgoing[source] = outgoing[source] + flow
        if target == END:
            continue
        if edge.is_factor:
            factors[target].append(flow)
            continue
        incoming[target] = incoming[target] + flow
        if not (edge.is_data or edge.is_parameter):
            constants[target] = constants[target] + flow

    found = []
    scale = flows.scale
    parts = zip(program.steps, incoming, outgoing, constants, factors, strict=True)
    for step, flow_in, flow_out, constant, of_factors in parts:
        lacks = [flow_out - factor for factor in of_factors]
        total = flow_out - flow_in
        if step.side:
            # Of a product every operand is a factor.
            total = lacks[0] if lacks else total + constant
        surplus = _Surplus.of(total, constant, lacks, scale)
        found.append(surplus)
    return found


def _broken(program: Program, surplus: Sequence[_Surplus]) -> dict[str, float]:
    """Finds the steps whose output flow is not their input flow."""
    broken: dict[str, float] = {}
    for step, found in zip(program.steps, surplus, strict=True):
        # A scan itself is left out: the steps of its body tell more precisely where it breaks.
        if found.largest > _TOLERANCE and not step.is_scan:
            before = broken.get(step.name, 0.0)
            broken[step.name] = max(before, found.largest)
    return broken


def _unbalanced(program: Program, surplus: Sequence[_Surplus], *, has_cuts: bool) -> float:
    """Computes `Conservation.unbalanced`."""
    largest = 0.0
    by_side: dict[tuple[str, ...], float] = {}
    for step, found in zip(program.steps, surplus, strict=True):
        if step.is_scan:
            continue
        is_outside = step.scan == NO_SCAN
        if step.side and is_outside:
            total = float(np.sum(found.total))
            by_side[step.side] = by_side.get(step.side, 0.0) + total
        elif is_outside and has_cuts:
            # Cuts count what is added later, whatever it is.
            largest = max(largest, found.constants)
        else:
            largest = max(largest, found.largest)
    return max([largest, *map(abs, by_side.values())])


def _by_unit(groups: Sequence[Group], scores: Scores) -> dict[str, UnitResidual]:
    """Compares the flow into each hidden unit with the flow out of it (Theorem 1)."""
    from synflow_jax import units

    hidden = [group for group in groups if not group.is_input]
    reasons = {reason.cause for group in hidden for reason in group.fixed}
    # Batch statistics are constants here. Units that only meet constants can be compared, provided
    # that no step mixes units anywhere. Otherwise a unit may be added to a mixture of others.
    if reasons <= {units.Cause.MEETS_CONSTANT}:
        separate = hidden
    else:
        separate = [group for group in hidden if not group.fixed]
    audited = [group for group in separate if not group.is_output]

    residuals = {}
    for name, (incoming, outgoing) in units.unit_scores(audited, scores).items():
        largest = max(_largest(incoming), _largest(outgoing))
        difference = _largest(incoming - outgoing)
        residual = difference / largest if largest > 0 else 0.0
        residuals[name] = UnitResidual(incoming, outgoing, residual)
    return residuals


def _largest(array: Any) -> float:
    """Returns the largest absolute value of an array or a number; 0 for an empty array."""
    magnitudes = np.abs(array)
    return float(magnitudes.max(initial=0))
