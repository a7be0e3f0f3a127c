"""Scores weights: an objective R, its synaptic saliency, and the rules of the paper.

A rule is called as `scores = rule(params, mask, key)` and returns a score for every prunable
weight; larger = keep. Rules that differentiate do so at the masked parameters. Each of them is one
choice of R in the synaptic saliency S(theta) = dR/dtheta * theta (Eq. 1):

  SynFlow   R = 1^T (prod_l |theta_l|) 1, the l1 path norm (Eq. 2)
  SNIP      R = the loss, and the absolute value of its saliency (Lee et al. 2019)
  GraSP     R = <g, grad of the loss>, with g the gradient held constant (Wang et al. 2020)

To add a rule, write a function `(params, mask, key) -> scores` and pass it to `pruning.prune`. Use
`Rule` to say more about it.

Rules are pytrees whose leaves are their batches. A jitted function that takes a rule as an argument
therefore sees new data without a new trace.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from synflow_jax import arguments, trees
from synflow_jax.jaxprs import precision, scaling
from synflow_jax.jaxprs.varying import vary_like
from synflow_jax.trees import Mask, Params, Scores, apply_mask, map_prunable, merge, select

Batch = Any  # a pytree of arrays with a leading axis of examples
ApplyFn = Callable[[Params, jax.Array], jax.Array]  # inputs [batch, ...] -> outputs [batch, ...]
LossFn = Callable[[Params, Batch], jax.Array]  # -> the mean loss of the examples, []
Objective = Callable[..., jax.Array]  # R(theta), []; that of a network also takes input_scale
BatchesCheck = Callable[[Params, list[Batch]], None]  # raises ValueError, on the host
ScoreFn = Callable[[Params, Mask, chex.PRNGKey], Scores]
# Adds up function(batch) over the batches of a rule. The parameters are those it closes over.
SumOverBatches = Callable[[Callable[[Batch], Scores], Params], Scores]


# What a rule is ----------------------------------------------------------------------------------


class Flow(NamedTuple):
    """SynFlow's scores and the flow that enters at the input.

    The flow at the input, dR/dx * x, is the sum of |products of weights| over all paths from the
    input to the output. A cut is a set of weights that separates input and output. Every path
    passes every cut, so the scores of a cut add up to at least this flow, and weights of a smaller
    total cannot disconnect the network (Theorem 3). Without biases the flow is R.

    scores: as every rule returns them. cut: [], the flow at the input. exponent: int32 []; scores,
    cut and total are to be multiplied by 2^exponent. total: [], R itself, which is equal to the cut
    in a network without biases whose flow is conserved. None if it is not known.
    """

    scores: Scores
    cut: jax.Array
    exponent: jax.Array
    total: jax.Array | None = None


FlowFn = Callable[[Params, Mask, chex.PRNGKey], Flow]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("score", "batches", "flow", "objective", "check"),
    meta_fields=("num_iterations",),
)
@dataclasses.dataclass(frozen=True, eq=False)  # by identity: `jax.jit(rule)` hashes it
class Rule:
    """Scores the weights of a network: `rule(params, mask, key) -> scores`.

    score: `score(params, mask, key)`. If the rule has batches, it is called as
      `score(sum_over_batches, params, mask, key)`, so that several devices can share the sum. A
      `jax.tree_util.Partial`, if it binds arrays.
    num_iterations: how often the rule is usually applied on the way to the final mask.
    batches: the data, from `stack_batches`; None for a rule without data.
    flow: returns the cut together with the scores. None for a rule whose scores are not positive
      and conserved, so that no cut bounds what may be pruned.
    objective: R, as a function of the parameters and of the number that all inputs are multiplied
      by, 1 by default. A rule with a flow needs it: before `certified.prune` begins, it follows the
      steps of R and refuses a network that does not conserve flow. Error messages name the steps of
      R that may overflow.
    check: `check(params, batches)` raises ValueError if the batches do not fit the network. `prune`
      calls it on the host, before any work.
    """

    score: Callable[..., Scores]
    num_iterations: int = 100
    batches: list[Batch] | None = None
    flow: FlowFn | None = None
    objective: Objective | None = None
    check: BatchesCheck | None = None

    def __call__(self, params: Params, mask: Mask, key: chex.PRNGKey) -> Scores:
        """Returns the scores, of the shapes of the prunable parameters."""
        if self.batches is None:
            return self.score(params, mask, key)
        sum_over_batches = functools.partial(sum_over, self.batches)
        return self.score(sum_over_batches, params, mask, key)


def as_rule(score_fn: ScoreFn) -> Rule:
    """Turns a function `(params, mask, key) -> scores` into a `Rule`; a rule stays as it is.

    Raises:
      ValueError: `score_fn` is not a function, or makes rules instead of being one.
    """
    if isinstance(score_fn, Rule):
        return _with_partials(score_fn)
    factories = (synflow, snip, grasp, magnitude, random, inverted, fixed)
    is_factory = any(score_fn is factory for factory in factories)
    if not callable(score_fn) or is_factory:
        name = getattr(score_fn, "__name__", type(score_fn).__name__)
        raise ValueError(
            f"score_fn is {name!r}. It must be a rule such as scores.synflow(apply_fn, "
            "input_shape), or a function (params, mask, key) -> scores."
        )
    arguments.check_function(
        "score_fn", score_fn, ("params", "mask", "key"), "scores.synflow(apply_fn, input_shape)"
    )
    return Rule(as_partial(score_fn))


def _with_partials(rule: Rule) -> Rule:
    """Makes the plain functions of a rule pytrees. A rule of this package stays as it is."""
    fields = {
        "score": rule.score,
        "flow": rule.flow,
        "objective": rule.objective,
        "check": rule.check,
    }
    plain: dict[str, Any] = {
        name: as_partial(function)
        for name, function in fields.items()
        if function is not None and not isinstance(function, Partial)
    }
    return dataclasses.replace(rule, **plain) if plain else rule


def as_partial(function: Callable[..., Any]) -> Partial:
    """Makes a function a pytree, which jitted functions take as an argument."""
    # Wrapped once more, a Partial would lose its leaves and become a constant of the program.
    return function if isinstance(function, Partial) else Partial(function)


# Saliency and objectives -------------------------------------------------------------------------


def saliency(objective: Objective, params: Params, mask: Mask) -> Scores:
    """Computes the synaptic saliency dR/dtheta * theta (Eq. 1), at the masked parameters.

    This is the derivative of R with respect to the mask. For a pruned weight it says how R would
    change if the weight returned.

    Args:
      objective: R, differentiable, from the whole tree of parameters to a scalar.
      params: tree of float arrays, unmasked.
      mask: bool arrays at the prunable parameters, holes elsewhere.

    Returns:
      Scores, of the shapes and dtypes of the prunable parameters. In a network without biases and
      with homogeneous activations, every layer that separates input and output has the same total
      (Theorem 2).

    Raises:
      ValueError: the mask does not fit, or `objective` returns no float scalar.

    >>> params = {"w1": jnp.array([[1.0, 2.0]]), "w2": jnp.array([[3.0], [4.0]])}
    >>> mask = jax.tree.map(lambda w: jnp.ones(w.shape, bool), params)
    >>> saliency(lambda p: jnp.sum(p["w1"] @ p["w2"]), params, mask)["w1"]
    Array([[3., 8.]], dtype=float32)
    """
    arguments.check_function("objective", objective, ("params",), "path_norm(apply_fn, (784,))")
    trees.check_mask(mask, params)
    trees.check_params(params, mask)

    def scalar(prunable: Params) -> jax.Array:
        value = objective(merge(prunable, params))
        _check_scalar("objective", value)
        return value

    # Only the prunable leaves are differentiated: others may be integers or need no derivative.
    selected = select(apply_mask(params, mask), mask)
    gradient = jax.grad(scalar)(selected)
    # The factor is the unmasked weight, so that a pruned weight can score too.
    return map_prunable(lambda _, g, theta: g * theta, mask, gradient, params)


def path_norm(apply_fn: ApplyFn, input_shape: Sequence[int]) -> Objective:
    """Builds SynFlow's objective R_SF (Eq. 2): the sum of the outputs for an all-ones input.

    All floats of the parameters are replaced by their absolute values, and running means by 0.

    Args:
      apply_fn: `apply_fn(params, x)`, in evaluation mode.
      input_shape: the shape of one example, without the batch axis.

    Raises:
      ValueError: `apply_fn` is not a function of two arguments, or `input_shape` is not a shape.
        When it is called: `apply_fn` fails for inputs of this shape, or returns no float array.

    >>> float(path_norm(lambda p, x: x @ p["w"], (2,))({"w": jnp.array([[1.0], [-2.0]])}))
    3.0
    """
    check_apply_fn(apply_fn)
    shape = arguments.check_input_shape(input_shape)
    return Partial(_PathNorm(shape), as_partial(apply_fn))


@dataclasses.dataclass(frozen=True)
class _PathNorm:
    """Evaluates R for inputs of one shape.

    By equality, so that jitted users of equal objectives share one trace. A closure over the shape
    could not be pickled.
    """

    input_shape: tuple[int, ...]

    def __call__(
        self, apply_fn: ApplyFn, params: Params, input_scale: chex.Numeric = 1
    ) -> jax.Array:
        """Returns R, times the scale of the input. `path_norm` binds `apply_fn`."""
        dtype = trees.float_type(params)
        # The derivative with respect to the scale is the flow at the input, which bounds every cut.
        scale = jnp.asarray(input_scale, dtype)
        inputs = jnp.ones((1, *self.input_shape), dtype) * scale
        # A mean that is subtracted would make negative flow.
        positive = trees.without_means(trees.absolute(params))
        outputs = fed_with_ones(apply_fn, self.input_shape)(positive, inputs)
        check_outputs(outputs)
        return jnp.sum(outputs)


def cross_entropy(apply_fn: ApplyFn, temperature: float = 1.0) -> LossFn:
    """Builds the mean softmax cross-entropy of a batch, with logits divided by `temperature`.

    Args:
      apply_fn: `apply_fn(params, inputs) -> logits [batch, classes]`, in evaluation mode.
      temperature: positive.

    Returns:
      A function of parameters and a batch `(inputs [batch, ...], labels int [batch])`.

    Raises:
      ValueError: `apply_fn` is not a function of two arguments, or `temperature` is not a positive
        number. When it is called: the batch is not such a pair, or logits and labels do not fit.

    >>> loss_fn = cross_entropy(lambda p, x: x @ p)
    >>> float(loss_fn(jnp.zeros((3, 2)), (jnp.ones((5, 3)), jnp.array([0, 1, 0, 1, 1]))))
    0.6931471824645996
    """
    check_apply_fn(apply_fn)
    # A value that is traced cannot be read.
    if not isinstance(temperature, jax.core.Tracer):
        # A scalar array becomes a number; a float has no `item`.
        is_scalar = jnp.shape(temperature) == () and hasattr(temperature, "dtype")
        number = np.asarray(temperature).item() if is_scalar else temperature
        if not 0 < arguments.check_number("temperature", number, "200") < math.inf:
            raise ValueError(
                f"temperature={number!r} must be above 0 and finite: logits are divided by it."
            )
    return Partial(_cross_entropy, as_partial(apply_fn), temperature)


def _cross_entropy(
    apply_fn: ApplyFn, temperature: chex.Numeric, params: Params, batch: Batch
) -> jax.Array:
    inputs, labels = _inputs_and_labels(batch)
    logits = _call(apply_fn, params, inputs, "the inputs of batches", _BATCH_CURE)
    _check_logits(logits, labels)
    # In the dtype of the logits: a Python float would be a float64 where 64-bit types are enabled.
    logits = logits / jnp.asarray(temperature, logits.dtype)
    log_probabilities = jax.nn.log_softmax(logits)
    of_labels = jnp.take_along_axis(log_probabilities, labels[:, None], axis=1)
    return -jnp.mean(of_labels)


# Checks of a network -----------------------------------------------------------------------------


def check_apply_fn(apply_fn: Any) -> None:
    """Raises ValueError unless `apply_fn` can be called as `apply_fn(params, x)`."""
    arguments.check_function("apply_fn", apply_fn, ("params", "x"), "model.apply")


def fed_with_ones(apply_fn: ApplyFn, input_shape: Sequence[int]) -> ApplyFn:
    """Wraps a network so that its errors name the input that it was fed with, and `input_shape`."""
    source = f"an array of ones made for input_shape={tuple(input_shape)}"
    return functools.partial(_call, apply_fn, source=source, cure=_SHAPE_CURE)


_SHAPE_CURE = "Check that input_shape is the shape of one example, without the batch axis."
_INTEGER_CURE = (
    "SynFlow needs inputs of floats, and not the integer inputs of an embedding. Score the network "
    "from the embedding on: input_shape is the shape of one embedded example, and apply_fn takes "
    "it in place of the integers."
)
_BATCH_CURE = "Check that inputs are [batch, ...], as the network takes them."


def _call(apply_fn: ApplyFn, params: Params, inputs: Any, source: str, cure: str) -> Any:
    """Evaluates a network, with errors that say which inputs it got and why."""
    try:
        return apply_fn(params, inputs)
    except (FloatingPointError, MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        text = str(error)
        if cure == _SHAPE_CURE and "integer" in text.lower():
            cure = _INTEGER_CURE
        raise ValueError(
            f"apply_fn(params, x) failed for x = {arguments.describe(inputs)}, {source}. {cure} "
            f"{type(error).__name__}: {text}"
        ) from error


def check_outputs(outputs: Any) -> None:
    """Raises ValueError unless a network returned one array of floats."""
    if isinstance(outputs, tuple | list | Mapping):
        items = outputs.items() if isinstance(outputs, Mapping) else enumerate(outputs)
        # After features, and before a state that is no array.
        places = [place for place, value in items if trees.is_float(value)]
        logits = repr(places[-1]) if places else "..."
        raise ValueError(
            f"apply_fn returned {arguments.describe(outputs)}, and must return one array. Pick "
            f"the logits: lambda params, x: apply_fn(params, x)[{logits}]."
        )
    if not trees.is_float(outputs):
        raise ValueError(
            f"apply_fn returned {arguments.describe(outputs)}, and must return an array of floats, "
            "such as logits: scores are derivatives of it."
        )


def _check_scalar(name: str, value: Any) -> None:
    """Raises ValueError unless a function returned one float."""
    if not trees.is_float(value) or jnp.shape(value) != ():
        raise ValueError(
            f"{name} returned {arguments.describe(value)}, and must return one float: a mean or a "
            "sum over examples and outputs."
        )


def _inputs_and_labels(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Returns the parts of a batch."""
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise ValueError(
            f"batches holds {arguments.describe(batch)}, and cross_entropy needs pairs "
            "(inputs, labels). One batch alone is batches=[(inputs, labels)]."
        )
    inputs, labels = batch
    return inputs, labels


