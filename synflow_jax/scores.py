"""What a weight is worth: the objective R and its saliency, and the five rules of the paper.

A score function is called with the parameters, the mask so far and a key, and returns a score for every
prunable weight; larger = keep. The rules that differentiate do so at the masked parameters, and each is one
choice of R in the synaptic saliency S(theta) = dR/dtheta * theta (Eq. 1):

  SynFlow   R = 1^T (prod_l |theta_l|) 1, the l1 path norm (Eq. 4)
  SNIP      R = the loss, and the absolute value of its saliency (Lee et al. 2019)
  GraSP     R = <g, grad of the loss>, with g the gradient held constant (Wang et al. 2020)

The factories return `jax.tree_util.Partial`s: callables that are also trees, whose leaves are the batches.
A jitted function that takes a score function as an argument therefore sees new data without a new trace.
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
Objective = Callable[[Params], jax.Array]  # R(theta): parameters -> scalar
LossFn = Callable[[Params, Batch], jax.Array]  # parameters, batch -> the mean loss of its examples
ApplyFn = Callable[
    [Params, jax.Array], jax.Array
]  # parameters, inputs [batch, ...] -> outputs [batch, ...]
ScoreFn = Callable[
    [Params, Mask, chex.PRNGKey], Scores
]  # the protocol of every rule, and of a user's own


def as_partial(function: Callable[..., Any]) -> Partial:
    """The function as a `Partial`, that is as a tree, which jitted functions take as an argument.

    A `Partial` is returned as it is: wrapped once more it would lose its leaves, and be a constant of the program.
    """
    return function if isinstance(function, Partial) else Partial(function)


def saliency(objective: Objective, params: Params, mask: Mask) -> Scores:
    """Synaptic saliency, dR/dtheta * theta (Eq. 1), with dR/dtheta taken at the masked parameters.

    It is the derivative of R with respect to the mask; for a pruned weight it says what its return would change.

    Args:
      objective: R, differentiable, from the whole tree of parameters to a scalar.
      params: tree of float arrays, unmasked.
      mask: bool arrays beside the prunable parameters, holes elsewhere.

    Returns:
      Scores, of the shapes and dtypes of the prunable parameters. Their sum over a layer is the same for
      every layer that cuts the input of a bias-free network with homogeneous activations from its output
      (Theorem 2).

    >>> params = {"w1": jnp.array([[1.0, 2.0]]), "w2": jnp.array([[3.0], [4.0]])}
    >>> mask = jax.tree.map(lambda w: jnp.ones(w.shape, bool), params)
    >>> saliency(lambda p: jnp.sum(p["w1"] @ p["w2"]), params, mask)["w1"]
    Array([[3., 8.]], dtype=float32)
    """
    selected = select(apply_mask(params, mask), mask)
    gradient = jax.grad(lambda prunable: objective(merge(prunable, params)))(selected)
    return map_prunable(lambda _, g, theta: g * theta, mask, gradient, params)


def path_norm(apply_fn: ApplyFn, input_shape: Sequence[int]) -> Objective:
    """SynFlow's objective R_SF (Eq. 4): the sum of the outputs for an all-ones input under |parameters|.

    Args:
      apply_fn: `apply_fn(params, x)`, in evaluation mode.
      input_shape: the shape of one example, without the batch axis.

    >>> float(path_norm(lambda p, x: x @ p["w"], (2,))({"w": jnp.array([[1.0], [-2.0]])}))
    3.0
    """
    return Partial(_path_norm(tuple(input_shape)), as_partial(apply_fn))


@functools.lru_cache
def _path_norm(input_shape: tuple[int, ...]) -> Callable[..., jax.Array]:
    # Cached, so that jitted users find their trace again.
    def objective(apply_fn: ApplyFn, params: Params, input_scale: chex.Numeric = 1) -> jax.Array:
        dtype = jnp.result_type(*jax.tree.leaves(params))
        inputs = jnp.ones((1, *input_shape), dtype) * jnp.asarray(input_scale, dtype)
        return jnp.sum(apply_fn(jax.tree.map(jnp.abs, params), inputs))

    return objective


def synflow(apply_fn: ApplyFn, input_shape: Sequence[int], *, scaled: bool = True) -> ScoreFn:
    """Synaptic flow (Algorithm 1): the saliency of the l1 path norm. Needs no data, and is never negative.

    A pruned weight scores exactly 0. Use many iterations: the paper takes 100.

    Args:
      apply_fn: `apply_fn(params, x)`, in evaluation mode.
      input_shape: the shape of one example, without the batch axis.
      scaled: carries a power of two beside every value (`scaling.evaluate`), so that float32 reaches any depth. The
        scores of one call are then divided by one power of two, which changes no mask. False for the plain sums of
        products, of which Eq. 4 is one.

    >>> params = {"w1": jnp.array([[1.0, -2.0]]), "w2": jnp.array([[3.0], [4.0]])}
    >>> mask = jax.tree.map(lambda w: jnp.ones(w.shape, bool), params)
    >>> score_fn = synflow(lambda p, x: jax.nn.relu(x @ p["w1"]) @ p["w2"], input_shape=(1,), scaled=False)
    >>> score_fn(params, mask, jax.random.key(0))["w1"]
    Array([[3., 8.]], dtype=float32)
    """
    evaluate = scaling.evaluate if scaled else _plain
    return Partial(_synflow, Partial(evaluate, path_norm(apply_fn, input_shape)))


def _plain(objective: Callable[..., jax.Array], *args: Any) -> scaling.Scaled:
    return scaling.Scaled(objective(*args), jnp.int32(0))


def _synflow(
    evaluate: Callable[..., scaling.Scaled], params: Params, mask: Mask, key: chex.PRNGKey
) -> Scores:
    return _synflow_and_cut(evaluate, params, mask, key).scores


class Flow(NamedTuple):
    """SynFlow's scores and the flow that enters at the input, both to be multiplied by 2^exponent.

    The input's flow is dR/dx * x, the sum of |products| of weights over all paths from the input to the output. Every
    such path passes every cut of the network (a set of weights that parts input and output), so that a cut's
    total score is at least this: weights of a smaller total disconnect nothing (Theorem 3). Without biases it is R.

    scores: as every rule returns them; cut: []; exponent: int32 [].
    """

    scores: Scores
    cut: jax.Array
    exponent: jax.Array


FlowFn = Callable[[Params, Mask, chex.PRNGKey], Flow]


def with_cut(score_fn: ScoreFn) -> FlowFn | None:
    """For a score function of `synflow`, the one that returns its `Flow`; None for every other rule."""
    if isinstance(score_fn, Partial) and score_fn.func is _synflow:
        return Partial(_synflow_and_cut, *score_fn.args, **score_fn.keywords)
    return None


def unscaled(score_fn: ScoreFn, params: Params) -> tuple[str, ...]:
    """The steps of a scaled SynFlow's network that are evaluated at plain values, and so may overflow; else ()."""
    if with_cut(score_fn) is None or score_fn.args[0].func is not scaling.evaluate:  # type: ignore[attr-defined]
        return ()
    return scaling.unscaled(score_fn.args[0].args[0], params)  # type: ignore[attr-defined]


