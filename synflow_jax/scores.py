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
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from synflow_jax.jaxprs import scaling
from synflow_jax.trees import Mask, Params, Scores, apply_mask, map_prunable, merge, select

Batch = Any  # a pytree of arrays with a leading axis of examples
ApplyFn = Callable[[Params, jax.Array], jax.Array]  # inputs [batch, ...] -> outputs [batch, ...]
LossFn = Callable[[Params, Batch], jax.Array]  # -> the mean loss of the examples, []
Objective = Callable[..., jax.Array]  # R(theta), []; that of a network also takes input_scale
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
    data_fields=("score", "batches", "flow", "objective"),
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
    """

    score: Callable[..., Scores]
    num_iterations: int = 100
    batches: list[Batch] | None = None
    flow: FlowFn | None = None
    objective: Objective | None = None

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
    is_factory = score_fn in (synflow, snip, grasp, magnitude, random, inverted, fixed)
    if not callable(score_fn) or is_factory:
        name = getattr(score_fn, "__name__", type(score_fn).__name__)
        raise ValueError(
            f"score_fn is {name!r}. It must be a rule such as scores.synflow(apply_fn, "
            "input_shape), or a function (params, mask, key) -> scores."
        )
    return Rule(_as_partial(score_fn))


def _with_partials(rule: Rule) -> Rule:
    """Makes the plain functions of a rule pytrees. A rule of this package stays as it is."""
    fields = {"score": rule.score, "flow": rule.flow, "objective": rule.objective}
    plain: dict[str, Any] = {
        name: _as_partial(function)
        for name, function in fields.items()
        if function is not None and not isinstance(function, Partial)
    }
    return dataclasses.replace(rule, **plain) if plain else rule


def _as_partial(function: Callable[..., Any]) -> Partial:
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

    >>> params = {"w1": jnp.array([[1.0, 2.0]]), "w2": jnp.array([[3.0], [4.0]])}
    >>> mask = jax.tree.map(lambda w: jnp.ones(w.shape, bool), params)
    >>> saliency(lambda p: jnp.sum(p["w1"] @ p["w2"]), params, mask)["w1"]
    Array([[3., 8.]], dtype=float32)
    """
    # Only the prunable leaves are differentiated: others may be integers or need no derivative.
    selected = select(apply_mask(params, mask), mask)
    gradient = jax.grad(lambda prunable: objective(merge(prunable, params)))(selected)
    # The factor is the unmasked weight, so that a pruned weight can score too.
    return map_prunable(lambda _, g, theta: g * theta, mask, gradient, params)


def path_norm(apply_fn: ApplyFn, input_shape: Sequence[int]) -> Objective:
    """Builds SynFlow's objective R_SF (Eq. 2): the sum of the outputs for an all-ones input.

    All parameters are replaced by their absolute values.

    Args:
      apply_fn: `apply_fn(params, x)`, in evaluation mode.
      input_shape: the shape of one example, without the batch axis.

    Raises:
      ValueError: `input_shape` is not a sequence.

    >>> float(path_norm(lambda p, x: x @ p["w"], (2,))({"w": jnp.array([[1.0], [-2.0]])}))
    3.0
    """
    if not isinstance(input_shape, Sequence):
        raise ValueError(
            f"input_shape={input_shape!r} must be the shape of one example, for instance (784,) or "
            "(32, 32, 3)."
        )
    return Partial(_path_norm(tuple(input_shape)), _as_partial(apply_fn))


@functools.lru_cache
def _path_norm(input_shape: tuple[int, ...]) -> Callable[..., jax.Array]:
    # Cached, so that jitted users of equal objectives share one trace.
    def objective(apply_fn: ApplyFn, params: Params, input_scale: chex.Numeric = 1) -> jax.Array:
        dtype = jnp.result_type(*jax.tree.leaves(params))
        # The derivative with respect to the scale is the flow at the input, which bounds every cut.
        scale = jnp.asarray(input_scale, dtype)
        inputs = jnp.ones((1, *input_shape), dtype) * scale
        outputs = apply_fn(jax.tree.map(jnp.abs, params), inputs)
        return jnp.sum(outputs)

    return objective