def _check_logits(logits: Any, labels: Any) -> None:
    """Raises ValueError unless there is one whole label for each row of logits."""
    check_outputs(logits)
    if logits.ndim != 2:
        raise ValueError(
            f"apply_fn returned {arguments.describe(logits)}, and cross_entropy needs logits "
            "[batch, classes]."
        )
    is_whole = jnp.issubdtype(jnp.result_type(labels), jnp.integer)
    if jnp.ndim(labels) != 1 or not is_whole:
        raise ValueError(
            f"labels of batches are {arguments.describe(labels)}, and must be whole numbers, one "
            "for each example. Of one-hot labels take jnp.argmax(labels, axis=-1)."
        )
    if len(labels) != len(logits):
        raise ValueError(
            f"labels of batches are {arguments.describe(labels)}, and the network returned "
            f"{arguments.describe(logits)}. There must be one label for each example."
        )


# Keyed by the structure of `apply_fn`, so that a network is traced once for all batches.
@jax.jit
def _outputs_of(apply_fn: ApplyFn, params: Params, inputs: jax.Array) -> Any:
    return _call(apply_fn, params, inputs, "the inputs of batches", _BATCH_CURE)


def _check_labels(apply_fn: ApplyFn, params: Params, batches: list[Batch]) -> None:
    """Raises ValueError if a label is no class of the network. Reads the labels on the host."""
    for group in batches:
        # Without the axis along which the batches of a group are stacked.
        batch = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), group)
        inputs, labels = _inputs_and_labels(batch)
        logits = _outputs_of.eval_shape(apply_fn, params, inputs)
        _check_logits(logits, labels)
        _, all_labels = group
        # Values that are traced cannot be read.
        if isinstance(all_labels, jax.core.Tracer):
            continue
        values = jax.device_get(all_labels)
        num_classes = logits.shape[1]
        is_class = (values >= 0) & (values < num_classes)
        if not is_class.all():
            raise ValueError(
                f"labels of batches hold {values[~is_class][0]}, and the network has "
                f"{num_classes} outputs. Labels must be between 0 and {num_classes - 1}."
            )