def _synflow_and_cut(
    evaluate: Callable[..., scaling.Scaled], params: Params, mask: Mask, key: chex.PRNGKey
) -> Flow:
    del key  # no data and no chance
    selected = select(apply_mask(params, mask), mask)
    input_scale = jnp.ones((), jnp.result_type(*jax.tree.leaves(params)))
    (gradient, cut), exponent = jax.grad(
        lambda prunable, scale: evaluate(merge(prunable, params), scale),
        argnums=(0, 1),
        has_aux=True,
    )(selected, input_scale)
    # A pruned weight scores 0 whatever its gradient is.
    scores = map_prunable(
        lambda m, g, theta: jnp.where(m, g * theta, jnp.zeros_like(theta)), mask, gradient, selected
    )
    return Flow(scores, cut, jnp.where(cut > 0, exponent, 0))


def snip(loss_fn: LossFn, batches: Sequence[Batch]) -> ScoreFn:
    """SNIP (Lee et al. 2019): |dL/dmask|, divided by its total over all prunable weights.

    Args:
      loss_fn: mean loss of a batch, in evaluation mode; see `cross_entropy`.
      batches: one batch or more, of any sizes; the losses of the batches are added.

    Raises:
      ValueError: there is no batch.
    """
    return Partial(_snip, as_partial(loss_fn), _stack(batches))


