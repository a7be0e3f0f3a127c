"""Builds the row of a pruning run: its settings, its layers, and how its iterations went.

A row is one line of rows.jsonl. Its keys are a file format: they do not change.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np

from synflow_jax import analysis, models, trees, units
from synflow_jax.experiments.run import Run
from synflow_jax.models import Network
from synflow_jax.pruning import PruneInfo
from synflow_jax.trees import Mask, Scores


def prune_row(
    run: Run,
    network: Network,
    mask: Mask,
    info: PruneInfo,
    *,
    initial: Scores | None,
    maximum: float,
) -> dict[str, Any]:
    """Returns the row of a run, as plain values, without the names and digests of its files.

    Args:
      run: the one that was pruned.
      network: from `initialization.build`.
      mask: the result.
      info: the record of the iterations.
      initial: the scores before pruning, if they are known.
      maximum: from `initialization.max_compression`.
    """
    config, prune = run.config, run.config.prune
    apply_fn = models.synflow_fn(network.model, network.batch_stats)
    masked = (apply_fn, network.params, mask, network.input_shape)
    positions = models.output_positions(network.model, network.input_shape)
    multiply_adds_kept, multiply_adds = analysis.multiply_adds(mask, positions)
    magnitudes = _initial_magnitudes(run, info, initial)
    total = sum(trees.sizes(mask))
    num_kept = int(np.sum(info.kept[-1]))
    return {
        "run_id": run.prune_id,
        "model": config.model,
        "dataset": config.dataset,
        "scored_dataset": run.scored_dataset,
        "pruner": prune.pruner,
        "compression": prune.compression,
        "seed": config.seed,
        "num_iterations": run.num_iterations,
        "schedule": prune.schedule,
        "scope": prune.scope,
        "mode": prune.mode,
        "nested": prune.nested,
        "ablation": prune.ablation,
        "total": total,
        "kept": num_kept,
        "reached_compression": total / max(1, num_kept),
        "layers": _layers(mask, info, magnitudes, positions),
        "multiply_adds": multiply_adds,
        "multiply_adds_kept": multiply_adds_kept,
        "collapsed": analysis.collapsed(*masked),
        "log10_objective": analysis.log10_path_norm(*masked),
        "max_compression": maximum,
        "largest_cut_fraction": _largest(cut_fractions(info)),
        "iterations": _iterations(info),
        "config": run.prune_dict,
    }


def _layers(
    mask: Mask,
    info: PruneInfo,
    magnitudes: list[float | None],
    positions: dict[str, int],
) -> list[dict[str, Any]]:
    """Returns, for each layer, its size and its scores."""
    kept, totals = np.asarray(info.kept), np.asarray(info.score_total)
    named = zip(trees.names(mask), jax.tree.leaves(mask), strict=True)
    layers = []
    for i, (name, leaf) in enumerate(named):
        layer = {
            "name": name,
            "shape": list(leaf.shape),
            "size": leaf.size,
            "kept": int(kept[-1, i]),
            "initial_score": float(totals[0, i]),
            "initial_magnitude": magnitudes[i],
            # Of the weights that were kept before the last iteration.
            "score": float(totals[-1, i]),
            # A layer that is no convolution is applied once.
            "positions": positions.get(name, 1),
        }
        layers.append(layer)
    return layers


def _iterations(info: PruneInfo) -> dict[str, list[Any]]:
    """Returns, for each iteration, what is left and what was pruned.

    An iteration's scores are in units of 2^log2_unit; a layer's score is in that of the last one.
    """
    totals = np.asarray(info.score_total, np.float64)
    return {
        "kept": np.asarray(info.kept).sum(axis=1).tolist(),
        "min_layer_score": totals.min(axis=1).tolist(),
        "pruned_score": np.asarray(info.pruned_score, np.float64).tolist(),
        "log10_cut": _log10_cut(info),
        "log2_unit": np.asarray(info.exponent).tolist(),
    }


def cut_fractions(info: PruneInfo) -> list[float]:
    """Returns, for each iteration, the score that it pruned as a fraction of the smallest cut.

    inf where the cut was empty, or is not known.
    """
    pruned = np.asarray(info.pruned_score, np.float64)
    cut = np.asarray(info.cut, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        fractions = pruned / cut
    return np.where(cut == 0, np.inf, fractions).tolist()


def _largest(fractions: list[float]) -> float | None:
    """Returns the largest fraction of a cut; None for a rule without cuts."""
    finite = [fraction for fraction in fractions if math.isfinite(fraction)]
    return max(finite, default=None)


def _log10_cut(info: PruneInfo) -> list[float]:
    """Returns log10 of the smallest cut before each iteration, its unit included."""
    with np.errstate(divide="ignore"):
        digits = np.log10(np.asarray(info.cut, np.float64))
    # Scores are in units of 2^exponent, which as a number can overflow.
    unit = np.log10(2) * np.asarray(info.exponent)
    return (digits + unit).tolist()


def _initial_magnitudes(run: Run, info: PruneInfo, initial: Scores | None) -> list[float | None]:
    """Returns, for each layer, the sum of |score| before pruning; None if it is not known."""
    # In train mode, batch norm subtracts the mean of the batch, and scores can be negative.
    if run.pruner.non_negative and not run.trains_batch_norm:
        # All scores have one sign (a negative one, if they are inverted).
        return [abs(float(total)) for total in info.score_total[0]]
    if initial is None:
        return [None] * info.score_total.shape[1]
    arrays = map(np.asarray, jax.tree.leaves(initial))
    return [float(np.sum(np.abs(array), dtype=np.float64)) for array in arrays]


def unit_scores(network: Network, initial: Scores) -> dict[str, dict[str, list[float]]]:
    """Returns the incoming and the outgoing score of every hidden unit, to six digits.

    Args:
      network: from `initialization.build`.
      initial: the scores before pruning.

    Returns:
      {group: {"incoming": [one number per unit], "outgoing": [one number per unit]}}, in the order
      of the network.
    """
    apply_fn = models.synflow_fn(network.model, network.batch_stats)
    groups = units.groups(apply_fn, network.params, network.input_shape)
    hidden = [group for group in groups if not (group.is_input or group.is_output)]
    found = {}
    for name, (incoming, outgoing) in units.unit_scores(hidden, initial).items():
        found[name] = {"incoming": _rounded(incoming), "outgoing": _rounded(outgoing)}
    return found


def _rounded(values: Any) -> list[float]:
    """Rounds to six digits."""
    return [float(f"{value:.6g}") for value in values]