# SynFlow -----------------------------------------------------------------------------------------


def synflow(apply_fn: ApplyFn, input_shape: Sequence[int], *, scaled: bool = True) -> Rule:
    """Ranks weights by synaptic flow (Algorithm 1): the saliency of the l1 path norm (Eq. 2).

    Needs no data. Scores are never negative, and a pruned weight scores exactly 0.

    Args:
      apply_fn: `apply_fn(params, x)`, in evaluation mode.
      input_shape: the shape of one example, without the batch axis.
      scaled: carries a power of two next to every value (`jaxprs.scaling`), so that float32 reaches
        any depth. The scores of one call are then divided by one power of two, which changes no
        mask. False computes the plain sums of products of Eq. 2.

    Raises:
      ValueError: as `path_norm`, or `scaled` is not a bool.

    >>> params = {"w1": jnp.array([[1.0, -2.0]]), "w2": jnp.array([[3.0], [4.0]])}
    >>> mask = jax.tree.map(lambda w: jnp.ones(w.shape, bool), params)
    >>> apply_fn = lambda p, x: jax.nn.relu(x @ p["w1"]) @ p["w2"]
    >>> rule = synflow(apply_fn, input_shape=(1,), scaled=False)
    >>> rule(params, mask, jax.random.key(0))["w1"]
    Array([[3., 8.]], dtype=float32)
    """
    arguments.check_flag("scaled", scaled)
    objective = path_norm(apply_fn, input_shape)
    evaluate = Partial(scaling.evaluate if scaled else _evaluate_plainly, objective)
    return Rule(
        Partial(_synflow, evaluate),
        num_iterations=100,
        flow=Partial(_flow, evaluate),
        objective=objective,
    )