def _snip(
    loss_fn: LossFn, batches: list[Batch] | _Shares, params: Params, mask: Mask, key: chex.PRNGKey
) -> Scores:
    del key
    scores = _sum_over(
        batches, lambda batch: saliency(lambda theta: loss_fn(theta, batch), params, mask), params
    )
    scores = jax.tree.map(jnp.abs, scores)
    total = _by_itself(_total, params, scores)
    return jax.tree.map(lambda s: s / total, scores)


def grasp(loss_fn: LossFn, batches: Sequence[Batch]) -> ScoreFn:
    """GraSP (Wang et al. 2020): theta * Hg, divided by |its total| + 1e-10. May be negative; larger = keep.

    g is the gradient of the losses of all batches, held constant; H g is the gradient of <g, grad L>.

    Args:
      loss_fn: mean loss of a batch, in evaluation mode. The published rule divides the logits by 200:
        `cross_entropy(apply_fn, temperature=200)`.
      batches: one batch or more, of any sizes; the losses of the batches are added.

    Raises:
      ValueError: there is no batch.
    """
    return Partial(_grasp, as_partial(loss_fn), _stack(batches))


def _grasp(
    loss_fn: LossFn, batches: list[Batch] | _Shares, params: Params, mask: Mask, key: chex.PRNGKey
) -> Scores:
    del key
    masked = apply_mask(params, mask)

    def gradient(theta: Params, batch: Batch) -> Params:
        return jax.grad(lambda prunable: loss_fn(merge(prunable, theta), batch))(
            select(theta, mask)
        )

    g = _sum_over(batches, lambda batch: gradient(masked, batch), params)

    def objective(theta: Params, batch: Batch) -> jax.Array:
        products = jax.tree.map(lambda a, b: jnp.sum(a * b), g, gradient(theta, batch))
        return jax.tree.reduce(jnp.add, products)

    scores = _sum_over(
        batches, lambda batch: saliency(lambda theta: objective(theta, batch), params, mask), params
    )
    total = jnp.abs(_by_itself(_total, params, scores)) + 1e-10
    return jax.tree.map(lambda s: s / total, scores)


def magnitude() -> ScoreFn:
    """|theta|, of pruned weights too."""
    return Partial(_magnitude)


def _magnitude(params: Params, mask: Mask, key: chex.PRNGKey) -> Scores:
    del key
    return map_prunable(lambda _, theta: jnp.abs(theta), mask, params)


def random() -> ScoreFn:
    """Independent standard normal scores, drawn in float32 whatever the parameters are."""
    return Partial(_random)


def _random(params: Params, mask: Mask, key: chex.PRNGKey) -> Scores:
    leaves, structure = jax.tree.flatten(select(params, mask))
    keys = jax.random.split(key, len(leaves))
    draws = [
        jax.random.normal(k, leaf.shape, jnp.float32) for k, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, draws)


def inverted(score_fn: ScoreFn) -> ScoreFn:
    """The negative scores of a rule: what it would prune last goes first (Frankle et al. 2021).

    Scores of exactly 0, as those of dead units and of a collapsed network are, become positive ones below 2^-100 by
    chance: they go last, and not all at once as one tie.

    >>> inverted(magnitude())({"w": jnp.array([1.0, -2.0])}, {"w": jnp.ones(2, bool)}, jax.random.key(0))["w"]
    Array([-1., -2.], dtype=float32)
    """
    return Partial(_inverted, as_partial(score_fn))


def _inverted(score_fn: ScoreFn, params: Params, mask: Mask, key: chex.PRNGKey) -> Scores:
    leaves, structure = jax.tree.flatten(score_fn(params, mask, key))
    rows = zip(jax.random.split(jax.random.fold_in(key, 1), len(leaves)), leaves, strict=True)
    tiny = lambda k, leaf: jnp.exp2(
        -100 - 20 * jax.random.uniform(k, leaf.shape, jnp.float32)
    ).astype(leaf.dtype)
    return jax.tree.unflatten(
        structure, [jnp.where(leaf == 0, tiny(k, leaf), -leaf) for k, leaf in rows]
    )


