"""Writes and verifies the certificates of the certified schedule.

A certificate says which weights each iteration pruned. It shows that no iteration can have
disconnected the network (Theorem 3), and `verify` does not rely on the run that made it: it draws
the network again, takes SynFlow's scores in float64 before each iteration, and compares the total
score of the weights that were pruned with that of the smallest cut. Then it compares what it found
with every number that the certificate records.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from synflow_jax import certified, models, scores, storage, trees
from synflow_jax.experiments import initialization, rows
from synflow_jax.experiments.run import Run, from_dict
from synflow_jax.jaxprs.compiled import bounded_jit
from synflow_jax.models import Network
from synflow_jax.pruning import PruneInfo
from synflow_jax.storage import schema
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


# Of a fraction of a cut, and of log10 of a cut. A run computes both in float32, whose rounding
# differs between machines by up to 1e-5 in the deepest networks. The schedule leaves 1e-3 of a cut.
_TOLERANCE = 1e-3

_SCHEMA: schema.Schema = {
    "run_id": schema.TEXT,
    "kept": schema.POSITIVE,
    "largest_cut_fraction": schema.NUMBER,
    "mask_sha256": schema.TEXT,
    "iterations": [
        {"kept": schema.POSITIVE, "cut_fraction": schema.NUMBER, "log10_cut": schema.NUMBER},
        ...,
    ],
    "config": {},
}
_KEYS = (
    "run_id",
    "kept",
    "largest_cut_fraction",
    "mask_sha256",
    "iterations.kept",
    "iterations.cut_fraction",
    "iterations.log10_cut",
    "config",
)


def verify(
    path: str | os.PathLike[str],
    on_progress: Callable[[int, int], None] | None = None,
    *,
    init: str | None = None,
) -> Verdict:
    """Verifies every iteration of a certificate, independently of the run that wrote it.

    Every number that the certificate records is computed again.

    Args:
      path: of the JSON file; see `storage.load_certificate`.
      on_progress: called as `on_progress(num_done, num_iterations)`: once the files are checked,
        and after each iteration.
      init: the file of weights that the run began from, if it did.

    Raises:
      ValueError: the certificate does not hold, or its files are not of one run; names the file,
        the key, the value that it records and the one that was computed.
    """
    certificate, removed_in = storage.load_certificate(path)
    name = f"certificate {str(path)!r}"
    cure = "It was edited or damaged: take another file, or prune again."
    schema.check(certificate, _SCHEMA, _KEYS, lambda: name, cure)
    try:
        run = from_dict(certificate["config"], init)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{name}: {error}") from error
    _compare(name, "run_id", certificate["run_id"], run.prune_id)
    _compare(name, "config.prune.schedule", run.config.prune.schedule, "certified")
    network = initialization.build(run)
    _check_layers(name, removed_in, network)
    _check_counts(name, certificate, removed_in, run, network)
    iterations = certificate["iterations"]
    num_iterations = len(iterations)
    if on_progress is not None:
        on_progress(0, num_iterations)
    fractions = []
    with jax.enable_x64(True):
        replay = _make_replay(network, removed_in)
        for i, recorded in enumerate(iterations, start=1):
            pruned, cut, log10_unit = replay(i)
            fraction = pruned / cut if cut > 0 else math.inf
            # Not `fraction >= 1`, which accepts NaN.
            if not fraction < 1:
                raise ValueError(
                    f"{name} does not hold: iteration {i} pruned {fraction:.6g} times what the "
                    "smallest cut is known to hold, which may have disconnected the network."
                )
            key = f"iterations[{i - 1}]"
            log10_cut = math.log10(cut) + log10_unit
            _compare(name, f"{key}.cut_fraction", recorded["cut_fraction"], fraction, _TOLERANCE)
            _compare(name, f"{key}.log10_cut", recorded["log10_cut"], log10_cut, _TOLERANCE)
            fractions.append(fraction)
            if on_progress is not None:
                on_progress(i, num_iterations)
        # The cut before an iteration that never was is the cut after the last one.
        _, cut, _ = replay(num_iterations + 1)
        if not cut > 0:
            raise ValueError(f"{name} does not hold: no path is left in the end.")
    largest = max(fractions)
    recorded_largest = certificate["largest_cut_fraction"]
    _compare(name, "largest_cut_fraction", recorded_largest, largest, _TOLERANCE)
    return Verdict(certificate["run_id"], num_iterations, certificate["kept"], largest)


def _compare(name: str, key: str, recorded: Any, computed: Any, tolerance: float = 0) -> None:
    """Raises ValueError unless a recorded value is the one that was computed.

    Args:
      name: of the certificate, for the message.
      key: of the value.
      recorded, computed: two numbers, or two texts.
      tolerance: how far two numbers may differ.
    """
    if recorded == computed or (tolerance and abs(recorded - computed) <= tolerance):
        return
    raise ValueError(
        f"{name} does not hold: it records {key}={recorded!r}, but computing it again gives "
        f"{computed!r}."
    )


def _check_layers(name: str, removed_in: Mapping[str, np.ndarray], network: Network) -> None:
    """Raises ValueError unless the arrays of a certificate are of the layers of its network."""
    leaves = trees.by_name(network.mask)
    shapes = {layer: tuple(leaf.shape) for layer, leaf in leaves.items()}
    found = {layer: leaf.shape for layer, leaf in removed_in.items()}
    if found != shapes:
        raise ValueError(f"{name} is of other layers ({found}) than its network has ({shapes}).")


def _check_counts(
    name: str,
    certificate: Mapping[str, Any],
    removed_in: Mapping[str, np.ndarray],
    run: Run,
    network: Network,
) -> None:
    """Checks all of a certificate that needs no scores.

    Raises:
      ValueError: a recorded value is not the one that follows from the arrays and the config.
    """
    layers = [removed_in[layer] == 0 for layer in trees.names(network.mask)]
    mask = jax.tree.unflatten(jax.tree.structure(network.mask), layers)
    digest = storage.mask_digest(mask)
    if certificate["mask_sha256"] != digest:
        raise ValueError(
            f"{name} is of another mask than it says: it records "
            f"mask_sha256={certificate['mask_sha256']!r}, but computing it again gives {digest!r}."
        )
    steps = certificate["iterations"]
    if len(steps) > run.num_iterations:
        raise ValueError(
            f"{name} does not hold: it lists {len(steps)} iterations, and its config allows "
            f"{run.num_iterations}."
        )
    # Weights of an iteration that is not listed would never be looked at.
    last_iteration = max(int(leaf.max(initial=0)) for leaf in removed_in.values())
    if last_iteration > len(steps):
        raise ValueError(
            f"{name} prunes weights in iteration {last_iteration}, and lists only {len(steps)}."
        )
    kept = _kept_after(removed_in, len(steps))
    for i, (step, num_kept) in enumerate(zip(steps, kept, strict=True)):
        _compare(name, f"iterations[{i}].kept", step["kept"], num_kept)
    _compare(name, "kept", certificate["kept"], kept[-1])
    total = sum(trees.sizes(network.mask))
    goal = certified.num_kept(total, run.config.prune.compression)
    if kept[-1] < goal:
        raise ValueError(
            f"{name} does not hold: kept={kept[-1]} of {total} weights, and its config asks for "
            f"{goal}."
        )


def _kept_after(removed_in: Mapping[str, np.ndarray], num_iterations: int) -> list[int]:
    """Returns how many weights are left after each iteration."""
    num_removed = np.zeros(num_iterations + 1, np.int64)
    for leaf in removed_in.values():
        numbers = leaf.reshape(-1).astype(np.int64)
        num_removed += np.bincount(numbers, minlength=num_iterations + 1)
    # Weights with the number 0 are kept.
    total = int(num_removed.sum())
    kept: list[int] = (total - np.cumsum(num_removed[1:])).tolist()
    return kept


def _make_replay(
    network: Network, removed_in: Mapping[str, np.ndarray]
) -> Callable[[int], tuple[float, float, float]]:
    """Returns a function of an iteration: its pruned score, the smallest cut, log10 of their unit.

    It is to be used with float64 enabled.

    Raises:
      ValueError: Theorem 3 does not hold for the network.
    """
    apply_fn = models.synflow_fn(network.model, network.batch_stats)
    rule = scores.synflow(apply_fn, network.input_shape)
    # Biases count as 0: their flow does not come from the input, and a cut bounds only flow that
    # does.
    without_biases = certified.check(rule, network.params, network.mask)
    flow_fn, params = jax.tree.map(_widen, (rule.flow, without_biases))
    iterations = [jnp.asarray(removed_in[name]) for name in trees.names(network.mask)]
    tree = jax.tree.unflatten(jax.tree.structure(network.mask), iterations)

    def replay(iteration: int) -> tuple[float, float, float]:
        pruned, cut, exponent = _pruned_and_cut(flow_fn, params, tree, iteration)
        return float(pruned), float(cut), int(exponent) * math.log10(2)

    return replay


def _widen(leaf: Any) -> jax.Array:
    """Turns floats into float64."""
    is_float = jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
    return jnp.asarray(leaf, jnp.float64) if is_float else leaf


@bounded_jit
def _pruned_and_cut(
    flow_fn: scores.FlowFn, params: Params, removed_in: Tree, iteration: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the score that an iteration pruned and the smallest cut before it.

    Both are to be multiplied by two to the power of the third result.
    """
    mask = jax.tree.map(lambda n: (n == 0) | (n >= iteration), removed_in)
    flow = flow_fn(params, mask, jax.random.key(0))

    def pruned_score(number: jax.Array, score: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(number == iteration, score, 0))

    pruned = jax.tree.map(pruned_score, removed_in, flow.scores)
    return jax.tree.reduce(jnp.add, pruned), flow.cut, flow.exponent