def _evaluate_plainly(objective: Callable[..., jax.Array], *args: Any) -> scaling.Scaled:
    """Stands in for `scaling.evaluate` where nothing is scaled."""
    return scaling.Scaled(objective(*args), jnp.int32(0))


def _synflow(
    evaluate: Callable[..., scaling.Scaled], params: Params, mask: Mask, key: chex.PRNGKey
) -> Scores:
    return _flow(evaluate, params, mask, key).scores


def _flow(
    evaluate: Callable[..., scaling.Scaled], params: Params, mask: Mask, key: chex.PRNGKey
) -> Flow:
    """Differentiates R with respect to the masked weights and to the scale of the input."""
    del key  # no data and no randomness

    def objective(prunable: Params, input_scale: jax.Array) -> scaling.Scaled:
        return evaluate(merge(prunable, params), input_scale)

    selected = select(apply_mask(params, mask), mask)
    input_scale = jnp.ones((), trees.float_type(params))
    differentiate = jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)
    (total, exponent), (gradient, cut) = differentiate(selected, input_scale)

    # A pruned weight scores 0, even if its gradient is infinite and the product would be NaN.
    scores = map_prunable(
        lambda m, g, theta: jnp.where(m, g * theta, jnp.zeros_like(theta)),
        mask,
        gradient,
        selected,
    )
    return Flow(scores, cut, jnp.where(cut > 0, exponent, 0), total)