def cross_entropy(apply_fn: ApplyFn, temperature: float = 1.0) -> LossFn:
    """Builds the mean softmax cross-entropy of a batch, with logits divided by `temperature`.

    Args:
      apply_fn: `apply_fn(params, inputs) -> logits [batch, classes]`, in evaluation mode.
      temperature: positive.

    Returns:
      A function of parameters and a batch `(inputs [batch, ...], labels int [batch])`.

    >>> loss_fn = cross_entropy(lambda p, x: x @ p)
    >>> float(loss_fn(jnp.zeros((3, 2)), (jnp.ones((5, 3)), jnp.array([0, 1, 0, 1, 1]))))
    0.6931471824645996
    """
    return Partial(_cross_entropy, _as_partial(apply_fn), temperature)


def _cross_entropy(
    apply_fn: ApplyFn, temperature: chex.Numeric, params: Params, batch: Batch
) -> jax.Array:
    inputs, labels = batch
    logits = apply_fn(params, inputs)
    chex.assert_rank([logits, labels], [2, 1])
    # In the dtype of the logits: a Python float would be a float64 where 64-bit types are enabled.
    logits = logits / jnp.asarray(temperature, logits.dtype)
    log_probabilities = jax.nn.log_softmax(logits)
    of_labels = jnp.take_along_axis(log_probabilities, labels[:, None], axis=1)
    return -jnp.mean(of_labels)


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

    >>> params = {"w1": jnp.array([[1.0, -2.0]]), "w2": jnp.array([[3.0], [4.0]])}
    >>> mask = jax.tree.map(lambda w: jnp.ones(w.shape, bool), params)
    >>> apply_fn = lambda p, x: jax.nn.relu(x @ p["w1"]) @ p["w2"]
    >>> rule = synflow(apply_fn, input_shape=(1,), scaled=False)
    >>> rule(params, mask, jax.random.key(0))["w1"]
    Array([[3., 8.]], dtype=float32)
    """
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
    input_scale = jnp.ones((), jnp.result_type(*jax.tree.leaves(params)))
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
      ValueError: there is no batch.
    """
    score = Partial(_snip, _as_partial(loss_fn))
    return Rule(score, num_iterations=1, batches=stack_batches(batches))


def _snip(
    loss_fn: LossFn,
    sum_over_batches: SumOverBatches,
    params: Params,
    mask: Mask,
    key: chex.PRNGKey,
) -> Scores:
    del key

    def saliency_of(batch: Batch) -> Scores:
        return saliency(lambda theta: loss_fn(theta, batch), params, mask)

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
      ValueError: there is no batch.
    """
    score = Partial(_grasp, _as_partial(loss_fn))
    return Rule(score, num_iterations=1, batches=stack_batches(batches))


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
        loss = lambda prunable: loss_fn(merge(prunable, theta), batch)
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
    total = jnp.abs(isolated(_total, scores, params)) + 1e-10
    return jax.tree.map(lambda s: s / total, scores)


def _total(scores: Scores) -> jax.Array:
    return jax.tree.reduce(jnp.add, jax.tree.map(jnp.sum, scores))


def stack_batches(batches: Sequence[Batch]) -> list[Batch]:
    """Groups neighbouring batches of equal shapes, and stacks each group along a new first axis.

    A scan over batches needs one shape.

    Raises:
      ValueError: there is no batch.
    """
    batches = list(batches)
    if not batches:
        raise ValueError("batches is empty: a data-driven rule needs at least one batch.")
    groups: list[list[Batch]] = []
    for batch in batches:
        if groups and _shapes(groups[-1][0]) == _shapes(batch):
            groups[-1].append(batch)
        else:
            groups.append([batch])
    return [jax.tree.map(lambda *leaves: jnp.stack(leaves), *group) for group in groups]


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
    one is taken. It cannot know whether a parameter is NaN.
    """
    like = jax.eval_shape(function, argument)

    def broken(_: Any) -> Any:
        return jax.tree.map(lambda leaf: jnp.full(leaf.shape, jnp.nan, leaf.dtype), like)

    first_param = jax.tree.leaves(params)[0].reshape(-1)[0]
    return jax.lax.cond(jnp.isnan(first_param), broken, function, argument)


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
    return Rule(Partial(_inverted, rule), num_iterations=rule.num_iterations)


def _inverted(rule: Rule, params: Params, mask: Mask, key: chex.PRNGKey) -> Scores:
    leaves, structure = jax.tree.flatten(rule(params, mask, key))
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