def without_cut(score_fn: ScoreFn) -> ScoreFn:
    """The same scores without the cut of `with_cut`, for a network whose outputs no flow of paths is."""
    return Partial(_without_cut, as_partial(score_fn))


def _without_cut(score_fn: ScoreFn, params: Params, mask: Mask, key: chex.PRNGKey) -> Scores:
    return score_fn(params, mask, key)


def fixed(scores: Scores) -> ScoreFn:
    """Scores that are known already, for several masks of one ranking: a rule of one iteration looks at no mask.

    Args:
      scores: what every call returns; see `pruning.first_scores`.

    >>> fixed({"w": jnp.array([1.0, 2.0])})({"w": jnp.zeros(2)}, {"w": jnp.ones(2, bool)}, jax.random.key(0))["w"]
    Array([1., 2.], dtype=float32)
    """
    return Partial(_fixed, scores)


def _fixed(scores: Scores, params: Params, mask: Mask, key: chex.PRNGKey) -> Scores:
    del params, mask, key
    return scores


def cross_entropy(apply_fn: ApplyFn, temperature: float = 1.0) -> LossFn:
    """The mean softmax cross-entropy of a batch `(inputs [batch, ...], labels int [batch])`, logits / temperature.

    >>> loss_fn = cross_entropy(lambda p, x: x @ p)
    >>> float(loss_fn(jnp.zeros((3, 2)), (jnp.ones((5, 3)), jnp.array([0, 1, 0, 1, 1]))))
    0.6931471824645996
    """
    return Partial(_cross_entropy, as_partial(apply_fn), temperature)


def _cross_entropy(
    apply_fn: ApplyFn, temperature: chex.Numeric, params: Params, batch: Batch
) -> jax.Array:
    inputs, labels = batch
    logits = apply_fn(params, inputs)
    chex.assert_rank([logits, labels], [2, 1])
    log_probabilities = jax.nn.log_softmax(logits / jnp.asarray(temperature, logits.dtype))
    return -jnp.mean(jnp.take_along_axis(log_probabilities, labels[:, None], axis=1))


def _total(scores: Scores) -> jax.Array:
    return jax.tree.reduce(jnp.add, jax.tree.map(jnp.sum, scores))


def _stack(batches: Sequence[Batch]) -> list[Batch]:
    """Runs of batches of equal shapes, each stacked along a new leading axis: a scan needs one shape."""
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


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("groups", "num_batches"),
    meta_fields=("axis_name",),
)
@dataclasses.dataclass(frozen=True)
class _Shares:
    """Batches dealt out to the devices of an axis, round by round: batch i of a group to device i mod D.

    groups: of each group of `_stack`, [num_rounds, D, ...]; a device holds [num_rounds, 1, ...]. The last round is
      filled up with batches that are not counted.
    num_batches: int32 [num_groups].
    """

    groups: list[Batch]
    num_batches: Any
    axis_name: str


def over_devices(score_fn: ScoreFn, num_devices: int, axis_name: str) -> tuple[ScoreFn, Any]:
    """A score function for use inside of a shard_map, whose devices share the batches of SNIP and GraSP.

    Each device differentiates for its own batches; what they find is added in the order of the batches, as one device
    adds it, so that the scores are the same to the last bit, and all of them on every device. Other rules have nothing
    to share, and are returned as they are.

    Returns:
      The score function, and a tree of its structure that says which of its leaves are to be split, along their second
      axis: True, and False for what every device needs whole.
    """
    score_fn = as_partial(score_fn)
    if score_fn.func not in (_snip, _grasp):
        return score_fn, jax.tree.map(lambda _: False, score_fn)
    loss_fn, stacked = score_fn.args
    groups = [jax.tree.map(functools.partial(_deal, num_devices), group) for group in stacked]
    num_batches = jnp.array([jax.tree.leaves(group)[0].shape[0] for group in stacked], jnp.int32)
    split = _Shares(jax.tree.map(lambda _: True, groups), False, axis_name)
    return (
        Partial(score_fn.func, loss_fn, _Shares(groups, num_batches, axis_name)),
        Partial(score_fn.func, jax.tree.map(lambda _: False, loss_fn), split),
    )