# Rules that look at data -------------------------------------------------------------------------


def snip(loss_fn: LossFn, batches: Sequence[Batch]) -> Rule:
    """Ranks weights by SNIP (Lee et al. 2019): |dL/dmask|, divided by its total over all weights.

    Args:
      loss_fn: the mean loss of a batch, in evaluation mode; see `cross_entropy`.
      batches: one batch or more, of any sizes. The losses of the batches are added.

    Raises:
      ValueError: `loss_fn` is not a function of two arguments, or there is no batch.
    """
    return _rule_of_loss(_snip, loss_fn, batches)


def _rule_of_loss(score: Callable[..., Scores], loss_fn: LossFn, batches: Iterable[Batch]) -> Rule:
    arguments.check_function(
        "loss_fn", loss_fn, ("params", "batch"), "scores.cross_entropy(apply_fn)"
    )
    loss_fn = as_partial(loss_fn)
    # What the batches of another loss may hold is not known.
    has_labels = loss_fn.func is _cross_entropy and len(loss_fn.args) == 2
    return Rule(
        Partial(score, loss_fn),
        num_iterations=1,
        batches=stack_batches(batches),
        check=Partial(_check_labels, loss_fn.args[0]) if has_labels else None,
    )


def _snip(
    loss_fn: LossFn,
    sum_over_batches: SumOverBatches,
    params: Params,
    mask: Mask,
    key: chex.PRNGKey,
) -> Scores:
    del key

    def saliency_of(batch: Batch) -> Scores:
        def loss(theta: Params) -> jax.Array:
            value = loss_fn(theta, batch)
            _check_scalar("loss_fn", value)
            return value

        return saliency(loss, params, mask)

    scores = jax.tree.map(jnp.abs, sum_over_batches(saliency_of, params))
    total = isolated(_total, scores, params)
    return jax.tree.map(lambda s: s / total, scores)


