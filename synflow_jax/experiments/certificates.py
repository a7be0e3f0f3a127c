"""Whether a certificate of the certified schedule holds: every iteration of the run, looked at once more.

A certificate says which weights each iteration pruned. That no iteration can have disconnected the network (Theorem 3)
needs no trust in the run that made it: `verify` draws the network anew, takes SynFlow's scores in float64 before each
iteration and compares the total score of what went with what the smallest cut held.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from synflow_jax import models, scores, storage, trees
from synflow_jax.experiments import config, prune_run


class Verdict(NamedTuple):
    """What a certificate that holds has shown.

    num_iterations, kept: of the run. largest_fraction: the most that an iteration pruned of a cut, in float64.
    run_id: of the run.
    """

    run_id: str
    num_iterations: int
    kept: int
    largest_fraction: float


def verify(
    path: str | os.PathLike[str],
    on_progress: Callable[[int, int], None] | None = None,
    *,
    init: str | None = None,
) -> Verdict:
    """Looks at every iteration of a certificate's run, independently of what the run itself has computed.

    Args:
      path: of the JSON file; see `storage.load_certificate`.
      on_progress: called as `on_progress(num_done, num_iterations)`.
      init: the file of weights, where the run began from one.

    Raises:
      ValueError: it does not hold, or its files are not what they should be; says what is wrong and in which iteration.
    """
    certificate, removed_in = storage.load_certificate(path)
    settings = config.from_dict(certificate["config"])
    if init is not None and settings.init is not None:
        recorded, settings.init = settings.init, init
        if config.init_digest(settings) != recorded:
            raise ValueError(
                f"init={init!r} is not the file that the run of certificate {str(path)!r} began from."
            )
    network = prune_run.build(settings)
    names, sizes = trees.names(network.mask), trees.sizes(network.mask)
    found = {name: int(leaf.size) for name, leaf in removed_in.items()}
    if found != dict(zip(names, sizes, strict=True)):
        raise ValueError(
            f"certificate {str(path)!r} is of other layers ({found}) than its network has."
        )
    numbers = [removed_in[name] for name in names]
    structure = jax.tree.structure(network.mask)
    num_iterations = len(certificate["iterations"])
    if max(int(leaf.max()) for leaf in numbers) > num_iterations:
        raise ValueError(
            f"certificate {str(path)!r} prunes weights in iterations that it does not list."
        )
    if certificate["mask_sha256"] != storage.mask_digest(
        jax.tree.unflatten(structure, [n == 0 for n in numbers])
    ):
        raise ValueError(f"certificate {str(path)!r} is of another mask than it says.")

    apply_fn = models.synflow_fn(network.model, network.batch_stats)
    fractions = []
    with jax.enable_x64(True):
        score_fn, params = jax.tree.map(
            _widen,
            (scores.synflow(apply_fn, network.input_shape), trees.without_biases(network.params)),
        )
        iterations = jax.tree.unflatten(structure, [jnp.asarray(n) for n in numbers])
        for i in range(1, num_iterations + 1):
            pruned, cut = _pruned_and_cut(score_fn.flow, params, iterations, i)
            fractions.append(float(pruned) / float(cut) if cut > 0 else math.inf)
            if not fractions[-1] < 1:
                raise ValueError(
                    f"certificate {str(path)!r} does not hold: iteration {i} pruned {fractions[-1]:.6g} times what the "
                    "smallest cut is known to hold, which may have disconnected the network."
                )
            if on_progress is not None:
                on_progress(i, num_iterations)
        _, cut = _pruned_and_cut(score_fn.flow, params, iterations, num_iterations + 1)
        if not cut > 0:
            raise ValueError(
                f"certificate {str(path)!r} does not hold: no path is left in the end."
            )
    kept = sum(int(np.count_nonzero(n == 0)) for n in numbers)
    return Verdict(certificate["run_id"], num_iterations, kept, max(fractions, default=0.0))


def _widen(leaf: Any) -> jax.Array:
    is_float = jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
    return jnp.asarray(leaf, jnp.float64) if is_float else leaf


@jax.jit
def _pruned_and_cut(
    flow_fn: scores.FlowFn, params: trees.Params, removed_in: trees.Tree, iteration: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """What an iteration pruned, and what the smallest cut held before it, in one unit."""
    mask = jax.tree.map(lambda n: (n == 0) | (n >= iteration), removed_in)
    flow = flow_fn(params, mask, jax.random.key(0))
    gone = jax.tree.map(
        lambda n, s: jnp.sum(jnp.where(n == iteration, s, 0)), removed_in, flow.scores
    )
    return jax.tree.reduce(jnp.add, gone), flow.cut
