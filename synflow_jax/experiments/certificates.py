"""Writes and verifies the certificates of the certified schedule.

A certificate says which weights each iteration pruned. It shows that no iteration can have
disconnected the network (Theorem 3), and `verify` does not rely on the run that made it: it draws
the network again, takes SynFlow's scores in float64 before each iteration, and compares the total
score of the weights that were pruned with that of the smallest cut.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from synflow_jax import models, scores, storage, trees
from synflow_jax.experiments import initialization, rows
from synflow_jax.experiments.run import from_dict
from synflow_jax.models import Network
from synflow_jax.pruning import PruneInfo
from synflow_jax.trees import Params, Tree


def certificate(row: Mapping[str, Any], info: PruneInfo) -> dict[str, Any]:
    """Returns the certificate of a run, without the arrays of `info.removed_in`.

    Args:
      row: from `rows.prune_row`, with the digest of the mask.
      info: from `certified.prune`.
    """
    iterations = zip(
        row["iterations"]["kept"],
        rows.cut_fractions(info),
        row["iterations"]["log10_cut"],
        strict=True,
    )
    return {
        "run_id": row["run_id"],
        "claim": "no iteration pruned weights of a total score of a cut or more, so that none can "
        "have disconnected the network (Theorem 3); prune.py --verify looks at every iteration "
        "again",
        "kept": row["kept"],
        "largest_cut_fraction": row["largest_cut_fraction"],
        "mask_sha256": row["mask_sha256"],
        "iterations": [
            {"kept": kept, "cut_fraction": fraction, "log10_cut": log10_cut}
            for kept, fraction, log10_cut in iterations
        ],
        "config": row["config"],
    }


class Verdict(NamedTuple):
    """The result of a certificate that holds.

    run_id: of the run.
    num_iterations: of the run.
    kept: how many weights are left.
    largest_fraction: the largest score that an iteration pruned, as a fraction of the smallest cut
      before it, in float64.
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
    """Verifies every iteration of a certificate, independently of the run that wrote it.

    Args:
      path: of the JSON file; see `storage.load_certificate`.
      on_progress: called as `on_progress(num_done, num_iterations)`: once the files are checked,
        and after each iteration.
      init: the file of weights that the run began from, if it did.

    Raises:
      ValueError: the certificate does not hold, or its files are not of one run; says which
        iteration or which file.
    """
    certificate, removed_in = storage.load_certificate(path)
    network = initialization.build(from_dict(certificate["config"], init))
    _check_layers(path, certificate, removed_in, network)
    num_iterations = len(certificate["iterations"])
    if on_progress is not None:
        on_progress(0, num_iterations)
    fractions = []
    with jax.enable_x64(True):
        replay = _make_replay(network, removed_in)
        for i in range(1, num_iterations + 1):
            pruned, cut = replay(i)
            fraction = pruned / cut if cut > 0 else math.inf
            # Not `fraction >= 1`, which accepts NaN.
            if not fraction < 1:
                raise ValueError(
                    f"certificate {str(path)!r} does not hold: iteration {i} pruned {fraction:.6g} "
                    "times what the smallest cut is known to hold, which may have disconnected the "
                    "network."
                )
            fractions.append(fraction)
            if on_progress is not None:
                on_progress(i, num_iterations)
        # The cut before an iteration that never was is the cut after the last one.
        _, cut = replay(num_iterations + 1)
        if not cut > 0:
            raise ValueError(
                f"certificate {str(path)!r} does not hold: no path is left in the end."
            )
    return Verdict(
        certificate["run_id"],
        num_iterations,
        kept=sum(int(np.count_nonzero(leaf == 0)) for leaf in removed_in.values()),
        largest_fraction=max(fractions, default=0.0),
    )


def _check_layers(
    path: str | os.PathLike[str],
    certificate: Mapping[str, Any],
    removed_in: Mapping[str, np.ndarray],
    network: Network,
) -> None:
    """Checks that a certificate, its arrays and its network belong together.

    Raises:
      ValueError: the layers, the iterations or the mask differ.
    """
    leaves = trees.by_name(network.mask)
    sizes = {name: int(leaf.size) for name, leaf in leaves.items()}
    found = {name: int(leaf.size) for name, leaf in removed_in.items()}
    if found != sizes:
        raise ValueError(
            f"certificate {str(path)!r} is of other layers ({found}) than its network has."
        )
    # Weights of an iteration that is not listed would never be looked at.
    last_iterations = [int(leaf.max()) for leaf in removed_in.values()]
    if max(last_iterations) > len(certificate["iterations"]):
        raise ValueError(
            f"certificate {str(path)!r} prunes weights in iterations that it does not list."
        )
    kept = [removed_in[name] == 0 for name in sizes]
    mask = jax.tree.unflatten(jax.tree.structure(network.mask), kept)
    if certificate["mask_sha256"] != storage.mask_digest(mask):
        raise ValueError(f"certificate {str(path)!r} is of another mask than it says.")


def _make_replay(
    network: Network, removed_in: Mapping[str, np.ndarray]
) -> Callable[[int], tuple[float, float]]:
    """Returns a function of an iteration that computes its `_pruned_and_cut`.

    It is to be used with float64 enabled.
    """
    apply_fn = models.synflow_fn(network.model, network.batch_stats)
    rule = scores.synflow(apply_fn, network.input_shape)
    assert rule.flow is not None
    # Biases count as 0: their flow does not come from the input, and a cut bounds only flow that
    # does.
    without_biases = trees.without_biases(network.params)
    flow_fn, params = jax.tree.map(_widen, (rule.flow, without_biases))
    iterations = [jnp.asarray(removed_in[name]) for name in trees.names(network.mask)]
    tree = jax.tree.unflatten(jax.tree.structure(network.mask), iterations)

    def replay(iteration: int) -> tuple[float, float]:
        pruned, cut = _pruned_and_cut(flow_fn, params, tree, iteration)
        return float(pruned), float(cut)

    return replay


def _widen(leaf: Any) -> jax.Array:
    """Turns floats into float64."""
    is_float = jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
    return jnp.asarray(leaf, jnp.float64) if is_float else leaf


@jax.jit
def _pruned_and_cut(
    flow_fn: scores.FlowFn, params: Params, removed_in: Tree, iteration: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the score that an iteration pruned and the smallest cut before it, in one unit."""
    mask = jax.tree.map(lambda n: (n == 0) | (n >= iteration), removed_in)
    flow = flow_fn(params, mask, jax.random.key(0))

    def pruned_score(number: jax.Array, score: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(number == iteration, score, 0))

    pruned = jax.tree.map(pruned_score, removed_in, flow.scores)
    return jax.tree.reduce(jnp.add, pruned), flow.cut