def grasp(loss_fn: LossFn, batches: Sequence[Batch]) -> Rule:
    """Ranks weights by GraSP (Wang et al. 2020): theta * Hg, divided by |its total| + 1e-10.

    g is the gradient of the losses of all batches, held constant. H g is the gradient of
    <g, grad L>. Scores may be negative; larger = keep.

    Args:
      loss_fn: the mean loss of a batch, in evaluation mode. The published rule divides the logits
        by 200: `cross_entropy(apply_fn, temperature=200)`.
      batches: one batch or more, of any sizes. The losses of the batches are added.

    Raises:
      ValueError: `loss_fn` is not a function of two arguments, or there is no batch.
    """
    return _rule_of_loss(_grasp, loss_fn, batches)


def _grasp(
    loss_fn: LossFn,
    sum_over_batches: SumOverBatches,
    params: Params,
    mask: Mask,
    key: chex.PRNGKey,
) -> Scores:
    del key
    masked = apply_mask(params, mask)

    def gradient(theta: Params, batch: Batch) -> Params:
        def loss(prunable: Params) -> jax.Array:
            value = loss_fn(merge(prunable, theta), batch)
            _check_scalar("loss_fn", value)
            return value

        return jax.grad(loss)(select(theta, mask))

    # First pass over the batches: g. It is a constant of the second pass, which differentiates
    # <g, grad L>; JAX computes that as a Hessian-vector product.
    g = sum_over_batches(lambda batch: gradient(masked, batch), params)

    def objective(theta: Params, batch: Batch) -> jax.Array:
        products = jax.tree.map(lambda a, b: jnp.sum(a * b), g, gradient(theta, batch))
        return jax.tree.reduce(jnp.add, products)

    def saliency_of(batch: Batch) -> Scores:
        return saliency(lambda theta: objective(theta, batch), params, mask)

    scores = sum_over_batches(saliency_of, params)
    total = jnp.abs(isolated(_total, scores, params))
    # In float16 the constant would be 0.
    total = total.astype(precision.wider(total.dtype, np.dtype(np.float32))) + 1e-10
    return jax.tree.map(lambda s: s.astype(total.dtype) / total, scores)


def _total(scores: Scores) -> jax.Array:
    return jax.tree.reduce(jnp.add, jax.tree.map(jnp.sum, scores))


