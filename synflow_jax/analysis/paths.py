"""What a mask has done: paths left, the maximal compression, collapse, the work that is left.

A network has collapsed when no path of kept weights leads from its input to its output. An empty layer is
neither necessary nor sufficient: residual networks live on without their shortcut convolutions. Biases make
output without input, so they count as 0 in everything here that asks for paths.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from synflow_jax import pruning, scores, trees
from synflow_jax.jaxprs import scaling
from synflow_jax.scores import ApplyFn, Objective, ScoreFn, path_norm
from synflow_jax.trees import Mask, Params


def log10_path_norm(
    apply_fn: ApplyFn, input_shape: Sequence[int], params: Params, mask: Mask
) -> float:
    """log10 of SynFlow's objective (Eq. 4) of the masked network; -inf where it is 0.

    Args:
      apply_fn: `apply_fn(params, x)`, in evaluation mode.
      input_shape: of one example, without the batch axis.
      params: tree of float arrays.
      mask: bool arrays beside the prunable parameters, holes elsewhere.

    Returns:
      A float, which may be far above what float32 or float64 could hold: the path norm itself is never formed.
    """
    return _log10_norm(apply_fn, input_shape, trees.apply_mask(params, mask))


def collapsed(apply_fn: ApplyFn, input_shape: Sequence[int], params: Params, mask: Mask) -> bool:
    """Whether no path of kept, nonzero weights leads from the input to the output. Arguments as `log10_path_norm`."""
    return (
        _log10_norm(apply_fn, input_shape, trees.without_biases(trees.apply_mask(params, mask)))
        == -math.inf
    )


def max_compression(
    apply_fn: ApplyFn, input_shape: Sequence[int], mask: Mask, params: Params
) -> float:
    """The largest compression that leaves a path: total / `shortest_path`, N / L on a chain (Section 3)."""
    return sum(trees.sizes(mask)) / max(1, shortest_path(apply_fn, input_shape, mask, params))


def shortest_path(apply_fn: ApplyFn, input_shape: Sequence[int], mask: Mask, params: Params) -> int:
    """How many prunable weights the shortest path from input to output holds; L for a chain of L layers.

    With every prunable weight equal to t, the path norm R(t) is a polynomial in t whose lowest power is that
    length: R(t) / R(t / 2) tends to 2^length as t goes to 0.

    Args:
      apply_fn, input_shape: as `log10_path_norm`.
      mask: says which parameters are prunable; its values do not matter.
      params: only the parameters that are not prunable matter, and the shapes.

    Raises:
      ValueError: no path at all, or a network that no float64 resolves (a chain of hundreds of layers beside
        shorter paths).
    """
    params = trees.without_biases(params)
    objective = path_norm(apply_fn, input_shape)

    def norm(t: float) -> Params:
        # Divided by the fan-in, so that what flows through a layer stays near t whatever its size.
        weights = trees.map_prunable(
            lambda m, w: jnp.full_like(w, t / max(1, w.size // w.shape[-1])), mask, params
        )
        return trees.merge(weights, params)

    for evaluate in (_evaluate, _evaluate_in_float64):
        for t in (2.0**-17, 2.0**-8, 2.0**-3):
            larger, smaller = evaluate(objective, norm(t)), evaluate(objective, norm(t / 2))
            if smaller > 0 and math.isfinite(larger):
                length = math.log2(larger / smaller)
                if abs(length - round(length)) < 0.05:
                    return round(length)
    raise ValueError(
        "the length of the shortest path from input to output could not be found: no path leads there, or it is "
        "too long for float64. Check that the network's output depends on its input."
    )


def effective_mask(
    apply_fn: ApplyFn, input_shape: Sequence[int], params: Params, mask: Mask
) -> Mask:
    """The kept weights that lie on a path from input to output; the others change no output.

    total / kept of this mask is the *effective* compression, which is at least that of `mask`.

    Args and shapes as `log10_path_norm`. Weights that are 0 lie on no path.
    """
    # Every weight that is there counts the same, so that no path is too thin to be seen.
    ones = trees.map_prunable(lambda m, w: (m & (w != 0)).astype(w.dtype), mask, params)
    params = trees.without_biases(trees.merge(ones, params))
    flow = _jitted_scores(scores.synflow(apply_fn, input_shape), params, mask)
    return jax.tree.map(lambda m, s: m & (s > 0), mask, flow)


def critical_compression(
    score_fn: ScoreFn,
    apply_fn: ApplyFn,
    input_shape: Sequence[int],
    params: Params,
    *,
    mask: Mask | None = None,
    num_iterations: int = 1,
    resolution: float = 0.01,
    **options: Any,
) -> float:
    """The largest compression at which a rule leaves a path from input to output (Section 3), by bisection.

    Args:
      score_fn: a rule; see `synflow_jax.scores`.
      apply_fn, input_shape, params: as `log10_path_norm`.
      mask: what is prunable; all kernels by default.
      num_iterations: of the rule. A rule of one iteration is scored once for all compressions.
      resolution: in powers of ten; how close the bisection comes.
      **options: more of `pruning.prune`: schedule, scope, key, ...

    Returns:
      A compression at which the network has not collapsed, while 10^resolution times that it has; or the maximal
      compression, if it has not collapsed there. (A rule that recovers beyond its first collapse is given as that of
      one of its collapses.)

    >>> params = {"fc": {"kernel": jnp.arange(1.0, 9).reshape(2, 4)}, "head": {"kernel": 0.1 * jnp.ones((4, 1))}}
    >>> apply_fn = lambda p, x: x @ p["fc"]["kernel"] @ p["head"]["kernel"]
    >>> round(critical_compression(scores.magnitude(), apply_fn, (2,), params), 1)  # the head goes at once
    1.1
    >>> critical_compression(scores.synflow(apply_fn, (2,)), apply_fn, (2,), params, num_iterations=10)
    6.0
    """
    mask = trees.prunable(params) if mask is None else mask
    if num_iterations == 1:
        key, dtype = options.get("key"), options.get("score_dtype")
        score_fn = scores.fixed(
            pruning.first_scores(score_fn, params, key=key, mask=mask, score_dtype=dtype)
        )

    def survives(compression: float) -> bool:
        found, _ = pruning.prune(
            score_fn,
            params,
            compression=compression,
            mask=mask,
            num_iterations=num_iterations,
            **options,
        )
        return not collapsed(apply_fn, input_shape, params, found)

    low, high = 1.0, max_compression(apply_fn, input_shape, mask, params)
    if survives(high):
        return high
    while math.log10(high / low) > resolution:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if survives(middle) else (low, middle)
    return low


def multiply_adds(mask: Mask, positions: Mapping[str, int]) -> tuple[int, int]:
    """(kept, total) multiply-adds of one example: each weight works once at each position of its layer's output.

    Args:
      mask: bool arrays, or holes.
      positions: per leaf name, the height times width of the layer's output; 1 where absent.
    """
    names, leaves = trees.names(mask), jax.tree.leaves(mask)
    uses = [positions.get(name, 1) for name in names]
    kept = sum(int(np.count_nonzero(np.asarray(m))) * n for m, n in zip(leaves, uses, strict=True))
    return kept, sum(m.size * n for m, n in zip(leaves, uses, strict=True))


def _log10_norm(apply_fn: ApplyFn, input_shape: Sequence[int], params: Params) -> float:
    objective = path_norm(apply_fn, input_shape)
    norm = _evaluate(objective, params)
    if norm > 0 and math.isfinite(norm):
        return math.log10(norm)
    # 0 may be underflow, inf and NaN overflow: only a power of two beside the values tells. It compiles for longer.
    return scaling.log10(_jitted_scaled(objective, params))


_jitted_scores = jax.jit(lambda score_fn, params, mask: score_fn(params, mask, jax.random.key(0)))
_jitted = jax.jit(lambda objective, params: objective(params))
_jitted_scaled = jax.jit(lambda objective, params: scaling.evaluate(objective, params))


def _evaluate(objective: Objective, params: Params) -> float:
    return float(_jitted(objective, params))


def _evaluate_in_float64(objective: Objective, params: Params) -> float:
    """On the host: accelerators have slow float64, or none."""

    def widen(leaf: jax.Array) -> jax.Array:
        is_float = jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
        return jnp.asarray(np.asarray(leaf, np.float64)) if is_float else leaf

    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
        return float(_jitted(jax.tree.map(widen, objective), jax.tree.map(widen, params)))