def _deal(num_devices: int, leaf: jax.Array) -> jax.Array:
    num_more = -leaf.shape[0] % num_devices
    filled = jnp.concatenate([leaf, jnp.broadcast_to(leaf[:1], (num_more, *leaf.shape[1:]))])
    return filled.reshape(-1, num_devices, *leaf.shape[1:])


def _sum_over_devices(shares: _Shares, function: Callable[[Batch], Scores]) -> Scores:
    """`_sum_over` for batches of which each device has its own.

    Every device adds up one part of each leaf, in the order of the batches, and the parts are put together at the end:
    as much traffic as an all-reduce, which would add in an order of its own.
    """
    num_devices = jax.lax.axis_size(shares.axis_name)

    def part(leaf: jax.Array) -> jax.Array:
        """All devices' values of this device's part: [D, part]."""
        padded = jnp.pad(leaf.reshape(-1), (0, -leaf.size % num_devices)).reshape(num_devices, -1)
        return jax.lax.all_to_all(padded, shares.axis_name, 0, 0)

    def whole(part: jax.Array, like: jax.Array) -> jax.Array:
        return jax.lax.all_gather(part, shares.axis_name, tiled=True)[: like.size].reshape(
            like.shape
        )

    def add_round(
        num_batches: jax.Array, carry: tuple[Scores, jax.Array], batch: Batch
    ) -> tuple[Any, None]:
        total, num_added = carry
        values = jax.tree.map(part, function(jax.tree.map(lambda leaf: leaf[0], batch)))
        for i in range(num_devices):
            counts = num_added + i < num_batches
            total = jax.tree.map(
                lambda t, v, i=i, counts=counts: jnp.where(counts, t + v[i], t), total, values
            )
        return (total, num_added + num_devices), None

    example = jax.tree.map(lambda leaf: leaf[0, 0], shares.groups[0])
    like = jax.eval_shape(function, example)
    total = jax.tree.map(lambda leaf: jnp.zeros(-(-leaf.size // num_devices), leaf.dtype), like)
    for group, num_batches in zip(shares.groups, shares.num_batches, strict=True):
        (total, _), _ = jax.lax.scan(
            functools.partial(add_round, num_batches), (total, jnp.int32(0)), group
        )
    return jax.tree.map(whole, total, like)


def _by_itself(function: Callable[[Any], Any], probe: Params, argument: Any) -> Any:
    """`function(argument)` as a computation that the compiler cannot mix with what stands around it.

    XLA would round otherwise in each place (a product that is added at once becomes one fused operation; a sum goes in
    the order that suits what it follows), and scores would depend on which device computed them. What it cannot know at
    compile time is whether a parameter is NaN.
    """
    like = jax.eval_shape(function, argument)
    broken = lambda _: jax.tree.map(lambda leaf: jnp.full(leaf.shape, jnp.nan, leaf.dtype), like)
    return jax.lax.cond(
        jnp.isnan(jax.tree.leaves(probe)[0].reshape(-1)[0]), broken, function, argument
    )


def _sum_over(
    stacked: list[Batch] | _Shares, function: Callable[[Batch], Scores], probe: Params
) -> Scores:
    """The sum of `function(batch)` over all batches, one at a time, so that one batch's memory is enough.

    probe: parameters that the function takes.
    """
    function = functools.partial(_by_itself, function, probe)
    if isinstance(stacked, _Shares):
        return _sum_over_devices(stacked, function)

    def add(total: Scores, batch: Batch) -> tuple[Scores, None]:
        return jax.tree.map(jnp.add, total, function(batch)), None

    first = jax.tree.map(lambda leaf: leaf[0], stacked[0])
    total = function(first)
    for i, group in enumerate(stacked):
        rest = jax.tree.map(lambda leaf: leaf[1:], group) if i == 0 else group
        if jax.tree.leaves(rest)[0].shape[0]:
            total, _ = jax.lax.scan(add, total, rest)
    return total