def stack_batches(batches: Iterable[Batch]) -> list[Batch]:
    """Groups neighbouring batches of equal shapes, and stacks each group along a new first axis.

    A scan over batches needs one shape.

    Raises:
      ValueError: there is no batch, or one that holds no example; or `batches` is one batch in
        place of a list.
    """
    if isinstance(batches, Mapping) or hasattr(batches, "shape") or not _is_iterable(batches):
        raise ValueError(
            f"batches={arguments.describe(batches)} must be a list of batches. One batch alone is "
            "batches=[batch]."
        )
    batches = list(batches)
    if not batches:
        raise ValueError("batches is empty: a data-driven rule needs at least one batch.")
    _check_batches(batches)
    groups: list[list[Batch]] = []
    for batch in batches:
        if groups and _shapes(groups[-1][0]) == _shapes(batch):
            groups[-1].append(batch)
        else:
            groups.append([batch])
    return [jax.tree.map(lambda *leaves: jnp.stack(leaves), *group) for group in groups]


def _is_iterable(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, str)


def _check_batches(batches: Sequence[Batch]) -> None:
    """Raises ValueError unless every batch holds arrays with examples."""
    for i, batch in enumerate(batches):
        leaves = jax.tree.leaves(batch)
        are_arrays = all(_is_array(leaf) for leaf in leaves)
        if not leaves or not are_arrays:
            raise ValueError(
                f"batches[{i}]={arguments.describe(batch)} must hold arrays of numbers, for "
                "instance (inputs, labels)."
            )
        if any(jnp.ndim(leaf) and not len(leaf) for leaf in leaves):
            raise ValueError(
                f"batches[{i}]={arguments.describe(batch)} holds no example. Leave it out."
            )
    # Inputs and labels of the same examples, which a loss would take for two batches.
    are_bare = all(_is_array(batch) and jnp.ndim(batch) for batch in batches)
    if are_bare and len(batches) > 1:
        kinds = {(jnp.ndim(batch), jnp.result_type(batch)) for batch in batches}
        lengths = {len(batch) for batch in batches}
        if len(kinds) > 1 and len(lengths) == 1:
            raise ValueError(
                f"batches={arguments.describe(tuple(batches))} looks like one batch. Pass a list "
                "of batches: [(inputs, labels)]."
            )


def _is_array(leaf: Any) -> bool:
    """Returns whether JAX can stack a leaf."""
    if hasattr(leaf, "dtype") and hasattr(leaf, "shape"):
        return not isinstance(leaf, np.ndarray) or leaf.dtype.kind in "biufcV"
    return isinstance(leaf, bool | int | float | complex)


def _shapes(batch: Batch) -> Any:
    leaves, structure = jax.tree.flatten(batch)
    return structure, [(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves]


def sum_over(groups: list[Batch], function: Callable[[Batch], Scores], params: Params) -> Scores:
    """Adds up `function(batch)` over all batches, one at a time: memory for one is enough.

    Args:
      groups: from `stack_batches`.
      function: from a batch to scores.
      params: the parameters that `function` closes over; see `isolated`.
    """

    def term(batch: Batch) -> Scores:
        return isolated(function, batch, params)

    def add(total: Scores, batch: Batch) -> tuple[Scores, None]:
        return jax.tree.map(jnp.add, total, term(batch)), None

    # The sum starts from the first term, not from 0: its dtypes and shapes need not be guessed.
    first = jax.tree.map(lambda leaf: leaf[0], groups[0])
    total = term(first)
    for i, group in enumerate(groups):
        rest = jax.tree.map(lambda leaf: leaf[1:], group) if i == 0 else group
        if jax.tree.leaves(rest)[0].shape[0]:
            total, _ = jax.lax.scan(add, total, rest)
    return total


def isolated(function: Callable[[Any], Any], argument: Any, params: Params) -> Any:
    """Computes `function(argument)` so that the compiler cannot mix it with its surroundings.

    XLA rounds differently in different surroundings: a product that is added at once becomes one
    fused operation, and a sum runs in the order that suits its neighbours. Scores would then depend
    on which device computed them. A branch stops that, as long as the compiler cannot know which
    one is taken. It cannot know whether a parameter has an odd value that no parameter has.
    """
    like = jax.eval_shape(function, argument)

    def broken(_: Any) -> Any:
        blank = jax.tree.map(lambda leaf: jnp.full(leaf.shape, jnp.nan, leaf.dtype), like)
        return vary_like(blank, like)

    floats = [leaf for leaf in jax.tree.leaves(params) if trees.is_float(leaf) and jnp.size(leaf)]
    if not floats:
        return function(argument)
    first_param = jnp.asarray(floats[0]).reshape(-1)[0]
    # Not NaN, infinite or the lowest number: parameters that are not used may be that.
    odd_value = jnp.asarray(0.7 * float(jnp.finfo(first_param.dtype).min), first_param.dtype)
    return jax.lax.cond(first_param == odd_value, broken, function, argument)


# Rules without data ------------------------------------------------------------------------------


def magnitude() -> Rule:
    """Ranks weights by |theta|. Pruned weights have scores too."""
    return Rule(Partial(_magnitude), num_iterations=1)


def _magnitude(params: Params, mask: Mask, key: chex.PRNGKey) -> Scores:
    del key
    return map_prunable(lambda _, theta: jnp.abs(theta), mask, params)


def random() -> Rule:
    """Ranks weights by independent standard normal numbers, drawn in float32 for any dtype."""
    return Rule(Partial(_random), num_iterations=1)


def _random(params: Params, mask: Mask, key: chex.PRNGKey) -> Scores:
    # In float32 always, so that a seed gives one mask whatever the scores are ranked in.
    leaves, structure = jax.tree.flatten(select(params, mask))
    keys = jax.random.split(key, len(leaves))
    draws = []
    for leaf_key, leaf in zip(keys, leaves, strict=True):
        draws.append(jax.random.normal(leaf_key, leaf.shape, jnp.float32))
    return jax.tree.unflatten(structure, draws)


# Rules made of other rules -----------------------------------------------------------------------


def inverted(score_fn: ScoreFn) -> Rule:
    """Negates the scores of a rule: its best weights are pruned first (Frankle et al. 2021).

    Dead units and collapsed networks have scores of exactly 0. Those become random positive scores
    below 2^-100, so that such weights are pruned last, and not all at once as one tie.

    >>> params, mask = {"w": jnp.array([1.0, -2.0])}, {"w": jnp.ones(2, bool)}
    >>> inverted(magnitude())(params, mask, jax.random.key(0))["w"]
    Array([-1., -2.], dtype=float32)
    """
    rule = as_rule(score_fn)
    score = Partial(_inverted, rule.score)
    return Rule(score, rule.num_iterations, batches=rule.batches, check=rule.check)


def _inverted(score: Callable[..., Scores], *args: Any) -> Scores:
    """Calls the score function of a rule, with or without its batches, and negates its scores."""
    *_, key = args
    leaves, structure = jax.tree.flatten(score(*args))
    # Folded, since a random rule has used the key itself.
    keys = jax.random.split(jax.random.fold_in(key, 1), len(leaves))
    negated = []
    for leaf_key, leaf in zip(keys, leaves, strict=True):
        exponents = -100 - 20 * jax.random.uniform(leaf_key, leaf.shape, jnp.float32)
        tiny = jnp.exp2(exponents).astype(leaf.dtype)
        negated.append(jnp.where(leaf == 0, tiny, -leaf))
    return jax.tree.unflatten(structure, negated)


def fixed(scores: Scores) -> Rule:
    """Returns the given scores at every call, to make several masks from one ranking.

    Args:
      scores: from `pruning.first_scores`, for instance.

    >>> rule = fixed({"w": jnp.array([1.0, 2.0])})
    >>> rule({"w": jnp.zeros(2)}, {"w": jnp.ones(2, bool)}, jax.random.key(0))["w"]
    Array([1., 2.], dtype=float32)
    """
    return Rule(Partial(_fixed, scores), num_iterations=1)


def _fixed(scores: Scores, params: Params, mask: Mask, key: chex.PRNGKey) -> Scores:
    del params, mask, key
    return scores
